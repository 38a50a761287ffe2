"""Several ranks are one run: the same losses, the same counts, one way out. gloo, on the CPU."""

import dataclasses
import errno
import functools
import json
import math
import os
import re
import signal
import socket
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from conftest import batch, labelled, until
from test_resume import at_step, main_like
from timm.layers import BatchNormAct2d
from torch import nn
from torch.distributed.fsdp import FSDPModule

import lambdanets.files
import lambdanets.runs.checkpoints
import lambdanets.training.distributed
import lambdanets.training.loop
import lambdanets.training.preflight
from lambdanets.classification.scores import evaluate
from lambdanets.classification.train import train
from lambdanets.cli import main
from lambdanets.data.batches import Batches
from lambdanets.data.transforms import View
from lambdanets.errors import BadRecipe
from lambdanets.recipes import choose
from lambdanets.recipes.recipe import Options
from lambdanets.runs.checkpoints import newest_checkpoint
from lambdanets.runs.nested_state import flatten
from lambdanets.runs.weights import read_weights
from lambdanets.training.distributed import Ranks
from lambdanets.training.learner import Learner
from lambdanets.training.sync_batch_norm import sync_batch_norm
from lambdanets.training.watchdog import HANG, LOST


def same_on_any_ranks(**changes):
    """7 epochs of 3 steps, nothing drawn by (seed, step, rank): dropout. Augmentation and mixing are by the image."""
    recipe = choose("folder", model="lambda_resnet_tiny", image_px=8, epochs=7, batch_images=8, lr_per_256=0.3)
    return dataclasses.replace(recipe, eval_batch_images=4, drop_rate=0.0, mixup_alpha=0.2, **changes)


def run(recipe, data, out, seed=3, **options):
    """`train`, with the command's exit codes."""
    options = {"save_minutes": 0, "log_steps": 1, **options}
    code = main_like(lambda: train(recipe, data, out=out, seed=seed, resume=True, options=Options(**options)))
    raise SystemExit(code)


def losses(out):
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def weights(out):
    return (Path(out) / "weights.safetensors").read_bytes()


def codes(group, timeout_s=60):
    return [child.wait(timeout_s) for child in group]


@pytest.mark.parametrize(
    ("batch_norm", "precision", "ranks", "accumulation"),
    [
        ("frozen", "float32", 2, 1),
        ("frozen", "float64", 4, 2),
        pytest.param("frozen", "float64", 3, 1, marks=pytest.mark.slow),  # 3, 3 and 2 of 8 images
        pytest.param("sync", "float32", 2, 1, marks=pytest.mark.slow),
        ("sync", "float64", 2, 1),
        pytest.param("sync", "float32", 4, 1, marks=pytest.mark.slow),
        pytest.param("sync", "float64", 4, 1, marks=pytest.mark.slow),
        pytest.param("frozen", "float32", 4, 1, marks=pytest.mark.slow),
    ],
)
def test_ranks_compute_what_one_process_does(
    batch_norm, precision, ranks, accumulation, shared_colours, tmp_path, children
):
    recipe = same_on_any_ranks(batch_norm=batch_norm, precision=precision, accumulation=accumulation)
    if ranks == 3:
        recipe = dataclasses.replace(recipe, mixup_alpha=0.0)  # neighbours are mixed, and here they are divided
    alone = children.start(run, recipe, shared_colours, tmp_path / "alone")
    group = children.ranks(ranks, run, recipe, shared_colours, tmp_path / "group")
    assert codes([alone, *group]) == [0] * (ranks + 1), group[0].said()
    one, many = losses(tmp_path / "alone"), losses(tmp_path / "group")
    assert len(one) == 21
    assert max(one) - min(one) > 0.05  # it learns: the comparison is of something
    worst = max(abs(a - b) for a, b in zip(one, many, strict=True))
    assert worst <= {"float32": 1e-6, "float64": 1e-12}[precision]
    records = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("alone", "group")]
    assert records[0]["result"]["confusion"] == records[1]["result"]["confusion"]
    assert [p.name for p in sorted((tmp_path / "group").iterdir())] == [
        p.name for p in sorted((tmp_path / "alone").iterdir())
    ]


@pytest.mark.parametrize(
    ("precision", "before", "after", "changes"),
    [
        ("float64", 2, 1, {"batch_norm": "frozen", "optimizer": "adamw", "accumulation": 2, "clip_norm": 0.5}),
        pytest.param("float32", 4, 1, {"batch_norm": "frozen"}, marks=pytest.mark.slow),
        pytest.param("float32", 2, 4, {"batch_norm": "sync"}, marks=pytest.mark.slow),
        pytest.param(
            "float64", 4, 2, {"batch_norm": "sync", "optimizer": "lamb", "ema_decay": 0.9}, marks=pytest.mark.slow
        ),
        pytest.param("float64", 1, 4, {"batch_norm": "frozen"}, marks=pytest.mark.slow),
    ],
)
def test_a_divided_state_computes_the_same_and_goes_on_with_another_number_of_ranks(
    precision, before, after, changes, shared_colours, tmp_path, children
):
    """FSDP2, killed in step 9 of 21, resumed on other ranks, against one process."""
    recipe = same_on_any_ranks(precision=precision, **changes)
    out = tmp_path / "run"
    alone = children.start(run, recipe, shared_colours, tmp_path / "alone")
    group = children.ranks(before, killed_divided, 0, 9, recipe, shared_colours, out)
    assert codes([alone]) == [0]
    assert codes(group)[0] == -signal.SIGKILL
    group = children.ranks(after, run_divided, recipe, shared_colours, out)
    assert codes(group) == [0] * after, group[0].said()
    assert "goes on after step 8 of 21" in group[0].said()
    one, many = losses(tmp_path / "alone"), losses(out)
    assert len(one) == 21
    assert max(one) - min(one) > 0.05
    allowed = {"float32": 1e-6, "float64": 1e-12}[precision]
    assert max(abs(a - b) for a, b in zip(one, many, strict=True)) <= allowed
    found, wanted = (read_weights(folder) for folder in (out, tmp_path / "alone"))
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e3 * allowed, atol=1e2 * allowed)


def run_divided(recipe, data, out):
    parts = recipe.accumulation > 1  # so that one case has everything on
    run(recipe, data, out, fsdp=True, recompute=parts, channels_last=parts, save_steps=2)


def killed_divided(rank, step, recipe, data, out):
    on_rank(rank, step, lambda run: os.kill(os.getpid(), signal.SIGKILL))
    run_divided(recipe, data, out)


def divided():
    """Which part of the state a rank holds, and the checkpoint's state, which is whole on rank 0 alone."""
    recipe = choose("folder", model="resnet50_ccll", image_px=32, optimizer="adamw", precision="float32")
    with Ranks() as ranks:
        torch.manual_seed(0)
        learner = Learner(recipe, labelled(recipe, 10), batch_images=4, seed=0, device=torch.device("cpu"), ranks=ranks)
        all_numbers = sum(p.numel() for p in learner.model.parameters())
        learner.parallelise(fsdp=True)
        images, labels = torch.randn(2, 3, 32, 32), torch.tensor([ranks.rank, 3])
        found = learner.gradients(batch(images, labels), 0)
        learner.apply(0, 0.1, found.norm)
        held_parameters = list(learner.model.parameters())
        held = {
            "weights": sum(p.to_local().numel() for p in held_parameters),
            "gradients": sum(p.grad.to_local().numel() for p in held_parameters),
            "moments": sum(s["exp_avg"].to_local().numel() for s in learner.optimizer.state.values()),
        }
        state, _ = flatten(learner.state())
        units = sum(isinstance(module, FSDPModule) for module in learner.model.modules())
    parts = {name: n / all_numbers for name, n in held.items()}
    return {"parts": parts, "parameters": len(held_parameters), "saved": len(state), "units": units}


def test_a_rank_holds_its_part_of_weights_gradients_and_moments(children):
    found = [child.gave() for child in children.ranks(2, divided)]
    for each in found:
        assert each["units"] == 1 + 3 + 4 + 6 + 3
        for part in each["parts"].values():
            assert 0.45 < part < 0.55
    assert found[0]["saved"] - found[1]["saved"] == 3 * found[0]["parameters"]  # weights and two moments


def loses_float16():
    """A gradient that overflows on one rank alone: both halve their scale and leave the step out."""
    recipe = choose("folder", model="lambda_resnet_tiny", image_px=8, precision="float16")
    with Ranks() as ranks:
        torch.manual_seed(0)
        learner = Learner(recipe, labelled(recipe, 4), batch_images=4, seed=0, device=torch.device("cpu"), ranks=ranks)
        learner.parallelise(fsdp=True)
        images = torch.randn(2, 3, 8, 8) * (1 if ranks.first else 1e30)
        learner.gradients(batch(images, torch.tensor([0, 1])), 0)
        learner.leave_out()
        return learner.scaler.get_scale()


def test_the_loss_scale_stays_the_same_on_all_ranks(children):
    assert [child.gave() for child in children.ranks(2, loses_float16)] == [32768.0, 32768.0]


def sync_and_torchs():
    """Our batch norm over ranks of 5, 2 images against torch's over 7: outputs, gradients, running statistics."""
    torch.manual_seed(0)
    x, dy = torch.randn(7, 3, 4, 5).double() * 3 + 2, torch.randn(7, 3, 4, 5).double()
    with Ranks() as ranks:
        part = slice(0, 5) if ranks.first else slice(5, 7)
        kinds = [
            nn.BatchNorm2d,
            functools.partial(nn.BatchNorm2d, momentum=None),
            functools.partial(BatchNormAct2d, act_layer=nn.SiLU),  # timm's, with what comes after the norm
        ]
        for kind in kinds:
            want = kind(3).double()
            nn.init.normal_(want.weight)
            ours = sync_batch_norm(nn.Sequential(kind(3)).double(), torch.device("cpu"))
            ours[0].load_state_dict(want.state_dict())
            for _ in range(2):
                whole, mine = x.clone().requires_grad_(), x[part].clone().requires_grad_()
                y = want(whole)
                y.backward(dy)
                z = ours(mine)
                z.backward(dy[part])
                torch.testing.assert_close(z, y[part], rtol=1e-12, atol=1e-12)
                torch.testing.assert_close(mine.grad, whole.grad[part], rtol=1e-10, atol=1e-12)
            grads = [
                sum(torch.tensor(g, dtype=torch.float64) for g in ranks.all(p.grad.tolist())) for p in ours.parameters()
            ]
            for grad, p in zip(grads, want.parameters(), strict=True):
                torch.testing.assert_close(grad, p.grad, rtol=1e-10, atol=1e-12)
            for name, value in want.state_dict().items():
                torch.testing.assert_close(ours[0].state_dict()[name], value, rtol=1e-12, atol=1e-12)
            ours.eval()
            torch.testing.assert_close(ours(x), want.eval()(x))
    return "equal"


def test_batch_norm_over_ranks_is_batch_norm(children):
    assert [child.gave() for child in children.ranks(2, sync_and_torchs)] == ["equal"] * 2


def test_a_batch_norm_that_computes_something_else_is_not_taken_for_one() -> None:
    class Doubled(nn.BatchNorm2d):
        def forward(self, input):
            return 2 * super().forward(input)

    with pytest.raises(ValueError, match=r"1 is a Doubled, which may compute more than a batch norm"):
        sync_batch_norm(nn.Sequential(nn.Identity(), Doubled(3)), torch.device("cpu"))


class Level(nn.Module):
    """Logits from the grey level: eight classes, some wrong."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.1))

    def forward(self, x):
        level = x.mean((1, 2, 3)) * 255 * self.weight
        return -((level[:, None] - torch.arange(8.0)) ** 2)


def evaluate_101():
    from test_train import Grey

    levels = [(7 * i) % 8 for i in range(101)]
    labels = [level if i % 3 else (level + i % 8) % 8 for i, level in enumerate(levels)]
    images = Grey.of(levels, labels, classes=8)
    with Ranks() as ranks:
        view = View(4, 1, (0.0,), (1.0,), 1.0)
        batches = Batches(images, view, batch_images=16, training=False, rank=ranks.rank, ranks=ranks.ranks)
        scores = evaluate(Level(), batches, classes=8, device=torch.device("cpu"), ranks=ranks)
    return dataclasses.asdict(scores) | {"confusion": scores.confusion.json()}


def test_each_of_101_images_is_counted_once_on_any_number_of_ranks(children):
    groups = [children.ranks(ranks, evaluate_101) for ranks in (2, 3, 4)]
    alone = evaluate_101()
    assert alone["n"] == 101
    assert 0 < alone["top1_frac"] < alone["top5_frac"] < 1
    loss = alone.pop("loss")
    for group in groups:
        for child in group:
            found = child.gave()
            assert found.pop("loss") == pytest.approx(loss, rel=1e-6)
            assert found == alone  # to the last digit


def test_a_batch_too_small_for_its_ranks_and_parts_is_refused(shared_colours, tmp_path, monkeypatch):
    with pytest.raises(BadRecipe, match="8 images is too small for 1 processes that take theirs in 9 parts"):
        train(same_on_any_ranks(accumulation=9), shared_colours, out=tmp_path / "run")


# --- faults -----------------------------------------------------------------------------------------------------------


def drawing(**changes):
    recipe = choose("folder", model="lambda_resnet_tiny", image_px=8, epochs=4, batch_images=8, lr_per_256=1.0)
    return dataclasses.replace(recipe, eval_batch_images=4, drop_path_rate=0.2, **changes)


def on_rank(rank, step, do):
    if os.environ.get("RANK") == str(rank):
        at_step(step, do)


def killed(rank, step, recipe, data, out):
    on_rank(rank, step, lambda run: os.kill(os.getpid(), signal.SIGKILL))
    run(recipe, data, out, save_steps=2)


def stopped(recipe, data, out):
    on_rank(1, 4, lambda run: os.kill(os.getpid(), signal.SIGSTOP))
    run(recipe, data, out, hang_timeout_s=2)


def terminated(recipe, data, out):
    on_rank(1, 4, lambda run: os.kill(os.getpid(), signal.SIGTERM))
    run(recipe, data, out)


def failing(recipe, data, out):
    def fail(run):
        raise ValueError("the graphics card burns")

    on_rank(1, 4, fail)
    try:
        run(recipe, data, out)
    except ValueError:
        raise SystemExit(77) from None


def nan_on_one(recipe, data, out, skip):
    def poison(run):
        gradients = run.learner.gradients
        run.learner.gradients = lambda batch, *rest: gradients(batch._replace(images=batch.images * math.nan), *rest)
        at_step(5, lambda run: setattr(run.learner, "gradients", gradients))

    on_rank(1, 4, poison)
    run(recipe, data, out, skip_non_finite=skip, save_steps=1)


def no_space(recipe, data, out):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    on_rank(0, 4, lambda run: setattr(lambdanets.runs.checkpoints, "written", full))
    run(recipe, data, out, save_steps=1)


def timed(group, timeout_s):
    started = time.monotonic()
    found = codes(group, timeout_s)
    return found, time.monotonic() - started


def test_two_ranks_that_were_killed_terminated_and_resumed_end_as_the_undisturbed(shared_colours, tmp_path, children):
    recipe = drawing()
    straight = children.ranks(2, run, recipe, shared_colours, tmp_path / "straight")
    assert codes(straight) == [0, 0]
    out = tmp_path / "run"
    assert codes(children.ranks(2, killed, 1, 3, recipe, shared_colours, out)) == [LOST, -signal.SIGKILL]
    group = children.ranks(2, terminated, recipe, shared_colours, out)  # a signal to one is a signal to all
    assert codes(group) == [143, 143]
    assert newest_checkpoint(out).step == 5
    assert "goes on after step 2 of 12" in group[0].said()
    elsewhere = children.ranks(2, run_apart, recipe, shared_colours, out)
    assert codes(elsewhere) == [0, 0], elsewhere[1].said()
    assert "goes on after step 5 of 12" in elsewhere[0].said()
    assert weights(out) == weights(tmp_path / "straight")
    assert losses(out) == losses(tmp_path / "straight")


def run_apart(recipe, data, out):
    """Rank 1 cannot see the checkpoints (R45): its machine has a folder of its own."""
    if os.environ["RANK"] == "1":
        lambdanets.training.loop.Checkpoints = None
        lambdanets.training.preflight._place = None
        out = Path(out).parent / "elsewhere"
    run(recipe, data, out)


@pytest.mark.parametrize(
    ("ranks", "killed", "run"),
    [
        pytest.param(3, killed, run, marks=pytest.mark.slow),
        pytest.param(4, killed, run, marks=pytest.mark.slow),
        pytest.param(2, killed_divided, run_divided),
    ],
)
def test_ranks_resume_to_the_bit_also_with_a_divided_state(ranks, killed, run, shared_colours, tmp_path, children):
    """The order of a ring's sums depends on DDP's buckets: they are the same before and after a resume."""
    recipe = drawing()
    assert codes(children.ranks(ranks, run, recipe, shared_colours, tmp_path / "straight")) == [0] * ranks
    assert codes(children.ranks(ranks, killed, 1, 5, recipe, shared_colours, tmp_path / "run"))[1] == -signal.SIGKILL
    assert codes(children.ranks(ranks, run, recipe, shared_colours, tmp_path / "run")) == [0] * ranks
    assert weights(tmp_path / "run") == weights(tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 4), (4, 1)])
def test_a_run_goes_on_with_another_number_of_ranks(before, after, shared_colours, tmp_path, children):
    recipe = same_on_any_ranks(batch_norm="sync")
    out = tmp_path / "run"
    assert codes([children.start(run, recipe, shared_colours, tmp_path / "alone")]) == [0]
    assert codes(children.ranks(before, killed, 0, 9, recipe, shared_colours, out))[0] == -signal.SIGKILL
    assert codes(children.ranks(after, run, recipe, shared_colours, out)) == [0] * after
    one, many = losses(tmp_path / "alone"), losses(out)
    assert max(abs(a - b) for a, b in zip(one, many, strict=True)) <= 1e-6


def test_both_ranks_stop_or_skip_where_one_has_a_nan(shared_colours, tmp_path, children):
    stops = children.ranks(2, nan_on_one, drawing(), shared_colours, tmp_path / "stops", 0)
    skips = children.ranks(2, nan_on_one, drawing(), shared_colours, tmp_path / "skips", 1)
    assert codes(stops) == [3, 3]
    texts = [re.search(r"step 4: the loss is nan.*", child.said())[0] for child in stops]
    assert texts[0] == texts[1]
    found = json.loads((tmp_path / "stops" / "run.json").read_text())["non_finite"]
    assert len(found["images"]) == 4  # the half that rank 1 had
    assert newest_checkpoint(tmp_path / "stops").step == 4
    assert codes(skips) == [0, 0], skips[1].said()
    assert json.loads((tmp_path / "skips" / "run.json").read_text())["result"]["left_out_steps"] == 1


def test_a_rank_that_fails_takes_the_others_with_it(shared_colours, tmp_path, children):
    groups = {
        "burns": children.ranks(2, failing, drawing(), shared_colours, tmp_path / "burns"),
        "full": children.ranks(2, no_space, drawing(), shared_colours, tmp_path / "full"),
    }
    started = time.monotonic()
    assert codes(groups["burns"]) == [LOST, 77]
    assert "rank 1 failed: ValueError: the graphics card burns" in groups["burns"][0].said()
    assert codes(groups["full"]) == [2, LOST]
    assert time.monotonic() - started < 40  # with the start of four processes; the others' timeout is 1,800
    said = [child.said() for child in groups["full"]]
    assert "3 checkpoints in a row could not be written" in said[0]
    assert "rank 0 failed: BadRun: 3 checkpoints in a row" in said[1]


def lost_disk(recipe, data, out):
    if os.environ.get("RANK") == "1":
        at_step(4, lambda run: Path(data).rename(f"{data}-away"))
    lambdanets.files.PAUSES_S = (0.01,)
    run(recipe, data, out)


def test_a_disk_that_one_rank_loses_ends_all_with_the_steps_so_far_saved(colours, tmp_path, children):
    straight = children.ranks(2, run, drawing(), colours, tmp_path / "straight")
    assert codes(straight) == [0, 0]
    out = tmp_path / "run"
    group = children.ranks(2, lost_disk, drawing(), colours, out)
    assert codes(group) == [LOST, LOST]
    found = [re.search(r"the state after step (\d+) of 12 is saved: go on with --resume", c.said()) for c in group]
    assert newest_checkpoint(out).step == int(found[0][1]) == int(found[1][1]) == 5
    assert "cannot be read: No such file" in group[1].said()
    Path(f"{colours}-away").rename(colours)
    assert codes(children.ranks(2, run, drawing(), colours, out)) == [0, 0]
    assert weights(out) == weights(tmp_path / "straight")


def test_what_only_one_rank_sees_at_the_start_is_an_error_on_all(shared_colours, colours, tmp_path, children):
    (colours / "train" / "red" / "0.jpg").rename(colours / "train" / "red" / "9.jpg")
    group = children.ranks(2, other_images, drawing(), shared_colours, colours, tmp_path / "run")
    assert codes(group, 10) == [LOST, 2]
    assert "rank 1 found other images" in group[0].said()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"clip_norm": 3.0}, "clip_norm is 0.0 on rank 0 and 3.0 on rank 1"),
        ({"keep_best": True}, "keep_best is False on rank 0 and True on rank 1"),
        ({"hang_timeout_s": 7.0}, "hang_timeout_s is 1800.0 on rank 0 and 7.0 on rank 1"),
        ({"resume": False}, "resume is True on rank 0 and False on rank 1"),
        ({"seed": 4, "fsdp": True}, "seed is 3 on rank 0 and 4 on rank 1; fsdp is False on rank 0 and True on rank 1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_ranks_that_were_asked_for_different_runs_all_refuse_and_name_what_differs(
    changes, said, shared_colours, tmp_path, children
):
    group = children.ranks(2, asked_otherwise, changes, drawing(), shared_colours, tmp_path / "run")
    assert codes(group, 10) == [2, 2]
    for child in group:
        assert f"asked for different runs: {said}. Give every process the same" in child.said()
    assert not (tmp_path / "run").exists()


def asked_otherwise(changes, recipe, data, out):
    how = {"seed": 3, "resume": True, "options": Options(save_minutes=0)}
    if os.environ["RANK"] == "1":
        own = {field.name for field in dataclasses.fields(Options)}
        how |= {name: value for name, value in changes.items() if name in how}
        how["options"] = dataclasses.replace(how["options"], **{n: v for n, v in changes.items() if n in own})
        recipe = dataclasses.replace(recipe, **{n: v for n, v in changes.items() if n not in own and n not in how})
    raise SystemExit(main_like(lambda: train(recipe, data, out=out, **how)))


def other_first_weights(recipe, data, out, mine):
    raise SystemExit(main_like(lambda: train(recipe, data, out=out, init_from=mine[int(os.environ["RANK"])])))


def test_ranks_that_begin_with_different_weights_all_refuse(shared_colours, tmp_path, children):
    """Also where both were given weights, from files of one name on two machines."""
    for name in ("a", "b"):
        assert codes([children.start(run, drawing(), shared_colours, tmp_path / name, int(name == "b"))]) == [0]
    weights_of = [str(tmp_path / name / "weights.safetensors") for name in ("a", "b")]
    groups = [
        children.ranks(2, other_first_weights, drawing(), shared_colours, tmp_path / "differ", weights_of),
        children.ranks(2, other_first_weights, drawing(), shared_colours, tmp_path / "one", [weights_of[0], None]),
    ]
    assert [codes(group, 20) for group in groups] == [[2, 2], [2, 2]]
    digests = re.findall(r"first weights is ([0-9a-f]{64}) on rank 0 and ([0-9a-f]{64}) on rank 1", groups[0][1].said())
    assert len(set(digests[0])) == 2
    assert "init_from given is True on rank 0 and False on rank 1" in groups[1][0].said()
    assert not (tmp_path / "differ").exists()


# --- what a launcher says ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "abc"}, "RANK is 'abc' and should be a whole number from 0"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two' and should be a whole number from 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": "-1", "RANK": "0"}, "WORLD_SIZE is '-1'"),
        ({"RANK": "٣"}, "RANK is '٣'"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK is ''"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 and WORLD_SIZE 2: ranks run from 0"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 and RANK is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "cannot meet the others"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"}, "cannot meet the others"),
    ],
    ids=str,
)
def test_variables_that_no_launcher_sets_are_one_message(variables, said, tmp_path, monkeypatch, capsys):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "--out", str(tmp_path / "run")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_port_in_use_and_two_processes_of_one_rank_are_one_message(shared_colours, tmp_path, children):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        busy = children.start(run, drawing(), shared_colours, tmp_path / "a", RANK="0", WORLD_SIZE="2", **place)
        assert busy.wait(20) == 2
    assert "cannot meet the others at 127.0.0.1:" in busy.said()
    assert "in use by another run or by a second process with RANK=0" in busy.said()

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place["MASTER_PORT"] = str(free.getsockname()[1])
    start = [drawing(), shared_colours, tmp_path / "b"]
    group = [children.start(run, *start, RANK=rank, WORLD_SIZE="3", **place) for rank in ("0", "1", "1")]
    until(lambda: any(child.process.exitcode is not None for child in group), 20)
    second = next(child for child in group if child.process.exitcode is not None)
    assert second.wait() == 2
    assert "two processes have RANK=1" in second.said()
    for child in group:
        child.process.kill()


def other_images(recipe, data, others, out):
    run(recipe, others if os.environ["RANK"] == "1" else data, out)


def test_the_other_ranks_of_a_stopped_one_leave(shared_colours, tmp_path, children):
    out = tmp_path / "run"
    group = children.ranks(2, stopped, drawing(), shared_colours, out)
    until(lambda: (out / "log.jsonl").exists() and len(losses(out)) == 4)
    started = time.monotonic()
    assert group[0].wait() == HANG
    assert time.monotonic() - started < 2 + 10  # 2 + 2 are promised on a machine that does nothing else
    assert (
        "all_reduce" in (out / "stacks-rank0.txt").read_text() or "backward" in (out / "stacks-rank0.txt").read_text()
    )
    os.kill(group[1].pid, signal.SIGKILL)


def test_torchrun_restarts_a_killed_rank_and_the_run_goes_on(shared_colours, tmp_path, children):
    recipe = "--recipe folder --model lambda_resnet_tiny --image-px 8 --epochs 14 --batch-images 8 --lr-per-256 1.0"
    out = tmp_path / "run"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1",
        "-m", "lambdanets", "train", "--data", str(shared_colours), *recipe.split(), "--out", str(out), "--resume",
        "--seed", "3", "--save-steps", "2", "--log-steps", "1", "--device", "cpu",
    ]  # fmt: skip
    asked = choose("folder", model="lambda_resnet_tiny", image_px=8, epochs=14, batch_images=8, lr_per_256=1.0)
    straight = children.ranks(2, run, asked, shared_colours, tmp_path / "straight")
    with open(tmp_path / "said", "w") as said:
        torchrun = children.program(command, stdout=said, stderr=said)
    until(lambda: (out / "log.jsonl").exists() and len(losses(out)) >= 4, 60)
    rank = max(int(pid) for pid in Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split())
    os.kill(rank, signal.SIGKILL)
    # Two Pythons import torch again: 6 s on a quiet machine, 16 on a busy one; without a restart it would be for ever.
    until(lambda: (tmp_path / "said").read_text().count("goes on after step") == 1, 90)
    assert torchrun.wait(90) == 0, (tmp_path / "said").read_text()
    assert codes(straight) == [0, 0]
    assert weights(out) == weights(tmp_path / "straight")
    assert losses(out) == losses(tmp_path / "straight")


@pytest.mark.slow
def test_the_guides_slurm_file_runs_on_two_pretended_machines_and_goes_on_after_sigterm(
    shared_colours, tmp_path, children
):
    """srun starts one torchrun a machine; here both are this one, with a rendezvous of their own."""
    guide = (Path(__file__).parents[2] / "docs" / "photos.md").read_text()
    script = textwrap.dedent(re.search(r"^    #!/bin/bash\n(?:    .*\n)+", guide, re.MULTILINE)[0])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path / "run"
    here = {
        "--nnodes=16": "--nnodes=2",
        "--nproc-per-node=8": "--nproc-per-node=1",
        "29500": str(port),
        "/shared/shards": str(shared_colours),
        "--recipe pareto --model lambda_resnet152": "--recipe folder --model lambda_resnet_tiny --image-px 8 "
        "--epochs 40 --batch-images 8 --lr-per-256 1 --seed 3 --device cpu --log-steps 1",
        "--workers 10": "--workers 0",
        "/shared/runs/big": str(out),
        "torchrun": f"{sys.executable} -m torch.distributed.run",
    }
    for theirs, ours in here.items():
        assert script.count(theirs) == 1, theirs
        script = script.replace(theirs, ours)
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, body in {
        "scontrol": "echo 127.0.0.1; echo machine-2",
        # SLURM sends the signal to the processes of the step
        "srun": '"$@" & a=$!\n"$@" & b=$!\ntrap "kill -TERM $a $b" TERM\nwait $a\nwait $b && wait $a',
    }.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    (tmp_path / "job.sh").write_text(script.replace("srun", "exec srun"))
    variables = {"SLURM_JOB_NODELIST": "machine-[1-2]", "SLURM_JOB_ID": "7", "OMP_NUM_THREADS": "1"}
    variables |= {"PATH": f"{tools}:{os.environ['PATH']}"}

    def submit(name):
        command = ["bash", tmp_path / "job.sh"]
        with open(tmp_path / name, "w") as said:
            return children.program(command, env=os.environ | variables, stdout=said, stderr=said)

    first = submit("first")
    until(lambda: (out / "log.jsonl").exists() and len(losses(out)) >= 4, 60)
    os.kill(first.pid, signal.SIGTERM)
    assert first.wait(60) != 0
    assert "which is saved: go on with --resume" in (tmp_path / "first").read_text()
    second = submit("second")
    assert second.wait(100) == 0, (tmp_path / "second").read_text()
    assert "40 epochs on 2 processes" in (tmp_path / "second").read_text()
    assert "goes on after step" in (tmp_path / "second").read_text()
    record = json.loads((out / "run.json").read_text())
    assert (record["status"], len(record["history"]), len(losses(out))) == ("finished", 40, 120)
