"""Two ranks train under faults, and the result is compared with that of an undisturbed run: every bit must be equal.

    python -m benchmarks.soak --minutes 30

1. 4,000 small images are drawn, 0.05% of them broken, and a short run tells how long a step takes here.
2. An undisturbed run of as many epochs as fit the time.
3. The same run with faults, in turn: kill -9 of one rank; SIGTERM; a disk that takes no large file until two saves have
   failed; kill -9 of everything, and a flipped bit in the newest checkpoint; kill -9 of everything. That is one kill -9
   a minute, starts included. After each it is started again with --resume. A fault counts when the run's own output, or
   its end, shows that it struck.
4. The last line is a JSON object: the faults by kind, and whether weights and history are equal. Exit code 1 where they
   are not, or where a kind of fault never struck.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.op import machine

CLASSES = {"blue": (40, 60, 220), "green": (30, 200, 60), "red": (220, 50, 40)}
TRAIN_IMAGES, BAD_IMAGES, VAL_IMAGES = 4_000, 2, 60
BATCH_IMAGES, SAVE_STEPS = 64, 5
LARGE_FILE_BYTES = 100_000  # of the limit that stands for a full disk; a checkpoint is larger
KINDS = ("kill_one_rank", "sigterm", "full_disk", "flipped_bit", "kill_everything")
TIMES = ("train_s", "data_wait_s", "images_per_s")  # what may differ between equal runs
RESTART_S = 15  # first guess of what a restart costs, until it is measured


def draw(root: Path) -> None:
    """The images: coloured noise in three classes; the broken ones are cut short."""
    of = random.Random(0)
    for part, count in (("train", TRAIN_IMAGES), ("val", VAL_IMAGES)):
        for i in range(count):
            name = list(CLASSES)[i % len(CLASSES)]
            image = Image.frombytes("RGB", (4, 4), of.randbytes(48)).resize((16, 16))
            path = root / part / name / f"{i:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.blend(image, Image.new("RGB", (16, 16), CLASSES[name]), 0.3).save(path)
    for i in of.sample(range(TRAIN_IMAGES), BAD_IMAGES):
        (path,) = (root / "train").glob(f"*/{i:05d}.png")
        path.write_bytes(path.read_bytes()[:60])


class Job:
    """One start of the run under torchrun; `said` is what it has printed so far."""

    def __init__(self, data: Path, run: Path, epochs: int, log: Path, *, resume: bool) -> None:
        self.run, self.log = run, log
        self._sessions: set[int] = set()  # of the ranks: torchrun gives each its own, with its loader's processes
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lambdanets",
            "train", "--recipe", "folder", "--model", "lambda_resnet_tiny", "--image-px", "8", "--epochs", str(epochs),
            "--batch-images", str(BATCH_IMAGES), "--data", str(data), "--out", str(run), "--device", "cpu",
            "--workers", "1", "--save-steps", str(SAVE_STEPS), "--hang-timeout-s", "120",
        ]  # fmt: skip
        self.started = time.monotonic()
        with open(log, "wb") as output:
            self.process = subprocess.Popen(
                command + ["--resume"] * resume, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def running(self) -> bool:
        return self.process.poll() is None

    def ranks(self) -> list[int]:
        """The process of each rank, as far as they have started."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, ValueError, LookupError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == self.process.pid:
                    variables = dict(v.split("=", 1) for v in (entry / "environ").read_text().split("\0") if "=" in v)
                    found[int(variables["RANK"])] = int(entry.name)
        self._sessions |= set(found.values())
        return [found[rank] for rank in sorted(found)]

    def kill(self) -> None:
        """End all of it at once, as a power cut does, and wait until it is gone."""
        self.ranks()
        for session in (self.process.pid, *self._sessions):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(session, signal.SIGKILL)
        self.process.wait()

    def wait(self, limit_s: float) -> int:
        """The exit code; what outlives torchrun is killed. Raises TimeoutExpired."""
        self.ranks()
        try:
            return self.process.wait(limit_s)
        finally:
            self.kill()

    def wait_for(self, what: str, limit_s: float, since: int = 0) -> bool:
        """Until it has printed that, after the first `since` characters, or ended."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            if what in self.said[since:]:
                return True
            self.ranks()
            if not self.running():
                return what in self.said[since:]
            time.sleep(0.1)
        return False


def steps(run: Path) -> list[int]:
    """The checkpoints of a run, ascending."""
    return sorted(int(p.name[5:]) for p in run.glob("step-*") if p.name[5:].isdecimal())


def whole_run(data: Path, run: Path, epochs: int, log: Path) -> float:
    """Train without faults; gives the seconds that it took."""
    started = time.monotonic()
    job = Job(data, run, epochs, log, resume=False)
    if job.wait(24 * 3600) != 0:
        raise SystemExit(f"the undisturbed run failed:\n{job.said[-3000:]}")
    return time.monotonic() - started


def disturbed_run(
    data: Path, run: Path, epochs: int, logs: Path, every_s: float, limit_s: float, seed: int
) -> dict[str, Any]:
    """Train with a fault about every `every_s` seconds of training; gives what struck, and the restarts."""
    of, struck, starts = random.Random(seed), Counter[str](), 0
    planned = itertools.cycle([*KINDS[seed % len(KINDS) :], *KINDS[: seed % len(KINDS)]])
    deadline = time.monotonic() + limit_s
    flipped, kind = False, next(planned)
    while True:
        job = Job(data, run, epochs, logs / f"start-{starts}.log", resume=starts > 0)
        starts += 1
        try:
            if flipped:
                struck["flipped_bit"] += job.wait_for("is damaged", 120)
                flipped = False
            before = steps(run)
            while job.running():
                if time.monotonic() > deadline:
                    raise SystemExit(f"not done after {limit_s:.0f} s: {job.said[-3000:]}")
                time.sleep(0.1)
                job.ranks()
                if len(set(steps(run)) - set(before)) >= 2:  # it trains, and a flipped bit has one to fall back to
                    break
            quiet = time.monotonic() + of.uniform(0.5, 1.5) * every_s
            while job.running() and time.monotonic() < quiet:
                time.sleep(0.05)
            while job.running():
                mark = len(job.said)
                print(f"start {starts}, step {steps(run)[-1]}: {kind}", flush=True)
                if kind == "full_disk":
                    struck[kind] += full_disk(job, mark)
                    kind = next(planned)
                    quiet = time.monotonic() + of.uniform(0.5, 1.5) * every_s
                    while job.running() and time.monotonic() < quiet:
                        time.sleep(0.05)
                    continue
                if kind == "sigterm":
                    job.process.send_signal(signal.SIGTERM)
                    job.wait(60)
                    struck[kind] += "which is saved" in job.said[mark:]
                elif kind == "kill_one_rank":
                    if len(found := job.ranks()) == 2:
                        os.kill(of.choice(found), signal.SIGKILL)
                        struck[kind] += job.wait(60) != 0
                else:
                    job.kill()
                    struck["kill_everything"] += 1
                    if kind == "flipped_bit":
                        flip(run / f"step-{steps(run)[-1]}" / "tensors.safetensors", of)
                        flipped = True
                kind = next(planned)
            code = job.wait(60)
            if code == 0:
                break
        finally:
            job.kill()
    return {"starts": starts, "struck": {kind: struck[kind] for kind in KINDS}}


def full_disk(job: Job, mark: int) -> bool:
    """Let rank 0 write no large file until two saves have failed. Whether one did."""
    found = job.ranks()
    if len(found) != 2:
        return False
    with contextlib.suppress(ProcessLookupError):
        soft, hard = resource.prlimit(found[0], resource.RLIMIT_FSIZE)
        resource.prlimit(found[0], resource.RLIMIT_FSIZE, (LARGE_FILE_BYTES, hard))
        job.wait_for("failed 2 of 3 times", 60, mark)
        resource.prlimit(found[0], resource.RLIMIT_FSIZE, (soft, hard))
    return "was not written" in job.said[mark:]


def flip(path: Path, of: random.Random) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[of.randrange(len(content))] ^= 1 << of.randrange(8)
    path.write_bytes(content)


def outcome(run: Path) -> dict[str, Any]:
    """What must be equal: the weights, every epoch's numbers, the bad images that were met."""
    record = json.loads((run / "run.json").read_text())
    history = [{key: value for key, value in row.items() if key not in TIMES} for row in record["history"]]
    lines = (run / "bad_samples.jsonl").read_text().splitlines()
    digest = hashlib.sha256((run / "weights.safetensors").read_bytes()).hexdigest()
    return {"weights_sha256": digest, "history": history, "bad": sorted({json.loads(line)["name"] for line in lines})}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30, help="about how long all of it takes (default: 30)")
    parser.add_argument("--every-s", type=float, default=20, help="seconds of training between faults (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the faults' moments, and which kind is first")
    parser.add_argument("--out", type=Path, help="where to work, and leave the logs (default: a temporary folder)")
    given = parser.parse_args()
    root = given.out or Path(tempfile.mkdtemp(prefix="soak-"))
    root.mkdir(parents=True, exist_ok=True)
    draw(root / "data")
    batches = TRAIN_IMAGES // BATCH_IMAGES
    one_s = whole_run(root / "data", root / "one-epoch", 1, root / "one-epoch.log")
    row = json.loads((root / "one-epoch" / "run.json").read_text())["history"][0]
    restart_s = max(RESTART_S, one_s - row["train_s"])
    epochs = max(2, int(60 * given.minutes / (2 + restart_s / given.every_s) / row["train_s"]))
    print(f"{root}: {row['train_s'] / batches * 1e3:.0f} ms a step, {epochs} epochs of {batches} steps", flush=True)
    clean_s = whole_run(root / "data", root / "undisturbed", epochs, root / "undisturbed.log")
    started = time.monotonic()
    limit_s = 60 + 4 * 60 * given.minutes
    found = disturbed_run(root / "data", root / "disturbed", epochs, root, given.every_s, limit_s, given.seed)
    wanted, got = outcome(root / "undisturbed"), outcome(root / "disturbed")
    result = {
        "machine": machine("cpu"),
        "epochs": epochs,
        "steps": epochs * batches,
        "undisturbed_s": round(clean_s, 1),
        "disturbed_s": round(time.monotonic() - started, 1),
        "starts": found["starts"],
        "faults": {**found["struck"], "bad_images": len(got["bad"])},
        "weights_equal": wanted["weights_sha256"] == got["weights_sha256"],
        "history_equal": wanted["history"] == got["history"],
        "bad_images_equal": wanted["bad"] == got["bad"] and len(got["bad"]) == BAD_IMAGES,
    }
    equal = all(value for key, value in result.items() if key.endswith("_equal"))
    if equal and given.out is None:
        shutil.rmtree(root)
    print(json.dumps(result))
    return 0 if equal and all(found["struck"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
