"""Every file of labels read again: is each shard there, whole, of this plan and of this shard?"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from lambdanets.data.archive import join
from lambdanets.data.manifest import Shard
from lambdanets.data.source import absolute
from lambdanets.errors import BadData, printable, some
from lambdanets.pseudo_labels.label_files import (
    Labels,
    file_of,
    finished,
    labelled_pictures,
    read_file_of,
    read_labels,
)

_READERS = 8


@dataclass(frozen=True)
class Verified:
    """What `verify` counted: shards, pictures, and those that cannot be read."""

    home: str
    shards: int
    pictures: int
    bad: int

    def __str__(self) -> str:
        counts = f"all {self.shards:,} shards are labelled, {self.pictures:,} images"
        return f"{printable(self.home)}: {counts}; {self.bad:,} of these cannot be read"


def verify(home: str | Path, data: str | Path | None = None, *, allow_sources: Sequence[str] = ()) -> Verified:
    """Reads every file of labels and compares it with the plan, its own content_sha256, and its shard.

    data  where the shards lie now; None: where they lay when they were labelled
    Raises BadData that names each shard that is not labelled, and each file that is damaged or of something else.
    """
    labels = read_labels(absolute(home))
    images = labelled_pictures(labels, data, allow_sources=allow_sources, look_at_shards=False)
    there = finished(labels.home)
    missing = [shard for shard in images.shards if file_of(shard.name) not in there]
    counted = [shard for shard in images.shards if file_of(shard.name) in there]
    with ThreadPoolExecutor(_READERS) as pool:
        found = list(pool.map(lambda shard: _looked_at(labels, shard), counted))
    wrong = [one for one in found if isinstance(one, str)]
    if missing:
        remedy = "the command that made the others labels them"
        wrong.append(
            f"{len(missing):,} of {len(images.shards):,} shards are not labelled: {some(s.name for s in missing)}"
        )
        wrong[-1] += f"; {remedy}"
    if wrong:
        raise BadData(f"{printable(labels.home)} is not whole:\n  {some(wrong, between=chr(10) + '  ')}")
    rows = [one for one in found if not isinstance(one, str)]
    return Verified(labels.home, len(images.shards), sum(n for n, _ in rows), sum(bad for _, bad in rows))


def _looked_at(labels: Labels, shard: Shard) -> tuple[int, int] | str:
    """Rows of a shard's labels and those without a picture that can be read; or what is wrong with the file."""
    name = file_of(shard.name)
    try:
        table, footer = read_file_of(labels, name)
    except BadData as error:
        return str(error)
    if (footer.shard_sha256, footer.samples) != (shard.sha256, shard.samples):
        return f"{join(labels.home, name)} has the labels of another {shard.name}: remove it, and label again"
    return table.num_rows, table.num_rows - table.column("error").null_count
