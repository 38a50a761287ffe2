"""What a person looks at before training on a selection: its numbers by class, and the pictures taken with most doubt.

classes.png   draws, rows and doubt of each class, the confidences, the copies
report.html   the same, the warnings, thumbnails of the most doubtful pictures and of copies that were left out
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lambdanets.data.images import Images
from lambdanets.errors import BadData, BadImage, BadRun, DiskFault, need, printable
from lambdanets.files import to_stderr, write_atomically
from lambdanets.pseudo_labels.near_copies import Joined
from lambdanets.pseudo_labels.write_selection import Doubtful
from lambdanets.runs import page as pages
from lambdanets.runs.folder import REPORT
from lambdanets.runs.page import cut, html_name, saved, src, thumbnail

CLASSES_PNG = "classes.png"

_PAIRS = 10  # of copies that are shown
_NAMED_CLASSES = 40  # whose names can be read under bars
_LISTED_CLASSES = 40  # of a table, from each end
_STYLE = """
.pictures { display: flex; flex-wrap: wrap; gap: 1em } figure { width: 136px } .pair figure { width: 240px }
figure img, .gone { width: 112px; height: 112px; object-fit: contain; background: #eef1f4 }
.gone { display: grid; place-items: center; color: #5a6b7d }
"""


def write(
    out: Path,
    held: dict[str, Any],
    doubtful: Sequence[Doubtful],
    lines: Sequence[dict[str, Any]],
    pictures: Images | None,
    known: Joined,
) -> None:
    """Writes both.

    held      what selection.json will say
    doubtful  the rows of the largest doubt
    lines     of excluded.jsonl
    pictures  those that were labelled; None: the page has no thumbnails
    known     those held out, see `near_copies.Joined`
    Raises OSError.
    """
    picture = b""
    try:
        need("matplotlib", "plots", f"{CLASSES_PNG} is drawn with it")
        picture = classes_png(held)
        write_atomically(out / CLASSES_PNG, picture)
    except BadRun as error:
        to_stderr(f"{error}; the selection is made without that picture")
    parts = list(_parts(held, picture, doubtful, lines, pictures, known))
    write_atomically(out / REPORT, pages.document("Selection", parts, _STYLE).encode())


def classes_png(held: dict[str, Any]) -> bytes:
    """Draw the numbers of a selection, as the bytes of a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here: 0.4 s, and an extra
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    counts = held["counts"]
    of = {key: np.array(values, float) for key, values in counts["classes"].items()}  # None becomes NaN: not drawn
    order = np.argsort(-of["rows"], kind="stable")
    figure = Figure(figsize=(13, 7), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    title = f"{held['draws']:,} draws of {held['rows']:,} pictures, {len(order):,} classes"
    figure.suptitle(title, parse_math=False)
    (many, medians), (confidence, copies) = figure.subplots(2, 2)
    at = np.arange(len(order))
    for key, colour, name in (("draws", "#cfd8e3", "draws"), ("rows", "#3b6ea5", "pictures")):
        if len(at) <= _NAMED_CLASSES:
            many.bar(at, of[key][order], color=colour, label=name)
        else:  # thousands of bars take minutes
            many.fill_between(at, of[key][order], color=colour, label=name, step="mid")
    many.step(at, of["candidates"][order], color="#e09b12", where="mid", label="candidates")
    many.set(ylabel="of a class, most pictures first", yscale="symlog", ylim=(0, None))
    many.legend()
    medians.plot(at, of["median_doubt"][order], marker=".", linestyle="none", color="#3b6ea5")
    medians.set(ylabel="median doubt of the pictures", ylim=(0, None), xlim=many.get_xlim())
    for axes in (many, medians):
        if len(at) <= _NAMED_CLASSES:
            names = [cut(printable(held["classes"][c]), 14).replace("$", r"\$") for c in order]
            axes.set_xticks(at, names, rotation=60, ha="right", fontsize=8)
        else:
            axes.set_xlabel("class")
    bins = len(counts["confidence"])
    confidence.bar((np.arange(bins) + 0.5) / bins, counts["confidence"], width=0.9 / bins, color="#3b6ea5")
    confidence.set(xlabel="confidence", ylabel="pictures")
    how_often = [int(n) for n in counts["copies"]]
    copies.bar(how_often, list(counts["copies"].values()), color="#3b6ea5")
    copies.set(xlabel="draws of one picture", ylabel="pictures", yscale="log")
    copies.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (many, medians, confidence, copies):
        axes.grid(alpha=0.3, axis="y")
    return saved(figure, "png")


def _parts(
    held: dict[str, Any],
    picture: bytes,
    doubtful: Sequence[Doubtful],
    lines: Sequence[dict[str, Any]],
    pictures: Images | None,
    known: Joined,
) -> Iterator[str]:
    names = held["classes"]
    yield "<h1>A selection of pseudo-labelled pictures</h1>"
    teacher = held["labels"]["plan"]["teacher"]
    by = f"{teacher.get('model', 'a teacher')} with the weights {held['teacher_sha256']}"
    yield f"<p>{pages.html(held['labels']['source'])}, labelled by {pages.html(by)}</p>"
    for warning in held["warnings"]:
        yield f'<p class="warn">{pages.html(warning)}</p>'
    yield pages.numbers(
        [
            (f"{held['draws']:,}", "draws"),
            (f"{held['rows']:,}", "pictures"),
            (f"{held['counts']['labelled']:,}", "labelled"),
            (f"{held['per_class']:,}", "draws a class"),
        ]
    )
    if picture:
        yield f'<img class="wide" alt="classes" {src(picture)}>'
    yield f"<h2>The {len(doubtful)} most doubtful pictures that were taken</h2>"
    yield "<p>If many of these labels are wrong, take a higher --confidence or a smaller --per-class.</p>"
    yield f'<div class="pictures">{"".join(_figure(one, names, pictures) for one in doubtful)}</div>'
    near = [line for line in lines if line["reason"].endswith("near")]
    if near:
        yield f"<h2>Copies that were left out: {len(near):,} by their looks, the first {min(len(near), _PAIRS)}</h2>"
        shown = "".join(_pair(line, pictures, known) for line in near[:_PAIRS])
        yield f'<div class="pictures pair">{shown}</div>'
    yield "<h2>Left out</h2>"
    yield pages.table([(why.replace("_", " "), f"{n:,}") for why, n in held["excluded"].items()])
    yield from _classes(held)


def _classes(held: dict[str, Any]) -> Iterator[str]:
    of = held["counts"]["classes"]
    keys = "candidates", "rows", "draws", "median_doubt"
    rows = sorted(zip(held["classes"], *(of[key] for key in keys), strict=True), key=lambda row: -row[2])
    left_out = len(rows) - 2 * _LISTED_CLASSES
    if left_out > 0:
        rows = rows[:_LISTED_CLASSES] + rows[-_LISTED_CLASSES:]
    yield "<h2>Classes</h2>"
    if left_out > 0:
        yield f"<p>Those of most and of fewest pictures; {left_out:,} between them are in selection.json.</p>"
    heads = ["class", "candidates", "pictures", "draws", "median doubt"]
    shown = [
        [name, *(f"{n:,}" for n in numbers), "" if median is None else f"{median:.3g}"]
        for name, *numbers, median in rows
    ]
    yield pages.grid(heads, shown, texts=1)


def _shown(images: Images | None, index: int) -> str:
    if images is not None:
        try:
            return f'<img alt="" {src(thumbnail(images.load(index)))}>'
        except (BadImage, BadData):  # gone or replaced since it was labelled; DiskFault is one
            pass
    return '<div class="gone">gone</div>'


def _name(images: Images | None, index: int) -> str:
    """Which picture it is, to be found again; its number where the shards are not at hand."""
    if images is None:
        return f"number {index:,}"
    try:
        return f"{html_name(images.names[index])}, number {index:,}"
    except DiskFault:
        return f"number {index:,}"


def _figure(one: Doubtful, names: Sequence[str], pictures: Images | None) -> str:
    most = [f"{names[c]} {p:.2f}" for c, p in zip(one.top_class[:3], one.top_prob[:3], strict=True)]
    return (
        f"<figure>{_shown(pictures, one.id)}<div><b>{html_name(names[one.label])}</b>, doubt {one.doubt:.3g}</div>"
        f'<div>{html_name(", ".join(most))}</div><div class="name">{_name(pictures, one.id)}</div></figure>'
    )


def _pair(line: dict[str, Any], pictures: Images | None, known: Joined) -> str:
    return (
        f"<figure>{_shown(pictures, line['id'])}{_shown(known, line['of']['picture'])}"
        f"<div>{line['bits']} bits, difference {line['difference']:.3f}</div>"
        f'<div class="name">{html_name(line["name"])} / {html_name(line["of"]["name"])}</div></figure>'
    )
