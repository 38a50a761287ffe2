"""Labelled pictures to batches of tensors: `Batches`, a pure function of (seed, epoch, sample id); see reading.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from lambdanets.data.images import Images, check_labels
from lambdanets.data.reading import Draws, PictureBatches
from lambdanets.data.transforms import View, training_transform


class Batch(NamedTuple):
    """images (b, C, H, W) float32; labels (b,) int64; ids: which of the Images these are (a substitute's own id)."""

    images: Tensor
    labels: Tensor
    ids: list[int]


@dataclass(frozen=True)
class _Labelled:
    transform: Callable[[Image.Image], Tensor]

    def __call__(self, image: Image.Image, index: int, label: int) -> tuple[Tensor, int]:
        return self.transform(image), label


def _joined(samples: list[tuple[Tensor, int]], ids: list[int]) -> Batch:
    # in a worker this stacks into shared memory: no second copy of 600 kB an image
    return Batch(default_collate([image for image, _ in samples]), torch.tensor([label for _, label in samples]), ids)


class Batches(PictureBatches[Batch]):
    """Batches of images and labels; see `PictureBatches`, whose other arguments are the same.

    images        what to read; its labels are checked here (BadData)
    view          picture -> tensor
    augment, flip_frac, min_crop_frac, randaugment_ops, randaugment_magnitude, erase_frac   see `training_transform`;
                  used in training only
    """

    def __init__(
        self,
        images: Images,
        view: View,
        *,
        batch_images: int,
        training: bool,
        seed: int = 0,
        augment: str = "none",
        flip_frac: float = 0.5,
        min_crop_frac: float = 0.08,
        randaugment_ops: int = 0,
        randaugment_magnitude: int = 0,
        erase_frac: float = 0.0,
        workers: int = 0,
        max_bad_frac: float = 0.001,
        bad_file: Path | None = None,
        rank: int = 0,
        ranks: int = 1,
        draws: Draws | None = None,
    ) -> None:
        transform: Callable[[Image.Image], Tensor] = view.evaluate
        if training:
            transform = training_transform(
                view,
                augment=augment,
                flip_frac=flip_frac,
                min_crop_frac=min_crop_frac,
                randaugment_ops=randaugment_ops,
                randaugment_magnitude=randaugment_magnitude,
                erase_frac=erase_frac,
            )
        super().__init__(
            images,
            _Labelled(transform),
            _joined,
            batch_images=batch_images,
            training=training,
            seed=seed,
            workers=workers,
            max_bad_frac=max_bad_frac,
            bad_file=bad_file,
            rank=rank,
            ranks=ranks,
            draws=draws,
        )
        check_labels(images)
        self.view = view
