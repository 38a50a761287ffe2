"""Labels made by a Ray cluster: the same bytes, whoever is killed, and a teacher loaded once a process.

Tests that start Ray carry its marker, and its driver runs in a process of its own; the others check the driver's
decisions, with a clock and a cluster that are made up.
"""

import contextlib
import io
import json
import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import until
from labelling import contents, manifest, picture, wishes, write_shards, write_teacher
from PIL import Image

from lambdanets.data.transforms import View
from lambdanets.errors import BadData, BadRun, Terminated
from lambdanets.pseudo_labels import engines
from lambdanets.pseudo_labels.label_shards import label
from lambdanets.pseudo_labels.verify import verify

ROOT = Path(__file__).parents[2]
SHARDS = 24


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """One that takes a while, so that there is somebody to kill in the middle of something."""
    view = View(96, 3, (0.5, 0.5, 0.5), (0.3, 0.3, 0.3))
    pictures = [Image.open(io.BytesIO(picture(i))) for i in range(6)]
    return write_teacher(tmp_path_factory.mktemp("teacher") / "run", view=view, pictures=pictures)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """240 pictures in 24 shards."""
    return write_shards(tmp_path_factory.mktemp("data"), 240, SHARDS)


@pytest.fixture(scope="module")
def made(teacher, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("labels") / "labels"
    label(wishes(teacher, data, out))
    return out


# ---- Ray itself


class Rays:
    """Programs that start Ray, and all processes that carry their mark."""

    def __init__(self, children):
        self._children, self._mark = children, f"LAMBDANETS_TEST={secrets.token_hex(8)}"

    def start(self, *words):
        name, value = self._mark.split("=")
        path = f"{ROOT}{os.pathsep}{ROOT / 'tests/pseudo_labels'}"
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", name: value}
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return self._children.program([sys.executable, *words], cwd=ROOT, env=environment, **how)

    def label(self, teacher, data, out, *more):
        words = [
            "label",
            str(teacher),
            "--data",
            str(data),
            "--out",
            str(out),
            "--batch-images",
            "4",
            "--device",
            "cpu",
        ]
        return self.start("-m", "lambdanets", *words, "--engine", "ray", *more)

    def processes(self, called=""):
        """Ours that live, those alone whose command line begins so."""
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                told = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if self._mark.encode() in (place / "environ").read_bytes() and told.startswith(called) and told:
                    found.append(int(place.name))
        return found


@pytest.fixture
def rays(children):
    rays = Rays(children)
    yield rays
    for pid in rays.processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.ray
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_cluster_gives_the_same_bytes_and_loads_the_teacher_once_a_process(
    workers, made, data, teacher, tmp_path, rays
):
    asked = f"wishes({str(teacher)!r}, {str(data)!r}, {str(tmp_path / 'out')!r}, workers={workers})"
    done = rays.start(
        "-c",
        "import json; from labelling import wishes; from lambdanets.pseudo_labels.engines import label_with_ray\n"
        f"found = label_with_ray({asked})\n"
        "print(found); print(json.dumps([found.processes, len(found.did), found.failed]))",
    )
    said, _ = done.communicate(timeout=800)
    assert done.returncode == 0, said
    processes, did, failed = json.loads(said.splitlines()[-1])
    assert (did, failed) == (SHARDS, {})
    assert 1 <= len(processes) <= os.cpu_count()
    assert set(processes.values()) == {1}  # 24 tasks, and each process loaded its teacher once
    assert f"{SHARDS} of {SHARDS} shards are labelled, {SHARDS} of them now by {len(processes)} processes" in said
    assert contents(tmp_path / "out") == contents(made)
    until(lambda: not rays.processes(), timeout_s=300)  # nothing stays


@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_a_killed_worker_and_a_killed_driver_change_no_byte(made, data, teacher, tmp_path, rays):
    out = tmp_path / "out"
    driver = rays.label(teacher, data, out)
    until(lambda: len(contents(out)) >= 2 or driver.poll() is not None, timeout_s=600)
    assert driver.poll() is None, driver.communicate()[0]
    until(lambda: rays.processes("ray::label_one"), timeout_s=300)
    os.kill(rays.processes("ray::label_one")[0], signal.SIGKILL)
    seen = len(contents(out))
    until(lambda: len(contents(out)) >= seen + 3 or driver.poll() is not None, timeout_s=600)
    assert driver.poll() is None, driver.communicate()[0]  # it lost a worker and goes on
    os.kill(driver.pid, signal.SIGKILL)
    until(lambda: not rays.processes(), timeout_s=300)  # a local cluster ends with its driver
    before = {name: (out / name).stat().st_ino for name in contents(out)}
    assert len(before) < SHARDS
    again = rays.label(teacher, data, out)
    said, _ = again.communicate(timeout=800)
    assert again.returncode == 0, said
    assert f"{SHARDS} of {SHARDS} shards are labelled, {SHARDS - len(before)} of them now" in said
    assert before.items() <= {name: (out / name).stat().st_ino for name in contents(out)}.items()
    assert contents(out) == contents(made)
    assert verify(out).pictures == 240


@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_sigterm_ends_the_driver_with_143_and_the_same_command_without_ray_goes_on(made, data, teacher, tmp_path, rays):
    out = tmp_path / "out"
    driver = rays.label(teacher, data, out)
    until(lambda: len(contents(out)) >= 2 or driver.poll() is not None, timeout_s=600)
    driver.send_signal(signal.SIGTERM)
    said, _ = driver.communicate(timeout=400)
    assert driver.returncode == 143, said
    assert "the same command goes on, finished shards are kept" in said
    label(wishes(teacher, data, out))
    assert contents(out) == contents(made)


@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_two_nodes_of_which_one_is_lost_give_the_same_bytes(made, data, teacher, tmp_path, rays):
    out = tmp_path / "out"
    done = rays.start(
        "-c",
        f"""
import json, pathlib, threading, time
from ray.cluster_utils import Cluster
from labelling import wishes
from lambdanets.pseudo_labels.engines import label_with_ray

cluster = Cluster(initialize_head=True, head_node_args={{"num_cpus": 1, "include_dashboard": False}})
second = cluster.add_node(num_cpus=1)
out = pathlib.Path({str(out)!r})

def lose_it():
    while len(list(out.glob("*.parquet"))) < 8:
        time.sleep(0.02)
    cluster.remove_node(second, allow_graceful=False)

thread = threading.Thread(target=lose_it)
thread.start()
found = label_with_ray(wishes({str(teacher)!r}, {str(data)!r}, str(out)), address=cluster.address)
thread.join()
print(json.dumps([found.processes, len(found.did), found.failed]))
cluster.shutdown()
""",
    )
    said, _ = done.communicate(timeout=800)
    assert done.returncode == 0, said
    processes, did, failed = json.loads(said.splitlines()[-1])
    assert (did, failed) == (SHARDS, {})
    assert len(processes) >= 2
    assert set(processes.values()) == {1}
    assert contents(out) == contents(made)


@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_a_shard_that_was_changed_fails_alone_and_the_command_says_so(data, teacher, tmp_path, rays):
    import shutil

    place = shutil.copytree(data, tmp_path / "data")
    name = manifest(data)[5]["name"]
    (place / name).write_bytes((place / name).read_bytes()[:-1500])
    driver = rays.label(teacher, place, tmp_path / "out")
    said, _ = driver.communicate(timeout=800)
    assert driver.returncode == 2, said
    assert name in said
    assert f"{SHARDS - 1} of {SHARDS} shards are labelled" in said
    assert "1 shards of" in said
    assert len(contents(tmp_path / "out")) == SHARDS - 1


# ---- what the driver decides


class LostWorker(Exception):
    pass


class MadeUpRay:
    """A cluster in which task k of a shard takes `takes(number, k)` seconds and gives `gives(number, k)`."""

    exceptions = SimpleNamespace(RayError=LostWorker)

    def __init__(self, slots, takes, gives):
        self.now_s, self._slots, self._takes, self._gives = 0.0, slots, takes, gives
        self.handed_out, self.most = [], 0
        self._queue, self._ends = [], {}

    def submit(self, number):
        ref = (number, self.handed_out.count(number))
        self.handed_out.append(number)
        self._queue.append(ref)
        self._begin()
        return ref

    def _begin(self):
        while self._queue and len(self._ends) < self._slots:
            ref = self._queue.pop(0)
            self._ends[ref] = self.now_s + self._takes(*ref)

    def wait(self, refs, num_returns, timeout):
        self.most = max(self.most, len(refs))
        assert len(refs) == len(set(refs)) > 0
        first = min(self._ends, key=self._ends.get)
        if self._ends[first] > self.now_s + timeout:
            self.now_s += timeout
            return [], refs
        self.now_s = max(self.now_s, self._ends.pop(first))
        self._begin()
        return [first], [ref for ref in refs if ref != first]

    def get(self, ref):
        found = self._gives(*ref)
        if isinstance(found, Exception):
            raise found
        return {"samples": 10, "bad": 1, "took_s": self._takes(*ref), "process": "a/1", "loads": 1} | (found or {})


def ran(
    monkeypatch, tmp_path, n, slots=2, takes=lambda number, k: 1.0, gives=lambda number, k: None, done=(), signal=None
):
    ray = MadeUpRay(slots, takes, gives)
    shards = [SimpleNamespace(name=f"{number:03d}.tar") for number in range(n)]
    for number in done:
        (tmp_path / f"{number:03d}.parquet").write_bytes(bytes(20))
    labeller = SimpleNamespace(images=SimpleNamespace(shards=shards), labels=SimpleNamespace(home=str(tmp_path)))
    monkeypatch.setattr(engines.time, "monotonic", lambda: ray.now_s)
    watch = SimpleNamespace(signal=signal, beat=lambda: None, stopped=lambda text: Terminated(text))
    found = engines._Job(ray, ray.submit, labeller).run(watch, lambda: slots, lambda line: None)
    return ray, found


def test_every_missing_shard_is_handed_out_once_and_few_at_a_time(monkeypatch, tmp_path):
    ray, found = ran(monkeypatch, tmp_path, 50, slots=3, done=range(10))
    assert sorted(ray.handed_out) == list(range(10, 50))
    assert ray.most == 6  # twice the slots
    assert (found.before, len(found.did), found.failed) == (10, 40, {})
    assert str(found).endswith("50 of 50 shards are labelled, 40 of them now by 1 processes: 400 images; "
                               "40 of these cannot be read, their rows say why")  # fmt: skip


def test_a_shard_that_fails_is_tried_once_more_at_the_end_and_then_told(monkeypatch, tmp_path):
    def gives(number, k):
        return {"why": f"broken {k}"} if number == 3 or (number == 5 and k == 0) else None

    ray, found = ran(monkeypatch, tmp_path, 20, gives=gives)
    assert ray.handed_out == [*range(20), 3, 5]
    assert found.failed == {"003.tar": "broken 1"}
    assert len(found.did) == 19


def test_a_shard_whose_processes_die_does_not_stop_the_others(monkeypatch, tmp_path):
    def gives(number, k):
        return LostWorker("the worker died\nmore") if number == 2 else None

    _ray, found = ran(monkeypatch, tmp_path, 12, gives=gives)
    assert len(found.did) == 11
    assert found.failed == {"002.tar": "its process was lost 6 times: the worker died"}


def test_a_slow_shard_is_given_out_a_second_time_and_the_first_file_wins(monkeypatch, tmp_path):
    ray, found = ran(monkeypatch, tmp_path, 12, takes=lambda number, k: 1000.0 if (number, k) == (4, 0) else 1.0)
    assert ray.handed_out.count(4) == 2
    assert len(ray.handed_out) == 13
    assert len(found.did) == 12
    assert ray.now_s < 30  # the slow one is not waited for
    ray, found = ran(monkeypatch, tmp_path, 12, takes=lambda number, k: 4.0 if number == 4 else 1.0)
    assert len(ray.handed_out) == 12  # four times the median is not yet slow


def test_what_is_every_shards_fault_ends_the_job_and_one_broken_machine_does_not(monkeypatch, tmp_path):
    full = {"why": "node1: /labels/000.parquet, 600 bytes, cannot be written: No space left", "general": True}
    with pytest.raises(BadData, match="No space left"):
        ran(monkeypatch, tmp_path, 20, gives=lambda number, k: full)
    _, found = ran(monkeypatch, tmp_path, 20, gives=lambda number, k: full if k == 0 and number % 2 else None)
    assert (len(found.did), found.failed) == (20, {})


def test_a_signal_ends_the_driver(monkeypatch, tmp_path):
    with pytest.raises(Terminated, match="the same command goes on"):
        ran(monkeypatch, tmp_path, 20, signal=15)


def test_all_machines_are_told_absolute_places_and_one_device(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    told = engines._for_all_machines(wishes("run", "data", "out", classes_file="names.txt"), on_gpus=True)
    assert (told.teacher, told.data, told.out) == tuple(str(tmp_path / name) for name in ("run", "data", "out"))
    assert (told.classes_file, told.device) == (str(tmp_path / "names.txt"), "cuda")
    told = engines._for_all_machines(wishes("timm:a@w.safetensors", "s3://x/data", "s3://x/out"), on_gpus=False)
    assert (told.teacher, told.data, told.device) == (f"timm:a@{tmp_path / 'w.safetensors'}", "s3://x/data", "cpu")


def test_a_task_that_no_machine_has_room_for_is_refused(monkeypatch):
    ray = SimpleNamespace(cluster_resources=lambda: {"CPU": 2.0})
    engines._check_fits(ray, 2, False, None)
    with pytest.raises(BadRun, match="takes 3 CPUs, and Ray found 2 and 0 here"):
        engines._check_fits(ray, 3, False, None)
    with pytest.raises(BadRun, match="takes 1 CPUs and a GPU"):
        engines._check_fits(ray, 1, True, None)
    engines._check_fits(ray, 3, True, "auto")  # another cluster may grow


def test_a_cluster_that_does_not_start_is_one_sentence():
    def init(**how):
        raise Exception("The current node timed out during startup.\nThis could happen because")

    with pytest.raises(
        BadRun, match="a cluster on this machine cannot be started: The current node timed out"
    ) as error:
        engines._connect(SimpleNamespace(init=init), None)
    assert "This could" not in str(error.value)
    with pytest.raises(BadRun, match=r"no Ray cluster at 10\.0\.0\.1:6379"):
        engines._connect(SimpleNamespace(init=init), "10.0.0.1:6379")


def test_a_task_gives_its_errors_as_words(teacher, data, tmp_path):
    asked = {**vars(wishes(teacher, data, tmp_path / "out")), "hang_timeout_s": 0.0}
    told = engines.label_one({**asked, "teacher": str(tmp_path / "none")}, "0" * 64, 0)
    assert told["general"]
    assert "none" in told["why"]
    told = engines.label_one(asked, "0" * 64, 0)
    assert "has another teacher or other data" in told["why"]
