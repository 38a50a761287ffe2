"""Files and tar archives of unknown origin: bytes from a folder or an object store, members read strictly.

`read` gives bytes and retries what a network does to them; `samples` walks an archive in the WebDataset layout.  The
walk is ours, since Python's tarfile ends silently at a damaged header; each header is parsed by tarfile.  Nothing here
unpickles, calls a program or writes where an archive says.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import queue
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, TypeVar
from urllib.parse import unquote

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem

from lambdanets.data.listing import IMAGE_SUFFIXES
from lambdanets.errors import SHOWN, BadData, DiskFault, printable
from lambdanets.files import open_file, tried_again

STREAM = "stream:"
"""Before a folder or URL of shards: read them from end to end."""

MAX_MEMBER_BYTES = 256 << 20
"""A file in an archive above this is refused by its header, unread."""

_MAX_TEXT_BYTES = 1 << 20  # of a label file, or of an extended header
_BLOCK = 512

READ_ATTEMPTS = 8
READ_TIMEOUT_S = 60.0
FIRST_PAUSE_S = 0.25  # doubled from attempt to attempt: 32 s in all

T = TypeVar("T")


# ---- bytes, from a folder or an object store


def join(base: str | Path, name: str) -> str:
    return f"{str(base).rstrip('/')}/{name}"


def filesystem(base: str) -> tuple[Any, str, bool]:
    """The file system of a folder or URL, the path in it, and whether it is this machine's. Raises BadData.

    `pipe:` runs a command and is refused, as is every protocol that fsspec does not know.
    """
    if base.startswith("pipe:") or "|" in base:
        raise BadData(f"{base!r} would run a command: give a folder or a URL of files")
    try:
        found, path = fsspec.core.url_to_fs(base)
    except (ValueError, ImportError) as error:  # an unknown protocol, or its package is missing
        raise BadData(f"{base} cannot be opened: {error}") from error
    return found, path, isinstance(found, LocalFileSystem)


def on_this_machine(place: str) -> bool:
    """Whether a place is a folder of this machine, by its text alone: to ask fsspec may be to call a server."""
    remote = "://" in place and not place.startswith(("file://", "local://"))
    return not remote and "::" not in place and not place.startswith("data:")


def check_source(place: str, named: Iterable[str], by: str) -> None:
    """Raises BadData where `by`, a file of unknown origin, sends this program to a place that the user did not name.

    place  a folder or URL that the file holds, "stream:" before it or not
    named  what the user gave: the data set, each --allow-source; a URL is followed where it is one of them or below it
    by     the file; where it lies on this machine, it may name folders of this machine

    >>> check_source("https://host/set/part", ["https://host/set"], "https://host/set/manifest.json")
    """
    place = place.removeprefix(STREAM)
    if on_this_machine(place) and on_this_machine(by):
        return
    if not any(_below(place, top.removeprefix(STREAM)) for top in named):
        shown = printable(place)
        remedy = f"nothing was read from there; if you trust it, add --allow-source {shown}"
        raise BadData(f"{by} names another place, {shown}: {remedy}")


def _below(place: str, top: str) -> bool:
    """Whether a URL is that one or leads to something below it, as every server understands it."""
    top = top.rstrip("/")
    if place.rstrip("/") == top:
        return True
    rest = unquote(place.removeprefix(f"{top}/"))
    return place.startswith(f"{top}/") and "::" not in rest and ".." not in rest.replace("\\", "/").split("/")


def read(base: str, name: str, start: int, end: int) -> bytes:
    """The bytes of a file from `start` to `end`. Faults are waited out: `retried`, `on_disk`.

    Raises BadData naming the file: missing, forbidden, shorter than asked for, no parts served.
    """
    where = join(base, name)
    found, path, local = filesystem(where)
    wanted, what = end - start, f"{where}, bytes {start:,} to {end:,}"

    def part() -> bytes:
        with open_file(path) as file:
            file.seek(start)
            return file.read(wanted)

    def once() -> bytes:
        try:
            content = bytes(found.cat_file(path, start=start, end=end))
        except (NotImplementedError, ValueError) as error:
            raise BadData(f"{what}: {_no_parts(base, repr(error))}") from error
        if len(content) > wanted:
            raise BadData(f"{what}: {_no_parts(base, f'{len(content):,} bytes came')}")
        if len(content) < wanted:
            raise OSError(f"{len(content):,} of {wanted:,} bytes came")
        return content

    if not local:
        return retried(what, once)
    content = on_disk(what, part)
    if len(content) < wanted:
        raise BadData(f"{what}: the file is cut off, {len(content):,} of {wanted:,} bytes are there")
    return content


def on_disk(what: str, call: Callable[[], T]) -> T:
    """What `call` gives, which reads from a disk of this machine (`tried_again`). Raises DiskFault with `what`."""
    try:
        return tried_again(call)
    except OSError as error:
        raise DiskFault(what, f"cannot be read: {error.strerror or error}") from error


def retried(what: str, call: Callable[[], T], *, limited: bool = True) -> T:
    """What `call` gives, which asks a remote store, in at most READ_ATTEMPTS attempts with growing pauses between them.

    An attempt that raises or takes longer than READ_TIMEOUT_S is a fault (limited=False: `call` sees to its own time).
    Raises BadData with `what` and the last fault, at once where the file is missing or forbidden.
    """
    fault = ""
    for attempt in range(READ_ATTEMPTS):
        if attempt:
            time.sleep(FIRST_PAUSE_S * 2 ** (attempt - 1))
        try:
            return within(READ_TIMEOUT_S, call) if limited else call()
        except (BadData, MemoryError):
            raise
        except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
            raise BadData(f"{what}: {error!r}") from error
        except Exception as error:  # each store has its own exceptions, and few of them are an OSError
            fault = str(error) or repr(error)
    raise BadData(f"{what}: could not be read in {READ_ATTEMPTS} attempts, at the last: {fault}")


def _no_parts(base: str, why: str) -> str:
    return f"the store serves no parts of files ({why}): copy the shards, or stream them: --data {STREAM}{base}"


@contextlib.contextmanager
def whole(base: str, name: str, size: int | None = None, *, most_bytes: int | None = None) -> Iterator[IO[bytes]]:
    """A file opened to be read from end to end; a remote one is copied to a temporary file first, with retries.

    size        its bytes, where they are known: a copy of another length is a fault
    most_bytes  a larger file is refused: BadData, a remote one after so many bytes
    """
    where = join(base, name)
    _, path, local = filesystem(where)

    def copy() -> IO[bytes]:
        with contextlib.ExitStack() as closing:
            file = closing.enter_context(tempfile.TemporaryFile())
            if (full := _copy(where, file, size, most_bytes, lambda part: None)) is not None:
                raise full
            file.seek(0)
            closing.pop_all()  # whole: it stays open
        return file

    with on_disk(where, lambda: open_file(path)) if local else retried(where, copy, limited=False) as file:
        if most_bytes is not None and file.seek(0, io.SEEK_END) > most_bytes:
            raise BadData(f"{where} has {file.tell():,} bytes, at most {most_bytes:,} allowed")
        file.seek(0)
        yield file


def copied(base: str, name: str, to: Path, size: int) -> str:
    """Copies a remote file of that size to one of this machine, with retries; gives its sha256. Raises BadData; OSError
    where this machine's disk does not take it."""
    where = join(base, name)

    def once() -> str | OSError:
        digest = hashlib.sha256()
        try:
            opened = os.open(to, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:  # of this machine: to try again helps nobody
            return error
        with open(opened, "wb", buffering=0) as file:  # else the last bytes would be refused when it is closed
            full = _copy(where, file, size, None, digest.update)
        return digest.hexdigest() if full is None else full

    done = retried(where, once, limited=False)
    if isinstance(done, OSError):
        raise done
    return done


def _copy(
    where: str, to: IO[bytes], size: int | None, most_bytes: int | None, seen: Callable[[bytes], object]
) -> OSError | None:
    """One attempt to copy a remote file. Gives what this machine's disk has against it; raises what the store has."""
    found, path, _ = filesystem(where)
    options = {"block_size": 0} if where.startswith(("http:", "https:")) else {}  # else fsspec asks for parts
    most = most_bytes if most_bytes is not None else size
    n = 0
    with found.open(path, "rb", **options) as file:
        while part := within(READ_TIMEOUT_S, lambda: file.read(1 << 20)):
            left = memoryview(part)
            try:
                while left:  # a disk that is almost full takes a part, and refuses the rest
                    left = left[to.write(left) :]
            except OSError as error:
                return error
            seen(part)
            n += len(part)
            if most is not None and n > most:
                break
    if most_bytes is not None and n > most_bytes:
        raise BadData(f"{where} has more than {most_bytes:,} bytes")
    if size is not None and n != size:
        raise OSError(f"{n:,} of {size:,} bytes came")
    return None


def within(seconds: float, call: Callable[[], T]) -> T:
    """What `call` gives, or TimeoutError: a read that hangs is left to its thread, which ends with the process."""
    answer: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answer.put((call(), None))
        except BaseException as error:
            answer.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        found, error = answer.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer in {seconds:g} s") from None
    if error is not None:
        raise error
    return found  # type: ignore[return-value]  # T, since there is no error


# ---- the members of one archive


class Member(NamedTuple):
    """A regular file in an archive: its path, where its header starts, bytes of the header and of the content."""

    name: str
    start: int
    head_bytes: int
    bytes: int


def header(take: Callable[[int], bytes], shard: str, start: int) -> Member | None:
    """Reads one header with `take(n_bytes)`; None for a folder, and for the zeros at the end (`bytes` not read).

    Raises BadData naming shard and place: a damaged header, a link, device or sparse file, a path that is absolute or
    climbs (`..`), a size above MAX_MEMBER_BYTES.
    """
    at = f"{shard}, byte {start:,}"
    head = block = take(_BLOCK)
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        while info.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME):
            if not 0 <= info.size <= _MAX_TEXT_BYTES or len(head) > _MAX_TEXT_BYTES:
                raise BadData(f"{at}: an extended header of {info.size:,} bytes, {_MAX_TEXT_BYTES:,} allowed")
            head += take(_padded(info.size))
            block = take(_BLOCK)
            head += block
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        if len(head) > _BLOCK:  # the standard library knows what they say of the name and size
            with tarfile.open(fileobj=io.BytesIO(head), mode="r:") as archive:
                info = archive.next() or info
    except BadData:
        raise
    except (tarfile.TarError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
        raise BadData(f"{at}: no header of a file, the archive is damaged ({error})") from error
    if info.isdir():
        return Member("", start, len(head), 0)
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or info.issparse():
        raise BadData(f"{at}: {info.name!r} is a link, device or sparse file: only plain files are read")
    parts = PurePosixPath(info.name).parts
    if not parts or info.name.startswith("/") or ".." in parts or "\0" in info.name or "\\" in info.name:
        raise BadData(f"{at}: the path {info.name!r} leads out of the data set")
    if not 0 <= info.size <= MAX_MEMBER_BYTES:
        raise BadData(f"{at}: {info.name!r} has {info.size:,} bytes, {MAX_MEMBER_BYTES:,} allowed")
    return Member("/".join(part for part in parts if part != "."), start, len(head), info.size)


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def key_and_suffix(name: str) -> tuple[str, str]:
    """WebDataset's split of a member's path: at the first dot of its last part.

    >>> key_and_suffix("a.b/c.seg.PNG")
    ('a.b/c', '.seg.png')
    """
    folder, slash, last = name.rpartition("/")
    stem, dot, suffix = last.partition(".")
    return f"{folder}{slash}{stem}", (dot + suffix).lower()


class Sample(NamedTuple):
    """One sample met in an archive: its picture's member and label, and the members passed over."""

    key: str
    picture: Member
    content: bytes
    label: int
    others: list[str]


def samples(file: IO[bytes], shard: str, seen: Callable[[bytes], object], *, labelled: bool = True) -> Iterator[Sample]:
    """The samples of an archive, one after another, from its first byte to its last; `seen` gets every byte, in order.

    labelled  False: beside a picture lies something else than its label, which is passed over; labels are 0
    Raises BadData, naming shard and place: a cut or damaged archive, whatever `header` refuses, a sample without a
    picture or with two, and one without a label or with one below 0.
    """
    position = 0

    def take(size: int) -> bytes:
        nonlocal position
        content = some_of(size)
        while len(content) < size and (more := some_of(size - len(content))):  # a socket gives what it has
            content += more
        if len(content) < size:
            there = position + len(content)
            raise BadData(f"{shard} is cut off: {there:,} bytes, in the middle of a file or without the archive's end")
        seen(content)
        position += size
        return content

    def some_of(size: int) -> bytes:
        try:
            return file.read(size)
        except OSError as error:
            raise DiskFault(shard, f"cannot be read after byte {position:,}: {error.strerror or error}") from error

    key, found, label, others = "", [], None, []  # type: ignore[var-annotated]
    while True:
        start = position
        block = take(_BLOCK)
        ended = not any(block)
        if ended:
            name, member = "", None
        else:
            member = header(_pushed_back(block, take), shard, start)
            name = member.name if member else ""
            if member is None or not name:
                continue  # a folder
            if labelled and member.bytes > _MAX_TEXT_BYTES and key_and_suffix(name)[1] in (".cls", ".json"):
                raise BadData(f"{shard}, byte {start:,}: a label in {member.bytes:,} bytes: {name!r}")
        if ended or key_and_suffix(name)[0] != key:
            if found or others or label is not None:
                yield _sample(shard, key, found, label if labelled else 0, others)
            key, found, label, others = key_and_suffix(name)[0], [], None, []
        if member is None:
            break
        content = take(_padded(member.bytes))[: member.bytes]
        suffix = key_and_suffix(name)[1]
        if suffix in IMAGE_SUFFIXES:
            found.append((member, content))
            if len(found) > 1:  # said before a third is kept
                _sample(shard, key, found, label, others)
        elif labelled and suffix in (".cls", ".json"):
            label = _label(shard, name, content) if label is None or suffix == ".cls" else label
        elif len(others) < SHOWN:
            others.append(name)
    while rest := some_of(1 << 20):
        if rest.count(0) < len(rest):
            raise BadData(f"{shard} goes on after its end at byte {position:,}: several archives in one file?")
        seen(rest)


def _pushed_back(first: bytes, take: Callable[[int], bytes]) -> Callable[[int], bytes]:
    waiting = [first]
    return lambda size: waiting.pop() if waiting else take(size)


def _label(shard: str, name: str, content: bytes) -> int | None:
    """The label that a .cls or .json holds; None where the JSON has none."""
    try:
        if name.lower().endswith(".cls"):
            return int(content)
        found = json.loads(content)
        if not isinstance(found, dict):
            raise ValueError(f"it holds no object but {str(found)[:60]}")
        label = found.get("label", found.get("cls"))
        if label is not None and (isinstance(label, bool) or not isinstance(label, int)):
            raise ValueError(f"its label is {label!r}")
        return label
    except (ValueError, RecursionError) as error:
        found = f"{printable(name)} is no label: {str(error)[:200]}"
        raise BadData(f"{shard}: {found}: a whole number, from 0 on") from error


def _sample(shard: str, key: str, found: list[tuple[Member, bytes]], label: int | None, others: list[str]) -> Sample:
    if len(found) != 1:
        raise BadData(f"{shard}: the sample {key!r} has {len(found)} pictures instead of one {_met(found, others)}")
    if label is None:
        remedy = f"expected {key}.cls, or {key}.json with a 'label'"
        raise BadData(f"{shard}: the sample {key!r} has no label {_met(found, others)}: {remedy}")
    if label < 0 or label > np.iinfo(np.int32).max:
        raise BadData(f"{shard}: the sample {key!r} has the label {label}: labels run from 0 on")
    return Sample(key, *found[0], label, others)


def _met(found: list[tuple[Member, bytes]], others: list[str]) -> str:
    names = ", ".join([member.name for member, _ in found] + others)[:200]
    return f"(among {printable(names) or 'labels only'})"
