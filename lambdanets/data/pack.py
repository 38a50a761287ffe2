"""Shards written: pictures packed into archives, or an index made for archives that others wrote.

Both go shard by shard. A finished shard is a line of the journal in the target folder; a job that was killed goes on
from there and ends, byte for byte, where the undisturbed one does.  The manifest is written last.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import multiprocessing
import os
import re
import stat
import tarfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
from PIL import Image

from lambdanets.data.archive import MAX_MEMBER_BYTES, filesystem, join, on_this_machine, samples, whole
from lambdanets.data.decode import open_image
from lambdanets.data.folders import folder, tree
from lambdanets.data.images import Images
from lambdanets.data.index_files import column, file_beside
from lambdanets.data.journal import BAD_SAMPLES, Job, _job
from lambdanets.data.manifest import MANIFEST, SPLITS, UNLABELLED, Digest, Manifest, Shard, columns_of, manifest
from lambdanets.data.order import Order, natural
from lambdanets.data.shards import differing, is_shards, place_of
from lambdanets.errors import SHOWN, BadData, BadImage, DiskFault, some
from lambdanets.files import placed, read_file, serve_the_parent, to_stderr, tried_again

SHARD_BYTES = 1 << 30
MAX_BAD_FRAC = 0.001
_JPEG_QUALITY = 95
_BLOCK_IMAGES = 64  # read at a time, by each worker
_MOST_CLASSES = 1_000_000  # without their names; one digit too many in a label is no reason to make 10**9 of them
_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}
_END = bytes(2 * tarfile.BLOCKSIZE)


class Packed(NamedTuple):
    """What a data set of shards holds: images of each split, shards and their bytes, unreadable files left out."""

    place: str
    train_images: int
    val_images: int
    shards: int
    bytes: int
    left_out: int
    shards_at: str = ""
    """A URL that has to be allowed when the data set is opened, since the user will name the index alone."""
    unlabelled_images: int = 0
    with_others: int = 0
    """Of the unlabelled ones: beside so many lay something, a label maybe, that was passed over."""

    def __str__(self) -> str:
        images = f"{self.train_images:,} training and {self.val_images:,} validation images"
        use = "train"
        if self.unlabelled_images:
            others = f" ({self.with_others:,} with labels or other files beside them, ignored)"
            images = f"{self.unlabelled_images:,} images without labels{others if self.with_others else ''}"
            use = "label"
        bad = f"; {self.left_out:,} unreadable files left out, listed in {BAD_SAMPLES}" if self.left_out else ""
        there = f"; {use} with --data {self.place} --allow-source {self.shards_at}" if self.shards_at else ""
        return f"{self.place}: {images} in {self.shards:,} shards, {self.bytes:,} bytes{bad}{there}"


def pack(
    source: str | Path,
    out: str | Path,
    *,
    max_side_px: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    workers: int = 0,
    max_bad_frac: float = MAX_BAD_FRAC,
    unlabelled: bool = False,
) -> Packed:
    """Writes the pictures of a folder to shards in `out`, split as `data.folder` splits it, the training ones shuffled.

    unlabelled   all pictures below the folder, shuffled, without labels: for a teacher to label, `lambdanets label`
    max_side_px  a picture with a longer side is shrunk to it (upright, RGB, a JPEG of quality 95); other files, and all
                 where it is None, keep their bytes and get the suffix of what they are
    shard_bytes  a shard is closed before a picture that would make it larger
    workers      processes that read; 0: this one; the result does not depend on them
    max_bad_frac of a split: more pictures that cannot be decoded than this (and more than one) raise BadData
    Every picture is decoded once; one whose content is bad is left out, counted and listed with its reason.  Raises
    BadData: what `data.folder` refuses, too many bad pictures, an `out` that holds something else or is being written,
    a full disk; DiskFault: a picture that the disk did not give.  After that, or after a kill, the same call continues,
    and what was bad before is looked at again.
    """
    out = Path(out)
    if shard_bytes < 1 or (max_side_px is not None and max_side_px < 1) or workers < 0 or not 0 <= max_bad_frac <= 1:
        asked = f"shard_bytes is {shard_bytes}, max_side_px {max_side_px}, workers {workers}"
        raise ValueError(f"{asked}, max_bad_frac {max_bad_frac}: at least 1, 1 and 0, and 0 to 1")
    if is_shards(source):
        raise BadData(f"{source} is a data set of shards already: give the folder of pictures")
    if Path(source).resolve() in (out.resolve(), *out.resolve().parents):
        raise BadData(f"{out} lies in {source}, and would be one of its classes: choose another place")
    if unlabelled:
        images, how = tree(source)
        to_stderr(how)
        lists, classes = {UNLABELLED: images}, tuple[str, ...]()
    else:
        found = folder(source)
        lists, classes = {"train": found.train, "val": found.val}, found.train.classes
    plan: dict[str, Any] = {"max_side_px": max_side_px, "shard_bytes": shard_bytes}
    plan |= {split: images.fingerprint() for split, images in lists.items()}
    parts = {split: _part(split, images) for split, images in lists.items()}
    prepare = functools.partial(_of_folder, _root(next(iter(lists.values()))), max_side_px)
    return pack_parts(
        parts, out, prepare, classes, plan,
        shard_bytes=shard_bytes, workers=workers, max_bad_frac=max_bad_frac,
    )  # fmt: skip


class Part(NamedTuple):
    """One split as it is packed.

    names   of its pictures, of which no two in the data set are alike; they become the keys
    labels  for the index
    order   place in the shards -> position in `names`
    beside  position -> suffix and content of the member that follows the picture; None: none does
    """

    names: Sequence[str]
    labels: Sequence[int] | np.ndarray[Any, np.dtype[np.integer[Any]]]
    order: Order | range
    beside: Callable[[int], tuple[str, bytes]] | None


def _part(split: str, images: Images) -> Part:
    def label(index: int) -> tuple[str, bytes]:
        return "cls", str(int(images.labels[index])).encode()

    order = range(len(images)) if split == "val" else Order(len(images), seed=0, epoch=0)
    return Part(images.names, images.labels, order, None if split == UNLABELLED else label)


def pack_parts(
    parts: dict[str, Part],
    out: Path,
    prepare: Callable[[str], tuple[str, bytes] | BadImage],
    classes: tuple[str, ...],
    plan: dict[str, Any],
    *,
    shard_bytes: int = SHARD_BYTES,
    workers: int = 0,
    max_bad_frac: float = MAX_BAD_FRAC,
    files: Callable[[set[str]], dict[str, str]] | None = None,
) -> Packed:
    """`pack`, of any pictures with anything beside them.

    parts    of "train" and "val", or of "unlabelled" alone
    prepare  name -> suffix and bytes of a picture's file, see `prepared`; travels to the workers
    plan     what is asked for, as JSON: a job of another plan in `out` is refused
    files    writes what lies beside the manifest, once it is known which names were left out: file -> sha256
    """
    with _job(out, plan, shared=False) as job:
        if job is not None:
            job.forget_repaired(prepare)
            for split, part in parts.items():
                with contextlib.closing(_items(part, job.next(split), prepare, workers)) as items:
                    _pack_split(job, split, part, items, shard_bytes, max_bad_frac)
            left_out = {name for split in parts for name in job.bad(split)}
            beside = None if files is None else files(left_out)
            job.finish(classes, paths=True, files=beside, splits=parts)
    return _result(str(out), manifest(str(out)))


def _pack_split(
    job: Job, split: str, part: Part, items: Iterator[_Item], shard_bytes: int, max_bad_frac: float
) -> None:
    number = len(job.shards(split))
    known = job.bad(split)
    n_images = len(part.names)
    _check_bad(known, {}, split, n_images, max_bad_frac, items)
    item = next(items, None)
    while item is not None:
        path = job.out / f"{split}-{number:05d}.tar"
        rows: list[tuple[int, int, int]] = []
        bad: dict[str, str] = {}
        digest = Digest()
        with placed(path) as file:
            while item is not None:
                if isinstance(item.found, BadImage):
                    bad[item.found.name] = item.found.reason
                    _check_bad(known, bad, split, n_images, max_bad_frac, items)
                else:
                    members, picture_bytes = _archived(
                        item.name, item.found, None if part.beside is None else part.beside(item.at)
                    )
                    if rows and digest.bytes + len(members) + len(_END) > shard_bytes:
                        break
                    rows.append((digest.bytes, picture_bytes, int(part.labels[item.at])))
                    file.write(members)
                    digest.update(members)
                item = next(items, None)
            digest.update(_END)
            file.write(_END)
        shard = digest.shard(path.name, len(rows)) if rows else None
        if shard is None:  # what was left could not be read
            path.unlink()
        number += 1
        job.add(split, shard, rows, next_place=n_images if item is None else item.place, bad=bad)
        known |= bad
    if not job.shards(split):
        raise BadData(f"none of the {n_images:,} images of {split} can be read; the first: {_listed(known, 1)}")


def _check_bad(
    known: dict[str, str], new: dict[str, str], split: str, n: int, max_bad_frac: float, items: Iterator[_Item]
) -> None:
    """Raises BadData where there are too many; a thousand more pictures are looked at, to name more than the first."""
    allowed = max(1, int(max_bad_frac * n))
    if len(known) + len(new) <= allowed:
        return
    bad = known | new
    for item in itertools.islice(items, 1000):
        if len(bad) >= SHOWN:
            break
        if isinstance(item.found, BadImage):
            bad[item.found.name] = item.found.reason
    found = f"at least {len(bad):,} of the {n:,} images of {split} cannot be read, {allowed:,} allowed"
    remedy = f"repair them, or raise --max-bad-frac (now {max_bad_frac:g}), and give the same command"
    raise BadData(
        f"{found}: {remedy}; after removing some, pack into a new folder; the first:\n  {_listed(bad, SHOWN)}"
    )


def _listed(bad: dict[str, str], shown: int) -> str:
    return some((f"{name}: {reason}" for name, reason in itertools.islice(bad.items(), shown)), between="\n  ")


def _root(images: Images) -> Path:
    root: Path = images.root  # type: ignore[attr-defined]  # a list of files
    return root


class _Item(NamedTuple):
    place: int
    at: int  # in the names
    name: str
    found: tuple[str, bytes] | BadImage


def _items(
    part: Part, first: int, prepare: Callable[[str], tuple[str, bytes] | BadImage], workers: int
) -> Generator[_Item, None, None]:
    """What is to be packed, from a place on: (suffix, bytes) of a picture, or why it cannot be read."""
    n_images = len(part.names)
    block = _BLOCK_IMAGES * max(1, workers)
    with contextlib.ExitStack() as stack:
        mapped: Callable[..., Any] = map
        if workers:
            pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), serve_the_parent)
            stack.callback(pool.shutdown, cancel_futures=True)  # after an error or Ctrl-C nobody wants the rest
            mapped = functools.partial(pool.map, chunksize=8)
        for start in range(first, n_images, block):
            places = range(start, min(start + block, n_images))
            ids = np.asarray(part.order[places.start : places.stop]).tolist()
            names = [part.names[index] for index in ids]
            try:
                for place, index, name, found in zip(places, ids, names, mapped(prepare, names), strict=True):
                    yield _Item(place, index, name, found)
            except BrokenProcessPool as error:
                remedy = "give the same command, with fewer --workers if memory is short: finished shards are kept"
                raise BadData(f"a process that reads pictures was killed: {remedy}") from error


def _of_folder(root: Path, max_side_px: int | None, name: str) -> tuple[str, bytes] | BadImage:
    return prepared(root / name, name, max_side_px)


def prepared(path: Path, name: str, max_side_px: int | None = None) -> tuple[str, bytes] | BadImage:
    """The picture's file read once, decoded from those bytes: all of it, since a cut file shows only then."""
    try:
        content = _content(path, name)
        image = open_image(content, name=name)
        if max_side_px is not None and max(image.size) > max_side_px:
            image.thumbnail((max_side_px, max_side_px), Image.Resampling.LANCZOS)
            file = io.BytesIO()
            image.save(file, "JPEG", quality=_JPEG_QUALITY)
            return "jpg", file.getvalue()
        with Image.open(io.BytesIO(content)) as stored:
            return _SUFFIXES[stored.format or ""], content
    except BadImage as error:
        return error


def _content(path: Path, name: str) -> bytes:
    def once() -> bytes:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise BadImage(name, "is a folder or a device, not a file")
        if found.st_size > MAX_MEMBER_BYTES:
            raise BadImage(name, f"has {found.st_size:,} bytes, {MAX_MEMBER_BYTES:,} allowed")
        return read_file(path, MAX_MEMBER_BYTES)

    try:
        return tried_again(once)
    except OSError as error:
        reason = f"cannot be read, though it was tried again: {error.strerror or error}"
        remedy = "nothing was concluded from that; give the same command when it can: finished shards are kept"
        raise DiskFault(name, f"{reason}; {remedy}") from error


def _archived(name: str, found: tuple[str, bytes], beside: tuple[str, bytes] | None) -> tuple[bytes, int]:
    """The members of a sample as bytes, and how many of those end with the picture's last one."""
    # WebDataset ends a key at the first dot; what is quoted here, ShardImages.called unquotes.
    key = quote(os.fsencode(name), safe="/ !#$&'()+,;=@[]^{}~").replace(".", "%2E")
    members = [_head(f"{key}.{suffix}", content) + content for suffix, content in filter(None, (found, beside))]
    return b"".join(map(_padded, members)), len(members[0])


def _head(name: str, content: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info.tobuf(tarfile.PAX_FORMAT)


def _padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % tarfile.BLOCKSIZE)


def index(
    where: str | Path,
    *,
    out: str | Path | None = None,
    classes: str | Path | None = None,
    allow_sources: Sequence[str] = (),
    unlabelled: bool = False,
) -> Packed:
    """Makes index and manifest for the archives `where`/*.tar; where they are there, compares every byte with them.

    where    a folder or URL; archives called val*, valid*, validation* or test* are the validation split
    out      a folder for index and manifest where `where` cannot be written; the data set is then opened there
    classes  a text file with a name a line; without it the classes are called 0, 1, ... up to the largest label
    allow_sources  URLs that a manifest may name as the place of the shards, besides `where`
    unlabelled  all archives, whatever they are called, are one list of pictures; what lies beside these, labels too, is
             passed over and counted
    Raises BadData naming the archive: damaged, cut, a member that `archive.header` refuses, a sample without picture or
    label; in a comparison, all archives that differ, the first ten by name.
    """
    base = str(where).rstrip("/")
    found, path, local = filesystem(base)
    if unlabelled and classes is not None:
        raise BadData("--classes names what labels mean, and --unlabelled ignores labels: leave one of them out")
    if found.exists(join(path, MANIFEST)):
        return _compared(base, allow_sources, unlabelled=unlabelled)
    listed = found.glob(join(path, "*.tar"), detail=True)
    sizes = {name.rpartition("/")[2]: int(entry["size"]) for name, entry in listed.items()}
    names = _by_split(base, sizes, unlabelled)
    if not local and out is None:
        raise BadData(f"{base} is not a folder of this machine: say where the index goes with --out FOLDER")
    known = None if classes is None else class_names(Path(classes))
    # Sizes are in the plan: an archive that changes on the way makes it another job.
    plan = {"archives": sizes, "classes": known} | ({"unlabelled": True} if unlabelled else {})
    with_others = 0
    with _job(Path(path if out is None else out), plan, shared=True) as job:
        if job is not None:
            last = max(_index_split(job, split, base, names[split], known) for split in names)
            home = "" if out is None else str(Path(path).resolve()) if local else base
            numbers = () if unlabelled else tuple(str(label) for label in range(last + 1))
            with_others = job.with_others(UNLABELLED)
            job.finish(known or numbers, paths=False, base=home, splits=names)
    home = str(where if out is None else out)
    return _result(home, manifest(home))._replace(with_others=with_others)


def _by_split(base: str, archives: Iterable[str], unlabelled: bool) -> dict[str, list[str]]:
    """Split -> its archives in natural order. Raises BadData where one has none."""
    ordered = sorted(archives, key=natural)
    if unlabelled:
        if not ordered:
            raise BadData(f"{base} has no archive: expected NAME.tar, with KEY.jpg in it")
        return {UNLABELLED: ordered}
    names: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name in ordered:
        names["val" if re.match(r"(val|valid|validation|test)(?![a-z])", name.lower()) else "train"].append(name)
    if not names["train"] or not names["val"]:
        counts = f"{len(names['train'])} archives to train on and {len(names['val'])} called val-... to validate"
        remedy = "both are needed, as in train-00000.tar and val-00000.tar; pictures without labels: --unlabelled"
        raise BadData(f"{base} has {counts}: {remedy}")
    return names


def _index_split(job: Job, split: str, base: str, names: list[str], classes: tuple[str, ...] | None) -> int:
    """Indexes what is not yet in the journal; gives the largest label."""
    for name in names[len(job.shards(split)) :]:
        digest, rows, with_others = Digest(), [], 0
        with whole(base, name) as file:
            for sample in samples(file, join(base, name), digest.update, labelled=split != UNLABELLED):
                n = _MOST_CLASSES if classes is None else len(classes)
                if sample.label >= n:
                    known = f"{n:,} classes" if classes is not None else "more need their names: --classes FILE"
                    allowed = f"labels run from 0 to {n - 1} ({known})"
                    raise BadData(f"{join(base, name)}: {sample.key!r} has the label {sample.label}: {allowed}")
                with_others += split == UNLABELLED and bool(sample.others)
                picture = sample.picture
                rows.append((picture.start, picture.head_bytes + picture.bytes, sample.label))
        if not rows:
            raise BadData(f"{join(base, name)} holds no sample: remove it")
        job.add(split, digest.shard(name, len(rows)), rows, next_place=0, bad={}, with_others=with_others)
    return max(int(job.rows(shard)["label"].max()) for shard in job.shards(split))


def class_names(path: Path) -> tuple[str, ...]:
    """The classes in a text file, a name a line. Raises BadData: it cannot be read, a name twice or none."""
    try:
        names = tuple(line.strip() for line in read_file(path).decode("utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise BadData(f"{path}: the class names cannot be read: {error}") from error
    if len(names) < 2 or len(set(names)) < len(names) or not all(names):
        raise BadData(f"{path} holds {len(names)} names, {len(set(names))} different: one a line, at least two")
    return names


def _compared(base: str, allow_sources: Sequence[str], *, unlabelled: bool) -> Packed:
    held = manifest(base)
    if unlabelled and held.labelled:
        remedy = "`lambdanets label` takes it as it is; to compare it with its manifest leave --unlabelled out"
        raise BadData(f"{base} is indexed already, with labels: {remedy}")
    home = place_of(base, held, allow_sources)
    missing = differing(home, held, heads=False)
    wrong = []
    for file in held.files:
        try:
            file_beside(base, held, file)
        except BadData as error:
            wrong.append(str(error))
    for split in held.splits:
        columns: list[np.ndarray[Any, Any]] = []
        for name in columns_of(split):
            try:
                columns.append(column(base, held, split, name))
            except BadData as error:
                wrong.append(str(error))
        first = 0
        for shard in held.splits[split]:
            whole_index = len(columns) == len(columns_of(split))
            of_shard = [of[first : first + shard.samples] for of in columns] if whole_index else None
            first += shard.samples
            if shard.name in missing:
                wrong.append(f"{join(home, shard.name)} {missing[shard.name]}")
            elif (why := _differs(home, shard, of_shard, labelled=held.labelled and not held.files)) is not None:
                wrong.append(why)
    if wrong:
        listed = some(wrong, between="\n  ")
        raise BadData(f"{len(wrong):,} files of {base} are damaged or changed:\n  {listed}")
    return _result(base, held)


def _differs(home: str, shard: Shard, columns: list[np.ndarray[Any, Any]] | None, *, labelled: bool) -> str | None:
    """How an archive, read from end to end, differs from the manifest and from its part of the index."""
    where, digest, count, first = join(home, shard.name), Digest(), 0, None
    try:
        with whole(home, shard.name) as file:
            for sample in samples(file, where, digest.update, labelled=labelled):
                if columns is not None and first is None and count < shard.samples:
                    picture = sample.picture
                    told = tuple(int(of[count]) for of in columns)
                    has = (picture.start, picture.head_bytes + picture.bytes, sample.label)[: len(told)]
                    if has != told:
                        names = "start, bytes, label" if len(told) > 2 else "start, bytes"
                        first = f"{where}: ({names}) of {sample.key!r} are {has}, the index says {told}"
                count += 1
    except BadData as error:
        return str(error)
    seen = digest.shard(shard.name, count)
    if not shard.head:  # of an older version
        seen = seen._replace(head="")
    return first if seen == shard else f"{where}: found {seen[1:]}, the manifest says {shard[1:]}"


def _result(place: str, held: Manifest) -> Packed:
    shards = [shard for of in held.splits.values() for shard in of]
    train, val, unlabelled = (
        sum(shard.samples for shard in held.splits.get(split, ())) for split in (*SPLITS, UNLABELLED)
    )
    away = held.base if held.base and not on_this_machine(held.base) else ""
    return Packed(place, train, val, len(shards), sum(shard.bytes for shard in shards), held.left_out, away, unlabelled)
