"""Pictures to the batches of an epoch: which ones, read by whom, and what is done about those that cannot be read.

What becomes of a picture is the caller's (`prepare`, `join`). Training may replace an unreadable picture, and counts
it; evaluation may not.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, cast

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lambdanets.data.decode import open_image
from lambdanets.data.images import Images
from lambdanets.data.order import Order, hash_of
from lambdanets.data.shards import ShardImages, Streamed, stream
from lambdanets.errors import SHOWN, BadData, BadImage, DiskFault, printable
from lambdanets.files import JSON_BYTES, end_with_parent, lock, open_to_append, to_stderr

_SUBSTITUTES = 100  # tries before a sample is given up: all bad by chance at 1e-30 where half of the files are bad


B = TypeVar("B")


@dataclass(frozen=True)
class Draws:
    """Which pictures the slots of a training batch show, what these draw, and who stands in for an unreadable one.

    A slot is whatever says so, picklable: here a picture's id. All of it is a function of (seed, epoch, slot): of no
    process, worker or rank. Other rules are other classes with these methods.

    n_images      of the data set
    batch_images  of a batch, all ranks together
    """

    n_images: int
    batch_images: int
    seed: int

    def __len__(self) -> int:
        """Batches in an epoch."""
        return max(1, self.n_images // self.batch_images)

    def slots(self, epoch: int, batch: int, part: range) -> list[Any]:
        """Those at these places of a batch."""
        first = batch * self.batch_images
        return list(Order(self.n_images, seed=self.seed, epoch=epoch)[first + part.start : first + part.stop].tolist())

    def augments(self, epoch: int, slot: Any) -> int:
        """The seed of what a slot draws."""
        return hash_of("augment", self.seed, epoch, slot)

    def candidate(self, epoch: int, slot: Any, attempt: int) -> int:
        """The id of the picture that a slot shows; from attempt 1 on, of one in its stead."""
        if not attempt:
            return int(slot)
        return hash_of("substitute", self.seed, epoch, slot, attempt - 1) % self.n_images


class _Result(NamedTuple):
    found: Any | BadImage | BadData  # an error is a value here: raised in a worker it would arrive as a wall of text
    bad: dict[str, str]


@dataclass(frozen=True)
class _Reader:
    """(epoch, slots) -> their batch: the part that runs in a worker, and remembers nothing."""

    images: Images
    prepare: Callable[[Image.Image, int, int], Any]
    join: Callable[[list[Any], list[int]], Any]
    training: bool
    draws: Draws

    def __getitem__(self, key: tuple[int, list[Any]]) -> _Result:
        epoch, slots = key
        bad: dict[str, str] = {}
        self.images.expect([self.draws.candidate(epoch, slot, 0) for slot in slots])
        return self._batch(epoch, slots, (self._readable(epoch, slot, bad) for slot in slots), bad)

    def streamed(self, key: tuple[int, list[int]], source: Iterator[Streamed]) -> _Result:
        """As many pictures, with the seeds of these ids: in training the next that can be read, else these very ids."""
        epoch, ids = key
        bad: dict[str, str] = {}
        return self._batch(epoch, ids, (self._next_readable(index, source, bad) for index in ids), bad)

    def _batch(
        self, epoch: int, slots: list[Any], pictures: Iterator[tuple[Image.Image, int, int]], bad: dict[str, str]
    ) -> _Result:
        samples, used = [], []
        # timm's RandAugment draws from all three, the last one in its legacy form.
        ambient = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
        try:
            for slot, (image, found, label) in zip(slots, pictures, strict=True):
                seed = self.draws.augments(epoch, slot)
                torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which reaches for the accelerators
                random.seed(seed)
                np.random.seed(seed % 2**32)  # noqa: NPY002
                samples.append(self.prepare(image, found, label))
                used.append(found)
        except (BadImage, BadData) as error:
            return _Result(error, bad)
        finally:
            torch.set_rng_state(ambient[0])
            random.setstate(ambient[1])
            np.random.set_state(ambient[2])  # noqa: NPY002
        return _Result(self.join(samples, used), bad)

    def _readable(self, epoch: int, slot: Any, bad: dict[str, str]) -> tuple[Image.Image, int, int]:
        """The picture, its id and label; in training the first readable of a sequence fixed by (seed, epoch, slot)."""
        for attempt in range(_SUBSTITUTES):
            candidate = self.draws.candidate(epoch, slot, attempt)
            try:
                return self.images.load(candidate), candidate, int(self.images.labels[candidate])
            except BadImage as error:
                if not self.training:
                    raise
                bad[self.images.names[candidate]] = error.reason
            except OSError as error:
                if error.errno is None:
                    raise
                raise DiskFault(self.images.names[candidate], f"cannot be read: {error.strerror}") from error
        first = self.images.names[self.draws.candidate(epoch, slot, 0)]
        raise BadData(f"{first} and {_SUBSTITUTES - 1} substitutes in a row cannot be read")

    def _next_readable(
        self, index: int, source: Iterator[Streamed], bad: dict[str, str]
    ) -> tuple[Image.Image, int, int]:
        for found in itertools.islice((s for s in source if self.training or s.id == index), _SUBSTITUTES):
            try:
                return open_image(found.content, name=found.name), found.id, found.label
            except BadImage as error:
                if not self.training:
                    raise
                bad[found.name] = error.reason
        raise BadData(f"{_SUBSTITUTES} streamed images in a row cannot be read; the last: {list(bad)[-1:]}")


@dataclass
class _Stream(IterableDataset[_Result]):
    """The batches of one epoch of a streamed data set; each worker makes every n-th of them from shards of its own."""

    reader: _Reader
    keys: _Keys

    def __iter__(self) -> Iterator[_Result]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        keys = self.keys
        images = cast(ShardImages, self.reader.images)
        seeds = keys.draws.seed, keys.epoch, keys.first_batch, keys.rank, number
        source = stream(images, *seeds, resampled=keys.training)
        for key in itertools.islice(keys, number, None, workers):
            yield self.reader.streamed(key, source)


@dataclass
class _Keys:
    """(epoch, this rank's slots) of each batch of the epoch under way, made when it is asked for."""

    draws: Draws
    training: bool
    rank: int
    ranks: int
    epoch: int = 0
    first_batch: int = 0

    def __len__(self) -> int:
        if self.training:
            return len(self.draws)
        n, b = self.draws.n_images, self.draws.batch_images
        return n // b * bool(self._part(b)) + bool(self._part(n % b))

    def __iter__(self) -> Iterator[tuple[int, list[Any]]]:
        epoch, draws, b = self.epoch, self.draws, self.draws.batch_images
        if self.training:
            for batch in range(self.first_batch, len(draws)):
                yield epoch, draws.slots(epoch, batch, self._part(b))
            return
        for first in range(self.first_batch * b, draws.n_images, b):
            part = self._part(min(b, draws.n_images - first))
            if part:
                yield epoch, list(range(first + part.start, first + part.stop))

    def _part(self, batch_images: int) -> range:
        """Which images of a batch of that many this rank reads."""
        return range(self.rank * batch_images // self.ranks, (self.rank + 1) * batch_images // self.ranks)


class PictureBatches(Generic[B]):
    """The batches of an epoch: order, augmentation and substitutes are a function of (seed, epoch, sample id) alone.

    images        what to read
    prepare       (picture, its id, its label) -> a sample; what it draws from torch, random and numpy.random is a
                  function of (seed, epoch, id)
    join          (samples, their ids) -> a batch, which has `ids`
    batch_images  images in a batch, of all ranks together; afterwards, of training, what a full one has
    training      False: every image once, in order; an unreadable one raises BadImage.  True: shuffled, augmented,
                  unreadable ones replaced, every batch full (a set smaller than a batch is one smaller batch).
                  Unreadable is what has the wrong content; a fault of the disk raises DiskFault in both
    seed          of order and augmentation
    workers       processes that read; 0 reads here; the number does not change one bit of the result
    max_bad_frac  of the data set: more unreadable pictures than this (and more than one) raise BadData
    bad_file      where each unreadable picture is appended once, as a JSON line {"name", "reason"}; ranks may share it
    rank, ranks   this process reads its part of each batch: images rank * b // ranks to (rank + 1) * b // ranks of the
                  b in it, so another number of ranks sees the same batches.  In evaluation the parts may differ in
                  length, and an empty one is left out
    draws         of training, another rule than `Draws` of all images, once an epoch each
    """

    bad: dict[str, str]
    """name -> reason of the unreadable pictures met so far."""

    def __init__(
        self,
        images: Images,
        prepare: Callable[[Image.Image, int, int], Any],
        join: Callable[[list[Any], list[int]], B],
        *,
        batch_images: int,
        training: bool,
        seed: int = 0,
        workers: int = 0,
        max_bad_frac: float = 0.001,
        bad_file: Path | None = None,
        rank: int = 0,
        ranks: int = 1,
        draws: Draws | None = None,
    ) -> None:
        if batch_images < 1 or workers < 0 or not 0 <= max_bad_frac <= 1:
            asked = f"batch_images is {batch_images}, workers {workers}, max_bad_frac {max_bad_frac}"
            raise ValueError(f"{asked}: 1 or more, 0 or more, and 0 to 1")
        if not 0 <= rank < ranks:
            raise ValueError(f"rank is {rank} of {ranks} ranks: 0 or more, and below the number of ranks")
        if len(images) < 1 + training:  # batch norm on a 1 x 1 map cannot use a batch of one
            raise BadData(f"{len(images)} image(s) to {'train on: two' if training else 'evaluate: one'} at least")
        if training:
            draws = draws or Draws(len(images), min(batch_images, len(images)), seed)
        if draws is not None and draws.batch_images < ranks:
            asked = f"batch_images is {batch_images}, of {len(images):,} images, for {ranks} ranks"
            raise ValueError(f"{asked}: every rank needs one at least; ask for larger batches or fewer ranks")
        self.rank, self.ranks, self.workers = rank, ranks, workers
        draws = draws or Draws(len(images), batch_images, seed)
        self.images, self.batch_images, self.training = images, draws.batch_images, training
        self.seed, self.max_bad_frac, self.bad_file = seed, max_bad_frac, bad_file
        self.bad = {}
        self._unlisted: dict[str, str] = {}  # waits for a disk that takes it
        self._said: set[str] = set()
        self._reader = _Reader(images, prepare, join, training, draws)
        self._keys = _Keys(draws, training, rank, ranks)  # the sampler of the loader below
        self._epochs_started = 0
        self._source: Iterable[_Result] | None = None
        if workers:
            self._source = DataLoader(
                self._reader,  # type: ignore[arg-type]  # has __getitem__, is no Dataset
                batch_size=None,
                sampler=self._keys,
                num_workers=workers,
                persistent_workers=True,
                collate_fn=_unchanged,
                worker_init_fn=serve_the_run,
                generator=torch.Generator(),  # else every epoch draws from the ambient one
            )

    def __len__(self) -> int:
        """Batches in an epoch: in training the same on every rank, in evaluation those that hold an image of ours."""
        return len(self._keys)

    @property
    def names(self) -> Sequence[str]:
        """Of all images; `Batch.ids` are positions here."""
        return self.images.names

    def epoch(self, epoch: int, *, first_batch: int = 0) -> Iterator[B]:
        """The batches of one epoch, from `first_batch` on (a resumed run reads nothing twice); one epoch at a time."""
        self._keys.epoch, self._keys.first_batch = epoch, first_batch
        self._epochs_started = started = self._epochs_started + 1
        for result in self._results():
            if started != self._epochs_started:
                raise RuntimeError(f"epoch {epoch} is no longer read: another one was started on the same Batches")
            self._count(result.bad)
            if isinstance(result.found, ValueError):
                # a new one: `result` lives in this frame, and a cycle of error and frame would keep the workers alive
                raise type(result.found)(*result.found.args)
            yield result.found
        self._list()

    def _results(self) -> Iterable[_Result]:
        if isinstance(self.images, ShardImages) and self.images.streamed:
            workers = self.workers if self.training else min(self.workers, 1)  # in order there is one stream
            return DataLoader(
                _Stream(self._reader, self._keys),
                batch_size=None,
                num_workers=workers,
                collate_fn=_unchanged,
                worker_init_fn=serve_the_run,
                generator=torch.Generator(),
            )
        return self._source if self._source is not None else map(self._reader.__getitem__, self._keys)

    def _list(self) -> None:
        """Write what is not listed yet; where that is impossible it is said once, and tried again later."""
        if self.bad_file is None or not self._unlisted:
            return
        try:
            damaged = _list_bad(self.bad_file, self._unlisted)
        except OSError as error:
            why = f"cannot be written ({error.strerror or error}): the run goes on, and its lines wait in memory"
        else:
            self._unlisted.clear()
            why = f"has lines that are no JSON with a name, {damaged:,} of them: they are left as they are"
            if not damaged:
                return
        if why not in self._said:
            self._said.add(why)
            to_stderr(f"{printable(self.bad_file)} {why}")

    def _count(self, bad: dict[str, str]) -> None:
        new = {name: reason for name, reason in bad.items() if name not in self.bad}
        if not new:
            return
        self.bad.update(new)
        self._unlisted.update(new)
        self._list()
        for what, n, bad in self._kinds():
            self._check_bad(what, n, bad)

    def _kinds(self) -> list[tuple[str, int, dict[str, str]]]:
        """Of each kind of image that has a bound of its own: what it is called, how many there are, the bad ones."""
        return [("training images", len(self.images), self.bad)]

    def _check_bad(self, what: str, n: int, bad: dict[str, str]) -> None:
        allowed = max(1, int(self.max_bad_frac * n))
        if len(bad) > allowed:
            found = f"{len(bad):,} of {n:,} {what} cannot be read, {allowed:,} allowed"
            written = self.bad_file is not None and not self._unlisted
            listed = f" (listed in {self.bad_file})" if written else ""
            first = "".join(f"\n  {name}: {reason}" for name, reason in list(bad.items())[:SHOWN])
            remedy = f"repair or remove them{listed}, or raise max_bad_frac (now {self.max_bad_frac})"
            raise BadData(f"{found}: {remedy}; the first:{first}")


def serve_the_run(worker: int) -> None:
    """In a reading process: it ends with its run, and SIGTERM and Ctrl-C end it only when its own run sends them.

    torchrun, schedulers and terminals send them to every process at once. The run answers by finishing its step and
    saving, and would fail there if its readers were gone already.
    """
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    end_with_parent()
    if not hasattr(signal, "sigwaitinfo"):  # macOS does not tell who sent a signal
        return

    def answer() -> None:
        while signal.sigwaitinfo(signals).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=answer, daemon=True).start()


def _unchanged(result: Any) -> Any:
    return result


def _list_bad(bad_file: Path, bad: dict[str, str]) -> int:
    """Appends those of `bad` that the file lacks; an earlier run may have written it, other ranks write it too.

    Gives the number of its lines that say nothing; they stay. Raises OSError, and then has written nothing.
    """
    with open_to_append(bad_file) as file:
        lock(file, bad_file.parent, wait=True)
        file.seek(0)
        held = file.read(JSON_BYTES + 1)
        if len(held) > JSON_BYTES:
            raise OSError(errno.EFBIG, f"it has more than {JSON_BYTES:,} bytes already")
        lines = held.splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n") and _listed(lines[-1]) is None:
            held = held[: -len(lines.pop())]  # a kill cut it short: that name is written again
            file.truncate(len(held))
        names = [_listed(line) for line in lines]
        known = set(names)
        new = [json.dumps({"name": name, "reason": bad[name]}) for name in bad if name not in known]
        content = "".join(f"{line}\n" for line in new).encode()
        if held and not held.endswith(b"\n"):
            content = b"\n" + content
        try:
            while content:
                content = content[file.write(content) :]
        except OSError:
            file.truncate(len(held))
            raise
    return names.count(None)


def _listed(line: bytes) -> str | None:
    try:
        return str(json.loads(line)["name"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
