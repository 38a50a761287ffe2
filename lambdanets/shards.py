"""Tar shards in the WebDataset layout, read by sample: an index says where each lies, so any can be read at any time.

A data set of shards is a folder, or a URL that fsspec opens, with

    manifest.json         classes; of each split its shards, each with samples, bytes and sha256
    train-00000.tar ...   KEY.jpg beside KEY.cls (the label in digits) or KEY.json ({"label": 3})
    train.start.npy       uint64, where in its shard a sample's picture begins: at its header
    train.bytes.npy       uint32, from there to the picture's last byte
    train.label.npy       int32
    val-..., val....      the same of the pictures held out

Samples count through the shards in the manifest's order.  `pack.py` writes all this.  `ShardImages` reads a sample,
`stream` whole shards, where a store serves no parts of files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, cast, overload
from urllib.parse import unquote

import numpy as np
from PIL import Image

from .archive import (
    STREAM,
    Member,
    filesystem,
    header,
    join,
    key_and_suffix,
    read,
    retried,
    samples,
    whole,
)
from .data import CHUNK_IMAGES, SHOWN, BadData, FolderData, Images, hash_of, open_image
from .files import placed

MANIFEST = "manifest.json"
FORMAT = "lambdanets shards 1"
COLUMNS = {"start": "<u8", "bytes": "<u4", "label": "<i4"}
SPLITS = ("train", "val")
_PART_BYTES = 16 << 20  # of a remote index, a read
_READERS = 16  # of a store, at a time, in each process


class Shard(NamedTuple):
    """One archive of the manifest."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says, checked.

    classes   names; a label is a position here
    paths     keys are quoted paths of the folder that was packed: a sample is called by its path, not by its member
    left_out  unreadable files that packing left out, listed in bad_samples.jsonl
    base      where the shards lie; "": beside the manifest
    plan      what packing was asked for, to know a finished data set again
    splits    "train", "val" -> shards;  columns  the same -> column -> sha256 of its file
    """

    classes: tuple[str, ...]
    paths: bool
    left_out: int
    base: str
    plan: dict[str, Any]
    splits: dict[str, list[Shard]]
    columns: dict[str, dict[str, str]]

    def text(self) -> str:
        """The JSON, the same for the same data set; a line a shard."""
        shards = {split: [shard._asdict() for shard in of] for split, of in self.splits.items()}
        fields = {name: getattr(self, name) for name in ("classes", "paths", "left_out", "base", "plan", "columns")}
        lines = json.dumps({"format": FORMAT, **fields, "splits": {split: [] for split in shards}}, indent=1)
        for split, of in shards.items():
            rows = ",\n".join(f"   {json.dumps(row)}" for row in of)
            lines = lines.replace(f'"{split}": []', f'"{split}": [\n{rows}\n  ]')
        return lines + "\n"


def manifest(base: str) -> Manifest:
    """Reads and checks BASE/manifest.json. Raises BadData."""
    where = join(base, MANIFEST)
    content = read(base, MANIFEST)
    try:
        held = json.loads(content)
        if held.get("format") != FORMAT:
            raise ValueError(f"its format is {held.get('format')!r}, not {FORMAT!r}")
        splits = {split: [Shard(**shard) for shard in held["splits"][split]] for split in SPLITS}
        for shard in (shard for of in splits.values() for shard in of):
            sizes = (shard.samples, shard.bytes)
            if PurePosixPath(shard.name).name != shard.name or shard.name in ("", "..") or "\\" in shard.name:
                raise ValueError(f"the shard {shard.name!r} is no plain file name")
            if not all(isinstance(size, int) and size > 0 for size in sizes):
                raise ValueError(f"the shard {shard.name} has {sizes} samples and bytes")
        columns = {split: {name: str(held["columns"][split][name]) for name in COLUMNS} for split in SPLITS}
        classes = tuple(str(name) for name in held["classes"])
        fields = bool(held["paths"]), int(held["left_out"]), str(held["base"]), dict(held["plan"])
        return Manifest(classes, *fields, splits, columns)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadData(f"{where} is no manifest of shards: {error!r}") from error


@dataclass(frozen=True, eq=False, repr=False)
class ShardImages(Images):
    """The pictures of one split. Names are read from the shards when they are asked for; labels lie in a mapped file.

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
    coming: dict[tuple[int, int], Future[bytes]] = field(default_factory=dict)  # (process, id): `expect`

    def load(self, index: int) -> Image.Image:
        """The picture. Raises BadImage where it is bad, BadData where the shard is: it is not what was indexed."""
        member, content = self._read(index)
        return open_image(content, name=self.called(index, member.name))

    def label_parts(self) -> Iterator[np.ndarray[Any, np.dtype[np.integer[Any]]]]:
        """Read, not mapped: pages of a mapped file that were touched count as memory of this process."""
        column = cast("np.memmap[Any, Any]", self.labels)
        for start in range(0, len(column), CHUNK_IMAGES):
            offset = column.offset + start * column.itemsize
            yield np.fromfile(str(column.filename), column.dtype, min(CHUNK_IMAGES, len(column) - start), offset=offset)

    def expect(self, ids: Sequence[int]) -> None:
        """Begins to read these from a store, 16 at a time: an answer may take 0.1 s, decoding takes 2 ms."""
        self.coming.clear()
        if not filesystem(self.base)[2]:
            pool = ThreadPoolExecutor(_READERS)
            process = os.getpid()  # threads, and so what they promised, do not follow into a forked worker
            self.coming.update({(process, index): pool.submit(self._bytes, index) for index in ids})
            pool.shutdown(wait=False)  # its threads end with the last of these

    def fingerprint(self) -> str:
        """Of classes, labels, and the sha256 of every shard; the place does not count."""
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
        start = int(self.starts[index])
        return read(self.base, self._shard(index).name, start, start + int(self.lengths[index]))

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
            remedy = f"it was changed after it was indexed; compare all: lambdanets index {self.home}"
            raise BadData(f"{where}, byte {start:,}: {found} where the index has {length:,} bytes: {remedy}")
        return member, bytes(content[member.head_bytes :])

    def __reduce__(self) -> tuple[Any, ...]:  # to a worker that is not forked; a mapped file would travel as its bytes
        return _again, (f"{STREAM if self.streamed else ''}{self.home}", self.split)


def _again(home: str, split: str) -> Images:
    found = open_shards(home)
    return found.train if split == "train" else found.val


class _Names(Sequence[str]):
    def __init__(self, owner: list[ShardImages], n: int) -> None:
        self._owner, self._n = owner, n

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
        return self._owner[0].name(index % self._n)


def is_shards(path: str | Path) -> bool:
    """Whether that is a data set of shards: a URL, or a folder with a manifest."""
    return "://" in str(path) or str(path).startswith((STREAM, "pipe:")) or (Path(path) / MANIFEST).is_file()


def open_shards(where: str | Path) -> FolderData:
    """Opens a data set of shards: a folder, a URL, or "stream:" before either (see `stream`).

    Every shard's size is compared with the manifest; `lambdanets index` compares every byte. A remote index is copied
    to ~/.cache/lambdanets once. Raises BadData: no manifest, a shard that is missing, cut or of another size, an index
    that does not fit.
    """
    home = str(where).removeprefix(STREAM)
    streamed = str(where).startswith(STREAM)
    held = manifest(home)
    base = held.base or home
    check_sizes(base, held)
    if len(held.classes) < 2:
        raise BadData(f"{join(home, MANIFEST)} has {len(held.classes)} class(es); a classifier needs two")
    parts = []
    for split in SPLITS:
        n = [shard.samples for shard in held.splits[split]]
        first_images = np.concatenate([[0], np.cumsum(n, dtype=np.int64)])
        if not n:
            raise BadData(f"{join(home, MANIFEST)} lists no shard of {split}")
        columns = [_column(home, f"{split}.{name}.npy", held.columns[split][name], sum(n)) for name in COLUMNS]
        start, length, label = columns
        owner: list[ShardImages] = []
        content = held.classes, held.paths, held.splits[split], held.columns[split]["label"]
        part = ShardImages(
            held.classes, _Names(owner, sum(n)), label, base, home, split, held.splits[split], first_images, start,
            length, held.paths, streamed, hashlib.sha256(json.dumps(content).encode()).hexdigest(),
        )  # fmt: skip
        owner.append(part)
        parts.append(part)
    train, val = parts
    counts = f"{len(train):,} training and {len(val):,} validation images of {len(held.classes):,} classes"
    how = f"shards {where}: {counts} in {len(train.shards):,} and {len(val.shards):,} archives"
    if held.left_out:
        how += f"; {held.left_out:,} unreadable ones were left out when they were packed"
    if streamed:
        how += "; streamed by webdataset: shards are drawn at random, so a resumed run draws anew"
    return FolderData(train, val, how, {})


def check_sizes(base: str, held: Manifest) -> None:
    """Compares the bytes of every shard with the manifest. Raises BadData naming those that differ or are missing."""
    found, path, _ = filesystem(base)
    sizes: dict[str, int | None] = {}
    with contextlib.suppress(Exception):  # a store need not list, and then each shard is asked for
        listed = found.ls(path, detail=True)
        sizes = {str(entry["name"]).rpartition("/")[2]: entry.get("size") for entry in listed}
    shards = [shard for split in SPLITS for shard in held.splits[split]]

    def size_of(shard: Shard) -> int | None:
        known = sizes.get(shard.name)
        if known is not None:
            return known
        try:
            size = found.info(join(path, shard.name)).get("size")
        except FileNotFoundError:
            return None
        return shard.bytes if size is None else int(size)  # some servers do not tell

    with ThreadPoolExecutor(32) as pool:
        wrong = [
            f"{shard.name} " + ("is missing" if size is None else f"has {size:,} bytes instead of {shard.bytes:,}")
            for shard, size in zip(shards, pool.map(size_of, shards), strict=True)
            if size != shard.bytes
        ]
    if wrong:
        more = f" and {len(wrong) - SHOWN:,} more" if len(wrong) > SHOWN else ""
        raise BadData(f"{len(wrong):,} of {len(shards):,} shards of {base}: {', '.join(wrong[:SHOWN])}{more}")


def _column(home: str, name: str, sha256: str, n: int) -> np.ndarray[Any, Any]:
    """An index file, mapped."""
    _, path, local = filesystem(join(home, name))
    where = Path(path) if local else _fetched(home, name, sha256)
    try:
        column = np.load(where, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BadData(f"{join(home, name)} is no index: {error}; remove {MANIFEST} and index again") from error
    dtype = np.dtype(COLUMNS[name.split(".")[1]])
    if column.shape != (n,) or column.dtype != dtype:
        held = f"{column.dtype} {column.shape}"
        raise BadData(f"{join(home, name)} holds {held} instead of {dtype} ({n},): it belongs to other shards")
    return column


def _fetched(home: str, name: str, sha256: str) -> Path:
    """The copy of a remote index file, named by its hash."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lambdanets"
    if not os.access(next(place for place in (cache, *cache.parents) if place.exists()), os.W_OK):
        cache = Path(tempfile.gettempdir()) / f"lambdanets-{os.getuid()}"
    place = cache / f"{sha256}.npy"
    if place.is_file():
        return place
    found, path, _ = filesystem(join(home, name))
    size = retried(join(home, name), lambda: int(found.info(path)["size"]), local=False)
    digest = hashlib.sha256()
    cache.mkdir(parents=True, exist_ok=True)
    with placed(place) as file:
        for start in range(0, size, _PART_BYTES):
            part = read(home, name, start, min(start + _PART_BYTES, size))
            digest.update(part)
            file.write(part)
        if digest.hexdigest() != sha256:
            seen = digest.hexdigest()
            raise BadData(f"{join(home, name)} has the sha256 {seen}, the manifest {sha256}: copy the index again")
    return place


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
    where, digest, count = join(images.base, shard.name), hashlib.sha256(), 0
    with whole(images.base, shard.name, shard.bytes) as file:
        for sample in samples(file, where, digest.update):
            index = first + count
            count += 1
            yield Streamed(index, images.called(index, sample.picture.name), sample.label, sample.content)
    if (count, digest.hexdigest()) != (shard.samples, shard.sha256):
        seen = f"{count:,} samples with the sha256 {digest.hexdigest()}"
        raise BadData(f"{where} holds {seen}, the manifest says {shard.samples:,} with {shard.sha256}")
