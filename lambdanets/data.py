"""Images on disk, or the digits in scikit-learn: which pictures there are, their labels, and one picture decoded.

Read from the top: one picture (`open_image`), one list of labelled pictures (`Images`), and where such lists come from
(`digits`, `folder`).  `batches.py` makes tensors of them.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import stat
import warnings
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from .errors import SHOWN, some
from .files import tried_again

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp"})
"""Files of a folder that are considered, in any case of letters; what a file really is, its content decides."""

MAX_IMAGE_PX = 50_000_000
"""Width times height above which a picture is refused by its header, undecoded."""

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_SYSTEM_NAMES = frozenset({"__MACOSX", "Thumbs.db", "desktop.ini", "@eaDir"})
_VAL_FOLDERS = ("val", "valid", "validation", "test")
CHUNK_IMAGES = 1 << 20
_LAYOUTS = "expected PATH/train/CLASS/*.jpg and PATH/val/CLASS/*.jpg, or PATH/CLASS/*.jpg"
# EXIF tag 0x0112 -> what turns the stored picture upright.  ImageOps.exif_transpose rewrites all tags besides, and
# fails where one of the others is broken.
_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(ValueError):
    """One picture cannot be read: `name` says which, `reason` why, `str()` both.

    >>> str(BadImage("cats/1.jpg", "the file is empty"))
    'cats/1.jpg: the file is empty'
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # both in args: the error travels from a worker process unchanged
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class BadData(ValueError):
    """The data set as a whole is unusable; the message says what to do about it."""


class DiskFault(BadData):
    """A file could not be read, though it was tried again: nothing is known of its content.

    The fault is the machine's or the network's (a folder that is away, EIO, EACCES), not the picture's, so nothing may
    be concluded from it: no substitute, no line in a list of bad pictures. `name` says which file, `reason` why.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def open_image(source: str | Path | bytes, *, name: str | None = None, max_px: int = MAX_IMAGE_PX) -> Image.Image:
    """Decodes one picture to 8-bit RGB, upright, whatever its file is called.

    source  a path, or the bytes of a file: JPEG, PNG, WebP, GIF or BMP, recognised by content
    name    what errors call it (default: the path)
    max_px  largest width x height; read from the header, nothing is decoded above it

    Of an animation the first frame; transparency is composited on white; 16-bit grey is scaled, not clipped; CMYK is
    converted as Pillow does; the EXIF orientation is applied; colour profiles are not.
    Raises BadImage with a plain reason for content that is no such picture: empty, cut off, another format, too large;
    DiskFault where the file cannot be read, which says nothing of its content: missing, forbidden, a fault of the disk,
    each tried again for two seconds.

    >>> file = io.BytesIO()
    >>> Image.new("RGBA", (3, 2), (255, 0, 0, 0)).save(file, "PNG")
    >>> open_image(file.getvalue()).getpixel((0, 0))
    (255, 255, 255)
    """
    shown = name if name is not None else "<bytes>" if isinstance(source, bytes) else str(source)
    try:
        return tried_again(lambda: _opened(source, shown, max_px))
    except OSError as error:
        raise DiskFault(shown, f"cannot be read: {error.strerror}") from error


def _opened(source: str | Path | bytes, name: str, max_px: int) -> Image.Image:
    """The picture. Raises BadImage for its content, OSError with the system's number for the disk."""
    try:
        with warnings.catch_warnings(), _file(source, name) as file:
            warnings.simplefilter("ignore")  # Pillow's bomb and metadata warnings: decided here, by max_px
            return _decode(file, name, max_px)
    except (BadImage, MemoryError):  # no memory is the machine's fault, not the picture's
        raise
    except OSError as error:
        if error.errno is not None:  # the system's; Pillow's own have no number
            raise
        raise BadImage(name, f"is broken or cut off: {error}") from error
    except Exception as error:  # Pillow's readers raise SyntaxError, struct.error, IndexError ... on broken files
        raise BadImage(name, f"is broken: {type(error).__name__}: {error}") from error


def _file(source: str | Path | bytes, name: str) -> io.BufferedIOBase:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    opened = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would be waited for
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise BadImage(name, "is a folder or a device, not a file")
    return os.fdopen(opened, "rb")


def _decode(file: io.BufferedIOBase, name: str, max_px: int) -> Image.Image:
    head = file.read(16)
    if not head:
        raise BadImage(name, "the file is empty")
    file.seek(0)
    try:
        image = Image.open(file, formats=_FORMATS)  # type: ignore[arg-type]  # reads the header only
    except UnidentifiedImageError:
        reason = f"is no JPEG, PNG, WebP, GIF or BMP image, or is cut off in its header: it begins with {head!r}"
        raise BadImage(name, reason) from None
    except Image.DecompressionBombError as error:
        raise BadImage(name, f"is too large to decode (max_px is {max_px:,}): {error}") from None
    width, height = image.size
    if width * height > max_px:
        raise BadImage(name, f"has {width} x {height} = {width * height:,} pixels, more than max_px = {max_px:,}")
    image.load()
    try:
        turn = _ORIENTATION.get(image.getexif().get(0x0112, 1))
    except Exception:  # broken metadata around a good picture: shown as stored
        turn = None
    rgb = _to_rgb(image)
    rgb.info.clear()  # else a later reader of the EXIF tag turns it again
    return rgb if turn is None else rgb.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, where convert("RGB") clips
        return image.convert("I").point(lambda level: level * (1 / 257) + 0.5).convert("L").convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


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


@dataclass(frozen=True, eq=False, repr=False)
class _Files(Images):
    root: Path

    def stamp(self) -> dict[str, str] | None:
        sizes, times, root = hashlib.sha256(), hashlib.sha256(), os.fspath(self.root)
        for name in self.names:
            try:
                found = os.stat(f"{root}/{name}")
                size, time_ns = found.st_size, found.st_mtime_ns
            except OSError:  # gone since: the reader says so
                size, time_ns = -1, -1
            sizes.update(b"%d\n" % size)
            times.update(b"%d %d\n" % (size, time_ns))
        return {"sizes": sizes.hexdigest(), "times": times.hexdigest()}

    def load(self, index: int) -> Image.Image:
        return open_image(self.root / self.names[index], name=self.names[index])


@dataclass(frozen=True, eq=False, repr=False)
class _Digits(Images):
    levels: Any  # (n, 8, 8) uint8 array

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(self.levels[index])


def digits() -> tuple[Images, Images]:
    """scikit-learn's 1,797 scanned digits, 8 x 8 px in 17 grey levels (0..255 here, mode "L"): 1,437 train, 360 test.

    The split is stratified and fixed; no training seed moves it.  Raises ImportError without scikit-learn.

    >>> train, test = digits()
    >>> len(train), len(test), train.classes[3], set(train.names) & set(test.names)
    (1437, 360, '3', set())
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError("the digits are scikit-learn's: pip install lambdanets[digits]") from error
    scans = load_digits()
    levels = (scans.images * (255 / 16)).round().astype("uint8")
    split = train_test_split(range(len(levels)), test_size=360, stratify=scans.target, random_state=0)
    classes = tuple(str(name) for name in scans.target_names)

    def part(ids: list[int]) -> Images:
        ids = sorted(ids)
        return _Digits(classes, [f"digits/{i:04d}" for i in ids], [int(scans.target[i]) for i in ids], levels[ids])

    return part(split[0]), part(split[1])


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


def absolute(path: str | Path) -> str:
    """What `folder` takes, written so that it means the same in another working folder; a URL stays as it is."""
    from . import shards

    text = str(path)
    if text.startswith(shards.STREAM):
        return shards.STREAM + absolute(text.removeprefix(shards.STREAM))
    return text if "://" in text else str(Path(path).resolve())


def folder(path: str | Path, *, val_frac: float = 0.1, seed: int = 0) -> FolderData:
    """Lists a folder of pictures: PATH/train/CLASS/... with PATH/val/CLASS/..., or PATH/CLASS/... split here.

    A folder or URL of shards (`shards.open_shards`) is recognised by its manifest, and keeps the split it was given.
    The validation folder is the first of val, valid, validation, test.  Without one, a picture is held out if a hash of
    (seed, name) falls below `val_frac`: a new file moves no other, except in a class so small that one side would stay
    empty (there the lowest hash validates, the highest trains).  Classes are the folders of train in natural order (2
    before 10, as timm; torchvision's ImageFolder has 10 before 2).  Folders inside a class are searched, links are
    followed.  A class without validation pictures keeps its label, and `how` names it.

    Raises BadData for what cannot be trained on: no folder, no pictures, fewer than two classes, an empty class, a
    class of one picture that would have to be split, a validation class unknown to train.
    """
    root = Path(path)
    if not 0 < val_frac < 1:
        raise ValueError(f"val_frac is {val_frac}: it must lie between 0 and 1")
    from . import shards  # here: it reads pictures with this module

    if shards.is_shards(path):
        return shards.open_shards(path)
    if not root.is_dir():
        raise BadData(f"{root} {'is not a folder' if root.exists() else 'does not exist'}: {_LAYOUTS}")
    if (archives := sorted(root.glob("*.tar"))) and not _folders(root):
        raise BadData(f"{root} holds {len(archives):,} archives and no {shards.MANIFEST}: lambdanets index {root}")
    ignored: dict[str, list[str]] = defaultdict(list)
    places = {name.lower(): name for name in _folders(root)}
    train_place = places.get("train", "")
    if train_place and not _folders(root / train_place):
        train_place = ""  # pictures of railways: "train" is a class here
    val_place = next((places[name] for name in _VAL_FOLDERS if name in places), "")
    if val_place and not train_place and ("train" in places or _folders(root / val_place)):
        raise BadData(f"{root} has {val_place}/ but no train/ with class folders in it: {_LAYOUTS}")
    train, here = _classes(root, train_place, ignored), root / train_place
    if not any(train.values()):
        raise BadData(f"no images in the class folders of {here}: {_LAYOUTS}{_passed_over(ignored)}")
    if empty := [name for name, files in train.items() if not files]:
        raise BadData(f"no images in these classes of {here}: {some(empty)}; add or remove{_passed_over(ignored)}")
    if len(train) < 2:
        raise BadData(f"only one class in {here}: {some(train)}; a classifier needs two: {_LAYOUTS}")
    if train_place and val_place:
        val, there = _classes(root, val_place, ignored), root / val_place
        if unknown := [name for name in val if name not in train]:
            known = f"the {len(train):,} classes of {here} are {some(train)}"
            raise BadData(f"classes in {there} that training lacks: {some(unknown)}; {known}; rename or remove them")
        if not any(val.values()):
            raise BadData(f"no images in {there}: fill it, or remove it to split {here}{_passed_over(ignored)}")
        how = f"{train_place}/ and {val_place}/ as given"
    else:
        if single := [name for name, files in train.items() if len(files) == 1]:
            raise BadData(f"classes of {here} with one image, too few to hold one out: {some(single)}; add images")
        train, val = _split(train, val_frac, seed)
        how = f"no val folder, so {val_frac:.1%} of each class of {here} held out by a hash of (seed {seed}, name)"
    classes = tuple(train)
    train_images, val_images = _files(root, classes, train), _files(root, classes, val)
    how += f": {len(train_images):,} training and {len(val_images):,} validation images of {len(classes):,} classes"
    if without := [name for name in classes if not val.get(name)]:
        how += f"; no validation images of {some(without)}"
    shown = {why: Ignored(len(names), sorted(names)[:SHOWN]) for why, names in ignored.items()}
    return FolderData(train_images, val_images, how, shown)


def val_or_all(path: str | Path) -> tuple[Images, str]:
    """Every picture of PATH/val/CLASS/... (or valid, validation, test), or else of PATH/CLASS/...; and a sentence.

    Classes are the folders that hold pictures, in natural order. Raises BadData where there are no pictures.
    """
    root = Path(path)
    places = {name.lower(): name for name in _folders(root)}
    val = next((places[name] for name in _VAL_FOLDERS if name in places), "")
    place = val if val and _folders(root / val) else ""
    ignored: dict[str, list[str]] = defaultdict(list)
    held = {name: files for name, files in _classes(root, place, ignored).items() if files}
    if not held:
        raise BadData(
            f"no images in the class folders of {root / place}: expected CLASS/*.jpg there{_passed_over(ignored)}"
        )
    images = _files(root, tuple(held), held)
    return images, f"all {len(images):,} images of {root / place}{_passed_over(ignored)}"


def _files(root: Path, classes: tuple[str, ...], files: dict[str, list[str]]) -> Images:
    labelled = [(name, label) for label, of in enumerate(classes) for name in files.get(of, [])]
    return _Files(classes, [name for name, _ in labelled], [label for _, label in labelled], root)


def _folders(place: Path) -> list[str]:
    return [entry.name for entry in os.scandir(place) if entry.is_dir() and not _hidden(entry.name)]


def _classes(root: Path, top: str, ignored: dict[str, list[str]]) -> dict[str, list[str]]:
    """Class -> its images below root/top, as sorted paths relative to root; the classes in natural order."""

    def refuse(error: OSError) -> None:  # os.walk would skip the folder silently
        raise BadData(f"{error.filename} cannot be listed: {error.strerror}")

    found: dict[str, list[str]] = {}
    seen: set[tuple[str, str]] = set()
    for place, inner, files in os.walk(root / top, onerror=refuse, followlinks=True):
        at = Path(place).relative_to(root)
        of = "".join(Path(place).relative_to(root / top).parts[:1])  # "" at the top
        here = (of, os.path.realpath(place))
        if here in seen:  # a link led back
            inner.clear()
            continue
        seen.add(here)
        if of:
            found.setdefault(of, [])
        for name in filter(_hidden, inner):
            ignored["hidden or system"].append(f"{(at / name).as_posix()}/")
        inner[:] = sorted(name for name in inner if not _hidden(name))
        for name in files:
            shown = (at / name).as_posix()
            if _hidden(name):
                ignored["hidden or system"].append(shown)
            elif Path(name).suffix.lower() not in IMAGE_SUFFIXES:
                ignored["no image suffix"].append(shown)
            elif not of:
                ignored["outside a class folder"].append(shown)
            else:
                found[of].append(shown)
    return {of: sorted(found[of]) for of in sorted(found, key=natural)}


def _split(
    files: dict[str, list[str]], val_frac: float, seed: int
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    train, val = {}, {}
    for of, names in files.items():
        rank = {name: hash_of("split", seed, name) / 2**64 for name in names}
        lowest, highest = min(names, key=rank.__getitem__), max(names, key=rank.__getitem__)
        held = {name for name in names if rank[name] < val_frac or name == lowest} - {highest}
        train[of] = [name for name in names if name not in held]
        val[of] = [name for name in names if name in held]
    return train, val


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in _SYSTEM_NAMES


def natural(name: str) -> tuple[list[str | int], str]:
    """A key that sorts 2 before 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)], name


def _passed_over(ignored: dict[str, list[str]]) -> str:
    return "".join(f"; {len(names):,} ignored ({why}): {some(names)}" for why, names in ignored.items())


def hash_of(*parts: str | int) -> int:
    """64 bits that depend on the parts alone, the same on every machine."""
    text = "/".join(str(part) for part in parts).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


class Order:
    """The ids 0..n_images-1 shuffled, a function of (seed, epoch); any part is computed when it is asked for.

    Nothing is stored: a keyed Feistel network on the pairs (a, b) with id = a * columns + b permutes a little more than
    n_images numbers, and a number beyond the last id is permuted again until it is one.

    >>> Order(5, seed=0, epoch=0)[0:5].tolist()
    [2, 4, 0, 1, 3]
    """

    _ROUNDS = 12  # places, and pairs of neighbours, look drawn by chance (chi-square) from 8 on

    def __init__(self, n_images: int, *, seed: int, epoch: int) -> None:
        self.n_images = n_images
        self._columns = max(1, math.isqrt(max(0, n_images - 1)) + 1)
        self._rows = -(-n_images // self._columns)
        self._keys = [np.uint64(hash_of("order", seed, epoch, part)) for part in range(self._ROUNDS)]

    def __len__(self) -> int:
        return self.n_images

    def __getitem__(self, part: slice) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The ids at these places, int64."""
        ids = self._permuted(np.arange(*part.indices(self.n_images), dtype=np.uint64))
        while (outside := ids >= self.n_images).any():  # ends: the walk follows the cycle that a place of ours is on
            ids[outside] = self._permuted(ids[outside])
        return ids.astype(np.int64)

    def _permuted(self, ids: np.ndarray[Any, np.dtype[np.uint64]]) -> np.ndarray[Any, np.dtype[np.uint64]]:
        rows, columns = np.uint64(self._rows), np.uint64(self._columns)
        row, column = np.divmod(ids, columns)
        for number, key in enumerate(self._keys):
            if number % 2:
                row = (row + _scrambled(column, key) % rows) % rows
            else:
                column = (column + _scrambled(row, key) % columns) % columns
        return row * columns + column


def _scrambled(values: np.ndarray[Any, np.dtype[np.uint64]], key: np.uint64) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """64 bits from 64 bits: the finishing steps of splitmix64, whose every output bit depends on every input bit."""
    values = (values + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + key  # wraps, as arrays of unsigned numbers do
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


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
