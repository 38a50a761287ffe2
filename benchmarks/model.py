"""Times whole models: Table 12's hybrids of ResNet-50, and LambdaResNets beside the paper's EfficientNets and ViT.

    python -m benchmarks.model --only table12 --channels-last --compile --out FILE    this machine's CPU
    python -m benchmarks.model --only pairs --channels-last --out FILE --figure PNG    hours on a CPU
    python -m benchmarks.model --device cuda --channels-last --compile --out FILE --figure PNG
    python -m benchmarks.model --quick                        small models, b = 2, float32, eager, for a look

Images a second and peak memory, inference and training step (forward, loss, backward, SGD). Weights are random, made
as if trained: timings do not depend on them. Inference has `lambdanets.fuse` applied to every model; bfloat16 inference
is a model of bfloat16 weights, bfloat16 training is autocast. Every setting (--channels-last, --compile) is measured
for every model, and each side's fastest setting is in the ratio and named; a setting that fails is reported and left
out. A model is timed only after it agreed: fused and unfused in float64, our layers against strategy="lambdas" in
float64, the timed dtype no worse than 3 times the unfused model's rounding, each setting with the eager one.

A comparison's models are interleaved and share one batch: --batch, halved until the neediest fits into memory. Times
are medians. Peak memory is what a call holds at most beyond what was there, and the weights; compiled on a CPU, where
that is not seen, it is the eager form's. --out is written after every row. The last line of stdout is one JSON object;
`python -m benchmarks.figure FILE PNG` draws the pairs from it.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import lambdanets
from benchmarks.op import measure, peak_bytes, seconds, start
from benchmarks.peers import compiled, reason, why_not_compiled
from benchmarks.public import as_if_trained, error
from lambdanets import paper

PASSES = ("inference", "training")

# Paper, Table 12, at 224 px, the words that are timed: examples a second, top-1 in percent.
TABLE12 = {
    f"resnet50_{word.lower()}": paper.TABLE12.rows[word][1:] for word in ("CCCC", "LLLL", "CLLL", "CCLL", "CCCL")
}
# timm's efficientnet_bN, padded symmetrically: the tf_ ones, of TensorFlow's padding, are the same network and slower.
FIGURE_OURS = [point for point in paper.FIGURE if point.model.startswith("lambda_resnet")]
FIGURE_THEIRS = [point for point in paper.FIGURE if point.model.startswith("efficientnet")]
# Paper, Table 5, extra data: model, image px, examples a second in training and inference, top-1 in percent.
TABLE5 = [
    (name, px, *numbers[1:])
    for (name, px), numbers in zip(
        (("lambda_resnet152", 288), ("efficientnet_b7", 600), ("vit_large_patch16_384", 384)),
        paper.TABLE5.rows.values(),
        strict=True,
    )
]

# What issue 3 aims at: images a second over CCCC's, for LLLL, CLLL, CCLL, CCCL; LLLL's peak memory over CCCC's.
WORDS = list(TABLE12)[1:]
AIMS = {
    ("cpu", "inference"): dict(zip(WORDS, (0.85, 0.9, 1.0, 1.0), strict=True)),
    ("cuda", "inference"): dict(zip(WORDS, (0.8, 0.9, 1.0, 1.0), strict=True)),
    ("cuda", "training"): dict(zip(WORDS, (0.8, 0.9, 1.0, 1.0), strict=True)),
}
PEAK_AIMS = {("cuda", "training"): {"resnet50_llll": 1.3}}


class Disagreement(Exception):
    """Two forms of one model gave different numbers."""


@dataclass(frozen=True)
class Subject:
    """A model at an image size, and the top-1 that the paper reports for it, in percent."""

    model: str
    px: int
    top1: float

    def __str__(self) -> str:
        return f"{self.model} at {self.px}"


@dataclass(frozen=True)
class Claim:
    """One ratio of images a second, `over` / `under`, and what the paper prints for it, by pass.

    points   the ratio of the figure's two digitised points, training; B6's is below what the paper prints
    """

    over: Subject
    under: Subject
    paper: dict[str, float]
    points: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Models that are timed interleaved, and the ratios between them."""

    table: str  # table12, figure or table5
    subjects: tuple[Subject, ...]
    claims: tuple[Claim, ...]


def comparisons(only: list[str], quick: bool = False) -> list[Comparison]:
    """What is measured, smallest first. A pair of the figure is an EfficientNet and the fastest LambdaResNet in the
    paper that reaches its accuracy."""
    found = []
    if "table12" in only:
        words = {word: Subject(word, 224, top1) for word, (_, top1) in TABLE12.items()}
        base = words["resnet50_cccc"]
        ratio = {word: rate / TABLE12[base.model][0] for word, (rate, _) in TABLE12.items()}
        claims = [Claim(words[word], base, dict.fromkeys(PASSES, round(ratio[word], 2))) for word in WORDS]
        found.append(Comparison("table12", tuple(words.values()), tuple(claims)))
    if "pairs" in only:
        for name, px, s, top1 in FIGURE_THEIRS[:2] if quick else FIGURE_THEIRS:
            ours = min((row for row in FIGURE_OURS if row[3] >= top1), key=lambda row: row[2])
            over, under = Subject(ours[0], ours[1], ours[3]), Subject(name, px, top1)
            points = round(s / ours[2], 2)
            printed = {"training": paper.PRINTED_SPEEDUPS[name]} if name in paper.PRINTED_SPEEDUPS else {}
            found.append(Comparison("figure", (over, under), (Claim(over, under, printed, points),)))
    if "pairs" in only and not quick:
        subjects = [Subject(name, px, top1) for name, px, _, _, top1 in TABLE5]
        _, _, train, infer, _ = TABLE5[0]
        claims = [
            Claim(subjects[0], subject, {"training": round(train / row[2], 1), "inference": round(infer / row[3], 1)})
            for subject, row in zip(subjects[1:], TABLE5[1:], strict=True)
        ]
        found.append(Comparison("table5", tuple(subjects), tuple(claims)))
    return found


def macs(subject: Subject) -> float:
    """Multiply-adds an image, to say how long the rest will take: within some tens of percent is enough."""
    if subject.model in lambdanets.list_models():
        return sum(stage.macs for stage in lambdanets.model_cost(subject.model, subject.px))
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        timm.create_model(subject.model).eval()(torch.empty(1, 3, subject.px, subject.px))
    return counter.get_total_flops() / 2


def build(subject: Subject, device: str) -> tuple[nn.Module, Tensor]:
    """The model in float32 and eval mode, as if trained, and the two images that its batch norms know.

    Only those are ever shown to it: each lambda layer multiplies three functions of its input, so what one random
    layer's batch norm does not know grows from layer to layer until float32 overflows.
    """
    torch.manual_seed(0)
    ours = subject.model in lambdanets.list_models()
    model = lambdanets.create_model(subject.model) if ours else timm.create_model(subject.model)
    x = torch.randn(2, 3, subject.px, subject.px, device=device)
    return as_if_trained(model.to(device), x), x


def check(model: nn.Module, x: Tensor, dtypes: list[torch.dtype]) -> dict[torch.dtype, float]:
    """Raises Disagreement unless the forms of a model agree; returns the fused model's rounding in each dtype.

    Distances are relative rms of the logits of x, from the unfused model in float64.
    """
    exact = copy.deepcopy(model).double()
    with torch.inference_mode():
        want = exact(x.double())
    forms = {"fuse(model)": lambdanets.fuse(copy.deepcopy(exact))}
    layers = [m for m in exact.modules() if isinstance(m, lambdanets.LambdaLayer)]
    if layers:
        for layer in layers:
            layer.strategy = "lambdas"
        forms['strategy="lambdas"'] = exact
    for name, form in forms.items():
        if not (found := error(form, x.double(), want)) <= 1e-9:
            raise Disagreement(f"{name} and the model disagree in float64: relative rms {found:.1e}, at most 1e-9")
    rounding = {}
    for dtype in dtypes:
        plain = error(copy.deepcopy(model).to(dtype), x.to(dtype), want)
        rounding[dtype] = error(lambdanets.fuse(model).to(dtype), x.to(dtype), want)
        if not rounding[dtype] <= 3 * plain + 2 * torch.finfo(dtype).eps:
            raise Disagreement(
                f"fuse(model) rounds to {rounding[dtype]:.1e} in {dtype}, the model to {plain:.1e}; at most 3 times "
                "that + 2 eps"
            )
    return rounding


@dataclass
class Timed:
    """A model in one setting, ready to be timed: `call` returns the logits, or the loss of a training step."""

    call: Callable[[], Tensor]
    net: nn.Module
    images: Tensor

    def peak(self, device: str) -> int:
        """Bytes: the most that the second call holds, with what the first one left behind, and the weights."""
        own = [*self.net.parameters(), *self.net.buffers()]
        return peak_bytes(self.call, device, [*own, self.images]) + sum(t.nbytes for t in own)


def ready(model: nn.Module, x: Tensor, batch: int, setting: str, training: bool, dtype: torch.dtype) -> Timed:
    """A copy of the model as it is timed, and a batch of the images x."""
    device = x.device.type
    net = copy.deepcopy(model) if training else lambdanets.fuse(model).to(dtype)
    images = x.repeat(-(-batch // len(x)), 1, 1, 1)[:batch].to(torch.float32 if training else dtype)
    if "channels_last" in setting:
        net, images = net.to(memory_format=torch.channels_last), images.contiguous(memory_format=torch.channels_last)
    net.train(training)
    run = compiled(net, device, training) if "compiled" in setting else net

    def infer() -> Tensor:
        with torch.inference_mode():
            return run(images)

    if not training:
        return Timed(infer, net, images)
    labels = torch.arange(batch, device=device)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-5, momentum=0.9, weight_decay=4e-5)  # small: it stays finite

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            logits = run(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.1)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return Timed(step, net, images)


def fitting(batch: int, needed_bytes: int, device: str) -> int:
    """The batch, halved until it takes at most 0.8 of the free memory at so many bytes an image."""
    if device == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
    else:
        info = Path("/proc/meminfo")
        lines = info.read_text().splitlines() if info.exists() else []
        free = next((1024 * int(text.split()[1]) for text in lines if text.startswith("MemAvailable")), 1 << 60)
    while batch > 1 and batch * needed_bytes > 0.8 * free:
        batch //= 2
    return batch


@dataclass(frozen=True)
class Limits:
    """How a row is measured: the batch asked for, seconds of running and least number of runs for each contender."""

    batch: int
    budget_s: float
    least: int = 5


def bench(
    comparison: Comparison, dtypes: list[torch.dtype], settings: list[str], device: str, limits: Limits
) -> Iterator[dict[str, Any]]:
    """A row for each dtype and pass, as soon as it is measured."""
    models: dict[Subject, tuple[nn.Module, Tensor]] = {}
    rounding: dict[Subject, dict[torch.dtype, float]] = {}
    refused: dict[str, str] = {}
    for subject in comparison.subjects:
        model, x = build(subject, device)
        try:
            rounding[subject] = check(model, x, dtypes)
            models[subject] = model, x
        except Exception as problem:  # its comparison goes on without it, and the exit code says so
            refused[str(subject)] = reason(problem)
            print(f"{subject} is not timed: {problem}", file=sys.stderr)
    for dtype in dtypes:
        for training in (False, True):
            torch._dynamo.reset()  # drops the last row's code
            yield _row(comparison, models, rounding, dtype, training, settings, device, limits, dict(refused))


def _row(
    comparison: Comparison,
    models: dict[Subject, tuple[nn.Module, Tensor]],
    rounding: dict[Subject, dict[torch.dtype, float]],
    dtype: torch.dtype,
    training: bool,
    settings: list[str],
    device: str,
    limits: Limits,
    left_out: dict[str, str],
) -> dict[str, Any]:
    batch = limits.batch
    for model, x in models.values():
        few = min(2, batch)
        needed = ready(model, x, few, "eager", training, dtype).peak(device) // few
        batch = min(batch, fitting(batch, needed, device))
    timed: dict[tuple[Subject, str], Timed] = {}
    peaks: dict[tuple[Subject, str], int] = {}
    for subject, (model, x) in models.items():
        eager: Tensor | None = None
        for setting in settings:
            try:
                one = ready(model, x, batch, setting, training, dtype)
                if device == "cuda" or "compiled" not in setting:  # compiled code's memory is not seen on a CPU
                    peaks[subject, setting] = one.peak(device)  # of its first two calls: caches and momentum count
                else:
                    one.call(), one.call()
                got = one.call().detach().double().clone()  # of a training step: the third
                eager = got if eager is None else eager
                _same(got, eager, None if training else rounding[subject][dtype], dtype)
            except Exception as problem:  # whatever a compiler or an allocator raises: the other settings go on
                left_out[f"{subject}, {setting}"] = reason(problem)
                print(f"{subject}, {setting} is left out: {reason(problem)}", file=sys.stderr)
                continue
            timed[subject, setting] = one
    calls = {f"{subject}, {setting}": one.call for (subject, setting), one in timed.items()}
    first = {name: seconds(call, device) for name, call in calls.items()}
    runs = sum(t * (2 + min(200, max(limits.least, 1 + limits.budget_s / t))) for t in first.values())
    name = f"{comparison.table} {str(dtype)[6:]} {PASSES[training]}"
    print(f"{name}, b={batch}: about {runs:.0f} s for {len(calls)} contenders, by their first calls", flush=True)
    times = measure(calls, device, limits.budget_s, limits.least)
    found: dict[str, dict[str, Any]] = {}
    for subject in models:
        mine = {s: times[f"{subject}, {s}"] for s in settings if (subject, s) in timed}
        if not mine:
            continue
        median = {s: statistics.median(t) for s, t in mine.items()}
        best = min(median, key=median.__getitem__)
        plain = best.removeprefix("compiled").strip() or "eager"
        memory = {s: round(peaks[subject, s] / 1e6, 1) for s in mine if (subject, s) in peaks}
        found[str(subject)] = {
            "model": subject.model, "px": subject.px, "paper_top1": subject.top1, "setting": best,
            "images_per_s": round(batch / median[best], 3), "s_per_1024_images": round(1024 * median[best] / batch, 4),
            "peak_mb": memory.get(best, memory.get(plain)), "ms": {s: round(1e3 * t, 2) for s, t in median.items()},
            "spread": {s: [round(1e3 * min(t), 2), round(1e3 * max(t), 2)] for s, t in mine.items()},
            "peaks_mb": memory,
        }  # fmt: skip
    row = {
        "table": comparison.table, "dtype": str(dtype)[6:], "pass": PASSES[training], "batch": batch, "models": found,
        "left_out": left_out,
    }  # fmt: skip
    return {**row, "ratios": ratios(comparison, row, device)}


def _same(got: Tensor, eager: Tensor, rounding: float | None, dtype: torch.dtype) -> None:
    """Raises Disagreement unless a setting gives what the eager one gives: logits, or a training step's loss."""
    allowed = (
        3 * rounding + 2 * torch.finfo(dtype).eps if rounding is not None else 1e-1 if dtype != torch.float32 else 1e-2
    )
    distance = ((got - eager).square().mean().sqrt() / eager.square().mean().sqrt()).item()
    if not distance <= allowed:
        raise Disagreement(f"it disagrees with the eager model: relative rms {distance:.1e}, at most {allowed:.1e}")


def ratios(comparison: Comparison, row: dict[str, Any], device: str) -> list[dict[str, Any]]:
    """Each claim's measured ratio of images a second, beside the paper's and the aim; then those of peak memory."""
    out = []
    where = (device, row["pass"])
    for claim in comparison.claims:
        over, under = row["models"].get(str(claim.over)), row["models"].get(str(claim.under))
        if over is None or under is None:
            continue
        known = comparison.table == "table12"
        base = {"over": str(claim.over), "under": str(claim.under)}
        measured = over["images_per_s"] / under["images_per_s"]
        points = claim.points if row["pass"] == "training" else None
        out.append(
            {**base, "what": "images_per_s", "measured": round(measured, 3), "paper": claim.paper.get(row["pass"]),
             "paper_points": points, "aim": AIMS.get(where, {}).get(claim.over.model) if known else None}
        )  # fmt: skip
        if over["peak_mb"] and under["peak_mb"]:
            aim = PEAK_AIMS.get(where, {}).get(claim.over.model) if known else None
            measured = over["peak_mb"] / under["peak_mb"]
            out.append({**base, "what": "peak_mb", "measured": round(measured, 3), "paper": None, "aim": aim})
    return out


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The geometric mean of the figure's pairs by dtype and pass, ours over EfficientNet, and every aim, met or not."""
    pairs: dict[str, list[float]] = {}
    aims = []
    for row in rows:
        name = f"{row['dtype']} {row['pass']}"
        for r in row["ratios"]:
            if row["table"] == "figure" and r["what"] == "images_per_s":
                pairs.setdefault(name, []).append(r["measured"])
            if r["aim"] is not None:
                met = r["measured"] <= r["aim"] if r["what"] == "peak_mb" else r["measured"] >= r["aim"]
                what = f"{r['over']} / {r['under']}, {r['what']}, {name}"
                aims.append({"what": what, "measured": r["measured"], "aim": r["aim"], "met": met})
    means = {name: round(statistics.geometric_mean(found), 3) for name, found in pairs.items()}
    return {"geometric_mean_of_pairs": means, "aims": aims}


def lines(row: dict[str, Any]) -> str:
    head = f"{row['table']} {row['dtype']} {row['pass']} b={row['batch']}"
    out = [head]
    for name, m in row["models"].items():
        memory = f"{m['peak_mb']:9.0f} MB" if m["peak_mb"] else " " * 12
        out.append(f"  {name:<28} {m['images_per_s']:9.2f} images/s {memory}  {m['setting']}")
    for r in row["ratios"]:
        paper = f"  paper {r['paper']}" if r["paper"] else ""
        paper += f"  paper's points {r['paper_points']}" if r.get("paper_points") else ""
        aim = f"  aim {r['aim']}" if r["aim"] else ""
        out.append(f"  {r['over']} / {r['under']}: {r['measured']:.2f}x {r['what']}{paper}{aim}")
    return "\n".join(out)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["table12", "pairs"], choices=["table12", "pairs"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", nargs="+", default=None, choices=["float32", "bfloat16"], help="default: both")
    parser.add_argument("--channels-last", action="store_true", help="measure that memory format too")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile too")
    parser.add_argument("--batch", type=int, default=None, help="default: 8 on a CPU, 128 on CUDA, 2 with --quick")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--budget-s", type=float, default=None, help="seconds of running for each contender: 10, quick 1"
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=None, help="JSON, written after every row")
    parser.add_argument("--figure", type=Path, default=None, help="PNG of the speed-accuracy pairs")
    args = parser.parse_args(argv)
    if args.figure:
        if "pairs" not in args.only:
            parser.error(f"--figure {args.figure} draws the pairs, and --only {' '.join(args.only)} leaves them out")
        try:
            from benchmarks import figure  # now: matplotlib is an extra, and missing it must not cost a long run
        except ImportError as problem:
            parser.error(f"--figure {args.figure} needs matplotlib ({problem}): pip install 'lambdanets[plots]'")
    about = start(args.device, args.threads)
    if args.device == "cuda":
        torch.backends.cudnn.benchmark = True
    settings = ["eager", *["channels_last"] * args.channels_last]
    if args.compile and (why_not := why_not_compiled(args.device)):
        print(f"warning: {why_not}", file=sys.stderr)
    elif args.compile:
        settings += [f"compiled {s}".removesuffix(" eager") for s in settings]
    names = args.dtype or (["float32"] if args.quick else ["float32", "bfloat16"])
    batch = args.batch or (2 if args.quick else 128 if args.device == "cuda" else 8)
    limits = Limits(batch, args.budget_s or (1.0 if args.quick else 10.0), 3)
    todo = comparisons(args.only, args.quick)
    sizes = [sum(map(macs, comparison.subjects)) for comparison in todo]
    result: dict[str, Any] = {"machine": about, "settings": settings, "rows": [], **summary([])}
    began, done = time.perf_counter(), 0.0
    for comparison, size in zip(todo, sizes, strict=True):
        for row in bench(comparison, [getattr(torch, name) for name in names], settings, args.device, limits):
            result["rows"].append(row)
            result |= summary(result["rows"])
            _write(result, args.out)  # what an interrupted run has measured is kept
            done += size * (3 if row["pass"] == "training" else 1)
            left = 4 * len(names) * sum(sizes) - done
            spent = time.perf_counter() - began
            print(f"{lines(row)}\n  {spent:.0f} s so far, roughly {spent * left / done:.0f} s to go", flush=True)
    if args.figure:
        args.figure.write_bytes(figure.draw(result))
        print(f"drawn: {args.figure}")
    for aim in result["aims"]:
        print(f"{aim['what']}: {aim['measured']}, aim {aim['aim']}: {'met' if aim['met'] else 'missed'}")
    print("geometric mean of the pairs:", result["geometric_mean_of_pairs"])
    print(json.dumps(result))
    lost = {
        name
        for row in result["rows"]
        for name, why in row["left_out"].items()
        if "compiled" not in name or why.startswith(Disagreement.__name__)
    }
    if lost:
        sys.exit(f"not everything was timed, reasons above and in left_out: {'; '.join(sorted(lost))}")


def _write(result: dict[str, Any], out: Path | None) -> None:
    if out:
        part = out.with_name(out.name + ".part")
        part.write_text(json.dumps(result) + "\n")
        part.replace(out)


if __name__ == "__main__":
    main()
