"""timm's models accelerated equal timm's, d-li14's weights in our model equal d-li14's, and nothing else changes."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers.lambda_layer import LambdaLayer as TimmLambdaLayer
from timm.models import create_feature_extractor
from torch import Tensor, nn
from torchvision.models import resnet50

from lambdanets import LambdaLayer, LambdaResNet
from lambdanets.models.create import PUBLIC, create_model
from lambdanets.models.d_li14 import from_d_li14
from lambdanets.models.timm_layers import AcceleratedLambdaLayer, accelerate

PARAMETERS = {
    "lambda_resnet26t": 10_958_272, "lambda_resnet26rpt_256": 10_988_688, "lambda_resnet50ts": 21_536_832,
    "lamhalobotnet50ts_256": 22_569_824,
}  # fmt: skip
LAYERS = {"lambda_resnet26t": 3, "lambda_resnet26rpt_256": 3, "lambda_resnet50ts": 5, "lamhalobotnet50ts_256": 2}


def as_if_trained(model: nn.Module, x: Tensor) -> nn.Module:
    """Random norms with the statistics of x: at initialisation a block's last norm is zero and hides its layer.

    The layers are cubic in their input: with statistics that are a little off, 16 of them in a row overflow.
    """

    def take_statistics(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        variance, mean = torch.var_mean(inputs[0], (0, 2, 3), correction=0)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)

    hooks = []
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, std=0.1)
            hooks.append(m.register_forward_pre_hook(take_statistics))
    with torch.no_grad():
        model.eval()(x)
    for hook in hooks:
        hook.remove()
    return model


def images(b: int, height: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(b, 3, height, width, dtype=dtype)


def timm_layer(r: int | None, size: tuple[int, int] = (6, 7), *, stride: int = 1, bias: bool = False) -> nn.Module:
    layer = TimmLambdaLayer(24, feat_size=size, stride=stride, num_heads=3, dim_head=5, r=r, qkv_bias=bias)
    for p in layer.parameters():
        if p.dim() == 1:
            nn.init.normal_(p)
    return layer


def lambda_layers(model: nn.Module) -> list[TimmLambdaLayer]:
    return [m for m in model.modules() if isinstance(m, TimmLambdaLayer)]


def relative_rms(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).square().mean().sqrt() / want.square().mean().sqrt()).item()


# --- the same function ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_model_equals_timms_in_float64(name: str) -> None:
    fixed = name.endswith("_256")
    x = images(1, *((256, 256) if fixed else (96, 160)))
    model = as_if_trained(timm.create_model(name).double(), x)
    with torch.inference_mode():
        want = model(x)
        assert accelerate(model) == LAYERS[name]
        got = model(x)
        for layer in lambda_layers(model):
            nn.init.zeros_(layer.norm_v.weight)
            nn.init.zeros_(layer.norm_v.bias)
        without = model(x)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert relative_rms(without, want) > 1e-3  # the layers matter: their agreement is no accident


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("r", [3, 9, None])
def test_a_layers_output_gradients_and_statistics_equal_timms(r, stride: int, bias: bool, training: bool) -> None:
    theirs = timm_layer(r, stride=stride, bias=bias).double().train(training)
    ours = copy.deepcopy(theirs)
    assert accelerate(ours) == 1
    x = torch.randn(2, 24, 6, 7, dtype=torch.float64)
    results = []
    for layer in (theirs, ours):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.square().sum().backward()
        results.append({"y": y, "x": leaf.grad, **{n: p.grad for n, p in layer.named_parameters()}})
    assert results[1].keys() == results[0].keys()
    for key, want in results[0].items():
        torch.testing.assert_close(
            results[1][key], want, rtol=1e-10, atol=1e-10 * (1 + float(want.detach().abs().max()))
        )
    for key, want in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], want, rtol=1e-12, atol=1e-12)


def test_a_model_trains_as_timms_does() -> None:
    x, target = images(2, 64, 64), torch.tensor([1, 4])
    theirs = as_if_trained(timm.create_model("lambda_resnet26t", num_classes=5).double(), x).train()
    ours = copy.deepcopy(theirs)
    optimiser = torch.optim.SGD(ours.parameters(), 0.1, momentum=0.9)  # made before the swap
    assert accelerate(ours) == 3
    other = torch.optim.SGD(theirs.parameters(), 0.1, momentum=0.9)
    before = theirs.state_dict()["stages.3.1.self_attn.conv_lambda.weight"].clone()
    for model, opt in ((theirs, other), (ours, optimiser)):
        for _ in range(2):
            opt.zero_grad()
            F.cross_entropy(model(x), target).backward()
            opt.step()
    state = theirs.state_dict()
    for key, got in ours.state_dict().items():
        torch.testing.assert_close(got, state[key], rtol=1e-7, atol=1e-9)
    assert not torch.allclose(state["stages.3.1.self_attn.conv_lambda.weight"], before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("r", [9, None])
def test_rounding_is_no_worse_than_three_times_timms(r: int | None, dtype: torch.dtype) -> None:
    theirs = timm_layer(r, (14, 10)).to(dtype).eval()
    ours, exact = copy.deepcopy(theirs), copy.deepcopy(theirs).double()
    accelerate(ours)
    x = torch.randn(4, 24, 14, 10).to(dtype)
    with torch.inference_mode():
        want, y = exact(x.double()), ours(x)
        assert y.dtype == dtype
        assert relative_rms(y, want) <= 3 * relative_rms(theirs(x), want) + 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("r", [9, None])
def test_autocast_gives_its_dtype_and_float32_gradients(r: int | None) -> None:
    theirs = timm_layer(r).eval()
    ours, exact = copy.deepcopy(theirs), copy.deepcopy(theirs).double()
    accelerate(ours)
    x = torch.randn(2, 24, 6, 7)
    want = exact(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        y, other = ours(x), theirs(x)
    assert y.dtype == torch.bfloat16
    assert relative_rms(y, want) <= 3 * relative_rms(other, want) + 2 * torch.finfo(torch.bfloat16).eps
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in ours.parameters())


# --- the same objects -----------------------------------------------------------------------------------------------


def test_modules_parameters_and_keys_stay_and_undo_gives_timms_classes_back() -> None:
    model = nn.ModuleDict({"window": timm_layer(3), "deep": nn.Sequential(nn.ReLU(), timm_layer(None, bias=True))})
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    types = {name: type(m) for name, m in modules.items()}
    keys = list(model.state_dict())
    assert accelerate(model) == 2
    assert [type(m) for m in lambda_layers(model)] == [AcceleratedLambdaLayer] * 2
    assert accelerate(model) == 0  # harmless
    assert list(model.state_dict()) == keys
    assert accelerate(model, undo=True) == 2
    assert accelerate(model, undo=True) == 0
    after = dict(model.named_modules())
    assert after.keys() == modules.keys()
    assert all(after[name] is m and type(m) is types[name] for name, m in modules.items())
    assert all(p is parameters[name] for name, p in model.named_parameters())


@pytest.mark.parametrize("name", ["lambda_resnet26t", "lambda_resnet26rpt_256"])
def test_state_dicts_load_strictly_into_the_other_form_and_back(name: str) -> None:
    x = images(1, 64, 64)
    theirs, ours = (as_if_trained(timm.create_model(name, num_classes=3, img_size=64).double(), x) for _ in range(2))
    accelerate(ours)
    with torch.inference_mode():
        assert not torch.allclose(ours(x), theirs(x))
        ours.load_state_dict(theirs.state_dict(), strict=True)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)
        again = timm.create_model(name, num_classes=3, img_size=64).double().eval()
        again.load_state_dict(ours.state_dict(), strict=True)
        assert torch.equal(again(x), theirs(x))


def test_a_model_without_lambda_layers_gives_0_and_subclasses_are_left_alone() -> None:
    class Own(TimmLambdaLayer):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    assert accelerate(timm.create_model("resnet18")) == 0
    model = nn.Sequential(Own(24), timm_layer(3))
    assert accelerate(model) == 1
    assert type(model[0]) is Own


def test_deepcopy_pickle_and_hooks_keep_the_accelerated_forward() -> None:
    layer = timm_layer(None).eval()
    seen: list[type] = []
    layer.register_forward_hook(lambda module, *_: seen.append(type(module)))
    accelerate(layer)
    layer(torch.randn(2, 24, 6, 7))
    assert seen == [AcceleratedLambdaLayer]
    layer._forward_hooks.clear()
    stream = io.BytesIO()
    pickle.dump(layer, stream)
    x = torch.randn(2, 24, 6, 7)
    for other in (copy.deepcopy(layer), pickle.loads(stream.getvalue())):
        assert type(other) is AcceleratedLambdaLayer
        assert torch.equal(other(x), layer(x))
        assert other.pos_emb is not layer.pos_emb


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("r", "stride"), [(9, 2), (None, 1)])
def test_compiles_as_one_graph_forward_and_backward(r: int | None, stride: int) -> None:
    layer = timm_layer(r, stride=stride)
    x = torch.randn(2, 24, 6, 7)
    want = layer(x)
    accelerate(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    got = compiled(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    got.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.usefixtures("fresh_compiler")
def test_a_layer_that_was_compiled_before_is_compiled_again_with_our_forward() -> None:
    layer, x = timm_layer(None).eval(), torch.randn(2, 24, 6, 7)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    want = compiled(x)
    assert accelerate(compiled) == 1
    torch.testing.assert_close(compiled(x), want, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError):  # timm's forward needs maps of its table's size
        TimmLambdaLayer.forward(layer, x[..., :5])
    assert compiled(x[..., :5]).shape == (2, 24, 6, 5)


def test_channels_last_works_for_the_whole_model_where_timms_5_d_kernel_refuses_it() -> None:
    x = images(2, 64, 96)
    model = as_if_trained(timm.create_model("lambda_resnet26t", num_classes=3).double(), x)
    with torch.inference_mode():
        want = model(x)
    with pytest.raises(RuntimeError, match="rank 4"):
        copy.deepcopy(model).to(memory_format=torch.channels_last)
    accelerate(model)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    model.to(memory_format=torch.channels_last)
    assert {name: p.shape for name, p in model.named_parameters()} == shapes
    assert model.stages[3][1].conv1_1x1.conv.weight.is_contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        last = x.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(model(last), want, rtol=1e-10, atol=1e-10)
        accelerate(model, undo=True)
        torch.testing.assert_close(model(x), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "convert", [nn.Module.half, nn.Module.double, lambda m: m.to("meta")], ids=["half", "double", "meta"]
)
def test_conversions_reach_every_weight_of_an_accelerated_layer(convert: Callable[[nn.Module], nn.Module]) -> None:
    ours, theirs = timm_layer(3, bias=True), timm_layer(3, bias=True)
    accelerate(ours)
    ours(torch.randn(1, 24, 6, 7)).sum().backward()
    got, want = convert(ours).state_dict(), convert(theirs).state_dict()
    assert {k: (v.shape, v.dtype, v.device) for k, v in got.items()} == {
        k: (v.shape, v.dtype, v.device) for k, v in want.items()
    }
    assert all(p.grad.dtype == p.dtype and p.grad.shape == p.shape for p in ours.parameters())


@pytest.mark.parametrize("feature_cls", ["list", "fx"])
def test_feature_extractors_give_the_same_maps(feature_cls: str) -> None:
    x = images(1, 96, 64)
    model = timm.create_model("lambda_resnet26t", features_only=True, feature_cls=feature_cls).double()
    as_if_trained(model, x)
    with torch.inference_mode():
        want = model(x)
        # A graph that was traced before holds timm's operations, no layers.
        assert accelerate(model) == (3 if feature_cls == "list" else 0)
        got = model(x)
    assert [f.shape[1:] for f in got] == [(64, 48, 32), (256, 24, 16), (512, 12, 8), (1024, 6, 4), (2048, 3, 2)]
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_a_graph_traced_afterwards_calls_our_layer() -> None:
    x = images(1, 64, 64)
    model = as_if_trained(timm.create_model("lambda_resnet26t").double(), x)
    accelerate(model)
    graph = create_feature_extractor(model, ["stages.3"])
    assert len(lambda_layers(graph)) == 3
    with torch.inference_mode():
        torch.testing.assert_close(graph(x)["stages.3"], model.stages(model.stem(x)), rtol=1e-10, atol=1e-10)


# --- maps of other sizes --------------------------------------------------------------------------------------------


def test_a_smaller_map_uses_the_middle_of_timms_table_and_a_larger_one_is_refused_with_the_sizes() -> None:
    big, small = timm_layer(None, (7, 9)).double().eval(), timm_layer(None, (4, 5)).double().eval()
    state = {k: v for k, v in big.state_dict().items() if k != "pos_emb"}
    small.load_state_dict(state | {"pos_emb": big.pos_emb[3:10, 4:13]})
    accelerate(big)
    x = torch.randn(2, 24, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(big(x), small(x), rtol=1e-10, atol=1e-10)
    for size in ((8, 9), (7, 10), (9, 7)):
        with pytest.raises(ValueError, match=rf"the map is \({size[0]}, {size[1]}\).*at most \(7, 9\).*resize_table"):
            big(torch.randn(1, 24, *size, dtype=torch.float64))


def test_channels_out_may_differ_from_channels_in_where_timms_forward_crashes() -> None:
    layer, x = TimmLambdaLayer(24, 36, r=3).double().eval(), torch.randn(2, 24, 6, 7, dtype=torch.float64)
    with pytest.raises(RuntimeError):
        layer(x)
    accelerate(layer)
    same = LambdaLayer(24, 36, scope=3, position_bias=True).double().eval()
    q, k, v = layer.qkv.weight.split([64, 16, 9])
    same.load_state_dict(
        {
            "to_q.weight": q, "to_k.weight": k, "to_v.weight": v, "position_bias": layer.conv_lambda.bias,
            "table": layer.conv_lambda.weight[:, 0].permute(1, 2, 0, 3),
            **{key: value for key, value in layer.state_dict().items() if key.startswith("norm_")},
        }
    )  # fmt: skip
    torch.testing.assert_close(layer(x), same(x), rtol=1e-10, atol=1e-10)


# --- create_model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLIC)
def test_create_model_builds_timms_model_with_its_parameter_count(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert [type(m) for m in lambda_layers(model)] == [AcceleratedLambdaLayer] * LAYERS[name]


def test_create_model_passes_every_argument_to_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    model = create_model("lambda_resnet26t.c1_in1k", num_classes=7, in_channels=1, drop_rate=0.25, drop_path_rate=0.1)
    assert model.get_classifier().weight.shape == (7, 2048)
    assert model.stem.conv1.conv.weight.shape[1] == 1
    assert model.head.drop.p == 0.25
    assert any(type(m).__name__ == "DropPath" for m in model.modules())
    assert not any(type(m).__name__ == "DropPath" for m in create_model("lambda_resnet26t").modules())
    asked = {}

    def instead(name: str, **arguments: object) -> nn.Module:
        asked.update(arguments, name=name)
        return nn.Identity()

    monkeypatch.setattr(timm, "create_model", instead)  # the download is timm's own and needs a network
    create_model("lambda_resnet50ts", pretrained=True)
    assert asked["name"] == "lambda_resnet50ts"
    assert asked["pretrained"] is True


def test_create_model_builds_both_kinds_and_refuses_what_one_of_them_has_not() -> None:
    arguments = {"num_classes": 5, "in_channels": 1, "drop_rate": 0.25, "drop_path_rate": 0.1}
    with torch.device("meta"):
        ours = create_model("resnet50_cclc", **arguments, share_tables=True, lambda_args={"scope": 5})
        public = create_model("lambda_resnet50ts", **arguments)
    assert type(ours) is LambdaResNet
    assert ours.layer3[0].conv2.table is ours.layer3[1].conv2.table
    assert ours.layer3[0].conv2.scope == (5, 5)
    assert len(lambda_layers(public)) == 5
    for model, stem, rate in ((ours, ours.conv1, ours.drop_rate), (public, public.stem.conv1.conv, public.head.drop.p)):
        assert (model.get_classifier().out_features, stem.in_channels, rate) == (5, 1, 0.25)
        assert any(type(m).__name__ == "DropPath" for m in model.modules())
    for wrong in ({"share_tables": True}, {"lambda_args": {"scope": 5}}):
        with pytest.raises(ValueError, match=r"'lambda_resnet26t' is timm's model, .* leave them out"):
            create_model("lambda_resnet26t", **wrong)
    with pytest.raises(ValueError, match="nobody has published weights of 'resnet50_llll'; of lambda_resnet26t, "):
        create_model("resnet50_llll", pretrained=True)
    with pytest.raises(ValueError, match="no model is called 'lambda_resnet51'"):
        create_model("lambda_resnet51")


# --- d-li14's weights -----------------------------------------------------------------------------------------------


class DLi14Layer(nn.Module):
    """What the checkpoint's layer computes, in other words than its published source: 4 heads, k = 16, scope r.

    One projection with rows q (head-major), k, v; batch norm on q and v, softmax of k over
    positions; a kernel (k, 1, 1, r, r) with a bias over each channel of v; 3x3 pooling, zeros counted.
    """

    def __init__(self, dim: int, stride: int = 1, r: int = 23) -> None:
        super().__init__()
        self.depth, self.stride, self.r = dim // 4, stride, r
        self.conv_qkv = nn.Conv2d(dim, 64 + 16 + dim // 4, 1, bias=False)
        self.norm_q, self.norm_v = nn.BatchNorm2d(64), nn.BatchNorm2d(dim // 4)
        self.lambda_conv = nn.Conv3d(1, 16, (1, r, r), padding=(0, r // 2, r // 2))

    def forward(self, x: Tensor) -> Tensor:
        projected = self.conv_qkv(x)
        keys = projected[:, 64:80].flatten(2).softmax(2)
        v = self.norm_v(projected[:, 80:])
        kernel = self.lambda_conv.weight[:, :, 0]  # (16, 1, r, r), applied to every channel of v alone
        each = [F.conv2d(c, kernel, self.lambda_conv.bias, padding=self.r // 2) for c in v.split(1, 1)]
        lambdas = torch.stack(each, 2) + (keys @ v.flatten(2).mT)[..., None, None]  # (b, 16, v, H, W)
        heads = self.norm_q(projected[:, :64]).split(16, 1)
        y = torch.cat([(q[:, :, None] * lambdas).sum(1) for q in heads], 1)
        return y if self.stride == 1 else F.avg_pool2d(F.pad(y, (1, 1, 1, 1)), 3, 2)


def d_li14(num_classes: int = 1000) -> nn.Module:
    """torchvision's ResNet-50 with every 3x3 as a lambda layer: the checkpoint's names and shapes."""
    model = resnet50(num_classes=num_classes)
    for name in ("layer1", "layer2", "layer3", "layer4"):
        for block in getattr(model, name):
            block.conv2 = DLi14Layer(block.conv2.in_channels, block.conv2.stride[0])
    return model


@pytest.mark.parametrize("stride", [1, 2])
def test_our_layer_with_d_li14s_weights_is_their_layer(stride: int) -> None:
    theirs = DLi14Layer(24, stride, r=5).double()
    ours = LambdaLayer(24, scope=5, stride=stride, position_bias=True, pool_count_padding=True).double()
    for p in theirs.parameters():
        nn.init.normal_(p)
    state = theirs.state_dict()
    q, k, v = state.pop("conv_qkv.weight").split([64, 16, 6])
    table = state.pop("lambda_conv.weight")[:, :, 0].permute(2, 3, 0, 1)
    bias = state.pop("lambda_conv.bias")
    ours.load_state_dict(
        {**state, "to_q.weight": q, "to_k.weight": k, "to_v.weight": v, "table": table, "position_bias": bias}
    )
    x = torch.randn(2, 24, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_whole_d_li14_checkpoint_gives_d_li14s_logits(prefix: str) -> None:
    x = images(2, 64, 96)
    theirs = as_if_trained(d_li14(num_classes=10).double(), x).float()  # checkpoints are float32
    ours = from_d_li14({prefix + key: value for key, value in theirs.state_dict().items()})
    assert type(ours) is LambdaResNet
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    with torch.inference_mode():
        torch.testing.assert_close(ours.double().eval()(x), theirs.double()(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_d_li14s_weights_are_taken_as_they_are_given_and_stay_the_callers(dtype: torch.dtype) -> None:
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in d_li14(num_classes=3).state_dict().items()}
    before = {key: value.clone() for key, value in state.items()}
    ours = from_d_li14(state)
    assert {p.dtype for p in ours.parameters()} == {dtype}
    assert torch.equal(ours.layer2[0].conv2.to_v.weight, before["layer2.0.conv2.conv_qkv.weight"][80:])
    kernel = ours.layer4[2].conv2.table.permute(2, 3, 0, 1)[:, :, None]
    assert torch.equal(kernel, before["layer4.2.conv2.lambda_conv.weight"])
    with torch.no_grad():
        for value in ours.state_dict().values():
            value.zero_()
    assert all(torch.equal(state[key], before[key]) for key in state)


def test_d_li14s_model_has_14995848_parameters() -> None:
    with torch.device("meta"):
        model = d_li14()
    assert sum(p.numel() for p in model.parameters()) == 14_995_848 == 14_995_592 + 16 * 16


def test_a_checkpoint_of_another_model_is_refused_with_at_most_ten_keys_a_kind() -> None:
    with pytest.raises(RuntimeError, match=r"does not fit d-li14's lambda_resnet50") as caught:
        from_d_li14(resnet50(num_classes=10).state_dict())
    text = str(caught.value)
    assert "16 keys unknown: layer1.0.conv2.weight, " in text
    assert "and 6 more" in text
    assert "208 keys missing: layer1.0.conv2.conv_qkv.weight, " in text
    assert text.count("conv2.") == 20

    state = d_li14(num_classes=10).state_dict()
    state["layer2.1.conv2.lambda_conv.weight"] = torch.zeros(16, 1, 1, 7, 7)
    state["layer3.0.conv2.conv_qkv.weight"] = torch.zeros(100, 256, 1, 1)
    del state["layer4.2.bn2.bias"]
    with pytest.raises(RuntimeError) as caught:
        from_d_li14(state)
    text = str(caught.value)
    assert "1 keys missing: layer4.2.bn2.bias" in text
    assert "layer2.1.conv2.lambda_conv.weight is (16, 1, 1, 7, 7), the model's (16, 1, 1, 23, 23)" in text
    assert "layer3.0.conv2.conv_qkv.weight is (100, 256, 1, 1), the model's (144, 256, 1, 1)" in text
    with pytest.raises(RuntimeError, match="1 keys unknown: state_dict"):
        from_d_li14({"state_dict": state})
