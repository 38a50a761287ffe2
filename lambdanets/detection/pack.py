"""A COCO data set packed into tar shards: pictures as they are, each followed by its annotations."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from lambdanets.data.index_files import sha256_of
from lambdanets.data.pack import MAX_BAD_FRAC, SHARD_BYTES, Packed, Part, pack_parts, prepared
from lambdanets.data.shards import is_shards
from lambdanets.detection.check import Wishes
from lambdanets.detection.coco import CocoImages, object_rows, picture_row, write_clean
from lambdanets.detection.layouts import open_coco
from lambdanets.detection.shards import annotations_of, packed_name
from lambdanets.errors import BadData, BadImage, printable_text, some
from lambdanets.files import to_stderr


def pack_coco(
    data: str | Path,
    out: str | Path,
    *,
    skip_missing: bool = False,
    shard_bytes: int = SHARD_BYTES,
    workers: int = 0,
    max_bad_frac: float = MAX_BAD_FRAC,
) -> Packed:
    """Writes a COCO data set to shards in `out`: both parts as they are when one trains on `data`, in the same order.

    data          a folder in one of `layouts.LAYOUTS`, or one COCO file
    skip_missing  pictures that are not there are left out, with their objects; else they are an error
    shard_bytes, workers, max_bad_frac  as in `data.pack.pack`

    A sample is KEY.jpg (or what the picture is) and KEY.json: {"image": an entry of COCO's images, "annotations": its
    entries}.  Beside the manifest lie the COCO files of both parts without what was found wrong and without pictures
    that cannot be read; these are what is trained on.  Every picture's size is compared with its annotations first, and
    all findings are said to stderr.  Raises BadData: what `open_coco` and `data.pack.pack` refuse; DiskFault.  After
    that, or after a kill, the same call continues.
    """
    out = Path(out)
    if shard_bytes < 1 or workers < 0 or not 0 <= max_bad_frac <= 1:
        asked = f"shard_bytes is {shard_bytes}, workers {workers}, max_bad_frac {max_bad_frac}"
        raise ValueError(f"{asked}: at least 1, at least 0, and 0 to 1")
    if is_shards(data):
        raise BadData(f"{data} is a data set of shards already: give the folder of pictures")
    found = open_coco(data, wishes=Wishes(skip_missing=skip_missing, all_headers=True))
    if len(found.findings):
        to_stderr(printable_text(found.findings.table()))
    both = {"train": found.train, "val": found.val}
    parts = {split: _part(split, images) for split, images in both.items()}
    plan: dict[str, Any] = {"shard_bytes": shard_bytes}
    plan |= {split: images.fingerprint() for split, images in both.items()}
    return pack_parts(
        parts, out, functools.partial(_prepared, {split: images.root for split, images in both.items()}),
        found.train.classes, plan, shard_bytes=shard_bytes, workers=workers, max_bad_frac=max_bad_frac,
        files=functools.partial(_files, out, both, parts),
    )  # fmt: skip


def _part(split: str, images: CocoImages) -> Part:
    names = [packed_name(split, name) for name in images.names]
    if len(set(names)) < len(names):
        seen: set[str] = set()
        again = [name for name in names if name in seen or seen.add(name)]  # type: ignore[func-returns-value]
        raise BadData(f"{images.file} lists {len(again):,} pictures a second time ({some(again)}): list each once")

    def annotations(index: int) -> tuple[str, bytes]:
        held = {"image": picture_row(images, index), "annotations": list(object_rows(images, index))}
        return "json", json.dumps(held, allow_nan=False).encode()

    return Part(names, images.labels, range(len(names)), annotations)


def _prepared(roots: dict[str, Path], name: str) -> tuple[str, bytes] | BadImage:
    split, _, own = name.partition("/")
    return prepared(roots[split] / own, name)


def _files(out: Path, both: dict[str, CocoImages], parts: dict[str, Part], left_out: set[str]) -> dict[str, str]:
    """Writes the COCO files of the pictures that are in the archives; gives their sha256."""
    (out / annotations_of("train")).parent.mkdir(exist_ok=True)
    written = {}
    for split, images in both.items():
        gone = [index for index, name in enumerate(parts[split].names) if name in left_out]
        place = out / annotations_of(split)
        write_clean(images.without(gone), place)
        written[annotations_of(split)] = sha256_of(place)
    return written
