"""What `make demo-detection` shows: nuclei in a micrograph, found one by one after a few minutes of training on a CPU.

The picture and its masks, drawn by people, lie in the wheel of stardist 0.9.2 (BSD-3), which is unpacked and not
installed; they are of the 2018 Data Science Bowl (Caicedo et al., Nature Methods 16, 2019).
"""

from __future__ import annotations

import io
import itertools
import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError

from lambdanets.detection.draw import draw
from lambdanets.detection.masks import decode, encode
from lambdanets.detection.precision import Detected
from lambdanets.errors import BadData, BadRun, printable
from lambdanets.files import write_atomically
from lambdanets.recipes.coco import DetectionRecipe
from lambdanets.recipes.coco import nuclei as nuclei_recipe

if TYPE_CHECKING:
    from lambdanets.detection.coco import CocoImages

TRAIN_COLUMNS, VIEW_PX, STEP_PX = 352, 192, 32
HELD_OUT_VIEWS = 3
SHOWN_SCORE = 0.5
PICTURE = "nuclei.png"

_PICTURE, _MASKS = "stardist/data/images/img2d.tif", "stardist/data/images/mask2d.tif"
_ENLARGED, _LETTERS_PX, _GAP_PX, _BLACK, _COLOURS = 2, 18, 6, 40, 192

Pixels = np.ndarray[Any, Any]


class View(NamedTuple):
    """A part of the picture that becomes a picture of the data set."""

    top: int
    left: int
    height: int
    width: int

    def of(self, pixels: Pixels) -> Pixels:
        return pixels[self.top : self.top + self.height, self.left : self.left + self.width]


def training_views(height: int) -> list[View]:
    """Squares of 192 px that overlap, a step of 32 px apart, in the left 352 columns."""
    tops, lefts = (range(0, side - VIEW_PX + 1, STEP_PX) for side in (height, TRAIN_COLUMNS))
    return [View(top, left, VIEW_PX, VIEW_PX) for top in tops for left in lefts]


def held_out_views(height: int, width: int) -> list[View]:
    """The columns from 352 on, all of them once: three parts, one above the other.

    >>> held_out_views(512, 512)[1]
    View(top=170, left=352, height=171, width=160)
    """
    cuts = [height * i // HELD_OUT_VIEWS for i in range(HELD_OUT_VIEWS + 1)]
    return [View(a, TRAIN_COLUMNS, b - a, width - TRAIN_COLUMNS) for a, b in itertools.pairwise(cuts)]


def nuclei(wheel: str | Path, folder: str | Path) -> Path:
    """Writes a COCO data set, FOLDER/train.json, FOLDER/val.json and FOLDER/images/*.png, from the stardist wheel.

    Raises BadData for a wheel without the two pictures, and for a folder in which there is such a set already; OSError.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            pixels, labels = (np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in (_PICTURE, _MASKS))
    except (zipfile.BadZipFile, KeyError, UnidentifiedImageError, FileNotFoundError, IsADirectoryError) as error:
        raise BadData(
            f"{printable(wheel)} is not the wheel of stardist 0.9.2, with {_PICTURE} and {_MASKS} ({error}): "
            "pip download --no-deps stardist==0.9.2"
        ) from error
    return write(pixels, labels, folder)


def write(pixels: Pixels, labels: Pixels, folder: str | Path) -> Path:
    """The data set of one picture (H, W), grey of 8 or 16 bits, and the number of the object at each pixel (0: none).

    The left 352 columns are for training, in overlapping views; the rest is held out, in three views without overlap.
    What an edge leaves of an object is an object to train on, as where training crops; held out it is one if at least
    half of the object's pixels are inside, and a smaller piece is marked as a crowd, not asked for and not wrong to
    find. The 1st and the 99th percentile of the training columns become 0 and 255.
    """
    if pixels.shape != labels.shape or pixels.ndim != 2 or min(pixels.shape) < VIEW_PX:
        raise BadData(f"a picture {pixels.shape} and masks {labels.shape}: grey and of one size, {VIEW_PX} px at least")
    if pixels.shape[1] <= TRAIN_COLUMNS:
        raise BadData(f"the picture has {pixels.shape[1]} columns, and the first {TRAIN_COLUMNS} are for training")
    root = Path(folder)
    if present := [name for name in ("train.json", "val.json", "images") if os.path.lexists(root / name)]:
        raise BadData(f"{printable(root)} has {present[0]} already: name a folder without, nothing is written over")
    low, high = np.percentile(pixels[:, :TRAIN_COLUMNS], (1, 99))
    grey = (255 * np.clip((pixels - low) / max(high - low, 1.0), 0, 1)).round().astype(np.uint8)
    os.makedirs(root / "images")
    parts = {"train": training_views(len(pixels)), "val": held_out_views(*pixels.shape)}
    areas = np.bincount(labels.ravel())
    for part, views in parts.items():
        pictures: list[dict[str, Any]] = []
        objects: list[dict[str, Any]] = []
        for number, view in enumerate(views, 1):
            name = f"{part}-{view.top:03d}-{view.left:03d}.png"
            Image.fromarray(view.of(grey)).save(root / "images" / name)
            pictures.append({"id": number, "file_name": name, "width": view.width, "height": view.height})
            for one in _objects(view.of(labels), areas if part == "val" else None):
                objects.append({"id": len(objects) + 1, "image_id": number, "category_id": 1, **one})
        content = {"images": pictures, "annotations": objects, "categories": [{"id": 1, "name": "nucleus"}]}
        write_atomically(root / f"{part}.json", json.dumps(content).encode())
    return root


def _objects(labels: Pixels, areas: Pixels | None) -> list[dict[str, Any]]:
    """What is in a view, in the words of COCO; `areas`, of the whole objects, make small pieces crowds."""
    found = []
    for number in np.unique(labels[labels > 0]):
        bits = labels == number
        rows, columns = np.flatnonzero(bits.any(1)), np.flatnonzero(bits.any(0))
        top, left, bottom, right = (int(v) for v in (rows[0], columns[0], rows[-1] + 1, columns[-1] + 1))
        area = int(bits.sum())
        found.append(
            {
                "bbox": [left, top, right - left, bottom - top],
                "area": area,
                "iscrowd": int(areas is not None and 2 * area < areas[number]),
                "segmentation": {"size": list(bits.shape), "counts": encode(bits).decode()},
            }
        )
    return found


def demo(
    wheel: str | Path,
    out: str | Path | None = None,
    *,
    data: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    recipe: DetectionRecipe | None = None,
) -> Path:
    """Train a detector on the nuclei, judge it on those held out, and draw RUN/nuclei.png. Returns RUN.

    data    where the data set is, or is to be written (default: beside the wheel, in a folder "nuclei")
    recipe  `recipes.coco.nuclei` by default
    Raises what `nuclei` and `detection.train.train` raise.
    """
    import torch

    from lambdanets.detection.batches import evaluation_batches
    from lambdanets.detection.layouts import open_coco
    from lambdanets.detection.run import open_run
    from lambdanets.detection.scores import evaluate
    from lambdanets.detection.train import train

    root = Path(wheel).parent / "nuclei" if data is None else Path(data)
    if not (root / "val.json").exists():  # which is written last
        nuclei(wheel, root)
    result = train(recipe or nuclei_recipe(), root, out=out, seed=seed, device=device)
    run, val = open_run(result.folder), open_coco(root).val
    batches = evaluation_batches(val, run.view, batch_images=run.recipe.eval_batch_images)
    scores = evaluate(run.model, batches, val, device=torch.device("cpu"))
    picture = result.folder / PICTURE
    try:
        sheet = side_by_side(val, scores.detected)
        sheet.quantize(_COLOURS, dither=Image.Dither.NONE).save(picture, optimize=True)
    except OSError as error:
        raise BadRun(f"{result.folder} is trained, but {picture} cannot be written: {error}") from error
    objects = sum(int((~val.objects(i).crowd).sum()) for i in range(len(val)))
    assert scores.mask is not None
    print(
        f"\nOf {objects} nuclei in columns that training did not see: box AP50 {scores.box.ap50:.3f}, "
        f"mask AP50 {scores.mask.ap50:.3f} (AP {scores.box.ap:.3f} and {scores.mask.ap:.3f}). {result.seconds:.0f} s."
    )
    print(f"{printable(picture)}: what is seen, the masks drawn by people, and those found")
    return result.folder


class _Seen(NamedTuple):
    """Objects in the held-out columns as they lie in the whole picture: boxes (n, 4), masks (n of (H, W)), names."""

    boxes: list[Pixels]
    masks: list[Pixels]
    names: list[str]


def side_by_side(images: CocoImages, detected: Sequence[Detected], score: float = SHOWN_SCORE) -> Image.Image:
    """The held-out columns, lying on their side, three times: as they are, with their masks, with those found.

    score  of what is shown. A found object has the colour of the one that it overlaps most, if by half.
    """
    tops = np.cumsum([0, *images.sizes[:, 0]])
    height, width = int(tops[-1]), int(images.sizes[:, 1].max())
    grey = Image.new("RGB", (width, height))
    truth, found = _Seen([], [], []), _Seen([], [], [])
    for i, top in enumerate(tops[:-1].tolist()):
        grey.paste(images.load(i), (0, top))
        down = np.array([0, top, 0, top])
        objects, one, (rows, columns) = images.objects(i), detected[i], images.sizes[i].tolist()

        def whole(runs: Any, rows: int = rows, columns: int = columns, top: int = top) -> Pixels:
            bits = np.zeros((height, width), bool)
            bits[top : top + rows, :columns] = decode(runs, rows, columns)
            return bits

        own = [whole(runs) for runs in objects.segmentations]
        names = [f"{i}-{k}" for k in range(len(own))]
        truth.boxes.extend(objects.boxes + down)
        truth.masks.extend(own)
        truth.names.extend(names)
        for k in np.flatnonzero(one.scores >= score):
            bits = whole((one.masks or [])[k])
            over = [(bits & other).sum() / (bits | other).sum() for other in own]
            best = int(np.argmax(over)) if over else -1
            found.boxes.append(one.boxes[k] + down)
            found.masks.append(bits)
            found.names.append(names[best] if over and over[best] >= 0.5 else f"{i}, found {k}")
    # The camera's noise, which is most of the file, becomes black.
    grey = grey.point([max(0, v - _BLACK) * 255 // (255 - _BLACK) for v in range(256)] * 3)
    words = f"{len(truth.names)} by hand", f"{len(found.names)} found, score {score:g} or more"
    panels = [("held out", grey.resize((_ENLARGED * width, _ENLARGED * height), Image.Resampling.BILINEAR))]
    for word, seen in zip(words, (truth, found), strict=True):
        masks = [np.kron(bits, np.ones((_ENLARGED, _ENLARGED), bool)) for bits in seen.masks]
        boxes = np.array(seen.boxes).reshape(-1, 4) * _ENLARGED
        panels.append((word, draw(panels[0][1], boxes, seen.names, None, masks, labels=False)))
    return _under_one_another(panels)


def _under_one_another(panels: list[tuple[str, Image.Image]]) -> Image.Image:
    font = ImageFont.load_default(_LETTERS_PX)
    line = _LETTERS_PX + _GAP_PX
    lying = [(word, panel.transpose(Image.Transpose.ROTATE_90)) for word, panel in panels]
    side = lying[0][1].size
    sheet = Image.new("RGB", (side[0], len(lying) * (side[1] + line)), (255, 255, 255))
    pen = ImageDraw.Draw(sheet)
    for k, (word, panel) in enumerate(lying):
        top = k * (side[1] + line)
        pen.text((2, top), word, fill=(0, 0, 0), font=font)
        sheet.paste(panel, (0, top + line))
    return sheet
