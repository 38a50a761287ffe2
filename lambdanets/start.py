"""What is looked at before a run starts, and what it may be asked: nothing is written until all of it is right."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lambdanets import data as images_on_disk
from lambdanets.archive import check_source
from lambdanets.batches import Batches
from lambdanets.checkpoint import BAD_SAMPLES, BadRun, check_weights, choose_folder, need, versions
from lambdanets.data import Images
from lambdanets.distributed import Ranks
from lambdanets.errors import printable
from lambdanets.files import present, to_stderr, write_json
from lambdanets.learner import create, train_mode
from lambdanets.recipes import BadRecipe, Options, Recipe
from lambdanets.record import RUN_JSON, read_record, recipe_of
from lambdanets.steps import LEFT_AT_THE_START
from lambdanets.transforms import View
from lambdanets.watchdog import Watchdog

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
        if self.old is None and present(self.folder / RUN_JSON):
            raise BadRun(f"--out {self.folder} was just taken by another run: name another folder")
        if self.old is not None:
            now = {key: self.record[key] for key in ("status", "options", "device")}
            self.record.update({**self.old, **now})
            self.record.pop("error", None)
        if began_from is not None:
            self.record["init_from"] = {"source": began_from["source"], "sha256": began_from["sha256"]}
            print(printable(began_from["said"]))
        try:
            write_json(self.folder / RUN_JSON, self.record)
        except OSError as error:
            raise BadRun(f"--out {self.folder} cannot be written ({error}): name another folder") from error
        found = self.record["data"]
        ignored = found.get("ignored", {}).items()
        print(printable(found["how"] + "".join(f"; ignored {count}: {why}" for why, (count, _) in ignored)))


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
    allow_sources: Sequence[str],
    watch: Watchdog,
    made: contextlib.ExitStack,
) -> Start:
    """Everything that `train` needs, or its errors; arguments as there. Only reads, but for a folder runs/NAME-N, whose
    name is taken: where nothing gets into it, `made` removes it again."""
    _refuse_differences(recipe, data, seed, resume, init_from, options, ranks)
    folder: Path | None = None
    old: dict[str, Any] | None = None
    with ranks.together(), watch.working():
        if ranks.first:
            folder, old = _place(out, recipe, seed, resume, init_from)
            if out is None:
                made.callback(_remove_if_empty, folder)
        _check_extras(digits=data is None, tensorboard=options.tensorboard)
        where = choose_device(device, ranks)
        train_images, val_images, how, ignored = _read_data(data, allow_sources)
        _check_model(recipe, len(train_images.classes), min(len(train_images), recipe.batch_images), ranks, options)
        prints = {"train": train_images.fingerprint(), "val": val_images.fingerprint()}
        content = {"train": train_images.stamp(), "val": val_images.stamp()} if ranks.first else {}
    watch.beat()
    told = ranks.all([str(folder), old, prints])
    folder, old = Path(told[0][0]), told[0][1]
    with ranks.together():
        if old is not None and old["data"].get("fingerprint") != prints:
            source = old["data"]["source"]
            raise BadRun(
                f"--resume: {data or 'the digits'} are other images, names or labels than {source} was at the start"
            )
        if prints != told[0][2]:
            raise BadRun(f"rank {ranks.rank} found other images in {data} than rank 0: every machine needs the same")
        if old is not None and ranks.first:
            _say_what_was_replaced(old["data"].get("content"), content, str(data))
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
                watch.beat()
    record: dict[str, Any] = {
        "status": "running",
        "id": secrets.token_hex(8) if old is None else old.get("id"),  # checkpoints name it; None: older ones do not
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
            "content": content,
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


def _refuse_differences(
    recipe: Recipe,
    data: str | Path | None,
    seed: int,
    resume: bool,
    init_from: str | Path | None,
    options: Options,
    ranks: Ranks,
) -> None:
    """All ranks must be asked for the same: all raise BadRun where they are not, with what differs. The device, the
    readers and the places of folders are a rank's own."""
    asked = {**dataclasses.asdict(recipe), "seed": seed, "resume": resume, **dataclasses.asdict(options)}
    asked["init_from given"], asked["data given"] = init_from is not None, data is not None
    if differing := ranks.differences(asked):
        raise BadRun(f"the processes were asked for different runs: {differing}. Give every process the same")


def _say_what_was_replaced(then: Any, now: dict[str, Any], place: str) -> None:
    """One line where pictures of a resumed run have other sizes or times than at its start; older runs did not note."""
    if not isinstance(then, dict):
        return
    changed = {
        what
        for part, stamp in now.items()
        for what in (stamp or {})
        if isinstance(then.get(part), dict) and then[part].get(what) not in (None, stamp[what])
    }
    if "sizes" in changed:
        to_stderr(
            f"{place}: some files have other sizes than at the start of this run: pictures were replaced under the "
            "same names, and the run goes on with other pictures than it began with"
        )
    elif changed:
        to_stderr(
            f"{place}: some files have other times than at the start of this run, of the same sizes: it is a copy, or "
            "pictures were replaced under the same names"
        )


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        os.removedirs(folder)


def _place(
    out: str | Path | None, recipe: Recipe, seed: int, resume: bool, init_from: str | Path | None
) -> tuple[Path, dict[str, Any] | None]:
    """The run's folder, and its run.json where it is to be resumed. Raises BadRun where that was another run."""
    if resume and out is None:
        raise BadRun("--resume needs --out RUN, the folder of the run to go on with")
    try:
        if not resume or out is None:
            return choose_folder(out, recipe.name), None
        folder = Path(out)
        if not present(folder / RUN_JSON):
            held = [path.name for path in folder.iterdir()] if folder.is_dir() else []
            begun = held and all(re.fullmatch(LEFT_AT_THE_START, name) for name in held)
            return (folder if begun else choose_folder(out, recipe.name)), None
    except OSError as error:
        raise BadRun(f"--out {printable(out)} cannot be used ({error.strerror}): name another folder") from error
    old = read_record(folder)
    differing = recipe.differences(recipe_of(old))
    if old["seed"] != seed:
        differing.append(f"seed {old['seed']}, not {seed}")
    was_from = (old.get("init_from") or {}).get("source")
    if was_from != (None if init_from is None else str(init_from)):
        differing.append(f"init_from {was_from}, not {init_from}")
    if differing:
        raise BadRun(f"--resume: the run in {folder} has {'; '.join(differing)}. Give the same, or another --out")
    if old["status"] == "finished":  # nothing is computed any more: the weights that it tells of must be there
        check_weights(folder)
    return folder, old


def recorded(
    folder: str | Path, allow_sources: Sequence[str] = ()
) -> tuple[Recipe, str | None, int, str | None] | None:
    """Recipe, data, seed and init_from of the run in a folder, as `train` takes them; None where none has begun.

    Raises BadRun where its run.json is not one; OSError where it may not be looked at; BadData where it names a URL
    that is none of `allow_sources`, nor below one: the user did not name it.
    """
    if not present(Path(folder) / RUN_JSON):
        return None
    record = read_record(folder)
    source = record["data"]["source"]
    if source != _DIGITS:
        check_source(source, allow_sources, str(Path(folder) / RUN_JSON))
    init_from = (record.get("init_from") or {}).get("source")
    return recipe_of(record), None if source == _DIGITS else source, record["seed"], init_from


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


def _read_data(data: str | Path | None, allow_sources: Sequence[str]) -> tuple[Images, Images, str, dict[str, Any]]:
    """Training images, held-out images, a sentence on where they come from, and what a folder held besides."""
    if data is None:
        train_images, val_images = images_on_disk.digits()
        how = f"scikit-learn's digits: {len(train_images):,} to train, {len(val_images):,} held out, a fixed split"
        return train_images, val_images, how, {}
    found = images_on_disk.folder(data, allow_sources=allow_sources)
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
