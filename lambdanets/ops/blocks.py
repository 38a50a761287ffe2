"""Blocks of E: which queries and contexts one has, how it is cut from a table, and how its gradient goes back.

A relative table is never indexed: padded or cropped to the offsets that the grid has and flipped, its windows *are*
the rows of E for a context in reversed order (a Hankel matrix), so one strided copy makes a block of E and one
strided sum brings its gradient back. Blocks that are rows of the grid, or the same part of every row, share one copy:
along the first axis the next row's block is the same memory, read one step further.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lambdanets.ops.content import normalise

Box = tuple[tuple[int, int], ...]  # (start, stop) an axis


class Spec(NamedTuple):
    """Everything about a contraction that is not a tensor."""

    source: str  # where the weights come from: "table", "embeddings" or "keys"
    order: str  # "lambdas" or "scores"
    block: int  # queries at a time
    grid: Sequence[int]  # (n,) where positions are not a grid
    context_grid: Sequence[int]  # of a table
    reach: Sequence[int]  # of a table: offsets on either side of the middle
    key_norm: str

    def blocks(self) -> list[tuple[Box, Box]]:
        """Boxes of the query grid and, in a table, the contexts that each reaches, counted in reversed order."""
        return [(box, _seen(box, self.context_grid, self.reach)) for box in _blocks(tuple(self.grid), self.block)]


def _blocks(grid: tuple[int, ...], queries: int) -> list[Box]:
    """Cut a grid into boxes of at most `queries` points, each contiguous in row-major order.

    Parts of rows come part by part, not row by row: what `Blocks` keeps is for one part.
    """
    if math.prod(grid) <= queries:
        return [tuple((0, s) for s in grid)]
    head, tail = grid[0], grid[1:]
    row = math.prod(tail)
    if row > queries:
        return [((i, i + 1), *box) for box in _blocks(tail, queries) for i in range(head)]
    step = max(1, queries // row)
    whole = tuple((0, s) for s in tail)
    return [((i, min(head, i + step)), *whole) for i in range(0, head, step)]


def _seen(box: Box, context_grid: Sequence[int], reach: Sequence[int]) -> Box:
    """The contexts, counted in reversed order, that a box of queries reaches with so many offsets on either side."""
    if not context_grid:
        return ()

    def along(start: int, stop: int, size: int, half: int) -> tuple[int, int]:
        if start - half >= size:
            return 0, 0
        # No min and max: under torch.compile they would make symbols of what is plainly 0.
        return 0 if stop + half >= size else size - stop - half, size if start <= half else size - start + half

    return tuple(along(*ends, size, half) for ends, size, half in zip(box, context_grid, reach, strict=True))


def positions_of(box: Box, grid: Sequence[int]) -> tuple[int, int]:
    """(start, stop) of a block among the queries."""
    start = 0
    for (first, _), side in zip(box, grid, strict=True):
        start = start * side + first
    return start, start + _points(box)


def _points(box: Box) -> int:
    return math.prod([stop - start for start, stop in box])


def seen_part(x: Tensor, spec: Spec, seen: Box, axis: int) -> Tensor:
    """The part of an axis M = (u, reversed context) that a box of queries reaches."""
    if spec.source != "table" or all(part == (0, size) for part, size in zip(seen, spec.context_grid, strict=True)):
        return x
    x = x.unflatten(axis, (-1, *spec.context_grid))
    for at, (start, stop) in enumerate(seen, start=axis + 1):
        x = x.narrow(at, start, stop - start)
    return x.flatten(axis, axis + len(seen))


def _windows(weights: Tensor, box: Box, seen: Box, axes: range) -> Tensor:
    """(k, u, offsets...) -> (k, u, offsets or block..., context...): the windows along those of the grid's axes."""
    for axis in axes:
        (start, stop), (first, last) = box[axis], seen[axis]
        size = last - first
        weights = weights.narrow(axis + 2, start + first, stop - start - 1 + size).unfold(axis + 2, size, 1)
    return weights


class Blocks:
    """The blocks of E. `weights`, padded and flipped, is what they are cut from."""

    def __init__(self, spec: Spec, weights: Tensor, mask: Tensor | None) -> None:
        self.spec, self.weights, self.mask = spec, weights, mask
        self.part: tuple[Box, Box] | None = None
        self.boxes = spec.blocks()
        several_rows = spec.source == "table" and len(spec.grid) > 1 and len(self.boxes) > 1
        self.shared = several_rows and all(box[0][1] - box[0][0] == 1 for box, _ in self.boxes)
        if self.shared:  # offsets along the first axis that any block reaches
            of_row = [(box[0][0], seen[0]) for box, seen in self.boxes]
            self.first = min(row + start for row, (start, _) in of_row)
            self.reach = max(row + stop for row, (_, stop) in of_row) - self.first

    def block(self, box: Box, seen: Box) -> Tensor:
        """One block of E, (block, k, M), or of normalised keys, (b, block, k, M)."""
        if not self.shared:
            return _weights(self.spec, self.weights, box, seen, self.mask)
        d, (row, _), (first, last) = len(box), box[0], seen[0]
        if self.part != (box[1:], seen[1:]):
            self.part = box[1:], seen[1:]
            used = self.weights.narrow(2, self.first, self.reach)
            windows = _windows(used, box, seen, range(1, d))  # (k, u, offsets, block..., context...)
            self.rows = windows.permute(*range(3, d + 2), 0, 1, 2, *range(d + 2, 2 * d + 1)).contiguous()
        k, u = self.weights.shape[:2]
        here = self.rows.narrow(d + 1, row + first - self.first, last - first)  # (block..., k, u, context...)
        return here.reshape(_points(box), k, u * _points(seen))  # a view, if u = 1


def _weights(spec: Spec, weights: Tensor, box: Box, seen: Box, mask: Tensor | None) -> Tensor:
    """A block that shares nothing, in memory of its own."""
    if spec.source == "table":
        d = len(box)
        weights = _windows(weights, box, seen, range(d))
        k, u = weights.shape[:2]
        # (k, u, block..., context...) -> (block, k, u·m)
        weights = weights.permute(*range(2, d + 2), 0, 1, *range(d + 2, 2 * d + 2))
        return weights.reshape(_points(box), k, u * _points(seen))
    ((start, stop),) = box
    if spec.source == "embeddings":
        return weights[start:stop].permute(0, 2, 1, 3).flatten(2)
    assert mask is not None
    visible = mask[:, start:stop, :, None, None]
    bar = normalise(weights[:, None], visible, spec.key_norm, 2)  # (b, block, m, k, u)
    return bar.to(weights.dtype).permute(0, 1, 3, 2, 4).flatten(3)


def weights_grad(
    spec: Spec, weights: Tensor, box: Box, seen: Box, mask: Tensor | None, bar: Tensor, grad: Tensor
) -> Tensor:
    """The adjoint of `_weights`: one block's gradient, in the shape of what the block was cut from."""
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    if spec.source == "table":
        d = len(box)
        grad = grad.view(*[b - a for a, b in box], *weights.shape[:2], *[b - a for a, b in seen])
        for _ in range(d):  # (block axes left, k, u, offsets done, context axes left)
            grad = _sum_diagonals(grad, d + 2, wide)
        return grad.to(wide)
    grad = grad.to(wide)
    if spec.source == "embeddings":
        _, m, k, u = weights.shape
        return grad.view(grad.shape[0], k, m, u).permute(0, 2, 1, 3)
    assert mask is not None
    ((start, stop),) = box
    b, m, k, u = weights.shape
    bar = bar.view(b, stop - start, k, m, u).to(grad.dtype)
    grad = grad.view(b, stop - start, k, m, u)
    if spec.key_norm == "softmax":
        grad = bar * (grad - (grad * bar).sum(3, keepdim=True))
    else:
        shown = mask[:, start:stop, None, :, None]
        if spec.key_norm == "l2":
            squares = (weights.to(grad.dtype).square().permute(0, 2, 1, 3)[:, None] * shown).sum(3, keepdim=True)
            scale = squares.clamp_min(1e-24).rsqrt()
            # Below the clamp the divisor is a constant.
            shared = torch.where(squares > 1e-24, (grad * bar).sum(3, keepdim=True), 0)
            grad = (grad - bar * shared) * scale
        grad = grad * shown
    return grad.sum(1).permute(0, 2, 1, 3)


def _sum_diagonals(x: Tensor, axis: int, dtype: torch.dtype) -> Tensor:
    """Σ_i x[i, ..., s - i, ...] for every s, the adjoint of cutting windows: (c, ..., w, ...) -> (..., c + w - 1, ...).

    axis   where w is in x; the sums are of that dtype
    """
    c, w = x.shape[0], x.shape[axis]
    if c == 1:
        return x[0]  # nothing to sum: not even converted, which would copy it
    if x.device.type != "cpu" or torch.compiler.is_compiling():  # few launches, few nodes
        # Rows padded to c + w and read again c + w - 1 at a time are each one step further to the right.
        rows = F.pad(x.to(dtype).movedim((0, axis), (-2, -1)), (0, c)).flatten(-2)[..., :-c]
        return rows.unflatten(-1, (c, c + w - 1)).sum(-2).movedim(-1, axis - 1)
    total = x.new_zeros((*x.shape[1:axis], c + w - 1, *x.shape[axis + 1 :]), dtype=dtype)
    if c <= w:  # read once, where it lies: up to a hundred times as fast as the copy (LOG.md, 2026-11-22 (4))
        for i, row in enumerate(x):
            total.narrow(axis - 1, i, w).add_(row)
    else:
        for j in range(w):
            total.narrow(axis - 1, j, c).add_(x.select(axis, j).movedim(0, axis - 1))
    return total


def block_mask(
    spec: Spec, mask: Tensor | None, lo: int, hi: int, seen: Box, M: int, dtype: torch.dtype
) -> Tensor | None:
    """The block's rows of the mask, spread over u: (1 or b, block, 1, M)."""
    if mask is None or spec.source == "keys":  # there the normalisation has applied it already
        return None
    part = seen_part(mask[:, lo:hi, None], spec, seen, 3)
    u = M // max(1, part.shape[3])  # a block may reach no context
    part = part.repeat(1, 1, 1, u) if spec.source == "table" else part.repeat_interleave(u, 3)
    return part.to(dtype)


def gather(spec: Spec, weights: Tensor, box: Box, seen: Box, total: Tensor | None, part: Tensor) -> Tensor:
    """Add one block's gradient to the total."""
    if spec.source == "keys":
        return part if total is None else total + part
    if part.shape == weights.shape:
        return part if total is None else total + part
    total = part.new_zeros(weights.shape) if total is None else total
    target = total
    for axis, (start, _) in enumerate(box):
        if spec.source == "table":
            target = target.narrow(axis + 2, start + seen[axis][0], part.shape[axis + 2])
        else:
            target = target.narrow(axis, start, part.shape[axis])
    target += part
    return total
