"""Sizes in, orders out: what each order of STRATEGIES costs on a problem (`plan`), and which runs (`choose_order`)."""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import torch

from lambdanets.ops import convolution
from lambdanets.ops.problem import Cost, Problem, exporting, itemsize_of, reachable_offsets
from lambdanets.ops.strategies import RATES, STRATEGIES

try:
    from torch.fx.experimental.symbolic_shapes import optimization_hint
except ImportError:  # an older torch: its compiler then follows the prices
    optimization_hint = None  # type: ignore[assignment]


# From here on the CPU's convolution runs at about a tenth of its speed (LOG.md, 2026-11-22 (2)); a GPU's: a guess.
_LARGE_KERNEL = 60
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
    rates = RATES[device, itemsize_of(p) < 4, p.training]
    order = name.removesuffix("_chunked")
    blocks = max(1, p.n // block) if row.chunked else 1
    rate = rates.of(name).macs
    if order == "conv" and p.table is not None and p.grid is not None:
        rate = rate / 10 if max(reachable_offsets(p.table, p.grid)) > _LARGE_KERNEL else rate
        if device == "cpu" and p.training and itemsize_of(p) < 4 and p.n > convolution.SMALL_MAP:
            rate = rate / 2  # the table's gradient has another route
    far = 1.0 if largest <= _CACHE_BYTES[device] else rates.far
    seconds = macs / rate + moved / rates.of(name).bytes * far + rates.block_s * blocks
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
    if exporting() or torch.jit.is_tracing():
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


def choose_order(p: Problem, strategy: str, limit: int | None) -> Cost:
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
