"""Images on disk, or the digits in scikit-learn: which pictures there are, their labels, and one picture decoded.

Read from the top: one picture (`open_image`), one list of labelled pictures (`Images`), and where such lists come from
(`digits`, `folder`).  `batches.py` makes tensors of them.
"""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import json
import math
import os
import re
import stat
import struct
import warnings
from abc import ABC, abstractmethod
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
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
# How people call the parts of a data set; of several held-out folders the first of this list is used.
_TRAIN = ("train", "training", "trn", "trainval")
_HELD_OUT = (
    "val", "valid", "validation", "dev", "test", "testing", "tst", "eval", "evaluation", "holdout", "heldout",
)  # fmt: skip
_FIRST = ("train", "val", "valid", "validation", "test")  # a folder called just so, before any other spelling
_OF_OTHER_THINGS_TOO = frozenset({"dev", "eval", "evaluation", "holdout", "heldout"})  # with its other half only
_SAYS_NOTHING = re.compile(r"(data)?sets?|data|splits?|folder|images?|imgs?|pictures?|photos?")
_PICTURES = re.compile(r"(jpeg)?images?|imgs?|pictures?|photos?|rgb|inputs?|originals?")
_MASKS = re.compile(
    r"masks?|labels?|annot(ation)?s?|seg(mentation)?s?|segmentation(class|object)|gt|groundtruth|targets?|trimaps?|depth"
)
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


# What of a PNG or JPEG is looked at again where Pillow stumbled, see `_without_metadata`.
_PNG_HEAD, _JPEG_HEAD = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
_PNG_TURN_KEYS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
_MOST_TURN_BYTES, _MOST_SLIM_BYTES = 1 << 20, 1 << 29


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


class _TooLarge(BadImage):
    """By its header: nothing else of the file need be looked at."""


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


def open_image(
    source: str | Path | bytes, *, name: str | None = None, max_px: int = MAX_IMAGE_PX, known: bool = True
) -> Image.Image:
    """Decodes one picture to 8-bit RGB, upright, whatever its file is called.

    source  a path, or the bytes of a file: JPEG, PNG, WebP, GIF or BMP, recognised by content
    name    what errors call it (default: the path)
    max_px  largest width x height; read from the header, nothing is decoded above it
    known   the file was seen there before: a fault of the disk, a missing file too, is tried again for two seconds

    Of an animation the first frame; transparency is composited on white; 16-bit grey is scaled, not clipped; CMYK is
    converted as Pillow does; the EXIF orientation is applied; colour profiles are not. Other metadata plays no part,
    large or broken.
    Raises BadImage with a plain reason for content that is no such picture: empty, cut off, another format, too large;
    DiskFault where the file cannot be read, which says nothing of its content: missing, forbidden, a fault of the disk.

    >>> file = io.BytesIO()
    >>> Image.new("RGBA", (3, 2), (255, 0, 0, 0)).save(file, "PNG")
    >>> open_image(file.getvalue()).getpixel((0, 0))
    (255, 255, 255)
    """
    shown = name if name is not None else "<bytes>" if isinstance(source, bytes) else str(source)
    try:
        if not known:
            return _opened(source, shown, max_px)
        return tried_again(lambda: _opened(source, shown, max_px))
    except OSError as error:
        raise DiskFault(shown, f"cannot be read: {error.strerror}") from error


def _opened(source: str | Path | bytes, name: str, max_px: int) -> Image.Image:
    """The picture. Raises BadImage for its content, OSError with the system's number for the disk."""
    with warnings.catch_warnings(), _file(source, name) as file:
        warnings.simplefilter("ignore")  # Pillow's bomb and metadata warnings: decided here, by max_px
        found = _decoded(file, name, max_px)
        for keep_turn in (True, False):
            if isinstance(found, BadImage) and not isinstance(found, _TooLarge):
                slim = _without_metadata(file, keep_turn=keep_turn)
                again = found if slim is None else _decoded(slim, name, max_px)
                found = found if isinstance(again, BadImage) else again
    if isinstance(found, BadImage):
        raise BadImage(*found.args)
    return found


def _decoded(file: io.BufferedIOBase, name: str, max_px: int) -> Image.Image | BadImage:
    """The picture, or what is wrong with it. Raises OSError with the system's number for the disk."""
    try:
        return _decode(file, name, max_px)
    except BadImage as error:
        return error
    except MemoryError:  # the machine's fault, not the picture's
        raise
    except OSError as error:
        if error.errno is not None:  # the system's; Pillow's own have no number
            raise
        return BadImage(name, f"is broken or cut off: {error}")
    except Exception as error:  # Pillow's readers raise SyntaxError, struct.error, IndexError ... on broken files
        return BadImage(name, f"is broken: {type(error).__name__}: {error}")


def _file(source: str | Path | bytes, name: str) -> io.BufferedIOBase:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    reason = "is a folder or a device, not a file"
    try:
        opened = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would be waited for
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket
            raise BadImage(name, reason) from None
        raise
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise BadImage(name, reason)
    return os.fdopen(opened, "rb")


def _decode(file: io.BufferedIOBase, name: str, max_px: int) -> Image.Image:
    file.seek(0)
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
        raise _TooLarge(name, f"is too large to decode (max_px is {max_px:,}): {error}") from None
    width, height = image.size
    if width * height > max_px:
        raise _TooLarge(name, f"has {width} x {height} = {width * height:,} pixels, more than max_px = {max_px:,}")
    image.load()
    try:
        turn = _ORIENTATION.get(image.getexif().get(0x0112, 1))
    except Exception:  # broken metadata around a good picture: shown as stored
        turn = None
    rgb = _to_rgb(image)
    rgb.info.clear()  # else a later reader of the EXIF tag turns it again
    return rgb if turn is None else rgb.transpose(turn)


def _without_metadata(file: io.BufferedIOBase, *, keep_turn: bool) -> io.BytesIO | None:
    """A PNG or JPEG again with the parts alone that decide its pixels, and those that may say which side is up.

    For a picture at which Pillow stumbled: it may have been at the metadata, over its own limits or over damage. What
    is left out is passed over unread. None: nothing can be left out, or it is no such file, or too large.
    """
    file.seek(0)
    head = file.read(8)
    parts = _png_parts if head == _PNG_HEAD else _jpeg_parts if head[:2] == _JPEG_HEAD else None
    if parts is None:
        return None
    slim, left_out = io.BytesIO(), False
    for part in parts(file, keep_turn):
        left_out = left_out or part is None
        if slim.write(part or b"") and slim.tell() > _MOST_SLIM_BYTES:
            return None
    slim.seek(0)
    return slim if left_out else None


def _png_parts(file: io.BufferedIOBase, keep_turn: bool) -> Iterator[bytes | None]:
    """The chunks of a PNG that matter, as they are; None for each that does not."""
    file.seek(len(_PNG_HEAD))
    yield _PNG_HEAD
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        decides = not kind[0] & 32 or kind == b"tRNS"  # without the bit 32 a chunk is critical
        if not decides and keep_turn and length <= _MOST_TURN_BYTES:
            body = file.read(length + 4)
            yield head + body if kind == b"eXIf" or body.startswith(_PNG_TURN_KEYS) else None
        elif not decides:
            file.seek(length + 4, os.SEEK_CUR)
            yield None
        else:
            yield head + file.read(min(length + 4, _MOST_SLIM_BYTES))


def _jpeg_parts(file: io.BufferedIOBase, keep_turn: bool) -> Iterator[bytes | None]:
    """The segments of a JPEG that matter, as they are; None for each that does not."""
    file.seek(len(_JPEG_HEAD))
    yield _JPEG_HEAD
    while len(head := file.read(4)) == 4 and head[0] == 0xFF and head[1] not in (0xFF, 0xDA):  # to the first scan
        (length,) = struct.unpack(">H", head[2:])
        body = file.read(max(0, length - 2))
        is_metadata = 0xE0 <= head[1] <= 0xEF or head[1] == 0xFE  # APP0 to APP15, a comment
        turns = head[1] in (0xE0, 0xE1) and body.startswith((b"JFIF", b"Exif", b"http://ns.adobe.com/xap/"))
        adobe = head[1] == 0xEE  # says what the colours mean
        yield head + body if not is_metadata or adobe or (keep_turn and turns) else None
    yield head + file.read(_MOST_SLIM_BYTES)


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


@dataclass(frozen=True, eq=False, repr=False)
class _Files(Images):
    root: Path

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
    The parts may be called as people call them, in any case: Training, train_images, val2017, testing, seg_train beside
    seg_test. The validation folder is the first of val, valid, validation, test, then of other spellings, in the order
    val, valid, validation, dev, test, eval; `how` names what lies beside the two and is not used.  Without one, a
    picture is held out if a hash of (seed, name) falls below `val_frac`: a new file moves no other, except in a class
    so small that one side would stay empty (there the lowest hash validates, the highest trains).  Classes are the
    folders of train in natural order (2 before 10, as timm; torchvision's ImageFolder has 10 before 2).  Folders inside
    a class are searched, links are followed, but for those to a folder above.  A file that is met twice in a class, by
    a link of either kind, counts once.  A class without validation pictures keeps its label, and `how` names it.

    Raises BadData for what cannot be trained on: no folder, no pictures, fewer than two classes, an empty class, a
    class of one picture that would have to be split, a validation class unknown to train; one file under two labels, or
    in both parts; folders that can be read in two ways (all hold the same folders, pictures beside their masks).
    DiskFault: a folder that cannot be listed, a link that leads nowhere.
    """
    root = Path(path)
    if not 0 < val_frac < 1:
        raise ValueError(f"val_frac is {val_frac}: it must lie between 0 and 1")
    from . import shards  # here: it reads pictures with this module

    try:
        if shards.is_shards(path):
            return shards.open_shards(path)
        if not root.is_dir():
            raise BadData(f"{root} {'is not a folder' if root.exists() else 'does not exist'}: {_LAYOUTS}")
    except OSError as error:
        raise DiskFault(str(root), f"cannot be read: {error.strerror}") from error
    if (archives := sorted(root.glob("*.tar"))) and not _folders(root):
        raise BadData(f"{root} holds {len(archives):,} archives and no {shards.MANIFEST}: lambdanets index {root}")
    listing = _Listing(root)
    parts = _parts(root)
    if not parts.train and (held := parts.without_train):
        remedy = "if it is a class, put the folders of all classes into a folder train/"
        raise BadData(f"{root} has {some(held)} but no train/ with class folders in it: {_LAYOUTS}; {remedy}")
    train, here = listing.classes(parts.train), root / parts.train
    ignored = listing.ignored
    if not any(train.values()):
        raise BadData(f"no images in the class folders of {here}: {_LAYOUTS}{_passed_over(ignored)}")
    if empty := [name for name, files in train.items() if not files]:
        raise BadData(f"no images in these classes of {here}: {some(empty)}; add or remove{_passed_over(ignored)}")
    if len(train) < 2:
        raise BadData(f"only one class in {here}: {some(train)}; a classifier needs two: {_LAYOUTS}")
    if parts.train and parts.val:
        val, there = listing.classes(parts.val), root / parts.val
        if unknown := [name for name in val if name not in train]:
            known = f"the {len(train):,} classes of {here} are {some(train)}"
            raise BadData(f"classes in {there} that training lacks: {some(unknown)}; {known}; rename or remove them")
        if not any(val.values()):
            raise BadData(f"no images in {there}: fill it, or remove it to split {here}{_passed_over(ignored)}")
        listing.one_label_a_file(train, val)
        how = f"{parts.train}/ and {parts.val}/ as given"
    else:
        listing.one_label_a_file(train)
        if single := [name for name, files in train.items() if len(files) == 1]:
            raise BadData(f"classes of {here} with one image, too few to hold one out: {some(single)}; add images")
        train, val = _split(train, val_frac, seed)
        how = f"no val folder, so {val_frac:.1%} of each class of {here} held out by a hash of (seed {seed}, name)"
    classes = tuple(train)
    train_images, val_images = _files(root, classes, train), _files(root, classes, val)
    how += f": {len(train_images):,} training and {len(val_images):,} validation images of {len(classes):,} classes"
    if without := [name for name in classes if not val.get(name)]:
        how += f"; no validation images of {some(without)}"
    how += listing.beside(parts)
    shown = {why: Ignored(len(names), sorted(names)[:SHOWN]) for why, names in ignored.items()}
    return FolderData(train_images, val_images, how, shown)


def val_or_all(path: str | Path) -> tuple[Images, str]:
    """Every picture of PATH/val/CLASS/... (the held-out folder that `folder` takes), or else of PATH/CLASS/...; and a
    sentence.

    Classes are the folders that hold pictures, in natural order. Raises BadData where there are no pictures, and for
    what can be read in two ways, as `folder` does.
    """
    root = Path(path)
    parts, listing = _parts(root), _Listing(root)
    place = parts.val if parts.val and _folders(root / parts.val) else ""
    if parts.train and not place:
        there = root / parts.train
        raise BadData(f"{root} has {parts.train}/ and no held-out folder beside it: to take all of that, give {there}")
    held = {name: files for name, files in listing.classes(place).items() if files}
    if not held:
        passed = _passed_over(listing.ignored)
        raise BadData(f"no images in the class folders of {root / place}: expected CLASS/*.jpg there{passed}")
    listing.one_label_a_file(held)
    images = _files(root, tuple(held), held)
    beside = listing.beside(parts) if place else ""
    return images, f"all {len(images):,} images of {root / place}{beside}{_passed_over(listing.ignored)}"


class _Named(NamedTuple):
    """What a folder's name says of a part of a data set."""

    training: bool
    word: int  # its place in the list of such words
    rest: tuple[str, ...]  # what the name says besides: ("seg",) of seg_train
    sure: bool  # even where no other part lies beside it


def _named(name: str) -> _Named | None:
    """None where the name says nothing of a part, or of two (train_test)."""
    words = re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())
    found = []
    for at, word in enumerate(words):
        for part in (*_TRAIN, *_HELD_OUT):
            ending = word.removeprefix(part)
            if word.startswith(part) and (ending in ("", "s") or _SAYS_NOTHING.fullmatch(ending)):
                found.append((at, part, ending == "s"))
                break
    if len(found) != 1:
        return None
    at, part, plural = found[0]
    rest = tuple(word for place, word in enumerate(words) if place != at and not _SAYS_NOTHING.fullmatch(word))
    sure = not rest and not plural and part not in _OF_OTHER_THINGS_TOO
    training = part in _TRAIN
    return _Named(training, (_TRAIN if training else _HELD_OUT).index(part), rest, sure)


class _Parts(NamedTuple):
    """The folders that are parts of a data set; "" where there is none.

    without_train  where there is no training folder: folders whose names are those of other parts
    """

    train: str
    val: str
    without_train: list[str]


def _parts(root: Path) -> _Parts:
    """Which folders of a data set are its parts, by their names and by the class folders in them.

    Raises BadData where two could be the same part, or where it is open whether one is a part or a class.
    """
    folders = sorted(_folders(root), key=natural)
    named = {name: found for name in folders if (found := _named(name)) is not None}
    deep = {name for name in named if _folders(root / name)}  # without class folders "train" is a class of railways
    held = [name for name in deep if not named[name].training]
    trains = [
        name
        for name in deep
        if named[name].training and (named[name].sure or any(named[other].rest == named[name].rest for other in held))
    ]
    train = _only(root, named, trains, "training")
    rest = named[train].rest if train else ()
    held = [name for name in held if named[name].rest == rest and (train or named[name].sure)]
    held = [name for name in held if name.lower() in _FIRST or _holds_pictures(root / name)]
    val = _only(root, named, held, "held-out")
    if train and not val:  # one without class folders: `folder` says what is wrong with it
        val = _only(root, named, [name for name in named if name.lower() in _FIRST[1:] and name != train], "held-out")
    if train and not val and train.lower() not in _FIRST:
        others = [name for name in folders if name != train and _holds_pictures(root / name)]
        if others:
            raise BadData(
                f"{root} can be read in two ways: {train}/ holds the pictures to train on, or it is a class beside "
                f"{some(others)}. Rename it to train/ for the one, or put the folders of all classes into a folder "
                "train/ for the other"
            )
    without_train: list[str] = []
    if not train:
        halves = {(found.rest, found.training) for found in named.values()}
        both = {found.rest for found in named.values() if {(found.rest, True), (found.rest, False)} <= halves}
        all_named = len(folders) > 1 and all(name in named and not named[name].rest for name in folders)
        without_train = [
            f"{name}/"
            for name, found in named.items()
            if not found.training and (found.rest in both or all_named or (found.sure and name in deep))
        ]
    return _Parts(train, val, without_train)


def _only(root: Path, named: dict[str, _Named], found: list[str], part: str) -> str:
    """The first folder in the order that `folder` states; "" of none. Raises BadData where two are the first."""

    def order(name: str) -> tuple[int, bool, int]:
        plain = name.lower()
        return (_FIRST.index(plain) if plain in _FIRST else len(_FIRST)), bool(named[name].rest), named[name].word

    if not found:
        return ""
    first = min(map(order, found))
    if len(same := sorted(name for name in found if order(name) == first)) > 1:
        remedy = f"rename the one that is meant to {'train' if named[same[0]].training else 'val'}/"
        raise BadData(f"{root} has {len(same)} {part} folders, {some(same)}: join them, or {remedy}")
    return next(name for name in found if order(name) == first)


def _holds_pictures(place: Path) -> bool:
    return any(os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES for _, _, files in os.walk(place) for name in files)


def _files(root: Path, classes: tuple[str, ...], files: dict[str, list[str]]) -> Images:
    labelled = [(name, label) for label, of in enumerate(classes) for name in files.get(of, [])]
    return _Files(classes, [name for name, _ in labelled], [label for _, label in labelled], root)


def _entries(place: str | Path) -> tuple[os.stat_result, list[os.DirEntry[str]]]:
    """What the system knows of a folder, and what is in it. Raises DiskFault."""

    def listed() -> tuple[os.stat_result, list[os.DirEntry[str]]]:
        with os.scandir(place) as found:
            return os.stat(place), list(found)

    try:
        return tried_again(listed)
    except OSError as error:
        raise DiskFault(str(place), f"cannot be listed: {error.strerror}") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle
        return False


def _folders(place: Path) -> list[str]:
    return [entry.name for entry in _entries(place)[1] if _is_folder(entry) and not _hidden(entry.name)]


class _Listing:
    """The pictures below a folder, as they are found; `ignored` tells reason -> what was passed over."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ignored: dict[str, list[str]] = defaultdict(list)
        # Of every picture its device and number there, for `one_label_a_file`: as a link of either kind leads to it.
        self._names: list[str] = []
        self._devices, self._numbers = array("Q"), array("Q")

    def classes(self, top: str) -> dict[str, list[str]]:
        """Class -> its images below root/top, as sorted paths relative to root; the classes in natural order."""
        start = f"{top}/" if top else ""
        found: dict[str, list[str]] = {}
        inner: dict[str, Counter[str]] = defaultdict(Counter)  # class -> a folder in it ("": itself) -> its pictures
        visited: set[str] = set()
        seen: set[tuple[str, int, int]] = set()
        links: list[str] = []
        # Below `start`, each with the real places of the folders whose links lead there.
        waiting: list[tuple[str, tuple[str, ...]]] = [("", ())]
        while waiting:
            inside, came_by = waiting.pop()
            place = os.path.join(self.root, start, inside)
            about, entries = _entries(place)
            of, _, deeper = inside.rstrip("/").partition("/")
            if (of, about.st_dev, about.st_ino) in seen:
                self.ignored["a folder met before in its class, by a link"].append(start + inside)
                continue
            seen.add((of, about.st_dev, about.st_ino))
            visited.add(inside)
            pictures = found.setdefault(of, []) if of else []
            before, below = len(pictures), []
            for entry in entries:
                shown = f"{start}{inside}{entry.name}"
                if _is_folder(entry):
                    if _hidden(entry.name):
                        self.ignored["hidden or system"].append(f"{shown}/")
                    elif not entry.is_symlink():
                        below.append((f"{inside}{entry.name}/", came_by))
                    elif _leads_up(entry, from_places := (*came_by, os.path.realpath(place))):
                        self.ignored["a link to a folder above"].append(f"{shown}/")
                    else:
                        below.append((f"{inside}{entry.name}/", from_places))
                elif self._passes(entry.name, shown, outside=not of):
                    pictures.append(shown)
                    device, number = about.st_dev, entry.inode()
                    if entry.is_symlink():
                        links.append(shown)
                        device = number = 0  # found out below
                    self._names.append(shown)
                    self._devices.append(device)
                    self._numbers.append(number)
            if of:
                inner[of][deeper.partition("/")[0]] += len(pictures) - before
            waiting.extend(sorted(below, reverse=True))
        self._follow(links)
        classes = {of: sorted(found[of]) for of in sorted(found, key=natural)}
        self._refuse_masks(start, visited, classes)
        if not top:
            _refuse_two_readings(self.root, classes, inner)
        return classes

    def _passes(self, name: str, shown: str, *, outside: bool) -> bool:
        """Whether a file counts as a picture."""
        if _hidden(name):
            self.ignored["hidden or system"].append(shown)
        elif os.path.splitext(name)[1].lower() not in IMAGE_SUFFIXES:
            self.ignored["no image suffix"].append(shown)
        elif outside:
            self.ignored["outside a class folder"].append(shown)
        else:
            return True
        return False

    def _follow(self, links: list[str]) -> None:
        """Find out where links lead. Raises DiskFault where one leads nowhere: perhaps a disk is away."""

        def known() -> dict[str, os.stat_result]:
            return {name: os.stat(self.root / name) for name in links}

        if not links:
            return
        try:
            leads_to = tried_again(known)
        except OSError as error:
            what = f"is a link whose target cannot be read: {error.strerror}; remove it, or bring the target back"
            raise DiskFault(str(error.filename), what) from error
        for at, name in enumerate(self._names):
            if name in leads_to:
                self._devices[at], self._numbers[at] = leads_to[name].st_dev, leads_to[name].st_ino

    def beside(self, parts: _Parts) -> str:
        """Note the files beside the parts of a data set among the ignored; a half-sentence on the folders there."""
        unused: list[str] = []
        if not parts.train and not parts.val:
            return ""
        for entry in _entries(self.root)[1]:
            if not _is_folder(entry):
                self._passes(entry.name, entry.name, outside=True)
            elif _hidden(entry.name):
                self.ignored["hidden or system"].append(f"{entry.name}/")
            elif entry.name not in (parts.train, parts.val):
                unused.append(f"{entry.name}/")
        unused.sort(key=natural)
        return f"; not used, though beside: {some(unused)}" if unused else ""

    def one_label_a_file(self, *parts: dict[str, list[str]]) -> None:
        """Leave out the second name of a file in its class. Raises BadData where a file has two labels, or is in two
        parts: of each such pair both names are said."""
        devices, numbers = np.frombuffer(self._devices, np.uint64), np.frombuffer(self._numbers, np.uint64)
        order = np.lexsort((numbers, devices))
        ordered = np.stack([devices[order], numbers[order]])
        again = np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).all(axis=0))
        files: dict[tuple[int, int], set[str]] = defaultdict(set)
        for at in {int(place) for first in again for place in order[first : first + 2]}:
            about = self._about(self._names[at])  # some network disks give all files of a folder one number there
            files[about.st_dev, about.st_ino].add(self._names[at])
        double = [sorted(names) for names in files.values() if len(names) > 1]
        if not double:
            return
        owner = {
            name: (number, of)
            for number, part in enumerate(parts)
            for of, names in part.items()
            for name in {one for same in double for one in same}.intersection(names)
        }
        wrong, left_out = [], set()
        for names in double:
            owners = {owner[name]: name for name in reversed(names) if name in owner}
            if len(owners) > 1:
                wrong.append(" = ".join(sorted(owners.values())))
            else:
                left_out.update([name for name in names if name in owner][1:])
        if wrong:
            what = "has two labels, or is in both parts" if len(wrong) == 1 else "have two labels, or are in both parts"
            raise BadData(f"{len(wrong):,} file(s) of {self.root}, by links, {what}: {some(sorted(wrong))}; remove one")
        if left_out:
            self.ignored["the same file as another of its class, by a link"].extend(left_out)
        for part in parts:
            for of, names in part.items():
                part[of] = [name for name in names if name not in left_out]

    def _about(self, name: str) -> os.stat_result:
        try:
            return tried_again(lambda: os.stat(self.root / name))
        except OSError as error:
            raise DiskFault(name, f"cannot be read: {error.strerror}") from error

    def _refuse_masks(self, start: str, visited: set[str], classes: dict[str, list[str]]) -> None:
        """Raises BadData for masks/ beside images/ whose files have the same names."""
        kinds: dict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
        for place in sorted(visited):
            parent, _, name = place.rstrip("/").rpartition("/")
            plain = re.sub(r"[\W_]", "", name.lower())
            for number, pattern in enumerate((_PICTURES, _MASKS)):
                if pattern.fullmatch(plain):
                    kinds[parent][number].append(place)
        for images, masks in (pair for of in kinds.values() for pair in itertools.product(*of)):
            held = [name for of in {images.partition("/")[0], masks.partition("/")[0]} for name in classes.get(of, [])]
            stems = _stems(held, start + images), _stems(held, start + masks)
            both = stems[0] & stems[1]
            if both and 2 * len(both) >= len(stems[1]):
                raise BadData(
                    f"{self.root / start / masks} holds files of the same names as those of "
                    f"{self.root / start / images} ({some(sorted(both))}): masks or annotations of those pictures, and "
                    f"not pictures of a class. Move them out of {self.root}; if they are pictures, give the folder "
                    "another name"
                )


def _stems(names: Iterable[str], below: str) -> set[str]:
    stems = (os.path.splitext(name.removeprefix(below))[0].lower() for name in names if name.startswith(below))
    return {re.sub(r"[\W_]*(masks?|labels?|seg(mentation)?|gt|annotations?)$", "", stem) for stem in stems}


def _leads_up(link: os.DirEntry[str], places: Iterable[str]) -> bool:
    """Whether a link leads to one of these places or to a folder above one."""
    target = os.path.join(os.path.realpath(link.path), "")
    return any(f"{place}/".startswith(target) for place in places)


def _refuse_two_readings(root: Path, classes: dict[str, list[str]], inner: dict[str, Counter[str]]) -> None:
    """Raises BadData where the folders of a data set may be its parts and not its classes."""
    within = {of: {name: n for name, n in inner[of].items() if name and n} for of, names in classes.items() if names}
    for of, names in within.items():
        parts = [found for name in names if (found := _named(name)) is not None and found.sure]
        if {part.training for part in parts} == {True, False}:
            raise BadData(f"{root / of} holds {some(names)}: the parts come first, then the classes: {_LAYOUTS}")
    sets = {frozenset(names) for names in within.values()}
    most_inside = 2 * sum(sum(names.values()) for names in within.values()) > sum(map(len, classes.values()))
    if len(within) > 1 and len(sets) == 1 and len(same := sorted(next(iter(sets)), key=natural)) > 1 and most_inside:
        outer, first = list(within), next(iter(within))
        raise BadData(
            f"{root} can be read in two ways, since {some(outer)} all hold the same folders ({some(same)}). If those "
            f"are the classes, and {some(outer, 2)} parts: rename these to train/ and val/, or join them in one. If "
            f"{some(outer, 2)} are the classes: put them all into a folder train/ ({root / 'train' / first})"
        )


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
