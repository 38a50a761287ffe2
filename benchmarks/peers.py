"""What `op.py` times the lambda layer against: its public forms, with our layer's weights, eager and compiled."""

import os
import shutil
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers.lambda_layer import LambdaLayer as TimmLambdaLayer
from torch import Tensor, nn

from lambdanets import LambdaLayer
from lambdanets.ops.reference import relative_embeddings
from lambdanets.ops.strategies import STRATEGIES

PEERS = {"timm": None, "plain einsum": "lambdas", "conv2d": "conv"}  # which order of ours predicts a peer's time
OURS = ("auto", "fuse", "fused")  # the last on a GPU alone: "auto" does not take it yet
COMPILED = " compiled"  # the end of a compiled contender's name


def _projected(layer: LambdaLayer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q (b, h, k, n), normalised keys (b, k, n), values (b, v, n), from the layer's own projections and norms."""
    b = x.shape[0]
    q = layer.norm_q(layer.to_q(x)).reshape(b, layer.heads, layer.key_depth, -1)
    keys = layer.to_k(x).reshape(b, layer.key_depth, -1).softmax(-1)
    return q, keys, layer.norm_v(layer.to_v(x)).reshape(b, layer.value_depth, -1)


class PlainEinsum(nn.Module):
    """The paper's order as most ports have it: gather E, λ = E·V, y = q·λ."""

    def __init__(self, layer: LambdaLayer, side: int) -> None:
        super().__init__()
        self.layer, self.side = layer, side

    def forward(self, x: Tensor) -> Tensor:
        q, keys, values = _projected(self.layer, x)
        E = relative_embeddings(self.layer.table, (self.side, self.side))[..., 0]
        lambdas = torch.einsum("nmk,bvm->bnkv", E, values) + torch.einsum("bkm,bvm->bkv", keys, values)[:, None]
        return torch.einsum("bhkn,bnkv->bhvn", q, lambdas).reshape(x.shape[0], -1, self.side, self.side)


class LambdaConvolution(nn.Module):
    """The lambda convolution as a Conv2d: the v channels are folded into the batch, one channel in, k out.

    A global table is the window that reaches every offset, r = 2·side - 1.
    """

    def __init__(self, layer: LambdaLayer, side: int) -> None:
        super().__init__()
        self.layer, self.side = layer, side
        self.kernel = nn.Parameter(layer.table.detach()[..., 0].permute(2, 0, 1)[:, None].contiguous())  # (k, 1, r, r)

    def forward(self, x: Tensor) -> Tensor:
        q, keys, values = _projected(self.layer, x)
        b, v, side = x.shape[0], values.shape[1], self.side
        content = torch.einsum("bkm,bvm->bkv", keys, values)
        position = F.conv2d(values.reshape(b * v, 1, side, side), self.kernel, padding=self.kernel.shape[-1] // 2)
        y = torch.einsum("bhkn,bkv->bhvn", q, content)
        y = y + torch.einsum("bhkn,bvkn->bhvn", q, position.reshape(b, v, -1, side * side))
        return y.reshape(b, -1, side, side)


def contenders(side: int, dim: int, scope: int | None) -> dict[str, nn.Module]:
    """Ours by strategy, then the peers, all with the same weights."""
    where = {"scope": scope} if scope else {"scope": None, "size": side}
    ours = {name: LambdaLayer(dim, strategy=name, **where) for name in ("auto", *STRATEGIES)}
    theirs = TimmLambdaLayer(dim, feat_size=(side, side), num_heads=4, dim_head=16, r=scope)
    first = ours["auto"]
    for layer in ours.values():
        layer.load_state_dict(first.state_dict())
    with torch.no_grad():
        theirs.qkv.weight.copy_(torch.cat([first.to_q.weight, first.to_k.weight, first.to_v.weight]))
        if scope:
            theirs.conv_lambda.weight.copy_(first.table.permute(2, 3, 0, 1)[..., None])
            theirs.conv_lambda.bias.zero_()
        else:
            theirs.pos_emb.copy_(first.table[..., 0])
    peers = {"timm": theirs, "plain einsum": PlainEinsum(first, side), "conv2d": LambdaConvolution(first, side)}
    return {**peers, **ours}


def compiled(module: nn.Module, device: str, training: bool) -> nn.Module:
    """The module under torch.compile with what helps it: on a CPU weights frozen in inference, on CUDA max-autotune.

    It compiles at its first call, for that shape, dtype and pass alone. When a recompilation's limit is reached,
    Dynamo would quietly go on without compiling: here it raises.
    """
    torch._dynamo.config.recompile_limit = 128  # several models of one class are compiled in one run
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    if device == "cuda":
        return cast(nn.Module, torch.compile(module, dynamic=False, mode="max-autotune"))
    options: dict[str, str | int | bool] = {} if training else {"freezing": True}
    return cast(nn.Module, torch.compile(module, dynamic=False, options=options))


def why_not_run(name: str, side: int, scope: int | None, dtype: torch.dtype, device: str, backward: bool) -> str | None:
    """Why a peer must not be run at all, or None."""
    faulty = torch.backends.cpu.get_cpu_capability() == "AVX512" and not torch.cpu._is_amx_tile_supported()
    if name != "timm" or device != "cpu" or not backward or dtype != torch.bfloat16 or not faulty:
        return None
    if scope is None or scope <= side:
        return None
    return (
        f"oneDNN's bfloat16 gradient of a Conv3d's kernel ({scope}, {scope}, 1), larger than the map of {side}², does "
        "not return, or writes past its memory, on processors with AVX-512 and without AMX (LOG.md, 2026-11-26)"
    )


def why_not_compiled(device: str) -> str | None:
    """Why torch.compile cannot work here, or None. On a CPU it writes C++."""
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    if device == "cuda" or any(map(shutil.which, names)):
        return None
    return (
        f"no C++ compiler ({' or '.join(names)}) is on the PATH, and torch.compile needs one for the CPU: install one "
        "(apt install g++), or name it in CXX; compiled contenders are left out"
    )


def reason(error: Exception) -> str:
    """One line of an error, for the list of what was left out."""
    lines = [text.strip() for text in str(error).splitlines() if text.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
