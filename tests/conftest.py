"""Every test is seeded, runs on one thread, finds NaN where memory was never written; processes to kill are cheap."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to be deterministic, before it starts
torch.backends.cudnn.allow_tf32 = False  # a GPU's convolutions are compared in float32


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # also fills uninitialised memory with NaN
    yield
    torch.use_deterministic_algorithms(False)


class Child:
    """One process: `wait()` gives its exit code, `said()` what it printed, `gave()` what its function returned."""

    def __init__(self, process, place):
        self.process, self.place = process, place

    @property
    def pid(self):
        return self.process.pid

    def wait(self, timeout_s=60):
        self.process.join(timeout_s)
        if self.process.exitcode is None:
            self.process.kill()
            pytest.fail(f"process {self.pid} still ran after {timeout_s} s; it said:\n{self.said()}")
        return self.process.exitcode

    def said(self):
        return self.place.with_suffix(".out").read_text()

    def gave(self):
        assert self.wait() == 0, self.said()
        return json.loads(self.place.with_suffix(".json").read_text())


class Children:
    """Starts functions of a test file in processes, forked from a server that has imported lambdanets already."""

    def __init__(self, folder):
        self.folder = folder
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(
            [
                "lambdanets.classification.train",
                "torch.distributed",
                "matplotlib.figure",
                "matplotlib.backends.backend_agg",
            ]
        )
        self.started = []
        self.programs = []

    def start(self, function, *args, **environment):
        place = self.folder / f"child{len(self.started)}"
        process = self.context.Process(target=_child, args=(function, args, environment, str(place)))
        process.start()
        self.started.append(process)
        return Child(process, place)

    def program(self, command, **how):
        """A command, as subprocess.Popen starts it; with all that it started it is gone when the test is over."""
        self.programs.append(subprocess.Popen(command, start_new_session=True, **how))
        return self.programs[-1]

    def ranks(self, ranks, function, *args):
        """One process a rank, with the variables that torchrun sets."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return [self.start(function, *args, RANK=str(r), LOCAL_RANK=str(r), **shared) for r in range(ranks)]


def _child(function, args, environment, place):
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # of loader processes, as in any other program
    out = open(f"{place}.out", "w", buffering=1)  # noqa: SIM115
    for stream in (1, 2):
        os.dup2(out.fileno(), stream)
    sys.stdout = sys.stderr = out
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        given = function(*args)
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    with open(f"{place}.json", "w") as file:
        json.dump(given, file)


@pytest.fixture
def largest_file():
    """`with largest_file(so_many_bytes)`: the system fails the write that crosses it, as on a full disk."""

    @contextmanager
    def limited(most):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


@pytest.fixture
def children(tmp_path):
    folder = tmp_path / "children"
    folder.mkdir()
    children = Children(folder)
    yield children
    for process in children.started:
        process.kill()
        process.join()
    for program in children.programs:
        with suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)
        program.communicate()


def until(condition, timeout_s=30):
    """Wait until `condition()`, looking often."""
    ends = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < ends, f"not within {timeout_s} s"
        time.sleep(0.01)


def runs(pid):
    """Whether there is such a process, and not only its exit code, which nobody has asked for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


COLOURS = {"blue": (40, 60, 220), "green": (30, 200, 60), "red": (220, 50, 40)}


def write_images(root, count, seed):
    """`count` noisy 32 px JPEGs of each colour."""
    import random

    from PIL import Image

    draw = random.Random(seed)
    for name, colour in COLOURS.items():
        folder = root / name
        folder.mkdir(parents=True)
        for i in range(count):
            image = Image.new("RGB", (32, 32), tuple(min(255, max(0, c + draw.randint(-40, 40))) for c in colour))
            image.paste((draw.randint(0, 255),) * 3, (8, 8, 16, 16))
            image.save(folder / f"{i}.jpg")


@pytest.fixture(scope="session")
def shared_colours(tmp_path_factory):
    root = tmp_path_factory.mktemp("colours")
    write_images(root / "train", 8, seed=0)
    write_images(root / "val", 3, seed=1)
    return root


@pytest.fixture(scope="session")
def unlabelled_shards(tmp_path_factory):
    """24 such pictures in shards, without their labels."""
    from lambdanets.data.pack import pack

    root = tmp_path_factory.mktemp("unlabelled")
    write_images(root / "pictures", 8, seed=7)
    pack(root / "pictures", root / "shards", unlabelled=True)
    return root / "shards"


@pytest.fixture
def colours(shared_colours, tmp_path):
    """A fresh folder of 24 training and 9 held-out images in 3 classes; a test may break it."""
    return shutil.copytree(shared_colours, tmp_path / "colours")


def labelled(recipe, classes, seed=0):
    """The task of learning that many classes, without images: for a learner that is handed batches."""
    from lambdanets.classification.task import Classification

    task = Classification(recipe, None, workers=0, seed=seed)
    task._train_images = SimpleNamespace(classes=tuple(map(str, range(classes))))
    return task


def batch(images, labels):
    from lambdanets.data.batches import Batch

    return Batch(images, labels, list(range(len(labels))))
