"""`fuse`: a model for inference alone. Batch norms go into the convolutions before them, a lambda layer's three
projections and two batch norms become one product, and expanded relative tables stay in memory between calls.
"""

import copy
import inspect
import warnings
from collections import Counter
from typing import Any, Literal, overload

import torch
from timm.layers import BatchNormAct2d
from timm.layers.lambda_layer import LambdaLayer as TimmLambdaLayer
from timm.layers.lambda_layer import rel_pos_indices
from timm.models import get_notrace_functions, get_notrace_modules, register_notrace_module
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from lambdanets.layers.lambda_layer import LambdaLayer, LambdaLayer1d, LambdaLayer3d
from lambdanets.layers.projections import fold, product, stack
from lambdanets.models.timm_layers import AcceleratedLambdaLayer, relative_table, why_not_read
from lambdanets.ops.planner import plan
from lambdanets.ops.problem import autocast_dtype
from lambdanets.ops.reference import relative_embeddings
from lambdanets.ops.tune import tuned
from lambdanets.untouched import BATCH_NORM, CONV, Changes, touched, why_called, why_not_folded

KEPT_BYTES = 8 << 20  # of expanded tables a layer may keep: three maps of 14 x 14 in float32, or one of 19 x 19


@overload
def fuse(model: nn.Module, *, explain: Literal[False] = False) -> nn.Module: ...
@overload
def fuse(model: nn.Module, *, explain: Literal[True]) -> tuple[nn.Module, Changes]: ...
def fuse(model: nn.Module, *, explain: bool = False) -> nn.Module | tuple[nn.Module, Changes]:
    """A copy of a model for inference: its outputs are those of `model.eval()`, within rounding, to 1e-10 in float64.

    model    any module: ours, timm's, one `LambdaLayer`; it stays as it is. Fused are lambda layers (ours and timm's)
             and each convolution that only a batch norm reads, where they are exactly what they seem. Left alone is
             what somebody has replaced, subclassed, parametrised or hooked, and a layer with a context of other width;
             a model whose calls `torch.fx` cannot follow keeps its batch norms, with a warning
    explain  return a table as well: each lambda layer and batch norm, whether it was replaced, folded or left, and why
    returns  the copy, in evaluation, without gradients. Its state dict has other names: save the model, fuse again

    >>> from lambdanets import create_model
    >>> model = create_model("lambda_resnet_tiny", num_classes=5).double().eval()
    >>> x = torch.randn(2, 3, 32, 24).double()
    >>> fused, changes = fuse(model, explain=True)
    >>> bool(torch.allclose(fused(x), model(x), rtol=0, atol=1e-10))
    True
    >>> changes.of("layer2.0.conv2").what, changes.of("layer2.0.bn1").why
    ('replaced', 'into layer2.0.conv1')
    >>> sum(isinstance(m, nn.BatchNorm2d) for m in fused.modules())  # a norm stays after each of the 3 lambda layers
    3
    """
    changes = Changes()
    # A tensor made in inference mode could never be part of a gradient, say of a saliency map.
    with torch.inference_mode(False), torch.no_grad():
        # Pruning keeps the weight of the last call, which is part of a graph: torch would refuse to copy that.
        made = [t for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor) and not t.is_leaf]
        fused = copy.deepcopy(model, {id(t): t.detach().clone() for t in made}).eval().requires_grad_(False)
        _fold_batch_norms(fused, changes)
        for path, layer in list(fused.named_modules()):
            if not isinstance(layer, LambdaLayer | TimmLambdaLayer):
                continue
            why = _why_left(layer)
            if why is None:
                ours = _from_timm(layer) if isinstance(layer, TimmLambdaLayer) else layer
                changes.add(path, layer, "replaced", "its projections and norms are one product")
                _become(layer, FusedLambdaLayer(ours))
            else:
                changes.add(path, layer, "left", why)
    return (fused, changes) if explain else fused


def _become(module: nn.Module, other: nn.Module) -> None:
    """Make a module another one in its place: under each of its names, and for whoever holds the object."""
    module.__class__ = other.__class__
    vars(module).clear()
    vars(module).update(vars(other))


def _why_left(layer: LambdaLayer | TimmLambdaLayer) -> str | None:
    """Why a lambda layer may be more than its weights say; None: it is not."""
    timms = isinstance(layer, TimmLambdaLayer)
    kinds = (TimmLambdaLayer, AcceleratedLambdaLayer) if timms else (LambdaLayer, LambdaLayer1d, LambdaLayer3d)
    if (why := touched(layer, kinds)) is not None:
        return why
    own = {"qkv", "norm_q", "norm_v", "pool"} if timms else {"to_q", "to_k", "to_v", "norm_q", "norm_v"}
    for name, part in layer.named_children():
        if name == "conv_lambda":
            continue
        if name not in own:
            return f"has a part {name} of somebody else's"
        if name == "pool" and isinstance(part, nn.AvgPool2d):
            plain = (part.kernel_size, part.stride, part.padding, part.ceil_mode) == (2, 2, 0, False)
            why = touched(part, (nn.AvgPool2d,)) if plain else "is not timm's 2x2 pooling"
        else:
            why = why_called(part)
        if why is not None:
            return f"its {name} {why}"
    if isinstance(layer, TimmLambdaLayer):
        if layer.pos_emb is not None:
            assert layer.rel_pos_indices is not None
            same = torch.equal(layer.rel_pos_indices, rel_pos_indices(layer.feat_size, layer.rel_pos_indices.device))
            return None if same else "its rel_pos_indices are not timm's"
        return why_not_read(layer)
    if layer.context_dim != layer.dim:
        return f"its context has {layer.context_dim} channels and its queries {layer.dim}: no one product"
    return None


@register_notrace_module
class FusedLambdaLayer(LambdaLayer):
    """A `LambdaLayer` whose weights never change: made by `fuse`.

    weight, bias   (q, k and v channels out, dim) and (channels out,), batch norms folded in
    expanded       E (n, m, k, u) for the maps seen last, where the plan's order reads it; KEPT_BYTES at most
    kept           what another order makes of the table, see `lambda_op`
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, layer: LambdaLayer) -> None:
        nn.Module.__init__(self)
        vars(self).update({name: getattr(layer, name) for name in LambdaLayer.SETTINGS})
        vars(self)["ndim"] = type(layer).ndim
        with torch.no_grad():
            weights, biases, norms = layer.projections()
            weight, bias = stack(weights, biases, norms)
        self.counts = [len(part) for part in weights]
        self.register_buffer("weight", weight)
        self.register_buffer("bias", weight.new_zeros(len(weight)) if bias is None else bias)
        for name in ("table", "position_bias"):
            given = getattr(layer, name)
            self.register_buffer(name, None if given is None else given.detach())
        self.expanded: dict[Any, Tensor | None] = {}
        self.kept: dict[Any, Any] = {}
        self.eval()

    def train(self, mode: bool = True) -> "FusedLambdaLayer":
        """Evaluation only."""
        if mode:
            raise RuntimeError("a fused layer is for inference: train the model that it was made from, and fuse again")
        return super().train(mode)

    def resize(self, size: Any) -> None:
        raise RuntimeError("a fused layer keeps its table: resize the layer that it was made from, and fuse again")

    def _project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        if context is x:
            q, *keys, values = product(x, self.weight, self.bias).split(self.counts, 1)
        else:
            of_q = self.counts[0]
            q = product(x, self.weight[:of_q], self.bias[:of_q])
            *keys, values = product(context, self.weight[of_q:], self.bias[of_q:]).split(self.counts[1:], 1)
        return q.transpose(-2, -1), keys[0].transpose(-2, -1) if keys else None, values.transpose(-2, -1)

    def _positions(self, x: Tensor, context: Tensor) -> dict[str, Any]:
        dtype = autocast_dtype(x) or x.dtype
        if self.table is None or dtype == torch.float16 or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return {"table": self.table}
        key = (tuple(x.shape), tuple(context.shape[2:]), dtype, self.strategy)
        E = self.expanded.get(key, self)
        if E is self:  # not yet seen
            with torch.inference_mode(False), torch.no_grad():  # it may be part of a gradient later
                E = self._expand(x, context, dtype)
            seen = {**self.expanded, key: E}
            while len(seen) > 64 or sum(t.nbytes for t in seen.values() if t is not None) > KEPT_BYTES:
                del seen[next(iter(seen))]
            self.expanded = seen  # one assignment: threads that meet here lose a table at most
        return {"table": self.table, "kept": self.kept} if E is None else {"embeddings": E}

    def _expand(self, x: Tensor, context: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The table for this map, laid out as the strategies read it; None where none would, or it is too large."""
        assert self.table is not None
        p = self.problem(x, context)
        order = plan(p)[0].strategy if self.strategy == "auto" else self.strategy
        order = tuned(p) if order == "tuned" else order
        if order.removesuffix("_chunked") not in ("lambdas", "scores"):
            return None
        if p.n * p.m * p.k * p.u * dtype.itemsize > KEPT_BYTES:
            return None
        E = relative_embeddings(self.table.to(dtype), p.grid or (), p.context_grid)
        return E.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)

    def _forget(self) -> None:
        self.expanded, self.kept = {}, {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "expanded": {}, "kept": {}}  # made again where the copy or the file is used

    def _apply(self, fn: Any, recurse: bool = True) -> "FusedLambdaLayer":
        self._forget()  # another device or dtype
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)


def _from_timm(layer: TimmLambdaLayer) -> LambdaLayer:
    """timm's lambda layer as ours, in evaluation."""
    window = None if layer.conv_lambda is None else layer.conv_lambda.kernel_size[:2]
    pooled = isinstance(layer.pool, nn.AvgPool2d)
    bias = layer.conv_lambda is not None and layer.conv_lambda.bias is not None
    ours = LambdaLayer(
        layer.qkv.in_channels, layer.num_heads * layer.dim_v, heads=layer.num_heads, key_depth=layer.dim_qk,
        scope=window, size=layer.feat_size if window is None else None, stride=2 if pooled else 1, pool_size=2,
        position_bias=bias,
    ).to(layer.qkv.weight)  # fmt: skip
    counts = [layer.num_heads * layer.dim_qk, layer.dim_qk, layer.dim_v]
    for i, conv in enumerate((ours.to_q, ours.to_k, ours.to_v)):
        assert conv is not None
        conv.weight = nn.Parameter(layer.qkv.weight.split(counts)[i].detach())
        if layer.qkv.bias is not None:
            conv.bias = nn.Parameter(layer.qkv.bias.split(counts)[i].detach())
    ours.norm_q, ours.norm_v = layer.norm_q, layer.norm_v
    if layer.conv_lambda is not None and layer.conv_lambda.bias is not None:
        ours.position_bias = nn.Parameter(layer.conv_lambda.bias.detach())
    ours.table = nn.Parameter(relative_table(layer).detach())
    return ours.eval()


# --- convolutions -----------------------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    """Follows a model's calls down to convolutions and norms; what timm calls untraceable is one call."""

    def __init__(self) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self.leaves = (*get_notrace_modules(), _ConvNd, *BATCH_NORM, LambdaLayer, TimmLambdaLayer)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self.leaves) or super().is_leaf_module(m, module_qualified_name)


def _fold_batch_norms(model: nn.Module, changes: Changes) -> None:
    """Fold, in place, each batch norm into the convolution whose only reader it is, where both are called once."""
    if isinstance(model, LambdaLayer | TimmLambdaLayer):
        return
    for module in model.modules():
        if hasattr(module, "grad_checkpointing"):
            setattr(module, "grad_checkpointing", False)  # noqa: B010  (a Module's attributes have no type)
    parts = dict(model.named_modules())
    # The norms of a lambda layer are its own.
    layers = [part for part in parts.values() if isinstance(part, LambdaLayer | TimmLambdaLayer)]
    inside = {id(part) for layer in layers for part in layer.modules()}
    norms = {path: part for path, part in parts.items() if isinstance(part, _BatchNorm) and id(part) not in inside}
    if not norms:
        return
    try:
        graphs = _graphs(model)
    except Exception as error:  # whatever the model's own code raises when it is handed a proxy
        name = type(model).__name__
        warnings.warn(f"{name} keeps its batch norms: torch.fx cannot follow it ({error})", stacklevel=3)
        short = str(error).partition("\n")[0][:80]
        for path, norm in norms.items():
            changes.add(path, norm, "left", f"torch.fx cannot follow {name}: {short}")
        return
    for path, norm in norms.items():
        pairs = {_convolution_of(path, norm, parts, graph) for graph in graphs}
        into, why_left = max(pairs, key=lambda pair: str(pair[1] or ""))
        if len(pairs) > 1 and why_left is None:
            why_left = "its input depends on the arguments that the model gets"
        if why_left is not None:
            changes.add(path, norm, "left", why_left)
            continue
        conv: Any = parts[into]
        weight, bias = fold(conv.weight.detach(), conv.bias, norm)
        assert bias is not None
        conv.weight, conv.bias = (nn.Parameter(value, requires_grad=False) for value in (weight, bias))
        changes.add(path, norm, "folded", f"into {into}")
        _become(norm, nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity())
        norm.eval()


def _graphs(model: nn.Module) -> list[fx.Graph]:
    """The model's calls with all of its arguments given, and with the first alone where it has others."""
    graphs = [_Tracer().trace(model)]
    arguments = list(inspect.signature(model.forward).parameters.values())
    left_out = {a.name: a.default for a in arguments[1:] if a.default is not a.empty}
    return [*graphs, _Tracer().trace(model, left_out)] if left_out else graphs


def _convolution_of(path: str, norm: nn.Module, parts: dict[str, nn.Module], graph: fx.Graph) -> tuple[str, str | None]:
    """The convolution that the batch norm at a path can be folded into, or why there is none."""
    calls = [node for node in graph.nodes if node.op == "call_module"]
    counts = Counter(str(node.target) for node in calls)
    called = [node for node in calls if node.target == path]
    if (why := touched(norm, (*BATCH_NORM, BatchNormAct2d)) or why_not_folded(norm)) is not None:
        return "", why
    if norm.training:
        return "", "stays in training mode"
    if len(called) != 1:
        return "", f"is called {len(called)} times"
    node = called[0].args[0] if called[0].args else None
    into = str(node.target) if isinstance(node, fx.Node) and node.op == "call_module" else ""
    if not into or not isinstance(parts[into], CONV):
        what = f"{into}, a {type(parts[into]).__name__}," if into else "something else"
        return "", f"reads {what} and no convolution"
    assert isinstance(node, fx.Node)
    if (why := touched(parts[into], CONV)) is not None:
        return "", f"its convolution {into} {why}"
    if counts[into] != 1 or len(node.users) != 1:
        return "", f"its convolution {into} is called {counts[into]} times and read by {len(node.users)}"
    # Weights may be read as well, by the model itself or inside a module that is one call.
    read = [
        str(n.target) for n in graph.nodes if n.op == "get_attr" and str(n.target).startswith((f"{into}.", f"{path}."))
    ]
    leaves = {str(n.target) for n in calls} - {into, path}
    pair = (parts[into], norm)
    within = [leaf for leaf in leaves if any(part is own for part in parts[leaf].modules() for own in pair)]
    if read or within:
        return "", f"its convolution {into}, or the norm, is used by {(read + within)[0]} as well"
    return into, None
