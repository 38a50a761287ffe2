"""The counterparts that the paper compares lambda layers with (Tables 3 and 4), each in the place of a 3x3 convolution.

Letters: b batch, n queries, m contexts, h heads, k and v depths of a head's keys and values, r side of a window, d
channels. Projections are 1x1 without bias, tables of relative positions start at N(0, 1/k). Positions are indexed by
m - n, offset 0 in the middle, as the lambda layer's are.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lambdanets.layers.projections import as_one_call, in_format_of, projected
from lambdanets.layers.relative_attention import map_sides, relative_attention, resized, table_for
from lambdanets.layers.spatial import SpatialLayer, average_pool, hidden

fx.wrap("as_one_call")


def _of_heads(dim: int, heads: int) -> int:
    if dim % heads:
        raise ValueError(f"dim = {dim} must be a multiple of heads = {heads}: each head gives dim / heads")
    return dim // heads


def _projection(dim: int, dim_out: int, queries: int = 0, key_depth: int = 1) -> nn.Conv2d:
    """A 1x1 convolution without bias; its first `queries` rows start smaller by √k, so that q·k starts near 1."""
    conv = nn.Conv2d(dim, dim_out, 1, bias=False)
    with torch.no_grad():
        nn.init.normal_(conv.weight, std=dim**-0.5)
        conv.weight[:queries] *= key_depth**-0.5
    return conv


class GlobalAttention(SpatialLayer):
    """Each pixel attends to the whole map, by content and by relative row and column.

        y[n,h] = Σ_m softmax_m( q[n,h]·k[m,h] / √k + q[n,h]·(R_rows[m_y - n_y] + R_columns[m_x - n_x]) ) v[m,h]

    Source: BoTNet (Srinivas 2021, arXiv 2101.11605, section 3 and figure 4), as timm's `BottleneckAttn`. The paper's
    Table 4 calls it global self-attention. The heads share the tables.

    dim         d, channels in and out
    heads       h; dim is a multiple of it
    key_depth   k of a head; d / h unless given
    size        (H, W) of the largest map, for tables of 2H-1 and 2W-1 offsets; smaller maps use their middle
    stride      2 runs the layer at the input's resolution, then average pooling

    >>> layer = GlobalAttention(64, size=14)
    >>> layer(torch.randn(2, 64, 14, 10)).shape
    torch.Size([2, 64, 14, 10])
    >>> sum(p.numel() for p in layer.parameters())  # three projections of 64 x 64, two tables of 27 x 16
    13152
    """

    sized: ClassVar[bool] = True

    def __init__(
        self, dim: int, *, heads: int = 4, key_depth: int | None = None, size: int | Sequence[int], stride: int = 1
    ) -> None:
        super().__init__(dim, stride, heads=heads, key_depth=key_depth)
        self.heads, self.value_depth = heads, _of_heads(dim, heads)
        self.key_depth = k = self.value_depth if key_depth is None else key_depth
        self.to_qkv = _projection(dim, 2 * heads * k + dim)
        self.table_rows, self.table_columns = (nn.Parameter(torch.empty(2 * s - 1, k)) for s in map_sides(size))
        for table in (self.table_rows, self.table_columns):
            nn.init.normal_(table, std=k**-0.5)

    def resize(self, size: int | Sequence[int]) -> None:
        """Give the tables another map size, in place, by `lambdanets.resize_table`."""
        rows, columns = map_sides(size)
        self.table_rows, self.table_columns = resized(self.table_rows, rows), resized(self.table_columns, columns)

    def forward(self, x: Tensor, *, padding: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """As every `SpatialLayer`; mask bool (n, m) or (b, n, m), True where a query sees a context: each sees one."""
        return as_one_call(self, x, padding, mask)

    def evaluate(self, x: Tensor, padding: Tensor | None, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            return super().evaluate(x, padding)
        self.check(x, padding)
        n = x.shape[2] * x.shape[3]
        if mask.dtype != torch.bool or tuple(mask.shape) not in ((n, n), (x.shape[0], n, n)):
            raise ValueError(
                f"mask must be bool (n, m) = {(n, n)} or (b, n, m), and is {mask.dtype} {tuple(mask.shape)}"
            )
        y = in_format_of(x, self.mixed(x, padding, mask))
        return y if self.stride == 1 else average_pool(y, self.stride, padding)

    def mixed(self, x: Tensor, padding: Tensor | None, mask: Tensor | None = None) -> Tensor:
        h, grid = self.heads, x.shape[2:]
        of_keys = h * self.key_depth
        q, k, v = (
            part.unflatten(1, (h, -1)).mT for part in projected(self.to_qkv, x).split([of_keys, of_keys, self.dim], 1)
        )
        tables = [table_for(grid[0], self.table_rows, self), table_for(grid[1], self.table_columns, self)]
        seen = None if padding is None else padding.flatten(1)[:, None, None]
        if mask is not None:
            mask = mask if mask.dim() == 2 else mask[:, None]
            seen = mask if seen is None else mask & seen
        return relative_attention(q, k, v, tables, grid, seen).mT.reshape(x.shape[0], self.dim, *grid)

    def mixing_macs(self, height: int, width: int) -> int:
        n = height * width
        return self.heads * n * (n * (self.key_depth + self.value_depth) + (height + width) * self.key_depth)

    def extra_repr(self) -> str:
        size = (self.table_rows.shape[0] // 2 + 1, self.table_columns.shape[0] // 2 + 1)
        return f"{self.dim}, heads={self.heads}, key_depth={self.key_depth}, size={size}, stride={self.stride}"


class AxialAttention(SpatialLayer):
    """Each pixel attends along its row, then what came of that along its column.

        z[y,x] = Σ_j softmax_j( q·k[y,j] / √k + q·R[j - x] ) v[y,j],   then the same along y on z

    Sources: Ho 2019 (arXiv 1912.12180, section 3), and Wang 2020 (arXiv 2003.07853, section 3.2) for a table of
    relative positions on the queries; its tables on keys and values are left out. The paper's Table 4 names it. Each
    direction has its own projections; the heads share its table.

    dim         d, channels in and out
    heads       h; dim is a multiple of it
    key_depth   k of a head; None: d / (2 h)
    size        (H, W) of the largest map, for tables of 2W-1 and 2H-1 offsets; smaller maps use their middle
    stride      2 runs the layer at the input's resolution, then average pooling

    >>> layer = AxialAttention(32, size=(7, 9))
    >>> layer(torch.randn(2, 32, 7, 9)).shape
    torch.Size([2, 32, 7, 9])
    >>> sum(p.numel() for p in layer.parameters())  # twice 32 x (64 + 64 + 32), tables of 17 x 16 and 13 x 16
    10720
    """

    sized: ClassVar[bool] = True

    def __init__(
        self, dim: int, *, heads: int = 4, key_depth: int | None = 16, size: int | Sequence[int], stride: int = 1
    ) -> None:
        super().__init__(dim, stride, heads=heads, key_depth=key_depth)
        self.heads, self.value_depth = heads, _of_heads(dim, heads)
        self.key_depth = k = max(1, dim // (2 * heads)) if key_depth is None else key_depth
        height, width = map_sides(size)
        self.to_qkv_in_row, self.to_qkv_in_column = (_projection(dim, 2 * heads * k + dim) for _ in range(2))
        self.table_columns, self.table_rows = (nn.Parameter(torch.empty(2 * s - 1, k)) for s in (width, height))
        for table in (self.table_rows, self.table_columns):
            nn.init.normal_(table, std=k**-0.5)

    def resize(self, size: int | Sequence[int]) -> None:
        """Give the tables another map size, in place, by `lambdanets.resize_table`."""
        rows, columns = map_sides(size)
        self.table_rows, self.table_columns = resized(self.table_rows, rows), resized(self.table_columns, columns)

    def mixed(self, x: Tensor, padding: Tensor | None) -> Tensor:
        z = self._along_rows(x, self.to_qkv_in_row, self.table_columns, padding)
        turned = None if padding is None else padding.mT
        return self._along_rows(z.mT, self.to_qkv_in_column, self.table_rows, turned).mT

    def _along_rows(self, x: Tensor, to_qkv: nn.Conv2d, table: Tensor, padding: Tensor | None) -> Tensor:
        b, d, height, width = x.shape
        of_keys = self.heads * self.key_depth
        qkv = projected(to_qkv, x).unflatten(2, (height, width)).permute(0, 2, 3, 1).flatten(0, 1)  # (b·H, W, channels)
        parts = qkv.split([of_keys, of_keys, d], -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)  # (b·H, h, W, k or v)
        seen = None
        if padding is not None:  # a row of padding alone sees itself: a softmax of nothing may be NaN
            seen = (padding | ~padding.any(-1, keepdim=True)).flatten(0, 1)[:, None, None]
        y = relative_attention(q, k, v, [table_for(width, table, self)], (width,), seen)
        return y.transpose(1, 2).reshape(b, height, width, d).permute(0, 3, 1, 2)

    def mixing_macs(self, height: int, width: int) -> int:
        return self.heads * height * width * (height + width) * (2 * self.key_depth + self.value_depth)

    def extra_repr(self) -> str:
        size = (self.table_rows.shape[0] // 2 + 1, self.table_columns.shape[0] // 2 + 1)
        return f"{self.dim}, heads={self.heads}, key_depth={self.key_depth}, size={size}, stride={self.stride}"


class LocalAttention(SpatialLayer):
    """Each pixel attends to a window around it, by content and by relative row and column.

        y[n,h] = Σ_m softmax_m( q[n,h]·k[m,h] + q[n,h]·(R_rows[h, m_y - n_y], R_columns[h, m_x - n_x]) ) v[m,h]

    over the m of a window around n. Source: Ramachandran 2019 (arXiv 1906.05909, section 3, equation 3): half of a
    head's position is a row, half a column; the logits are not divided by √k. What lies outside of the map is in no
    window. Each head has its own tables.

    dim      d, channels in and out
    heads    h; dim is a multiple of 2 h
    scope    r, side of the window, odd; wider than the map is allowed
    stride   2 runs the layer at the input's resolution, then average pooling

    >>> layer = LocalAttention(32, heads=4)
    >>> layer(torch.randn(2, 32, 5, 9)).shape
    torch.Size([2, 32, 5, 9])
    >>> sum(p.numel() for p in layer.parameters())  # three projections of 32 x 32, 7 rows and 7 columns of 16
    3296
    """

    def __init__(self, dim: int, *, heads: int = 8, scope: int = 7, stride: int = 1) -> None:
        super().__init__(dim, stride, heads=heads, scope=scope)
        self.heads, self.scope = heads, scope
        self.value_depth = self.key_depth = k = _of_heads(dim, heads)
        if k % 2:
            raise ValueError(f"dim / heads = {dim} / {heads} must be even: half of a head is a row, half a column")
        if scope % 2 == 0:
            raise ValueError(f"scope must be odd, so that the window has a middle, and is {scope}")
        self.to_qkv = _projection(dim, 3 * dim, queries=dim, key_depth=k)
        self.table_rows, self.table_columns = (nn.Parameter(torch.empty(heads, scope, k // 2)) for _ in range(2))
        for table in (self.table_rows, self.table_columns):
            nn.init.normal_(table, std=k**-0.5)

    def mixed(self, x: Tensor, padding: Tensor | None) -> Tensor:
        height, width = x.shape[2:]
        h, r, half = self.heads, self.scope, self.scope // 2
        maps = projected(self.to_qkv, x).unflatten(2, (height, width)).unflatten(1, (3, h, -1))
        q, k, v = maps.unbind(1)  # (b, h, k, H, W)
        of_rows, of_columns = q.chunk(2, 2)
        rows = torch.einsum("bhkyx,hrk->bhryx", of_rows, self.table_rows.to(q.dtype))
        columns = torch.einsum("bhkyx,hrk->bhryx", of_columns, self.table_columns.to(q.dtype))
        around = [half] * 4
        k, v = F.pad(k, around), F.pad(v, around)
        real = x.new_ones(1, height, width, dtype=torch.bool) if padding is None else padding
        real = F.pad(real, around)[:, None]  # (b or 1, 1, H + r - 1, W + r - 1)
        # One shift of keys and values after the other: unfolded, they would be r·r times as large.
        places = [
            (i, j, (..., slice(i, i + height), slice(j, j + width)))
            for i in range(max(0, half - height + 1), r - max(0, half - height + 1))
            for j in range(max(0, half - width + 1), r - max(0, half - width + 1))
        ]
        logits = []
        for i, j, at in places:
            one = (q * k[at]).sum(2) + rows[:, :, i] + columns[:, :, j]
            logits.append(one if i == j == half else one.masked_fill(~real[at], -torch.inf))  # each sees itself
        shares = torch.stack(logits, 2).softmax(2, dtype=torch.promote_types(q.dtype, torch.float32)).to(v.dtype)
        y = torch.zeros_like(q)
        for (_, _, at), share in zip(places, shares.unbind(2), strict=True):
            y = y + share[:, :, None] * v[at]
        return y.flatten(1, 2)

    def mixing_macs(self, height: int, width: int) -> int:
        r = self.scope
        return height * width * self.heads * (r * r * (self.key_depth + self.value_depth) + r * self.key_depth)

    def extra_repr(self) -> str:
        return f"{self.dim}, heads={self.heads}, scope={self.scope}, stride={self.stride}"


class EfficientAttention(SpatialLayer):
    """Linear attention: keys and values become one matrix for the whole map, which each query reads. No positions.

        q = softmax over channels (W_Q x), k = softmax over positions (W_K x), v = W_V x
        y[n] = W_O concat_h( q[n,h] Σ_m k[m,h] v[m,h]ᵀ )

    Source: Shen 2018 (arXiv 1812.01243, section 3). Its module adds its input; in place of a 3x3 convolution the
    block's shortcut does. `LambdaLayer(position=False, query_softmax=True)` is the form whose heads share keys and
    values.

    dim         d, channels in and out
    heads       h; dim is a multiple of it
    key_depth   k of a head; None: d / (2 h)
    stride      2 runs the layer at the input's resolution, then average pooling

    >>> layer = EfficientAttention(32)
    >>> layer(torch.randn(2, 32, 5, 9)).shape
    torch.Size([2, 32, 5, 9])
    >>> sum(p.numel() for p in layer.parameters())  # 32 x (64 + 64 + 32) and 32 x 32
    6144
    """

    def __init__(self, dim: int, *, heads: int = 4, key_depth: int | None = 16, stride: int = 1) -> None:
        super().__init__(dim, stride, heads=heads, key_depth=key_depth)
        self.heads, self.value_depth = heads, _of_heads(dim, heads)
        self.key_depth = k = max(1, dim // (2 * heads)) if key_depth is None else key_depth
        self.to_qkv, self.to_out = _projection(dim, 2 * heads * k + dim), _projection(dim, dim)

    def mixed(self, x: Tensor, padding: Tensor | None) -> Tensor:
        of_keys = self.heads * self.key_depth
        parts = projected(self.to_qkv, x).split([of_keys, of_keys, self.dim], 1)
        q, k, v = (part.unflatten(1, (self.heads, -1)) for part in parts)  # (b, h, k or v, n)
        wide = torch.promote_types(q.dtype, torch.float32)
        if padding is not None:
            k = k.masked_fill(~padding.flatten(1)[:, None, None], -torch.inf)
        q, k = q.softmax(2, dtype=wide).to(v.dtype), k.softmax(3, dtype=wide).to(v.dtype)
        y = (v @ k.mT @ q).flatten(1, 2).unflatten(2, x.shape[2:])
        return projected(self.to_out, y).unflatten(2, x.shape[2:])

    def mixing_macs(self, height: int, width: int) -> int:
        return 2 * height * width * self.heads * self.key_depth * self.value_depth

    def extra_repr(self) -> str:
        return f"{self.dim}, heads={self.heads}, key_depth={self.key_depth}, stride={self.stride}"


class AugmentedConvolution(SpatialLayer):
    """A 3x3 convolution gives most channels, attention over the whole map the others.

        o[n,h] = Σ_m softmax_m( q[n,h]·(k[m,h] + R_rows[m_y - n_y] + R_columns[m_x - n_x]) / √k ) v[m,h]
        y = concat( W * x, W_O concat_h o )

    Source: Bello 2019 (arXiv 1904.09925, equations 2 to 5), of which the paper's Table 3 says "conv + relative
    self-attention". 8 heads, queries and keys of 0.2 d channels, but at least 20 a head, values of 0.1 d; in the
    comparison in c3, c4 and c5 (by counting). The heads share the tables.

    dim         d, channels in and out
    heads       N_h
    key_depth   of a head; None: 0.2 d / N_h, and at least 20
    value_depth   of a head; None: 0.1 d / N_h, and at least 1
    size        (H, W) of the largest map that comes in
    stride      2: the convolution has the stride, and attention sees the map after an average pooling
    pooled      True: all runs at the input's resolution, then average pooling, as the lambda layer's stride is

    >>> layer = AugmentedConvolution(128, size=14, stride=2)
    >>> layer(torch.randn(2, 128, 14, 11)).shape
    torch.Size([2, 128, 7, 6])
    >>> layer.conv.out_channels, layer.key_depth, layer.value_depth
    (120, 20, 1)
    """

    sized: ClassVar[bool] = True

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        key_depth: int | None = None,
        value_depth: int | None = None,
        size: int | Sequence[int],
        stride: int = 1,
        pooled: bool = False,
    ) -> None:
        super().__init__(dim, stride, pooled=pooled, heads=heads, key_depth=key_depth, value_depth=value_depth)
        self.heads = heads
        self.key_depth = k = max(20, dim // 5 // heads) if key_depth is None else key_depth
        self.value_depth = max(1, dim // 10 // heads) if value_depth is None else value_depth
        values = heads * self.value_depth
        if values >= dim:
            raise ValueError(
                f"dim = {dim} leaves no channel to the convolution: {heads} heads give {self.value_depth} each; take "
                "fewer heads or a smaller value_depth"
            )
        # At stride 2 attention reads the pooled map, whose sides are rounded up.
        sides = [side if pooled else -(-side // stride) for side in map_sides(size)]
        self.conv = nn.Conv2d(dim, dim - values, 3, 1 if pooled else stride, 1, bias=False)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        self.to_qkv, self.to_out = _projection(dim, 2 * heads * k + values), _projection(values, values)
        self.table_rows, self.table_columns = (nn.Parameter(torch.empty(2 * s - 1, k)) for s in sides)
        for table in (self.table_rows, self.table_columns):
            nn.init.normal_(table, std=k**-0.5)

    def resize(self, size: int | Sequence[int]) -> None:
        """Give the tables another size of the map that comes in, in place, by `lambdanets.resize_table`."""
        rows, columns = (side if self.pooled else -(-side // self.stride) for side in map_sides(size))
        self.table_rows, self.table_columns = resized(self.table_rows, rows), resized(self.table_columns, columns)

    def mixed(self, x: Tensor, padding: Tensor | None) -> Tensor:
        convolved = self.conv(hidden(x, padding))
        if self.stride > 1 and not self.pooled:
            x = average_pool(x, self.stride, padding)
            padding = None if padding is None else padding[:, :: self.stride, :: self.stride]
        h, grid = self.heads, x.shape[2:]
        of_keys = h * self.key_depth
        parts = projected(self.to_qkv, x).split([of_keys, of_keys, h * self.value_depth], 1)
        q, k, v = (part.unflatten(1, (h, -1)).mT for part in parts)
        tables = [table_for(grid[0], self.table_rows, self), table_for(grid[1], self.table_columns, self)]
        seen = None if padding is None else padding.flatten(1)[:, None, None]
        y = relative_attention(q, k, v, tables, grid, seen, scale_positions=True)  # (b, h, n, v)
        attended = projected(self.to_out, y.mT.reshape(x.shape[0], -1, *grid)).unflatten(2, grid)
        return torch.cat([convolved, attended], 1)

    def mixing_macs(self, height: int, width: int) -> int:
        if not self.pooled:
            height, width = -(-height // self.stride), -(-width // self.stride)
        n = height * width
        return self.heads * n * (n * (self.key_depth + self.value_depth) + (height + width) * self.key_depth)

    def extra_repr(self) -> str:
        parts = (f"heads={self.heads}", f"key_depth={self.key_depth}", f"value_depth={self.value_depth}")
        return f"{self.dim}, {', '.join(parts)}, stride={self.stride}, pooled={self.pooled}"


class DoubleAttention(SpatialLayer):
    """Features of the whole map are gathered into c vectors, and each pixel takes its mixture of them: an addition.

        A = W_A x, B = softmax over positions (W_B x), V = softmax over channels (W_V x)
        y = x + BN( W_Z (A Bᵀ) V )

    Source: A2-Nets (Chen 2018, arXiv 1810.11579, sections 3.1 to 3.3), of which the paper's Table 3 says
    "linear attention". It stands after a block's last batch norm, where squeeze-and-excitation would. Its projections
    have biases, c = d / 4 each; the batch norm's weight starts at 0, so that the layer starts as its input.

    dim         d, channels in and out
    reduction   d / c

    >>> layer = DoubleAttention(32)
    >>> x = torch.randn(2, 32, 5, 9)
    >>> bool((layer(x) == x).all())
    True
    >>> sum(p.numel() for p in layer.parameters())  # 3 x (32 x 8 + 8), 8 x 32 + 32, batch norm 64
    1144
    """

    def __init__(self, dim: int, *, reduction: int = 4) -> None:
        super().__init__(dim, 1, reduction=reduction)
        if dim % reduction:
            raise ValueError(f"dim = {dim} must be a multiple of reduction = {reduction}")
        self.width = dim // reduction
        self.to_abv, self.to_out = nn.Conv2d(dim, 3 * self.width, 1), nn.Conv2d(self.width, dim, 1)
        self.norm = nn.BatchNorm2d(dim)
        for conv in (self.to_abv, self.to_out):
            nn.init.normal_(conv.weight, std=conv.in_channels**-0.5)
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)
        nn.init.zeros_(self.norm.weight)

    def mixed(self, x: Tensor, padding: Tensor | None) -> Tensor:
        a, b, v = projected(self.to_abv, x).chunk(3, 1)  # (b, c, n)
        wide = torch.promote_types(a.dtype, torch.float32)
        if padding is not None:
            b = b.masked_fill(~padding.flatten(1)[:, None], -torch.inf)
        gathered = a @ b.softmax(2, dtype=wide).to(a.dtype).mT  # (b, c, c)
        y = (gathered @ v.softmax(1, dtype=wide).to(a.dtype)).unflatten(2, x.shape[2:])
        added: Tensor = self.norm(projected(self.to_out, y).unflatten(2, x.shape[2:]))
        return x + added

    def mixing_macs(self, height: int, width: int) -> int:
        return 2 * height * width * self.width**2

    def extra_repr(self) -> str:
        return f"{self.dim}, reduction={self.dim // self.width}"
