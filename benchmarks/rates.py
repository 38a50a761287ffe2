"""Measures the position part in every order of evaluation and fits the plan's rates to it (`strategies.RATES`).

    python -m benchmarks.rates --out FILE                        this machine's CPU, float32 and bfloat16: ten minutes
    python -m benchmarks.rates --device cuda --batch 16 --out FILE    16 times the batch
    python -m benchmarks.rates --fit FILE [FILE ...]             fit again, to one or several machines together

Times are medians of interleaved runs. A strategy that needs over --memory-gb at once, longer than --limit-s a run, or
20 times as long as the fastest, or is priced at that, is left out. The fit is least squares of the logarithms of the
plan's own prices, and a walk from there to what chooses best. What it prints goes into RATES, with how often the plan
would then take a strategy within 15% of the fastest, and how often it does so today, on the same measurements.
"""

import argparse
import json
import math
import statistics
import sys
from contextlib import AbstractContextManager
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from scipy.optimize import least_squares

from benchmarks.op import BUDGET_BYTES, measure, seconds, start
from benchmarks.peers import reason
from lambdanets.ops import planner
from lambdanets.ops.planner import plan, where
from lambdanets.ops.problem import Problem, itemsize_of
from lambdanets.ops.strategies import RATES, STRATEGIES, Rate, Rates
from lambdanets.ops.tune import random_position, run_once

SHAPES = [  # side, scope (None: global), v, batch
    (7, 23, 128, 8), (7, 7, 128, 8), (14, 23, 64, 8), (14, 7, 64, 8), (14, None, 64, 8), (20, 23, 32, 8),
    (28, 23, 32, 8), (28, 23, 32, 2), (28, 7, 32, 8), (28, None, 32, 8), (40, 15, 32, 4), (56, 23, 16, 8),
    (56, 23, 16, 2), (56, 7, 16, 8), (64, 23, 64, 2), (64, None, 64, 2), (100, 11, 16, 2),
]  # fmt: skip
FAR = 20  # a strategy that is priced at, or takes, so many times the fastest's time says nothing about choices
ORDERS = tuple(field.name for field in fields(Rates) if field.name not in ("far", "block_s"))


def problem(shape: tuple[int, int | None, int, int], dtype: torch.dtype, training: bool, device: str) -> Problem:
    side, scope, v, b = shape
    table = (scope or 2 * side - 1,) * 2
    return Problem(
        b, side**2, side**2, 4, 16, v, grid=(side, side), context_grid=(side, side), table=table, training=training,
        dtype=dtype, device=device,
    )  # fmt: skip


def measured(p: Problem, budget_s: float, limit_s: float, memory_bytes: int) -> dict[str, float]:
    """Seconds of the position part and q·λc, by strategy."""
    position, calls, best_s = random_position(p), {}, math.inf
    costs = [c for c in plan(p) if c.why_not is None]
    with torch.set_grad_enabled(p.training):
        for cost in costs:
            if cost.largest_bytes * (3 if p.training else 1) > memory_bytes or cost.seconds > FAR * costs[0].seconds:
                continue
            call = partial(run_once, position, cost.strategy, cost.block, p)
            try:
                seconds(call, p.device)  # the first run looks for routines
                took = seconds(call, p.device)
            except (RuntimeError, torch.OutOfMemoryError) as error:  # a GPU's library, or too little memory
                print(f"{cost.strategy} is left out: {reason(error)}", file=sys.stderr)
                continue
            best_s = min(best_s, took)
            if took < min(limit_s, FAR * best_s):
                calls[cost.strategy] = call
        return {name: statistics.median(t) for name, t in measure(calls, p.device, budget_s).items()}


def rows(args: argparse.Namespace, about: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    memory_bytes = int(args.memory_gb * 2**30) if args.memory_gb else BUDGET_BYTES[args.device]
    for name in args.dtype:
        for shape in SHAPES[:2] if args.quick else SHAPES:
            for training in (False, True):
                p = problem((*shape[:3], shape[3] * args.batch), getattr(torch, name), training, args.device)
                ms = {s: round(1e3 * t, 4) for s, t in measured(p, args.budget_s, args.limit_s, memory_bytes).items()}
                found.append({"problem": {**asdict(p), "dtype": name}, "ms": ms})
                passes = "fwd+bwd" if training else "fwd"
                times = "  ".join(f"{s} {t:.2f}" for s, t in ms.items())
                print(f"{shape[0]}² r={shape[1]} b={p.b} {name} {passes}: {plan(p)[0].strategy} | {times}", flush=True)
                if args.out:  # what an interrupted run has measured is kept
                    args.out.write_text(json.dumps({"machine": about, "rows": found}) + "\n")
    return found


def restored(fields: dict[str, Any]) -> Problem:
    lists = {name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()}
    return Problem(**{**lists, "dtype": getattr(torch, fields["dtype"])})


def vector(rates: Rates) -> np.ndarray:
    orders = [rates.of(order) for order in ORDERS]
    return np.log([*(rate.macs for rate in orders), *(rate.bytes for rate in orders), rates.far, rates.block_s])


def rates_of(x: np.ndarray, digits: int = 12) -> Rates:
    n = len(ORDERS)
    values = [float(f"{v:.{digits}g}") for v in np.exp(x)]
    orders = {name: Rate(*pair) for name, *pair in zip(ORDERS, values[:n], values[n : 2 * n], strict=True)}
    return Rates(**orders, far=values[-2], block_s=values[-1])


Key = tuple[str, bool, bool]
Group = list[tuple[Problem, dict[str, float]]]


def with_rates(key: Key, rates: Rates) -> AbstractContextManager[Any]:
    return patch.dict(RATES, {key: rates})


def fit(key: Key, group: Group) -> Any:
    """The rates near to what was measured that choose best: today's where nothing speaks, at most 1,000 times off."""
    today = vector(RATES[key])

    def errors(x: np.ndarray) -> np.ndarray:
        with with_rates(key, rates_of(x)):
            off = [math.log(planner._price(p, s, None).seconds / t) for p, ts in group for s, t in ts.items()]
        return np.concatenate([off, 0.02 * (x - today)])

    low, high = today - math.log(1000), today + math.log(1000)
    low[-2] = 0.0  # memory is not faster than the cache
    start_at = np.clip(today, low + 1e-6, high - 1e-6)
    nearest = least_squares(errors, start_at, bounds=(low, high), loss="soft_l1").x

    def lost(x: np.ndarray) -> float:
        return float(np.log(choices(key, rates_of(x, digits=2), group)).mean() + 0.002 * ((x - nearest) ** 2).sum())

    # The nearest prices are not the best choices: a walk around them, the same every time.
    draw, best = np.random.default_rng(0), nearest
    least = lost(best)
    for _ in range(2000):
        tried = best + draw.normal(0, 0.15, len(best)) * (draw.random(len(best)) < 0.3)
        tried[-2] = max(0.0, tried[-2])
        if (now := lost(tried)) < least:
            best, least = tried, now
    return rates_of(best, digits=2)


def choices(key: Key, rates: Rates, group: Group) -> list[float]:
    """The time of what the plan takes over that of the fastest, problem by problem."""
    found = []
    with with_rates(key, rates):
        for p, times in group:
            allowed = [s for s in times if where(p) in STRATEGIES[s].automatic]
            takes = min(allowed, key=lambda s: planner._price(p, s, None).seconds)
            found.append(times[takes] / min(times[s] for s in allowed))
    return found


def report(measurements: list[dict[str, Any]]) -> None:
    groups: dict[Key, Group] = {}
    for row in measurements:
        p = restored(row["problem"])
        key = where(p), itemsize_of(p) < 4, p.training
        groups.setdefault(key, []).append((p, {s: t / 1e3 for s, t in row["ms"].items()}))
    for key, group in groups.items():
        rates = fit(key, group)
        print(f"    {key}: {rates},")
        for name, what in (("fitted", rates), ("today", RATES[key])):
            off = choices(key, what, group)
            within = sum(x <= 1.15 for x in off)
            print(f"      {name}: within 15% of the fastest in {within} of {len(off)}, worst {max(off):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=1, help="times each shape's own")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget-s", type=float, default=0.3, help="seconds of running for each strategy and problem")
    parser.add_argument("--limit-s", type=float, default=2.0, help="a strategy that takes longer is left out")
    parser.add_argument("--memory-gb", type=float, default=None, help="what may be allocated at once: 6, on a GPU 40")
    parser.add_argument("--quick", action="store_true", help="two shapes, for a look")
    parser.add_argument("--fit", nargs="+", type=Path, default=None, metavar="FILE", help="measure nothing")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    if args.fit:
        report([row for path in args.fit for row in json.loads(path.read_text())["rows"]])
        return
    about = start(args.device, args.threads)
    report(rows(args, about))


if __name__ == "__main__":
    main()
