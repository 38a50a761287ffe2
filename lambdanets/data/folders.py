"""Folders of pictures, a folder a class: the lists of labelled pictures in them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lambdanets.data.decode import open_image
from lambdanets.data.images import FolderData, Ignored, Images
from lambdanets.data.listing import LAYOUTS, Listing, _folders, _parts, passed_over
from lambdanets.data.order import hash_of
from lambdanets.errors import SHOWN, BadData, DiskFault, some


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
    from lambdanets.data import shards  # here: it reads pictures with this module

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


def tree(path: str | Path) -> tuple[Images, str]:
    """Every picture below a folder, without labels (each has a 0), in the order of their paths; and a sentence.

    Raises BadData where there are none; DiskFault as `folder` does.
    """
    root, shown = Path(path), f"expected pictures in {path} or in folders below it"
    try:
        if not root.is_dir():
            raise BadData(f"{root} {'is not a folder' if root.exists() else 'does not exist'}: {shown}")
    except OSError as error:
        raise DiskFault(str(root), f"cannot be read: {error.strerror}") from error
    listing = Listing(root)
    names = listing.tree()
    passed = passed_over(listing.ignored)
    if not names:
        raise BadData(f"no images below {root}: {shown}{passed}")
    labels = np.broadcast_to(np.int32(0), len(names))  # without memory
    return _Files((), names, labels, root), f"all {len(names):,} images below {root}{passed}"


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
