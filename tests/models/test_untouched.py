"""Whatever somebody has done to a module, `fuse`, `accelerate` and the layers compute what a call of it would."""

import copy
import pickle
import threading
import types
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from test_fuse import as_if_trained, assert_equal_within_rounding
from timm.layers import BatchNormAct2d, StdConv2d
from timm.layers.lambda_layer import LambdaLayer as TimmLambdaLayer
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from lambdanets import LambdaLayer, LambdaLayer1d, accelerate, create_model, fuse
from lambdanets.models.fuse import FusedLambdaLayer
from lambdanets.models.timm_layers import AcceleratedLambdaLayer

# --- what people do to modules ------------------------------------------------------------------------------------


def subclassed(module: nn.Module) -> None:
    class Own(type(module)):  # type: ignore[misc]
        def forward(self, *inputs: Any) -> Any:
            return 1.5 * super().forward(*inputs)

    module.__class__ = Own


def changed_by_a_hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, inputs, output: 1.5 * output)


def changed_by_a_hook_before(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda module, inputs: tuple(1.5 * x for x in inputs))


def patched(module: nn.Module) -> None:
    module.forward = types.MethodType(lambda self, *inputs: 1.5 * type(self).forward(self, *inputs), module)  # type: ignore[method-assign]


def with_an_adapter_in_its_forward(module: nn.Module) -> None:
    """As accelerate's offloading does: the weights are elsewhere until the call."""
    kept = {name: p.detach().clone() for name, p in module.named_parameters(recurse=False)}
    if not kept:
        return changed_by_a_hook(module)
    for p in module.parameters(recurse=False):
        p.data = torch.full_like(p, float("nan"))

    def forward(self: nn.Module, *inputs: Any) -> Any:
        with torch.no_grad():
            for name, value in kept.items():
                getattr(self, name).data = value.clone()
        y = type(self).forward(self, *inputs)
        for name in kept:
            getattr(self, name).data = torch.full_like(kept[name], float("nan"))
        return y

    module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def weight_of(module: nn.Module) -> str | None:
    return next((name for name, _ in module.named_parameters(recurse=False)), None)


def parametrized(module: nn.Module) -> None:
    name = weight_of(module)
    if name is None:
        return changed_by_a_hook(module)
    parametrize.register_parametrization(module, name, Half())


def normalised_spectrally(module: nn.Module) -> None:
    name = weight_of(module)
    if name is None or getattr(module, name).dim() < 2:
        return parametrized(module)
    parametrizations.spectral_norm(module, name)


def pruned(module: nn.Module) -> None:
    name = weight_of(module)
    if name is None:
        return changed_by_a_hook(module)
    prune.random_unstructured(module, name, amount=0.5)


TOUCHES: list[Callable[[nn.Module], None]] = [
    subclassed, changed_by_a_hook, changed_by_a_hook_before, patched, with_an_adapter_in_its_forward, parametrized,
    normalised_spectrally, pruned,
]  # fmt: skip


class Chain(nn.Module):
    """Every kind of part that is folded or read, and the pooling."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.layer = layer
        self.conv2, self.norm_act = nn.Conv2d(8, 4, 1, bias=False), BatchNormAct2d(4, drop_layer=nn.Identity)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm_act(self.conv2(self.layer(self.norm(self.conv(x)))))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "ours": lambda: LambdaLayer(8, scope=3, key_depth=4, stride=2),
    "ours without norms": lambda: LambdaLayer(8, scope=3, key_depth=4, qv_norm=False),
    "timm's window": lambda: TimmLambdaLayer(8, r=3, dim_head=4, stride=2),
    "timm's table": lambda: TimmLambdaLayer(8, r=None, feat_size=(6, 6), dim_head=4),
}


def chain(layer: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = Chain(LAYERS[layer]())
    return model, as_if_trained(model, 2, 3, 6, 6)


PLACES = [(layer, path) for layer in LAYERS for path in dict(chain(layer)[0].named_modules())]


@pytest.mark.filterwarnings("ignore:.* keeps its batch norms")
@pytest.mark.parametrize("touch", TOUCHES)
@pytest.mark.parametrize(("layer", "path"), PLACES)
def test_what_is_done_to_any_part_is_in_the_fused_models_output(layer: str, path: str, touch: Callable) -> None:
    model, x = chain(layer)
    plain = model(x)
    touch(model.get_submodule(path))
    want = model(x)
    if touch is not with_an_adapter_in_its_forward:
        assert not torch.allclose(want, plain, rtol=1e-3)
    torch.manual_seed(1)
    assert_equal_within_rounding(fuse(model)(x), want)


@pytest.mark.parametrize("touch", TOUCHES)
@pytest.mark.parametrize(("layer", "path"), [place for place in PLACES if place[0].startswith("timm")])
def test_what_is_done_before_or_after_accelerating_is_in_the_output(layer: str, path: str, touch: Callable) -> None:
    want = None
    for accelerated in ("never", "before", "after"):
        model, x = chain(layer)
        if accelerated == "before":
            assert accelerate(model) == 1
        torch.manual_seed(1)  # what pruning draws
        touch(model.get_submodule(path))
        if accelerated == "after":
            accelerate(model)
        for _ in range(2):
            want = model(x) if want is None else want
            assert_equal_within_rounding(model(x), want)


@pytest.mark.parametrize("touch", [touch for touch in TOUCHES if touch is not with_an_adapter_in_its_forward])
@pytest.mark.parametrize("layer", ["timm's window", "timm's table"])
def test_training_an_accelerated_layer_that_was_touched_is_training_timms(layer: str, touch: Callable) -> None:
    losses = []
    for fast in (True, False):
        model, x = chain(layer)
        if fast:
            accelerate(model)
        torch.manual_seed(1)
        touch(model.layer.conv_lambda if layer == "timm's window" else model.layer.qkv)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for _ in range(3):
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_a_hook_on_all_modules_hears_the_parts_of_a_layer() -> None:
    model, x = chain("ours")
    heard: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: heard.append(module))
    try:
        model(x)
    finally:
        handle.remove()
    assert {model.layer.to_q, model.layer.norm_v, model.conv2} <= set(heard)


# --- convolutions and norms that are not what they seem -----------------------------------------------------------


class Aliased(nn.Module):
    """Calls its parts through lists that torch does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.layer = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), LambdaLayer(8, scope=3)
        object.__setattr__(self, "parts", [self.conv, self.norm, self.layer])

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x

    def __deepcopy__(self, memo: dict) -> "Aliased":
        made = Aliased().to(next(self.parameters()))
        made.load_state_dict(self.state_dict())
        return made.train(self.training)


class Twice(nn.Module):
    """A layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a = LambdaLayer(4, scope=3)
        self.b = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


class Optional(nn.Module):
    """Whether the norm is the only reader depends on an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y if more is None else self.norm(y) + more


class ReadsWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) * self.conv.weight.sum()


class Standardised(nn.Module):
    """What NFNets and BiT have: the convolution standardises its weights at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = StdConv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


@pytest.mark.parametrize("kind", [Aliased, Optional, ReadsWeights, Standardised])
def test_a_norm_is_folded_only_where_nothing_else_can_notice(kind: type) -> None:
    torch.manual_seed(0)
    model = kind()
    x = as_if_trained(model, 2, 3, 5, 5)
    fused = fuse(model)
    assert_equal_within_rounding(fused(x), model(x))
    if kind is Optional:
        assert_equal_within_rounding(fused(x, 2 * x), model(x, 2 * x))


def test_a_layer_under_two_names_is_one_fused_layer() -> None:
    model = Twice()
    x = as_if_trained(model, 1, 4, 5, 5)
    fused = fuse(model)
    assert type(fused.a) is FusedLambdaLayer
    assert fused.a is fused.b
    assert_equal_within_rounding(fused(x), model(x))


@pytest.mark.parametrize(
    "name", ["resnetv2_50x1_bit", "nf_resnet50", "dm_nfnet_f0", "mobilenetv3_small_100", "vgg11_bn"]
)
def test_timms_models_with_convolutions_of_their_own_fuse_to_equals(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4)
    x = as_if_trained(model, 1, 3, 64, 64)
    assert_equal_within_rounding(fuse(model)(x), model(x), 1e-8)


# --- what it says -------------------------------------------------------------------------------------------------


def test_fusing_explains_each_lambda_layer_and_each_norm() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), LambdaLayer(8, scope=3), nn.BatchNorm2d(8), StdConv2d(8, 8, 1),
        nn.BatchNorm2d(8), TimmLambdaLayer(8, r=3), LambdaLayer(8, scope=3),
    )  # fmt: skip
    model[6].conv_lambda.register_forward_hook(lambda *_: None)
    subclassed(model[7])
    fused, changes = fuse(model, explain=True)
    assert {row.path: (row.what, row.why) for row in changes} == {
        "1": ("folded", "into 0"),
        "2": ("replaced", "its projections and norms are one product"),
        "3": ("left", "reads 2, a LambdaLayer, and no convolution"),
        "5": ("left", "its convolution 4 is no Conv2d itself but a StdConv2d"),
        "6": ("left", "its conv_lambda has hooks"),
        "7": ("left", "is no LambdaLayer itself but a Own"),
    }
    assert str(changes).splitlines()[0] == "1 replaced, 1 folded, 4 left"
    assert len(str(changes).splitlines()) == 7
    assert type(fused[2]) is FusedLambdaLayer
    assert str(fuse(nn.ReLU(), explain=True)[1]) == "nothing here is a lambda layer or a batch norm"


def test_accelerating_explains_each_of_timms_layers() -> None:
    model = nn.ModuleList([TimmLambdaLayer(8, r=3) for _ in range(4)])
    subclassed(model[1])
    patched(model[2])
    pruned(model[3].conv_lambda)
    count, changes = accelerate(model, explain=True)
    assert count == 1
    assert type(model[0]) is AcceleratedLambdaLayer
    assert {row.path: (row.what, row.why) for row in changes} == {
        "0": ("replaced", "by the order that lambda_op plans"),
        "1": ("left", "is a subclass, which may compute something else"),
        "2": ("left", "has a forward of its own"),
        "3": ("left", "its conv_lambda has hooks"),
    }
    assert accelerate(model, explain=True)[1].of("0") == ("0", "AcceleratedLambdaLayer", "left", "is so already")


# --- inference tensors, threads, pickles --------------------------------------------------------------------------


@pytest.mark.parametrize("fused_in_inference", [False, True])
@pytest.mark.parametrize("strategy", ["scores", "lambdas", "fourier", "conv", "auto"])
def test_a_saliency_map_after_a_call_in_inference_mode(strategy: str, fused_in_inference: bool) -> None:
    torch.manual_seed(0)
    layer = LambdaLayer(8, scope=5, strategy=strategy)
    x = as_if_trained(layer, 1, 8, 7, 6)
    with torch.inference_mode(fused_in_inference):
        fused = fuse(layer)
    with torch.inference_mode():
        fused(x)
    gradients = []
    for module in (fused, layer):
        inputs = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(module(inputs).square().sum(), inputs)[0])
    assert_equal_within_rounding(*gradients)


def test_threads_that_share_a_fused_model_get_the_models_numbers() -> None:
    torch.manual_seed(0)
    layer = LambdaLayer(8, scope=5)
    as_if_trained(layer, 1, 8, 7, 6)
    fused = fuse(layer)
    images = [torch.randn(1, 8, 3 + i % 9, 4 + i % 7, dtype=torch.float64) for i in range(63)]
    with torch.inference_mode():
        want = [layer(x) for x in images]
    wrong: list[Any] = []

    def serve(start: int) -> None:
        with torch.inference_mode():
            for i in range(3 * len(images)):
                at = (7 * i + start) % len(images)
                try:
                    assert_equal_within_rounding(fused(images[at]), want[at])
                except BaseException as error:
                    wrong.append(error)

    threads = [threading.Thread(target=serve, args=(start,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_pickle_of_a_fused_model_does_not_grow_with_the_maps_that_it_has_seen() -> None:
    fused = fuse(create_model("lambda_resnet_tiny", num_classes=3))
    before = len(pickle.dumps(fused))
    x = torch.randn(1, 3, 32, 32)
    want = fused(x)
    content = pickle.dumps(fused)
    assert len(content) < before + 1000
    torch.testing.assert_close(pickle.loads(content)(x), want)
    torch.testing.assert_close(copy.deepcopy(fused)(x), want)


@pytest.mark.parametrize("kind", [LambdaLayer, LambdaLayer1d])
@pytest.mark.parametrize("training", [False, True])
def test_second_derivatives_of_a_layer_are_those_of_finite_differences(kind: type, training: bool) -> None:
    torch.manual_seed(0)
    layer = kind(4, scope=3, key_depth=2, heads=2).double().train(training)
    x = torch.randn(2, 4, *((3, 2) if kind is LambdaLayer else (5,)), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(layer, (x,))
