"""Times timm's public lambda models beside the same models after `accelerate`, with equal weights.

    python -m benchmarks.public            CPU inference at 256 px, b = 8, two threads, float32 and bfloat16
    python -m benchmarks.public --quick    the smallest model, b = 2, float32, for a look

Weights are random: timings do not depend on them. A model is timed only after the accelerated one agreed with timm's in
float64. Times are medians of interleaved runs; what to quote is the ratio. Hooks time the lambda layers inside the same
runs: their share s of timm's time leaves, by Amdahl's law, at most 1 / (1 - s) for any order of evaluation. Both sides
are also timed in channels_last, which timm's model refuses as a whole and gets here weight by weight. The last line of
stdout is one JSON object; --out keeps it.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers.lambda_layer import LambdaLayer as TimmLambdaLayer
from torch import Tensor, nn

from benchmarks.op import measure, start
from lambdanets.models.timm_layers import accelerate

MODELS = ("lambda_resnet26t", "lambda_resnet26rpt_256", "lambda_resnet50ts")
WARM_UPS = 2  # calls that `measure` makes of each before those that it returns


def build(name: str, x: Tensor) -> nn.Module:
    """timm's model as if trained."""
    return as_if_trained(timm.create_model(name, img_size=x.shape[-1]), x)


def as_if_trained(model: nn.Module, x: Tensor) -> nn.Module:
    """Batch norms as in use, the model in eval mode: a block's last one starts at zero and would hide its layers.

    It gets a small weight, as in trained models: with 1, a hundred random blocks amplify rounding until nothing shows.
    """
    for norm in [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]:
        last = not norm.weight.any()
        nn.init.uniform_(norm.weight, *((0.1, 0.3) if last else (0.5, 1.5)))
        norm.momentum = 1.0  # the statistics become those of x
    with torch.no_grad():
        model.train()(x)
    return model.eval()


def error(model: nn.Module, x: Tensor, want: Tensor) -> float:
    """Relative rms distance of the logits."""
    with torch.inference_mode():
        return ((model(x).double() - want).square().mean().sqrt() / want.square().mean().sqrt()).item()


def check(theirs: nn.Module, ours: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    """Exit unless ours equals timm's in float64, and rounds no worse than 3 times timm's in the dtype to be timed."""
    exact, mine = copy.deepcopy(theirs).double(), copy.deepcopy(ours).double()
    with torch.inference_mode():
        want = exact(x.double())
    found = error(mine, x.double(), want)
    rounded = [error(copy.deepcopy(m).to(dtype), x.to(dtype), want) for m in (theirs, ours)]
    if not (found <= 1e-10 and rounded[1] <= 3 * rounded[0] + 2 * torch.finfo(dtype).eps):
        raise SystemExit(f"the models disagree: relative rms {found:.1e} in float64; {dtype}: timm, ours {rounded}")


def to_channels_last(model: nn.Module) -> nn.Module:
    """A copy with its 4-D weights in channels_last, also where a 5-D one forbids `model.to`."""
    model = copy.deepcopy(model)
    for p in model.parameters():
        if p.dim() == 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last)
    return model


def timed(model: nn.Module, x: Tensor, inside: list[float]) -> Callable[[], None]:
    """One call of a model; the seconds spent inside its lambda layers are appended to `inside`."""
    started = 0.0

    def start(*_: Any) -> None:
        nonlocal started
        started = time.perf_counter()

    def stop(*_: Any) -> None:
        inside[-1] += time.perf_counter() - started

    for layer in model.modules():
        if isinstance(layer, TimmLambdaLayer):
            layer.register_forward_pre_hook(start)
            layer.register_forward_hook(stop)

    def call() -> None:
        inside.append(0.0)
        with torch.inference_mode():
            model(x)

    return call


def bench(name: str, batch: int, px: int, dtype: torch.dtype, budget_s: float) -> dict[str, Any]:
    torch.manual_seed(0)
    x = torch.randn(batch, 3, px, px)
    theirs = build(name, x)
    ours = copy.deepcopy(theirs)
    layers = accelerate(ours)
    check(theirs, ours, x[:2], dtype)
    x = x.to(dtype)
    last = x.contiguous(memory_format=torch.channels_last)
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    models = {
        "timm": (theirs, x), "accelerated": (ours, x),
        "timm channels_last": (to_channels_last(theirs), last),
        "accelerated channels_last": (to_channels_last(ours), last),
    }  # fmt: skip
    inside: dict[str, list[float]] = {key: [] for key in models}
    calls = {key: timed(model, images, inside[key]) for key, (model, images) in models.items()}
    times = measure(calls, "cpu", budget_s)
    median = {key: statistics.median(t) for key, t in times.items()}
    within = {key: statistics.median(inside[key][WARM_UPS:]) for key in times}
    share = {
        key: statistics.median(s / t for s, t in zip(inside[key][WARM_UPS:], times[key], strict=True)) for key in times
    }
    ratio, bound = median["timm"] / median["accelerated"], 1 / (1 - share["timm"])
    row = {
        "model": name, "batch": batch, "px": px, "dtype": str(dtype)[6:], "lambda_layers": layers,
        "ms": {key: round(1e3 * t, 2) for key, t in median.items()},
        "spread": {key: [round(1e3 * min(t), 2), round(1e3 * max(t), 2)] for key, t in times.items()},
        "layer_share_frac": {key: round(s, 4) for key, s in share.items()},
        "times_timm": round(ratio, 3), "amdahl_bound": round(bound, 3), "of_bound_frac": round(ratio / bound, 3),
        "layers_times_timm": round(within["timm"] / within["accelerated"], 2),
        "times_timm_channels_last": round(median["timm channels_last"] / median["accelerated channels_last"], 3),
        "channels_last_times_timm": round(median["timm"] / median["accelerated channels_last"], 3),
    }  # fmt: skip
    print(line(row), flush=True)
    return row


def line(row: dict[str, Any]) -> str:
    ms = "  ".join(f"{key} {t:.0f}" for key, t in row["ms"].items())
    return (
        f"{row['model']} b={row['batch']} {row['px']} px {row['dtype']}: {row['times_timm']:.2f}x timm; lambda layers "
        f"{row['layer_share_frac']['timm']:.0%} of timm's time, so at most {row['amdahl_bound']:.2f}x "
        f"({row['of_bound_frac']:.0%} of that); the layers alone {row['layers_times_timm']:.1f}x; both channels_last "
        f"{row['times_timm_channels_last']:.2f}x | ms: {ms}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="timm's names")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--px", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget-s", type=float, default=10.0, help="seconds of running for each contender")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    if args.quick:
        args.models, args.dtype, args.batch, args.budget_s = args.models[:1], args.dtype[:1], 2, 1.0
    about = start("cpu", args.threads)
    rows = [
        bench(name, args.batch, args.px, getattr(torch, dtype), args.budget_s)
        for name in args.models
        for dtype in args.dtype
    ]
    result = json.dumps({"machine": about, "rows": rows})
    if args.out:
        args.out.write_text(result + "\n")
    print(result)


if __name__ == "__main__":
    main()
