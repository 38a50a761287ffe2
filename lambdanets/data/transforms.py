"""A picture to the tensor that a model sees: as evaluated, as trained; and batches mixed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import Mixup
from torch import Tensor
from torchvision.transforms import v2

from lambdanets.data.order import hash_of


@dataclass(frozen=True)
class View:
    """How a picture becomes the tensor that a model sees: all of it, so that a run folder can keep it (`asdict`, JSON).

    image_px       side of the square
    in_channels    1 (grey) or 3 (RGB)
    mean, std      of each channel, in units where white is 1
    crop_frac      side of the central square kept, as a fraction of the shorter side; 1 keeps the largest square
    interpolation  "bilinear" or "bicubic", antialiased (Pillow)

    >>> grey = View(image_px=4, in_channels=1, mean=(0.5,), std=(0.25,), crop_frac=1.0)
    >>> grey.evaluate(Image.new("RGB", (9, 7), "white")).unique()    # (1 - mean) / std
    tensor([2.])
    """

    image_px: int
    in_channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_frac: float = 0.875
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))  # JSON gives lists
        object.__setattr__(self, "std", tuple(float(value) for value in self.std))
        if self.image_px < 1:
            raise ValueError(f"image_px is {self.image_px}: it must be at least 1")
        if self.in_channels not in (1, 3):
            raise ValueError(f"in_channels is {self.in_channels}: 1 (grey) or 3 (RGB)")
        if not len(self.mean) == len(self.std) == self.in_channels or min(self.std) <= 0:
            raise ValueError(f"mean {self.mean}, std {self.std}: {self.in_channels} numbers each, std above 0")
        if not 0 < self.crop_frac <= 1:
            raise ValueError(f"crop_frac is {self.crop_frac}: it must lie above 0 and be at most 1")
        if self.interpolation not in ("bilinear", "bicubic"):
            raise ValueError(f"interpolation is {self.interpolation!r}: bilinear or bicubic")

    def evaluate(self, image: Image.Image) -> Tensor:
        """(C, H, W) float32: shorter side to round(image_px / crop_frac), centre crop, normalised."""
        image = self._in_mode(image)
        short_px = round(self.image_px / self.crop_frac)
        width, height = (short_px * side // min(image.size) for side in image.size)
        left, top = (round((side - self.image_px) / 2) for side in (width, height))
        # The crop alone is resized: the same but for rounding, and 1 x 1,000,000 never becomes 256 x 256,000,000.
        across, down = image.width / width, image.height / height
        box = (left * across, top * down, (left + self.image_px) * across, (top + self.image_px) * down)
        resample = Image.Resampling[self.interpolation.upper()]
        return self._normalised(image.resize((self.image_px, self.image_px), resample, box))

    def _in_mode(self, image: Image.Image) -> Image.Image:
        mode = "L" if self.in_channels == 1 else "RGB"
        return image if image.mode == mode else image.convert(mode)

    def _normalised(self, image: Image.Image) -> Tensor:
        rows = np.asarray(image).reshape(image.height, image.width, self.in_channels)
        levels = torch.from_numpy(rows.transpose(2, 0, 1).copy())  # bytes are moved, then made floats: 0.4 ms, not 0.65
        mean, std = (torch.tensor(value)[:, None, None] for value in (self.mean, self.std))
        return levels.float().div_(255).sub_(mean).div_(std)


def training_transform(
    view: View,
    *,
    augment: str,
    flip_frac: float = 0.5,
    min_crop_frac: float = 0.08,
    randaugment_ops: int = 0,
    randaugment_magnitude: int = 0,
    erase_frac: float = 0.0,
) -> Callable[[Image.Image], Tensor]:
    """A function from picture to (C, H, W) float32 that draws from the ambient generators (`Batches` seeds them).

    augment  "imagenet": a random crop, a flip from left to right, then `randaugment_ops` of RandAugment;
             "digits": rotation to 10 degrees, shift to 8%, scale 0.9 to 1.1, no flip; "none": `view.evaluate`
    flip_frac  of the pictures are flipped; 0 where left and right tell classes apart
    min_crop_frac  the smallest crop, as a part of the picture's area; the largest is all of it
    randaugment_magnitude  the published TensorFlow code's level, 3 to 15, 10 the end of its scale, each operation
             always applied: timm's RandAugment with p1.0 and mmax (torchvision's has another scale). Below 3 posterize
             would keep no bit
    erase_frac  of the pictures: a random rectangle (2 to 33% of the area) becomes noise, after all else
    """
    for name, frac in (("erase_frac", erase_frac), ("flip_frac", flip_frac)):
        if not 0 <= frac <= 1:
            raise ValueError(f"{name} is {frac}: it must lie between 0 and 1")
    if not 0 < min_crop_frac <= 1:
        raise ValueError(f"min_crop_frac is {min_crop_frac}: it must lie above 0 and be at most 1")
    if randaugment_ops < 0 or (randaugment_ops and not 3 <= randaugment_magnitude <= 15):
        asked = f"randaugment_ops is {randaugment_ops}, randaugment_magnitude {randaugment_magnitude}"
        raise ValueError(f"{asked}: 0 or more, and 3 to 15")
    if randaugment_ops and augment != "imagenet":
        raise ValueError(f"randaugment_ops is {randaugment_ops} with augment={augment!r}: it goes with 'imagenet' only")
    px, filter_ = view.image_px, v2.InterpolationMode(view.interpolation)
    erase = [v2.RandomErasing(erase_frac, value="random")] if erase_frac else []
    if augment == "none":
        return v2.Compose([view.evaluate, *erase]) if erase else view.evaluate
    if augment == "imagenet":
        crop = v2.RandomResizedCrop(px, scale=(min_crop_frac, 1), interpolation=filter_)
        steps = [crop, v2.RandomHorizontalFlip(flip_frac)]
        if randaugment_ops:
            grey = (128,) * 3 if view.in_channels == 3 else 128  # where the picture ends, as published
            strength = f"rand-m{randaugment_magnitude}-n{randaugment_ops}-p1.0-mmax{max(10, randaugment_magnitude)}"
            shift_px = int(0.45 * px)  # at the end of the scale; 100 of 224
            steps.append(rand_augment_transform(strength, {"img_mean": grey, "translate_const": shift_px}))
    elif augment == "digits":
        steps = [v2.Resize((px, px), filter_), v2.RandomAffine(10, (0.08, 0.08), (0.9, 1.1), interpolation=filter_)]
    else:
        raise ValueError(f"augment is {augment!r}: 'imagenet', 'digits' or 'none'")
    return v2.Compose([view._in_mode, *steps, view._normalised, *erase])


def mix(
    images: Tensor,
    labels: Tensor,
    *,
    classes: int,
    seed: int,
    step: int,
    mixup_alpha: float = 0.0,
    cutmix_alpha: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Mixup or cutmix of neighbours in a batch (timm's): images (b, C, H, W) and targets (b, classes) that sum to 1.

    images, labels  (b, C, H, W) floats and (b,) classes, on any device, left as they are
    seed, step      decide everything drawn: the share and the rectangle are those of the step, on every rank, and image
                    2j is mixed with 2j + 1; so ranks that hold even parts of a batch compute what one process would
    mixup_alpha, cutmix_alpha  of the Beta distribution of the share; 0: never; with both above 0 a step takes either

    An odd last image stays alone.  Label smoothing is the loss's (cross_entropy takes these targets and smooths them).

    >>> labels = torch.tensor([0, 1, 2, 0])
    >>> images, targets = mix(torch.rand(4, 3, 8, 8), labels, classes=3, seed=0, step=7, cutmix_alpha=1.0)
    >>> images.shape, targets.sum(dim=1)
    (torch.Size([4, 3, 8, 8]), tensor([1., 1., 1., 1.]))
    """
    if mixup_alpha < 0 or cutmix_alpha < 0:
        raise ValueError(f"mixup_alpha is {mixup_alpha}, cutmix_alpha {cutmix_alpha}: 0 or more")
    targets = torch.nn.functional.one_hot(labels, classes).float()
    if len(images) < 2 or not (mixup_alpha or cutmix_alpha):
        return images, targets
    even = len(images) // 2 * 2
    # timm mixes image i with b - 1 - i: in this order those are neighbours.
    order = torch.cat([torch.arange(0, even, 2), torch.arange(1, even, 2).flip(0)]).to(images.device)
    timms = Mixup(mixup_alpha, cutmix_alpha, label_smoothing=0.0, num_classes=classes)
    ambient = np.random.get_state()  # noqa: NPY002  # where timm draws from
    try:
        np.random.seed(hash_of("mix", seed, step) % 2**32)  # noqa: NPY002
        mixed, mixed_targets = timms(images[order], labels[order])
    finally:
        np.random.set_state(ambient)  # noqa: NPY002
    images, targets = images.clone(), targets.to(mixed_targets.dtype)
    images[order], targets[order] = mixed, mixed_targets
    return images, targets
