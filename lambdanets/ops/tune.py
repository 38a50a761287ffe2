"""`strategy="tuned"`: measure instead of predict, once for each problem, and remember.

The plan's prices are fitted to one machine. On another, or where two strategies are priced close together, a stopwatch
knows better: the first call of each problem takes as long as some twenty calls, every later one asks a dictionary.
"""

import time

import torch
from torch import Tensor

from lambdanets.ops.planner import plan, where
from lambdanets.ops.problem import Position, Problem
from lambdanets.ops.strategies import STRATEGIES

TUNED: dict[tuple[Problem, int | None, int], str] = {}  # (problem, memory limit, threads) -> strategy
_HOPELESS = 4  # a strategy priced at this many times the best is not tried: the plan's rms error is a factor of 1.3
_REPEATS = 3


def tuned(problem: Problem, memory_limit_bytes: int | None = None) -> str:
    """The strategy that ran fastest here on random numbers of this problem, with the backward pass if it has one.

    Measures on the first call in this process (forget with `TUNED.clear()`); the caller's random numbers stay as they
    are. Returns a name of STRATEGIES. Raises ValueError, with the plan, where none can run.
    """
    key = (problem, memory_limit_bytes, torch.get_num_threads())
    if key not in TUNED:
        TUNED[key] = _measure(problem, memory_limit_bytes)
    return TUNED[key]


def _measure(p: Problem, limit: int | None) -> str:
    rows = plan(p, memory_limit_bytes=limit)
    if rows[0].why_not is not None:
        raise ValueError(f"no strategy can run this problem: {rows[0].why_not}\n{rows}")
    usable = [c for c in rows if c.why_not is None and where(p) in STRATEGIES[c.strategy].automatic]
    usable = [c for c in usable if c.seconds <= _HOPELESS * rows[0].seconds]
    if len(usable) < 2 or (p.table is None and not p.embeddings):
        return rows[0].strategy
    times = {c.strategy: float("inf") for c in usable}
    with torch.inference_mode(False), torch.set_grad_enabled(p.training), torch.autocast(p.device, enabled=False):
        position = random_position(p)
        for turn in range(_REPEATS + 1):  # interleaved; the first turn warms up
            for cost in usable:
                seconds = _seconds(position, cost.strategy, cost.block, p)
                times[cost.strategy] = min(times[cost.strategy], seconds if turn else float("inf"))
    return min(times, key=lambda name: times[name])


def random_position(p: Problem) -> Position:
    """Random numbers of a problem, the same at every call; q and V lie as in a layer, positions side by side."""
    generator = torch.Generator(p.device).manual_seed(0)
    dtype = torch.float32 if p.dtype == torch.float16 else p.dtype  # as `lambda_op` computes it

    def normal(*size: int, positions_last: bool = False) -> Tensor:
        lies = (size[0], *size[2:], size[1]) if positions_last else size
        x = torch.randn(lies, generator=generator, device=p.device, dtype=torch.float32).to(dtype)
        return (x.movedim(-1, 1) if positions_last else x).requires_grad_(p.training)

    table = normal(*p.table, p.k, p.u) if p.table is not None else None
    embeddings = normal(p.n, p.m, p.k, p.u) if p.embeddings else None
    mask = None
    if p.mask is not None:
        mask = torch.ones(1 if p.mask == "queries" else p.b, p.n, p.m, dtype=torch.bool, device=p.device)
    return Position(
        normal(p.b, p.n, p.h, p.k, positions_last=True), normal(p.b, p.m, p.v, p.u, positions_last=True), table,
        embeddings, p.grid or (p.n,), p.context_grid or (p.m,), mask, normal(p.b, p.k, p.v) if p.content else None,
    )  # fmt: skip


def _seconds(position: Position, strategy: str, block: int, p: Problem) -> float:
    _wait(p)
    start = time.perf_counter()
    run_once(position, strategy, block, p)
    _wait(p)
    return time.perf_counter() - start


def run_once(position: Position, strategy: str, block: int, p: Problem) -> None:
    """The position part and q·λc, with the backward pass if the problem has one."""
    y = STRATEGIES[strategy].run(position, block)
    if p.training:
        inputs = [x for x in position if isinstance(x, Tensor) and x.requires_grad]
        torch.autograd.grad(y, inputs, torch.ones_like(y))


def _wait(p: Problem) -> None:
    if p.device == "cuda":
        torch.cuda.synchronize()
