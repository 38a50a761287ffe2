"""Images a second that a loader with worker processes gives: ours from a folder, ours from shards, timm's, in one run.

    python -m benchmarks.data [--images N] [--workers N] [--rounds N] [--out FILE]

The pictures are made here, in a temporary folder: JPEGs of 500 x 375 px with the spectrum of photographs, about 120 kB
as ImageNet's are.  All loaders crop (RandomResizedCrop), flip and normalise to 224 px.  An epoch of each is timed in
turn, `rounds` times after one that is not counted; the medians are compared.  The last line is JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset, create_loader

from lambdanets.data.batches import Batches
from lambdanets.data.folders import folder
from lambdanets.data.pack import pack
from lambdanets.data.transforms import View
from lambdanets.recipes.recipe import IMAGENET_MEAN, IMAGENET_STD

PX, BATCH_IMAGES, CLASSES = 224, 32, 4


def photo(seed: int) -> bytes:
    """A JPEG whose amplitudes fall with the frequency as photographs' do, with a little noise."""
    dice = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(375)[:, None], np.fft.fftfreq(500)) + 1 / 500
    spectrum = (dice.normal(size=(3, 375, 500)) + 1j * dice.normal(size=(3, 375, 500))) / frequency**1.1
    levels = np.fft.ifft2(spectrum).real
    levels = 128 + 50 * (levels - levels.mean()) / levels.std() + dice.normal(scale=4, size=levels.shape)
    file = io.BytesIO()
    Image.fromarray(levels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)).save(file, "JPEG", quality=90)
    return file.getvalue()


def fill(root: Path, images: int) -> None:
    """images training pictures and as many validation ones as there are classes."""
    different = [photo(seed) for seed in range(min(images, 64))]
    for index in range(images + CLASSES):
        split = "train" if index < images else "val"
        path = root / split / str(index % CLASSES) / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(different[index % len(different)])


def seconds(epoch: Callable[[int], Iterable[int]], number: int) -> tuple[float, int]:
    start = time.perf_counter()
    images = sum(epoch(number))
    return time.perf_counter() - start, images


def loaders(root: Path, shards: Path, workers: int) -> dict[str, Callable[[int], Iterable[int]]]:
    view = View(PX, 3, IMAGENET_MEAN, IMAGENET_STD)
    ours = {}
    for name, place in (("folder", root), ("shards", shards)):
        batches = Batches(
            folder(place).train, view, batch_images=BATCH_IMAGES, training=True, augment="imagenet", workers=workers
        )
        ours[name] = lambda number, batches=batches: (len(batch.ids) for batch in batches.epoch(number))
    timms = create_loader(
        ImageDataset(str(root / "train")), (3, PX, PX), BATCH_IMAGES, is_training=True, use_prefetcher=False,
        color_jitter=None, interpolation="bilinear", num_workers=workers, pin_memory=False, persistent_workers=True,
    )  # fmt: skip
    return {**ours, "timm": lambda number: (len(labels) for _, labels in timms)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=640)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="where the last line's JSON is written, too")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        root, shards = Path(place, "photos"), Path(place, "shards")
        fill(root, given.images)
        start = time.perf_counter()
        packed = pack(root, shards)
        pack_s = time.perf_counter() - start
        kilobytes = packed.bytes / (packed.train_images + packed.val_images) / 1000
        print(f"{given.images} JPEGs of 500 x 375 px, {kilobytes:.0f} kB each; packed in {pack_s:.1f} s")
        timed: dict[str, list[float]] = {}
        epochs = loaders(root, shards, given.workers)
        for number in range(given.rounds + 1):
            for name, epoch in epochs.items():
                took, images = seconds(epoch, number)
                if number:
                    timed.setdefault(name, []).append(images / took)
    cores = max(1, given.workers)
    result: dict[str, object] = {
        "images": given.images, "kilobytes": round(kilobytes), "workers": given.workers, "px": PX,
        "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2), "torch": torch.__version__,
        "pack_images_per_s": round(given.images / pack_s),
    }  # fmt: skip
    for name, rates in timed.items():
        rate = statistics.median(rates)
        ratio = statistics.median(one / other for one, other in zip(rates, timed["timm"], strict=True))
        print(f"{name:7} {rate:7.0f} images/s, {rate / cores:6.0f} a worker, {ratio:.2f} of timm's")
        spread = [round(min(rates)), round(max(rates))]
        result[name] = {"images_per_s": round(rate), "spread": spread, "of_timm": round(ratio, 3)}
    line = json.dumps(result)
    print(line)
    if given.out:
        given.out.write_text(line + "\n")


if __name__ == "__main__":
    main()
