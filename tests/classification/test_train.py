"""The main job: what moves the weights, what is counted, what is written, and what is refused before anything is."""

import dataclasses
import errno
import importlib.util
import json
import math
import os
import shutil
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import lambdanets
import lambdanets.classification.task
import lambdanets.data
import lambdanets.files
import lambdanets.runs.folder
import lambdanets.training.learner
import lambdanets.training.loop
import lambdanets.training.preflight
from lambdanets.classification.demo import demo
from lambdanets.classification.plots import curves_png
from lambdanets.classification.predict import predict
from lambdanets.classification.run import open_run
from lambdanets.classification.scores import Confusion, evaluate
from lambdanets.classification.train import train
from lambdanets.cli import main
from lambdanets.data.batches import Batches
from lambdanets.data.images import Images
from lambdanets.data.transforms import View
from lambdanets.errors import BadData, BadImage, BadRecipe, BadRun, NonFiniteLoss
from lambdanets.files import write_atomically
from lambdanets.recipes import choose
from lambdanets.recipes.digits import digits
from lambdanets.recipes.imagenet import layer_comparison, pareto
from lambdanets.runs.folder import choose_folder
from lambdanets.runs.weights import save_weights
from lambdanets.training import optim
from lambdanets.training.ema import RunningAverage

CPU = torch.device("cpu")


def tiny(**changes):
    """A run of 3 epochs of 3 steps on `colours`, a second long."""
    recipe = choose("folder", model="lambda_resnet_tiny", image_px=8, epochs=3, batch_images=8)
    return dataclasses.replace(recipe, eval_batch_images=4, **changes)


def weights_of(folder):
    return safetensors.torch.load_file(folder / "weights.safetensors")


def record_of(folder):
    return json.loads((folder / "run.json").read_text())


# --- optim ----------------------------------------------------------------------------------------------------------


def test_the_rate_is_linear_then_a_cosine_to_zero():
    def rate(step):
        return optim.learning_rate(step, 1.6, warmup_steps=10, total_steps=110)

    assert [rate(s) for s in (0, 4, 9)] == pytest.approx([0.16, 0.8, 1.6])
    assert rate(10) == pytest.approx(1.6)
    assert rate(60) == pytest.approx(0.8)
    assert rate(35) == pytest.approx(1.6 * (1 + math.cos(math.pi / 4)) / 2)
    assert rate(110) == pytest.approx(0, abs=1e-12)
    assert 0 < rate(109) < 1e-3
    assert optim.learning_rate(0, 0.1, warmup_steps=0, total_steps=1) == 0.1


def test_tables_biases_and_norms_do_not_decay():
    model = lambdanets.create_model("lambda_resnet_tiny", num_classes=3, share_tables=True)
    still, decaying = optim.parameter_groups(model, 0.05)
    assert (still["weight_decay"], decaying["weight_decay"]) == (0.0, 0.05)
    names = {id(p): name for name, p in model.named_parameters()}
    still_names = {names[id(p)] for p in still["params"]}
    decaying_names = {names[id(p)] for p in decaying["params"]}
    assert still_names | decaying_names == set(names.values())
    assert not still_names & decaying_names
    assert len(still["params"]) + len(decaying["params"]) == len(names)
    assert decaying_names == {n for n, p in model.named_parameters() if p.ndim > 1 and not n.endswith("table")}
    assert sum(n.endswith("table") for n in still_names) == 3


def test_the_optimiser_is_the_recipes():
    model = nn.Linear(3, 2)
    sgd = optim.optimizer(model, layer_comparison())
    assert isinstance(sgd, torch.optim.SGD)
    assert (sgd.defaults["momentum"], sgd.defaults["nesterov"], sgd.defaults["lr"]) == (0.9, False, 1.6)
    adamw = optim.optimizer(model, digits())
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.defaults["betas"] == (0.9, 0.999)
    assert [g["weight_decay"] for g in adamw.param_groups] == [0.0, digits().weight_decay]


class TwoUsers(nn.Module):
    """One table under two names, a batch norm, and a whole number."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2)
        self.b.weight = self.a.weight


def test_the_average_follows_its_definition_and_counts_a_shared_table_once():
    model = TwoUsers()
    average = RunningAverage(model, 0.9)
    want_weight, want_mean = model.a.weight.detach().clone(), model.norm.running_mean.clone()
    for step in range(100):
        with torch.no_grad():
            model.a.weight.add_(torch.randn(2, 2))
            model.norm.running_mean.add_(torch.randn(2))
            model.norm.num_batches_tracked += 1
        average.update(model, step)
        decay = min(0.9, (1 + step) / (10 + step))
        want_weight = decay * want_weight + (1 - decay) * model.a.weight.detach()
        want_mean = decay * want_mean + (1 - decay) * model.norm.running_mean
    assert average.module.a.weight is average.module.b.weight
    torch.testing.assert_close(average.module.a.weight.detach(), want_weight)
    torch.testing.assert_close(average.module.norm.running_mean, want_mean)
    assert average.module.norm.num_batches_tracked == 100
    assert not average.module.training


def test_a_decay_of_zero_keeps_the_last_weights():
    model = TwoUsers()
    average = RunningAverage(model, 0.0)
    with torch.no_grad():
        model.a.weight.fill_(7.0)
    average.update(model, 50)
    assert torch.equal(average.module.a.weight, model.a.weight)


# --- evaluate -------------------------------------------------------------------------------------------------------


class Grey(Images):
    """Images whose grey level is a class: what a model of one line can read."""

    def load(self, index):
        return Image.new("L", (4, 4), self.levels[index])

    @staticmethod
    def of(levels, labels, classes):
        images = Grey(tuple(map(str, range(classes))), [f"grey/{i}" for i in range(len(levels))], labels)
        object.__setattr__(images, "levels", levels)
        return images


class ByLevel(nn.Module):
    """Logits that peak at the class whose number is the grey level."""

    def __init__(self, classes):
        super().__init__()
        self.classes = classes

    def forward(self, x):
        level = x.mean((1, 2, 3)) * 255
        return -((level[:, None] - torch.arange(self.classes, dtype=x.dtype)) ** 2)


@pytest.mark.parametrize("batch_images", [1, 3, 7, 50])
def test_each_image_is_counted_once_whatever_the_batch(batch_images):
    levels = [0, 1, 2, 3, 4, 5, 6, 6, 0, 0, 0]
    labels = [0, 1, 2, 3, 4, 5, 6, 5, 6, 1, 0]
    images = Grey.of(levels, labels, classes=7)
    batches = Batches(images, View(4, 1, (0.0,), (1.0,), 1.0), batch_images=batch_images, training=False)
    model = ByLevel(7).train()
    scores = evaluate(model, batches, classes=7, device=CPU)
    assert model.training
    assert (scores.n, scores.errors, scores.ids, scores.predicted) == (11, 3, list(range(11)), levels)
    assert scores.top1_frac == 8 / 11
    assert scores.top5_frac == 10 / 11  # only "0 taken for 6" is further than five classes away
    want = torch.zeros(7, 7, dtype=torch.int64)
    for label, level in zip(labels, levels, strict=True):
        want[label, level] += 1
    assert scores.confusion.dense() == want.tolist()
    logits = model(torch.tensor(levels).float()[:, None, None, None].expand(-1, 1, 4, 4) / 255)
    assert scores.loss == pytest.approx(F.cross_entropy(logits, torch.tensor(labels)).item(), rel=1e-5)
    assert str(scores) == "8 of 11 right: top-1 72.73%, top-5 90.91%"


def test_top5_needs_more_than_five_classes():
    batches = Batches(Grey.of([0, 1], [0, 1], 5), View(4, 1, (0.0,), (1.0,), 1.0), batch_images=2, training=False)
    assert evaluate(ByLevel(5), batches, classes=5, device=CPU).top5_frac is None


def test_predict_keeps_the_order_names_bad_files_and_holds_one_batch(tmp_path):
    taken = []

    def sources():
        for i in range(10):
            path = tmp_path / f"{i}.png"
            if i in (2, 7):
                path.write_bytes(b"nothing")
            else:
                Image.new("L", (4, 4), i % 3).save(path)
            taken.append(i)
            yield path

    found = predict(ByLevel(3), View(4, 1, (0.0,), (1.0,), 1.0), sources(), device=CPU, batch_images=4)
    first = next(found)
    assert taken == [0, 1, 2, 3]
    rest = [first, *found]
    assert [f.image for f in rest] == [str(tmp_path / f"{i}.png") for i in range(10)]
    for i, one in enumerate(rest):
        if i in (2, 7):
            assert one.probabilities is None
            assert "is no JPEG" in one.error
        else:
            assert one.error is None
            assert sum(one.probabilities) == pytest.approx(1)
            assert one.top(("a", "b", "c"), 1)[0][0] == "abc"[i % 3]


# --- a run ----------------------------------------------------------------------------------------------------------


def test_a_run_leaves_weights_numbers_and_a_picture(colours, tmp_path):
    result = train(tiny(), colours, out=tmp_path / "run", seed=5)
    folder = result.folder
    written = {"weights.safetensors", "run.json", "curves.png", "report.html", "log.jsonl", ".lock"}
    assert {p.name for p in folder.iterdir()} == written

    record = record_of(folder)
    assert record["status"] == "finished"
    assert record["recipe"] == json.loads(json.dumps(dataclasses.asdict(tiny())))
    assert record["classes"] == ["blue", "green", "red"]
    assert (record["data"]["train_images"], record["data"]["val_images"]) == (24, 9)
    assert record["data"]["source"] == str(colours)
    assert "as given" in record["data"]["how"]
    assert (record["seed"], record["device"]) == (5, "cpu")
    assert record["versions"]["torch"] == torch.__version__
    assert set(record["versions"]) == {"python", "torch", "torchvision", "timm", "lambdanets", "lambdanets_commit"}
    assert [row["epoch"] for row in record["history"]] == [1, 2, 3]
    assert record["history"] == result.history
    assert record["result"]["n"] == result.scores.n == 9
    assert record["result"]["top1_frac"] == result.scores.top1_frac
    assert record["result"]["confusion"] == result.scores.confusion.json()

    model = lambdanets.create_model("lambda_resnet_tiny", num_classes=3, drop_rate=0.2)
    model.load_state_dict(weights_of(folder))  # strict
    with Image.open(folder / "curves.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 500

    run = open_run(folder)
    batches = Batches(lambdanets.data.folder(colours).val, run.view, batch_images=9, training=False)
    again = evaluate(run.model, batches, classes=3, device=CPU)
    assert again.confusion == result.scores.confusion
    assert again.loss == pytest.approx(result.scores.loss, rel=1e-5)


def test_a_run_that_is_judged_after_its_last_epoch_only_ends_with_its_picture_and_page(colours, tmp_path):
    result = train(dataclasses.replace(tiny().with_epochs(3), eval_epochs=9), colours, out=tmp_path / "run")
    assert [("val_loss" in row) for row in result.history] == [False, False, True]
    assert (tmp_path / "run" / "curves.png").exists()
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize("names", [("$5 bill", "$x^$", "a_b", "猫", "\n"), [f"class {i}" for i in range(40)]])
def test_the_picture_takes_any_class_name_and_any_number_of_classes(names):
    history = [{"epoch": 1, "train_loss": 2.0, "val_loss": 1.0, "train_top1_frac": 0.1, "val_top1_frac": 0.2}]
    counts = [[int(i == j) for j in range(len(names))] for i in range(len(names))]
    pictures = [curves_png(history, Confusion.read(c, len(names)), names, "title") for c in (counts, counts[::-1])]
    assert all(png.startswith(b"\x89PNG") for png in pictures)
    assert pictures[0] != pictures[1]


def test_it_learns(colours, tmp_path):
    recipe = dataclasses.replace(tiny(augment="none", randaugment_ops=0, drop_rate=0.0).with_epochs(12), lr_per_256=1.0)
    result = train(recipe, colours, out=tmp_path / "run")
    assert result.history[-1]["train_loss"] < 0.8 * result.history[0]["train_loss"]
    assert result.scores.errors == 0


def test_the_same_seed_gives_the_same_bits_with_any_workers_and_another_seed_does_not(colours, tmp_path):
    recipe = tiny(drop_path_rate=0.2)
    before = torch.get_rng_state()
    runs = [
        train(recipe, colours, out=tmp_path / str(i), seed=seed, workers=workers)
        for i, (seed, workers) in enumerate([(3, 0), (3, 0), (3, 2), (4, 0)])
    ]
    assert torch.equal(torch.get_rng_state(), before)  # the caller's randomness is untouched
    bits = [(r.folder / "weights.safetensors").read_bytes() for r in runs]
    assert bits[0] == bits[1] == bits[2]
    assert bits[0] != bits[3]
    losses = [[row["train_loss"] for row in r.history] for r in runs]
    assert losses[0] == losses[1] == losses[2]
    assert runs[0].scores == runs[2].scores


def test_the_rates_of_a_run_are_the_schedules(colours, tmp_path, monkeypatch):
    used = []
    step = torch.optim.SGD.step

    def spy(self, *args):
        used.append(self.param_groups[0]["lr"])
        assert len({g["lr"] for g in self.param_groups}) == 1
        return step(self, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    train(tiny(warmup_epochs=1.0), colours, out=tmp_path / "run")
    peak = 0.1 * 8 / 256
    assert used == [optim.learning_rate(s, peak, warmup_steps=3, total_steps=9) for s in range(9)]
    assert max(used) == pytest.approx(peak)


def test_a_folder_without_val_is_split_and_the_run_says_how(colours, tmp_path, capsys):
    result = train(tiny(), colours / "train", out=tmp_path / "run")
    assert "held out by a hash" in record_of(result.folder)["data"]["how"]
    assert "held out by a hash" in capsys.readouterr().out
    assert result.scores.n == 3


def test_ignored_files_are_counted_in_the_output_and_the_record(colours, tmp_path, capsys):
    (colours / "train" / "red" / ".DS_Store").write_bytes(b"x")
    result = train(tiny(epochs=1, warmup_epochs=0.0), colours, out=tmp_path / "run")
    assert "ignored 1: hidden" in capsys.readouterr().out
    assert record_of(result.folder)["data"]["ignored"]["hidden or system"][0] == 1


@pytest.mark.parametrize("recipe", [layer_comparison(small=True), pareto(152, 224, small=True)], ids=lambda r: r.name)
def test_the_papers_recipes_run_in_their_small_form(recipe, colours, tmp_path):
    result = train(recipe, colours, out=tmp_path / "run")
    assert result.scores.n == 9
    assert all(math.isfinite(row["train_loss"]) for row in result.history)
    assert len(result.history) == 5


def test_a_quick_run_on_the_digits_gets_nine_of_ten_right(tmp_path):
    recipe = dataclasses.replace(digits().with_epochs(4), image_px=8)
    scores = train(recipe, out=tmp_path / "run").scores
    assert scores.n == 360
    assert scores.top1_frac >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_digits_recipe_gets_985_of_1000_right(seed, tmp_path):
    result = train(digits(), out=tmp_path / "run", seed=seed)
    assert result.scores.n == 360
    assert result.scores.top1_frac >= 0.985


def test_the_demo_predicts_files_as_the_evaluation_did(tmp_path, capsys):
    recipe = dataclasses.replace(digits().with_epochs(1), image_px=4)
    folder = demo(tmp_path / "run", recipe=recipe)
    out = capsys.readouterr().out
    files = sorted((folder / "digits").iterdir())
    assert len(files) == 20
    run = open_run(folder)
    test = lambdanets.data.digits()[1]
    scores = evaluate(run.model, Batches(test, run.view, batch_images=360, training=False), classes=10, device=CPU)
    right = 0
    for found in predict(run.model, run.view, files, device=CPU):
        label, number = found.image.rsplit("/", 1)[1].removesuffix(".png").split("-")
        at = test.names.index(f"digits/{number}")
        assert label == str(test.labels[at])
        assert found.top(run.classes, 1)[0][0] == str(scores.predicted[at])
        assert found.text(run.classes, 3) in out
        right += scores.predicted[at] == test.labels[at]
    assert f"{right} of these 20 are right; of all held-out digits {scores}" in out


# --- what stops a run -----------------------------------------------------------------------------------------------


def poison(monkeypatch, at_step, how):
    """From training step `at_step` on (0-based), `how(loss)` replaces the loss."""
    steps = iter(range(1_000))

    def cross_entropy(*args, **kwargs):
        loss = F.cross_entropy(*args, **kwargs)
        return how(loss) if next(steps) >= at_step else loss

    monkeypatch.setattr(lambdanets.classification.task, "F", SimpleNamespace(cross_entropy=cross_entropy))


def bad_gradient(loss):
    loss.register_hook(lambda grad: grad * math.inf)
    return loss


@pytest.mark.parametrize("how", [lambda loss: loss * math.nan, lambda loss: loss * math.inf, bad_gradient])
def test_a_loss_that_is_not_finite_stops_there_and_keeps_the_last_epoch(how, colours, tmp_path, monkeypatch):
    good = train(tiny(), colours, out=tmp_path / "good")
    kept = {}
    save = lambdanets.training.loop.save_weights
    monkeypatch.setattr(
        lambdanets.training.loop,
        "save_weights",
        lambda model, path: (save(model, path), kept.update(last=path.read_bytes())),
    )
    poison(monkeypatch, 7, how)  # the second step of the third epoch
    folder = tmp_path / "run"
    with pytest.raises(NonFiniteLoss) as caught:
        train(tiny(), colours, out=folder)
    text = "\n".join([str(caught.value), *caught.value.__notes__])
    assert "step 7" in text
    assert "epoch 3 of 3" in text
    assert f"the weights of epoch 2 are in {folder / 'weights.safetensors'}" in text
    record = record_of(folder)
    assert record["status"] == "stopped"
    assert record["non_finite"]["step"] == 7
    assert [row["train_loss"] for row in record["history"]] == [row["train_loss"] for row in good.history[:2]]
    named = record["non_finite"]["images"]
    assert len(named) == 8
    assert all((colours / name).is_file() and name in text for name in named)

    assert (folder / "weights.safetensors").read_bytes() == kept["last"]
    model = open_run(folder).model  # refuses weights that are not finite
    batches = Batches(lambdanets.data.folder(colours).val, open_run(folder).view, batch_images=9, training=False)
    assert evaluate(model, batches, classes=3, device=CPU).loss == pytest.approx(good.history[1]["val_loss"], rel=1e-5)


@pytest.fixture
def full_after(monkeypatch):
    """Weights cannot be written after these epochs of this process."""

    def fill(*epochs):
        calls, write = [], lambdanets.training.loop.save_weights

        def save(model, path):
            calls.append(path)
            if len(calls) in epochs:
                raise OSError(errno.ENOSPC, "No space left on device")
            write(model, path)

        monkeypatch.setattr(lambdanets.training.loop, "save_weights", save)

    return fill


def test_a_disk_that_is_full_after_an_epoch_costs_nothing(colours, tmp_path, full_after, capsys):
    undisturbed = train(tiny(), colours, out=tmp_path / "undisturbed")
    full_after(1)
    done = train(tiny(), colours, out=tmp_path / "run")
    said = capsys.readouterr().err
    assert "after epoch 1 a file was not written: No space left on device; no epoch was finished and written" in said
    assert "tried again after the next epoch" in said
    assert [row["train_loss"] for row in done.history] == [row["train_loss"] for row in undisturbed.history]
    written = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("undisturbed", "run")]
    assert written[0] == written[1]


def test_weights_that_cannot_be_written_at_the_end_are_an_error_and_a_resumed_run_writes_them(
    colours, tmp_path, full_after
):
    undisturbed = train(tiny(), colours, out=tmp_path / "undisturbed")
    full_after(2, 3)
    with pytest.raises(BadRun, match=r"after epoch 3 a file was not written: No space.*go on with --resume") as caught:
        train(tiny(), colours, out=tmp_path / "run")
    assert "stopped in epoch 3 of 3: the weights of epoch 1 are in" in caught.value.__notes__[0]
    assert record_of(tmp_path / "run")["status"] == "stopped"
    full_after()
    done = train(tiny(), colours, out=tmp_path / "run", resume=True)
    assert done.scores.errors == undisturbed.scores.errors
    written = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("undisturbed", "run")]
    assert written[0] == written[1]


def test_a_report_that_cannot_be_written_is_an_error_and_a_resumed_run_writes_it(colours, tmp_path, monkeypatch):
    def full(*rest):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(lambdanets.classification.task, "write_report", full)
        with pytest.raises(
            BadRun, match=r"all epochs are done, but a file was not written: No space.*of epoch 3 are in"
        ):
            train(tiny(), colours, out=tmp_path / "run")
    assert not (tmp_path / "run" / "report.html").exists()
    train(tiny(), colours, out=tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "report.html").exists()
    assert record_of(tmp_path / "run")["status"] == "finished"


def test_at_most_ten_images_are_named_and_the_rest_is_in_the_record(colours, tmp_path, monkeypatch):
    poison(monkeypatch, 0, lambda loss: loss * math.nan)
    with pytest.raises(NonFiniteLoss, match=r"and 2 more") as caught:
        train(tiny(batch_images=12), colours, out=tmp_path / "run")
    assert "no epoch was finished" in caught.value.__notes__[0]
    assert sum(name in str(caught.value) for name in record_of(tmp_path / "run")["non_finite"]["images"]) == 10
    assert not (tmp_path / "run" / "weights.safetensors").exists()


def test_weights_that_break_in_evaluation_are_not_written(colours, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        return dataclasses.replace(evaluate(*args, **kwargs), loss=math.nan)

    monkeypatch.setattr(lambdanets.classification.task, "evaluate", broken)
    with pytest.raises(NonFiniteLoss, match="held-out images is nan after epoch 1"):
        train(tiny(), colours, out=tmp_path / "run")
    assert not (tmp_path / "run" / "weights.safetensors").exists()


def test_an_interrupted_run_keeps_its_last_epoch(colours, tmp_path, monkeypatch):
    def interrupt(loss):
        raise KeyboardInterrupt

    poison(monkeypatch, 4, interrupt)
    with pytest.raises(KeyboardInterrupt) as caught:
        train(tiny(), colours, out=tmp_path / "run")
    assert "interrupted in epoch 2 of 3: the weights of epoch 1 are in" in caught.value.__notes__[0]
    assert record_of(tmp_path / "run")["status"] == "interrupted"
    assert len(record_of(tmp_path / "run")["history"]) == 1
    assert open_run(tmp_path / "run").classes == ("blue", "green", "red")


def test_a_bad_training_image_is_replaced_counted_and_listed(colours, tmp_path):
    (colours / "train" / "red" / "0.jpg").write_bytes(b"")
    result = train(tiny(), colours, out=tmp_path / "run")
    lines = [json.loads(line) for line in (result.folder / "bad_samples.jsonl").read_text().splitlines()]
    assert [(line["name"], line["reason"]) for line in lines] == [("train/red/0.jpg", "the file is empty")]
    assert record_of(result.folder)["result"]["bad_train_images"] == 1


def test_too_many_bad_training_images_stop_the_run(colours, tmp_path):
    for i in (0, 1):
        (colours / "train" / "red" / f"{i}.jpg").write_bytes(b"<html>")
    with pytest.raises(BadData, match="2 of 24 training images cannot be read") as caught:
        train(tiny(), colours, out=tmp_path / "run")
    assert "holds no weights" in caught.value.__notes__[0]
    assert record_of(tmp_path / "run")["status"] == "stopped"


# --- what is refused before the first step ----------------------------------------------------------------------------


def refuse(error, match, recipe, data, out, **kwargs):
    """The run is refused with that error and leaves nothing behind."""
    before = sorted(out.iterdir()) if out.is_dir() else out.exists()
    with pytest.raises(error, match=match):
        train(recipe, data, out=out, **kwargs)
    assert (sorted(out.iterdir()) if out.is_dir() else out.exists()) == before


def test_a_bad_held_out_image_is_an_error_at_the_start(colours, tmp_path):
    whole = (colours / "val" / "green" / "2.jpg").read_bytes()
    (colours / "val" / "green" / "2.jpg").write_bytes(whole[: len(whole) // 2])
    refuse(BadImage, r"val/green/2\.jpg", tiny(), colours, tmp_path / "run")


def test_a_val_class_unknown_to_train_is_refused(colours, tmp_path):
    (colours / "val" / "red").rename(colours / "val" / "orange")
    refuse(BadData, "orange", tiny(), colours, tmp_path / "run")


def test_a_missing_folder_of_images_is_refused(tmp_path):
    refuse(BadData, "does not exist", tiny(), tmp_path / "none", tmp_path / "run")


@pytest.mark.parametrize("content", ["run.json", "holiday.txt"])
def test_a_folder_that_holds_anything_is_refused_before_any_work(content, tmp_path, monkeypatch):
    out = tmp_path / "run"
    out.mkdir()
    (out / content).write_text("{}")
    monkeypatch.setattr(lambdanets.data, "folder", lambda path: pytest.fail("work was done"))
    refuse(BadRun, "holds another run" if content == "run.json" else "holiday.txt", tiny(), "anything", out)


def test_an_empty_folder_is_taken_and_a_file_is_not(colours, tmp_path):
    (tmp_path / "file").write_text("")
    refuse(BadRun, "is a file", tiny(), colours, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    train(tiny(epochs=1, warmup_epochs=0.0), colours, out=tmp_path / "empty")


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", ["n" * 300, "é" * 200], ids=["letters", "bytes"])
def test_a_name_that_no_disk_takes_is_one_message(name, resume, colours, tmp_path):
    with pytest.raises(BadRun, match="cannot be used"):
        train(tiny(), colours, out=tmp_path / name, resume=resume)


def test_a_run_that_may_not_be_read_is_one_message(colours, tmp_path, monkeypatch, capsys):
    def forbidden(self):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    def no_look(path):
        return forbidden(path) if path == tmp_path / "run.json" else os.stat(path, follow_symlinks=False)

    for where, name, fake in ((os, "lstat", no_look), (lambdanets.runs.folder.Path, "iterdir", forbidden)):
        with monkeypatch.context() as patched:
            patched.setattr(where, name, fake)
            assert main(["train", "--data", str(colours), "--out", str(tmp_path), "--resume", "--device", "cpu"]) == 2
            assert "Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "value", "said"),
    [
        ("image_px", 100_000, "image_px must be at most 7,000, not 100,000"),
        ("lr_per_256", 1e300, "lr_per_256 must be at most 10,000, not 1e\\+300"),
        ("lr_per_256", math.inf, "lr_per_256 must be a finite number"),
        ("lr_per_256", math.nan, "lr_per_256 must be a finite number"),
        ("weight_decay", 1e30, "weight_decay must be at most 10,000"),
        ("batch_images", 10**12, "batch_images must be at most 1,000,000"),
        ("epochs", 10**30, "epochs must be at most 1,000,000"),
        ("std", (math.inf, 1.0, 1.0), "std must be a finite number"),
        ("mean", (math.nan, 0.0, 0.0), "mean must be a finite number"),
    ],
)
def test_a_number_beyond_any_sense_is_refused_with_its_name(argument, value, said):
    with pytest.raises(BadRecipe, match=said):
        tiny(**{argument: value})


def test_a_folder_that_cannot_be_written_is_refused(colours, tmp_path):
    (tmp_path / "file").write_text("")
    refuse(BadRun, "cannot be written", tiny(), colours, tmp_path / "file" / "run")


def test_of_two_runs_that_start_together_one_gets_the_folder(colours, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    monkeypatch.setattr(
        lambdanets.training.preflight, "choose_folder", lambda out, name: out
    )  # it saw the folder empty
    with pytest.raises(BadRun, match="just taken"):
        train(tiny(), colours, out=tmp_path / "run")
    assert (tmp_path / "run" / "run.json").read_text() == "{}"


def test_an_unknown_model_is_refused_with_the_nearest_names(colours, tmp_path):
    refuse(BadRecipe, "lambda_resnet50", tiny(model="lambda_resnet5O"), colours, tmp_path / "run")


def test_a_model_that_cannot_take_the_image_is_refused(colours, tmp_path, monkeypatch):
    create = lambdanets.classification.task.create_model

    def with_a_global_table(*args, **kwargs):
        return create(*args, **kwargs, lambda_args={"scope": None, "size": (4, 4)})

    monkeypatch.setattr(lambdanets.classification.task, "create_model", with_a_global_table)
    refuse(BadRecipe, r"cannot train on a batch of \(8, 3, 8, 8\).*4", tiny(), colours, tmp_path / "run")


def test_a_batch_of_one_on_a_map_of_one_pixel_is_found_at_the_start(colours, tmp_path):
    refuse(BadRecipe, "another --batch-images", tiny(batch_images=1), colours, tmp_path / "run")


@pytest.mark.parametrize(("device", "message"), [("tpu", "must be cpu, cuda"), ("cuda:99", "cannot be used")])
def test_a_device_that_is_not_there_is_refused(device, message, colours, tmp_path):
    refuse(BadRun, message, tiny(), colours, tmp_path / "run", device=device)


@pytest.mark.parametrize(("module", "extra"), [("matplotlib", "plots"), ("sklearn", "digits")])
def test_a_missing_extra_is_found_at_the_start(module, extra, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == module else found(name, *a))
    refuse(BadRun, rf"pip install 'lambdanets\[{extra}\]'", digits(), None, tmp_path / "run")


# --- the run's folder -----------------------------------------------------------------------------------------------


def test_the_next_folder_is_the_next_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(choose_folder(None, "digits")) == os.path.join("runs", "digits-1")
    for name in ("digits-2", "digits-10", "digits-old", "folder-77", "digits"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert choose_folder(None, "digits").name == "digits-11"


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    write_atomically(path, b"old")

    def fail(*args, **named):
        raise OSError("no space left")

    for call in ("fsync", "replace"):
        with monkeypatch.context() as broken:
            broken.setattr(os, call, fail)
            with pytest.raises(OSError, match="no space"):
                write_atomically(path, b"new")
        assert path.read_bytes() == b"old"
        assert [p.name for p in tmp_path.iterdir()] == [path.name]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_shared_table_is_written_under_each_name_and_loads_strictly(tmp_path):
    model = TwoUsers()
    save_weights(model, tmp_path / "w.safetensors")
    tensors = safetensors.torch.load_file(tmp_path / "w.safetensors")
    assert torch.equal(tensors["a.weight"], tensors["b.weight"])
    again = TwoUsers()
    again.load_state_dict(tensors)
    assert torch.equal(again.b.weight, model.a.weight)


@pytest.fixture(scope="module")
def _finished(shared_colours, tmp_path_factory):
    torch.set_num_threads(1)
    return train(tiny(epochs=1, warmup_epochs=0.0), shared_colours, out=tmp_path_factory.mktemp("runs") / "run").folder


@pytest.fixture
def finished(_finished, tmp_path):
    """The folder of a finished run; a test may break it."""
    return shutil.copytree(_finished, tmp_path / "finished")


def test_a_folder_that_is_no_run_is_refused(tmp_path, finished):
    with pytest.raises(BadRun, match=r"no run\.json"):
        open_run(tmp_path)
    (finished / "weights.safetensors").unlink()
    with pytest.raises(BadRun, match=r"no weights\.safetensors"):
        open_run(finished)


@pytest.mark.parametrize(
    "break_it",
    [lambda text: text[:100], lambda text: "[]", lambda text: text.replace('"image_px": 8', '"image_px": 0'),
     lambda text: text.replace('"augment"', '"cutmix"')],
)  # fmt: skip
def test_a_record_that_is_not_ours_is_refused(break_it, finished):
    path = finished / "run.json"
    path.write_text(break_it(path.read_text()))
    with pytest.raises(BadRun, match=r"run\.json is not a run of lambdanets"):
        open_run(finished)


def test_weights_cut_short_are_refused(finished):
    path = finished / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadRun, match="cut short"):
        open_run(finished)


def test_weights_of_another_model_are_refused_with_at_most_ten_names(finished):
    other = lambdanets.create_model("resnet50_cccc", num_classes=3)
    save_weights(other, finished / "weights.safetensors")
    with pytest.raises(
        BadRun, match=r"is not the weights of this run's lambda_resnet_tiny(.|\n)* and \d+ more"
    ) as caught:
        open_run(finished)
    assert str(caught.value).count("layer") <= 30  # ten names a kind: missing, unknown, another shape


def test_weights_that_are_not_finite_are_refused(finished):
    tensors = weights_of(finished)
    tensors["fc.bias"][1] = math.nan
    (finished / "weights.safetensors").write_bytes(safetensors.torch.save(tensors))
    with pytest.raises(BadRun, match=r"1 tensors are not finite: fc\.bias"):
        open_run(finished)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_run_under_the_callers_no_grad_is_the_same_run(mode, colours, tmp_path):
    with mode():
        train(tiny(epochs=1, warmup_epochs=0.0), colours, out=tmp_path / "within")
        assert not torch.is_grad_enabled()
    train(tiny(epochs=1, warmup_epochs=0.0), colours, out=tmp_path / "without")
    first, second = weights_of(tmp_path / "within"), weights_of(tmp_path / "without")
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_another_class_count_is_refused(finished):
    path = finished / "run.json"
    record = json.loads(path.read_text())
    record["classes"].append("violet")
    path.write_text(json.dumps(record))
    with pytest.raises(BadRun, match="nor the rows of 4 classes"):  # of its own result, before the weights are read
        open_run(finished)
    record["result"]["confusion"] = [[1, 0, 0, 0]] * 4
    path.write_text(json.dumps(record))
    with pytest.raises(BadRun, match=r"fc\.bias is \(3,\), the model's \(4,\)"):
        open_run(finished)
