"""The lambda layer on maps, sequences and volumes: projections, norms, table, then `lambda_op`."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from lambdanets.layers.loading import StrictLoading, resize_table
from lambdanets.layers.projections import as_one_call, in_format_of, normed, project
from lambdanets.layers.spatial import average_pool
from lambdanets.ops import lambda_op
from lambdanets.ops.lambda_op import KEY_NORMS
from lambdanets.ops.problem import Problem, sizes
from lambdanets.ops.strategies import STRATEGIES
from lambdanets.untouched import BATCH_NORM, CONV, why_called

fx.wrap("as_one_call")


class LambdaLayer(StrictLoading):
    """Replaces a convolution or an attention: each pixel's context becomes a linear function, applied to its query.

        q = BN(W_Q x), K̄ = softmax over positions (W_K c), V = BN(W_V c)
        y[b,n,h,:] = (Σ_m K̄[b,m] V[b,m]ᵀ + Σ_m R[t(m)-t(n)] V[b,m]ᵀ)ᵀ q[b,n,h]          (paper, section 3)

    dim, dim_out    channels in and out (dim_out defaults to dim); a multiple of heads, v = dim_out / heads
    heads           h, queries a position; they share keys, values and lambdas
    key_depth       k
    intra_depth     u: keys and values carry u slices that are summed (paper, section 4)
    scope           r, side of the window of relative positions, odd; wider than the map is allowed
    size            map size for a global table of (2H-1)(2W-1) offsets, with scope=None; smaller maps use its middle
    stride          2 runs the layer at the input's resolution, then average pooling
    content, position   leave a part out: the content or the position lambda (one of them must stay)
    key_norm        "softmax" over positions, "l2" over positions (which axis the paper means is unconfirmed), "none"
    query_softmax   softmax of each query over k as well (ablation of the paper)
    qv_norm         batch norm on queries and values
    pool_size, pool_count_padding   3 and False: 3x3, padding not counted. timm's weights need 2, d-li14's True
    position_bias   adds a constant to the position lambda, one number a key; public weights have it, the paper not
    causal          position n sees m <= n; sequences only
    context_dim     channels of a separate context, when `forward` gets one
    table           another layer's `table`, shared (paper, Table 4)
    strategy        "auto", "tuned" or a name of `lambdanets.ops.STRATEGIES`, as in `lambda_op`

    The parameter `table` is (r_1, ..., r_d, k, u) ~ N(0, 1); W_K, W_V have std dim^-1/2, W_Q (k·dim)^-1/2.

    >>> layer = LambdaLayer(64, scope=23)
    >>> layer(torch.randn(2, 64, 14, 10)).shape
    torch.Size([2, 64, 14, 10])
    >>> sum(p.numel() for p in layer.parameters())  # projections 6,144, table 8,464, two batch norms 160
    14768
    """

    ndim: ClassVar[int] = 2
    SETTINGS: ClassVar[tuple[str, ...]] = (
        "dim", "dim_out", "context_dim", "heads", "key_depth", "intra_depth", "value_depth", "stride", "pool_size",
        "pool_count_padding", "content", "key_norm", "query_softmax", "causal", "strategy", "scope", "size",
    )  # fmt: skip
    """What a layer is besides its weights: attributes of these names."""

    def __init__(
        self,
        dim: int,
        dim_out: int | None = None,
        *,
        heads: int = 4,
        key_depth: int = 16,
        intra_depth: int = 1,
        scope: int | Sequence[int] | None = 23,
        size: int | Sequence[int] | None = None,
        stride: int = 1,
        content: bool = True,
        position: bool = True,
        key_norm: str = "softmax",
        query_softmax: bool = False,
        qv_norm: bool = True,
        pool_size: int = 3,
        pool_count_padding: bool = False,
        position_bias: bool = False,
        causal: bool = False,
        context_dim: int | None = None,
        table: nn.Parameter | None = None,
        strategy: str = "auto",
    ) -> None:
        super().__init__()
        dim_out = dim if dim_out is None else dim_out
        context_dim = dim if context_dim is None else context_dim
        counts = {
            "dim": dim, "dim_out": dim_out, "heads": heads, "key_depth": key_depth, "intra_depth": intra_depth,
            "stride": stride, "pool_size": pool_size, "context_dim": context_dim,
        }  # fmt: skip
        for name, count in counts.items():
            if not isinstance(count, int) or count < 1:
                raise ValueError(f"{name} must be a positive integer and is {count!r}")
        if dim_out % heads:
            raise ValueError(
                f"dim_out = {dim_out} must be a multiple of heads = {heads}: each head gives dim_out / heads"
            )
        if not content and not position:
            raise ValueError("content and position are both False: nothing would be left")
        if key_norm not in KEY_NORMS:
            raise ValueError(f"key_norm must be one of {', '.join(KEY_NORMS)} and is {key_norm!r}")
        if strategy not in ("auto", "tuned", *STRATEGIES):
            raise ValueError(f"strategy must be auto, tuned or one of {', '.join(STRATEGIES)} and is {strategy!r}")
        if causal and self.ndim != 1:
            raise ValueError("causal order needs a sequence: use LambdaLayer1d")
        if causal and stride > 1:
            raise ValueError("causal order and stride > 1: pooling would look ahead; pool outside the layer")
        self.dim, self.dim_out, self.context_dim = dim, dim_out, context_dim
        self.heads, self.key_depth, self.intra_depth = heads, key_depth, intra_depth
        self.value_depth = dim_out // heads
        self.stride, self.pool_size, self.pool_count_padding = stride, pool_size, pool_count_padding
        self.content, self.key_norm, self.query_softmax = content, key_norm, query_softmax
        self.causal, self.strategy = causal, strategy
        self.scope, self.size = self._sides(scope, size) if position else (None, None)

        conv, norm = CONV[self.ndim - 1], BATCH_NORM[self.ndim - 1]
        self.to_q = conv(dim, heads * key_depth, 1, bias=False)
        self.to_k = conv(context_dim, key_depth * intra_depth, 1, bias=False) if content else None
        self.to_v = conv(context_dim, self.value_depth * intra_depth, 1, bias=False)
        self.norm_q = norm(heads * key_depth) if qv_norm else nn.Identity()
        self.norm_v = norm(self.value_depth * intra_depth) if qv_norm else nn.Identity()
        self.table: nn.Parameter | None = None
        if position:
            sides = self.scope if self.scope is not None else [2 * s - 1 for s in self.size or ()]
            shape = (*sides, key_depth, intra_depth)
            if table is not None and table.shape != shape:
                raise ValueError(f"the shared table is {tuple(table.shape)} and this layer's would be {shape}")
            self.table = nn.Parameter(torch.empty(shape)) if table is None else table
        elif table is not None:
            raise ValueError("a shared table was given with position=False")
        self.position_bias = nn.Parameter(torch.zeros(key_depth)) if position and position_bias else None
        if position_bias and not position:
            raise ValueError("position_bias=True was given with position=False")
        self.reset_parameters(table=table is None)

    def _sides(
        self, scope: int | Sequence[int] | None, size: int | Sequence[int] | None
    ) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        if (scope is None) == (size is None):
            raise ValueError(
                f"give scope=r for a window, or scope=None, size=(H, W) for a global table; got scope={scope}, "
                f"size={size}"
            )
        name, given = ("size", size) if scope is None else ("scope", scope)
        sides = (given,) * self.ndim if isinstance(given, int) else tuple(given or ())
        if len(sides) != self.ndim or any(not isinstance(s, int) or s < 1 for s in sides):
            raise ValueError(f"{name} must be a positive integer or {self.ndim} of them and is {given!r}")
        if scope is None:
            return None, sides
        if any(s % 2 == 0 for s in sides):
            raise ValueError(f"scope must be odd, so that the window has a middle, and is {scope}")
        return sides, None

    def reset_parameters(self, *, table: bool = True) -> None:
        """Initialise as the paper does (docs/paper.md section 1); `table=False` leaves a shared table alone."""
        nn.init.normal_(self.to_q.weight, std=(self.key_depth * self.dim) ** -0.5)
        if self.to_k is not None:
            nn.init.normal_(self.to_k.weight, std=self.context_dim**-0.5)
        nn.init.normal_(self.to_v.weight, std=self.context_dim**-0.5)
        if self.table is not None and table:
            nn.init.normal_(self.table)
        if self.position_bias is not None:
            nn.init.zeros_(self.position_bias)

    def resize(self, size: int | Sequence[int]) -> None:
        """Give a global table another map size, in place, by `resize_table`."""
        if self.table is None or self.size is None:
            raise ValueError("only a layer with a global table (scope=None, size=...) has a size to change")
        sizes = (size,) * self.ndim if isinstance(size, int) else tuple(size)
        self.table = nn.Parameter(resize_table(self.table.detach(), sizes))
        self.size = sizes

    def problem(self, x: Tensor, context: Tensor | None = None) -> Problem:
        """The sizes of the operation inside, for `lambdanets.plan`."""
        grid = tuple(x.shape[2:])
        context_grid = grid if context is None else tuple(context.shape[2:])
        n, m = math.prod(grid), math.prod(context_grid)
        return Problem(
            x.shape[0], n, m, self.heads, self.key_depth, self.value_depth, self.intra_depth, grid, context_grid,
            None if self.table is None else tuple(self.table.shape[: self.ndim]), causal=self.causal,
            content=self.content, dtype=x.dtype, device=x.device.type,
        )  # fmt: skip

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None, padding: Tensor | None = None
    ) -> Tensor:
        """Apply the layer.

        x        (b, dim, *map)
        context  (b, context_dim, *map'), the positions that lambdas are made from; x unless given
        mask     bool (n, m) or (b, n, m), True where a query sees a context
        padding  bool (b, *map'), True on real pixels, False on padding; in evaluation a padded batch then gives every
                 image what it gives alone (in training the batch norms still see the padding)
        returns  (b, dim_out, *map), or the map divided by stride, rounded up for the paper's 3x3 pooling
        """
        return as_one_call(self, x, context, mask, padding)

    def evaluate(self, x: Tensor, context: Tensor | None, mask: Tensor | None, padding: Tensor | None) -> Tensor:
        """`forward` itself."""
        self._check(x, context, padding)
        context = x if context is None else context
        b, grid = x.shape[0], sizes(x)[2:]
        context_grid = sizes(context)[2:]
        n, m = math.prod(grid), math.prod(context_grid)
        h, k, u, v = self.heads, self.key_depth, self.intra_depth, self.value_depth
        q, keys, values = self._project(x, context)
        q = q.reshape(b, n, h, k)
        if self.query_softmax:
            q = q.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
        keys = None if keys is None else keys.reshape(b, m, k, u)
        values = values.reshape(b, m, v, u)
        if padding is not None:
            hidden = padding.reshape(b, 1, m)
            mask = hidden if mask is None else mask & hidden
        y = lambda_op(
            q, keys, values, grid=grid, context_grid=context_grid, mask=mask, causal=self.causal,
            key_norm=self.key_norm, strategy=self.strategy, **self._positions(x, context),
        )  # fmt: skip
        if self.position_bias is not None:
            y = y + (q * self.position_bias.to(q.dtype)).sum(-1, keepdim=True)
        y = y.permute(0, 2, 3, 1).reshape(b, self.dim_out, *grid)
        y = in_format_of(x, y)
        if self.stride == 1:
            return y
        real = padding if context_grid == grid else None
        return average_pool(y, self.stride, real, size=self.pool_size, count_padding=self.pool_count_padding)

    def _project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Queries, keys and values, each (b, positions, channels), normalised.

        One product instead of three where nobody has replaced or hooked a part.
        """
        convs, norms = (self.to_q, self.to_k, self.to_v), (self.norm_q, None, self.norm_v)
        if context is not x or any(why_called(part) for part in (*convs, *norms)):
            keys = None if self.to_k is None else self.to_k(context).flatten(2).transpose(-2, -1)
            values = normed(self.norm_v, self.to_v(context)).flatten(2).transpose(-2, -1)
            return normed(self.norm_q, self.to_q(x)).flatten(2).transpose(-2, -1), keys, values
        q, *keys, values = project(x, *self.projections())
        return q, keys[0] if keys else None, values

    def projections(self) -> tuple[list[Tensor], list[Tensor | None], list[nn.Module | None]]:
        """Weights (channels out, context_dim or dim), biases and norms of q, of k where there are keys, and of v."""
        parts = ((self.to_q, self.norm_q), (self.to_k, None), (self.to_v, self.norm_v))
        used = [(conv, norm) for conv, norm in parts if conv is not None]
        return [c.weight.flatten(1) for c, _ in used], [c.bias for c, _ in used], [norm for _, norm in used]

    def _positions(self, x: Tensor, context: Tensor) -> dict[str, Any]:
        """The position argument of `lambda_op`."""
        return {"table": self.table}

    def _check(self, x: Tensor, context: Tensor | None, padding: Tensor | None) -> None:
        for name, t, channels in (("x", x, self.dim), ("context", context, self.context_dim)):
            if t is not None and (t.dim() != self.ndim + 2 or t.shape[1] != channels):
                axes = ", ".join(("length",) if self.ndim == 1 else ("T", "H", "W")[-self.ndim :])
                raise ValueError(f"{name} must be (b, {channels}, {axes}) and is {tuple(t.shape)}")
        if context is None and self.context_dim != self.dim:
            raise ValueError(
                f"this layer has context_dim={self.context_dim}, dim={self.dim}: forward needs context=..."
            )
        if context is not None and context.shape[0] != x.shape[0]:
            raise ValueError(f"x has batch {x.shape[0]} and context batch {context.shape[0]}")
        source = x if context is None else context
        if padding is not None and (padding.dtype != torch.bool or padding.shape != (x.shape[0], *source.shape[2:])):
            raise ValueError(
                f"padding must be bool (b, *map) = {(x.shape[0], *source.shape[2:])}, True on real pixels, and is "
                f"{padding.dtype} {tuple(padding.shape)}"
            )
        for t in (x, source):
            if self.size is not None and any(s > own for s, own in zip(t.shape[2:], self.size, strict=True)):
                raise ValueError(
                    f"the map is {tuple(t.shape[2:])} and the global table was made for at most {self.size}: call "
                    f"layer.resize({tuple(t.shape[2:])}), which interpolates it (lambdanets.resize_table), or use "
                    "scope=r"
                )

    def extra_repr(self) -> str:
        where = "content only" if self.table is None else f"scope={self.scope}" if self.scope else f"size={self.size}"
        parts = [
            f"{self.dim}, {self.dim_out}",
            where,
            f"heads={self.heads}, key_depth={self.key_depth}, intra_depth={self.intra_depth}",
        ]
        parts += [f"stride={self.stride}"] * (self.stride > 1)
        parts += ["position only"] * (not self.content) + ["causal"] * self.causal
        parts += [f"key_norm={self.key_norm}"] * (self.key_norm != "softmax")
        parts += [f"strategy={self.strategy}"] * (self.strategy != "auto")
        return ", ".join(parts)


class LambdaLayer1d(LambdaLayer):
    """`LambdaLayer` on sequences (b, dim, length), with `causal=True` for autoregressive order; scope and size are 1-D.

    >>> layer = LambdaLayer1d(32, scope=9, causal=True).eval()
    >>> x = torch.randn(1, 32, 20)
    >>> changed = x.clone()
    >>> changed[..., 12:] = 0
    >>> bool(torch.allclose(layer(x)[..., :12], layer(changed)[..., :12], atol=1e-5))
    True
    """

    ndim: ClassVar[int] = 1


class LambdaLayer3d(LambdaLayer):
    """`LambdaLayer` on volumes or video (b, dim, T, H, W); scope and size have three sides.

    >>> LambdaLayer3d(16, scope=(3, 7, 7))(torch.randn(1, 16, 4, 6, 5)).shape
    torch.Size([1, 16, 4, 6, 5])
    """

    ndim: ClassVar[int] = 3
