"""A teacher over every picture of a data set of shards: one shard becomes one file of labels, whoever does it.

What a picture gets depends on the plan alone: batches cross no shard, and nothing adapts itself to a machine. So a job
is any number of processes, started and killed at any time, each of which does what is missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from lambdanets.data.archive import STREAM
from lambdanets.data.shards import ShardImages, is_shards, open_pictures
from lambdanets.data.source import absolute
from lambdanets.errors import BadData, BadRecipe, BadRun, printable, some
from lambdanets.files import to_stderr
from lambdanets.pseudo_labels import label_files
from lambdanets.pseudo_labels.doubt import SOFTMAX, Rows, rows_of
from lambdanets.pseudo_labels.label_files import HASHES, Labels, file_of
from lambdanets.pseudo_labels.shard_reading import Part, ShardFailed, ShardReader
from lambdanets.pseudo_labels.teacher import open_teacher
from lambdanets.runs.folder import versions
from lambdanets.training.distributed import Ranks
from lambdanets.training.preflight import choose_device
from lambdanets.training.watchdog import Interrupted, Watchdog

TOP = 10
HANG_TIMEOUT_S = 1800.0
_MOST_THREADS = 1024
AGAIN = "the same command goes on, finished shards are kept"


@dataclass(frozen=True)
class Wishes:
    """What is asked for, as JSON: it travels to other machines.

    teacher, classes_file  see `open_teacher`
    data, allow_sources    see `data.shards.open_pictures`
    out                    the folder or URL of the labels
    batch_images           pictures a batch; None: as the teacher's recipe evaluates
    precision              "auto": bfloat16 where the device is a GPU, float32 on a CPU
    top                    classes kept a picture
    hashes                 whether each picture's two hashes are kept
    workers                processes that read, beside each one that labels
    device                 see `choose_device`
    hang_timeout_s         a process in which nothing moves for so long is ended; 0: never
    """

    teacher: str
    data: str
    out: str
    classes_file: str | None = None
    allow_sources: tuple[str, ...] = ()
    batch_images: int | None = None
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    top: int = TOP
    hashes: bool = True
    workers: int = 0
    device: str = "auto"
    hang_timeout_s: float = HANG_TIMEOUT_S


@dataclass
class Labelled:
    """What a call came to.

    home, shards      the labels, and how many shards the data set has
    before            of them were done when the call began
    did               shards of this call -> their pictures, and those that cannot be read
    failed            shards that stay undone -> why
    """

    home: str
    shards: int
    before: int
    did: dict[str, tuple[int, int]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    elsewhere: int = 0
    """Shards that other processes did meanwhile."""
    processes: dict[str, int] = field(default_factory=dict)
    """On a cluster: machine/process -> how often it loaded the teacher."""

    def __str__(self) -> str:
        done = self.before + len(self.did) + self.elsewhere
        lines = f"{printable(self.home)}: {done:,} of {self.shards:,} shards are labelled"
        if not self.did:
            return f"{lines}; there was nothing to do" if done == self.shards else lines
        pictures, bad = (sum(of[i] for of in self.did.values()) for i in (0, 1))
        by = f" by {len(self.processes):,} processes" if self.processes else ""
        lines += f", {len(self.did):,} of them now{by}: {pictures:,} images"
        return lines + (f"; {bad:,} of these cannot be read, their rows say why" if bad else "")


class Done(NamedTuple):
    """A shard whose labels are in their place: its number, pictures, and those that cannot be read."""

    number: int
    samples: int
    bad: int


class Labeller:
    """One process's teacher, pictures and plan; it labels the shards that it is told.

    start_method  of the processes that read; None, the system's own
    cpu_threads   where no process has begun yet and a CPU labels; None: as many as torch has
    Raises what `open_teacher` and `open_pictures` raise; BadData where labels of another plan lie in `wishes.out`.
    """

    def __init__(
        self, wishes: Wishes, *, device: torch.device, start_method: str | None = None, cpu_threads: int | None = None
    ) -> None:
        self.wishes, self.device = wishes, device
        self._closing = ExitStack()
        self._use(cpu_threads)
        self.teacher = open_teacher(wishes.teacher, classes_file=wishes.classes_file)
        self.images = _pictures(wishes)
        self.precision = wishes.precision
        if self.precision == "auto":
            self.precision = "bfloat16" if device.type == "cuda" else "float32"
        self.batch_images = wishes.batch_images or self.teacher.batch_images
        places = {"teacher": self.teacher.place, "data": wishes.data, "allow_sources": list(wishes.allow_sources)}
        self.versions = {**versions(), "pyarrow": label_files.arrow().__version__}
        self.labels = Labels(wishes.out, self._plan(), places, self.versions)
        self._start_method = start_method
        self._opened: ShardReader | None = None

    def _plan(self) -> dict[str, Any]:
        images = self.images
        return {
            "teacher": self.teacher.plan,
            "data": {"fingerprint": images.fingerprint(), "shards": len(images.shards), "samples": len(images)},
            "batch_images": self.batch_images,
            "precision": self.precision,
            "cpu_threads": torch.get_num_threads() if self.device.type == "cpu" else None,
            "fused": True,
            "top": min(self.wishes.top, len(self.teacher.classes)),
            "hashes": self.wishes.hashes,
            "softmax": SOFTMAX,
        }

    def begin(self) -> None:
        """The plan is in the folder, or what is there is refused with each field that differs.

        On a CPU the last bits of a sum depend on how many threads share it (measured: lambda_resnet50 at 96 px), and
        torchrun and Ray choose that number; so it is the first process's, and the others take it over.
        """
        held = label_files.begin(self.labels)
        threads = held.plan.get("cpu_threads")
        if self.device.type == "cpu" and type(threads) is int and 1 <= threads <= _MOST_THREADS:
            self._use(threads)
            self.labels = replace(self.labels, plan=self._plan())
        label_files.check_plan(held, self.labels)

    def _use(self, threads: int | None) -> None:
        if threads is not None and self.device.type == "cpu":
            self._closing.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(threads)

    def close(self) -> None:
        """Ends the processes that read."""
        self._closing.close()
        self._opened = None

    def shards(self, numbers: Iterator[int], watch: Watchdog) -> Iterator[Done | ShardFailed]:
        """Labels these shards, which are asked for as they are needed. A shard that fails is left undone.

        Raises BadData where labels cannot be written, or those of another plan came there; BadRun where a batch does
        not fit the GPU; what `watch` was told by a signal.
        """
        collected: _Collected | None = None
        failed: set[int] = set()
        for part, logits in self._judged(numbers, watch):
            if part.number in failed:
                continue
            if isinstance(part, Part):
                if collected is None or collected.number != part.number:
                    collected = _Collected(part.number, self)
                if (why := collected.add(part, logits)) is not None:
                    part = ShardFailed(part.number, why)
            if isinstance(part, ShardFailed):
                failed.add(part.number)
                self._reader().leave_out(part.number)
                yield part
            elif part.last and collected is not None:
                yield collected.write()
                collected = None

    def _judged(
        self, numbers: Iterator[int], watch: Watchdog
    ) -> Iterator[tuple[Part | ShardFailed, np.ndarray[Any, np.dtype[np.float32]] | None]]:
        """Each batch with its logits. A GPU computes a batch while the one before is put down."""
        waiting: list[tuple[Part, _Answer | None]] = []
        parts = self._reader().parts(numbers)
        while True:
            watch.beat()
            try:
                with watch.interruptible():
                    part = next(parts, None)
            except Interrupted:
                raise watch.stopped(f"interrupted: {AGAIN}") from None
            if isinstance(part, Part):
                waiting.append((part, _Answer(self._logits(part.images)) if len(part.images) else None))
            while len(waiting) > (1 if isinstance(part, Part) else 0):
                before, answer = waiting.pop(0)
                yield before, None if answer is None else answer.logits()
            if part is None:
                return
            if isinstance(part, ShardFailed):
                yield part, None

    @torch.inference_mode()
    def _logits(self, images: torch.Tensor) -> torch.Tensor:
        half = self.precision == "bfloat16"
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
                found: torch.Tensor = self.teacher.model(images.to(self.device, non_blocking=True))
        except torch.OutOfMemoryError as error:
            remedy = f"give --batch-images {max(1, self.batch_images // 2)}, and another --out where labels are begun"
            raise BadRun(
                f"a batch of {self.batch_images:,} images does not fit into {self.device}: {remedy}"
            ) from error
        return found

    def _reader(self) -> ShardReader:
        if self._opened is None:
            self.teacher.model.to(self.device)
            reader = ShardReader(
                self.images, self.teacher.view, batch_images=self.batch_images, hashes=self.wishes.hashes,
                workers=self.wishes.workers, start_method=self._start_method,
            )  # fmt: skip
            self._opened = self._closing.enter_context(reader)
        return self._opened


class _Answer:
    """Logits on their way to the host. On a GPU the copy follows its own batch, not the next one, which is begun."""

    def __init__(self, found: torch.Tensor) -> None:
        on_gpu = found.device.type == "cuda"
        self._host = torch.empty(found.shape, dtype=torch.float32, pin_memory=on_gpu)
        with torch.inference_mode():
            self._host.copy_(found, non_blocking=on_gpu)
        self._copied = torch.cuda.Event() if on_gpu else None
        if self._copied is not None:
            self._copied.record()

    def logits(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """(pictures, classes) float32, once they are there."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host.numpy()


def _pictures(wishes: Wishes) -> ShardImages:
    """Each shard is compared when it is read; label files of two shards must not have one name."""
    where = wishes.data.removeprefix(STREAM)  # shards are read whole in any case
    if not is_shards(where):
        remedy = "lambdanets pack FOLDER OUT --unlabelled makes one of a folder, index --unlabelled of archives"
        raise BadData(f"{printable(where)} is no data set of shards, it has no manifest.json: {remedy}")
    images = open_pictures(where, allow_sources=wishes.allow_sources, look_at_shards=False)
    seen: dict[str, str] = {}
    for shard in images.shards:
        if (other := seen.setdefault(file_of(shard.name), shard.name)) != shard.name:
            raise BadData(
                f"{where} has the shards {other} and {shard.name}, whose labels would have one name: rename one"
            )
    return images


class _Collected:
    """The rows of one shard, until the last batch is there."""

    def __init__(self, number: int, of: Labeller) -> None:
        self.number, self._of = number, of
        n, top = of.images.shards[number].samples, of.labels.plan["top"]
        self._rows = Rows(
            np.full(n, -1, np.int32), np.zeros(n, np.float32), np.ones(n, np.float32),
            np.full((n, top), -1, np.int32), np.zeros((n, top), np.float16),
        )  # fmt: skip
        self._hashes = np.zeros((2, n), np.uint64)
        self._errors: list[str | None] = [None] * n

    def add(self, part: Part, logits: np.ndarray[Any, np.dtype[np.float32]] | None) -> str | None:
        """Puts a batch down; gives why the shard fails, if it does: a teacher whose logits are not finite."""
        good = np.array([part.first + i for i in range(len(part.members)) if i not in part.errors], np.int64)
        for place, why in part.errors.items():
            self._errors[part.first + place] = why
        if part.hashes is not None:
            self._hashes[:, part.first : part.first + len(part.members)] = part.hashes
        if logits is None:
            return None
        if len(wrong := np.flatnonzero(~np.isfinite(logits).all(axis=1))):
            of = self._of
            index = int(of.images.first_images[self.number]) + int(good[wrong[0]])
            name = printable(of.images.called(index, part.members[int(good[wrong[0]]) - part.first]))
            remedy = "" if of.precision == "float32" else ": --precision float32, into another --out, may help"
            return f"the teacher's logits of {name} are not finite, and of {len(wrong) - 1:,} more in its batch{remedy}"
        rows = rows_of(logits, self._rows.top_class.shape[1])
        for name, values in rows._asdict().items():
            getattr(self._rows, name)[good] = values
        return None

    def write(self) -> Done:
        pa = label_files.arrow()
        of, rows = self._of, self._rows
        shard, schema, n = of.images.shards[self.number], of.labels.schema, len(self._errors)
        number = schema.field("class").type
        columns: dict[str, Any] = {
            "sample": np.arange(n, dtype=np.int32),
            "class": pa.array(rows.number).cast(number),
            "confidence": rows.confidence,
            "doubt": rows.doubt,
        }
        for name, values in (("top_class", pa.array(rows.top_class.reshape(-1)).cast(number)), ("top_prob", None)):
            flat = pa.array(rows.top_prob.reshape(-1)) if values is None else values
            columns[name] = pa.FixedSizeListArray.from_arrays(flat, type=schema.field(name).type)
        if of.wishes.hashes:
            columns |= dict(zip(HASHES, self._hashes, strict=True))
        columns["error"] = pa.array(self._errors, pa.string())
        table = pa.table([columns[name] for name in schema.names], schema=schema)
        device = torch.cuda.get_device_name(of.device) if of.device.type == "cuda" else of.device.type
        content = label_files.file_bytes(
            table, labels=of.labels, shard=shard.name, shard_sha256=shard.sha256, device=device, versions=of.versions
        )
        # A store may have let a second job write its own plan over ours: then not one more shard.
        label_files.check_plan(label_files.read_labels(of.labels.home), of.labels)
        label_files.write(of.labels.home, shard.name, content)
        return Done(self.number, n, n - self._errors.count(None))


# ---- which shards a process does


def chosen(n_shards: int, part: tuple[int, int] | None) -> list[int]:
    """The shards of part I of N: I, I + N, I + 2N ...; all where there are no parts.

    >>> chosen(7, (1, 3))
    [1, 4]
    """
    first, parts = part or (0, 1)
    return list(range(first, n_shards, parts))


def missing_ones(
    shards: Sequence[int], done: set[int], there: Callable[[], set[int]], *, rank: int = 0, ranks: int = 1
) -> Iterator[int]:
    """The shards that this process does: its own first, then whatever nobody has done, each at most once.

    shards  of this job; rank r of R begins with the places r, r + R, ... of those that are not done
    there   looks again which are done
    Nobody claims a shard: one that is done twice is time lost, and no error.

    >>> list(missing_ones(range(5), {1}, lambda: {0, 1, 2, 3}, rank=1, ranks=2))
    [2, 4]
    """
    left = [number for number in shards if number not in done]
    own = left[rank::ranks]
    given = set(own)
    yield from own
    while ranks > 1:
        now = there()
        left = [number for number in left if number not in now and number not in given]
        if not left:
            return
        number = left[rank * len(left) // ranks]  # not where the others begin
        given.add(number)
        yield number


def label(
    wishes: Wishes,
    *,
    part: tuple[int, int] | None = None,
    said: Callable[[str], object] = to_stderr,
) -> Labelled:
    """Labels every shard that is not labelled yet, in this process, or as one of the ranks that torchrun started.

    part  (I, N): only shards I, I + N, ...
    said  hears a line now and then
    Raises BadData with what was done, where shards stay undone: each is tried twice, the others go on. Whatever ends
    it, the same call goes on; a file of labels is there whole, or not at all.
    """
    ranks = Ranks()  # which one this is; they need not meet
    check(wishes, part)
    with Watchdog(hang_timeout_s=wishes.hang_timeout_s, again=AGAIN) as watch:
        with watch.working():
            labeller = Labeller(_absolute(wishes), device=choose_device(wishes.device, ranks))
            labeller.begin()
        try:
            return _label(labeller, part, ranks, watch, said)
        finally:
            labeller.close()


def _label(
    labeller: Labeller, part: tuple[int, int] | None, ranks: Ranks, watch: Watchdog, said: Callable[[str], object]
) -> Labelled:
    home, shards = labeller.labels.home, labeller.images.shards
    known = {file_of(shard.name): number for number, shard in enumerate(shards)}

    def there() -> set[int]:
        return {known[name] for name in label_files.finished(home) if name in known}

    before = there()
    found = Labelled(home, len(shards), len(before))
    ours = chosen(len(shards), part)
    failed: dict[int, str] = {}
    progress = Progress(len(ours), len(before.intersection(ours)), said if ranks.first else lambda line: None)
    for again in (False, True):
        first = missing_ones(ours, before, there, rank=ranks.rank, ranks=ranks.ranks)
        for one in labeller.shards(iter(list(failed)) if again else first, watch):
            if isinstance(one, ShardFailed):
                failed[one.number] = one.why
            else:
                failed.pop(one.number, None)
                found.did[shards[one.number].name] = one.samples, one.bad
                progress.one_more(one.samples)
    after = before if not failed and ranks.ranks == 1 else there()
    found.failed = {shards[number].name: why for number, why in failed.items() if number not in after}
    did = {known[file_of(name)] for name in found.did}
    found.elsewhere = len(after - before - did)
    return found


class Progress:
    """A line at most every 30 seconds: how far, how fast, how much longer."""

    EVERY_S = 30.0

    def __init__(self, shards: int, done: int, said: Callable[[str], object]) -> None:
        self._shards, self._done, self._said = shards, done, said
        self._first, self._pictures = done, 0
        self._began_s = self._told_s = time.monotonic()

    def one_more(self, pictures: int) -> None:
        self._done += 1
        self._pictures += pictures
        now_s = time.monotonic()
        if now_s - self._told_s < self.EVERY_S:
            return
        self._told_s = now_s
        took_s = now_s - self._began_s
        left_s = took_s / (self._done - self._first) * (self._shards - self._done)
        rate = self._pictures / took_s
        self._said(f"{self._done:,} of {self._shards:,} shards; {rate:,.0f} images/s; {left_s / 60:,.0f} min left")


def refuse_undone(found: Labelled, data: str) -> None:
    """Raises BadData, with what was done, where shards stay undone."""
    if found.failed:
        each = some((f"{name}: {why}" for name, why in found.failed.items()), between="\n  ")
        remedy = f"mend them, and {AGAIN}; or go on without them: lambdanets select --incomplete"
        undone = f"{len(found.failed):,} shards of {printable(data)} stay undone, though tried twice"
        raise BadData(f"{found}; {undone}: {remedy}:\n  {each}")


def _absolute(wishes: Wishes) -> Wishes:
    """Places that mean the same in another working folder."""
    return replace(wishes, data=absolute(wishes.data), out=absolute(wishes.out))


def check(wishes: Wishes, part: tuple[int, int] | None) -> None:
    """Raises BadRecipe for what cannot be meant; BadRun where pyarrow is missing."""
    label_files.arrow()
    if part is not None and not 0 <= part[0] < part[1]:
        raise BadRecipe(f"--part {part[0]}/{part[1]}: the parts of N are 0/N to {part[1] - 1}/{part[1]}")
    if wishes.top < 1 or (wishes.batch_images is not None and wishes.batch_images < 1) or wishes.workers < 0:
        asked = f"top is {wishes.top}, batch_images {wishes.batch_images}, workers {wishes.workers}"
        raise BadRecipe(f"{asked}: at least 1, 1 and 0")
