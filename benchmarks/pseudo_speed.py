"""What labelling costs beside evaluating, and a joint step beside a plain one, turn by turn in one run.

    python -m benchmarks.pseudo_speed --out FILE            about five minutes on two quiet cores
    python -m benchmarks.pseudo_speed --quick               small counts, for a look: no number to quote

Labelling and evaluating: the same JPEG pictures of 500 x 375 in shards, the same run, precision and readers
(lambda_resnet50 at 160 px), each turn in a process of its own, timed after the imports; the labels of every turn must
be the classes that the evaluation predicts. Labelling may be the faster one: its teacher is fused.
Joint and plain steps: one recipe, model and batch; what is compared is images a second of an epoch of training, by the
run's own record. The first batches: two of 4,096 from a selection of 130 million draws, as a reader makes them.
Ratios are medians over interleaved turns, with their spread. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.detector_outside import held_mb
from benchmarks.op import machine
from lambdanets.files import write_atomically

CLASSES = 4
TARGETS = {
    "label_over_evaluate": 0.95,
    "label_without_hashes_over_evaluate": 1.0,
    "joint_over_plain": 0.97,
    "first_batches_s": 1.0,
    "first_batches_mb": 50.0,
}


def pictures(folder: Path, train: int, val: int, px: tuple[int, int]) -> None:
    """Noise under smooth shades, as JPEG files of a photograph's size, by class; no two are alike."""
    draw = np.random.default_rng(0)
    for split, n in (("train", train), ("val", val)):
        for i in range(n):
            shade = Image.fromarray(draw.integers(0, 255, (6, 8, 3), np.uint8)).resize(px, Image.Resampling.BICUBIC)
            noise = draw.normal(0, 12, (px[1], px[0], 3))
            path = folder / split / str(i % CLASSES) / f"{i:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.clip(np.asarray(shade) + noise, 0, 255).astype(np.uint8)).save(path, quality=90)


def apart(call: Callable[..., Any], *arguments: Any) -> Any:
    """What a call gives in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(call, arguments)


def evaluated(run: str, data: str, out: str, threads: int) -> dict[str, Any]:

    from lambdanets.classification.evaluate_run import evaluate_run

    torch.set_num_threads(threads)
    before_mb, start = held_mb("VmRSS"), time.perf_counter()
    found = evaluate_run(run, data, out=out, device=torch.device("cpu"))
    s = time.perf_counter() - start
    return {
        "s": s,
        "peak_mb": held_mb("VmHWM") - before_mb,
        "images": found.scores.n,
        "classes": found.scores.predicted,
    }


def labelled(run: str, data: str, out: str, threads: int, hashes: bool) -> dict[str, Any]:
    import pyarrow.parquet as parquet

    from lambdanets.pseudo_labels.label_shards import Wishes, label

    torch.set_num_threads(threads)
    before_mb, start = held_mb("VmRSS"), time.perf_counter()
    label(Wishes(run, data, out, device="cpu", hashes=hashes), said=lambda line: None)
    s = time.perf_counter() - start
    files = sorted(Path(out).glob("*.parquet"))
    classes = [c for path in files for c in parquet.read_table(path, columns=["class"])["class"].to_pylist()]
    return {"s": s, "peak_mb": held_mb("VmHWM") - before_mb, "images": len(classes), "classes": classes}


def ratio(of: Sequence[dict[str, Any]], over: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Images a second of `of` over those of `over`, pair by pair."""
    each = [(a["images"] / a["s"]) / (b["images"] / b["s"]) for a, b in zip(of, over, strict=True)]
    return {"median": round(statistics.median(each), 3), "least": round(min(each), 3), "most": round(max(each), 3)}


def labelling(place: Path, n: int, turns: int, threads: int) -> dict[str, Any]:
    from lambdanets.classification.train import train
    from lambdanets.data.pack import pack
    from lambdanets.recipes import choose
    from lambdanets.recipes.recipe import Options

    pictures(place / "pictures", CLASSES, n, (500, 375))
    shards, run = place / "shards", place / "run"
    pack(place / "pictures", shards, shard_bytes=64 << 20)
    recipe = replace(choose("folder", batch_images=2), steps=1, warmup_epochs=0.0, name="teacher")
    train(recipe, shards, out=run, device="cpu", options=Options(save_minutes=0))
    turned: dict[str, list[dict[str, Any]]] = {"evaluate": [], "label": [], "label_without_hashes": []}
    for turn in range(turns):
        out = place / f"turn{turn}"
        turned["evaluate"].append(apart(evaluated, str(run), str(shards), f"{out}-evaluation", threads))
        turned["label"].append(apart(labelled, str(run), str(shards), f"{out}-labels", threads, True))
        turned["label_without_hashes"].append(apart(labelled, str(run), str(shards), f"{out}-plain", threads, False))
        predicted = turned["evaluate"][-1]["classes"]
        for name in ("label", "label_without_hashes"):
            classes = turned[name][-1].pop("classes")[-len(predicted) :]  # the training shards come first
            if classes != predicted:
                wrong = sum(a != b for a, b in zip(classes, predicted, strict=True))
                raise SystemExit(f"{name}: {wrong} of {len(predicted)} labels are not what the evaluation predicts")
        turned["evaluate"][-1].pop("classes")
    return {
        "pictures": n,
        "label_over_evaluate": ratio(turned["label"], turned["evaluate"]),
        "label_without_hashes_over_evaluate": ratio(turned["label_without_hashes"], turned["evaluate"]),
        "memory_beyond_evaluate_mb": round(
            statistics.median(of["peak_mb"] for of in turned["label"])
            - statistics.median(of["peak_mb"] for of in turned["evaluate"])
        ),
        "turns": turned,
    }


def trained(data: str, selection: str, out: str, steps: int, threads: int) -> dict[str, Any]:
    """Images a second of all epochs but the first, of a plain run, or of a joint one where there is a selection."""

    from lambdanets.classification import train as plain
    from lambdanets.pseudo_labels import train as joint
    from lambdanets.recipes import choose
    from lambdanets.recipes.pseudo_labels import Mixture
    from lambdanets.recipes.recipe import Options

    torch.set_num_threads(threads)
    recipe = choose("folder", small=True, batch_images=64)
    recipe = replace(recipe, steps=steps, warmup_epochs=0.0, eval_epochs=1_000_000)
    how: dict[str, Any] = {"out": out, "device": "cpu", "options": Options(save_minutes=0)}
    done = (
        joint.train(recipe, data, selection, Mixture(), unchecked_overlap=True, **how)
        if selection
        else plain.train(recipe, data, **how)
    )
    s = sum(row["train_s"] for row in done.history[1:])
    return {"s": s, "images": sum(row["train_s"] * row["images_per_s"] for row in done.history[1:])}


def steps_of_both(place: Path, steps: int, turns: int, threads: int) -> dict[str, Any]:
    from lambdanets.cli import main as command

    pictures(place / "small", 256, 64, (64, 64))
    flat, run = place / "flat", place / "steps-run"
    flat.mkdir()
    for i, path in enumerate(sorted((place / "small" / "train").rglob("*.jpg"))):
        shutil.copy(path, flat / f"{i}.jpg")
    shards, labels, selection = place / "flat-shards", place / "flat-labels", place / "flat-selection"
    data = place / "small"
    trained(str(data), "", str(run), 2, threads)
    for words in (
        ["pack", str(flat), str(shards), "--unlabelled"],
        ["label", str(run), "--data", str(shards), "--out", str(labels), "--device", "cpu"],
        ["select", str(labels), "--out", str(selection), "--confidence", "0"],
    ):
        if code := command(words):
            raise SystemExit(f"lambdanets {' '.join(words)}: exit code {code}")
    turned: dict[str, list[dict[str, Any]]] = {"plain": [], "joint": []}
    for turn in range(turns):
        turned["plain"].append(apart(trained, str(data), "", str(place / f"plain{turn}"), steps, threads))
        turned["joint"].append(apart(trained, str(data), str(selection), str(place / f"joint{turn}"), steps, threads))
    return {"steps": steps, "joint_over_plain": ratio(turned["joint"], turned["plain"]), "turns": turned}


def first_batches(place: str, rows: int, batch_images: int) -> dict[str, float]:
    """Two batches' pictures, labels and targets' columns from mapped columns of that many draws."""
    from lambdanets.pseudo_labels.mixture import JointDraws
    from lambdanets.pseudo_labels.selection import Selection

    columns: dict[str, Any] = {}
    for name, (dtype, shape) in {
        "id": ("<u8", (rows,)), "label": ("<i4", (rows,)), "top_class": ("<i2", (rows, 10)),
        "top_prob": ("<f2", (rows, 10)), "row": ("<u4", (rows,)),
    }.items():  # fmt: skip
        path = Path(place) / f"{name}.npy"
        if not path.exists():  # holes: as large as the real ones, and as quick to map
            np.lib.format.open_memmap(path, "w+", np.dtype(dtype), shape)
        columns[name] = np.load(path, mmap_mode="r")
    before_mb, start = held_mb("VmRSS"), time.perf_counter()
    selection = Selection(Path(place), {}, "", **columns)
    labelled_ones = batch_images // 2
    draws = JointDraws(1_281_167, batch_images, 0, labelled_ones, selection)
    for batch in range(2):
        ids = [slot.id - draws.n_images for slot in draws.slots(0, batch, range(batch_images)) if slot.draw >= 0]
        for column in (selection.id, selection.label, selection.top_class, selection.top_prob):
            np.asarray(column[np.array(ids)])
    return {"s": round(time.perf_counter() - start, 3), "mb": round(held_mb("VmRSS") - before_mb, 1)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the last line's JSON is written, too")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args(arguments)
    n, turns, steps, rows = (12, 1, 16, 1_000_000) if given.quick else (100, 3, 32, 130_000_000)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        found: dict[str, Any] = {"machine": machine("cpu"), "threads": given.threads}
        found["labelling"] = labelling(place, n, turns, given.threads)
        print(json.dumps(found["labelling"]), flush=True)
        found["steps"] = steps_of_both(place, steps, turns, given.threads)
        print(json.dumps(found["steps"]), flush=True)
        found["first_batches"] = {f"{b:,} a batch": apart(first_batches, str(place), rows, b) for b in (256, 4096)}
    first = found["first_batches"]["4,096 a batch"]
    seen = {
        "label_over_evaluate": found["labelling"]["label_over_evaluate"]["median"],
        "label_without_hashes_over_evaluate": found["labelling"]["label_without_hashes_over_evaluate"]["median"],
        "joint_over_plain": found["steps"]["joint_over_plain"]["median"],
        "first_batches_s": first["s"],
        "first_batches_mb": first["mb"],
    }
    found["targets"] = {}
    for name, target in TARGETS.items():
        reached = seen[name] >= target if "over" in name else seen[name] <= target
        found["targets"][name] = {"target": target, "seen": seen[name], "reached": reached}
        print(f"{name}: {seen[name]} ({'at least' if 'over' in name else 'at most'} {target}: "
              f"{'reached' if reached else 'MISSED'})")  # fmt: skip
    text = json.dumps(found)
    if given.out:
        write_atomically(given.out, (text + "\n").encode())
    print(text)


if __name__ == "__main__":
    main()
