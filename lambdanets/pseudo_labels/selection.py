"""A selection on the disk: which pictures a student learns from, how often, and with what label.

    selection.json   format, where it comes from, what was asked for, counts, the columns' sha256; written last
    excluded.jsonl   a line a copy of a held-out picture that was left out: its id, why, of which picture
    classes.png      draws, pictures and doubt of each class; report.html the same, with the most doubtful pictures
    id.npy           uint64, (rows,): the picture's number in the data set that was labelled, in its manifest's order
    label.npy        int32, (rows,): the class
    confidence.npy   float32, (rows,)
    top_class.npy    int16 (int32 of more than 32,767 classes), (rows, K)
    top_prob.npy     float16, (rows, K)
    row.npy          uint32, (draws,): which row each draw is of, ascending

Ids ascend; a class has `per_class` draws where it has any (docs/pseudo-labels.md says how ties and copies fall). Of the
rule "rank" a picture may have several rows, one a class.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from lambdanets.data.images import CHUNK_IMAGES
from lambdanets.data.index_files import array, sha256_of
from lambdanets.errors import BadData, DiskFault, printable, some
from lambdanets.files import field, json_object, read_file
from lambdanets.runs.record import strings

FORMAT = "lambdanets selection 1"
SELECTION_JSON = "selection.json"
ROWS = {"id": "<u8", "label": "<i4", "confidence": "<f4", "top_class": "<i2", "top_prob": "<f2"}
DRAWS = {"row": "<u4"}

_JSON_BYTES = 256 << 20  # of selection.json, at most
_INT16_CLASSES = 32_767  # more need 32 bits

Column = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False, repr=False)
class Selection:
    """A selection on the disk, its columns mapped: 130 million draws cost no memory.

    folder   where it lies
    held     its selection.json
    digest   of that: 64 hexadecimal digits
    order    the number of each of the teacher's classes among those that are learnt; None: they are the same
    id, label, top_class, top_prob, row   the columns, as they lie there; classes are the teacher's numbers
    """

    folder: Path
    held: dict[str, Any]
    digest: str
    id: Column
    label: Column
    top_class: Column
    top_prob: Column
    row: Column
    order: Column | None = None

    def fingerprint(self) -> str:
        """64 hexadecimal digits that change with anything in it, since selection.json has the columns' sha256; the
        place does not count."""
        return self.digest

    @property
    def classes(self) -> tuple[str, ...]:
        """The teacher's."""
        return tuple(self.held["classes"])

    @property
    def teacher(self) -> dict[str, Any]:
        """What the labels' plan says of it; {} where that is not known."""
        plan = self.held.get("labels", {}).get("plan", {})
        found = plan.get("teacher", {}) if isinstance(plan, dict) else {}
        return found if isinstance(found, dict) else {}

    def last_id(self) -> int:
        """The largest number of a picture."""
        return max(int(part.max()) for part in _parts(self.id))

    @property
    def draws(self) -> int:
        return len(self.row)

    def __len__(self) -> int:
        return len(self.id)

    def in_classes(self, classes: tuple[str, ...]) -> Selection:
        """The same with labels that are numbers among these classes. Raises BadData where they are others than the
        teacher's; their order may differ."""
        own = self.classes
        if own == classes:
            return self
        numbers = {name: number for number, name in enumerate(classes)}
        theirs = [repr(name) for name in own if name not in numbers]
        ours = [repr(name) for name in classes if name not in set(own)]
        if theirs or ours:
            only = [
                f"only the {what} has {some(names)}" for what, names in (("teacher", theirs), ("data", ours)) if names
            ]
            raise BadData(
                f"{self.folder}: the teacher told {len(own):,} classes apart, and the labelled pictures have "
                f"{len(classes):,}: {'; '.join(only)}. Use a teacher of the same classes, or name the classes alike"
            )
        return dataclasses.replace(self, order=np.array([numbers[name] for name in own], np.int64))

    def labels_of(self, rows: Any) -> Column:
        """int64, the classes of these rows."""
        return self._numbers(self.label[rows])

    def soft(self, rows: Any) -> tuple[Column, Column]:
        """Of these rows: the classes that were kept, int64 (b, K), and their probabilities, float16."""
        return self._numbers(self.top_class[rows]), np.asarray(self.top_prob[rows])

    def class_counts(self) -> Column:
        """int64, draws of each class."""
        found = np.zeros(len(self.classes), np.int64)
        for rows in _parts(self.row):
            found += np.bincount(self.labels_of(rows), minlength=len(found))
        return found

    def _numbers(self, found: Column) -> Column:
        found = np.asarray(found, np.int64)
        return found if self.order is None else self.order[found]

    def __reduce__(self) -> tuple[Any, ...]:  # to a worker that is not forked; a mapped file would travel as its bytes
        return _again, (str(self.folder), self.digest, self.order)


def _again(folder: str, digest: str, order: Column | None) -> Selection:
    found = open_selection(folder, compare=False)
    if found.digest != digest:
        raise BadData(f"{folder}: {SELECTION_JSON} was changed since the run began: put it back, and resume")
    return dataclasses.replace(found, order=order)


def forms_of(*, classes: int, top: int, rows: int, draws: int) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Column -> its type and shape, of a selection of that size."""
    forms: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
    for name, kind in {**ROWS, **DRAWS}.items():
        dtype = np.dtype("<i4" if name == "top_class" and classes > _INT16_CLASSES else kind)
        forms[name] = dtype, (draws,) if name in DRAWS else (rows, top) if name.startswith("top_") else (rows,)
    return forms


def open_selection(path: str | Path, *, compare: bool = True) -> Selection:
    """Opens a selection: a folder that `lambdanets select` wrote.

    compare  False: again, in a process whose parent compared
    Raises BadData: no selection.json, one of another format, a column that is missing, cut, changed since it was
    written (sha256), or that names a class, a row or a picture that cannot be; DiskFault where a file cannot be read.
    """
    if "://" in str(path):
        raise BadData(f"{path} is a URL, and a selection is read from a disk, in any order: copy it there")
    folder = Path(os.path.abspath(path))
    where = folder / SELECTION_JSON
    try:
        content = read_file(where, _JSON_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise BadData(f"{path} holds no {SELECTION_JSON}: give the folder that `lambdanets select` wrote") from None
    except OSError as error:
        raise DiskFault(str(where), f"cannot be read: {error.strerror or error}") from error
    try:
        held = _checked(json_object(content))
    except ValueError as error:
        raise BadData(f"{where} is no selection of this version: {printable(error)}") from error
    forms = forms_of(classes=len(held["classes"]), top=held["top"], rows=held["rows"], draws=held["draws"])
    del forms["confidence"]  # for people
    columns = {
        name: _column(folder / f"{name}.npy", dtype, shape, held["columns"][name], compare=compare)
        for name, (dtype, shape) in forms.items()
    }
    found = Selection(folder, held, hashlib.sha256(content).hexdigest(), **columns)
    if compare:
        _check_bounds(found)
    return found


def _checked(held: dict[str, Any]) -> dict[str, Any]:
    """selection.json, whose fields that are used here are of their types. Raises ValueError."""
    if held.get("format") != FORMAT:
        raise ValueError(f"its format is {str(held.get('format'))[:60]!r}, not {FORMAT!r}")
    classes = strings(held, "classes")
    if len(classes) < 2 or len(set(classes)) < len(classes):
        raise ValueError("its 'classes' should be two different names at least")
    for name, most in (("rows", 2**32), ("draws", 2**40), ("top", len(classes))):
        if not 0 < field(held, name, int) <= most:
            raise ValueError(f"its {name!r} is {held[name]}: it should be 1 to {most:,}")
    for name in ("teacher_sha256", "rule"):
        field(held, name, str)
    field(held, "labels", dict)
    pictures = field(held, "pictures", dict)
    for name in ("source", "fingerprint"):
        field(pictures, name, str)
    for data in field(held, "exclude", list):
        field(data, "held_out", str)
        field(data, "train", (str, type(None)))
    columns = field(held, "columns", dict)
    for name in (*ROWS, *DRAWS):
        field(columns, name, str)
    return held


def _column(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], sha256: str, *, compare: bool) -> Column:
    remedy = "copy the selection again, or select again into a new folder"
    if not path.is_file():
        raise BadData(f"{path} is missing: {remedy}")
    mapped = array(path, str(path), dtype, shape, remedy)
    if compare:
        try:
            seen = sha256_of(path)
        except OSError as error:
            raise DiskFault(str(path), f"cannot be read: {error.strerror or error}") from error
        if seen != sha256:
            raise BadData(f"{path}: its sha256 is {seen}, {SELECTION_JSON} says {sha256}, so it was changed: {remedy}")
    return mapped


def _check_bounds(found: Selection) -> None:
    """Raises BadData where a column names what cannot be: the folder may be a stranger's."""
    classes = len(found.classes)
    for name, most in (("label", classes), ("top_class", classes), ("row", len(found))):
        for part in _parts(getattr(found, name)):
            if int(part.min()) < 0 or int(part.max()) >= most:
                raise BadData(f"{found.folder}: {name}.npy has numbers outside 0 to {most - 1:,}: select again")
    for part in _parts(found.top_prob):
        probs = part.astype(np.float32)
        if not (np.isfinite(probs).all() and probs.min() >= 0 and probs.max() <= 1 and probs.any(axis=1).all()):
            raise BadData(f"{found.folder}: top_prob.npy has rows that are no probabilities: select again")


def _parts(column: Column) -> Iterator[Column]:
    """A million rows at a time, read, not mapped: pages of a mapped file that were touched count as memory."""
    file = cast("np.memmap[Any, Any]", column)
    width = math.prod(column.shape[1:])
    for start in range(0, len(column), CHUNK_IMAGES):
        offset, n = file.offset + start * width * column.itemsize, min(CHUNK_IMAGES, len(column) - start)
        yield np.fromfile(str(file.filename), column.dtype, n * width, offset=offset).reshape(n, *column.shape[1:])
