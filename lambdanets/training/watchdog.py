"""What watches a command while its main thread works: signals that end it, hangs, and ranks that left.

1. SIGTERM, Ctrl-C or SIGHUP (the terminal is gone): the run is asked to stop; it saves between two steps and leaves. A
   second one, later than a second after the first, ends the process at once (torchrun passes on what the scheduler has
   sent to all already). A SIGHUP that was ignored before, as by nohup, stays ignored.
2. No beat for `hang_timeout_s`: the stacks of all threads, and of the processes that read images, are written, and the
   process ends with exit code 4. The watch counts its own time: a pause (Ctrl-Z, SIGSTOP) is no hang.
3. Another rank left word that it failed: after 5 seconds in which the main thread did not notice, exit code 5.
4. SIGUSR1: the stacks are written, and the run goes on.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import IO, Any

from lambdanets.errors import HANG, LOST, Terminated
from lambdanets.files import open_to_append, to_stderr

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_GRACE_S = 5.0
_SAME_SIGNAL_S = 1.0
_LONGEST_TICK_S = 2.0  # what is longer between two looks of the watch was a pause

# Where C code keeps the interpreter's lock, no thread of Python can end the process. This one watches the watch, from
# outside, and counts its own time as well: faulthandler's timer goes on through a pause, and fires when it is over.
_GUARD = """
import os, select, signal, sys, time
run, allowed_s, silent_s = int(sys.argv[1]), float(sys.argv[2]), 0.0
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)

def paused():
    try:
        with open(f"/proc/{run}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in "tT"
    except OSError:
        return False

while os.getppid() == run:
    if select.select([0], [], [], 0.25)[0]:
        if not os.read(0, 4096):
            break
        silent_s = 0.0
    elif not paused():
        silent_s += 0.25
    if silent_s > allowed_s:
        os.kill(run, signal.SIGUSR1)
        time.sleep(0.25)
        try:
            os.write(2, sys.argv[3].encode())
        except OSError:
            pass
        os.kill(run, signal.SIGKILL)
        break
"""


class Interrupted(BaseException):
    """A signal came inside `Watchdog.interruptible`."""


class Watchdog:
    """A context in which a command is watched; the four rules stand at the top of the file.

    hang_timeout_s  seconds without `beat()`, once there was one; 0: for ever
    words           what another rank said before it failed, or None
    tell            leaves such a word
    again           how to go on, for the last line
    signals         False: those that end a process are somebody else's
    Stacks go to stderr until `write_to` names a file. Signals are caught only where it is made in the main thread.
    """

    def __init__(
        self,
        *,
        hang_timeout_s: float,
        words: Callable[[], str | None] = lambda: None,
        tell: Callable[[str], None] = lambda words: None,
        again: str = "go on with --resume",
        signals: bool = True,
    ) -> None:
        self.signal: int | None = None
        """The signal that asked the run to stop, or None."""
        self.hang_timeout_s, self._words, self._tell, self._again = hang_timeout_s, words, tell, again
        self._signals = _SIGNALS if signals else ()
        self._interruptible = False
        self._own_s = 0.0  # the watch's own time
        self._last_beat_s: float | None = None  # in it
        self._working = False
        self._signalled_s = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._before: dict[int, Any] = {}
        self._process = os.getpid()
        self._stacks: Path | None = None
        self._file: IO[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Watchdog:
        if threading.current_thread() is threading.main_thread():
            self._before = {
                number: signal.signal(number, self._asked)
                for number in self._signals
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
            }
        # Loader processes are forks, so they write their stacks to the same place on the same signal.
        faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
        if self.hang_timeout_s:
            text = f"lambdanets: nothing has moved for {self.hang_timeout_s:g} s, and the interpreter's lock is held\n"
            allowed_s = max(self.hang_timeout_s + 1, 8.0)  # `words` may wait for 5 s
            command = [sys.executable, "-I", "-S", "-c", _GUARD, str(os.getpid()), str(allowed_s), text]
            with contextlib.suppress(OSError):  # no more processes are allowed: then it is done without
                self._guard = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, bufsize=0)
                os.set_blocking(self._guard.stdin.fileno(), False)  # type: ignore[union-attr]
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        if self._guard is not None and self._guard.stdin is not None:
            with contextlib.suppress(OSError):
                self._guard.stdin.close()
            self._guard.kill()  # a reader's process may hold the other end of its pipe
            self._guard.wait()
        faulthandler.unregister(signal.SIGUSR1)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._file is not None and self._stacks is not None:
            empty = os.fstat(self._file.fileno()).st_size == 0
            self._file.close()
            with contextlib.suppress(OSError):
                if empty:
                    self._stacks.unlink()

    def write_to(self, stacks: Path) -> None:
        """Write stacks there from now on; the file is removed at the end if there were none."""
        try:
            file = open_to_append(stacks)
        except OSError as error:
            to_stderr(f"{stacks} cannot be written ({error.strerror}): stacks would go to the terminal")
            return
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
        self._stacks, self._file = stacks, file

    def beat(self) -> None:
        """The main thread got on; to be called at least every `hang_timeout_s`."""
        self._last_beat_s = self._own_s

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """The main thread computes, or lists a large folder, and cannot call `beat`: it gets on while it uses the
        processor, in however small bits. Not for a wait that looks from time to time, as that for readers does."""
        self.beat()
        self._working = True
        try:
            yield
        finally:
            self._working = False
            self.beat()

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

    def stopped(self, text: str) -> BaseException:
        """What to raise once the run has stopped since a signal asked for it."""
        if self.signal == signal.SIGINT:
            return KeyboardInterrupt(text)
        error = Terminated(text)
        error.code = 128 + (self.signal or signal.SIGTERM)  # another rank's signal is SIGTERM here
        return error

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a reader's, a fork of this process: the run answers
        now_s = time.monotonic()
        if self.signal is None:
            self.signal, self._signalled_s = number, now_s
            if self._interruptible:
                self._interruptible = False
                raise Interrupted
        elif now_s - self._signalled_s > _SAME_SIGNAL_S:
            os._exit(128 + number)

    def _watch(self) -> None:
        poll_s = min(0.25, self.hang_timeout_s / 8) if self.hang_timeout_s else 0.5
        told_s: float | None = None
        looked_s, used_s = time.monotonic(), _main_threads_seconds()
        while not self._over.wait(poll_s):
            before_s, looked_s = looked_s, time.monotonic()
            self._own_s += min(looked_s - before_s, _LONGEST_TICK_S)
            if self._guard is not None and self._guard.stdin is not None:
                with contextlib.suppress(OSError):
                    os.write(self._guard.stdin.fileno(), b".")
            if self._working:
                before_s, used_s = used_s, _main_threads_seconds()
                if used_s > before_s:
                    self.beat()
            beat_s = self._last_beat_s
            if self.hang_timeout_s and beat_s is not None and self._own_s - beat_s > self.hang_timeout_s + poll_s:
                self._leave(HANG, f"nothing has moved for {self.hang_timeout_s:g} s")
            words = self._words()
            if words is None:
                told_s = None
            elif told_s is None:
                told_s = self._own_s
            elif self._own_s - told_s > _GRACE_S:
                self._leave(LOST, words)

    def _leave(self, code: int, why: str) -> None:
        place = 2 if self._file is None else self._file.fileno()
        ends_s = time.monotonic() + 1.2
        with contextlib.suppress(OSError, ValueError):  # a full disk, no terminal: it ends all the same
            os.write(place, f"process {os.getpid()}: {why}\n".encode())
            faulthandler.dump_traceback(file=place, all_threads=True)
        for child in multiprocessing.active_children():
            start = size = os.fstat(place).st_size
            with contextlib.suppress(OSError):
                os.kill(child.pid or 0, signal.SIGUSR1)
            while time.monotonic() < ends_s:  # for its stacks, whole: those of two at once would mix
                time.sleep(0.05)
                before, size = size, os.fstat(place).st_size
                if start < before == size:
                    break
        self._tell(f"process {os.getpid()}: {why}")
        where = "" if self._stacks is None else f": the stacks are in {self._stacks}"
        with contextlib.suppress(OSError):  # not print, whose lock another thread may hold
            os.write(2, f"lambdanets: {why}{where}; exit code {code}, {self._again}\n".encode())
        os._exit(code)


def _main_threads_seconds() -> float:
    """Processor time that the main thread has used; of the whole process, in hundredths, where that is not known."""
    clock = getattr(time, "pthread_getcpuclockid", None)
    ident = threading.main_thread().ident
    if clock is None or ident is None:
        return round(time.process_time(), 2)
    return time.clock_gettime(clock(ident))
