"""A Ray cluster labels: the driver hands out numbers of shards, notices who died, and gives their shards to others.

A task is one shard and returns a summary; labels never travel. Each worker process keeps its teacher from task to task.
What is done is known from the files alone, so the driver may be killed as well: the same command goes on.
"""

from __future__ import annotations

import os
import platform
import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

import torch

from lambdanets.data.source import absolute
from lambdanets.errors import BadData, BadRecipe, BadRun, need
from lambdanets.files import to_stderr
from lambdanets.pseudo_labels.label_files import file_of, finished
from lambdanets.pseudo_labels.label_shards import (
    AGAIN,
    Done,
    Labelled,
    Labeller,
    Progress,
    ShardFailed,
    Wishes,
    check,
)
from lambdanets.pseudo_labels.teacher import TIMM
from lambdanets.training.preflight import choose_device
from lambdanets.training.watchdog import Watchdog

MAX_RETRIES = 5  # of a shard whose process is lost: the system's faults, not ours
SLOW = 5.0  # times the median: a shard that takes longer is given out a second time, when nothing else is left
_LEAST_SLOW_S = 1.0
_POLL_S = 0.5


def label_with_ray(
    wishes: Wishes, *, address: str | None = None, said: Callable[[str], object] = to_stderr
) -> Labelled:
    """`label_shards.label` on a Ray cluster: one task a shard, a process a GPU, or a CPU where there is none.

    address  of a running cluster; None: a cluster on this machine, for this call
    All machines see teacher, data and labels under the same names. Raises what `label` raises; BadRun where Ray is
    missing, or has no place for a task.
    """
    need("ray", "ray", "--engine ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    check(wishes, None)
    with ExitStack() as closing:
        watch = closing.enter_context(Watchdog(hang_timeout_s=wishes.hang_timeout_s, again=AGAIN))
        watch.beat()
        closing.callback(ray.shutdown)  # of the connection, and of a cluster that this call began; no other
        _connect(ray, address)
        watch.beat()
        on_gpus = _on_gpus(ray, wishes.device)
        wishes = _for_all_machines(wishes, on_gpus)
        with watch.working():
            labeller = Labeller(wishes, device=torch.device(wishes.device), cpu_threads=1)
            closing.callback(labeller.close)
            labeller.begin()
        cpus = (labeller.labels.plan["cpu_threads"] or 1) + wishes.workers
        _check_fits(ray, cpus, on_gpus, address)
        task = ray.remote(
            # Without it a process that used a GPU ends after one task, and the teacher is loaded for each shard.
            max_calls=0,
            max_retries=MAX_RETRIES,
            num_cpus=cpus,
            num_gpus=int(on_gpus),
        )(label_one)
        job = _Job(ray, lambda number: task.remote(asdict(wishes), labeller.labels.plan_sha256, number), labeller)
        return job.run(watch, lambda: _slots(ray, cpus, on_gpus), said)


def _connect(ray: Any, address: str | None) -> None:
    """Raises BadRun."""
    how: dict[str, Any] = {"address": address or "local", "logging_level": "ERROR", "log_to_driver": False}
    if address is None:
        how["include_dashboard"] = False
    ours = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        ray.init(**how)
    except Exception as error:  # a bare one, too, where a machine is so busy that Ray gives up waiting for itself
        where = "a cluster on this machine cannot be started" if address is None else f"no Ray cluster at {address}"
        raise BadRun(f"--engine ray: {where}: {str(error).splitlines()[0] if str(error) else repr(error)}") from error
    if threading.current_thread() is threading.main_thread():
        # Ray has put handlers of its own in their place, in Python and below it: one exits with 15, one aborts.
        for number, handler in ours.items():
            signal.signal(number, handler)


def _on_gpus(ray: Any, device: str) -> bool:
    if device not in ("auto", "cpu", "cuda"):
        raise BadRecipe(f"--device {device} with --engine ray: say cuda, and each process gets a GPU of its own")
    return device == "cuda" or (device == "auto" and ray.cluster_resources().get("GPU", 0) >= 1)


def _for_all_machines(wishes: Wishes, on_gpus: bool) -> Wishes:
    """Nothing that each machine would decide for itself: places, device, precision."""
    teacher = wishes.teacher if wishes.teacher.startswith(TIMM) else os.path.abspath(wishes.teacher)
    if teacher.startswith(TIMM):
        name, at, file = teacher.partition("@")
        teacher = f"{name}{at}{os.path.abspath(file) if file else ''}"
    classes = None if wishes.classes_file is None else os.path.abspath(wishes.classes_file)
    return replace(
        wishes, teacher=teacher, classes_file=classes, data=absolute(wishes.data), out=absolute(wishes.out),
        device="cuda" if on_gpus else "cpu",
    )  # fmt: skip


def _slots(ray: Any, cpus: int, on_gpus: bool) -> int:
    """How many tasks the cluster, as it is now, does at a time."""
    has = ray.cluster_resources()
    by_cpus = int(has.get("CPU", 0)) // cpus
    return min(by_cpus, int(has.get("GPU", 0))) if on_gpus else by_cpus


def _check_fits(ray: Any, cpus: int, on_gpus: bool, address: str | None) -> None:
    """Raises BadRun where a local cluster will never have room for one task; another one may still grow."""
    if address is None and _slots(ray, cpus, on_gpus) < 1:
        has = {name: int(ray.cluster_resources().get(name, 0)) for name in ("CPU", "GPU")}
        wanted = f"{cpus} CPUs{' and a GPU' if on_gpus else ''}"
        raise BadRun(
            f"a process that labels takes {wanted}, and Ray found {has['CPU']} and {has['GPU']} here: --workers"
        )


class _Job:
    """The driver's knowledge: which shards are handed out, done, failed once, failed twice."""

    def __init__(self, ray: Any, submit: Callable[[int], Any], labeller: Labeller) -> None:
        self._ray, self._submit = ray, submit
        self._shards, home = labeller.images.shards, labeller.labels.home
        there = finished(home)
        missing = [number for number, shard in enumerate(self._shards) if file_of(shard.name) not in there]
        self.found = Labelled(home, len(self._shards), len(self._shards) - len(missing))
        self._waiting, self._open = deque(missing), set(missing)
        self._running: dict[Any, int] = {}  # by age; of a shard there may be two
        self._since_s: dict[Any, float] = {}  # when it began, as far as one can tell
        self._took_s: list[float] = []
        self._failed_once: dict[int, str] = {}
        self._given_twice: set[int] = set()
        self._at_once = 1
        self._in_a_row = 0  # failures that are not one shard's, without a shard done between them

    def run(self, watch: Watchdog, slots: Callable[[], int], said: Callable[[str], object]) -> Labelled:
        progress = Progress(len(self._shards), self.found.before, said)
        while self._open:
            self._at_once = at_once = max(1, slots())
            # Twice as many, so that no process waits for the driver; not all, so that the driver holds kilobytes.
            while self._waiting and len(self._running) < 2 * at_once:
                self._hand_out(self._waiting.popleft())
            now_s = time.monotonic()
            for ref in list(self._running)[:at_once]:
                self._since_s.setdefault(ref, now_s)
            if not self._waiting:
                self._hand_out_slow_ones_again(now_s)
            ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=_POLL_S)
            if watch.signal is not None:
                raise watch.stopped(f"interrupted: {AGAIN}")
            for ref in ready:
                watch.beat()
                self._ended(ref, progress)
        return self.found

    def _hand_out(self, number: int) -> None:
        self._running[self._submit(number)] = number

    def _hand_out_slow_ones_again(self, now_s: float) -> None:
        """The first of two files wins, and the second is equal."""
        if not self._took_s:
            return
        most_s = max(_LEAST_SLOW_S, SLOW * statistics.median(self._took_s))
        for ref, number in list(self._running.items()):
            slow = now_s - self._since_s.get(ref, now_s) > most_s
            if slow and number in self._open and number not in self._given_twice:
                self._given_twice.add(number)
                self._hand_out(number)

    def _ended(self, ref: Any, progress: Progress) -> None:
        number = self._running.pop(ref)
        self._since_s.pop(ref, None)
        try:
            told: dict[str, Any] = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            told = {"why": f"its process was lost {MAX_RETRIES + 1} times: {str(error).splitlines()[0]}"}
        if number not in self._open:  # done by another one meanwhile
            return
        self._in_a_row = self._in_a_row + 1 if told.get("general") else 0
        if self._in_a_row > max(2, self._at_once):  # one broken machine stops nobody; a full disk stops all
            raise BadData(told["why"])
        if "why" not in told:
            self._open.discard(number)
            self._took_s.append(told["took_s"])
            self.found.did[self._shards[number].name] = told["samples"], told["bad"]
            self.found.processes[told["process"]] = told["loads"]
            progress.one_more(told["samples"])
        elif number in self._running.values():
            pass  # the other one of two may still succeed
        elif number not in self._failed_once:
            self._failed_once[number] = told["why"]
            self._waiting.append(number)  # once more, at the end
        else:
            self._open.discard(number)
            self.found.failed[self._shards[number].name] = told["why"]


# ---- in a worker process

_labellers: dict[str, Labeller] = {}  # by plan, one at a time
_loads = 0


def label_one(wishes: dict[str, Any], plan_sha256: str, number: int) -> dict[str, Any]:
    """A task: labels one shard. Gives {samples, bad, took_s, process, loads}, or {why} it stays undone, with "general"
    where it is not the shard's fault. Errors of ours travel as words: Ray retries lost processes alone."""
    began_s = time.monotonic()
    try:
        asked = Wishes(**{**wishes, "allow_sources": tuple(wishes["allow_sources"])})
        with Watchdog(
            hang_timeout_s=asked.hang_timeout_s, again="Ray gives its shard to another", signals=False
        ) as watch:
            with watch.working():
                labeller = _labeller(asked, plan_sha256)
            found = next(labeller.shards(iter([number]), watch))
    except Exception as error:
        for labeller in _labellers.values():
            labeller.close()
        _labellers.clear()  # its readers may be gone, or in the middle of something
        return {"why": f"{platform.node()}: {str(error) or repr(error)}", "general": True}
    if isinstance(found, ShardFailed):
        return {"why": found.why}
    assert isinstance(found, Done)
    took_s = time.monotonic() - began_s
    process = f"{platform.node()}/{os.getpid()}"
    return {"samples": found.samples, "bad": found.bad, "took_s": took_s, "process": process, "loads": _loads}


def _labeller(wishes: Wishes, plan_sha256: str) -> Labeller:
    global _loads
    if plan_sha256 not in _labellers:
        for other in _labellers.values():
            other.close()
        _labellers.clear()
        _loads += 1
        device = choose_device(wishes.device)
        # A worker of Ray has threads that hold locks, and a fork would inherit those.
        found = Labeller(wishes, device=device, start_method="spawn", cpu_threads=1)
        found.begin()
        if found.labels.plan_sha256 != plan_sha256:
            raise BadData(f"{platform.node()} has another teacher or other data than the machine that hands out shards")
        _labellers[plan_sha256] = found
    return _labellers[plan_sha256]
