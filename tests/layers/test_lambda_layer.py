"""The layer: equal to timm's with mapped weights, to itself in other guises; every argument does something."""

import copy
import io
import itertools
import math

import onnxruntime
import pytest
import torch
from timm.layers.lambda_layer import LambdaLayer as TimmLambdaLayer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lambdanets import LambdaLayer, LambdaLayer1d, LambdaLayer3d, accelerate, fuse, resize_table
from lambdanets.layers.loading import StrictLoading
from lambdanets.layers.projections import product
from lambdanets.ops.reference import lambda_reference, relative_embeddings
from lambdanets.ops.strategies import STRATEGIES


def timm_pair(
    size: tuple[int, int], r: int | None, dim: int = 24, stride: int = 1
) -> tuple[TimmLambdaLayer, LambdaLayer]:
    """timm's layer, and ours with its weights: q, k, v rows split, conv_lambda or pos_emb as the table."""
    theirs = TimmLambdaLayer(dim, feat_size=size, stride=stride, num_heads=3, dim_head=5, r=r).double()
    where = {"scope": r} if r else {"scope": None, "size": size}
    ours = LambdaLayer(
        dim, heads=3, key_depth=5, stride=stride, pool_size=2, position_bias=r is not None, **where
    ).double()
    for bn in (theirs.norm_q, theirs.norm_v):
        nn.init.normal_(bn.weight)
        nn.init.normal_(bn.bias)
    with torch.no_grad():
        q, k, v = theirs.qkv.weight.split([15, 5, dim // 3])
        ours.to_q.weight.copy_(q)
        ours.to_k.weight.copy_(k)
        ours.to_v.weight.copy_(v)
        if r:
            nn.init.normal_(theirs.conv_lambda.bias)
            ours.table.copy_(theirs.conv_lambda.weight[:, 0, :, :, 0].permute(1, 2, 0)[..., None])
            ours.position_bias.copy_(theirs.conv_lambda.bias)
        else:
            nn.init.normal_(theirs.pos_emb)
            ours.table.copy_(theirs.pos_emb[..., None])
    ours.norm_q.load_state_dict(theirs.norm_q.state_dict())
    ours.norm_v.load_state_dict(theirs.norm_v.state_dict())
    return theirs, ours


MAPS = [(8, 8), (14, 10), (10, 14), (7, 7), (1, 9), (9, 1), (33, 17)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("r", [3, 9, None])
@pytest.mark.parametrize("size", MAPS, ids=str)
def test_outputs_and_gradients_equal_timms_layer_with_mapped_weights(size, r: int | None, training: bool) -> None:
    theirs, ours = timm_pair(size, r)
    theirs.train(training), ours.train(training)
    x = torch.randn(2, 24, *size, dtype=torch.float64)
    results = []
    for layer in (theirs, ours):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.square().sum().backward()
        results.append((y, leaf.grad, layer))
    (y0, gx0, _), (y1, gx1, _) = results
    torch.testing.assert_close(y1, y0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gx1, gx0, rtol=1e-8, atol=1e-8)
    dq, dk, dv = theirs.qkv.weight.grad.split([15, 5, 8])
    pairs = [(ours.to_q.weight.grad, dq), (ours.to_k.weight.grad, dk), (ours.to_v.weight.grad, dv)]
    if r:
        pairs.append((ours.table.grad[..., 0], theirs.conv_lambda.weight.grad[:, 0, :, :, 0].permute(1, 2, 0)))
        pairs.append((ours.position_bias.grad, theirs.conv_lambda.bias.grad))
    else:
        pairs.append((ours.table.grad[..., 0], theirs.pos_emb.grad))
    for mine, yours in pairs:
        torch.testing.assert_close(mine, yours, rtol=1e-8, atol=1e-8 * float(yours.abs().max()) + 1e-12)


@pytest.mark.parametrize("size", [(8, 8), (14, 10)])
def test_stride_2_equals_timms_with_its_2x2_pooling(size: tuple[int, int]) -> None:
    theirs, ours = timm_pair(size, 9, stride=2)
    x = torch.randn(2, 24, *size, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-9)


def test_the_layer_is_the_reference_on_its_projections() -> None:
    layer = LambdaLayer(12, 20, heads=4, key_depth=6, intra_depth=3, scope=5).double().eval()
    x = torch.randn(2, 12, 5, 7, dtype=torch.float64)
    q = layer.norm_q(layer.to_q(x)).view(2, 4, 6, 35).permute(0, 3, 1, 2)
    keys = layer.to_k(x).view(2, 6, 3, 35).permute(0, 3, 1, 2)
    values = layer.norm_v(layer.to_v(x)).view(2, 5, 3, 35).permute(0, 3, 1, 2)
    want = lambda_reference(q, keys, values, relative_embeddings(layer.table, (5, 7)))
    torch.testing.assert_close(layer(x), want.permute(0, 2, 3, 1).reshape(2, 20, 5, 7), rtol=1e-10, atol=1e-10)


# --- traps that peers fell into (peers.md section 2) ----------------------------------------------------------------


def test_trap_1_keys_are_normalised_over_positions_not_over_their_depth() -> None:
    layer = LambdaLayer(8, heads=2, key_depth=4, position=False).eval()
    x = torch.randn(1, 8, 5, 5)
    before = layer(x)
    with torch.no_grad():  # a constant added to one key channel at all positions cancels in a softmax over positions
        layer.to_k.bias = nn.Parameter(torch.tensor([5.0, 0, 0, 0]))
    torch.testing.assert_close(layer(x), before)


def test_trap_2_u_slices_are_summed_separately_and_do_not_mix_with_v() -> None:
    one = LambdaLayer(8, heads=2, key_depth=4, intra_depth=1, scope=3, qv_norm=False).double()
    two = LambdaLayer(8, heads=2, key_depth=4, intra_depth=2, scope=3, qv_norm=False).double()
    other = LambdaLayer(8, heads=2, key_depth=4, intra_depth=1, scope=3, qv_norm=False).double()
    with torch.no_grad():
        other.to_q.weight.copy_(one.to_q.weight)
        two.to_q.weight.copy_(one.to_q.weight)
        for name in ("to_k", "to_v"):
            first, second = getattr(one, name).weight, getattr(other, name).weight
            getattr(two, name).weight.copy_(torch.stack([first, second], 1).flatten(0, 1))  # channels (k or v, u)
        two.table.copy_(torch.cat([one.table, other.table], -1))
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(two(x), one(x) + other(x), rtol=1e-10, atol=1e-10)


def test_trap_3_transposing_the_image_and_the_table_transposes_the_output() -> None:
    layer = LambdaLayer(8, heads=2, key_depth=4, scope=(3, 5)).double().eval()
    turned = LambdaLayer(8, heads=2, key_depth=4, scope=(5, 3)).double().eval()
    state = layer.state_dict()
    turned.load_state_dict(state | {"table": state["table"].transpose(0, 1)})
    x = torch.randn(2, 8, 6, 9, dtype=torch.float64)
    torch.testing.assert_close(turned(x.mT), layer(x).mT, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s != "fused"])
def test_trap_4_the_position_part_is_equivariant_to_shifts_and_does_not_wrap_around_rows(strategy: str) -> None:
    layer = LambdaLayer(8, heads=2, key_depth=4, scope=5, content=False, strategy=strategy).double().eval()
    layer.norm_q = nn.Identity()
    x = torch.zeros(1, 8, 9, 11, dtype=torch.float64)
    x[:, :, 2, 9:] = torch.randn(1, 8, 2, dtype=torch.float64)  # at the right border, two rows down
    y = layer(x)
    assert y[..., :7].abs().max() == 0  # nothing arrives at the left of any row
    shifted = layer(x.roll((3, -4), (2, 3)))
    torch.testing.assert_close(shifted[:, :, 3:, 2:7], y[:, :, :-3, 6:11], rtol=1e-10, atol=1e-10)


def test_trap_5_a_map_larger_than_a_global_table_is_refused_and_a_transposed_one_too() -> None:
    layer = LambdaLayer(8, heads=2, key_depth=4, scope=None, size=(8, 8))
    with pytest.raises(
        ValueError, match=r"the map is \(4, 16\) and the global table was made for at most \(8, 8\).*resize"
    ):
        layer(torch.randn(1, 8, 4, 16))
    layer = LambdaLayer(8, heads=2, key_depth=4, scope=None, size=(8, 12))
    with pytest.raises(ValueError, match=r"the map is \(12, 8\)"):
        layer(torch.randn(1, 8, 12, 8))


def test_trap_6_nothing_of_size_n_times_m_is_saved_for_the_backward_pass() -> None:
    saved = 0

    def pack(t: Tensor) -> Tensor:
        nonlocal saved
        saved = max(saved, t.numel())
        return t

    layer = LambdaLayer(32, scope=31, strategy="scores")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(torch.randn(1, 32, 16, 16, requires_grad=True))
    assert saved <= 256 * 64  # q; the expanded table would be 256 * 256 * 16


def test_trap_7_a_whole_model_takes_channels_last() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), LambdaLayer(16, scope=5), nn.Conv2d(16, 4, 1)).double().eval()
    x = torch.randn(2, 3, 10, 9, dtype=torch.float64)
    want = model(x)
    model = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last)), want)


@pytest.mark.parametrize("stride", [1, 2])
def test_trap_8_R31_a_padded_batch_of_unequal_images_equals_the_images_alone(stride: int) -> None:
    layer = LambdaLayer(16, heads=2, key_depth=4, scope=7, stride=stride).eval()
    sizes = [(9, 6), (5, 11), (1, 1)]
    images = [torch.randn(16, *s) for s in sizes]
    batch, real = torch.zeros(3, 16, 9, 11), torch.zeros(3, 9, 11, dtype=torch.bool)
    for i, (h, w) in enumerate(sizes):
        batch[i, :, :h, :w] = images[i]
        real[i, :h, :w] = True
    together = layer(batch, padding=real)
    for i, image in enumerate(images):
        alone = layer(image[None])[0]
        got = together[i, :, : alone.shape[1], : alone.shape[2]]
        assert (got - alone).abs().max() <= 1e-6 * alone.abs().max()
    assert not torch.allclose(layer(batch)[0, :, :5, :5], together[0, :, :5, :5], atol=1e-3)


def test_trap_9_R32_pooling_does_not_count_the_padding_unless_asked() -> None:
    x = torch.randn(1, 8, 6, 6)
    layer = LambdaLayer(8, heads=2, key_depth=4, scope=3, stride=2).eval()
    full = LambdaLayer(8, heads=2, key_depth=4, scope=3).eval()
    full.load_state_dict(layer.state_dict())
    counting = LambdaLayer(8, heads=2, key_depth=4, scope=3, stride=2, pool_count_padding=True).eval()
    counting.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x)[0, :, 0, 0], full(x)[0, :, :2, :2].mean((1, 2)))
    torch.testing.assert_close(counting(x)[0, :, 0, 0], layer(x)[0, :, 0, 0] * 4 / 9)


def test_trap_10_R22_no_more_non_finite_gradients_in_fp16_at_a_large_loss_scale_than_a_convolution() -> None:
    x = torch.randn(4, 64, 14, 14).half()

    def non_finite(middle: nn.Module) -> int:
        torch.manual_seed(1)
        net = nn.Sequential(nn.Conv2d(64, 64, 1), middle, nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 10, 1)).half()
        (net(x).mean((2, 3)).float().logsumexp(1).mean() * 65536).backward()
        return sum(int(not p.grad.isfinite().all()) for p in net.parameters())

    assert non_finite(LambdaLayer(64)) <= non_finite(nn.Conv2d(64, 64, 3, padding=1))


def test_trap_11_there_are_no_index_tables_to_move_and_meta_and_deepcopy_work() -> None:
    import copy

    layer = LambdaLayer(16, scope=None, size=(64, 64))
    assert {n for n, _ in layer.named_buffers()} == {
        f"norm_{a}.{b}" for a in "qv" for b in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert not [n for n, v in vars(layer).items() if isinstance(v, Tensor)]
    moved = copy.deepcopy(layer).to("meta")
    assert moved(torch.empty(2, 16, 64, 64, device="meta")).shape == (2, 16, 64, 64)


BASE = {"dim": 16, "heads": 2, "key_depth": 4, "scope": 5}


@pytest.mark.parametrize(
    "change",
    [
        {"dim_out": 32},
        {"heads": 4},
        {"key_depth": 8},
        {"intra_depth": 2},
        {"scope": 3},
        {"scope": None, "size": 7},
        {"stride": 2},
        {"stride": 2, "pool_size": 2},
        {"stride": 2, "pool_count_padding": True},
        {"content": False},
        {"position": False},
        {"key_norm": "l2"},
        {"key_norm": "none"},
        {"query_softmax": True},
        {"qv_norm": False},
        {"position_bias": True},
    ],
    ids=str,
)
def test_trap_12_every_constructor_argument_changes_the_result(change: dict) -> None:
    x = torch.randn(2, 16, 7, 7)

    def build(arguments: dict) -> LambdaLayer:
        torch.manual_seed(3)
        layer = LambdaLayer(**arguments)
        for p in layer.parameters():  # a bias starts at zero
            if not p.any():
                nn.init.normal_(p)
        return layer

    less = {k: v for k, v in change.items() if not k.startswith("pool")}
    base = build(BASE | ({} if less == change else less))(x)
    other = build(BASE | change)(x)
    assert base.shape != other.shape or not torch.allclose(base, other)


def test_the_other_arguments_do_something_too() -> None:
    x = torch.randn(2, 16, 9)
    causal, free = (LambdaLayer1d(16, heads=2, key_depth=4, scope=5, causal=c).eval() for c in (True, False))
    free.load_state_dict(causal.state_dict())
    assert not torch.allclose(causal(x), free(x))
    layer = LambdaLayer(16, context_dim=6, scope=5)
    assert layer(torch.randn(2, 16, 5, 5), torch.randn(2, 6, 5, 5)).shape == (2, 16, 5, 5)
    first = LambdaLayer(16, scope=5)
    second = LambdaLayer(16, scope=5, table=first.table)
    assert second.table is first.table
    assert {id(p) for p in second.parameters()} & {id(p) for p in first.parameters()} == {id(first.table)}
    with pytest.raises(ValueError, match="needs a relative table"):
        LambdaLayer(**BASE, position=False, strategy="conv")(torch.randn(1, 16, 5, 5))


# --- one implementation, three dimensions ---------------------------------------------------------------------------


def test_1d_2d_and_3d_are_the_same_function_on_degenerate_maps() -> None:
    flat = LambdaLayer1d(8, heads=2, key_depth=4, scope=5).double().eval()
    plane = LambdaLayer(8, heads=2, key_depth=4, scope=(1, 5)).double().eval()
    solid = LambdaLayer3d(8, heads=2, key_depth=4, scope=(1, 1, 5)).double().eval()
    for layer in (plane, solid):
        own = layer.state_dict()
        layer.load_state_dict({k: v.reshape(own[k].shape) for k, v in flat.state_dict().items()})
    x = torch.randn(2, 8, 11, dtype=torch.float64)
    torch.testing.assert_close(plane(x[:, :, None])[:, :, 0], flat(x))
    torch.testing.assert_close(solid(x[:, :, None, None])[:, :, 0, 0], flat(x))


def test_a_window_of_2_side_minus_1_is_the_global_table_to_the_bit() -> None:
    window = LambdaLayer(8, heads=2, key_depth=4, scope=(13, 9)).eval()
    whole = LambdaLayer(8, heads=2, key_depth=4, scope=None, size=(7, 5)).eval()
    whole.load_state_dict(window.state_dict())
    x = torch.randn(2, 8, 7, 5)
    assert torch.equal(window(x), whole(x))


def test_a_smaller_map_uses_the_middle_of_a_global_table() -> None:
    big = LambdaLayer(8, heads=2, key_depth=4, scope=None, size=(7, 9)).eval()
    small = LambdaLayer(8, heads=2, key_depth=4, scope=None, size=(4, 5)).eval()
    state = big.state_dict()
    small.load_state_dict(state | {"table": state["table"][3:10, 4:13]})
    x = torch.randn(2, 8, 4, 5)
    torch.testing.assert_close(big(x), small(x))


def test_resize_keeps_the_middle_and_interpolates_a_linear_table_exactly_inside() -> None:
    ramp = torch.linspace(-1, 1, 13)[:, None, None, None] + torch.linspace(-2, 2, 9)[:, None, None]
    out = resize_table(ramp, (13, 5))
    assert out.shape == (25, 9, 1, 1)
    torch.testing.assert_close(out[4:-4, 4, 0, 0], torch.linspace(-1, 1, 25)[4:-4])  # bicubic clamps at the ends
    torch.testing.assert_close(resize_table(ramp, (7, 5)), ramp)
    layer = LambdaLayer(8, heads=2, key_depth=4, scope=None, size=(7, 7))
    layer.resize((14, 10))
    assert layer(torch.randn(1, 8, 14, 10)).shape == (1, 8, 14, 10)
    assert isinstance(layer.table, nn.Parameter)
    for build, size in ((LambdaLayer1d, (9,)), (LambdaLayer3d, (3, 4, 5))):
        layer = build(8, heads=2, key_depth=4, scope=None, size=size)
        layer.resize(tuple(s + 1 for s in size))
        assert layer(torch.randn(1, 8, *[s + 1 for s in size])).shape[2:] == tuple(s + 1 for s in size)
    with pytest.raises(ValueError, match="only a layer with a global table"):
        LambdaLayer(8).resize(7)


# --- shapes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(33, 17), (1, 1), (1, 20), (20, 1), (2, 31)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_any_height_and_width_empty_batches_and_batch_one(size: tuple[int, int], stride: int) -> None:
    layer = LambdaLayer(16, 24, heads=2, key_depth=4, scope=23, stride=stride).eval()
    for b in (0, 1, 2):
        x = torch.randn(b, 16, *size, requires_grad=True)
        y = layer(x)
        assert y.shape == (b, 24, *(math.ceil(s / stride) for s in size))
        y.sum().backward()
        assert x.grad.shape == x.shape


def test_a_separate_context_of_another_size_and_a_mask() -> None:
    layer = LambdaLayer(16, heads=2, key_depth=4, scope=5, context_dim=6).double().eval()
    x, context = torch.randn(2, 16, 5, 4, dtype=torch.float64), torch.randn(2, 6, 3, 7, dtype=torch.float64)
    y = layer(x, context)
    assert y.shape == (2, 16, 5, 4)
    hidden = torch.ones(20, 21, dtype=torch.bool)
    hidden[:, 14:] = False  # the context's last row
    torch.testing.assert_close(layer(x, context, mask=hidden), layer(x, context[:, :, :2]))
    real = hidden[0].view(1, 3, 7).expand(2, 3, 7)
    torch.testing.assert_close(layer(x, context, padding=real), layer(x, context[:, :, :2]))
    both = layer(x, context, mask=torch.rand(2, 20, 21) < 0.5, padding=real)
    assert both.isfinite().all()


def test_a_causal_sequence_never_sees_the_future_also_through_gradients() -> None:
    layer = LambdaLayer1d(16, heads=2, key_depth=4, scope=9, causal=True).eval()
    x = torch.randn(1, 16, 100, requires_grad=True)
    layer(x)[..., 40].sum().backward()
    assert x.grad[..., 41:].abs().max() == 0
    assert x.grad[..., :41].abs().amin(1).min() > 0


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim_out": 18}, "dim_out = 18 must be a multiple of heads = 4"),
        ({"heads": 0}, "heads must be a positive integer and is 0"),
        ({"key_depth": 1.5}, "key_depth must be a positive integer and is 1.5"),
        ({"scope": 8}, "scope must be odd.* 8"),
        ({"scope": 7, "size": 14}, "scope=7, size=14"),
        ({"scope": None}, "scope=None, size=None"),
        ({"scope": None, "size": (7, 7, 7)}, r"size must be .* 2 of them and is \(7, 7, 7\)"),
        ({"content": False, "position": False}, "nothing would be left"),
        ({"key_norm": "tanh"}, "key_norm must be one of softmax, l2, none and is 'tanh'"),
        ({"strategy": "turbo"}, "strategy must be auto, tuned or one of .* 'turbo'"),
        ({"causal": True}, "LambdaLayer1d"),
        ({"position": False, "position_bias": True}, "position_bias=True was given with position=False"),
        ({"table": nn.Parameter(torch.zeros(7, 7, 16, 1))}, r"shared table is \(7, 7, 16, 1\) and .*\(23, 23, 16, 1\)"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_at_construction_and_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LambdaLayer(**{"dim": 16, **arguments})


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_one_product_equals_three_projections_and_their_norms(training: bool, grad: bool, channels_last: bool) -> None:
    torch.manual_seed(0)
    layer = LambdaLayer(12, 8, heads=2, key_depth=3, intra_depth=2, scope=3).double().train(training)
    for norm in (layer.norm_q, layer.norm_v):
        for t in (norm.weight, norm.running_var):
            nn.init.uniform_(t, 0.5, 1.5)
        for t in (norm.bias, norm.running_mean):
            nn.init.normal_(t)
    other = copy.deepcopy(layer)
    called = []
    for part in (other.to_q, other.to_k, other.to_v, other.norm_q, other.norm_v):
        part.register_forward_hook(lambda *_: called.append(1))  # heard, and so called one by one
    x = torch.randn(2, 12, 4, 5, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    a, b = x.clone().requires_grad_(grad), x.clone().requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        ours, theirs = layer(a), other(b)
    assert len(called) == 5
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert ours.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    if grad:
        ours.square().sum().backward()
        theirs.square().sum().backward()
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9)
        for (name, p), q in zip(layer.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9, msg=name)
    for name, t in layer.named_buffers():
        torch.testing.assert_close(t, other.get_buffer(name), msg=name)


def test_a_projection_that_somebody_replaced_is_called() -> None:
    """Adapters, quantisation and wrappers replace `to_v`; a 3x3 convolution there has the class but not the meaning."""
    torch.manual_seed(0)
    layer = LambdaLayer(8, scope=3).eval()
    x = torch.randn(1, 8, 5, 5)
    with torch.no_grad():
        before = layer(x)
        layer.to_v = nn.Sequential(layer.to_v, nn.Tanh())
        assert not torch.allclose(layer(x), before)
        layer.to_v = nn.Conv2d(8, 2, 3, padding=1, bias=False)
        wide = layer(x)
        layer.to_v.weight[..., 0, 0] += 1  # a corner of the kernel, which a 1x1 reading would not see
        assert not torch.allclose(layer(x), wide)


def test_bad_tensors_are_refused_with_both_shapes() -> None:
    layer = LambdaLayer(16, scope=5)
    for arguments, message in (
        ((torch.zeros(1, 8, 5, 5),), r"x must be \(b, 16, H, W\) and is \(1, 8, 5, 5\)"),
        ((torch.zeros(16, 5, 5),), r"x must be \(b, 16, H, W\)"),
        ((torch.zeros(1, 16, 5, 5), torch.zeros(2, 16, 5, 5)), "batch 1 and context batch 2"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(*arguments)
    with pytest.raises(ValueError, match=r"padding must be bool .*\(1, 5, 5\)"):
        layer(torch.zeros(1, 16, 5, 5), padding=torch.ones(1, 5, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="forward needs context"):
        LambdaLayer(16, context_dim=8)(torch.zeros(1, 16, 5, 5))


def test_a_wrong_state_dict_names_at_most_ten_keys_and_the_remedy() -> None:
    layer = LambdaLayer(16, scope=None, size=7)
    with pytest.raises(RuntimeError, match=r"table is \(27, 27, 16, 1\), the model's \(13, 13, 16, 1\)") as caught:
        layer.load_state_dict(LambdaLayer(16, scope=None, size=14).state_dict())
    assert "resize_table" in str(caught.value)

    class Many(StrictLoading):
        def __init__(self, count: int) -> None:
            super().__init__()
            self.parts = nn.ModuleList(nn.Linear(1, 1) for _ in range(count))

    with pytest.raises(RuntimeError, match=r"70 keys missing: .* and 60 more") as caught:
        Many(40).load_state_dict(Many(5).state_dict())
    assert str(caught.value).count("parts.") == 10
    assert Many(3).load_state_dict(Many(5).state_dict(), strict=False).unexpected_keys
    assert not layer.load_state_dict(layer.state_dict()).missing_keys


def test_repr_shows_what_matters() -> None:
    text = repr(LambdaLayer(64, 128, scope=None, size=14, stride=2, key_norm="l2"))
    assert all(
        part in text for part in ("64, 128", "size=(14, 14)", "heads=4", "key_depth=16", "stride=2", "key_norm=l2")
    )


def test_initialisation_is_the_papers() -> None:
    layer = LambdaLayer(256, intra_depth=4)
    assert layer.table.std().item() == pytest.approx(1, rel=0.02)
    assert layer.to_q.weight.std().item() == pytest.approx((16 * 256) ** -0.5, rel=0.05)
    assert layer.to_k.weight.std().item() == pytest.approx(256**-0.5, rel=0.05)
    assert layer.to_v.weight.std().item() == pytest.approx(256**-0.5, rel=0.05)


@pytest.mark.parametrize("dim", [64, 128, 256, 512])
def test_one_layer_has_the_papers_parameter_counts(dim: int) -> None:
    layer = LambdaLayer(dim)
    projections = sum(p.numel() for n, p in layer.named_parameters() if n.startswith("to_"))
    assert projections == {64: 6_144, 128: 14_336, 256: 36_864, 512: 106_496}[dim]
    assert layer.table.numel() == 8_464


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("side", "stride"), [(8, 1), (5, 2)])
def test_a_batch_of_one_has_the_gradients_that_it_has_beside_a_copy_of_itself(side, stride, training):
    """Batch statistics of x twice are those of x; so are the gradients. torch's batch norm gets this wrong alone."""
    layer = LambdaLayer(32, scope=7, key_depth=8, stride=stride).double().train(training)
    x = torch.randn(1, 32, side, side).double()
    found = []
    for copies in (1, 2):
        layer.zero_grad()
        given = x.repeat(copies, 1, 1, 1).requires_grad_()
        (layer(given).square().sum() / copies).backward()
        grads = {name: p.grad.clone() for name, p in layer.named_parameters()}
        found.append({**grads, "x": given.grad.sum(0)})
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_batch_norms_are_handed_gradients_in_the_format_of_their_input(channels_last: bool, apart: bool) -> None:
    """PyTorch's backward pass of a batch norm takes up to 40 times as long on a CPU where they differ."""
    layer = LambdaLayer(32, scope=3)
    if apart:  # three projections, each called
        layer.to_k.register_forward_hook(lambda *_: None)
    x = torch.randn(2, 32, 6, 5)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    strides = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.native_batch_norm_backward.default:
                strides.append((args[0].stride(), args[1].stride()))
            return func(*args, **(kwargs or {}))

    with Watch():
        layer(x.requires_grad_()).square().sum().backward()
    assert len(strides) == 2
    assert all(grad == given for grad, given in strides)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_projections_gradients_are_as_exact_as_a_convolutions(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(32, 24, 9, 9).to(dtype), torch.randn(40, 24).to(dtype)
    grad = torch.randn(32, 40, 81).to(dtype)

    def run(f, *tensors: Tensor) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        y = f(*leaves)
        return [y, *torch.autograd.grad(y, leaves, grad.to(y.dtype))]

    def convolution(x: Tensor, weight: Tensor) -> Tensor:
        return nn.functional.conv2d(x, weight[..., None, None]).flatten(2)

    exact = run(convolution, x.double(), weight.double())
    ours, theirs = run(lambda x, w: product(x, w, None), x, weight), run(convolution, x, weight)
    for a, b, right in zip(ours, theirs, exact, strict=True):
        assert a.dtype == dtype
        assert (a - right).norm() <= 1.5 * (b - right).norm()


def test_resizing_a_table_keeps_the_precision_that_it_has() -> None:
    torch.manual_seed(0)
    exact = torch.randn(7, 9, 3, 2, dtype=torch.float64)
    by_axis = torch.nn.functional.interpolate(
        exact.flatten(2).movedim(-1, 0)[None], size=(11, 5), mode="bicubic", align_corners=True
    )[0].movedim(0, -1)
    assert torch.equal(resize_table(exact, (6, 3)), by_axis.reshape(11, 5, 3, 2))
    rounded = resize_table(exact.bfloat16(), (6, 3))
    assert torch.equal(rounded, resize_table(exact.bfloat16().double(), (6, 3)).bfloat16())


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("strategy", ["auto", *[s for s in STRATEGIES if s != "fused"]])
@pytest.mark.parametrize(
    ("kind", "shape", "arguments"),
    [
        (LambdaLayer, (2, 8, 7, 6), {"scope": 5, "stride": 2, "position_bias": True}),
        (LambdaLayer, (1, 8, 40, 36), {"scope": 23}),
        (LambdaLayer1d, (2, 8, 20), {"scope": 5, "causal": True}),
        (LambdaLayer3d, (2, 8, 3, 4, 5), {"scope": 3}),
    ],
    ids=["stride", "large", "causal", "volume"],
)
def test_a_trace_of_a_layer_gives_the_layers_numbers(kind, shape, arguments, strategy, training) -> None:
    torch.manual_seed(0)
    layer = kind(8, heads=2, key_depth=4, strategy=strategy, **arguments).double().train(training)
    x = torch.randn(shape, dtype=torch.float64)
    with torch.set_grad_enabled(training):
        try:
            want = layer(x)
        except ValueError:  # an order that this problem does not have
            return
        traced = torch.jit.trace(layer, x, check_trace=False)
        torch.testing.assert_close(traced(x), want)
        other = torch.randn_like(x)
        torch.testing.assert_close(traced(other), layer(other))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("what", ["ours", "timm's window", "timm's table", "timm's fused", "ours fused"])
def test_traces_can_be_saved_and_hold_no_python(what: str, tmp_path) -> None:
    torch.manual_seed(0)
    r = None if what == "timm's table" else 5
    layer = TimmLambdaLayer(8, r=r, feat_size=(7, 6)) if "timm" in what else LambdaLayer(8, scope=5)
    layer.eval()
    x = torch.randn(2, 8, 7, 6)
    want = layer(x)
    if "timm" in what:
        accelerate(layer)
    layer = fuse(layer) if "fused" in what else layer
    traced = torch.jit.trace(layer, x)
    traced.save(tmp_path / "trace.pt")
    torch.testing.assert_close(torch.jit.load(tmp_path / "trace.pt")(x), want, rtol=1e-4, atol=1e-5)
    assert "PythonOp" not in str(traced.graph)


@pytest.mark.filterwarnings("ignore")  # torch's own, of its older exporter
@pytest.mark.parametrize("strategy", ["auto", "lambdas", "scores", "conv", "fourier"])
def test_the_older_onnx_exporter_gives_the_layers_numbers(strategy: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(LambdaLayer(8, scope=5, strategy=strategy)).eval()
    x, file = torch.randn(2, 8, 9, 7), io.BytesIO()
    torch.onnx.export(model, (x,), file, dynamo=False, opset_version=17)
    session = onnxruntime.InferenceSession(file.getvalue())
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s != "fused" and not s.endswith("_chunked")])
def test_forward_mode_derivatives_and_hessians_are_those_of_reverse_mode(strategy: str) -> None:
    torch.manual_seed(0)
    layer = LambdaLayer(4, scope=3, heads=2, key_depth=2, strategy=strategy).double().eval()
    x, v = torch.randn(2, 1, 4, 3, 3, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return layer(x).square().sum()

    jacobian = torch.func.jacrev(layer)(x)
    torch.testing.assert_close(torch.func.jvp(layer, (x,), (v,))[1], (jacobian * v).sum((-1, -2, -3, -4)))
    by_forward, by_reverse = torch.func.hessian(loss)(x), torch.func.jacrev(torch.func.jacrev(loss))(x)
    torch.testing.assert_close(by_forward, by_reverse)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_autocast_leaves_float64_as_torchs_own_layers_do(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, conv = LambdaLayer(8, scope=3).to(dtype), nn.Conv2d(8, 8, 1).to(dtype)
    x = torch.randn(2, 8, 5, 4, dtype=dtype)
    for training in (False, True):
        layer.train(training)
        want = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
            assert y.dtype == conv(x).dtype == (torch.float64 if dtype == torch.float64 else torch.bfloat16)
        if dtype == torch.float64:
            torch.testing.assert_close(y, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("count_padding", [False, True])
@pytest.mark.parametrize("sides", [(1, 5, 4), (2, 8, 8), (2, 2, 2), (4, 1, 5), (1, 1, 1)])
def test_a_volume_of_few_frames_is_pooled_as_the_frames_that_are_there(sides: tuple, count_padding: bool) -> None:
    torch.manual_seed(0)
    layer = LambdaLayer3d(8, scope=3, stride=2, pool_count_padding=count_padding).double().eval()
    x = torch.randn(1, 8, *sides, dtype=torch.float64)
    layer.stride = 1
    whole = layer(x)
    layer.stride = 2
    y = layer(x)
    assert y.shape == (1, 8, *(-(-s // 2) for s in sides))
    for at in itertools.product(*(range(-(-s // 2)) for s in sides)):
        window = whole[(..., *(slice(max(0, 2 * i - 1), 2 * i + 2) for i in at))]
        mean = window.sum((2, 3, 4)) / (27 if count_padding else window[0, 0].numel())
        torch.testing.assert_close(y[(..., *at)], mean)
    with pytest.raises(ValueError, match="smaller than the pooling: 1 < 2"):
        LambdaLayer3d(8, scope=3, stride=2, pool_size=2)(torch.randn(1, 8, 1, 4, 4))


class WithExtraState(LambdaLayer):
    told = None

    def get_extra_state(self) -> str:
        return "kept"

    def set_extra_state(self, state: str) -> None:
        self.told = state


def test_loading_is_torchs_own_but_for_the_words_of_an_error() -> None:
    torch.manual_seed(0)
    layer, other = LambdaLayer(8, scope=3), LambdaLayer(8, scope=3)
    old = {k: v for k, v in other.state_dict().items() if not k.endswith("num_batches_tracked")}  # as torch 0.4 saved
    assert str(layer.load_state_dict(old)) == "<All keys matched successfully>"
    assert torch.equal(layer.table, other.table)

    def renamed(module, state, *_) -> None:
        state["table"] = state.pop("rel")

    layer.register_load_state_dict_pre_hook(renamed)
    layer.load_state_dict({("rel" if k == "table" else k): 2 * v for k, v in other.state_dict().items()})
    assert torch.equal(layer.table, 2 * other.table)

    extra = WithExtraState(8, scope=3)
    extra.load_state_dict(WithExtraState(8, scope=3).state_dict())
    assert extra.told == "kept"
    with pytest.raises(RuntimeError, match="_extra_state"):
        extra.load_state_dict(other.state_dict())
    found = other.load_state_dict({"table": other.table, "more": other.table}, strict=False)
    assert "to_q.weight" in found.missing_keys
    assert found.unexpected_keys == ["more"]
