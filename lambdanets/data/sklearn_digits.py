"""The digits in scikit-learn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from PIL import Image

from lambdanets.data.images import Images


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
