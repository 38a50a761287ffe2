"""Pictures of a data set with their true objects drawn on them, and those that a detector found beside them."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from lambdanets.detection.coco import CocoImages, Segmentation
from lambdanets.detection.draw import draw
from lambdanets.detection.masks import rasterise
from lambdanets.detection.precision import Detected
from lambdanets.errors import BadImage, DiskFault

_MOST_PX, _LEAST_PX = 640, 320  # the longer side of a picture in a page


class Pair(NamedTuple):
    """A picture twice, as JPEGs: with its true objects, and with those found. None where it cannot be read."""

    name: str
    f1: float
    objects: int
    shown: int
    """Detections, of at least the score."""
    truth: bytes | None
    found: bytes | None


def draw_truth(images: CocoImages, index: int, picture: Image.Image, scale: float = 1.0) -> Image.Image:
    """The picture at that place, resized by `scale`, with its objects. A crowd says that it is one."""
    objects = images.objects(index)
    names = [
        images.classes[label - 1] + (" (crowd)" if crowd else "")
        for label, crowd in zip(objects.labels.tolist(), objects.crowd.tolist(), strict=True)
    ]
    return _drawn(images, picture, scale, objects.boxes, names, None, objects.segmentations)


def draw_found(
    images: CocoImages, picture: Image.Image, found: Detected, score: float, scale: float = 1.0
) -> Image.Image:
    """The same with what was found, of at least that score."""
    kept = np.flatnonzero(found.scores >= score)
    names = [images.classes[label - 1] for label in found.labels[kept].tolist()]
    masks: list[Segmentation] = [None if found.masks is None else found.masks[i] for i in kept.tolist()]
    return _drawn(images, picture, scale, found.boxes[kept], names, found.scores[kept].tolist(), masks)


def _drawn(
    images: CocoImages,
    picture: Image.Image,
    scale: float,
    boxes: np.ndarray[Any, Any],
    names: list[str],
    scores: list[float] | None,
    segmentations: list[Segmentation],
) -> Image.Image:
    before = picture.height, picture.width
    height, width = (max(1, round(side * scale)) for side in before)
    down, across = height / before[0], width / before[1]
    if (height, width) != before:
        enlarging = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
        picture = picture.resize((width, height), enlarging)

    def masks() -> Iterator[np.ndarray[Any, Any]]:
        for segmentation in segmentations:
            if segmentation is None:
                yield np.zeros((height, width), np.uint8)
            else:
                yield rasterise(segmentation, before, scale=(down, across), to=(height, width))

    shapes = masks() if any(segmentation is not None for segmentation in segmentations) else None
    return draw(picture, boxes * (across, down, across, down), names, scores, shapes, classes=images.classes)


def pairs(
    images: CocoImages, indices: Iterable[int], detected: Iterable[Detected], score: float, f1: Mapping[int, float]
) -> list[Pair]:
    """Some pictures as a page shows them: at most 640 px a side, and small ones enlarged.

    score   detections below it are not drawn
    f1      image id -> F1 of the image
    """
    of = {one.image_id: one for one in detected}
    found = []
    for index in indices:
        image_id = int(images.image_ids[index])
        one = of[image_id]
        truth = drawn = None
        try:
            picture = images.load(index)
        except (BadImage, DiskFault):  # gone since
            pass
        else:
            side = max(picture.size)
            scale = min(1.0, _MOST_PX / side) if side >= _LEAST_PX else float(-(-_LEAST_PX // side))
            truth = _jpeg(draw_truth(images, index, picture, scale))
            drawn = _jpeg(draw_found(images, picture, one, score, scale))
        objects = int((~images.objects(index).crowd).sum())
        shown = int((one.scores >= score).sum())
        found.append(Pair(images.names[index], f1[image_id], objects, shown, truth, drawn))
    return found


def _jpeg(picture: Image.Image) -> bytes:
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=85)
    return content.getvalue()
