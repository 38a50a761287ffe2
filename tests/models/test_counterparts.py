"""Counterparts of the lambda layer in a model's word: their counts, timm's registry, fuse, padding."""

import re

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lambdanets import LambdaLayer, LambdaResNet, create_model, fuse, list_models, model_cost
from lambdanets.layers.attention import (
    AugmentedConvolution,
    AxialAttention,
    DoubleAttention,
    EfficientAttention,
    GlobalAttention,
    LocalAttention,
)
from lambdanets.layers.spatial import SpatialLayer
from lambdanets.models.resnet import COUNTERPARTS
from lambdanets.models.sizes import LETTERS, Size

ONE_EACH = ["AGXR", "DEPL"]


def on_meta(name: str, **arguments) -> LambdaResNet:
    with torch.device("meta"):
        return create_model(name, **arguments)


def params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def small(word: str, **changes) -> LambdaResNet:
    """A model of one block a stage, in float64 and evaluation, whose blocks are more than their shortcuts."""
    torch.manual_seed(3)
    size = Size(
        (1, 1, 1, 1), tuple(word), "small", se_stages="2-S2", width=24,
        lambda_args={"scope": 5, "key_depth": 4, "strategy": "scores"},
    )  # fmt: skip
    model = LambdaResNet(size, num_classes=5, image_px=32, **changes).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean)
    return model


EVERY_STAGE = {"heads": 8, "key_depth": None}
COUNTS = [
    ("resnet50_double_attention", {}, 32_927_784),
    ("resnet50_eeee", {}, 17_238_056),
    ("resnet50_eeee", {"heads": 1, "key_depth": None}, 18_012_200),
    ("resnet50_caaa", {}, 25_813_872),
    ("resnet50_aaaa", {}, 25_876_536),
    ("resnet50_rrrr", {}, 18_038_632),
    ("resnet50_xxxx", {}, 17_748_648),
    ("resnet50_xxxx", EVERY_STAGE, 19_286_224),
    ("resnet50_gggg", {}, 18_078_408),
    ("resnet50_cccg", {}, 20_852_008),
    ("resnet50_pppp", {}, 25_557_032),
]


@pytest.mark.parametrize(("name", "layer_args", "count"), COUNTS)
def test_parameter_counts_in_resnet50(name: str, layer_args: dict, count: int) -> None:
    assert params(on_meta(name, layer_args=layer_args)) == count


def test_where_double_attention_stands_is_not_known_and_another_place_has_another_count() -> None:
    """3 blocks of c4 and 2 of c3 with c = d / 2 would be 32,915,496: neither is the paper's 33.0."""
    model = on_meta("resnet50_double_attention")
    found = [name for name, module in model.named_modules() if isinstance(module, DoubleAttention)]
    assert found == [f"layer{i}.{j}.se" for i, blocks in ((2, 4), (3, 6)) for j in range(blocks)]


def test_any_word_is_a_model_and_no_word_is_one_of_timms() -> None:
    assert params(on_meta("resnet50_cxgl")) not in {
        params(on_meta(name)) for name in ("resnet50_cccc", "resnet50_gggg")
    }
    kinds = {"X": AxialAttention, "G": GlobalAttention, "L": LambdaLayer}
    model = on_meta("resnet50_cxgl", image_px=256)
    for stage, letter in zip(model.stages()[1:], "XGL", strict=True):
        assert all(type(block.conv2) is kinds[letter] for block in stage)
    word = re.compile(f"resnet50_[{''.join(LETTERS).lower()}]{{4}}")
    theirs = {name for name in timm.list_models() if word.fullmatch(name)}
    assert theirs <= set(list_models())
    assert not any(timm.is_model(name) for name in ("resnet50_cxgl", "resnet50_aaaa"))  # nothing was registered by that
    assert set(LETTERS) == {"C", "L", *COUNTERPARTS}
    with pytest.raises(ValueError, match="no model is called 'resnet50_ccqq'"):
        create_model("resnet50_ccqq")


def test_tables_are_of_the_map_of_each_stage() -> None:
    model = on_meta("resnet50_gggg", image_px=250)
    sides = [[block.conv2.table_rows.shape[0] // 2 + 1 for block in stage] for stage in model.stages()]
    assert sides == [[63] * 3, [63, 32, 32, 32], [32] + [16] * 5, [16, 8, 8]]
    layer = on_meta("resnet50_aaaa").layer2[0].conv2
    assert isinstance(layer, AugmentedConvolution)
    assert len(layer.table_rows) == 2 * 28 - 1  # of the map after its own stride


@pytest.mark.parametrize("word", ONE_EACH)
@pytest.mark.parametrize("size", [(32, 32), (23, 29), (5, 32)], ids=str)
def test_any_image_up_to_the_size_of_the_tables(word: str, size: tuple[int, int]) -> None:
    model = small(word)
    y = model(torch.randn(2, 3, *size).double())
    assert y.shape == (2, 5)
    assert y.isfinite().all()


@pytest.mark.parametrize("word", ONE_EACH)
def test_padding_changes_no_logit(word: str) -> None:
    model, x = small(word), torch.randn(2, 3, 32, 32).double()
    padding = torch.zeros(2, 32, 32, dtype=torch.bool)
    padding[0, :, :19], padding[1, :9, :13] = True, True
    found = model.forward_padded(x, padding)
    alone = [model(x[:1, :, :, :19]), model(x[1:, :, :9, :13])]
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(model(x), found)


@pytest.mark.parametrize("word", ONE_EACH)
def test_fuse_folds_what_a_convolution_gives_and_leaves_the_counterparts(word: str) -> None:
    model, x = small(word), torch.randn(2, 3, 24, 32).double()
    fused, changes = fuse(model, explain=True)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-9, atol=1e-9)
    left = {name for name, module in fused.named_modules() if isinstance(module, nn.BatchNorm2d)}
    # After each layer, and inside of double attention in c2 and c5; the lambda layer's own are in its product.
    assert left == {f"layer{i}.0.bn2" for i in range(1, 5)} | {"layer1.0.se.norm", "layer4.0.se.norm"}
    assert "and no convolution" in changes.of("layer1.0.bn2").why
    assert changes.of("layer1.0.bn1").what == "folded"


@pytest.mark.parametrize("word", ONE_EACH)
def test_a_model_compiles_whole_and_its_gradients_are_those_of_checkpointing(word: str) -> None:
    model, x = small(word), torch.randn(2, 3, 16, 16).double()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-9, atol=1e-9)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(x).square().sum().backward()
        return [p.grad for p in model.parameters()]

    plain = gradients()
    assert all(grad is not None and grad.any() for grad in plain)
    model.set_grad_checkpointing()
    torch.testing.assert_close(gradients(), plain, rtol=1e-9, atol=1e-9)


def test_tables_are_not_decayed_and_timm_cuts_features() -> None:
    model = on_meta("resnet50_gggg")
    tables = {name for name, _ in model.named_parameters() if "table" in name}
    assert tables == model.no_weight_decay()
    assert len(tables) == 2 * 16
    maps = timm.create_model("resnet50_eeee", features_only=True, feature_cls="fx").eval()(torch.randn(1, 3, 64, 64))
    assert [m.shape[2] for m in maps] == [32, 16, 8, 4, 2]


def test_multiply_adds_of_linear_forms_are_torchs() -> None:
    for layer in (EfficientAttention(16, heads=2, key_depth=3), DoubleAttention(16)):
        inside = [m for m in layer.modules() if isinstance(m, nn.Conv2d)]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer(torch.randn(1, 16, 6, 5))
        own = 6 * 5 * sum(m.weight.numel() for m in inside)
        assert counter.get_total_flops() == 2 * (own + layer.mixing_macs(6, 5))


def test_multiply_adds_of_attention_are_those_of_the_definitions() -> None:
    n, h = 6 * 5, 2
    pairs = GlobalAttention(16, heads=h, key_depth=3, size=8)
    assert pairs.mixing_macs(6, 5) == h * (n * n * (3 + 8) + n * (6 + 5) * 3)
    assert AxialAttention(16, heads=h, key_depth=3, size=8).mixing_macs(6, 5) == h * n * (6 + 5) * (3 + 3 + 8)
    assert LocalAttention(16, heads=h, scope=3).mixing_macs(6, 5) == h * n * (9 * (8 + 8) + 2 * 3 * 4)
    half = AugmentedConvolution(16, heads=h, key_depth=3, value_depth=2, size=8, stride=2)
    assert half.mixing_macs(6, 5) == h * (9 * 9 * (3 + 2) + 9 * (3 + 3) * 3)
    at_full = AugmentedConvolution(16, heads=h, key_depth=3, value_depth=2, size=8, stride=2, pooled=True)
    assert at_full.mixing_macs(6, 5) == h * (n * n * (3 + 2) + n * (6 + 5) * 3)


def test_the_cost_of_a_model_has_the_multiply_adds_of_its_attention() -> None:
    model = on_meta("resnet50_gggg")
    rows = {row.stage: row for row in model_cost(model)}
    layer = model.layer4[1].conv2
    assert isinstance(layer, SpatialLayer)
    n = 49
    block = n * (2048 * 512 + 3 * 512 * 512 + 512 * 2048) + layer.mixing_macs(7, 7)
    first = model.layer4[0].conv2.mixing_macs(14, 14) + 196 * (1024 * 512 + 3 * 512 * 512) + n * (512 + 1024) * 2048
    assert rows["c5"].macs == first + 2 * block
    assert rows["c5"].lambdas == 0


def test_arguments_of_the_layers_reach_them_and_are_refused_where_there_are_none() -> None:
    assert on_meta("resnet50_cccg", layer_args={"heads": 8}).layer4[0].conv2.heads == 8
    with pytest.raises(ValueError, match="layer_args are for A, D, E, G, P, R, X, and no stage has one of these"):
        create_model("lambda_resnet_tiny", layer_args={"heads": 8})
    with pytest.raises(ValueError, match=r"is timm's model, .*layer_args=\{'heads': 8\}.* leave them out"):
        create_model("lambda_resnet26t", layer_args={"heads": 8})
    with pytest.raises(ValueError, match=r"a stage of 1 blocks is one of A, C, D, E, G, L, P, R, X or some of 1\.\.1"):
        LambdaResNet(Size((1, 1, 1, 1), ("C", "C", "C", "Q")))
    with pytest.raises(ValueError, match=r"a larger size where this GlobalAttention is made \(of a model: image_px"):
        on_meta("resnet50_cccg").eval()(torch.empty(1, 3, 256, 256, device="meta"))
