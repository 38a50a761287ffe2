"""The lambda layer's counterparts, in float64: each against its definition, an element at a time, or timm's layer."""

import itertools
import math

import pytest
import torch
from timm.layers.bottleneck_attn import BottleneckAttn
from torch import Tensor, nn

from lambdanets.layers.attention import (
    AugmentedConvolution,
    AxialAttention,
    DoubleAttention,
    EfficientAttention,
    GlobalAttention,
    LocalAttention,
)
from lambdanets.layers.controls import DepthwiseConvolution, PooledConvolution
from lambdanets.layers.relative_attention import relative_attention
from lambdanets.layers.spatial import SpatialLayer, average_pool

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def of_each(dim: int = 16, size: tuple[int, int] = (9, 8), **given) -> dict[str, SpatialLayer]:
    """One of each, in float64 and evaluation, with no parameter at its neutral first value."""
    layers = {
        "augmented": AugmentedConvolution(dim, heads=2, key_depth=3, value_depth=2, size=size, **given),
        "augmented, pooled": AugmentedConvolution(dim, heads=2, size=size, pooled=True, **given),
        "axial": AxialAttention(dim, heads=2, key_depth=3, size=size, **given),
        "depthwise": DepthwiseConvolution(dim, kernel=5, **given),
        "depthwise, strided": DepthwiseConvolution(dim, kernel=5, pooled=False, **given),
        "double": DoubleAttention(dim),
        "efficient": EfficientAttention(dim, heads=2, key_depth=3, **given),
        "global": GlobalAttention(dim, heads=2, key_depth=5, size=size, **given),
        "local": LocalAttention(dim, heads=4, scope=5, **given),
        "pooled": PooledConvolution(dim, **given),
    }
    torch.manual_seed(1)
    for layer in layers.values():
        layer.double().eval()
        for module in layer.modules():
            if isinstance(module, nn.BatchNorm2d):
                for t in (module.weight, module.bias, module.running_mean):
                    nn.init.normal_(t)
                nn.init.uniform_(module.running_var, 0.5, 2)
    return layers


NAMES = list(of_each())


def maps(*shape: int) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(*shape, dtype=torch.float64)


def at(weight: Tensor, x: Tensor, y: int, i: int) -> Tensor:
    """A 1x1 projection of one pixel of one image."""
    return weight.flatten(1) @ x[:, y, i]


def attended(logits: dict, values: dict) -> Tensor:
    total = sum(math.exp(value) for value in logits.values())
    return sum(math.exp(logits[m]) / total * values[m] for m in logits)


def dot(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum().detach())


# --- the definitions, an element at a time ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(3, 4), (4, 2), (1, 5)], ids=str)
def test_global_attention_is_its_definition_on_maps_smaller_than_its_table(size: tuple[int, int]) -> None:
    layer, x = of_each(size=(4, 6))["global"], maps(2, 16, *size)
    q, k, v = layer.to_qkv.weight.split([10, 10, 16])
    places = list(itertools.product(*map(range, size)))
    want = torch.zeros(2, 16, *size, dtype=torch.float64)
    for b, h, n in itertools.product(range(2), range(2), places):
        of_q, of_v = slice(5 * h, 5 * h + 5), slice(8 * h, 8 * h + 8)
        query = at(q[of_q], x[b], *n)
        logits = {
            m: dot(query, at(k[of_q], x[b], *m)) / math.sqrt(5)
            + dot(query, layer.table_rows[m[0] - n[0] + 3] + layer.table_columns[m[1] - n[1] + 5])
            for m in places
        }
        want[b, of_v, n[0], n[1]] = attended(logits, {m: at(v[of_v], x[b], *m) for m in places})
    torch.testing.assert_close(layer(x), want, **EXACT)


@pytest.mark.parametrize("size", [(3, 4), (5, 2)], ids=str)
def test_axial_attention_is_rows_and_then_columns(size: tuple[int, int]) -> None:
    layer, x = of_each(size=(5, 6))["axial"], maps(2, 16, *size)
    height, width = size

    def line(weight: Tensor, table: Tensor, pixels: Tensor) -> Tensor:
        """Attention along one line (16, length)."""
        q, k, v = (part.flatten(1) @ pixels for part in weight.split([6, 6, 16]))
        out, middle = torch.zeros_like(pixels), len(table) // 2
        for h, n in itertools.product(range(2), range(pixels.shape[1])):
            of_q, of_v = slice(3 * h, 3 * h + 3), slice(8 * h, 8 * h + 8)
            query = q[of_q, n]
            logits = {
                m: dot(query, k[of_q, m]) / math.sqrt(3) + dot(query, table[m - n + middle])
                for m in range(pixels.shape[1])
            }
            out[of_v, n] = attended(logits, {m: v[of_v, m] for m in logits})
        return out

    want = torch.zeros_like(x)
    for b in range(2):
        rows = [line(layer.to_qkv_in_row.weight, layer.table_columns, x[b, :, y]) for y in range(height)]
        z = torch.stack(rows, 1)
        columns = [line(layer.to_qkv_in_column.weight, layer.table_rows, z[:, :, i]) for i in range(width)]
        want[b] = torch.stack(columns, 2)
    torch.testing.assert_close(layer(x), want, **EXACT)


@pytest.mark.parametrize("size", [(6, 7), (2, 3), (1, 8)], ids=str)
def test_local_attention_is_its_definition_inside_the_map_alone(size: tuple[int, int]) -> None:
    layer, x = of_each()["local"], maps(1, 16, *size)
    q, k, v = layer.to_qkv.weight.chunk(3)
    want = torch.zeros_like(x)
    for h, n in itertools.product(range(4), itertools.product(*map(range, size))):
        own = slice(4 * h, 4 * h + 4)
        query = at(q[own], x[0], *n)
        window = [
            (n[0] + i, n[1] + j)
            for i, j in itertools.product(range(-2, 3), repeat=2)
            if 0 <= n[0] + i < size[0] and 0 <= n[1] + j < size[1]
        ]
        logits = {
            m: dot(query, at(k[own], x[0], *m))
            + dot(query[:2], layer.table_rows[h, m[0] - n[0] + 2])
            + dot(query[2:], layer.table_columns[h, m[1] - n[1] + 2])
            for m in window
        }
        want[0, own, n[0], n[1]] = attended(logits, {m: at(v[own], x[0], *m) for m in window})
    torch.testing.assert_close(layer(x), want, **EXACT)


def test_efficient_attention_is_its_definition() -> None:
    layer, x = of_each()["efficient"], maps(2, 16, 3, 4)
    pixels = x.flatten(2)
    q, k, v = (part.flatten(1) @ pixels for part in layer.to_qkv.weight.split([6, 6, 16]))
    heads = torch.zeros_like(pixels)
    for b, h, n in itertools.product(range(2), range(2), range(12)):
        of_q, of_v = slice(3 * h, 3 * h + 3), slice(8 * h, 8 * h + 8)
        query = q[b, of_q, n].exp() / q[b, of_q, n].exp().sum()
        for m in range(12):
            key = k[b, of_q, m].exp() / k[b, of_q].exp().sum(1)
            heads[b, of_v, n] += dot(query, key) * v[b, of_v, m]
    want = (layer.to_out.weight.flatten(1) @ heads).unflatten(2, (3, 4))
    torch.testing.assert_close(layer(x), want, **EXACT)


def test_double_attention_is_its_definition() -> None:
    layer, x = of_each()["double"], maps(2, 16, 3, 4)
    weights = zip(layer.to_abv.weight.flatten(1).chunk(3), layer.to_abv.bias.chunk(3), strict=True)
    a, b, v = (weight @ x.flatten(2) + bias[:, None] for weight, bias in weights)
    z = torch.zeros(2, 4, 12, dtype=torch.float64)
    for image, c in itertools.product(range(2), range(4)):
        gathered = sum(a[image, :, m] * b[image, c, m].exp() / b[image, c].exp().sum() for m in range(12))
        for n in range(12):
            z[image, :, n] += gathered * v[image, c, n].exp() / v[image, :, n].exp().sum()
    y = layer.to_out.weight.flatten(1) @ z + layer.to_out.bias[:, None]
    norm = layer.norm
    y = (y - norm.running_mean[:, None]) / (norm.running_var[:, None] + norm.eps).sqrt()
    want = x + (y * norm.weight[:, None] + norm.bias[:, None]).unflatten(2, (3, 4))
    torch.testing.assert_close(layer(x), want, **EXACT)


@pytest.mark.parametrize(("name", "side"), [("pooled", 3), ("depthwise", 5)])
def test_the_two_controls_are_sums_over_their_window(name: str, side: int) -> None:
    layer, x = of_each()[name], maps(1, 16, 4, 3)
    want, half = torch.zeros_like(x), side // 2
    for y, i in itertools.product(range(4), range(3)):
        for dy, dx in itertools.product(range(-half, half + 1), repeat=2):
            if 0 <= y + dy < 4 and 0 <= i + dx < 3:
                pixel = x[0, :, y + dy, i + dx]
                if name == "pooled":
                    want[0, :, y, i] += layer.conv.weight[:, :, dy + half, dx + half] @ pixel
                else:
                    one = layer.depthwise.weight[:, 0, dy + half, dx + half] * pixel
                    want[0, :, y, i] += layer.pointwise.weight.flatten(1) @ one
    torch.testing.assert_close(layer(x), want, **EXACT)


# --- timm's, with its weights ----------------------------------------------------------------------------------------


def given(layer: SpatialLayer, other: BottleneckAttn) -> None:
    with torch.no_grad():
        other.qkv.weight.copy_(layer.to_qkv.weight)
        other.pos_embed.height_rel.copy_(layer.table_rows)
        other.pos_embed.width_rel.copy_(layer.table_columns)


def test_global_attention_is_timms_with_its_weights_forward_and_backward() -> None:
    x = maps(3, 16, 5, 7)
    layer = of_each(size=(5, 7))["global"]
    other = BottleneckAttn(16, 16, feat_size=(5, 7), num_heads=2, dim_head=5).double()
    given(layer, other)
    found, want = [], []
    for module, into in ((layer, found), (other, want)):
        one = x.clone().requires_grad_()
        y = module(one)
        (y * maps(3, 16, 5, 7)).sum().backward()
        into += [y, one.grad]
    found += [layer.to_qkv.weight.grad, layer.table_rows.grad, layer.table_columns.grad]
    want += [other.qkv.weight.grad, other.pos_embed.height_rel.grad, other.pos_embed.width_rel.grad]
    torch.testing.assert_close(found, want, **EXACT)


@pytest.mark.parametrize("stride", [1, 2])
def test_augmented_convolution_is_torchs_convolution_beside_timms_attention(stride: int) -> None:
    x = maps(2, 16, 6, 8)
    layer = of_each(size=(6, 8), stride=stride)["augmented"]
    grid = (6 // stride, 8 // stride)
    other = BottleneckAttn(16, 4, feat_size=grid, num_heads=2, dim_head=3, scale_pos_embed=True).double()
    given(layer, other)
    seen = x if stride == 1 else nn.AvgPool2d(3, 2, 1, count_include_pad=False)(x)
    want = [layer.conv(x), layer.to_out(other(seen))]
    torch.testing.assert_close(layer(x), torch.cat(want, 1), **EXACT)
    assert layer.conv.stride == (stride, stride)


# --- strides, padding, masks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in NAMES if name != "double"])
def test_a_stride_averages_three_by_three_pixels_of_the_map_of_stride_1(name: str) -> None:
    x = maps(2, 16, 7, 6)
    one, two = of_each()[name], of_each(stride=2)[name]
    assert two(x).shape == (2, 16, 4, 3)
    if not two.pooled:
        return  # the stride is the convolution's
    two.load_state_dict(one.state_dict())
    whole, found = one(x), two(x)
    for y, i in itertools.product(range(4), range(3)):
        window = whole[:, :, max(0, 2 * y - 1) : 2 * y + 2, max(0, 2 * i - 1) : 2 * i + 2]
        torch.testing.assert_close(found[:, :, y, i], window.mean((2, 3)), **EXACT)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_every_image_of_a_padded_batch_gets_what_it_gets_alone(name: str, stride: int) -> None:
    layer = (of_each() if name == "double" else of_each(stride=stride))[name]
    stride = layer.stride
    x, padding = maps(3, 16, 9, 8), torch.zeros(3, 9, 8, dtype=torch.bool)
    sizes = [(9, 5), (4, 8), (1, 1)]
    for i, (height, width) in enumerate(sizes):
        padding[i, :height, :width] = True
    found = layer(x, padding=padding)
    assert found.isfinite().all()
    for i, (height, width) in enumerate(sizes):
        alone = layer(x[i : i + 1, :, :height, :width])
        part = found[i : i + 1, :, : -(-height // stride), : -(-width // stride)]
        torch.testing.assert_close(part, alone, **EXACT)


@pytest.mark.parametrize("name", NAMES)
def test_padding_leaves_no_gradient_and_none_that_is_not_finite(name: str) -> None:
    layer, x, padding = of_each()[name], maps(2, 16, 6, 6).requires_grad_(), torch.zeros(2, 6, 6, dtype=torch.bool)
    padding[0, :4, :3], padding[1, :1, :5] = True, True
    y = layer(x, padding=padding)
    (y * padding[:, None]).sum().backward()  # what stands on the padding is nobody's
    assert x.grad.isfinite().all()
    assert not (x.grad * ~padding[:, None]).any()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_a_window_without_a_real_position_pools_to_zero() -> None:
    x, padding = maps(1, 2, 6, 6), torch.zeros(1, 6, 6, dtype=torch.bool)
    padding[0, :2, :2] = True
    y = average_pool(x, 2, padding)
    torch.testing.assert_close(y[:, :, 0, 0], x[:, :, :2, :2].mean((2, 3)), **EXACT)
    assert not y[:, :, 2:, 2:].any()


def test_a_mask_of_global_attention_hides_what_it_says() -> None:
    layer, x = of_each(size=(3, 4))["global"], maps(2, 16, 3, 4)
    mask = torch.eye(12, dtype=torch.bool)
    values = layer.to_qkv.weight[20:].flatten(1) @ x.flatten(2)  # each pixel sees itself alone
    torch.testing.assert_close(layer(x, mask=mask), values.unflatten(2, (3, 4)), **EXACT)
    causal = torch.ones(12, 12, dtype=torch.bool).tril().expand(2, 12, 12)
    changed = x.clone()
    changed[:, :, 2] = 0
    torch.testing.assert_close(layer(x, mask=causal)[:, :, :2], layer(changed, mask=causal)[:, :, :2], **EXACT)
    assert not torch.allclose(layer(x)[:, :, :2], layer(changed)[:, :, :2])
    with pytest.raises(ValueError, match=r"mask must be bool \(n, m\) = \(12, 12\) or \(b, n, m\), and is torch.int64"):
        layer(x, mask=mask.long())


def test_global_attention_counts_positions_and_not_places() -> None:
    """A map shifted inside of its padding comes out shifted: only m - n counts."""
    layer, x = of_each()["global"], maps(1, 16, 4, 4)
    moved, padding = torch.zeros(1, 16, 7, 8, dtype=torch.float64), torch.zeros(1, 7, 8, dtype=torch.bool)
    moved[:, :, 2:6, 3:7], padding[:, 2:6, 3:7] = x, True
    torch.testing.assert_close(layer(moved, padding=padding)[:, :, 2:6, 3:7], layer(x), **EXACT)


# --- as modules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_gradient_and_maps_keep_their_memory_format(name: str) -> None:
    layer = of_each()[name].train()
    x = maps(2, 16, 5, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = layer(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    (y * maps(2, 16, 5, 6)).sum().backward()
    for key, p in [("x", x), *layer.named_parameters()]:
        assert p.grad is not None, key
        assert p.grad.isfinite().all(), key
        assert p.grad.any(), key


@pytest.mark.parametrize("name", NAMES)
def test_hooks_on_a_projection_are_called_and_numbers_stay(name: str) -> None:
    layer, x, calls = of_each()[name], maps(2, 16, 5, 6), []
    want = layer(x)
    convs = [module for module in layer.modules() if isinstance(module, nn.Conv2d)]
    for conv in convs:
        conv.register_forward_hook(lambda module, *_: calls.append(module))
    torch.testing.assert_close(layer(x), want, **EXACT)
    assert set(calls) == set(convs)


@pytest.mark.parametrize("name", NAMES)
def test_layers_export_and_compile_whole(name: str) -> None:
    layer, x = of_each()[name].float(), maps(2, 16, 5, 6).float()
    with torch.no_grad():
        want = layer(x)
        exported = torch.export.export(layer, (x,)).module()(x)
        compiled = torch.compile(layer, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(exported, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compiled, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_sixteen_bits_are_near(name: str) -> None:
    layer, x = of_each()[name], maps(2, 16, 5, 6)
    want = layer(x)
    layer.float()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        mixed = layer(x.float())
    half = layer.bfloat16()(x.bfloat16())
    for y in (mixed, half):
        assert y.dtype in (torch.bfloat16, torch.float32)
        assert (y.double() - want).norm() <= 0.05 * want.norm()


@pytest.mark.parametrize("name", ["global", "axial", "augmented"])
def test_a_larger_map_is_refused_until_the_tables_are_resized(name: str) -> None:
    layer, x = of_each(size=(4, 4))[name], maps(1, 16, 7, 6)
    with pytest.raises(ValueError, match=r"was made for at most 4: call layer.resize\(...\)"):
        layer(x)
    layer.resize((7, 6))
    assert layer(x).shape == x.shape
    assert (len(layer.table_rows), len(layer.table_columns)) == (13, 11)
    with torch.no_grad():
        layer.table_rows.copy_(torch.arange(13.0)[:, None].expand(13, layer.key_depth))
    layer.resize((4, 6))
    assert layer.table_rows[:, 0].tolist() == [0, 2, 4, 6, 8, 10, 12]


def test_what_does_not_fit_is_named() -> None:
    for make, message in (
        (lambda: GlobalAttention(10, heads=4, size=8), "dim = 10 must be a multiple of heads = 4"),
        (lambda: GlobalAttention(16, size=(4, 0)), r"size must be a positive integer or \(H, W\) and is \(4, 0\)"),
        (lambda: LocalAttention(8, heads=8), "dim / heads = 8 / 8 must be even"),
        (lambda: LocalAttention(32, scope=4), "scope must be odd"),
        (lambda: AugmentedConvolution(8, size=4), "dim = 8 leaves no channel to the convolution: 8 heads give 1 each"),
        (lambda: DepthwiseConvolution(8, kernel=4), "kernel must be odd"),
        (lambda: DoubleAttention(10), "dim = 10 must be a multiple of reduction = 4"),
        (lambda: EfficientAttention(16, stride=0), "stride must be a positive integer and is 0"),
        (lambda: of_each()["axial"](maps(1, 8, 4, 4)), r"x must be \(b, 16, H, W\) and is \(1, 8, 4, 4\)"),
        (
            lambda: of_each()["local"](maps(1, 16, 4, 4), padding=torch.ones(1, 4, 4)),
            r"padding must be bool \(b, H, W\) = \(1, 4, 4\), True on real pixels, and is torch.float32",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_relative_attention_makes_no_tensor_of_all_pairs() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, Tensor):
                    self.numel = max(self.numel, t.numel())
            return out

    side, k = 24, 4
    q, key, v = (torch.randn(1, 2, side * side, k) for _ in range(3))
    tables = [torch.randn(2 * side - 1, k) for _ in range(2)]
    with Largest() as seen:
        relative_attention(q, key, v, tables, (side, side))
    assert seen.numel <= 2 * side * side * (k + 2 * side)  # (b, h, n, k + H + W), and not n·m = 331,776 a head
