"""Draws the speed-accuracy pairs that `benchmarks.model` measured.

    python -m benchmarks.figure FILE.json FIGURE.png

Across: seconds per 1,024 images of that run, logarithmic, each model in its fastest setting. Up: the top-1 that the
paper reports, which nothing here measures. A panel for each dtype and pass.
"""

import io
import itertools
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

FAMILIES = {"LambdaResNet": ("#1857a4", "o"), "EfficientNet": ("#b5500b", "s")}
LEGEND = {"LambdaResNet": "LambdaResNet: depth, image", "EfficientNet": "EfficientNet: size, image (its time / ours)"}
SIDES = {"LambdaResNet": -1, "EfficientNet": 1}  # where a label goes first: the faster family's to the left
_PASS = {"inference": "inference", "training": "training step"}


def points(result: dict[str, Any], dtype: str, passes: str) -> dict[str, list[tuple[float, float, str]]]:
    """Seconds per 1,024 images, the paper's top-1 and a label for each model of a family, once each, by accuracy."""
    found: dict[str, dict[str, tuple[float, float, str]]] = {family: {} for family in FAMILIES}
    for row in result["rows"]:
        if (row["table"], row["dtype"], row["pass"]) != ("figure", dtype, passes):
            continue
        ratio = {r["under"]: r["measured"] for r in row["ratios"] if r["what"] == "images_per_s"}
        for name, m in row["models"].items():
            family = "EfficientNet" if m["model"].startswith("efficientnet") else "LambdaResNet"
            short = m["model"].removeprefix("lambda_resnet").removeprefix("efficientnet_").upper()
            times = f" ({ratio[name]:.2g}x)" if name in ratio else ""
            found[family][name] = (m["s_per_1024_images"], m["paper_top1"], f"{short}, {m['px']} px{times}")
    return {family: sorted(rows.values(), key=lambda p: p[1]) for family, rows in found.items()}


def draw(result: dict[str, Any]) -> bytes:
    """The figure of a result of `benchmarks.model`, as the bytes of a PNG."""
    return _png(_figure(result)[0])


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def _figure(result: dict[str, Any]) -> tuple[Figure, dict[Axes, list[Bbox]]]:
    """The figure, and where its labels are, in pixels."""
    rows = [row for row in result["rows"] if row["table"] == "figure" and row["models"]]
    if not rows:
        raise ValueError(
            f"there are no rows of the figure's pairs among the {len(result['rows'])} of this result: measure them "
            "with python -m benchmarks.model --only pairs --out FILE"
        )
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    passes = list(dict.fromkeys(row["pass"] for row in rows))
    figure = Figure(figsize=(7.6 * len(passes), 5.6 * len(dtypes) + 1.2), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    figure.suptitle("Speed measured here, accuracy as the paper reports it", fontsize=14)
    grid = figure.subplots(len(dtypes), len(passes), squeeze=False, sharey=True)
    panels = {}
    for i, dtype in enumerate(dtypes):
        for j, name in enumerate(passes):
            axes, families = grid[i][j], points(result, dtype, name)
            panels[axes] = families
            axes.set_title(f"{_PASS[name]}, {dtype}", fontsize=11)
            axes.set_xscale("log")
            axes.set_xlabel("seconds per 1,024 images, measured (log)")
            axes.grid(alpha=0.25, which="both", linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
            for family, (color, marker) in FAMILIES.items():
                x, y = [p[0] for p in families[family]], [p[1] for p in families[family]]
                axes.plot(x, y, color=color, marker=marker, markersize=6, linewidth=1.2, label=LEGEND[family])
            seconds = [p[0] for rows in families.values() for p in rows]
            tops = [p[1] for rows in families.values() for p in rows]
            if seconds:
                axes.set_xlim(min(seconds) / 2.5, max(seconds) * 2.8)  # room for the labels
                axes.set_ylim(min(tops) - 0.6, max(tops) + 0.6)
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda s, _: f"{s:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.legend(loc="lower right", frameon=False)
    for row_of_axes in grid:
        row_of_axes[0].set_ylabel("ImageNet top-1, %: the paper's, not measured here")
    figure.supxlabel(_caption(result, rows), fontsize=9, x=0.02, ha="left")
    figure.canvas.draw()  # now the constrained layout is settled, and pixels are known
    figure.set_layout_engine("none")
    return figure, {axes: _label(axes, families) for axes, families in panels.items()}


def _caption(result: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    about = result["machine"]
    batches = sorted({row["batch"] for row in rows})
    batch = f"{batches[0]}" if len(batches) == 1 else f"{batches[0]} to {batches[-1]}"
    text = (
        f"Seconds: medians of one run on {about['device']}, {about['threads']} CPU threads, torch {about['torch']}, "
        f"timm {about['timm']}, batch {batch}, each model in the fastest of: {', '.join(result['settings'])}; batch "
        "norms fused into every model in inference. Top-1: the figures of the paper (Bello, ICLR 2021), from training "
        "that nobody repeated here. In brackets: an EfficientNet's time over that of the LambdaResNet paired with it, "
        "the paper's fastest that reaches its accuracy."
    )
    width = 105 if len({row["pass"] for row in rows}) == 1 else 190
    return textwrap.fill(text, width)


def _label(axes: Axes, families: dict[str, list[tuple[float, float, str]]]) -> list[Bbox]:
    """Writes each point's label where it covers no other label, no marker and no line; returns the boxes."""
    renderer = axes.figure.canvas.get_renderer()
    marks = {family: axes.transData.transform([p[:2] for p in rows]) for family, rows in families.items() if rows}
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for xy in marks.values() for x, y in xy]
    for xy in marks.values():  # lines, as small boxes along them
        for (x0, y0), (x1, y1) in itertools.pairwise(xy):
            steps = int(max(abs(x1 - x0), abs(y1 - y0)) // 5) + 1
            taken += [
                Bbox.from_bounds(x0 + (x1 - x0) * t / steps - 2, y0 + (y1 - y0) * t / steps - 2, 4, 4)
                for t in range(steps + 1)
            ]
    legend = axes.get_legend()
    if legend is not None:
        taken.append(legend.get_window_extent(renderer))
    inside = axes.get_window_extent(renderer)
    labels = []
    for family, rows in families.items():
        first = SIDES[family]
        for s, top1, name in rows:
            best: tuple[float, Any, Bbox] | None = None
            for far in (9, 16, 26, 40, 60):
                for side, up in ((first, 0), (first, 1), (first, -1), (0, 1), (0, -1), (-first, 0), (-first, -1)):
                    text = axes.annotate(
                        name, (s, top1), (far * side, far * up * 0.8), textcoords="offset points", fontsize=9,
                        color=FAMILIES[family][0], ha={-1: "right", 0: "center", 1: "left"}[side],
                        va={-1: "top", 0: "center", 1: "bottom"}[up],
                        arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.5} if far > 16 else None,
                    )  # fmt: skip
                    text.update_positions(renderer)
                    box = Text.get_window_extent(text, renderer)  # the words without their line
                    cost = sum(box.overlaps(other) for other in taken)
                    cost += 5 * (not inside.contains(box.x0, box.y0) or not inside.contains(box.x1, box.y1))
                    if best is None or cost < best[0]:
                        if best is not None:
                            best[1].remove()
                        best = (cost, text, box)
                    else:
                        text.remove()
                    if cost == 0:
                        break
                if best is not None and best[0] == 0:
                    break
            assert best is not None
            taken.append(best[2])
            labels.append(best[2])
    return labels


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: python -m benchmarks.figure FILE.json FIGURE.png")
    source, target = map(Path, sys.argv[1:])
    target.write_bytes(draw(json.loads(source.read_text())))
    print(f"drawn: {target}")


if __name__ == "__main__":
    main()
