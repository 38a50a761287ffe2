"""The label files of a folder as one table: a row a picture, in the order of the shards that were labelled.

A file is taken if its footer says that it belongs to this folder's plan and to that shard, and it has the columns of
`label_files.schema` and no others. What its pages hold is compared with the footer's `content_sha256` by `verified`:
a turned bit passes DuckDB unseen.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from lambdanets.data.archive import filesystem, join, whole
from lambdanets.data.manifest import Shard
from lambdanets.errors import BadData, printable, some
from lambdanets.files import placed
from lambdanets.pseudo_labels.label_files import Labels, arrow, file_of, finished, read_columns, read_file_of

_AHEAD = 4  # files that are read ahead, a thread
_FILE_BYTES = 1 << 30

T = TypeVar("T")
U = TypeVar("U")


class LabelFile(NamedTuple):
    """The labels of one shard.

    name            of the file in the folder
    path            of it on this machine
    first           the number of the shard's first picture in the data set
    content_sha256  of its values, as its footer says
    """

    name: str
    path: str
    shard: str
    first: int
    samples: int
    content_sha256: str

    def refused(self, why: object) -> BadData:
        remedy = f"remove it, and label again with the same command, which does {printable(self.shard)} anew"
        return BadData(f"{self.path} cannot be used: {printable(why)[:300]}; {remedy}")


@dataclass(frozen=True)
class LabelRows:
    """The rows of a folder of labels.

    labels    the folder, on this machine
    files     in the order of the shards
    missing   shards that have no label file yet
    pictures  of all shards, those that are missing too: ids are below it
    """

    labels: Labels
    files: list[LabelFile]
    missing: list[Shard]
    pictures: int

    def __len__(self) -> int:
        """Rows that are there."""
        return sum(file.samples for file in self.files)

    @property
    def classes(self) -> tuple[str, ...]:
        """Of the teacher; a label is a position here."""
        return self.labels.classes

    @property
    def top(self) -> int:
        """Classes that are kept a picture."""
        return min(int(self.labels.plan["top"]), len(self.classes))

    @property
    def hashes(self) -> bool:
        """Whether the rows have `bytes_hash` and `look_hash`."""
        return bool(self.labels.plan["hashes"])

    def content_sha256(self) -> str:
        """Of all values: it changes with any of them, and not with how the files are written."""
        content = "".join(f"{file.first} {file.samples} {file.content_sha256}\n" for file in self.files)
        return hashlib.sha256(content.encode()).hexdigest()

    def each(self, take: Callable[[LabelFile], T], threads: int) -> Iterator[tuple[LabelFile, T]]:
        """What `take` gives of each file, in order; so many threads read, a few files ahead."""
        return zip(self.files, in_order(take, self.files, threads), strict=True)


def in_order(call: Callable[[U], T], items: Iterable[U], threads: int) -> Iterator[T]:
    """`map` by threads: what they give comes in order, and only a few are made ahead of the one that is wanted."""
    with ThreadPoolExecutor(threads) as pool:
        ahead: collections.deque[Future[T]] = collections.deque()
        try:
            for item in items:
                ahead.append(pool.submit(call, item))
                if len(ahead) > _AHEAD * threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for one in ahead:
                one.cancel()


def label_rows(labels: Labels, shards: Sequence[Shard], threads: int) -> LabelRows:
    """Finds the label files of these shards in a folder of this machine, and reads their footers alone.

    Raises BadData naming the file, why it cannot be used and what to do: one of another plan or of no shard, other
    columns than a label file's, cut short.
    """
    folder = labels.home
    by_name = {file_of(shard.name): shard for shard in shards}
    there = finished(folder)
    if strangers := sorted(there - set(by_name)):
        raise BadData(f"{folder} holds labels of no shard of the data set: {some(strangers)}; remove them")
    firsts = np.concatenate([[0], np.cumsum([shard.samples for shard in shards], dtype=np.int64)])
    wanted = [(name, int(first)) for name, first in zip(by_name, firsts, strict=False) if name in there]

    def file(found: tuple[str, int]) -> LabelFile:
        name, first = found
        shard, (columns, footer) = by_name[name], read_columns(labels, name)
        place = LabelFile(name, join(folder, name), shard.name, first, footer.samples, footer.content_sha256)
        if (footer.samples, footer.shard_sha256) != (shard.samples, shard.sha256):
            seen = f"{footer.samples:,} pictures with the sha256 {footer.shard_sha256[:16]}"
            raise place.refused(f"it is of a shard of {seen}, and the data set's has {shard.samples:,}")
        if wrong := _differing(columns, labels.schema):
            raise place.refused(f"its columns are not those of its plan: {some(wrong)}")
        return place

    files = list(in_order(file, wanted, threads))
    missing = [shard for name, shard in by_name.items() if name not in there]
    return LabelRows(labels, files, missing, int(firsts[-1]))


def _differing(found: Any, columns: Any) -> list[str]:
    """How a file's columns differ from those of a label file."""
    if found.equals(columns):
        return []

    def kind(of: Any) -> str:  # of a list without the name of its field, which parquet changes
        return f"{of.value_type}[{of.list_size}]" if hasattr(of, "list_size") else str(of)

    theirs, ours = ({column.name: kind(column.type) for column in of} for of in (found, columns))
    wrong = [
        f"{name} is {theirs.get(name, 'missing')}, not {of}" for name, of in ours.items() if theirs.get(name) != of
    ]
    wrong += [f"{name} ({of}) is unknown" for name, of in theirs.items() if name not in ours]
    return wrong or [f"{some(found.names)}, and not {some(columns.names)}"]


def column(file: LabelFile, *names: str) -> Any:
    """Some columns of a label file, not compared with its content_sha256: a table of pyarrow. Raises BadData."""
    pa = arrow()
    try:
        with pa.parquet.ParquetFile(file.path) as opened:
            return opened.read(list(names), use_threads=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise file.refused(error) from error


def verified(labels: Labels, file: LabelFile) -> Any:
    """The whole table of a label file, once its values are those of its footer and what they may be. Raises BadData."""
    table, footer = read_file_of(labels, file.name)
    if (footer.samples, footer.content_sha256) != (file.samples, file.content_sha256):
        raise file.refused("it was replaced while this command read it")
    if any(table.column(name).null_count for name in table.schema.names if name != "error"):
        raise file.refused("it has rows without a value")
    label, doubt = (table.column(name).to_numpy() for name in ("class", "doubt"))
    bad = table.column("error").is_valid().to_numpy()
    top = table.column("top_class").combine_chunks().flatten().to_numpy().reshape(file.samples, -1)
    most = len(labels.classes) - 1
    if (table.column("sample").to_numpy() != np.arange(file.samples)).any():
        raise file.refused("its rows are not the pictures of the shard, one by one")
    if ((label < 0) != bad).any() or label.max() > most or top.max() > most or (top[~bad] < 0).any():
        raise file.refused(f"it has a class outside 0 to {most}, or one where there is an error")
    if not ((doubt >= 0) & (doubt <= 1)).all():
        raise file.refused("it has a doubt outside 0 to 1")
    return table


def on_this_machine(labels: Labels, beside: Path, threads: int) -> Labels:
    """The labels in a folder of this machine: those of a store are copied to `beside`, since each is read thrice.

    Files that are there already are not copied again. Raises BadData, OSError.
    """
    _, path, local = filesystem(labels.home)
    if local:
        return dataclasses.replace(labels, home=str(path))
    beside.mkdir(parents=True, exist_ok=True)

    def copy(name: str) -> None:
        with whole(labels.home, name, most_bytes=_FILE_BYTES) as file, placed(beside / name) as to:
            while part := file.read(1 << 20):
                to.write(part)

    there = finished(labels.home)
    for _ in in_order(copy, sorted(there - finished(str(beside))), threads):
        pass
    return dataclasses.replace(labels, home=str(beside))
