"""Times each Triton kernel of `strategy="fused"` with other tiles than `fused._tiles` gives it, for whoever tunes them.

    python -m benchmarks.tiles --out FILE                         on a GPU, bfloat16, b = 128: a few minutes
    TRITON_INTERPRET=1 python -m benchmarks.tiles --device cpu    a map of 4 x 4 in Triton's interpreter: does it run

A kernel is timed only after its result agreed with that of today's tiles. The candidates differ from those in the
fields that are named; one that does not compile, or needs more than the GPU has, is reported and left out. The rate is
that of the multiply-adds in the paper's order within the map, beside that of a large product measured in the same run:
what overlapping windows, borders and idle multiprocessors cost is in it. All are compiled beforehand, a process a core.
The last line of stdout is one JSON object; --out keeps it.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.op import ceilings, measure, pairs, start
from benchmarks.peers import reason
from lambdanets.ops import fused

CELLS = [(56, 23, 16), (28, 23, 32), (14, 27, 64), (7, 13, 128)]  # side, scope, v
SMALL = [(4, 3, 16)]  # for the interpreter
CANDIDATES: dict[str, list[dict[str, int]]] = {
    "forward": [
        {}, {"contexts": 32}, {"contexts": 32, "stages": 4}, {"contexts": 128, "stages": 2}, {"stages": 2},
        {"columns": 64, "warps": 4}, {"columns": 64, "contexts": 32, "warps": 4}, {"rows": 512, "columns": 64},
        {"rows": 128, "warps": 4}, {"rows": 128, "contexts": 32, "warps": 4}, {"rows": 128, "columns": 256},
    ],
    "dV": [
        {}, {"stages": 2}, {"queries": 32}, {"queries": 32, "stages": 4}, {"positions": 128},
        {"positions": 128, "stages": 4}, {"positions": 128, "queries": 128},
        {"positions": 128, "queries": 32, "warps": 4}, {"positions": 128, "columns": 64, "warps": 4},
    ],
    "dR": [
        {}, {"stages": 2}, {"depth": 128, "stages": 2}, {"depth": 32}, {"depth": 32, "stages": 4}, {"pairs": 128 * 128},
        {"pairs": 128 * 128, "warps": 4}, {"pairs": 64 * 256, "depth": 128},
    ],
}  # fmt: skip
CANDIDATES["dq"] = CANDIDATES["forward"]
REPEATED = 10


def tensors(cell: tuple[int, int, int], b: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    side, scope, v = cell
    torch.manual_seed(0)
    t = {
        "q": torch.randn(b, side**2, 4, 16), "values": torch.randn(b, side**2, v, 1), "lam_c": torch.randn(b, 16, v),
        "table": torch.randn(scope, scope, 16, 1) / scope, "dy": torch.randn(b, side**2, 4, v),
    }  # fmt: skip
    return {name: x.to(device, torch.float32 if name == "lam_c" else dtype) for name, x in t.items()}


def kernel(name: str, t: dict[str, Tensor], side: int) -> Callable[[], Tensor]:
    grid = [side, side]
    return {
        "forward": lambda: fused._fused(t["q"], t["values"], t["table"], t["lam_c"], grid),
        "dq": lambda: fused._fused_dq(t["values"], t["table"], t["lam_c"], t["dy"], grid),
        "dV": lambda: fused._fused_dvalues(t["q"], t["table"], t["dy"], grid),
        "dR": lambda: fused._fused_dtable(t["q"], t["values"], t["dy"], grid, list(t["table"].shape[:2])),
    }[name]


def with_tiles(call: Callable[[], Tensor], changes: dict[str, int]) -> Callable[[], Tensor]:
    rule = fused._tiles

    def run() -> Tensor:
        with patch.object(fused, "_tiles", lambda *args: rule(*args)._replace(**changes)):
            return call()

    return run


def repeated(call: Callable[[], Tensor]) -> Callable[[], None]:
    """REPEATED calls as one graph: launched one by one they would take longer in Python than on the GPU."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATED):
            call()
    return graph.replay


def compile_one(name: str, cell: tuple[int, int, int], b: int, dtype: torch.dtype, changes: dict[str, int]) -> None:
    """Leaves the code in Triton's cache, for the process that times it."""
    with contextlib.suppress(Exception):  # whatever a compiler raises: the process that times it says so
        with_tiles(kernel(name, tensors(cell, b, dtype, "cuda"), cell[0]), changes)()


def compile_all(cells: list[tuple[int, int, int]], b: int, dtype: torch.dtype) -> None:
    asked = [(name, cell, b, dtype, changes) for name, some in CANDIDATES.items() for cell in cells for changes in some]
    workers = min(16, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_one, *zip(*asked, strict=True), chunksize=4))


def macs(cell: tuple[int, int, int], b: int) -> int:
    """Of the paper's order, contexts within the window and the map."""
    side, scope, v = cell
    return b * pairs((side, side), (scope, scope)) * 16 * v


def bench(name: str, cell: tuple[int, int, int], b: int, dtype: torch.dtype, device: str, budget_s: float) -> dict:
    call = kernel(name, tensors(cell, b, dtype, device), cell[0])
    want = call().double()
    calls, left_out = {}, {}
    for changes in CANDIDATES[name]:
        label = ", ".join(f"{field} {size}" for field, size in changes.items()) or "today"
        run = with_tiles(call, changes)
        try:
            got = run().double()
        except Exception as error:  # whatever a compiler raises
            left_out[label] = reason(error)
            continue
        distance = ((got - want).norm() / want.norm()).item()
        if not distance <= 4 * torch.finfo(dtype).eps:
            raise SystemExit(f"{name} {cell} with {label} is another function: relative distance {distance:.1e}")
        calls[label] = repeated(run) if device == "cuda" else run
    at_once = REPEATED if device == "cuda" else 1
    median = {label: statistics.median(t) / at_once for label, t in measure(calls, device, budget_s).items()}
    best = min(median, key=median.__getitem__)
    rate = macs(cell, b) / median[best]
    row = {
        "kernel": name, "side": cell[0], "scope": cell[1], "v": cell[2], "batch": b, "dtype": str(dtype)[6:],
        "ms": {label: round(1e3 * t, 4) for label, t in median.items()}, "best": best,
        "best_over_todays": round(median[best] / median["today"], 3),
        "share_of_product": round(rate / ceilings(device, dtype)["macs_per_s"], 3), "left_out": left_out,
    }  # fmt: skip
    print(
        f"{name:<7} {cell[0]}² r={cell[1]} v={cell[2]}: today {row['ms']['today']:.3f} ms, best {best} "
        f"{row['ms'][best]:.3f} ms, {row['share_of_product']:.0%} of a large product's rate",
        flush=True,
    )
    for label, why in left_out.items():
        print(f"  {label} is left out: {why}", file=sys.stderr)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batch", type=int, default=None, help="default: 128, in the interpreter 2")
    parser.add_argument("--budget-s", type=float, default=0.1, help="seconds of running for each candidate")
    parser.add_argument("--out", type=Path, default=None, help="JSON, written after every kernel")
    args = parser.parse_args()
    if args.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("--device cpu needs TRITON_INTERPRET=1 from the start: there the kernels are emulated")
    about = start(args.device, 2)
    dtype, cells = getattr(torch, args.dtype), SMALL if args.device == "cpu" else CELLS
    b = args.batch or (2 if args.device == "cpu" else 128)
    if args.device == "cuda":
        compile_all(cells, b, dtype)
    result: dict[str, Any] = {"machine": about, "rows": []}
    for cell in cells:
        for name in CANDIDATES:
            result["rows"].append(bench(name, cell, b, dtype, args.device, args.budget_s))
            if args.out:  # what an interrupted run has measured is kept
                args.out.write_text(json.dumps(result) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
