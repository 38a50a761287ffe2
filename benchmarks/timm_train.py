"""Trains one model on the same images with timm's training script and with ours: held-out top-1 and images a second.

    python -m benchmarks.timm_train --timm-train PATH [--seeds 0 1 2] [--epochs N] [--out FILE]

PATH is train.py of github.com/huggingface/pytorch-image-models at the tag of the installed timm; it is run as it is.
The images are scikit-learn's digits, written here as PNG files in folders that both read. One settings object, the
`Recipe` of `recipe()`, decides both sides: ours trains with it, timm's arguments are made from it
(`timm_arguments`). Each training is a process of its own, ours and timm's in turn, seed by seed; both have the same
environment, threads and number of reading processes, and start from the same weights. What the clocks see is the same
too: steps with the waiting for their batches, without evaluation and saving.

What no option makes equal:

  order          each side shuffles the training images with a generator of its own
  schedule       the warm-ups agree at every step; timm's cosine begins a step earlier, so that of n steps of decay the
                 rates differ by less than 1/n of the peak (`test_benchmarks.py` checks it, and so does every run)
  normalisation  of training images: timm's in the process that trains (its prefetcher), ours in the one that reads
  per step       ours also computes the gradient's norm, keeps the batch norms' statistics to be able to leave a step
                 out, and copies the weights to the model that is evaluated; timm's has its log
  loss           the same function, summed and divided here, averaged there: equal but for rounding

There is no running average on either side: timm's warms up by another formula.

The accuracies agree within noise if the difference of their means is at most twice its standard error, the root of the
sum of two squares: of the seeds (from the standard deviations of both sides) and of the held-out images, the binomial
sqrt(2 p (1 - p) / n). Both sides see the same images, so the second one is an upper bound. One seed gives no verdict.
The speed is the median over the epochs after the first; aimed at are 0.95 of timm's. The last line of stdout is one
JSON object; --out keeps it.
"""

import argparse
import hashlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import timm
from PIL import Image

from benchmarks.op import start
from lambdanets.data.sklearn_digits import digits
from lambdanets.recipes.recipe import Recipe
from lambdanets.training import optim

PX, TRAIN_IMAGES, VAL_IMAGES, CLASSES = 32, 1437, 360, 10
BATCH_IMAGES = 32
STEPS = TRAIN_IMAGES // BATCH_IMAGES  # an epoch's; both sides drop what does not fill a batch
WARMUP_EPOCHS = 1
WORKERS = 1
AIM = 0.95

ROOT = Path(__file__).resolve().parents[1]
TIMM = "import lambdanets, runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
OURS = (
    "import json, sys; from lambdanets.recipes import Recipe; from lambdanets.train import train; "
    "a = json.loads(sys.argv[1]); train(Recipe.from_json(a.pop('recipe')), **a)"
)
TRAIN_LINE = re.compile(
    r"Train: (?P<epoch>\d+) \[ *(?P<update>\d+)/(?P<updates>\d+) .*"
    r"\( *[\d.]+s, +(?P<rate>[\d.]+)/s\) +LR: (?P<lr>[\d.e+-]+)"
)
TEST_LINE = re.compile(r"Test: \[ *(?P<batch>\d+)/(?P<last>\d+)\].*Acc@1: +[\d.]+ \( *(?P<top1>[\d.]+)\)")


class Trained(NamedTuple):
    """What a run came to: held-out images that are right, their number, and images a second in each epoch."""

    right: int
    n: int
    rates: list[float]


# --- the settings ---


def recipe(epochs: int) -> Recipe:
    """The settings of both sides. Our warm-up is a step longer than timm's: only then are its rates the same."""
    return Recipe(
        name="timm_train",
        model="lambda_resnet_tiny",
        image_px=PX,
        epochs=epochs,
        batch_images=BATCH_IMAGES,
        lr_per_256=0.4,
        warmup_epochs=WARMUP_EPOCHS + 1 / STEPS,
        optimizer="sgd",
        momentum=0.9,
        weight_decay=1e-4,
        label_smoothing=0.1,
        augment="none",
        precision="float32",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        crop_frac=1.0,
        interpolation="bilinear",
        eval_batch_images=120,
    )


def timm_arguments(of: Recipe) -> list[str]:
    """The recipe in the words of timm's script, but for folders and seed."""
    given: dict[str, Any] = {
        "model": of.model,
        "num-classes": CLASSES,
        "input-size": [of.in_channels, of.image_px, of.image_px],
        "mean": of.mean,
        "std": of.std,
        "interpolation": of.interpolation,
        "crop-pct": of.crop_frac,
        "no-aug": [],
        "batch-size": of.batch_images,
        "validation-batch-size": of.eval_batch_images,
        "opt": "momentum",  # its "sgd" is Nesterov's
        "momentum": of.momentum,
        "weight-decay": of.weight_decay,
        "lr": of.peak_lr,
        "sched": "cosine",
        "sched-on-updates": [],
        "warmup-prefix": [],  # the cosine begins at the peak, and --epochs does not count the warm-up
        "warmup-epochs": WARMUP_EPOCHS,
        "warmup-lr": of.peak_lr / (WARMUP_EPOCHS * STEPS + 1),
        "min-lr": 0.0,
        "epochs": of.epochs - WARMUP_EPOCHS,
        "smoothing": of.label_smoothing,
        "drop": of.drop_rate,
        "workers": WORKERS,
        "device": "cpu",
        "val-split": "val",
    }
    words = []
    for name, value in given.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list | tuple) else [value])]
    return words


def write_digits(root: Path) -> None:
    """root/train/CLASS/NUMBER.png and root/val/...: the digits at the size that is trained on, in RGB."""
    for split, images in zip(("train", "val"), digits(), strict=True):
        for index, (name, label) in enumerate(zip(images.names, images.labels, strict=True)):
            path = root / split / images.classes[label] / f"{Path(name).name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            images.load(index).resize((PX, PX), Image.Resampling.BICUBIC).convert("RGB").save(path)


# --- the trainings ---


def run(words: Sequence[str], threads: int, what: str) -> str:
    """What a child process printed. SystemExit with the end of it where it failed."""
    # The spin count is what the command `lambdanets train` sets for itself; here both sides have it.
    environment = {"GOMP_SPINCOUNT": "10000", **os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, "-c", *words], cwd=ROOT, env=environment, text=True, errors="replace",
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        tail = "\n  ".join(done.stdout.strip().splitlines()[-30:])
        raise SystemExit(f"{what} failed with exit code {done.returncode}; the end of its output:\n  {tail}")
    return done.stdout


def check_script(path: Path | None, of: Recipe) -> Path:
    """The path, absolute. SystemExit unless there is a training script of timm that takes our arguments."""
    remedy = (
        f"take train.py of github.com/huggingface/pytorch-image-models at the tag v{timm.__version__}, "
        "the installed timm's"
    )
    if path is None:
        raise SystemExit(f"--timm-train PATH is missing: {remedy}")
    if not path.is_file():
        raise SystemExit(f"--timm-train {path} {'is not a file' if path.exists() else 'does not exist'}: {remedy}")
    text = path.read_text(errors="replace")
    lacking = [part for part in ("from timm", "def train_one_epoch(", "create_scheduler_v2") if part not in text]
    if lacking:
        raise SystemExit(f"--timm-train {path} is not timm's train.py, it has no {lacking[0]!r} in it: {remedy}")
    path = path.absolute()
    shown = run([TIMM, str(path), "--help"], 1, f"{path} --help, with timm {timm.__version__},")
    names = [word for word in [*timm_arguments(of), "--data-dir", "--seed", "--output"] if word.startswith("--")]
    unknown = [name for name in names if not re.search(rf"(?<![\w-]){name}(?![\w-])", shown)]
    if unknown:
        raise SystemExit(f"--timm-train {path} does not take {', '.join(unknown)}: {remedy}")
    return path


def train_ours(of: Recipe, data: Path, out: Path, seed: int, threads: int) -> Trained:
    given = {"recipe": asdict(of), "data": str(data), "out": str(out), "seed": seed, "device": "cpu"}
    run([OURS, json.dumps({**given, "workers": WORKERS})], threads, f"our training, seed {seed},")
    record = json.loads((out / "run.json").read_text())
    result = record["result"]
    return Trained(result["n"] - result["errors"], result["n"], [row["images_per_s"] for row in record["history"]])


def train_timm(script: Path, of: Recipe, data: Path, out: Path, seed: int, threads: int) -> Trained:
    folders = ["--data-dir", str(data), "--output", str(out), "--seed", str(seed)]
    printed = run([TIMM, str(script), *timm_arguments(of), *folders], threads, f"timm's training, seed {seed},")
    return read_timm(printed, of)


def read_timm(printed: str, of: Recipe) -> Trained:
    """What timm's log says. SystemExit where it shows other epochs, steps, images or learning rates than asked for."""
    tail = "\n  ".join(printed.strip().splitlines()[-30:])
    lines = [match.groupdict() for match in TRAIN_LINE.finditer(printed)]
    tests = [match.groupdict() for match in TEST_LINE.finditer(printed)]
    top1 = [float(line["top1"]) for line in tests if line["batch"] == line["last"]]
    ends = [line for line in lines if int(line["update"]) + 1 == int(line["updates"])]
    if len(ends) != of.epochs or len(top1) != of.epochs:
        what = f"the ends of {len(ends)} epochs and {len(top1)} evaluations, not {of.epochs}"
        raise SystemExit(f"timm's log shows {what}; is its train.py that of timm {timm.__version__}?\n  {tail}")
    batches = -(-VAL_IMAGES // of.eval_batch_images)
    found = {int(line["updates"]) for line in lines}, {int(line["last"]) + 1 for line in tests}
    if found != ({STEPS}, {batches}):
        raise SystemExit(
            f"timm's log shows {found[0]} steps an epoch and {found[1]} batches of held-out images, not {STEPS} and "
            f"{batches}: it did not train on the same images\n  {tail}"
        )
    total, warmup = of.epochs * STEPS, round(of.warmup_epochs * STEPS)
    for line in lines:
        step = int(line["epoch"]) * STEPS + int(line["update"])
        ours = optim.learning_rate(step, of.peak_lr, warmup_steps=warmup, total_steps=total)
        later = 2.5 / (total - warmup) if step >= warmup else 0  # timm's cosine is a step ahead
        if not math.isclose(float(line["lr"]), ours, rel_tol=1e-3 + later):  # the log has four digits
            raise SystemExit(f"timm's learning rate of step {step} is {line['lr']}, ours {ours:.3e}: not the same run")
    return Trained(round(top1[-1] / 100 * VAL_IMAGES), VAL_IMAGES, [float(line["rate"]) for line in ends])


# --- the comparison ---


def row(side: str, seed: int, found: Trained, seconds: float) -> dict[str, Any]:
    return {
        "side": side, "seed": seed, "right": found.right, "n": found.n, "top1": round(found.right / found.n, 5),
        "images_per_s": round(statistics.median(found.rates[1:]), 1), "by_epoch": found.rates,
        "seconds": round(seconds, 1),
    }  # fmt: skip


def compare(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means, spreads, the difference against its standard error, ratios of speed; of the seeds that both have run."""
    by = {side: {r["seed"]: r for r in rows if r["side"] == side} for side in ("ours", "timm")}
    seeds = [seed for seed in by["ours"] if seed in by["timm"]]
    if not seeds:
        return {}
    found: dict[str, Any] = {}
    variances = []
    for side, runs in by.items():
        top1 = [runs[seed]["right"] / runs[seed]["n"] for seed in seeds]
        sd = statistics.stdev(top1) if len(top1) > 1 else 0.0
        variances.append(sd**2 / len(top1))
        found[side] = {"mean": statistics.mean(top1), "sd": sd, "spread": [min(top1), max(top1)]}
    p, n = (found["ours"]["mean"] + found["timm"]["mean"]) / 2, by["ours"][seeds[0]]["n"]
    of_seeds, of_images = math.sqrt(sum(variances)), math.sqrt(2 * p * (1 - p) / n)
    difference, error = found["ours"]["mean"] - found["timm"]["mean"], math.hypot(of_seeds, of_images)
    found |= {
        "difference": difference, "standard_error": error, "of_seeds": of_seeds, "of_images": of_images,
        "within_noise": abs(difference) <= 2 * error if len(seeds) > 1 else None,
    }  # fmt: skip
    ratios = [by["ours"][seed]["images_per_s"] / by["timm"][seed]["images_per_s"] for seed in seeds]
    speed = {"by_seed": [round(r, 3) for r in ratios], "median": round(statistics.median(ratios), 3), "aim": AIM}
    return {"seeds": seeds, "top1": rounded(found), "speed_over_timm": {**speed, "met": speed["median"] >= AIM}}


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return round(value, 5) if isinstance(value, float) else value


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timm-train", type=Path, metavar="PATH", help="timm's train.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=8, help="the first one is the warm-up's")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="where the last line's JSON is written, too")
    given = parser.parse_args(args)
    if given.epochs < 2:
        parser.error(f"--epochs {given.epochs}: 2 at least, since the first one is the warm-up and is not timed")
    if len(set(given.seeds)) < len(given.seeds):
        parser.error(f"--seeds {' '.join(map(str, given.seeds))}: each one once")
    of = recipe(given.epochs)
    script = check_script(given.timm_train, of)
    about = start("cpu", given.threads)
    settings = {
        "recipe": asdict(of), "timm_arguments": timm_arguments(of), "workers": WORKERS,
        "train_images": TRAIN_IMAGES, "val_images": VAL_IMAGES,
        "timm_train_sha256": hashlib.sha256(script.read_bytes()).hexdigest(),
    }  # fmt: skip
    rows: list[dict[str, Any]] = []
    text = ""
    with tempfile.TemporaryDirectory() as place:
        data = Path(place, "digits")
        write_digits(data)
        for seed in given.seeds:
            for side in ("ours", "timm"):
                began, out = time.monotonic(), Path(place, f"{side}-{seed}")
                if side == "ours":
                    found = train_ours(of, data, out, seed, given.threads)
                else:
                    found = train_timm(script, of, data, out, seed, given.threads)
                rows.append(row(side, seed, found, time.monotonic() - began))
                last = rows[-1]
                print(
                    f"{side}, seed {seed}: {last['right']} of {last['n']} right ({last['top1']:.2%}), "
                    f"{last['images_per_s']:.0f} images/s, {last['seconds']:.0f} s in all",
                    flush=True,
                )
                text = json.dumps({"machine": about, "settings": settings, "rows": rows, **compare(rows)})
                if given.out:  # what an interrupted run has measured is kept
                    given.out.write_text(text + "\n")
    made = compare(rows)
    top1, speed = made["top1"], made["speed_over_timm"]
    for side in ("ours", "timm"):
        low, high = top1[side]["spread"]
        print(f"{side}: top-1 {top1[side]['mean']:.2%} ({low:.2%} to {high:.2%})")
    verdict = {True: "within", False: "beyond", None: "of one seed, so without a verdict;"}[top1["within_noise"]]
    print(
        f"difference {top1['difference']:+.2%}, {verdict} twice the standard error of {top1['standard_error']:.2%} "
        f"(seeds {top1['of_seeds']:.2%}, images {top1['of_images']:.2%})"
    )
    print(f"images/s over timm's: {speed['median']} (aim {AIM}: {'met' if speed['met'] else 'missed'})")
    print(text)


if __name__ == "__main__":
    main()
