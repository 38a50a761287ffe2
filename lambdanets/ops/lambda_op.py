"""The front door: check every size, choose a strategy, run it.

y[b,n,h,v] = Σ_k q[b,n,h,k] · Σ_{m,u} (K̄[b,m,k,u] + E[n,m,k,u]) · V[b,m,v,u]
"""

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from lambdanets.ops import blockwise, content
from lambdanets.ops.planner import BLOCK_BYTES, choose_order
from lambdanets.ops.problem import Cost, Position, Problem, autocast_dtype, sizes
from lambdanets.ops.strategies import STRATEGIES
from lambdanets.ops.tune import tuned

KEY_NORMS = ("softmax", "l2", "none")


def lambda_op(
    q: Tensor,
    keys: Tensor | None,
    values: Tensor,
    *,
    table: Tensor | None = None,
    embeddings: Tensor | None = None,
    grid: tuple[int, ...] | None = None,
    context_grid: tuple[int, ...] | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    key_norm: str = "softmax",
    strategy: str = "auto",
    memory_limit_bytes: int | None = None,
    kept: dict[Any, Any] | None = None,
) -> Tensor:
    """Turn the context into one linear function per query and apply it (paper, section 3).

        y[b,n,h,v] = Σ_k q[b,n,h,k] · Σ_{m,u} (K̄[b,m,k,u] + E[n,m,k,u]) · V[b,m,v,u]

    q                   (b, n, h, k)
    keys                (b, m, k, u), not normalised; None leaves the content part out
    values              (b, m, v, u)
    table               (r_1, ..., r_d, k, u), d = 1, 2 or 3, every r odd: the relative table, E[n,m] = R[t(m) - t(n)],
                        offset 0 in its middle, zero outside. r = scope is the paper's window, r = 2·side - 1 its
                        global table; the two are the same function on the same numbers
    embeddings          (n, m, k, u): E itself, for positions that are no grid. At most one of table and embeddings
    grid, context_grid  sizes of the grids that n and m run over in row-major order; needed with a table;
                        context_grid is grid unless given, and both start at position 0
    mask                bool, True where query n sees context m: (n, m) or (b, n, m); (1, m) or (b, 1, m) hides padding
                        from every query, and costs nothing. Keys are normalised over what is visible. A query that sees
                        nothing gives zeros. What nobody sees may hold anything, NaN too
    causal              query n sees contexts m <= n; 1-D, n = m
    key_norm            over the context: "softmax" (in float32 or better), "l2" or "none"
    strategy            "auto" takes the first row of `plan`; "tuned" what ran fastest on this problem when it was first
                        met (`ops/tune.py`; in a graph being compiled, as "auto"); a name from STRATEGIES forces that
                        one, or raises
    memory_limit_bytes  no intermediate of the position part may be larger
    kept                a dictionary of the caller's for one table that never changes, as in `fuse`: without gradients,
                        what a strategy makes of the table stays there for the next call, 8 MiB at most. Nobody looks
                        whether the table is the same
    returns             (b, n, h, v), dtype of the inputs (under autocast, the autocast dtype)

    Every strategy is exact. Sums run in float32 or better; float16 is computed in float32 and rounded once.
    Raises ValueError on sizes that do not fit, naming them.

    >>> _ = torch.manual_seed(0)
    >>> q, K, V = torch.randn(2, 12, 4, 8), torch.randn(2, 12, 8, 1), torch.randn(2, 12, 5, 1)
    >>> R = torch.randn(5, 7, 8, 1)
    >>> y = lambda_op(q, K, V, table=R, grid=(3, 4))
    >>> same = lambda_op(q, K, V, table=R, grid=(3, 4), strategy="conv")
    >>> torch.allclose(y, same, atol=1e-4)
    True
    """
    device, autocast = q.device.type, autocast_dtype(q)
    if autocast is not None:
        q, values = q.to(autocast), values.to(autocast)
        keys, table, embeddings = (None if t is None else t.to(autocast) for t in (keys, table, embeddings))
    problem = _problem(q, keys, values, table, embeddings, grid, context_grid, mask, causal)
    if key_norm not in KEY_NORMS:
        raise ValueError(f"key_norm {key_norm!r} is not one of {', '.join(KEY_NORMS)}")
    if strategy == "tuned":
        graph = torch.compiler.is_compiling() or device == "meta"
        strategy = "auto" if graph else tuned(problem, memory_limit_bytes)
    cost = choose_order(problem, strategy, memory_limit_bytes)
    result = q.dtype
    if result == torch.float16 and cost.strategy != "fused":  # a partial sum may overflow where the result does not
        q, values = q.float(), values.float()
        keys, table, embeddings = (None if t is None else t.float() for t in (keys, table, embeddings))
        kept = None  # its keys could not tell this table from one of float32
    with torch.autocast(device, enabled=False) if autocast is not None else nullcontext():
        y = _evaluate(problem, cost, q, keys, values, table, embeddings, mask, key_norm, kept)
    return y.to(result)


def _evaluate(
    p: Problem,
    cost: Cost,
    q: Tensor,
    keys: Tensor | None,
    values: Tensor,
    table: Tensor | None,
    embeddings: Tensor | None,
    mask: Tensor | None,
    key_norm: str,
    kept: dict[Any, Any] | None,
) -> Tensor:
    padding = None  # (1 or b, 1, m): what every query sees
    if mask is not None:
        mask = mask if mask.dim() == 3 else mask[None]
        seen = mask.any(1)[..., None, None]  # (1 or b, m, 1, 1)
        values = torch.where(seen, values, 0)
        keys = None if keys is None else torch.where(seen, keys, 0)
        if p.mask is None:
            padding, mask = mask, None
    y = lam_c = None
    if keys is not None:
        if mask is not None:
            both = mask & _lower(p.n, mask.device) if p.causal else mask
            per_query = max(1, p.b * p.m * max(p.k, p.h) * p.u * 4)
            block = max(1, min(p.n, BLOCK_BYTES.get(p.device, 8 << 20) // per_query))
            y = blockwise.content_masked(q, keys, values, key_norm, both, block)
        elif p.causal:
            if padding is not None and key_norm == "softmax":  # the values are zero there: no weight can matter
                keys = torch.where(padding[:, 0, :, None, None], keys, torch.finfo(keys.dtype).min)
            y = content.content_causal(q, keys, values, key_norm)
        else:
            lam_c = content.content_lambda(keys, values, key_norm, padding)
    if table is not None or embeddings is not None:
        if p.causal and table is not None:
            future = torch.arange(table.shape[0], device=table.device) > table.shape[0] // 2
            table = torch.where(future[:, None, None], 0, table)
        elif p.causal and embeddings is not None:
            embeddings = torch.where(_lower(p.n, q.device)[..., None, None], embeddings, 0)
        grids = p.grid or (p.n,), p.context_grid or (p.m,)
        position = Position(q, values, table, embeddings, *grids, mask, lam_c, kept)
        at = STRATEGIES[cost.strategy].run(position, cost.block)
        y = at if y is None else y + at
    elif lam_c is not None:
        y = torch.einsum("bnhk,bkv->bnhv", q, lam_c)
    return q.new_zeros(p.b, p.n, p.h, p.v) if y is None else y


def _lower(n: int, device: torch.device) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool, device=device).tril()


def _problem(
    q: Tensor,
    keys: Tensor | None,
    values: Tensor,
    table: Tensor | None,
    embeddings: Tensor | None,
    grid: tuple[int, ...] | None,
    context_grid: tuple[int, ...] | None,
    mask: Tensor | None,
    causal: bool,
) -> Problem:
    """Check every size against every other and say which two disagree."""
    for name, x, axes in (("q", q, "bnhk"), ("keys", keys, "bmku"), ("values", values, "bmvu")):
        if x is not None and x.dim() != 4:
            raise ValueError(f"{name} must be ({', '.join(axes)}), 4 axes, and has shape {tuple(x.shape)}")
    b, n, h, k = sizes(q)
    m, v, u = sizes(values)[1:]
    if values.shape[0] != b:
        raise ValueError(f"q has batch {b} and values batch {values.shape[0]}")
    if keys is not None and keys.shape != (b, m, k, u):
        raise ValueError(
            f"keys must be (b, m, k, u) = {(b, m, k, u)}, from q {tuple(q.shape)} and values {tuple(values.shape)}, "
            f"and are {tuple(keys.shape)}"
        )
    if table is not None and embeddings is not None:
        raise ValueError("table and embeddings were both given: a position part has one of them")
    if keys is None and table is None and embeddings is None:
        raise ValueError("nothing to compute: keys, table and embeddings are all None")
    for name, x in (("keys", keys), ("values", values), ("table", table), ("embeddings", embeddings)):
        if x is not None and (x.dtype != q.dtype or x.device != q.device):
            raise ValueError(
                f"{name} is {x.dtype} on {x.device} and q is {q.dtype} on {q.device}: cast one, or use autocast"
            )
    if not q.dtype.is_floating_point:
        raise ValueError(f"q must be floating point and is {q.dtype}")
    if grid is not None:
        grid = tuple(grid)
        context_grid = grid if context_grid is None else tuple(context_grid)
        for name, shape, letter, count in (("grid", grid, "n", n), ("context_grid", context_grid, "m", m)):
            if not shape or min(shape) < 1 or math.prod(shape) != count:
                raise ValueError(f"{name} {shape} has {math.prod(shape)} positions and {letter} is {count}")
        if len(grid) != len(context_grid) or len(grid) > 3:
            raise ValueError(f"grid {grid} and context_grid {context_grid} must have the same 1, 2 or 3 axes")
    elif context_grid is not None:
        raise ValueError(f"context_grid {tuple(context_grid)} was given without grid")
    sides = None
    if table is not None:
        if grid is None:
            raise ValueError("a relative table needs grid=(H, W), the sizes that n runs over")
        sides = sizes(table)[: len(grid)]
        if table.dim() != len(grid) + 2 or table.shape[-2:] != (k, u) or any(r % 2 == 0 for r in sides):
            raise ValueError(
                f"table must be ({', '.join('r' for _ in grid)}, k, u) with every r odd and (k, u) = {(k, u)} for grid "
                f"{grid}, and is {tuple(table.shape)}"
            )
    if embeddings is not None and embeddings.shape != (n, m, k, u):
        raise ValueError(f"embeddings must be (n, m, k, u) = {(n, m, k, u)} and are {tuple(embeddings.shape)}")
    kind = None
    if mask is not None:
        if mask.dtype != torch.bool:
            raise ValueError(f"mask must be bool, True where a query sees a context, and is {mask.dtype}")
        full = mask.shape if mask.dim() == 3 else (1, *mask.shape)
        if len(full) != 3 or full[0] not in (1, b) or full[1] not in (1, n) or full[2] != m:
            raise ValueError(f"mask must be (n, m) or (b, n, m) = {(b, n, m)} and is {tuple(mask.shape)}")
        if full[1] != 1 or n == 1:
            kind = "queries" if full[0] == 1 else "examples"
        if n == 1:
            kind = None  # one query: hiding from it is hiding from all
    if causal and (n != m or (grid is not None and (len(grid) != 1 or grid != context_grid))):
        raise ValueError(f"causal order is 1-D with n = m, and got n = {n}, m = {m}, grid {grid}")
    inputs = [x for x in (q, keys, values, table, embeddings) if x is not None]
    training = torch.is_grad_enabled() and any([x.requires_grad for x in inputs])  # noqa: C419  (torch.compile)
    return Problem(
        b, n, m, h, k, v, u, grid, context_grid, sides, embeddings is not None, kind, causal, keys is not None,
        training, q.dtype, q.device.type,
    )  # fmt: skip
