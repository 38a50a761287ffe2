"""Softmax attention with relative positions along each axis, without a tensor of biases, and the tables it reads."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lambdanets.layers.loading import resize_table


def relative_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Sequence[Tensor],
    grid: Sequence[int],
    mask: Tensor | None = None,
    *,
    scale_positions: bool = False,
) -> Tensor:
    """Softmax attention whose logits have a term for the offset along each axis:

        y[n] = Σ_m softmax_m( q[n]·k[m] / √k + Σ_axes q[n]·R_axis[m_axis - n_axis] ) v[m]

    q, k      (b, h, n, k); v (b, h, m, v), m = n = the product of grid
    tables    for each axis (offsets, k), an odd number of them, at least 2·side - 1, the middle of which is read
    mask      bool, to be broadcast to (b, h, n, m), True where a query sees a context; each must see one
    scale_positions   the terms of positions are divided by √k as well
    returns   (b, h, n, v)

    Along each axis the term depends on m through one coordinate. So q gets a column for each value of it, that term,
    and k the indicator of its own: their product is the sum above, and no tensor of n·m biases is made.
    """
    scale = q.shape[-1] ** -0.5
    content, at = q * scale, (q * scale if scale_positions else q).unflatten(2, tuple(grid))
    queries, keys = [content], [k]
    for axis, (side, table) in enumerate(zip(grid, tables, strict=True)):
        middle, place = table.shape[0] // 2, torch.arange(side, device=q.device)
        offsets = table[place - place[:, None] + middle]  # (side of n, side of m, k)
        last = at.movedim(2 + axis, -2)  # (b, h, other axes, side, k)
        term = torch.einsum("...xk,xjk->...xj", last, offsets.to(q.dtype)).movedim(-2, 2 + axis)
        shape = [side if a == axis else 1 for a in range(len(grid))]
        own = torch.eye(side, dtype=q.dtype, device=q.device).view(*shape, side).expand(*grid, side).flatten(0, -2)
        queries.append(term.flatten(2, -2).to(q.dtype))  # (b, h, n, side)
        keys.append(own.expand(*q.shape[:2], -1, -1))
    wide, deep = torch.cat(queries, -1), torch.cat(keys, -1)
    # PyTorch's kernels that keep no (n, m) on a CPU want values as deep as keys.
    short = max(0, wide.shape[-1] - v.shape[-1])
    y = F.scaled_dot_product_attention(wide, deep, F.pad(v, (0, short)), mask, scale=1.0)
    return y[..., : v.shape[-1]]


def table_for(side: int, table: Tensor, layer: nn.Module) -> Tensor:
    """The table of a layer, for a map of this side. Raises ValueError where it was made for smaller ones."""
    if 2 * side - 1 > table.shape[0]:
        raise ValueError(
            f"a side of the map is {side} and the table of relative positions was made for at most "
            f"{table.shape[0] // 2 + 1}: call layer.resize(...), which interpolates it (lambdanets.resize_table), or "
            f"give a larger size where this {type(layer).__name__} is made (of a model: image_px=...)"
        )
    return table


def resized(table: nn.Parameter, side: int) -> nn.Parameter:
    """A table (offsets, k) interpolated to the 2·side - 1 offsets of another side."""
    return nn.Parameter(resize_table(table.detach()[..., None], (side,))[..., 0])


def map_sides(size: int | Sequence[int]) -> tuple[int, int]:
    """(H, W) of a size given as one or as two numbers."""
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or any(not isinstance(s, int) or s < 1 for s in sides):
        raise ValueError(f"size must be a positive integer or (H, W) and is {size!r}")
    return sides[0], sides[1]
