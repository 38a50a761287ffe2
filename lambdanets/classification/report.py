"""The page of a run: one HTML file with its pictures in it, that needs no network and runs no script."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from lambdanets.classification.held_out import own_images
from lambdanets.classification.plots import confusion_png, curves_svg
from lambdanets.classification.run import open_run, read_record
from lambdanets.classification.scores import Confusion, Scores, evaluate
from lambdanets.data.batches import Batches
from lambdanets.data.images import Images
from lambdanets.errors import BadData, BadImage, BadRun, DiskFault, need, some
from lambdanets.runs import page as pages
from lambdanets.runs.folder import REPORT
from lambdanets.runs.page import THUMBNAIL_PX, html_name, src, thumbnail
from lambdanets.runs.record import RUN_JSON

_MISTAKES = 24  # thumbnails in a report
_STYLE = """
.mistakes { display: flex; flex-wrap: wrap; gap: 1em } figure { width: 136px }
figure img, .gone { width: 112px; height: 112px; object-fit: contain; background: #eef1f4; image-rendering: auto }
.small img { image-rendering: pixelated } .gone { display: grid; place-items: center; color: #5a6b7d }
"""
_COLUMNS = {
    "train loss": ("train_loss", "{:.4f}"),
    "held-out loss": ("val_loss", "{:.4f}"),
    "train top-1": ("train_top1_frac", "{:.2%}"),
    "held-out top-1": ("val_top1_frac", "{:.2%}"),
}
_OF_PSEUDO = {  # where a teacher's labels are learnt, too
    "loss, labelled": ("loss_labelled", "{:.4f}"),
    "pseudo-labelled": ("loss_pseudo", "{:.4f}"),
    "as the teacher": ("pseudo_agree_frac", "{:.1%}"),
    "classes seen": ("predicted_classes", "{:.1f}"),
}


class Mistake(NamedTuple):
    """A held-out image that was taken for another class. `picture`: a PNG or JPEG, None where it cannot be read."""

    name: str
    label: str
    predicted: str
    loss: float
    picture: bytes | None


def page(
    record: dict[str, Any],
    *,
    scores: Scores | None,
    confusion: Confusion | None,
    mistakes: Sequence[Mistake],
    notes: Sequence[str],
    steps: Sequence[tuple[int, float]],
    bad_samples: int,
) -> str:
    """The HTML of a run, whatever of it there is yet. Every string in it is escaped, and the page allows no script.

    record       run.json, as `checkpoint.read_record` gives it
    scores       of the held-out images; None where there are none
    confusion    which class was taken for which; None where it is not known
    mistakes     the worst first
    notes        what the reader must know, above all else
    steps        (step, training loss) of single steps
    bad_samples  training images that could not be read and were replaced
    """
    recipe, history, data = record["recipe"], record["history"], record["data"]
    title = f"{recipe['model']}, {recipe['image_px']} px: {recipe.get('name', 'run')}"
    parts = [*pages.head(record, title, notes), _numbers(record, scores, bad_samples)]
    if history or steps:
        parts += ["<h2>Curves</h2>", curves_svg(history, steps)]
    if confusion is not None:
        picture = confusion_png(confusion, record["classes"], "")
        parts += [
            "<h2>Which class was taken for which</h2>",
            f'<img class="wide" alt="which class was taken for which" {src(picture)}>',
        ]
    if scores is not None:
        said = f"None: all {scores.n:,} held-out images are right."
        if mistakes:
            said = f"The {len(mistakes)} of highest loss among {scores.errors:,} wrong of {scores.n:,} held-out images."
        parts.append(f"<h2>Worst mistakes</h2><p>{said}</p>")
        parts.append(f'<div class="mistakes">{"".join(map(_figure, mistakes))}</div>')
    if history:
        parts += [
            "<h2>Epochs and speed</h2>",
            pages.epochs(history, _COLUMNS | (_OF_PSEUDO if "pseudo" in data else {})),
        ]
    parts += ["<h2>Recipe</h2>", pages.table(recipe.items())]
    parts += [
        "<h2>Data</h2>",
        pages.table([*pages.flat(data), ("classes", f"{len(record['classes']):,}: {some(record['classes'], 20)}")]),
    ]
    return pages.document(title, [*parts, *pages.foot(record)], _STYLE)


def _numbers(record: dict[str, Any], scores: Scores | None, bad_samples: int) -> str:
    shown: list[tuple[str, str]] = []
    if scores is not None:
        shown = [(f"{scores.top1_frac:.2%}", "top-1"), (f"{scores.loss:.4f}", "held-out loss, nats")]
        if scores.top5_frac is not None:
            shown.insert(1, (f"{scores.top5_frac:.2%}", "top-5"))
        shown.append((f"{scores.errors:,} of {scores.n:,}", "wrong"))
    return pages.numbers([*shown, *pages.speed(record["history"], bad_samples)])


def _figure(mistake: Mistake) -> str:
    shown = '<div class="gone">gone</div>'
    if mistake.picture is not None:
        shown = f'<img alt="" {src(mistake.picture)}>'
        if Image.open(io.BytesIO(mistake.picture)).width <= THUMBNAIL_PX // 2:
            shown = f'<div class="small">{shown}</div>'
    label, predicted = html_name(mistake.label), html_name(mistake.predicted)
    return (
        f"<figure>{shown}<div><b>{label}</b> taken for <b class=wrong>{predicted}</b>"
        f'</div><div>loss {mistake.loss:.2f}</div><div class="name">{html_name(mistake.name)}</div></figure>'
    )


# --- the page of a run ----------------------------------------------------------------------------------------------


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
    need("matplotlib", "plots", f"{REPORT} is drawn with it")
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
    text = page(
        record,
        scores=scores,
        confusion=confusion,
        mistakes=mistakes,
        notes=notes,
        steps=pages.losses(folder),
        bad_samples=pages.bad_samples(folder),
    )
    return pages.write_page(folder, text)


def _worst(scores: Scores, images: Images) -> list[Mistake]:
    """The mistakes of the highest loss, with thumbnails."""
    found = []
    for k in scores.mistakes(images)[:_MISTAKES]:
        index = scores.ids[k]
        try:
            picture = thumbnail(images.load(index))
        except (BadImage, DiskFault):  # gone since
            picture = None
        label, predicted = images.classes[int(images.labels[index])], images.classes[scores.predicted[k]]
        found.append(Mistake(images.names[index], label, predicted, scores.losses[k], picture))
    return found
