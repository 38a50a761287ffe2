"""The columns of a selection (selection.py), written shard by shard from the label files, and what is counted there."""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections import Counter
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from lambdanets.errors import BadData
from lambdanets.files import placed
from lambdanets.pseudo_labels.label_rows import LabelFile, LabelRows, verified
from lambdanets.pseudo_labels.query import Choice
from lambdanets.pseudo_labels.selection import ROWS, forms_of

MOST_DOUBTFUL = 24
CONFIDENCE_BINS = 20

_MOST_ROWS = 1 << 32  # `row` has 32 bits
# Doubts are counted by their exponent, from -32 on, and 3 bits of their mantissa: a median is right to 12%.
_DOUBT_SHIFT, _DOUBT_FIRST, _DOUBT_BINS = 20, (127 - 32) << 3, 32 * 8 + 1


class Doubtful(NamedTuple):
    """A picture that was taken, one of those whose doubt is largest."""

    id: int
    label: int
    doubt: float
    top_class: list[int]
    top_prob: list[float]


class Columns(NamedTuple):
    """What was written, and counted on the way.

    classes     candidates, rows, draws, median_doubt of its rows (within 12%; None without rows): a list each
    confidence  rows in each twentieth of 0 to 1
    copies      how often a row is drawn -> rows
    doubtful    the rows of the largest doubt, that first
    unreadable  pictures that could not be labelled
    sha256      column -> of the bytes of its file
    """

    rows: int
    draws: int
    classes: dict[str, list[Any]]
    confidence: list[int]
    copies: dict[str, int]
    doubtful: list[Doubtful]
    unreadable: int
    sha256: dict[str, str]


def copies_of(rank: Any, rows: Any, per_class: int, max_copies: int = 0) -> np.ndarray[Any, np.dtype[np.int64]]:
    """How often the row is drawn that is number `rank` (from 0, by id) of the `rows` of its class.

    They sum to per_class and differ by one at most; max_copies bounds each, and then the class has fewer draws.

    >>> copies_of(np.arange(3), 3, 7).tolist(), copies_of(np.arange(2), 2, 7, 2).tolist()
    ([2, 2, 3], [2, 2])
    """
    rank = np.asarray(rank, np.int64)
    copies = (rank + 1) * per_class // rows - rank * per_class // rows
    return np.minimum(copies, max_copies) if max_copies else copies


def draws_of(choice: Choice, max_copies: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """(classes,): draws of each class."""
    rows = choice.rows
    draws = np.where(rows > 0, choice.per_class, 0)
    return np.minimum(draws, rows * max_copies) if max_copies else draws


class _Column:
    """A .npy file as it grows, with the sha256 of what is in it."""

    def __init__(self, file: IO[bytes], dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        self._file, self._dtype, self._digest = file, dtype, hashlib.sha256()
        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            head, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        )
        self._put(head.getvalue())

    def _put(self, content: bytes | memoryview) -> None:
        self._digest.update(content)
        self._file.write(content)

    def add(self, values: np.ndarray[Any, Any]) -> None:
        self._put(np.ascontiguousarray(values, self._dtype).tobytes())

    def sha256(self) -> str:
        return self._digest.hexdigest()


def written_columns(rows: LabelRows, choice: Choice, out: Path, rule: str, max_copies: int, threads: int) -> Columns:
    """Writes id, label, confidence, top_class, top_prob and row; every label file is read whole and `verified`.

    Memory does not depend on the number of rows. Raises BadData: a label file was changed; OSError: as on a full disk.
    """
    draws, n_rows = draws_of(choice, max_copies), int(choice.rows.sum())
    if n_rows >= _MOST_ROWS:
        raise BadData(f"{n_rows:,} pictures would be selected, {_MOST_ROWS:,} allowed: give a smaller --per-class")
    forms = forms_of(classes=len(rows.classes), top=rows.top, rows=n_rows, draws=int(draws.sum()))
    tally = _Tally(len(rows.classes))
    with contextlib.ExitStack() as stack:
        columns = {
            name: _Column(stack.enter_context(placed(out / f"{name}.npy")), *form) for name, form in forms.items()
        }
        done, seen = 0, np.zeros(len(rows.classes), np.int64)
        for _, part in rows.each(lambda file: _taken(rows, file, choice, rule), threads):
            label = part["label"]
            rank = seen[label] + _rank_in_class(label)
            seen += np.bincount(label, minlength=len(seen))
            copies = copies_of(rank, choice.rows[label], choice.per_class, max_copies)
            for name in ROWS:
                columns[name].add(part[name])
            columns["row"].add(np.repeat(np.arange(done, done + len(label)), copies))
            done += len(label)
            tally.add(part, copies)
        if (seen != choice.rows).any() or tally.draws != draws.sum():
            raise RuntimeError(
                f"{done:,} rows and {tally.draws:,} draws were written, not {n_rows:,} and {draws.sum():,}"
            )
    classes = {
        "candidates": choice.candidates.tolist(),
        "rows": choice.rows.tolist(),
        "draws": draws.tolist(),
        "median_doubt": tally.median_doubts(),
    }
    copied = {str(n): count for n, count in sorted(tally.copies.items())}
    sha256 = {name: of.sha256() for name, of in columns.items()}
    return Columns(
        done, tally.draws, classes, tally.confidence.tolist(), copied, tally.doubtful(), tally.unreadable, sha256
    )


def _taken(rows: LabelRows, file: LabelFile, choice: Choice, rule: str) -> dict[str, Any]:
    """The rows of a label file that were chosen, column by column, by (id, place)."""
    table = verified(rows.labels, file)
    bits = choice.picked[file.first : file.first + file.samples]
    sample, place = np.nonzero(np.unpackbits(bits, axis=1, bitorder="little"))
    found = {name: table.column(name).to_numpy() for name in ("class", "confidence", "doubt")}
    for name in ("top_class", "top_prob"):
        values = table.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False)
        found[name] = values.reshape(file.samples, rows.top)
    unreadable = int((found["class"] < 0).sum())
    if rule == "rank":
        label, confidence = found["top_class"][sample, place], found["top_prob"][sample, place].astype(np.float32)
        doubt = 1 - confidence
    else:
        label, confidence, doubt = (found[name][sample] for name in ("class", "confidence", "doubt"))
    return {
        "id": file.first + sample, "label": label.astype(np.int64), "confidence": confidence, "doubt": doubt,
        "top_class": found["top_class"][sample], "top_prob": found["top_prob"][sample], "unreadable": unreadable,
    }  # fmt: skip


def _rank_in_class(label: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """How many before it have the same label.

    >>> _rank_in_class(np.array([4, 1, 4, 4, 1])).tolist()
    [0, 0, 1, 2, 1]
    """
    order = np.argsort(label, kind="stable")
    in_order = label[order]
    rank = np.empty(len(label), np.int64)
    rank[order] = np.arange(len(label)) - np.searchsorted(in_order, in_order)
    return rank


class _Tally:
    def __init__(self, classes: int) -> None:
        self._doubts = np.zeros((classes, _DOUBT_BINS), np.uint32)
        self.confidence = np.zeros(CONFIDENCE_BINS, np.int64)
        self.copies: Counter[int] = Counter()
        self._most: list[Doubtful] = []
        self.unreadable = self.draws = 0

    def add(self, part: dict[str, Any], copies: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        self.unreadable += part["unreadable"]
        self.draws += int(copies.sum())
        values, counts = np.unique(copies, return_counts=True)
        self.copies.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        doubt = part["doubt"].astype(np.float32)
        bins = (doubt.view(np.uint32) >> _DOUBT_SHIFT).astype(np.int64)  # floats above 0 are in the order of their bits
        bins = (bins - _DOUBT_FIRST).clip(0, _DOUBT_BINS - 1)
        np.add.at(self._doubts, (part["label"], bins), 1)
        of = (part["confidence"] * CONFIDENCE_BINS).astype(np.int64).clip(0, CONFIDENCE_BINS - 1)
        self.confidence += np.bincount(of, minlength=CONFIDENCE_BINS)
        most = np.lexsort((part["id"], -doubt))[:MOST_DOUBTFUL] if len(doubt) <= 4 * MOST_DOUBTFUL else _largest(doubt)
        self._most += [
            Doubtful(
                int(part["id"][at]), int(part["label"][at]), float(doubt[at]),
                part["top_class"][at].tolist(), part["top_prob"][at].tolist(),
            )
            for at in most.tolist()
        ]  # fmt: skip
        self._most = self.doubtful()

    def doubtful(self) -> list[Doubtful]:
        return sorted(self._most, key=lambda one: (-one.doubt, one.id, one.label))[:MOST_DOUBTFUL]

    def median_doubts(self) -> list[float | None]:
        """The middle of the bin that has a class's median."""
        found: list[float | None] = [None] * len(self._doubts)
        total = self._doubts.sum(axis=1, dtype=np.int64)
        for at in np.flatnonzero(total).tolist():
            middle = int(np.searchsorted(np.cumsum(self._doubts[at], dtype=np.int64), (int(total[at]) + 1) // 2))
            bits = ((middle + _DOUBT_FIRST) << _DOUBT_SHIFT) + (1 << (_DOUBT_SHIFT - 1))
            found[at] = float(f"{np.array([bits], np.uint32).view(np.float32)[0]:.3g}")
        return found


def _largest(doubt: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Positions of the MOST_DOUBTFUL largest, the first of equal ones."""
    at_least = np.partition(doubt, -MOST_DOUBTFUL)[-MOST_DOUBTFUL]
    above, equal = np.flatnonzero(doubt > at_least), np.flatnonzero(doubt == at_least)
    return np.concatenate([above, equal[: MOST_DOUBTFUL - len(above)]])
