"""A list of labelled pictures (`Images`), and two such lists with what was found beside them (`FolderData`)."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from lambdanets.errors import BadData

CHUNK_IMAGES = 1 << 20


# What of a PNG or JPEG is looked at again where Pillow stumbled, see `_without_metadata`.


@dataclass(frozen=True, eq=False, repr=False)
class Images(ABC):
    """One list of labelled pictures.

    classes  names; a label is a position here
    names    one per picture, unique: a path relative to the data folder, or "digits/0123"
    labels   one per picture, 0..len(classes)-1; a list or an integer array
    """

    classes: tuple[str, ...]
    names: Sequence[str]
    labels: Sequence[int] | np.ndarray[Any, np.dtype[np.integer[Any]]]

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def load(self, index: int) -> Image.Image:
        """The picture, mode "RGB" or "L"; raises BadImage."""

    def content(self, index: int) -> bytes | None:
        """The bytes of the picture's file, whatever is in it; None where it has none. Raises DiskFault or BadData."""
        return None

    def expect(self, ids: Sequence[int]) -> None:  # noqa: B027  # sets on a disk do nothing
        """These will be loaded next, in this process: a remote set begins to fetch them."""

    def label_parts(self) -> Iterator[np.ndarray[Any, np.dtype[np.integer[Any]]]]:
        """All labels, a million at a time."""
        for start in range(0, len(self.labels), CHUNK_IMAGES):
            yield np.asarray(self.labels[start : start + CHUNK_IMAGES])

    def fingerprint(self) -> str:
        """64 hexadecimal digits that change with the classes, any name, any label and their order."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for name, label in zip(self.names, self.labels, strict=True):
            digest.update(f"\n{label} {name}".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def stamp(self) -> dict[str, str] | None:
        """Of the files' sizes, and of their sizes and times: two numbers that differ once pictures were replaced under
        the same names. None where the fingerprint says it already."""
        return None


class Ignored(NamedTuple):
    """Files passed over for one reason: how many (a hidden folder counts once), and up to ten of their names."""

    files: int
    first_names: list[str]


@dataclass(frozen=True)
class FolderData:
    """What `folder` found: two lists with the same classes, a sentence on the split, and reason -> what was ignored."""

    train: Images
    val: Images
    how: str
    ignored: dict[str, Ignored]


def check_labels(images: Images) -> None:
    """Raises BadData at the first label outside 0..len(classes)-1, naming the sample."""
    if len(images.labels) != len(images.names):
        raise BadData(f"{len(images.names):,} names but {len(images.labels):,} labels")
    last = len(images.classes) - 1
    start = 0
    for labels in images.label_parts():
        if (wrong := np.flatnonzero((labels < 0) | (labels > last))).size:
            name, label = images.names[start + int(wrong[0])], labels[wrong[0]]
            raise BadData(f"{name} has the label {label}: labels run from 0 to {last} ({last + 1} classes)")
        start += len(labels)
