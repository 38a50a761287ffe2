"""The loop knows no label and no picture: a line is learnt by it, killed and resumed, on one rank and on two."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from torch import nn

from lambdanets.data.order import Order
from lambdanets.errors import BadRun
from lambdanets.recipes.recipe import Options, TrainingRecipe
from lambdanets.runs import record
from lambdanets.runs.weights import load_weights
from lambdanets.training import loop
from lambdanets.training.task import Found


class Numbers:
    """y = 3 x - 1 for x = 0, 1/32, ...: this rank's part of each batch."""

    def __init__(self, n, size, ranks, training):
        self.names, self.bad = [f"number {i}" for i in range(n)], {}
        self.size, self.batch_images, self.ranks, self.training = size, size, ranks, training

    def __len__(self):
        return len(self.names) // self.size

    def epoch(self, epoch, *, first_batch=0):
        order = Order(len(self.names), seed=7, epoch=epoch)
        for batch in range(first_batch, len(self)):
            every = slice(batch * self.size, (batch + 1) * self.size)
            ids = order[every].tolist() if self.training else list(range(every.start, every.stop))
            ids = ids[self.ranks.rank :: self.ranks.ranks]
            yield SimpleNamespace(ids=ids, x=torch.tensor(ids)[:, None] / 32)


@dataclass
class Fit:
    loss: float

    def row(self):
        return {"val_loss": self.loss, "val_r2": 1 - self.loss}

    def json(self):
        return asdict(self)


class Line:
    """The smallest task: what `training.task.Task` asks for, and nothing else."""

    name, title, best, remedy, shown = "line", "a line", "val_r2", "give another line", "numbers"

    def __init__(self, recipe):
        self.recipe = recipe

    def asked(self):
        return {}

    def need(self):
        pass

    def open(self):
        return self.recipe.batch_images

    def fingerprint(self):
        return {"train": "32 numbers"}

    def stamp(self):
        return {}

    def make_batches(self, folder, ranks):
        self.train = Numbers(32, self.recipe.batch_images, ranks, training=True)
        self.held_out = Numbers(8, 8, ranks, training=False)

    def record(self):
        return {"data": {"source": "numbers", "how": "32 numbers"}}

    def read_record(self, folder):
        nothing = lambda *held: None  # noqa: E731
        return record.read_record(
            folder, task="line", recipe=TrainingRecipe, row=("val_r2",), check=nothing, check_result=nothing
        )

    def create_model(self):
        return nn.Linear(1, 1)

    def load_weights(self, model, source):
        return load_weights(model, source)

    def example(self, samples, place):
        return (torch.zeros(samples, 1, dtype=place.dtype, device=place.device),)

    def parts(self, batch, place, *, step):
        return batch.x.to(place.device, place.dtype).tensor_split(self.recipe.accumulation)

    def loss(self, forward, part):
        off = forward(part) - (3 * part - 1)
        return Found(off.square().sum(), {"near": (off.abs() < 0.1).sum()})

    def train_row(self, counts, samples):
        return {"train_near_frac": counts["near"] / samples}

    def log_row(self, counts):
        return {"near": counts["near"]}

    def warning(self, history):
        return None

    def said(self, row):
        return f"near {row['train_near_frac']:.0%}"

    def held_out_said(self, value):
        return f"of held-out numbers {value:.2f} is explained"

    def scores(self, model, device, ranks, go_on):
        (batch,) = self.held_out.epoch(0)
        off = model(batch.x.to(next(model.parameters()))) - (3 * batch.x - 1)
        loss, n = ranks.sum(off.square().sum().item(), len(batch.ids))
        return Fit(loss / n)

    def report(self, folder, record, scores):
        (folder / "line.txt").write_text(f"off by {scores.loss}\n")


def recipe(**changes):
    return TrainingRecipe(
        **{
            "name": "line", "model": "linear", "epochs": 5, "batch_images": 8, "lr_per_256": 8.0, "warmup_epochs": 0.5,
            "precision": "float64", "accumulation": 2, **changes,
        }
    )  # fmt: skip


def learn(out, kill_at=None, resume=False, **changes):
    """Train in this process; killed before that step where it is asked for. Gives the weights and the history."""
    if kill_at is not None:
        step = loop._Run._step

        def killing(run, *rest):
            if run.at.step == kill_at and run.ranks.rank == run.ranks.ranks - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(run, *rest)

        loop._Run._step = killing
    asked = recipe(**changes)
    options = Options(save_steps=3, keep_best=True)
    found = loop.train(asked, Line(asked), out=out, seed=5, device="cpu", resume=resume, options=options)
    weights = safetensors.torch.load_file(found.folder / "weights.safetensors")
    shown = ("train_loss", "train_near_frac", "val_loss", "val_r2")
    rows = [{name: row[name] for name in shown} for row in found.record["history"]]
    return {name: value.tolist() for name, value in weights.items()}, rows, found.scores.loss


def test_a_task_without_labels_is_learnt_by_the_loop(tmp_path, capsys):
    _, rows, loss = learn(tmp_path / "run", epochs=20)
    assert loss < 1e-3
    assert rows[0]["val_r2"] < rows[-1]["val_r2"]
    assert "epoch 20/20: loss" in (said := capsys.readouterr().out)
    assert re.search(r"near 100%, of held-out numbers (0\.9\d|1\.00) is explained, \d+ images/s", said)
    held = json.loads((tmp_path / "run/run.json").read_text())
    assert (held["task"], held["status"]) == ("line", "finished")
    assert held["result"]["loss"] == loss
    assert (tmp_path / "run/line.txt").read_text() == f"off by {loss}\n"


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kill_at", [5, 13])
def test_a_killed_run_of_any_task_ends_as_the_undisturbed_one(ranks, kill_at, tmp_path, children):
    def run(out, *how):
        return children.ranks(ranks, learn, out, *how) if ranks > 1 else [children.start(learn, out, *how)]

    whole = run(tmp_path / "whole")[0].gave()
    for child in run(tmp_path / "killed", kill_at):
        assert child.wait() != 0
    assert run(tmp_path / "killed", None, True)[0].gave() == whole


def test_ranks_learn_what_one_process_does(tmp_path, children):
    one, two = learn(tmp_path / "one"), children.ranks(2, learn, tmp_path / "two")[0].gave()
    for name, value in one[0].items():
        torch.testing.assert_close(torch.tensor(two[0][name]), torch.tensor(value))


def test_a_run_of_one_task_is_none_of_another(tmp_path):
    from lambdanets.classification.run import open_run

    learn(tmp_path / "run")
    with pytest.raises(BadRun, match="it is one of the task 'line', and one of 'classification' is needed"):
        open_run(tmp_path / "run")


def test_the_loop_and_all_that_it_imports_know_no_picture_and_no_label():
    code = "import sys, lambdanets.training.loop; print(*[m for m in sys.modules if m.startswith('lambdanets.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    rooms = {name.removeprefix("lambdanets.") for name in done.stdout.split()}
    assert not {m for m in rooms if m.startswith(("classification", "commands"))}
    assert {m for m in rooms if m.startswith("data.")} == {"data.order"}
