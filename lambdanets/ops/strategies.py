"""Sizes in, strategies out: what each exact order of evaluation costs on a problem, and which one to run.

The letters are the paper's: b batch, n queries, m context, h queries per position (heads), k key depth, v value depth,
u intra-depth, r scope. The content part is always q·(K̄ᵀV); the strategies differ in the position part.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

try:
    from torch.fx.experimental.symbolic_shapes import optimization_hint
except ImportError:  # an older torch: its compiler then follows the prices
    optimization_hint = None  # type: ignore[assignment]

from . import convolution, eager, fourier, fused


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
        return math.prod(convolution.cut(self.table, self.grid))

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

    `run` evaluates the position part and q·λc a block of queries at a time, `cost` gives (multiply-adds, bytes moved,
    largest bytes) for a block, `why_not` says why a problem cannot run, `builds` names the intermediates for the
    plan's printout.
    """

    run: Callable[[eager.Position, int], Tensor]
    cost: Callable[[Problem, int], tuple[int, int, int]]  # (problem, block) -> macs, bytes moved, largest bytes
    why_not: Callable[[Problem], str | None]
    chunked: bool
    builds: str
    automatic: tuple[str, ...] = ("cpu", "cuda", "export")  # where "auto" may take it


def _itemsize(p: Problem) -> int:
    return max(p.dtype.itemsize, 4) if p.dtype == torch.float16 else p.dtype.itemsize  # fp16 is computed in float32


def _ends(p: Problem) -> int:
    """Numbers read and written whatever the strategy: q, V, the table, y."""
    weights = math.prod(p.table) * p.k * p.u if p.table else p.n * p.m * p.k * p.u
    return p.b * p.n * p.h * (p.k + p.v) + p.b * p.m * p.v * p.u + weights


def _reached(p: Problem, block: int) -> int:
    """Contexts that a block of whole rows reaches, on average over the blocks: the window clipped to the map."""
    if p.table is None or p.grid is None or p.context_grid is None:
        return p.m
    side = p.context_grid[0]
    half = min((p.table[0] - 1) // 2, side)
    rows = max(1, block // max(1, p.n // p.grid[0]))
    seen = rows + 2 * half - half * (half + rows) // side  # less what lies over the two borders
    return min(side, seen) * (p.m // side)


def _by_rows(p: Problem, block: int) -> bool:
    """Whether the blocks are rows of the grid or parts of rows, which share one copy of their E (blocks.Blocks)."""
    return p.table is not None and p.grid is not None and len(p.grid) > 1 and block <= p.n // p.grid[0] < p.n


def _expanded(p: Problem, block: int) -> tuple[int, int]:
    """Numbers of E a query: moved, and held at once."""
    whole = _reached(p, block) * p.k * p.u
    if not _by_rows(p, block):
        return whole, whole
    assert p.table is not None
    assert p.grid is not None
    assert p.context_grid is not None
    held = min(p.table[0], p.grid[0] + p.context_grid[0] - 1) * (p.m // p.context_grid[0]) * p.k * p.u
    return whole if p.training else held // p.grid[0], held  # the gradient of E has a copy a block


def _cost_lambdas(p: Problem, block: int) -> tuple[int, int, int]:
    m = _reached(p, block)
    macs = p.b * p.n * m * p.k * p.v * p.u + p.b * p.n * p.h * p.k * p.v
    (expanded, held), lam = _expanded(p, block), p.b * p.k * p.v  # a query
    moved = 2 * p.n * (expanded + 2 * lam) + _ends(p)
    return macs, moved * _itemsize(p), max(held, lam) * block * _itemsize(p)


def _cost_scores(p: Problem, block: int) -> tuple[int, int, int]:
    m = _reached(p, block)
    macs = p.b * p.h * p.n * m * p.u * (p.k + p.v)
    (expanded, held), s = _expanded(p, block), p.b * p.h * m * p.u
    moved = 2 * p.n * (expanded + 2 * s) + _ends(p)
    return macs, moved * _itemsize(p), max(held, s) * block * _itemsize(p)


def _cost_conv(p: Problem, block: int) -> tuple[int, int, int]:
    macs = p.b * p.n * p.window * p.k * p.v * p.u + p.b * p.n * p.h * p.k * p.v
    lam = p.n * p.k * p.v
    at_once = convolution.examples(p.b, lam * _itemsize(p)) if p.device == "cpu" and len(p.grid or ()) == 2 else p.b
    return macs, (4 * p.b * lam + _ends(p)) * _itemsize(p), at_once * lam * _itemsize(p)


def _cost_fourier(p: Problem, block: int) -> tuple[int, int, int]:
    if p.table is None or p.grid is None or len(p.grid) != 2:
        return 0, 0, 0
    size = max(4, p.dtype.itemsize)  # 16 bits are computed in float32
    (H, _), (r_y, r_x) = p.grid, convolution.cut(p.table, p.grid)
    f = fourier.frame(p.k, p.u, p.grid, p.table, size)
    # Of rows: a block's own and those that it reads.
    pairs = sum((last - first) * (stop - start) for first, last, start, stop in fourier.blocks(H, r_y, f.rows))
    columns, lam = p.b * f.tiles * p.v, H * f.width * p.k  # λ's, for each of the columns
    macs = columns * f.numbers * (H * f.read * p.u + 2 * pairs * p.k * p.u + H * f.width * p.k)
    macs += p.k * p.u * r_y * r_x * f.numbers + columns * H * f.width * p.h * p.k
    toeplitz = 2 * f.numbers * f.rows * p.k * (f.rows + r_y - 1) * p.u
    X, Z = H * p.u * f.numbers, f.numbers * p.k  # for each of the columns; of one row
    moved = 2 * columns * (2 * X + H * Z + 2 * lam) + toeplitz * (2 + H // f.rows)
    at_once = convolution.examples(p.b * f.tiles, f.rows * f.width * p.k * p.v * size) * p.v
    return macs, moved * size + _ends(p) * p.dtype.itemsize, max(toeplitz, at_once * max(X, f.rows * Z)) * size


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


def _fourier_why_not(p: Problem) -> str | None:
    if p.table is not None and len(p.grid or ()) != 2:
        return f"it transforms the rows of a map (H, W), and got the grid {p.grid}"
    return _conv_why_not(p)


def _fused(p: eager.Position, block: int) -> Tensor:
    assert p.table is not None
    return fused.fused(p.q, p.values, p.table, p.lam_c, p.grid)


def _cost_fused(p: Problem, block: int) -> tuple[int, int, int]:
    macs = p.b * p.n * p.window * p.k * p.v * p.u + p.b * p.n * p.h * p.k * p.v
    return macs, _ends(p) * p.dtype.itemsize, 0


def _always(p: Problem) -> str | None:
    return None


STRATEGIES: dict[str, Strategy] = {
    "lambdas": Strategy(eager.lambdas, _cost_lambdas, _lambdas_why_not, False, "E (n,m,k,u), λ (b,n,k,v)"),
    "scores": Strategy(eager.scores, _cost_scores, _always, False, "E (n,m,k,u), s (b,h,n,m,u)"),
    "conv": Strategy(convolution.conv, _cost_conv, _conv_why_not, False, "some examples' λ (n,k,v)"),
    # On a GPU by name: never timed there. An export has a convolution, one node for a hundred.
    "fourier": Strategy(
        fourier.fourier, _cost_fourier, _fourier_why_not, False, "some rows' frequencies and λ (rows,W,k,v)", ("cpu",)
    ),
    "lambdas_chunked": Strategy(eager.lambdas, _cost_lambdas, _lambdas_why_not, True, "a block of E and of λ"),
    "scores_chunked": Strategy(eager.scores, _cost_scores, _always, True, "a block of E and of s"),
    # By name only: its kernels have run in Triton's interpreter and compiled for sm_90, never yet on a GPU.
    "fused": Strategy(_fused, _cost_fused, fused.why_not, False, "nothing", automatic=()),
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
    orders = ("lambdas", "scores", "conv", "fourier", "fused")
    return _Rates(dict(zip(orders, macs, strict=True)), dict(zip(orders, moved, strict=True)), far, block_s)


# From here on the CPU's convolution runs at about a tenth of its speed (LOG.md, 2026-11-22 (2)); a GPU's: a guess.
_LARGE_KERNEL = 60
# Keys: device, two-byte numbers or not, training or not. "cpu" is the least-squares fit of LOG.md, 2026-11-23 (2), to
# every strategy on 17 shapes, on a Xeon with AMX (two threads: the ranking is what matters), fourier in training from
# 2026-11-26 (3); an EPYC without AMX is ranked as well by it. "cuda" is a guess from data sheets, not measured yet.
_RATES = {
    ("cpu", False, False): _rates(
        (2.1e11, 1.4e11, 4.7e11, 2.3e11, 1e6), (3.8e10, 8.2e10, 2e10, 3.1e10, 1e9), 3.2, 2e-4
    ),
    ("cpu", False, True): _rates((4.6e10, 4.9e10, 3e10, 3.4e10, 1e6), (1e10, 1.5e10, 5.3e9, 8.6e9, 1e9), 3.0, 5.3e-4),
    ("cpu", True, False): _rates((1e12, 6.4e11, 6.6e11, 1.8e11, 1e6), (3.6e10, 3.4e10, 1.8e10, 3.2e10, 1e9), 2.4, 2e-4),
    ("cpu", True, True): _rates((2e11, 8.6e11, 1.25e11, 4.2e10, 1e6), (5.5e9, 6.4e9, 3.6e9, 1.1e10, 1e9), 2.1, 9e-4),
    ("cuda", False, False): _rates((2e13, 1e13, 1e13, 1e13, 2e13), (4e12, 4e12, 4e12, 4e12, 4e12), 1.5, 2e-5),
    ("cuda", False, True): _rates((7e12, 3e12, 3e12, 3e12, 6e12), (1e12, 1e12, 1e12, 1e12, 1e12), 1.5, 6e-5),
    ("cuda", True, False): _rates((2e14, 5e13, 5e13, 1e13, 2e14), (4e12, 4e12, 4e12, 4e12, 4e12), 1.5, 2e-5),
    ("cuda", True, True): _rates((7e13, 2e13, 2e13, 3e12, 6e13), (1e12, 1e12, 1e12, 1e12, 1e12), 1.5, 6e-5),
}
_CACHE_BYTES = {"cpu": 16 << 20, "cuda": 32 << 20}
BLOCK_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}


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
        positions = f"grid {p.grid}, table {p.table}" if p.table else "embeddings" if p.embeddings else "no positions"
        lines = [
            f"b={p.b} n={p.n} m={p.m} h={p.h} k={p.k} v={p.v} u={p.u}, {positions}, {str(p.dtype)[6:]} on {p.device}",
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


def where(p: Problem) -> str:
    """Whose rates and limits count: what is neither a CPU nor a GPU is priced as a GPU."""
    return p.device if p.device in BLOCK_BYTES else "cuda"


def _price(p: Problem, name: str, limit: int | None) -> Cost:
    row = STRATEGIES[name]
    why_not = row.why_not(p)
    if p.table is None and not p.embeddings:  # content only: every strategy does the same, nothing
        return Cost(name, 0, 0, 0, 0.0, p.n, why_not)
    device = where(p)
    block = max(1, p.n)
    if row.chunked:
        budget = BLOCK_BYTES[device] if limit is None else min(limit, BLOCK_BYTES[device])
        block = max(1, min(block, budget // max(1, row.cost(p, p.n)[2] // max(1, p.n))))
        if limit is not None and row.cost(p, block)[2] > limit:  # rows hold more than their own E
            block = max(1, limit // max(1, row.cost(p, 1)[2]))
    macs, moved, largest = row.cost(p, block)
    if why_not is None and limit is not None and largest > limit:
        why_not = f"its largest intermediate needs {largest:,} bytes, over the limit of {limit:,}"
    rates = _RATES[device, _itemsize(p) < 4, p.training]
    order = name.removesuffix("_chunked")
    blocks = max(1, p.n // block) if row.chunked else 1
    rate = rates.macs[order]
    if order == "conv" and p.table is not None and p.grid is not None:
        rate = rate / 10 if max(convolution.cut(p.table, p.grid)) > _LARGE_KERNEL else rate
        if device == "cpu" and p.training and _itemsize(p) < 4 and p.n > convolution.SMALL_MAP:
            rate = rate / 2  # the table's gradient has another route
    far = 1.0 if largest <= _CACHE_BYTES[device] else rates.far
    seconds = macs / rate + moved / rates.bytes[order] * far + rates.block_s * blocks
    return Cost(name, macs, moved, largest, seconds, block, why_not)


@lru_cache(maxsize=4096)
def _plan(p: Problem, limit: int | None) -> Plan:
    costs = [_price(p, name, limit) for name in STRATEGIES]
    here = where(p)
    return Plan(
        p, sorted(costs, key=lambda c: (c.why_not is not None, here not in STRATEGIES[c.strategy].automatic, c.seconds))
    )


def _choose_once(p: Problem, limit: int | None) -> Cost:
    """The choice for a graph that is being compiled or exported, and may serve other sizes: of these sizes, without
    making the prices part of what the compiler proves of them, which took it half a minute. Every order is exact at
    any size; whether one can run is asked of the sizes themselves."""
    here, hinted = where(p), _hinted(p)
    if eager.exporting() or torch.jit.is_tracing():
        # The graph serves any batch; torch.jit.trace checks without gradients what it recorded with them.
        training = p.training and not torch.jit.is_tracing()
        here, hinted = "export", replace(hinted, b=8, training=training)
    best: Cost | None = None
    refused: Cost | None = None
    for name, row in STRATEGIES.items():
        if here not in row.automatic:
            continue
        cost = _price(hinted, name, limit)
        if cost.why_not is not None or row.why_not(p) is not None:
            refused = refused or replace(cost, why_not=cost.why_not or row.why_not(p))
        elif best is None or cost.seconds < best.seconds:
            best = cost if row.chunked else replace(cost, block=p.n)
    best = best or refused
    assert best is not None
    return best


def _hinted(p: Problem) -> Problem:
    """A problem of symbolic sizes with the sizes of the example that is compiled."""
    if optimization_hint is None or torch.jit.is_tracing():
        return p
    b, n, m = (optimization_hint(size) for size in (p.b, p.n, p.m))
    grids = [None if g is None else tuple([optimization_hint(size) for size in g]) for g in (p.grid, p.context_grid)]
    return replace(p, b=b, n=n, m=m, grid=grids[0], context_grid=grids[1])


def choose(p: Problem, strategy: str, limit: int | None) -> Cost:
    if strategy != "auto":
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy {strategy!r} is not one of auto, tuned, {', '.join(STRATEGIES)}")
        best = _price(p, strategy, limit)
    elif not torch.compiler.is_compiling() and not torch.jit.is_tracing():
        best = _plan(p, limit)[0]
    else:  # traced once; a compiler can follow comparisons of symbolic sizes but neither the cache nor a sort
        best = _choose_once(p, limit)
    if best.why_not is not None:
        what = "no strategy can" if strategy == "auto" else f"strategy {strategy!r} cannot"
        raise ValueError(f"{what} run this problem: {best.why_not}\n{_plan(p, limit)}")
    return best
