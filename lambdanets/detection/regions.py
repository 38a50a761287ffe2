"""Region proposals and the heads on regions: torchvision's, on the real part of a canvas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import (
    RoIHeads,
    fastrcnn_loss,
    maskrcnn_inference,
    maskrcnn_loss,
)
from torchvision.models.detection.rpn import (
    AnchorGenerator,
    RegionProposalNetwork,
    RPNHead,
    concat_box_prediction_layers,
)
from torchvision.ops import MultiScaleRoIAlign

from lambdanets.detection.pyramid import Maps
from lambdanets.models.resnet import masked

RATIOS = (0.5, 1.0, 2.0)


class _ProposalHead(RPNHead):
    """Objectness and box corrections of each anchor; its 3x3 convolutions read no padding."""

    def forward(self, features: Sequence[Tensor], reals: Sequence[Tensor] | None) -> tuple[list[Tensor], list[Tensor]]:
        objectness, corrections = [], []
        for level, x in enumerate(features):
            real = None if reals is None else reals[level]
            x, _ = masked((layer for block in self.conv for layer in block), x, real)
            objectness.append(_exact(self.cls_logits(x)))
            corrections.append(_exact(self.bbox_pred(x)))
        return objectness, corrections


class _Proposer(RegionProposalNetwork):
    """Anchors over padding are proposed nowhere and learnt from nowhere: the rest is as if they were not there.

    The sampler draws from counts, so the same seed draws the same anchors with any padding.
    """

    head: _ProposalHead

    def forward(
        self, maps: Maps, targets: Sequence[dict[str, Tensor]] | None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Boxes of each image; and, in training, the two losses."""
        objectness, corrections = self.head(maps.features, maps.reals)
        anchors = self.anchor_generator(ImageList(maps.canvas, maps.sizes), maps.features)
        of_level = [x[0].numel() for x in objectness]
        found, moved = concat_box_prediction_layers(objectness, corrections)
        found = found.view(len(anchors), -1)
        boxes = self.box_coder.decode(moved.detach(), anchors).view(len(anchors), -1, 4)
        real = None
        scores = found.detach()
        if maps.reals is not None:
            of_position = self.anchor_generator.num_anchors_per_location()[0]
            flat = torch.cat([level.flatten(1) for level in maps.reals], dim=1)
            real = flat.bool().repeat_interleave(of_position, dim=1)
            scores = scores.masked_fill(~real, -torch.inf)
        self.score_thresh = 0.0 if real is None else torch.finfo(scores.dtype).tiny  # a score of 0 is of padding
        proposals, _ = self.filter_proposals(boxes, scores, maps.sizes, of_level)
        if not self.training or targets is None:
            return proposals, {}
        labels, matched = self._assigned(anchors, targets, real)
        wanted = self.box_coder.encode(matched, anchors)
        of_object, of_box = self.compute_loss(found, moved, labels, wanted)
        return proposals, {"loss_objectness": of_object, "loss_rpn_box_reg": of_box}

    def _assigned(
        self, anchors: list[Tensor], targets: Sequence[dict[str, Tensor]], real: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Of each anchor 1 on an object, 0 off it, -1 to be left out; and the box of the object."""
        if real is None:
            return self.assign_targets_to_anchors(anchors, list(targets))
        labels, matched = [], []
        for boxes, target, keep in zip(anchors, targets, real, strict=True):
            (own_labels,), (own_matched,) = self.assign_targets_to_anchors([boxes[keep]], [target])
            all_labels, all_matched = own_labels.new_full((len(boxes),), -1.0), boxes.clone()
            all_labels[keep], all_matched[keep] = own_labels, own_matched.to(boxes)
            labels.append(all_labels)
            matched.append(all_matched)
        return labels, matched


def proposer(
    width: int, strides: Sequence[int], anchor_per_stride: float, convs: int, kept: tuple[int, int, int, int]
) -> _Proposer:
    """Region proposals on maps of these strides, with torchvision's numbers (Mask R-CNN's): 256 anchors an image are
    learnt from, half of them positive, over 0.7 and under 0.3 of overlap; suppression at 0.7.

    kept  proposals before and after suppression in training, before and after it in evaluation
    """
    sizes = tuple((anchor_per_stride * stride,) for stride in strides)
    anchors = AnchorGenerator(sizes, (RATIOS,) * len(strides))
    head = _ProposalHead(width, anchors.num_anchors_per_location()[0], conv_depth=convs)
    before = {"training": kept[0], "testing": kept[2]}
    after = {"training": kept[1], "testing": kept[3]}
    return _Proposer(anchors, head, 0.7, 0.3, 256, 0.5, before, after, 0.7)


class Heads(RoIHeads):
    """Class, box and mask of a region, with torchvision's numbers: over 0.5 of overlap is on the object; suppression at
    0.5."""

    def __init__(
        self,
        box_roi_pool: MultiScaleRoIAlign,
        box_head: nn.Module,
        box_predictor: nn.Module,
        *,
        rois_per_image: int,
        positive_frac: float,
        score_min: float,
        detections: int,
        **mask_parts: Any,
    ) -> None:
        super().__init__(
            box_roi_pool, box_head, box_predictor, 0.5, 0.5, rois_per_image, positive_frac, None, score_min, 0.5,
            detections, **mask_parts,
        )  # fmt: skip

    def of_maps(
        self, maps: Maps, proposals: list[Tensor], targets: Sequence[dict[str, Tensor]] | None
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """What is found on the proposals in evaluation, and the losses in training."""
        if maps.reals is not None:
            for x in maps.features[:4]:
                stride = maps.canvas.shape[2] // x.shape[2]
                _EdgeRepeated.apply(x, [(-(-height // stride), -(-width // stride)) for height, width in maps.sizes])
        levels, sizes = {str(level): x for level, x in enumerate(maps.features[:4])}, maps.sizes
        if self.training and targets is not None:
            return [], self._losses(levels, proposals, sizes, list(targets))
        logits, moves = self._boxes(levels, proposals, sizes)
        boxes, scores, labels = self.postprocess_detections(logits, moves, proposals, sizes)
        found = [{"boxes": b, "labels": k, "scores": s} for b, k, s in zip(boxes, labels, scores, strict=True)]
        if self.mask_head is not None:
            probabilities = maskrcnn_inference(self._masks(levels, boxes, sizes), labels)
            for one, mask in zip(found, probabilities, strict=True):
                one["masks"] = mask[:, 0]
        return found, {}

    def _boxes(
        self, maps: dict[str, Tensor], proposals: list[Tensor], sizes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        logits, moves = self.box_predictor(self.box_head(self.box_roi_pool(maps, proposals, sizes)))
        return _exact(logits), _exact(moves)

    def _masks(self, maps: dict[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]]) -> Tensor:
        return _exact(self.mask_predictor(self.mask_head(self.mask_roi_pool(maps, boxes, sizes))))

    def _losses(
        self,
        maps: dict[str, Tensor],
        proposals: list[Tensor],
        sizes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        proposals, matched, labels, wanted = self.select_training_samples(proposals, targets)
        logits, moves = self._boxes(maps, proposals, sizes)
        of_class, of_box = fastrcnn_loss(logits, moves, labels, wanted)
        losses = {"loss_classifier": of_class, "loss_box_reg": of_box}
        if self.mask_head is None:
            return losses
        regions, objects = [], []
        for boxes, of, label, target in zip(proposals, matched, labels, targets, strict=True):
            taken = label > 0
            if "has_mask" in target and len(target["has_mask"]):  # objects with a box alone teach no mask
                taken = taken & target["has_mask"][of]
            regions.append(boxes[taken])
            objects.append(of[taken])
        found = self._masks(maps, regions, sizes)
        own_masks, own_labels = [t["masks"] for t in targets], [t["labels"] for t in targets]
        losses["loss_mask"] = maskrcnn_loss(found, regions, own_masks, own_labels, objects)
        return losses


def _exact(x: Tensor) -> Tensor:
    """In float32 at least: boxes, suppression and losses are not computed in autocast's types."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class _EdgeRepeated(torch.autograd.Function):
    """The last real row and column of a map are written once more after it, in its place: RoIAlign reads there what it
    would read at the end of a map of the image alone, which ends there.

    Assigned one by one, each row and column of each image would cost five passes over the map's gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, ends: list[tuple[int, int]]) -> Tensor:
        """x (b, C, H, W); rows and columns of each image that are real."""
        ctx.ends = ends
        ctx.mark_dirty(x)
        for one, (rows, columns) in zip(x, ends, strict=True):
            if rows < x.shape[2]:
                one[:, rows] = one[:, rows - 1]
            if columns < x.shape[3]:
                one[:, :, columns] = one[:, :, columns - 1]
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        for one, (rows, columns) in zip(grad, ctx.ends, strict=True):
            if columns < grad.shape[3]:
                one[:, :, columns - 1] += one[:, :, columns]
                one[:, :, columns] = 0
            if rows < grad.shape[2]:
                one[:, rows - 1] += one[:, rows]
                one[:, rows] = 0
        return grad, None
