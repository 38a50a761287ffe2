"""Do a teacher's labels help on handwritten digits? 100 labelled scans, 1,337 without labels, 360 held out, 20 seeds.

    python -m benchmarks.pseudo_digits --out FILE --folder FOLDER     under an hour on two quiet cores
    python -m benchmarks.pseudo_digits --out FILE --figure docs/pseudo-digits.png     the picture, from the numbers

Each seed draws ten labelled scans a class of scikit-learn's training digits, trains a teacher on them, lets it label
the others, selects, and trains a student on both kinds. All runs of all arms have equal steps, equal batches and the
recipe `digits`; those of one seed have the same first weights. The commands of the package do all of it.

The 360 are in no choice: the number of steps was set by the time that it takes, and hard or soft labels are chosen by
the students of five other seeds, by how many of the unlabelled scans they get right. The true labels of those are used
for that, for the counts that are printed, and in the arm "true labels". Every finished run is a file in FOLDER, so that
the same command goes on where it was stopped.

    supervised     the 100 labelled scans; it is the teacher
    soft, hard     the student, on the teacher's probabilities or on its first class
    shuffled       the labels of the selection dealt out at random: what is left if they say nothing
    own            the student's own 100 scans with the teacher's labels: soft targets without new pictures
    no threshold   whatever the teacher's confidence
    no balance     each scan once, whatever its class
    true labels    those of all 1,337: the most that labels can do
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import shutil
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student_t

from benchmarks.op import machine
from lambdanets.classification import train as supervised
from lambdanets.classification.run import open_run
from lambdanets.classification.scores import evaluate
from lambdanets.cli import main as command
from lambdanets.data.batches import Batches
from lambdanets.data.index_files import sha256_of
from lambdanets.data.order import Order
from lambdanets.data.shards import open_pictures
from lambdanets.data.sklearn_digits import digits
from lambdanets.files import read_json, write_atomically
from lambdanets.pseudo_labels import train as joint
from lambdanets.pseudo_labels.selection import SELECTION_JSON
from lambdanets.recipes.digits import digits as digits_recipe
from lambdanets.recipes.pseudo_labels import Mixture
from lambdanets.recipes.recipe import Options, Recipe

LABELLED_A_CLASS = 10
STEPS, BATCH_IMAGES = 150, 32
DRAWS_A_CLASS, CONFIDENCE = 160, 0.3
PILOT_SEEDS = range(100, 105)
ALL = str(10_000)  # draws a class, more than there are scans
# The selection of each arm: what `lambdanets select` is asked for, what is done to it, and the kind of targets ("": as
# chosen).
ARMS: dict[str, tuple[dict[str, str], str, str]] = {
    "soft": ({}, "", "soft"),
    "hard": ({}, "", "hard"),
    "shuffled": ({}, "shuffled", ""),
    "own": ({"per-class": ALL, "max-copies": "1", "confidence": "0"}, "", ""),
    "no threshold": ({"confidence": "0"}, "", ""),
    "no balance": ({"per-class": ALL, "max-copies": "1"}, "", ""),
    "true labels": ({"per-class": ALL, "max-copies": "1", "confidence": "0"}, "true", "hard"),
}


def recipe() -> Recipe:
    return replace(
        digits_recipe(), steps=STEPS, warmup_steps=STEPS // 5, batch_images=BATCH_IMAGES, eval_epochs=1_000_000
    )


class Scans:
    """The scans of one seed, as folders of PNG files: labelled/train and labelled/val by class, unlabelled, own."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.train, self.val = digits()
        mixed = Order(len(self.train), seed=seed, epoch=0)[0 : len(self.train)].tolist()
        self.labelled = {
            i for c in range(10) for i in [j for j in mixed if self.train.labels[j] == c][:LABELLED_A_CLASS]
        }
        self.folder = folder

    def write(self) -> None:
        if (self.folder / "written").exists():
            return
        for i in range(len(self.train)):
            scan, label = self.train.load(i), str(self.train.labels[i])
            for place in ["labelled/train/" + label, "own"] if i in self.labelled else ["unlabelled"]:
                (self.folder / place).mkdir(parents=True, exist_ok=True)
                scan.save(self.folder / place / f"{i:04d}.png")
        for i in range(len(self.val)):
            place_of = self.folder / "labelled" / "val" / str(self.val.labels[i])
            place_of.mkdir(parents=True, exist_ok=True)
            self.val.load(i).save(place_of / f"{i:04d}.png")
        (self.folder / "written").touch()

    def right_of_the_unlabelled(self, run: Path) -> int:
        """How many of the 1,337 a run gets right, as it sees them."""
        opened = open_run(run)
        batches = Batches(self.train, opened.view, batch_images=120, training=False)
        found = evaluate(opened.model, batches, classes=10, device=torch.device("cpu"))
        pairs = zip(found.ids, found.predicted, strict=True)
        return sum(first == self.train.labels[i] for i, first in pairs if i not in self.labelled)

    def true_labels(self, shards: Path, selection: Path) -> list[int]:
        """Of the rows of a selection among these scans."""
        names = open_pictures(shards).names
        return [int(self.train.labels[int(Path(names[int(i)]).stem)]) for i in np.load(selection / "id.npy")]


def of_seed(seed: int, folder: Path, arms: Sequence[str], chosen: str) -> None:
    """The runs of one seed that are not there yet, each left as FOLDER/SEED/ARM.json."""
    torch.set_num_threads(1)
    scans = Scans(seed, folder / str(seed))
    todo = [arm for arm in ("supervised", *arms) if not (scans.folder / f"{arm}.json").exists()]
    if not todo:
        return
    scans.write()
    with open(scans.folder / "log", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        _run(scans, "supervised", seed, None, "")
        for arm in todo:
            if arm != "supervised":
                asked, changed, targets = ARMS[arm]
                _run(scans, arm, seed, _selected(scans, seed, arm, asked, changed), targets or chosen)


def _said(*arguments: object) -> None:
    code = command([str(argument) for argument in arguments])
    assert code == 0, f"exit code {code}: lambdanets {' '.join(map(str, arguments))}"


def _shards(scans: Scans, arm: str) -> Path:
    return scans.folder / f"{'own' if arm == 'own' else 'unlabelled'}-shards"


def _selected(scans: Scans, seed: int, arm: str, asked: dict[str, str], changed: str) -> Path:
    shards, out = _shards(scans, arm), scans.folder / f"{arm}-selection"
    labels = shards.with_name(shards.name.replace("-shards", "-labels"))
    _said("pack", shards.with_name(shards.name.removesuffix("-shards")), shards, "--unlabelled")
    _said("label", scans.folder / "supervised", "--data", shards, "--out", labels, "--device", "cpu")
    shutil.rmtree(out, ignore_errors=True)
    options = {"per-class": str(DRAWS_A_CLASS), "confidence": str(CONFIDENCE), **asked}
    given = [part for name, value in options.items() for part in (f"--{name}", value)]
    _said("select", labels, "--out", out, "--exclude", scans.folder / "labelled", *given)
    if changed:
        _relabelled(out, scans, shards, seed, changed)
    return out


def _relabelled(selection: Path, scans: Scans, shards: Path, seed: int, how: str) -> None:
    """A selection with other labels: dealt out at random, probabilities too, or the true ones, for hard targets."""
    labels = np.load(selection / "label.npy")
    if how == "shuffled":
        order = np.random.default_rng(seed).permutation(len(labels))
        names = ("label", "confidence", "top_class", "top_prob")
        columns = {name: np.load(selection / f"{name}.npy")[order] for name in names}
    else:
        columns = {"label": np.array(scans.true_labels(shards, selection), labels.dtype)}
    held = read_json(selection / SELECTION_JSON)
    for name, values in columns.items():
        np.save(selection / f"{name}.npy", values)
        held["columns"][name] = sha256_of(selection / f"{name}.npy")
    (selection / SELECTION_JSON).write_text(json.dumps(held))


def _run(scans: Scans, arm: str, seed: int, selection: Path | None, targets: str) -> None:
    row, out = scans.folder / f"{arm}.json", scans.folder / arm
    if row.exists() and out.exists():
        return
    shutil.rmtree(out, ignore_errors=True)
    options, began_s, data = Options(save_minutes=0), time.process_time(), scans.folder / "labelled"
    line: dict[str, Any] = {"seed": seed, "arm": arm, "targets": targets}
    if selection is None:
        done = supervised.train(recipe(), data, out=out, seed=seed, device="cpu", options=options)
    else:
        mixture = Mixture(labels=targets)  # type: ignore[arg-type]  # one of its two
        done = joint.train(recipe(), data, selection, mixture, out=out, seed=seed, device="cpu", options=options)
        true = scans.true_labels(_shards(scans, arm), selection)
        labels, held = np.load(selection / "label.npy").tolist(), read_json(selection / SELECTION_JSON)
        line["selected"] = len(labels)
        line["selected_and_labelled_right"] = sum(a == b for a, b in zip(labels, true, strict=True))
        line["draws"], line["excluded"] = held["draws"], held["excluded"]
    line["cpu_s"] = round(time.process_time() - began_s, 1)
    line["right_of_360"] = done.scores.n - done.scores.errors
    line["right_of_1337"] = scans.right_of_the_unlabelled(out)
    write_atomically(row, json.dumps(line).encode())


def interval(differences: Sequence[float]) -> dict[str, float]:
    """Mean and Student's 95% interval.

    >>> interval([1.0, 2.0, 3.0])
    {'mean': 2.0, 'low': -0.484, 'high': 4.484, 'n': 3}
    """
    mean, n = statistics.fmean(differences), len(differences)
    half = float(student_t.ppf(0.975, n - 1)) * statistics.stdev(differences) / math.sqrt(n)
    return {"mean": round(mean, 3), "low": round(mean - half, 3), "high": round(mean + half, 3), "n": n}


def compared(rows: Sequence[dict[str, Any]], what: str) -> dict[str, Any]:
    """Arm -> its values by seed, their mean, and the paired difference from "supervised" of the same seeds."""
    of = {(row["arm"], row["seed"]): row[what] for row in rows}
    seeds = sorted({seed for _, seed in of})
    found: dict[str, Any] = {}
    for arm in dict.fromkeys(arm for arm, _ in of):
        values = [of[arm, seed] for seed in seeds]
        found[arm] = {"each": values, "mean": round(statistics.fmean(values), 2)}
        if arm != "supervised":
            found[arm]["minus_supervised"] = interval([of[arm, s] - of["supervised", s] for s in seeds])
    return found


def chosen_by(pilot: Sequence[dict[str, Any]]) -> str:
    """Hard or soft: whose students get more of the unlabelled scans right, over the pilot's seeds; soft at a tie."""
    found = compared(pilot, "right_of_1337")
    return "hard" if found["hard"]["mean"] > found["soft"]["mean"] else "soft"


def table(found: dict[str, Any]) -> str:
    lines = [
        "| arm | right of 360, mean | minus supervised, 95% interval | right of the 1,337, mean |",
        "|---|---|---|---|",
    ]
    for arm, of_360 in found["right_of_360"].items():
        difference = of_360.get("minus_supervised")
        shown = "–" if difference is None else "{mean:+.1f} ({low:+.1f} to {high:+.1f})".format(**difference)
        unlabelled = found["right_of_1337"][arm]["mean"]
        lines.append(f"| {arm} | {of_360['mean']:.1f} ({of_360['mean'] / 3.6:.1f}%) | {shown} | {unlabelled:.0f} |")
    return "\n".join(lines)


def figure(found: dict[str, Any], path: Path) -> None:
    """Each seed's paired difference as a point, the mean and its 95% interval beside them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = found["right_of_360"]
    base, arms = rows["supervised"]["each"], [arm for arm in rows if arm != "supervised"]
    drawn = Figure(figsize=(8, 0.55 * len(arms) + 1.6), layout="constrained", dpi=120)
    FigureCanvasAgg(drawn)
    axes = drawn.add_subplot()
    for y, arm in enumerate(reversed(arms)):
        points = [value - of for value, of in zip(rows[arm]["each"], base, strict=True)]
        axes.plot(points, [y + 0.12 + 0.02 * (k % 9) for k in range(len(points))], ".", color="#7a94ad", alpha=0.8)
        of = rows[arm]["minus_supervised"]
        reach = [[of["mean"] - of["low"]], [of["high"] - of["mean"]]]
        axes.errorbar(of["mean"], y, xerr=reach, fmt="o", color="#b3402e", capsize=4)
    axes.axvline(0, color="#444444", linewidth=1)
    axes.set_yticks(range(len(arms)), list(reversed(arms)))
    axes.set_xlabel("digits right of the 360 held out, minus the supervised run of the same seed")
    axes.set_title(f"{len(base)} seeds: each (grey), their mean and its 95% interval (red)", fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    drawn.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the numbers, as JSON")
    parser.add_argument("--folder", type=Path, metavar="FOLDER", help="where the runs are kept, to go on")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2, help="each of one thread")
    parser.add_argument("--figure", type=Path, metavar="PNG", help="draw what FILE holds, and train nothing")
    given = parser.parse_args(arguments)
    if given.figure is not None:
        figure(read_json(given.out), given.figure)
        return
    if given.folder is None:
        parser.error("--folder FOLDER is where the runs are kept: give one")
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(given.processes, multiprocessing.get_context("spawn")) as pool:

        def trained(seeds: Sequence[int], arms: Sequence[str], chosen: str) -> list[dict[str, Any]]:
            for done in [pool.submit(of_seed, seed, given.folder, arms, chosen) for seed in seeds]:
                done.result()
            return [read_json(given.folder / str(s) / f"{arm}.json") for s in seeds for arm in ("supervised", *arms)]

        pilot = trained(PILOT_SEEDS, ("soft", "hard"), "")
        chosen = chosen_by(pilot)
        rows = trained(range(given.seeds), tuple(ARMS), chosen)
    found = {
        "what": "digits right, by arm; see benchmarks/pseudo_digits.py",
        "machine": machine("cpu"),
        "settings": {
            "model": recipe().model,
            "image_px": recipe().image_px,
            "steps": STEPS,
            "batch_images": BATCH_IMAGES,
            "labelled": 10 * LABELLED_A_CLASS,
            "per_class": DRAWS_A_CLASS,
            "confidence": CONFIDENCE,
        },
        "chosen": chosen,
        "pilot_right_of_1337": compared(pilot, "right_of_1337"),
        "right_of_360": compared(rows, "right_of_360"),
        "right_of_1337": compared(rows, "right_of_1337"),
        "cpu_s": round(sum(row["cpu_s"] for row in [*pilot, *rows])),
        "rows": rows,
    }
    write_atomically(given.out, json.dumps(found, indent=1).encode())
    print(table(found))
    print(json.dumps({"chosen": chosen, "cpu_s": found["cpu_s"]}))


if __name__ == "__main__":
    main()
