"""The LambdaResNets: stem, block, model.

Attribute and parameter names follow torchvision and timm: `layer1`..`layer4` are the paper's c2..c5.
"""

from collections.abc import Iterable
from typing import Any

import torch
from timm.layers import DropPath, SEModule, create_classifier
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lambdanets.layers import attention, controls
from lambdanets.layers.lambda_layer import LambdaLayer
from lambdanets.layers.loading import StrictLoading
from lambdanets.layers.spatial import SpatialLayer
from lambdanets.models.sizes import LETTERS, Size

EXPANSION = 4

COUNTERPARTS: dict[str, type[SpatialLayer]] = {
    "A": attention.AugmentedConvolution,
    "D": controls.DepthwiseConvolution,
    "E": attention.EfficientAttention,
    "G": attention.GlobalAttention,
    "P": controls.PooledConvolution,
    "R": attention.LocalAttention,
    "X": attention.AxialAttention,
}
"""The layers of the letters of `LETTERS` other than C and L."""


class Bottleneck(nn.Module):
    """1x1, then a 3x3 convolution or a layer in its place, then 1x1, on a shortcut; stride in the middle (v1.5).

    layer   a lambda layer or a counterpart of it, which takes `padding`; None: a 3x3 convolution
    """

    def __init__(
        self,
        dim: int,
        width: int,
        stride: int,
        *,
        layer: LambdaLayer | SpatialLayer | None,
        lambda_norm_act: bool,
        deep_shortcut: bool,
        se_ratio: float,
        double_attention: bool,
        drop_path: float,
    ) -> None:
        super().__init__()
        dim_out = width * EXPANSION
        self.conv1, self.bn1, self.act1 = _conv(dim, width, 1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        self.conv2 = _conv(width, width, 3, stride) if layer is None else layer
        keep = not isinstance(layer, LambdaLayer) or lambda_norm_act
        self.bn2 = nn.BatchNorm2d(width) if keep else nn.Identity()
        self.act2 = nn.ReLU(inplace=True) if keep else nn.Identity()
        self.conv3, self.bn3 = _conv(width, dim_out, 1), nn.BatchNorm2d(dim_out)
        nn.init.zeros_(self.bn3.weight)  # each block starts as its shortcut (docs/paper.md section 1)
        self.se: nn.Module = nn.Identity()
        if double_attention:
            self.se = attention.DoubleAttention(dim_out)
        elif se_ratio:
            self.se = SEModule(dim_out, rd_channels=int(dim_out * se_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.downsample: nn.Module | None = None
        if stride > 1 or dim != dim_out:
            pooled = stride > 1 and deep_shortcut
            # Odd sizes keep their last row: the pooling rounds up and averages what is there.
            pool = nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False) if pooled else nn.Identity()
            self.downsample = nn.Sequential(
                pool, _conv(dim, dim_out, 1, 1 if pooled else stride), nn.BatchNorm2d(dim_out)
            )
        self.act3 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """The block's map; `real` as in `LambdaResNet.forward_maps`, of the size of x."""
        y = self.bn1(self.conv1(x))
        told = isinstance(self.conv2, LambdaLayer | SpatialLayer)
        if real is not None and not told:
            # In its place, and before the ReLU, whose result its gradient needs: no second map is held.
            y *= real
        y = self.act1(y)
        y = self.conv2(y) if real is None or not told else self.conv2(y, padding=real[:, 0].bool())
        y = self.bn3(self.conv3(self.act2(self.bn2(y))))
        y = self.drop_path(self.se(y) if real is None else self._squeezed(y, fitted(real, y)))
        # In its place: a new map takes three times as long.
        y += x if self.downsample is None else self._shortcut(self.downsample, x, real)
        return self.act3(y)

    def _squeezed(self, y: Tensor, real: Tensor) -> Tensor:
        """Squeeze-and-excitation whose mean is over real positions, or double attention among them."""
        if isinstance(self.se, attention.DoubleAttention):
            return self.se(y, padding=real[:, 0].bool())
        if not isinstance(self.se, SEModule):
            return self.se(y)
        seen = real.flatten(2).mT.to(y.dtype)  # as a product: y * real would be a map of its own
        mean = (y.flatten(2) @ seen / seen.sum(1, keepdim=True))[..., None]
        return y * self.se.gate(self.se.fc2(self.se.act(self.se.bn(self.se.fc1(mean)))))

    @staticmethod
    def _shortcut(downsample: nn.Module, x: Tensor, real: Tensor | None) -> Tensor:
        """The shortcut, whose average pooling is over real positions."""
        if real is None:
            return downsample(x)
        pool, *rest = downsample.children()
        if not isinstance(pool, nn.Identity):
            real = real.to(x.dtype)
            share = pool(real)
            x = pool(x * real) / (share + (share == 0))
        for layer in rest:
            x = layer(x)
        return x


def fitted(real: Tensor, x: Tensor) -> Tensor:
    """The mask of a map, for a map x of the same size or of half of it, rounded up: every second row and column."""
    return real if real.shape[2:] == x.shape[2:] else real[:, :, ::2, ::2]


def masked(layers: Iterable[nn.Module], x: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The layers in turn, and the mask of what they give: padding is 0 wherever a kernel larger than 1 x 1 reads it."""
    layers = list(layers)
    around = [getattr(layer, "kernel_size", 1) not in (1, (1, 1)) for layer in layers]
    zero = False
    for i, layer in enumerate(layers):
        if real is not None and around[i] and not zero:
            x = x * real.to(x.dtype)  # autocast would have the product in float32
        if real is not None and i and isinstance(layer, nn.ReLU) and any(around[i + 1 :]):
            # In its place, and before the ReLU, whose result its gradient needs: no second map is held.
            x *= real
            zero = True
        elif not isinstance(layer, nn.ReLU):
            zero = False
        x = layer(x)
        real = None if real is None else fitted(real, x)
    return x, real


def _conv(dim: int, dim_out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(dim, dim_out, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


class LambdaResNet(StrictLoading):
    """Images to logits: a stem, four stages of bottlenecks, some of whose 3x3 are lambda layers, a classifier.

    size             a row of SIZES
    num_classes      0 returns the pooled features
    in_chans         image channels
    drop_rate        dropout before the classifier
    drop_path_rate   stochastic depth of c5; c2, c3, c4 get 2/5, 3/5, 4/5 of it
    global_pool      timm's names: "avg", "max", "avgmax", ""
    lambda_norm_act  batch norm and ReLU after a lambda layer, as after the 3x3 it replaces (unconfirmed by the paper)
    share_tables     one relative table for all lambda layers of a stage (paper, Table 4)
    lambda_args      arguments of `LambdaLayer` on top of the row's
    layer_args       arguments of the counterparts' layers (docs/evidence.md), as {"heads": 8}
    image_px         side of the largest image that those with tables of a whole map (A, G, X) take

    Any image from 32 pixels a side; H and W may differ. `forward(x)` takes (b, in_chans, H, W).
    """

    def __init__(
        self,
        size: Size,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
        lambda_norm_act: bool = True,
        share_tables: bool = False,
        lambda_args: dict[str, Any] | None = None,
        layer_args: dict[str, Any] | None = None,
        image_px: int = 224,
    ) -> None:
        super().__init__()
        for name, rate in (("drop_rate", drop_rate), ("drop_path_rate", drop_path_rate)):
            if not 0 <= rate < 1:
                raise ValueError(f"{name} must be in [0, 1) and is {rate}")
        if num_classes < 0 or in_chans < 1:
            raise ValueError(f"num_classes = {num_classes} must be at least 0 and in_chans = {in_chans} at least 1")
        for count, lambdas in zip(size.blocks, size.lambdas, strict=True):
            if lambdas not in LETTERS and (isinstance(lambdas, str) or not set(lambdas) <= set(range(1, count + 1))):
                raise ValueError(
                    f"a stage of {count} blocks is one of {', '.join(LETTERS)} or some of 1..{count}, and got "
                    f"{lambdas!r}"
                )
        if layer_args and not set(size.lambdas) & set(COUNTERPARTS):
            raise ValueError(f"layer_args are for {', '.join(COUNTERPARTS)}, and no stage has one of these")
        self.num_classes, self.drop_rate = num_classes, drop_rate
        self.grad_checkpointing = False

        stem = size.width
        # In this order: timm's features_only runs the children as they were registered.
        self.conv1, maxpool, reduction = _stem(size.stem, in_chans, stem)
        self.bn1, self.act1 = nn.BatchNorm2d(stem), nn.ReLU(inplace=True)
        self.maxpool = maxpool
        self.feature_info = [{"num_chs": stem, "reduction": reduction[0], "module": "act1"}]
        dim, stride = stem, reduction[1]
        for i, (count, lambdas) in enumerate(zip(size.blocks, size.lambdas, strict=True)):
            width = size.width * 2**i
            stage: list[Bottleneck] = []
            table: nn.Parameter | None = None
            for j in range(count):
                step = 2 if i > 0 and j == 0 else 1
                layer: LambdaLayer | SpatialLayer | None = None
                if isinstance(lambdas, str) and lambdas in COUNTERPARTS:
                    kind, args = COUNTERPARTS[lambdas], dict(layer_args or {})
                    if kind.sized:  # of the map that comes in
                        args.setdefault("size", -(-image_px // stride))
                    layer = kind(width, stride=step, **args)
                elif lambdas == "L" or (lambdas != "C" and j + 1 in lambdas):
                    args = {**size.lambda_args, **(lambda_args or {})}
                    layer = of_lambdas = LambdaLayer(width, stride=step, table=table if share_tables else None, **args)
                    table = of_lambdas.table
                block = Bottleneck(
                    dim, width, step, layer=layer, lambda_norm_act=lambda_norm_act, deep_shortcut=size.deep_shortcut,
                    se_ratio=size.se_ratio if size.se_stages[i] == "S" else 0.0,
                    double_attention=size.se_stages[i] == "2", drop_path=drop_path_rate * (i + 2) / 5,
                )  # fmt: skip
                stage.append(block)
                dim, stride = width * EXPANSION, stride * step
            name = f"layer{i + 1}"
            self.add_module(name, nn.Sequential(*stage))
            self.feature_info.append({"num_chs": dim, "reduction": stride, "module": name})
        self.num_features = self.head_hidden_size = dim
        self.global_pool, self.fc = create_classifier(dim, num_classes, pool_type=global_pool)

    def forward_features(self, x: Tensor) -> Tensor:
        """(b, in_chans, H, W) -> (b, num_features, H/32, W/32), rounded up."""
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        for stage in self.stages():
            x = checkpoint_seq(stage, x) if self.grad_checkpointing else stage(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(b, num_features, h, w) -> logits (b, num_classes), or the pooled features."""
        x = self.global_pool(x)
        return self._classified(x, pre_logits)

    def _classified(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_padded(self, x: Tensor, padding: Tensor) -> Tensor:
        """Logits (b, num_classes) of padded images: in evaluation each gets what it gets alone.

        x        (b, in_chans, H, W), the sides multiples of 32
        padding  bool (b, H, W), True on real pixels, which lie at the top left, False on padding
        """
        # Not an argument of `forward`: torch.fx, by which models are fused and cut into features, traces those.
        if padding.dtype != torch.bool or padding.shape != (x.shape[0], *x.shape[2:]):
            raise ValueError(
                f"padding must be bool (b, H, W) = {(x.shape[0], *x.shape[2:])}, True on real pixels, and is "
                f"{padding.dtype} {tuple(padding.shape)}"
            )
        rows, columns = padding.any(2), padding.any(1)
        first = [torch.arange(t.shape[1], device=t.device) < t.sum(1, keepdim=True) for t in (rows, columns)]
        if not bool(rows.any(1).all()) or not torch.equal(padding, first[0][:, :, None] & first[1][:, None, :]):
            raise ValueError("padding must be True on a rectangle at the top left of each image, and False elsewhere")
        if (kind := getattr(self.global_pool, "pool_type", None)) != "avg":
            raise ValueError(f"padding goes with the average pooling of a classifier, and global_pool is {kind!r}")
        maps, reals = self.forward_maps(x, padding[:, None].to(x.dtype))
        share = self.global_pool(reals[-1])  # (b, 1)
        return self._classified(self.global_pool(maps[-1] * reals[-1]) / share)

    def forward_maps(self, x: Tensor, real: Tensor | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """The maps of c2..c5, and which of their positions are real: what a detector stands on.

        real  (b, 1, H, W) of the type of x: 1 on real pixels, which lie at the top left, 0 on padding. Every layer that
              would mix them is told: what an image gets does not depend on its padding, but for batch norm's statistics
              in training. None: all pixels are real, and no masks are given back
        The map of a stage has ceil(H / 4), ceil(H / 8), ... rows (of a "small" stem H, H / 2, ...).
        """
        stem = (part for module in (self.conv1, self.bn1, self.act1, self.maxpool) for part in _layers(module))
        x, real = masked(stem, x, real)
        maps, reals = [], []
        for stage in self.stages():
            for block in stage:
                held = (x,) if real is None else (x, real)
                x = checkpoint(block, *held, use_reentrant=False) if self.grad_checkpointing else block(*held)
                real = None if real is None else fitted(real, x)
            maps.append(x)
            if real is not None:
                reals.append(real)
        return maps, reals

    def stages(self) -> list[nn.Sequential]:
        """c2..c5."""
        return [getattr(self, f"layer{i}") for i in range(1, 5)]

    # What timm asks of a model.

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The stem's map and those of c2..c5 on the way, as timm's ResNets give them.

        indices             of the five: the last so many, or a list; None: all
        norm                there is no norm to apply at the end
        stop_early          compute no stage after the last that is asked for
        output_fmt          NCHW only
        intermediates_only  leave out what `forward_features` returns
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is {output_fmt!r}: this model's maps are NCHW")
        wanted, last = feature_take_indices(5, indices)
        x = self.act1(self.bn1(self.conv1(x)))
        found = [x] if 0 in wanted else []
        x = self.maxpool(x)
        for i, stage in enumerate(self.stages()[: last if stop_early else 4], start=1):
            x = checkpoint_seq(stage, x) if self.grad_checkpointing else stage(x)
            found += [x] if i in wanted else []
        return found if intermediates_only else (x, found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove, in place, the stages after the last of these intermediates; gives their indices."""
        wanted, last = feature_take_indices(5, indices)
        for at in range(last + 1, 5):
            setattr(self, f"layer{at}", nn.Sequential())
        if last == 0:
            self.maxpool = nn.Identity()
        if last < 4:  # the head was for features that are gone
            self.num_features = self.head_hidden_size = int(str(self.feature_info[last]["num_chs"]))
        if prune_head or last < 4:
            self.reset_classifier(0, "")
        return list(wanted)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations block by block in the backward pass."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier for another class count; 0 removes it."""
        self.num_classes = num_classes
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        like = next(self.parameters())
        head = create_classifier(self.num_features, num_classes, pool_type=pool, device=like.device, dtype=like.dtype)
        self.global_pool, self.fc = (part.train(self.training) for part in head)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Parameter groups for layer-wise learning rates."""
        return {"stem": r"^(?:conv1|bn1|maxpool)", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    def no_weight_decay(self) -> set[str]:
        """The relative tables: they are positions, not weights of a projection."""
        return {
            name
            for name, _ in self.named_parameters()
            if name.endswith(("conv2.table", "conv2.table_rows", "conv2.table_columns"))
        }


def _layers(module: nn.Module) -> Iterable[nn.Module]:
    return module if isinstance(module, nn.Sequential) else (module,)


def _stem(kind: str, in_chans: int, width: int) -> tuple[nn.Module, nn.Module, tuple[int, int]]:
    """conv1, what stands for the max pool, and the reductions after each."""
    if kind == "plain":
        conv = nn.Conv2d(in_chans, width, 7, 2, 3, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        return conv, nn.MaxPool2d(3, 2, 1), (2, 4)
    if kind == "deep":
        half = width // 2
        parts: list[nn.Module] = []
        for a, b, stride in ((in_chans, half, 2), (half, half, 1)):
            parts += [_conv(a, b, 3, stride), nn.BatchNorm2d(b), nn.ReLU(inplace=True)]
        down = nn.Sequential(_conv(width, width, 3, 2), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        return nn.Sequential(*parts, _conv(half, width, 3)), down, (2, 4)
    if kind == "small":
        return _conv(in_chans, width, 3), nn.Identity(), (1, 1)
    raise ValueError(f"stem must be plain, deep or small and is {kind!r}")
