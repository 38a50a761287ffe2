"""A detector and pictures in, average precision out: every picture once, whatever the batches and ranks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lambdanets.data.order import hash_of
from lambdanets.data.reading import PictureBatches
from lambdanets.detection.batches import Batch
from lambdanets.detection.coco import CocoImages
from lambdanets.detection.detector import Detector
from lambdanets.detection.masks import paste_runs
from lambdanets.detection.precision import Detected, Precision, average_precision, detections_json, said
from lambdanets.errors import EvaluationStopped
from lambdanets.files import placed
from lambdanets.training.distributed import Ranks

_ROW = ("ap", "ap50", "ap75")
_AT_ONCE = 100  # images whose detections are in memory as JSON: of all of COCO's they are 2 GB


@dataclass(frozen=True)
class Scores:
    """What `evaluate` found.

    n         images, each counted once
    loss      the sum of the losses
    losses    the detector's five (four without masks), means over the images: frozen norms, samples of a fixed seed
    box       average precision of boxes
    mask      of masks; None where there are none
    detected  what was found in each image, in their order; on rank 0 alone
    """

    n: int
    losses: Mapping[str, float]
    box: Precision
    mask: Precision | None
    detected: list[Detected]

    @property
    def loss(self) -> float:
        return sum(self.losses.values())

    def row(self) -> dict[str, float]:
        """What an epoch's line of the history has of it. AP is in 0 to 1."""
        found = {f"val_box_{name}": self.box.numbers[name] for name in _ROW}
        if self.mask is not None:
            found |= {f"val_mask_{name}": self.mask.numbers[name] for name in _ROW}
        return {"val_loss": self.loss, **{f"val_{name}": value for name, value in self.losses.items()}, **found}

    def json(self) -> dict[str, Any]:
        """For run.json."""
        return {
            "n": self.n,
            "loss": self.loss,
            "losses": dict(self.losses),
            "box": self.box.json(),
            "mask": None if self.mask is None else self.mask.json(),
        }

    def __str__(self) -> str:
        return f"{said(self.box, self.mask)} on {self.n:,} images"


def as_floats(image: Tensor, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 (C, H, W) to what the detector takes."""
    return image.to(device, non_blocking=True).to(dtype) / 255


@torch.inference_mode()
def evaluate(
    model: Detector,
    batches: PictureBatches[Batch],
    images: CocoImages,
    *,
    device: torch.device,
    ranks: Ranks | None = None,
    go_on: Callable[[], bool] = lambda: True,
) -> Scores:
    """Run the detector in evaluation mode over every picture of the batches, once, and compute COCO's numbers.

    batches   made by `evaluation_batches`, with this rank's number where there are several
    ranks     those that share the images; every rank gets the numbers of all of them
    go_on     asked after every batch; False ends the evaluation on all ranks with EvaluationStopped

    On a CPU the images of a batch are computed one at a time, each on its own tight canvas, which is as fast and takes
    less memory; so the numbers are equal to the last bit for batches of any size and any number of ranks. On a GPU the
    batch is one, and they are equal up to the rounding of its kernels.
    """
    ranks = ranks or Ranks.alone()
    was_training = model.training
    model.eval()
    dtype = next(model.parameters()).dtype
    found: list[list[Any]] = []
    stopped = False
    with ranks.together():
        for batch in batches.epoch(0):
            together = len(batch.ids) if device.type == "cuda" else 1
            seen, targets = batch.images(), batch.targets()
            for first in range(0, len(batch.ids), together):
                part = slice(first, first + together)
                originals = [(height, width) for height, width in batch.originals[part].tolist()]
                found += _of_images(model, seen[part], targets[part], originals, batch.ids[part], images, device, dtype)
            if stopped := not go_on():
                break
    model.train(was_training)
    if any(ranks.sum(stopped)):
        raise EvaluationStopped("the evaluation was stopped")
    everything = sorted((one for part in ranks.all(found) for one in part), key=lambda one: one[0])
    names = list(everything[0][1]) if everything else []
    losses = {name: sum(one[1][name] for one in everything) / len(everything) for name in names}
    numbers: Any = None
    with ranks.together():
        if ranks.first:
            detected = [_read(one, images) for one in everything]
            most = max(100, model.sizes_of_heads.detections)
            box = average_precision(images, detected, "bbox", most)
            mask = average_precision(images, detected, "segm", most) if model.masks and images.has_masks else None
            numbers = [box.json(), None if mask is None else mask.json()]
        else:
            detected = []
    held_box, held_mask = ranks.all(numbers)[0]
    return Scores(
        len(everything),
        losses,
        Precision.read(held_box),
        None if held_mask is None else Precision.read(held_mask),
        detected,
    )


def _of_images(
    model: Detector,
    pixels: list[Tensor],
    held: list[dict[str, Tensor]],
    originals: list[tuple[int, int]],
    ids: list[int],
    images: CocoImages,
    device: torch.device,
    dtype: torch.dtype,
) -> list[list[Any]]:
    """Of each image its number, its losses, and boxes, labels, scores and masks in its own pixels: what JSON holds."""
    seen = [as_floats(image, device, dtype) for image in pixels]
    targets = [{name: t.to(device) for name, t in target.items()} for target in held]
    for target in targets:
        target["boxes"] = target["boxes"].to(dtype)
    seeds = [hash_of("judged", int(images.image_ids[i])) for i in ids]
    detections, losses = model(seen, targets, seeds=seeds)
    sizes = [(image.shape[1], image.shape[2]) for image in seen]
    rows = []
    for index, loss, found, original, size in zip(ids, losses, detections, originals, sizes, strict=True):
        boxes = in_picture(found["boxes"], size, original)
        masks = None
        if model.masks:
            masks = [runs.decode("latin-1") for runs in paste_runs(found["masks"].cpu(), boxes, original)]
        rows.append(
            [
                index,
                {name: value.item() for name, value in loss.items()},
                boxes.tolist(),
                found["labels"].tolist(),
                found["scores"].tolist(),
                masks,
            ]
        )
    return rows


def in_picture(boxes: Tensor, size: tuple[int, int], original: tuple[int, int]) -> Tensor:
    """Boxes (n, 4) xyxy of an image of `size` in the pixels of the picture that it was resized from, on the CPU."""
    down, across = original[0] / size[0], original[1] / size[1]
    return boxes.cpu().double() * torch.tensor([across, down, across, down], dtype=torch.float64)


def _read(one: list[Any], images: CocoImages) -> Detected:
    index, _, boxes, labels, scores, masks = one
    return Detected(
        int(images.image_ids[index]),
        np.array(boxes, np.float64).reshape(-1, 4),
        np.array(labels, np.int64),
        np.array(scores, np.float64),
        None if masks is None else [runs.encode("latin-1") for runs in masks],
    )


def write_detections(path: Path, images: CocoImages, detected: Sequence[Detected]) -> None:
    """A file in COCO's result format, as `detections_json` gives it, with the data's own ids. Raises OSError."""
    ordered = sorted(detected, key=lambda one: one.image_id)
    with placed(path) as file:
        between = b"["
        for first in range(0, len(ordered), _AT_ONCE):
            for result in detections_json(images, ordered[first : first + _AT_ONCE]):
                file.write(between + json.dumps(result).encode())
                between = b",\n"
        file.write(b"[]\n" if between == b"[" else b"]\n")
