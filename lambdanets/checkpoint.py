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
import hashlib
import importlib.util
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import timm
import torch
import torchvision
from torch import Tensor, nn

import lambdanets
from lambdanets.errors import BadRun, printable, some
from lambdanets.files import field, json_object, open_file, placed, read_json
from lambdanets.layer import mismatch
from lambdanets.record import RUN_JSON, read_record, recipe_of, view_of
from lambdanets.state import DTYPES, is_finite, safetensors_bytes
from lambdanets.steps import STATE, TENSORS, is_checkpoint, read_checkpoint
from lambdanets.transforms import View

WEIGHTS = "weights.safetensors"
CURVES = "curves.png"
BAD_SAMPLES = "bad_samples.jsonl"
_HEADER_BYTES = 16 << 20  # of a file of weights; above this it is refused unread
_PIECE_BYTES = 1 << 20
_TORCH = {name: dtype for dtype, name in DTYPES.items()}


def need(module: str, extra: str, why: str) -> None:
    """Raises BadRun, with the command that installs it, where an optional module is missing."""
    if importlib.util.find_spec(module) is None:
        raise BadRun(f"{module} is not installed ({why}): pip install 'lambdanets[{extra}]'")


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


# --- weights --------------------------------------------------------------------------------------------------------


def save_weights(model: nn.Module, path: Path) -> None:
    """The model's state dict as safetensors, atomically. A table shared by several layers is written under each name:

    lambdanets.create_model(...).load_state_dict(safetensors.torch.load_file(path)) then loads strictly. The file's
    metadata holds the sha256 of the rest of it, so that it needs no other file to tell whether it is as it was written.
    """
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    head, *pieces = safetensors_bytes(tensors)
    header = json.loads(bytes(head[8:]))
    digest = _digest_of_header(header)
    for piece in pieces:
        digest.update(piece)
    sealed = {"__metadata__": {"format": "pt", "sha256": digest.hexdigest()}, **header}
    text = json.dumps(sealed, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with placed(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for piece in pieces:
            file.write(piece)


def _digest_of_header(header: Mapping[str, Any]) -> hashlib._Hash:
    """A sha256 that has taken the tensors' names, types, shapes and places, however the header is written."""
    own = {name: entry for name, entry in header.items() if name != "__metadata__"}
    return hashlib.sha256(json.dumps(own, sort_keys=True, separators=(",", ":")).encode())


class Weights:
    """The weights in a safetensors file, a run's folder, or a checkpoint RUN/step-N (there the running average).

        with Weights(path) as found:
            found.shapes              # {"fc.bias": (10,), ...}, from the header: no tensor is read yet
            tensors = found.read()

    So that what does not fit a model costs nothing, whatever sizes it claims. The file is open from the first to the
    last: one that is replaced meanwhile is read as it was. A pickle is refused: reading one runs what is in it. Raises
    BadRun, naming the file and the remedy: missing, a pickle, cut short, no safetensors.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._names: dict[str, str] | None = None  # of the average's tensors in a checkpoint
        if is_checkpoint(self.path):
            self._names = _average_names(self.path)
        self.file = weights_file(self.path)
        try:
            self._opened: IO[bytes] = open_file(self.file)
        except FileNotFoundError:
            raise BadRun(f"{self.file} does not exist: name a safetensors file, or the folder of a run") from None
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
            raise BadRun(f"{self.file} cannot be read: {error}") from error
        try:
            self._read_header()
        except BaseException:
            self._opened.close()
            raise

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self._tensors[held][1] for name, held in self._wanted().items()}

    def _wanted(self) -> dict[str, str]:
        return {name: name for name in self._tensors} if self._names is None else self._names

    def _read_header(self) -> None:
        try:
            head = self._opened.read(8)
            if head[:2] == b"PK" or head[:1] == b"\x80":  # torch.save since 1.6, and before
                raise BadRun(
                    f"{self.file} is a pickle, and reading one runs what is in it: where you trust it, load it with "
                    "torch, and write its state dict with safetensors.torch.save_file"
                )
            size_bytes = os.fstat(self._opened.fileno()).st_size
            header_bytes = int.from_bytes(head, "little")
            if len(head) < 8 or header_bytes > size_bytes - 8:
                raise ValueError("it ends before its header does")
            if header_bytes > _HEADER_BYTES:
                raise ValueError(f"its header has {header_bytes:,} bytes, more than {_HEADER_BYTES:,}")
            self._header = json_object(self._opened.read(header_bytes))
            self._data_at = 8 + header_bytes
            self._tensors = _tensors_of(self._header, size_bytes - self._data_at)
            if missing := set(self._wanted().values()) - self._tensors.keys():
                raise ValueError(f"it lacks tensors that {STATE} names: {some(sorted(missing))}")
        except BadRun:
            raise
        except (OSError, ValueError) as error:
            raise BadRun(f"{self.file} cannot be read, it may be cut short or no safetensors: {error}") from error

    def misfit(
        self, model: nn.Module, names: Iterable[str] | None = None, *, may_lack: Iterable[str] = ()
    ) -> str | None:
        """What does not fit the model (at most ten names a kind) and what to do; None: all fits.

        names     of the tensors that are to be loaded; None: all
        may_lack  names of the model
        """
        own, shapes = model.state_dict(), self.shapes
        if names is not None:
            shapes = {name: shapes[name] for name in names}
        counters = [name for name in own if name.endswith(".num_batches_tracked")]  # torch does without them too
        missing = sorted(own.keys() - shapes.keys() - set(may_lack) - set(counters))
        extra = sorted(map(printable, shapes.keys() - own.keys()))
        both = sorted(own.keys() & shapes.keys())
        differing = {n: (tuple(own[n].shape), shapes[n]) for n in both if tuple(own[n].shape) != shapes[n]}
        if missing or extra or differing:
            return mismatch(str(self.file), differing, missing, extra)
        held = self._wanted()
        types = {n: self._tensors[held[n]][0] for n in both}
        if wrong := [n for n in both if own[n].is_floating_point() and not types[n].is_floating_point]:
            return f"{some(wrong)} of {self.file} are {types[wrong[0]]}, no floating-point numbers as the model's"
        return None

    def read(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """The tensors, or those of some names. Raises BadRun: the file is not as it was written, or a tensor holds what
        is not finite (at most ten named)."""
        wanted = self._wanted()
        if names is not None:
            wanted = {name: wanted[name] for name in names}
        held = set(wanted.values())
        try:
            found = dict(self._read(held))
        except (OSError, ValueError) as error:
            raise BadRun(f"{self.file} cannot be read: {error}") from error
        tensors = {name: found[held] for name, held in wanted.items()}
        if wrong := [name for name, value in tensors.items() if not is_finite(value)]:
            raise BadRun(f"{self.file}: {len(wrong)} tensors are not finite: {some(wrong)}; take older weights")
        return tensors

    def _read(self, wanted: set[str]) -> Iterator[tuple[str, Tensor]]:
        metadata = self._header.get("__metadata__")
        sealed = metadata.get("sha256") if isinstance(metadata, dict) else None
        digest = _digest_of_header(self._header)
        for name, (dtype, shape, begin, end) in sorted(self._tensors.items(), key=lambda tensor: tensor[1][2:]):
            if name not in wanted and sealed is None:
                continue
            self._opened.seek(self._data_at + begin)
            content = bytearray(end - begin if name in wanted else min(end - begin, _PIECE_BYTES))
            left = end - begin
            while left:
                piece = memoryview(content)[-left:] if name in wanted else memoryview(content)[:left]
                count = self._opened.readinto(piece[:_PIECE_BYTES])  # type: ignore[attr-defined]
                if not count:
                    raise ValueError("it was cut short while it was read")
                if sealed is not None:
                    digest.update(piece[:count])
                left -= count
            if name in wanted:
                flat = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
                yield name, flat.view(shape)
        if sealed not in (None, digest.hexdigest()):
            raise ValueError("it is not as it was written, its sha256 differs: copy it again, or take older weights")


def _tensors_of(header: dict[str, Any], size_bytes: int) -> dict[str, tuple[torch.dtype, tuple[int, ...], int, int]]:
    """name -> type, shape and place of each tensor of a safetensors header. Raises ValueError where they do not fill
    the file, without holes and without overlaps."""
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        kind, shape = field(entry, "dtype", str), field(entry, "shape", list)
        offsets = field(entry, "data_offsets", list)
        if kind not in _TORCH:
            raise ValueError(f"{printable(name)} is of the type {printable(kind)}, unknown here")
        if any(type(n) is not int or n < 0 for n in [*shape, *offsets]) or len(offsets) != 2:
            raise ValueError(f"{printable(name)} has the shape {shape} and lies at {offsets}")
        begin, end = offsets
        if end - begin != prod(shape) * _TORCH[kind].itemsize:
            raise ValueError(f"{printable(name)}, {kind} of {shape}, does not take the {end - begin:,} bytes it has")
        found[name] = (_TORCH[kind], tuple(shape), begin, end)
    at = 0
    for name, (_, _, begin, end) in sorted(found.items(), key=lambda tensor: tensor[1][2:]):
        if begin != at:
            raise ValueError(f"{printable(name)} begins at {begin:,}, and what is before it ends at {at:,}")
        at = end
    if at != size_bytes:
        raise ValueError(f"its header tells of {at:,} bytes, and it has {size_bytes:,}")
    return found


def _average_names(path: Path) -> dict[str, str]:
    """The running average of a checkpoint: a model's name -> the name in its file. The checkpoint is compared with its
    manifest, in pieces. Raises BadRun."""
    read_checkpoint(path)
    try:
        average = field(field(read_json(path / STATE), "learner", dict), "average", dict)
        return {name: field(entry, "$tensor", str) for name, entry in average.items()}
    except (OSError, ValueError) as error:
        raise BadRun(f"{path / STATE} does not tell of a model's weights: {error}") from error


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, a run's folder, or a checkpoint RUN/step-N: there the running average.

    All that the file says it holds is read; where a model is there to compare with, `Weights` costs less. Raises what
    that raises. Whether the tensors fit a model, its `load_state_dict` says.
    """
    with Weights(path) as found:
        return found.read()


def check_weights(folder: Path) -> None:
    """Raises BadRun where the weights of a finished run are gone, or are not as they were written."""
    try:
        with Weights(folder) as found:
            found.read(())
    except BadRun as error:
        remedy = f"copy {WEIGHTS} back from elsewhere, or train again in another folder"
        raise BadRun(f"{folder} is finished, but without its weights: {error}; {remedy}") from error


def weights_file(path: Path) -> Path:
    """The file that `read_weights` reads the tensors of a path from."""
    if not os.path.isdir(path):
        return path
    return path / (TENSORS if is_checkpoint(path) else WEIGHTS)


# --- a run ----------------------------------------------------------------------------------------------------------


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

    Raises BadRun, naming the file, where anything is missing, damaged or does not fit together.
    """
    folder = Path(os.path.abspath(source)).parent if is_checkpoint(source) else Path(source)
    record = read_record(folder)
    recipe, view, classes = recipe_of(record), view_of(record), tuple(record["classes"])
    if not os.path.lexists(file := weights_file(Path(source))):
        raise BadRun(f"{folder} is not the folder of a run with a finished epoch: it has no {file.name}")

    def build() -> nn.Module:
        try:
            return lambdanets.create_model(recipe.model, num_classes=len(classes), in_channels=recipe.in_channels)
        except ValueError as error:
            raise BadRun(f"{folder / RUN_JSON} is not a run of lambdanets {lambdanets.__version__}: {error}") from error

    with Weights(source) as found:
        with torch.device("meta"):  # compared before there is memory for either
            if (why := found.misfit(build())) is not None:
                raise BadRun(f"{found.file} is not the weights of this run's {recipe.model}: {why}")
        tensors = found.read()
    model = build()
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise BadRun(f"{found.file} is not the weights of this run's {recipe.model}: {error}") from error
    return Run(folder, model.eval(), view, classes, record)
