"""The folder of a run: what is written there, in which order, and how it is read back. No pickle on either way.

    weights.safetensors   the evaluated weights of the last finished epoch
    run.json              recipe, view, classes, where the data came from, versions, history, results
    curves.png            loss and accuracy by epoch, and the confusion matrix
    report.html           the page of the run
    bad_samples.jsonl     images that training skipped, one a line, if there were any
    step-N/               a checkpoint (steps.py)
    .lock                 held by the process that trains

A file is written beside its place, synchronised and renamed: a reader sees the old one or the new one, never a part.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
import torchvision
from torch import Tensor, nn

import lambdanets
from lambdanets.batches import View
from lambdanets.files import write_atomically
from lambdanets.recipes import Recipe
from lambdanets.steps import TENSORS, BadRun, is_checkpoint, read_checkpoint

WEIGHTS = "weights.safetensors"
RUN_JSON = "run.json"
CURVES = "curves.png"
BAD_SAMPLES = "bad_samples.jsonl"


def need(module: str, extra: str, why: str) -> None:
    """Raises BadRun, with the command that installs it, where an optional module is missing."""
    if importlib.util.find_spec(module) is None:
        raise BadRun(f"{module} is not installed ({why}): pip install 'lambdanets[{extra}]'")


def choose_folder(out: str | Path | None, name: str) -> Path:
    """The folder for a new run: `out`, or the next runs/NAME-N by number. Nothing is created.

    Raises BadRun where `out` is a file or holds anything: a run is never mixed with another.
    """
    if out is None:
        return next_numbered(Path("runs"), name)
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise BadRun(f"--out {folder} is a file: name a folder")
    if folder.is_dir() and (held := sorted(p.name for p in folder.iterdir())):
        kind = "holds another run" if RUN_JSON in held else f"is not empty (it holds {held[0]})"
        raise BadRun(f"--out {folder} {kind}: name a new folder, or delete that one")
    return folder


def next_numbered(folder: Path, name: str) -> Path:
    """FOLDER/NAME-N with N one above the largest there, by number."""
    found = (re.fullmatch(rf"{re.escape(name)}-(\d+)", path.name) for path in folder.glob(f"{name}-*"))
    return folder / f"{name}-{max((int(match[1]) for match in found if match), default=0) + 1}"


def versions() -> dict[str, str | None]:
    """What computed a run: Python, the packages, and this project's commit where the package is a checkout of it."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    found |= {module.__name__: module.__version__ for module in (torch, torchvision, timm, lambdanets)}
    found["lambdanets_commit"] = None
    root = Path(__file__).parents[1]
    if (root / ".git").exists():  # else it is installed, maybe inside the checkout of another project
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):  # no git, or no commit yet
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5)
            found["lambdanets_commit"] = done.stdout.strip()
    return found


def save_weights(model: nn.Module, path: Path) -> None:
    """The model's state dict as safetensors, atomically. A table shared by several layers is written under each name:

    lambdanets.create_model(...).load_state_dict(safetensors.torch.load_file(path)) then loads strictly.
    """
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    write_atomically(path, safetensors.torch.save(tensors))


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, a run's folder, or a checkpoint RUN/step-N: there the running average.

    A pickle is refused: reading one runs what is in it. Raises BadRun, naming the file and the remedy: missing, a
    pickle, cut short, or with weights that are not finite (at most ten named). Whether they fit a model, its
    `load_state_dict` says.
    """
    path = Path(path)
    if is_checkpoint(path):
        average: dict[str, Tensor] = read_checkpoint(path).load()["learner"]["average"]
        return average  # finite: another is never saved
    path = weights_file(path)
    try:
        with open(path, "rb") as file:
            head = file.read(4)
        if head[:2] == b"PK" or head[:1] == b"\x80":  # torch.save since 1.6, and before
            raise BadRun(
                f"{path} is a pickle, and reading one runs what is in it: where you trust it, load it with torch, and "
                "write its state dict with safetensors.torch.save_file"
            )
        tensors = safetensors.torch.load_file(path)
    except BadRun:
        raise
    except FileNotFoundError:
        raise BadRun(f"{path} does not exist: name a safetensors file, or the folder of a run") from None
    except Exception as error:  # safetensors has its own exception, not a ValueError
        raise BadRun(f"{path} cannot be read, it may be cut short: {error}") from error
    if wrong := [k for k, v in tensors.items() if v.is_floating_point() and not v.isfinite().all()]:
        more = f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise BadRun(f"{path}: {len(wrong)} tensors are not finite: {', '.join(wrong[:10])}{more}; take older weights")
    return tensors


def weights_file(path: Path) -> Path:
    """The file that `read_weights` reads the tensors of a path from."""
    if not path.is_dir():
        return path
    return path / (TENSORS if is_checkpoint(path) else WEIGHTS)


@dataclass(frozen=True)
class Run:
    """A run read back: its folder, model (eval mode, CPU), how it sees an image, classes, run.json."""

    folder: Path
    model: nn.Module
    view: View
    classes: tuple[str, ...]
    record: dict[str, Any]


def open_run(source: str | Path) -> Run:
    """Read a run's folder, with the weights of its last finished epoch; or a checkpoint RUN/step-N, with its own.

    Raises BadRun, naming the file, where anything is missing or does not fit together.
    """
    folder = Path(os.path.abspath(source)).parent if is_checkpoint(source) else Path(source)
    record_path, weights_path = folder / RUN_JSON, weights_file(Path(source))
    for path in (record_path, weights_path):
        if not path.is_file():
            raise BadRun(f"{folder} is not the folder of a run with a finished epoch: it has no {path.name}")
    try:
        record: dict[str, Any] = json.loads(record_path.read_text())
        recipe = Recipe.from_json(record["recipe"])
        view = View(**record["view"])
        classes = tuple(str(c) for c in record["classes"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadRun(f"{record_path} is not a run of lambdanets {lambdanets.__version__}: {error!r}") from error
    tensors = read_weights(source)
    model = lambdanets.create_model(recipe.model, num_classes=len(classes), in_channels=recipe.in_channels)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise BadRun(f"{weights_path} is not the weights of this run's {recipe.model}: {error}") from error
    return Run(folder, model.eval(), view, classes, record)
