"""What a detector costs outside its model: masks into pictures, pictures into batches; for `benchmarks.detector`.

Photographs are made by numpy as in `benchmarks.data`, objects are stars of random corners: files and shapes as
expensive as real ones, and no download.
"""

from __future__ import annotations

import json
import resource
import time
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.data import photo
from lambdanets.data.decode import open_image
from lambdanets.detection.batches import training_batches
from lambdanets.detection.layouts import open_coco
from lambdanets.detection.masks import paste, paste_runs
from lambdanets.detection.scores import in_picture
from lambdanets.detection.transforms import DetectionView
from lambdanets.recipes.coco import table6

PHOTO = (480, 640)  # height and width of COCO's usual picture
LARGE = (3000, 4000)  # 12 million pixels
DETECTIONS, OBJECTS, CORNERS = 100, 8, 30


def held_mb(which: str) -> float:
    """What this process holds (VmRSS), or has held at most (VmHWM). ru_maxrss, which knows the most alone, starts in a
    child at what its parent held."""
    status = Path("/proc/self/status")
    if status.exists():
        found = dict(text.split(":", 1) for text in status.read_text().splitlines())
        return int(found[which].split()[0]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def photograph(path: Path, size: tuple[int, int], seed: int) -> None:
    """A JPEG of that height and width with the spectrum of a photograph."""
    small = Image.open(BytesIO(photo(seed)))
    small.resize((size[1], size[0]), Image.Resampling.BICUBIC).save(path, "JPEG", quality=90)


def detections(size: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Masks (100, 28, 28) and boxes (100, 4) xyxy px as a model gives them: sides from 2 % of the picture to all."""
    dice = np.random.default_rng(seed)
    high, wide = np.exp(dice.uniform(np.log(0.02), 0, (2, DETECTIONS))) * np.array([size]).T
    top, left = dice.random(DETECTIONS) * (size[0] - high), dice.random(DETECTIONS) * (size[1] - wide)
    y, x = np.mgrid[:28, :28] / 13.5 - 1
    bumps = 1 + 0.3 * dice.uniform(-1, 1, (DETECTIONS, 1, 1)) * np.sin(5 * np.arctan2(y, x))
    masks = 1 / (1 + np.exp(8 * (np.hypot(y, x) / bumps - 0.9)))
    boxes = np.stack((left, top, left + wide, top + high), 1)
    return torch.from_numpy(masks.astype(np.float32)), torch.from_numpy(boxes)


def paste_ms(rounds: int, size: tuple[int, int] = PHOTO) -> list[float]:
    """Milliseconds of pasting 100 detections into a picture and of their run lengths, of each round after the first."""
    found = []
    for turn in range(rounds + 1):
        masks, boxes = detections(size, turn)
        start = time.perf_counter()
        runs = list(paste_runs(masks, boxes, size))
        found.append(1e3 * (time.perf_counter() - start))
        assert len(runs) == DETECTIONS
    return found[1:]


def predict_without_a_model(path: Path, image_px: int) -> int:
    """All of a prediction but the model: decode and shrink, 100 detections to run lengths, each pasted for a drawing.

    Gives the pixels on objects, so that nothing is left out.
    """
    with open_image(path) as picture:
        seen = DetectionView(image_px).evaluate(picture.convert("RGB"))
    size = (seen.image.shape[1], seen.image.shape[2])
    masks, boxes = detections(size)
    boxes = in_picture(boxes, size, seen.original)
    assert len(list(paste_runs(masks, boxes, seen.original))) == DETECTIONS
    return sum(int(bits.sum()) for bits in paste(masks, boxes, seen.original))


def draw_set(root: Path, images: int) -> Path:
    """A COCO file of photographs with 8 polygons each; returns it."""
    dice = np.random.default_rng(0)
    height, width = PHOTO
    (root / "images").mkdir(parents=True)
    held: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "star"}]}
    for index in range(images):
        photograph(root / "images" / f"{index}.jpg", PHOTO, index)
        held["images"].append({"id": index + 1, "file_name": f"{index}.jpg", "height": height, "width": width})
        for _ in range(OBJECTS):
            side = np.exp(dice.uniform(np.log(24), np.log(400)))
            middle = dice.uniform(side / 2, np.array([width, height]) - side / 2)
            angle = np.sort(dice.random(CORNERS)) * 2 * np.pi
            far = side / 2 * dice.uniform(0.5, 1, (CORNERS, 1))
            points = middle + far * np.stack((np.cos(angle), np.sin(angle)), 1)
            low, high = points.min(0), points.max(0)
            held["annotations"].append(
                {
                    "id": len(held["annotations"]) + 1, "image_id": index + 1, "category_id": 1, "iscrowd": 0,
                    "bbox": [*low, *(high - low)], "area": float(np.prod(high - low)) / 2,
                    "segmentation": [points.ravel().tolist()],
                }
            )  # fmt: skip
    file = root / "all.json"
    file.write_text(json.dumps(held))
    return file


def loader_images_per_s(root: Path, rounds: int, images: int, image_px: int) -> list[float]:
    """Of one process, in each epoch after the first: decode, flip, jitter of 0.1 to 2, masks of 8 polygons, batches."""
    data = open_coco(None, annotations=draw_set(root, images), images=root / "images")
    recipe = replace(table6(), image_px=image_px, batch_images=4)
    batches = training_batches(data.train, DetectionView(image_px), recipe, workers=0)
    found = []
    for number in range(rounds + 1):
        start, seen, objects = time.perf_counter(), 0, 0
        for batch in batches.epoch(number):
            seen += len(batch.images())
            objects += sum(len(target["masks"]) for target in batch.targets())
        found.append(seen / (time.perf_counter() - start))
        assert objects
    return found[1:]
