"""A fused model gives the outputs of the model that it was made from, faster, and never something else instead."""

import copy
import warnings

import pytest
import timm
import torch
from timm.layers.lambda_layer import LambdaLayer as TimmLambdaLayer
from torch import Tensor, nn

from lambdanets import LambdaLayer, LambdaLayer1d, LambdaLayer3d, create_model, fuse
from lambdanets.models.fuse import KEPT_BYTES, FusedLambdaLayer
from lambdanets.ops import convolution


def as_if_trained(model: nn.Module, *shape: int) -> Tensor:
    """Norms with random weights and the statistics of an image, which is returned: deep lambda models blow up else."""
    x = torch.randn(shape, dtype=torch.float64)

    def take_statistics(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        variance, mean = torch.var_mean(inputs[0], [d for d in range(inputs[0].dim()) if d != 1], correction=0)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)

    model.double().eval()
    hooks = []
    for m in model.modules():
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, std=0.1)
            hooks.append(m.register_forward_pre_hook(take_statistics))
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return x


def assert_equal_within_rounding(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * b.abs().max().item())


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("name", "norms"),
    # One norm stays after each lambda layer; every other one is gone.
    [("lambda_resnet50", 4), ("resnet50_llll", 16), ("resnet50_cccc", 0), ("lambda_resnet_tiny", 3)],
)
def test_a_fused_model_equals_the_model_and_only_norms_after_lambda_layers_stay(
    name: str, norms: int, channels_last: bool
) -> None:
    torch.manual_seed(0)
    model = create_model(name, num_classes=7)
    x = as_if_trained(model, 2, 3, 64, 48)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fused = fuse(model)
    if channels_last:
        x, fused = x.contiguous(memory_format=torch.channels_last), fused.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        for _ in range(2):  # the second call reads the expanded tables
            # 16 lambda layers in a row, each cubic in its input, magnify rounding.
            assert_equal_within_rounding(fused(x), model(x), 1e-8 if norms == 16 else 1e-10)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in fused.modules()) == norms
    assert sum(type(m) is FusedLambdaLayer for m in fused.modules()) == norms
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())  # a copy was fused
    assert not any(p.requires_grad for p in fused.parameters())


@pytest.mark.parametrize("name", ["lambda_resnet26t", "lambda_resnet26rpt_256", "efficientnet_b0", "resnet18"])
def test_timms_models_are_fused_too(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5)
    x = as_if_trained(model, 1, 3, *((256, 256) if "rpt" in name else (64, 64)))
    fused = fuse(model)
    with torch.inference_mode():
        assert_equal_within_rounding(fused(x), model(x))
    lambdas = sum(isinstance(m, TimmLambdaLayer) for m in model.modules())
    assert sum(type(m) is FusedLambdaLayer for m in fused.modules()) == lambdas
    assert sum(isinstance(m, nn.BatchNorm2d) for m in fused.modules()) == lambdas


@pytest.mark.parametrize("where", [{"r": 5}, {"r": None, "feat_size": (6, 7)}])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_timms_layer_with_biases_and_pooling_fuses_exactly(where: dict, stride: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = TimmLambdaLayer(24, stride=stride, num_heads=3, dim_head=5, qkv_bias=bias, **where)
    if layer.conv_lambda is not None:
        nn.init.normal_(layer.conv_lambda.bias)
    if bias:
        nn.init.normal_(layer.qkv.bias)
    x = as_if_trained(layer, 2, 24, 6, 7)
    assert type(fuse(layer)) is FusedLambdaLayer
    assert_equal_within_rounding(fuse(layer)(x), layer(x))


@pytest.mark.parametrize(
    "change",
    [
        {}, {"content": False}, {"position": False, "scope": None}, {"intra_depth": 3}, {"stride": 2},
        {"query_softmax": True}, {"qv_norm": False}, {"key_norm": "l2"}, {"position_bias": True},
        {"scope": None, "size": (6, 7)}, {"strategy": "conv"}, {"strategy": "lambdas"}, {"strategy": "tuned"},
        {"strategy": "scores_chunked"},
    ],
)  # fmt: skip
def test_every_option_of_the_layer_survives_fusing(change: dict) -> None:
    torch.manual_seed(0)
    layer = LambdaLayer(8, 12, **{"heads": 3, "key_depth": 4, "scope": 5, **change})
    if layer.position_bias is not None:
        nn.init.normal_(layer.position_bias)
    x = as_if_trained(layer, 2, 8, 6, 7)
    fused = fuse(layer)
    hidden = torch.rand(2, 6, 7) < 0.7
    with torch.inference_mode():
        for _ in range(2):
            assert_equal_within_rounding(fused(x), layer(x))
            assert_equal_within_rounding(fused(x, padding=hidden), layer(x, padding=hidden))


@pytest.mark.parametrize(
    ("kind", "shape", "change"),
    [(LambdaLayer1d, (9,), {"causal": True}), (LambdaLayer3d, (2, 3, 4), {}), (LambdaLayer, (5, 6), {"context": True})],
)
def test_sequences_volumes_and_a_separate_context_are_fused(kind: type, shape: tuple, change: dict) -> None:
    torch.manual_seed(0)
    separate = change.pop("context", False)
    layer = kind(8, scope=3, **change).double().eval()
    inputs = torch.randn(1 + separate, 2, 8, *shape, dtype=torch.float64)
    assert type(fuse(layer)) is FusedLambdaLayer
    assert_equal_within_rounding(fuse(layer)(*inputs), layer(*inputs))
    assert type(fuse(LambdaLayer(8, context_dim=4))) is LambdaLayer  # its projections read two different widths


def test_expanded_tables_are_kept_for_small_maps_within_their_bound_and_dropped_with_the_dtype() -> None:
    layer = fuse(LambdaLayer(256, scope=23, strategy="scores"))
    with torch.inference_mode():
        for side in (7, 14, 7, 14):
            layer(torch.randn(1, 256, side, side))
        kept = [tuple(t.shape[:2]) for t in layer.expanded.values() if t is not None]
        assert kept == [(49, 49), (196, 196)]
        for b in range(1, 6):  # the plan depends on the batch, so each size has its own
            layer(torch.randn(b, 256, 14, 14))
        assert sum(t.nbytes for t in layer.expanded.values() if t is not None) <= KEPT_BYTES
        layer(torch.randn(1, 256, 30, 30))
        assert list(layer.expanded.values())[-1] is None
    layer.bfloat16()
    assert not layer.expanded
    assert layer(torch.randn(1, 256, 7, 7).bfloat16()).dtype == torch.bfloat16


def test_loading_other_weights_forgets_the_expanded_tables() -> None:
    a, b = (fuse(LambdaLayer(16, scope=7).eval()) for _ in range(2))
    x = torch.randn(1, 16, 5, 5)
    want = b(x)
    a(x)
    a.load_state_dict(b.state_dict())
    assert torch.equal(a(x), want)


def test_what_fourier_makes_of_a_table_is_kept_within_its_bound_and_forgotten_with_the_table(monkeypatch) -> None:
    torch.manual_seed(0)
    layer, other = (LambdaLayer(16, scope=5, strategy="fourier").eval() for _ in range(2))
    fused = fuse(layer)
    x, wide = torch.randn(2, 16, 12, 9), torch.randn(1, 16, 7, 40)
    for _ in range(2):
        torch.testing.assert_close(fused(x), layer(x))
        torch.testing.assert_close(fused(wide), layer(wide))
    first = list(fused.kept.values())
    assert len(first) == 2
    with torch.autocast("cpu", torch.bfloat16):
        fused(x)
    assert len(fused.kept) == 3  # the table was rounded
    fused(x)
    assert list(fused.kept.values())[:2] == first
    monkeypatch.setattr(convolution, "BLOCK_BYTES", first[0].T.nbytes)
    fused(torch.randn(1, 16, 11, 9))
    assert sum(made.T.nbytes for made in fused.kept.values()) <= first[0].T.nbytes
    fused.load_state_dict(fuse(other).state_dict())
    torch.testing.assert_close(fused(x), other(x))
    torch.testing.assert_close(fused.double()(x.double()), other.double()(x.double()), rtol=0, atol=1e-5)
    x.requires_grad_()
    fused, other = fused.float(), other.float()
    torch.testing.assert_close(torch.autograd.grad(fused(x).sum(), x), torch.autograd.grad(other(x).sum(), x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_that_of_the_layer(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = LambdaLayer(32, scope=7)
    x = as_if_trained(layer, 4, 32, 10, 9)
    exact = layer(x)

    def rms(y: Tensor) -> float:
        return ((y.double() - exact).square().mean() / exact.square().mean()).sqrt().item()

    plain = copy.deepcopy(layer).to(dtype)
    plain.to_q.register_forward_hook(lambda *_: None)  # heard, and so not folded
    with torch.inference_mode():
        assert rms(fuse(layer).to(dtype)(x.to(dtype))) <= 1.5 * rms(plain(x.to(dtype))) + 2 * torch.finfo(dtype).eps


def test_autocast_and_compile_give_the_fused_layers_numbers() -> None:
    torch.manual_seed(0)
    fused = fuse(LambdaLayer(32, scope=7).eval())
    x = torch.randn(2, 32, 6, 5)
    want = fused(x)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            y = fused(x)
            assert y.dtype == torch.bfloat16
            assert (y - want).square().mean().sqrt() < 0.02 * want.square().mean().sqrt()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), want)


def test_what_is_replaced_or_hooked_is_called_not_folded() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), LambdaLayer(8, scope=3)).eval()
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append("conv"))
    model[2].to_v.register_forward_hook(lambda *_: seen.append("to_v"))
    fused = fuse(model)
    x = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(fused(x), model(x))
    assert seen == ["conv", "to_v"] * 2
    assert isinstance(fused[1], nn.BatchNorm2d)
    assert type(fused[2]) is LambdaLayer


class Shared(nn.Module):
    """A convolution read twice, and one that is called twice: neither may take a norm in."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.na, self.nb = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.na(y) + y + self.nb(self.b(x)) + self.b(2 * x)


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.layer = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), LambdaLayer(8, scope=3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return self.layer(y if y.sum() > 0 else -y)


def test_a_convolution_with_another_reader_keeps_its_norm() -> None:
    model = Shared()
    x = as_if_trained(model, 2, 3, 4, 4)
    assert_equal_within_rounding(fuse(model)(x), model(x))


def test_a_model_that_cannot_be_traced_keeps_its_norms_and_says_so() -> None:
    model = Untraceable()
    x = as_if_trained(model, 2, 3, 4, 4)
    with pytest.warns(UserWarning, match="Untraceable keeps its batch norms: torch.fx cannot follow it"):
        fused = fuse(model)
    assert isinstance(fused.norm, nn.BatchNorm2d)
    assert type(fused.layer) is FusedLambdaLayer
    assert_equal_within_rounding(fused(x), model(x))


def test_a_fused_layer_refuses_training_and_resizing_with_the_remedy() -> None:
    fused = fuse(nn.Sequential(LambdaLayer(8, scope=None, size=4)))
    with pytest.raises(RuntimeError, match="train the model that it was made from"):
        fused.train()
    with pytest.raises(RuntimeError, match="resize the layer that it was made from"):
        fused[0].resize(5)
    with pytest.raises(ValueError, match="was made for at most"):
        fused(torch.randn(1, 8, 5, 5))
    fused.eval()


def test_a_fused_model_without_data_has_the_shape_of_its_output() -> None:
    model = create_model("lambda_resnet_tiny", num_classes=3).to("meta")
    assert fuse(model)(torch.empty(2, 3, 32, 48, device="meta")).shape == (2, 3)


def test_a_fused_model_can_be_copied_exported_and_saved() -> None:
    model = create_model("lambda_resnet_tiny", num_classes=3)
    x = as_if_trained(model, 2, 3, 32, 32).float()
    fused = fuse(model).float()
    want = fused(x)
    again = copy.deepcopy(fused)
    again.load_state_dict(fused.state_dict())
    torch.testing.assert_close(again(x), want)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own
        program = torch.export.export(fused, (x,))
    torch.testing.assert_close(program.module()(x), want)


def test_the_settings_of_a_layer_are_all_that_it_is_besides_its_weights() -> None:
    for layer in (LambdaLayer(8, scope=3), LambdaLayer(8, position=False), LambdaLayer(8, scope=None, size=(4, 4))):
        held = {name for name in vars(layer) if not name.startswith("_")} - {
            "training",
            "to_k",
            "table",
            "position_bias",
        }
        assert held == set(LambdaLayer.SETTINGS)
        assert all(getattr(fuse(layer.eval()), name) == getattr(layer, name) for name in held)
