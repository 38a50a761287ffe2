"""One job a folder: RUN/.lock is held by the process that trains."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import IO

from lambdanets.errors import BadRun
from lambdanets.files import lock, open_to_append


def locked(folder: Path) -> IO[bytes]:
    """An open, locked RUN/.lock; the system frees it when the process ends, however it ends. Raises BadRun, OSError."""
    file = open_to_append(folder / ".lock")
    try:
        lock(file, folder)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n".encode())
    except BlockingIOError:
        file.seek(0)
        holder = file.read(200).decode(errors="replace").strip() or "another process"
        file.close()
        raise BadRun(f"{folder} is in use by {holder}: wait until it ends, or name another folder") from None
    except BaseException:
        file.close()
        raise
    _held.add(file)
    return file


def unlock(file: IO[bytes]) -> None:
    if file in _held:
        _held.discard(file)
        file.close()


_held: set[IO[bytes]] = set()


def _forget_in_child() -> None:
    # A forked loader worker outlives a killed parent by seconds; holding the lock, it would keep the restart out.
    for file in list(_held):
        unlock(file)


os.register_at_fork(after_in_child=_forget_in_child)
