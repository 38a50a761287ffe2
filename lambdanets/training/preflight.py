"""What is looked at before a run starts, and what it may be asked: nothing is written until all of it is right."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves

from lambdanets.errors import BadRecipe, BadRun, need, printable
from lambdanets.files import present, to_stderr, write_json
from lambdanets.recipes.recipe import Options, TrainingRecipe
from lambdanets.runs.checkpoints import LEFT_AT_THE_START
from lambdanets.runs.folder import choose_folder, versions
from lambdanets.runs.record import RUN_JSON
from lambdanets.runs.weights import check_weights
from lambdanets.training.distributed import Ranks
from lambdanets.training.learner import train_mode
from lambdanets.training.task import Place, Task
from lambdanets.training.watchdog import Watchdog


@dataclass
class Start:
    """A run that can start: `record` is its run.json to be, `old` the one in the folder where it is resumed."""

    recipe: TrainingRecipe
    task: Task
    options: Options
    folder: Path
    old: dict[str, Any] | None
    device: torch.device
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


def prepare(
    recipe: TrainingRecipe,
    task: Task,
    *,
    out: str | Path | None,
    seed: int,
    device: str,
    resume: bool,
    init_from: str | Path | None,
    options: Options,
    ranks: Ranks,
    watch: Watchdog,
    made: contextlib.ExitStack,
) -> Start:
    """Everything that a run needs, or its errors; arguments as in `loop.train`. Only reads, but for a folder
    runs/NAME-N, whose name is taken: where nothing gets into it, `made` removes it again."""
    _refuse_differences(recipe, task, seed, resume, init_from, options, ranks)
    folder: Path | None = None
    old: dict[str, Any] | None = None
    with ranks.together(), watch.working():
        if ranks.first:
            folder, old = _place(out, recipe, task, seed, resume, init_from)
            if out is None:
                made.callback(_remove_if_empty, folder)
        task.need()
        if options.tensorboard:
            need("tensorboard", "tensorboard", "--tensorboard asks for it")
        where = choose_device(device, ranks)
        _check_model(recipe, task, task.open(), ranks, options)
        prints, content = task.fingerprint(), task.stamp() if ranks.first else {}
    watch.beat()
    of_first = _OfTheFirst(*ranks.all([str(folder), old, prints])[0])
    folder, old = Path(of_first.folder), of_first.old
    with ranks.together():
        if old is not None and old["data"].get("fingerprint") != prints:
            source = old["data"]["source"]
            raise BadRun(f"--resume: {task.shown} are other images, names or labels than {source} was at the start")
        if prints != of_first.prints:
            raise BadRun(
                f"rank {ranks.rank} found other images in {task.shown} than rank 0: every machine needs the same"
            )
        if old is not None and ranks.first:
            _say_what_was_replaced(old["data"].get("content"), content, task.shown)
        task.make_batches(folder, ranks)
        if old is None:
            for _ in task.held_out.epoch(0):  # evaluation may skip none: what cannot be read is found now, not later
                watch.beat()
    own = task.record()
    own["data"] |= {"fingerprint": prints, "content": content}
    record: dict[str, Any] = {
        "status": "running",
        "id": secrets.token_hex(8) if old is None else old.get("id"),  # checkpoints name it; None: older ones do not
        "task": task.name,
        "recipe": dataclasses.asdict(recipe),
        **own,
        "seed": seed,
        "init_from": None,
        "device": str(where),
        "options": dataclasses.asdict(options),
        "versions": versions(),
        "starts": [],
        "history": [],
    }
    return Start(recipe, task, options, folder, old, where, record)


class _OfTheFirst(NamedTuple):
    """What rank 0 found: all use its folder, and must have found the same samples."""

    folder: str
    old: dict[str, Any] | None
    prints: dict[str, str]


def _refuse_differences(
    recipe: TrainingRecipe,
    task: Task,
    seed: int,
    resume: bool,
    init_from: str | Path | None,
    options: Options,
    ranks: Ranks,
) -> None:
    """All ranks must be asked for the same: all raise BadRun where they are not, with what differs. The device, the
    readers and the places of folders are a rank's own."""
    asked = {**dataclasses.asdict(recipe), "seed": seed, "resume": resume, **dataclasses.asdict(options)}
    asked |= {"init_from given": init_from is not None, **task.asked()}
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
    out: str | Path | None,
    recipe: TrainingRecipe,
    task: Task,
    seed: int,
    resume: bool,
    init_from: str | Path | None,
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
    old = task.read_record(folder)
    differing = recipe.differences(type(recipe).from_json(old["recipe"]))
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


def _check_model(recipe: TrainingRecipe, task: Task, batch: int, ranks: Ranks, options: Options) -> None:
    """Run the smallest part of a batch through the model on the meta device: checks sizes, computes nothing."""
    smallest = batch // ranks.ranks // recipe.accumulation
    if smallest < 1:
        raise BadRecipe(
            f"batch_images: a step of {batch} images is too small for {ranks.ranks} processes that take theirs in "
            f"{recipe.accumulation} parts: give a larger --batch-images"
        )
    try:
        with torch.device("meta"):
            model = task.create_model()
    except ValueError as error:  # an unknown name
        raise BadRecipe(f"model: {error}") from error
    if options.recompute and not hasattr(model, "stages"):
        raise BadRun(f"--recompute works block by block, and {recipe.model} has no stages of blocks")
    train_mode(model, recipe)
    if recipe.batch_norm == "sync":
        smallest *= ranks.ranks
    inputs = task.example(smallest, Place(torch.device("meta")))
    try:
        model(*inputs)
    except (ValueError, RuntimeError) as error:
        remedy = task.remedy
        if smallest == 1 and "more than 1 value per channel" in str(error):
            remedy = (
                "batch norm needs two: give another --batch-images, so that no part of a batch is a single image, or "
                "--batch-norm frozen"
            )
        shape = next((tuple(x.shape) for x in tree_leaves(inputs) if isinstance(x, torch.Tensor)), ())
        raise BadRecipe(f"{recipe.model} cannot train on a batch of {shape}: {error}; {remedy}") from error
