"""What a run shows: a bar while it works, and a picture of loss, accuracy and which class was taken for which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lambdanets.classification.scores import Confusion
from lambdanets.errors import printable
from lambdanets.runs.page import cut, draw_steps, saved, svg

_MATRIX_CLASSES = 50  # of more the most frequent mistakes are drawn instead: no cell could be seen
_MISTAKES = 25  # that are drawn there
_NAME_LETTERS = 20  # of a class in a picture
_NUMBERED_CLASSES = 15  # more numbers than this cannot be read in the cells


def curves_png(history: Sequence[dict[str, Any]], confusion: Confusion, classes: Sequence[str], title: str) -> bytes:
    """Draw the history and the confusion matrix side by side, as the bytes of a PNG.

    history    one dict an epoch: epoch, train_loss, train_top1_frac; where it was judged, val_loss, val_top1_frac
    confusion  drawn as a matrix of up to 50 classes, whose colour is the share of the label's row; of more classes the
               most frequent mistakes are drawn, as bars
    title      one line above both
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here: 0.4 s, and an extra
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)  # no pyplot: no display is looked for and no state is kept
    figure.suptitle(printable(title), parse_math=False)
    grid = figure.add_gridspec(2, 2, width_ratios=(1, 1.1))
    loss = figure.add_subplot(grid[0, 0])
    _draw_curves(loss, figure.add_subplot(grid[1, 0], sharex=loss), history)
    _draw_confusion(figure, figure.add_subplot(grid[:, 1]), confusion, classes)
    return saved(figure, "png")


def curves_svg(history: Sequence[dict[str, Any]], steps: Sequence[tuple[int, float]]) -> str:
    """The curves side by side, as an <svg> element that stands in an HTML page by itself.

    history  as for `curves_png`; it may be empty
    steps    (step, training loss) of single steps; the picture holds the means of 400 stretches at most
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.4), layout="constrained")
    FigureCanvasSVG(figure)
    panels = list(figure.subplots(1, bool(steps) + 2 * bool(history), squeeze=False)[0])
    if steps:
        draw_steps(panels[0], steps, ", nats")
    if history:
        _draw_curves(panels[-2], panels[-1], history)
        panels[-2].set_xlabel("epoch")
    return svg(figure)


def confusion_png(confusion: Confusion, classes: Sequence[str], title: str) -> bytes:
    """Draw the confusion matrix alone, as the bytes of a PNG; arguments as `curves_png`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    matrix = len(classes) <= _MATRIX_CLASSES
    side = max(6.5, 0.25 * len(classes) + 3) if matrix else 8.5  # inches: a name an axis mark
    figure = Figure(figsize=(side, 0.85 * side), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    figure.suptitle(printable(title), parse_math=False)
    _draw_confusion(figure, figure.add_subplot(), confusion, classes)
    return saved(figure, "png")


def _draw_curves(loss: Any, accuracy: Any, history: Sequence[dict[str, Any]]) -> None:
    from matplotlib.ticker import MaxNLocator

    epochs = [row["epoch"] for row in history]
    loss.plot(epochs, [row["train_loss"] for row in history], marker=".", label="train (augmented, smoothed labels)")
    judged = [row for row in history if "val_loss" in row]  # of `eval_epochs` not every epoch is
    asked = [row["epoch"] for row in judged]
    loss.plot(asked, [row["val_loss"] for row in judged], marker=".", label="held out")
    loss.set(ylabel="cross-entropy, nats", xlim=(0.5, len(epochs) + 0.5))
    loss.set_ylim(bottom=0)
    accuracy.plot(epochs, [100 * row["train_top1_frac"] for row in history], marker=".", label="train (augmented)")
    accuracy.plot(asked, [100 * row["val_top1_frac"] for row in judged], marker=".", label="held out")
    accuracy.set(xlabel="epoch", ylabel="top-1, %", xlim=loss.get_xlim())
    for axes in (loss, accuracy):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()


def _draw_confusion(figure: Any, axes: Any, confusion: Confusion, classes: Sequence[str]) -> None:
    n = sum(confusion.cells.values())
    if len(classes) > _MATRIX_CLASSES:
        _draw_mistakes(axes, confusion, classes, n)
        return
    of_label = confusion.sums()[0]
    rows = confusion.dense()
    shares = [[count / max(1, of_label[label]) for count in row] for label, row in enumerate(rows)]
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the label's images", shrink=0.8)
    axes.set(xlabel="predicted", ylabel="label", title=f"held-out images, n = {n}")
    names = [_short(name) for name in classes]
    sideways = 90 if max(map(len, names)) > 3 else 0
    small = {"fontsize": 7} if len(classes) > 30 else {}
    axes.set_xticks(range(len(classes)), names, rotation=sideways, parse_math=False, **small)  # a class may be "$5"
    axes.set_yticks(range(len(classes)), names, parse_math=False, **small)
    if len(classes) <= _NUMBERED_CLASSES:
        for (label, predicted), count in confusion.cells.items():
            colour = "white" if shares[label][predicted] > 0.5 else "black"
            axes.text(predicted, label, str(count), ha="center", va="center", color=colour)


def _draw_mistakes(axes: Any, confusion: Confusion, classes: Sequence[str], n: int) -> None:
    """Bars: label → predicted, and how many images."""
    from matplotlib.ticker import MaxNLocator

    of_label, mistakes = confusion.sums()[0], confusion.mistakes()
    drawn = mistakes[:_MISTAKES]
    places = range(len(drawn))
    axes.barh(places, [count for *_, count in drawn], height=0.7)
    names = [f"{_short(classes[label])} → {_short(classes[predicted])}" for label, predicted, _ in drawn]
    axes.set_yticks(places, names, parse_math=False)
    for place, (label, _, count) in zip(places, drawn, strict=True):
        axes.text(count, place, f" {count} of {of_label[label]}", va="center", fontsize=8)
    axes.set(xlabel="images, of all of that label", xlim=(0, 1.25 * max((count for *_, count in drawn), default=1)))
    axes.set_ylim(_MISTAKES - 0.4, -0.6)  # the most frequent on top, and bars of one width however few they are
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    wrong = n - confusion.right
    pairs = f"the {len(drawn)} most frequent of {len(mistakes):,} pairs" if len(drawn) < len(mistakes) else "all pairs"
    axes.set_title(
        f"{wrong:,} of {n:,} held-out images are wrong, {len(classes):,} classes\nlabel → predicted, {pairs}"
    )


def _short(name: str) -> str:
    return cut(printable(name), _NAME_LETTERS)
