"""Shards written: a folder of pictures packed into archives, or an index made for archives that others wrote.

Both go shard by shard. A finished shard is a line of the journal in the target folder; a job that was killed goes on
from there and ends, byte for byte, where the undisturbed one does.  The manifest is written last.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import quote

import numpy as np
from PIL import Image

from .archive import MAX_MEMBER_BYTES, filesystem, join, samples, whole
from .data import SHOWN, BadData, BadImage, Images, Order, folder, natural, open_image
from .files import placed
from .shards import COLUMNS, MANIFEST, SPLITS, Manifest, Shard, is_shards, manifest

SHARD_BYTES = 1 << 30
BAD_SAMPLES = "bad_samples.jsonl"
_JOURNAL = "packing.jsonl"
_JPEG_QUALITY = 95
_BLOCK_IMAGES = 64  # read at a time, by each worker
_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}
_ROW = np.dtype(list(COLUMNS.items()))
_END = bytes(2 * tarfile.BLOCKSIZE)


class Packed(NamedTuple):
    """What a data set of shards holds: images of each split, shards and their bytes, unreadable files left out."""

    place: str
    train_images: int
    val_images: int
    shards: int
    bytes: int
    left_out: int

    def __str__(self) -> str:
        images = f"{self.train_images:,} training and {self.val_images:,} validation images"
        bad = f"; {self.left_out:,} unreadable files left out, listed in {BAD_SAMPLES}" if self.left_out else ""
        return f"{self.place}: {images} in {self.shards:,} shards, {self.bytes:,} bytes{bad}"


def pack(
    source: str | Path,
    out: str | Path,
    *,
    max_side_px: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    workers: int = 0,
) -> Packed:
    """Writes the pictures of a folder to shards in `out`, split as `data.folder` splits it, the training ones shuffled.

    max_side_px  a picture with a longer side is shrunk to it (upright, RGB, a JPEG of quality 95); other files, and all
                 where it is None, keep their bytes and get the suffix of what they are
    shard_bytes  a shard is closed before a picture that would make it larger
    workers      processes that read; 0: this one; the result does not depend on them
    Every picture is decoded once; an unreadable one is left out, counted and listed with its reason.  Raises BadData:
    what `data.folder` refuses, an `out` that holds something else or is being written, a full disk.  After that, or
    after a kill, the same call continues.
    """
    out = Path(out)
    if shard_bytes < 1 or (max_side_px is not None and max_side_px < 1) or workers < 0:
        asked = f"shard_bytes is {shard_bytes}, max_side_px {max_side_px}, workers {workers}"
        raise ValueError(f"{asked}: at least 1, 1 and 0")
    if is_shards(source):
        raise BadData(f"{source} is a data set of shards already: give the folder of pictures")
    if Path(source).resolve() in (out.resolve(), *out.resolve().parents):
        raise BadData(f"{out} lies in {source}, and would be one of its classes: choose another place")
    found = folder(source)
    lists = {"train": found.train, "val": found.val}
    plan: dict[str, Any] = {"max_side_px": max_side_px, "shard_bytes": shard_bytes}
    plan |= {split: images.fingerprint() for split, images in lists.items()}
    with _job(out, plan, shared=False) as job:
        if job is not None:
            for split, images in lists.items():
                _pack_split(job, split, images, max_side_px, shard_bytes, workers)
            job.finish(found.train.classes, paths=True)
    return _result(str(out), manifest(str(out)))


def _pack_split(job: _Job, split: str, images: Images, max_side_px: int | None, shard_bytes: int, workers: int) -> None:
    number, first = len(job.shards(split)), job.next(split)
    items = _items(images, split, first, max_side_px, workers)
    item = next(items, None)
    while item is not None:
        path = job.out / f"{split}-{number:05d}.tar"
        rows: list[tuple[int, int, int]] = []
        bad: dict[str, str] = {}
        digest, size = hashlib.sha256(), 0
        with placed(path) as file:
            while item is not None:
                if isinstance(item.found, BadImage):
                    bad[item.found.name] = item.found.reason
                else:
                    suffix, content = item.found
                    members, picture_bytes = _archived(item.name, suffix, content, item.label)
                    if rows and size + len(members) + len(_END) > shard_bytes:
                        break
                    rows.append((size, picture_bytes, item.label))
                    size += file.write(members)
                    digest.update(members)
                item = next(items, None)
            digest.update(_END)
            size += file.write(_END)
        shard = Shard(path.name, len(rows), size, digest.hexdigest()) if rows else None
        if shard is None:  # what was left could not be read
            path.unlink()
        number += 1
        job.add(split, shard, rows, next_place=len(images) if item is None else item.place, bad=bad)
    if not job.shards(split):
        raise BadData(f"none of the {len(images):,} images of {split} can be read; the first: {job.first_bad(split)}")


class _Item(NamedTuple):
    place: int
    name: str
    label: int
    found: tuple[str, bytes] | BadImage


def _items(images: Images, split: str, first: int, max_side_px: int | None, workers: int) -> Iterator[_Item]:
    """What is to be packed, from a place on: (suffix, bytes) of a picture, or why it cannot be read."""
    order = Order(len(images), seed=0, epoch=0)
    prepare = functools.partial(_prepared, images.root, max_side_px)  # type: ignore[attr-defined]  # a list of files
    block = _BLOCK_IMAGES * max(1, workers)
    with contextlib.ExitStack() as stack:
        mapped: Callable[..., Any] = map
        if workers:
            pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
            mapped = functools.partial(stack.enter_context(pool).map, chunksize=8)
        for start in range(first, len(images), block):
            places = range(start, min(start + block, len(images)))
            ids = order[places.start : places.stop].tolist() if split == "train" else list(places)
            names = [images.names[index] for index in ids]
            for place, index, name, found in zip(places, ids, names, mapped(prepare, names), strict=True):
                yield _Item(place, name, int(images.labels[index]), found)


def _prepared(root: Path, max_side_px: int | None, name: str) -> tuple[str, bytes] | BadImage:
    try:
        image = open_image(root / name, name=name)  # all of it: a cut file shows only then
        content = (root / name).read_bytes()
        if len(content) > MAX_MEMBER_BYTES:
            return BadImage(name, f"has {len(content):,} bytes, {MAX_MEMBER_BYTES:,} allowed")
        if max_side_px is not None and max(image.size) > max_side_px:
            image.thumbnail((max_side_px, max_side_px), Image.Resampling.LANCZOS)
            file = io.BytesIO()
            image.save(file, "JPEG", quality=_JPEG_QUALITY)
            return "jpg", file.getvalue()
        with Image.open(io.BytesIO(content)) as stored:
            return _SUFFIXES[stored.format or ""], content
    except BadImage as error:
        return error
    except OSError as error:
        return BadImage(name, f"cannot be read: {error.strerror or error}")


def _archived(name: str, suffix: str, content: bytes, label: int) -> tuple[bytes, int]:
    """The two members of a sample as bytes, and how many of those end with the picture's last one."""
    # WebDataset ends a key at the first dot; what is quoted here, ShardImages.called unquotes.
    key = quote(os.fsencode(name), safe="/ !#$&'()+,;=@[]^{}~").replace(".", "%2E")
    picture = _head(f"{key}.{suffix}", content) + content
    text = str(label).encode()
    members = [_padded(picture), _padded(_head(f"{key}.cls", text) + text)]
    return b"".join(members), len(picture)


def _head(name: str, content: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info.tobuf(tarfile.PAX_FORMAT)


def _padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % tarfile.BLOCKSIZE)


def index(where: str | Path, *, out: str | Path | None = None, classes: str | Path | None = None) -> Packed:
    """Makes index and manifest for the archives `where`/*.tar; where they are there, compares every byte with them.

    where    a folder or URL; archives called val*, valid*, validation* or test* are the validation split
    out      a folder for index and manifest where `where` cannot be written; the data set is then opened there
    classes  a text file with a name a line; without it the classes are called 0, 1, ... up to the largest label
    Raises BadData naming the archive: damaged, cut, a member that `archive.header` refuses, a sample without picture or
    label; in a comparison, all archives that differ, the first ten by name.
    """
    base = str(where).rstrip("/")
    found, path, local = filesystem(base)
    if found.exists(join(path, MANIFEST)):
        return _compared(base)
    listed = found.glob(join(path, "*.tar"), detail=True)
    sizes = {name.rpartition("/")[2]: int(entry["size"]) for name, entry in listed.items()}
    names: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name in sorted(sizes, key=natural):
        names["val" if re.match(r"(val|valid|validation|test)(?![a-z])", name.lower()) else "train"].append(name)
    if not names["train"] or not names["val"]:
        counts = f"{len(names['train'])} archives to train on and {len(names['val'])} called val-... to validate"
        raise BadData(f"{base} has {counts}: both are needed, as in train-00000.tar and val-00000.tar")
    if not local and out is None:
        raise BadData(f"{base} is not a folder of this machine: say where the index goes with --out FOLDER")
    known = None if classes is None else _class_names(Path(classes))
    # Sizes are in the plan: an archive that changes on the way makes it another job.
    plan = {"archives": sizes, "classes": known}
    with _job(Path(path if out is None else out), plan, shared=True) as job:
        if job is not None:
            last = max(_index_split(job, split, base, names[split], known) for split in SPLITS)
            home = "" if out is None else str(Path(path).resolve()) if local else base
            job.finish(known or tuple(str(label) for label in range(last + 1)), paths=False, base=home)
    home = str(where if out is None else out)
    return _result(home, manifest(home))


def _index_split(job: _Job, split: str, base: str, names: list[str], classes: tuple[str, ...] | None) -> int:
    """Indexes what is not yet in the journal; gives the largest label."""
    for name in names[len(job.shards(split)) :]:
        digest, rows = hashlib.sha256(), []
        with whole(base, name) as file:
            for sample in samples(file, join(base, name), digest.update):
                if classes is not None and sample.label >= len(classes):
                    allowed = f"labels run from 0 to {len(classes) - 1} ({len(classes)} classes)"
                    raise BadData(f"{join(base, name)}: {sample.key!r} has the label {sample.label}: {allowed}")
                picture = sample.picture
                rows.append((picture.start, picture.head_bytes + picture.bytes, sample.label))
            size = file.tell()
        if not rows:
            raise BadData(f"{join(base, name)} holds no sample: remove it")
        job.add(split, Shard(name, len(rows), size, digest.hexdigest()), rows, next_place=0, bad={})
    return max(int(job.rows(shard.name)["label"].max()) for shard in job.shards(split))


def _class_names(path: Path) -> tuple[str, ...]:
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise BadData(f"{path}: the class names cannot be read: {error}") from error
    if len(names) < 2 or len(set(names)) < len(names) or not all(names):
        raise BadData(f"{path} holds {len(names)} names, {len(set(names))} different: one a line, at least two")
    return names


def _compared(base: str) -> Packed:
    held = manifest(base)
    home, wrong = held.base or base, []
    for shard in (shard for split in SPLITS for shard in held.splits[split]):
        digest, count = hashlib.sha256(), 0
        try:
            with whole(home, shard.name) as file:
                for _ in samples(file, join(home, shard.name), digest.update):
                    count += 1
                size = file.tell()
        except BadData as error:
            wrong.append(str(error))
            continue
        seen = Shard(shard.name, count, size, digest.hexdigest())
        if seen != shard:
            wrong.append(f"{join(home, shard.name)}: found {seen[1:]}, the manifest says {shard[1:]}")
    for split, name in itertools.product(SPLITS, COLUMNS):
        digest = hashlib.sha256()
        with whole(base, f"{split}.{name}.npy") as file:
            while part := file.read(1 << 20):
                digest.update(part)
        if digest.hexdigest() != held.columns[split][name]:
            wrong.append(f"{split}.{name}.npy: its sha256 is not the manifest's: remove {MANIFEST} and index again")
    if wrong:
        more = f"\n  and {len(wrong) - SHOWN:,} more" if len(wrong) > SHOWN else ""
        raise BadData(f"{len(wrong):,} files of {base} are damaged or changed:" + "".join(
            f"\n  {line}" for line in wrong[:SHOWN]) + more)  # fmt: skip
    return _result(base, held)


def _result(place: str, held: Manifest) -> Packed:
    shards = [shard for split in SPLITS for shard in held.splits[split]]
    train, val = (sum(shard.samples for shard in held.splits[split]) for split in SPLITS)
    return Packed(place, train, val, len(shards), sum(shard.bytes for shard in shards), held.left_out)


# ---- the journal


@contextlib.contextmanager
def _job(out: Path, plan: dict[str, Any], *, shared: bool) -> Iterator[_Job | None]:
    """The job in that folder, begun or continued; None where it is done. shared: other files may lie there."""
    plan = json.loads(json.dumps(plan))
    if (out / MANIFEST).is_file():
        if manifest(str(out)).plan != plan:
            raise BadData(f"{out} holds the shards of another folder, or of other sizes: name a new folder")
        _tidy(out)
        yield None
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        held = sorted(path.name for path in out.iterdir())
        if held and _JOURNAL not in held and not shared:
            raise BadData(f"{out} is not empty (it holds {held[0]}): name a new folder")
        with open(out / _JOURNAL, "a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BadData(f"{out} is being written by another process") from None
            yield _Job(out, file, plan, anew=shared)
    except OSError as error:
        remedy = "free space or choose another place, and give the same command: finished shards are kept"
        raise BadData(f"{out} cannot be written: {error}; {remedy}") from error
    _tidy(out)


def _tidy(out: Path) -> None:
    for left in [*out.glob(".*.tar.npy"), *out.glob(".*.part"), out / _JOURNAL]:
        left.unlink(missing_ok=True)


class _Job:
    """Finished shards: a line each in the journal, rows of the index in a file each until `finish` joins them."""

    def __init__(self, out: Path, file: IO[bytes], plan: dict[str, Any], *, anew: bool) -> None:
        self.out, self._file, self._plan = out, file, plan
        file.seek(0)
        text = file.read()
        if not text.endswith(b"\n"):  # a kill cut the last line short
            text = text[: text.rfind(b"\n") + 1]
            file.truncate(len(text))
        lines = [json.loads(line) for line in text.splitlines()]
        if lines and lines[0]["plan"] != plan and anew:  # an archive was repaired: indexing loses nothing but time
            file.truncate(0)
            lines = []
        if not lines:
            self._write({"plan": plan})
        elif lines[0]["plan"] != plan:
            remedy = "finish that with its own command, or remove it"
            raise BadData(f"{out} holds an unfinished job on other pictures, or of other sizes: {remedy}")
        self._lines = lines[1:]

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def shards(self, split: str) -> list[Shard]:
        return [Shard(*line["shard"]) for line in self._lines if line["split"] == split and line["shard"]]

    def next(self, split: str) -> int:
        return next((int(line["next"]) for line in reversed(self._lines) if line["split"] == split), 0)

    def first_bad(self, split: str) -> str:
        bad = [(name, why) for line in self._lines if line["split"] == split for name, why in line["bad"].items()]
        return f"{bad[0][0]}: {bad[0][1]}" if bad else "there is none"

    def rows(self, shard: str) -> np.ndarray[Any, Any]:
        rows: np.ndarray[Any, Any] = np.load(self.out / f".{shard}.npy", allow_pickle=False)
        return rows

    def add(
        self, split: str, shard: Shard | None, rows: list[tuple[int, int, int]], *, next_place: int, bad: dict[str, str]
    ) -> None:
        if shard is not None:
            with placed(self.out / f".{shard.name}.npy") as file:
                np.save(file, np.array(rows, _ROW), allow_pickle=False)
        line = {"split": split, "shard": shard, "next": next_place, "bad": bad}
        self._write(line)
        self._lines.append(json.loads(json.dumps(line)))

    def finish(self, classes: tuple[str, ...], *, paths: bool, base: str = "") -> None:
        columns = {split: {name: self._join(split, name) for name in COLUMNS} for split in SPLITS}
        bad = {name: why for line in self._lines for name, why in line["bad"].items()}
        if bad:
            with placed(self.out / BAD_SAMPLES) as file:
                file.writelines(json.dumps({"name": name, "reason": bad[name]}).encode() + b"\n" for name in bad)
        splits = {split: self.shards(split) for split in SPLITS}
        held = Manifest(classes, paths, len(bad), base, self._plan, splits, columns)
        with placed(self.out / MANIFEST) as file:
            file.write(held.text().encode())

    def _join(self, split: str, column: str) -> str:
        """Writes one column of the index from the rows of all shards; gives its sha256."""
        shards, digest = self.shards(split), hashlib.sha256()
        start = io.BytesIO()
        shape = (sum(shard.samples for shard in shards),)
        np.lib.format.write_array_header_1_0(start, {"descr": COLUMNS[column], "fortran_order": False, "shape": shape})
        with placed(self.out / f"{split}.{column}.npy") as file:
            for part in itertools.chain([start.getvalue()], (self.rows(s.name)[column].tobytes() for s in shards)):
                digest.update(part)
                file.write(part)
        return digest.hexdigest()
