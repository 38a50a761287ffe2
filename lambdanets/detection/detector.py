"""Mask R-CNN on a body of four maps: torchvision's heads, told everywhere which pixels are padding.

The heads, their sizes and the names of their parameters are those of torchvision's `maskrcnn_resnet50_fpn_v2`, so its
weights load and its numbers are the test. What differs is what is done about padding (`padding="masked"`): no kernel
reads it, no mean counts it, no anchor on it is proposed or learnt from.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper

from lambdanets.detection.pyramid import Maps, Pyramid
from lambdanets.detection.regions import Heads, proposer
from lambdanets.models.create import PUBLIC, create_lambda_resnet
from lambdanets.models.sizes import SIZES
from lambdanets.models.timm_layers import accelerate
from lambdanets.recipes.recipe import IMAGENET_MEAN, IMAGENET_STD

Padding = Literal["masked", "visible"]
LOSSES = ("loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg")


@dataclass(frozen=True)
class HeadSizes:
    """Sizes and counts of the heads; the defaults are torchvision's v2, but for the proposals kept in training.

    fpn_channels       of each of the five maps
    anchor_per_stride  side of an anchor, in strides of its map
    rpn_convs, box_convs, mask_convs   3x3 convolutions of the region proposals, of boxes, of masks
    box_fc             outputs of the box head's linear layer
    proposals          kept before and after suppression in training, before and after it in evaluation
    rois_per_image     regions that an image's box loss is computed on
    roi_positive_frac  at most this share of them are on objects; masks are learnt on those
    detections         at most so many an image
    score_min          no detection scores less, in (0, 1)
    """

    fpn_channels: int = 256
    anchor_per_stride: float = 8.0
    rpn_convs: int = 2
    box_convs: int = 4
    box_fc: int = 1024
    mask_convs: int = 4
    proposals: tuple[int, int, int, int] = (2000, 1000, 1000, 1000)
    rois_per_image: int = 512
    roi_positive_frac: float = 0.25
    detections: int = 100
    score_min: float = 0.05

    def __post_init__(self) -> None:
        object.__setattr__(self, "proposals", tuple(self.proposals))  # JSON gives lists
        counts = ("fpn_channels", "rpn_convs", "box_convs", "box_fc", "mask_convs", "rois_per_image", "detections")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: one at least")
        if len(self.proposals) != 4 or min(self.proposals) < 1:
            raise ValueError(f"proposals is {self.proposals}: four counts, one at least")
        if not (self.anchor_per_stride > 0 and 0 < self.roi_positive_frac <= 1 and 0 < self.score_min < 1):
            raise ValueError(
                f"anchor_per_stride is {self.anchor_per_stride}, roi_positive_frac {self.roi_positive_frac}, score_min "
                f"{self.score_min}: above 0, at most 1 and below 1"
            )


class _Backbone(nn.Module):
    """`body` and `fpn`, under torchvision's names."""

    def __init__(self, body: nn.Module, channels: Sequence[int], fpn_channels: int) -> None:
        super().__init__()
        self.body, self.fpn = body, Pyramid(channels, fpn_channels)

    def forward(self, x: Tensor, real: Tensor | None) -> tuple[list[Tensor], list[Tensor] | None]:
        body: Any = self.body
        if hasattr(body, "forward_maps"):
            maps, reals = body.forward_maps(x, real)
        else:
            maps, reals = body(x)[-4:], []
        found: tuple[list[Tensor], list[Tensor] | None] = self.fpn(maps, reals or None)
        return found


class Detector(nn.Module):
    """Images to boxes, classes and masks of their objects; made by `create_detector`.

    forward(images, targets)   in training: a dict of five scalars, LOSSES (four without masks), means over the images
                               as torchvision computes them
    forward(images)            in evaluation: of each image a dict of boxes (n, 4) xyxy in its pixels, labels (n,) from
                               1, scores (n,), masks (n, 28, 28) in [0, 1], each of its box; `lambdanets.paste` puts
                               them into the picture. The best score comes first
    forward(images, targets, seeds=...)   in evaluation: these, and of each image its losses by themselves: frozen
                               norms, samples drawn by its own seed, whatever else is in the batch

    images   a list of (C, H_i, W_i) in [0, 1], of any sizes; or (b, C, H, W), padded right and below to multiples of
             `multiple`, with `sizes`, (height, width) of each
    targets  of each image a dict: boxes (n, 4) xyxy, floating; labels (n,) int64, 1..classes; masks (n, H_i, W_i)
             uint8, 0 or 1; and, where not every object has a mask, has_mask (n,) bool. n may be 0
    The model normalises by its own mean and std, pads, and masks the padding; it never resizes.
    """

    def __init__(
        self,
        body: nn.Module,
        *,
        classes: int,
        masks: bool = True,
        padding: Padding = "masked",
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        heads: HeadSizes | None = None,
    ) -> None:
        super().__init__()
        if type(classes) is not int or classes < 1:
            raise ValueError(f"classes is {classes!r}: a whole number, one at least, without the background")
        if padding not in ("masked", "visible"):
            raise ValueError(f"padding is {padding!r}: 'masked' or 'visible'")
        if padding == "masked" and not hasattr(body, "forward_maps"):
            raise ValueError(
                f"{type(body).__name__} cannot be told what is padding: take padding='visible', or a model of "
                "lambdanets.list_models()"
            )
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError(f"mean {tuple(mean)}, std {tuple(std)}: a number for each channel, std above 0")
        self.classes, self.padding, self.sizes_of_heads = classes, padding, heads or HeadSizes()
        heads = self.sizes_of_heads
        info: Any = body.feature_info  # a list of ours, a class of timm's, which knows what was chosen
        rows = (info.get_dicts() if hasattr(info, "get_dicts") else list(info))[-4:]
        self.strides = [int(row["reduction"]) for row in rows]
        if len(rows) < 4 or any(b != 2 * a for a, b in zip(self.strides, self.strides[1:], strict=False)):
            raise ValueError(f"{type(body).__name__} has maps of the strides {self.strides}: four are needed, doubling")
        self.multiple = 2 * self.strides[-1]
        self.register_buffer("mean", torch.tensor([float(m) for m in mean]).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor([float(s) for s in std]).view(-1, 1, 1))
        width = heads.fpn_channels
        self.backbone = _Backbone(body, [int(row["num_chs"]) for row in rows], width)
        self.rpn = proposer(
            width, [*self.strides, self.multiple], heads.anchor_per_stride, heads.rpn_convs, heads.proposals
        )
        convs = [width] * heads.box_convs
        box_head = FastRCNNConvFCHead((width, 7, 7), convs, [heads.box_fc], norm_layer=nn.BatchNorm2d)
        mask_parts: dict[str, nn.Module] = {}
        if masks:
            mask_parts = {
                "mask_roi_pool": self._pool(14),
                "mask_head": MaskRCNNHeads(width, [width] * heads.mask_convs, 1, norm_layer=nn.BatchNorm2d),
                "mask_predictor": MaskRCNNPredictor(width, width, classes + 1),
            }
        self.roi_heads = Heads(
            self._pool(7), box_head, FastRCNNPredictor(heads.box_fc, classes + 1),
            rois_per_image=heads.rois_per_image, positive_frac=heads.roi_positive_frac, score_min=heads.score_min,
            detections=heads.detections, **mask_parts,
        )  # fmt: skip

    def _pool(self, side: int) -> MultiScaleRoIAlign:
        """RoIAlign whose scales are those of the maps. It would guess them at its first call, and keep the guess."""
        pool = MultiScaleRoIAlign(["0", "1", "2", "3"], side, 2)
        pool.scales = [1 / stride for stride in self.strides]
        first, last = (round(math.log2(stride)) for stride in (self.strides[0], self.strides[-1]))
        pool.map_levels = LevelMapper(first, last)
        return pool

    @property
    def masks(self) -> bool:
        """Whether masks are found, or boxes alone."""
        return self.roi_heads.mask_head is not None

    def forward(
        self,
        images: Sequence[Tensor] | Tensor,
        targets: Sequence[dict[str, Tensor]] | None = None,
        *,
        sizes: Sequence[tuple[int, int]] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> Any:
        maps = self.maps(images, sizes)
        if maps.canvas.is_meta:
            return self._shapes(maps)
        if not self.training:
            found = self.found(maps)
            return found if seeds is None or targets is None else (found, self._judged(maps, targets, seeds))
        if targets is None:
            raise ValueError("in training a detector needs targets: model(images, targets)")
        self.check_targets(targets, maps.sizes)
        return self._losses(maps, targets)

    def maps(self, images: Sequence[Tensor] | Tensor, sizes: Sequence[tuple[int, int]] | None = None) -> Maps:
        """The five maps of the images, on one canvas."""
        canvas, real, given = self._on_canvas(images, sizes)
        features, reals = self.backbone(canvas, real)
        return Maps(features, reals, given, canvas)

    def found(self, maps: Maps) -> list[dict[str, Tensor]]:
        """What evaluation finds on the maps of `maps`; the model is in evaluation mode."""
        proposals, _ = self.rpn(maps, None)
        found, _ = self.roi_heads.of_maps(maps, proposals, None)
        return found

    def _judged(
        self, maps: Maps, targets: Sequence[dict[str, Tensor]], seeds: Sequence[int]
    ) -> list[dict[str, Tensor]]:
        """The five losses of each image by itself, in evaluation mode: frozen norms, samples drawn by its own seed.

        They do not depend on what else is in the batch.
        """
        self.check_targets(targets, maps.sizes)
        losses = []
        device = maps.canvas.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), self._samples_as_in_training():
            for i, (target, seed) in enumerate(zip(targets, seeds, strict=True)):
                torch.manual_seed(seed % 2**63)
                losses.append(self._losses(maps.of(i), [target]))
        return losses

    @contextlib.contextmanager
    def _samples_as_in_training(self) -> Iterator[None]:
        parts: tuple[nn.Module, ...] = (self.rpn, self.roi_heads)
        before = [part.training for part in parts]
        for part in parts:  # these two alone: what is in them keeps its mode
            part.training = True
        try:
            yield
        finally:
            for part, mode in zip(parts, before, strict=True):
                part.training = mode

    def _losses(self, maps: Maps, targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        proposals, of_regions = self.rpn(maps, targets)
        _, of_heads = self.roi_heads.of_maps(maps, proposals, targets)
        losses = {**of_heads, **of_regions}
        return {name: losses[name] for name in LOSSES if name in losses}

    def _shapes(self, maps: Maps) -> dict[str, Tensor]:
        """On the meta device: every layer is run through once, and nothing is found."""
        heads, channels = self.roi_heads, self.sizes_of_heads.fpn_channels
        reached = [*self.rpn.head(maps.features, maps.reals)[0]]
        reached += heads.box_predictor(heads.box_head(maps.canvas.new_empty(2, channels, 7, 7)))
        if heads.mask_head is not None:
            reached.append(heads.mask_predictor(heads.mask_head(maps.canvas.new_empty(2, channels, 14, 14))))
        return {"loss": torch.stack([x.sum() for x in reached]).sum()}

    def _on_canvas(
        self, images: Sequence[Tensor] | Tensor, sizes: Sequence[tuple[int, int]] | None
    ) -> tuple[Tensor, Tensor | None, list[tuple[int, int]]]:
        """The images, normalised, on one canvas; what of it is real (None: all, or it is not asked); their sizes."""
        mean, std = self.get_buffer("mean"), self.get_buffer("std")
        if mean.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"the detector's weights are {mean.dtype}, and boxes need float32: keep the weights so, and call it "
                "under torch.autocast"
            )
        channels = len(mean)
        for i, image in enumerate(images):
            if image.dim() != 3 or image.shape[0] != channels or not image.is_floating_point() or not image.numel():
                raise ValueError(
                    f"image {i} is {image.dtype} {tuple(image.shape)}: ({channels}, H, W), floating, in [0, 1], "
                    "is needed"
                )
        if not len(images):
            raise ValueError("there is no image")
        given = [(image.shape[1], image.shape[2]) for image in images]
        if isinstance(images, Tensor):
            canvas_px = given[0]
            given = given if sizes is None else [(int(h), int(w)) for h, w in sizes]
            wrong = [s for s in given if not (1 <= s[0] <= canvas_px[0] and 1 <= s[1] <= canvas_px[1])]
            if len(given) != len(images) or wrong:
                raise ValueError(f"sizes {given} are not of {len(images)} images on a canvas of {canvas_px}")
            if canvas_px[0] % self.multiple or canvas_px[1] % self.multiple:
                raise ValueError(
                    f"the sides of a padded batch must be multiples of {self.multiple} pixels, and are {canvas_px}: "
                    "give the images as a list, and the model pads them"
                )
        else:
            height, width = (max(side) for side in zip(*given, strict=True))
            if self.padding == "visible":  # on a canvas that depended on the batch, so would the results
                height = width = max(height, width)
            canvas_px = -(-height // self.multiple) * self.multiple, -(-width // self.multiple) * self.multiple
        canvas = mean.new_zeros(len(images), channels, *canvas_px)
        for i, (image, (height, width)) in enumerate(zip(images, given, strict=True)):
            canvas[i, :, :height, :width] = (image[:, :height, :width].to(mean.dtype) - mean) / std
        if self.padding == "visible" or all(size == canvas_px for size in given):
            return canvas, None, given
        real = canvas.new_zeros(len(images), 1, *canvas_px)
        for i, (height, width) in enumerate(given):
            real[i, :, :height, :width] = 1
        return canvas, real, given

    def check_targets(self, targets: Sequence[dict[str, Tensor]], sizes: Sequence[tuple[int, int]]) -> None:
        """Raises ValueError for targets that cannot be learnt from, naming the image; values on a GPU are trusted."""
        if len(targets) != len(sizes):
            raise ValueError(f"{len(targets)} targets for {len(sizes)} images")
        for i, (target, size) in enumerate(zip(targets, sizes, strict=True)):
            if missing := {"boxes", "labels", *(("masks",) if self.masks else ())} - set(target):
                raise ValueError(f"image {i}: its target has no {', '.join(sorted(missing))}")
            boxes, labels = target["boxes"], target["labels"]
            n = len(labels)
            if (
                boxes.shape != (n, 4)
                or not boxes.is_floating_point()
                or labels.dtype != torch.int64
                or labels.dim() != 1
            ):
                raise ValueError(
                    f"image {i}: boxes are {boxes.dtype} {tuple(boxes.shape)}, labels {labels.dtype} "
                    f"{tuple(labels.shape)}: floating (n, 4) and int64 (n,) are needed"
                )
            if self.masks and (target["masks"].shape != (n, *size) or target["masks"].dtype != torch.uint8):
                raise ValueError(
                    f"image {i}: masks are {target['masks'].dtype} {tuple(target['masks'].shape)}, and uint8 "
                    f"{(n, *size)} is needed: one an object, of the size of the image"
                )
            has_mask = target.get("has_mask")
            if has_mask is not None and (has_mask.shape != (n,) or has_mask.dtype != torch.bool):
                raise ValueError(
                    f"image {i}: has_mask is {has_mask.dtype} {tuple(has_mask.shape)}, and bool {(n,)} is needed"
                )
            if not n or boxes.device.type != "cpu":
                continue
            if self.masks and int(target["masks"].max()) > 1:
                raise ValueError(f"image {i}: masks hold {int(target['masks'].max())}: 0 and 1 alone are understood")
            if not bool(((labels >= 1) & (labels <= self.classes)).all()):
                raise ValueError(f"image {i}: labels {labels.tolist()[:10]}: 1 to {self.classes}, 0 is the background")
            if not bool(torch.isfinite(boxes).all() and (boxes[:, 2:] > boxes[:, :2]).all()):
                raise ValueError(f"image {i}: a box is not finite, or has no width or height: {boxes.tolist()[:10]}")

    # What training asks of a model.

    def stages(self) -> list[nn.Module]:
        """The body's, whose blocks may be computed again in the backward pass."""
        stages: Any = getattr(self.backbone.body, "stages", list)
        return list(stages if isinstance(stages, nn.Sequential) else stages())

    def no_weight_decay(self) -> set[str]:
        """The relative tables."""
        named = getattr(self.backbone.body, "no_weight_decay", set)
        return {f"backbone.body.{name}" for name in named()}

    def compile_parts(self) -> None:
        """torch.compile what has static shapes: body, pyramid and the head of the region proposals."""
        self.backbone.compile()
        self.rpn.head.compile()


def create_detector(
    backbone: str | nn.Module,
    *,
    classes: int,
    masks: bool = True,
    padding: Padding | None = None,
    in_channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    drop_path_rate: float = 0.0,
    heads: HeadSizes | None = None,
) -> Detector:
    """Mask R-CNN on a backbone, with new weights.

    backbone   a name of `lambdanets.list_models()`, or one of timm's public lambda models; or a module that gives a
               list of maps and has `feature_info`, as timm's `features_only=True` makes them
    classes    of objects, without the background: 80 for COCO
    masks      False: boxes alone (Faster R-CNN)
    padding    "masked" (the default where the backbone can): no output depends on it; "visible": it is seen, as
               in Google's code and everybody else's
    mean, std  of each channel, in [0, 1]; ImageNet's by default, or 0.5 and 0.25 of other than three channels
    heads      their sizes
    Raises ValueError for an unknown name, or a backbone whose maps do not fit.

    >>> model = create_detector("lambda_resnet_small", classes=3, heads=HeadSizes(fpn_channels=32)).eval()
    >>> [sorted(found) for found in model([torch.rand(3, 50, 70)])]
    [['boxes', 'labels', 'masks', 'scores']]
    """
    if isinstance(backbone, nn.Module):
        body = backbone
    elif backbone.split(".")[0] in PUBLIC:
        body = timm.create_model(backbone, features_only=True, in_chans=in_channels, drop_path_rate=drop_path_rate)
        accelerate(body)
    else:
        try:
            body = create_lambda_resnet(backbone, num_classes=0, in_chans=in_channels, drop_path_rate=drop_path_rate)
        except ValueError as error:
            if backbone in SIZES:
                raise
            name = backbone if timm.is_model(backbone) else "resnet18"
            raise ValueError(
                f"{error}; a backbone of timm is given as a module: "
                f"create_detector(timm.create_model({name!r}, features_only=True), classes={classes})"
            ) from None
    if padding is None:
        padding = "masked" if hasattr(body, "forward_maps") else "visible"
    given_mean = (IMAGENET_MEAN if in_channels == 3 else (0.5,) * in_channels) if mean is None else mean
    given_std = (IMAGENET_STD if in_channels == 3 else (0.25,) * in_channels) if std is None else std
    return Detector(body, classes=classes, masks=masks, padding=padding, mean=given_mean, std=given_std, heads=heads)


__all__ = ["LOSSES", "Detector", "HeadSizes", "Maps", "create_detector"]
