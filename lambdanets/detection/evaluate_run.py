"""The numbers of a run on a COCO data set."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lambdanets.detection.batches import evaluation_batches
from lambdanets.detection.mistakes import Errors, errors
from lambdanets.detection.plots import precision_png
from lambdanets.detection.precision import Precision
from lambdanets.detection.predict import view_at
from lambdanets.detection.run import DETECTIONS, DetectionRun, open_run
from lambdanets.detection.scores import Scores, evaluate, write_detections
from lambdanets.detection.source import CocoSource, Judged, images_of, own_images
from lambdanets.detection.tables import class_table, errors_said, losses_said, precision_table
from lambdanets.errors import BadRun, need, printable, printable_text, some
from lambdanets.files import to_stderr, write_atomically, write_json
from lambdanets.runs.folder import EVALUATION_JSON, NotWritten, choose_folder, evaluation_folder
from lambdanets.training.distributed import Ranks

PRECISION = "precision.png"


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate_run` found and wrote.

    scores    of the images
    judged    those images, with the run's classes, and how they were chosen
    image_px  their longer side as the detector saw it
    errors    kinds of errors and F1, of masks where there are some, else of boxes; on rank 0 alone
    passed    detections of classes that the data does not have: they are in no number
    folder    where evaluation.json, detections.json and precision.png are; None while they are not written
    run       as it was named
    """

    scores: Scores
    judged: Judged
    image_px: int
    errors: Errors | None
    passed: int
    folder: Path | None = None
    run: str = "RUN"

    @property
    def kinds(self) -> list[Precision]:
        """Of boxes, and of masks where there are some."""
        return [kind for kind in (self.scores.box, self.scores.mask) if kind is not None]

    def __str__(self) -> str:
        losses = losses_said(self.scores.losses, 4)
        lines = [printable(self.how), f"{self.scores}", f"loss {self.scores.loss:.4f} ({losses})", ""]
        lines += [*precision_table(self.kinds), "", *class_table(self.kinds)]
        if self.errors is not None:
            lines += ["", *errors_said(self.errors, self.kinds[-1])]
        if self.folder is not None:
            lines += ["", f"{printable(self.folder)}: {EVALUATION_JSON}, {DETECTIONS}, {PRECISION}"]
        if self.errors is not None and self.errors.best_f1:
            run = printable(shlex.quote(self.run))
            lines += [f"next: lambdanets predict {run} PICTURES --draw found --score {self.errors.best_score:.2f}"]
        return "\n".join(lines)

    @property
    def how(self) -> str:
        """Which images these are, and what is unlike the run."""
        said = f"{self.judged.how}; the longer side is {self.image_px} px"
        if self.judged.missing:
            names = some(self.judged.images.classes[label - 1] for label in self.judged.missing)
            said += f"; the data has no class {names}: {self.passed:,} detections of such are in no number"
        return said


def evaluate_run(
    run: str | Path,
    data: CocoSource | str | Path | None = None,
    *,
    out: str | Path | None = None,
    batch_images: int | None = None,
    workers: int = 0,
    device: torch.device,
    image_px: int | None = None,
) -> Evaluation:
    """Judge a run's weights by COCO data, each image counted once, and write numbers, detections and curves.

    run           the folder of a run, or a checkpoint of it, RUN/step-N
    data          see `source.images_of`; None: the images that the run held out
    out           a new or empty folder; None: the next RUN/evaluation-N
    batch_images  images a batch; None: the recipe's. It changes memory and time
    workers       processes that read images
    image_px      the longer side as the detector sees it; None: the run's
    Under torchrun the ranks share the images; each gets the numbers, rank 0 has the detections and writes.
    Raises BadRun (run, folder), BadData (the data, or its classes do not fit the run), BadImage, BadRecipe (image_px);
    NotWritten, with the result, where it cannot be written in the end.
    """
    with Ranks() as ranks:
        with ranks.together():
            need("faster_coco_eval", "detection", "average precision is computed with it")
            need("matplotlib", "plots", f"{PRECISION} is drawn with it")
            opened = open_run(run)
            view = view_at(opened, image_px)
            if data is None:
                judged = own_images(opened.record)
            else:
                judged = images_of(data if isinstance(data, CocoSource) else CocoSource(data), opened.record)
            if out is not None:
                choose_folder(out, "evaluation")
            if ranks.first and len(judged.findings):
                to_stderr(printable_text(judged.findings.table()))
            images = judged.images
            batches = evaluation_batches(
                images,
                view,
                batch_images=batch_images or opened.recipe.eval_batch_images,
                workers=workers,
                rank=ranks.rank,
                ranks=ranks.ranks,
            )
        scores = evaluate(opened.model.to(device), batches, images, device=device, ranks=ranks)
        if not math.isfinite(scores.loss):
            raise BadRun(f"the loss of {run} is {scores.loss} on {judged.how}")
        written: list[Any] = []
        found = Evaluation(scores, judged, view.image_px, None, 0, run=str(run))
        with ranks.together():
            if ranks.first:
                found = _with_errors(found)
                written = [str(_write(found, opened, Path(run), out)), found.passed]
        folder, passed = ranks.all(written)[0]
        return replace(found, folder=Path(folder), passed=passed)


def _with_errors(found: Evaluation) -> Evaluation:
    """With the kinds of errors; detections of what the data does not have are left out, since it cannot judge them."""
    gone, before = set(found.judged.missing), sum(len(one.labels) for one in found.scores.detected)
    detected = []
    for one in found.scores.detected:
        kept = [i for i, label in enumerate(one.labels.tolist()) if label not in gone]
        masks = None if one.masks is None else [one.masks[i] for i in kept]
        detected.append(
            one._replace(boxes=one.boxes[kept], labels=one.labels[kept], scores=one.scores[kept], masks=masks)
        )
    scores = replace(found.scores, detected=detected)
    of = errors(found.judged.images, detected, found.kinds[-1].kind)
    return replace(found, scores=scores, errors=of, passed=before - sum(len(one.labels) for one in detected))


def _write(found: Evaluation, run: DetectionRun, run_folder: Path, out: str | Path | None) -> Path:
    """Write the files; gives their folder. Raises NotWritten."""
    assert found.errors is not None
    images, of = found.judged.images, found.errors
    index_of = {image_id: index for index, image_id in enumerate(images.image_ids.tolist())}
    content = {
        "run": printable(run_folder),
        "model": run.recipe.model,
        "data": printable(images.file),
        "how": printable(found.how),
        "image_px": found.image_px,
        "score_min": run.recipe.score_min,
        **found.scores.json(),
        "missing_classes": [printable(images.classes[label - 1]) for label in found.judged.missing],
        "detections_of_missing_classes": found.passed,
        "findings": [[row.id, row.severity, row.what, row.count, *row.names] for row in found.judged.findings],
        "errors": {"kind": found.kinds[-1].kind, "iou": 0.5, **of.json()},
        "worst_images": [
            {"image_id": image_id, "name": printable(images.names[index_of[image_id]]), "f1": of.by_image[image_id]}
            for image_id in of.worst(len(images))
        ],
    }
    picture = precision_png(found.kinds, of, f"{run.recipe.model}: {found.scores}")
    try:
        with evaluation_folder(run.folder, out) as folder:
            write_json(folder / EVALUATION_JSON, content)
            write_detections(folder / DETECTIONS, images, found.scores.detected)
            write_atomically(folder / PRECISION, picture)
            return folder
    except (OSError, BadRun) as error:
        raise NotWritten(run.folder if out is None else out, error, found) from error
