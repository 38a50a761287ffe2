"""What a run says on a terminal while it works."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


class Progress:
    """A bar with loss, accuracy, images/s and time left on a terminal; elsewhere a line an epoch."""

    def __init__(self, epochs: int, train_samples: int) -> None:
        self.epochs = epochs
        form = "{desc} {percentage:3.0f}%|{bar}| {rate_fmt}, {elapsed} gone, {remaining} left"
        on_terminal = sys.stderr is not None and sys.stderr.isatty()  # None: closed before the program began
        self.bar = tqdm(total=epochs * train_samples, unit=" images", bar_format=form, disable=not on_terminal)
        self.held_out = ""

    def step(self, samples: int, epoch: int, loss: float, said: str) -> None:
        """said  of the task, on the epoch so far: "top-1 41.7%"."""
        text = f"epoch {epoch + 1}/{self.epochs}: loss {loss:.3f}, {said}{self.held_out}"
        self.bar.set_description_str(text, refresh=False)
        self.bar.update(samples)

    def epoch(self, row: dict[str, Any], said: str, held_out: str | None) -> None:
        """row       of the history
        said      of the task, on the epoch's training
        held_out  of the task, on the held-out samples; None where they were not asked after this one
        """
        self.held_out = "" if held_out is None else f", {held_out}"
        if self.bar.disable:
            speed = f"{row['images_per_s']:.0f} images/s"
            trained = f"loss {row['train_loss']:.3f}, {said}"
            print(f"epoch {row['epoch']}/{self.epochs}: {trained}{self.held_out}, {speed}", flush=True)

    def close(self) -> None:
        self.bar.close()
