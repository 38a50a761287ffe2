"""What a run is worth: its numbers on a folder of images (`evaluate_run`), its page (`write_report`)."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader

from lambdanets import data as images_on_disk
from lambdanets.archive import check_source
from lambdanets.batches import Batches, serve_the_run
from lambdanets.checkpoint import (
    BAD_SAMPLES,
    CURVES,
    WEIGHTS,
    BadRun,
    Run,
    choose_folder,
    need,
    next_numbered,
    open_run,
)
from lambdanets.data import Images
from lambdanets.decode import BadData, BadImage, DiskFault
from lambdanets.distributed import Ranks
from lambdanets.errors import printable, some
from lambdanets.evaluate import Confusion, Scores, evaluate
from lambdanets.files import field, json_object, lock, open_file, write_atomically, write_json
from lambdanets.log import LOG
from lambdanets.page import Mistake, page, thumbnail
from lambdanets.record import RUN_JSON, read_record
from lambdanets.report import confusion_png
from lambdanets.shards import is_shards

EVALUATION_JSON = "evaluation.json"
CONFUSION = "confusion.png"
REPORT = "report.html"
_TABLE_CLASSES = 40  # rows that a person reads; all are in the JSON file
_MISTAKES = 24  # thumbnails in a report
_COLUMN = 40  # letters of a class in the table
_LINES_BYTES = 256 << 20  # of a file of lines that a report reads; the rest of a larger one is left out
_LINE_BYTES = 1 << 20


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
        rows = [{**row, "class": _cut(row["class"])} for row in rows]
        width = max(len("class"), *(len(row["class"]) for row in rows))
        lines = [f"{'class':{width}}  {'images':>7}  {'right':>7}  {'top-1':>6}  most often taken for"]
        for row in rows:
            taken = row["most_often_taken_for"]
            wrong = "" if taken is None else f"{_cut(taken['class'])} ({taken['images']})"
            line = f"{row['class']:{width}}  {row['images']:>7}  {row['right']:>7}  {row['recall_frac']:>6.1%}  {wrong}"
            lines.append(line.rstrip())
        return "\n".join([*lines, *note])


def _cut(name: str) -> str:
    return name if len(name) <= _COLUMN else name[: _COLUMN - 1] + "…"


class NotWritten(BadRun):
    """An evaluation was computed and cannot be written; `found` has its numbers."""

    def __init__(self, message: str, found: Evaluation) -> None:
        super().__init__(message)
        self.found = found


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
            _need_matplotlib(CONFUSION)
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
    wrong = [k for k in sorted(range(scores.n), key=lambda k: -scores.losses[k]) if _wrong(found, k)]
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
            for k in wrong
        ],
    }
    picture = confusion_png(scores.confusion, run.classes, f"{run.record['recipe']['model']}: {scores}")
    try:
        with _taken(run.folder, out) as folder:
            write_json(folder / EVALUATION_JSON, content)
            write_atomically(folder / CONFUSION, picture)
            return folder
    except (OSError, BadRun) as error:
        where = run.folder if out is None else out
        raise NotWritten(
            f"nothing of this evaluation is written to {where} ({error}): give another --out", found
        ) from error


@contextlib.contextmanager
def _taken(run_folder: Path, out: str | Path | None) -> Iterator[Path]:
    """A folder that this evaluation alone writes in: the next evaluation-N, or `out`. Raises BadRun, OSError."""
    if out is None:
        folder = next_numbered(run_folder, "evaluation")
        try:
            yield folder
        except BaseException:
            with contextlib.suppress(OSError):  # it stays where one of the files is in it
                folder.rmdir()
            raise
        return
    os.makedirs(out, exist_ok=True)
    opened = os.open(out, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        lock(opened, out, wait=True)
        yield choose_folder(out, "evaluation")  # still empty, now that no other may write in it
    finally:
        os.close(opened)


def _wrong(found: Evaluation, k: int) -> bool:
    return found.scores.predicted[k] != int(found.images.labels[found.scores.ids[k]])


# --- which images ----------------------------------------------------------------------------------------------------


def own_images(record: dict[str, Any], by: str | Path, allow_sources: Sequence[str] = ()) -> tuple[Images, str]:
    """The images that a run held out, from where they were, and a sentence. Raises BadData where they have changed."""
    found = record["data"]
    if found["source"] == "scikit-learn digits":
        images = images_on_disk.digits()[1]
    else:
        check_source(found["source"], allow_sources, str(by))
        images = images_on_disk.folder(found["source"], allow_sources=allow_sources).val
    fingerprint = _val_fingerprint(record)
    same = len(images) == found["val_images"] and list(images.classes) == record["classes"]
    if not same or fingerprint not in (None, images.fingerprint()):
        raise BadData(
            f"the held-out images of {found['source']} are not those of the run any more ({len(images):,} now, "
            f"{found['val_images']:,} then): name the images with --data FOLDER"
        )
    return images, f"the {len(images):,} images that the run held out, of {found['source']}"


def images_of(data: str | Path, record: dict[str, Any], allow_sources: Sequence[str] = ()) -> tuple[Images, str]:
    """The images of a folder that a run is judged by, labelled with its classes by name, and a sentence on them.

    data  what the run was trained on, known by its place or by its fingerprint: the part that it held out.
          FOLDER/val/CLASS/* (or valid, validation, test) where there is such a folder; shards: those of the val split;
          else all of FOLDER/CLASS/*
    Raises BadData for a class that the run does not know, or no images.
    """
    root, classes = Path(data), tuple(record["classes"])
    own = record["data"]["source"] == images_on_disk.absolute(data)
    divided: Images | None = None
    try:
        divided = images_on_disk.folder(data, allow_sources=allow_sources).val
    except BadData:  # fit for no training: one class, say
        if own or not root.is_dir() or is_shards(data):
            raise
    if divided is not None:
        own = own or divided.fingerprint() == _val_fingerprint(record)
        if own or not root.is_dir() or is_shards(data):
            which = "that the run held out" if own else "of its val split"
            _refuse_unknown(divided.classes, classes, str(data))
            return _chosen(divided, range(len(divided)), classes), f"the {len(divided):,} images of {data} {which}"
    images, how = images_on_disk.val_or_all(root)
    _refuse_unknown(images.classes, classes, str(root))
    return _chosen(images, range(len(images)), classes), how


def _refuse_unknown(found: Sequence[str], classes: Sequence[str], where: str) -> None:
    known = set(classes)
    if unknown := [name for name in found if name not in known]:
        raise BadData(
            f"{len(unknown)} classes of {where} are unknown to the run: {some(unknown)}; its {len(classes)} classes "
            f"are {some(classes)}; rename or remove the folders"
        )


@dataclass(frozen=True, eq=False, repr=False)
class _Chosen(Images):
    """Some images of another list, under the class names of a run."""

    source: Images
    ids: Sequence[int]

    def load(self, index: int) -> Image.Image:
        return self.source.load(self.ids[index])


def _chosen(source: Images, ids: Sequence[int], classes: Sequence[str]) -> Images:
    position = {name: i for i, name in enumerate(classes)}
    label_of = [position.get(name, -1) for name in source.classes]
    labels = [label_of[int(source.labels[i])] for i in ids]
    return _Chosen(tuple(classes), [source.names[i] for i in ids], labels, source, ids)


@dataclass(frozen=True)
class _Reads:
    images: Images

    def __getitem__(self, index: int) -> tuple[int, str | None]:
        try:
            self.images.load(index)
        except BadImage as error:
            return index, error.reason
        return index, None


def _unreadable(images: Images, ids: Sequence[int], workers: int) -> dict[int, str]:
    """id -> reason of those that cannot be read, every one tried."""
    tried: Iterable[Any] = map(_Reads(images).__getitem__, ids)
    if workers:
        loader: Any = DataLoader(
            _Reads(images),  # type: ignore[arg-type]  # has __getitem__, is no Dataset
            batch_size=None,
            sampler=ids,
            num_workers=workers,
            worker_init_fn=serve_the_run,
            generator=torch.Generator(),
        )
        tried = loader
    return {index: why for index, why in tried if why is not None}


def _val_fingerprint(record: dict[str, Any]) -> str | None:
    fingerprint: dict[str, str] = record["data"].get("fingerprint") or {}
    return fingerprint.get("val")


def _need_matplotlib(what: str) -> None:
    need("matplotlib", "plots", f"{what} is drawn with it")


# --- the page --------------------------------------------------------------------------------------------------------


def write_report(
    folder: str | Path,
    record: dict[str, Any] | None = None,
    scores: Scores | None = None,
    images: Images | None = None,
    *,
    device: torch.device | None = None,
    workers: int = 0,
    allow_sources: Sequence[str] = (),
) -> Path:
    """Write RUN/report.html: one file that needs no network and runs no script. Gives its path.

    folder   of a run, finished or not
    record   its run.json; None: read from the folder
    scores   of `images`, the held-out ones, by the weights in the folder. None: they are computed, if the folder has
             weights and the images are still there; if not, the page says why it lacks them
    device, workers, allow_sources   for that, as in `evaluate_run`
    Raises BadRun where the folder is no run's, or cannot be written.
    """
    folder, notes = Path(folder), []
    _need_matplotlib(REPORT)
    if record is None:
        record = read_record(folder)
    if scores is None:
        try:
            run = open_run(folder)
            images, _ = own_images(record, folder / RUN_JSON, allow_sources)
            size = record["recipe"]["eval_batch_images"]
            batches = Batches(images, run.view, batch_images=size, training=False, workers=workers)
            device = device or torch.device("cpu")
            scores = evaluate(run.model.to(device), batches, classes=len(run.classes), device=device)
        except (BadRun, BadData, BadImage, ImportError) as error:
            notes.append(f"No evaluation of the weights: {error}")
    confusion = scores.confusion if scores is not None else None
    if confusion is None and record.get("result"):
        confusion = Confusion.read(record["result"]["confusion"], len(record["classes"]))
    mistakes: list[Mistake] = []
    if scores is not None and images is not None:
        mistakes = _worst(scores, images)
    bad = sum(line.endswith(b"\n") for line in _lines(folder / BAD_SAMPLES))
    steps = _losses(folder / LOG)
    text = page(
        record, scores=scores, confusion=confusion, mistakes=mistakes, notes=notes, steps=steps, bad_samples=bad
    )
    try:
        write_atomically(folder / REPORT, text.encode())
    except OSError as error:
        raise BadRun(f"{folder / REPORT} cannot be written: {error}") from error
    return folder / REPORT


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file that a run appends to, as far as they can be read; a pipe, say, has none."""
    with contextlib.suppress(OSError), open_file(path) as file:
        left = _LINES_BYTES
        while left > 0 and (line := file.readline(_LINE_BYTES)):
            left -= len(line)
            yield line


def _losses(path: Path) -> list[tuple[int, float]]:
    """(step, loss) of the lines of log.jsonl that have them; a line that a kill cut short has not."""
    found = []
    for line in _lines(path):
        with contextlib.suppress(ValueError, OverflowError):
            row = json_object(line)
            step, loss = field(row, "step", int), field(row, "loss", float)  # one that is not finite is text there
            if math.isfinite(loss) and 0 <= step < 2**53:
                found.append((step, loss))
    return found


def _worst(scores: Scores, images: Images) -> list[Mistake]:
    """The mistakes of the highest loss, with thumbnails."""
    wrong = [k for k in range(scores.n) if scores.predicted[k] != int(images.labels[scores.ids[k]])]
    wrong.sort(key=lambda k: -scores.losses[k])
    found = []
    for k in wrong[:_MISTAKES]:
        index = scores.ids[k]
        try:
            picture = thumbnail(images.load(index))
        except (BadImage, DiskFault):  # gone since
            picture = None
        label, predicted = images.classes[int(images.labels[index])], images.classes[scores.predicted[k]]
        found.append(Mistake(images.names[index], label, predicted, scores.losses[k], picture))
    return found


@dataclass(frozen=True)
class Result:
    """What a run came to: its folder, the last epoch's scores on the held-out images, one dict an epoch, seconds."""

    folder: Path
    scores: Scores
    history: list[dict[str, Any]]
    seconds: float

    def __str__(self) -> str:
        files = f"{WEIGHTS}, {RUN_JSON}, {CURVES}, {REPORT}"
        return f"{self.scores} after {self.seconds:.0f} s\n{printable(self.folder)}: {files}"


def result_of(folder: Path, record: dict[str, Any]) -> Result:
    found = record["result"]
    top5 = found["top5_frac"]
    confusion = Confusion.read(found["confusion"], len(record["classes"]))
    scores = Scores(found["n"], found["top1_frac"], top5, found["loss"], confusion, ids=[], predicted=[])
    return Result(folder, scores, record["history"], found["seconds"])
