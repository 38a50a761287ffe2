"""Training on both kinds of pictures: what it leaves, survives and refuses."""

import dataclasses
import json
import os
import random
import shutil
import signal

import numpy as np
import pytest
import torch
from selections import a_selection, write_selection

from lambdanets.classification import train as classification
from lambdanets.classification.evaluate_run import evaluate_run
from lambdanets.cli import main
from lambdanets.data.folders import folder
from lambdanets.data.shards import ShardImages
from lambdanets.errors import BadData, BadRecipe, BadRun
from lambdanets.models.resnet import LambdaResNet
from lambdanets.pseudo_labels.task import Joint
from lambdanets.pseudo_labels.train import train
from lambdanets.recipes import choose
from lambdanets.recipes.pseudo_labels import Mixture
from lambdanets.recipes.recipe import Options
from lambdanets.runs.nested_state import flatten
from lambdanets.training.loop import _Run


def tiny(**changes):
    """2 epochs of 6 steps of 4 labelled and 4 pseudo-labelled pictures, with everything that draws."""
    recipe = choose("folder", model="lambda_resnet_tiny", image_px=8, epochs=2, batch_images=8)
    changes = {"eval_batch_images": 4, "drop_path_rate": 0.2, "erase_frac": 0.3, "lr_per_256": 1.0, **changes}
    return dataclasses.replace(recipe, **changes)


CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def selection(shared_colours, unlabelled_shards, tmp_path_factory):
    """Of which the held-out pictures of `shared_colours` were kept away."""
    place = tmp_path_factory.mktemp("selection") / "selection"
    return a_selection(place, unlabelled_shards, exclude=[excluded(shared_colours)])


def excluded(data):
    found = folder(data)
    return {"source": str(data), "held_out": found.val.fingerprint(), "train": None}


def logged(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def pages():
    """Asked for by a test whose runs draw their curves and write their page: more than half of a tiny run's time."""


@pytest.fixture(autouse=True)
def _whole(request, monkeypatch):
    """What a test replaces in this process is put back."""
    monkeypatch.setattr(_Run, "_step", _Run._step)
    if "pages" not in request.fixturenames:
        monkeypatch.setattr(Joint, "report", lambda *rest: None)


# --- what is left -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(shared_colours, selection, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    return train(tiny(), shared_colours, selection, out=out, seed=3, device="cpu", options=Options(log_steps=4))


def test_a_run_is_one_of_classification_and_says_what_it_was_learnt_from(finished, shared_colours, selection):
    record = json.loads((finished.folder / "run.json").read_text())
    assert (record["task"], record["status"]) == ("classification", "finished")
    held = record["data"]["pseudo"]
    assert (held["rows"], held["draws"], held["step"]) == (15, 21, {"labelled": 4, "pseudo": 4})
    assert (held["source"], held["teacher_sha256"]) == (str(selection), "1" * 64)
    assert (held["ratio"], held["labels"], held["temperature"]) == (1.0, "soft", 1.0)
    assert held["fingerprint"] == record["data"]["fingerprint"]["pseudo"]
    assert held["held_out_pictures_excluded"]
    page = (finished.folder / "report.html").read_text()
    for said in (
        "pseudo.draws",
        "21",
        str(selection),
        "pseudo.teacher_sha256",
        "pseudo.held_out_pictures_excluded",
        "classes seen",
    ):
        assert said in page
    assert evaluate_run(finished.folder, shared_colours, device=CPU).scores.top1_frac == finished.scores.top1_frac


def test_the_numbers_of_both_kinds_are_in_the_log_and_in_the_history(finished):
    names = ("loss_labelled", "loss_pseudo", "pseudo_agree_frac", "predicted_classes")
    lines = [line for line in logged(finished.folder) if "loss" in line]
    assert [line["step"] for line in lines] == [3, 5, 7, 11]
    for row in (*lines, *finished.history):
        assert 0 < row["loss_labelled"] < 10
        assert 0 < row["loss_pseudo"] < 10
        assert 0 <= row["pseudo_agree_frac"] <= 1
        assert 1 <= row["predicted_classes"] <= 3
    for row in finished.history:
        assert row["pseudo_passes"] == 24 / 21  # six steps of four draws
        assert row["train_loss"] == pytest.approx((row["loss_labelled"] + row["loss_pseudo"]) / 2)
        assert (row["train_top1_frac"] * 24) % 1 == pytest.approx(0)  # of the 24 labelled pictures
    for name in names[:3]:  # a line is of the steps since the one before: 4, then 2 of the first epoch
        first, second = (line[name] for line in lines[:2])
        assert (4 * first + 2 * second) / 6 == pytest.approx(finished.history[0][name])


def test_a_student_that_sees_few_classes_after_the_warm_up_is_warned_of_once(
    shared_colours, unlabelled_shards, tmp_path, capsys, pages
):
    rows = np.arange(12)
    one = {"id": rows, "label": rows % 3, "row": rows, "top_class": (rows % 3)[:, None], "top_prob": np.ones((12, 1))}
    spread = write_selection(tmp_path / "s", unlabelled_shards, one, classes=["blue", "green", "red"])
    recipe = tiny(epochs=3, lr_per_256=0.01, warmup_epochs=1.0)
    how = {"unchecked_overlap": True, "device": "cpu"}
    forward = LambdaResNet.forward
    with pytest.MonkeyPatch.context() as patch:  # a student that sees one class everywhere
        patch.setattr(
            LambdaResNet,
            "forward",
            lambda self, x: forward(self, x) * 1e-3 + torch.tensor([9.0, 0, 0], device=x.device),
        )
        result = train(recipe, shared_colours, spread, out=tmp_path / "run", **how)
    assert [row["predicted_classes"] for row in result.history] == [1.0] * 3
    said = [line for line in capsys.readouterr().err.splitlines() if "collapsing" in line]
    assert len(said) == 1  # once
    assert "in epoch 2 the student saw the pseudo-labelled pictures in 1.0 classes" in said[0]  # epoch 1 is the warm-up
    assert "their labels are in 3.0" in said[0]
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert [f"lambdanets: {warning}" for warning in record["warnings"]] == said
    assert record["warnings"][0][:60] in (tmp_path / "run/report.html").read_text()
    train(tiny(epochs=1), shared_colours, spread, out=tmp_path / "other", **how)
    assert "collapsing" not in capsys.readouterr().err


# --- what it survives -------------------------------------------------------------------------------------------------


def note_ids(place):
    step = _Run._step

    def spy(self, batch, wait_s):
        with open(f"{place}.{self.ranks.rank}", "a") as file:
            file.write(json.dumps([self.at.step, batch.ids]) + "\n")
        step(self, batch, wait_s)

    _Run._step = spy


def ids_of(place, ranks=1):
    """Step -> the ids of all ranks; a step that was done again had the same."""
    found = {}
    for rank in range(ranks):
        own = {}
        with open(f"{place}.{rank}") as file:
            for step, ids in map(json.loads, file):
                assert own.setdefault(step, ids) == ids
        for step, ids in own.items():
            found.setdefault(step, []).extend(ids)
    return found


def kill_at(wanted):
    step = _Run._step

    def spy(self, batch, wait_s):
        if self.at.step == wanted:
            os.kill(os.getpid(), signal.SIGKILL)
        step(self, batch, wait_s)

    _Run._step = spy


def run_to(recipe, data, selection, out, mixture=None, **how):
    """Train to the end; gives everything that is left, as named tensors, and the history without times."""
    ends = {}
    finish = _Run._finish

    def spy(self, scores):
        ends["state"], ends["history"] = self.learner.state(), self.at.history
        return finish(self, scores)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Run, "_finish", spy)
        patch.setattr(_Run, "_step", _Run._step)
        note_ids(out.parent / f"{out.name}.ids")
        train(recipe, data, selection, mixture, out=out, seed=3, device="cpu", options=Options(log_steps=1), **how)
    tensors, tree = flatten(ends["state"])
    timed = {"train_s", "images_per_s", "data_wait_s"}
    history = [{k: v for k, v in row.items() if k not in timed} for row in ends["history"]]
    lines = [{k: v for k, v in line.items() if k not in timed} for line in logged(out)]
    return tensors, json.dumps(tree), history, lines, ids_of(out.parent / f"{out.name}.ids")


def killed(recipe, data, selection, out, mixture, step, how):
    note_ids(out.parent / f"{out.name}.ids")
    kill_at(step)
    options = Options(save_steps=2, save_minutes=0, log_steps=1)
    train(recipe, data, selection, mixture, out=out, seed=3, device="cpu", resume=True, options=options, **how)


def same(one, other):
    assert list(one[0]) == list(other[0])
    assert [name for name in one[0] if not torch.equal(one[0][name], other[0][name])] == []
    assert one[1:] == other[1:]


@pytest.mark.parametrize(
    ("changes", "mixture", "kills", "how"),
    [
        ({}, Mixture(), (4, 9), ({}, {"workers": 2}, {"workers": 1})),  # 24 draws an epoch: passes of 21 end inside
        (
            {"optimizer": "adamw", "lr_per_256": 0.1, "accumulation": 3, "mixup_alpha": 0.2},
            Mixture(ratio=3, labels="hard"),
            (5, 14),
            ({"workers": 1}, {}, {}),
        ),
    ],
    ids=["soft", "hard in three parts, mixed"],
)
def test_a_killed_run_ends_as_the_undisturbed_one_with_any_workers(
    changes, mixture, kills, how, shared_colours, selection, tmp_path, children
):
    recipe, out = tiny(**changes), tmp_path / "run"
    whole = run_to(recipe, shared_colours, selection, tmp_path / "whole", mixture)
    for step, these in zip(kills, how, strict=False):
        child = children.start(killed, recipe, shared_colours, selection, out, mixture, step, these)
        assert child.wait() == -signal.SIGKILL
    same(whole, run_to(recipe, shared_colours, selection, out, mixture, resume=True, **how[-1]))
    assert len(json.loads((out / "run.json").read_text())["starts"]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 3])
def test_twelve_kills_at_random_steps(accumulation, shared_colours, selection, tmp_path, children):
    recipe, out, draw = tiny(accumulation=accumulation, epochs=10), tmp_path / "run", random.Random(0)
    mixture = Mixture(temperature=0.5)
    whole = run_to(recipe, shared_colours, selection, tmp_path / "whole", mixture)
    step = 0
    for _ in range(12):
        step += draw.randint(3, 5)  # beyond the checkpoint, which comes every 2 steps
        how = {"workers": draw.randrange(3)}
        child = children.start(killed, recipe, shared_colours, selection, out, mixture, step, how)
        assert child.wait() == -signal.SIGKILL
    same(whole, run_to(recipe, shared_colours, selection, out, mixture, resume=True))
    assert len(json.loads((out / "run.json").read_text())["starts"]) == 13


def on_ranks(recipe, data, selection, out):
    note_ids(out.parent / f"{out.name}.ids")
    Joint.report = lambda *rest: None
    found = train(recipe, data, selection, Mixture(), out=out, seed=3, device="cpu", options=Options(log_steps=1))
    return [row["train_loss"] for row in found.history]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_see_in_each_step_what_one_process_does(ranks, shared_colours, selection, tmp_path, children):
    recipe = tiny(batch_norm="sync", drop_rate=0.0, drop_path_rate=0.0, precision="float64", epochs=1)
    want = on_ranks(recipe, shared_colours, selection, tmp_path / "one")
    group = children.ranks(ranks, on_ranks, recipe, shared_colours, selection, tmp_path / "many")
    for child in group:
        assert child.gave() == pytest.approx(want, rel=1e-9)
    assert ids_of(tmp_path / "many.ids", ranks) == ids_of(tmp_path / "one.ids")
    assert json.loads((tmp_path / "many/run.json").read_text())["history"][0]["predicted_classes"] >= 1


def resumed(recipe, data, selection, out):
    note_ids(out.parent / "resumed.ids")
    Joint.report = lambda *rest: None
    train(recipe, data, selection, Mixture(), out=out, seed=3, device="cpu", resume=True)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks_and_the_same_pictures(
    shared_colours, selection, tmp_path, children
):
    whole = run_to(tiny(), shared_colours, selection, tmp_path / "whole")[4]
    args = (tiny(), shared_colours, selection, tmp_path / "run")
    assert children.start(killed, *args, Mixture(), 7, {}).wait() == -signal.SIGKILL
    for child in children.ranks(2, resumed, *args):
        assert child.wait(240) == 0
    later = ids_of(tmp_path / "resumed.ids", 2)
    assert len(later) >= 5
    assert all(whole[step] == ids for step, ids in later.items())


def test_an_unreadable_picture_without_a_label_is_replaced_by_another_with_its_own_label(
    shared_colours, selection, tmp_path, monkeypatch
):
    from lambdanets.errors import BadImage

    load = ShardImages.load

    def broken(self, index):
        if index == 5:  # row 4 of the selection
            raise BadImage(self.names[index], "it is torn")
        return load(self, index)

    monkeypatch.setattr(ShardImages, "load", broken)
    run_to(tiny(), shared_colours, selection, tmp_path / "run")
    bad = [json.loads(line) for line in (tmp_path / "run/bad_samples.jsonl").read_text().splitlines()]
    assert [line["reason"] for line in bad] == ["it is torn"]
    assert bad[0]["name"].startswith("pseudo:")
    ids = [index for step in ids_of(tmp_path / "run.ids").values() for index in step]
    assert 24 + 4 not in ids
    assert sum(index < 24 for index in ids) == 2 * 24  # labelled ones are never a substitute


def test_each_kind_has_its_own_bound_of_unreadable_pictures(shared_colours, selection, tmp_path, monkeypatch):
    from lambdanets.errors import BadImage

    load, torn = ShardImages.load, {5, 8}

    def broken(self, index):
        if index in torn:
            raise BadImage(self.names[index], "it is torn")
        return load(self, index)

    monkeypatch.setattr(ShardImages, "load", broken)
    with pytest.raises(BadData, match="2 of 15 pseudo-labelled images cannot be read, 1 allowed"):
        train(tiny(), shared_colours, selection, out=tmp_path / "run", device="cpu")


# --- what it refuses --------------------------------------------------------------------------------------------------


def refused(recipe, data, selection, kind=BadData, **how):
    with pytest.raises(kind) as told:
        train(recipe, data, selection, **{"out": how.pop("out"), "device": "cpu", **how})
    return str(told.value)


def test_a_selection_from_which_the_held_out_pictures_were_not_kept_is_refused_unless_told(
    shared_colours, unlabelled_shards, tmp_path
):
    plain = a_selection(tmp_path / "plain", unlabelled_shards)
    said = refused(tiny(), shared_colours, plain, out=tmp_path / "run")
    assert "was selected without --exclude, so held-out pictures" in said
    assert f"--exclude {shared_colours}, or say --unchecked-overlap" in said
    other = a_selection(tmp_path / "other", unlabelled_shards, exclude=[{"held_out": "f" * 64, "train": None}])
    said = refused(tiny(), shared_colours, other, out=tmp_path / "run")
    assert "with --exclude of other pictures than these" in said
    assert not (tmp_path / "run").exists()
    train(tiny(epochs=1), shared_colours, plain, out=tmp_path / "run", device="cpu", unchecked_overlap=True)
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert not record["data"]["pseudo"]["held_out_pictures_excluded"]
    assert "nobody looked for held-out pictures" in record["data"]["how"]


def test_classes_in_another_order_are_matched_by_name_and_others_are_refused_by_name(
    shared_colours, unlabelled_shards, selection, tmp_path, capsys
):
    exclude = [excluded(shared_colours)]
    theirs = ["red", "blue", "green"]  # class 0 of the data is their 1
    to_theirs = np.array([theirs.index(name) for name in ("blue", "green", "red")])
    columns = {name: np.load(selection / f"{name}.npy") for name in ("id", "label", "top_class", "top_prob", "row")}
    turned = {**columns, "label": to_theirs[columns["label"]], "top_class": to_theirs[columns["top_class"]]}
    turned = write_selection(tmp_path / "turned", unlabelled_shards, turned, classes=theirs, exclude=exclude)
    recipe = tiny(epochs=1)
    want = run_to(recipe, shared_colours, selection, tmp_path / "a")
    capsys.readouterr()
    same(want[:2], run_to(recipe, shared_colours, turned, tmp_path / "b")[:2])
    assert "the same classes in another order, and they are matched by name" in capsys.readouterr().out
    renamed = a_selection(tmp_path / "renamed", unlabelled_shards, classes=["blue", "lime", "red"], exclude=exclude)
    said = refused(recipe, shared_colours, renamed, out=tmp_path / "run")
    assert "only the teacher has 'lime'" in said
    assert "only the data has 'green'" in said


@pytest.fixture
def unfinished(shared_colours, selection, tmp_path, children):
    """A run of which some steps are saved, and its selection, which a test may move or change."""
    own = shutil.copytree(selection, tmp_path / "selection")
    args = (tiny(), shared_colours, own, tmp_path / "run", Mixture(), 7, {})
    assert children.start(killed, *args).wait() == -signal.SIGKILL
    return tmp_path / "run", own


def test_a_run_does_not_go_on_with_another_selection_or_another_mixture(
    unfinished, shared_colours, unlabelled_shards, tmp_path
):
    out, own = unfinished
    changed = a_selection(tmp_path / "other", unlabelled_shards, exclude=[excluded(shared_colours)], per_class=9)
    how = {"out": out, "seed": 3, "resume": True}
    said = refused(tiny(), shared_colours, changed, BadRun, **how)
    assert "is another selection than the run in" in said
    assert "15 pictures in 21 draws" in said
    said = refused(tiny(), shared_colours, own, BadRun, mixture=Mixture(ratio=3, labels="hard"), **how)
    assert "--pseudo-ratio 1.0, not 3; --pseudo-labels soft, not hard" in said
    with pytest.raises(BadRun, match="learns from pseudo-labels too: give --pseudo SELECTION as well"):
        classification.train(tiny(), shared_colours, out=out, seed=3, resume=True, device="cpu")
    column = own / "top_prob.npy"
    held = bytearray(column.read_bytes())
    held[-1] ^= 1
    column.write_bytes(held)
    assert "top_prob.npy: its sha256 is" in refused(tiny(), shared_colours, own, **how)


def test_a_run_without_pseudo_labels_does_not_go_on_with_them(shared_colours, selection, tmp_path):
    classification.train(tiny(epochs=1), shared_colours, out=tmp_path / "run", device="cpu")
    said = refused(tiny(epochs=1), shared_colours, selection, BadRun, out=tmp_path / "run", resume=True)
    assert "learns from labelled pictures alone: leave --pseudo out" in said


def test_a_selection_and_pictures_that_moved_with_equal_content_are_taken_and_said(
    unfinished, shared_colours, selection, unlabelled_shards, tmp_path, capsys
):
    out, own = unfinished
    moved, shards = own.rename(tmp_path / "elsewhere"), shutil.copytree(unlabelled_shards, tmp_path / "shards")
    again = ["train", "--out", str(out), "--resume", "--log-steps", "1", "--device", "cpu"]
    assert main(again) == 2
    assert "is no longer in" in (err := capsys.readouterr().err)
    assert "give --pseudo SELECTION, where it lies now" in err
    assert main([*again, "--pseudo", str(moved), "--pseudo-data", str(shards)]) == 0
    assert f"{moved} is the selection of this run, which lay in {own}" in capsys.readouterr().err
    want = run_to(tiny(), shared_colours, selection, tmp_path / "whole")
    weights = [(place / "weights.safetensors").read_bytes() for place in (out, tmp_path / "whole")]
    assert weights[0] == weights[1]
    lines = [{k: v for k, v in line.items() if k not in ("images_per_s", "data_wait_s")} for line in logged(out)]
    assert lines == want[3]  # what a line says of the steps since the one before, too


def test_the_command_trains_resumes_and_refuses(shared_colours, selection, unlabelled_shards, tmp_path, capsys, pages):
    small = ["--model", "lambda_resnet_tiny", "--image-px", "8", "--epochs", "1", "--device", "cpu"]
    command = ["train", "--data", str(shared_colours), *small]
    joint = [*command, "--pseudo", str(selection), "--batch-images", "8", "--out", str(tmp_path / "run")]
    assert main([*joint, "--pseudo-labels", "hard", "--pseudo-ratio", "3"]) == 0
    said = capsys.readouterr().out
    assert "pseudo-labels: 15 pictures in 21 draws" in said
    assert "6 in a step of 8, hard labels" in said
    held = json.loads((tmp_path / "run/run.json").read_text())
    assert (held["data"]["pseudo"]["ratio"], held["data"]["pseudo"]["labels"]) == (3.0, "hard")
    assert main(["train", "--resume", "--out", str(tmp_path / "run"), "--device", "cpu"]) == 0
    assert "is finished" in capsys.readouterr().out
    assert main(["evaluate", str(tmp_path / "run"), "--data", str(shared_colours), "--device", "cpu"]) == 0
    assert main(["report", str(tmp_path / "run"), "--device", "cpu"]) == 0
    capsys.readouterr()
    for more, answer in (
        (["--pseudo-ratio", "2"], "--pseudo-ratio goes with --pseudo SELECTION: give both"),
        (["--unchecked-overlap"], "--unchecked-overlap goes with --pseudo SELECTION"),
        (["--pseudo", str(tmp_path), "--batch-images", "8"], "holds no selection.json"),
        (["--pseudo", str(selection), "--batch-images", "64"], "give --batch-images 49 at most"),
        (["--pseudo", str(selection), "--batch-images", "8", "--pseudo-data", str(shared_colours)], "holds no shards"),
        (
            ["--pseudo", str(selection), "--batch-images", "8", "--pseudo-data", f"stream:{unlabelled_shards}"],
            "streamed",
        ),
        (["--pseudo", str(selection), "--recipe", "detect"], "a detector learns no pseudo-labels"),
    ):
        assert main([*command, *more, "--out", str(tmp_path / "none")]) == 2
        assert answer in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_other_pictures_than_were_selected_from_are_refused(shared_colours, selection, tmp_path):
    from conftest import write_images

    from lambdanets.data.pack import pack

    write_images(tmp_path / "pictures", 8, seed=70)
    pack(tmp_path / "pictures", tmp_path / "shards", unlabelled=True)
    said = refused(tiny(), shared_colours, selection, pictures=tmp_path / "shards", out=tmp_path / "run")
    assert "holds other pictures than those that" in said


def test_soft_labels_of_a_ranking_are_refused_and_hard_ones_taken(shared_colours, unlabelled_shards, tmp_path):
    ranked = a_selection(tmp_path / "s", unlabelled_shards, rule="rank", exclude=[excluded(shared_colours)])
    assert "--pseudo-labels hard" in refused(tiny(), shared_colours, ranked, BadRecipe, out=tmp_path / "run")
    train(tiny(epochs=1), shared_colours, ranked, Mixture(labels="hard"), out=tmp_path / "run", device="cpu")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: (s / "row.npy").unlink(), "row.npy is missing"),
        (lambda s: (s / "selection.json").write_text("{}"), "is no selection of this version: its format is"),
        (lambda s: rewritten(s, rows=14), "holds uint64"),
        (lambda s: rewritten(s, classes=["a", "a"]), "'classes' should be"),
        (lambda s: rewritten(s, classes=["blue", "green"]), "has numbers outside 0 to 1"),
        (lambda s: rewritten(s, top=0), "its 'top' is 0"),
        (lambda s: rewritten(s, exclude=[{}]), "'held_out'"),
    ],
    ids=[
        "a column is gone",
        "no selection",
        "too few rows",
        "a class twice",
        "a class too many",
        "none kept",
        "exclude",
    ],
)
def test_a_damaged_selection_is_refused_with_what_is_wrong(change, said, shared_colours, selection, tmp_path):
    own = shutil.copytree(selection, tmp_path / "selection")
    change(own)
    assert said in refused(tiny(), shared_colours, own, out=tmp_path / "run")


def rewritten(place, **changes):
    held = json.loads((place / "selection.json").read_text())
    (place / "selection.json").write_text(json.dumps({**held, **changes}))


# --- fair comparisons -------------------------------------------------------------------------------------------------


def test_a_baseline_reads_no_picture_without_a_label_and_evaluation_reads_none(
    shared_colours, unlabelled_shards, selection, tmp_path, monkeypatch
):
    from lambdanets.data import shards
    from lambdanets.pseudo_labels import task

    reads, load = [], ShardImages.load

    def counted(self, index):
        reads.append(index)
        return load(self, index)

    def opened(*args, **how):
        reads.append("opened")
        return shards.open_pictures(*args, **how)

    monkeypatch.setattr(ShardImages, "load", counted)
    monkeypatch.setattr(task, "open_pictures", opened)
    beside = shutil.copytree(shared_colours, tmp_path / "data")
    shutil.copytree(unlabelled_shards, beside / "unlabelled")
    alone = classification.train(tiny(), beside, out=tmp_path / "alone", device="cpu")
    assert reads == []
    assert len(alone.history) == 2
    both = train(tiny(), shared_colours, selection, out=tmp_path / "both", device="cpu")
    assert reads[0] == "opened"
    assert len(reads) - 1 == 2 * 6 * 4  # four in a step: none is read to evaluate
    before = len(reads)
    scores = evaluate_run(tmp_path / "both", shared_colours, device=CPU).scores
    assert (scores.n, len(reads)) == (9, before)
    assert scores.top1_frac == both.scores.top1_frac
