"""What the loop asks of what is learnt: a `Task`. Labels, boxes and pictures are known to the wings alone.

A wing is a folder beside `classification/` whose task has these methods; nothing in `training/` changes for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from lambdanets.training.distributed import Ranks


class Batch(Protocol):
    """A rank's part of the samples of one step: `ids` are their numbers in `Batches.names`; the rest is the task's."""

    @property
    def ids(self) -> Sequence[int]: ...


B = TypeVar("B", bound=Batch, covariant=True)


class Batches(Protocol[B]):
    """The batches of an epoch: a pure function of (seed, epoch, sample), so that a resumed run sees the same ones.

    names         of all samples
    batch_images  samples of a full batch, all ranks together
    bad           name -> reason of the samples that could not be read so far and were replaced
    """

    bad: dict[str, str]
    batch_images: int

    @property
    def names(self) -> Sequence[str]: ...

    def __len__(self) -> int:
        """Batches in an epoch: of training the same number on every rank."""

    def epoch(self, epoch: int, *, first_batch: int = 0) -> Iterator[B]:
        """The batches of one epoch, from `first_batch` on."""


class Place(NamedTuple):
    """Where a batch is computed: its floating-point tensors get this type and memory format, the others the device."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.contiguous_format


Counts = dict[str, Any]
"""A task's own sums over samples, by name: numbers, and lists of them (a histogram, say)."""


class Found(NamedTuple):
    """Of one part of a batch: the sum of its samples' losses, with its gradient; and sums of counts, without.

    A count is a number, or a vector of them.
    """

    loss: Tensor
    counts: dict[str, Tensor]


class Scores(Protocol):
    """What an evaluation found. `loss` must be finite; `str()` is a line for a person."""

    @property
    def loss(self) -> float: ...

    def row(self) -> dict[str, float]:
        """What an epoch's line of the history has of it."""

    def json(self) -> dict[str, Any]:
        """All of it, for run.json."""


class Task(Protocol):
    """What is learnt, from what, and how it is judged.

    name      of the kind of task, in run.json
    title     of this one, for a person: "lambda_resnet50, 224 px"
    best      the number of a history's line by which epochs are compared: larger is better, 1 the most
    remedy    what to change where the model cannot take a batch: "give another --image-px"
    shown     where the samples come from, for a person
    train, held_out   batches; there after `make_batches`
    """

    name: str
    title: str
    best: str
    remedy: str

    @property
    def shown(self) -> str: ...

    @property
    def train(self) -> Batches[Any]: ...

    @property
    def held_out(self) -> Batches[Any]: ...

    # --- before a run

    def asked(self) -> dict[str, Any]:
        """What every process must have been asked for alike, besides recipe, seed and options."""

    def need(self) -> None:
        """Raises BadRun where an optional package that this task uses is not installed."""

    def open(self) -> int:
        """Find the samples; gives how many a full step takes. Raises BadData, DiskFault."""

    def fingerprint(self) -> dict[str, str]:
        """Part -> a number that changes with its samples' names, labels and order."""

    def stamp(self) -> dict[str, Any]:
        """Part -> numbers that change with the samples' content, where it is known; see `Images.stamp`."""

    def make_batches(self, folder: Path, ranks: Ranks) -> None:
        """Make `train` and `held_out`, for this rank; what could not be read is listed in the run's folder."""

    def record(self) -> dict[str, Any]:
        """What run.json says of the task: "data" with at least its "source" and "how", and what reads a run back."""

    def read_record(self, folder: Path) -> dict[str, Any]:
        """run.json of a run of this kind of task. Raises BadRun where it is none."""

    # --- the model and its steps

    def create_model(self) -> nn.Module:
        """A new model, with first weights drawn from torch's generator. Raises ValueError for an unknown name."""

    def load_weights(self, model: nn.Module, source: str | Path) -> dict[str, str]:
        """Start a model from weights of before; gives what run.json keeps: see `runs.weights.load_weights`."""

    def example(self, samples: int, place: Place) -> tuple[Any, ...]:
        """Arguments of the model for that many samples, of the right shapes and nothing in them."""

    def parts(self, batch: Any, place: Place, *, step: int) -> Sequence[Any]:
        """A batch in the parts that the recipe asks for, where they are computed; what it draws depends on the step."""

    def loss(self, forward: Callable[..., Any], part: Any) -> Found:
        """Of one part; `forward` is the model, in the precision of the recipe."""

    # --- what comes of it

    def train_row(self, counts: Counts, samples: int) -> dict[str, float]:
        """What an epoch's line of the history has of the counts over its samples."""

    def log_row(self, counts: Counts) -> dict[str, float]:
        """What a line of log.jsonl has of the counts over the steps since the line before."""

    def warning(self, history: Sequence[dict[str, Any]]) -> str | None:
        """What a person must be told, once, of the history now that its last line is there."""

    def said(self, row: dict[str, float]) -> str:
        """`train_row` for a person: "top-1 41.7%"."""

    def held_out_said(self, value: float) -> str:
        """The number `best`, of the held-out samples, for a person: "held-out box AP 0.266"."""

    def scores(self, model: nn.Module, device: torch.device, ranks: Ranks, go_on: Callable[[], bool]) -> Scores:
        """Evaluate on `held_out`; `go_on` is asked after every batch. Raises EvaluationStopped where it says no."""

    def report(self, folder: Path, record: dict[str, Any], scores: Any) -> None:
        """The pictures and the page of a run that is done."""
