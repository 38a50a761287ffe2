"""Detection as a task of the loop: a picture in, boxes, classes and masks out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lambdanets.data.reading import PictureBatches
from lambdanets.detection import run
from lambdanets.detection.batches import Batch, evaluation_batches, training_batches
from lambdanets.detection.check import Wishes
from lambdanets.detection.layouts import CocoData
from lambdanets.detection.precision import shown
from lambdanets.detection.report import write_pictures
from lambdanets.detection.scores import Scores, as_floats, evaluate
from lambdanets.detection.source import CocoSource
from lambdanets.detection.starting import load_detector_weights
from lambdanets.detection.tables import losses_said
from lambdanets.detection.transforms import DetectionView
from lambdanets.errors import BadRecipe, need, printable_text
from lambdanets.files import to_stderr
from lambdanets.recipes.coco import DetectionRecipe
from lambdanets.runs.folder import BAD_SAMPLES
from lambdanets.training.distributed import Ranks
from lambdanets.training.task import Counts, Found, Place

_FEW_FOR_NORMS = 8  # images a process, under which its own statistics ruin a detector


class _Part(NamedTuple):
    images: list[Tensor]
    targets: list[dict[str, Tensor]]


class Detection:
    """Boxes, classes and masks are learnt from a COCO data set; see `training.task.Task`, whose methods these are.

    source          where the data lies
    workers         processes that read images
    seed            of the order of the images, of augmentation and of what the losses are computed on
    init_image_px   image size at which the weights of --init-from were trained, where it is a file without a run
    """

    name = run.NAME
    best = "val_box_ap"
    remedy = "give another --image-px"
    train: PictureBatches[Batch]
    held_out: PictureBatches[Batch]
    _data: CocoData

    def __init__(
        self, recipe: DetectionRecipe, source: CocoSource, *, workers: int, seed: int, init_image_px: int | None = None
    ) -> None:
        self.recipe, self.source, self.workers, self.seed = recipe, source, workers, seed
        self.init_image_px = init_image_px
        self.title = f"detector on {recipe.model}, {recipe.image_px} px"
        self.shown = str(source.data if source.data is not None else source.annotations)

    @property
    def masks(self) -> bool:
        """Whether masks are learnt: the recipe asks for them and the data has some."""
        return self.recipe.masks and self._data.train.has_masks

    @property
    def classes(self) -> tuple[str, ...]:
        return self._data.train.classes

    def asked(self) -> dict[str, Any]:
        return {"skip_missing": self.source.skip_missing, "class_names": self.source.class_names}

    def need(self) -> None:
        need("faster_coco_eval", "detection", "average precision is computed with it")
        need("matplotlib", "plots", "curves.png is drawn with it")

    def open(self) -> int:
        recipe = self.recipe
        self._data = self.source.open(Wishes(self.source.skip_missing, False, recipe.image_px, recipe.detections))
        self.best = "val_mask_ap" if self.masks and self._data.val.has_masks else "val_box_ap"
        return min(len(self._data.train), recipe.batch_images)

    def fingerprint(self) -> dict[str, str]:
        return {"train": self._data.train.fingerprint(), "val": self._data.val.fingerprint()}

    def stamp(self) -> dict[str, Any]:
        return {"train": self._data.train.stamp(), "val": self._data.val.stamp()}

    def make_batches(self, folder: Path, ranks: Ranks) -> None:
        recipe, view = self.recipe, self.view
        if ranks.first:
            self._say_what_was_found(ranks)
        self.train = training_batches(
            self._data.train, view, recipe, seed=self.seed, workers=self.workers, bad_file=folder / BAD_SAMPLES,
            rank=ranks.rank, ranks=ranks.ranks,
        )  # fmt: skip
        self.held_out = evaluation_batches(
            self._data.val, view, batch_images=recipe.eval_batch_images, workers=self.workers, rank=ranks.rank,
            ranks=ranks.ranks,
        )  # fmt: skip

    def _say_what_was_found(self, ranks: Ranks) -> None:
        if len(self._data.findings):
            to_stderr(printable_text(self._data.findings.table()))
        if self.recipe.masks and not self.masks:
            to_stderr("no object has a segmentation: boxes alone are learnt, as with --boxes-only")
        own = self.recipe.batch_images // ranks.ranks // self.recipe.accumulation
        if self.recipe.batch_norm == "local" and own < _FEW_FOR_NORMS:
            remedy = "--batch-norm frozen (with --init-from) or sync (with several processes), or a larger batch"
            to_stderr(
                f"batch norm has statistics of {own} images at a time, and under {_FEW_FOR_NORMS} they are known to "
                f"cost a detector accuracy: {remedy}"
            )

    @property
    def view(self) -> DetectionView:
        return DetectionView(self.recipe.image_px, self.recipe.in_channels, self.masks)

    def record(self) -> dict[str, Any]:
        train, val, view = self._data.train, self._data.val, self.view
        data = {
            **self.source.record(),
            "how": self._data.how,
            "train_images": len(train),
            "val_images": len(val),
            "train_objects": train.n_objects,
            "val_objects": val.n_objects,
            "findings": [[row.id, row.part, row.severity, row.what, row.count] for row in self._data.findings],
        }
        return {
            "view": {"image_px": view.image_px, "in_channels": view.in_channels, "masks": view.masks,
                     "mean": self.recipe.mean, "std": self.recipe.std, "padding": self.recipe.padding},
            "categories": [{"id": category.id, "name": category.name} for category in train.categories],
            "data": data,
            "init_image_px": self.init_image_px,
        }  # fmt: skip

    def read_record(self, folder: Path) -> dict[str, Any]:
        return run.read_record(folder)

    def create_model(self) -> nn.Module:
        return run.detector_of(self.recipe, classes=len(self.classes), masks=self.masks)

    def load_weights(self, model: nn.Module, source: str | Path) -> dict[str, str]:
        assert isinstance(model, run.Detector)
        return load_detector_weights(
            model, source, classes=self.classes, image_px=self.init_image_px, backbone=self.recipe.model
        )

    def example(self, samples: int, place: Place) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        side, device = self.recipe.image_px, place.device
        target = {
            "boxes": torch.tensor([[1.0, 1, side // 2, side // 2]], dtype=place.dtype, device=device),
            "labels": torch.ones(1, dtype=torch.int64, device=device),
            "masks": torch.ones(1, side, side, dtype=torch.uint8, device=device),
        }
        image = torch.zeros(self.recipe.in_channels, side, side, dtype=place.dtype, device=device)
        return [image] * samples, [target] * samples

    def parts(self, batch: Batch, place: Place, *, step: int) -> list[_Part]:
        images = [as_floats(image, place.device, place.dtype) for image in batch.images()]
        targets = batch.targets()
        for i, target in enumerate(targets):
            if not bool(torch.isfinite(target["boxes"]).all()):
                raise BadRecipe(f"image {batch.ids[i]} has a box that is not finite")
            target["boxes"] = target["boxes"].to(place.dtype)
        moved = [{name: t.to(place.device, non_blocking=True) for name, t in target.items()} for target in targets]
        cuts = [len(images) * k // self.recipe.accumulation for k in range(self.recipe.accumulation + 1)]
        return [_Part(images[a:b], moved[a:b]) for a, b in itertools.pairwise(cuts)]

    def loss(self, forward: Callable[..., Any], part: _Part) -> Found:
        losses = forward(part.images, part.targets)
        n = len(part.images)
        counts = {name: value.detach() * n for name, value in losses.items()}
        total: Tensor = torch.stack(list(losses.values())).sum()
        return Found(total * n, counts)

    def train_row(self, counts: Counts, samples: int) -> dict[str, float]:
        return {f"train_{name}": value / samples for name, value in counts.items()}

    def log_row(self, counts: Counts) -> dict[str, float]:
        return {}

    def warning(self, history: Sequence[dict[str, Any]]) -> str | None:
        return None

    def said(self, row: dict[str, float]) -> str:
        return losses_said({name.removeprefix("train_"): value for name, value in row.items()}, 3)

    def held_out_said(self, value: float) -> str:
        return f"held-out {'mask' if self.best == 'val_mask_ap' else 'box'} AP {shown(value)}"

    def scores(self, model: nn.Module, device: torch.device, ranks: Ranks, go_on: Callable[[], bool]) -> Scores:
        assert isinstance(model, run.Detector)
        return evaluate(model, self.held_out, self._data.val, device=device, ranks=ranks, go_on=go_on)

    def report(self, folder: Path, record: dict[str, Any], scores: Scores) -> None:
        write_pictures(folder, record, scores, self._data.val)


def check_start(recipe: DetectionRecipe, init_from: str | Path | None) -> None:
    """Raises BadRecipe where norms are to stay as they are, and are new."""
    if recipe.batch_norm == "frozen" and init_from is None:
        raise BadRecipe(
            "batch_norm is 'frozen', which leaves the norms as they are, and without --init-from they are new and norm "
            "nothing: give --init-from RUN, or --batch-norm local or sync"
        )
