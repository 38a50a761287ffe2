"""The images, objects and regions that `benchmarks.detector` shows to every contender."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

CLASSES, OBJECTS = 90, 8


def pictures(px: int, batch: int, device: str) -> Tensor:
    """Images (batch, 3, px, px) in [0, 1]: a photograph of 4:3, and black below it."""
    draw = torch.Generator().manual_seed(1)
    canvas = torch.zeros(batch, 3, px, px)
    canvas[:, :, : px * 3 // 4] = torch.rand(batch, 3, px * 3 // 4, px, generator=draw)
    return canvas.to(device)


def objects(height: int, width: int, batch: int, device: Any) -> list[dict[str, Tensor]]:
    """8 objects an image, all in its upper three quarters, whatever its height; half of each box is mask."""
    draw = torch.Generator().manual_seed(2)
    targets = []
    for _ in range(batch):
        side = width * torch.exp(torch.empty(OBJECTS, 2).uniform_(math.log(0.06), math.log(0.6), generator=draw))
        side = side.clamp(4)
        low = torch.rand(OBJECTS, 2, generator=draw) * (torch.tensor([1.0, 0.75]) * width - side)
        boxes = torch.cat((low, low + side), 1)
        masks = torch.zeros(OBJECTS, height, width, dtype=torch.uint8)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.long().tolist(), strict=True):
            mask[y0 : y1 + 1, x0 : (x0 + x1) // 2 + 1] = 1
        labels = torch.randint(1, CLASSES + 1, (OBJECTS,), generator=draw)
        targets.append({"boxes": boxes.to(device), "labels": labels.to(device), "masks": masks.to(device)})
    return targets


def regions(targets: list[dict[str, Tensor]], counts: list[int]) -> list[Tensor]:
    """So many proposals (n, 4) of each image: every fourth lies on an object, the others are the inside of one.

    Random weights propose hardly anything on objects, and each model something else; after training a quarter of the
    regions that losses are computed on are on objects, whose masks cost as much as all boxes.
    """
    draw = torch.Generator().manual_seed(4)
    found = []
    for target, n in zip(targets, counts, strict=True):
        boxes = target["boxes"].cpu()[torch.arange(n) // 4 % OBJECTS]
        share = torch.empty(n, 2).uniform_(0.9, 1.1, generator=draw)
        share[torch.arange(n) % 4 > 0] *= 0.4
        middle, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2 * share
        found.append(torch.cat((middle - half, middle + half), 1).to(target["boxes"].device))
    return found
