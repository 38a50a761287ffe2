"""What layers in the place of a 3x3 convolution share: the check of a map, the pooling that is their stride."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from lambdanets.layers.loading import _AVG_POOL, StrictLoading
from lambdanets.layers.projections import as_one_call, in_format_of

fx.wrap("as_one_call")


def average_pool(
    y: Tensor, stride: int, padding: Tensor | None = None, *, size: int = 3, count_padding: bool = False
) -> Tensor:
    """The average pooling that gives a layer its stride: of 3x3, of real positions alone (docs/paper.md section 2).

    y         (b, c, *map), of one, two or three axes
    padding   bool (b, *map), True on real positions: the others are not averaged, and a window without any gives 0
    size, count_padding   side of the window; whether what lies outside of the map counts as zeros
    returns   (b, c, *map / stride), rounded up where size is odd
    """
    axes = y.dim() - 2
    pool = _AVG_POOL[axes - 1]
    half = size // 2 if size % 2 else 0
    real = None if padding is None else padding[:, None].to(y.dtype)
    if (side := min(y.shape[2:])) < size:
        if not half:
            raise ValueError(f"the map {tuple(y.shape[2:])} is smaller than the pooling: {side} < {size}")
        if axes == 3:  # the library refuses these, of three axes alone: what it would add is added here
            if real is None and not count_padding:
                real = y.new_ones(1, 1, *y.shape[2:])
            y, real = F.pad(y, [half] * 6), None if real is None else F.pad(real, [half] * 6)
            half = 0
    if real is None:
        return pool(y, size, stride, half, count_include_pad=count_padding)
    total = pool(y * real, size, stride, half, count_include_pad=False)
    share = pool(real, size, stride, half, count_include_pad=False)
    return torch.where(share > 0, total / share.clamp_min(torch.finfo(y.dtype).tiny), 0)


class SpatialLayer(StrictLoading):
    """What may stand in the place of a bottleneck's 3x3 convolution: (b, dim, H, W) to (b, dim, H/s, W/s).

    A layer gives `mixed`, the map at the resolution of its input. A stride is the average pooling of the lambda layer
    after that, so that two layers of one place differ in the layer alone; where a layer is not `pooled`, `mixed` has
    the stride itself. All take `padding`, so that all work in `LambdaResNet.forward_padded` and in a detector.
    """

    sized: ClassVar[bool] = False
    """Whether it has tables of a whole map, and takes `size`."""

    def __init__(self, dim: int, stride: int, *, pooled: bool = True, **counts: int | None) -> None:
        super().__init__()
        for name, count in {"dim": dim, "stride": stride, **counts}.items():
            if count is not None and (not isinstance(count, int) or count < 1):
                raise ValueError(f"{name} must be a positive integer and is {count!r}")
        self.dim, self.stride, self.pooled = dim, stride, pooled

    def forward(self, x: Tensor, *, padding: Tensor | None = None) -> Tensor:
        """Apply the layer.

        x        (b, dim, H, W), any H and W
        padding  bool (b, H, W), True on real pixels, False on padding; in evaluation every image then gets what
                 it gets alone
        returns  (b, dim, H, W), or the map divided by stride, rounded up
        """
        return as_one_call(self, x, padding)

    def evaluate(self, x: Tensor, padding: Tensor | None) -> Tensor:
        """`forward` itself."""
        self.check(x, padding)
        y = in_format_of(x, self.mixed(x, padding))
        return y if self.stride == 1 or not self.pooled else average_pool(y, self.stride, padding)

    def mixed(self, x: Tensor, padding: Tensor | None) -> Tensor:
        """The layer without the pooling: (b, dim, H, W) to the same, or to its stride where it is not `pooled`."""
        raise NotImplementedError

    def mixing_macs(self, height: int, width: int) -> int:
        """Multiply-adds for one image's map of this size, those of the layer's own convolutions left out."""
        return 0

    def check(self, x: Tensor, padding: Tensor | None) -> None:
        """Raises ValueError where a map or its padding has another shape than the layer takes."""
        if x.dim() != 4 or x.shape[1] != self.dim:
            raise ValueError(f"x must be (b, {self.dim}, H, W) and is {tuple(x.shape)}")
        if padding is not None and (padding.dtype != torch.bool or padding.shape != (x.shape[0], *x.shape[2:])):
            raise ValueError(
                f"padding must be bool (b, H, W) = {(x.shape[0], *x.shape[2:])}, True on real pixels, and is "
                f"{padding.dtype} {tuple(padding.shape)}"
            )


def hidden(x: Tensor, padding: Tensor | None) -> Tensor:
    """The map with zeros on its padding, for a convolution that reads around each position."""
    return x if padding is None else x * padding[:, None].to(x.dtype)
