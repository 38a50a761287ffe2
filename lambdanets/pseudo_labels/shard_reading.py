"""The pictures of whole shards, in order and in batches that cross no shard: read ahead by the processes of one loader.

A shard on a disk is read where it lies; one on a store is copied to this machine first, the next one while this one is
read. Each is compared with its sha256, whoever changed it since it was indexed.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lambdanets.data.archive import copied, filesystem, join, on_disk
from lambdanets.data.decode import open_image
from lambdanets.data.index_files import sha256_of
from lambdanets.data.manifest import Shard
from lambdanets.data.reading import serve_the_run
from lambdanets.data.shards import ShardImages, changed, picture_in, stored
from lambdanets.data.transforms import View
from lambdanets.errors import BadData, BadImage, printable
from lambdanets.pseudo_labels.hashes import bytes_hash, look_hash


class ShardFailed(NamedTuple):
    """A shard that cannot be read, or is not what was indexed: `why`."""

    number: int
    why: str


class Part(NamedTuple):
    """A batch of one shard's pictures.

    number      of the shard
    first       the first picture's place in it
    members     of each picture the name of its member
    images      float32 (readable, C, H, W), those that can be read
    errors      place in the batch -> why a picture cannot be read
    hashes      uint64 (2, pictures): bytes_hash and look_hash; None where nobody asked
    last        whether it is the shard's last batch
    """

    number: int
    first: int
    members: list[str]
    images: Tensor
    errors: dict[int, str]
    hashes: np.ndarray[Any, np.dtype[np.uint64]] | None
    last: bool


class _Key(NamedTuple):
    """A batch that is to be read: the shard's number, name and bytes, where it lies, rows of the index."""

    number: int
    shard: Shard
    base: str
    first: int
    starts: np.ndarray[Any, np.dtype[np.uint64]]
    lengths: np.ndarray[Any, np.dtype[np.uint32]]
    last: bool


@dataclass(frozen=True)
class _Reader:
    """A key -> its batch: the part that runs in a worker, and remembers nothing."""

    view: View
    hashes: bool
    home: str

    def __getitem__(self, key: _Key | ShardFailed) -> Part | ShardFailed:
        if isinstance(key, ShardFailed):
            return key
        try:
            return self._part(key)
        except BadData as error:  # raised in a worker it would arrive as a wall of text
            return ShardFailed(key.number, str(error))

    def _part(self, key: _Key) -> Part:
        members, images, errors = [], [], {}
        hashes = np.zeros((2, len(key.starts)), np.uint64)
        for place, (start, length) in enumerate(zip(key.starts.tolist(), key.lengths.tolist(), strict=True)):
            found = stored(key.base, key.shard, start, length, changed(self.home))
            member, content = picture_in(found, join(key.base, key.shard.name), start, changed(self.home))
            members.append(member.name)
            if self.hashes:
                hashes[0, place] = bytes_hash(content)
            try:
                image = open_image(content, name=member.name)
            except BadImage as error:
                errors[place] = error.reason
                continue
            if self.hashes:
                hashes[1, place] = look_hash(image)
            images.append(self.view.evaluate(image))
        side = self.view.image_px
        stacked = torch.stack(images) if images else torch.empty(0, self.view.in_channels, side, side)
        return Part(key.number, key.first, members, stacked, errors, hashes if self.hashes else None, key.last)


class ShardReader:
    """Batches of the pictures of shards, one shard after another, by one persistent loader.

    images        `open_pictures` of the data set
    batch_images  pictures a batch; the last of a shard has fewer
    hashes        whether each picture's two hashes are made
    workers       processes that read; 0 reads here; nothing depends on their number
    start_method  of those processes: None, the system's own
    """

    def __init__(
        self,
        images: ShardImages,
        view: View,
        *,
        batch_images: int,
        hashes: bool,
        workers: int,
        start_method: str | None = None,
    ) -> None:
        self.images, self.batch_images = images, batch_images
        self._reader = _Reader(view, hashes, images.home)
        self._local = filesystem(images.base)[2]
        self._numbers: Iterable[int] = ()
        self._passed: set[int] = set()
        self._checks: dict[int, Future[str | None]] = {}
        self._closing = contextlib.ExitStack()
        place = tempfile.TemporaryDirectory(prefix="lambdanets-", ignore_cleanup_errors=True)
        self._copies = self._closing.enter_context(place)  # of remote shards
        self._loader: Iterable[Part | ShardFailed] | None = None
        if workers:
            self._loader = DataLoader(
                self._reader,  # type: ignore[arg-type]  # has __getitem__, is no Dataset
                batch_size=None,
                sampler=_Sampler(self._keys),
                num_workers=workers,
                persistent_workers=True,
                collate_fn=_unchanged,
                worker_init_fn=serve_the_run,
                generator=torch.Generator(),  # else every pass draws from the ambient one
                multiprocessing_context=start_method,
            )

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._loader = None
        self._closing.close()

    def parts(self, numbers: Iterable[int]) -> Iterator[Part | ShardFailed]:
        """The batches of these shards, which are asked for as they are needed; one such pass at a time.

        A shard that fails is told once, and the rest of it is left out.
        """
        self._numbers = numbers
        self._passed.clear()
        self._checks.clear()
        found = self._loader if self._loader is not None else map(self._reader.__getitem__, self._keys())
        for part in found:
            if part.number in self._passed:
                continue
            if isinstance(part, Part) and part.last and (why := self._checks.pop(part.number).result()) is not None:
                part = ShardFailed(part.number, why)
            if isinstance(part, ShardFailed):
                self.leave_out(part.number)
            yield part
            if isinstance(part, Part) and part.last:
                self._forget(part.number)

    def leave_out(self, number: int) -> None:
        """What is left of this shard, in the pass under way, is not wanted."""
        self._passed.add(number)
        self._checks.pop(number, None)
        self._forget(number)

    def _forget(self, number: int) -> None:
        if not self._local:
            Path(self._copies, self.images.shards[number].name).unlink(missing_ok=True)

    def _keys(self) -> Iterator[_Key | ShardFailed]:
        numbers = iter(self._numbers)
        waiting: list[tuple[int, Future[str | None]]] = []
        while True:
            # Of a store, the next shard is copied while this one is read.
            while len(waiting) < (1 if self._local else 2) and (number := next(numbers, None)) is not None:
                waiting.append((number, _begun(self._looked_at, self.images.shards[number])))
            if not waiting:
                return
            number, looked_at = waiting.pop(0)
            if not self._local and (why := looked_at.result()) is not None:
                yield ShardFailed(number, why)
                continue
            self._checks[number] = looked_at
            yield from self._of_shard(number)

    def _of_shard(self, number: int) -> Iterator[_Key]:
        images, b = self.images, self.batch_images
        first, end = (int(n) for n in images.first_images[number : number + 2])
        base = images.base if self._local else self._copies
        for start in range(first, end, b):
            if number in self._passed:
                return
            rows = slice(start, min(start + b, end))
            starts, lengths = np.array(images.starts[rows]), np.array(images.lengths[rows])  # not the mapped file
            yield _Key(number, images.shards[number], base, start - first, starts, lengths, rows.stop == end)

    def _looked_at(self, shard: Shard) -> str | None:
        """Copies a shard if it lies on a store; gives why it is not the one that was indexed."""
        where = join(self.images.base, shard.name)
        try:
            if self._local:
                path = filesystem(where)[1]
                size, seen = on_disk(where, lambda: Path(path).stat().st_size), ""
                if size == shard.bytes:
                    seen = on_disk(where, functools.partial(sha256_of, path))
            else:
                size, seen = (
                    shard.bytes,
                    copied(self.images.base, shard.name, Path(self._copies, shard.name), shard.bytes),
                )
        except BadData as error:
            return str(error)
        except OSError as error:
            why = error.strerror or error
            return f"{printable(self._copies)} cannot hold the {shard.bytes:,} bytes of {shard.name}: {why}"
        if size != shard.bytes:
            return f"{where} has {size:,} bytes instead of {shard.bytes:,}: {changed(self.images.home)}"
        if seen != shard.sha256:
            return f"{where} has the sha256 {seen}, the manifest {shard.sha256}: {changed(self.images.home)}"
        return None


def _begun(call: Callable[[Shard], str | None], shard: Shard) -> Future[str | None]:
    """What `call` gives, in time: in a thread that nobody waits for when the program ends, as for one of a pool."""
    future: Future[str | None] = Future()

    def run() -> None:
        try:
            future.set_result(call(shard))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=shard.name, daemon=True).start()
    return future


@dataclass
class _Sampler:
    """The keys of one pass, made as they are asked for."""

    keys: Callable[[], Iterator[_Key | ShardFailed]]

    def __iter__(self) -> Iterator[_Key | ShardFailed]:
        return self.keys()


def _unchanged(part: Any) -> Any:
    return part
