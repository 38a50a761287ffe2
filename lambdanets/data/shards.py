"""Tar shards in the WebDataset layout, read by sample: an index says where each lies, so any can be read at any time.

A data set of shards is a folder, or a URL that fsspec opens, with

    manifest.json         classes; of each split its shards, each with samples, bytes and sha256, and heads
    train-00000.tar ...   KEY.jpg beside KEY.cls (the label in digits) or KEY.json ({"label": 3})
    train.start.npy       uint64, where in its shard a sample's picture begins: at its header
    train.bytes.npy       uint32, from there to the picture's last byte
    train.label.npy       int32
    val-..., val....      the same of the pictures held out

Pictures that nobody has labelled are unlabelled-00000.tar ..., a KEY.jpg each, with the columns start and bytes.

Where a wing says more of a picture than a label, KEY.json holds that, labels are 0, and the manifest names the files
beside it that say the same of all pictures (`Manifest.files`).

Samples count through the shards in the manifest's order.  `pack.py` writes all this.  `ShardImages` reads a sample,
`stream` whole shards, where a store serves no parts of files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, overload
from urllib.parse import unquote

import numpy as np
from PIL import Image

from lambdanets.data.archive import (
    MAX_MEMBER_BYTES,
    STREAM,
    Member,
    check_source,
    filesystem,
    header,
    join,
    key_and_suffix,
    read,
    retried,
    samples,
    whole,
)
from lambdanets.data.decode import open_image
from lambdanets.data.images import CHUNK_IMAGES, FolderData, Images
from lambdanets.data.index_files import column
from lambdanets.data.manifest import (
    COLUMNS,
    HEAD_BYTES,
    MANIFEST,
    UNLABELLED,
    Digest,
    Manifest,
    Shard,
    columns_of,
    manifest,
)
from lambdanets.data.order import hash_of
from lambdanets.errors import BadData, printable, some

_PICTURE_BYTES = MAX_MEMBER_BYTES + (3 << 20)  # with its header, which may be extended
_READERS = 16  # of a store, at a time, in each process
EVERY = "every picture"  # the split of `open_pictures`


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ShardImages(Images):
    """The pictures of one split, or of all. Names are read from the shards when they are asked for; labels lie in a
    mapped file.

    base          where the shards lie
    home          where manifest and index lie
    first_images  the number of each shard's first sample, and after the last the number of all
    streamed      whole shards are read by `stream`, since the store serves no parts of files
    """

    base: str
    home: str
    split: str
    shards: list[Shard]
    first_images: np.ndarray[Any, np.dtype[np.int64]]
    starts: np.ndarray[Any, np.dtype[np.uint64]]
    lengths: np.ndarray[Any, np.dtype[np.uint32]]
    paths: bool
    streamed: bool
    digest: str
    coming: dict[tuple[int, int], Future[bytes]] = dataclasses.field(default_factory=dict)  # (process, id): `expect`

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", _Names(self))  # of the archives themselves

    def load(self, index: int) -> Image.Image:
        """The picture. Raises BadImage where it is bad, BadData where the shard is: it is not what was indexed."""
        name, content = self.read(index)
        return open_image(content, name=name)

    def read(self, index: int) -> tuple[str, bytes]:
        """The name of a picture and the bytes of its file. Raises BadData where the shard is not what was indexed."""
        member, content = self._read(index)
        return self.called(index, member.name), content

    def label_parts(self) -> Iterator[np.ndarray[Any, np.dtype[np.integer[Any]]]]:
        """Read, not mapped: pages of a mapped file that were touched count as memory of this process."""
        if not isinstance(self.labels, np.memmap):
            yield from super().label_parts()
            return
        mapped: np.memmap[Any, Any] = self.labels
        for start in range(0, len(mapped), CHUNK_IMAGES):
            offset = mapped.offset + start * mapped.itemsize
            yield np.fromfile(str(mapped.filename), mapped.dtype, min(CHUNK_IMAGES, len(mapped) - start), offset=offset)

    def expect(self, ids: Sequence[int]) -> None:
        """Begins to read these from a store, 16 at a time: an answer may take 0.1 s, decoding takes 2 ms."""
        self.coming.clear()
        if not filesystem(self.base)[2]:
            pool = ThreadPoolExecutor(_READERS)
            process = os.getpid()  # threads, and so what they promised, do not follow into a forked worker
            self.coming.update({(process, index): pool.submit(self._bytes, index) for index in ids})
            pool.shutdown(wait=False)  # its threads end with the last of these

    def fingerprint(self) -> str:
        """Of classes, labels, and the sha256 of every shard (of `open_pictures` of that alone); the place does not
        count."""
        return self.digest

    def called(self, index: int, member: str) -> str:
        """The name of a sample whose picture is this member: the path that was packed, or shard and key."""
        key = key_and_suffix(member)[0]
        return unquote(key, errors="surrogateescape") if self.paths else f"{self._shard(index).name}/{key}"

    def name(self, index: int) -> str:
        """Read from the shard; of a damaged one, the place in it."""
        try:
            return self.called(index, self._read(index)[0].name)
        except BadData:
            return f"{self._shard(index).name}/sample {index - self.first_images[self._number(index)]:,}"

    def _number(self, index: int) -> int:
        return int(np.searchsorted(self.first_images, index, side="right")) - 1

    def _shard(self, index: int) -> Shard:
        return self.shards[self._number(index)]

    def _bytes(self, index: int) -> bytes:
        shard, start, length = self._shard(index), int(self.starts[index]), int(self.lengths[index])
        if start + length > shard.bytes or length > _PICTURE_BYTES:  # nothing is made ready for what cannot be
            found = f"{length:,} bytes from byte {start:,} of {shard.bytes:,}"
            raise BadData(f"{join(self.base, shard.name)}: the index says {found}: {self._remedy}")
        return read(self.base, shard.name, start, start + length)

    @property
    def _remedy(self) -> str:
        return f"it was changed after it was indexed; compare all: lambdanets index {self.home}"

    def _read(self, index: int) -> tuple[Member, bytes]:
        shard, start, length = self._shard(index), int(self.starts[index]), int(self.lengths[index])
        coming = self.coming.pop((os.getpid(), index), None)
        content = memoryview(coming.result() if coming is not None else self._bytes(index))
        place = 0

        def take(size: int) -> bytes:
            nonlocal place
            place += size
            return bytes(content[place - size : place])

        where = join(self.base, shard.name)
        member = header(take, where, start)
        if member is None or member.head_bytes + member.bytes != length:
            found = "a folder" if member is None else f"{member.name!r} with {member.bytes:,} bytes"
            raise BadData(f"{where}, byte {start:,}: {found} where the index has {length:,} bytes: {self._remedy}")
        return member, bytes(content[member.head_bytes :])

    def __reduce__(self) -> tuple[Any, ...]:  # to a worker that is not forked; a mapped file would travel as its bytes
        return _again, (f"{STREAM if self.streamed else ''}{self.home}", self.base, self.split)


def _again(where: str, base: str, split: str) -> Images:
    if split == EVERY:
        return open_pictures(where, allow_sources=(base,), compare=False)
    return open_parts(where, manifest(where.removeprefix(STREAM)), (base,), compare=False)[split]


class _Names(Sequence[str]):
    """The names in the archives, read one by one as they are asked for."""

    def __init__(self, images: ShardImages) -> None:
        self._images, self._n = images, len(images.starts)

    def __len__(self) -> int:
        return self._n

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._n))]
        if not -self._n <= index < self._n:
            raise IndexError(index)
        return self._images.name(index % self._n)


def is_shards(path: str | Path) -> bool:
    """Whether that is a data set of shards: a URL, or a folder with a manifest."""
    return "://" in str(path) or str(path).startswith((STREAM, "pipe:")) or os.path.isfile(Path(path) / MANIFEST)


def open_shards(where: str | Path, *, allow_sources: Sequence[str] = ()) -> FolderData:
    """Opens a data set of shards: a folder, a URL, or "stream:" before either (see `stream`).

    allow_sources  URLs that its manifest may name as the place of the shards, besides `where` and what lies below it

    Compared with the manifest are the index, byte for byte, and every shard's size and first bytes; `lambdanets index`
    compares every byte. A remote index is copied to ~/.cache/lambdanets once. Raises BadData: no manifest, a place that
    nobody allowed, a shard that is missing, cut, of another size or in another's place, an index that does not fit.
    """
    where = str(where)
    home = where.removeprefix(STREAM)
    held = manifest(home)
    if held.files:
        raise BadData(f"{home} holds no label a picture but {some(held.files)}: it is not for a classifier")
    if not held.labelled:
        remedy = f"a teacher labels them (lambdanets label RUN --data {home}), and a student takes them with --pseudo"
        raise BadData(f"{home} holds pictures without labels, and nothing can be trained on them alone: {remedy}")
    parts = open_parts(where, held, allow_sources)
    if len(held.classes) < 2:
        raise BadData(f"{join(home, MANIFEST)} has {len(held.classes)} class(es); a classifier needs two")
    train, val = parts["train"], parts["val"]
    counts = f"{len(train):,} training and {len(val):,} validation images of {len(held.classes):,} classes"
    how = f"shards {where}: {counts} in {len(train.shards):,} and {len(val.shards):,} archives"
    if held.left_out:
        how += f"; {held.left_out:,} unreadable ones were left out when they were packed"
    if train.streamed:
        how += "; streamed by webdataset: shards are drawn at random, so a resumed run draws anew"
    return FolderData(train, val, how, {})


def open_parts(
    where: str, held: Manifest, allow_sources: Sequence[str] = (), *, compare: bool = True
) -> dict[str, ShardImages]:
    """The pictures of each split of a manifest, compared as `open_shards` says.

    compare  False: again, in a process whose parent compared
    """
    home = where.removeprefix(STREAM)
    base = _compared_place(where, held, allow_sources, heads=None if not compare else not where.startswith(STREAM))
    parts = {}
    for split, listed in held.splits.items():
        start, length, label = _columns(home, held, split, list(COLUMNS), compare=compare)
        known = [shard[:4] for shard in listed]  # without heads: a run goes on with what it began with
        content = held.classes, held.paths, known, held.columns[split]["label"]
        parts[split] = ShardImages(
            held.classes, (), label, base, home, split, listed, _first_images(listed), start,
            length, held.paths, where.startswith(STREAM), hashlib.sha256(json.dumps(content).encode()).hexdigest(),
        )  # fmt: skip
    return parts


def open_pictures(
    where: str | Path, *, allow_sources: Sequence[str] = (), compare: bool = True, look_at_shards: bool = True
) -> ShardImages:
    """Every picture of a data set of shards, labelled or not, in the manifest's order (training ones first).

    Labels are ignored: there are no classes, and each is 0. Compared, and raised, is what `open_shards` says.
    compare         False: again, in a process whose parent compared
    look_at_shards  False: the index alone is compared, by a process that compares each shard when it reads it
    """
    where = str(where)
    home = where.removeprefix(STREAM)
    held = manifest(home)
    heads = not where.startswith(STREAM) if compare and look_at_shards else None
    base = _compared_place(where, held, allow_sources, heads=heads)
    read = [_columns(home, held, split, columns_of(UNLABELLED), compare=compare) for split in held.splits]
    start, length = read[0] if len(read) == 1 else (np.concatenate(parts) for parts in zip(*read, strict=True))
    listed = [shard for of in held.splits.values() for shard in of]
    digest = hashlib.sha256(json.dumps([shard[:4] for shard in listed]).encode()).hexdigest()
    labels = np.broadcast_to(np.int32(0), len(start))  # without memory
    return ShardImages(
        (), (), labels, base, home, EVERY, listed, _first_images(listed), start,
        length, held.paths, where.startswith(STREAM), digest,
    )  # fmt: skip


def _compared_place(where: str, held: Manifest, allow_sources: Sequence[str], *, heads: bool | None) -> str:
    """Where the shards lie, once their sizes are as the manifest says, and their heads. heads: None: not compared."""
    base = place_of(where.removeprefix(STREAM), held, allow_sources)
    if heads is not None and (wrong := differing(base, held, heads=heads)):
        count, why = sum(len(of) for of in held.splits.values()), (f"{name} {why}" for name, why in wrong.items())
        raise BadData(f"{len(wrong):,} of {count:,} shards of {base}: {some(why)}")
    return base


def _columns(
    home: str, held: Manifest, split: str, names: Sequence[str], *, compare: bool
) -> list[np.ndarray[Any, Any]]:
    if not held.splits[split]:
        raise BadData(f"{join(home, MANIFEST)} lists no shard of {split}")
    with ThreadPoolExecutor(len(names)) as pool:  # 2 GB to hash where there are 130 million samples
        return list(pool.map(functools.partial(column, home, held, split, compare=compare), names))


def _first_images(listed: list[Shard]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.concatenate([[0], np.cumsum([shard.samples for shard in listed], dtype=np.int64)])


def place_of(home: str, held: Manifest, allow_sources: Sequence[str]) -> str:
    """Where the shards lie. Raises BadData where the manifest sends us to a place that the user did not name."""
    if held.base:
        check_source(held.base, (home, *allow_sources), join(home, MANIFEST))
    return held.base or home


def differing(base: str, held: Manifest, *, heads: bool) -> dict[str, str]:
    """The shards that are not those of the manifest by their size, or by their first bytes, and why.

    Sizes come in one listing; each head is a read, 32 at a time.  heads: False where a store serves no parts.
    """
    found, path, local = filesystem(base)
    sizes: dict[str, int | None] = {}
    with contextlib.suppress(Exception):  # a store need not list, and then each shard is asked for
        listed = found.ls(path, detail=True) if local else retried(base, lambda: found.ls(path, detail=True))
        sizes = {str(entry["name"]).rpartition("/")[2]: entry.get("size") for entry in listed}

    def asked_for(shard: Shard) -> int | None:
        place, where = join(path, shard.name), join(base, shard.name)
        try:
            size = found.info(place).get("size") if local else retried(where, lambda: found.info(place).get("size"))
        except (OSError, BadData) as error:
            if isinstance(error, FileNotFoundError) or isinstance(error.__cause__, FileNotFoundError):
                return None
            raise BadData(f"{where}: {printable(error)}") from error
        return shard.bytes if size is None else int(size)  # some servers do not tell

    def wrong(shard: Shard) -> str | None:
        known = sizes.get(shard.name)
        size = known if known is not None else asked_for(shard)
        if size != shard.bytes:
            return "is missing" if size is None else f"has {size:,} bytes instead of {shard.bytes:,}"
        if heads and shard.head:
            head = read(base, shard.name, 0, min(HEAD_BYTES, shard.bytes))
            if hashlib.sha256(head).hexdigest() != shard.head:
                return "is not the archive that was indexed: it begins with other bytes"
        return None

    shards = [shard for of in held.splits.values() for shard in of]
    with ThreadPoolExecutor(32) as pool:
        return {shard.name: why for shard, why in zip(shards, pool.map(wrong, shards), strict=True) if why is not None}


class Streamed(NamedTuple):
    """A sample that came by: its id, name, label, and its picture's file."""

    id: int
    name: str
    label: int
    content: bytes


def stream(images: ShardImages, *parts: str | int, resampled: bool) -> Iterator[Streamed]:
    """Samples as whole shards come by.  resampled: without end, shards drawn by webdataset with a seed made of `parts`,

    the samples of several mixed in a buffer of 1,000; otherwise each sample once, in order.
    A shard that does not hold what the manifest says (count, sha256) raises BadData that names it.  Raises ImportError
    without webdataset.
    """
    if not resampled:
        for number in range(len(images.shards)):
            yield from _shard_samples(images, number)
        return
    try:
        from webdataset import DataPipeline, ResampledShards, shuffle
    except ImportError as error:
        raise ImportError("shards are streamed with webdataset: pip install lambdanets[stream]") from error
    seed = hash_of("stream", *parts)
    numbers = [str(number) for number in range(len(images.shards))]
    drawn = ResampledShards(numbers, seed=seed, worker_seed=lambda: 0, deterministic=True)

    def opened(source: Iterator[dict[str, str]]) -> Iterator[Streamed]:
        for found in source:
            yield from _shard_samples(images, int(found["url"]))

    yield from DataPipeline(drawn, opened, shuffle(1000, rng=random.Random(seed)))


def _shard_samples(images: ShardImages, number: int) -> Iterator[Streamed]:
    shard, first = images.shards[number], int(images.first_images[number])
    where, digest, count = join(images.base, shard.name), Digest(), 0
    with whole(images.base, shard.name, shard.bytes) as file:
        for sample in samples(file, where, digest.update, labelled=images.split != EVERY):
            index = first + count
            count += 1
            yield Streamed(index, images.called(index, sample.picture.name), sample.label, sample.content)
    found = digest.shard(shard.name, count)
    if (count, found.sha256) != (shard.samples, shard.sha256):
        seen = f"{count:,} samples with the sha256 {found.sha256}"
        raise BadData(f"{where} holds {seen}, the manifest says {shard.samples:,} with {shard.sha256}")
