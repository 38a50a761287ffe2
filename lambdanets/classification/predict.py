"""Images in, the most probable classes out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lambdanets.data.decode import open_image
from lambdanets.data.transforms import View
from lambdanets.errors import BadImage, DiskFault, printable


@dataclass(frozen=True)
class Prediction:
    """One image's class probabilities, or why there are none: exactly one of `probabilities` and `error` is given.

    `image` is the path as it was given, to open the file with; `text` and `json` show it as `printable` does.
    """

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
        return "  ".join([printable(self.image), *(f"{printable(n)} {share:.1%}" for n, share in self.top(classes, k))])

    def json(self, classes: Sequence[str], k: int) -> str:
        """One line for a program: {"image", "top": [{"class", "probability"}]} or {"image", "error"}."""
        if self.error is not None:
            return json.dumps({"image": printable(self.image), "error": printable(self.error)})
        top = [{"class": printable(name), "probability": round(share, 6)} for name, share in self.top(classes, k)]
        return json.dumps({"image": printable(self.image), "top": top})


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
