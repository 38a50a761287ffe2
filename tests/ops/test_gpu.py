"""A GPU gives what a CPU gives: layers, models, `fuse`, `accelerate`, compiled code, a training run, the benchmark.

`python -m pytest -m gpu` runs them there, with test_op.py's strategies and test_fused.py's kernels. Without a GPU they
compare the CPU with itself: a GPU that is lent for minutes should not be the first to run this file.
"""

import copy
import dataclasses

import pytest
import timm
import torch
from test_op import forward_and_gradients
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import lambdanets
from benchmarks import op
from lambdanets import LambdaLayer
from lambdanets.classification.train import train
from lambdanets.ops import fused, lambda_op
from lambdanets.ops.problem import Problem
from lambdanets.ops.strategies import STRATEGIES
from lambdanets.recipes import choose
from lambdanets.recipes.recipe import Options
from lambdanets.training.loop import _Run


def on(model: nn.Module, device: str) -> nn.Module:
    return copy.deepcopy(model).to(device)


def step(model: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """The output and the gradient of every parameter, on the CPU."""
    x = x.to(next(model.parameters()))
    y = model(x)
    y.backward(dy.to(y))
    return {"y": y.detach().cpu()} | {name: p.grad.cpu() for name, p in model.named_parameters()}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], most: float) -> None:
    """The norm of what is wrong is at most so much of the norm of what is right."""
    assert list(got) == list(want)
    for name, right in want.items():
        wrong = (got[name].double() - right.double()).norm()
        assert wrong <= most * right.double().norm() + 1e-30, (name, wrong / right.double().norm())


def random_norms(model: nn.Module) -> nn.Module:
    """A block's last norm starts at zero and would hide what is before it."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
    return model


@pytest.mark.parametrize("strategy", ["auto", *STRATEGIES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_tensor_of_the_cpu_slips_in(strategy: str, dtype: torch.dtype) -> None:
    """Tensors without data that claim to be on a GPU: mixing them with others raises, also where there is none."""
    kinds = {"scope": 7}, {"scope": None, "size": 9}, {"scope": 5, "stride": 2}, {"scope": 3, "intra_depth": 2}
    with FakeTensorMode():
        for where in kinds:
            with torch.device("cuda"):
                layer = LambdaLayer(32, heads=2, strategy=strategy, **where)
                for tensor in (*layer.parameters(), *layer.buffers()):
                    tensor.data = tensor.data.to(dtype) if tensor.is_floating_point() else tensor.data
                x = torch.randn(2, 32, 9, 8, dtype=dtype)
            for training in (False, True):
                y = layer.train(training)(x)
                assert (y.device.type, y.dtype) == ("cuda", dtype)


@pytest.mark.parametrize("name", ["lambda_resnet_tiny", "resnet50_llll"])
def test_a_training_step_has_the_same_gradients(name: str, device: str) -> None:
    model = random_norms(lambdanets.create_model(name, num_classes=5)).double().train()
    x, dy = torch.randn(4, 3, 64, 96), torch.randn(4, 5)
    assert_same(step(on(model, device), x, dy), step(on(model, "cpu"), x, dy), 1e-9)


@pytest.mark.parametrize("channels_last", [False, True])
def test_mixed_precision_rounds_as_on_a_cpu(channels_last: bool, device: str) -> None:
    model = random_norms(lambdanets.create_model("lambda_resnet_tiny", num_classes=5)).train()
    x, dy = torch.randn(8, 3, 64, 64), torch.randn(8, 5)
    exact = step(on(model, "cpu").double(), x, dy)
    model = on(model, device)
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    with torch.autocast(device, torch.bfloat16):
        got = step(model, x, dy)
    assert got["y"].dtype == torch.bfloat16
    assert_same({"y": got["y"]}, {"y": exact["y"]}, 0.1)
    assert all(g.isfinite().all() for g in got.values())


@pytest.mark.parametrize("name", ["lambda_resnet_tiny", "lambda_resnet26rpt_256"])
def test_fused_and_accelerated_models_give_the_same_logits(name: str, device: str) -> None:
    make = lambdanets.create_model if name == "lambda_resnet_tiny" else timm.create_model
    model = random_norms(make(name, num_classes=5)).double().eval()
    side = 64 if name == "lambda_resnet_tiny" else 256
    x = torch.randn(2, 3, side, side, dtype=torch.float64)
    with torch.inference_mode():
        want = model(x)
        there = on(model, device)
        lambdanets.accelerate(there)
        for got in (there(x.to(device)), lambdanets.fuse(there)(x.to(device))):
            torch.testing.assert_close(got.cpu(), want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("strategy", ["auto", "conv", "scores", "lambdas_chunked", "fused"])
def test_compiles_as_one_graph(strategy: str, training: bool, device: str) -> None:
    if device == "cpu" and strategy == "fused":
        strategy = "fourier"
    torch._dynamo.reset()
    layer = LambdaLayer(32, heads=2, scope=5, strategy=strategy).to(device).train(training)
    x, dy = torch.randn(2, 32, 9, 10), torch.randn(2, 32, 9, 10)
    want = step(on(layer, device), x, dy)
    backend = "inductor" if device == "cuda" else "aot_eager"
    assert_same(step(torch.compile(layer, fullgraph=True, backend=backend), x, dy), {
        name if name == "y" else f"_orig_mod.{name}": right for name, right in want.items()
    }, 1e-3)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("side", "scope", "v", "u"), [(56, 23, 16, 1), (28, 23, 32, 1), (14, 27, 64, 1), (7, 13, 128, 1), (28, 7, 32, 4)]
)
def test_the_kernels_are_right_at_the_sizes_of_the_models(side, scope, v, u, dtype, device: str) -> None:
    """Their tiles at these sizes are not those of the small cases in test_fused.py."""
    b, strategy = (48, "fused") if device == "cuda" else (1, "conv")
    t = {
        "q": torch.randn(b, side * side, 4, 16), "keys": torch.randn(b, side * side, 16, u),
        "values": torch.randn(b, side * side, v, u), "table": torch.randn(scope, scope, 16, u) / scope,
    }  # fmt: skip
    t = {name: x.to(device, dtype) for name, x in t.items()}

    def run(how: str):
        return lambda t: lambda_op(**t, grid=(side, side), strategy=how)

    got, grads, dy = forward_and_gradients(run(strategy), t)
    wide = {name: x.float() for name, x in t.items()}
    want, right, _ = forward_and_gradients(run("lambdas_chunked"), wide, dy.float())
    most = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert_same({"y": got.detach(), **grads}, {"y": want.detach(), **right}, most)


def test_the_kernels_hold_no_scores_no_lambdas_and_no_expanded_table(device: str) -> None:
    side, b, v = (64, 2, 64) if device == "cuda" else (6, 2, 8)
    problem = Problem(
        b, side**2, side**2, 4, 16, v, grid=(side, side), context_grid=(side, side), table=(2 * side - 1,) * 2,
        training=True, device=device, dtype=torch.bfloat16,
    )  # fmt: skip
    if device == "cuda":
        assert fused.why_not(problem) is None
    t = {
        "q": torch.randn(b, side**2, 4, 16), "keys": torch.randn(b, side**2, 16, 1),
        "values": torch.randn(b, side**2, v, 1), "table": torch.randn(2 * side - 1, 2 * side - 1, 16, 1),
    }  # fmt: skip
    t = {name: x.to(device, torch.bfloat16).requires_grad_() for name, x in t.items()}
    dy = torch.randn(b, side**2, 4, v).to(device, torch.bfloat16)
    strategy = "fused" if device == "cuda" else "scores_chunked"

    def call() -> None:
        lambda_op(**t, grid=(side, side), strategy=strategy).backward(dy)

    call()  # a library's first call takes a workspace
    peak = op.peak_bytes(call, device, known=[*t.values(), dy])
    given = sum(x.numel() * x.element_size() for x in (*t.values(), dy))
    assert 0 < peak < 12 * given  # of 64²: s alone is 38 times as much, E 76 times


def test_equal_runs_and_a_resumed_one_leave_the_same_weights(
    shared_colours, tmp_path, monkeypatch, device: str
) -> None:
    recipe = choose("folder", model="lambda_resnet_tiny", image_px=8, epochs=3, batch_images=8)
    recipe = dataclasses.replace(recipe, eval_batch_images=4, drop_path_rate=0.2)

    def left_by(out, **how) -> bytes:
        train(recipe, shared_colours, out=out, seed=1, device=device, **how)
        return (out / "weights.safetensors").read_bytes()

    first = left_by(tmp_path / "first")
    assert left_by(tmp_path / "again") == first
    real = _Run._step

    def stops(self, batch, wait_s):
        if self.at.step == 5:
            raise KeyboardInterrupt
        real(self, batch, wait_s)

    with monkeypatch.context() as patched:
        patched.setattr(_Run, "_step", stops)
        with pytest.raises(KeyboardInterrupt):
            left_by(tmp_path / "resumed", options=Options(save_steps=2, save_minutes=0))
    assert left_by(tmp_path / "resumed", resume=True) == first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_benchmark_runs_every_contender_there(dtype: torch.dtype, device: str) -> None:
    rows = op.bench_shape(6, 32, 5, 2, dtype, device, 0.0, False)
    for made in rows:
        assert {"timm", "plain einsum", "conv2d", "auto", "scores", "conv"} <= set(made["ms"])
        assert ("fused" in made["ms"]) == (device == "cuda")
        assert made["times_fastest"] > 0
