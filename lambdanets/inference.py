"""`fuse`: a model for inference alone. Batch norms go into the convolutions before them, a lambda layer's three
projections and two batch norms become one product, and expanded relative tables stay in memory between calls.
"""

import copy
import warnings
from collections import Counter, OrderedDict
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from timm.layers.lambda_layer import LambdaLayer as TimmLambdaLayer
from timm.models import get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn

from .layer import LambdaLayer, LambdaLayer1d, LambdaLayer3d
from .ops import plan, relative_embeddings
from .ops.eager import autocast_dtype
from .ops.tune import tuned
from .projections import BATCH_NORM, fold, heard, plain, product, stack
from .weights import relative_table

KEPT_BYTES = 8 << 20  # of expanded tables a layer may keep: three maps of 14 x 14 in float32, or one of 19 x 19


def fuse(model: nn.Module) -> nn.Module:
    """A copy of a model for inference: its outputs are those of `model.eval()`, within rounding, to 1e-10 in float64.

    model    any module: ours, timm's, one `LambdaLayer`; it stays as it is. Fused are lambda layers (ours and timm's)
             and each convolution that only a batch norm reads. What somebody has replaced or hooked is left alone, and
             so is a layer with a context of other width; a model whose calls `torch.fx` cannot follow keeps its batch
             norms, with a warning
    returns  the copy, in evaluation, without gradients. Its state dict has other names: save the model, fuse again

    >>> from lambdanets import create_model
    >>> model = create_model("lambda_resnet_tiny", num_classes=5).double().eval()
    >>> x = torch.randn(2, 3, 32, 24).double()
    >>> fused = fuse(model)
    >>> bool(torch.allclose(fused(x), model(x), rtol=0, atol=1e-10))
    True
    >>> sum(isinstance(m, nn.BatchNorm2d) for m in fused.modules())  # a norm stays after each of the 3 lambda layers
    3
    """
    fused = copy.deepcopy(model).eval().requires_grad_(False)
    _fold_batch_norms(fused)
    for path, layer in list(fused.named_modules()):
        ours = _from_timm(layer) if isinstance(layer, TimmLambdaLayer) else layer
        if type(ours) not in (LambdaLayer, LambdaLayer1d, LambdaLayer3d):
            continue
        if heard(layer) or ours.context_dim != ours.dim or not all(plain(part) for part in ours.children()):
            continue
        if not path:
            return FusedLambdaLayer(ours)
        fused.set_submodule(path, FusedLambdaLayer(ours))
    return fused


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
        left = ("training", "to_k", "table", "position_bias")  # None here where the layer lacks them
        vars(self).update({k: value for k, value in vars(layer).items() if k[0] != "_" and k not in left})
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
        self.expanded: OrderedDict[Any, Tensor | None] = OrderedDict()
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
        return q.mT, keys[0].mT if keys else None, values.mT

    def _positions(self, x: Tensor, context: Tensor) -> dict[str, Any]:
        dtype = autocast_dtype(x) or x.dtype
        if self.table is None or dtype == torch.float16 or torch.compiler.is_compiling():
            return {"table": self.table}
        key = (tuple(x.shape), tuple(context.shape[2:]), dtype, self.strategy)
        if key not in self.expanded:
            self.expanded[key] = self._expand(x, context, dtype)
            while len(self.expanded) > 64 or self._kept_bytes() > KEPT_BYTES:
                self.expanded.popitem(last=False)
        E = self.expanded.get(key)
        return {"table": self.table, "kept": self.kept} if E is None else {"embeddings": E}

    def _kept_bytes(self) -> int:
        return sum(t.nbytes for t in self.expanded.values() if t is not None)

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
        self.expanded.clear()
        self.kept.clear()

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
        self.leaves = (*get_notrace_modules(), *BATCH_NORM, LambdaLayer, TimmLambdaLayer)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self.leaves) or super().is_leaf_module(m, module_qualified_name)


def _fold_batch_norms(model: nn.Module) -> None:
    """Fold, in place, each batch norm into the convolution whose only reader it is, where both are called once."""
    if isinstance(model, LambdaLayer | TimmLambdaLayer):
        return
    for module in model.modules():
        if hasattr(module, "grad_checkpointing"):
            setattr(module, "grad_checkpointing", False)  # noqa: B010  (a Module's attributes have no type)
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # whatever the model's own code raises when it is handed a proxy
        warnings.warn(
            f"{type(model).__name__} keeps its batch norms: torch.fx cannot follow it ({error})", stacklevel=3
        )
        return
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    parts = dict(model.named_modules())
    for node in graph.nodes:
        if node.op != "call_module" or len(node.users) != 1:
            continue
        reader = next(iter(node.users))
        if reader.op != "call_module" or calls[node.target] > 1 or calls[reader.target] > 1:
            continue
        conv, norm = parts[str(node.target)], parts[str(reader.target)]
        acts = type(norm) is BatchNormAct2d
        if not isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d) or not (acts or type(norm) in BATCH_NORM):
            continue
        if heard(conv) or heard(norm) or norm.running_var is None or norm.weight is None:
            continue
        weight, bias = fold(conv.weight.detach(), conv.bias, norm)
        conv.weight = nn.Parameter(weight, requires_grad=False)
        assert bias is not None
        conv.bias = nn.Parameter(bias, requires_grad=False)
        model.set_submodule(str(reader.target), nn.Sequential(norm.drop, norm.act) if acts else nn.Identity())
