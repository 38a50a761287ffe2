"""Models by name: ours, registered with timm, and timm's public ones."""

import difflib
import re
from collections.abc import Callable
from typing import Any

import timm
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    register_notrace_module,
)
from torch import nn

from lambdanets.layers.attention import DoubleAttention
from lambdanets.layers.lambda_layer import LambdaLayer, LambdaLayer1d, LambdaLayer3d
from lambdanets.models.resnet import COUNTERPARTS, LambdaResNet
from lambdanets.models.sizes import LETTERS, SIZES, Size
from lambdanets.models.timm_layers import accelerate

__all__ = ["create_model", "list_models"]  # timm adds the names

PUBLIC = ("lambda_resnet26t", "lambda_resnet26rpt_256", "lambda_resnet50ts", "lamhalobotnet50ts_256")

# One call to timm's tracers; the layers import no timm.
for _kind in (LambdaLayer, LambdaLayer1d, LambdaLayer3d, DoubleAttention, *COUNTERPARTS.values()):
    register_notrace_module(_kind)


def _default_cfg(size: Size) -> dict[str, Any]:
    side = 32 if size.stem == "small" else 224
    return {
        "url": "", "num_classes": 1000, "input_size": (3, side, side), "pool_size": (side // 32 or 1,) * 2,
        "crop_pct": 0.875, "interpolation": "bicubic", "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
        "first_conv": "conv1.0" if size.stem == "deep" else "conv1", "classifier": "fc",
    }  # fmt: skip


_WORD = re.compile(f"resnet50_([{''.join(LETTERS).lower()}]{{4}})")

default_cfgs = generate_default_cfgs({name: _default_cfg(size) for name, size in SIZES.items()})


def _entrypoint(name: str) -> Callable[..., LambdaResNet]:
    def build(pretrained: bool = False, **kwargs: Any) -> LambdaResNet:
        return build_model_with_cfg(
            LambdaResNet, name, pretrained, size=SIZES[name], feature_cfg={"flatten_sequential": False}, **kwargs
        )

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"{name}: the row of SIZES, with timm's arguments (num_classes, in_chans, features_only, ...)."
    return register_model(build)


ENTRYPOINTS = {name: _entrypoint(name) for name in SIZES}


def list_models() -> list[str]:
    """The names that `create_model` takes; it takes any other word of four letters of `LETTERS` as well."""
    return list(SIZES)


def create_model(
    name: str,
    *,
    pretrained: bool = False,
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    share_tables: bool = False,
    lambda_args: dict[str, Any] | None = None,
    layer_args: dict[str, Any] | None = None,
    image_px: int = 224,
) -> nn.Module:
    """Build a LambdaResNet by name, with the paper's initialisation; or a public model of timm's, `accelerate`d.

    name             one of `list_models()`, or of PUBLIC with timm's tag or without: "lambda_resnet50ts.a1h_in1k". Any
                     "resnet50_" and four letters, one for each of c2 to c5, is a model: C convolutions, L lambda
                     layers, and their counterparts A, D, E, G, P, R, X (docs/evidence.md has them; `sizes.LETTERS`)
    pretrained       timm's published weights, downloaded by timm; only the names in PUBLIC have any. What they expect
                     of an image is in `model.pretrained_cfg`: 256 px, crop 0.94 or 0.95
    num_classes      another count than the weights' starts a new classifier; 0 gives features
    drop_rate        dropout before the classifier
    drop_path_rate   stochastic depth of c5, scaled down towards c2
    share_tables     one relative table a stage (paper, Table 4); ours only
    lambda_args      arguments of `LambdaLayer`, e.g. {"key_depth": 8, "heads": 8} (paper, ablation); ours only
    layer_args       arguments of the counterparts' layers, e.g. {"heads": 8}; ours only
    image_px         side of the largest image that A, G and X take: their tables are of a whole map; ours only

    The same names work in `timm.create_model` once lambdanets is imported, with timm's arguments.

    >>> sum(p.numel() for p in create_model("resnet50_llll").parameters())
    14995592
    >>> sum(p.numel() for p in create_model("lambda_resnet26t").parameters())
    10958272
    """
    if name.split(".")[0] in PUBLIC:
        if share_tables or lambda_args or layer_args or image_px != 224:
            raise ValueError(
                f"{name!r} is timm's model, of fixed layers, and got share_tables={share_tables}, "
                f"lambda_args={lambda_args}, layer_args={layer_args}, image_px={image_px}: leave them out, or take one "
                "of lambdanets.list_models()"
            )
        model: nn.Module = timm.create_model(
            name, pretrained=pretrained, num_classes=num_classes, in_chans=in_channels, drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
        )  # fmt: skip
        accelerate(model)
        return model
    if pretrained:
        raise ValueError(
            f"pretrained=True, and nobody has published weights of {name!r}; of {', '.join(PUBLIC)} timm has"
        )
    return create_lambda_resnet(
        name, num_classes=num_classes, in_chans=in_channels, drop_rate=drop_rate, drop_path_rate=drop_path_rate,
        share_tables=share_tables, lambda_args=lambda_args, layer_args=layer_args, image_px=image_px,
    )  # fmt: skip


def create_lambda_resnet(name: str, **timms: Any) -> LambdaResNet:
    """One of ours, with timm's names of the arguments. Raises ValueError where none is called so, with near names."""
    if name not in SIZES and (word := _WORD.fullmatch(name)):
        size = Size.hybrid(word[1])
        # Its configuration is given: a name that is not registered would have none.
        return build_model_with_cfg(
            LambdaResNet, name, False, pretrained_cfg=_default_cfg(size), size=size,
            feature_cfg={"flatten_sequential": False}, **timms,
        )  # fmt: skip
    if name not in SIZES:
        near = difflib.get_close_matches(name, SIZES, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise ValueError(f"no model is called {name!r}: {hint}lambdanets.list_models() has all {len(SIZES)} names")
    return ENTRYPOINTS[name](**timms)
