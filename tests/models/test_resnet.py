"""The models: the paper's parameter counts and FLOPs, timm's interface, any image."""

import re

import pytest
import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor

import lambdanets
from lambdanets import LambdaLayer, create_model, list_models, model_cost
from lambdanets.models.cost import models_text, plan_text
from lambdanets.models.create import ENTRYPOINTS
from lambdanets.models.sizes import SIZES


def on_meta(name: str, **arguments) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, **arguments)


def params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# docs/paper.md sections 2, 3 and 5. It prints 51.41 for the 152: with its own 57.99 for the 200, whose c3 has 16 more
# blocks of 411,776, that can only be 51.40.
MILLIONS = {
    "lambda_resnet50": 18.96, "lambda_resnet101": 36.87, "lambda_resnet152": 51.40, "lambda_resnet200": 57.99,
    "lambda_resnet270": 81.37, "lambda_resnet350": 105.5, "lambda_resnet420": 124.4, "lambda_resnet101_c4": 25.98,
    "resnet101_d": 44.6, "resnet101_d_se": 63.6, "resnet152_d": 60.2, "resnet152_d_se": 86.6,  # Table 6

    "lambda_resnet152_c4": 35.08, "lambda_resnet200_c4": 41.67, "resnet50_cccc": 25.6, "resnet50_lccc": 25.5,
    "resnet50_llcc": 25.0, "resnet50_lllc": 21.7, "resnet50_llll": 15.0, "resnet50_clll": 15.1, "resnet50_ccll": 15.56,
    "resnet50_cccl": 18.8, "resnet50_se": 28.1, "resnet50_llll_u4": 16.04,
}  # fmt: skip
# Our own, hybrids, and the counterparts, whose counts test_counterparts.py has.
OURS = "resnet50_[cl]{4}|lambda_resnet_(tiny|small)|resnet50_(double_attention|caaa|rrrr|xxxx|gggg|eeee|dddd|pppp)"
EXACT = {"resnet50_llll": 14_995_592, "resnet50_cccc": 25_557_032, "lambda_resnet50": 18_963_272}


@pytest.mark.parametrize("name", MILLIONS)
def test_parameter_counts_are_the_papers(name: str) -> None:
    count, decimals = params(on_meta(name)), len(str(MILLIONS[name]).split(".")[1])
    assert round(count / 1e6, decimals) == MILLIONS[name]
    assert EXACT.get(name, count) == count


def test_no_published_name_is_without_a_row_or_a_function() -> None:
    for name in list_models():
        assert name in MILLIONS or re.fullmatch(OURS, name)
        assert callable(ENTRYPOINTS[name])
        assert timm.is_model(name)
    assert {f"resnet50_{a}{b}{c}{d}" for a in "cl" for b in "cl" for c in "cl" for d in "cl"} <= set(SIZES)


def test_lambda_resnet50_by_parts() -> None:
    parts = {s.stage: s.params for s in model_cost("lambda_resnet50")}
    assert parts == {
        "stem": 65_760, "c2": 315_072, "c3": 1_746_432, "c4": 6_554_128, "c5": 8_232_880, "head": 2_049_000,
    }  # fmt: skip


def test_without_its_tables_llll_has_14_860_168_parameters() -> None:
    model = on_meta("resnet50_llll")
    assert params(model) - sum(m.table.numel() for m in model.modules() if isinstance(m, LambdaLayer)) == 14_860_168


ABLATION = {
    (2, 4, 1): 14.61, (4, 4, 1): 14.67, (8, 4, 1): 14.78, (16, 4, 1): 15.00, (32, 4, 1): 15.44, (8, 8, 1): 14.74,
    (16, 8, 1): 15.08, (32, 8, 1): 15.76, (8, 8, 4): 15.26, (8, 8, 8): 16.04, (16, 4, 4): 16.04,
}  # fmt: skip


@pytest.mark.parametrize(("sizes", "millions"), ABLATION.items(), ids=str)
def test_key_depth_heads_and_intra_depth_give_the_papers_counts(sizes: tuple[int, int, int], millions: float) -> None:
    k, h, u = sizes
    arguments = {"key_depth": k, "heads": h, "intra_depth": u, "scope": 23 if u == 1 else 7}
    assert round(params(on_meta("resnet50_llll", lambda_args=arguments)) / 1e6, 2) == millions


def gflops(model: nn.Module | str) -> float:
    return round(2e-9 * sum(s.macs for s in model_cost(model, 224)), 1)


def test_gflops_of_content_position_and_both_are_the_papers() -> None:
    assert gflops(on_meta("resnet50_llll", lambda_args={"position": False})) == 5.0
    assert gflops(on_meta("resnet50_llll", lambda_args={"content": False})) == 11.9
    assert gflops("resnet50_llll") == 12.0


@pytest.mark.parametrize(("scope", "want"), {3: 5.7, 7: 6.1, 15: 7.8, 23: 10.0, 31: 12.4, 111: 19.4}.items())
def test_gflops_by_scope_are_the_papers(scope: int, want: float) -> None:
    """A scope of 2·side - 1 = 55 or more is global in c3, the largest lambda map of CLLL."""
    assert gflops(on_meta("resnet50_clll", lambda_args={"scope": scope})) == want


@pytest.mark.parametrize("name", ["resnet50_cccc", "resnet50_se", "lambda_resnet50", "resnet50_llll"])
def test_torchs_flop_counter_agrees_when_each_layer_runs_the_paper_orders(name: str) -> None:
    model, sizes = on_meta(name).eval(), []
    for module in model.modules():
        if isinstance(module, LambdaLayer):
            module.register_forward_pre_hook(_paper_order)
            module.register_forward_hook(lambda m, a, o: sizes.append(m.problem(a[0])))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device="meta"))
    # Our content and position parts each apply their lambda to q; the paper adds the two first.
    twice = sum(p.n * p.h * p.k * p.v for p in sizes)
    assert counter.get_total_flops() == 2 * (sum(s.macs for s in model_cost(name, 224)) + twice)


def _paper_order(layer: LambdaLayer, arguments: tuple[torch.Tensor, ...]) -> None:
    layer.strategy = "conv" if layer.scope[0] < arguments[0].shape[2] else "lambdas"


def test_the_plan_prints_every_stage_and_every_strategy_and_models_print_every_name() -> None:
    text = plan_text("lambda_resnet50", 256)
    assert all(word in text for word in ("stem", "c2", "c5", "head", "18,963,272", "scores", "conv", "16x16"))
    assert text.count("\nc5: b=8") == 2  # the strided layer and the two after it
    table = models_text(64)
    assert all(name in table for name in list_models())


# --- the function ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lambda_resnet50", "resnet50_llcl", "lambda_resnet_tiny"])
@pytest.mark.parametrize("size", [(33, 17), (32, 32), (33, 65), (63, 95), (64, 160)], ids=str)
def test_any_image_size_height_unlike_width(name: str, size: tuple[int, int]) -> None:
    model = create_model(name, num_classes=7).eval()
    with torch.no_grad():
        out = model(torch.randn(2, 3, *size))
    assert out.shape == (2, 7)
    assert out.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("size", [(255, 255), (256, 320), (1280, 1280)], ids=str)
def test_large_images(size: tuple[int, int]) -> None:
    with torch.no_grad():
        assert create_model("lambda_resnet50").eval()(torch.randn(1, 3, *size)).isfinite().all()


@pytest.mark.parametrize("name", ["lambda_resnet50", "resnet50_llll", "lambda_resnet_tiny"])
def test_a_training_step_gives_every_parameter_a_finite_gradient_and_blocks_start_as_their_shortcut(name: str) -> None:
    model = create_model(name, num_classes=5, drop_rate=0.2, drop_path_rate=0.1, in_channels=1)
    assert all(not m.bn3.weight.any() for m in model.modules() if hasattr(m, "bn3"))
    for m in model.modules():
        if hasattr(m, "bn3"):
            nn.init.ones_(m.bn3.weight)
    model(torch.randn(3, 1, 64, 64)).logsumexp(1).sum().backward()
    for key, p in model.named_parameters():
        assert p.grad is not None, key
        assert p.grad.isfinite().all(), key
        assert p.grad.any(), key


def test_every_model_argument_changes_the_model() -> None:
    def run(training: bool = False, **arguments) -> torch.Tensor:
        torch.manual_seed(2)
        model = create_model("lambda_resnet_tiny", num_classes=5, **arguments).train(training)
        for m in model.modules():
            if hasattr(m, "bn3"):
                nn.init.ones_(m.bn3.weight)
        torch.manual_seed(2)
        return model(torch.randn(4, model.conv1.in_channels, 32, 32))

    base = run()
    for change in ({"in_channels": 1}, {"lambda_args": {"key_norm": "none"}}):
        assert not torch.allclose(run(**change), base)
    for change in ({"drop_rate": 0.5}, {"drop_path_rate": 0.5}):
        torch.testing.assert_close(run(**change), base)
        assert not torch.allclose(run(training=True, **change), run(training=True))
    assert run(lambda_args={"position": False}).shape == base.shape
    assert create_model("lambda_resnet_tiny", num_classes=0)(torch.randn(2, 3, 32, 32)).shape == (2, 512)
    word = timm.create_model("lambda_resnet_tiny", lambda_norm_act=False)
    assert isinstance(word.layer4[0].bn2, nn.Identity)


def test_shared_tables_are_one_parameter_a_stage() -> None:
    model = on_meta("resnet50_llll", share_tables=True)
    tables = {id(m.table) for m in model.modules() if isinstance(m, LambdaLayer)}
    assert len(tables) == 4
    assert params(model) == 14_860_168 + 4 * 8_464
    assert model.no_weight_decay() == {f"layer{i}.0.conv2.table" for i in range(1, 5)}
    again = on_meta("resnet50_llll", share_tables=True)
    again.load_state_dict(model.state_dict(), assign=True)


def test_stochastic_depth_grows_by_stage() -> None:
    model = on_meta("lambda_resnet50", drop_path_rate=0.5)
    rates = [{round(b.drop_path.drop_prob, 6) for b in stage} for stage in model.stages()]
    assert rates == [{0.2}, {0.3}, {0.4}, {0.5}]


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    grads = []
    for enable in (False, True):
        torch.manual_seed(0)
        model = create_model("lambda_resnet_tiny", num_classes=5).eval()
        model.set_grad_checkpointing(enable)
        model(torch.randn(2, 3, 32, 32)).square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for name, g in grads[0].items():
        torch.testing.assert_close(grads[1][name], g)


def test_channels_last_and_bfloat16_agree_with_float32() -> None:
    model = create_model("lambda_resnet50", num_classes=5).eval()
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        want = model(x)
        last = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(last, want, rtol=1e-4, atol=1e-4)
        low = model.bfloat16()(x.bfloat16()).float()
    assert (low - want).norm() < 0.05 * want.norm()


PIXELS = [
    (32, 32), (33, 65), (17, 40), (64, 64), (63, 95), (96, 32), (100, 100), (127, 129), (128, 64), (224, 224),
    (40, 17), (65, 33), (48, 48), (50, 70), (80, 80), (95, 63), (112, 160), (144, 144), (31, 200), (160, 96),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("size", [*PIXELS[:2], *(pytest.param(s, marks=pytest.mark.slow) for s in PIXELS[2:])], ids=str)
def test_eager_export_and_onnx_runtime_agree_for_any_batch(size: tuple[int, int], tmp_path) -> None:
    import onnxruntime

    torch.manual_seed(0)
    model = create_model("lambda_resnet_tiny", num_classes=10)
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):  # a block's last one starts at 0, and would hide the block
            torch.nn.init.uniform_(m.weight, 0.2, 0.5)
            m.momentum = 1.0
    with torch.no_grad():
        model(torch.randn(16, 3, *size))  # statistics
    model.eval()
    shapes = {"x": {0: torch.export.Dim("batch", min=1, max=64)}}
    exported = torch.export.export(model, (torch.randn(2, 3, *size),), dynamic_shapes=shapes)
    torch.onnx.export(exported, dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for b in (1, 7):
        x = torch.randn(b, 3, *size)
        with torch.no_grad():
            want = model(x)
            found = exported.module()(x), torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
        for got in found:
            assert (got - want).norm() <= 1e-5 * want.norm()
            assert torch.equal(got.topk(5).indices, want.topk(5).indices)


# --- timm -----------------------------------------------------------------------------------------------------------


def test_timm_builds_the_same_model_with_its_arguments() -> None:
    model = timm.create_model("lambda_resnet50", num_classes=10, in_chans=1, drop_rate=0.1, drop_path_rate=0.2)
    assert params(model) == params(create_model("lambda_resnet50", num_classes=10, in_channels=1))
    assert model.default_cfg["classifier"] == "fc"
    assert model.pretrained_cfg["input_size"] == (3, 224, 224)
    x = torch.randn(2, 1, 64, 64)
    assert model.forward_features(x).shape == (2, 2048, 2, 2)
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, 2048)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    assert model.get_classifier().out_features == 3
    model.reset_classifier(0)
    assert model(x).shape == (2, 2048)


@pytest.mark.parametrize("name", ["lambda_resnet50", "resnet50_llll", "lambda_resnet_tiny"])
def test_features_only_gives_five_maps_with_the_announced_channels_and_reductions(name: str) -> None:
    model = timm.create_model(name, features_only=True).eval()
    side = 96
    with torch.no_grad():
        maps = model(torch.randn(1, 3, side, side))
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
    assert [side // m.shape[2] for m in maps] == model.feature_info.reduction()
    two = timm.create_model(name, features_only=True, out_indices=(2, 4))
    assert len(two(torch.randn(2, 3, side, side))) == 2


def test_timm_parameter_groups_leave_tables_undecayed() -> None:
    from timm.optim import param_groups_weight_decay

    model = on_meta("resnet50_llll")
    groups = param_groups_weight_decay(model, 1e-4, no_weight_decay_list=model.no_weight_decay())
    undecayed = {id(p) for p in groups[0]["params"]}
    assert {id(m.table) for m in model.modules() if isinstance(m, LambdaLayer)} <= undecayed
    assert groups[0]["weight_decay"] == 0
    assert set(model.group_matcher(coarse=True)) == {"stem", "blocks"}


# --- bad input ------------------------------------------------------------------------------------------------------


def test_an_unknown_name_suggests_near_ones() -> None:
    with pytest.raises(ValueError, match="'lambda_resnet51': did you mean lambda_resnet50, "):
        create_model("lambda_resnet51")


def test_bad_model_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"drop_path_rate must be in \[0, 1\) and is 1.5"):
        create_model("lambda_resnet_tiny", drop_path_rate=1.5)
    with pytest.raises(ValueError, match="in_chans = 0"):
        create_model("lambda_resnet_tiny", in_channels=0)


def test_another_class_count_is_refused_with_the_remedy() -> None:
    model, other = on_meta("lambda_resnet_tiny", num_classes=10), on_meta("lambda_resnet_tiny", num_classes=7)
    with pytest.raises(RuntimeError, match=r"fc.weight is \(10, 512\), the model's \(7, 512\)") as caught:
        other.load_state_dict(model.state_dict())
    assert "reset_classifier" in str(caught.value)


@pytest.mark.parametrize("name", ["lambda_resnet50", "lambda_resnet_tiny", "resnet50_llll", "resnet50_cccc"])
def test_layer_decay_gives_each_stage_its_rate(name: str) -> None:
    model = on_meta(name)
    groups = timm.optim.create_optimizer_v2(model, "sgd", lr=0.1, layer_decay=0.5).param_groups
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert len(scale) == len(list(model.parameters()))
    parts = ("conv1", "layer1.0", "layer2.0", "layer3.0", "layer4.0", "fc")
    of_part = [{scale[id(p)] for n, p in model.named_parameters() if n.startswith(part)} for part in parts]
    assert all(len(scales) == 1 for scales in of_part)
    ordered = [scales.pop() for scales in of_part]
    assert ordered == sorted(set(ordered))
    assert ordered[1] / ordered[0] == 2
    assert ordered[0] == pytest.approx(ordered[-1] * 0.5 ** (1 + sum(len(stage) for stage in model.stages())))
    for coarse in (False, True):
        found = timm.models.group_parameters(model, model.group_matcher(coarse=coarse))
        assert sorted(n for names in found.values() for n in names) == sorted(n for n, _ in model.named_parameters())


@pytest.mark.parametrize("name", ["lambda_resnet50", "lambda_resnet_tiny"])
@pytest.mark.parametrize("kind", ["list", "dict", "hook", "fx", "getter"])
def test_every_way_to_features_in_timm_gives_the_maps_of_the_stages(name: str, kind: str) -> None:
    whole = create_model(name, num_classes=0).eval()
    torch.manual_seed(0)
    model = timm.create_model(name, features_only=True, feature_cls=kind).eval()
    torch.manual_seed(0)
    whole = create_model(name).eval()
    x = torch.randn(1, 3, 64, 48)
    found = model(x)
    found = list(found.values()) if isinstance(found, dict) else found
    want = whole.forward_intermediates(x, intermediates_only=True)
    assert [t.shape[1] for t in found] == [info["num_chs"] for info in whole.feature_info]
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other)


def test_intermediates_and_what_is_pruned_for_them() -> None:
    torch.manual_seed(0)
    model = create_model("lambda_resnet_tiny", num_classes=4).eval()
    x = torch.randn(2, 3, 32, 24)
    last, every = model.forward_intermediates(x)
    assert torch.equal(last, model.forward_features(x))
    assert torch.equal(last, every[4])
    for indices, kept in ((2, [3, 4]), ([1, 3], [1, 3]), ([0], [0])):
        some = model.forward_intermediates(x, indices, stop_early=True, intermediates_only=True)
        assert [torch.equal(a, every[i]) for a, i in zip(some, kept, strict=True)] == [True] * len(kept)
    calls = []
    model.layer4.register_forward_hook(lambda *_: calls.append(1))
    model.forward_intermediates(x, [2], stop_early=True)
    assert not calls
    assert model.prune_intermediate_layers([2]) == [2]
    assert torch.equal(model.forward_intermediates(x, [2], intermediates_only=True)[0], every[2])
    assert model(x).shape[1] == model.num_features == every[2].shape[1]
    assert not any(name.startswith(("layer3", "layer4", "fc")) for name, _ in model.named_parameters())
    with pytest.raises(ValueError, match="NCHW"):
        model.forward_intermediates(x, output_fmt="NLC")


@pytest.mark.parametrize("fast", ["plain", "accelerated", "fused"])
def test_torchvisions_feature_extractor_sees_a_lambda_layer_as_one_call(fast: str) -> None:
    torch.manual_seed(0)
    ours = fast == "plain"
    model = create_model("lambda_resnet_tiny") if ours else timm.create_model("lambda_resnet26t", num_classes=3)
    model.eval()
    at = "layer2" if ours else "stages.2"
    x = torch.randn(1, 3, 64, 64)
    want = create_feature_extractor(model, [at])(x)[at]
    if fast == "accelerated":
        assert lambdanets.accelerate(model) == 3
    if fast == "fused":  # torchvision's traces the training mode as well, which a fused model has not
        model = lambdanets.fuse(model)
    else:
        torch.testing.assert_close(create_feature_extractor(model, [at])(x)[at], want, rtol=1e-3, atol=1e-4)
    graph = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(graph(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_model_without_lambda_layers_makes_no_map_that_timms_does_not() -> None:
    model = create_model("resnet50_cccc", num_classes=3).eval()
    timms = timm.create_model("resnet50", num_classes=3).eval()
    x, made = torch.randn(1, 3, 64, 64), []

    class Maps(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            y = func(*args, **(kwargs or {}))
            if isinstance(y, torch.Tensor) and y.dim() == 4 and not func.__name__.partition(".")[0].endswith("_"):
                made.append(y.numel())
            return y

    sums = []
    for each in (model, timms):
        made.clear()
        with torch.no_grad(), Maps():
            each(x)
        sums.append(sum(made))
    assert sums[0] == sums[1]
