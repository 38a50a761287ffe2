"""The kinds of a detector's errors, and the score that is best to cut at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lambdanets.detection.precision import Detected, Floats, Kind, Truth, Whole, _wanted, _xywh, check_detected
from lambdanets.errors import need

NEAR_IOU, FOUND_IOU = 0.1, 0.5
"""An object is found from the second on; what overlaps less than the first is background."""

ERROR_KINDS = {
    "class": "in the right place, of another class",
    "place": "of the right class, beside the object",
    "both": "beside an object of another class",
    "duplicate": "of an object that is found already",
    "background": "where there is no object",
    "missed": "objects without any detection near",
}
"""What `errors` counts."""


@dataclass(frozen=True)
class Errors:
    """What goes wrong at one score, and how F1 goes with the score; an object is found at IoU 0.5.

    score       detections below it are left out
    best_score  of highest F1, in hundredths; in the middle where several are equal
    counts      kind of `ERROR_KINDS` -> how many
    correct     detections that found an object
    objects     how many there are
    f1          at the scores 0.00, 0.01 ... 1.00
    by_image    image id -> F1 of the image at `score`; 1 where nothing is and nothing was found
    """

    score: float
    best_score: float
    counts: Mapping[str, int]
    correct: int
    objects: int
    f1: tuple[float, ...]
    by_image: Mapping[int, float]

    @property
    def best_f1(self) -> float:
        """The highest; 0 where no score finds any object."""
        return self.f1[round(self.best_score * 100)]

    def worst(self, n: int) -> list[int]:
        """The image ids of lowest F1, worst first."""
        return sorted(self.by_image, key=lambda image_id: (self.by_image[image_id], image_id))[:n]

    def json(self) -> dict[str, Any]:
        """As JSON, without the images."""
        return {
            **{name: getattr(self, name) for name in ("score", "best_score", "correct", "objects")},
            "counts": dict(self.counts),
            "f1": list(self.f1),
        }


def errors(images: Truth, detected: Sequence[Detected], kind: Kind = "bbox", score: float | None = None) -> Errors:
    """Counts the kinds of errors among detections with a score of at least `score` (default: the best one).

    A detection finds the object of its class that it overlaps most, if at IoU 0.5 or more and no detection of higher
    score found it; inside a crowd of its class it counts neither way. Any other is an error of the first kind that
    fits: duplicate; class (IoU 0.5 with an object of another class); place (IoU 0.1 with one of its own class); both
    (IoU 0.1 with one of another); background. Missed are objects not found that no error of class or place is about.
    Raises ValueError as `average_precision` does.
    """
    need("faster_coco_eval", "detection", "it computes overlaps of masks")
    check_detected(images, detected, kind)
    matched = list(_matches(images, detected, kind))
    objects = sum(one.objects for one in matched)
    scores = np.concatenate([one.scores for one in matched]) if matched else np.zeros(0)
    kinds = np.concatenate([one.kinds for one in matched]) if matched else np.zeros(0, np.int64)
    f1 = []
    for hundredth in range(101):
        at = kinds[scores >= hundredth / 100]
        f1.append(_f1(int((at == _FOUND).sum()), int((at != _PASSED).sum()), objects))
    first = last = f1.index(max(f1))
    while last < 100 and f1[last + 1] == f1[first]:
        last += 1
    best = (first + last) // 2 / 100
    score = best if score is None else score

    counts: Counter[str] = Counter(dict.fromkeys(ERROR_KINDS, 0))
    by_image, correct = {}, 0
    for one in matched:
        of = one.kinds[one.scores >= score]
        counts.update(_NAMES[int(kind)] for kind in of if kind >= 0)
        explained = set(one.objects_of[(one.scores >= score) & np.isin(one.kinds, _EXPLAINS)].tolist())
        counts["missed"] += one.objects - len(explained)
        here = int((of == _FOUND).sum())
        correct += here
        by_image[one.image_id] = _f1(here, int((of != _PASSED).sum()), one.objects)
    return Errors(score, best, dict(counts), correct, objects, tuple(f1), by_image)


_NAMES = tuple(ERROR_KINDS)
_FOUND, _PASSED = -1, -2
_CLASS, _PLACE, _BOTH, _DUPLICATE, _BACKGROUND = range(5)
_EXPLAINS = (_FOUND, _CLASS, _PLACE)


def _f1(correct: int, given: int, objects: int) -> float:
    return 2 * correct / (given + objects) if given + objects else 1.0


class _Matched(NamedTuple):
    image_id: int
    scores: Floats
    kinds: Whole
    """A position in `ERROR_KINDS`, _FOUND or _PASSED."""
    objects_of: Whole
    """The object that a detection is about."""
    objects: int


def _matches(images: Truth, detected: Sequence[Detected], kind: Kind) -> Iterator[_Matched]:
    from faster_coco_eval.core import mask

    of_image = {int(one.image_id): one for one in detected}
    nothing = Detected(0, np.zeros((0, 4)), np.zeros(0, np.int64), np.zeros(0), [])
    for index, image_id in enumerate(images.image_ids.tolist()):
        wanted, one = _wanted(images, index, kind), of_image.get(image_id, nothing)
        order = np.argsort(-one.scores, kind="stable")
        overlaps = np.zeros((len(order), len(wanted.labels)))
        if overlaps.size:
            if kind == "segm":
                assert one.masks is not None  # as checked
                size = [int(side) for side in images.sizes[index]]
                shapes: list[Any] = [{"size": size, "counts": one.masks[i]} for i in order]
            else:
                shapes = _xywh(np.asarray(one.boxes, np.float64))[order].tolist()
            overlaps = np.asarray(mask.iou(shapes, wanted.shapes, wanted.crowd.astype(int).tolist()))
        kinds, about = _kinds(overlaps, one.labels[order], wanted.labels, wanted.crowd)
        yield _Matched(image_id, one.scores[order], kinds, about, int((~wanted.crowd).sum()))


def _kinds(
    overlaps: Floats, labels: Whole, wanted: Whole, crowd: np.ndarray[Any, np.dtype[np.bool_]]
) -> tuple[Whole, Whole]:
    """Of each detection, from the highest score, its kind and the object that it is about."""
    kinds = np.full(len(labels), _BACKGROUND)
    about = np.full(len(labels), -1)
    if not overlaps.size:
        return kinds, about
    same = labels[:, None] == wanted[None]
    free = ~crowd
    for i, row in enumerate(overlaps):
        # Equal overlaps: COCO takes the last.
        for which, kind, least in (
            (same[i] & free, _FOUND, FOUND_IOU),
            (same[i] & crowd, _PASSED, FOUND_IOU),
            (same[i] & ~crowd, _DUPLICATE, FOUND_IOU),
            (~same[i] & ~crowd, _CLASS, FOUND_IOU),
            (same[i] & ~crowd, _PLACE, NEAR_IOU),
            (~same[i] & ~crowd, _BOTH, NEAR_IOU),
        ):
            closest = len(row) - 1 - int(np.argmax(np.where(which, row, -1.0)[::-1]))
            if which[closest] and row[closest] >= least:
                kinds[i], about[i] = kind, closest
                if kind == _FOUND:
                    free[closest] = False
                break
    return kinds, about
