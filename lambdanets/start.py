"""What is looked at before a run starts, and what it may be asked: nothing is written until all of it is right."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lambdanets import data as images_on_disk
from lambdanets.batches import Batches, View
from lambdanets.checkpoint import BAD_SAMPLES, RUN_JSON, BadRun, choose_folder, need, versions
from lambdanets.data import Images
from lambdanets.distributed import Ranks
from lambdanets.files import write_json
from lambdanets.learner import create, train_mode
from lambdanets.recipes import BadRecipe, Options, Recipe

_DIGITS = "scikit-learn digits"


@dataclass
class Start:
    """A run that can start: `record` is its run.json to be, `old` the one in the folder where it is resumed."""

    recipe: Recipe
    options: Options
    folder: Path
    old: dict[str, Any] | None
    device: torch.device
    batches: Batches
    val_batches: Batches
    record: dict[str, Any]

    def begin(self, began_from: dict[str, str] | None) -> None:
        """Write run.json, the first thing in the folder but for the lock, and say what was found."""
        if self.old is None and (self.folder / RUN_JSON).exists():
            raise BadRun(f"--out {self.folder} was just taken by another run: name another folder")
        if self.old is not None:
            now = {key: self.record[key] for key in ("status", "options", "device")}
            self.record.update({**self.old, **now})
            self.record.pop("error", None)
        if began_from is not None:
            self.record["init_from"] = {"source": began_from["source"], "sha256": began_from["sha256"]}
            print(began_from["said"])
        try:
            write_json(self.folder / RUN_JSON, self.record)
        except OSError as error:
            raise BadRun(f"--out {self.folder} cannot be written ({error}): name another folder") from error
        found = self.record["data"]
        print(found["how"] + "".join(f"; ignored {count}: {why}" for why, (count, _) in found["ignored"].items()))


def look(
    recipe: Recipe,
    data: str | Path | None,
    *,
    out: str | Path | None,
    seed: int,
    device: str,
    workers: int,
    resume: bool,
    init_from: str | Path | None,
    options: Options,
    ranks: Ranks,
) -> Start:
    """Everything that `train` needs, or its errors; arguments as there. Only reads."""
    folder: Path | None = None
    old: dict[str, Any] | None = None
    with ranks.together():
        if ranks.first:
            folder, old = _place(out, recipe, seed, resume, init_from)
        _check_extras(digits=data is None, tensorboard=options.tensorboard)
        where = choose_device(device, ranks)
        train_images, val_images, how, ignored = _read_data(data)
        _check_model(recipe, len(train_images.classes), min(len(train_images), recipe.batch_images), ranks, options)
        prints = {"train": train_images.fingerprint(), "val": val_images.fingerprint()}
    asked = json.loads(json.dumps([dataclasses.asdict(recipe), seed]))  # as another rank's arrives
    told = ranks.all([str(folder), old, prints, asked])
    folder, old = Path(told[0][0]), told[0][1]
    with ranks.together():
        if old is not None and old["data"].get("fingerprint") != prints:
            source = old["data"]["source"]
            raise BadRun(
                f"--resume: {data or 'the digits'} are other images, names or labels than {source} was at the start"
            )
        if asked != told[0][3]:
            raise BadRun(
                f"rank {ranks.rank} was asked for another recipe or seed than rank 0: give every process the same"
            )
        if prints != told[0][2]:
            raise BadRun(f"rank {ranks.rank} found other images in {data} than rank 0: every machine needs the same")
        view = View(
            recipe.image_px, recipe.in_channels, recipe.mean, recipe.std, recipe.crop_frac, recipe.interpolation
        )
        mine = functools.partial(Batches, view=view, workers=workers, rank=ranks.rank, ranks=ranks.ranks)
        batches = mine(
            train_images,
            batch_images=recipe.batch_images,
            training=True,
            seed=seed,
            augment=recipe.augment,
            flip_frac=recipe.flip_frac,
            min_crop_frac=recipe.min_crop_frac,
            randaugment_ops=recipe.randaugment_ops,
            randaugment_magnitude=recipe.randaugment_magnitude,
            erase_frac=recipe.erase_frac,
            bad_file=folder / BAD_SAMPLES,
        )
        held_out = functools.partial(mine, val_images, batch_images=recipe.eval_batch_images, training=False)
        if old is None:
            for _ in held_out().epoch(0):  # evaluation may skip none: what cannot be read is found now, not later
                pass
    record: dict[str, Any] = {
        "status": "running",
        "recipe": dataclasses.asdict(recipe),
        "view": dataclasses.asdict(view),
        "classes": list(train_images.classes),
        "data": {
            "source": _DIGITS if data is None else images_on_disk.absolute(data),
            "how": how,
            "ignored": ignored,
            "train_images": len(train_images),
            "val_images": len(val_images),
            "fingerprint": prints,
        },
        "seed": seed,
        "init_from": None,
        "device": str(where),
        "options": dataclasses.asdict(options),
        "versions": versions(),
        "starts": [],
        "history": [],
    }
    return Start(recipe, options, folder, old, where, batches, held_out(), record)


def _place(
    out: str | Path | None, recipe: Recipe, seed: int, resume: bool, init_from: str | Path | None
) -> tuple[Path, dict[str, Any] | None]:
    """The run's folder, and its run.json where it is to be resumed. Raises BadRun where that was another run."""
    if not resume:
        return choose_folder(out, recipe.name), None
    if out is None:
        raise BadRun("--resume needs --out RUN, the folder of the run to go on with")
    folder = Path(out)
    if not (folder / RUN_JSON).is_file():
        held = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
        return (folder if held == {".lock"} else choose_folder(out, recipe.name)), None
    old = read_record(folder)
    differing = recipe.differences(Recipe.from_json(old["recipe"]))
    if old["seed"] != seed:
        differing.append(f"seed {old['seed']}, not {seed}")
    was_from = (old.get("init_from") or {}).get("source")
    if was_from != (None if init_from is None else str(init_from)):
        differing.append(f"init_from {was_from}, not {init_from}")
    if differing:
        raise BadRun(f"--resume: the run in {folder} has {'; '.join(differing)}. Give the same, or another --out")
    return folder, old


def read_record(folder: str | Path) -> dict[str, Any]:
    """The run.json of a run, finished or not. Raises BadRun where it is none."""
    path = Path(folder) / RUN_JSON
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        Recipe.from_json(record["recipe"])
        record["seed"], record["status"], record["data"]["source"]
    except OSError as error:
        raise BadRun(f"{folder} is not the folder of a run: {path} cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, KeyError) as error:
        raise BadRun(f"{path} is not the record of a run: {error!r}") from error
    return record


def recorded(folder: str | Path) -> tuple[Recipe, str | None, int, str | None] | None:
    """Recipe, data, seed and init_from of the run in a folder, as `train` takes them; None where none has begun.

    Raises BadRun where its run.json cannot be read.
    """
    if not (Path(folder) / RUN_JSON).is_file():
        return None
    record = read_record(folder)
    source = record["data"]["source"]
    init_from = (record.get("init_from") or {}).get("source")
    return Recipe.from_json(record["recipe"]), None if source == _DIGITS else source, record["seed"], init_from


def choose_device(device: str, ranks: Ranks | None = None) -> torch.device:
    """The device of that name; "auto" is the first GPU, or else the CPU. Raises BadRun where it is not there.

    ranks  of several on a machine each takes the GPU of its local number, for "auto" and for "cuda"
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if re.fullmatch(r"cpu|cuda(:\d+)?", device) is None:
        raise BadRun(f"--device must be cpu, cuda, cuda:NUMBER or auto, not {device!r}")
    if ranks is not None and ranks.ranks > 1 and device.startswith("cuda"):
        if device != "cuda":
            raise BadRun(
                f"--device {device} is one GPU and there are {ranks.ranks} processes: say cuda, and each takes its own"
            )
        device = f"cuda:{ranks.local_rank}"
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either, depending on how it was built
        reason = str(error).splitlines()[0]
        raise BadRun(f"--device {device} cannot be used: {reason} 'auto' takes a GPU if there is one") from error
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    return torch.device(device)


def _check_extras(*, digits: bool, tensorboard: bool) -> None:
    need("matplotlib", "plots", "curves.png is drawn with it")
    if digits:
        need("sklearn", "digits", "the digits come with scikit-learn")
    if tensorboard:
        need("tensorboard", "tensorboard", "--tensorboard asks for it")


def _read_data(data: str | Path | None) -> tuple[Images, Images, str, dict[str, Any]]:
    """Training images, held-out images, a sentence on where they come from, and what a folder held besides."""
    if data is None:
        train_images, val_images = images_on_disk.digits()
        how = f"scikit-learn's digits: {len(train_images):,} to train, {len(val_images):,} held out, a fixed split"
        return train_images, val_images, how, {}
    found = images_on_disk.folder(data)
    return found.train, found.val, found.how, {why: list(files) for why, files in found.ignored.items()}


def _check_model(recipe: Recipe, classes: int, batch_images: int, ranks: Ranks, options: Options) -> None:
    """Run the smallest part of a batch through the model on the meta device: checks sizes, computes nothing."""
    smallest = batch_images // ranks.ranks // recipe.accumulation
    if smallest < 1:
        raise BadRecipe(
            f"batch_images: a step of {batch_images} images is too small for {ranks.ranks} processes that take theirs "
            f"in {recipe.accumulation} parts: give a larger --batch-images"
        )
    try:
        with torch.device("meta"):
            model = create(recipe, classes)
    except ValueError as error:  # an unknown name
        raise BadRecipe(f"model: {error}") from error
    if options.recompute and not hasattr(model, "stages"):
        raise BadRun(f"--recompute works block by block, and {recipe.model} has no stages of blocks")
    train_mode(model, recipe)
    if recipe.batch_norm == "sync":
        smallest *= ranks.ranks
    size = (smallest, recipe.in_channels, recipe.image_px, recipe.image_px)
    try:
        model(torch.empty(size, device="meta"))
    except (ValueError, RuntimeError) as error:
        remedy = "give another --image-px"
        if smallest == 1 and "more than 1 value per channel" in str(error):
            remedy = (
                "batch norm needs two: give another --batch-images, so that no part of a batch is a single image, or "
                "--batch-norm frozen"
            )
        raise BadRecipe(f"{recipe.model} cannot train on a batch of {size}: {error}; {remedy}") from error
