"""timm's lambda layers evaluated in our order."""

from collections.abc import Callable
from typing import Literal, overload

from timm.layers.lambda_layer import LambdaLayer as TimmLambdaLayer
from timm.models import register_notrace_module
from torch import Tensor, fx, nn

from lambdanets.layers.projections import as_one_call, in_format_of, normed, project
from lambdanets.ops import lambda_op
from lambdanets.ops.problem import sizes
from lambdanets.untouched import Changes, touched, why_called

fx.wrap("as_one_call")


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
        return self.pool(in_format_of(x, y))

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
