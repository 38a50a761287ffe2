"""A class that is told far away: a detector with lambda layers beside one with convolutions, equal in all else.

    python -m benchmarks.detection_cue --device cuda --batch-images 16 --steps N --why "..." --out FILE
    python -m benchmarks.detection_cue --first-look --out FILE    one run of the lambda model, to choose --steps by

Whether a disc is a "warm disc" or a "cold disc" is told by the colour of one marker of 6 px in a corner of the picture
(data/procedural.py, 256 px). Both bodies have the same stem, blocks, strides, heads, recipe, pictures and steps; the
convolutional one is narrower, so that the detectors' parameters differ by less than 1%. Each run is added to the file
when it ends, and runs that are there are not repeated.

On a CPU 25 minutes of one core are 600 steps a run, and after them the lambda model finds every disc and guesses its
class (benchmarks/results/detection-cue.json has that first look): the comparison needs a GPU, and longer runs.

What is compared: the mean AP of the two classes of discs, and of the discs that are found (overlap over 0.5, called
warm or cold) the share that is called rightly, where a guess has 0.5: of all, and of those whose box is too far from
the marker for the convolutions to see it, by rows or by columns.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torchvision.ops import box_iou

from benchmarks.op import machine
from lambdanets.data.procedural import _MARKERS, coco_shapes
from lambdanets.detection.coco import CocoImages
from lambdanets.detection.detector import Detector, HeadSizes, create_detector
from lambdanets.detection.precision import Detected
from lambdanets.detection.scores import Scores
from lambdanets.detection.task import CocoSource, Detection
from lambdanets.files import write_atomically
from lambdanets.models.resnet import LambdaResNet
from lambdanets.models.sizes import Size
from lambdanets.recipes.coco import DetectionRecipe, detect
from lambdanets.recipes.recipe import Options
from lambdanets.training import loop

BODIES = {  # lambda_resnet_small, narrower, with the cheaper stem; a scope of 33 has every offset of its 16 x 16 map
    "lambda": Size((1, 1, 2, 1), tuple("CCLL"), "plain", se_stages="----", width=20, lambda_args={"scope": 33}),
    "convolution": Size((1, 1, 2, 1), tuple("CCCC"), "plain", se_stages="----", width=17),
}
DISCS = 1, 2  # the labels of warm and cold discs
FAR_PX = 100  # the convolutional detector's map for such boxes sees 89 px at most (its gradient), a marker has 6
LOOK_SEED = 100
COMPARED = "disc_ap", "disc_ap50", "called_rightly", "far_called_rightly"
OBJECTS = 1, 1  # one disc in each picture, and nothing else
STEPS = 600
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}  # by the number of pairs


def recipe(steps: int, batch_images: int = 4) -> DetectionRecipe:
    """The whole picture, so that its marker is never cropped; boxes alone, few regions: the body is to do the work."""
    return replace(
        detect(small=True), name="cue", image_px=256, masks=False, steps=steps, min_steps=0, scale_jitter=(1.0, 1.0),
        eval_epochs=1_000_000, lr_per_256=0.128, fpn_channels=32, box_fc=128, proposals=(100, 30, 100, 30),
        rois_per_image=8, detections=20, batch_images=batch_images,
    )  # fmt: skip


def detector(body: str, of: DetectionRecipe, classes: int) -> Detector:
    return create_detector(
        LambdaResNet(BODIES[body], num_classes=0), classes=classes, masks=False, padding=of.padding, mean=of.mean,
        std=of.std, heads=HeadSizes(**of.heads),
    )  # fmt: skip


class Cue(Detection):
    """Detection on a body of this file's."""

    body: str

    def create_model(self) -> nn.Module:
        return detector(self.body, self.recipe, len(self.classes))


def marker(images: CocoImages, i: int) -> np.ndarray[Any, Any]:
    """x, y of the middle of the marker: the corner whose pixels have its colour."""
    pixels = np.asarray(images.load(i)).astype(int)
    side = len(pixels)
    corners = [(x, y) for x in (5, side - 5) for y in (5, side - 5)]
    found = [(x, y) for x, y in corners if any((pixels[y, x] == colour).all() for colour in _MARKERS)]
    assert len(found) == 1, f"picture {i} has {len(found)} markers"
    return np.array(found[0])


def called(images: CocoImages, detected: list[Detected]) -> dict[str, dict[str, int]]:
    """Of the discs near the marker and far from it how many there are, are found, and are called rightly."""
    counts: dict[str, Counter[str]] = {"near": Counter(), "far": Counter()}
    for i, one in enumerate(detected):
        objects, at = images.objects(i), marker(images, i)
        assert images.image_ids[i] == one.image_id
        mine = np.isin(one.labels, DISCS)
        boxes, labels, scores = one.boxes[mine], one.labels[mine], one.scores[mine]
        for box, label in zip(objects.boxes, objects.labels, strict=True):
            if label not in DISCS:
                continue
            gap_px = np.maximum(box[:2] - at, at - box[2:]).max()
            count = counts["far" if gap_px > FAR_PX else "near"]
            count["discs"] += 1
            over = box_iou(torch.from_numpy(box[None]), torch.from_numpy(boxes))[0].numpy() > 0.5
            if over.any():
                count["found"] += 1
                count["right"] += int(labels[over][scores[over].argmax()] == label)
    return {name: {k: count[k] for k in ("discs", "found", "right")} for name, count in counts.items()}


def one_run(body: str, seed: int, of: DetectionRecipe, data: Path, device: str) -> dict[str, Any]:
    task = Cue(of, CocoSource(data), workers=0, seed=seed)
    task.body = body
    cpu_s, wall_s = time.process_time(), time.time()
    with tempfile.TemporaryDirectory() as out:
        found = loop.train(
            of, task, out=Path(out) / "run", seed=seed, device=device, options=Options(save_minutes=0)
        )  # fmt: skip
    scores = found.scores
    assert isinstance(scores, Scores)
    ap = {row.name: [round(row.ap, 4), round(row.ap50, 4), row.objects] for row in scores.box.by_class}
    discs = called(task._data.val, scores.detected)
    total = Counter[str]()
    for part in discs.values():
        total.update(part)
    return {
        "body": body,
        "seed": seed,
        "steps": of.steps,
        "setting": {
            "batch_images": of.batch_images,
            "objects": OBJECTS,
            "stem": BODIES[body].stem,
            "lr_per_256": of.lr_per_256,
            "rois_per_image": of.rois_per_image,
            "train_images": len(task._data.train),
        },
        "disc_ap": round(statistics.fmean(row.ap for row in scores.box.by_class[:2]), 4),
        "disc_ap50": round(statistics.fmean(row.ap50 for row in scores.box.by_class[:2]), 4),
        "called_rightly": round(total["right"] / max(total["found"], 1), 4),
        "far_called_rightly": round(discs["far"]["right"] / max(discs["far"]["found"], 1), 4),
        "discs": discs,
        "ap_ap50_objects_by_class": ap,
        "train_loss": [round(row["train_loss"], 4) for row in found.record["history"]],
        "cpu_s": round(time.process_time() - cpu_s, 1),
        "wall_s": round(time.time() - wall_s, 1),
    }


def alike(runs: list[dict[str, Any]], of: DetectionRecipe) -> list[dict[str, Any]]:
    """The runs of as many steps and as large a batch."""
    return [run for run in runs if (run["steps"], run["setting"]["batch_images"]) == (of.steps, of.batch_images)]


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each number mean and standard deviation over the seeds, and the paired difference with its 95% interval."""
    by = {body: {run["seed"]: run for run in runs if run["body"] == body} for body in BODIES}
    pairs = sorted(set(by["lambda"]) & set(by["convolution"]))
    found: dict[str, Any] = {"pairs": len(pairs)}
    for name in COMPARED:
        row: dict[str, Any] = {}
        for body, of in by.items():
            values = [run[name] for run in of.values()]
            row[body] = {
                "mean": round(statistics.fmean(values), 4) if values else None,
                "sd": round(statistics.stdev(values), 4) if len(values) > 1 else None,
            }
        if len(pairs) in T_95:
            off = [by["lambda"][seed][name] - by["convolution"][seed][name] for seed in pairs]
            half = T_95[len(pairs)] * statistics.stdev(off) / math.sqrt(len(off))
            mean = statistics.fmean(off)
            row["difference"] = {"mean": round(mean, 4), "interval95": [round(mean - half, 4), round(mean + half, 4)]}
        found[name] = row
    for body, of in by.items():
        for part in ("near", "far"):
            counts = [run["discs"][part] for run in of.values()]
            found[f"{body}_{part}"] = {k: sum(count[k] for count in counts) for k in ("discs", "found", "right")}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--batch-images", type=int, default=4, help="the learning rate follows it")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=2_100, help="drawn, the last hundred held out")
    parser.add_argument("--first-look", action="store_true")
    parser.add_argument("--why", help="why so many steps: kept in the file")
    parser.add_argument("--data", type=Path, help="a folder for the pictures; drawn where it is not there yet")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    of = recipe(given.steps, given.batch_images)
    with tempfile.TemporaryDirectory() as own:
        data = given.data or Path(own) / "cue"
        if not data.exists():
            coco_shapes(data, images=given.images, split=100, seed=7, cue=True, objects=OBJECTS)
        held: dict[str, Any] = json.loads(given.out.read_text()) if given.out.exists() else {}
        with torch.device("meta"):
            sizes = {body: sum(p.numel() for p in detector(body, of, 6).parameters()) for body in BODIES}
        assert abs(sizes["convolution"] / sizes["lambda"] - 1) < 0.01
        held = {
            "machine": machine(given.device.split(":")[0]), "parameters": sizes,
            "bodies": {name: asdict(row) for name, row in BODIES.items()},
            "recipe": asdict(of), "images": given.images, "held_out": 100,
            "why_so_many_steps": given.why or held.get("why_so_many_steps"), "first_looks": held.get("first_looks", []),
            "runs": held.get("runs", []),
        }  # fmt: skip
        wanted = [(body, seed, "runs") for seed in given.seeds for body in BODIES]
        if given.first_look:
            wanted = [("lambda", LOOK_SEED, "first_looks")]
        for body, seed, part in wanted:
            if not any((run["body"], run["seed"]) == (body, seed) for run in alike(held[part], of)):
                held[part].append(one_run(body, seed, of, data, given.device))
            held["summary"] = summary(alike(held["runs"], of))
            write_atomically(given.out, (json.dumps(held, indent=1) + "\n").encode())
            print(json.dumps(held[part][-1]), flush=True)
    print(json.dumps(held["summary"]))


if __name__ == "__main__":
    main()
