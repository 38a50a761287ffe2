"""What watches a run while its main thread works: signals that end it, hangs, and ranks that left.

1. SIGTERM or Ctrl-C: the run is asked to stop; it saves between two steps and leaves. A second one, later than a
   second after the first, ends the process at once (torchrun passes on what the scheduler has sent to all already).
2. No beat for `hang_timeout_s`: the stacks of all threads, and of the processes that read images, are written, and the
   process ends with exit code 4.
3. Another rank left word that it failed: after 5 seconds in which the main thread did not notice, exit code 5.
4. SIGUSR1: the stacks are written, and the run goes on.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

HANG, LOST = 4, 5  # exit codes
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_GRACE_S = 5.0
_SAME_SIGNAL_S = 1.0


class Terminated(Exception):
    """SIGTERM asked the run to stop, and it did; the message says after which step, and what was saved."""


class Interrupted(BaseException):
    """A signal came inside `Watchdog.interruptible`."""


class Watchdog:
    """A context in which a run is watched; the four rules stand at the top of the file.

    stacks          where stacks are written; removed at the end if there were none
    hang_timeout_s  seconds without `beat()`; 0: for ever
    words           what another rank said before it failed, or None
    tell            leaves such a word
    Signals are caught only where it is made in the main thread.
    """

    def __init__(
        self,
        stacks: Path,
        *,
        hang_timeout_s: float,
        words: Callable[[], str | None] = lambda: None,
        tell: Callable[[str], None] = lambda words: None,
    ) -> None:
        self.signal: int | None = None
        """The signal that asked the run to stop, or None."""
        self.stacks, self.hang_timeout_s, self._words, self._tell = stacks, hang_timeout_s, words, tell
        self._interruptible = False
        self._last_beat_s = self._signalled_s = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Watchdog:
        self._file = open(self.stacks, "a")  # closed in __exit__
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._asked) for number in _SIGNALS}
        # Loader processes are forks, so they write their stacks to the same file on the same signal.
        faulthandler.register(signal.SIGUSR1, file=self._file, all_threads=True)
        self.beat()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(signal.SIGUSR1)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._file.close()
        with contextlib.suppress(OSError):
            if self.stacks.stat().st_size == 0:
                self.stacks.unlink()

    def beat(self) -> None:
        """The main thread got on; to be called at least every `hang_timeout_s`."""
        self._last_beat_s = time.monotonic()

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """A wait that a signal ends, by Interrupted; elsewhere it is only noted, for the end of the step."""
        if self.signal is not None:
            raise Interrupted
        self._interruptible = True
        try:
            yield
        finally:
            self._interruptible = False

    def _asked(self, number: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if self.signal is None:
            self.signal, self._signalled_s = number, now_s
            if self._interruptible:
                self._interruptible = False
                raise Interrupted
        elif now_s - self._signalled_s > _SAME_SIGNAL_S:
            os._exit(128 + number)

    def _watch(self) -> None:
        poll_s = min(0.5, self.hang_timeout_s / 4) if self.hang_timeout_s else 0.5
        told_s: float | None = None
        while not self._over.wait(poll_s):
            now_s = time.monotonic()
            if self.hang_timeout_s:
                # This thread needs the interpreter's lock; where the main one keeps it, C code ends the process.
                faulthandler.dump_traceback_later(self.hang_timeout_s + 1.5, exit=True, file=self._file)
                if now_s - self._last_beat_s > self.hang_timeout_s:
                    self._leave(HANG, f"nothing has moved for {self.hang_timeout_s:g} s")
            words = self._words()
            if words is None:
                told_s = None
            elif told_s is None:
                told_s = now_s
            elif now_s - told_s > _GRACE_S:
                self._leave(LOST, words)

    def _leave(self, code: int, why: str) -> None:
        self._file.write(f"process {os.getpid()}: {why}\n")
        self._file.flush()
        faulthandler.dump_traceback(file=self._file, all_threads=True)
        ends_s = time.monotonic() + 1.2
        for child in multiprocessing.active_children():
            start = size = os.fstat(self._file.fileno()).st_size
            with contextlib.suppress(OSError):
                os.kill(child.pid or 0, signal.SIGUSR1)
            while time.monotonic() < ends_s:  # for its stacks, whole: those of two at once would mix
                time.sleep(0.05)
                before, size = size, os.fstat(self._file.fileno()).st_size
                if start < before == size:
                    break
        self._tell(f"process {os.getpid()}: {why}")
        text = f"lambdanets: {why}: the stacks are in {self.stacks}; exit code {code}, go on with --resume\n"
        with contextlib.suppress(OSError, ValueError):
            os.write(2, text.encode())
        os._exit(code)
