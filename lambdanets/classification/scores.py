"""A model and images in, numbers out. Evaluation never skips or substitutes an image: a bad one is an error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lambdanets.data.batches import Batches
from lambdanets.data.images import Images
from lambdanets.errors import EvaluationStopped
from lambdanets.training.distributed import Ranks


@dataclass(frozen=True)
class Confusion:
    """Which class was taken for which. It holds the pairs that occur, so its size is that of the images, not classes².

    classes  how many there are
    cells    (label, predicted) -> images, at least one; the pairs ascend

    >>> found = Confusion.of(3, [(0, 0), (2, 1), (0, 0)])
    >>> found.json()
    {'classes': 3, 'cells': [[0, 0, 2], [2, 1, 1]]}
    >>> found.dense(), found == Confusion.read(found.dense(), 3) == Confusion.read(found.json(), 3)
    ([[2, 0, 0], [0, 0, 0], [0, 1, 0]], True)
    """

    classes: int
    cells: dict[tuple[int, int], int]

    @classmethod
    def of(cls, classes: int, pairs: Iterable[tuple[int, int]]) -> Confusion:
        """Of the label and the predicted class of every image."""
        return cls(classes, dict(sorted(Counter(pairs).items())))

    @classmethod
    def read(cls, held: Any, classes: int) -> Confusion:
        """What `json` or `dense` wrote; the files of 0.1.0 hold the latter. Raises ValueError for anything else."""
        cells = held.get("cells") if isinstance(held, dict) else None
        if (
            isinstance(held, list)
            and len(held) == classes
            and all(isinstance(r, list) and len(r) == classes for r in held)
        ):
            cells = [[label, i, n] for label, row in enumerate(held) for i, n in enumerate(row) if n != 0]
        if not isinstance(cells, list) or (isinstance(held, dict) and held.get("classes") != classes):
            raise ValueError(f"it is neither the cells nor the rows of {classes} classes")
        found = {}
        for cell in cells:
            if not (isinstance(cell, list) and len(cell) == 3 and all(type(n) is int for n in cell)):
                raise ValueError(f"{str(cell)[:60]} is not a label, a predicted class and a number of images")
            label, predicted, n = cell
            if not (0 <= label < classes and 0 <= predicted < classes and n > 0) or (label, predicted) in found:
                raise ValueError(f"{str(cell)[:60]} cannot be a cell of {classes} classes")
            found[label, predicted] = n
        return cls(classes, dict(sorted(found.items())))

    @property
    def right(self) -> int:
        """Images whose predicted class is the label."""
        return sum(n for (label, predicted), n in self.cells.items() if label == predicted)

    def mistakes(self) -> list[tuple[int, int, int]]:
        """(label, predicted, images) of the pairs that differ, the most frequent first."""
        wrong = [(label, predicted, n) for (label, predicted), n in self.cells.items() if label != predicted]
        return sorted(wrong, key=lambda cell: -cell[2])

    def sums(self) -> tuple[list[int], list[int]]:
        """Images of each label, and of each predicted class."""
        labels, predictions = [0] * self.classes, [0] * self.classes
        for (label, predicted), n in self.cells.items():
            labels[label] += n
            predictions[predicted] += n
        return labels, predictions

    def json(self) -> dict[str, Any]:
        """For a file: {"classes": C, "cells": [[label, predicted, images], ...]}; `read` takes it."""
        return {"classes": self.classes, "cells": [[*pair, n] for pair, n in self.cells.items()]}

    def dense(self) -> list[list[int]]:
        """rows[label][predicted]: images. classes² numbers."""
        rows = [[0] * self.classes for _ in range(self.classes)]
        for (label, predicted), n in self.cells.items():
            rows[label][predicted] = n
        return rows


@dataclass(frozen=True)
class Scores:
    """What `evaluate` found.

    n            images, each counted once
    top1_frac    share of them whose first class is the label
    top5_frac    share whose label is among the first five; None where there are five classes or fewer
    loss         mean cross-entropy, nats, without label smoothing
    confusion    which class was taken for which; the sum of its cells is n
    ids          the images' numbers in their data set, ascending
    predicted    the first class of each image, in the order of `ids`
    losses       cross-entropy of each image, nats, in the order of `ids`
    """

    n: int
    top1_frac: float
    top5_frac: float | None
    loss: float
    confusion: Confusion
    ids: list[int]
    predicted: list[int]
    losses: list[float] = field(default_factory=list)

    def row(self) -> dict[str, float]:
        """What an epoch's line of the history has of it."""
        return {"val_loss": self.loss, "val_top1_frac": self.top1_frac}

    def json(self) -> dict[str, Any]:
        """For run.json."""
        return {
            "n": self.n,
            "errors": self.errors,
            "top1_frac": self.top1_frac,
            "top5_frac": self.top5_frac,
            "loss": self.loss,
            "confusion": self.confusion.json(),
        }

    def mistakes(self, images: Images) -> list[int]:
        """Places in `ids` of the images whose first class is not the label, the highest loss first."""
        wrong = [k for k, i in enumerate(self.ids) if self.predicted[k] != int(images.labels[i])]
        return sorted(wrong, key=lambda k: -self.losses[k])

    @property
    def errors(self) -> int:
        """Images whose first class is not the label."""
        return self.n - self.confusion.right

    def __str__(self) -> str:
        top5 = "" if self.top5_frac is None else f", top-5 {self.top5_frac:.2%}"
        return f"{self.n - self.errors} of {self.n} right: top-1 {self.top1_frac:.2%}{top5}"


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Batches,
    *,
    classes: int,
    device: torch.device,
    ranks: Ranks | None = None,
    go_on: Callable[[], bool] = lambda: True,
) -> Scores:
    """Run the model in eval mode and its own precision over every image of the batches, once, and count.

    model     (b, C, H, W) -> (b, classes) logits; its training mode is put back afterwards
    batches   made with training=False, and with this rank's number where there are several
    ranks     those that share the images; every rank gets the scores of all images. The counts, and with them top-1 and
              top-5, are whole numbers: equal for any number of ranks
    go_on     asked after every batch; False ends the evaluation on all ranks with EvaluationStopped
    Raises what `batches` raises for an image that cannot be read.
    """
    ranks = ranks or Ranks.alone()
    was_training = model.training
    model.eval()
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    found: list[tuple[int, int, int, float]] = []  # of each image: number, label, first class, loss
    loss_sum, in_five, stopped = 0.0, 0, False
    with ranks.together():
        for images, labels, batch_ids in batches.epoch(0):
            logits = model(images.to(device, dtype)).cpu()  # (b, classes)
            losses = F.cross_entropy(logits, labels, reduction="none")
            loss_sum += losses.sum(dtype=torch.float64).item()
            first = logits.argmax(dim=1)
            if classes > 5:
                in_five += int((logits.topk(5, dim=1).indices == labels[:, None]).sum())
            found.extend(zip(map(int, batch_ids), labels.tolist(), first.tolist(), losses.tolist(), strict=True))
            if stopped := not go_on():
                break
    model.train(was_training)
    loss_sum, in_five_sum, stops = ranks.sum(loss_sum, in_five, stopped)
    if stops:
        raise EvaluationStopped("the evaluation was stopped")
    found = sorted(tuple(image) for part in ranks.all(found) for image in part)
    n = len(found)
    if n == 0:
        raise ValueError("evaluate: the batches hold no image")
    confusion = Confusion.of(classes, ((label, predicted) for _, label, predicted, _ in found))
    return Scores(
        n=n,
        top1_frac=confusion.right / n,
        top5_frac=int(in_five_sum) / n if classes > 5 else None,
        loss=loss_sum / n,
        confusion=confusion,
        ids=[i for i, *_ in found],
        predicted=[predicted for *_, predicted, _ in found],
        losses=[loss for *_, loss in found],
    )
