"""Times our detectors beside torchvision's `maskrcnn_resnet50_fpn_v2`, on the same images, objects and region counts.

    python -m benchmarks.detector --out FILE            everything, 512 and 1024 px, 1 and 2 images: hours on a CPU
    python -m benchmarks.detector --only trunk --px 512 body and pyramid alone, which is all that differs
    python -m benchmarks.detector --only memory outside peak memory of a training step; masks, pictures, the loader
    python -m benchmarks.detector --quick               small maps and counts, for a look: no number to quote
    python -m benchmarks.detector --device cuda --out FILE

Agreement comes first: ours of resnet50_cccc, with torchvision's weights, gives torchvision's boxes, scores, masks and
losses to the last bit on the images that are timed, and nothing is timed otherwise. Ratios are a reference's time over
a contender's, turn by turn, interleaved in shuffled turns: their median and spread. Training is forward and backward in
training mode without an optimizer; heads learn from equal proposals, and every call draws the same samples.

A photograph of 4:3 stands in a square canvas for torchvision, whose resizing and pasting are off, and for "visible"; a
tight canvas is what "masked" makes of it. At these sizes that holds no padding: what the mask costs is measured in the
square. Given unpadded, torchvision's batch of equal images is tight as well: "torchvision, tight" is that.
Weights are random, made as if trained; proposals, regions and detections of each contender are counted in the JSON.
The last lines are the targets, what was found, and whether it was reached; the last one is a JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection import maskrcnn_resnet50_fpn_v2

from benchmarks import detector_outside as outside
from benchmarks.detector_scenes import CLASSES, objects, pictures, regions
from benchmarks.detector_targets import REFERENCE, judged, table
from benchmarks.model import Disagreement, fitting
from benchmarks.op import library, measure, start
from benchmarks.public import as_if_trained
from lambdanets.detection.detector import LOSSES, HeadSizes, create_detector

THEIRS, BASE = REFERENCE, "resnet50_cccc"
SECTIONS = ("whole", "trunk", "memory", "outside")
FOUND = ("boxes", "labels", "scores", "masks")
STEP_BYTES_A_PX = 7000  # of a training step, about: what must be free before one is tried


class Contender(NamedTuple):
    """A model, how it treats padding, and its canvas: "square", or "tight" around the picture."""

    model: str
    padding: str = "visible"
    canvas: str = "square"


CONTENDERS = {
    "torchvision": Contender(THEIRS),
    "torchvision, tight": Contender(THEIRS, "visible", "tight"),
    "resnet50_cccc visible": Contender(BASE),
    "resnet50_cccc masked": Contender(BASE, "masked", "tight"),
    "resnet50_cccc masked, square": Contender(BASE, "masked"),
    "lambda_resnet50 masked": Contender("lambda_resnet50", "masked", "tight"),
    "lambda_resnet50 masked, square": Contender("lambda_resnet50", "masked"),
    "resnet101_d masked, square": Contender("resnet101_d", "masked"),
    "lambda_resnet101 masked, square": Contender("lambda_resnet101", "masked"),
}
TIMED = {
    "whole": [name for name in CONTENDERS if name != "lambda_resnet50 masked, square"],
    "trunk": [name for name in CONTENDERS if "101" not in name],
    "memory": [name for name in CONTENDERS if name != "torchvision, tight"],
}
QUICK = ["torchvision", "resnet50_cccc visible", "resnet50_cccc masked, square"]
# Contender and reference, besides torchvision, which all but the models of 101 layers are compared with.
ALSO = [
    ("resnet50_cccc masked, square", "resnet50_cccc visible"),
    ("resnet50_cccc masked", "torchvision, tight"),
    ("lambda_resnet101 masked, square", "resnet101_d masked, square"),
]


@dataclass(frozen=True)
class Counts:
    """Proposals before and after suppression in training, then in evaluation; regions an image; detections."""

    proposals: tuple[int, int, int, int] = (2000, 1000, 1000, 1000)
    rois: int = 512
    detections: int = 100


@dataclass(frozen=True)
class Limits:
    """Seconds of running for each contender of a row, and the least number of rounds."""

    budget_s: float
    least: int


# --- the models, and what they are shown ---


class _Step(nn.Module):
    """A training step's losses as one output, on whatever square images."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack(list(self.model(list(x), objects(x.shape[2], x.shape[3], len(x), x.device)).values()))


def settled(model: nn.Module, device: str) -> Any:
    """Norms as in use, which timed steps leave as they are, and class scores far enough apart to find something."""
    model.to(device)
    as_if_trained(_Step(model), pictures(128, 2, device)[..., :128])
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 0.0
    heads: Any = model.roi_heads
    nn.init.normal_(heads.box_predictor.cls_score.weight, 0, 0.2)
    return model


def build(name: str, counts: Counts, device: str) -> Any:
    """A model of CONTENDERS; resnet50_cccc has the weights of torchvision's."""
    torch.manual_seed(0)
    if name == THEIRS:
        before, after, test_before, test_after = counts.proposals
        theirs = maskrcnn_resnet50_fpn_v2(
            weights=None, weights_backbone=None, num_classes=CLASSES + 1, rpn_pre_nms_top_n_train=before,
            rpn_post_nms_top_n_train=after, rpn_pre_nms_top_n_test=test_before, rpn_post_nms_top_n_test=test_after,
            box_batch_size_per_image=counts.rois, box_detections_per_img=counts.detections, image_mean=[0.0] * 3,
            image_std=[1.0] * 3,
        )  # fmt: skip
        theirs.transform.resize = lambda image, target=None: (image, target)
        theirs.transform.postprocess = lambda found, *sizes: found  # pasting: ours leaves it out as well
        return settled(theirs, device)
    heads = HeadSizes(proposals=counts.proposals, rois_per_image=counts.rois, detections=counts.detections)
    ours = create_detector(name, classes=CLASSES, mean=(0,) * 3, std=(1,) * 3, heads=heads)
    return settled(ours, device)


def load(ours: nn.Module, theirs: nn.Module) -> None:
    """Give resnet50_cccc the weights of torchvision's model."""
    named = {
        name.replace("downsample.1.", "downsample.2.").replace("downsample.0.", "downsample.1."): value
        for name, value in theirs.state_dict().items()
    }
    missing, extra = ours.load_state_dict(named, strict=False)
    if (missing, extra) != (["mean", "std"], []):
        raise Disagreement(f"torchvision's weights are not resnet50_cccc's: missing {missing}, not known {extra}")


def models(names: Sequence[str], counts: Counts, device: str) -> dict[str, Any]:
    """The models of these contenders."""
    wanted = dict.fromkeys(CONTENDERS[name].model for name in names)
    made = {name: build(name, counts, device) for name in wanted}
    if THEIRS in made and BASE in made:
        load(made[BASE], made[THEIRS])
    return made


def shown(contender: Contender, px: int, batch: int, device: str) -> tuple[Tensor, Any, list[dict[str, Tensor]]]:
    """Images, their sizes (None: all of the canvas is image) and targets, as the contender is given them."""
    canvas, height = pictures(px, batch, device), px * 3 // 4
    if contender.canvas == "tight":
        return canvas[:, :, :height].contiguous(), None, objects(height, px, batch, device)
    if contender.padding == "masked":
        return canvas, [(height, px)] * batch, objects(height, px, batch, device)
    return canvas, None, objects(px, px, batch, device)


def work(
    model: Any,
    contender: Contender,
    px: int,
    batch: int,
    device: str,
    training: bool,
    trunk: bool = False,
    own_regions: bool = False,
) -> Callable[[], Any]:
    """One call to be timed; the model must be in the mode that `training` says.

    own_regions  a training step's heads learn from the model's own proposals, not from everybody's `regions`
    """
    images, sizes, targets = shown(contender, px, batch, device)
    theirs = contender.model == THEIRS
    given = list(images) if theirs or contender.canvas == "tight" else images  # a canvas of its own, or this one

    def maps() -> list[Tensor]:
        if theirs:
            return list(model.backbone(model.transform(given)[0].tensors).values())
        return list(model.maps(given, sizes).features)

    def whole(*learnt: Any) -> Any:
        return model(given, *learnt) if theirs else model(given, *learnt, sizes=sizes)

    def infer() -> Any:
        if not theirs:
            model.padding = contender.padding
        with torch.inference_mode():
            return maps() if trunk else whole()

    def proposed(_: Any, __: Any, out: Any) -> Any:
        return regions(targets, [len(boxes) for boxes in out[0]]), out[1]

    grads: list[Tensor] = []

    def step() -> Any:
        if not theirs:
            model.padding = contender.padding
        torch.manual_seed(3)  # the same samples in every call
        if trunk:
            found = maps()
            if not grads:
                grads.extend(torch.randn_like(x) for x in found)
            torch.autograd.backward(found, grads)
            losses = {}
        else:
            hook = None if own_regions else model.rpn.register_forward_hook(proposed)
            losses = whole(targets)
            if hook is not None:
                hook.remove()
            torch.stack(list(losses.values())).sum().backward()
        model.zero_grad(set_to_none=True)
        return {name: value.detach() for name, value in losses.items()}

    return step if training else infer


# --- agreement ---


def agree(theirs: Any, ours: Any, px: int, device: str) -> dict[str, Any]:
    """Raises Disagreement unless ours gives torchvision's detections and losses, on one image, to the last bit."""
    exact: AbstractContextManager[None] = nullcontext()
    if device == "cuda":
        exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    about: dict[str, Any] = {"px": px}
    with exact:
        for training in (False, True):
            theirs.train(training), ours.train(training)
            args = (px, 1, device, training, False, True)
            with counted(theirs) as count:
                want = work(theirs, CONTENDERS[THEIRS], *args)()
            got = work(ours, CONTENDERS["resnet50_cccc visible"], *args)()
            if training:
                pairs = {name: (got[name], want[name]) for name in LOSSES}
            else:
                about |= {"proposals": count["proposals"], "detections": len(want[0]["scores"])}
                if not about["detections"]:
                    raise Disagreement(f"torchvision's model found nothing at {px} px: there is nothing to compare")
                want[0]["masks"] = want[0]["masks"][:, 0]
                pairs = {name: (got[0][name], want[0][name]) for name in FOUND}
            for name, (mine, other) in pairs.items():
                if mine.shape != other.shape:
                    raise Disagreement(f"{name} at {px} px: ours {tuple(mine.shape)}, theirs {tuple(other.shape)}")
                if not torch.equal(mine, other):
                    most = (mine.double() - other.double()).abs().max().item()
                    raise Disagreement(f"{name} at {px} px differ from torchvision's by up to {most:.1e}")
    return about


@contextmanager
def counted(model: Any) -> Iterator[dict[str, int]]:
    """How many proposals, regions for boxes and regions for masks a call of the model has; nothing of a trunk's."""
    count: dict[str, int] = {}

    def proposed(_: Any, __: Any, out: Any) -> None:
        count["proposals"] = sum(map(len, out[0]))

    def given(name: str, _: Any, inputs: Any) -> None:
        count[name] = len(inputs[0])

    heads = model.roi_heads
    hooks = [
        model.rpn.register_forward_hook(proposed),
        heads.box_head.register_forward_pre_hook(partial(given, "box_regions")),
        heads.mask_head.register_forward_pre_hook(partial(given, "mask_regions")),
    ]
    try:
        yield count
    finally:
        for hook in hooks:
            hook.remove()


# --- time ---


def bench(
    section: str,
    names: Sequence[str],
    made: dict[str, Any],
    px: int,
    batch: int,
    training: bool,
    device: str,
    limits: Limits,
) -> dict[str, Any]:
    """A row: those contenders that the section has, their times, counts and ratios."""
    row: dict[str, Any] = {"section": section, "px": px, "batch": batch, "pass": ("inference", "training")[training]}
    if training and fitting(2, STEP_BYTES_A_PX * px * px * batch // 2, device) < 2:
        return {**row, "contenders": {}, "ratios": [], "left_out": "there is not enough free memory for this step"}
    calls, counts = {}, {}
    names = [name for name in names if name in TIMED[section]]
    for name in names:
        contender = CONTENDERS[name]
        model = made[contender.model].train(training)
        calls[name] = work(model, contender, px, batch, device, training, section == "trunk")
        with counted(model) as counts[name]:
            calls[name]()
    times = measure(calls, device, limits.budget_s, limits.least)
    found = {
        name: {
            "ms": round(1e3 * statistics.median(t), 2), "spread": [round(1e3 * min(t), 2), round(1e3 * max(t), 2)],
            "rounds": len(t), **counts[name],
        }
        for name, t in times.items()
    }  # fmt: skip
    pairs = [(name, THEIRS) for name in names if name != THEIRS and "101" not in name]
    ratios = [ratio(times, *pair) for pair in pairs + ALSO if {*pair} <= {*names}]
    same = all(count == counts[names[0]] for count in counts.values())
    return {**row, "contenders": found, "ratios": ratios, "same_counts": same}


def ratio(times: dict[str, list[float]], contender: str, reference: str) -> dict[str, Any]:
    """The reference's time over the contender's in each turn that both had: median and spread."""
    turns = [theirs / mine for theirs, mine in zip(times[reference], times[contender], strict=False)]
    spread = [round(min(turns), 3), round(max(turns), 3)]
    return {"contender": contender, "reference": reference, "ratio": round(statistics.median(turns), 3),
            "spread": spread}  # fmt: skip


def lines(row: dict[str, Any]) -> str:
    out = [f"{row['section']} {row['pass']} {row['px']} px b={row['batch']} {row.get('left_out', '')}".rstrip()]
    for name, one in row["contenders"].items():
        counts = ", ".join(f"{one[key]} {key}" for key in ("proposals", "box_regions", "mask_regions") if key in one)
        out.append(f"  {name:<33}{one['ms']:10.1f} ms  {counts}".rstrip())
    if not row.get("same_counts", True):
        out.append("  the numbers of regions differ, and so does the work of the heads")
    for r in row["ratios"]:
        low, high = r["spread"]
        out.append(f"  {r['contender']} against {r['reference']}: {r['ratio']:.3f} ({low:.2f} to {high:.2f})")
    return "\n".join(out)


# --- memory, each in a process of its own ---


def child(asked: dict[str, Any]) -> dict[str, float]:
    """What a process of its own measures: peak MB, and what it held before."""
    torch.set_num_threads(asked["threads"])
    if asked["what"] == "picture":
        outside.predict_without_a_model(Path(asked["small"]), 64)  # what is imported late is not the picture's
        before = outside.held_mb("VmRSS")
        outside.predict_without_a_model(Path(asked["file"]), asked["px"])
        return {"before_mb": round(before, 1), "peak_mb": round(outside.held_mb("VmHWM"), 1)}
    before, device = outside.held_mb("VmRSS"), asked["device"]
    contender = CONTENDERS[asked["contender"]]
    model = build(contender.model, Counts(**asked["counts"]), device).train()
    step = work(model, contender, asked["px"], asked["batch"], device, training=True)
    step(), step()
    peak = torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else outside.held_mb("VmHWM")
    return {"before_mb": round(0.0 if device == "cuda" else before, 1), "peak_mb": round(peak, 1)}


def in_a_child(**asked: Any) -> dict[str, Any]:
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.detector", "--child", json.dumps(asked)], capture_output=True, text=True
    )
    if ran.returncode:  # killed for its memory, for one
        return {"failed": f"exit code {ran.returncode}: {(ran.stderr.strip().splitlines() or [''])[-1]}"}
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def memory(names: Sequence[str], px: int, batch: int, counts: Counts, device: str, threads: int) -> dict[str, Any]:
    """Peak memory of a training step of each, and its ratio to torchvision's."""
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        found[name] = in_a_child(
            what="step", contender=name, px=px, batch=batch, counts=asdict(counts), device=device, threads=threads
        )
        if "peak_mb" in found[name] and "peak_mb" in found[THEIRS]:
            found[name]["ratio"] = round(found[name]["peak_mb"] / found[THEIRS]["peak_mb"], 3)
        print(f"memory of a step, {px} px b={batch}, {name}: {found[name]}", flush=True)
    return {"px": px, "batch": batch, "contenders": found}


def around(rounds: int, images: int, px: int) -> dict[str, Any]:
    """What is outside the model, on one thread."""
    with tempfile.TemporaryDirectory() as place:
        small, large = Path(place, "small.jpg"), Path(place, "large.jpg")
        outside.photograph(small, (48, 64), 0), outside.photograph(large, outside.LARGE, 1)
        held = in_a_child(what="picture", small=str(small), file=str(large), px=px, threads=1)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        pasted, loaded = outside.paste_ms(rounds), outside.loader_images_per_s(Path(place, "set"), rounds, images, px)
        torch.set_num_threads(threads)
    height, width = outside.LARGE
    found: dict[str, Any] = {
        "paste_ms": round(statistics.median(pasted), 1), "paste_spread": [round(min(pasted), 1), round(max(pasted), 1)],
        "loader_images_per_s": round(statistics.median(loaded), 2),
        "loader_spread": [round(min(loaded), 2), round(max(loaded), 2)],
        "picture": held, "torchvisions_masks_mb": round(4e-6 * outside.DETECTIONS * height * width),
    }  # fmt: skip
    if "peak_mb" in held:
        found["picture_mb"] = round(held["peak_mb"] - held["before_mb"], 1)
    print(f"outside the model: {found}", flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(SECTIONS), choices=SECTIONS)
    parser.add_argument("--px", type=int, nargs="+", default=None, help="multiples of 64; default: 512 and 1024")
    parser.add_argument("--batch", type=int, nargs="+", default=None, help="default: 1 and 2")
    parser.add_argument("--seconds", type=float, default=None, help="of running for each contender and row: 30")
    parser.add_argument("--rounds", type=int, default=None, help="at least so many: 7")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help="128 px, 1 image, few regions, three contenders")
    parser.add_argument("--out", type=Path, default=None, help="JSON, written after every row")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.child:
        print(json.dumps(child(json.loads(given.child))))
        return
    sizes = given.px or ([128] if given.quick else [512, 1024])
    batches = given.batch or ([1] if given.quick else [1, 2])
    if wrong := [px for px in sizes if px < 64 or px % 64]:
        parser.error(f"--px {wrong[0]}: a canvas has sides that are multiples of 64")
    if min(batches) < 1:
        parser.error(f"--batch {min(batches)}: 1 at least")
    counts = Counts((60, 40, 60, 40), 16, 10) if given.quick else Counts()
    limits = Limits(
        given.seconds if given.seconds is not None else 0.0 if given.quick else 30.0,
        given.rounds or (1 if given.quick else 7),
    )
    about = start(given.device, given.threads)
    result: dict[str, Any] = {
        "machine": about, "quick": given.quick, "counts": asdict(counts), "agreement": [], "rows": []
    }  # fmt: skip

    def keep() -> None:
        result["targets"] = judged(result)
        if given.out:  # what an interrupted run has measured is kept
            given.out.write_text(json.dumps(result) + "\n")

    timed = [section for section in ("whole", "trunk") if section in given.only]
    names = QUICK if given.quick else list(CONTENDERS)
    needed = [name for name in names if any(name in TIMED[section] for section in timed)]
    with library(given.device):
        made = models(needed or [THEIRS, "resnet50_cccc visible"], counts, given.device)
        for px in sizes:
            result["agreement"].append(agree(made[THEIRS], made[BASE], px, given.device))
            print(f"agreement to the last bit: {result['agreement'][-1]}", flush=True)
        for section in timed:
            for px in sizes:
                for batch in batches:
                    for training in (False, True):
                        result["rows"].append(bench(section, names, made, px, batch, training, given.device, limits))
                        keep()
                        print(lines(result["rows"][-1]), flush=True)
    del made
    gc.collect()  # before the children need the memory
    if "memory" in given.only:
        few = [THEIRS, "lambda_resnet50 masked, square"] if given.quick else TIMED["memory"]
        result["memory"] = memory(few, max(sizes), max(batches), counts, given.device, given.threads)
        keep()
    if "outside" in given.only:
        result["outside"] = around(limits.least, 4 if given.quick else 32, max(sizes))
    keep()
    if given.quick:
        print("--quick: these sizes are not the targets', and say nothing about them")
    print(table(result["targets"]))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
