"""Measures the position part in every order of evaluation and fits the plan's rates to it (`strategies._RATES`).

    python -m benchmarks.rates --out FILE                        this machine's CPU, float32 and bfloat16: ten minutes
    python -m benchmarks.rates --device cuda --batch 16 --out FILE    16 times the batch
    python -m benchmarks.rates --fit FILE [FILE ...]             fit again, to one or several machines together

Times are medians of interleaved runs. A strategy that needs over --memory-gb at once, longer than --limit-s a run or 20
times as long as the fastest is left out. The fit is least squares of the logarithms, the price is the plan's own. What
it prints goes into _RATES, with how often the plan would then take a strategy within 15% of the fastest, and how often
it does so today, on the same measurements.
"""

import argparse
import json
import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from scipy.optimize import least_squares

from benchmarks.op import measure, start
from lambdanets.ops import STRATEGIES, Problem, plan, strategies
from lambdanets.ops.tune import _random, _seconds

SHAPES = [  # side, scope (None: global), v, batch
    (7, 23, 128, 8), (7, 7, 128, 8), (14, 23, 64, 8), (14, 7, 64, 8), (14, None, 64, 8), (20, 23, 32, 8),
    (28, 23, 32, 8), (28, 23, 32, 2), (28, 7, 32, 8), (28, None, 32, 8), (40, 15, 32, 4), (56, 23, 16, 8),
    (56, 23, 16, 2), (56, 7, 16, 8), (64, 23, 64, 2), (64, None, 64, 2), (100, 11, 16, 2),
]  # fmt: skip
ORDERS = tuple(strategies._RATES["cpu", False, False].macs)


def problem(shape: tuple[int, int | None, int, int], dtype: torch.dtype, training: bool, device: str) -> Problem:
    side, scope, v, b = shape
    table = (scope or 2 * side - 1,) * 2
    return Problem(
        b, side**2, side**2, 4, 16, v, grid=(side, side), context_grid=(side, side), table=table, training=training,
        dtype=dtype, device=device,
    )  # fmt: skip


def measured(p: Problem, budget_s: float, limit_s: float, memory_bytes: int) -> dict[str, float]:
    """Seconds of the position part and q·λc, by strategy."""
    position, calls, best_s = _random(p), {}, math.inf
    with torch.set_grad_enabled(p.training):
        for cost in plan(p):
            if cost.why_not or cost.largest_bytes * (3 if p.training else 1) > memory_bytes:
                continue

            def call(name: str = cost.strategy, block: int = cost.block) -> None:
                _seconds(position, name, block, p)

            took = [_seconds(position, cost.strategy, cost.block, p)]  # the first run chooses routines
            if took[0] < 20 * limit_s:
                took.append(_seconds(position, cost.strategy, cost.block, p))
            best_s = min(best_s, took[-1])
            if took[-1] < min(limit_s, 20 * best_s):
                calls[cost.strategy] = call
        return {name: statistics.median(t) for name, t in measure(calls, p.device, budget_s).items()}


def rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    for name in args.dtype:
        for shape in SHAPES[:2] if args.quick else SHAPES:
            for training in (False, True):
                p = problem((*shape[:3], shape[3] * args.batch), getattr(torch, name), training, args.device)
                seconds = measured(p, args.budget_s, args.limit_s, int(args.memory_gb * 2**30))
                fields = {**asdict(p), "dtype": name}
                ms = {s: round(1e3 * t, 4) for s, t in seconds.items()}
                found.append({"problem": fields, "rates": strategies.rates_key(p), "ms": ms})
                takes = plan(p)[0].strategy
                print(f"{shape[0]}² r={shape[1]} b={p.b} {name} {'fwd+bwd' if training else 'fwd'}: {takes} | ", end="")
                print("  ".join(f"{s} {1e3 * t:.2f}" for s, t in seconds.items()), flush=True)
    return found


def restored(fields: dict[str, Any]) -> Problem:
    lists = {name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()}
    return Problem(**{**lists, "dtype": getattr(torch, fields["dtype"])})


def vector(rates: Any) -> np.ndarray:
    return np.log([*rates.macs.values(), *rates.bytes.values(), rates.far, rates.block_s])


def rates_of(x: np.ndarray) -> Any:
    n = len(ORDERS)
    values = [float(f"{v:.2g}") for v in np.exp(x)]
    return strategies._rates(tuple(values[:n]), tuple(values[n : 2 * n]), values[-2], values[-1])


Key = tuple[str, bool, bool]
Group = list[tuple[Problem, dict[str, float]]]


@contextmanager
def with_rates(key: Key, rates: Any) -> Iterator[None]:
    """Problems are priced with these rates, whichever machine they were measured on."""
    with patch.dict(strategies._RATES, {key: rates}), patch.object(strategies, "rates_key", lambda p: key):
        yield


def fit(key: Key, group: Group) -> Any:
    """The rates nearest to what was measured: within a factor of 1,000 of today's, and at them where nothing speaks."""
    today = vector(strategies._RATES[key])

    def errors(x: np.ndarray) -> np.ndarray:
        n = len(ORDERS)
        values = np.exp(x)
        tried = strategies._rates(tuple(values[:n]), tuple(values[n : 2 * n]), values[-2], values[-1])
        with with_rates(key, tried):
            off = [math.log(strategies._price(p, s, None).seconds / t) for p, ts in group for s, t in ts.items()]
        return np.concatenate([off, 0.02 * (x - today)])

    low, high = today - math.log(1000), today + math.log(1000)
    low[-2] = 0.0  # memory is not faster than the cache
    start_at = np.clip(today, low + 1e-6, high - 1e-6)
    return rates_of(least_squares(errors, start_at, bounds=(low, high), loss="soft_l1").x)


def choices(key: Key, rates: Any, group: Group) -> list[float]:
    """The time of what the plan takes over that of the fastest, problem by problem."""
    found = []
    with with_rates(key, rates):
        for p, seconds in group:
            allowed = [s for s in seconds if strategies.where(p) in STRATEGIES[s].automatic]
            takes = min(allowed, key=lambda s: strategies._price(p, s, None).seconds)
            found.append(seconds[takes] / min(seconds[s] for s in allowed))
    return found


def report(measurements: list[dict[str, Any]]) -> dict[str, Any]:
    groups: dict[Key, Group] = {}
    for row in measurements:
        p, (kind, two_bytes, training) = restored(row["problem"]), row["rates"]
        groups.setdefault((kind, two_bytes, training), []).append((p, {s: t / 1e3 for s, t in row["ms"].items()}))
    found = {}
    for key, group in groups.items():
        rates = fit(key, group)
        macs, moved = (", ".join(f"{x:.2g}" for x in some.values()) for some in (rates.macs, rates.bytes))
        print(f"    {key}: _rates(({macs}), ({moved}), {rates.far}, {rates.block_s}),")
        for name, what in (("fitted", rates), ("today", strategies._RATES[key])):
            off = choices(key, what, group)
            within = sum(x <= 1.15 for x in off)
            print(f"      {name}: within 15% of the fastest in {within} of {len(off)}, worst {max(off):.2f}")
            found[f"{key} {name}"] = {"within_15_percent": within, "of": len(off), "worst": round(max(off), 3)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=1, help="times each shape's own")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget-s", type=float, default=0.3, help="seconds of running for each strategy and problem")
    parser.add_argument("--limit-s", type=float, default=2.0, help="a strategy that takes longer is left out")
    parser.add_argument("--memory-gb", type=float, default=6.0)
    parser.add_argument("--quick", action="store_true", help="two shapes, for a look")
    parser.add_argument("--fit", nargs="+", type=Path, default=None, metavar="FILE", help="measure nothing")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    if args.fit:
        report([row for path in args.fit for row in json.loads(path.read_text())["rows"]])
        return
    about = start(args.device, args.threads)
    found = rows(args)
    if args.out:
        args.out.write_text(json.dumps({"machine": about, "rows": found}) + "\n")
    report(found)


if __name__ == "__main__":
    main()
