"""What a run says while it works: a bar or a line an epoch, log.jsonl, and TensorBoard on request."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lambdanets.errors import BadRun, need
from lambdanets.files import open_to_append, to_stderr, write_atomically

LOG = "log.jsonl"


class Log:
    """RUN/log.jsonl, one JSON object a line, and the same numbers for TensorBoard in RUN/tensorboard.

    first_step   lines of this step and later ones, which a run wrote before it was killed, are removed: they come again
    tensorboard  write events too
    say          where it goes that lines cannot be written (a full disk): they wait in memory, training does not
    Raises BadRun where the file cannot be opened, is a link, or the package for events is not installed.
    """

    def __init__(
        self, folder: Path, *, first_step: int, tensorboard: bool = False, say: Callable[[str], None] = to_stderr
    ) -> None:
        self._path, self._say, self._waiting = folder / LOG, say, b""
        self._board: Any = None
        if tensorboard:
            need("tensorboard", "tensorboard", "--tensorboard asks for it")
            from torch.utils.tensorboard import SummaryWriter

            if (folder / "tensorboard").is_symlink():
                raise BadRun(f"{folder / 'tensorboard'} is a link, and its target would be written: remove it")
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
        try:
            with open_to_append(self._path) as file:
                file.seek(0)
                held = file.read().splitlines(keepends=True)
            kept = _before(held, first_step)
            if kept != held:
                write_atomically(self._path, b"".join(kept))
            self._file = open_to_append(self._path)  # closed by `close`
        except OSError as error:
            raise BadRun(f"{self._path} cannot be written ({error.strerror or error}): mend that") from error

    def write(self, step: int, **values: Any) -> None:
        """One line: {"step": ..., ...}. Numbers that are not finite become text, since JSON has none."""
        line = {name: repr(v) if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}
        self._append((json.dumps({"step": step, **line}) + "\n").encode())
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(name, value, step)

    def _append(self, content: bytes) -> None:
        said, self._waiting = bool(self._waiting), self._waiting + content
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not said:
                self._say(f"{self._path} cannot be written: {error.strerror or error}; its lines wait in memory")

    def close(self) -> None:
        self._append(b"")
        if self._waiting:
            lines = len(self._waiting.splitlines())
            self._say(f"{self._path} lacks its last {lines} lines: they could not be written")
        self._file.close()
        if self._board is not None:
            self._board.close()


def _before(lines: list[bytes], step: int) -> list[bytes]:
    """The lines of earlier steps; one that a kill cut short is dropped."""
    kept = []
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            if line.endswith(b"\n") and json.loads(line)["step"] < step:
                kept.append(line)
    return kept
