"""What a run survives: kills, signals, hangs, lost readers, steps that are not finite. Every fault is a real one."""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import random
import re
import signal
import time

import pytest
import torch
from conftest import until

import lambdanets.data
import lambdanets.learner
import lambdanets.train
from lambdanets.checkpoint import BadRun, open_run
from lambdanets.cli import main
from lambdanets.distributed import LostProcess
from lambdanets.recipes import BadRecipe, Options, choose
from lambdanets.state import flatten
from lambdanets.steps import newest_checkpoint
from lambdanets.train import NonFiniteLoss, _Run, train
from lambdanets.watchdog import HANG, Terminated


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
def test_R2_R3_a_killed_run_ends_as_the_undisturbed_one_with_any_workers(
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
def test_R2_twelve_kills_at_random_steps(changes, references, shared_colours, tmp_path, children):
    recipe, out, draw = tiny(epochs=14, **changes), tmp_path / "run", random.Random(0)
    for _ in range(12):
        how = {"workers": draw.randrange(3)}
        child = children.start(killed_after, recipe, shared_colours, out, draw.randint(1, 5), how)
        assert child.wait() == -signal.SIGKILL
    same(references(recipe), run_to(recipe, shared_colours, out, resume=True))
    assert len(json.loads((out / "run.json").read_text())["starts"]) == 13


def test_R1_the_same_seed_twice_leaves_the_same_bits_everywhere(references, shared_colours, tmp_path):
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


def test_R13_a_run_whose_checkpoints_are_all_bad_does_not_start_again(unfinished, shared_colours, capsys):
    steps = sorted(unfinished.glob("step-*"))
    assert len(steps) == 2
    for step in steps:
        path = next(step.glob("*.safetensors"))
        path.write_bytes(path.read_bytes()[:-1])
    assert main(["train", "--resume", "--out", str(unfinished)]) == 2
    assert "none can be read" in capsys.readouterr().err


def test_R12_a_damaged_newest_checkpoint_is_passed_over_aloud(unfinished, references, shared_colours, capfd):
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
    tops, evaluate = iter((0.5, 0.75, 0.25, 0.75)), lambdanets.train.evaluate

    def scored(*args, **how):
        return dataclasses.replace(evaluate(*args, **how), top1_frac=next(tops))

    monkeypatch.setattr(lambdanets.train, "evaluate", scored)
    out, options = tmp_path / "run", Options(keep_best=True, save_steps=5, save_minutes=0, keep_checkpoints=1)
    averages = {}
    save = _Run._save

    def spy(self, **how):
        averages[self.at.step] = {k: v.clone() for k, v in self.learner.average.whole().state_dict().items()}
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


# --- signals ----------------------------------------------------------------------------------------------------------


def sleep_at_step(recipe, data, out, how, step, options):
    at_step(step, asleep)
    raise SystemExit(main_like(lambda: train(recipe, data, out=out, seed=3, resume=True, options=options, **how)))


def asleep(run=None):
    time.sleep(60)


def main_like(call):
    """`lambdanets train` with a recipe of our own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lambdanets.train, "train", lambda *args, **kwargs: call())
        return main(["train"])


def slow_images(recipe, data, out, how, options):
    def load(self, index):
        asleep()

    batches = lambdanets.train._Run._next_batch

    def spy(self, stream):
        if self.at.step == 4:
            lambdanets.data._Files.load = load
        return batches(self, stream)

    _Run._next_batch = spy
    if how.get("workers"):  # they are forks of the beginning
        read, taken = lambdanets.data._Files.load, []
        parent = os.getpid()

        def some(self, index):
            taken.append(index)
            return read(self, index) if os.getpid() == parent or len(taken) < 40 else asleep()

        lambdanets.data._Files.load = some
    raise SystemExit(main_like(lambda: train(recipe, data, out=out, seed=3, options=options, **how)))


def slow_evaluation(recipe, data, out, how, options):
    evaluate = lambdanets.train.evaluate

    def slow(*args, go_on, **kwargs):
        def slowly():
            print("evaluating", flush=True)
            time.sleep(0.3)
            return go_on()

        return evaluate(*args, go_on=slowly, **kwargs)

    lambdanets.train.evaluate = slow
    raise SystemExit(main_like(lambda: train(recipe, data, out=out, seed=3, options=options, **how)))


def lines(out):
    path = out / "log.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.parametrize("where", ["step", "data", "evaluation"])
def test_R9_sigterm_saves_the_step_and_leaves(where, references, shared_colours, tmp_path, children):
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
    assert time.monotonic() - sent < 10
    found = re.search(r"stopped after step (\d+) of \d+, which is saved: go on with --resume", child.said())
    assert newest_checkpoint(out).step == int(found[1])
    assert json.loads((out / "run.json").read_text())["status"] == "interrupted"
    if where != "step":
        assert int(found[1]) == {"data": 4, "evaluation": 3}[where]
        same_but_ids(references(recipe), run_to(recipe, shared_colours, out, resume=True))


def test_R9_a_second_sigterm_ends_it_at_once(shared_colours, tmp_path, children):
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
    assert time.monotonic() - sent < 1
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


# --- processes that are lost, and hangs -------------------------------------------------------------------------------


def test_R10_a_killed_reader_is_named_and_the_run_goes_on(shared_colours, tmp_path, references, monkeypatch):
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
def test_R11_a_hang_leaves_the_stacks_and_exit_code_4(where, shared_colours, tmp_path, children):
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
    assert time.monotonic() - last < 2 + 2
    stacks = (out / "stacks-rank0.txt").read_text()
    assert "nothing has moved for 2 s" in stacks
    assert " in asleep" in stacks  # in the reader's case it is the reader's stack
    assert " in _next_batch" in stacks or " in _step" in stacks or "in spy" in stacks
    assert "stacks-rank0.txt" in child.said()


# --- numbers ----------------------------------------------------------------------------------------------------------


def not_a_number_at(*steps):
    step = _Run._step

    def spy(self, batch, wait_s):
        if self.at.step in steps:
            batch = batch._replace(images=batch.images.clone().fill_(float("nan")))
        step(self, batch, wait_s)

    _Run._step = spy


def test_R20_a_nan_stops_the_run_on_its_step_and_no_checkpoint_holds_one(shared_colours, tmp_path):
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


def test_R20_steps_that_are_not_finite_can_be_left_out(shared_colours, tmp_path):
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


def test_R20_more_in_a_row_than_allowed_stop_it(shared_colours, tmp_path):
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
