"""Pictures with objects to batches, which travel from the reading processes as a few flat tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lambdanets.data.images import Images
from lambdanets.data.reading import PictureBatches
from lambdanets.detection.coco import CocoImages
from lambdanets.detection.transforms import DetectionView, Sample
from lambdanets.errors import BadData, printable
from lambdanets.recipes.coco import DetectionRecipe


class Batch(NamedTuple):
    """Images of several sizes, flat: a tensor an image and three an object would need a file descriptor each.

    pixels     uint8 (Σ C·H·W,), one image after the other
    sizes      int64 (b, 2), height and width of each; originals: as they lie in the file
    counts     int64 (b,), objects of each
    boxes, labels, has_mask   of all objects, image by image
    masks      uint8: their masks, a bit a pixel
    channels   of every image
    ids        which of the Images these are
    """

    pixels: Tensor
    sizes: Tensor
    originals: Tensor
    counts: Tensor
    boxes: Tensor
    labels: Tensor
    has_mask: Tensor
    masks: Tensor
    channels: int
    ids: list[int]

    def images(self) -> list[Tensor]:
        """uint8 (C, H, W) of each."""
        sizes = self.sizes.tolist()
        flat = self.pixels.split([self.channels * h * w for h, w in sizes])
        return [one.view(self.channels, h, w) for one, (h, w) in zip(flat, sizes, strict=True)]

    def targets(self) -> list[dict[str, Tensor]]:
        """As `Detector` takes them; without masks where the batch has none."""
        counts, sizes = self.counts.tolist(), self.sizes.tolist()
        of_image = [
            dict(zip(("boxes", "labels", "has_mask"), parts, strict=True))
            for parts in zip(*(t.split(counts) for t in (self.boxes, self.labels, self.has_mask)), strict=True)
        ]
        if self.masks.numel() or not sum(counts):
            bits = [n * h * w for n, (h, w) in zip(counts, sizes, strict=True)]
            flat = np.unpackbits(self.masks.numpy(), count=sum(bits))
            for target, one, n, (h, w) in zip(of_image, torch.from_numpy(flat).split(bits), counts, sizes, strict=True):
                target["masks"] = one.view(n, h, w)
        return of_image


def joined(samples: list[Sample], ids: list[int]) -> Batch:
    """One batch of samples."""
    targets = [sample.targets for sample in samples]
    bits = np.packbits(torch.cat([t.masks.reshape(-1) for t in targets]).numpy())
    return Batch(
        torch.cat([sample.image.reshape(-1) for sample in samples]),
        torch.tensor([sample.image.shape[1:] for sample in samples]),
        torch.tensor([sample.original for sample in samples]),
        torch.tensor([len(t.labels) for t in targets]),
        torch.cat([t.boxes for t in targets]),
        torch.cat([t.labels for t in targets]),
        torch.cat([t.has_mask for t in targets]),
        torch.from_numpy(bits),
        samples[0].image.shape[0],
        ids,
    )


def _check_size(picture: Image.Image, images: CocoImages, index: int) -> None:
    """Raises BadData where a picture is not as large as its annotations say: boxes would lie elsewhere."""
    height, width = images.sizes[index].tolist()
    if picture.size != (width, height):
        raise BadData(
            f"{printable(images.names[index])} is {picture.width} x {picture.height} pixels (width x height, upright), "
            f"and {images.file} says {width} x {height}: `lambdanets check --all-images` lists all such pictures"
        )


@dataclass(frozen=True)
class _AsTrained:
    images: CocoImages
    view: DetectionView
    recipe: DetectionRecipe

    def __call__(self, picture: Image.Image, index: int, label: int) -> Sample:
        _check_size(picture, self.images, index)
        recipe = self.recipe
        low, high = recipe.scale_jitter
        return self.view.train(
            picture, self.images.objects(index), scale_jitter=(low, high), flip_frac=recipe.flip_frac,
            turns=recipe.turns, photometric=recipe.photometric,
        )  # fmt: skip


@dataclass(frozen=True)
class _AsEvaluated:
    images: CocoImages
    view: DetectionView

    def __call__(self, picture: Image.Image, index: int, label: int) -> Sample:
        _check_size(picture, self.images, index)
        return self.view.evaluate(picture, self.images.objects(index))


def training_batches(
    images: CocoImages,
    view: DetectionView,
    recipe: DetectionRecipe,
    *,
    pictures: Images | None = None,
    seed: int = 0,
    workers: int = 0,
    bad_file: Path | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> PictureBatches[Batch]:
    """Shuffled, augmented; see `data.reading.PictureBatches`.

    pictures   where the pictures are read from (shards), in the order of `images`; by default from its own files
    """
    return PictureBatches(
        pictures or images, _AsTrained(images, view, recipe), joined, batch_images=recipe.batch_images, training=True,
        seed=seed, workers=workers, bad_file=bad_file, rank=rank, ranks=ranks,
    )  # fmt: skip


def evaluation_batches(
    images: CocoImages,
    view: DetectionView,
    *,
    batch_images: int,
    pictures: Images | None = None,
    workers: int = 0,
    rank: int = 0,
    ranks: int = 1,
) -> PictureBatches[Batch]:
    """Every picture once, in order."""
    return PictureBatches(
        pictures or images, _AsEvaluated(images, view), joined, batch_images=batch_images, training=False,
        workers=workers, rank=rank, ranks=ranks,
    )  # fmt: skip
