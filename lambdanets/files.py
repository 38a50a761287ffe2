"""A file appears whole, or not at all; and a file of unknown origin is read without being trusted.

Every file that this package writes in a folder that somebody else may have filled goes through here: nothing is written
through a link, and what a disk cannot do (locks, synchronised folders on some network disks) is lived with and said
once.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import secrets
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# A disk that answers so has no locks, or nothing to synchronise in a folder: EIO, ENOSPC and their like are not here.
_NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL})
_NO_SYNC = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF})
JSON_BYTES = 256 << 20
"""Above this a JSON file of unknown origin is refused unread."""

PAUSES_S = (0.1, 0.4, 1.5)
"""Between attempts to read from a disk."""

T = TypeVar("T")

_said: set[tuple[str, str]] = set()


def to_stderr(line: str) -> None:
    """A line that a person must see. It is dropped where nobody listens any more."""
    with contextlib.suppress(OSError, ValueError):
        print(f"lambdanets: {line}", file=sys.stderr, flush=True)


def _say_once(folder: str | Path, what: str) -> None:
    if (str(folder), what) not in _said:
        _said.add((str(folder), what))
        to_stderr(f"{folder} is on a file system {what}")


# ---- written


@contextlib.contextmanager
def placed(path: str | Path) -> Iterator[IO[bytes]]:
    """A file to write that appears at `path` whole, synchronised, when the block ends; not at all where it fails.

    A link at `path` is replaced, not followed. What a killed writer left beside it is removed. Raises OSError.
    """
    path = Path(path)
    with _opened_folder(path.parent) as folder:
        _tidy(folder, path.name)
        beside, opened = _held(folder, path.name)
        try:
            with os.fdopen(opened, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                # Still held: what nobody holds is debris to another writer.
                os.replace(beside, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(beside, dir_fd=folder)
            raise
        _sync_folder(folder, path.parent)


def _held(folder: int, name: str) -> tuple[str, int]:
    """A new file beside that name, opened and held, which tells `_tidy` that its writer lives."""
    while True:
        beside = f".{name}.{secrets.token_hex(4)}.part"
        opened = os.open(beside, _NEW, 0o666, dir_fd=folder)
        with contextlib.suppress(OSError):  # without locks nothing is tidied either
            fcntl.flock(opened, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            os.stat(beside, dir_fd=folder, follow_symlinks=False)
            return beside, opened
        os.close(opened)  # another writer took it for debris before it was held


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write beside `path`, synchronise, rename: after a crash the old content or the new is there, whole."""
    with placed(path) as file:
        file.write(content)


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """`write_atomically` of indented JSON; a NaN is refused, since JSON has none."""
    write_atomically(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def open_to_append(path: str | Path) -> IO[bytes]:
    """A file to read and to write at its end, unbuffered, made where it is missing; never the target of a link.

    Raises OSError: where `path` is a link, a pipe or a device, too.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    opened = os.open(path, flags, 0o666)
    try:
        _regular(opened, path)
        return os.fdopen(opened, "a+b", buffering=0)
    except BaseException:
        os.close(opened)
        raise


def sync_folder(folder: str | Path) -> None:
    """Put the names in a folder, a rename say, on the disk."""
    with _opened_folder(folder) as opened:
        _sync_folder(opened, folder)


def _sync_folder(opened: int, shown: str | Path) -> None:
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
        _say_once(shown, "that synchronises no folders: a power failure may undo the newest files")


def lock(file: int | IO[bytes], where: str | Path, *, wait: bool = False) -> None:
    """Hold a file for this process alone; the system gives it free when the process ends, however it ends.

    where  the folder that a message names
    wait   until it is free; else BlockingIOError where another process holds it
    On a file system without locks nothing is held, and that is said once. Raises OSError.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _say_once(where, "without locks: two jobs that write there at once would not notice each other")


@contextlib.contextmanager
def _opened_folder(folder: str | Path) -> Iterator[int]:
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield opened
    finally:
        os.close(opened)


def _tidy(folder: int, name: str) -> None:
    """Remove what killed writers of this file left: those parts that nobody holds any more."""
    front, back = f".{name}.", ".part"
    for left in os.listdir(folder):
        if left.startswith(front) and left.endswith(back) and len(left) == len(front) + 8 + len(back):
            with contextlib.suppress(OSError):
                opened = os.open(left, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
                try:
                    fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(left, dir_fd=folder)
                finally:
                    os.close(opened)


# ---- read


def present(path: str | Path) -> bool:
    """Whether there is something of this name, a link that leads nowhere too; OSError where it cannot be seen."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def tried_again(call: Callable[[], T]) -> T:
    """What `call` gives; an OSError of it is final after PAUSES_S. For reading what is known to be there: a network
    disk that is away for a moment answers ENOENT, EACCES or EIO, as one that is broken does."""
    for pause_s in PAUSES_S:
        try:
            return call()
        except OSError:
            time.sleep(pause_s)
    return call()


def _regular(opened: int, path: str | Path) -> None:
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        raise OSError(errno.EINVAL, "it is no file but a folder, a pipe or a device", str(path))


def open_file(path: str | Path) -> IO[bytes]:
    """A regular file to read. Raises OSError: a pipe or device, which would be waited for, too."""
    opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _regular(opened, path)
        return os.fdopen(opened, "rb")
    except BaseException:
        os.close(opened)
        raise


def read_file(path: str | Path, most_bytes: int = JSON_BYTES) -> bytes:
    """All bytes of a regular file. Raises OSError: a pipe or device (which would be waited for), one that is larger."""
    with open_file(path) as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise OSError(errno.EFBIG, f"it has more than {most_bytes:,} bytes", str(path))
    return content


def json_object(content: bytes) -> dict[str, Any]:
    """The JSON object in bytes of unknown origin. Raises ValueError for all else: cut short, no UTF-8, NaN, nested
    beyond any use, a list."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    try:
        held = json.loads(content.decode("utf-8"), parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(held, dict):
        raise ValueError(f"it holds no object but a {type(held).__name__}")
    return held


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file, see `read_file` and `json_object`. Raises OSError or ValueError."""
    return json_object(read_file(path))


def field(held: Any, key: str, kind: type | tuple[type, ...]) -> Any:
    """held[key], if `held` is an object that has it and it is of that kind; a whole number counts as a float, a bool
    as no number. Raises ValueError, naming key, kind and what was found.

    >>> field({"epochs": 3}, "epochs", int)
    3
    """
    kinds = kind if isinstance(kind, tuple) else (kind,)
    names = " or ".join("nothing" if k is type(None) else k.__name__ for k in kinds)
    if not isinstance(held, dict) or key not in held:
        raise ValueError(f"it has no {key!r} ({names})")
    found = held[key]
    if float in kinds and type(found) is int:
        return float(found)
    if not isinstance(found, kinds) or (isinstance(found, bool) and bool not in kinds):
        raise ValueError(f"its {key!r} is {str(found)[:60]!r} and should be {names}")
    return found


# ---- processes that read


def end_with_parent() -> None:
    """To be called first in a process that reads for another: it ends within seconds of that one, however that ends.

    A thread looks once a second, in whatever state the others are. The system's own way (PR_SET_PDEATHSIG of Linux)
    would fire as soon as the thread ends that started this process, while the program goes on.
    """
    started_by, parent = os.getppid(), multiprocessing.parent_process()

    def gone() -> bool:
        if os.getppid() != started_by:
            return True
        try:
            if parent is not None and parent.pid is not None:  # it may have gone before this process looked first
                os.kill(parent.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return False

    def watch() -> None:
        while not gone():
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def serve_the_parent() -> None:
    """To be called first in a worker: it ends with its parent, and leaves Ctrl-C, which the terminal sends to all, to
    it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def written(folder: Path, name: str, content: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write and synchronise; gives the manifest's entry, of what was meant to be written."""
    digest, size_bytes = hashlib.sha256(), 0
    file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for piece in content:
            digest.update(piece)
            size_bytes += len(piece)
            left = memoryview(piece)
            while left:
                left = left[os.write(file, left) :]
        os.fsync(file)
    finally:
        os.close(file)
    return {"bytes": size_bytes, "sha256": digest.hexdigest()}
