"""One optimiser step: what is computed does not depend on how; the log; first weights from elsewhere."""

import dataclasses
import json
import math
import sys
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from conftest import batch, labelled
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

import lambdanets.training.learner
from lambdanets.classification.train import train
from lambdanets.errors import BadRun, NonFiniteLoss
from lambdanets.recipes import choose
from lambdanets.recipes.imagenet import finetune
from lambdanets.recipes.recipe import Options
from lambdanets.runs.log import Log
from lambdanets.runs.weights import load_weights, save_weights
from lambdanets.training.distributed import Ranks
from lambdanets.training.learner import Learner, train_mode
from lambdanets.training.optim import optimizer, parameter_groups

CPU = torch.device("cpu")
IMAGES = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 1, 1])


def recipe(**changes):
    base = choose("folder", model="lambda_resnet_tiny", image_px=12, batch_images=8, lr_per_256=3.0)
    return dataclasses.replace(base, **{"drop_rate": 0.0, "label_smoothing": 0.1, **changes})


def learner(how=None, compile_model=False, **changes):
    torch.manual_seed(0)
    made = Learner(
        recipe(**changes),
        labelled(recipe(**changes), 3),
        batch_images=8,
        seed=0,
        device=CPU,
        ranks=Ranks.alone(),
        **(how or {}),
    )
    with torch.no_grad():
        for name, p in made.model.named_parameters():
            if name.endswith("bn3.weight"):  # 0 at first: nothing would flow through the blocks
                p.fill_(0.5)
    made.parallelise(compile_model=compile_model)
    train_mode(made.model, made.recipe)
    return made


def steps(made, count=3, rate=0.1):
    found = []
    for step in range(count):
        found.append(made.gradients(batch(IMAGES, LABELS), step))
        made.apply(step, rate, found[-1].norm)
    return found


def differ(one, other):
    """The largest difference of weights and statistics."""
    mine, theirs = one.model.state_dict(), other.model.state_dict()
    return max((mine[k].double() - theirs[k].double()).abs().max().item() for k in mine if "num_batches" not in k)


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_accumulated_parts_are_the_mean_over_the_whole_batch(parts):
    whole, divided = learner(batch_norm="frozen", precision="float64"), None
    divided = learner(batch_norm="frozen", precision="float64", accumulation=parts)  # 3: parts of 3, 3 and 2
    for a, b in zip(steps(whole), steps(divided), strict=True):
        assert b.loss_sum == pytest.approx(a.loss_sum, rel=1e-12)
        assert b.norm == pytest.approx(a.norm, rel=1e-12)
        assert b.counts["right"] == a.counts["right"]
    assert differ(whole, divided) < 1e-12


def test_the_loss_and_the_gradient_are_those_of_plain_pytorch():
    made = learner(precision="float64")
    found = made.gradients(batch(IMAGES, LABELS), 0)
    given = {name: p.grad.clone() for name, p in made.model.named_parameters()}
    again = learner(precision="float64")
    logits = again.model(IMAGES.double())
    loss = F.cross_entropy(logits, LABELS, label_smoothing=0.1)
    loss.backward()
    assert found.loss_sum / 8 == pytest.approx(loss.item(), rel=1e-12)
    assert found.counts["right"] == int((logits.argmax(1) == LABELS).sum())
    for name, p in again.model.named_parameters():
        torch.testing.assert_close(given[name], p.grad, rtol=1e-10, atol=1e-12)
    assert found.norm == pytest.approx(math.sqrt(sum(g.square().sum() for g in given.values())))


def test_a_gradient_above_the_norm_is_scaled_down_to_it():
    clipped, free = learner(clip_norm=0.01), learner()
    norm = clipped.gradients(batch(IMAGES, LABELS), 0).norm
    free.gradients(batch(IMAGES, LABELS), 0)
    assert norm > 0.1
    clipped.apply(0, 0.1, norm)
    grads = [p.grad for p in clipped.model.parameters()]
    assert torch.nn.utils.get_total_norm(grads).item() == pytest.approx(0.01, rel=1e-3)
    for small, p in zip(grads, free.model.parameters(), strict=True):
        torch.testing.assert_close(small, p.grad * 0.01 / norm, rtol=1e-3, atol=1e-8)


def test_recomputed_activations_change_nothing_not_even_the_statistics():
    """A checkpointed block runs twice; running means must move once."""
    plain = learner(drop_rate=0.3, drop_path_rate=0.3, precision="float64")
    again = learner({"recompute": True}, drop_rate=0.3, drop_path_rate=0.3, precision="float64")
    assert [f.loss_sum for f in steps(plain)] == [f.loss_sum for f in steps(again)]
    assert differ(plain, again) == 0
    counts = [b for name, b in again.model.named_buffers() if "num_batches" in name]
    assert {int(c) for c in counts} == {3}


def test_channels_last_is_the_same_function():
    plain, last = learner(precision="float64"), learner({"channels_last": True}, precision="float64")
    assert last.model.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    for a, b in zip(steps(plain), steps(last), strict=True):
        assert b.loss_sum == pytest.approx(a.loss_sum, rel=1e-10)
    assert differ(plain, last) < 1e-9


@pytest.mark.slow
def test_a_compiled_model_learns_the_same():
    plain, compiled = learner(), learner(compile_model=True)
    for a, b in zip(steps(plain), steps(compiled), strict=True):
        assert b.loss_sum == pytest.approx(a.loss_sum, rel=1e-3)


@pytest.mark.parametrize(("precision", "rel"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_autocast_is_near_float32_and_weights_stay_float32(precision, rel):
    plain, low = learner(), learner(precision=precision)
    # At 0.1 the third loss is chaotic: 0.8 to 1.7% apart in float16, by the order of float32 sums; here 0.1%.
    for a, b in zip(steps(plain, rate=0.02), steps(low, rate=0.02), strict=True):
        assert b.loss_sum == pytest.approx(a.loss_sum, rel=rel)
        assert b.norm == pytest.approx(a.norm, rel=0.1)  # of the gradient itself, the scale taken out
        assert b.loss_sum != a.loss_sum
    assert {p.dtype for p in low.model.parameters()} == {torch.float32}
    assert low.scaler.is_enabled() == (precision == "float16")


def test_a_loss_scale_that_is_too_large_is_halved_until_it_fits_and_the_run_goes_on(
    shared_colours, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        lambdanets.training.learner.torch.amp, "GradScaler",
        lambda device, enabled: torch.amp.grad_scaler.GradScaler(device, init_scale=2.0**30, enabled=enabled),
    )  # fmt: skip
    tiny = dataclasses.replace(recipe(precision="float16", image_px=8).with_epochs(6), warmup_epochs=1)
    result = train(tiny, shared_colours, out=tmp_path / "run")
    left_out = json.loads((tmp_path / "run" / "run.json").read_text())["result"]["left_out_steps"]
    assert 5 <= left_out < 16  # 2^30 -> about 2^20; none of it counts as a fault
    assert math.isfinite(result.history[-1]["train_loss"])
    monkeypatch.setattr(torch.amp.grad_scaler.GradScaler, "get_scale", lambda self: 1.0)
    with pytest.raises(NonFiniteLoss, match="step 0"):  # at a scale of 1 it is the gradient's own fault
        train(tiny, shared_colours, out=tmp_path / "other")


def test_frozen_statistics_stay_and_the_rest_learns():
    made = learner(batch_norm="frozen")
    before = {k: v.clone() for k, v in made.model.state_dict().items()}
    steps(made)
    after = made.model.state_dict()
    statistics = {k for k in before if "running" in k or "num_batches" in k}
    assert len(statistics) > 10
    assert all(torch.equal(before[k], after[k]) for k in statistics)
    assert sum(not torch.equal(before[k], after[k]) for k in before) > 20
    assert not any(m.training for m in made.model.modules() if isinstance(m, _BatchNorm))


def test_lamb_has_no_clipping_of_its_own_and_all_may_decay():
    model = learner().model
    lamb = optimizer(model, recipe(optimizer="lamb", lr_per_256=0.5, weight_decay=0.1))
    assert type(lamb).__name__ == "Lamb"
    assert lamb.defaults["max_grad_norm"] is None
    assert [g["weight_decay"] for g in lamb.param_groups] == [0.0, 0.1]
    (group,) = parameter_groups(model, 0.1, everything=True)
    assert (len(group["params"]), group["weight_decay"]) == (len(list(model.parameters())), 0.1)
    (group,) = optimizer(model, recipe(decay_everything=True, weight_decay=0.1)).param_groups
    assert group["weight_decay"] == 0.1


# --- first weights from elsewhere -------------------------------------------------------------------------------------


def test_fine_tuning_starts_from_weights_with_another_class_count(shared_colours, tmp_path, capsys):
    source = learner().model
    source.reset_classifier(7)
    save_weights(source, tmp_path / "w.safetensors")
    small = dataclasses.replace(finetune(small=True).with_epochs(1), batch_images=8, lr_per_256=1e-9)
    result = train(small, shared_colours, out=tmp_path / "run", init_from=tmp_path / "w.safetensors")
    assert "its classifier is for other classes, so a new one for 3 starts" in capsys.readouterr().out
    got = safetensors.torch.load_file(result.folder / "weights.safetensors")
    assert got["fc.weight"].shape == (3, 512)
    for name, value in source.state_dict().items():
        if not name.startswith("fc."):
            torch.testing.assert_close(got[name], value, rtol=0, atol=1e-5)
    record = json.loads((result.folder / "run.json").read_text())
    assert record["init_from"]["source"] == str(tmp_path / "w.safetensors")
    assert len(record["init_from"]["sha256"]) == 64

    again = dataclasses.replace(small, name="again")  # from the folder of that run: the same classes, all of it
    train(again, shared_colours, out=tmp_path / "again", init_from=result.folder)
    assert "all of it" in capsys.readouterr().out
    both = safetensors.torch.load_file(tmp_path / "again" / "weights.safetensors")
    torch.testing.assert_close(both["fc.weight"], got["fc.weight"], rtol=0, atol=1e-5)


def test_weights_that_do_not_fit_are_refused_before_anything_is_written(shared_colours, tmp_path):
    other = learner(model="resnet50_cccc").model
    save_weights(other, tmp_path / "other.safetensors")
    broken = learner().model
    with torch.no_grad():
        broken.fc.bias[0] = math.nan
    save_weights(broken, tmp_path / "nan.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "nan.safetensors").read_bytes()[:-50])
    (tmp_path / "empty").mkdir()
    wrong = {
        "other.safetensors": r"keys (missing|unknown)(.|\n)* and \d+ more",
        "nan.safetensors": r"1 tensors are not finite: fc\.bias",
        "cut.safetensors": "cannot be read",
        "empty": r"no weights\.safetensors",
        "none": "does not exist",
    }
    for name, message in wrong.items():
        with pytest.raises(BadRun, match=message):
            train(recipe(image_px=8), shared_colours, out=tmp_path / "run", init_from=tmp_path / name)
        assert not (tmp_path / "run").exists()


def test_what_is_loaded_is_said(tmp_path):
    model = learner().model
    save_weights(model, tmp_path / "w.safetensors")
    found = load_weights(learner().model, tmp_path / "w.safetensors")
    assert found["said"] == f"weights from {tmp_path / 'w.safetensors'}: all of it"


# --- the log ----------------------------------------------------------------------------------------------------------


def test_the_log_has_what_a_step_was(shared_colours, tmp_path):
    result = train(
        recipe(image_px=8).with_epochs(2), shared_colours, out=tmp_path / "run", options=Options(log_steps=2)
    )
    lines = [json.loads(line) for line in (result.folder / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 5]  # every second, and each epoch's last
    assert set(steps[0]) == {"step", "loss", "lr", "norm", "images_per_s", "data_wait_s"}
    assert [line["epoch"] for line in lines if "val_loss" in line] == [1, 2]
    assert all(0 <= row["data_wait_s"] <= row["train_s"] for row in result.history)


class Board:
    """torch.utils.tensorboard.SummaryWriter, as far as it is used."""

    made = None

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.scalars, self.closed = folder, purge_step, [], False
        Board.made = self

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def close(self):
        self.closed = True


def test_tensorboard_gets_the_same_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Board))
    log = Log(tmp_path, first_step=3, tensorboard=True)
    log.write(3, loss=math.inf, lr=0.5, what={"a": 1})
    log.close()
    assert Board.made.scalars == [("loss", math.inf, 3), ("lr", 0.5, 3)]
    assert (Board.made.purge_step, Board.made.closed) == (3, True)
    assert json.loads((tmp_path / "log.jsonl").read_text()) == {"step": 3, "loss": "inf", "lr": 0.5, "what": {"a": 1}}


def test_tensorboard_reads_back_what_a_run_wrote_over_two_starts(tmp_path):
    """What was written after the step that a start goes on from is purged, as in log.jsonl."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, losses in ((0, (1.5, 1.25, 1.0)), (2, (0.75, 0.5))):
        log = Log(tmp_path, first_step=first, tensorboard=True)
        for step, loss in enumerate(losses, first):
            log.write(step, loss=loss)
        log.close()
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(0, 1.5), (1, 1.25), (2, 0.75), (3, 0.5)]


def test_a_missing_tensorboard_is_found_at_the_start(shared_colours, tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "tensorboard" else find(name, *a))
    with pytest.raises(BadRun, match=r"pip install 'lambdanets\[tensorboard\]'"):
        train(recipe(image_px=8), shared_colours, out=tmp_path / "run", options=Options(tensorboard=True))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dangling", [False, True])
@pytest.mark.parametrize("name", ["log.jsonl", "tensorboard"])
def test_a_log_that_is_a_link_is_refused_and_its_target_stays(name, dangling, tmp_path):
    run, outside = tmp_path / "run", tmp_path / "outside"
    run.mkdir()
    if not dangling:
        outside.mkdir() if name == "tensorboard" else outside.write_text("mine")
    (run / name).symlink_to(outside)
    with pytest.raises(BadRun, match=f"{name} (is a link|cannot be written)"):
        Log(run, first_step=0, tensorboard=name == "tensorboard")
    assert outside.exists() == (not dangling)
    if not dangling:
        assert list(outside.iterdir()) == [] if outside.is_dir() else outside.read_text() == "mine"


def test_lines_of_undone_steps_and_torn_lines_leave_the_log(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "loss": 1}\n{"step": 5, "loss": 1}\nnonsense\n{"step": 2, "lo')
    Log(tmp_path, first_step=3).close()
    assert path.read_text() == '{"step": 1, "loss": 1}\n'


def test_log_lines_that_a_full_disk_does_not_take_wait_and_come_later(tmp_path, largest_file):
    said = []
    log = Log(tmp_path, first_step=0, say=said.append)
    log.write(0, loss=1.0)
    with largest_file(40):  # in the middle of the second line
        for step in (1, 2, 3):
            log.write(step, loss=0.5)
    assert (tmp_path / "log.jsonl").stat().st_size == 40
    log.write(4, loss=0.25)
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert said == [f"{tmp_path / 'log.jsonl'} cannot be written: File too large; its lines wait in memory"]


def test_lines_that_the_disk_never_took_are_counted(tmp_path, largest_file):
    said = []
    log = Log(tmp_path, first_step=0, say=said.append)
    with largest_file(10):
        log.write(0, loss=1.0)
        log.write(1, loss=1.0)
        log.close()
    assert said[-1] == f"{tmp_path / 'log.jsonl'} lacks its last 2 lines: they could not be written"
