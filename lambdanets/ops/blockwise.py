"""The exact orders in PyTorch. Each equals `reference.py`; they differ in what they build (see `STRATEGIES`).

The position part is y[b,n,h,v] = Σ_k q[b,n,h,k] Σ_{m,u} E[n,m,k,u] V[b,m,v,u]. Inside this file the context and the
intra-depth are one axis M = m·u, because they are always summed together. All runs a block of queries at a time, on the
contexts that the block's window reaches, and nothing of size n·m is kept for the backward pass: it makes the block
again.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lambdanets.ops.blocks import Blocks, Spec, block_mask, gather, positions_of, seen_part, weights_grad
from lambdanets.ops.problem import Position, Problem, applied, ends, expanded, exporting, itemsize_of, reached, sizes
from lambdanets.ops.reference import relative_embeddings

_APART = 100  # contexts from which heads are taken apart
_UNROLLED = 8  # blocks up to which a compiler sees what is in them


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
    spec = Spec("keys", "scores", block, (sizes(q)[1],), (), (), key_norm)
    return _contract(q, folded, keys, mask.expand(b, -1, -1), None, spec)


def _position(p: Position, order: str, block: int) -> Tensor:
    b, m, v, u = sizes(p.values)
    mask = p.mask
    if p.table is None or torch.onnx.is_in_onnx_export():  # torch.jit's exporter has no windows: E is looked up there
        weights = p.embeddings if p.table is None else relative_embeddings(p.table, p.grid, p.context_grid)
        assert weights is not None
        values = p.values.permute(0, 1, 3, 2).reshape(b, m * u, v)  # M = (m, u)
        spec = Spec("embeddings", order, block, (sizes(p.q)[1],), (), (), "")
    else:
        d = len(p.grid)
        weights = p.table.permute(d, d + 1, *range(d))  # (k, u, r...)
        pads = [
            side - 1 - (r - 1) // 2
            for r, s, c in zip(sizes(p.table)[:d], p.grid, p.context_grid, strict=True)
            for side in (c, s)
        ]  # F.pad counts from the last axis, and flipping exchanges the two ends
        weights = F.pad(weights.flip(tuple(range(2, d + 2))), _last_axis_first(pads))
        values = p.values.flip(1).permute(0, 3, 1, 2).reshape(b, u * m, v)  # M = (u, reversed m)
        mask = None if mask is None else mask.flip(2)
        reach = tuple((r - 1) // 2 for r in sizes(p.table)[:d])
        spec = Spec("table", order, block, p.grid, p.context_grid, reach, "")
    h = sizes(p.q)[2]
    if not _heads_apart(p, order, values, spec):
        return _contract(p.q, values, weights, mask, p.lam_c, spec)
    q = p.q.transpose(1, 2).flatten(0, 1)[:, :, None]
    values = values[:, None].expand(-1, h, -1, -1).flatten(0, 1)
    lam_c = None if p.lam_c is None else p.lam_c[:, None].expand(-1, h, -1, -1).flatten(0, 1)
    return _contract(q, values, weights, None, lam_c, spec).unflatten(0, (b, h))[:, :, :, 0].transpose(1, 2)


def _heads_apart(p: Position, order: str, values: Tensor, spec: Spec) -> bool:
    """Whether each head becomes an example of its own: s is then multiplied by V as it lies, not copied first.

    On a CPU that is faster but in 16 bits and on small maps. Each head has a V then: no larger than a block of s.
    """
    if order != "scores" or p.mask is not None or p.q.dtype.itemsize < 4 or p.q.device.type != "cpu":
        return False
    M, v = sizes(values)[1:]
    if p.q.shape[2] == 1 or p.values.shape[1] < _APART:
        return False
    seen = spec.blocks()[0][1]
    reached = math.prod([stop - start for start, stop in seen]) * p.values.shape[3] if seen else M
    return M * v <= min(spec.block, p.q.shape[1]) * reached


def _last_axis_first(pairs: list[int]) -> list[int]:
    return [x for i in range(len(pairs) - 2, -1, -2) for x in pairs[i : i + 2]]


def _contract(
    q: Tensor, values: Tensor, weights: Tensor, mask: Tensor | None, lam_c: Tensor | None, spec: Spec
) -> Tensor:
    inputs = q, values, weights, mask, lam_c
    if torch.compiler.is_compiling() and not exporting() and len(spec.blocks()) > _UNROLLED:
        return _contract_op(*inputs, *spec)
    # Without gradients the function alone: binding its arguments takes as long as a small map's products.
    return applied(_Contract, *inputs, spec) if torch.is_grad_enabled() else _Contract.forward(*inputs, spec)


class _Contract(torch.autograd.Function):
    """y[b,n,h,v] = Σ_k q[b,n,h,k] (λc[b,k,v] + Σ_M W[n,M,k] V[b,M,v]), a block of queries at a time.

    Saves its inputs and nothing else.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: Tensor, values: Tensor, weights: Tensor, mask: Tensor | None, lam_c: Tensor | None, spec: Spec
    ) -> Tensor:
        b, _, h, _ = sizes(q)
        v = sizes(values)[2]
        rows, outputs = Blocks(spec, weights, mask), []
        for box, seen in rows.boxes:
            lo, hi = positions_of(box, spec.grid)
            part, V = q[:, lo:hi], seen_part(values, spec, seen, 1)
            M = sizes(V)[1]
            W = rows.block(box, seen)
            shown = block_mask(spec, mask, lo, hi, seen, M, q.dtype)
            if spec.order == "scores" and h == 1:
                s = _to_scores(part, W, shown)[:, :, 0]
                y = torch.bmm(s, V) if lam_c is None else torch.baddbmm(torch.bmm(part[:, :, 0], lam_c), s, V)
                y = y[:, :, None]
            elif spec.order == "scores":
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
    q: Tensor, values: Tensor, weights: Tensor, mask: Tensor | None, lam_c: Tensor | None, spec: Spec, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Of q, values, weights and lam_c, a block of queries at a time."""
    b, _, h, k = q.shape
    v = values.shape[2]
    # Gradients that are sums over blocks are summed in float32 or better.
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    grads_q, grad_v, grad_w, grad_c = [], None, None, None
    expanded = Blocks(spec, weights, mask)
    for box, seen in expanded.boxes:
        lo, hi = positions_of(box, spec.grid)
        rows = hi - lo
        part, dy, V = q[:, lo:hi], grad[:, lo:hi], seen_part(values, spec, seen, 1)
        M = V.shape[1]
        W = expanded.block(box, seen)
        shown = block_mask(spec, mask, lo, hi, seen, M, q.dtype)
        if spec.order == "scores":
            flat = dy.reshape(b, rows * h, v)
            if h == 1:
                dv = torch.bmm(_to_scores(part, W, shown)[:, :, 0].mT, flat)
                ds = torch.bmm(flat, V.mT)[:, :, None]
                if lam_c is not None:
                    dlam_c, dq_c = content_grad(part, lam_c, dy)
            else:
                s, both = _with_content(_to_scores(part, W, shown), V, part, lam_c)
                dboth = torch.bmm(s.mT, flat)  # (b, M or M + k, v)
                del s  # as large as ds, and ds is about to be copied
                ds = torch.bmm(flat, both.mT).view(b, rows, h, both.shape[1])
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
            target = grad_v.unflatten(1, (-1, *spec.context_grid))
            for axis, (start, stop) in enumerate(seen, start=2):
                target = target.narrow(axis, start, stop - start)
            target += dv.view(target.shape)
        grad_w = gather(spec, weights, box, seen, grad_w, weights_grad(spec, weights, box, seen, mask, W, dW))
    assert grad_v is not None
    assert grad_w is not None
    grad_c = None if grad_c is None else grad_c.to(values.dtype)
    return _joined(grads_q), grad_v.to(values.dtype), grad_w.to(weights.dtype), grad_c


def _lambdas(weights: Tensor, values: Tensor) -> Tensor:
    """λ for one block as a single matrix product: (block, k, M), (b, M, v) -> (block, k, b, v)."""
    block, k, M = weights.shape
    b, _, v = values.shape
    return (weights.reshape(block * k, M) @ values.transpose(0, 1).reshape(M, b * v)).view(block, k, b, v)


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


def _with_content(s: Tensor, V: Tensor, q: Tensor, lam_c: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scores (b, rows, M) and values (b, M, v) to multiply, rows = block·h.

    The content lambda joins them as k more contexts: Σ_M s·V + Σ_k q·λc is one product of (s, q) with (V, λc).
    """
    if lam_c is None:
        return s.flatten(1, 2), V
    if torch.jit.is_tracing():  # ONNX has no writing into a part
        return torch.cat([s, q], 3).flatten(1, 2), torch.cat([V, lam_c], 1)
    b, block, h, M = sizes(s)
    joined = s.new_empty(b, block, h, M + q.shape[3])  # twice as fast as cat, which copies strided parts one by one
    joined[..., :M] = s
    joined[..., M:] = q
    return joined.flatten(1, 2), torch.cat([V, lam_c], 1)


def content_grad(q: Tensor, lam_c: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Of y = q·λc: dλc (b, k, v) = Σ_{n,h} q·dy, and dq = dy·λcᵀ."""
    return torch.einsum("bnhk,bnhv->bkv", q, grad), torch.einsum("bnhv,bkv->bnhk", grad, lam_c)


def _joined(parts: list[tuple[int, Tensor]]) -> Tensor:
    """Blocks by their start -> all queries, axis 1."""
    return parts[0][1] if len(parts) == 1 else torch.cat([part for _, part in sorted(parts, key=lambda p: p[0])], 1)


# Many blocks are one operation to a compiler: unrolled, 128 of them took it more than five minutes.


@torch.library.custom_op("lambdanets::contract", mutates_args=())
def _contract_op(
    q: Tensor, values: Tensor, weights: Tensor, mask: Tensor | None, lam_c: Tensor | None, source: str, order: str,
    block: int, grid: Sequence[int], context_grid: Sequence[int], reach: Sequence[int], key_norm: str,
) -> Tensor:  # fmt: skip
    spec = Spec(source, order, block, grid, context_grid, reach, key_norm)
    return _Contract.forward(q, values, weights, mask, lam_c, spec).contiguous()


@torch.library.custom_op("lambdanets::contract_gradients", mutates_args=())
def _gradients_op(
    q: Tensor, values: Tensor, weights: Tensor, mask: Tensor | None, lam_c: Tensor | None, source: str, order: str,
    block: int, grid: Sequence[int], context_grid: Sequence[int], reach: Sequence[int], key_norm: str, grad: Tensor,
) -> list[Tensor]:  # fmt: skip
    spec = Spec(source, order, block, grid, context_grid, reach, key_norm)
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


def cost_lambdas(p: Problem, block: int) -> tuple[int, int, int]:
    m = reached(p, block)
    macs = p.b * p.n * m * p.k * p.v * p.u + p.b * p.n * p.h * p.k * p.v
    (copied, held), lam = expanded(p, block), p.b * p.k * p.v  # a query
    moved = 2 * p.n * (copied + 2 * lam) + ends(p)
    return macs, moved * itemsize_of(p), max(held, lam) * block * itemsize_of(p)


def cost_scores(p: Problem, block: int) -> tuple[int, int, int]:
    m = reached(p, block)
    macs = p.b * p.h * p.n * m * p.u * (p.k + p.v)
    (copied, held), s = expanded(p, block), p.b * p.h * m * p.u
    moved = 2 * p.n * (copied + 2 * s) + ends(p)
    return macs, moved * itemsize_of(p), max(held, s) * block * itemsize_of(p)


def lambdas_why_not(p: Problem) -> str | None:
    if p.mask == "examples":
        return f"a mask that differs by example would need {p.b} expanded tables; scores applies it to s instead"
    return None
