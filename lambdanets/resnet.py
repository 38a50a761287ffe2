"""The LambdaResNets: one table of sizes, one block, one model class, one function per published name.

Attribute and parameter names follow torchvision and timm: `layer1`..`layer4` are the paper's c2..c5.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from timm.layers import DropPath, SEModule, create_classifier
from timm.models import (
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
    register_notrace_module,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn import functional as F

from .layer import LambdaLayer, LambdaLayer1d, LambdaLayer3d, StrictLoading

__all__ = ["SIZES", "Bottleneck", "LambdaResNet", "Size", "create_model", "list_models"]  # timm adds the names

EXPANSION = 4

for _kind in (LambdaLayer, LambdaLayer1d, LambdaLayer3d):  # one call to timm's tracers; layer.py imports no timm
    register_notrace_module(_kind)


@dataclass(frozen=True)
class Size:
    """One row of the table of sizes.

    blocks       blocks in c2..c5
    lambdas      for each stage "C" (convolutions), "L" (lambda layers), or the 1-based blocks that are lambda layers
    stem         "plain" (7x7, max pool), "deep" (ResNet-D: three 3x3, then a strided 3x3), "small" (one 3x3, no stride)
    deep_shortcut   ResNet-D: 2x2 average pooling before the shortcut's 1x1, instead of a strided 1x1
    se_stages, se_ratio   stages with squeeze-and-excitation, its width as a fraction of the block's output
    width        channels inside c2's blocks; doubles every stage
    lambda_args  arguments of `LambdaLayer` other than its defaults
    """

    blocks: tuple[int, int, int, int]
    lambdas: tuple[str | tuple[int, ...], ...]
    stem: str = "deep"
    deep_shortcut: bool = True
    se_stages: str = "SS--"
    se_ratio: float = 0.25
    width: int = 64
    lambda_args: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def hybrid(word: str, **changes: Any) -> "Size":
        """ResNet-50 of Table 12: plain stem, no SE, v1.5 blocks; a letter a stage, C or L."""
        row = Size((3, 4, 6, 3), tuple(word.upper()), "plain", deep_shortcut=False, se_stages="----")
        return replace(row, **changes)


def _every(step: int, last: int) -> tuple[int, ...]:
    return tuple(range(step, last + 1, step))


# paper.md section 2. Which blocks of c4 are lambda layers is unconfirmed; how many is confirmed by counting parameters.
SIZES: dict[str, Size] = {
    "lambda_resnet50": Size((3, 4, 6, 3), ("C", "C", (3,), "L")),
    "lambda_resnet101": Size((3, 4, 23, 3), ("C", "C", _every(6, 18), "L")),
    "lambda_resnet152": Size((3, 8, 36, 3), ("C", "C", _every(5, 30), "L")),
    "lambda_resnet200": Size((3, 24, 36, 3), ("C", "C", _every(5, 30), "L")),
    "lambda_resnet270": Size((4, 29, 53, 4), ("C", "C", _every(8, 48), "L")),
    "lambda_resnet350": Size((4, 36, 72, 4), ("C", "C", _every(10, 60), "L")),
    "lambda_resnet420": Size((4, 44, 87, 4), ("C", "C", _every(10, 80), "L")),
    "lambda_resnet101_c4": Size((3, 4, 23, 3), tuple("CCLL")),
    "lambda_resnet152_c4": Size((3, 8, 36, 3), tuple("CCLL")),
    "lambda_resnet200_c4": Size((3, 24, 36, 3), tuple("CCLL")),
    "resnet50_se": Size.hybrid("CCCC", se_stages="SSSS", se_ratio=1 / 16),
    "resnet50_llll_u4": Size.hybrid("LLLL", lambda_args={"intra_depth": 4, "scope": 7}),
    # Ours, for images of 8 to 64 pixels and for tests: the same block, a stem without stride.
    "lambda_resnet_tiny": Size(
        (1, 1, 1, 1), tuple("CLLL"), "small", se_stages="----", width=16, lambda_args={"scope": 15, "key_depth": 8}
    ),
}
for _word in ("".join("CL"[i >> s & 1] for s in range(4)) for i in range(16)):
    SIZES[f"resnet50_{_word.lower()}"] = Size.hybrid(_word)


class Bottleneck(nn.Module):
    """1x1, then a 3x3 convolution or a lambda layer, then 1x1, on a shortcut; stride in the middle (v1.5)."""

    def __init__(
        self,
        dim: int,
        width: int,
        stride: int,
        *,
        lambda_layer: LambdaLayer | None,
        lambda_norm_act: bool,
        deep_shortcut: bool,
        se_ratio: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        dim_out = width * EXPANSION
        self.conv1, self.bn1, self.act1 = _conv(dim, width, 1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        self.conv2 = _conv(width, width, 3, stride) if lambda_layer is None else lambda_layer
        keep = lambda_layer is None or lambda_norm_act
        self.bn2 = nn.BatchNorm2d(width) if keep else nn.Identity()
        self.act2 = nn.ReLU(inplace=True) if keep else nn.Identity()
        self.conv3, self.bn3 = _conv(width, dim_out, 1), nn.BatchNorm2d(dim_out)
        nn.init.zeros_(self.bn3.weight)  # each block starts as its shortcut (paper.md section 1)
        self.se = SEModule(dim_out, rd_channels=int(dim_out * se_ratio)) if se_ratio else nn.Identity()
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

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.act2(self.bn2(self.conv2(y)))
        y = self.drop_path(self.se(self.bn3(self.conv3(y))))
        y += x if self.downsample is None else self.downsample(x)  # in its place: a new map takes three times as long
        return self.act3(y)


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
    ) -> None:
        super().__init__()
        for name, rate in (("drop_rate", drop_rate), ("drop_path_rate", drop_path_rate)):
            if not 0 <= rate < 1:
                raise ValueError(f"{name} must be in [0, 1) and is {rate}")
        if num_classes < 0 or in_chans < 1:
            raise ValueError(f"num_classes = {num_classes} must be at least 0 and in_chans = {in_chans} at least 1")
        for count, lambdas in zip(size.blocks, size.lambdas, strict=True):
            if lambdas not in ("C", "L") and (isinstance(lambdas, str) or not set(lambdas) <= set(range(1, count + 1))):
                raise ValueError(f"a stage of {count} blocks is 'C', 'L' or some of 1..{count}, and got {lambdas!r}")
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
                layer = None
                if lambdas == "L" or (lambdas != "C" and j + 1 in lambdas):
                    args = {**size.lambda_args, **(lambda_args or {})}
                    layer = LambdaLayer(width, stride=step, table=table if share_tables else None, **args)
                    table = layer.table
                block = Bottleneck(
                    dim, width, step, lambda_layer=layer, lambda_norm_act=lambda_norm_act,
                    deep_shortcut=size.deep_shortcut, se_ratio=size.se_ratio if size.se_stages[i] == "S" else 0.0,
                    drop_path=drop_path_rate * (i + 2) / 5,
                )  # fmt: skip
                stage.append(block)
                dim = width * EXPANSION
            stride *= 2 if i else 1
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
        x = F.dropout(self.global_pool(x), self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

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
        return {name for name, _ in self.named_parameters() if name.endswith("conv2.table")}


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


# --- names ----------------------------------------------------------------------------------------------------------


def _default_cfg(name: str) -> dict[str, Any]:
    size = SIZES[name]
    side = 32 if size.stem == "small" else 224
    return {
        "url": "", "num_classes": 1000, "input_size": (3, side, side), "pool_size": (side // 32 or 1,) * 2,
        "crop_pct": 0.875, "interpolation": "bicubic", "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
        "first_conv": "conv1.0" if size.stem == "deep" else "conv1", "classifier": "fc",
    }  # fmt: skip


default_cfgs = generate_default_cfgs({name: _default_cfg(name) for name in SIZES})


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build_model_with_cfg(
            LambdaResNet, name, pretrained, size=SIZES[name], feature_cfg={"flatten_sequential": False}, **kwargs
        )

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"{name}: the row of SIZES, with timm's arguments (num_classes, in_chans, features_only, ...)."
    return register_model(build)


lambda_resnet50 = _entrypoint("lambda_resnet50")
lambda_resnet101 = _entrypoint("lambda_resnet101")
lambda_resnet152 = _entrypoint("lambda_resnet152")
lambda_resnet200 = _entrypoint("lambda_resnet200")
lambda_resnet270 = _entrypoint("lambda_resnet270")
lambda_resnet350 = _entrypoint("lambda_resnet350")
lambda_resnet420 = _entrypoint("lambda_resnet420")
lambda_resnet101_c4 = _entrypoint("lambda_resnet101_c4")
lambda_resnet152_c4 = _entrypoint("lambda_resnet152_c4")
lambda_resnet200_c4 = _entrypoint("lambda_resnet200_c4")
lambda_resnet_tiny = _entrypoint("lambda_resnet_tiny")
resnet50_se = _entrypoint("resnet50_se")
resnet50_llll_u4 = _entrypoint("resnet50_llll_u4")
resnet50_cccc = _entrypoint("resnet50_cccc")
resnet50_lccc = _entrypoint("resnet50_lccc")
resnet50_clcc = _entrypoint("resnet50_clcc")
resnet50_llcc = _entrypoint("resnet50_llcc")
resnet50_cclc = _entrypoint("resnet50_cclc")
resnet50_lclc = _entrypoint("resnet50_lclc")
resnet50_cllc = _entrypoint("resnet50_cllc")
resnet50_lllc = _entrypoint("resnet50_lllc")
resnet50_cccl = _entrypoint("resnet50_cccl")
resnet50_lccl = _entrypoint("resnet50_lccl")
resnet50_clcl = _entrypoint("resnet50_clcl")
resnet50_llcl = _entrypoint("resnet50_llcl")
resnet50_ccll = _entrypoint("resnet50_ccll")
resnet50_lcll = _entrypoint("resnet50_lcll")
resnet50_clll = _entrypoint("resnet50_clll")
resnet50_llll = _entrypoint("resnet50_llll")


def list_models() -> list[str]:
    """Every name that `create_model` takes."""
    return list(SIZES)


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    share_tables: bool = False,
    lambda_args: dict[str, Any] | None = None,
) -> LambdaResNet:
    """Build a model by name, with the paper's initialisation.

    name             one of `list_models()`
    num_classes      0 for features
    drop_rate        dropout before the classifier
    drop_path_rate   stochastic depth of c5, scaled down towards c2
    share_tables     one relative table a stage (paper, Table 4)
    lambda_args      arguments of `LambdaLayer`, e.g. {"key_depth": 8, "heads": 8} (paper, ablation)

    The same names work in `timm.create_model` once lambdanets is imported, with timm's arguments.

    >>> model = create_model("resnet50_llll", num_classes=1000)
    >>> sum(p.numel() for p in model.parameters())
    14995592
    """
    if name not in SIZES:
        near = difflib.get_close_matches(name, SIZES, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise ValueError(f"no model is called {name!r}: {hint}lambdanets.list_models() has all {len(SIZES)} names")
    entry = globals()[name]
    return entry(
        num_classes=num_classes, in_chans=in_channels, drop_rate=drop_rate, drop_path_rate=drop_path_rate,
        share_tables=share_tables, lambda_args=lambda_args,
    )  # fmt: skip
