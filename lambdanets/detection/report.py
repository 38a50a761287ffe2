"""The pictures and the page of a run: one HTML file with its pictures in it, that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lambdanets.detection.batches import evaluation_batches
from lambdanets.detection.coco import CocoImages
from lambdanets.detection.gallery import Pair, pairs
from lambdanets.detection.mistakes import Errors, errors
from lambdanets.detection.plots import curves_png, curves_svg, precision_png
from lambdanets.detection.precision import Precision
from lambdanets.detection.run import DETECTIONS, open_run, read_record
from lambdanets.detection.scores import Scores, evaluate, write_detections
from lambdanets.detection.source import own_images
from lambdanets.detection.tables import OF_KIND, best_score_said, class_heads, class_rows, error_rows, precision_rows
from lambdanets.errors import BadData, BadImage, BadRun, need, printable, some
from lambdanets.files import write_atomically
from lambdanets.runs import page as pages
from lambdanets.runs.folder import CURVES, REPORT
from lambdanets.runs.page import html, html_name, src

_PICTURES = 12  # of the held-out ones, and of the worst
_CLASSES = 200  # rows of the table by class
_STYLE = """
.pairs { display: grid; gap: 1.4em } .pair { display: grid; gap: .2em 1em;
       grid-template-columns: minmax(0, max-content) minmax(0, max-content) }
.pair .name { grid-column: 1 / 3; overflow-wrap: anywhere } .pair img { max-width: 100%; height: auto }
"""
_COLUMNS = {
    "train loss": ("train_loss", "{:.4f}"),
    "held-out loss": ("val_loss", "{:.4f}"),
    "box AP": ("val_box_ap", "{:.3f}"),
    "box AP50": ("val_box_ap50", "{:.3f}"),
    "mask AP": ("val_mask_ap", "{:.3f}"),
    "mask AP50": ("val_mask_ap50", "{:.3f}"),
}


def write_pictures(folder: Path, record: dict[str, Any], scores: Scores, images: CocoImages) -> None:
    """detections.json in COCO's result format, curves.png and report.html. Raises BadRun, OSError."""
    write_detections(folder / DETECTIONS, images, scores.detected)
    write_atomically(folder / CURVES, curves_png(record["history"], f"{_title(record)}: {scores}"))
    write_report(folder, record, scores, images)


def write_report(
    folder: str | Path,
    record: dict[str, Any] | None = None,
    scores: Scores | None = None,
    images: CocoImages | None = None,
    *,
    device: torch.device | None = None,
    workers: int = 0,
) -> Path:
    """Write RUN/report.html: one file that needs no network and runs no script. Gives its path.

    folder   of a run, finished or not
    record   its run.json; None: read from the folder
    scores   of `images`, the held-out ones, by the weights in the folder. None: they are computed, if the folder has
             weights and the pictures are still there; if not, the page says why it lacks them
    device, workers   for that, as in `evaluate_run`
    Raises BadRun where the folder is no run's, or cannot be written.
    """
    folder, notes = Path(folder), []
    need("matplotlib", "plots", f"{REPORT} is drawn with it")
    if record is None:
        record = read_record(folder)
    if scores is None:
        try:
            run = open_run(folder)
            images = own_images(record).images
            batches = evaluation_batches(images, run.view, batch_images=run.recipe.eval_batch_images, workers=workers)
            device = device or torch.device("cpu")
            scores = evaluate(run.model.to(device), batches, images, device=device)
        except (BadRun, BadData, BadImage, ImportError) as error:
            notes.append(f"No evaluation of the weights: {error}")
    kinds: list[Precision | None] = []
    if scores is not None:
        kinds = [scores.box, scores.mask]
    elif record.get("result"):
        kinds = [Precision.read(held) for name in ("box", "mask") if (held := record["result"].get(name)) is not None]
    known = [kind for kind in kinds if kind is not None]
    of: Errors | None = None
    chosen: list[Pair] = []
    worst: list[Pair] = []
    if scores is not None and images is not None:
        of = errors(images, scores.detected, known[-1].kind)
        spread = [i * len(images) // _PICTURES for i in range(_PICTURES)]
        index_of = {image_id: index for index, image_id in enumerate(images.image_ids.tolist())}
        chosen = pairs(images, sorted(set(spread)), scores.detected, of.score, of.by_image)
        bad = [index_of[image_id] for image_id in of.worst(_PICTURES) if of.by_image[image_id] < 1]
        worst = pairs(images, bad, scores.detected, of.score, of.by_image)
    text = page(
        record,
        kinds=known,
        loss=None if scores is None else scores.loss,
        n=0 if scores is None else scores.n,
        errors=of,
        chosen=chosen,
        worst=worst,
        notes=notes,
        steps=pages.losses(folder),
        bad_samples=pages.bad_samples(folder),
    )
    return pages.write_page(folder, text)


def page(
    record: dict[str, Any],
    *,
    kinds: Sequence[Precision],
    loss: float | None,
    n: int,
    errors: Errors | None,
    chosen: Sequence[Pair],
    worst: Sequence[Pair],
    notes: Sequence[str],
    steps: Sequence[tuple[int, float]],
    bad_samples: int,
) -> str:
    """The HTML of a run, whatever of it there is yet. Every string in it is escaped, and the page allows no script.

    record        run.json, as `read_record` gives it
    kinds         average precision of boxes, and of masks where there are some; none where it is not known
    loss, n       of the held-out images, and how many these are
    errors        of them, of the last of `kinds`
    chosen, worst pictures
    notes         what the reader must know, above all else
    steps         (step, training loss) of single steps
    bad_samples   training images that could not be read and were replaced
    """
    history, data = record["history"], record["data"]
    title = _title(record)
    shown = [(f"{kind.numbers[name]:.3f}", f"{what} of {OF_KIND[kind.kind]}")
             for kind in kinds for name, what in (("ap", "AP"), ("ap50", "AP50"))]  # fmt: skip
    if loss is not None:
        shown += [(f"{loss:.3f}", "held-out loss"), (f"{n:,}", "held-out images")]
    parts = [*pages.head(record, title, notes), pages.numbers([*shown, *pages.speed(history, bad_samples)])]
    if history or steps:
        parts += ["<h2>Curves</h2>", curves_svg(history, steps)]
    if kinds:
        parts += _precision(kinds)
    if errors is not None:
        parts += _errors(errors, kinds)
        with_score = f"Objects with a score of at least {errors.score:.2f}"
        with_score += ", which gives the best F1 of all together." if errors.best_f1 else "; no score finds any object."
        parts += ["<h2>Held-out pictures: the truth, and what was found</h2>", f"<p>{with_score}</p>", _pairs(chosen)]
        said = f"<p>The {len(worst)} of lowest F1.</p>" if worst else "<p>None: every object is found, no other.</p>"
        parts += ["<h2>The worst</h2>", said, _pairs(worst)]
    parts += ["<h2>What was found in the data</h2>", _findings(data.get("findings"))]
    if history:
        parts += ["<h2>Epochs and speed</h2>", pages.epochs(history, _columns(history))]
    parts += ["<h2>Recipe</h2>", pages.table(record["recipe"].items())]
    names = [category["name"] for category in record["categories"]]
    told = pages.flat({key: value for key, value in data.items() if key != "findings"})
    parts += ["<h2>Data</h2>", pages.table([*told, ("classes", f"{len(names):,}: {some(names, 100)}")])]
    return pages.document(title, [*parts, *pages.foot(record)], _STYLE)


def _title(record: dict[str, Any]) -> str:
    recipe = record["recipe"]
    return f"detector on {recipe['model']}, {recipe['image_px']} px: {recipe.get('name', 'run')}"


def _precision(kinds: Sequence[Precision]) -> list[str]:
    names = [OF_KIND[kind.kind] for kind in kinds]
    rows, notes = class_rows(kinds, _CLASSES)
    return [
        "<h2>Average precision</h2>",
        pages.grid(["", *names], precision_rows(kinds), texts=1),
        "<h2>By class</h2>",
        pages.grid(class_heads(kinds), rows, texts=1),
        *(f"<p>{html(note)}</p>" for note in notes),
    ]


def _errors(of: Errors, kinds: Sequence[Precision]) -> list[str]:
    rows = [[kind, what, count] for count, kind, what in error_rows(of)]
    return [
        "<h2>Errors</h2>",
        f"<p>{html(best_score_said(of, kinds[-1]))}</p>",
        pages.grid(["kind", "", "how many"], rows, texts=2),
        f'<img class="wide" alt="precision by recall, F1 by score" {src(precision_png(kinds, of, ""))}>',
    ]


def _pairs(shown: Sequence[Pair]) -> str:
    each = []
    for one in shown:
        what = f"F1 {one.f1:.2f}: {one.objects:,} objects, {one.shown:,} detections"
        pictures = '<div class="gone">gone</div>' * 2
        if one.truth is not None and one.found is not None:
            pictures = f'<img alt="truth" {src(one.truth)}><img alt="found" {src(one.found)}>'
        each.append(f'<div class="pair"><div class="name">{html_name(one.name)}, {what}</div>{pictures}</div>')
    return f'<div class="pairs">{"".join(each)}</div>'


def _findings(rows: Any) -> str:
    """Of run.json, which may be anybody's."""
    if not isinstance(rows, list) or not rows:
        return "<p>Nothing.</p>"
    cells = [[printable(cell) for cell in row] for row in rows if isinstance(row, list) and len(row) == 5]
    return pages.grid(["case", "part", "severity", "what", "how many"], cells, texts=4)


def _columns(history: Sequence[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    return {head: column for head, column in _COLUMNS.items() if any(column[0] in row for row in history)}
