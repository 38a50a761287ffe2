"""A model and images in, numbers out. Evaluation never skips or substitutes an image: a bad one is an error."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from lambdanets.batches import Batches, View
from lambdanets.data import BadImage, DiskFault, open_image
from lambdanets.distributed import Ranks


class EvaluationStopped(Exception):
    """`go_on` said no on some rank, so that there are no scores."""


@dataclass(frozen=True)
class Scores:
    """What `evaluate` found.

    n            images, each counted once
    top1_frac    share of them whose first class is the label
    top5_frac    share whose label is among the first five; None where there are five classes or fewer
    loss         mean cross-entropy, nats, without label smoothing
    confusion    confusion[label][predicted]: images; the sum of all is n
    ids          the images' numbers in their data set, ascending
    predicted    the first class of each image, in the order of `ids`
    losses       cross-entropy of each image, nats, in the order of `ids`
    """

    n: int
    top1_frac: float
    top5_frac: float | None
    loss: float
    confusion: list[list[int]]
    ids: list[int]
    predicted: list[int]
    losses: list[float] = field(default_factory=list)

    @property
    def errors(self) -> int:
        """Images whose first class is not the label."""
        return self.n - sum(row[label] for label, row in enumerate(self.confusion))

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
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    found: list[tuple[int, int, float]] = []
    loss_sum, in_five, stopped = 0.0, 0, False
    with ranks.together():
        for images, labels, batch_ids in batches.epoch(0):
            logits = model(images.to(device, dtype)).cpu()  # (b, classes)
            losses = F.cross_entropy(logits, labels, reduction="none")
            loss_sum += losses.sum(dtype=torch.float64).item()
            first = logits.argmax(dim=1)
            confusion += torch.bincount(labels * classes + first, minlength=classes**2).view(classes, classes)
            if classes > 5:
                in_five += int((logits.topk(5, dim=1).indices == labels[:, None]).sum())
            found.extend(zip(map(int, batch_ids), first.tolist(), losses.tolist(), strict=True))
            if stopped := not go_on():
                break
    model.train(was_training)
    loss_sum, in_five_sum, stops = ranks.sum(loss_sum, in_five, stopped)
    if stops:
        raise EvaluationStopped("the evaluation was stopped")
    confusion = ranks.sum_counts(confusion)
    found = sorted((i, label, loss) for part in ranks.all(found) for i, label, loss in part)
    n = len(found)
    if n == 0:
        raise ValueError("evaluate: the batches hold no image")
    return Scores(
        n=n,
        top1_frac=int(confusion.diagonal().sum()) / n,
        top5_frac=int(in_five_sum) / n if classes > 5 else None,
        loss=loss_sum / n,
        confusion=confusion.tolist(),
        ids=[i for i, _, _ in found],
        predicted=[label for _, label, _ in found],
        losses=[loss for _, _, loss in found],
    )


@dataclass(frozen=True)
class Prediction:
    """One image's class probabilities, or why there are none: exactly one of `probabilities` and `error` is given."""

    image: str
    probabilities: list[float] | None = None
    error: str | None = None

    def top(self, classes: Sequence[str], k: int) -> list[tuple[str, float]]:
        """The k most probable classes and their probabilities, best first; all of them where k is larger."""
        return sorted(zip(classes, self.probabilities or [], strict=True), key=lambda pair: -pair[1])[:k]

    def text(self, classes: Sequence[str], k: int) -> str:
        """One line for a person.

        >>> Prediction("a.png", [0.25, 0.75]).text(("cat", "dog"), 2)
        'a.png  dog 75.0%  cat 25.0%'
        """
        return "  ".join([self.image, *(f"{name} {share:.1%}" for name, share in self.top(classes, k))])

    def json(self, classes: Sequence[str], k: int) -> str:
        """One line for a program: {"image", "top": [{"class", "probability"}]} or {"image", "error"}."""
        if self.error is not None:
            return json.dumps({"image": self.image, "error": self.error})
        top = [{"class": name, "probability": round(share, 6)} for name, share in self.top(classes, k)]
        return json.dumps({"image": self.image, "top": top})


@torch.inference_mode()
def predict(
    model: nn.Module, view: View, images: Iterable[str | Path], *, device: torch.device, batch_images: int = 32
) -> Iterator[Prediction]:
    """Softmax probabilities of each image file, in the order given; a bad file becomes a Prediction with an error.

    At most `batch_images` images are in memory at a time, and results are given as their batch is done. float32.
    """
    model.eval()
    batch: list[Prediction | torch.Tensor] = []
    names: list[str] = []
    for image in images:
        names.append(str(image))
        try:
            batch.append(view.evaluate(open_image(image, known=False)))  # (C, H, W)
        except (BadImage, DiskFault) as error:
            batch.append(Prediction(str(image), error=error.reason))
        if len(batch) == batch_images:
            yield from _predict_batch(model, names, batch, device)
            batch, names = [], []
    yield from _predict_batch(model, names, batch, device)


def _predict_batch(
    model: nn.Module, names: list[str], batch: list[Prediction | torch.Tensor], device: torch.device
) -> Iterator[Prediction]:
    good = [x for x in batch if isinstance(x, torch.Tensor)]
    rows = iter(model(torch.stack(good).to(device)).float().softmax(dim=1).tolist() if good else [])
    for name, found in zip(names, batch, strict=True):
        yield found if isinstance(found, Prediction) else Prediction(name, probabilities=next(rows))
