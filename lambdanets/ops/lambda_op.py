"""The front door: describe the problem, price every strategy, pick one, run it.

    y[b,n,h,v] = Σ_k q[b,n,h,k] · Σ_{m,u} (K̄[b,m,k,u] + E[n,m,k,u]) · V[b,m,v,u]

The letters are the paper's: b batch, n queries, m context, h queries per position (heads), k key depth, v value depth,
u intra-depth, r scope. The content part is always q·(K̄ᵀV); the strategies differ in the position part.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from . import eager

KEY_NORMS = ("softmax", "l2", "none")


@dataclass(frozen=True)
class Problem:
    """The sizes that decide what a lambda operation costs. Nothing here holds data.

    b n m h k v u         sizes, in the paper's letters
    grid, context_grid    sizes of the query and the context grid; None where positions are not a grid
    table                 sides (r_1, ..., r_d) of the relative table, or None
    embeddings            True for explicit embeddings (n, m, k, u)
    mask                  None, "queries" for a mask (n, m), "examples" for a mask (b, n, m); a mask that hides the
                          same contexts from every query is applied to keys and values beforehand and costs nothing
    causal, content       causal order in 1-D; whether there is a content part
    training              whether a backward pass will follow: strategies differ in what theirs costs
    """

    b: int
    n: int
    m: int
    h: int
    k: int
    v: int
    u: int = 1
    grid: tuple[int, ...] | None = None
    context_grid: tuple[int, ...] | None = None
    table: tuple[int, ...] | None = None
    embeddings: bool = False
    mask: str | None = None
    causal: bool = False
    content: bool = True
    training: bool = False
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def window(self) -> int:
        """Contexts that a query's table reaches: Π min(r, 2·side - 1), or m for explicit embeddings."""
        if self.table is None or self.grid is None:
            return self.m
        return math.prod([min(r, 2 * s - 1) for r, s in zip(self.table, self.grid, strict=True)])

    @property
    def paper_macs(self) -> int:
        """Multiply-adds as the paper counts them: position b·n·Π min(r, side)·k·v·u, content b·m·k·v·u, and q·λ.

        The two lambdas are added before they are applied, so q·λ is paid once.
        """
        macs = self.b * self.n * self.h * self.k * self.v
        if self.content:
            macs += self.b * self.m * self.k * self.v * self.u
        if self.table is not None and self.context_grid is not None:
            reach = math.prod([min(r, s) for r, s in zip(self.table, self.context_grid, strict=True)])
            macs += self.b * self.n * reach * self.k * self.v * self.u
        elif self.embeddings:
            macs += self.b * self.n * self.m * self.k * self.v * self.u
        return macs


@dataclass(frozen=True)
class Cost:
    """What one strategy costs on one problem, forward, position part.

    macs           multiply-adds
    bytes_moved    bytes read and written, intermediates included
    largest_bytes  the largest intermediate
    seconds        the model's estimate, with the backward pass if the problem has one; for ranking only
    block          queries worked on at a time
    why_not        why it cannot run here, or None
    """

    strategy: str
    macs: int
    bytes_moved: int
    largest_bytes: int
    seconds: float
    block: int
    why_not: str | None = None


@dataclass(frozen=True)
class Strategy:
    """One exact order of evaluation: a row of STRATEGIES.

    `run` evaluates a block of queries at a time, `cost` gives (multiply-adds, bytes moved, largest bytes) for a block,
    `why_not` says why a problem cannot run, `builds` names the intermediates for the plan's printout.
    """

    run: Callable[[eager.Position, int], Tensor]
    cost: Callable[[Problem, int], tuple[int, int, int]]  # (problem, block) -> macs, bytes moved, largest bytes
    why_not: Callable[[Problem], str | None]
    chunked: bool
    builds: str


def _itemsize(p: Problem) -> int:
    return max(p.dtype.itemsize, 4) if p.dtype == torch.float16 else p.dtype.itemsize  # fp16 is computed in float32


def _ends(p: Problem) -> int:
    """Numbers read and written whatever the strategy: q, V, the table, y."""
    weights = math.prod(p.table) * p.k * p.u if p.table else p.n * p.m * p.k * p.u
    return p.b * p.n * p.h * (p.k + p.v) + p.b * p.m * p.v * p.u + weights


def _cost_lambdas(p: Problem, block: int) -> tuple[int, int, int]:
    macs = p.b * p.n * p.m * p.k * p.v * p.u + p.b * p.n * p.h * p.k * p.v
    expanded, lam = p.m * p.k * p.u, p.b * p.k * p.v  # a query
    moved = 2 * p.n * (expanded + 2 * lam) + _ends(p)
    return macs, moved * _itemsize(p), max(expanded, lam) * block * _itemsize(p)


def _cost_scores(p: Problem, block: int) -> tuple[int, int, int]:
    macs = p.b * p.h * p.n * p.m * p.u * (p.k + p.v)
    expanded, s = p.m * p.k * p.u, p.b * p.h * p.m * p.u
    moved = 2 * p.n * (expanded + 2 * s) + _ends(p)
    return macs, moved * _itemsize(p), max(expanded, s) * block * _itemsize(p)


def _cost_conv(p: Problem, block: int) -> tuple[int, int, int]:
    macs = p.b * p.n * p.window * p.k * p.v * p.u + p.b * p.n * p.h * p.k * p.v
    lam = p.b * p.n * p.k * p.v
    return macs, (4 * lam + _ends(p)) * _itemsize(p), lam * _itemsize(p)


def _lambdas_why_not(p: Problem) -> str | None:
    if p.mask == "examples":
        return f"a mask that differs by example would need {p.b} expanded tables; scores applies it to s instead"
    return None


def _conv_why_not(p: Problem) -> str | None:
    if p.table is None:
        return "it needs a relative table on a grid, and got " + ("embeddings" if p.embeddings else "no positions")
    if p.grid != p.context_grid:
        return f"the query grid {p.grid} and the context grid {p.context_grid} differ"
    if p.mask is not None:
        return "a mask by query cannot be written as one kernel"
    return None


def _always(p: Problem) -> str | None:
    return None


STRATEGIES: dict[str, Strategy] = {
    "lambdas": Strategy(eager.lambdas, _cost_lambdas, _lambdas_why_not, False, "E (n,m,k,u), λ (b,n,k,v)"),
    "scores": Strategy(eager.scores, _cost_scores, _always, False, "E (n,m,k,u), s (b,h,n,m,u)"),
    "conv": Strategy(eager.conv, _cost_conv, _conv_why_not, False, "λ (b,n,k,v)"),
    "lambdas_chunked": Strategy(eager.lambdas, _cost_lambdas, _lambdas_why_not, True, "a block of E and of λ"),
    "scores_chunked": Strategy(eager.scores, _cost_scores, _always, True, "a block of E and of s"),
}


# --- the plan -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rates:
    """What turns a cost into seconds: fitted to measurements, for ranking only.

    macs, bytes  a second, for each order: they run different routines
    far          how much slower bytes are when the largest intermediate leaves the cache
    block_s      a block's overhead
    """

    macs: dict[str, float]
    bytes: dict[str, float]
    far: float
    block_s: float


def _rates(macs: tuple[float, ...], moved: tuple[float, ...], far: float, block_s: float) -> _Rates:
    orders = ("lambdas", "scores", "conv")
    return _Rates(dict(zip(orders, macs, strict=True)), dict(zip(orders, moved, strict=True)), far, block_s)


# Keys: device, two-byte numbers or not, training or not. "cpu" is the least-squares fit of LOG.md, 2026-11-22, to every
# strategy on 11 shapes (one thread: the ranking is what matters). "cuda" is a guess from data sheets, not measured yet.
_RATES = {
    ("cpu", False, False): _rates((6.7e10, 1e12, 2.1e11), (3.9e10, 1.3e10, 1e10), 1.8, 2.1e-4),
    ("cpu", False, True): _rates((1.5e10, 2.2e10, 7.2e9), (6e9, 3.3e9, 2.4e9), 2.4, 2.3e-4),
    ("cpu", True, False): _rates((6.2e11, 1e12, 3.5e11), (1.4e10, 1.5e10, 4.7e9), 1.5, 2.8e-4),
    ("cpu", True, True): _rates((4.2e10, 1e12, 2.4e10), (4.6e9, 2.2e9, 1.4e9), 2.0, 8.7e-4),
    ("cuda", False, False): _rates((2e13, 1e13, 1e13), (4e12, 4e12, 4e12), 1.5, 2e-5),
    ("cuda", False, True): _rates((7e12, 3e12, 3e12), (1e12, 1e12, 1e12), 1.5, 6e-5),
    ("cuda", True, False): _rates((2e14, 5e13, 5e13), (4e12, 4e12, 4e12), 1.5, 2e-5),
    ("cuda", True, True): _rates((7e13, 2e13, 2e13), (1e12, 1e12, 1e12), 1.5, 6e-5),
}
_CACHE_BYTES = {"cpu": 16 << 20, "cuda": 32 << 20}
_BLOCK_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}


class Plan:
    """The strategies for one problem, best first, then those that cannot run. `print` it; `plan[0]` is what runs."""

    def __init__(self, problem: Problem, costs: list[Cost]) -> None:
        self.problem, self.costs = problem, costs

    def __getitem__(self, index: int) -> Cost:
        return self.costs[index]

    def __iter__(self) -> Iterator[Cost]:
        return iter(self.costs)

    def __len__(self) -> int:
        return len(self.costs)

    def __str__(self) -> str:
        p = self.problem
        where = f"grid {p.grid}, table {p.table}" if p.table else "embeddings" if p.embeddings else "no positions"
        lines = [
            f"b={p.b} n={p.n} m={p.m} h={p.h} k={p.k} v={p.v} u={p.u}, {where}, {str(p.dtype)[6:]} on {p.device}",
            f"{'strategy':<16} {'GMACs':>9} {'MB moved':>9} {'largest MB':>10} {'block':>6} {'est. ms':>8}"
            "  builds, or why not",
        ]
        for c in self.costs:
            lines.append(
                f"{c.strategy:<16} {c.macs / 1e9:9.3f} {c.bytes_moved / 1e6:9.1f} {c.largest_bytes / 1e6:10.2f} "
                f"{c.block:6d} {c.seconds * 1e3:8.2f}  {c.why_not or STRATEGIES[c.strategy].builds}"
            )
        return "\n".join(lines)


def plan(problem: Problem, *, memory_limit_bytes: int | None = None) -> Plan:
    """Price every strategy from sizes alone, without allocating; the first row is what "auto" runs.

    memory_limit_bytes  no intermediate may be larger; chunked strategies cut their blocks to fit

    >>> p = Problem(b=8, n=196, m=196, h=4, k=16, v=64, grid=(14, 14), context_grid=(14, 14), table=(23, 23))
    >>> plan(p)[0].strategy
    'scores'
    >>> p.paper_macs == 8 * 196 * (196 * 16 * 64) + 8 * 196 * 16 * 64 + 8 * 196 * 4 * 16 * 64
    True
    """
    return _plan(problem, memory_limit_bytes)


def _price(p: Problem, name: str, limit: int | None) -> Cost:
    row = STRATEGIES[name]
    why_not = row.why_not(p)
    if p.table is None and not p.embeddings:  # content only: every strategy does the same, nothing
        return Cost(name, 0, 0, 0, 0.0, p.n, why_not)
    device = p.device if p.device in _BLOCK_BYTES else "cuda"
    block = max(1, p.n)
    if row.chunked:
        budget = _BLOCK_BYTES[device] if limit is None else min(limit, _BLOCK_BYTES[device])
        one = row.cost(p, 1)[2]
        block = max(1, min(block, budget // max(1, one)))
    macs, moved, largest = row.cost(p, block)
    if why_not is None and limit is not None and largest > limit:
        why_not = f"its largest intermediate needs {largest:,} bytes, over the limit of {limit:,}"
    rates = _RATES[device, _itemsize(p) < 4, p.training]
    order = name.removesuffix("_chunked")
    blocks = max(1, p.n // block) if row.chunked else 1
    far = 1.0 if largest <= _CACHE_BYTES[device] else rates.far
    seconds = macs / rates.macs[order] + moved / rates.bytes[order] * far + rates.block_s * blocks
    return Cost(name, macs, moved, largest, seconds, block, why_not)


@lru_cache(maxsize=4096)
def _plan(p: Problem, limit: int | None) -> Plan:
    costs = [_price(p, name, limit) for name in STRATEGIES]
    return Plan(p, sorted(costs, key=lambda c: (c.why_not is not None, c.seconds)))


def _choose(p: Problem, strategy: str, limit: int | None) -> Cost:
    if strategy != "auto":
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy {strategy!r} is not one of auto, {', '.join(STRATEGIES)}")
        best = _price(p, strategy, limit)
    elif not torch.compiler.is_compiling():
        best = _plan(p, limit)[0]
    else:  # traced once; a compiler can follow comparisons of symbolic sizes but neither the cache nor a sort
        if torch.compiler.is_exporting():
            p = replace(p, b=8)  # an exported graph serves any batch: its choice may not depend on this one
        best = _price(p, "lambdas", limit)
        for name in STRATEGIES:
            cost = _price(p, name, limit)
            if cost.why_not is None and (best.why_not is not None or cost.seconds < best.seconds):
                best = cost
    if best.why_not is not None:
        what = "no strategy" if strategy == "auto" else f"strategy {strategy!r}"
        raise ValueError(f"{what} can run this problem: {best.why_not}\n{_plan(p, limit)}")
    return best


# --- the operation ------------------------------------------------------------------------------------------------


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
    strategy            "auto" takes the first row of `plan`; a name from STRATEGIES forces that one, or raises
    memory_limit_bytes  no intermediate of the position part may be larger
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
    device = q.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)  # there is no autocast on meta
    if autocast:
        dtype = torch.get_autocast_dtype(device)
        q, values = q.to(dtype), values.to(dtype)
        keys, table, embeddings = (None if t is None else t.to(dtype) for t in (keys, table, embeddings))
    problem = _problem(q, keys, values, table, embeddings, grid, context_grid, mask, causal)
    if key_norm not in KEY_NORMS:
        raise ValueError(f"key_norm {key_norm!r} is not one of {', '.join(KEY_NORMS)}")
    cost = _choose(problem, strategy, memory_limit_bytes)
    result = q.dtype
    if result == torch.float16:  # a partial sum may overflow where the result does not
        q, values = q.float(), values.float()
        keys, table, embeddings = (None if t is None else t.float() for t in (keys, table, embeddings))
    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        y = _evaluate(problem, cost, q, keys, values, table, embeddings, mask, key_norm)
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
) -> Tensor:
    padding = None  # (1 or b, 1, m): what every query sees
    if mask is not None:
        mask = mask if mask.dim() == 3 else mask[None]
        seen = mask.any(1)[..., None, None]  # (1 or b, m, 1, 1)
        values = torch.where(seen, values, 0)
        keys = None if keys is None else torch.where(seen, keys, 0)
        if p.mask is None:
            padding, mask = mask, None
    y = None
    if keys is not None:
        if mask is not None:
            both = mask & _lower(p.n, mask.device) if p.causal else mask
            per_query = max(1, p.b * p.m * max(p.k, p.h) * p.u * 4)
            block = max(1, min(p.n, _BLOCK_BYTES.get(p.device, 8 << 20) // per_query))
            y = eager.content_masked(q, keys, values, key_norm, both, block)
        elif p.causal:
            if padding is not None and key_norm == "softmax":  # the values are zero there: no weight can matter
                keys = torch.where(padding[:, 0, :, None, None], keys, torch.finfo(keys.dtype).min)
            y = eager.content_causal(q, keys, values, key_norm)
        else:
            y = eager.content(q, keys, values, key_norm, padding)
    if table is not None or embeddings is not None:
        if p.causal and table is not None:
            future = torch.arange(table.shape[0], device=table.device) > table.shape[0] // 2
            table = torch.where(future[:, None, None], 0, table)
        elif p.causal and embeddings is not None:
            embeddings = torch.where(_lower(p.n, q.device)[..., None, None], embeddings, 0)
        position = eager.Position(q, values, table, embeddings, p.grid or (p.n,), p.context_grid or (p.m,), mask)
        at = STRATEGIES[cost.strategy].run(position, cost.block)
        y = at if y is None else y + at
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
    b, n, h, k = q.shape
    m, v, u = values.shape[1:]
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
        for name, sizes, letter, count in (("grid", grid, "n", n), ("context_grid", context_grid, "m", m)):
            if not sizes or min(sizes) < 1 or math.prod(sizes) != count:
                raise ValueError(f"{name} {sizes} has {math.prod(sizes)} positions and {letter} is {count}")
        if len(grid) != len(context_grid) or len(grid) > 3:
            raise ValueError(f"grid {grid} and context_grid {context_grid} must have the same 1, 2 or 3 axes")
    elif context_grid is not None:
        raise ValueError(f"context_grid {tuple(context_grid)} was given without grid")
    sides = None
    if table is not None:
        if grid is None:
            raise ValueError("a relative table needs grid=(H, W), the sizes that n runs over")
        sides = tuple(table.shape[: len(grid)])
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
