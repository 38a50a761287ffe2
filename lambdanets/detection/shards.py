"""COCO data sets in tar shards, read: annotations from the COCO files beside the manifest, pictures from the archives.

`pack.py` writes them. Pictures lie in the archives in the order of the files, so that a position means the same picture
in both; each one's name is compared when it is read.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lambdanets.data.archive import STREAM, filesystem, join
from lambdanets.data.decode import open_image
from lambdanets.data.index_files import file_beside
from lambdanets.data.manifest import ANNOTATED_FORMAT, MANIFEST, SPLITS, manifest
from lambdanets.data.shards import ShardImages, is_shards, open_parts
from lambdanets.detection.check import Kept
from lambdanets.detection.coco import CocoImages, coco_images
from lambdanets.errors import BadData, printable
from lambdanets.files import open_file

_HEAD_BYTES = 200
_ASKED = 8  # names of each part that are compared when it is opened


def annotations_of(split: str) -> str:
    """The COCO file of "train" or "val", beside the manifest."""
    return f"annotations/instances_{split}.json"


def packed_name(split: str, name: str) -> str:
    """How the archives call a picture: names may be alike in both parts, and "a//b" and "a/b" are one file.

    >>> packed_name("val", "a//b.jpg")
    'val/a/b.jpg'
    """
    return "/".join([split, *filter(None, name.split("/"))])


@dataclass(frozen=True, eq=False, repr=False)
class CocoShards(CocoImages):
    """One part of a COCO data set whose pictures lie in shards.

    pictures  those of the archives
    places    int64 (n,), where among them each of these lies
    """

    pictures: ShardImages
    places: np.ndarray[Any, Any]

    @classmethod
    def of(cls, kept: Kept, pictures: ShardImages) -> CocoShards:
        """What `check_file` has kept of a COCO file whose pictures are these, in its order."""
        images = coco_images(kept)
        return cls(**{f.name: getattr(images, f.name) for f in fields(images)}, pictures=pictures, places=kept.pictures)

    def load(self, index: int) -> Image.Image:
        """The picture, RGB, upright; raises BadImage, and BadData where the archive holds another there."""
        name, content = self.pictures.read(int(self.places[index]))
        _check_pair(self.names[index], name, self.pictures, self.file)
        return open_image(content, name=self.names[index])

    def expect(self, ids: Sequence[int]) -> None:
        self.pictures.expect(self.places[list(ids)].tolist())

    def fingerprint(self) -> str:
        """As of CocoImages, and with every byte of the archives."""
        return hashlib.sha256(f"{super().fingerprint()} {self.pictures.fingerprint()}".encode()).hexdigest()

    def stamp(self) -> None:
        return None


def is_coco_shards(data: str | Path) -> bool:
    """Whether that is a COCO data set in shards. Of a folder, the manifest's first bytes are read.

    Raises BadData where a URL has no manifest.
    """
    where = str(data)
    if not is_shards(where):
        return False
    home = where.removeprefix(STREAM)
    try:
        _, path, local = filesystem(home)
    except BadData:  # a command, or a protocol whose package is missing: who opens it says so
        return False
    if not local:
        return bool(manifest(home).files)
    try:
        with open_file(os.path.join(path, MANIFEST)) as file:
            return ANNOTATED_FORMAT.encode() in file.read(_HEAD_BYTES)
    except OSError:
        return False


def open_coco_shards(where: str | Path) -> list[tuple[Path, ShardImages]]:
    """COCO file and pictures of both parts, training first; a remote file is copied to ~/.cache/lambdanets once.

    where  a folder, or a URL whose store serves parts of files
    Raises BadData as `data.shards.open_shards` does, besides for a COCO file that is not the manifest's.
    """
    where = str(where)
    if where.startswith(STREAM):
        remedy = "leave 'stream:' out where the store serves parts of files, else copy the shards to a disk"
        raise BadData(f"{where}: a detector reads pictures in any order, and a stream has one: {remedy}")
    held = manifest(where)
    if held.base:
        found = f"names another place for its archives, {printable(held.base)}"
        raise BadData(f"{join(where, MANIFEST)} {found}: those of COCO shards lie beside it; copy it there")
    if lacking := [name for name in map(annotations_of, SPLITS) if name not in held.files]:
        raise BadData(f"{join(where, MANIFEST)} names no {lacking[0]} among its files: it is not of a COCO data set")
    pictures = open_parts(where, held)
    return [(file_beside(where, held, annotations_of(split)), pictures[split]) for split in SPLITS]


def check_pairs(names: Sequence[str], pictures: ShardImages, file: Path) -> None:
    """Compares the names of a COCO file with those of the archives: how many, and a few. Raises BadData."""
    if len(names) != len(pictures):
        raise BadData(f"{file} lists {len(names):,} pictures, and the archives hold {len(pictures):,}: {_REMEDY}")
    asked = np.unique(np.linspace(0, len(names) - 1, _ASKED).astype(np.int64)).tolist()
    pictures.expect(asked)
    for index in asked:
        _check_pair(names[index], pictures.read(index)[0], pictures, file)


_REMEDY = "they are of different data sets; copy the whole folder again"


def _check_pair(name: str, found: str, pictures: ShardImages, file: Path) -> None:
    if (wanted := packed_name(pictures.split, name)) != found:
        shown = f"{file} has {printable(wanted)} where the archives of {pictures.home} hold {printable(found)}"
        raise BadData(f"{shown}: {_REMEDY}")
