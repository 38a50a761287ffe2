"""The exact orders in PyTorch. Each equals `reference.py`; they differ in what they build (see `lambda_op.STRATEGIES`).

The position part is y[b,n,h,v] = Σ_k q[b,n,h,k] Σ_{m,u} E[n,m,k,u] V[b,m,v,u]. Inside this file the context and the
intra-depth are one axis M = m·u, because they are always summed together.

A relative table is never indexed: padded or cropped to the offsets that the grid has and flipped, its windows *are*
the rows of E for a context in reversed order (a Hankel matrix), so one strided copy makes a block of E and one
strided sum brings its gradient back. Blocks that are rows of the grid, or the same part of every row, share one copy:
along the first axis the next row's block is the same memory, read one step further. All runs a block of queries at a
time, on the contexts that the block's window reaches, and nothing of size n·m is kept for the backward pass: it makes
the block again.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .content import normalise


class Position(NamedTuple):
    """What the position part works on; either `table` or `embeddings` is set."""

    q: Tensor  # (b, n, h, k)
    values: Tensor  # (b, m, v, u)
    table: Tensor | None  # (r_1, ..., r_d, k, u), every r odd, offset 0 in the middle, zero outside
    embeddings: Tensor | None  # (n, m, k, u)
    grid: tuple[int, ...]
    context_grid: tuple[int, ...]
    mask: Tensor | None  # (1 or b, n, m), True where query n sees context m
    lam_c: Tensor | None = None  # (b, k, v), the content lambda: applied in the same pass, since y is there


def lambdas(p: Position, block: int) -> Tensor:
    """The paper's order: λ[b,n,k,v] = Σ_M E[n,M,k] V[b,M,v], then y = q·λ."""
    return _position(p, "lambdas", block)


def scores(p: Position, block: int) -> Tensor:
    """Re-associated: s[b,n,h,M] = q·E, then y = s·V. The same sum, since no softmax stands between the two."""
    return _position(p, "scores", block)


def content_masked(q: Tensor, keys: Tensor, values: Tensor, key_norm: str, mask: Tensor, block: int) -> Tensor:
    """The content part where each query sees its own context: keys are normalised over what is visible to it.

    mask (1 or b, n, m). A block of queries at a time: largest intermediate b · block · m · k · u.
    """
    b, m, _, u = keys.shape
    folded = values.permute(0, 1, 3, 2).reshape(b, m * u, values.shape[2])
    spec = _Spec("keys", "scores", block, (q.shape[1],), (), (), key_norm)
    return _contract(q, folded, keys, mask.expand(b, -1, -1), None, spec)


# --- blocks of queries ------------------------------------------------------------------------------------------


Box = tuple[tuple[int, int], ...]  # (start, stop) an axis
_UNROLLED = 8  # blocks up to which a compiler sees what is in them


class _Spec(NamedTuple):
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

    Parts of rows come part by part, not row by row: what `_Blocks` keeps is for one part.
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


def _position(p: Position, order: str, block: int) -> Tensor:
    b, m, v, u = p.values.shape
    mask = p.mask
    if p.table is None:
        assert p.embeddings is not None
        weights = p.embeddings
        values = p.values.permute(0, 1, 3, 2).reshape(b, m * u, v)  # M = (m, u)
        spec = _Spec("embeddings", order, block, (p.q.shape[1],), (), (), "")
    else:
        d = len(p.grid)
        weights = p.table.permute(d, d + 1, *range(d))  # (k, u, r...)
        pads = [
            side - 1 - (r - 1) // 2
            for r, s, c in zip(p.table.shape[:d], p.grid, p.context_grid, strict=True)
            for side in (c, s)
        ]  # F.pad counts from the last axis, and flipping exchanges the two ends
        weights = F.pad(weights.flip(tuple(range(2, d + 2))), _last_axis_first(pads))
        values = p.values.flip(1).permute(0, 3, 1, 2).reshape(b, u * m, v)  # M = (u, reversed m)
        mask = None if mask is None else mask.flip(2)
        reach = tuple((r - 1) // 2 for r in p.table.shape[:d])
        spec = _Spec("table", order, block, p.grid, p.context_grid, reach, "")
    return _contract(p.q, values, weights, mask, p.lam_c, spec)


def _contract(
    q: Tensor, values: Tensor, weights: Tensor, mask: Tensor | None, lam_c: Tensor | None, spec: _Spec
) -> Tensor:
    inputs = q, values, weights, mask, lam_c
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting() and len(spec.blocks()) > _UNROLLED:
        return _contract_op(*inputs, *spec)
    # Without gradients the function alone: binding its arguments takes as long as a small map's products.
    return _Contract.apply(*inputs, spec) if torch.is_grad_enabled() else _Contract.forward(*inputs, spec)


def _last_axis_first(pairs: list[int]) -> list[int]:
    return [x for i in range(len(pairs) - 2, -1, -2) for x in pairs[i : i + 2]]


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


def _cut(x: Tensor, spec: _Spec, seen: Box, axis: int) -> Tensor:
    """The part of an axis M = (u, reversed context) that a box of queries reaches."""
    if spec.source != "table" or all(part == (0, size) for part, size in zip(seen, spec.context_grid, strict=True)):
        return x
    x = x.unflatten(axis, (-1, *spec.context_grid))
    for at, (start, stop) in enumerate(seen, start=axis + 1):
        x = x.narrow(at, start, stop - start)
    return x.flatten(axis, axis + len(seen))


def _place(box: Box, grid: Sequence[int]) -> tuple[int, int]:
    """(start, stop) of a block among the queries."""
    start = 0
    for (first, _), side in zip(box, grid, strict=True):
        start = start * side + first
    return start, start + math.prod([last - first for first, last in box])


def _joined(parts: list[tuple[int, Tensor]]) -> Tensor:
    """Blocks by their start -> all queries, axis 1."""
    return parts[0][1] if len(parts) == 1 else torch.cat([part for _, part in sorted(parts, key=lambda p: p[0])], 1)


def _windows(weights: Tensor, box: Box, seen: Box, axes: range) -> Tensor:
    """(k, u, offsets...) -> (k, u, offsets or block..., context...): the windows along those of the grid's axes."""
    for axis in axes:
        (start, stop), (first, last) = box[axis], seen[axis]
        size = last - first
        weights = weights.narrow(axis + 2, start + first, stop - start - 1 + size).unfold(axis + 2, size, 1)
    return weights


class _Blocks:
    """The blocks of E. `weights`, padded and flipped, is what they are cut from."""

    def __init__(self, spec: _Spec, weights: Tensor, mask: Tensor | None) -> None:
        self.spec, self.weights, self.mask = spec, weights, mask
        self.part: tuple[Box, Box] | None = None
        self.cut = spec.blocks()
        several_rows = spec.source == "table" and len(spec.grid) > 1 and len(self.cut) > 1
        self.shared = several_rows and all(box[0][1] - box[0][0] == 1 for box, _ in self.cut)
        if self.shared:  # offsets along the first axis that any block reaches
            of_row = [(box[0][0], seen[0]) for box, seen in self.cut]
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
            cut = _windows(used, box, seen, range(1, d))  # (k, u, offsets, block..., context...)
            self.rows = cut.permute(*range(3, d + 2), 0, 1, 2, *range(d + 2, 2 * d + 1)).contiguous()
        k, u = self.weights.shape[:2]
        here = self.rows.narrow(d + 1, row + first - self.first, last - first)  # (block..., k, u, context...)
        return here.reshape(-1, k, u * math.prod([b - a for a, b in seen]))  # a view, if u = 1


def _weights(spec: _Spec, weights: Tensor, box: Box, seen: Box, mask: Tensor | None) -> Tensor:
    """A block that shares nothing, in memory of its own."""
    if spec.source == "table":
        d = len(box)
        weights = _windows(weights, box, seen, range(d))
        k, u = weights.shape[:2]
        # (k, u, block..., context...) -> (block, k, u·m)
        weights = weights.permute(*range(2, d + 2), 0, 1, *range(d + 2, 2 * d + 2))
        return weights.reshape(math.prod([b - a for a, b in box]), k, u * math.prod([b - a for a, b in seen]))
    ((start, stop),) = box
    if spec.source == "embeddings":
        return weights[start:stop].permute(0, 2, 1, 3).flatten(2)
    assert mask is not None
    visible = mask[:, start:stop, :, None, None]
    bar = normalise(weights[:, None], visible, spec.key_norm, 2)  # (b, block, m, k, u)
    return bar.to(weights.dtype).permute(0, 1, 3, 2, 4).flatten(3)


def _weights_grad(
    spec: _Spec, weights: Tensor, box: Box, seen: Box, mask: Tensor | None, bar: Tensor, grad: Tensor
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


def _by_query(x: Tensor) -> Tensor:
    """(b, block, h, k) -> (block, b·h, k), in memory: from an NCHW map the reshape alone is a view without a unit
    stride, which bmm would copy query by query."""
    return x.permute(1, 0, 2, 3).flatten(1, 2).contiguous()


def _to_scores(q: Tensor, weights: Tensor, mask: Tensor | None) -> Tensor:
    """s = q·E for one block: q (b, block, h, k), weights (block, k, M) or (b, block, k, M) -> (b, block, h, M)."""
    b, block, h, _ = q.shape
    if weights.dim() == 4:
        s = torch.matmul(q, weights)
    else:
        s = torch.bmm(_by_query(q), weights)
        s = s.view(block, b, h, weights.shape[2]).permute(1, 0, 2, 3)
    return s if mask is None else s * mask


def _block_mask(
    spec: _Spec, mask: Tensor | None, lo: int, hi: int, seen: Box, M: int, dtype: torch.dtype
) -> Tensor | None:
    """The block's rows of the mask, spread over u: (1 or b, block, 1, M)."""
    if mask is None or spec.source == "keys":  # there the normalisation has applied it already
        return None
    part = _cut(mask[:, lo:hi, None], spec, seen, 3)
    u = M // part.shape[3]
    part = part.repeat(1, 1, 1, u) if spec.source == "table" else part.repeat_interleave(u, 3)
    return part.to(dtype)


class _Contract(torch.autograd.Function):
    """y[b,n,h,v] = Σ_k q[b,n,h,k] (λc[b,k,v] + Σ_M W[n,M,k] V[b,M,v]), a block of queries at a time.

    Saves its inputs and nothing else.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: Tensor, values: Tensor, weights: Tensor, mask: Tensor | None, lam_c: Tensor | None, spec: _Spec
    ) -> Tensor:
        b, _, h, _ = q.shape
        v = values.shape[2]
        rows, outputs = _Blocks(spec, weights, mask), []
        for box, seen in rows.cut:
            lo, hi = _place(box, spec.grid)
            part, V = q[:, lo:hi], _cut(values, spec, seen, 1)
            M = V.shape[1]
            W = rows.block(box, seen)
            shown = _block_mask(spec, mask, lo, hi, seen, M, q.dtype)
            if spec.order == "scores":
                y = torch.bmm(*_with_content(_to_scores(part, W, shown), V, part, lam_c)).view(b, hi - lo, h, v)
            else:
                W = W if shown is None else W * shown[0]
                y = torch.einsum("bnhk,nkbv->bnhv", part, _lambdas(W, V))
                y = y if lam_c is None else y + torch.einsum("bnhk,bkv->bnhv", part, lam_c)
            outputs.append((lo, y))
        return _joined(outputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        q, values, weights, mask, lam_c, ctx.spec = inputs
        ctx.save_for_backward(q, values, weights, mask, lam_c)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, values, weights, mask, lam_c = ctx.saved_tensors
        dq, dvalues, dweights, dlam_c = _gradients(q, values, weights, mask, lam_c, ctx.spec, grad)
        return dq, dvalues, dweights, None, dlam_c, None


def _gradients(
    q: Tensor, values: Tensor, weights: Tensor, mask: Tensor | None, lam_c: Tensor | None, spec: _Spec, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Of q, values, weights and lam_c, a block of queries at a time."""
    b, _, h, k = q.shape
    v = values.shape[2]
    # Gradients that are sums over blocks are summed in float32 or better.
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    grads_q, grad_v, grad_w, grad_c = [], None, None, None
    expanded = _Blocks(spec, weights, mask)
    for box, seen in expanded.cut:
        lo, hi = _place(box, spec.grid)
        rows = hi - lo
        part, dy, V = q[:, lo:hi], grad[:, lo:hi], _cut(values, spec, seen, 1)
        M = V.shape[1]
        W = expanded.block(box, seen)
        shown = _block_mask(spec, mask, lo, hi, seen, M, q.dtype)
        if spec.order == "scores":
            s, both = _with_content(_to_scores(part, W, shown), V, part, lam_c)
            flat = dy.reshape(b, rows * h, v)
            dboth = torch.bmm(s.transpose(1, 2), flat)  # (b, M or M + k, v)
            del s  # as large as ds, and ds is about to be copied
            ds = torch.bmm(flat, both.transpose(1, 2)).view(b, rows, h, both.shape[1])
            dv = dboth[:, :M]
            if lam_c is not None:
                dlam_c, dq_c = dboth[:, M:], ds[..., M:].clone()  # a view would keep all of ds
                ds = ds[..., :M]
            ds = ds if shown is None else ds * shown
            if W.dim() == 4:
                dq = torch.matmul(ds, W.transpose(2, 3))
                dW = torch.matmul(part.transpose(2, 3), ds)
            else:
                ds = ds.permute(1, 0, 2, 3).reshape(rows, b * h, M)
                dq = torch.bmm(ds, W.transpose(1, 2)).view(rows, b, h, k).permute(1, 0, 2, 3)
                dW = torch.bmm(_by_query(part).transpose(1, 2), ds)
        else:
            W = W if shown is None else W * shown[0]
            lam = _lambdas(W, V)
            dq = torch.einsum("bnhv,nkbv->bnhk", dy, lam)
            dlam = torch.einsum("bnhk,bnhv->nkbv", part, dy).reshape(rows * k, b * v)
            dv = (W.reshape(rows * k, M).t() @ dlam).view(M, b, v).transpose(0, 1)
            dW = (dlam @ V.transpose(0, 1).reshape(M, b * v).t()).view(rows, k, M)
            dW = dW if shown is None else dW * shown[0]
            if lam_c is not None:
                dlam_c, dq_c = content_grad(part, lam_c, dy)
        if lam_c is not None:
            dq = dq + dq_c
            grad_c = dlam_c.to(wide) if grad_c is None else grad_c + dlam_c
        grads_q.append((lo, dq))
        if values.shape[1] == M:
            grad_v = dv.to(wide) if grad_v is None else grad_v + dv
        else:
            grad_v = dv.new_zeros(values.shape, dtype=wide) if grad_v is None else grad_v
            place = grad_v.unflatten(1, (-1, *spec.context_grid))
            for axis, (start, stop) in enumerate(seen, start=2):
                place = place.narrow(axis, start, stop - start)
            place += dv.view(place.shape)
        grad_w = _gather(spec, weights, box, seen, grad_w, _weights_grad(spec, weights, box, seen, mask, W, dW))
    assert grad_v is not None
    assert grad_w is not None
    grad_c = None if grad_c is None else grad_c.to(values.dtype)
    return _joined(grads_q), grad_v.to(values.dtype), grad_w.to(weights.dtype), grad_c


# Many blocks are one operation to a compiler: unrolled, 128 of them took it more than five minutes.


@torch.library.custom_op("lambdanets::contract", mutates_args=())
def _contract_op(
    q: Tensor, values: Tensor, weights: Tensor, mask: Tensor | None, lam_c: Tensor | None, source: str, order: str,
    block: int, grid: Sequence[int], context_grid: Sequence[int], reach: Sequence[int], key_norm: str,
) -> Tensor:  # fmt: skip
    spec = _Spec(source, order, block, grid, context_grid, reach, key_norm)
    return _Contract.forward(q, values, weights, mask, lam_c, spec).contiguous()


@torch.library.custom_op("lambdanets::contract_gradients", mutates_args=())
def _gradients_op(
    q: Tensor, values: Tensor, weights: Tensor, mask: Tensor | None, lam_c: Tensor | None, source: str, order: str,
    block: int, grid: Sequence[int], context_grid: Sequence[int], reach: Sequence[int], key_norm: str, grad: Tensor,
) -> list[Tensor]:  # fmt: skip
    spec = _Spec(source, order, block, grid, context_grid, reach, key_norm)
    return [g.contiguous() for g in _gradients(q, values, weights, mask, lam_c, spec, grad) if g is not None]


@_contract_op.register_fake
def _(q: Tensor, values: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(*q.shape[:3], values.shape[2])


@_gradients_op.register_fake
def _(
    q: Tensor, values: Tensor, weights: Tensor, mask: Tensor | None, lam_c: Tensor | None, *rest: Any
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (q, values, weights, lam_c) if x is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.spec = inputs[5:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dq, dvalues, dweights, *rest = _gradients_op(*ctx.saved_tensors, *ctx.spec, grad)
    return dq, dvalues, dweights, None, rest[0] if rest else None, *[None] * len(ctx.spec)


_contract_op.register_autograd(_backward, setup_context=_save)


def _with_content(s: Tensor, V: Tensor, q: Tensor, lam_c: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scores (b, rows, M) and values (b, M, v) to multiply, rows = block·h.

    The content lambda joins them as k more contexts: Σ_M s·V + Σ_k q·λc is one product of (s, q) with (V, λc).
    """
    if lam_c is None:
        return s.flatten(1, 2), V
    b, block, h, M = s.shape
    joined = s.new_empty(b, block, h, M + q.shape[3])  # twice as fast as cat, which copies strided parts one by one
    joined[..., :M] = s
    joined[..., M:] = q
    return joined.flatten(1, 2), torch.cat([V, lam_c], 1)


def content_grad(q: Tensor, lam_c: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Of y = q·λc: dλc (b, k, v) = Σ_{n,h} q·dy, and dq = dy·λcᵀ."""
    return torch.einsum("bnhk,bnhv->bkv", q, grad), torch.einsum("bnhv,bkv->bnhk", grad, lam_c)


def _lambdas(weights: Tensor, values: Tensor) -> Tensor:
    """λ for one block as a single matrix product: (block, k, M), (b, M, v) -> (block, k, b, v)."""
    block, k, M = weights.shape
    b, _, v = values.shape
    return (weights.reshape(block * k, M) @ values.transpose(0, 1).reshape(M, b * v)).view(block, k, b, v)


def _gather(spec: _Spec, weights: Tensor, box: Box, seen: Box, total: Tensor | None, part: Tensor) -> Tensor:
    """Add one block's gradient to the total."""
    if spec.source == "keys":
        return part if total is None else total + part
    if part.shape == weights.shape:
        return part if total is None else total + part
    total = part.new_zeros(weights.shape) if total is None else total
    place = total
    for axis, (start, _) in enumerate(box):
        if spec.source == "table":
            place = place.narrow(axis + 2, start + seen[axis][0], part.shape[axis + 2])
        else:
            place = place.narrow(axis, start, part.shape[axis])
    place += part
    return total
