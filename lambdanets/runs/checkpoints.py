"""The checkpoints of a run: RUN/step-N, everything that training needs to go on after N steps, to the bit.

    tensors.safetensors  the tensors of the state
    state.json           the rest of it, with the tensors' names in their places
    manifest.json        size and sha256 of both, and its own; the step, the run that it is of, what it is kept for

No pickle on either way. A step folder is written beside its place, synchronised and renamed, and nothing is removed
before its successor is in place: there is a complete checkpoint at every moment, whatever is killed or fails. A link
in the place of anything that is written here is never followed.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import safetensors.torch
from torch import Tensor

from lambdanets.errors import BadRun, NonFiniteState, NotForThis, some
from lambdanets.files import field, json_object, present, read_file, sync_folder, to_stderr, written
from lambdanets.runs.lock import locked, unlock
from lambdanets.runs.nested_state import flatten, is_finite, safetensors_bytes, unflatten

TENSORS = "tensors.safetensors"
STATE = "state.json"
MANIFEST = "manifest.json"
_FORMAT = 1
_STEP = r"step-(0|[1-9][0-9]*)"
_TRIES = 3  # saves that may fail in a row
_LEFT_BY_A_KILL = r"\.step-(\w+)\.(part|old|gone)"
LEFT_AT_THE_START = rf"\.lock|{_LEFT_BY_A_KILL}|\.run\.json\.\w+\.part"
"""What a run that was killed in its very first writes may leave in its folder, and nothing else."""


@dataclass(frozen=True)
class Checkpoint:
    """One step folder whose files were just compared with their sha256.

    step  optimiser steps done
    path  RUN/step-N
    run   the `id` in the run.json of the run that it is of; None: it was written before runs had one
    """

    step: int
    path: Path
    run: str | None = None

    def load(self) -> Any:
        """The state that was saved, tensors on the CPU. Raises BadRun, naming the file, where it cannot be read."""
        try:
            tensors = safetensors.torch.load_file(self.path / TENSORS)
            return unflatten(tensors, json.loads((self.path / STATE).read_bytes()))
        except Exception as error:  # safetensors has its own exception, not a ValueError
            raise BadRun(f"{self.path} cannot be read: {error!r}") from error


def is_checkpoint(path: str | Path) -> bool:
    """Whether a path is that of a step folder, good or bad."""
    path = Path(os.path.abspath(path))
    return re.fullmatch(_STEP, path.name) is not None and path.is_dir()


def read_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint of a step folder, compared with its manifest. Raises BadRun where it is damaged."""
    step = int(Path(os.path.abspath(path)).name.removeprefix("step-"))
    try:
        return _verify(Path(path), step)
    except NotForThis:
        raise
    except (OSError, BadRun) as error:
        raise BadRun(f"{path} is damaged ({error}): name another step") from error


def newest_checkpoint(folder: str | Path, say: Callable[[str], None] | None = None) -> Checkpoint | None:
    """The checkpoint of the highest step, by number, whose files all have the sha256 of its manifest; None: no step.

    Those that do not are passed over, each with a line to `say` (default: stderr). It takes no lock and changes
    nothing: `Checkpoints.newest` is for the process that goes on with the run. Raises BadRun where there are
    checkpoints and none is good: a run that silently started again would be taken for the resumed one; and where one
    was written by a newer lambdanets, which is not damage.
    """
    return _newest(Path(folder), say or to_stderr, lambda bad: None)


def _newest(folder: Path, say: Callable[[str], None], passed_over: Callable[[Path], None]) -> Checkpoint | None:
    steps = _steps(folder)
    reasons: list[tuple[int, str]] = []
    for step in reversed(steps):
        path = folder / f"step-{step}"
        try:
            found = _verify(path, step)
        except NotForThis:
            raise
        except (OSError, BadRun) as error:
            reasons.append((step, str(error)))
            continue
        for bad, reason in reasons:
            say(f"{folder / f'step-{bad}'} is damaged ({reason}): it is passed over, step {step} is used")
            passed_over(folder / f"step-{bad}")
        return found
    if not steps:
        return None
    listed = some((f"step-{step}: {reason}" for step, reason in reasons), between="\n  ")
    raise BadRun(
        f"{folder} has {len(steps)} checkpoints and none can be read: copy a good one back, or start a new run in "
        f"another folder\n  {listed}"
    )


class Checkpoints:
    """The checkpoints of one run: the newest good one found, new ones written beside the training, old ones removed.

        with Checkpoints(folder) as store:
            if (found := store.newest()) is not None:
                state = found.load()
            store.save(step, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3})

    folder     of the run; it is made where it is missing, and locked until `close`: a second job is refused, the lock
               of a process that died is free. Of several ranks only one makes this object
    run        the run's own name for itself, written into each checkpoint; one that has another is never used
    keep_last  checkpoints kept besides the newest `best` one and all milestones
    say        where a line goes that a person must see (a save that failed, a damaged checkpoint); default: stderr

    A save is written in RUN/.step-N.part, every file synchronised, and renamed to RUN/step-N; only then are older ones
    removed. What a kill left is removed or put back here, at the start. Raises BadRun: the folder cannot be written,
    or another process holds it.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        run: str | None = None,
        keep_last: int = 3,
        say: Callable[[str], None] | None = None,
    ) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last is {keep_last}: 1 or more")
        self.folder, self.run, self.keep_last, self.say = Path(folder), run, keep_last, say or to_stderr
        self._marks = -1, False, False  # step, best, milestone of the last save, also of one that failed
        self._writer: Thread | None = None
        self._failed: OSError | None = None  # why the last save is not on the disk
        self._failed_saves = 0  # in a row
        self._fatal: BaseException | None = None
        probe = self.folder / ".step-probe.part"
        try:
            os.makedirs(self.folder, exist_ok=True)
            self._lock = locked(self.folder)
        except OSError as error:
            raise BadRun(f"{self.folder} cannot be written ({error}): name another folder") from error
        try:
            self._tidy()
            os.mkdir(probe)  # the lock file may be older than the folder's being read-only
            os.rmdir(probe)
        except OSError as error:
            unlock(self._lock)
            raise BadRun(f"{self.folder} cannot be written ({error}): name another folder") from error

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            self.wait()
        except BaseException as error:
            if kind is None:
                raise
            self.say(str(error))  # the error under way is the one to raise
        finally:
            self.close()

    def close(self) -> None:
        """Wait for the writer and give the folder free; errors are `wait`'s to raise."""
        self._join()
        unlock(self._lock)

    def newest(self) -> Checkpoint | None:
        """As `newest_checkpoint`; a damaged checkpoint is renamed to step-N.bad, so that it counts no more.

        Raises BadRun, too, where any checkpoint in the folder is whole and another run's.
        """

        def put_aside(bad: Path) -> None:
            number = 0
            while present(aside := bad.with_name(f"{bad.name}.bad{number or ''}")):
                number += 1
            try:
                os.rename(bad, aside)
            except OSError as error:
                self.say(f"{bad} cannot be renamed ({error}): remove it, it is damaged")

        self._join()
        for step in _steps(self.folder):
            try:
                other = _manifest(self.folder / f"step-{step}").get("run")
            except (OSError, BadRun):  # `_newest` says what is wrong with it
                continue
            if other != self.run:
                named = [f"{name}" if name is not None else "none: older ones have no id" for name in (other, self.run)]
                raise BadRun(
                    f"{self.folder / f'step-{step}'} is a checkpoint of another run (its id: {named[0]}; this run's: "
                    f"{named[1]}): move it out of {self.folder}, then go on with --resume"
                )
        return _newest(self.folder, self.say, put_aside)

    def save(self, step: int, state: Mapping[str, Any], *, best: bool = False, milestone: bool = False) -> None:
        """Copy the state to CPU memory, and let a thread write it as RUN/step-`step`; `wait` waits for it.

        step       optimiser steps done. A checkpoint of that step is replaced, and what it was kept for stays
        state      anything that `flatten` takes
        best       kept until there is another best one
        milestone  kept for ever

        A save still being written is waited for. A write that fails (a full disk, say) costs nothing but itself: the
        last good checkpoint stays, the debris is removed, a line says what is missing, the next save is the next try.
        Raises BadRun after 3 failed in a row; NonFiniteState where a tensor of the save before held a NaN or an
        infinity: that one was not written.
        """
        if step < 0:
            raise ValueError(f"step is {step}: 0 or more")
        self._join()
        self._give_up()
        tensors, tree = flatten(state)
        for name, value in tensors.items():
            tensors[name] = value.to("cpu", copy=True)  # keeps the memory format
        before = self._marks if self._marks[0] == step else (step, False, False)
        self._marks = (step, best or before[1], milestone or before[2])
        job = (step, tensors, tree, {"best": self._marks[1], "milestone": self._marks[2]})
        self._writer = Thread(target=self._write, args=job, name=f"checkpoint of step {step}")
        self._writer.start()

    def check(self) -> None:
        """Raise now what the next `save` would raise; waits for nothing. For every step of a loop."""
        if self._writer is None or not self._writer.is_alive():
            self._give_up()

    def wait(self) -> None:
        """Until the last save is on the disk. Raises BadRun where it is not, and what `save` raises."""
        self._join()
        self._give_up()
        if self._failed is not None:
            raise BadRun(f"the last checkpoint of {self.folder} was not written: {self._failed}") from self._failed

    def _join(self) -> None:
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def _give_up(self) -> None:
        if self._fatal is not None:
            raise self._fatal
        if self._failed is not None and self._failed_saves >= _TRIES:
            raise BadRun(
                f"{self._failed_saves} checkpoints in a row could not be written to {self.folder}: {self._failed}; "
                f"{self._last_good()}"
            ) from self._failed

    def _last_good(self) -> str:
        try:
            steps = _steps(self.folder)
        except OSError as error:  # this is said of a disk in trouble
            return f"the others cannot be listed ({error})"
        return f"the last one is step-{steps[-1]}" if steps else "there is none yet"

    def _write(self, step: int, tensors: dict[str, Tensor], tree: Any, flags: dict[str, bool]) -> None:
        """In the writer's thread: one save from memory to its place. Errors are kept for the main thread."""
        part = self.folder / f".step-{step}.part"
        place = self.folder / f"step-{step}"
        needed_bytes = sum(t.nbytes for t in tensors.values())
        try:
            if wrong := [name for name, t in tensors.items() if not is_finite(t)]:
                raise NonFiniteState(
                    f"the checkpoint of step {step} was not written: {len(wrong)} tensors are not finite: "
                    f"{', '.join(wrong[:10])}"
                )
            _remove(part)  # of a try that failed
            os.mkdir(part)
            files = {
                TENSORS: written(part, TENSORS, safetensors_bytes(tensors)),
                STATE: written(part, STATE, [json.dumps(tree, indent=1, allow_nan=False).encode()]),
            }
            with contextlib.suppress(OSError, BadRun):  # the same step again: its marks only grow
                before = _manifest(place)
                flags = {name: mark or bool(before.get(name)) for name, mark in flags.items()}
            head = {"format": _FORMAT, "step": step, "run": self.run, **flags}
            written(part, MANIFEST, [_manifest_bytes({**head, "files": files})])
            sync_folder(part)
            _put_in_place(part, place)
            sync_folder(self.folder)
        except OSError as error:
            self._failed, self._failed_saves = error, self._failed_saves + 1
            with contextlib.suppress(OSError):
                _remove(part)
            free = "?"
            with contextlib.suppress(OSError):
                free = f"{shutil.disk_usage(self.folder).free:,}"
            self.say(
                f"{place}: this checkpoint was not written: {error.strerror or error}; it needs {needed_bytes:,} "
                f"bytes, {free} are free; {self._last_good()}; failed {self._failed_saves} of {_TRIES} times in a row"
                + ("" if self._failed_saves >= _TRIES else ", tried again at the next save")
            )
        except BaseException as error:
            self._fatal = error
            with contextlib.suppress(OSError):
                _remove(part)
        else:
            self._failed, self._failed_saves = None, 0
            try:
                self._prune(step)
            except OSError as error:
                self.say(f"an old checkpoint of {self.folder} cannot be removed, tried again at the next save: {error}")

    def _prune(self, just_saved: int) -> None:
        steps = _steps(self.folder)
        keep = {just_saved, *steps[-self.keep_last :]}
        best = -1
        for step in steps:
            try:
                manifest = _manifest(self.folder / f"step-{step}")
            except (OSError, BadRun):  # damaged: goes with its age
                continue
            if manifest.get("milestone"):
                keep.add(step)
            if manifest.get("best"):
                best = step
        for step in steps:
            if step not in keep and step != best:
                gone = self.folder / f".step-{step}.gone"  # a kill in the middle leaves no step folder half removed
                _remove(gone)
                os.rename(self.folder / f"step-{step}", gone)
                _remove(gone)

    def _tidy(self) -> None:
        """What a killed save left: a finished checkpoint that was set aside is put back, the rest is removed."""
        for name in sorted(os.listdir(self.folder)):
            found = re.fullmatch(_LEFT_BY_A_KILL, name)
            if found is None:
                continue
            place = self.folder / f"step-{found[1]}"
            if found[2] == "old" and not present(place):
                os.rename(self.folder / name, place)
            else:
                _remove(self.folder / name)


def _put_in_place(part: Path, place: Path) -> None:
    """Rename, over a checkpoint of the same step if there is one: that is set aside first, and back if it fails."""
    old = place.with_name(f".{place.name}.old")
    if not present(place):
        os.rename(part, place)
        return
    _remove(old)
    os.rename(place, old)
    try:
        os.rename(part, place)
    except OSError:
        os.rename(old, place)
        raise
    sync_folder(place.parent)
    with contextlib.suppress(OSError):  # the new one is in place; the next start removes the old one
        _remove(old)


def _steps(folder: Path) -> list[int]:
    """The numbers N of the step-N below the folder, ascending."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return sorted(int(found[1]) for name in names if (found := re.fullmatch(_STEP, name)))


def _manifest_bytes(manifest: dict[str, Any]) -> bytes:
    """JSON whose last entry is the sha256 of the rest."""
    digest = hashlib.sha256(json.dumps(manifest, indent=1).encode()).hexdigest()
    return (json.dumps({**manifest, "sha256": digest}, indent=1) + "\n").encode()


def _manifest(path: Path) -> dict[str, Any]:
    """The manifest of a step folder. Raises BadRun where it is not, byte for byte, what a save writes."""
    try:
        content = read_file(path / MANIFEST)
        manifest = json_object(content)
        del manifest["sha256"]
        intact = _manifest_bytes(manifest) == content
    except FileNotFoundError:
        raise BadRun(f"it has no {MANIFEST}") from None
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise BadRun(f"{MANIFEST} cannot be read: {error!r}") from error
    if not intact:
        raise BadRun(f"{MANIFEST} is not as it was written: its sha256 differs")
    version = manifest.get("format")
    if isinstance(version, int) and version > _FORMAT:
        raise NotForThis(
            f"{path} was written by a newer lambdanets: its format is {version}, this one reads {_FORMAT}; "
            "pip install --upgrade lambdanets"
        )
    if version != _FORMAT:
        raise BadRun(f"{MANIFEST} has format {version}, this version reads {_FORMAT}")
    return manifest


def _verify(path: Path, step: int) -> Checkpoint:
    """Compare every file with the manifest. Raises BadRun with what differs, OSError where one cannot be read."""
    manifest = _manifest(path)
    try:
        if field(manifest, "step", int) != step:
            raise BadRun(f"{MANIFEST} is of step {manifest['step']}")
        files = field(manifest, "files", dict)
        wanted = {name: (field(of, "bytes", int), field(of, "sha256", str)) for name, of in files.items()}
    except BadRun:
        raise
    except ValueError as error:
        raise BadRun(f"{MANIFEST} is not what a save writes: {error}") from error
    for name, (size_bytes, sha256) in wanted.items():
        if os.path.basename(name) != name:
            raise BadRun(f"{MANIFEST} names the file {name!r}, outside the folder")
        try:
            with _opened(path / name) as file:
                found_bytes = os.fstat(file.fileno()).st_size
                if found_bytes != size_bytes:
                    raise BadRun(f"{name} has {found_bytes:,} bytes, its manifest says {size_bytes:,}")
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            raise BadRun(f"{name} is missing") from None
        if digest != sha256:
            raise BadRun(f"{name} is not as it was written: its sha256 differs")
    if missing := {TENSORS, STATE} - wanted.keys():
        raise BadRun(f"{MANIFEST} does not name {min(missing)}")
    return Checkpoint(step, path, manifest.get("run"))


def _opened(path: Path) -> io.BufferedReader:
    """A file to read; a pipe is not waited for."""
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise BadRun(f"{path.name} is no file")
    return file


def _remove(folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        if os.path.islink(folder):  # a stranger's: the link goes, what it leads to stays
            os.unlink(folder)
        else:
            shutil.rmtree(folder)
