"""The main job: a recipe and images in, a folder with weights, numbers and a picture out. One process, one device.

1. What can be wrong is looked for first: folder, extras, device, images, model. Only then is anything written.
2. A step: images -> loss -> gradients. If either is not finite the run stops there, before the weights change.
3. An epoch: the running average is evaluated on the held-out images, its weights are written, then run.json.
4. The end: the last epoch's weights are the result. No epoch is picked by its accuracy on the held-out images.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import lambdanets
from lambdanets import data as images_on_disk
from lambdanets import optim
from lambdanets.batches import Batches, View
from lambdanets.checkpoint import (
    BAD_SAMPLES,
    CURVES,
    RUN_JSON,
    WEIGHTS,
    BadRun,
    choose_folder,
    save_weights,
    versions,
    write_atomically,
    write_json,
)
from lambdanets.data import Images
from lambdanets.evaluate import Scores, evaluate
from lambdanets.recipes import BadRecipe, Recipe
from lambdanets.report import Progress, curves_png


class NonFiniteLoss(ArithmeticError):
    """A loss or gradient that is not a number; the message names the step, the images and the weights that remain."""


@dataclass(frozen=True)
class Result:
    """What a run came to: its folder, the last epoch's scores on the held-out images, one dict an epoch, seconds."""

    folder: Path
    scores: Scores
    history: list[dict[str, Any]]
    seconds: float

    def __str__(self) -> str:
        return f"{self.scores} after {self.seconds:.0f} s\n{self.folder}: {WEIGHTS}, {RUN_JSON}, {CURVES}"


def train(
    recipe: Recipe,
    data: str | Path | None = None,
    *,
    out: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    workers: int = 0,
) -> Result:
    """Train `recipe` on the images and write the folder of the run (checkpoint.py lists its files).

    data      a folder of images, as `lambdanets.data.folder` reads it; None: scikit-learn's digits
    out       a new or empty folder; None: the next runs/NAME-N
    seed      decides first weights, order, augmentation and dropout; two runs on one CPU are equal to the bit
    device    "cpu", "cuda", "cuda:1"; "auto": the first GPU, or else the CPU
    workers   processes that read images; 0: this one. They change the speed, never the run
    Raises, before the first step and before anything is written: BadRun (folder, device, missing extra), BadRecipe
    (model or its image size), BadData and BadImage (images). Later: NonFiniteLoss, KeyboardInterrupt, and
    BadData where too many training images are bad. A note on the error says which epoch's weights the folder holds.
    """
    folder = choose_folder(out, recipe.name)
    _check_extras(digits=data is None)
    where = choose_device(device)
    train_images, val_images, how, ignored = _read_data(data)
    classes = train_images.classes
    view = View(recipe.image_px, recipe.in_channels, recipe.mean, recipe.std, recipe.crop_frac, recipe.interpolation)
    batches = Batches(
        train_images,
        view,
        batch_images=recipe.batch_images,
        training=True,
        seed=seed,
        augment=recipe.augment,
        randaugment_ops=recipe.randaugment_ops,
        randaugment_magnitude=recipe.randaugment_magnitude,
        workers=workers,
        bad_file=folder / BAD_SAMPLES,
    )
    val_batches = Batches(val_images, view, batch_images=recipe.eval_batch_images, training=False, workers=workers)
    _check_model(recipe, len(classes), min(len(train_images), recipe.batch_images))
    for _ in val_batches.epoch(0):
        pass  # evaluation may not skip an image: one that cannot be read is found now, not after the first epoch

    record: dict[str, Any] = {
        "status": "running",
        "recipe": dataclasses.asdict(recipe),
        "view": dataclasses.asdict(view),
        "classes": list(classes),
        "data": {
            "source": "scikit-learn digits" if data is None else str(Path(data).resolve()),
            "how": how,
            "ignored": ignored,
            "train_images": len(train_images),
            "val_images": len(val_images),
        },
        "seed": seed,
        "device": str(where),
        "versions": versions(),
        "history": [],
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        open(folder / RUN_JSON, "x").close()  # of two runs that start together, one gets the folder
        write_json(folder / RUN_JSON, record)
    except FileExistsError:
        raise BadRun(f"--out {folder} was just taken by another run: name another folder") from None
    except OSError as error:
        raise BadRun(f"--out {folder} cannot be written ({error}): name another folder") from error

    passed_over = "".join(f"; ignored {count}: {why}" for why, (count, _) in ignored.items())
    print(f"{how}{passed_over}")
    print(f"{recipe.model}, {recipe.image_px} px, {recipe.epochs} epochs on {where}: {folder}", flush=True)
    with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []):  # the caller's randomness stays
        return _run(recipe, batches, val_batches, record, folder)


def _run(recipe: Recipe, batches: Batches, val_batches: Batches, record: dict[str, Any], folder: Path) -> Result:
    """The loop. `record` becomes run.json; it is written after every epoch and at every way out."""
    started = time.monotonic()
    seed, where, classes, history = record["seed"], torch.device(record["device"]), record["classes"], record["history"]
    amp = recipe.amp and where.type == "cuda"
    torch.manual_seed(seed % 2**63)
    model = _create(recipe, len(classes)).to(where)
    average = optim.RunningAverage(model, recipe.ema_decay)
    optimizer = optim.optimizer(model, recipe)
    total_steps = recipe.epochs * len(batches)
    warmup_steps = round(recipe.warmup_epochs * len(batches))
    step = 0
    progress = Progress(recipe.epochs, len(batches) * min(recipe.batch_images, len(batches.images)))
    try:
        for epoch in range(recipe.epochs):
            epoch_started = time.monotonic()
            model.train()
            seen, right, loss_sum = 0, 0, 0.0
            for images, labels, ids in batches.epoch(epoch):
                torch.manual_seed((seed * 1_000_003 + step + 1) % 2**63)  # dropout: by (seed, step)
                lr = optim.learning_rate(step, recipe.peak_lr, warmup_steps=warmup_steps, total_steps=total_steps)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                images, labels = images.to(where), labels.to(where)
                with torch.autocast(where.type, dtype=torch.bfloat16, enabled=amp):
                    logits = model(images)
                logits = logits.float()  # (b, classes)
                loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
                optimizer.zero_grad()
                loss.backward()
                norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item()
                if not (math.isfinite(loss.item()) and math.isfinite(norm)):
                    names = [batches.images.names[i] for i in ids]
                    raise _non_finite(record, folder, step, loss.item(), norm, names)
                optimizer.step()
                average.update(model, step)
                step += 1
                seen += len(labels)
                right += int((logits.argmax(dim=1) == labels).sum())
                loss_sum += loss.item() * len(labels)
                progress.step(len(labels), epoch, loss_sum / seen, right / seen)
            train_s = time.monotonic() - epoch_started
            scores = evaluate(average.module, val_batches, classes=len(classes), device=where)
            if not math.isfinite(scores.loss):
                raise NonFiniteLoss(f"the loss on the held-out images is {scores.loss} after epoch {epoch + 1}")
            row = {
                "epoch": epoch + 1,
                "lr": lr,
                "train_loss": loss_sum / seen,
                "train_top1_frac": right / seen,
                "val_loss": scores.loss,
                "val_top1_frac": scores.top1_frac,
                "train_s": round(train_s, 3),
                "images_per_s": round(seen / train_s, 1),
            }
            save_weights(average.module, folder / WEIGHTS)
            history.append(row)
            write_json(folder / RUN_JSON, record)
            progress.epoch(row)
    except BaseException as error:
        record["status"] = "interrupted" if isinstance(error, KeyboardInterrupt) else "stopped"
        record["error"] = repr(error)
        error.add_note(f"{record['status']} in epoch {len(history) + 1} of {recipe.epochs}: {_kept(folder, history)}")
        with contextlib.suppress(OSError):  # a full disk must not hide the first error
            write_json(folder / RUN_JSON, record)
        raise
    finally:
        progress.close()

    record["status"] = "finished"
    seconds = time.monotonic() - started
    record["result"] = {
        "n": scores.n,
        "errors": scores.errors,
        "top1_frac": scores.top1_frac,
        "top5_frac": scores.top5_frac,
        "loss": scores.loss,
        "seconds": round(seconds, 1),
        "bad_train_images": len(batches.bad),
        "confusion": scores.confusion,
    }
    write_json(folder / RUN_JSON, record)
    title = f"{recipe.model}, {recipe.image_px} px, seed {seed}: {scores}"
    write_atomically(folder / CURVES, curves_png(history, scores.confusion, classes, title))
    return Result(folder, scores, history, seconds)


def _non_finite(
    record: dict[str, Any], folder: Path, step: int, loss: float, norm: float, names: Sequence[str]
) -> NonFiniteLoss:
    """Put what is known of the step into the record, and make the error of it."""
    record["non_finite"] = {
        "step": step,
        "epoch": len(record["history"]) + 1,
        "loss": str(loss),  # JSON has no NaN
        "gradient_norm": str(norm),
        "images": list(names),
    }
    more = f" and {len(names) - 10} more (all: {folder / RUN_JSON})" if len(names) > 10 else ""
    return NonFiniteLoss(
        f"step {step}: the loss is {loss}, the gradient's norm {norm}. The images were {', '.join(names[:10])}{more}. "
        "Look at them, or try a lower --lr-per-256"
    )


def _kept(folder: Path, history: Sequence[dict[str, Any]]) -> str:
    if not history:
        return f"no epoch was finished, so {folder} holds no weights"
    return f"the weights of epoch {history[-1]['epoch']} are in {folder / WEIGHTS}"


def choose_device(device: str) -> torch.device:
    """The device of that name; "auto" is the first GPU, or else the CPU. Raises BadRun where it is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if re.fullmatch(r"cpu|cuda(:\d+)?", device) is None:
        raise BadRun(f"--device must be cpu, cuda, cuda:NUMBER or auto, not {device!r}")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either, depending on how it was built
        reason = str(error).splitlines()[0]
        raise BadRun(f"--device {device} cannot be used: {reason} 'auto' takes a GPU if there is one") from error
    return torch.device(device)


def _check_extras(*, digits: bool) -> None:
    needed = [("matplotlib", "plots", "curves.png is drawn with it")]
    if digits:
        needed.append(("sklearn", "digits", "the digits come with scikit-learn"))
    for module, extra, why in needed:
        if importlib.util.find_spec(module) is None:
            raise BadRun(f"{module} is not installed ({why}): pip install 'lambdanets[{extra}]'")


def _read_data(data: str | Path | None) -> tuple[Images, Images, str, dict[str, Any]]:
    """Training images, held-out images, a sentence on where they come from, and what a folder held besides."""
    if data is None:
        train_images, val_images = images_on_disk.digits()
        how = f"scikit-learn's digits: {len(train_images):,} to train, {len(val_images):,} held out, a fixed split"
        return train_images, val_images, how, {}
    found = images_on_disk.folder(data)
    return found.train, found.val, found.how, {why: list(files) for why, files in found.ignored.items()}


def _create(recipe: Recipe, classes: int) -> torch.nn.Module:
    return lambdanets.create_model(
        recipe.model,
        num_classes=classes,
        in_channels=recipe.in_channels,
        drop_rate=recipe.drop_rate,
        drop_path_rate=recipe.drop_path_rate,
    )


def _check_model(recipe: Recipe, classes: int, smallest_batch_images: int) -> None:
    """Run the smallest batch through the model on the meta device, which checks sizes and computes nothing."""
    try:
        with torch.device("meta"):
            model = _create(recipe, classes)
    except ValueError as error:  # an unknown name
        raise BadRecipe(f"model: {error}") from error
    size = (smallest_batch_images, recipe.in_channels, recipe.image_px, recipe.image_px)
    try:
        model.train()(torch.empty(size, device="meta"))
    except (ValueError, RuntimeError) as error:
        remedy = "give another --image-px"
        if smallest_batch_images == 1 and "more than 1 value per channel" in str(error):
            remedy = (
                "batch norm needs two: give another --batch-images, so that the last batch holds more than one image"
            )
        raise BadRecipe(f"{recipe.model} cannot train on a batch of {size}: {error}; {remedy}") from error
