"""Public models and checkpoints: timm's lambda layers evaluated in our order, d-li14's weights in our model."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, overload

import timm
import torch
from timm.layers.lambda_layer import LambdaLayer as TimmLambdaLayer
from timm.models import register_notrace_module
from torch import Tensor, fx, nn

from . import resnet
from .layer import mismatch
from .ops import lambda_op
from .ops.eager import sizes
from .projections import as_one_call, like, normed, project
from .untouched import Changes, touched, why_called

fx.wrap("as_one_call")

PUBLIC = ("lambda_resnet26t", "lambda_resnet26rpt_256", "lambda_resnet50ts", "lamhalobotnet50ts_256")


@register_notrace_module  # timm's feature extractors that trace a graph call it as one node
class AcceleratedLambdaLayer(TimmLambdaLayer):
    """timm's `LambdaLayer` with another forward: the same parameters under the same names, planned by `lambda_op`.

        y[b,n,h,v] = Σ_k q[b,n,h,k] · (Σ_m (K̄[b,m,k] + R[t(m)-t(n),k]) · V[b,m,v] + bias[k])

    It adds no state, so that an object of either class becomes one of the other by its `__class__` alone.
    x (b, dim, H, W) -> (b, heads·v, H, W), or H//2, W//2 where timm's layer pools. A window takes any map; a table
    (`pos_emb`) also takes smaller maps than it was made for, by its middle, which timm's forward does not. Raises
    ValueError on larger ones.
    """

    def forward(self, x: Tensor) -> Tensor:
        return as_one_call(self, x)

    def evaluate(self, x: Tensor) -> Tensor:
        """`forward` itself."""
        if why_not_read(self) is not None:  # touched since: timm's forward calls what is there now
            return super().forward(x)
        b, (height, width) = x.shape[0], sizes(x)[2:]
        h, k, v, n = self.num_heads, self.dim_qk, self.dim_v, height * width
        norms = (self.norm_q, None, self.norm_v)
        if not any(why_called(part) for part in (self.qkv, *norms)):
            counts = [h * k, k, v]
            biases = [None] * 3 if self.qkv.bias is None else self.qkv.bias.split(counts)
            q, keys, values = project(x, self.qkv.weight.flatten(1).split(counts), biases, norms)
        else:
            q, keys, values = self.qkv(x).split([h * k, k, v], dim=1)
            q, keys, values = (
                y.flatten(2).transpose(-2, -1) for y in (normed(self.norm_q, q), keys, normed(self.norm_v, values))
            )
        q = q.reshape(b, n, h, k)
        y = lambda_op(
            q, keys.reshape(b, n, k, 1), values.reshape(b, n, v, 1), table=self._table(height, width),
            grid=(height, width),
        )  # fmt: skip
        if self.conv_lambda is not None and self.conv_lambda.bias is not None:
            y = y + (q * self.conv_lambda.bias.to(q.dtype)).sum(-1, keepdim=True)
        y = y.permute(0, 2, 3, 1).reshape(b, h * v, height, width)
        return self.pool(like(y, x))

    def _table(self, height: int, width: int) -> Tensor:
        """`relative_table`, if this map is no larger than it was made for."""
        if self.conv_lambda is None and (height > self.feat_size[0] or width > self.feat_size[1]):
            raise ValueError(
                f"the map is {(height, width)} and pos_emb was made for at most {tuple(self.feat_size)}: give smaller "
                "images, or build timm's model with img_size=... and load its pos_emb from lambdanets.resize_table("
                f"pos_emb[..., None], {(height, width)})[..., 0]"
            )
        return relative_table(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AcceleratedLambdaLayer":
        # A 5-D kernel makes `model.to(memory_format=torch.channels_last)` fail; its last axis has one element.
        def on_four_axes(t: Tensor) -> Tensor:
            return fn(t.squeeze(-1)).unsqueeze(-1) if t.dim() == 5 else fn(t)

        return super()._apply(on_four_axes, recurse)


def why_not_read(layer: TimmLambdaLayer) -> str | None:
    """Why the positions of timm's layer are more than its weights: `conv_lambda` is not as timm built it; None: they
    are not."""
    conv = layer.conv_lambda
    if conv is None:
        return None
    if (why := touched(conv, (nn.Conv3d,))) is not None:
        return f"its conv_lambda {why}"
    r_y, r_x = conv.kernel_size[:2]
    if conv.padding != (r_y // 2, r_x // 2, 0) or conv.kernel_size[2] != 1 or not r_y % 2 == r_x % 2 == 1:
        return f"its conv_lambda has the kernel {conv.kernel_size} and the padding {conv.padding}"
    if conv.in_channels != 1 or conv.stride != (1, 1, 1) or conv.dilation != (1, 1, 1) or conv.padding_mode != "zeros":
        return "its conv_lambda is no plain window: it strides, dilates, or pads with something"
    return None


def relative_table(layer: TimmLambdaLayer) -> Tensor:
    """timm's positions as a relative table (r_y, r_x, k, 1), a view: both are indexed by context - query."""
    if layer.conv_lambda is not None:
        return layer.conv_lambda.weight[:, 0].permute(1, 2, 0, 3)  # (k, 1, r_y, r_x, 1)
    assert layer.pos_emb is not None
    return layer.pos_emb[..., None]  # (2H-1, 2W-1, k)


@overload
def accelerate(model: nn.Module, *, undo: bool = False, explain: Literal[False] = False) -> int: ...
@overload
def accelerate(model: nn.Module, *, undo: bool = False, explain: Literal[True]) -> tuple[int, Changes]: ...
def accelerate(model: nn.Module, *, undo: bool = False, explain: bool = False) -> int | tuple[int, Changes]:
    """Evaluate every timm `LambdaLayer` of a model in the order that `lambda_op` plans, in place: the same function.

    model    any module, or a `LambdaLayer` itself. Its modules, parameters, hooks and state dict stay the objects
             and names they are: optimisers go on, checkpoints of either form load into the other
    undo     True gives every layer timm's own forward back
    explain  return a table as well: each of timm's lambda layers, whether it was changed or left, and why
    returns  layers changed: 0 for a model without any, or on a second call

    Outputs and gradients equal timm's: to 1e-10 in float64, within rounding below. timm's published weights have such
    layers in lambda_resnet26t, lambda_resnet26rpt_256, lambda_resnet50ts and lamhalobotnet50ts_256. Call it before
    tracing a graph (`torch.fx`, `torch.export`). A layer is left alone if it has a forward of its own (a subclass, one
    put on the object) or positions that are more than a weight (a hook, an adapter or pruning at `conv_lambda`); where
    that comes later, timm's forward runs from then on. Hooks on the layer and whatever is at `qkv` and the norms work.

    >>> import torch
    >>> model = nn.Sequential(nn.Conv2d(3, 32, 3), TimmLambdaLayer(32, r=9), nn.ReLU()).double().eval()
    >>> x = torch.randn(2, 3, 10, 14).double()
    >>> before = model(x)
    >>> accelerate(model)
    1
    >>> bool(torch.allclose(model(x), before, rtol=0, atol=1e-10))
    True
    >>> accelerate(model), accelerate(model, undo=True)
    (0, 1)
    """
    changed, changes = 0, Changes()
    old, new = (AcceleratedLambdaLayer, TimmLambdaLayer) if undo else (TimmLambdaLayer, AcceleratedLambdaLayer)
    for path, layer in model.named_modules():
        if not isinstance(layer, TimmLambdaLayer):
            continue
        why = None
        if type(layer) is new:
            why = "is so already"
        elif type(layer) is not old:
            why = "is a subclass, which may compute something else"
        elif not undo:
            why = "has a forward of its own" if "forward" in vars(layer) else why_not_read(layer)
        if why is None:
            layer.__class__ = new
            changed += 1
        how = "by timm's own forward" if undo else "by the order that lambda_op plans"
        changes.add(path, layer, "left" if why else "replaced", why or how)
    return (changed, changes) if explain else changed


def create_model(
    name: str,
    *,
    pretrained: bool = False,
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    share_tables: bool = False,
    lambda_args: dict[str, Any] | None = None,
) -> nn.Module:
    """Build a LambdaResNet of ours by name (`resnet.create_model`), or a public model of timm's, `accelerate`d.

    name             one of `list_models()`, or of PUBLIC with timm's tag or without: "lambda_resnet50ts.a1h_in1k"
    pretrained       timm's published weights, downloaded by timm; only the names in PUBLIC have any. What they expect
                     of an image is in `model.pretrained_cfg`: 256 px, crop 0.94 or 0.95
    num_classes      another count than the weights' starts a new classifier; 0 gives features
    in_channels, drop_rate, drop_path_rate   as in timm
    share_tables, lambda_args                as in `resnet.create_model`; ours only

    >>> sum(p.numel() for p in create_model("resnet50_llll").parameters())
    14995592
    >>> sum(p.numel() for p in create_model("lambda_resnet26t").parameters())
    10958272
    """
    if name.split(".")[0] in PUBLIC:
        if share_tables or lambda_args:
            raise ValueError(
                f"{name!r} is timm's model, of fixed layers, and got share_tables={share_tables}, "
                f"lambda_args={lambda_args}: leave them out, or take one of lambdanets.list_models()"
            )
        model: nn.Module = timm.create_model(
            name, pretrained=pretrained, num_classes=num_classes, in_chans=in_channels, drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
        )  # fmt: skip
        accelerate(model)
        return model
    if pretrained:
        raise ValueError(
            f"pretrained=True, and nobody has published weights of {name!r}; of {', '.join(PUBLIC)} timm has"
        )
    return resnet.create_model(
        name, num_classes=num_classes, in_channels=in_channels, drop_rate=drop_rate, drop_path_rate=drop_path_rate,
        share_tables=share_tables, lambda_args=lambda_args,
    )  # fmt: skip


def from_d_li14(state_dict: Mapping[str, Any]) -> resnet.LambdaResNet:
    """Load the state dict of d-li14's lambda_resnet50 (github.com/d-li14/lambda.pytorch) into `resnet50_llll`.

    state_dict   torchvision's names, `module.` in front or not, and `layerL.B.conv2.` conv_qkv.weight (rows q, k, v;
                 q head-major), norm_q, norm_v, lambda_conv.weight (16, 1, 1, 23, 23) indexed by context - query,
                 lambda_conv.bias (16,)
    returns      a model in training mode whose outputs are theirs: with the constant on the position lambda, and
                 3x3 pooling that counts the padding. As many classes as `fc` has; dtype and device of the weights

    Raises RuntimeError, naming at most ten keys a kind, where a key is missing, unknown, or of another shape. The
    layout is that of lambda_layer.py and lambda_resnet.py at commit 7a10beb; published top-1 78.208 (its README).

    >>> model = create_model("resnet50_llll", lambda_args={"position_bias": True, "pool_count_padding": True})
    >>> sum(p.numel() for p in model.parameters())  # 14,995,592 and a bias of 16 in each of 16 layers
    14995848
    """
    state = {key.removeprefix("module."): value for key, value in state_dict.items()}
    fc = state.get("fc.weight")
    model = resnet.create_model(
        "resnet50_llll",
        num_classes=1000 if fc is None else len(fc),
        lambda_args={"position_bias": True, "pool_count_padding": True},
    )
    # What their model would have, from ours. Ours has a place for pooling at the start of each shortcut.
    shapes = {_shortcut(key, -1): tuple(value.shape) for key, value in model.state_dict().items()}
    rows: dict[str, list[int]] = {key.removesuffix("table"): [] for key in shapes if key.endswith("conv2.table")}
    for at in rows:
        parts = [shapes.pop(f"{at}to_{part}.weight") for part in "qkv"]
        rows[at] = [part[0] for part in parts]
        r_y, r_x, k, u = shapes.pop(f"{at}table")
        shapes[f"{at}conv_qkv.weight"] = (sum(rows[at]), *parts[0][1:])
        shapes[f"{at}lambda_conv.weight"] = (k, u, 1, r_y, r_x)
        shapes[f"{at}lambda_conv.bias"] = shapes.pop(f"{at}position_bias")
    wrong = {key: (shapes[key], tuple(state[key].shape)) for key in shapes.keys() & state.keys()}
    wrong = {key: pair for key, pair in sorted(wrong.items()) if pair[0] != pair[1]}
    missing, extra = sorted(shapes.keys() - state.keys()), sorted(state.keys() - shapes.keys())
    if wrong or missing or extra:
        raise RuntimeError(mismatch("d-li14's lambda_resnet50", wrong, missing, extra))

    for at, counts in rows.items():
        for part, weight in zip("qkv", state.pop(f"{at}conv_qkv.weight").split(counts), strict=True):
            state[f"{at}to_{part}.weight"] = weight
        state[f"{at}table"] = state.pop(f"{at}lambda_conv.weight")[:, :, 0].permute(2, 3, 0, 1)
        state[f"{at}position_bias"] = state.pop(f"{at}lambda_conv.bias")
    # Copies: the rows of conv_qkv share one memory, and the caller goes on with its state dict.
    own = {_shortcut(key, 1): v.detach().clone(memory_format=torch.contiguous_format) for key, v in state.items()}
    model.load_state_dict(own, assign=True)  # in their own dtype: copied into ours they would be rounded
    return model


def _shortcut(key: str, by: int) -> str:
    """Move the index in `layerL.B.downsample.INDEX.rest`; other keys as they are."""
    front, found, rest = key.partition(".downsample.")
    if not found:
        return key
    index, dot, rest = rest.partition(".")
    return f"{front}{found}{int(index) + by}{dot}{rest}"
