"""What a run survives: kills, signals, hangs, lost readers, steps that are not finite. Every fault is a real one."""

import ctypes
import dataclasses
import errno
import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import until

import lambdanets.classification.task
import lambdanets.classification.train
import lambdanets.data
import lambdanets.data.batches
import lambdanets.data.folders
import lambdanets.files
import lambdanets.runs.checkpoints
import lambdanets.training.learner
import lambdanets.training.loop
import lambdanets.training.preflight
from lambdanets.classification.run import open_run
from lambdanets.classification.task import Classification
from lambdanets.classification.train import train
from lambdanets.cli import main
from lambdanets.data.transforms import View
from lambdanets.errors import BadData, BadRecipe, BadRun, DiskFault, LostProcess, NonFiniteLoss, Terminated
from lambdanets.recipes import choose
from lambdanets.recipes.recipe import Options
from lambdanets.runs.checkpoints import Checkpoints, newest_checkpoint
from lambdanets.runs.nested_state import flatten
from lambdanets.training.loop import _Run
from lambdanets.training.preflight import Start
from lambdanets.training.watchdog import HANG, LOST


def tiny(**changes):
    """4 epochs of 3 steps on `colours`, with everything that draws: augmentation, dropout, stochastic depth."""
    recipe = choose("folder", model="lambda_resnet_tiny", image_px=8, epochs=4, batch_images=8)
    changes = {"eval_batch_images": 4, "drop_path_rate": 0.2, "erase_frac": 0.3, "lr_per_256": 1.0, **changes}
    return dataclasses.replace(recipe, **changes)


ADAMW = {"optimizer": "adamw", "lr_per_256": 0.1, "accumulation": 3, "clip_norm": 1.0, "mixup_alpha": 0.2}
STEPS = 12


def at_step(wanted, do):
    """Do something at the beginning of a step, before its gradients."""
    step = _Run._step

    def spy(self, batch, wait_s):
        if self.at.step == wanted:
            do(self)
        step(self, batch, wait_s)

    _Run._step = spy


def note_ids(place):
    step = _Run._step

    def spy(self, batch, wait_s):
        with open(place, "a") as file:
            file.write(json.dumps([self.at.step, batch.ids]) + "\n")
        step(self, batch, wait_s)

    _Run._step = spy


@pytest.fixture(autouse=True)
def _whole(monkeypatch):
    """What a test replaces in this process is put back."""
    for name in ("_step", "_finish", "_evaluate", "_save"):
        monkeypatch.setattr(_Run, name, getattr(_Run, name))


def run_to(recipe, data, out, **how):
    """Train to the end; gives everything that is left, as named tensors, and the ids of each step."""
    ends = {}
    finish = _Run._finish
    seen = out.parent / f"{out.name}.ids"

    def spy(self, scores):
        ends["state"], ends["history"] = self.learner.state(), self.at.history
        return finish(self, scores)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Run, "_finish", spy)
        patch.setattr(_Run, "_step", _Run._step)
        note_ids(seen)
        result = train(recipe, data, out=out, seed=3, **how)
    tensors, tree = flatten(ends["state"])
    ids = {}
    for line in seen.read_text().splitlines():
        step, these = json.loads(line)
        assert ids.setdefault(step, these) == these  # a step that was done again had the same images
    timed = {"train_s", "images_per_s", "data_wait_s"}
    history = [{k: v for k, v in row.items() if k not in timed} for row in ends["history"]]
    return tensors, json.dumps(tree), ids, history, result


def same(one, other):
    tensors, tree, ids, history, result = one
    assert list(tensors) == list(other[0])
    assert [name for name in tensors if not torch.equal(tensors[name], other[0][name])] == []
    assert (tree, ids, history) == other[1:4]
    weights = [(r.folder / "weights.safetensors").read_bytes() for r in (result, other[4])]
    assert weights[0] == weights[1]
    assert result.scores == other[4].scores


def killed_run(recipe, data, out, kill_at, how):
    note_ids(out.parent / f"{out.name}.ids")
    at_step(kill_at, lambda run: os.kill(os.getpid(), signal.SIGKILL))
    options = Options(save_steps=2, save_minutes=0, log_steps=1)
    train(recipe, data, out=out, seed=3, resume=True, options=options, **how)


@pytest.fixture(scope="module")
def references(shared_colours, tmp_path_factory):
    """What an undisturbed run leaves, computed once a recipe."""
    found = {}

    def of(recipe):
        if recipe not in found:
            found[recipe] = run_to(recipe, shared_colours, tmp_path_factory.mktemp("reference") / "run")
        return found[recipe]

    return of


@pytest.mark.parametrize(
    ("changes", "kills", "how"),
    [
        ({}, (5, 9), ({}, {"workers": 1}, {"workers": 2})),
        (ADAMW, (1, 8), ({"workers": 2}, {}, {})),
        ({"optimizer": "lamb", "cutmix_alpha": 1.0, "accumulation": 2}, (7,), ({}, {})),
    ],
    ids=["sgd", "adamw", "lamb"],
)
def test_a_killed_run_ends_as_the_undisturbed_one_with_any_workers(
    changes, kills, how, references, shared_colours, tmp_path, children
):
    recipe = tiny(**changes)
    out = tmp_path / "run"
    for kill_at, these in zip(kills, how, strict=False):
        assert children.start(killed_run, recipe, shared_colours, out, kill_at, these).wait() == -signal.SIGKILL
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    resumed = run_to(recipe, shared_colours, out, resume=True, options=Options(log_steps=1), **how[-1])
    same(references(recipe), resumed)
    starts = json.loads((out / "run.json").read_text())["starts"]
    assert len(starts) == len(kills) + 1
    assert all(0 <= kill - start["step"] <= 4 for kill, start in zip(kills, starts[1:], strict=True))
    assert len(log) < len([json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()])
    logged = [line["step"] for line in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if "loss" in line]
    assert logged == list(range(STEPS))  # each once: what was undone is out of the log


def killed_after(recipe, data, out, count, how):
    """Kill -9 before the step that would be the next after `count` in this process."""
    step, done = _Run._step, []

    def spy(self, batch, wait_s):
        if len(done) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(1)
        step(self, batch, wait_s)

    _Run._step = spy
    note_ids(out.parent / f"{out.name}.ids")
    train(recipe, data, out=out, seed=3, resume=True, options=Options(save_steps=2, save_minutes=0), **how)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, ADAMW], ids=["sgd", "adamw"])
def test_twelve_kills_at_random_steps(changes, references, shared_colours, tmp_path, children):
    recipe, out, draw = tiny(epochs=14, **changes), tmp_path / "run", random.Random(0)
    for _ in range(12):
        how = {"workers": draw.randrange(3)}
        child = children.start(killed_after, recipe, shared_colours, out, draw.randint(1, 5), how)
        assert child.wait() == -signal.SIGKILL
    same(references(recipe), run_to(recipe, shared_colours, out, resume=True))
    assert len(json.loads((out / "run.json").read_text())["starts"]) == 13


def test_the_same_seed_twice_leaves_the_same_bits_everywhere(references, shared_colours, tmp_path):
    recipe = tiny()
    same(references(recipe), run_to(recipe, shared_colours, tmp_path / "run"))


# --- what may be resumed ----------------------------------------------------------------------------------------------


class Killed(BaseException):
    """As far as a run in this process can be killed."""


def stop_at(step):
    def kill(run):
        run.store.wait()
        raise Killed

    at_step(step, kill)


@pytest.fixture
def unfinished(shared_colours, tmp_path):
    out = tmp_path / "run"
    stop_at(5)
    with pytest.raises(Killed):
        train(tiny(), shared_colours, out=out, seed=3, options=Options(save_steps=2))
    _Run._step = _original_step
    return out


_original_step = _Run._step


def test_another_recipe_seed_or_start_is_refused_with_every_difference(unfinished, shared_colours):
    before = sorted(unfinished.iterdir())
    with pytest.raises(BadRun, match=r"epochs 4, not 5; lr_per_256 1\.0, not 0\.5; seed 3, not 4"):
        train(tiny(epochs=5, lr_per_256=0.5), shared_colours, out=unfinished, seed=4, resume=True)
    with pytest.raises(BadRun, match="init_from None, not x"):
        train(tiny(), shared_colours, out=unfinished, seed=3, resume=True, init_from="x")
    with pytest.raises(BadRun, match="holds another run"):
        train(tiny(), shared_colours, out=unfinished, seed=3)
    assert sorted(unfinished.iterdir()) == before


def test_other_images_are_refused(unfinished, colours):
    (colours / "train" / "red" / "0.jpg").rename(colours / "train" / "red" / "9.jpg")
    with pytest.raises(BadRun, match="other images, names or labels"):
        train(tiny(), colours, out=unfinished, seed=3, resume=True)


def test_a_run_whose_checkpoints_are_all_bad_does_not_start_again(unfinished, shared_colours, capsys):
    steps = sorted(unfinished.glob("step-*"))
    assert len(steps) == 2
    for step in steps:
        path = next(step.glob("*.safetensors"))
        path.write_bytes(path.read_bytes()[:-1])
    assert main(["train", "--resume", "--out", str(unfinished)]) == 2
    assert "none can be read" in capsys.readouterr().err


def test_a_damaged_newest_checkpoint_is_passed_over_aloud(unfinished, references, shared_colours, capfd):
    newest = newest_checkpoint(unfinished)
    path = next(newest.path.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    resumed = run_to(tiny(), shared_colours, unfinished, resume=True)
    same_but_ids(references(tiny()), resumed)
    said = capfd.readouterr()
    assert f"step-{newest.step} is damaged" in said.err
    assert "goes on after step 2 of 12" in said.out


def same_but_ids(one, other):
    ids = other[2]
    assert ids == {step: one[2][step] for step in ids}
    same(one, (*other[:2], one[2], *other[3:]))


def test_resume_with_nothing_else_said_goes_on_as_it_was_asked_for(unfinished, references, capsys):
    assert main(["train", "--resume", "--out", str(unfinished), "--device", "cpu"]) == 0
    assert "goes on after step 4 of 12" in capsys.readouterr().out
    want = references(tiny())[4]
    assert (unfinished / "weights.safetensors").read_bytes() == (want.folder / "weights.safetensors").read_bytes()
    before = {p: p.stat().st_mtime_ns for p in unfinished.iterdir()}
    assert main(["train", "--resume", "--out", str(unfinished)]) == 0  # again
    out = capsys.readouterr().out
    assert f"{unfinished} is finished" in out
    assert str(want.scores) in out
    assert {p: p.stat().st_mtime_ns for p in unfinished.iterdir()} == before


def test_resume_without_a_folder_or_a_run(shared_colours, tmp_path, capsys):
    with pytest.raises(BadRun, match="needs --out"):
        train(tiny(), shared_colours, resume=True)
    result = train(tiny(epochs=1, warmup_epochs=0.0), shared_colours, out=tmp_path / "run", resume=True)
    assert result.folder == tmp_path / "run"
    assert "has no checkpoint to go on from and starts at its first step" in capsys.readouterr().out
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "holiday.txt").write_text("")
    with pytest.raises(BadRun, match=r"holiday\.txt"):
        train(tiny(), shared_colours, out=tmp_path / "other", resume=True)


def test_checkpoints_come_by_the_clock_or_by_the_count_and_milestones_stay(shared_colours, tmp_path):
    def saved(out, **options):
        options = {"save_minutes": 0, "keep_checkpoints": 1, **options}
        train(tiny(), shared_colours, out=out, options=Options(**options))
        return sorted(int(p.name.removeprefix("step-")) for p in out.glob("step-*"))

    assert saved(tmp_path / "none") == []
    assert saved(tmp_path / "count", save_steps=5, keep_checkpoints=9) == [5, 10]
    assert saved(tmp_path / "clock", save_minutes=1e-6, keep_checkpoints=99) == list(range(1, STEPS))
    assert saved(tmp_path / "milestones", milestone_epochs=2, save_steps=5) == [6, 12]
    result = train(tiny(), shared_colours, out=tmp_path / "milestones", resume=True)
    assert "finished" in json.loads((result.folder / "run.json").read_text())["status"]


def test_the_best_epoch_on_the_held_out_images_keeps_its_checkpoint_and_can_be_used(
    shared_colours, tmp_path, monkeypatch, capsys
):
    tops, evaluate = iter((0.5, 0.75, 0.25, 0.75)), lambdanets.classification.task.evaluate

    def scored(*args, **how):
        return dataclasses.replace(evaluate(*args, **how), top1_frac=next(tops))

    monkeypatch.setattr(lambdanets.classification.task, "evaluate", scored)
    out, options = tmp_path / "run", Options(keep_best=True, save_steps=5, save_minutes=0, keep_checkpoints=1)
    averages = {}
    save = _Run._save

    def spy(self, **how):
        averages[self.at.step] = {k: v.clone() for k, v in self.learner.average.up_to_date().state_dict().items()}
        save(self, **how)

    monkeypatch.setattr(_Run, "_save", spy)
    train(tiny(), shared_colours, out=out, options=options)
    assert sorted(p.name for p in out.glob("step-*")) == ["step-11", "step-6"]  # of epoch 2; the newest
    monkeypatch.undo()

    best = open_run(out / "step-6")
    assert best.folder == out
    for name, value in best.model.state_dict().items():
        assert torch.equal(value, averages[6][name]), name
    assert main(["evaluate", str(out / "step-6")]) == 0
    assert (out / "evaluation-1" / "evaluation.json").is_file()
    photo = next((shared_colours / "val").rglob("*.jpg"))
    assert main(["predict", str(out / "step-6"), str(photo)]) == 0
    tuned = train(tiny(epochs=1), shared_colours, out=tmp_path / "tuned", init_from=out / "step-6")
    digest = hashlib.sha256((out / "step-6" / "tensors.safetensors").read_bytes()).hexdigest()
    record = json.loads((tuned.folder / "run.json").read_text())
    assert record["init_from"] == {"source": str(out / "step-6"), "sha256": digest}

    (out / "step-6" / "state.json").write_text("{}")
    capsys.readouterr()
    assert main(["predict", str(out / "step-6"), str(photo)]) == 2
    assert re.search(r"step-6 is damaged \(state.json has 2 bytes, .*name another step", capsys.readouterr().err)


def test_a_run_that_was_killed_after_its_last_epoch_only_finishes(shared_colours, tmp_path, references):
    out = tmp_path / "run"

    def killed(self, scores):
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Run, "_finish", killed)
        with pytest.raises(Killed):
            train(tiny(), shared_colours, out=out, seed=3, options=Options(milestone_epochs=4))
    assert newest_checkpoint(out).step == STEPS
    (tmp_path / "run.ids").write_text("")
    tensors, tree, _, history, result = run_to(tiny(), shared_colours, out, resume=True)
    want = references(tiny())
    same(want, (tensors, tree, want[2], history, result))


# --- killed at the very start -----------------------------------------------------------------------------------------

STARTING = ("open", "write", "fsync", "close", "mkdir", "rmdir", "rename", "replace", "unlink", "link", "makedirs")


def learning(recipe):
    return Classification(recipe, None, workers=0, seed=3)


def first_writes(out, recipe, kill_at):
    """What a run writes before its first step, killed at that call of the system; gives how many calls there were."""
    calls = [0]
    for name in STARTING:
        call = getattr(os, name)

        def counted(*args, call=call, **kwargs):
            calls[0] += 1
            if calls[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        setattr(os, name, counted)
    folder, old = lambdanets.training.preflight._place(out, recipe, learning(recipe), 3, True, None)
    record = {"status": "running", "id": "0" * 16, "recipe": dataclasses.asdict(recipe), "seed": 3, "starts": []}
    record |= {"options": {}, "device": "cpu", "classes": ["a", "b"], "history": []}
    record["view"] = dataclasses.asdict(View(8, 3, (0.0,) * 3, (1.0,) * 3, 1.0))
    record["data"] = {"source": "x", "how": "", "ignored": {}, "val_images": 1}
    with Checkpoints(folder, run="0" * 16):
        Start(recipe, learning(recipe), Options(), folder, old, torch.device("cpu"), record).begin(None)
    return calls[0]


def test_the_same_resume_command_is_taken_after_a_kill_at_each_call_of_the_very_start(tmp_path, children):
    recipe = tiny()
    count = children.start(first_writes, tmp_path / "whole", recipe, 0).gave()
    assert count >= 10
    left = set()
    killed = [children.start(first_writes, tmp_path / f"run{at}", recipe, at) for at in range(1, count + 1)]
    assert [child.wait() for child in killed] == [-signal.SIGKILL] * count
    for at in range(1, count + 1):
        out = tmp_path / f"run{at}"
        left.add(tuple(sorted(p.name for p in out.iterdir())) if out.exists() else None)
        again = children.start(first_writes, out, recipe, 0)
        assert again.gave() >= 1, again.said()
        assert sorted(p.name for p in out.iterdir()) == [".lock", "run.json"]
    assert len(left) >= 4  # nothing, the lock, the probe, a part of run.json, run.json


def test_a_folder_that_holds_anything_else_is_still_refused(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    for name in (".lock", ".step-probe.part", ".run.json.0123abcd.part"):
        (out / name).write_text("")
    assert lambdanets.training.preflight._place(out, tiny(), learning(tiny()), 3, True, None) == (out, None)
    (out / ".run.json.notes").write_text("")
    with pytest.raises(BadRun, match="is not empty"):
        lambdanets.training.preflight._place(out, tiny(), learning(tiny()), 3, True, None)


# --- what ends a run between two steps --------------------------------------------------------------------------------


def ended(error, at, data, out, **how):
    """The run ends by that error, and what it did before is saved; gives the error's notes."""
    with pytest.raises(error) as caught:
        train(tiny(), data, out=out, seed=3, resume=True, options=Options(save_minutes=0), **how)
    _Run._step = _original_step
    notes = "\n".join(caught.value.__notes__)
    assert f"the state after step {at} of {STEPS} is saved: go on with --resume" in notes
    assert newest_checkpoint(out).step == at
    return caught.value


@pytest.mark.parametrize("workers", [0, 2])
def test_a_disk_that_is_away_in_training_ends_the_run_with_the_steps_so_far_saved(
    workers, colours, tmp_path, references, monkeypatch
):
    monkeypatch.setattr(lambdanets.files, "PAUSES_S", (0.01, 0.01))
    away = tmp_path / "away"
    at_step(4, lambda run: colours.rename(away))
    with pytest.raises(DiskFault, match="cannot be read: No such file") as caught:
        train(tiny(), colours, out=tmp_path / "run", seed=3, workers=workers, options=Options(save_minutes=0))
    _Run._step = _original_step
    found = newest_checkpoint(tmp_path / "run")
    assert found.step >= 5
    assert f"the state after step {found.step} of {STEPS} is saved" in "\n".join(caught.value.__notes__)
    assert found.load()["bad"] == {}  # no conclusion is drawn
    assert not (tmp_path / "run" / "bad_samples.jsonl").exists()
    away.rename(colours)
    same_but_ids(references(tiny()), run_to(tiny(), colours, tmp_path / "run", resume=True))


def test_a_disk_that_is_away_in_evaluation_ends_the_run_with_the_epoch_saved(
    colours, tmp_path, references, monkeypatch
):
    monkeypatch.setattr(lambdanets.files, "PAUSES_S", (0.01,))
    away = tmp_path / "away"
    at_step(5, lambda run: (colours / "val").rename(away))
    ended(DiskFault, 6, colours, tmp_path / "run")
    away.rename(colours / "val")
    same_but_ids(references(tiny()), run_to(tiny(), colours, tmp_path / "run", resume=True))


def test_a_lost_disk_has_exit_code_5_and_says_how_to_go_on(colours, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lambdanets.files, "PAUSES_S", (0.01,))
    at_step(4, lambda run: colours.rename(tmp_path / "away"))
    out, options = tmp_path / "run", Options(save_minutes=0)
    assert main_like(lambda: train(tiny(), colours, out=out, seed=3, options=options)) == LOST
    assert re.search(r"cannot be read.*\n.*\nthe state after step 5 of 12 is saved: go on", capsys.readouterr().err)


def test_too_many_bad_images_end_the_run_and_it_goes_on_once_they_are_repaired(colours, tmp_path, references):
    whole = {path: path.read_bytes() for name in ("red", "blue") for path in (colours / "train" / name).iterdir()}

    def damage(run):
        for path in whole:
            path.write_bytes(b"<html>")

    at_step(3, damage)
    error = ended(BadData, 4, colours, tmp_path / "run")
    assert re.search(r"\d of 24 training images cannot be read", str(error))
    assert newest_checkpoint(tmp_path / "run").load()["bad"] == {}  # those of the steps that were done
    with pytest.raises(BadData, match="training images cannot be read"):  # they still are
        train(tiny(), colours, out=tmp_path / "run", seed=3, resume=True)
    for path, content in whole.items():
        path.write_bytes(content)
    same_but_ids(references(tiny()), run_to(tiny(), colours, tmp_path / "run", resume=True))


def test_a_step_that_is_not_finite_leaves_the_state_before_it_to_go_on_from(shared_colours, tmp_path, references):
    not_a_number_at(7)
    error = ended(NonFiniteLoss, 7, shared_colours, tmp_path / "run")
    assert "--skip-non-finite" in str(error)
    same_but_ids(references(tiny()), run_to(tiny(), shared_colours, tmp_path / "run", resume=True))


def test_an_error_in_a_step_leaves_the_last_checkpoint_as_it_was(shared_colours, tmp_path, references):
    def burn(run):
        raise RuntimeError("the card burns")

    at_step(5, burn)
    with pytest.raises(RuntimeError, match="burns"):
        train(tiny(), shared_colours, out=tmp_path / "run", seed=3, options=Options(save_steps=2))
    _Run._step = _original_step
    assert newest_checkpoint(tmp_path / "run").step == 4
    same_but_ids(references(tiny()), run_to(tiny(), shared_colours, tmp_path / "run", resume=True))


def test_a_report_that_fails_leaves_the_last_step_saved(shared_colours, tmp_path, references, monkeypatch):
    def full(*rest):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(lambdanets.classification.task, "write_report", full)
        ended(BadRun, STEPS, shared_colours, tmp_path / "run")
    (tmp_path / "run.ids").write_text("")
    want = references(tiny())
    tensors, tree, _, history, result = run_to(tiny(), shared_colours, tmp_path / "run", resume=True)
    same(want, (tensors, tree, want[2], history, result))


@pytest.mark.parametrize("saved_before", [False, True])
def test_a_stop_right_after_an_epoch_keeps_its_milestone_and_its_best(saved_before, shared_colours, tmp_path):
    """SIGTERM comes after the epoch was evaluated, before or after the clock or the epoch has saved that very step."""
    out = tmp_path / "run"
    options = Options(milestone_epochs=1, keep_best=True, keep_checkpoints=1, save_minutes=0)
    next_batch = _Run._next_batch

    def spy(self, stream):
        if self.at.epoch == 1:
            if not saved_before:
                shutil.rmtree(out / "step-3", ignore_errors=True)
            os.kill(os.getpid(), signal.SIGTERM)
        return next_batch(self, stream)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Run, "_next_batch", spy)
        if not saved_before:
            patch.setattr(_Run, "_save", lambda self, **how: save(self, **how) if how else None)
        with pytest.raises(Terminated, match="step 3 of 12"):
            train(tiny(), shared_colours, out=out, seed=3, options=options)
    manifest = json.loads((out / "step-3" / "manifest.json").read_text())
    assert (manifest["milestone"], manifest["best"]) == (True, True)
    train(tiny(), shared_colours, out=out, seed=3, resume=True, options=options)
    assert [(out / f"step-{step}").is_dir() for step in (3, 6, 9, 12)] == [True] * 4


save = _Run._save


def test_a_checkpoint_of_another_run_in_the_folder_is_refused(unfinished, shared_colours, tmp_path, capsys):
    other = tmp_path / "other"
    train(tiny(), shared_colours, out=other, seed=3, options=Options(save_steps=7, save_minutes=0))
    shutil.copytree(other / "step-7", unfinished / "step-7")  # the same recipe, seed and images
    assert main(["train", "--resume", "--out", str(unfinished)]) == 2
    assert "step-7 is a checkpoint of another run" in capsys.readouterr().err
    assert (unfinished / "step-7").is_dir()
    shutil.rmtree(unfinished / "step-7")
    copied = shutil.copytree(unfinished, tmp_path / "copied")
    assert main(["train", "--resume", "--out", str(copied)]) == 0
    assert "goes on after step 4" in capsys.readouterr().out


def test_a_run_from_before_runs_had_a_name_goes_on(unfinished, references, shared_colours, capfd):
    record = json.loads((unfinished / "run.json").read_text())
    assert re.fullmatch("[0-9a-f]{16}", record.pop("id"))
    del record["data"]["content"]
    (unfinished / "run.json").write_text(json.dumps(record))
    for path in unfinished.glob("step-*/manifest.json"):
        manifest = json.loads(path.read_text())
        del manifest["sha256"], manifest["run"]
        path.write_bytes(lambdanets.runs.checkpoints._manifest_bytes(manifest))
    same_but_ids(references(tiny()), run_to(tiny(), shared_colours, unfinished, resume=True))
    said = capfd.readouterr()
    assert "goes on after step 4" in said.out
    assert said.err == ""


@pytest.mark.parametrize("how", ["nothing", "time", "size"])
def test_pictures_replaced_under_the_same_names_are_said_at_a_resume(how, shared_colours, tmp_path, capfd):
    colours = tmp_path / "colours"
    shutil.copytree(shared_colours, colours)
    stop_at(5)
    with pytest.raises(Killed):
        train(tiny(), colours, out=tmp_path / "run", seed=3, options=Options(save_steps=2))
    _Run._step = _original_step
    path = colours / "train" / "red" / "3.jpg"
    if how == "time":
        os.utime(path, (1, 1))
    elif how == "size":
        path.write_bytes(path.read_bytes() + b" ")
    capfd.readouterr()
    train(tiny(), colours, out=tmp_path / "run", seed=3, resume=True)
    said = [line for line in capfd.readouterr().err.splitlines() if "replaced" in line]
    wanted = {"time": "have other times than at the start of this run, of the same sizes: it is a copy, or"}
    wanted["size"] = "have other sizes than at the start of this run: pictures were replaced"
    assert len(said) == (how != "nothing")
    if said:
        assert wanted[how] in said[0]


# --- links of strangers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["log.jsonl", "stacks-rank0.txt", "curves.png", "report.html", "weights.safetensors"])
@pytest.mark.parametrize("dangling", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_no_link_in_a_strangers_run_is_written_through(name, dangling, unfinished, shared_colours, tmp_path):
    outside = tmp_path / "precious"
    if not dangling:
        outside.write_text('{"step": 99}\n')
    (unfinished / name).unlink(missing_ok=True)
    (unfinished / name).symlink_to(outside)
    refused = name == "log.jsonl"
    code = main(["train", "--resume", "--out", str(unfinished), "--device", "cpu"])
    assert code == (2 if refused else 0)
    assert outside.exists() == (not dangling)
    assert dangling or outside.read_text() == '{"step": 99}\n'


# --- signals ----------------------------------------------------------------------------------------------------------


def sleep_at_step(recipe, data, out, how, step, options):
    at_step(step, asleep)
    raise SystemExit(main_like(lambda: train(recipe, data, out=out, seed=3, resume=True, options=options, **how)))


def asleep(run=None):
    time.sleep(60)


def main_like(call):
    """`lambdanets train` with a recipe of our own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lambdanets.classification.train, "train", lambda *args, **kwargs: call())
        return main(["train"])


def slow_images(recipe, data, out, how, options):
    def load(self, index):
        asleep()

    batches = lambdanets.training.loop._Run._next_batch

    def spy(self, stream):
        if self.at.step == 4:
            lambdanets.data.folders._Files.load = load
        return batches(self, stream)

    _Run._next_batch = spy
    if how.get("workers"):  # they are forks of the beginning
        read, taken = lambdanets.data.folders._Files.load, []
        parent = os.getpid()

        def some(self, index):
            taken.append(index)
            return read(self, index) if os.getpid() == parent or len(taken) < 40 else asleep()

        lambdanets.data.folders._Files.load = some
    raise SystemExit(main_like(lambda: train(recipe, data, out=out, seed=3, options=options, **how)))


def slow_evaluation(recipe, data, out, how, options):
    evaluate = lambdanets.classification.task.evaluate

    def slow(*args, go_on, **kwargs):
        def slowly():
            print("evaluating", flush=True)
            time.sleep(0.3)
            return go_on()

        return evaluate(*args, go_on=slowly, **kwargs)

    lambdanets.classification.task.evaluate = slow
    raise SystemExit(main_like(lambda: train(recipe, data, out=out, seed=3, options=options, **how)))


def lines(out):
    path = out / "log.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.parametrize("where", ["step", "data", "evaluation"])
def test_sigterm_saves_the_step_and_leaves(where, references, shared_colours, tmp_path, children):
    out, options = tmp_path / "run", Options(log_steps=1, save_minutes=0)
    if where == "step":
        recipe = tiny(epochs=400, warmup_epochs=20.0)
        child = children.start(sleep_at_step, recipe, shared_colours, out, {}, -1, options)
        until(lambda: lines(out) >= 5)
    elif where == "data":
        recipe = tiny()
        child = children.start(slow_images, recipe, shared_colours, out, {}, options)
        until(lambda: lines(out) >= 5)  # four steps and an evaluation; then it waits for an image
    else:
        recipe = tiny()
        child = children.start(slow_evaluation, recipe, shared_colours, out, {}, options)
        until(lambda: child.place.with_suffix(".out").exists() and "evaluating" in child.said())
    time.sleep(0.1)
    sent = time.monotonic()
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait() == 143, child.said()
    assert time.monotonic() - sent < 30  # Slurm gives 30; the image would take 60
    found = re.search(r"stopped after step (\d+) of \d+, which is saved: go on with --resume", child.said())
    assert newest_checkpoint(out).step == int(found[1])
    assert json.loads((out / "run.json").read_text())["status"] == "interrupted"
    if where != "step":
        assert int(found[1]) == {"data": 4, "evaluation": 3}[where]
        same_but_ids(references(recipe), run_to(recipe, shared_colours, out, resume=True))


def test_a_second_sigterm_ends_it_at_once(shared_colours, tmp_path, children):
    out = tmp_path / "run"
    child = children.start(sleep_at_step, tiny(), shared_colours, out, {}, 3, Options(log_steps=1))
    until(lambda: lines(out) >= 4)
    time.sleep(0.2)
    os.kill(child.pid, signal.SIGTERM)
    time.sleep(1.2)
    assert child.process.is_alive()  # the step sleeps
    sent = time.monotonic()
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait() == 143
    assert time.monotonic() - sent < 10  # the step would sleep for 60
    assert newest_checkpoint(out) is None


def test_ctrl_c_saves_too_and_puts_the_handlers_back(shared_colours, tmp_path, references):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    at_step(5, lambda run: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt, match="stopped after step 6 of 12"):
        train(tiny(), shared_colours, out=tmp_path / "run", seed=3)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before
    _Run._step = _original_step
    same_but_ids(references(tiny()), run_to(tiny(), shared_colours, tmp_path / "run", resume=True))


def test_sigterm_in_this_process_is_terminated(shared_colours, tmp_path):
    at_step(2, lambda run: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Terminated, match="step 3 of 12"):
        train(tiny(), shared_colours, out=tmp_path / "run")


def test_a_terminal_that_is_closed_saves_the_step_with_a_code_of_its_own(shared_colours, tmp_path, children):
    """Readers are in the terminal's group, and get the signal as well."""
    out, options = tmp_path / "run", Options(log_steps=1, save_minutes=0)
    recipe = tiny(epochs=400, warmup_epochs=20.0)
    child = children.start(hung_up, recipe, shared_colours, out, {"workers": 2}, options)
    until(lambda: lines(out) >= 5)
    os.killpg(child.pid, signal.SIGHUP)
    assert child.wait() == 129, child.said()
    found = re.search(r"stopped after step (\d+) of 1200, which is saved: go on with --resume", child.said())
    assert newest_checkpoint(out).step == int(found[1])


def hung_up(recipe, data, out, how, options):
    os.setpgid(0, 0)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    raise SystemExit(main_like(lambda: train(recipe, data, out=out, seed=3, options=options, **how)))


def test_a_hangup_that_nohup_ignores_stays_ignored(shared_colours, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at_step(2, lambda run: os.kill(os.getpid(), signal.SIGHUP))
        train(tiny(epochs=1, warmup_epochs=0.0), shared_colours, out=tmp_path / "run")
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_first_step_ends_the_command_at_once_and_it_can_be_given_again(
    number, shared_colours, tmp_path, children
):
    """A large listing, say."""
    out = tmp_path / "run"
    child = children.start(slow_listing, tiny(epochs=1, warmup_epochs=0.0), shared_colours, out, Options())
    until(lambda: child.place.with_suffix(".out").exists() and "listing" in child.said())
    sent = time.monotonic()
    os.kill(child.pid, number)
    assert child.wait() == 128 + number
    assert time.monotonic() - sent < 5
    assert "stopped before a step was done" in child.said()
    assert not out.exists()


def slow_listing(recipe, data, out, options):
    def slow(*rest):
        print("listing", flush=True)
        asleep()

    lambdanets.classification.task.open_source = slow
    raise SystemExit(main_like(lambda: train(recipe, data, out=out, seed=3, options=options)))


def test_a_signal_during_the_report_saves_the_last_step(shared_colours, tmp_path, references, monkeypatch):
    out = tmp_path / "run"

    def slow(*rest):
        os.kill(os.getpid(), signal.SIGTERM)
        asleep()

    with monkeypatch.context() as patched:
        patched.setattr(lambdanets.classification.task, "write_report", slow)
        with pytest.raises(Terminated, match="stopped after step 12 of 12"):
            train(tiny(), shared_colours, out=out, seed=3, options=Options(save_minutes=0))
    assert json.loads((out / "run.json").read_text())["status"] == "interrupted"
    (tmp_path / "run.ids").write_text("")
    want = references(tiny())
    tensors, tree, _, history, result = run_to(tiny(), shared_colours, out, resume=True)
    same(want, (tensors, tree, want[2], history, result))


# --- a terminal that is gone ------------------------------------------------------------------------------------------

TRAIN = (
    "{python} -m lambdanets train --data {data} --out {out} --recipe folder --model lambda_resnet_tiny --image-px 8 "
    "--epochs 4 --batch-images 8 --seed 3 --device cpu --log-steps 1"
)


@pytest.mark.parametrize(
    "where",
    [
        "{} | head -1; exit ${{PIPESTATUS[0]}}",
        pytest.param("{} 2>&1 | true; exit ${{PIPESTATUS[0]}}", marks=pytest.mark.slow),
        pytest.param("{} > /dev/full", marks=pytest.mark.slow),
        pytest.param("{} > /dev/full 2>&1", marks=pytest.mark.slow),
        "{} >&- 2>&-",
        pytest.param("{} 2>&- <&-", marks=pytest.mark.slow),
    ],
)
def test_a_run_outlives_its_terminal_and_its_log_has_everything(where, shared_colours, tmp_path):
    out = tmp_path / "run"
    command = where.format(TRAIN.format(python=sys.executable, data=shared_colours, out=out))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    logged = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if "loss" in line] == list(range(STEPS))
    assert [line["epoch"] for line in logged if "epoch" in line] == [1, 2, 3, 4]
    assert json.loads((out / "run.json").read_text())["status"] == "finished"
    for path in out.rglob("*"):  # no file took the place of a closed stream
        if path.suffix in (".json", ".jsonl", ".txt"):
            assert b"lambda_resnet_tiny, 8 px" not in path.read_bytes()


# --- processes that are lost, and hangs -------------------------------------------------------------------------------


def test_a_killed_reader_is_named_and_the_run_goes_on(shared_colours, tmp_path, references, monkeypatch):
    def kill_a_reader(run):
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        time.sleep(0.1)

    at_step(5, kill_a_reader)
    out = tmp_path / "run"
    with pytest.raises(LostProcess, match=r"a process that reads images is gone .*killed by signal: Killed"):
        train(tiny(), shared_colours, out=out, seed=3, workers=2, options=Options(save_steps=2))
    assert json.loads((out / "run.json").read_text())["status"] == "stopped"
    _Run._step = _original_step
    same_but_ids(references(tiny()), run_to(tiny(), shared_colours, out, resume=True, workers=1))


@pytest.mark.parametrize("where", ["main thread", "reader"])
def test_a_hang_leaves_the_stacks_and_exit_code_4(where, shared_colours, tmp_path, children):
    out, options = tmp_path / "run", Options(log_steps=1, hang_timeout_s=2)
    if where == "reader":
        child = children.start(
            slow_images, tiny(epochs=400, warmup_epochs=0.0), shared_colours, out, {"workers": 1}, options
        )
        until(lambda: lines(out) >= 1)
    else:
        child = children.start(sleep_at_step, tiny(), shared_colours, out, {}, 3, options)
        until(lambda: lines(out) >= 4)
    last = time.monotonic()
    while (done := lines(out)) and not time.sleep(0.05):
        if lines(out) != done:
            last = time.monotonic()
        if child.process.exitcode is not None:
            break
    assert child.wait() == HANG, child.said()
    assert time.monotonic() - last < 2 + 10  # 2 + 2 are promised on a machine that does nothing else
    stacks = (out / "stacks-rank0.txt").read_text()
    assert "nothing has moved for 2 s" in stacks
    assert " in asleep" in stacks  # in the reader's case it is the reader's stack
    assert " in _next_batch" in stacks or " in _step" in stacks or "in spy" in stacks
    assert "stacks-rank0.txt" in child.said()


@pytest.mark.parametrize("signal_name", ["Bus error", "Killed"])
def test_readers_without_shared_memory_are_one_message_that_names_it(signal_name, shared_colours, tmp_path, capsys):
    """A reader gets the signal that the system sends where /dev/shm is full; also in the first look at the images."""
    number = {"Bus error": signal.SIGBUS, "Killed": signal.SIGKILL}[signal_name]

    def kill_a_reader(run):
        os.kill(multiprocessing.active_children()[0].pid, number)
        time.sleep(0.1)

    at_step(5, kill_a_reader)
    assert main_like(lambda: train(tiny(), shared_colours, out=tmp_path / "run", workers=2)) == LOST
    said = capsys.readouterr().err
    assert ("--shm-size" in said) == (signal_name == "Bus error")
    assert "--workers" in said
    assert "--resume" in said


def test_a_disk_of_shared_memory_too_small_for_the_first_look_is_one_message(shared_colours, tmp_path, monkeypatch):
    def full(self):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that ...")

    monkeypatch.setattr(lambdanets.data.batches.Batches, "_results", full)
    with pytest.raises(LostProcess, match=r"shared memory \(shm: /dev/shm, [\d,]+ MiB\) is too small.*--workers"):
        train(tiny(), shared_colours, out=tmp_path / "run", workers=2)


def paused(recipe, data, out, options):
    at_step(4, lambda run: os.kill(os.getpid(), signal.SIGSTOP))
    raise SystemExit(main_like(lambda: train(recipe, data, out=out, seed=3, options=options)))


def test_a_pause_longer_than_the_hang_timeout_is_no_hang(shared_colours, tmp_path, references, children):
    out = tmp_path / "run"
    child = children.start(paused, tiny(), shared_colours, out, Options(log_steps=1, hang_timeout_s=3))
    until(lambda: lines(out) >= 5)
    time.sleep(11)  # longer than the guard allows, too
    os.kill(child.pid, signal.SIGCONT)
    assert child.wait() == 0, child.said()
    weights = [(folder / "weights.safetensors").read_bytes() for folder in (out, references(tiny())[4].folder)]
    assert weights[0] == weights[1]


def keeps_the_lock(recipe, data, out, options):
    """C code that holds the interpreter's lock: no thread of Python runs any more."""
    at_step(4, lambda run: ctypes.PyDLL(None).sleep(100))
    raise SystemExit(main_like(lambda: train(recipe, data, out=out, seed=3, options=options)))


def test_a_hang_that_holds_the_interpreters_lock_is_ended_from_outside(shared_colours, tmp_path, children):
    out = tmp_path / "run"
    child = children.start(keeps_the_lock, tiny(), shared_colours, out, Options(log_steps=1, hang_timeout_s=3))
    until(lambda: lines(out) >= 5)
    assert child.wait(20) == -signal.SIGKILL
    assert "the interpreter's lock is held" in child.said()
    assert "keeps_the_lock" in (out / "stacks-rank0.txt").read_text()


@pytest.mark.parametrize("where", ["listing", "report"])
def test_a_hang_before_the_first_step_and_after_the_last_is_one_too(where, shared_colours, tmp_path, children):
    out = tmp_path / "run"
    recipe, options = tiny(epochs=1, warmup_epochs=0.0), Options(hang_timeout_s=3)
    child = children.start(slow_listing if where == "listing" else slow_report, recipe, shared_colours, out, options)
    assert child.wait() == HANG, child.said()
    assert "nothing has moved for 3 s" in child.said()
    stacks = child.said() if where == "listing" else (out / "stacks-rank0.txt").read_text()
    assert " in asleep" in stacks


def slow_report(recipe, data, out, options):
    lambdanets.classification.task.write_report = lambda *rest: asleep()
    raise SystemExit(main_like(lambda: train(recipe, data, out=out, seed=3, options=options)))


def busy_listing(recipe, data, out, options):
    read = lambdanets.classification.task.open_source

    def busy(*rest):
        for _ in range(60):  # as a network disk answers: mostly waiting
            time.sleep(0.1)
        return read(*rest)

    lambdanets.classification.task.open_source = busy
    raise SystemExit(main_like(lambda: train(recipe, data, out=out, seed=3, options=options)))


def test_a_listing_longer_than_the_hang_timeout_is_no_hang_while_it_gets_on(shared_colours, tmp_path, children):
    recipe, options = tiny(epochs=1, warmup_epochs=0.0), Options(hang_timeout_s=3)
    child = children.start(busy_listing, recipe, shared_colours, tmp_path / "run", options)
    assert child.wait() == 0, child.said()


@pytest.mark.parametrize("seconds", [pytest.param(1e12, marks=pytest.mark.slow), 1e300, 0.0])
def test_a_hang_timeout_of_any_finite_length_leaves_the_watch_alive(seconds, shared_colours, tmp_path):
    at_step(2, lambda run: (time.sleep(0.6), threads.extend(t.name for t in threading.enumerate())))
    threads = []
    recipe = tiny(epochs=1, warmup_epochs=0.0)
    train(recipe, shared_colours, out=tmp_path / "run", options=Options(hang_timeout_s=seconds))
    assert "watchdog" in threads


@pytest.mark.parametrize("name", ["hang_timeout_s", "save_minutes"])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1.0])
def test_seconds_and_minutes_are_finite(name, value):
    with pytest.raises(BadRecipe, match=f"{name} must be at least 0"):
        Options(**{name: value})


# --- numbers ----------------------------------------------------------------------------------------------------------


def not_a_number_at(*steps):
    step = _Run._step

    def spy(self, batch, wait_s):
        if self.at.step in steps:
            batch = batch._replace(images=batch.images.clone().fill_(float("nan")))
        step(self, batch, wait_s)

    _Run._step = spy


def test_a_nan_stops_the_run_on_its_step_and_no_checkpoint_holds_one(shared_colours, tmp_path):
    out = tmp_path / "run"
    not_a_number_at(7)
    with pytest.raises(NonFiniteLoss, match=r"step 7: the loss is nan, the gradient's norm nan"):
        train(tiny(), shared_colours, out=out, options=Options(save_steps=1))
    found = json.loads((out / "run.json").read_text())["non_finite"]
    assert (found["step"], found["loss"], found["gradient_norm"], len(found["images"])) == (7, "nan", "nan", 8)
    assert all((shared_colours / name).is_file() for name in found["images"])
    newest = newest_checkpoint(out)
    assert newest.step == 7
    tensors, _ = flatten(newest.load())
    assert all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())


def test_steps_that_are_not_finite_can_be_left_out(shared_colours, tmp_path):
    not_a_number_at(2, 3, 7)
    ends = {}
    at_step(3, lambda run: ends.update(before=flatten(run.learner.state())[0]))
    at_step(4, lambda run: ends.update(after=flatten(run.learner.state())[0]))
    ends_at_2 = {}
    at_step(2, lambda run: ends_at_2.update({k: v.clone() for k, v in flatten(run.learner.state())[0].items()}))
    result = train(tiny(), shared_colours, out=tmp_path / "run", options=Options(skip_non_finite=2))
    assert all(torch.equal(ends["after"][name], ends["before"][name]) for name in ends["after"])
    record = json.loads((result.folder / "run.json").read_text())
    assert record["result"]["left_out_steps"] == 3
    log = [json.loads(line) for line in (result.folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "non_finite" in line] == [2, 3, 7]


def test_more_in_a_row_than_allowed_stop_it(shared_colours, tmp_path):
    not_a_number_at(2, 4, 5, 6)
    with pytest.raises(NonFiniteLoss, match="step 6"):
        train(tiny(), shared_colours, out=tmp_path / "run", options=Options(skip_non_finite=2))
    with pytest.raises(BadRecipe, match="0 to 10"):
        Options(skip_non_finite=11)


def test_what_draws_comes_from_seed_and_step_alone(shared_colours, tmp_path, references):
    """Dropout, stochastic depth and mixing of a step do not depend on what was drawn before it."""

    def draw(run):
        torch.rand(1000)
        random.random()

    for step in range(STEPS):
        at_step(step, draw)
    same(references(tiny()), run_to(tiny(), shared_colours, tmp_path / "run"))
