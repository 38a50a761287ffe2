"""Training detectors on COCO files: the paper's Table 6, and people's own data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from lambdanets.errors import BadRecipe
from lambdanets.recipes.recipe import IMAGENET_MEAN, IMAGENET_STD, TrainingRecipe

Padding = Literal["masked", "visible"]


@dataclass(frozen=True, kw_only=True)
class DetectionRecipe(TrainingRecipe):
    """Everything that decides what a detector learns, apart from the images, the seed and the device.

    model               the backbone: a name of `lambdanets.list_models()`
    image_px            side of the square that training crops to; evaluation shrinks or grows the longer side to it
    scale_jitter        a picture is shown at image_px times a factor drawn evenly between these, then cropped at random
    flip_frac           share of the pictures that are flipped from left to right
    turns               all eight flips and quarter turns in its place: for pictures without an up (cells, aerial ones)
    photometric         brightness, contrast, saturation and hue are changed at random
    padding             "masked": no output depends on the padding; "visible": as everybody else does it
    masks               False: boxes alone
    in_channels, mean, std   1: grey; 3: RGB; of each channel, in [0, 1]
    drop_path_rate      stochastic depth of the last block, in [0, 1)
    fpn_channels, anchor_per_stride, rpn_convs, box_convs, box_fc, mask_convs, proposals, rois_per_image,
    roi_positive_frac, detections, score_min   the heads' sizes and counts: `detection.detector.HeadSizes`
    eval_batch_images   images a batch in evaluation; changes memory and time, not the result
    """

    image_px: int
    scale_jitter: tuple[float, float] = (1.0, 1.0)
    flip_frac: float = 0.5
    turns: bool = False
    photometric: bool = False
    padding: Padding = "masked"
    masks: bool = True
    in_channels: int = 3
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    drop_path_rate: float = 0.0
    fpn_channels: int = 256
    anchor_per_stride: float = 8.0
    rpn_convs: int = 2
    box_convs: int = 4
    box_fc: int = 1024
    mask_convs: int = 4
    proposals: tuple[int, ...] = (2000, 1000, 1000, 1000)
    rois_per_image: int = 512
    roi_positive_frac: float = 0.25
    detections: int = 100
    score_min: float = 0.05
    eval_batch_images: int = 8

    def _check(self) -> None:
        super()._check()
        need = self._need
        for argument in (
            "image_px", "eval_batch_images", "fpn_channels", "box_fc", "rois_per_image", "detections",
        ):  # fmt: skip
            need(getattr(self, argument) >= 1, argument, "at least 1")
        for argument in ("rpn_convs", "box_convs", "mask_convs"):
            need(1 <= getattr(self, argument) <= 16, argument, "1 to 16")
        need(self.image_px >= 32, "image_px", "at least 32")
        need(
            len(self.scale_jitter) == 2 and 0 < self.scale_jitter[0] <= self.scale_jitter[1] <= 8,
            "scale_jitter",
            "two factors, ascending, above 0 and at most 8",
        )
        need(self.padding in ("masked", "visible"), "padding", "'masked' or 'visible'")
        need(self.in_channels in (1, 3), "in_channels", "1 (grey) or 3 (RGB)")
        need(len(self.mean) == self.in_channels, "mean", f"one number for each of in_channels = {self.in_channels}")
        need(len(self.std) == self.in_channels, "std", f"one number for each of in_channels = {self.in_channels}")
        need(all(s > 0 for s in self.std), "std", "greater than 0")
        need(0 <= self.flip_frac <= 1, "flip_frac", "in [0, 1]")
        need(0 <= self.drop_path_rate < 1, "drop_path_rate", "in [0, 1)")
        need(0 < self.roi_positive_frac <= 1, "roi_positive_frac", "above 0 and at most 1")
        need(0 < self.score_min < 1, "score_min", "in (0, 1)")
        need(0 < self.anchor_per_stride <= 64, "anchor_per_stride", "above 0 and at most 64")
        need(len(self.proposals) == 4 and min(self.proposals) >= 1, "proposals", "four counts, at least 1")

    @property
    def heads(self) -> dict[str, Any]:
        """The arguments of `detection.detector.HeadSizes`."""
        names = (
            "fpn_channels", "anchor_per_stride", "rpn_convs", "box_convs", "box_fc", "mask_convs", "proposals",
            "rois_per_image", "roi_positive_frac", "detections", "score_min",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}


def table6(*, small: bool = False) -> DetectionRecipe:
    """Mask R-CNN on COCO at 1024 px from scratch: the rows of the paper's Table 6, not measured here.

    | backbone | box AP | of small, medium, large | mask AP | of small, medium, large |
    |---|---|---|---|---|
    | ResNet-101 (resnet101_d) | 48.2 | 29.9, 50.9, 64.9 | 42.6 | 24.2, 45.6, 60.0 |
    | ResNet-101 + SE (resnet101_d_se) | 48.5 | | 42.8 | |
    | LambdaResNet-101 | 49.4 | 31.7, 52.2, 65.6 | 43.5 | 25.9, 46.5, 60.8 |
    | ResNet-152 (resnet152_d) | 48.9 | | 43.2 | |
    | ResNet-152 + SE (resnet152_d_se) | 49.4 | | 43.5 | |
    | LambdaResNet-152 | 50.0 | 31.8, 53.4, 67.0 | 43.9 | 25.5, 47.3, 62.0 |

        lambdanets train --recipe table6 --data COCO --model lambda_resnet101 --device cuda --workers 8

    The paper gives 1024 px alone. The rest is the recipe of the same group's published COCO training (tensorflow/tpu,
    7dc921f), at the length that is told of the paper: batch 256, rate 0.32, 1,000 steps of warm-up, 130,000 steps
    (281 epochs), a tenth after 90, 95 and 97.5 % of them, weight decay 4e-5, scale jitter 0.1 to 2, statistics of all
    processes. Ours: torchvision's heads and loss normalisation, padding masked, no decay of norms and tables.

    >>> table6().peak_lr, round(table6().steps * 256 / 118_287)
    (0.32, 281)
    """
    run = DetectionRecipe(
        name="table6",
        model="lambda_resnet101",
        image_px=1024,
        epochs=1,
        steps=130_000,
        batch_images=256,
        lr_per_256=0.32,
        warmup_steps=1_000,
        schedule="steps",
        drops=(0.9, 0.95, 0.975),
        weight_decay=4e-5,
        batch_norm="sync",
        scale_jitter=(0.1, 2.0),
        eval_epochs=10,
    )
    return replace(_small(run), name="table6_small") if small else run


def detect(*, small: bool = False) -> DetectionRecipe:
    """A detector for people's own data: LambdaResNet-50 at 640 px, 36 epochs, at least 3,000 steps.

        lambdanets train --data COCO

    The numbers are ours and no published result belongs to them: AdamW at 1e-4 for 16 images, clipped at 10, cosine,
    scale jitter 0.5 to 1.5. With --init-from the batch norms stay as they were learnt ("frozen"). A CPU trains the
    `small` form: lambda_resnet_small at 160 px, small heads, 300 steps.

    >>> round(detect().peak_lr, 6)
    0.0001
    """
    run = DetectionRecipe(
        name="detect",
        model="lambda_resnet50",
        image_px=640,
        epochs=36,
        min_steps=3_000,
        batch_images=16,
        lr_per_256=1.6e-3,
        warmup_steps=500,
        optimizer="adamw",
        weight_decay=0.05,
        clip_norm=10.0,
        scale_jitter=(0.5, 1.5),
        photometric=True,
    )
    return replace(_small(run), name="detect_small") if small else run


def nuclei(*, small: bool = False) -> DetectionRecipe:
    """The demonstration: 125 nuclei in one micrograph, of which a CPU learns to find and to outline the held-out ones.

        make demo-detection

    Of 33 held-out nuclei (and 5 small pieces of others, which do not count) the seeds 0, 1 and 2 gave box AP50 0.894,
    0.928 and 0.899, mask AP50 0.853, 0.896 and 0.928 (AP 0.62, 0.62, 0.61 and 0.61, 0.60, 0.59), each in 170 s of one
    core's time (2026-11-28). Views of 192 px are shown as 160 to 280 px and cropped to 160, in all eight flips and
    turns. These were the first values tried. `small` is for tests: four steps.
    """
    run = replace(
        _small(detect()),
        name="nuclei",
        steps=150,
        min_steps=0,
        eval_epochs=1000,
        scale_jitter=(1.0, 1.75),
        turns=True,
        in_channels=1,
        mean=(0.25,),
        std=(0.25,),
    )
    return replace(run, name="nuclei_small", steps=4, warmup_steps=1, image_px=64) if small else run


def _small(run: DetectionRecipe) -> DetectionRecipe:
    """The form that a CPU trains in minutes: regions, not the body, are the time there."""
    return replace(
        run,
        model="lambda_resnet_small",
        image_px=160,
        epochs=1,
        steps=0,
        min_steps=300,
        batch_images=4,
        warmup_steps=30,
        optimizer="adamw",
        lr_per_256=0.064,
        schedule="cosine",
        drops=(),
        weight_decay=0.05,
        clip_norm=10.0,
        batch_norm="local",
        scale_jitter=(0.8, 1.25),
        photometric=False,
        fpn_channels=64,
        anchor_per_stride=3.0,
        rpn_convs=1,
        box_convs=1,
        box_fc=256,
        mask_convs=2,
        proposals=(300, 150, 300, 150),
        rois_per_image=48,
        roi_positive_frac=0.5,
        eval_epochs=1,
        eval_batch_images=4,
    )


def choose(
    name: str,
    *,
    model: str | None = None,
    image_px: int | None = None,
    epochs: int | None = None,
    scale_jitter: tuple[float, float] | None = None,
    small: bool = False,
    **changes: Any,
) -> DetectionRecipe:
    """The detection recipe of that name, "detect" or "table6", with the given values in place of its own.

    Raises BadRecipe: an unknown name or argument, and whatever DetectionRecipe refuses.

    >>> choose("detect", epochs=3, batch_images=8).epochs
    3
    """
    if name not in ("detect", "table6"):
        raise BadRecipe(f"recipe must be 'detect' or 'table6' for COCO files, not {name!r}")
    recipe = detect(small=small) if name == "detect" else table6(small=small)
    if epochs is not None:
        if epochs < 1:
            raise BadRecipe(f"epochs must be at least 1, not {epochs}")
        recipe = recipe.with_epochs(epochs)
    given = {"model": model, "image_px": image_px, "scale_jitter": scale_jitter, **changes}
    known = set(DetectionRecipe.__dataclass_fields__)
    given = {argument: value for argument, value in given.items() if value is not None}
    if unknown := sorted(set(given) - known):
        raise BadRecipe(f"{', '.join(unknown)}: the recipe {name!r} of detection has no such thing")
    return replace(recipe, **given)
