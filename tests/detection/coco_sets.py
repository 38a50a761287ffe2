"""Small COCO data sets for tests, written as anybody would write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

WIDE, HIGH = 64, 48


def rectangle(x: float, y: float, w: float, h: float) -> list[float]:
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def held(n: int = 4, *, first: int = 1, per_picture: int = 2) -> dict[str, Any]:
    """n pictures, each with so many rectangles in turn of the classes cat (3) and dog (7)."""
    pictures = [{"id": first + i, "file_name": f"{first + i}.png", "width": WIDE, "height": HIGH} for i in range(n)]
    objects = []
    for i in range(n * per_picture):
        x, y = 2 + 3 * (i % per_picture), 4 + i % 5
        objects.append(
            {
                "id": 100 * first + i,
                "image_id": first + i // per_picture,
                "category_id": (3, 7)[i % 2],
                "bbox": [x, y, 20, 30],
                "area": 600,
                "iscrowd": 0,
                "segmentation": [rectangle(x, y, 20, 30)],
            }
        )
    return {
        "images": pictures,
        "annotations": objects,
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
    }


def write(file: Path, content: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def draw(root: Path, content: dict[str, Any]) -> None:
    """A picture of its own for every entry; a name that leads elsewhere is passed over."""
    root.mkdir(parents=True, exist_ok=True)
    for picture in content["images"]:
        name = picture["file_name"]
        if ".." not in name and not name.startswith("/"):
            id = hash(str(picture["id"])) if not isinstance(picture["id"], int) else picture["id"]
            Image.new("RGB", (WIDE, HIGH), (id % 256, id // 256 % 256, 7)).save(root / name)


def pair(at: Path, train: dict[str, Any], val: dict[str, Any] | None = None) -> Path:
    """DIR/{train,val}.json with DIR/images."""
    val = held(2, first=50) if val is None else val
    for part, content in (("train", train), ("val", val)):
        write(at / f"{part}.json", content)
        draw(at / "images", content)
    return at
