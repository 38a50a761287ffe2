"""The folder of a run: what is written there, in which order, and how it is read back. No pickle on either way.

    weights.safetensors   the evaluated weights of the last finished epoch
    run.json              recipe, view, classes, where the data came from, versions, history, results
    curves.png            loss and accuracy by epoch, and the confusion matrix
    report.html           the page of the run
    bad_samples.jsonl     images that training skipped, one a line, if there were any
    step-N/               a checkpoint (checkpoints.py)
    .lock                 held by the process that trains
    evaluation-N/         of `lambdanets evaluate`: evaluation.json and its pictures

A file is written beside its place, synchronised and renamed: a reader sees the old one or the new one, never a part.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
import torchvision

import lambdanets
from lambdanets.errors import BadRun, printable
from lambdanets.files import lock
from lambdanets.runs.record import RUN_JSON

WEIGHTS = "weights.safetensors"
CURVES = "curves.png"
REPORT = "report.html"
BAD_SAMPLES = "bad_samples.jsonl"
EVALUATION_JSON = "evaluation.json"


class NotWritten(BadRun):
    """An evaluation was computed and cannot be written; `found` has its numbers, and `str()` of that shows them."""

    def __init__(self, where: str | Path, why: Exception, found: object) -> None:
        super().__init__(f"nothing of this evaluation is written to {where} ({why}): give another --out")
        self.found = found


def choose_folder(out: str | Path | None, name: str) -> Path:
    """The folder for a new run: `out`, not made yet; or the next runs/NAME-N by number, made and so taken.

    Raises BadRun where `out` is a file or holds anything, since a run is never mixed with another, or where the folder
    cannot be looked at or made.
    """
    if out is None:
        return next_numbered(Path("runs"), name)
    folder = Path(out)
    try:
        held = sorted(os.listdir(folder))
    except FileNotFoundError:
        return folder
    except NotADirectoryError as error:
        if folder.is_file():
            raise BadRun(f"--out {folder} is a file: name a folder") from error
        return folder  # below a file: where it is made, the error is said
    except (OSError, ValueError) as error:
        raise BadRun(f"--out {folder} cannot be used ({error}): name another folder") from error
    if held:
        kind = "holds another run" if RUN_JSON in held else f"is not empty (it holds {printable(held[0])})"
        raise BadRun(f"--out {folder} {kind}: name a new folder, or delete that one")
    return folder


def next_numbered(folder: Path, name: str) -> Path:
    """FOLDER/NAME-N with N one above the largest there, by number, made: of two that ask at once each gets its own.

    Raises BadRun where it cannot be made.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        while True:
            found = (re.fullmatch(rf"{re.escape(name)}-([0-9]+)", held) for held in os.listdir(folder))
            number = max((int(match[1]) for match in found if match), default=0) + 1
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder / f"{name}-{number}")
                return folder / f"{name}-{number}"
    except OSError as error:
        raise BadRun(f"no folder can be made in {folder} ({error}): name another with --out") from error


@contextlib.contextmanager
def evaluation_folder(run_folder: Path, out: str | Path | None) -> Iterator[Path]:
    """A folder that one evaluation alone writes in: the run's next evaluation-N, or `out`. Raises BadRun, OSError."""
    if out is None:
        folder = next_numbered(run_folder, "evaluation")
        try:
            yield folder
        except BaseException:
            with contextlib.suppress(OSError):  # it stays where one of the files is in it
                folder.rmdir()
            raise
        return
    os.makedirs(out, exist_ok=True)
    opened = os.open(out, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        lock(opened, out, wait=True)
        yield choose_folder(out, "evaluation")  # still empty, now that no other may write in it
    finally:
        os.close(opened)


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
