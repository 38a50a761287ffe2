"""Classification as a task of the loop: a picture in, one label out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lambdanets.classification import run
from lambdanets.classification.plots import curves_png
from lambdanets.classification.report import write_report
from lambdanets.classification.scores import Scores, evaluate
from lambdanets.data.batches import Batch, Batches
from lambdanets.data.images import Images
from lambdanets.data.reading import Draws
from lambdanets.data.source import DIGITS, absolute, open_source
from lambdanets.data.transforms import View, mix
from lambdanets.errors import BadRun, need
from lambdanets.files import write_atomically
from lambdanets.models.create import create_model
from lambdanets.recipes.recipe import Recipe
from lambdanets.runs.folder import BAD_SAMPLES, CURVES
from lambdanets.runs.weights import load_weights
from lambdanets.training.distributed import Ranks
from lambdanets.training.task import Counts, Found, Place


class _Part(NamedTuple):
    images: Tensor  # (b, C, H, W)
    labels: Tensor  # (b,)
    targets: Tensor  # (b,), or (b, classes) where images are mixed


class Classification:
    """Labels are learnt from the images of `data`; see `training.task.Task`, whose methods these are.

    data     a folder or URL, as `train` takes it; None: scikit-learn's digits
    workers  processes that read images
    seed     of the order of the images, of augmentation and of mixing
    """

    name = run.NAME
    best = "val_top1_frac"
    remedy = "give another --image-px"
    train: Batches
    held_out: Batches
    _train_images: Images
    _val_images: Images
    _how: str
    _ignored: dict[str, Any]

    def __init__(
        self, recipe: Recipe, data: str | Path | None, *, workers: int, seed: int, allow_sources: Sequence[str] = ()
    ) -> None:
        self.recipe, self.data, self.workers, self.seed, self.allow_sources = recipe, data, workers, seed, allow_sources
        self.view = View(
            recipe.image_px, recipe.in_channels, recipe.mean, recipe.std, recipe.crop_frac, recipe.interpolation
        )
        self.title = f"{recipe.model}, {recipe.image_px} px"
        self.shown = "the digits" if data is None else str(data)

    def asked(self) -> dict[str, Any]:
        return {"data given": self.data is not None}

    def need(self) -> None:
        need("matplotlib", "plots", "curves.png is drawn with it")
        if self.data is None:
            need("sklearn", "digits", "the digits come with scikit-learn")

    def open(self) -> int:
        found = open_source(self.data, self.allow_sources)
        self._train_images, self._val_images, self._how, self._ignored = found
        return min(len(self._train_images), self.recipe.batch_images)

    @property
    def classes(self) -> tuple[str, ...]:
        return self._train_images.classes

    def fingerprint(self) -> dict[str, str]:
        return {"train": self._train_images.fingerprint(), "val": self._val_images.fingerprint()}

    def stamp(self) -> dict[str, Any]:
        return {"train": self._train_images.stamp(), "val": self._val_images.stamp()}

    def make_batches(self, folder: Path, ranks: Ranks) -> None:
        self.train = self.training_batches(folder, ranks)
        self.held_out = Batches(
            self._val_images,
            self.view,
            batch_images=self.recipe.eval_batch_images,
            training=False,
            workers=self.workers,
            rank=ranks.rank,
            ranks=ranks.ranks,
        )

    def training_batches(self, folder: Path, ranks: Ranks) -> Batches:
        """Of this rank."""
        return self._as_trained(Batches, self._train_images, folder, ranks)

    def _as_trained(
        self, kind: type[Batches], images: Images, folder: Path, ranks: Ranks, draws: Draws | None = None
    ) -> Batches:
        recipe = self.recipe
        return kind(
            images,
            self.view,
            batch_images=recipe.batch_images,
            training=True,
            seed=self.seed,
            augment=recipe.augment,
            flip_frac=recipe.flip_frac,
            min_crop_frac=recipe.min_crop_frac,
            randaugment_ops=recipe.randaugment_ops,
            randaugment_magnitude=recipe.randaugment_magnitude,
            erase_frac=recipe.erase_frac,
            workers=self.workers,
            bad_file=folder / BAD_SAMPLES,
            rank=ranks.rank,
            ranks=ranks.ranks,
            draws=draws,
        )

    def record(self) -> dict[str, Any]:
        data = {
            "source": DIGITS if self.data is None else absolute(self.data),
            "how": self._how,
            "ignored": self._ignored,
            "train_images": len(self._train_images),
            "val_images": len(self._val_images),
        }
        return {"view": asdict(self.view), "classes": list(self.classes), "data": data}

    def read_record(self, folder: Path) -> dict[str, Any]:
        record = run.read_record(folder)
        if "pseudo" in record["data"]:
            raise BadRun(
                f"--resume: the run in {folder} learns from pseudo-labels too: give --pseudo SELECTION as well"
            )
        return record

    def create_model(self) -> nn.Module:
        recipe = self.recipe
        return create_model(
            recipe.model,
            num_classes=len(self.classes),
            in_channels=recipe.in_channels,
            drop_rate=recipe.drop_rate,
            drop_path_rate=recipe.drop_path_rate,
        )

    def load_weights(self, model: nn.Module, source: str | Path) -> dict[str, str]:
        return load_weights(model, source)

    def example(self, samples: int, place: Place) -> tuple[Tensor]:
        side = self.recipe.image_px
        size = (samples, self.recipe.in_channels, side, side)
        return (torch.zeros(size, dtype=place.dtype, device=place.device),)

    def parts(self, batch: Batch, place: Place, *, step: int) -> list[_Part]:
        images = batch.images.to(place.device, place.dtype, memory_format=place.memory_format, non_blocking=True)
        labels = targets = batch.labels.to(place.device, non_blocking=True)
        if self.recipe.mixup_alpha or self.recipe.cutmix_alpha:
            images, targets = mix(
                images, labels, classes=len(self.classes), seed=self.seed, step=step,
                mixup_alpha=self.recipe.mixup_alpha, cutmix_alpha=self.recipe.cutmix_alpha,
            )  # fmt: skip
        split = (part.tensor_split(self.recipe.accumulation) for part in (images, labels, targets))
        return [_Part(*part) for part in zip(*split, strict=True)]

    def loss(self, forward: Callable[..., Any], part: _Part) -> Found:
        logits = forward(part.images).to(part.images.dtype)  # (b, classes)
        smoothing = self.recipe.label_smoothing
        loss = F.cross_entropy(logits, part.targets, label_smoothing=smoothing, reduction="sum")
        return Found(loss, {"right": (logits.detach().argmax(dim=1) == part.labels).sum()})

    def train_row(self, counts: Counts, samples: int) -> dict[str, float]:
        return {"train_top1_frac": counts.get("right", 0.0) / samples}

    def log_row(self, counts: Counts) -> dict[str, float]:
        return {}

    def warning(self, history: Sequence[dict[str, Any]]) -> str | None:
        return None

    def said(self, row: dict[str, float]) -> str:
        return f"top-1 {row['train_top1_frac']:.1%}"

    def held_out_said(self, value: float) -> str:
        return f"held out {value:.2%}"

    def scores(self, model: nn.Module, device: torch.device, ranks: Ranks, go_on: Callable[[], bool]) -> Scores:
        return evaluate(model, self.held_out, classes=len(self.classes), device=device, ranks=ranks, go_on=go_on)

    def report(self, folder: Path, record: dict[str, Any], scores: Scores) -> None:
        title = f"{self.title}, seed {record['seed']}: {scores}"
        write_atomically(folder / CURVES, curves_png(record["history"], scores.confusion, self.classes, title))
        write_report(folder, record, scores, self._val_images)
