"""Joint training as a task of the loop: true labels and a teacher's in every step, judged by true ones alone."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lambdanets.classification import run
from lambdanets.classification.task import Classification
from lambdanets.data.archive import STREAM, check_source
from lambdanets.data.batches import Batch, Batches
from lambdanets.data.images import Images
from lambdanets.data.shards import ShardImages, open_pictures
from lambdanets.data.source import absolute
from lambdanets.errors import BadData, BadRecipe, BadRun, DiskFault, printable
from lambdanets.files import to_stderr
from lambdanets.pseudo_labels.mixture import (
    JointBatches,
    JointDraws,
    hard_targets,
    joint_images,
    mixed,
    soft_targets,
)
from lambdanets.pseudo_labels.selection import SELECTION_JSON, open_selection
from lambdanets.recipes.pseudo_labels import Mixture
from lambdanets.recipes.recipe import Recipe
from lambdanets.training.distributed import Ranks
from lambdanets.training.task import Counts, Found, Place

_COLLAPSED_FRAC = 0.5  # of the selection's number of classes


class _Part(NamedTuple):
    images: Tensor  # (b, C, H, W)
    labels: Tensor  # (b,)
    targets: Tensor  # (b, classes)
    pseudo: Tensor  # (b,) bool: the label is the teacher's


class Joint(Classification):
    """Labels are learnt from the pictures of `data` and, in the same steps, from a selection of pictures that a teacher
    labelled. In run.json it is a task of classification, so that all that is done with such a run is done with this.

    selection          the folder that `lambdanets select` wrote
    mixture            how much of it is in a step, and as what
    pictures           where the shards of the selection lie; None: where it says
    unchecked_overlap  go on though nobody looked for the held-out pictures among those of the selection
    The other arguments are those of `Classification`.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: str | Path | None,
        selection: str | Path,
        mixture: Mixture,
        *,
        pictures: str | Path | None = None,
        unchecked_overlap: bool = False,
        workers: int,
        seed: int,
        allow_sources: Sequence[str] = (),
    ) -> None:
        super().__init__(recipe, data, workers=workers, seed=seed, allow_sources=allow_sources)
        self.source, self.mixture, self.pictures, self.unchecked_overlap = (
            selection,
            mixture,
            pictures,
            unchecked_overlap,
        )
        self.labelled = mixture.labelled(recipe.batch_images)
        pseudo = recipe.batch_images - self.labelled  # as it is: a small batch bounds the ratio
        self.title += f", {self.labelled} labelled and {pseudo} pseudo-labelled pictures a step"

    def asked(self) -> dict[str, Any]:
        return {**super().asked(), **{f"pseudo_{k}": v for k, v in dataclasses.asdict(self.mixture).items()}}

    # --- before a run

    def open(self) -> int:
        super().open()
        if isinstance(self._train_images, ShardImages) and self._train_images.streamed:
            raise BadData(f"{self.shown} is streamed, and a step of both kinds needs each picture by its number: leave "
                          f"{STREAM!r} out")  # fmt: skip
        labelled, batch = len(self._train_images), self.recipe.batch_images
        if labelled < self.labelled:
            fits = self.mixture.fits(labelled)
            raise BadRecipe(
                f"batch_images: a step of {batch} pictures has {self.labelled} labelled ones at --pseudo-ratio "
                f"{self.mixture.ratio:g}, and {self.shown} has {labelled}: give --batch-images {fits} at most"
            )
        selection = open_selection(self.source)
        self._selection = selection.in_classes(self.classes)
        if self.mixture.labels == "soft" and selection.held["rule"] == "rank":
            raise BadRecipe(
                f"pseudo_labels is 'soft', and {self.source} was made by --rule rank, which gives a picture to a class "
                "whatever else it may be: give --pseudo-labels hard"
            )
        self._check_overlap()
        self._pictures = self._open_pictures()
        self._how += self._said()
        return batch

    def _check_overlap(self) -> None:
        """Whether the held-out pictures were looked for among those of the selection. Raises BadData."""
        held_out, train = self._val_images.fingerprint(), self._train_images.fingerprint()
        excluded = self._selection.held["exclude"]
        self._overlap = {
            "held_out": any(data["held_out"] == held_out for data in excluded),
            "train": any(data["train"] == train for data in excluded),
        }
        if not self._overlap["held_out"] and not self.unchecked_overlap:
            given = "without --exclude" if not excluded else "with --exclude of other pictures than these"
            raise BadData(
                f"{self.source} was selected {given}, so held-out pictures of {self.shown} may be among those that are "
                f"learnt: select again with --exclude {self.data or 'digits'}, or say --unchecked-overlap"
            )

    def _open_pictures(self) -> Images:
        held, where = self._selection.held, self.pictures
        if where is None:
            where = held["pictures"]["source"]
            named = [str(self.data), *self.allow_sources]
            check_source(str(where), named, str(self._selection.folder / SELECTION_JSON))
        if str(where).startswith(STREAM):
            raise BadData(
                f"{where} is streamed, and a selection needs each picture by its number: leave {STREAM!r} out"
            )
        try:
            found = open_pictures(where, allow_sources=self.allow_sources)
        except DiskFault as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            said = "" if self.pictures is not None else f", and {self.source} says that its pictures lie there"
            raise BadData(f"{where} holds no shards{said}: give --pseudo-data SHARDS, where they lie now") from error
        if found.fingerprint() != held["pictures"]["fingerprint"]:
            raise BadData(f"{where} holds other pictures than those that {self.source} was selected from")
        if (last := self._selection.last_id()) >= len(found):
            raise BadData(f"{self.source} has the picture {last:,}, and {where} has {len(found):,}: select again")
        self._pictures_lie = absolute(where)
        return found

    def _said(self) -> str:
        """What is known of the selection, after what is known of the labelled pictures."""
        selection, mixture = self._selection, self.mixture
        batch = self.recipe.batch_images
        said = (
            f"; pseudo-labels: {len(selection):,} pictures in {selection.draws:,} draws of {self.source}, "
            f"{batch - self.labelled:,} in a step of {batch:,}, {mixture.labels} labels"
        )
        if selection.order is not None:
            said += "; the teacher has the same classes in another order, and they are matched by name"
        if not self._overlap["held_out"]:
            said += "; nobody looked for held-out pictures among them (--unchecked-overlap)"
        view = selection.teacher.get("view")
        channels = view.get("in_channels") if isinstance(view, dict) else None
        if channels not in (None, self.recipe.in_channels):
            kinds = {1: "grey", 3: "in colour"}
            said += f"; the teacher saw them {kinds.get(channels, channels)}, the student sees them "
            said += kinds[self.recipe.in_channels]
        return said

    def fingerprint(self) -> dict[str, str]:
        return {**super().fingerprint(), "pseudo": self._selection.fingerprint()}

    def training_batches(self, folder: Path, ranks: Ranks) -> Batches:
        images = joint_images(self._train_images, self._pictures, self._selection)
        draws = JointDraws(len(self._train_images), self.recipe.batch_images, self.seed, self.labelled, self._selection)
        return self._as_trained(JointBatches, images, folder, ranks, draws)

    def record(self) -> dict[str, Any]:
        record, selection = super().record(), self._selection
        counted = {"labelled": self.labelled, "pseudo": self.recipe.batch_images - self.labelled}
        record["data"]["pseudo"] = {
            "source": str(selection.folder),
            "pictures": self._pictures_lie,
            "draws": selection.draws,
            "rows": len(selection),
            "fingerprint": selection.fingerprint(),
            "teacher_sha256": selection.held["teacher_sha256"],
            **dataclasses.asdict(self.mixture),
            "step": counted,
            "rule": selection.held["rule"],
            "classes": "the teacher's" if selection.order is None else "the teacher's, in another order",
            "held_out_pictures_excluded": self._overlap["held_out"],
            "training_pictures_excluded": self._overlap["train"],
        }
        return record

    def read_record(self, folder: Path) -> dict[str, Any]:
        record = run.read_record(folder)
        held = record["data"].get("pseudo")
        if held is None:
            raise BadRun(f"--resume: the run in {folder} learns from labelled pictures alone: leave --pseudo out")
        asked = dataclasses.asdict(self.mixture)
        differing = [f"--pseudo-{name} {held[name]}, not {asked[name]}" for name in asked if held[name] != asked[name]]
        if differing:
            raise BadRun(f"--resume: the run in {folder} has {'; '.join(differing)}. Give the same, or another --out")
        selection = open_selection(self.source, compare=False)
        if selection.fingerprint() != held["fingerprint"]:
            raise BadRun(
                f"--resume: {self.source} is another selection than the run in {folder} began with ({held['source']}, "
                f"{held['rows']:,} pictures in {held['draws']:,} draws, fingerprint {held['fingerprint'][:12]}): give "
                "--pseudo with that one, or another --out"
            )
        if str(selection.folder) != held["source"]:
            to_stderr(
                printable(
                    f"{selection.folder} is the selection of this run, which lay in {held['source']} when it began"
                )
            )
        return record

    # --- steps

    def parts(self, batch: Batch, place: Place, *, step: int) -> list[_Part]:  # type: ignore[override]
        recipe = self.recipe
        images = batch.images.to(place.device, place.dtype, memory_format=place.memory_format, non_blocking=True)
        pseudo = torch.tensor(batch.ids) >= len(self._train_images)
        targets = self._targets(batch, pseudo, place.dtype).to(place.device, non_blocking=True)
        if recipe.mixup_alpha or recipe.cutmix_alpha:
            images, targets = mixed(
                images, targets, seed=self.seed, step=step, mixup_alpha=recipe.mixup_alpha,
                cutmix_alpha=recipe.cutmix_alpha,
            )  # fmt: skip
        every = images, batch.labels.to(place.device, non_blocking=True), targets, pseudo.to(place.device)
        split = (part.tensor_split(recipe.accumulation) for part in every)
        return [_Part(*part) for part in zip(*split, strict=True)]

    def _targets(self, batch: Batch, pseudo: Tensor, dtype: torch.dtype) -> Tensor:
        """(b, classes) of a batch: smoothed one-hot, but for soft pseudo-labels."""
        classes, smoothing = len(self.classes), self.recipe.label_smoothing
        targets = hard_targets(batch.labels, classes=classes, smoothing=smoothing, dtype=dtype)
        if self.mixture.labels == "soft" and pseudo.any():
            rows = np.array([index - len(self._train_images) for index in batch.ids])[pseudo.numpy()]
            top_class, top_prob = map(torch.from_numpy, self._selection.soft(rows))
            targets[pseudo] = soft_targets(
                top_class, top_prob.to(dtype), classes=classes, temperature=self.mixture.temperature
            )
        return targets

    def loss(self, forward: Callable[..., Any], part: _Part) -> Found:  # type: ignore[override]
        """The sum of the cross-entropy with the targets. Where slots are mixed, a loss counts for its slot's kind."""
        logits = forward(part.images).to(part.images.dtype)  # (b, classes)
        losses = F.cross_entropy(logits, part.targets, reduction="none")  # (b,)
        found, pseudo = logits.detach().argmax(dim=1), part.pseudo
        right, own, labelled = found == part.labels, losses.detach(), ~part.pseudo
        predicted = found[:, None] == torch.arange(logits.shape[1], device=found.device)  # (b, classes)
        counts = {
            "right": (right & labelled).sum(),
            "labelled": labelled.sum(),
            "pseudo": pseudo.sum(),
            "loss_labelled": torch.where(labelled, own, 0).sum(),
            "loss_pseudo": torch.where(pseudo, own, 0).sum(),
            "agree": (right & pseudo).sum(),
            "predicted": (predicted & pseudo[:, None]).sum(dim=0),  # a histogram, (classes,)
        }
        return Found(losses.sum(), counts)

    # --- what is said of them

    def log_row(self, counts: Counts) -> dict[str, float]:
        return self._numbers(counts) if counts.get("labelled") or counts.get("pseudo") else {}

    def train_row(self, counts: Counts, samples: int) -> dict[str, float]:
        """Top-1 is that of the labelled pictures; pseudo_passes: how often the epoch saw all draws."""
        right, labelled, pseudo = (counts.get(name, 0.0) for name in ("right", "labelled", "pseudo"))
        passes = {"pseudo_passes": pseudo / self._selection.draws}
        return {"train_top1_frac": right / max(1.0, labelled), **self._numbers(counts), **passes}

    def _numbers(self, counts: Counts) -> dict[str, float]:
        """Of each kind its mean loss; how often the student's first class is the label of a pseudo-labelled picture;
        and in how many classes it sees these: exp of the entropy of its first classes."""
        labelled, pseudo = (max(1.0, counts.get(name, 0.0)) for name in ("labelled", "pseudo"))
        return {
            "loss_labelled": counts.get("loss_labelled", 0.0) / labelled,
            "loss_pseudo": counts.get("loss_pseudo", 0.0) / pseudo,
            "pseudo_agree_frac": counts.get("agree", 0.0) / pseudo,
            "predicted_classes": classes_in(counts.get("predicted", [])),
        }

    @functools.cached_property
    def _classes_selected(self) -> float:
        return classes_in(self._selection.class_counts())

    def warning(self, history: Sequence[dict[str, Any]]) -> str | None:
        batches = len(self.train)
        warmup_steps = self.recipe.length(batches)[2]
        for row in history:
            seen, every = row.get("predicted_classes", math.inf), self._classes_selected
            if (row["epoch"] - 1) * batches >= warmup_steps and seen < _COLLAPSED_FRAC * every:
                return (
                    f"in epoch {row['epoch']} the student saw the pseudo-labelled pictures in {seen:.1f} classes, and "
                    f"their labels are in {every:.1f} (exp of the entropy of either): it may be collapsing to a few "
                    f"classes; look at the selection's classes, or try a lower --lr-per-256 or --pseudo-ratio"
                )
        return None


def classes_in(histogram: Any) -> float:
    """exp of the entropy of a histogram: of n equal classes it is n; 0 where there is nothing.

    >>> classes_in([5, 5, 0]), classes_in([7, 0, 0])
    (2.0, 1.0)
    """
    counts = np.asarray(histogram, np.float64)
    shares = counts[counts > 0] / max(1.0, counts.sum())
    return float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0
