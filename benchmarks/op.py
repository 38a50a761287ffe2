"""Times the lambda layer in every strategy beside its public forms (peers.py), with equal weights.

    python -m benchmarks.op                       the paper's shapes on this machine's CPU, float32 and bfloat16
    python -m benchmarks.op --compile             the peers and ours under torch.compile too: five compilations a cell
    python -m benchmarks.op --device cuda --batch 128 --dtype bfloat16 --compile
    python -m benchmarks.op --cells 56:23 64:all  some of the shapes, by side and scope: compiling all takes an hour
    python -m benchmarks.op --quick               the two smallest maps, for a look

A contender is timed only after it agreed with `ops/reference.py` in float64 on 64 random queries of that shape. Times
are medians of interleaved runs; what to quote is a ratio to a peer, which ran in between: the fastest of ours ("auto",
in inference also "fuse", on a GPU also "fused", each eager or compiled) against timm's layer, `times_timm`, and against
the fastest peer, `times_fastest`. Inference is in evaluation, forward + backward in training mode, as a step is. A
contender that does not compile, or takes more than --limit-s a call, is reported and left out.

`roofline` is the share of the least time that the layer could take: its multiply-adds, in the order that needs fewest
(frequencies aside), at the rate of a large matrix product, or its input and output at the rate of a copy, whichever is
more, both measured in the same run. The last line of stdout is one JSON object; --out keeps it.
"""

import argparse
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.peers import COMPILED, OURS, PEERS, compiled, contenders, reason, why_not_compiled, why_not_run
from lambdanets import LambdaLayer, fuse, plan
from lambdanets.ops.problem import Cost, Problem
from lambdanets.ops.reference import lambda_reference
from lambdanets.ops.strategies import STRATEGIES

SHAPES = [  # map side, channels, scope (None: global), batch
    (7, 512, 23, 8), (14, 256, 23, 8), (28, 128, 23, 8), (56, 64, 23, 8),
    (7, 512, 7, 8), (14, 256, 7, 8), (28, 128, 7, 8), (56, 64, 7, 8),
    (7, 512, None, 8), (14, 256, None, 8), (28, 128, None, 8), (64, 256, None, 2),
]  # fmt: skip
BUDGET_BYTES = {"cpu": 6 << 30, "cuda": 40 << 30}  # what a contender may allocate at once
CEILING = {"cpu": (2048, 1 << 27), "cuda": (8192, 1 << 31)}  # side of the matrices, bytes of the copy
HOPELESS = 8, 1.0  # a contender predicted to take so many times the best one's time, and so many seconds, is left out


def truth(layer: LambdaLayer, x: Tensor, queries: Tensor) -> Tensor:
    """The reference in float64 of at most 8 examples at some queries: (b, queries, dim_out)."""
    exact = LambdaLayer(layer.dim, scope=layer.scope, size=layer.size).double()
    exact.load_state_dict({k: v.double() for k, v in layer.state_dict().items()})
    exact.train(layer.training)
    x, side = x.double().cpu(), x.shape[-1]
    b, h, k, v, n = x.shape[0], exact.heads, exact.key_depth, exact.value_depth, side * side
    with torch.no_grad():
        q = exact.norm_q(exact.to_q(x)).reshape(b, h, k, n).permute(0, 3, 1, 2)[:, queries]
        keys = exact.to_k(x).reshape(b, k, 1, n).permute(0, 3, 1, 2)
        values = exact.norm_v(exact.to_v(x)).reshape(b, v, 1, n).permute(0, 3, 1, 2)
        q, keys, values = q[:8], keys[:8], values[:8]  # not before: the norms see the whole batch
        out = []
        for i, position in enumerate(queries.tolist()):
            E = _row(exact.table, (position // side, position % side), side)
            out.append(lambda_reference(q[:, i : i + 1], keys, values, E).reshape(len(q), 1, h * v))
    return torch.cat(out, 1)


def _row(table: Tensor, at: tuple[int, int], side: int) -> Tensor:
    """E for one query at a position: (1, side², k, u)."""
    row = table.new_zeros(side, side, *table.shape[2:])
    reach = [(r - 1) // 2 for r in table.shape[:2]]
    for y in range(max(0, at[0] - reach[0]), min(side, at[0] + reach[0] + 1)):
        lo, hi = max(0, at[1] - reach[1]), min(side, at[1] + reach[1] + 1)
        row[y, lo:hi] = table[y - at[0] + reach[0], lo - at[1] + reach[1] : hi - at[1] + reach[1]]
    return row.reshape(1, side * side, *table.shape[2:])


class Live(TorchDispatchMode):
    """Bytes of the tensors that operations have made and nobody has dropped, and their peak; `known` are not counted.

    What compiled code allocates is not seen.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen = {t.untyped_storage()._cdata for t in known}

    def _drop(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor) and t.device.type != "meta":
                storage = t.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.seen:
                    self.seen.add(key)
                    self.now += size
                    weakref.finalize(storage, self._drop, key, size)
                    self.peak = max(self.peak, self.now)
        return out


def peak_bytes(call: Callable[[], Any], device: str, known: Iterable[Tensor] = ()) -> int:
    """The most that a call holds beyond what was there before: its second call, with what the first one left behind.

    So caches that stay between calls and an optimizer's state count. `known` are the tensors that are there already.
    """
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with Live(known) as live:
        call()
        live.peak = live.now
        call()
    return live.peak


def work(layer: nn.Module, x: Tensor, backward: bool) -> Callable[[], Tensor]:
    """One call to be timed; it returns the layer's output."""
    if not backward:

        def forward() -> Tensor:
            with torch.inference_mode():
                return layer(x)

        return forward
    leaf, grad = x.clone().requires_grad_(), torch.randn_like(x)

    def both() -> Tensor:
        leaf.grad = None
        layer.zero_grad(set_to_none=True)
        y = layer(leaf)
        y.backward(grad)
        return y.detach()

    return both


def seconds(call: Callable[[], Any], device: str, calls: int = 1) -> float:
    """Of one call, on average."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def measure(
    calls: dict[str, Callable[[], Any]], device: str, budget_s: float, least: int = 5
) -> dict[str, list[float]]:
    """Interleaved runs: one of each in turn, until the budget of each is spent; at least `least` of each.

    Every turn has another order, or each would find in the cache what the one before it left there. On a GPU a run is
    10 ms of calls, at most 20: as in a model, the next one is launched while the last one computes.
    """
    order, turns = list(calls), random.Random(0)
    first = {name: min(seconds(call, device), seconds(call, device)) for name, call in calls.items()}
    at_once = {name: max(1, min(20, int(0.01 / t))) if device == "cuda" else 1 for name, t in first.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(200):
        turns.shuffle(order)
        for name in order:
            if turn < least or first[name] * at_once[name] * turn < budget_s:
                times[name].append(seconds(calls[name], device, at_once[name]))
    return times


@lru_cache(maxsize=8)
def ceilings(device: str, dtype: torch.dtype) -> dict[str, float]:
    """What is reached here: multiply-adds a second in a large product, bytes read and written a second in a copy."""
    side, size = CEILING[device]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    calls = {"product": lambda: torch.mm(a, b), "copy": lambda: target.copy_(source)}
    median = {name: statistics.median(t) for name, t in measure(calls, device, 0.5).items()}
    return {"macs_per_s": side**3 / median["product"], "bytes_per_s": 2 * size / median["copy"]}


def pairs(grid: tuple[int, ...], table: tuple[int, ...]) -> int:
    """How many queries and contexts of a map see each other: within the table, and on the map."""
    return math.prod(
        sum(min(side, i + r // 2 + 1) - max(0, i - r // 2) for i in range(side))
        for side, r in zip(grid, table, strict=True)
    )


def least_work(p: Problem, dim: int) -> tuple[int, int]:
    """(multiply-adds, bytes) that a layer cannot do without: contexts outside the map, and q, k, v, cost nothing."""
    assert p.table is not None
    assert p.grid is not None
    position = p.b * pairs(p.grid, p.table) * p.u * min(p.k * p.v, p.h * (p.k + p.v))
    projections = p.b * p.n * dim * (p.h * p.k + p.k * p.u + p.v * p.u)
    content = p.b * p.n * p.k * p.v * p.u + p.b * p.n * p.h * p.k * p.v
    macs = position + projections + content
    maps = p.b * p.n * (dim + p.h * p.v)  # x and y; of a step also dx and dy, and x once more
    numbers = 2 * maps + p.b * p.n * dim if p.training else maps
    return macs * (3 if p.training else 1), numbers * p.dtype.itemsize


class TooSlow(Exception):
    """A call takes longer than --limit-s."""


def ready(
    name: str, run: nn.Module, x: Tensor, want: Tensor, queries: Tensor, backward: bool, limit_s: float
) -> Callable[[], Tensor]:
    """The call to be timed, of a contender that agrees with the reference (else SystemExit) and is not TooSlow."""
    call, started = work(run, x, backward), time.perf_counter()
    got = call().flatten(2).mT[: len(want), queries.to(x.device)].double().cpu()
    took = time.perf_counter() - started
    distance = ((got - want).square().mean().sqrt() / want.square().mean().sqrt()).item()
    if not distance <= 20 * torch.finfo(x.dtype).eps:
        side, dim = x.shape[-1], x.shape[1]
        raise SystemExit(f"{name} disagrees with the reference at {side}², d {dim}: relative rms {distance:.1e}")
    if limit_s < took < 60:  # the first call also compiles, and looks for the fastest routine
        took = seconds(call, x.device.type)
    if took > limit_s:
        raise TooSlow(f"a call took {took:.1f} s, over the limit of {limit_s} s")
    return work(run, x, backward)  # nothing of the first one stays


def library(device: str) -> AbstractContextManager[None]:
    """cuDNN may try some routines, which helps the peers; nobody's float32 is TF32, which agrees with no reference."""
    if device == "cpu":
        return nullcontext()
    found: AbstractContextManager[None] = torch.backends.cudnn.flags(
        enabled=True, benchmark=True, benchmark_limit=4, allow_tf32=False
    )
    return found


def bench_shape(
    side: int, dim: int, scope: int | None, batch: int, dtype: torch.dtype, device: str, budget_s: float, compile: bool,
    limit_s: float = math.inf,
) -> list[dict[str, Any]]:  # fmt: skip
    torch.manual_seed(0)
    layers = contenders(side, dim, scope)
    x = torch.randn(batch, dim, side, side).to(dtype)
    queries = torch.randperm(side * side)[:64]
    for layer in layers.values():
        layer.to(device=device, dtype=dtype).eval()
    layers["fuse"] = fuse(layers["auto"])
    rows = []
    for backward in (False, True):
        if backward:
            del layers["fuse"]
        for layer in layers.values():
            layer.train(backward and layer is not layers.get("fuse"))
        want = truth(layers["auto"], x, queries)
        problem = replace(layers["auto"].problem(x.to(device)), training=backward)
        costs = {c.strategy: c for c in plan(problem)}
        names = [name for name in layers if _worth(name, costs, side, scope, batch, dtype, device, backward)]
        asked = {name: why_not_run(name, side, scope, dtype, device, backward) for name in names}
        left_out = {name: why for name, why in asked.items() if why}
        names = [name for name in names if name not in left_out]
        if compile:
            torch._dynamo.reset()  # each cell compiles anew, and drops the last one's code
            names += [name + COMPILED for name in names if name in PEERS or name in OURS]
        calls: dict[str, Callable[[], Tensor]] = {}
        failed = []
        for name in names:
            layer = layers[name.removesuffix(COMPILED)]
            run = compiled(layer, device, backward) if name.endswith(COMPILED) else layer
            try:
                calls[name] = ready(name, run, x.to(device), want, queries, backward, limit_s)
            except Exception as error:  # whatever a compiler raises, or a GPU's library
                left_out[name] = reason(error)
                if not name.endswith(COMPILED) and not isinstance(error, TooSlow):
                    failed.append(name)
            layer.zero_grad(set_to_none=True)
        for name, why in left_out.items():
            print(f"{name} is left out at {side}², d {dim}: {why}", file=sys.stderr)
        if not any(name in OURS for name in calls):
            continue
        peaks = {
            name: peak_bytes(call, device)
            for name, call in calls.items()
            if device == "cuda" or not name.endswith(COMPILED)
        }
        times = measure(calls, device, budget_s)
        median = {name: statistics.median(t) for name, t in times.items()}
        found, (macs, moved) = ratios(median), least_work(problem, dim)
        ceiling = ceilings(device, dtype)
        least_s = max(macs / ceiling["macs_per_s"], moved / ceiling["bytes_per_s"])
        row = {
            "side": side, "dim": dim, "scope": scope, "batch": batch, "dtype": str(dtype)[6:], "backward": backward,
            "auto_takes": plan(problem)[0].strategy,
            "ms": {name: round(1e3 * t, 3) for name, t in median.items()},
            "spread": {name: [round(1e3 * min(t), 3), round(1e3 * max(t), 3)] for name, t in times.items()},
            "peak_mb": {name: round(p / 1e6, 2) for name, p in peaks.items()},
            "predicted_ms": {name: round(1e3 * c.seconds, 3) for name, c in costs.items() if name in times},
            "left_out": left_out, "failed": failed, **found,
            "least_ms": round(1e3 * least_s, 4), "roofline": round(least_s / median[found["ours"]], 3),
        }  # fmt: skip
        rows.append(row)
        print(line(row), flush=True)
    return rows


def _worth(
    name: str, costs: dict[str, Cost], side: int, scope: int | None, batch: int, dtype: torch.dtype, device: str,
    backward: bool,
) -> bool:  # fmt: skip
    """Whether a contender can run, has a chance, and fits into BUDGET_BYTES."""
    cost = costs.get(name)
    if cost is not None and cost.why_not is not None:
        return False
    order = costs.get(PEERS.get(name, name))
    times, seconds = HOPELESS
    best = min(c.seconds for c in costs.values() if not c.why_not)
    if order is not None and order.seconds > max(times * best, seconds):
        return False
    expands = name in ("plain einsum", "lambdas", "scores") or (name == "timm" and scope is None)
    copies = batch if name == "timm" else 1  # timm expands the table for every example
    return not expands or copies * 4 * side**4 * 16 * dtype.itemsize * (2 if backward else 1) <= BUDGET_BYTES[device]


def ratios(seconds_of: dict[str, float]) -> dict[str, Any]:
    """times_timm, times_fastest and who was fastest on either side, from the contenders' seconds."""
    peers = {name: t for name, t in seconds_of.items() if name.removesuffix(COMPILED) in PEERS}
    ours = {name: t for name, t in seconds_of.items() if name.removesuffix(COMPILED) in OURS}
    best = min(ours, key=ours.__getitem__)
    found: dict[str, Any] = {"ours": best}
    if "timm" in peers:
        found["times_timm"] = round(peers["timm"] / ours[best], 2)
    if peers:
        fastest = min(peers, key=peers.__getitem__)
        found |= {"times_fastest": round(peers[fastest] / ours[best], 2), "fastest": fastest}
    return found


def line(row: dict[str, Any]) -> str:
    passes = "fwd+bwd" if row["backward"] else "fwd"
    what = f"{row['side']}² d{row['dim']} r={row['scope'] or 'all'} {row['dtype']} {passes:<7}"
    ms = "  ".join(f"{name} {t:.2f}" for name, t in row["ms"].items())
    nan = float("nan")
    return (
        f"{what} {row.get('times_timm', nan):6.2f}x timm {row.get('times_fastest', nan):5.2f}x the fastest "
        f"({row.get('fastest', 'none')}), {row['ours']}, {row['roofline']:.0%} of the roofline | ms: {ms} | "
        f"auto = {row['auto_takes']}"
    )


def aims(row: dict[str, Any], device: str) -> dict[str, float]:
    """What is aimed at in a cell (issue 3): the least ratio to the fastest peer and to timm, the largest peak in MB."""
    side, scope, two_bytes = row["side"], row["scope"], row["dtype"] != "float32"
    if device == "cuda":
        return {"times_fastest": 5.0, "roofline": 0.5} if two_bytes else {}
    if scope == 7 or (scope == 23 and side >= 28):
        return {"times_fastest": 1.0}
    if side in (7, 14):
        return (
            {"times_fastest": 4.0, "times_timm": 12.0 if two_bytes else 10.0}
            if side == 7
            else {"times_fastest": 2.5, "times_timm": 12.0 if two_bytes else 4.0}
        )
    if side == 64:
        expanded_mb = side**4 * 16 * (2 if two_bytes else 4) / 1e6
        return {"times_fastest": 2.0, "peak_mb": round(expanded_mb / 8, 1)}
    return {}


def excess(row: dict[str, Any]) -> float | None:
    """The time of the strategy that "auto" took over the best strategy's."""
    strategies = {name: t for name, t in row["ms"].items() if name in STRATEGIES}
    took = strategies.get(row["auto_takes"])
    return None if took is None else round(took / min(strategies.values()), 3)


def summary(rows: list[dict[str, Any]], device: str) -> dict[str, Any]:
    """Geometric means by dtype and pass, and every aim beside what was measured."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(f"{row['dtype']} {'fwd+bwd' if row['backward'] else 'fwd'}", []).append(row)
    means = {}
    for key in ("times_timm", "times_fastest"):
        found = {name: [r[key] for r in group if key in r] for name, group in groups.items()}
        means[key] = {name: round(statistics.geometric_mean(t), 2) for name, t in found.items() if t}
    reached = []

    def compare(cell: str, what: str, measured: float | None, aim: float, at_most: bool = False) -> None:
        if measured is not None:
            met = measured <= aim if at_most else measured >= aim
            reached.append({"cell": cell, "what": what, "measured": measured, "aim": aim, "met": met})

    for name, group in groups.items():
        for row in group:
            cell = f"{row['side']}² d{row['dim']} r={row['scope'] or 'all'} {name}"
            for key, aim in aims(row, device).items():
                got = row["peak_mb"].get("auto") if key == "peak_mb" else row.get(key)
                compare(cell, key, got, aim, key == "peak_mb")
        large = [r["times_fastest"] for r in group if r["scope"] == 23 and r["side"] >= 28 and "times_fastest" in r]
        if device == "cpu" and len(large) > 1:
            compare(f"the better of 28² and 56², r=23 {name}", "times_fastest", max(large), 1.3)
        if device == "cpu" and len(group) == len(SHAPES):
            mean = means["times_timm"].get(name)
            compare(f"geometric mean {name}", "times_timm", mean, 6.0 if name.startswith("float32") else 8.0)
    off = [e for e in map(excess, rows) if e is not None]
    if off:
        compare(
            "plan", "cells where auto is within 15% of the best, share", sum(e <= 1.15 for e in off) / len(off), 0.9
        )
        compare("plan", "auto's time over the best strategy's, worst cell", max(off), 1.5, at_most=True)
    return {f"geometric_mean_{key}": mean for key, mean in means.items()} | {"aims": reached}


def machine(device: str) -> dict[str, Any]:
    """What the numbers were measured on."""
    try:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    model = next((w.split(":")[1].strip() for w in _cpuinfo() if w.startswith("model name")), platform.processor())
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else model, "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2), "torch": torch.__version__, "timm": timm.__version__,
        "python": platform.python_version(), "commit": commit,
    }  # fmt: skip


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def start(device: str, threads: int) -> dict[str, Any]:
    """Sets the threads, prints the machine and its load, and says so when others are at work on it."""
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: no CUDA device is visible")
    torch.set_num_threads(threads)
    # glibc gives memory back after a call and faults it in again at the next one, which can take longer than the layer,
    # until a large block was freed once, as the first model that runs does (LOG.md, 2026-11-23).
    large = torch.empty(31 << 20, dtype=torch.uint8)
    del large
    about = machine(device)
    print(about)
    if about["load"] > 0.5 * threads:
        print(f"warning: the load is {about['load']}: a busy neighbour distorts ratios by up to 10x", file=sys.stderr)
    return about


def cell(text: str) -> tuple[int, int, int | None, int]:
    """The row of SHAPES that "56:23" or "64:all" names."""
    for shape in SHAPES:
        if text == f"{shape[0]}:{shape[2] or 'all'}":
            return shape
    named = ", ".join(f"{side}:{scope or 'all'}" for side, _, scope, _ in SHAPES)
    raise argparse.ArgumentTypeError(f"{text!r} is none of {named}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=None, help="instead of each shape's own")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget-s", type=float, default=0.6, help="seconds of running for each contender and cell")
    parser.add_argument("--compile", action="store_true", help="the peers and auto under torch.compile as well")
    parser.add_argument("--cells", nargs="+", type=cell, default=None, metavar="SIDE:SCOPE", help="56:23, 64:all, ...")
    parser.add_argument("--limit-s", type=float, default=10.0, help="a contender that takes longer a call is left out")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    about = start(args.device, args.threads)
    if args.compile and (why_not := why_not_compiled(args.device)):
        print(f"warning: {why_not}", file=sys.stderr)
        args.compile = False
    rows: list[dict[str, Any]] = []
    with library(args.device):
        for name in args.dtype:
            reached = ceilings(args.device, getattr(torch, name))
            about[f"ceilings_{name}"] = {what: float(f"{rate:.3g}") for what, rate in reached.items()}
            print(
                f"{name}: {2e-12 * reached['macs_per_s']:.3g} TFLOP/s, a copy {1e-9 * reached['bytes_per_s']:.3g} GB/s"
            )
        for side, dim, scope, batch in args.cells or (SHAPES[:2] if args.quick else SHAPES):
            for name in args.dtype:
                rows += bench_shape(
                    side, dim, scope, args.batch or batch, getattr(torch, name), args.device, args.budget_s,
                    args.compile, args.limit_s,
                )  # fmt: skip
                _result(about, rows, {}, args.out)  # what an interrupted run has measured is kept
    found = summary(rows, args.device)
    for key in ("geometric_mean_times_timm", "geometric_mean_times_fastest"):
        print(f"{key}: {found[key]}")
    for aim in found["aims"]:
        sign = "met" if aim["met"] else "missed"
        print(f"{aim['cell']}: {aim['what']} {aim['measured']}, aim {aim['aim']}: {sign}")
    print(_result(about, rows, found, args.out))
    if lost := sorted({f"{name} at {row['side']}²: {row['left_out'][name]}" for row in rows for name in row["failed"]}):
        sys.exit(f"not everything was timed: {'; '.join(lost)}")


def _result(about: dict[str, Any], rows: list[dict[str, Any]], found: dict[str, Any], out: Path | None) -> str:
    text = json.dumps({"machine": about, "rows": rows, **found})
    if out:
        out.write_text(text + "\n")
    return text


if __name__ == "__main__":
    main()
