"""Which files of a folder are pictures of which class: links, hidden files and doubtful layouts looked at."""

from __future__ import annotations

import itertools
import os
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lambdanets.data.order import natural
from lambdanets.errors import BadData, DiskFault, some
from lambdanets.files import tried_again

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp"})


"""Files of a folder that are considered, in any case of letters; what a file really is, its content decides."""


_SYSTEM_NAMES = frozenset({"__MACOSX", "Thumbs.db", "desktop.ini", "@eaDir"})


_PICTURES = re.compile(r"(jpeg)?images?|imgs?|pictures?|photos?|rgb|inputs?|originals?")


_MASKS = re.compile(
    r"masks?|labels?|annot(ation)?s?|seg(mentation)?s?|segmentation(class|object)|gt|groundtruth|targets?|trimaps?|depth"
)


LAYOUTS = "expected PATH/train/CLASS/*.jpg and PATH/val/CLASS/*.jpg, or PATH/CLASS/*.jpg"


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


class Listing:
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
        found, inner, visited = self._walk(start, one_class=False)
        classes = {of: sorted(found[of]) for of in sorted(found, key=natural)}
        self._refuse_masks(start, visited, classes)
        if not top:
            _refuse_two_readings(self.root, classes, inner)
        return classes

    def tree(self) -> list[str]:
        """All images below root, whatever its folders mean, as sorted paths relative to root. A file counts once, also
        where links lead to it."""
        found = {".": sorted(self._walk("", one_class=True)[0].get(".", []))}
        self.one_label_a_file(found)
        return found["."]

    def _walk(self, start: str, *, one_class: bool) -> tuple[dict[str, list[str]], dict[str, Counter[str]], set[str]]:
        """Class -> its images below root/start; class -> a folder in it ("": itself) -> its images; folders seen.

        one_class  False: the folders there are the classes. True: all is one class, called "."
        """
        found: dict[str, list[str]] = {}
        inner: dict[str, Counter[str]] = defaultdict(Counter)
        visited: set[str] = set()
        seen: set[tuple[str, int, int]] = set()
        links: list[str] = []
        # Below `start`, each with the real places of the folders whose links lead there.
        waiting: list[tuple[str, tuple[str, ...]]] = [("", ())]
        while waiting:
            inside, came_by = waiting.pop()
            place = os.path.join(self.root, start, inside)
            about, entries = _entries(place)
            of, _, deeper = (".", "", "") if one_class else inside.rstrip("/").partition("/")
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
        return found, inner, visited

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

    def beside(self, parts: Parts) -> str:
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
            raise BadData(f"{root / of} holds {some(names)}: the parts come first, then the classes: {LAYOUTS}")
    sets = {frozenset(names) for names in within.values()}
    most_inside = 2 * sum(sum(names.values()) for names in within.values()) > sum(map(len, classes.values()))
    if len(within) > 1 and len(sets) == 1 and len(same := sorted(next(iter(sets)), key=natural)) > 1 and most_inside:
        outer, first = list(within), next(iter(within))
        raise BadData(
            f"{root} can be read in two ways, since {some(outer)} all hold the same folders ({some(same)}). If those "
            f"are the classes, and {some(outer, 2)} parts: rename these to train/ and val/, or join them in one. If "
            f"{some(outer, 2)} are the classes: put them all into a folder train/ ({root / 'train' / first})"
        )


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in _SYSTEM_NAMES


def passed_over(ignored: dict[str, list[str]]) -> str:
    return "".join(f"; {len(names):,} ignored ({why}): {some(names)}" for why, names in ignored.items())


# How people call the parts of a data set; of several held-out folders the first of this list is used.
_TRAIN = ("train", "training", "trn", "trainval")


_HELD_OUT = (
    "val", "valid", "validation", "dev", "test", "testing", "tst", "eval", "evaluation", "holdout", "heldout",
)  # fmt: skip


_FIRST = ("train", "val", "valid", "validation", "test")  # a folder called just so, before any other spelling


_OF_OTHER_THINGS_TOO = frozenset({"dev", "eval", "evaluation", "holdout", "heldout"})  # with its other half only


_SAYS_NOTHING = re.compile(r"(data)?sets?|data|splits?|folder|images?|imgs?|pictures?|photos?")


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


class Parts(NamedTuple):
    """The folders that are parts of a data set; "" where there is none.

    without_train  where there is no training folder: folders whose names are those of other parts
    """

    train: str
    val: str
    without_train: list[str]


def _parts(root: Path) -> Parts:
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
    return Parts(train, val, without_train)


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
