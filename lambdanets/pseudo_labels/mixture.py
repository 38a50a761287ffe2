"""Labelled and pseudo-labelled pictures in every batch: which slots are of which kind, and what is shown in them.

Everything is a function of (seed, epoch, batch): nothing of it is in a checkpoint, and no number of workers, ranks or
accumulation parts changes it. A batch that had first all of one kind and then all of the other would give parts of one
kind, and batch norm would take its statistics of one kind at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lambdanets.data.batches import Batches
from lambdanets.data.images import Images
from lambdanets.data.order import Order, hash_of
from lambdanets.data.reading import Draws
from lambdanets.data.transforms import mix
from lambdanets.pseudo_labels.selection import Selection

PSEUDO = "pseudo:"  # before the name of a picture without a label: a labelled one may have the same


def labelled_before(slot: Any, labelled: int, batch_images: int) -> Any:
    """How many of a batch's slots before this one, or each of these, are labelled: slot i is, where this differs for
    i and i + 1.

    >>> labelled_before(np.arange(7), labelled=3, batch_images=6).tolist()
    [0, 0, 1, 1, 2, 2, 3]
    """
    return slot * labelled // batch_images


class Slot(NamedTuple):
    """The id of the picture that is shown, and the number of the draw, from the first step on; -1: it is labelled."""

    id: int
    draw: int


@dataclass(frozen=True)
class JointDraws(Draws):
    """Two counted streams. Ids are positions in the labelled pictures, and after these in the selection's rows.

    n_images      labelled pictures
    labelled      of them in a batch
    selection     whose draws are shown

    Labelled pictures come as in any training, each once an epoch. Draw g of a pseudo-labelled one is number
    (epoch * batches + batch) * (batch_images - labelled) + its rank among the batch's slots of the kind; pass
    g // draws shuffles all draws anew, and a batch may have draws of two passes.
    """

    labelled: int
    selection: Selection

    def __len__(self) -> int:
        return max(1, self.n_images // self.labelled)

    def slots(self, epoch: int, batch: int, part: range) -> list[Any]:
        before = labelled_before(np.arange(part.start, part.stop + 1), self.labelled, self.batch_images)
        pseudo = before[1:] == before[:-1]
        start, stop = (int(before[end]) for end in (0, -1))
        order = Order(self.n_images, seed=self.seed, epoch=epoch)
        first = batch * self.labelled
        drawn = (epoch * len(self) + batch) * (self.batch_images - self.labelled)
        draws = range(drawn + part.start - start, drawn + part.stop - stop)
        ids = np.empty(len(part), np.int64)
        ids[~pseudo] = order[first + start : first + stop]
        ids[pseudo] = self.n_images + self._rows(draws)
        numbers = np.full(len(part), -1, np.int64)
        numbers[pseudo] = draws
        return list(map(Slot, ids.tolist(), numbers.tolist()))

    def _rows(self, draws: range) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The selection's rows of these draws."""
        n, found = self.selection.draws, [np.zeros(0, np.int64)]
        seed = hash_of("pseudo", self.seed)
        start = draws.start
        while start < draws.stop:
            number, place = divmod(start, n)
            count = min(n - place, draws.stop - start)
            entries = Order(n, seed=seed, epoch=number)[place : place + count]
            found.append(self.selection.row[entries].astype(np.int64))
            start += count
        return np.concatenate(found)

    def augments(self, epoch: int, slot: Slot) -> int:
        """By the draw's number where there is no label: the copies of one picture are cropped differently."""
        if slot.draw < 0:
            return super().augments(epoch, slot.id)
        return hash_of("augment-pseudo", self.seed, slot.draw)

    def candidate(self, epoch: int, slot: Slot, attempt: int) -> int:
        """In the stead of a picture without a label comes another such one, with its own label and targets."""
        if slot.draw < 0:
            return super().candidate(epoch, slot.id, attempt)
        if not attempt:
            return slot.id
        entry = hash_of("substitute-pseudo", self.seed, slot.draw, attempt - 1) % self.selection.draws
        return self.n_images + int(self.selection.row[entry])


@dataclass(frozen=True, eq=False, repr=False)
class JointImages(Images):
    """The labelled pictures, then one for each of the selection's rows, whose label is the selection's."""

    labelled: Images
    pictures: Images
    selection: Selection

    def load(self, index: int) -> Image.Image:
        row = index - len(self.labelled)
        return self.labelled.load(index) if row < 0 else self.pictures.load(int(self.selection.id[row]))

    def expect(self, ids: Sequence[int]) -> None:
        n = len(self.labelled)
        self.labelled.expect([index for index in ids if index < n])
        self.pictures.expect([int(self.selection.id[index - n]) for index in ids if index >= n])

    def label_parts(self) -> Iterator[np.ndarray[Any, np.dtype[np.integer[Any]]]]:
        """Of the labelled pictures: those of a selection were looked at when it was opened."""
        yield from self.labelled.label_parts()

    def __reduce__(self) -> tuple[Any, ...]:
        return joint_images, (self.labelled, self.pictures, self.selection)


def joint_images(labelled: Images, pictures: Images, selection: Selection) -> JointImages:
    """Both kinds as one list; the selection's labels are numbers among the classes of the labelled pictures."""
    n, rows = len(labelled), len(selection)
    names = _Joint(n, rows, labelled.names, lambda row: PSEUDO + pictures.names[int(selection.id[row])])
    labels: Any = _Joint(n, rows, labelled.labels, lambda row: int(selection.labels_of(row)))
    return JointImages(labelled.classes, names, labels, labelled, pictures, selection)


class _Joint(Sequence[Any]):
    """What is known of the labelled pictures, then what is asked of the selection's rows one by one."""

    def __init__(self, n: int, rows: int, labelled: Any, of_row: Callable[[int], Any]) -> None:
        self._n, self._rows, self._labelled, self._of_row = n, rows, labelled, of_row

    def __len__(self) -> int:
        return self._n + self._rows

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return self._labelled[index] if index < self._n else self._of_row(index - self._n)


class JointBatches(Batches):
    """Batches of both kinds; unreadable pictures of each kind are counted, and bounded, for themselves.

    images, draws  see there; the other arguments are those of `Batches`
    """

    def _kinds(self) -> list[tuple[str, int, dict[str, str]]]:
        assert isinstance(self.images, JointImages)
        kinds: tuple[dict[str, str], dict[str, str]] = {}, {}
        for name, reason in self.bad.items():
            kinds[name.startswith(PSEUDO)][name] = reason
        labelled, pseudo = kinds
        return [
            ("labelled training images", len(self.images.labelled), labelled),
            ("pseudo-labelled images", len(self.images.selection), pseudo),
        ]


# --- targets ----------------------------------------------------------------------------------------------------------


def soft_targets(top_class: Tensor, top_prob: Tensor, *, classes: int, temperature: float = 1.0) -> Tensor:
    """Probabilities of all classes from those of the K that were kept: (b, K) twice to (b, classes), of the type of
    `top_prob`. What is missing to 1 is spread evenly over the other classes; then all to the power 1 / temperature,
    divided by their sum.

    >>> kept = torch.tensor([[1, 4]]), torch.tensor([[0.6, 0.3]])
    >>> soft_targets(*kept, classes=5).mul(1000).round().int()
    tensor([[ 33, 600,  33,  33, 300]], dtype=torch.int32)
    """
    b, k = top_class.shape
    rest = (1 - top_prob.sum(dim=1, keepdim=True)).clamp(min=0) / max(1, classes - k)  # (b, 1)
    targets = rest.expand(b, classes).clone().scatter_(1, top_class, top_prob)
    if temperature != 1:
        largest = targets.amax(dim=1, keepdim=True)  # divided by it first: 0.1^50 is 0 in float32, and 0 / 0 no target
        targets = (targets / largest).pow(1 / temperature)
    return targets / targets.sum(dim=1, keepdim=True)


def hard_targets(labels: Tensor, *, classes: int, smoothing: float, dtype: torch.dtype) -> Tensor:
    """(1 - smoothing) one-hot + smoothing / classes: (b,) to (b, classes)."""
    return torch.nn.functional.one_hot(labels, classes).to(dtype) * (1 - smoothing) + smoothing / classes


def mixed(
    images: Tensor, targets: Tensor, *, seed: int, step: int, mixup_alpha: float, cutmix_alpha: float
) -> tuple[Tensor, Tensor]:
    """Mixup or cutmix of neighbouring slots, as `transforms.mix` does it, with targets (b, classes) of any kind."""
    sides = torch.arange(len(images), device=images.device) % 2  # of a pair: as classes they give the shares
    images, shares = mix(
        images, sides, classes=2, seed=seed, step=step, mixup_alpha=mixup_alpha, cutmix_alpha=cutmix_alpha
    )
    own = shares.gather(1, sides[:, None]).to(targets.dtype)  # (b, 1); 1 of an odd last one, which stays alone
    partner = (torch.arange(len(images), device=images.device) ^ 1).clamp(max=len(images) - 1)
    return images, own * targets + (1 - own) * targets[partner]
