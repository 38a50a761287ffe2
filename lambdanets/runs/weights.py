"""Weights as files: safetensors of ours, of others and of a checkpoint, read and written without a pickle."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from lambdanets import __version__
from lambdanets.errors import BadRun, mismatch, printable, some
from lambdanets.files import field, json_object, open_file, placed, read_json
from lambdanets.runs.checkpoints import STATE, TENSORS, is_checkpoint, read_checkpoint
from lambdanets.runs.folder import WEIGHTS
from lambdanets.runs.nested_state import DTYPES, is_finite, safetensors_bytes
from lambdanets.runs.record import RUN_JSON

_HEADER_BYTES = 16 << 20  # of a file of weights; above this it is refused unread
_PIECE_BYTES = 1 << 20
_TORCH = {name: dtype for dtype, name in DTYPES.items()}


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

    def rename(self, names: dict[str, str]) -> None:
        """Take these tensors under other names: a model's name -> the name they have now."""
        held = self._wanted()
        self._names = {ours: held[theirs] for ours, theirs in names.items()}

    def _read_header(self) -> None:
        try:
            head = self._opened.read(8)
            # torch.save since 1.6, and before. A header of 128 or 384 bytes begins with \x80 too: its length, of eight
            # bytes, ends in zeros, and a pickle's second half does not.
            if head[:4] == b"PK\x03\x04" or (head[:1] == b"\x80" and head[4:] != bytes(4)):
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


def with_weights(source: Path, folder: Path, build: Callable[[], nn.Module], what: str) -> nn.Module:
    """The model that `build` makes, in evaluation mode, with the weights of a run's folder or of RUN/step-N.

    folder  of the run; build raises ValueError where its record names no model
    what    the model is, for a person
    Raises BadRun, naming the file, where anything is missing, damaged or does not fit.
    """
    if not os.path.lexists(file := weights_file(source)):
        raise BadRun(f"{folder} is not the folder of a run with a finished epoch: it has no {file.name}")

    def built() -> nn.Module:
        try:
            return build()
        except ValueError as error:
            raise BadRun(f"{folder / RUN_JSON} is not a run of lambdanets {__version__}: {error}") from error

    with Weights(source) as found:
        with torch.device("meta"):  # compared before there is memory for either
            if (why := found.misfit(built())) is not None:
                raise BadRun(f"{found.file} is not the weights of this run's {what}: {why}")
        tensors = found.read()
    model = built()
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise BadRun(f"{found.file} is not the weights of this run's {what}: {error}") from error
    return model.eval()


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


def load_weights(model: nn.Module, source: str | Path) -> dict[str, str]:
    """Start `model` from weights that were trained before; a classifier for other classes stays new.

    source   a safetensors file with the names of `model.state_dict()`, the folder of a run, or its RUN/step-N
    returns  `said`, a line on what was loaded; `source`; and `sha256` of the file
    Raises BadRun: no such file, not safetensors, not finite, names or shapes of another model (at most ten a kind).
    """
    path = Path(source)
    file = weights_file(path)
    if path.is_dir() and not file.is_file():
        what = f"the run of {path} has not finished an epoch" if (path / RUN_JSON).is_file() else "it is no run"
        raise BadRun(f"--init-from {path}: it has no {file.name}, {what}: name a run's folder or a safetensors file")
    own = model.state_dict()
    head = [name for name in own if name.startswith(_classifier_name(model) + ".")]
    try:
        with Weights(path) as found:
            shapes = found.shapes
            kept = shapes.keys() & set(head)
            if any(shapes[name][:1] != own[name].shape[:1] for name in kept):  # for other classes
                kept = set()
            taken = [name for name in shapes if name not in head or name in kept]
            if (why := found.misfit(model, taken, may_lack=head)) is not None:
                raise BadRun(why)
            tensors = found.read(taken)
    except BadRun as error:
        raise BadRun(f"--init-from {error}") from error
    model.load_state_dict(tensors, strict=False)
    new = not any(name in tensors for name in head)
    classifier = (
        f"its classifier is for other classes, so a new one for {len(own[head[-1]])} starts" if new else "all of it"
    )
    said = f"weights from {file}: {classifier}"
    with open(file, "rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return {"said": said, "source": str(source), "sha256": digest}


def _classifier_name(model: nn.Module) -> str:
    classifier = model.get_classifier()  # type: ignore[operator]
    return next(name for name, module in model.named_modules() if module is classifier)
