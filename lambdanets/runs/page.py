"""What the pages and pictures of all runs share: style, escaping, tables, curves by steps, lines of a log.

A page is one HTML file with its pictures in it, that needs no network and runs no script.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from lambdanets import errors
from lambdanets.errors import BadRun, printable, printable_text
from lambdanets.files import field, json_object, open_file, write_atomically
from lambdanets.runs.folder import BAD_SAMPLES, REPORT
from lambdanets.runs.log import LOG

_EPOCHS = 60  # rows of the table of epochs
_STRETCHES = 400  # points of a curve by steps
_LINES_BYTES = 256 << 20  # of a file of lines that a page reads; the rest of a larger one is left out
_LINE_BYTES = 1 << 20
THUMBNAIL_PX = 112

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
figure { margin: 0; font-size: .82em; overflow-wrap: anywhere }
.name { color: #5a6b7d } svg, .wide { max-width: 100%; height: auto } b.wrong { color: #b3261e }
"""


# --- text -----------------------------------------------------------------------------------------------------------


def html(text: object) -> str:
    """Text of several lines, escaped."""
    return escape(printable_text(text))


def html_name(name: object) -> str:
    """A name or a line, escaped."""
    return escape(printable(name))


def cut(name: str, letters: int = 40) -> str:
    """A name that fits a column.

    >>> cut("a" * 9, 5)
    'aaaa…'
    """
    return name if len(name) <= letters else name[: letters - 1] + "…"


# --- parts of a page --------------------------------------------------------------------------------------------------


def document(title: str, parts: Iterable[str], style: str = "") -> str:
    """The page; no script in it is run and nothing is fetched. `style` comes after what all pages have."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width"><title>{html(title)}</title>'
        f"<style>{_STYLE}{style}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def head(record: dict[str, Any], title: str, notes: Iterable[str]) -> Iterator[str]:
    """What every page begins with: title, state, what went wrong, what the reader must know above all else."""
    yield f"<h1>{html(title)}</h1>"
    recipe = record["recipe"]
    of = "" if recipe.get("steps") or recipe.get("min_steps") else f" of {recipe['epochs']}"
    state = f"{record['status']}, {len(record['history'])}{of} epochs done"
    seed, device = record.get("seed"), record.get("device")
    yield f"<p>{html(f'{state}; seed {seed}, on {device}')}</p>"
    if record["status"] in ("stopped", "interrupted") and record.get("error"):
        yield f'<p class="warn">{html(_sentence(record["error"]))}</p>'
    for note in (*notes, *record.get("warnings", [])):
        yield f'<p class="warn">{html(note)}</p>'


def _sentence(error: str) -> str:
    """What run.json has of an error, which is how Python writes it; that of another kind than ours keeps its name.

    >>> _sentence("Terminated('stopped after step 3')"), _sentence("BadImage('1.jpg', 'is empty')")
    ('stopped after step 3', '1.jpg: is empty')
    >>> _sentence("KeyError('x')"), _sentence("KeyboardInterrupt()"), _sentence("stopped")
    ('KeyError: x', 'KeyboardInterrupt()', 'stopped')
    """
    kind, _, told = error.removesuffix(")").partition("(")
    if not told or not kind.isidentifier() or not error.endswith(")"):
        return error
    try:
        said = ": ".join(map(str, ast.literal_eval(f"({told},)")))
    except (ValueError, SyntaxError, RecursionError, MemoryError):  # run.json may be anybody's
        return error
    return said if kind == "KeyboardInterrupt" or hasattr(errors, kind) else f"{kind}: {said}"


def foot(record: dict[str, Any]) -> Iterator[str]:
    """What every page ends with: by what it was computed."""
    known = ("seed", "device", "init_from", "options", "versions")
    starts = [f"after step {start['step']}, {start['ranks']} processes" for start in record.get("starts", [])]
    rows = [("starts", starts), *flat({key: record[key] for key in known if key in record})]
    yield from ("<h2>Computed by</h2>", table(rows))


def numbers(shown: Iterable[tuple[str, str]]) -> str:
    """(number, what it is), large."""
    each = "".join(f"<div>{escape(n)}<span>{escape(what)}</span></div>" for n, what in shown)
    return f'<div class="numbers">{each}</div>'


def speed(history: Sequence[dict[str, Any]], bad_samples: int) -> Iterator[tuple[str, str]]:
    """For `numbers`."""
    if history:
        train_s = sum(row["train_s"] for row in history)
        images = sum(row["images_per_s"] * row["train_s"] for row in history)
        yield _rate(images / max(train_s, 1e-9)), "training images a second"
        if (share := waiting(history)) is not None:
            yield f"{share:.1%}", "of training time waited for data"
        yield f"{train_s / 60:,.1f} min", "training"
    if bad_samples:
        yield f"{bad_samples:,}", "training images unreadable, replaced"


def _rate(images_per_s: float) -> str:
    return f"{images_per_s:,.{0 if images_per_s >= 10 else 1}f}"


def waiting(history: Sequence[dict[str, Any]]) -> float | None:
    """The share of the training time in which a step waited for its images; None where it was not measured."""
    timed = [row for row in history if "data_wait_s" in row]
    total_s = sum(row["train_s"] for row in timed)
    return sum(row["data_wait_s"] for row in timed) / total_s if total_s else None


def epochs(history: Sequence[dict[str, Any]], columns: dict[str, tuple[str, str]]) -> str:
    """The table of epochs: the last 60.

    columns  head -> the key of a row and how its number is written, "{:.4f}", between the rate and the speed
    """
    heads = ["epoch", "rate", *columns, "images/s", "waited"]
    rows = []
    for row in history[-_EPOCHS:]:
        share = waiting([row])
        shown = [how.format(row[key]) if key in row else "" for key, how in columns.values()]
        cells = [str(row["epoch"]), f"{row['lr']:.3g}", *shown, _rate(row["images_per_s"])]
        rows.append([*cells, "" if share is None else f"{share:.1%}"])
    left_out = len(history) - len(rows)
    note = f"<p>The last {_EPOCHS}; {left_out} before them are in run.json.</p>" if left_out else ""
    return note + grid(heads, rows)


def grid(heads: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 0) -> str:
    """A table of numbers; the first `texts` columns are text."""

    def cell(at: int, value: str) -> str:
        return f"<td>{html_name(value)}</td>" if at < texts else f'<td class="n">{html_name(value)}</td>'

    top = "".join(
        f'<th style="text-align: left">{escape(h)}</th>' if at < texts else f"<th>{escape(h)}</th>"
        for at, h in enumerate(heads)
    )
    body = "".join(f"<tr>{''.join(cell(at, value) for at, value in enumerate(row))}</tr>" for row in rows)
    return f"<table class=numeric><tr>{top}</tr>{body}</table>"


def flat(values: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Nested values as (a.b.c, value)."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def table(rows: Iterable[tuple[str, Any]]) -> str:
    """Names and values."""

    def text(value: Any) -> str:
        return "; ".join(map(text, value)) if isinstance(value, (list, tuple)) else printable(value)

    lines = (f"<tr><th>{html_name(key)}</th><td>{escape(text(value))}</td></tr>" for key, value in rows)
    return f"<table>{''.join(lines)}</table>"


def src(picture: bytes) -> str:
    """The attribute of an <img> that holds a PNG or JPEG."""
    kind = "png" if picture.startswith(b"\x89PNG") else "jpeg"
    return f'src="data:image/{kind};base64,{base64.b64encode(picture).decode()}"'


def thumbnail(image: Image.Image, side_px: int = THUMBNAIL_PX) -> bytes:
    """At most that many pixels a side: a JPEG; as it is, in a PNG, where it is smaller."""
    content = io.BytesIO()
    if max(image.size) <= side_px:
        image.save(content, "PNG")
    else:
        small = image.convert("RGB")
        small.thumbnail((side_px, side_px))
        small.save(content, "JPEG", quality=85)
    return content.getvalue()


def write_page(folder: Path, text: str) -> Path:
    """Write RUN/report.html; gives its path. Raises BadRun."""
    try:
        write_atomically(folder / REPORT, text.encode())
    except OSError as error:
        raise BadRun(f"{folder / REPORT} cannot be written: {error}") from error
    return folder / REPORT


# --- curves ---------------------------------------------------------------------------------------------------------


def saved(figure: Any, form: str) -> bytes:
    """A figure of matplotlib as a file of the form "png" or "svg"."""
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a class in a script that matplotlib's font lacks: boxes
        figure.savefig(content, format=form)
    return content.getvalue()


def svg(figure: Any) -> str:
    """A figure as an <svg> element that stands in a page by itself."""
    text = saved(figure, "svg").decode()
    return text[text.index("<svg") :]


def draw_steps(axes: Any, steps: Sequence[tuple[int, float]], unit: str) -> None:
    """(step, training loss) of single steps as a curve: the means of 400 stretches at most."""
    size = -(-len(steps) // _STRETCHES)
    stretches = [steps[i : i + size] for i in range(0, len(steps), size)]
    at = [sum(step for step, _ in part) / len(part) for part in stretches]
    means = [sum(loss for _, loss in part) / len(part) for part in stretches]
    axes.plot(at, means, linewidth=1, marker="." if len(at) == 1 else None)  # one point makes no line
    axes.set(xlabel="step", ylabel=f"training loss of single steps{unit}")
    axes.grid(alpha=0.3)


# --- what a run has written so far ------------------------------------------------------------------------------------


def bad_samples(folder: Path) -> int:
    """Training images that could not be read and were replaced."""
    return sum(line.endswith(b"\n") for line in _lines(folder / BAD_SAMPLES))


def losses(folder: Path) -> list[tuple[int, float]]:
    """(step, loss) of the lines of log.jsonl that have them; a line that a kill cut short has not."""
    found = []
    for line in _lines(folder / LOG):
        with contextlib.suppress(ValueError, OverflowError):
            row = json_object(line)
            step, loss = field(row, "step", int), field(row, "loss", float)  # one that is not finite is text there
            if math.isfinite(loss) and 0 <= step < 2**53:
                found.append((step, loss))
    return found


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file that a run appends to, as far as they can be read; a pipe, say, has none."""
    with contextlib.suppress(OSError), open_file(path) as file:
        left = _LINES_BYTES
        while left > 0 and (line := file.readline(_LINE_BYTES)):
            left -= len(line)
            yield line
