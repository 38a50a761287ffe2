"""The numbers of a run on a folder of images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lambdanets.classification.held_out import _chosen, _unreadable, images_of, own_images
from lambdanets.classification.plots import confusion_png
from lambdanets.classification.run import Run, open_run
from lambdanets.classification.scores import Confusion, Scores, evaluate
from lambdanets.data.batches import Batches
from lambdanets.data.images import Images
from lambdanets.errors import BadImage, BadRun, need, printable, some
from lambdanets.files import write_atomically, write_json
from lambdanets.runs.folder import EVALUATION_JSON, NotWritten, choose_folder, evaluation_folder
from lambdanets.runs.page import cut
from lambdanets.runs.record import RUN_JSON
from lambdanets.training.distributed import Ranks

CONFUSION = "confusion.png"
_TABLE_CLASSES = 40  # rows that a person reads; all are in the JSON file


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate_run` found and wrote.

    scores    of the images that could be read
    images    those images, with the run's classes
    how       a sentence: which images these are
    excluded  name -> reason of images left out, since they cannot be read
    folder    where evaluation.json and confusion.png are; None while they are not written
    """

    scores: Scores
    images: Images
    how: str
    excluded: dict[str, str]
    folder: Path | None

    def __str__(self) -> str:
        lines = [printable(self.how), f"{self.scores}, loss {self.scores.loss:.4f} nats"]
        if self.excluded:
            total = self.scores.n + len(self.excluded)
            listed = some((f"{name}: {why}" for name, why in self.excluded.items()), between="\n  ")
            lines.append(
                f"{len(self.excluded)} of {total} images cannot be read and are in none of these numbers:\n  {listed}"
            )
        lines.append(self._table())
        if self.folder is not None:
            lines.append(f"{printable(self.folder)}: {EVALUATION_JSON}, {CONFUSION}")
        return "\n".join(lines)

    def _table(self) -> str:
        rows = [row for row in per_class(self.scores.confusion, self.images.classes) if row["images"]]
        absent = len(self.images.classes) - len(rows)
        note = [f"{absent} classes without images"] if absent else []
        if len(rows) > _TABLE_CLASSES:
            note.append(f"the {_TABLE_CLASSES} worst of {len(rows)} classes; all are in {EVALUATION_JSON}")
            rows = sorted(rows, key=lambda row: row["recall_frac"])[:_TABLE_CLASSES]
        rows = [{**row, "class": cut(row["class"])} for row in rows]
        width = max(len("class"), *(len(row["class"]) for row in rows))
        lines = [f"{'class':{width}}  {'images':>7}  {'right':>7}  {'top-1':>6}  most often taken for"]
        for row in rows:
            taken = row["most_often_taken_for"]
            wrong = "" if taken is None else f"{cut(taken['class'])} ({taken['images']})"
            line = f"{row['class']:{width}}  {row['images']:>7}  {row['right']:>7}  {row['recall_frac']:>6.1%}  {wrong}"
            lines.append(line.rstrip())
        return "\n".join([*lines, *note])


def evaluate_run(
    run: str | Path,
    data: str | Path | None = None,
    *,
    out: str | Path | None = None,
    batch_images: int | None = None,
    workers: int = 0,
    device: torch.device,
    exclude_bad: bool = False,
    allow_sources: Sequence[str] = (),
) -> Evaluation:
    """Evaluate a run's weights on a folder of images, each counted once, and write the numbers and the picture.

    run           the folder of a run, or a checkpoint of it, RUN/step-N
    data          a folder of images, see `images_of`; None: the images that the run held out
    out           a new or empty folder; None: the next RUN/evaluation-N
    batch_images  images a batch; None: the recipe's. It changes memory and time, not the counts
    workers       processes that read images
    allow_sources URLs that the run or a manifest may name, besides `data`
    exclude_bad   leave out images that cannot be read, and say how many; otherwise one is an error. Every image is read
                  twice then
    Under torchrun the ranks share the images; each gets the result, rank 0 writes it. Raises BadRun (run, folder),
    BadData (the images or their classes do not fit the run), BadImage; NotWritten, with the result, where it cannot be
    written in the end. Of two evaluations at once each gets a folder of its own.
    """
    with Ranks() as ranks:
        with ranks.together():
            need("matplotlib", "plots", f"{CONFUSION} is drawn with it")
            opened = open_run(run)
            if data is None:
                images, how = own_images(opened.record, opened.folder / RUN_JSON, allow_sources)
            else:
                images, how = images_of(data, opened.record, allow_sources)
            if out is not None:
                choose_folder(out, "evaluation")
        excluded: dict[str, str] = {}
        if exclude_bad:
            with ranks.together():
                mine = list(range(ranks.rank, len(images), ranks.ranks))
                bad = _unreadable(images, mine, workers)
            bad = {i: why for part in ranks.all(sorted(bad.items())) for i, why in part}
            excluded = {images.names[i]: bad[i] for i in sorted(bad)}
            images = _chosen(images, [i for i in range(len(images)) if i not in bad], images.classes)
        with ranks.together():
            batches = Batches(
                images,
                opened.view,
                batch_images=batch_images or opened.record["recipe"]["eval_batch_images"],
                training=False,
                workers=workers,
                rank=ranks.rank,
                ranks=ranks.ranks,
            )
        try:
            scores = evaluate(opened.model.to(device), batches, classes=len(opened.classes), device=device, ranks=ranks)
        except BadImage as error:
            error.add_note("repair or remove it, or leave such images out and count them: --exclude-bad")
            raise
        if not math.isfinite(scores.loss):
            raise BadRun(f"the loss of {run} on {data or 'its held-out images'} is {scores.loss}: {how}")
        found = Evaluation(scores, images, how, excluded, None)
        written: str | None = None
        with ranks.together():
            if ranks.first:
                written = str(_write(found, opened, Path(run), data, out))
        return replace(found, folder=Path(ranks.all(written)[0]))


def per_class(confusion: Confusion, classes: Sequence[str]) -> list[dict[str, Any]]:
    """One dict a class: class, images, right, recall_frac, precision_frac, most_often_taken_for {class, images}.

    Fractions of nothing are None. Names are as `printable` writes them.

    >>> per_class(Confusion.of(2, [(0, 0), (0, 1), (0, 1)]), ["cat", "dog"])[0]["most_often_taken_for"]
    {'class': 'dog', 'images': 2}
    """
    names = [printable(name) for name in classes]
    of_label, of_predicted = confusion.sums()
    most: dict[int, tuple[int, int]] = {}
    for label, predicted, count in confusion.mistakes():
        most.setdefault(label, (predicted, count))
    rows = []
    for label, (n, named) in enumerate(zip(of_label, of_predicted, strict=True)):
        right = confusion.cells.get((label, label), 0)
        taken_for, count = most.get(label, (None, 0))
        rows.append(
            {
                "class": names[label],
                "images": n,
                "right": right,
                "recall_frac": right / n if n else None,
                "precision_frac": right / named if named else None,
                "most_often_taken_for": None if taken_for is None else {"class": names[taken_for], "images": count},
            }
        )
    return rows


def _write(found: Evaluation, run: Run, run_folder: Path, data: str | Path | None, out: str | Path | None) -> Path:
    """Write both files; gives their folder. Raises NotWritten."""
    scores, names, labels = found.scores, found.images.names, found.images.labels
    content = {
        "run": printable(run_folder),
        "model": run.record["recipe"]["model"],
        "data": printable(data if data is not None else run.record["data"]["source"]),
        "how": printable(found.how),
        "n": scores.n,
        "top1_frac": scores.top1_frac,
        "top5_frac": scores.top5_frac,
        "loss": scores.loss,
        "excluded": [{"name": printable(name), "reason": printable(why)} for name, why in found.excluded.items()],
        "classes": per_class(scores.confusion, run.classes),
        "confusion": scores.confusion.json(),
        "mistakes": [
            {
                "name": printable(names[scores.ids[k]]),
                "label": printable(run.classes[int(labels[scores.ids[k]])]),
                "predicted": printable(run.classes[scores.predicted[k]]),
                "loss": scores.losses[k],
            }
            for k in scores.mistakes(found.images)
        ],
    }
    picture = confusion_png(scores.confusion, run.classes, f"{run.record['recipe']['model']}: {scores}")
    try:
        with evaluation_folder(run.folder, out) as folder:
            write_json(folder / EVALUATION_JSON, content)
            write_atomically(folder / CONFUSION, picture)
            return folder
    except (OSError, BadRun) as error:
        raise NotWritten(run.folder if out is None else out, error, found) from error
