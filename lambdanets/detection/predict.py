"""Pictures in; boxes, classes and masks of their objects out."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lambdanets.data.decode import MAX_IMAGE_PX, open_image
from lambdanets.data.listing import IMAGE_SUFFIXES
from lambdanets.data.order import natural
from lambdanets.detection.draw import draw
from lambdanets.detection.masks import decode, paste_runs
from lambdanets.detection.run import DetectionRun
from lambdanets.detection.scores import as_floats, in_picture
from lambdanets.detection.transforms import DetectionView
from lambdanets.errors import BadImage, BadRecipe, DiskFault, printable, some

SCORE = 0.5
"""The least score of what is shown, unless another is asked for."""

_NAMED = 10  # objects of a picture in a line for a person


@dataclass(frozen=True)
class DetectionPrediction:
    """What was found in one picture, best first; or why there is nothing.

    image         the path as it was given, to open the file with; `text` and `json` show it as `printable` does
    size          height and width of the picture, upright, px
    boxes         float64 (n, 4) x0, y0, x1, y1 px of the picture
    names         n classes; category_ids: their ids in the data that was trained on
    scores        float64 (n,), 0..1
    masks         n masks, COCO's compressed run lengths at `size`; None: the detector finds boxes alone
    error         a reason; then all else is empty
    """

    image: str
    size: tuple[int, int] = (0, 0)
    boxes: np.ndarray[Any, Any] = field(default_factory=lambda: np.zeros((0, 4)))
    names: tuple[str, ...] = ()
    category_ids: tuple[int, ...] = ()
    scores: np.ndarray[Any, Any] = field(default_factory=lambda: np.zeros(0))
    masks: list[bytes] | None = None
    error: str | None = None

    def text(self) -> str:
        """One line for a person.

        >>> DetectionPrediction("a.png", names=("car",), scores=np.array([0.97])).text()
        'a.png  1 object: car 0.97'
        >>> DetectionPrediction("a.png").text()
        'a.png  no objects'
        """
        if not self.names:
            return f"{printable(self.image)}  no objects"
        each = some((f"{name} {score:.2f}" for name, score in zip(self.names, self.scores, strict=True)), _NAMED)
        return f"{printable(self.image)}  {len(self.names)} object{'s' * (len(self.names) > 1)}: {each}"

    def json(self, drawn: str | Path | None = None) -> str:
        """One line for a program: {"image", "width", "height", "objects"} or {"image", "error"}.

        An object has name, category_id, bbox [x, y, width, height] px in hundredths, score, and segmentation, COCO's
        {"size", "counts"}, where there are masks. `drawn` is the file that it was drawn to.
        """
        if self.error is not None:
            return json.dumps({"image": printable(self.image), "error": printable(self.error)})
        objects = []
        for i, (x0, y0, x1, y1) in enumerate(self.boxes.tolist()):
            one: dict[str, Any] = {
                "name": printable(self.names[i]),
                "category_id": self.category_ids[i],
                "bbox": [round(side, 2) for side in (x0, y0, x1 - x0, y1 - y0)],
                "score": round(float(self.scores[i]), 6),
            }
            if self.masks is not None:
                one["segmentation"] = {"size": list(self.size), "counts": self.masks[i].decode("ascii")}
            objects.append(one)
        found = {"image": printable(self.image), "width": self.size[1], "height": self.size[0], "objects": objects}
        return json.dumps(found if drawn is None else {**found, "drawn": printable(drawn)})

    def drawn(self, classes: Iterable[str] = ()) -> Image.Image:
        """The picture, read again, with the objects on it; see `draw`. Raises BadImage, DiskFault, also where another
        picture is there now."""
        picture = open_image(self.image, known=False)
        height, width = self.size
        if picture.size != (width, height):
            raise BadImage(self.image, f"was {width} x {height} pixels a moment ago, and is {picture.size} now")
        masks = None if self.masks is None else (decode(runs, height, width) for runs in self.masks)
        return draw(picture, self.boxes, self.names, self.scores.tolist(), masks, classes=classes)


def view_at(run: DetectionRun, image_px: int | None) -> DetectionView:
    """How the run sees a picture, at another size if one is given. Raises BadRecipe for one that cannot be."""
    if image_px is None:
        return run.view
    if not image_px >= 32 or image_px**2 > MAX_IMAGE_PX:
        raise BadRecipe(
            f"image_px is {image_px:,}: 32 at least, and {MAX_IMAGE_PX:,} pixels in all at most are possible"
        )
    return replace(run.view, image_px=image_px)


def pictures_at(paths: Iterable[str | Path]) -> Iterator[str | DetectionPrediction]:
    """The paths; of a folder the pictures in it, in natural order, by their suffixes; or why there are none."""
    for path in map(str, paths):
        try:
            if not os.path.isdir(path):
                yield path
                continue
            held = (name for name in os.listdir(path) if not name.startswith("."))
            names = [name for name in held if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES]
        except (OSError, ValueError) as error:
            yield DetectionPrediction(path, error=f"cannot be read: {error}")
            continue
        if not names:
            yield DetectionPrediction(path, error=f"is a folder without pictures ({some(sorted(IMAGE_SUFFIXES), 99)})")
        for name in sorted(names, key=natural):
            yield os.path.join(path, name)


def predict(
    run: DetectionRun,
    paths: Iterable[str | Path],
    *,
    device: torch.device,
    score: float = SCORE,
    image_px: int | None = None,
) -> Iterator[DetectionPrediction]:
    """The objects in each picture, in the order given; what cannot be read becomes a prediction with an error.

    paths     files, or folders: all pictures in them, in natural order
    score     the least that an object must have, 0..1; a run finds none below its own score_min
    image_px  the longer side as the detector sees it (default: the run's, which it learnt and was judged at)

    One picture is in memory at a time, and of the masks no more than one at its size. A picture gives the same whatever
    else is asked for. The model moves to the device. Raises BadRecipe for a score or size that cannot be.
    """
    if not 0 <= score <= 1:
        raise BadRecipe(f"--score must be from 0 to 1, not {score:g}")
    return _predict(run, paths, device, score, view_at(run, image_px))


@torch.inference_mode()
def _predict(
    run: DetectionRun, paths: Iterable[str | Path], device: torch.device, score: float, view: DetectionView
) -> Iterator[DetectionPrediction]:
    model = run.model.to(device).eval()
    for path in pictures_at(paths):
        if isinstance(path, DetectionPrediction):
            yield path
            continue
        try:
            seen = view.evaluate(open_image(path, known=False))
        except (BadImage, DiskFault) as error:
            yield DetectionPrediction(path, error=error.reason)
            continue
        (found,) = model([as_floats(seen.image, device)])
        kept = found["scores"] >= score
        size = int(seen.image.shape[1]), int(seen.image.shape[2])
        boxes = in_picture(found["boxes"][kept], size, seen.original)
        masks = list(paste_runs(found["masks"][kept].cpu(), boxes, seen.original)) if model.masks else None
        categories = [run.categories[label - 1] for label in found["labels"][kept].tolist()]
        yield DetectionPrediction(
            path,
            seen.original,
            boxes.numpy(),
            tuple(category.name for category in categories),
            tuple(category.id for category in categories),
            found["scores"][kept].cpu().double().numpy(),
            masks,
        )
