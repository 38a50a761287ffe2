"""Where the COCO files and pictures of a data set lie, and its two parts, opened and looked at."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lambdanets.data.order import hash_of, natural
from lambdanets.data.shards import ShardImages
from lambdanets.detection.annotations import Annotations, read_annotations
from lambdanets.detection.check import Category, Kept, Wishes, check_file, check_names, other_case
from lambdanets.detection.coco import CocoImages, coco_images, write_clean
from lambdanets.detection.findings import Findings, counted
from lambdanets.detection.pictures import safe, same_pictures
from lambdanets.detection.shards import CocoShards, check_pairs, is_coco_shards, open_coco_shards
from lambdanets.errors import BadData, DiskFault, printable, some
from lambdanets.files import read_file

VAL_FRAC = 0.1
LAYOUTS = """DIR/annotations/instances_{train,val}2017.json with DIR/train2017/ and DIR/val2017/ (COCO's own)
DIR/{train,valid}/_annotations.coco.json beside the pictures (Roboflow's)
DIR/{train,val}.json with DIR/images/, or with names that start in DIR
one JSON file alone, itself or in DIR or DIR/annotations, its pictures there or in images/: about a tenth is held out"""

# Errors about a file as a whole; of all others something can be left out.
_NOT_MENDED = ("D3", "D4", "D5", "D18", "R75")
_ROBOFLOW = "_annotations.coco.json"
_HELD_OUT = ("valid", "val", "validation")
_INSTANCES = re.compile(r"instances_(train|val)(\w*)\.json")
_HEAD_BYTES = 1 << 16
_SEEN = 500
_CONVERTED = {  # the same as in docs/detection.md
    "LabelMe": """    pip install labelme2coco, and in the folder above that of the pictures:
    import labelme2coco
    labelme2coco.convert("labelme", ".", 0.9)""",
    "YOLO": """    pip install supervision, and:
    import supervision as sv
    found = sv.DetectionDataset.from_yolo("yolo/images", "yolo/labels", "yolo/data.yaml", force_masks=True)
    found.as_coco(images_directory_path="coco/images", annotations_path="coco/train.json")""",
    "Pascal VOC": """    pip install supervision, and:
    import supervision as sv
    found = sv.DetectionDataset.from_pascal_voc("voc/images", "voc/xml")
    found.as_coco(images_directory_path="coco/images", annotations_path="coco/train.json")""",
}
_KEYS = re.compile(rb'"(images|annotations|categories)"\s*:\s*\[')


class Source(NamedTuple):
    """A COCO file, and folders that its pictures' names may start from, or the archives that hold them."""

    file: Path
    roots: tuple[Path, ...]
    pictures: ShardImages | None = None

    def check(
        self, of: Annotations, part: str, categories: tuple[Category, ...], findings: Findings, wishes: Wishes
    ) -> Kept:
        if self.pictures is not None:
            check_pairs(of.names, self.pictures, self.file)
            wishes = replace(wishes, on_disk=False)
        return check_file(of, self.root(of), part, categories, findings, wishes)

    def images(self, kept: Kept) -> CocoImages:
        return coco_images(kept) if self.pictures is None else CocoShards.of(kept, self.pictures)

    def root(self, of: Annotations) -> Path:
        """The folder that has most of some twenty pictures; of equal ones the first."""
        names = [name for name in of.names[:: max(1, len(of.names) // 20)] if safe(name)]
        return max(self.roots, key=lambda root: sum((root / name).is_file() for name in names))


@dataclass(frozen=True)
class CocoData:
    """Two parts with the same classes, a sentence on what they are, and what was found wrong."""

    train: CocoImages
    val: CocoImages
    how: str
    findings: Findings


def is_coco(data: str | Path | None) -> bool:
    """Whether `open_coco` would find one of its layouts there, or shards of it; little is read. A URL is asked for its
    manifest, and BadData is raised where it has none.

    >>> is_coco("no/such/folder")
    False
    """
    if data is not None and is_coco_shards(data):
        return True
    try:
        return data is not None and _found(Path(data)) is not None
    except BadData:  # several at once: `open_coco` says so
        return True
    except OSError:
        return False


def open_coco(
    data: str | Path | None,
    *,
    annotations: str | Path | None = None,
    images: str | Path | None = None,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
    wishes: Wishes = Wishes(),  # noqa: B008  # frozen
) -> CocoData:
    """A COCO data set, looked at.

    data         a folder in one of LAYOUTS, one COCO file, or the folder or URL that `pack_coco` wrote
    annotations  a COCO file in any place, instead; a tenth of its pictures is held out
    images       the folder that its file names start from (default: found beside the file)
    seed         one file is split by a hash of (seed, image id): a new picture moves no other
    class_names  the classes, in the order of their labels; objects of others are left out, and counted
    wishes       how strictly it is looked

    Labels are 1..n in the order of the ids in the training file; the held-out file's categories are matched by name.
    Raises BadData for what is not there, cannot be read or has a finding that is an error; DiskFault.
    """
    found = look_at_coco(
        data, annotations=annotations, images=images, seed=seed, class_names=class_names, wishes=wishes
    )
    found.findings.refuse(annotations or data)
    return found


def look_at_coco(
    data: str | Path | None,
    *,
    annotations: str | Path | None = None,
    images: str | Path | None = None,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
    wishes: Wishes = Wishes(),  # noqa: B008
) -> CocoData:
    """As `open_coco`, but errors are among the findings; what they are about is left out of the parts."""
    sources = _sources(data, annotations, images)
    findings = Findings()
    parts = ["train", "val"] if len(sources) == 2 else [""]
    files = [read_annotations(source.file) for source in sources]
    for of, part in zip(files, parts, strict=True):
        check_names(of, part, findings)
    categories = _classes(files[0], class_names)
    kept = [sources[0].check(files[0], parts[0], categories, findings, wishes)]
    if len(sources) == 2:
        others = _matched(files[1], categories, findings, whole=class_names is None)
        kept.append(sources[1].check(files[1], parts[1], others, findings, wishes))
        train, val = (source.images(of) for source, of in zip(sources, kept, strict=True))
        packed = sources[0].pictures is not None
        how = f"shards {data}: {_shown(train)} to train, {_shown(val)} held out"
        if not packed:
            how = f"{sources[0].file} to train ({_shown(train)}), {sources[1].file} held out ({_shown(val)})"
    else:
        train, val = _split(kept[0], seed, findings)
        how = f"{sources[0].file}, about a tenth of its pictures held out by a hash of (seed {seed}, image id): "
        how += f"{_shown(train)} to train, {_shown(val)} held out"
    pairs = []
    if sources[0].pictures is None:
        pairs = same_pictures((train.root, list(train.names)), (val.root, list(val.names)))
    what = "pictures that are in both parts, by their content"
    names = (f"{one} = {other}" for one, other in pairs)
    findings.add("D15", "", what, "AP on them says nothing; hold out others", "warning", len(pairs), names)
    how += f", of {len(categories):,} class{'' if len(categories) == 1 else 'es'}"
    return CocoData(train, val, how, findings)


def every_picture(
    data: str | Path | None,
    *,
    annotations: str | Path | None = None,
    images: str | Path | None = None,
    class_names: Sequence[str] | None = None,
    wishes: Wishes = Wishes(),  # noqa: B008
) -> tuple[CocoImages, str, Findings]:
    """What a run is judged by: the held-out part where the data has one, else every picture of its one file.

    class_names  those of the run, in its order; matched by name: what the data lacks has no objects, objects of other
                 classes are left out, both counted in the findings
    Raises BadData, DiskFault as `open_coco`.
    """
    source = _sources(data, annotations, images)[-1]
    findings = Findings()
    of = read_annotations(source.file)
    check_names(of, "val", findings)
    if class_names is None:
        categories = _classes(of, None)
    else:
        if not set(class_names) & set(of.category_names):
            known = f"its classes are {some(of.category_names)}, those asked for {some(class_names)}"
            hint = other_case(class_names, of.category_names)
            raise BadData(f"{source.file} has none of the classes: {known}{hint}")
        categories = _with_ids(of, class_names)
        wishes = replace(wishes, of_a_run=True)
    kept = source.check(of, "val", categories, findings, wishes)
    findings.refuse(annotations or data, "judged on")
    held = source.images(kept)
    where = f"all of {source.file}" if source.pictures is None else f"the held-out part of the shards {data}"
    return held, f"{where}: {_shown(held)}", findings


def _shown(images: CocoImages) -> str:
    crowds = f" and {counted(images.n_crowds, 'crowd')}" if images.n_crowds else ""
    return f"{counted(len(images), 'picture')} with {counted(images.n_objects, 'object')}{crowds}"


def read_class_names(file: str | Path) -> list[str]:
    """Class names, one a line; empty lines are passed over. Raises BadData."""
    try:
        lines = read_file(file, 1 << 20).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadData(f"{file} cannot be read as class names, one a line: {error}") from None
    return [line.strip() for line in lines if line.strip()]


def write_fixed(found: CocoData, out: str | Path) -> str:
    """Writes a data set without what was found wrong, in one of LAYOUTS: clean files, and links to the pictures.

    out  a new or empty folder
    Gives a line on what was written, and one on how much is left out. Raises BadData for what cannot be mended by
    leaving something out.
    """
    out = Path(out)
    if left := [row for row in found.findings.errors if row.id in _NOT_MENDED]:
        raise BadData(f"--fix cannot mend {some(f'{row.id} ({row.what})' for row in left)}: correct that first")
    train, val = found.train, found.val
    if isinstance(train, CocoShards):
        raise BadData("--fix links to pictures, and these lie in shards, which hold what is clean: nothing is written")
    if empty := [part.file for part in (train, val) if not part.n_objects]:
        raise BadData(f"--fix would leave no object in {empty[0]}: correct what is wrong with it first")
    one = train.file == val.file
    places = [("annotations.json", "images")] if one else [
        ("annotations/instances_train.json", "train"), ("annotations/instances_val.json", "val")
    ]  # fmt: skip
    written, gone = [], np.zeros(2, np.int64)
    try:
        (out if one else out / "annotations").mkdir(parents=True, exist_ok=True)
        if any(name != "annotations" for name in os.listdir(out)) or (not one and os.listdir(out / "annotations")):
            raise BadData(f"{out} is not empty: --fix takes a new folder")
        for (name, pictures), part in zip(places, [train.whole()] if one else [train, val], strict=True):
            os.symlink(part.root.resolve(), out / pictures, target_is_directory=True)
            write_clean(part, out / name)
            written.append(f"{out / name}: {_shown(part)}")
            gone += part.left_out
    except OSError as error:
        raise BadData(f"{out} cannot be written: {error}") from error
    left_out = f"{counted(int(gone[0]), 'picture')}, {counted(int(gone[1]), 'object')}" if gone.any() else "nothing"
    said = f"written, with links to the pictures: {'; '.join(written)}. Use it as --data {out}"
    return f"{said}\nleft out: {left_out}"


# ---- where things lie


def _sources(data: str | Path | None, annotations: str | Path | None, images: str | Path | None) -> list[Source]:
    """One file, or that of training and that which is held out."""
    if annotations is not None:
        file = Path(annotations)
        if images is not None and not Path(images).is_dir():
            raise BadData(f"{images} is no folder: the file names of {file} start from there")
        return [Source(file, _beside(file) if images is None else (Path(images),))]
    if data is None:
        raise ValueError("open_coco needs data or annotations")
    if is_coco_shards(data):
        if images is not None:
            raise BadData(f"{data} holds its pictures, in archives: leave --images-dir out")
        return [Source(file, (file.parent,), pictures) for file, pictures in open_coco_shards(data)]
    path = Path(data)
    try:
        found = _found(path)
    except OSError as error:
        raise DiskFault(str(path), f"cannot be read: {error.strerror}") from error
    if found is None:
        raise BadData(_nothing(path))
    return found if images is None else [Source(source.file, (Path(images),)) for source in found]


def _found(path: Path) -> list[Source] | None:
    if path.is_file():
        return [Source(path, _beside(path))] if path.suffix.lower() == ".json" and _looks_coco(path) else None
    if not path.is_dir():
        return None
    return _instances(path) or _roboflow(path) or _pair(path) or _alone(path)


def _instances(path: Path) -> list[Source] | None:
    names = [m for m in map(_INSTANCES.fullmatch, _names(path / "annotations")) if m]
    of = {part: {m[2]: m for m in names if m[1] == part} for part in ("train", "val")}
    years = sorted(set(of["train"]) & set(of["val"])) or sorted(of["train"])
    if not years:
        return None
    if len(years) > 1:
        held = some(f"instances_train{year}.json" for year in years)
        raise BadData(f"{path / 'annotations'} has {held}: which one? --annotations FILE --images-dir DIR takes one")
    found = []
    for part in ("train", "val"):
        if years[0] in of[part]:
            places = [path / f"{part}{years[0]}", path / "images" / f"{part}{years[0]}", path / part, path / "images"]
            roots = tuple(place for place in places if place.is_dir()) or (places[0],)
            found.append(Source(path / "annotations" / of[part][years[0]][0], roots))
    return found


def _roboflow(path: Path) -> list[Source] | None:
    train = path / "train" / _ROBOFLOW
    if not train.is_file():
        return None
    held = [path / name / _ROBOFLOW for name in _HELD_OUT if (path / name / _ROBOFLOW).is_file()]
    return [Source(file, (file.parent,)) for file in [train, *held[:1]]]


def _pair(path: Path) -> list[Source] | None:
    if not (path / "train.json").is_file():
        return None
    held = [path / f"{name}.json" for name in ("val", "valid", "validation") if (path / f"{name}.json").is_file()]
    files = [path / "train.json", *held[:1]]
    places: tuple[Path, ...] = (path / "images", path)
    if not (path / "images").is_dir():  # names that start in DIR, as labelme2coco writes them
        if not held:
            return None
        places = (path,)
    return [Source(file, places) for file in files] if all(map(_looks_coco, files)) else None


def _alone(path: Path) -> list[Source] | None:
    for place in (path, path / "annotations"):  # CVAT writes annotations/instances_default.json
        files = [place / name for name in _names(place) if name.lower().endswith(".json") and not name.startswith(".")]
        held = [file for file in files[:100] if _looks_coco(file)]
        if held:
            return [Source(held[0], _beside(held[0]))] if len(held) == 1 else None
    return None


def _beside(file: Path) -> tuple[Path, ...]:
    """Where the names of a file may start; Label Studio's have "images/" in front."""
    folder = file.resolve().parent
    places = [folder / "images", folder]
    if folder.name == "annotations":
        places += [folder.parent / "images", folder.parent]
    return tuple(place for place in places if place.is_dir())


def _names(path: Path) -> list[str]:
    try:
        return sorted(os.listdir(path), key=natural)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _looks_coco(file: Path) -> bool:
    """Whether one of COCO's lists begins near the file's beginning, or near its end: they may come after a long one."""
    try:
        with open(file, "rb") if file.is_file() else open(os.devnull, "rb") as opened:
            head = opened.read(_HEAD_BYTES)
            opened.seek(max(0, os.fstat(opened.fileno()).st_size - _HEAD_BYTES))
            return head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{") and bool(_KEYS.search(head + opened.read()))
    except OSError:
        return False


def _nothing(path: Path) -> str:
    if not path.exists():
        return f"{path} does not exist; a COCO data set is one of\n{LAYOUTS}"
    lines = [
        f"{path} is no COCO data set, which is one of",
        LAYOUTS,
        "or any file with --annotations FILE --images-dir DIR",
    ]
    if path.is_dir():
        names = _names(path)
        lines.append(f"found: {some(names) if names else 'nothing, the folder is empty'}")
        if hint := other_format(path):
            lines.append(hint)
    else:
        lines.append("found: a file without COCO's lists of images, annotations and categories")
    return "\n".join(lines)


def other_format(data: str | Path | None) -> str | None:
    """Where a folder holds files of LabelMe, YOLO or Pascal VOC: that it does, and how they are converted to COCO.

    >>> other_format("no/such/folder")
    """
    kind = None if data is None else _format_of(Path(data))
    return None if kind is None else f"these look like files of {kind}. To convert them to COCO:\n{_CONVERTED[kind]}"


def _format_of(path: Path) -> str | None:
    """By the first sign in a folder and two below it; a few hundred files are looked at."""
    seen = level = [path / name for name in _names(path)[:_SEEN]]
    for _ in range(2):
        level = [place / name for place in level[:20] if place.is_dir() for name in _names(place)[:20]]
        seen = seen + level
    for file in seen[:_SEEN]:
        suffix = file.suffix.lower()
        if suffix not in (".json", ".xml", ".txt", ".yaml", ".yml"):
            continue
        try:
            with open(file, "rb") if file.is_file() else open(os.devnull, "rb") as opened:
                head = opened.read(4096)
        except OSError:
            continue
        if suffix == ".json" and b'"shapes"' in head:
            return "LabelMe"
        if suffix == ".xml" and b"<annotation" in head:
            return "Pascal VOC"
        if suffix == ".txt" and re.match(rb"\s*\d+(\s+[01]?\.\d+(e-\d+)?){4}", head):
            return "YOLO"
        if suffix in (".yaml", ".yml") and re.search(rb"^(nc|names)\s*:", head, flags=re.MULTILINE):
            return "YOLO"
    return None


# ---- classes and parts


def _classes(of: Annotations, class_names: Sequence[str] | None) -> tuple[Category, ...]:
    """In the order of the ids, or as asked."""
    held: dict[str, int] = {}
    for at in np.argsort(of.category_ids, kind="stable").tolist():
        held.setdefault(of.category_names[at], int(of.category_ids[at]))
    if class_names is None:
        return tuple(Category(id, name) for name, id in held.items())
    if unknown := [name for name in class_names if name not in held]:
        hint = other_case(unknown, held)
        raise BadData(f"{of.file} has no classes {some(unknown)}: it has {some(held, 100)}{hint}")
    if not class_names or len(set(class_names)) < len(class_names):
        raise BadData(f"the class names asked for are {some(class_names)}: expected one or more, each once")
    return tuple(Category(held[name], name) for name in class_names)


def _matched(
    of: Annotations, categories: tuple[Category, ...], findings: Findings, *, whole: bool
) -> tuple[Category, ...]:
    """The same classes with the ids of the held-out file (D3); one that it lacks gets an id that it does not use."""
    held = {category.name: category.id for category in reversed(_classes(of, None))}
    moved = [name for id, name in categories if held.get(name, id) != id]
    what = "categories with another id than in the training file"
    findings.add("D3", "val", what, "matched by their names", "warning", len(moved), moved)
    names = {category.name for category in categories}
    used = set(of.categories[of.rows].tolist())
    if whole:
        unknown = [name for name, id in held.items() if name not in names and id in used]
        what = "categories of objects that the training file does not have"
        action = f"name them alike, or take --class-names{other_case(unknown, names)}"
        findings.add("D3", "val", what, action, "error", len(unknown), unknown)
    return _with_ids(of, [name for _, name in categories])


def _with_ids(of: Annotations, names: Sequence[str]) -> tuple[Category, ...]:
    """The classes of these names with the ids of the file; one that it lacks gets an id that it does not use."""
    held = {category.name: category.id for category in _classes(of, None)}
    free = itertools.count(max(0, *held.values()) + 1)
    return tuple(Category(held[name] if name in held else next(free), name) for name in names)


def _split(kept: Kept, seed: int, findings: Findings) -> tuple[CocoImages, CocoImages]:
    """A tenth of the pictures held out; at least one with objects, and one left to train on, where there are two."""
    ids = kept.of.image_ids[kept.pictures].tolist()
    rank = np.array([hash_of("split", seed, id) / 2**64 for id in ids])
    held = rank < VAL_FRAC
    single = kept.rows[~kept.of.crowd[kept.rows]]
    counts = np.bincount(kept.pictures_of[single], minlength=len(kept.of.names))[kept.pictures]
    with_objects = np.flatnonzero(counts > 0)
    if with_objects.size:
        by_rank = with_objects[np.argsort(rank[with_objects], kind="stable")]
        held[by_rank[0]] = True
        held[by_rank[-1]] = False
    train, val = coco_images(kept, kept.pictures[~held]), coco_images(kept, kept.pictures[held])
    if single.size and not val.n_objects:
        what = "picture with objects: none is left to hold out"
        names = [printable(kept.of.names[kept.pictures[at]]) for at in with_objects]
        findings.add("D18", "", what, "annotate a second one", "error", 1, names)
    return train, val
