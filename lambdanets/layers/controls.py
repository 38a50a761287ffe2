"""Two controls for a comparison with lambda layers, which the paper does not have: convolutions that share one of the
lambda layer's properties each, its pooling or its reach.
"""

from torch import Tensor, nn

from lambdanets.layers.spatial import SpatialLayer, hidden


class PooledConvolution(SpatialLayer):
    """A 3x3 convolution at the input's resolution, then the lambda layer's average pooling: its places, no queries.

        y = AvgPool_3x3,s (W * x)

    A bottleneck's own 3x3 convolution has its stride inside and skips three quarters of the places; a lambda layer
    does not (docs/paper.md section 2). This control has the same weights as the convolution and the lambda layer's way.

    dim      channels in and out
    kernel   side of the kernel, odd
    stride   2 pools; at stride 1 it is the usual convolution

    >>> import torch
    >>> PooledConvolution(8, stride=2)(torch.randn(1, 8, 7, 10)).shape
    torch.Size([1, 8, 4, 5])
    """

    def __init__(self, dim: int, *, kernel: int = 3, stride: int = 1) -> None:
        super().__init__(dim, stride, kernel=kernel)
        _odd(kernel)
        self.conv = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, bias=False)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def mixed(self, x: Tensor, padding: Tensor | None) -> Tensor:
        y: Tensor = self.conv(hidden(x, padding))
        return y


class DepthwiseConvolution(SpatialLayer):
    """A depthwise convolution of a large kernel, then a 1x1 convolution: the lambda layer's reach without its queries.

        y[n] = W · Σ_m R[m - n] ⊙ x[m],   R one kernel a channel

    dim      channels in and out
    kernel   side of the kernel, odd
    stride   2 pools as the lambda layer does
    pooled   False: the depthwise convolution has the stride instead

    >>> import torch
    >>> layer = DepthwiseConvolution(8, kernel=15)
    >>> sum(p.numel() for p in layer.parameters())  # 8 kernels of 225, and 8 x 8
    1864
    >>> layer(torch.randn(1, 8, 7, 10)).shape
    torch.Size([1, 8, 7, 10])
    """

    def __init__(self, dim: int, *, kernel: int = 15, stride: int = 1, pooled: bool = True) -> None:
        super().__init__(dim, stride, pooled=pooled, kernel=kernel)
        _odd(kernel)
        self.depthwise = nn.Conv2d(dim, dim, kernel, 1 if pooled else stride, kernel // 2, groups=dim, bias=False)
        self.pointwise = nn.Conv2d(dim, dim, 1, bias=False)
        nn.init.normal_(self.depthwise.weight, std=kernel**-1.0)
        nn.init.kaiming_normal_(self.pointwise.weight, mode="fan_out", nonlinearity="relu")

    def mixed(self, x: Tensor, padding: Tensor | None) -> Tensor:
        y: Tensor = self.pointwise(self.depthwise(hidden(x, padding)))
        return y


def _odd(kernel: int) -> None:
    if kernel % 2 == 0:
        raise ValueError(f"kernel must be odd, so that it has a middle, and is {kernel}")
