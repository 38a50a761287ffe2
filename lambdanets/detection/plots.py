"""What a run of detection shows in curves: losses and average precision by epoch, precision by recall, F1 by score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lambdanets.detection.mistakes import Errors
from lambdanets.detection.precision import RECALLS, Precision
from lambdanets.detection.tables import OF_KIND, OF_LOSS
from lambdanets.errors import printable
from lambdanets.runs.page import draw_steps, saved, svg


def curves_png(history: Sequence[dict[str, Any]], title: str) -> bytes:
    """Losses and average precision by epoch, as the bytes of a PNG.

    history   one dict an epoch: epoch, train_loss, its parts train_loss_*; of the epochs that were judged also
              val_loss, val_box_ap, val_box_ap50, and val_mask_ap, val_mask_ap50 where there are masks
    title     one line above
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here: 0.4 s, and an extra
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.6), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    figure.suptitle(printable(title), parse_math=False)
    _draw_history(list(figure.subplots(1, 3)), history)
    return saved(figure, "png")


def curves_svg(history: Sequence[dict[str, Any]], steps: Sequence[tuple[int, float]]) -> str:
    """The same as an <svg> element, below single steps' losses, (step, loss); either may be empty."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    rows = bool(steps) + bool(history)
    figure = Figure(figsize=(12, 3.4 * rows), layout="constrained")
    FigureCanvasSVG(figure)
    grid = figure.add_gridspec(rows, 3)
    if steps:
        draw_steps(figure.add_subplot(grid[0, :]), steps, "")
    if history:
        _draw_history([figure.add_subplot(grid[-1, column]) for column in range(3)], history)
    return svg(figure)


def precision_png(kinds: Sequence[Precision], errors: Errors, title: str) -> bytes:
    """Precision by recall at IoU 0.5, of boxes and of masks, and F1 by score, as the bytes of a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    figure.suptitle(printable(title), parse_math=False)
    left, right = figure.subplots(1, 2)
    for kind in kinds:
        left.plot(RECALLS, kind.curve, label=f"{OF_KIND[kind.kind]}, AP50 {kind.ap50:.3f}")
    left.set(xlabel="recall", ylabel="precision, mean of the classes, at IoU 0.5", xlim=(0, 1), ylim=(0, 1.02))
    scores = [i / 100 for i in range(101)]
    right.plot(scores, errors.f1)
    if best := errors.best_f1:
        right.plot([errors.best_score], [best], "o", label=f"--score {errors.best_score:.2f}: F1 {best:.2f}")
    right.set(xlabel="least score (--score)", ylabel="F1 at IoU 0.5, of all classes together", xlim=(0, 1))
    right.set_ylim(0, 1.02)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    return saved(figure, "png")


def _draw_history(panels: Sequence[Any], history: Sequence[dict[str, Any]]) -> None:
    """Three panels: the loss, its parts, average precision."""
    from matplotlib.ticker import MaxNLocator

    loss, parts, precision = panels
    _line(loss, history, "train_loss", "train (augmented)")
    _line(loss, history, "val_loss", "held out")
    loss.set(ylabel="sum of the losses")
    for number, (name, short) in enumerate(OF_LOSS.items()):
        _line(parts, history, f"train_{name}", short, color=f"C{number}")
        _line(parts, history, f"val_{name}", None, color=f"C{number}", linestyle="--")
    parts.set(ylabel="each loss; dashed: held out", yscale="log")
    for number, (kind, which) in enumerate((("box", "boxes"), ("mask", "masks"))):
        _line(precision, history, f"val_{kind}_ap", f"{which}, AP", color=f"C{number}")
        _line(precision, history, f"val_{kind}_ap50", f"{which}, AP50", color=f"C{number}", linestyle="--")
    precision.set(ylabel="average precision, held out")
    for axes in (loss, precision):
        axes.set_ylim(bottom=0)
    for axes in panels:
        axes.set(xlabel="epoch", xlim=(0.5, len(history) + 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend(fontsize=8, framealpha=0.6)


def _line(axes: Any, history: Sequence[dict[str, Any]], key: str, label: str | None, **how: Any) -> None:
    """One number over the epochs that have it. AP of nothing, -1, is no point."""
    points = [(row["epoch"], row[key]) for row in history if row.get(key) is not None and row[key] >= 0]
    if points:
        axes.plot(*zip(*points, strict=True), marker=".", label=label, **how)
