"""The pictures of a COCO file against those on the disk: names, sizes by their headers, the same one twice."""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import os
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lambdanets.data.decode import _FORMATS, MAX_IMAGE_PX, open_image
from lambdanets.data.order import hash_of
from lambdanets.detection.annotations import Annotations
from lambdanets.detection.findings import Findings
from lambdanets.errors import BadImage, printable
from lambdanets.files import open_file

HEADERS = 1000
"""Pictures whose size is compared, unless all are asked for."""

_Array = np.ndarray[Any, Any]
_ON_ITS_SIDE = (5, 6, 7, 8)  # EXIF orientations: height and width change places
_HEAD_BYTES = 4096


def look_at_pictures(
    of: Annotations, root: Path | None, part: str, findings: Findings, skip_missing: bool, all_headers: bool,
    decode: bool = False,
) -> tuple[_Array, _Array, _Array]:  # fmt: skip
    """Which pictures of a file can be used, bool (n,), their sizes, int64 (n, 2) height, width px, and which are
    missing, bool (n,).

    root    None: the pictures are not files, and what the file says of them is taken for true
    decode  every picture is decoded, and one that cannot be is an error
    """
    usable, missing = np.ones(len(of.names), bool), np.zeros(0, np.int64)

    def left_out(id: str, what: str, action: str, which: _Array, *, dropped: bool = False) -> None:
        names = (of.names[at] for at in which)
        findings.add(id, part, what, action, "dropped" if dropped else "error", len(which), names)
        usable[which] = False

    order = np.argsort(of.image_ids, kind="stable")
    again = np.flatnonzero(np.diff(of.image_ids[order]) == 0)
    twice = np.union1d(order[again], order[again + 1])
    left_out("R77", "pictures whose id another has", "give each its own id", twice)
    unsafe = np.array([at for at, name in enumerate(of.names) if not safe(name)], np.int64)
    left_out("R80", "pictures whose file_name leads out of the folder", "refused: name a file below it", unsafe)
    sizes = of.sizes.copy()
    if root is None:
        unknown = np.flatnonzero(usable & (sizes == 0).any(axis=1))
        left_out("R79", "pictures whose size the file does not say", "write height and width", unknown)
    else:
        missing = np.flatnonzero(usable & ~_there(root, of.names, usable))
        where = "left out" if skip_missing else f"not below {root}; add them, or leave them out with --skip-missing"
        if missing.size and missing.size == usable.sum():
            names = [of.names[at] for at in missing.tolist()]
            where = f"no picture was found below {root}; the names look like {printable(names[0])}: give the folder "
            where += f"that they start from, --images-dir {_start(root, of.file, names)}"
        left_out("R70", "pictures that are missing", where, missing, dropped=skip_missing)
        unknown = np.flatnonzero(usable & (sizes == 0).any(axis=1))
        _compare(of, root, part, findings, usable, sizes, unknown, all_headers, decode, left_out)
    large = np.flatnonzero(usable & (sizes.prod(axis=1) > MAX_IMAGE_PX))
    left_out("R79", f"pictures of more than {MAX_IMAGE_PX:,} pixels", "no such picture is decoded: shrink them", large)
    return usable, sizes, np.isin(np.arange(len(of.names)), missing)


def _start(root: Path, file: Path, names: list[str]) -> str:
    """The folder near `root` that most of some twenty names start from; DIR where none does."""
    tried = names[:: max(1, len(names) // 20)]
    places = [*root.absolute().parents[:3], file.absolute().parent, file.absolute().parent / "images"]
    with contextlib.suppress(OSError):
        places += sorted(place for place in root.absolute().iterdir() if place.is_dir())[:50]
    for place in places:
        if 2 * sum((place / name).is_file() for name in tried) > len(tried):
            near = os.path.relpath(place)
            return printable(place if near.startswith("..") else near)
    return "DIR"


def _compare(
    of: Annotations, root: Path, part: str, findings: Findings, usable: _Array, sizes: _Array, unknown: _Array,
    all_headers: bool, decode: bool, left_out: Any,
) -> None:  # fmt: skip
    """Sizes of the file against those of the headers; those that the file does not say are filled in."""
    there = np.flatnonzero(usable).tolist()
    if not (all_headers or decode):
        there = heapq.nsmallest(HEADERS, there, key=lambda at: hash_of("header", int(of.image_ids[at])))
    found: dict[str, list[int]] = defaultdict(list)
    shown: dict[str, list[str]] = defaultdict(list)
    for at in sorted({*there, *unknown.tolist()}):
        kind, name = "unread", of.names[at]
        try:
            height, width, turned = header(root / name)
            if decode:
                open_image(root / name, name=name)
        except ValueError as error:
            kind = "lost" if (sizes[at] == 0).any() else "broken" if decode else "unread"
            found[kind].append(at)
            reason = error.reason if isinstance(error, BadImage) else error
            shown[kind].append(f"{name}: cannot be read: {reason}" if decode else f"{name}: {reason}")
            continue
        said = sizes[at].tolist()
        if 0 in said:
            sizes[at] = height, width
            kind = "filled"
        elif said == [height, width]:
            continue
        elif said == [width, height]:
            kind = "before" if turned else "swapped"
        else:
            kind = "wrong"
            name = f"{name} (width x height: said {said[1]} x {said[0]}, is {width} x {height})"
        found[kind].append(at)
        shown[kind].append(name)
    looked = f" (of {len(there):,} looked at; --all-images looks at all)" if len(there) < usable.sum() else ""

    def add(id: str, kind: str, what: str, action: str, severity: Any) -> None:
        findings.add(id, part, what, action, severity, len(found[kind]), shown[kind])
        if severity == "error":
            usable[found[kind]] = False

    add("R79", "wrong", f"pictures of another height and width than the file says{looked}", "correct them", "error")
    what = f"pictures whose height and width are those before the camera's turn (EXIF) is applied{looked}"
    add("D12", "before", what, "the picture is turned, the file is not: write the upright size and boxes", "error")
    what = f"pictures whose height and width the file has in the other order; no EXIF turn{looked}"
    add("D12", "swapped", what, "the file is turned, the picture is not: swap them", "error")
    add("R79", "filled", "pictures whose size the file does not say", "read from their headers", "warning")
    add("R70", "broken", "pictures that cannot be read", "replace them, or take them off the list", "error")
    what = f"pictures whose header cannot be read{looked}"
    add("R70", "unread", what, "training names each, and stops above its --max-bad-frac", "warning")
    lost = np.array(found["lost"], np.int64)
    left_out("R79", "pictures whose size neither the file nor a readable header says", "write height and width", lost)


def header(path: Path) -> tuple[int, int, bool]:
    """Height and width of a picture as it is shown, and whether its camera's turn changed their places.

    Raises ValueError with a plain reason.
    """
    try:
        with warnings.catch_warnings(), open_file(path) as file:
            warnings.simplefilter("ignore")
            with Image.open(file, formats=_FORMATS) as image:
                width, height = image.size
                try:
                    turned = image.getexif().get(0x0112, 1) in _ON_ITS_SIDE
                except Exception:  # broken metadata: shown as stored
                    turned = False
    except Image.DecompressionBombError:
        raise ValueError("is too large to decode") from None
    except OSError as error:
        raise ValueError(error.strerror or "is no picture") from None
    except Exception as error:  # Pillow's readers raise SyntaxError, struct.error, IndexError ... on broken files
        raise ValueError(f"is broken: {type(error).__name__}") from None
    return (width, height, True) if turned else (height, width, False)


def safe(name: str) -> bool:
    """Whether a name stays below the folder that it is looked for in, and can be a file's at all."""
    try:
        return not (os.path.isabs(name) or ".." in name.split("/") or b"\0" in os.fsencode(name))
    except UnicodeEncodeError:
        return False


def _there(root: Path, names: list[str], usable: _Array) -> _Array:
    """Which names are files; a folder is listed once, which is quicker than a question a file on a network's disk."""
    listed: dict[str, set[str]] = {}
    found = np.zeros(len(names), bool)
    for at in np.flatnonzero(usable).tolist():
        place, name = os.path.split(os.path.normpath(names[at]))
        if place not in listed:
            try:
                listed[place] = set(os.listdir(root / place))
            except OSError:
                listed[place] = set()
        found[at] = name in listed[place]
    return found


def same_pictures(one: tuple[Path, list[str]], other: tuple[Path, list[str]]) -> list[tuple[str, str]]:
    """Pairs of names whose files have the same content; only those of equal size are read.

    one, other  the folder, and the names below it
    """
    sizes: dict[int, list[str]] = defaultdict(list)
    for name in one[1]:
        sizes[_size(one[0] / name)].append(name)
    pairs = []
    heads: dict[str, bytes] = {}
    for name in other[1]:
        size = _size(other[0] / name)
        alike = sizes.get(size, []) if size > 0 else []
        if not alike:
            continue
        head = _digest(other[0] / name, _HEAD_BYTES)
        for first in alike:
            if first not in heads:
                heads[first] = _digest(one[0] / first, _HEAD_BYTES)
            if head == heads[first] and head and _digest(one[0] / first) == _digest(other[0] / name) != b"":
                pairs.append((first, name))
                break
    return pairs


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def _digest(path: Path, most: int = -1) -> bytes:
    """Of the whole file, or of its end, where pictures of one camera and program differ; empty where it is unread."""
    try:
        with open_file(path) as file:
            if most > 0:
                file.seek(max(0, os.fstat(file.fileno()).st_size - most))
            return hashlib.blake2b(file.read(), digest_size=16).digest()
    except OSError:
        return b""
