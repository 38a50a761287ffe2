"""Pictures that are copies: of one another, byte for byte, and of pictures that are held out, also encoded again.

Copies of held-out pictures are found in two steps. Difference hashes (hashes.look_hash) that differ in a few bits make
a pair; a pair is a copy if small grey thumbnails of both agree at every place, since photographs of one scene share
their hash. Measured on 400 parts of two photographs, encoded again (JPEG 40, 95) or scaled (0.5, 0.7, 2): of parts of
320 x 240 all but one are found in each way; of 160 x 120, many of them plain sky, 82% after JPEG 40, 90% halved and
JPEG 75, 96% or more in the other ways. Of 1,696 pairs with near hashes that show one scene with another object, of an
eighth of the side or more, 4 are taken for copies; of 1,163 pairs whose objects are smaller, 37.
A crop, a mirrored picture or one with other colours is not found, nor is a flat one, unless its bytes are equal.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from lambdanets.data.decode import open_image
from lambdanets.data.images import Images
from lambdanets.errors import BadData, BadImage
from lambdanets.files import serve_the_parent
from lambdanets.pseudo_labels.hashes import bytes_hash, look_hash
from lambdanets.pseudo_labels.label_rows import LabelFile, LabelRows, column

HASHED = np.dtype([("bytes_hash", "<u8"), ("look_hash", "<u8"), ("in_a_file", "?")])
MOST_BITS = 7  # more bands than 8 have too few bits each to tell anything apart
MOST_DIFFERENCE = 0.2
"""Of two thumbnails, where they differ most: above it they are two pictures."""

_LEAST_SET, _MOST_SET = 6, 58  # bits of the hash of a picture that is not flat
_THUMBNAIL_PX = 32
_LEAST_DEVIATION = 16.0  # levels: in a picture of little contrast JPEG's own noise would count as much as what it shows
_WORST_PLACES = 4
_CHUNK = 16  # pictures that a process is handed at a time
_PAIRS = 1 << 20  # candidates of one chunk of rows that are expanded at a time


# ---- pictures, read in processes


@dataclass(frozen=True, eq=False, repr=False)
class Joined(Images):
    """Several lists of pictures as one, without labels."""

    sets: tuple[Images, ...]

    @classmethod
    def of(cls, sets: Sequence[Images]) -> Joined:
        n = sum(map(len, sets))
        return cls((), range(n), np.broadcast_to(np.int32(0), n), tuple(sets))  # type: ignore[arg-type]  # unnamed

    def place(self, index: int) -> tuple[int, int]:
        """Which list a picture is of, and its position there."""
        for number, images in enumerate(self.sets):
            if index < len(images):
                return number, index
            index -= len(images)
        raise IndexError(index)

    def load(self, index: int) -> Image.Image:
        number, at = self.place(index)
        return self.sets[number].load(at)

    def content(self, index: int) -> bytes | None:
        number, at = self.place(index)
        return self.sets[number].content(at)


def hashed(images: Images, workers: int) -> np.ndarray[Any, Any]:
    """Both hashes of each picture, as HASHED; `in_a_file` where it has bytes to compare. Raises DiskFault."""
    found = np.zeros(len(images), HASHED)
    for index, row in enumerate(_read_by(workers, _hashes, (images,), range(len(images)))):
        found[index] = row
    return found


def _hashes(images: Images, index: int) -> tuple[int, int, bool]:
    content = images.content(index)
    try:
        image = images.load(index) if content is None else open_image(content, name=str(index))
    except BadImage:
        return bytes_hash(content or b""), 0, content is not None
    return bytes_hash(content or b""), look_hash(image), content is not None


def thumbnail(image: Image.Image) -> np.ndarray[Any, np.dtype[np.float32]]:
    """32 x 32 grey levels, without their mean, in standard deviations.

    >>> float(thumbnail(Image.linear_gradient("L")).std().round(3))
    1.0
    """
    grey = image.convert("L").resize((_THUMBNAIL_PX, _THUMBNAIL_PX), Image.Resampling.BILINEAR)
    levels = np.asarray(grey, np.float64)
    return ((levels - levels.mean()) / max(float(levels.std()), _LEAST_DEVIATION)).astype(np.float32)


def difference(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    """Of two thumbnails, the mean at the four places where they differ most.

    In the mean over all places a small object that is another one would be lost.
    """
    return float(np.partition(np.abs(one - other).ravel(), -_WORST_PLACES)[-_WORST_PLACES:].mean())


_sets: tuple[Images, ...] = ()  # of a reading process


def _begin(sets: tuple[Images, ...]) -> None:
    global _sets
    serve_the_parent()
    _sets = sets


def _call(function: Callable[..., Any], item: Any) -> Any:
    return function(*_sets, item)


def _read_by(
    workers: int, function: Callable[..., Any], sets: tuple[Images, ...], items: Sequence[Any]
) -> Iterator[Any]:
    """function(*sets, item) of each item, in order, in `workers` processes; in this one where there are none."""
    if not workers:
        yield from (function(*sets, item) for item in items)
        return
    with contextlib.ExitStack() as stack:
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin, (sets,))
        stack.callback(pool.shutdown, cancel_futures=True)
        block = 8 * _CHUNK * workers
        try:
            for start in range(0, len(items), block):
                yield from pool.map(functools.partial(_call, function), items[start : start + block], chunksize=_CHUNK)
        except BrokenProcessPool as error:
            remedy = "give the same command, with fewer --workers if memory is short: what is finished is kept"
            raise BadData(f"a process that reads pictures was killed: {remedy}") from error


# ---- copies among the rows


class Pair(NamedTuple):
    """A labelled picture's id, the held-out picture it may be a copy of, and in how many bits they differ; -1: none of
    the bytes differ."""

    id: int
    known: int
    bits: int


class Copies(NamedTuple):
    """equal: of equal bytes, the first held-out one each; near: by their looks, all of them.
    repeated: ids of pictures whose bytes an earlier picture has, too."""

    equal: list[Pair]
    near: list[Pair]
    repeated: np.ndarray[Any, np.dtype[np.int64]]


def copies(rows: LabelRows, known: np.ndarray[Any, Any], bits: int, threads: int) -> Copies:
    """Compares the hashes of all readable rows with one another and with those of the pictures that are held out.

    known  HASHED, of pictures that are held out
    bits   in which two looks may differ
    Memory: 16 bytes a row.
    """
    compare = functools.partial(_compared, Looks(known, bits), known)
    hashes = np.zeros(rows.pictures, np.uint64)
    readable = np.zeros(rows.pictures, bool)
    equal: list[Pair] = []
    near: list[Pair] = []
    for file, (own, fine, these_equal, these_near) in rows.each(compare, threads):
        part = slice(file.first, file.first + file.samples)
        hashes[part], readable[part] = own, fine
        equal += these_equal
        near += these_near
    return Copies(equal, near, repeated(hashes, readable))


def _compared(
    looks: Looks, known: np.ndarray[Any, Any], file: LabelFile
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], list[Pair], list[Pair]]:
    table = column(file, "class", "bytes_hash", "look_hash")
    label, own, look = (table.column(name).to_numpy() for name in ("class", "bytes_hash", "look_hash"))
    fine = label >= 0
    if not len(known):
        return own, fine, [], []
    by_bytes = looks.of_bytes(own)
    same = np.flatnonzero(fine & (by_bytes >= 0))
    equal = [Pair(file.first + at, int(by_bytes[at]), -1) for at in same.tolist()]
    others = np.flatnonzero(fine & (by_bytes < 0))
    near = [Pair(file.first + int(others[at]), of, bits) for at, of, bits in looks.near(look[others])]
    return own, fine, equal, near


class Looks:
    """The hashes of the pictures that are held out, in tables by which near ones are found.

    Two hashes of 64 bits that differ in `bits` agree in one of bits + 1 bands.
    """

    def __init__(self, known: np.ndarray[Any, Any], bits: int) -> None:
        self._bits = bits
        in_files = np.flatnonzero(known["in_a_file"])
        order = in_files[np.argsort(known["bytes_hash"][in_files], kind="stable")]
        self._bytes, self._bytes_of = known["bytes_hash"][order], order
        self._looks = known["look_hash"].astype(np.uint64)
        shaped = np.flatnonzero(_shaped(self._looks))
        edges = [64 * band // (bits + 1) for band in range(bits + 2)]
        self._bands = [self._band(shaped, low, high - low) for low, high in itertools.pairwise(edges)]

    def _band(self, shaped: np.ndarray[Any, Any], low: int, width: int) -> tuple[int, int, Any, Any]:
        key = _key(self._looks[shaped], low, width)
        order = np.argsort(key, kind="stable")
        return low, width, key[order], shaped[order]

    def of_bytes(self, hashes: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """For each hash of bytes the first picture held out that has it, or -1."""
        found = np.full(len(hashes), -1, np.int64)
        if len(self._bytes):
            at = np.searchsorted(self._bytes, hashes).clip(max=len(self._bytes) - 1)
            same = self._bytes[at] == hashes
            found[same] = self._bytes_of[at[same]]
        return found

    def near(self, looks: np.ndarray[Any, Any]) -> list[tuple[int, int, int]]:
        """(position in `looks`, picture held out, bits) of all pairs that differ in no more bits than allowed."""
        rows = np.flatnonzero(_shaped(looks))
        found: set[tuple[int, int, int]] = set()
        for low, width, keys, of in self._bands:
            wanted = _key(looks[rows], low, width)
            first = np.searchsorted(keys, wanted, "left")
            n = np.searchsorted(keys, wanted, "right") - first
            ends = np.cumsum(n)
            for part in _parts(ends):
                counts = n[part]
                at = np.arange(counts.sum()) + np.repeat(
                    first[part] - (ends[part] - counts - _before(ends, part)), counts
                )
                row, candidate = np.repeat(rows[part], counts), of[at]
                bits = np.bitwise_count(looks[row] ^ self._looks[candidate])
                near = np.flatnonzero(bits <= self._bits)
                found.update(zip(row[near].tolist(), candidate[near].tolist(), bits[near].tolist(), strict=True))
        return sorted(found)


def _shaped(looks: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Not flat: the hash of a flat picture says nothing."""
    ones = np.bitwise_count(looks)
    return (ones >= _LEAST_SET) & (ones <= _MOST_SET)


def _key(looks: np.ndarray[Any, Any], low: int, width: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    return (looks >> np.uint64(low)) & np.uint64((1 << width) - 1)


def _parts(ends: np.ndarray[Any, Any]) -> Iterator[slice]:
    """Stretches of rows with at most _PAIRS candidates together, or a single row."""
    start = 0
    while start < len(ends):
        most = _before(ends, slice(start, start)) + _PAIRS
        stop = max(start + 1, int(np.searchsorted(ends, most, "right")))
        yield slice(start, stop)
        start = stop


def _before(ends: np.ndarray[Any, Any], part: slice) -> int:
    return int(ends[part.start - 1]) if part.start else 0


def repeated(
    hashes: np.ndarray[Any, np.dtype[np.uint64]], readable: np.ndarray[Any, np.dtype[np.bool_]]
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The positions, ascending, of readable pictures whose hash an earlier readable one has.

    >>> repeated(np.array([7, 5, 7, 7], np.uint64), np.ones(4, bool)).tolist()
    [2, 3]
    """
    in_order = np.sort(hashes[readable])
    twice = np.unique(in_order[1:][in_order[1:] == in_order[:-1]])
    del in_order
    if not len(twice):
        return np.zeros(0, np.int64)
    at = [np.zeros(0, np.int64)]
    for start in range(0, len(hashes), 1 << 20):
        part = hashes[start : start + (1 << 20)]
        of = np.searchsorted(twice, part).clip(max=len(twice) - 1)
        at.append(start + np.flatnonzero((twice[of] == part) & readable[start : start + len(part)]))
    every = np.concatenate(at)
    _, first = np.unique(hashes[every], return_index=True)
    again = np.ones(len(every), bool)
    again[first] = False
    return every[again]


# ---- pairs confirmed


class Copy(NamedTuple):
    """A pair that is a copy. name: of the labelled picture; difference: of the thumbnails."""

    pair: Pair
    name: str
    difference: float


def confirmed(pairs: Iterable[Pair], pictures: Images, known: Images, workers: int) -> Iterator[Copy]:
    """Of each labelled picture the pair that agrees most, if its thumbnails agree. Pairs come with ascending ids."""
    grouped: dict[int, list[Pair]] = {}
    for pair in pairs:
        grouped.setdefault(pair.id, []).append(pair)
    for copy in _read_by(workers, _confirmed, (pictures, known), list(grouped.values())):
        if copy is not None:
            yield copy


def _confirmed(pictures: Images, known: Images, pairs: list[Pair]) -> Copy | None:
    try:
        own = thumbnail(pictures.load(pairs[0].id))
    except BadImage:  # the labels say that it could be read; what cannot be seen is no copy
        return None
    best = min(
        ((difference(own, _thumbnail_of(known, pair.known)), pair) for pair in pairs), key=lambda found: found[0]
    )
    if best[0] > MOST_DIFFERENCE:
        return None
    return Copy(best[1], pictures.names[best[1].id], best[0])


@functools.lru_cache(maxsize=4096)  # 4 kB each; look-alikes are asked for again and again
def _thumbnail_of(known: Images, index: int) -> np.ndarray[Any, Any]:
    return thumbnail(known.load(index))
