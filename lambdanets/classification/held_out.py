"""Which images a run is judged by: those that it held out, or those of a folder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader

from lambdanets.data.archive import check_source
from lambdanets.data.folders import folder, val_or_all
from lambdanets.data.images import Images
from lambdanets.data.reading import serve_the_run
from lambdanets.data.shards import is_shards
from lambdanets.data.sklearn_digits import digits
from lambdanets.data.source import DIGITS, absolute
from lambdanets.errors import BadData, BadImage, some
from lambdanets.runs.record import val_fingerprint


def own_images(record: dict[str, Any], by: str | Path, allow_sources: Sequence[str] = ()) -> tuple[Images, str]:
    """The images that a run held out, from where they were, and a sentence. Raises BadData where they have changed."""
    found = record["data"]
    if found["source"] == DIGITS:
        images = digits()[1]
    else:
        check_source(found["source"], allow_sources, str(by))
        images = folder(found["source"], allow_sources=allow_sources).val
    fingerprint = val_fingerprint(record)
    same = len(images) == found["val_images"] and list(images.classes) == record["classes"]
    if not same or fingerprint not in (None, images.fingerprint()):
        raise BadData(
            f"the held-out images of {found['source']} are not those of the run any more ({len(images):,} now, "
            f"{found['val_images']:,} then): name the images with --data FOLDER"
        )
    return images, f"the {len(images):,} images that the run held out, of {found['source']}"


def images_of(data: str | Path, record: dict[str, Any], allow_sources: Sequence[str] = ()) -> tuple[Images, str]:
    """The images of a folder that a run is judged by, labelled with its classes by name, and a sentence on them.

    data  what the run was trained on, known by its place or by its fingerprint: the part that it held out.
          FOLDER/val/CLASS/* (or valid, validation, test) where there is such a folder; shards: those of the val split;
          else all of FOLDER/CLASS/*
    Raises BadData for a class that the run does not know, or no images.
    """
    root, classes = Path(data), tuple(record["classes"])
    own = record["data"]["source"] == absolute(data)
    divided: Images | None = None
    try:
        divided = folder(data, allow_sources=allow_sources).val
    except BadData:  # fit for no training: one class, say
        if own or not root.is_dir() or is_shards(data):
            raise
    if divided is not None:
        own = own or divided.fingerprint() == val_fingerprint(record)
        if own or not root.is_dir() or is_shards(data):
            which = "that the run held out" if own else "of its val split"
            _refuse_unknown(divided.classes, classes, str(data))
            return _chosen(divided, range(len(divided)), classes), f"the {len(divided):,} images of {data} {which}"
    images, how = val_or_all(root)
    _refuse_unknown(images.classes, classes, str(root))
    return _chosen(images, range(len(images)), classes), how


def _refuse_unknown(found: Sequence[str], classes: Sequence[str], where: str) -> None:
    known = set(classes)
    if unknown := [name for name in found if name not in known]:
        raise BadData(
            f"{len(unknown)} classes of {where} are unknown to the run: {some(unknown)}; its {len(classes)} classes "
            f"are {some(classes)}; rename or remove the folders"
        )


@dataclass(frozen=True, eq=False, repr=False)
class _Chosen(Images):
    """Some images of another list, under the class names of a run."""

    source: Images
    ids: Sequence[int]

    def load(self, index: int) -> Image.Image:
        return self.source.load(self.ids[index])


def _chosen(source: Images, ids: Sequence[int], classes: Sequence[str]) -> Images:
    position = {name: i for i, name in enumerate(classes)}
    label_of = [position.get(name, -1) for name in source.classes]
    labels = [label_of[int(source.labels[i])] for i in ids]
    return _Chosen(tuple(classes), [source.names[i] for i in ids], labels, source, ids)


@dataclass(frozen=True)
class _Reads:
    images: Images

    def __getitem__(self, index: int) -> tuple[int, str | None]:
        try:
            self.images.load(index)
        except BadImage as error:
            return index, error.reason
        return index, None


def _unreadable(images: Images, ids: Sequence[int], workers: int) -> dict[int, str]:
    """id -> reason of those that cannot be read, every one tried."""
    tried: Iterable[Any] = map(_Reads(images).__getitem__, ids)
    if workers:
        loader: Any = DataLoader(
            _Reads(images),  # type: ignore[arg-type]  # has __getitem__, is no Dataset
            batch_size=None,
            sampler=ids,
            num_workers=workers,
            worker_init_fn=serve_the_run,
            generator=torch.Generator(),
        )
        tried = loader
    return {index: why for index, why in tried if why is not None}
