"""The feature pyramid: torchvision's, whose 3x3 convolutions read no padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FeaturePyramidNetwork


class Maps(NamedTuple):
    """What a backbone finds: five maps, what of each is real (None: all), the images' sizes, and the canvas."""

    features: list[Tensor]
    reals: list[Tensor] | None
    sizes: list[tuple[int, int]]
    canvas: Tensor

    def of(self, i: int) -> Maps:
        """Those of one image."""
        reals = None if self.reals is None else [real[i : i + 1] for real in self.reals]
        return Maps([x[i : i + 1] for x in self.features], reals, self.sizes[i : i + 1], self.canvas[i : i + 1])


class Pyramid(FeaturePyramidNetwork):
    """Four maps, strides doubling, to five of equal width: P2..P5 and P6, every second row and column of P5.

    channels  of the four maps
    width     of the five. Batch norm on laterals and outputs, no bias, as torchvision's v2
    """

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__(list(channels), width, norm_layer=nn.BatchNorm2d)

    def forward(
        self, maps: Sequence[Tensor], reals: Sequence[Tensor] | None
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """The five maps, and what of each is real.

        reals  of each of the four, (b, 1, h, w), 1 on real positions; None: all are real
        """
        inner = [block(x) for block, x in zip(self.inner_blocks, maps, strict=True)]
        for i in reversed(range(len(inner) - 1)):
            above = F.interpolate(inner[i + 1], size=inner[i].shape[-2:], mode="nearest")
            inner[i] += above  # in its place, as below: the gradients need none of these maps
        for x, real in zip(inner, reals or (), strict=False):
            x *= real
        outer = [block(x) for block, x in zip(self.layer_blocks, inner, strict=True)]
        outer.append(outer[-1][:, :, ::2, ::2])
        return outer, None if reals is None else [*reals, reals[-1][:, :, ::2, ::2]]
