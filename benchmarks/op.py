"""Times the lambda layer in every strategy beside timm's layer and the plain einsum order, with equal weights.

    python -m benchmarks.op                       the paper's shapes on this machine's CPU, float32 and bfloat16
    python -m benchmarks.op --device cuda --batch 128 --dtype bfloat16
    python -m benchmarks.op --quick               the two smallest maps, for a look

A contender is timed only after it agreed with `ops/reference.py` in float64 on 64 random queries of that shape. Times
are medians of interleaved runs; what to quote is the ratio to timm's layer, which ran in between. The last line of
stdout is one JSON object; --out keeps it.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers.lambda_layer import LambdaLayer as TimmLambdaLayer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lambdanets import LambdaLayer, plan
from lambdanets.ops import STRATEGIES, lambda_reference, relative_embeddings

SHAPES = [  # map side, channels, scope (None: global), batch
    (7, 512, 23, 8), (14, 256, 23, 8), (28, 128, 23, 8), (56, 64, 23, 8),
    (7, 512, 7, 8), (14, 256, 7, 8), (28, 128, 7, 8), (56, 64, 7, 8),
    (7, 512, None, 8), (14, 256, None, 8), (28, 128, None, 8), (64, 256, None, 2),
]  # fmt: skip
BUDGET_BYTES = 6 << 30  # what a contender may allocate at once here
HOPELESS = 8  # a contender predicted to take this many times the best one's time is left out: minutes for one cell


class PlainEinsum(nn.Module):
    """The paper's order as most ports have it: gather E, λ = E·V, y = q·λ."""

    def __init__(self, layer: LambdaLayer, side: int) -> None:
        super().__init__()
        self.layer, self.side = layer, side

    def forward(self, x: Tensor) -> Tensor:
        ours, b, n = self.layer, x.shape[0], self.side**2
        q = ours.norm_q(ours.to_q(x)).reshape(b, ours.heads, ours.key_depth, n)
        keys = ours.to_k(x).reshape(b, ours.key_depth, n).softmax(-1)
        values = ours.norm_v(ours.to_v(x)).reshape(b, ours.value_depth, n)
        E = relative_embeddings(ours.table, (self.side, self.side))[..., 0]
        lambdas = torch.einsum("nmk,bvm->bnkv", E, values) + torch.einsum("bkm,bvm->bkv", keys, values)[:, None]
        return torch.einsum("bhkn,bnkv->bhvn", q, lambdas).reshape(b, -1, self.side, self.side)


def contenders(side: int, dim: int, scope: int | None) -> dict[str, nn.Module]:
    """Ours by strategy, timm's and the plain einsum, all with the same weights, in training mode's batch norm off."""
    where = {"scope": scope} if scope else {"scope": None, "size": side}
    ours = {name: LambdaLayer(dim, strategy=name, **where) for name in ("auto", *STRATEGIES)}
    theirs = TimmLambdaLayer(dim, feat_size=(side, side), num_heads=4, dim_head=16, r=scope)
    first = ours["auto"]
    for layer in ours.values():
        layer.load_state_dict(first.state_dict())
    with torch.no_grad():
        theirs.qkv.weight.copy_(torch.cat([first.to_q.weight, first.to_k.weight, first.to_v.weight]))
        if scope:
            theirs.conv_lambda.weight.copy_(first.table.permute(2, 3, 0, 1)[..., None])
            theirs.conv_lambda.bias.zero_()
        else:
            theirs.pos_emb.copy_(first.table[..., 0])
    return {"timm": theirs, "plain einsum": PlainEinsum(first, side), **ours}


def truth(layer: LambdaLayer, x: Tensor, queries: Tensor) -> Tensor:
    """The reference in float64 at some queries: (b, queries, dim_out)."""
    exact = LambdaLayer(layer.dim, scope=layer.scope, size=layer.size).double()
    exact.load_state_dict({k: v.double() for k, v in layer.state_dict().items()})
    exact.train(layer.training)
    x, side = x.double().cpu(), x.shape[-1]
    b, h, k, v, n = x.shape[0], exact.heads, exact.key_depth, exact.value_depth, side * side
    with torch.no_grad():
        q = exact.norm_q(exact.to_q(x)).reshape(b, h, k, n).permute(0, 3, 1, 2)[:, queries]
        keys = exact.to_k(x).reshape(b, k, 1, n).permute(0, 3, 1, 2)
        values = exact.norm_v(exact.to_v(x)).reshape(b, v, 1, n).permute(0, 3, 1, 2)
        out = []
        for i, position in enumerate(queries.tolist()):
            E = _row(exact.table, (position // side, position % side), side)
            out.append(lambda_reference(q[:, i : i + 1], keys, values, E).reshape(b, 1, h * v))
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
    """Bytes of the tensors that operations have made and nobody has dropped, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

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


def work(layer: nn.Module, x: Tensor, backward: bool) -> Callable[[], None]:
    """One call to be timed."""
    if not backward:

        def forward() -> None:
            with torch.inference_mode():
                layer(x)

        return forward
    leaf = x.clone().requires_grad_()
    shape = layer(x[:1] if x.shape[0] > 1 else x).shape[1:]
    grad = torch.randn(x.shape[0], *shape, dtype=x.dtype, device=x.device)

    def both() -> None:
        leaf.grad = None
        layer.zero_grad(set_to_none=True)
        layer(leaf).backward(grad)

    return both


def seconds(call: Callable[[], None], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(calls: dict[str, Callable[[], None]], device: str, budget_s: float) -> dict[str, list[float]]:
    """Interleaved runs: one of each in turn, until the budget of each is spent; at least five of each."""
    first = {name: min(seconds(call, device), seconds(call, device)) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(200):
        for name, call in calls.items():
            if turn < 5 or first[name] * turn < budget_s:
                times[name].append(seconds(call, device))
    return times


def bench_shape(
    side: int, dim: int, scope: int | None, batch: int, dtype: torch.dtype, device: str, budget_s: float
) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    layers = contenders(side, dim, scope)
    x = torch.randn(batch, dim, side, side).to(dtype)
    queries = torch.randperm(side * side)[:64]
    for layer in layers.values():
        layer.to(device=device, dtype=dtype).eval()
    want = truth(layers["auto"], x, queries)
    rows = []
    for backward in (False, True):
        problem = replace(layers["auto"].problem(x.to(device)), training=backward)
        costs = {c.strategy: c for c in plan(problem)}
        calls = {}
        for name, layer in layers.items():
            cost = costs.get(name)
            if cost is not None and cost.why_not is not None:
                continue
            order = costs.get("lambdas" if name == "plain einsum" else name)
            if order is not None and order.seconds > HOPELESS * min(c.seconds for c in costs.values() if not c.why_not):
                continue
            expands = name in ("plain einsum", "lambdas", "scores") or (name == "timm" and scope is None)
            copies = {"timm": batch, "plain einsum": 1}.get(name, 1)  # timm expands the table for every example
            if expands and copies * 4 * side**4 * 16 * dtype.itemsize * (2 if backward else 1) > BUDGET_BYTES:
                continue
            with torch.no_grad():
                got = layer(x.to(device)).flatten(2).mT[:, queries.to(device)].double().cpu()
            error = ((got - want).square().mean().sqrt() / want.square().mean().sqrt()).item()
            if not error <= 20 * torch.finfo(dtype).eps:
                raise SystemExit(f"{name} disagrees with the reference at {side}², d {dim}: relative rms {error:.1e}")
            calls[name] = work(layer, x.to(device), backward)
        peaks = {}
        for name, call in calls.items():
            with Live() as live:
                call()
            peaks[name] = live.peak
        times = measure(calls, device, budget_s)
        median = {name: statistics.median(t) for name, t in times.items()}
        row = {
            "side": side, "dim": dim, "scope": scope, "batch": batch, "dtype": str(dtype)[6:], "backward": backward,
            "auto_takes": plan(problem)[0].strategy,
            "ms": {name: round(1e3 * t, 3) for name, t in median.items()},
            "spread": {name: [round(1e3 * min(t), 3), round(1e3 * max(t), 3)] for name, t in times.items()},
            "peak_mb": {name: round(p / 1e6, 2) for name, p in peaks.items()},
            "predicted_ms": {name: round(1e3 * c.seconds, 3) for name, c in costs.items() if name in times},
        }  # fmt: skip
        if "timm" in median:
            row["times_timm"] = round(median["timm"] / median["auto"], 2)
        rows.append(row)
        print(line(row), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    passes = "fwd+bwd" if row["backward"] else "fwd"
    what = f"{row['side']}² d{row['dim']} r={row['scope'] or 'all'} {row['dtype']} {passes:<7}"
    ms = "  ".join(f"{name} {t:.2f}" for name, t in row["ms"].items())
    return f"{what} {row.get('times_timm', float('nan')):6.2f}x timm | ms: {ms} | auto = {row['auto_takes']}"


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=None, help="instead of each shape's own")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget-s", type=float, default=0.6, help="seconds of running for each contender and cell")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: no CUDA device is visible")
    torch.set_num_threads(args.threads)
    about = machine(args.device)
    print(about)
    if about["load"] > 0.5 * args.threads:
        print(f"warning: the load is {about['load']}: a busy neighbour distorts ratios by up to 10x", file=sys.stderr)
    rows = []
    for side, dim, scope, batch in SHAPES[:2] if args.quick else SHAPES:
        for dtype in args.dtype:
            rows += bench_shape(
                side, dim, scope, args.batch or batch, getattr(torch, dtype), args.device, args.budget_s
            )
            _result(about, rows, {}, args.out)  # what an interrupted run has measured is kept
    summary = {}
    for dtype in args.dtype:
        for backward in (False, True):
            ratios = [
                r["times_timm"] for r in rows if r["dtype"] == dtype and r["backward"] == backward and "times_timm" in r
            ]
            summary[f"{dtype} {'fwd+bwd' if backward else 'fwd'}"] = round(statistics.geometric_mean(ratios), 2)
    print("geometric mean of the ratio to timm:", summary)
    print(_result(about, rows, summary, args.out))


def _result(about: dict[str, Any], rows: list[dict[str, Any]], summary: dict[str, float], out: Path | None) -> str:
    text = json.dumps({"machine": about, "rows": rows, "geometric_mean_times_timm": summary})
    if out:
        out.write_text(text + "\n")
    return text


if __name__ == "__main__":
    main()
