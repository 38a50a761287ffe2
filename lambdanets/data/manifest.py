"""manifest.json of a data set of shards: what is in it, read from strangers field by field, written."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from lambdanets.data.archive import join, whole
from lambdanets.errors import BadData, DiskFault, printable
from lambdanets.files import field, json_object

MANIFEST = "manifest.json"


FORMAT = "lambdanets shards 1"


ANNOTATED_FORMAT = "lambdanets annotated shards 1"
"""Of shards whose pictures have no label each; older versions, which would take it for 0, refuse them by this."""


UNLABELLED_FORMAT = "lambdanets unlabelled shards 1"
"""Of pictures that nobody has labelled: one split, UNLABELLED, no classes and no column of labels."""


UNLABELLED = "unlabelled"


COLUMNS = {"start": "<u8", "bytes": "<u4", "label": "<i4"}


SPLITS = ("train", "val")


def columns_of(split: str) -> list[str]:
    """The columns that the index of a split has.

    >>> columns_of("train"), columns_of("unlabelled")
    (['start', 'bytes', 'label'], ['start', 'bytes'])
    """
    return [name for name in COLUMNS if split != UNLABELLED or name != "label"]


HEAD_BYTES = 4096  # of each shard, hashed: the name, size and date of its first picture, and where that begins


MANIFEST_BYTES = 64 << 20  # 13,000 shards take 3 MB


_SHARD_BYTES = 1 << 48  # more than a disk holds; sums of them stay below 2**63


class Shard(NamedTuple):
    """One archive of the manifest. head: the sha256 of its first HEAD_BYTES; "" where an older version wrote it."""

    name: str
    samples: int
    bytes: int
    sha256: str
    head: str = ""


class Digest:
    """Counts and hashes the bytes of a shard as they pass."""

    def __init__(self) -> None:
        self.bytes = 0
        self._all, self._head = hashlib.sha256(), hashlib.sha256()

    def update(self, content: bytes) -> None:
        if self.bytes < HEAD_BYTES:
            self._head.update(content[: HEAD_BYTES - self.bytes])
        self._all.update(content)
        self.bytes += len(content)

    def shard(self, name: str, samples: int) -> Shard:
        return Shard(name, samples, self.bytes, self._all.hexdigest(), self._head.hexdigest())


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What manifest.json says, checked.

    classes   names; a label is a position here
    paths     keys are quoted paths of the folder that was packed: a sample is called by its path, not by its member
    left_out  unreadable files that packing left out, listed in bad_samples.jsonl
    base      where the shards lie; "": beside the manifest
    plan      what packing was asked for, to know a finished data set again
    splits    "train", "val" -> shards, or "unlabelled" alone;  columns  the same -> column -> sha256 of its file
    files     name -> sha256 of the files beside the manifest that say what is in the pictures; none where a label does
    """

    classes: tuple[str, ...]
    paths: bool
    left_out: int
    base: str
    plan: dict[str, Any]
    splits: dict[str, list[Shard]]
    columns: dict[str, dict[str, str]]
    files: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def labelled(self) -> bool:
        """Whether its pictures have a label each, or annotations."""
        return UNLABELLED not in self.splits

    def text(self) -> str:
        """The JSON, the same for the same data set; a line a shard."""
        shards = {split: [shard._asdict() for shard in of] for split, of in self.splits.items()}
        # Apart from the shards, whose fields older versions know: they read this manifest too.
        heads = {split: [shard.pop("head") for shard in of] for split, of in shards.items()}
        names = ["classes", "paths", "left_out", "base", "plan", "columns", *(["files"] if self.files else [])]
        form = ANNOTATED_FORMAT if self.files else FORMAT if self.labelled else UNLABELLED_FORMAT
        fields: dict[str, Any] = {"format": form}
        fields |= {name: getattr(self, name) for name in names} | {"heads": heads}
        lines = [f' "{name}": {_indented(value)}' for name, value in fields.items()]
        lines.append(f' "splits": {{\n{_by_lines(shards)}\n }}')
        return "{\n" + ",\n".join(lines) + "\n}\n"


def _indented(value: Any) -> str:
    """JSON of a field of an object, one space a level."""
    return json.dumps(value, indent=1).replace("\n", "\n ")


def _by_lines(shards: dict[str, list[dict[str, Any]]]) -> str:
    """JSON of the fields of an object, a list each, a line a shard."""
    of = {split: ",\n".join(f"   {json.dumps(row)}" for row in rows) for split, rows in shards.items()}
    return ",\n".join(f'  "{split}": [\n{rows}\n  ]' if rows else f'  "{split}": []' for split, rows in of.items())


def manifest(base: str) -> Manifest:
    """Reads and checks BASE/manifest.json, each field of it. Raises BadData."""
    where = join(base, MANIFEST)
    with whole(base, MANIFEST, most_bytes=MANIFEST_BYTES) as file:
        try:
            content = file.read()
        except OSError as error:
            raise DiskFault(where, f"cannot be read: {error.strerror or error}") from error
    try:
        return _manifest(json_object(content))
    except ValueError as error:
        raise BadData(f"{where} is no manifest of shards: {printable(error)}") from error


def _manifest(held: dict[str, Any]) -> Manifest:
    if held.get("format") not in (FORMAT, ANNOTATED_FORMAT, UNLABELLED_FORMAT):
        raise ValueError(f"its format is {str(held.get('format'))[:60]!r}, not {FORMAT!r}")
    splits, columns = {}, {}
    of_splits, of_columns = field(held, "splits", dict), field(held, "columns", dict)
    of_heads = field(held, "heads", dict) if "heads" in held else {}
    for split in (UNLABELLED,) if held["format"] == UNLABELLED_FORMAT else SPLITS:
        listed = field(of_splits, split, list)
        heads = field(of_heads, split, list) if "heads" in held else [""] * len(listed)
        if len(heads) != len(listed):
            raise ValueError(f"it has {len(listed):,} shards of {split} and {len(heads):,} heads")
        splits[split] = [shard_of(shard, head) for shard, head in zip(listed, heads, strict=True)]
        hashes = field(of_columns, split, dict)
        columns[split] = {name: _hex(field(hashes, name, str), f"{split}.{name}") for name in columns_of(split)}
    names = [shard.name for of in splits.values() for shard in of]
    if len(set(names)) < len(names):
        raise ValueError(f"it lists a shard twice, of {len(names):,}")
    classes = field(held, "classes", list)
    if not all(isinstance(name, str) for name in classes) or len(set(classes)) < len(classes):
        raise ValueError("its 'classes' should be different names")
    if classes and UNLABELLED in splits:
        raise ValueError(f"it has {len(classes):,} 'classes', and pictures without labels have none")
    left_out, plan = field(held, "left_out", int), field(held, "plan", dict)
    if left_out < 0:
        raise ValueError(f"its 'left_out' is {left_out}")
    paths, base = field(held, "paths", bool), field(held, "base", str)
    if b"\0" in os.fsencode(base):  # a ValueError of its own where it is no text
        raise ValueError(f"its 'base' is {base[:60]!r}")
    files = _files(held) if held["format"] == ANNOTATED_FORMAT else {}
    return Manifest(tuple(classes), paths, left_out, base, plan, splits, columns, files)


def _files(held: dict[str, Any]) -> dict[str, str]:
    files = field(held, "files", dict)
    for name, sha256 in files.items():
        os.fsencode(name)
        parts = name.split("/")
        if {"", ".", ".."} & set(parts) or any(part in name for part in ("\\", "\0", "::")):
            raise ValueError(f"the file {name[:60]!r} does not lie beside the manifest")
        _hex(sha256, name)
    if not files:
        raise ValueError("it has no 'files' that say what is in the pictures")
    return dict(files)


def shard_of(held: Any, head: Any = "") -> Shard:
    """The shard that an object from JSON describes. Raises ValueError: of other types, a name that is a path, sizes
    that cannot be."""
    name = field(held, "name", str)
    os.fsencode(name)  # a ValueError where no file can be called so
    if PurePosixPath(name).name != name or name in ("", "..") or any(part in name for part in ("\\", "\0", "::")):
        raise ValueError(f"the shard {name!r} is no plain file name")
    n, size = field(held, "samples", int), field(held, "bytes", int)
    if not 0 < n <= size // 512 or size > _SHARD_BYTES:  # a sample has a member at least, with a header of 512 bytes
        raise ValueError(f"the shard {name!r} has {n:,} samples and {size:,} bytes")
    if head != "":
        _hex(head, f"head of {name}")
    return Shard(name, n, size, _hex(field(held, "sha256", str), name), head)


def _hex(sha256: Any, what: str) -> str:
    if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ValueError(f"the sha256 {str(sha256)[:80]!r} of {what} is none")
    return sha256
