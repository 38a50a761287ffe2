"""A teacher, shards, and a store with faults: what the tests of labelling share."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import torch
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from lambdanets import create_model
from lambdanets.data.pack import pack
from lambdanets.data.transforms import View
from lambdanets.files import write_json
from lambdanets.pseudo_labels import label_files
from lambdanets.pseudo_labels.label_shards import Wishes
from lambdanets.recipes import choose
from lambdanets.runs.weights import save_weights

CLASSES = ("ant", "bee", "cat", "dog", "eel")


def write_teacher(
    folder: Path, *, classes=CLASSES, seed: int = 0, view: View | None = None, change=None, pictures=None
) -> Path:
    """A run's folder as `train` leaves it, with weights as they are before training; `change` may alter the model.

    pictures  on which it says each class now and then; None: those of `picture`
    """
    pictures = pictures or [Image.open(io.BytesIO(picture(i))) for i in range(64)]
    torch.manual_seed(seed)
    recipe = choose("folder", model="lambda_resnet_tiny", image_px=8, epochs=1)
    view = view or View(8, 3, recipe.mean, recipe.std, recipe.crop_frac, recipe.interpolation)
    own = {"eval_batch_images": 4, "in_channels": view.in_channels, "mean": view.mean, "std": view.std}
    record = {
        "status": "done", "recipe": dataclasses.asdict(recipe) | own, "view": dataclasses.asdict(view),
        "classes": list(classes), "seed": 0, "history": [], "task": "classification",
        "data": {"source": "nowhere", "how": "", "ignored": {}, "train_images": 2, "val_images": 2},
    }  # fmt: skip
    folder.mkdir(parents=True)
    write_json(folder / "run.json", record)
    model = create_model("lambda_resnet_tiny", num_classes=len(classes), in_channels=view.in_channels).eval()
    with torch.no_grad():  # logits with mean 0 and deviation 3, so that each class is found somewhere
        seen = torch.stack([view.evaluate(image) for image in pictures])
        head, logits = model.get_classifier(), model(seen)
        head.weight.mul_(3 / logits.std(0)[:, None])
        head.bias.sub_(model(seen).mean(0))
    if change is not None:
        with torch.no_grad():
            change(model)
    save_weights(model, folder / "weights.safetensors")
    return folder


def picture(seed: int, side: tuple[int, int] = (12, 10)) -> bytes:
    draw = np.random.default_rng(seed)
    levels = np.kron(draw.integers(0, 256, (3, 3, 3)), np.ones((4, 4, 1)))[: side[1], : side[0]].astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "PNG")
    return file.getvalue()


def write_shards(root: Path, pictures: int = 60, shards: int = 6) -> Path:
    """Unlabelled shards of about equal size."""
    for i in range(pictures):
        place = root / "tree" / f"{i % 7}" / f"{i:04d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(picture(i))
    size = 1024 + sum(512 + -(-len(picture(i)) // 512) * 512 for i in range(pictures)) // shards
    pack(root / "tree", root / "shards", unlabelled=True, shard_bytes=size + 512)
    return root / "shards"


def wishes(teacher: Path, data: Path | str, out: Path | str, **others) -> Wishes:
    return Wishes(str(teacher), str(data), str(out), device="cpu", **{"batch_images": 4, **others})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.parquet"))}


def table(folder: Path, shard: str):
    labels = label_files.read_labels(folder)
    return label_files.read_file_of(labels, label_files.file_of(shard))[0]


def manifest(data: Path) -> list[dict]:
    held = json.loads((data / "manifest.json").read_text())
    return [shard for of in held["splits"].values() for shard in of]


class Store(MemoryFileSystem):
    """A store that counts, and on which `faults` may be set: called with (what, path), it may raise."""

    protocol = "faulty"
    store: dict = {}  # noqa: RUF012
    pseudo_dirs: list = [""]  # noqa: RUF012
    asked: list = []  # noqa: RUF012
    faults = staticmethod(lambda what, path: None)

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("faulty:/").strip("/")

    def cat_file(self, path, start=None, end=None, **kwargs):
        self._ask("read", path)
        return super().cat_file(path, start, end, **kwargs)

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        self._ask("write", path)
        path = self._strip_protocol(path)
        if mode == "create" and path in self.store:
            raise FileExistsError(path)
        super().pipe_file(path, value, mode="overwrite")
        self._ask("written", path)

    def ls(self, path, detail=True, **kwargs):
        self._ask("list", path)
        return super().ls(path, detail=detail)

    def _open(self, path, mode="rb", **kwargs):
        if "r" in mode:
            self._ask("read", path)
        return super()._open(path, mode, **kwargs)

    def _ask(self, what, path):
        Store.asked.append((what, path.rpartition("/")[2]))
        Store.faults(what, path)
