"""What --data names: it is opened here, whatever it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lambdanets.data.archive import STREAM
from lambdanets.data.folders import folder
from lambdanets.data.images import Images
from lambdanets.data.sklearn_digits import digits

DIGITS = "scikit-learn digits"


def absolute(path: str | Path) -> str:
    """What `folder` takes, written so that it means the same in another working folder; a URL stays as it is."""
    text = str(path)
    if text.startswith(STREAM):
        return STREAM + absolute(text.removeprefix(STREAM))
    return text if "://" in text else str(Path(path).resolve())


def open_source(data: str | Path | None, allow_sources: Sequence[str]) -> tuple[Images, Images, str, dict[str, Any]]:
    """Training images, held-out images, a sentence on where they come from, and what a folder held besides."""
    if data is None:
        train_images, val_images = digits()
        how = f"scikit-learn's digits: {len(train_images):,} to train, {len(val_images):,} held out, a fixed split"
        return train_images, val_images, how, {}
    found = folder(data, allow_sources=allow_sources)
    return found.train, found.val, found.how, {why: list(files) for why, files in found.ignored.items()}
