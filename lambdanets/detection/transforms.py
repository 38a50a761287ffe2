"""A picture and its objects to what the detector sees, in training and in evaluation; chance comes from torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from lambdanets.detection.coco import Objects
from lambdanets.detection.masks import Pixels, decode, encode, rasterise


class Targets(NamedTuple):
    """The objects of one image as it is seen: boxes float32 (n, 4) xyxy px, labels int64 (n,), masks uint8 (n, H, W),
    has_mask bool (n,). Without masks (0, H, W) and none."""

    boxes: Tensor
    labels: Tensor
    masks: Tensor
    has_mask: Tensor


class Sample(NamedTuple):
    """image uint8 (C, H, W); its targets; height and width of the picture as it lies in the file."""

    image: Tensor
    targets: Targets
    original: tuple[int, int]


@dataclass(frozen=True)
class DetectionView:
    """How a picture becomes what the detector sees; a run's folder keeps it.

    image_px       the longer side of the picture in evaluation, of the square in training
    in_channels    1 (grey) or 3 (RGB)
    masks          whether targets have masks
    """

    image_px: int
    in_channels: int = 3
    masks: bool = True

    def __post_init__(self) -> None:
        if self.image_px < 1 or self.in_channels not in (1, 3):
            raise ValueError(f"image_px is {self.image_px}, in_channels {self.in_channels}: 1 or more, and 1 or 3")

    def seen(self, size: tuple[int, int], scale: float = 1.0) -> tuple[int, int]:
        """Height and width of a picture of that size where its longer side becomes image_px times `scale`.

        >>> DetectionView(64).seen((100, 75)), DetectionView(64).seen((1, 2000))
        ((64, 48), (1, 64))
        """
        by = self.image_px * scale / max(size)
        return max(1, round(size[0] * by)), max(1, round(size[1] * by))

    def evaluate(self, picture: Image.Image, objects: Objects | None = None) -> Sample:
        """The whole picture, its longer side image_px; crowds are no targets."""
        original = picture.height, picture.width
        size = self.seen(original)
        image = self._pixels(picture.resize((size[1], size[0]), Image.Resampling.BILINEAR))
        return Sample(image, self.targets(objects, original, size, (0, 0), size), original)

    def train(
        self,
        picture: Image.Image,
        objects: Objects,
        *,
        scale_jitter: tuple[float, float],
        flip_frac: float,
        turns: bool,
        photometric: bool,
    ) -> Sample:
        """Flipped or turned, scaled, and cropped to image_px a side at most; what it draws comes from torch."""
        original = picture.height, picture.width
        way = int(torch.randint(8, ())) if turns else int(torch.rand(()) < flip_frac)
        picture, objects = turned(picture, objects, way)
        before = picture.height, picture.width
        low, high = scale_jitter
        whole = self.seen(before, low + (high - low) * float(torch.rand(())))
        crop = min(whole[0], self.image_px), min(whole[1], self.image_px)
        top, left = (int(torch.randint(side - part + 1, ())) for side, part in zip(whole, crop, strict=True))
        down, across = before[0] / whole[0], before[1] / whole[1]
        # The crop alone is resized: at twice the size a quarter of the work.
        box = (left * across, top * down, (left + crop[1]) * across, (top + crop[0]) * down)
        image = self._pixels(picture.resize((crop[1], crop[0]), Image.Resampling.BILINEAR, box))
        if photometric and self.in_channels == 3:
            image = _distort(image)
        return Sample(image, self.targets(objects, before, whole, (top, left), crop), original)

    def _pixels(self, picture: Image.Image) -> Tensor:
        mode = "L" if self.in_channels == 1 else "RGB"
        picture = picture if picture.mode == mode else picture.convert(mode)
        rows = np.asarray(picture).reshape(picture.height, picture.width, self.in_channels)
        return torch.from_numpy(rows.transpose(2, 0, 1).copy())

    def targets(
        self,
        objects: Objects | None,
        before: tuple[int, int],
        whole: tuple[int, int],
        offset: tuple[int, int],
        crop: tuple[int, int],
    ) -> Targets:
        """The objects of a picture of size `before` that was resized to `whole` and cropped at `offset` to `crop`.

        Crowds are left out, and what has less than a pixel of side or of mask left. A box is the annotated one; where
        the crop cuts the object, or annotated box and mask disagree (overlap under 0.5), it is the mask's.
        """
        boxes, labels, masks, has = [], [], [], []
        scale = whole[0] / before[0], whole[1] / before[1]
        limits = np.array([crop[1], crop[0]] * 2)
        for i in range(0 if objects is None else len(objects.labels)):
            assert objects is not None
            if objects.crowd[i]:
                continue
            scaled = objects.boxes[i] * (scale[1], scale[0], scale[1], scale[0]) - (*offset[::-1], *offset[::-1])
            box = np.clip(scaled, 0, limits)
            if min(box[2:] - box[:2]) < 1:
                continue
            mask: Pixels | None = None
            if self.masks and objects.segmentations[i] is not None:
                mask = rasterise(objects.segmentations[i], before, scale=scale, offset=offset, to=crop)
                rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
                if not len(rows):
                    continue
                bounds = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float64)
                if not np.array_equal(box, scaled) or _overlap(box, bounds) < 0.5:
                    box = bounds
            boxes.append(box)
            labels.append(int(objects.labels[i]))
            has.append(mask is not None)
            if self.masks:
                masks.append(np.zeros(crop, np.uint8) if mask is None else mask)
        return Targets(
            torch.from_numpy(np.array(boxes, np.float32).reshape(-1, 4)),
            torch.tensor(labels, dtype=torch.int64),
            torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, *crop, dtype=torch.uint8),
            torch.tensor(has, dtype=torch.bool),
        )


# v2.RandomPhotometricDistort exchanges the channels too, and classes may be told by their colour.
_distort = v2.Compose(
    [
        v2.RandomApply([v2.ColorJitter(**{what: by})], p=0.5)
        for what, by in (("brightness", 0.125), ("contrast", 0.5), ("saturation", 0.5), ("hue", 0.05))
    ]
)


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    inside = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None).prod()
    return float(inside / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - inside))


def turned(picture: Image.Image, objects: Objects, way: int) -> tuple[Image.Image, Objects]:
    """Picture and objects in one of the eight ways: +1 left to right, +2 upside down, +4 rows and columns exchanged."""
    if not way:
        return picture, objects
    width, height = picture.size
    boxes, parts = objects.boxes.copy(), objects.segmentations
    bitmaps = [decode(s, height, width) if isinstance(s, bytes) else None for s in parts]
    outlines = [[p.copy() for p in s] if isinstance(s, list) else None for s in parts]
    for bit, axis, method, side in (
        (1, 0, Image.Transpose.FLIP_LEFT_RIGHT, width), (2, 1, Image.Transpose.FLIP_TOP_BOTTOM, height)
    ):  # fmt: skip
        if way & bit:
            picture = picture.transpose(method)
            boxes[:, [axis, axis + 2]] = side - boxes[:, [axis + 2, axis]]
            bitmaps = [None if b is None else np.flip(b, 1 - axis) for b in bitmaps]
            for polygon in (p for outline in outlines for p in outline or ()):
                polygon[:, axis] = side - polygon[:, axis]
    if way & 4:
        picture = picture.transpose(Image.Transpose.TRANSPOSE)
        boxes = boxes[:, [1, 0, 3, 2]]
        bitmaps = [None if b is None else b.T for b in bitmaps]
        outlines = [None if o is None else [p[:, ::-1] for p in o] for o in outlines]
    runs = [None if b is None else encode(b) for b in bitmaps]
    found = [run if run is not None else outline for run, outline in zip(runs, outlines, strict=True)]
    return picture, objects._replace(boxes=boxes, segmentations=found)
