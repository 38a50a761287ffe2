"""Images on disk, or the digits in scikit-learn: which pictures there are, their labels, and one picture decoded.

Read from the top: one picture (`open_image`), one list of labelled pictures (`Images`), and where such lists come from
(`digits`, `folder`).  `batches.py` makes tensors of them.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from lambdanets.decode import BadData, DiskFault, open_image
from lambdanets.listing import LAYOUTS, Listing, _folders, _parts, passed_over
from lambdanets.order import hash_of

from .errors import SHOWN, some

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


def folder(path: str | Path, *, val_frac: float = 0.1, seed: int = 0, allow_sources: Sequence[str] = ()) -> FolderData:
    """Lists a folder of pictures: PATH/train/CLASS/... with PATH/val/CLASS/..., or PATH/CLASS/... split here.

    A folder or URL of shards (`shards.open_shards`, with allow_sources) is recognised by its manifest, and keeps the
    split it was given.
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
            return shards.open_shards(path, allow_sources=allow_sources)
        if not root.is_dir():
            raise BadData(f"{root} {'is not a folder' if root.exists() else 'does not exist'}: {LAYOUTS}")
    except OSError as error:
        raise DiskFault(str(root), f"cannot be read: {error.strerror}") from error
    if (archives := sorted(root.glob("*.tar"))) and not _folders(root):
        raise BadData(f"{root} holds {len(archives):,} archives and no {shards.MANIFEST}: lambdanets index {root}")
    listing = Listing(root)
    parts = _parts(root)
    if not parts.train and (held := parts.without_train):
        remedy = "if it is a class, put the folders of all classes into a folder train/"
        raise BadData(f"{root} has {some(held)} but no train/ with class folders in it: {LAYOUTS}; {remedy}")
    train, here = listing.classes(parts.train), root / parts.train
    ignored = listing.ignored
    if not any(train.values()):
        raise BadData(f"no images in the class folders of {here}: {LAYOUTS}{passed_over(ignored)}")
    if empty := [name for name, files in train.items() if not files]:
        raise BadData(f"no images in these classes of {here}: {some(empty)}; add or remove{passed_over(ignored)}")
    if len(train) < 2:
        raise BadData(f"only one class in {here}: {some(train)}; a classifier needs two: {LAYOUTS}")
    if parts.train and parts.val:
        val, there = listing.classes(parts.val), root / parts.val
        if unknown := [name for name in val if name not in train]:
            known = f"the {len(train):,} classes of {here} are {some(train)}"
            raise BadData(f"classes in {there} that training lacks: {some(unknown)}; {known}; rename or remove them")
        if not any(val.values()):
            raise BadData(f"no images in {there}: fill it, or remove it to split {here}{passed_over(ignored)}")
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
    parts, listing = _parts(root), Listing(root)
    place = parts.val if parts.val and _folders(root / parts.val) else ""
    if parts.train and not place:
        there = root / parts.train
        raise BadData(f"{root} has {parts.train}/ and no held-out folder beside it: to take all of that, give {there}")
    held = {name: files for name, files in listing.classes(place).items() if files}
    if not held:
        passed = passed_over(listing.ignored)
        raise BadData(f"no images in the class folders of {root / place}: expected CLASS/*.jpg there{passed}")
    listing.one_label_a_file(held)
    images = _files(root, tuple(held), held)
    beside = listing.beside(parts) if place else ""
    return images, f"all {len(images):,} images of {root / place}{beside}{passed_over(listing.ignored)}"


def _files(root: Path, classes: tuple[str, ...], files: dict[str, list[str]]) -> Images:
    labelled = [(name, label) for label, of in enumerate(classes) for name in files.get(of, [])]
    return _Files(classes, [name for name, _ in labelled], [label for _, label in labelled], root)


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
