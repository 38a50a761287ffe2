"""Training runs written down: one dataclass, one function for each run worth repeating. Nothing here imports torch.

`Recipe` is what a run learns, `Options` how it is computed and watched.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, get_args

from lambdanets.errors import BadRecipe
from lambdanets.recipes import digits, folder, imagenet
from lambdanets.recipes.recipe import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    BatchNorm,
    Optimizer,
    Options,
    Precision,
    Recipe,
    RecipeName,
)

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "BadRecipe",
    "BatchNorm",
    "Options",
    "Precision",
    "Recipe",
    "RecipeName",
    "choose",
    "digits",
    "folder",
    "imagenet",
]


def choose(
    name: RecipeName,
    *,
    model: str | None = None,
    image_px: int | None = None,
    epochs: int | None = None,
    batch_images: int | None = None,
    lr_per_256: float | None = None,
    optimizer: Optimizer | None = None,
    accumulation: int | None = None,
    clip_norm: float | None = None,
    batch_norm: BatchNorm | None = None,
    precision: Precision | None = None,
    flip_frac: float | None = None,
    min_crop_frac: float | None = None,
    randaugment_ops: int | None = None,
    randaugment_magnitude: int | None = None,
    erase_frac: float | None = None,
    mixup_alpha: float | None = None,
    cutmix_alpha: float | None = None,
    label_smoothing: float | None = None,
    small: bool = False,
) -> Recipe:
    """The recipe of that name with the given values in place of its own; what the command line calls.

    model, image_px  for "pareto" they select the row of the paper: "lambda_resnet152" and 224
    epochs           the warm-up keeps its share of the run
    small            the form that a CPU finishes in a minute
    Raises BadRecipe: an unknown name, and whatever Recipe refuses.

    >>> choose("digits", epochs=3).epochs
    3
    """
    if name == "digits":
        recipe = digits.digits(small=small)
    elif name == "folder":
        recipe = folder.folder(small=small)
    elif name == "finetune":
        recipe = imagenet.finetune(small=small)
    elif name == "layer_comparison":
        recipe = imagenet.layer_comparison(small=small)
    elif name == "pareto":
        depth = re.fullmatch(r"lambda_resnet(\d+)", model or "lambda_resnet50")
        if depth is None:
            raise BadRecipe(
                f"model must be one of the paper's lambda_resnetDEPTH for the recipe 'pareto', not {model!r}"
            )
        recipe = imagenet.pareto(int(depth[1]), image_px or 128, small=small)
    elif name in ("detect", "table6"):
        raise BadRecipe(f"recipe {name!r} is of detectors: lambdanets.recipes.coco.choose makes it")
    else:
        raise BadRecipe(f"recipe must be one of {', '.join(get_args(RecipeName))}, not {name!r}")

    if epochs is not None:
        if epochs < 1:  # before with_epochs, whose own complaint would be about the warm-up
            raise BadRecipe(f"epochs must be at least 1, not {epochs}")
        recipe = recipe.with_epochs(epochs)
    if model is not None and not (small and name == "pareto"):  # there the model chose the row, and is made small
        recipe = replace(recipe, model=model)
    if image_px is not None and not (small and name == "pareto"):
        recipe = replace(recipe, image_px=image_px)
    changes: dict[str, Any] = {
        "batch_images": batch_images,
        "lr_per_256": lr_per_256,
        "optimizer": optimizer,
        "accumulation": accumulation,
        "clip_norm": clip_norm,
        "batch_norm": batch_norm,
        "precision": precision,
        "flip_frac": flip_frac,
        "min_crop_frac": min_crop_frac,
        "randaugment_ops": randaugment_ops,
        "randaugment_magnitude": randaugment_magnitude,
        "erase_frac": erase_frac,
        "mixup_alpha": mixup_alpha,
        "cutmix_alpha": cutmix_alpha,
        "label_smoothing": label_smoothing,
    }
    for argument in ("flip_frac", "min_crop_frac"):
        if changes[argument] is not None and recipe.augment != "imagenet":
            raise BadRecipe(
                f"{argument} is {changes[argument]}, but flips and crops go with augment='imagenet' only, and the "
                f"recipe {recipe.name!r} has {recipe.augment!r}"
            )
    recipe = replace(recipe, **{argument: value for argument, value in changes.items() if value is not None})
    if randaugment_magnitude is not None and not recipe.randaugment_ops:
        raise BadRecipe(f"randaugment_magnitude is {randaugment_magnitude}, but randaugment_ops is 0: give both")
    return recipe
