"""The page of a run: one HTML file with its pictures in it, that needs no network and runs no script."""

from __future__ import annotations

import base64
import contextlib
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from html import escape
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
from lambdanets.errors import BadData, BadImage, BadRun, DiskFault, need, printable, printable_text, some
from lambdanets.files import field, json_object, open_file, write_atomically
from lambdanets.runs.folder import BAD_SAMPLES, REPORT
from lambdanets.runs.log import LOG
from lambdanets.runs.record import RUN_JSON

_SIDE_PX = 112  # of a thumbnail
_EPOCHS = 60  # rows of the table of epochs
_MISTAKES = 24  # thumbnails in a report
_LINES_BYTES = 256 << 20  # of a file of lines that a report reads; the rest of a larger one is left out
_LINE_BYTES = 1 << 20

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1d2733; background: #fff; max-width: 1060px; margin: 2em auto;
       padding: 0 1em }
h1 { font-size: 1.5em; margin-bottom: .2em } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #d5dce4 }
.numbers { display: flex; flex-wrap: wrap; gap: .6em 2.2em; margin: 1em 0 }
.numbers div { font-size: 1.5em } .numbers span { display: block; font-size: .55em; color: #5a6b7d }
.warn { background: #fff3dc; border-left: 4px solid #e09b12; padding: .5em .9em; white-space: pre-wrap }
table { border-collapse: collapse; font-size: .92em } td, th { text-align: left; padding: .18em 1.2em .18em 0;
       vertical-align: top } td:not(.n) { overflow-wrap: anywhere }
       th { color: #5a6b7d; font-weight: 500 } td.n { text-align: right;
       font-variant-numeric: tabular-nums } .numeric th { text-align: right }
.mistakes { display: flex; flex-wrap: wrap; gap: 1em } figure { margin: 0; width: 136px; font-size: .82em;
       overflow-wrap: anywhere } figure img, .gone { width: 112px; height: 112px; object-fit: contain;
       background: #eef1f4; image-rendering: auto } .small img { image-rendering: pixelated }
.gone { display: grid; place-items: center; color: #5a6b7d } .name { color: #5a6b7d } svg, .wide { max-width: 100%;
       height: auto } b.wrong { color: #b3261e }
"""


class Mistake(NamedTuple):
    """A held-out image that was taken for another class. `picture`: a PNG or JPEG, None where it cannot be read."""

    name: str
    label: str
    predicted: str
    loss: float
    picture: bytes | None


def thumbnail(image: Image.Image) -> bytes:
    """At most 112 px a side: a JPEG; as it is, in a PNG, where it is smaller."""
    content = io.BytesIO()
    if max(image.size) <= _SIDE_PX:
        image.save(content, "PNG")
    else:
        small = image.convert("RGB")
        small.thumbnail((_SIDE_PX, _SIDE_PX))
        small.save(content, "JPEG", quality=85)
    return content.getvalue()


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
    parts = [f"<h1>{_html(title)}</h1>", f"<p>{_html(_state(record))}</p>"]
    if record["status"] in ("stopped", "interrupted") and record.get("error"):
        parts.append(f'<p class="warn">{_html(record["error"])}</p>')
    parts += [f'<p class="warn">{_html(note)}</p>' for note in notes]
    parts.append(_numbers(record, scores, bad_samples))
    if history or steps:
        parts += ["<h2>Curves</h2>", curves_svg(history, steps)]
    if confusion is not None:
        picture = confusion_png(confusion, record["classes"], "")
        parts += [
            "<h2>Which class was taken for which</h2>",
            f'<img class="wide" alt="which class was taken for which" {_src(picture)}>',
        ]
    if scores is not None:
        said = f"None: all {scores.n:,} held-out images are right."
        if mistakes:
            said = f"The {len(mistakes)} of highest loss among {scores.errors:,} wrong of {scores.n:,} held-out images."
        parts.append(f"<h2>Worst mistakes</h2><p>{said}</p>")
        parts.append(f'<div class="mistakes">{"".join(map(_figure, mistakes))}</div>')
    if history:
        parts += ["<h2>Epochs and speed</h2>", _epochs(history)]
    parts += ["<h2>Recipe</h2>", _table(recipe.items())]
    parts += [
        "<h2>Data</h2>",
        _table([*_flat(data), ("classes", f"{len(record['classes']):,}: {some(record['classes'], 20)}")]),
    ]
    known = ("seed", "device", "init_from", "options", "versions")
    starts = [f"after step {start['step']}, {start['ranks']} processes" for start in record.get("starts", [])]
    rows = [("starts", starts), *_flat({key: record[key] for key in known if key in record})]
    parts += ["<h2>Computed by</h2>", _table(rows)]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width"><title>{_html(title)}</title>'
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _state(record: dict[str, Any]) -> str:
    done, epochs = len(record["history"]), record["recipe"]["epochs"]
    return f"{record['status']}, {done} of {epochs} epochs done; seed {record.get('seed')}, on {record.get('device')}"


def _numbers(record: dict[str, Any], scores: Scores | None, bad_samples: int) -> str:
    shown: list[tuple[str, str]] = []
    if scores is not None:
        shown = [(f"{scores.top1_frac:.2%}", "top-1"), (f"{scores.loss:.4f}", "held-out loss, nats")]
        if scores.top5_frac is not None:
            shown.insert(1, (f"{scores.top5_frac:.2%}", "top-5"))
        shown.append((f"{scores.errors:,} of {scores.n:,}", "wrong"))
    if history := record["history"]:
        train_s = sum(row["train_s"] for row in history)
        images = sum(row["images_per_s"] * row["train_s"] for row in history)
        shown.append((f"{images / max(train_s, 1e-9):,.0f}", "training images a second"))
        if (share := _waiting(history)) is not None:
            shown.append((f"{share:.1%}", "of training time waited for data"))
        shown.append((f"{train_s / 60:,.1f} min", "training"))
    if bad_samples:
        shown.append((f"{bad_samples:,}", "training images unreadable, replaced"))
    return f'<div class="numbers">{"".join(f"<div>{escape(n)}<span>{escape(w)}</span></div>" for n, w in shown)}</div>'


def _waiting(history: Sequence[dict[str, Any]]) -> float | None:
    """The share of the training time in which a step waited for its images; None where it was not measured."""
    timed = [row for row in history if "data_wait_s" in row]
    total_s = sum(row["train_s"] for row in timed)
    return sum(row["data_wait_s"] for row in timed) / total_s if total_s else None


def _epochs(history: Sequence[dict[str, Any]]) -> str:
    heads = ["epoch", "rate", "train loss", "held-out loss", "train top-1", "held-out top-1", "images/s", "waited"]
    rows = []
    for row in history[-_EPOCHS:]:
        share = _waiting([row])
        cells = [
            str(row["epoch"]), f"{row['lr']:.3g}", f"{row['train_loss']:.4f}", f"{row['val_loss']:.4f}",
            f"{row['train_top1_frac']:.2%}", f"{row['val_top1_frac']:.2%}", f"{row['images_per_s']:,.0f}",
            "" if share is None else f"{share:.1%}",
        ]  # fmt: skip
        rows.append("".join(f'<td class="n">{escape(cell)}</td>' for cell in cells))
    left_out = len(history) - len(rows)
    note = f"<p>The last {_EPOCHS}; {left_out} before them are in run.json.</p>" if left_out else ""
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f"{note}<table class=numeric><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def _figure(mistake: Mistake) -> str:
    shown = '<div class="gone">gone</div>'
    if mistake.picture is not None:
        shown = f'<img alt="" {_src(mistake.picture)}>'
        if Image.open(io.BytesIO(mistake.picture)).width <= _SIDE_PX // 2:
            shown = f'<div class="small">{shown}</div>'
    return (
        f"<figure>{shown}<div><b>{_name(mistake.label)}</b> taken for <b class=wrong>{_name(mistake.predicted)}</b>"
        f'</div><div>loss {mistake.loss:.2f}</div><div class="name">{_name(mistake.name)}</div></figure>'
    )


def _src(picture: bytes) -> str:
    kind = "png" if picture.startswith(b"\x89PNG") else "jpeg"
    return f'src="data:image/{kind};base64,{base64.b64encode(picture).decode()}"'


def _flat(values: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _table(rows: Iterable[tuple[str, Any]]) -> str:
    def text(value: Any) -> str:
        return "; ".join(map(text, value)) if isinstance(value, (list, tuple)) else printable(value)

    lines = (f"<tr><th>{_name(key)}</th><td>{escape(text(value))}</td></tr>" for key, value in rows)
    return f"<table>{''.join(lines)}</table>"


def _html(text: object) -> str:
    return escape(printable_text(text))


def _name(name: object) -> str:
    return escape(printable(name))


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
