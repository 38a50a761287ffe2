"""What a run learns (`Recipe`), and how it is computed, saved and watched (`Options`)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, Self, get_args

from lambdanets.errors import BadRecipe

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

RecipeName = Literal["digits", "folder", "layer_comparison", "pareto", "finetune", "detect", "table6"]
Precision = Literal["auto", "float16", "bfloat16", "float32", "float64"]
BatchNorm = Literal["local", "sync", "frozen"]
Optimizer = Literal["sgd", "adamw", "lamb"]
Schedule = Literal["cosine", "steps"]


# A learning rate or a decay above overflows float32 within a step; an image above has more pixels than one may have.
_ANY = 1_000_000
_LARGEST = {"image_px": 7_000, "lr_per_256": 10_000, "weight_decay": 10_000}


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """What any training has: how far, how fast and by which rule the weights move. A task's recipe adds its own.

    name                what the run's folder is called after
    model               the model's name
    epochs              passes over the training samples
    steps               the run ends after so many, in place of the epochs; 0: the epochs decide
    min_steps           more epochs are run where they have fewer steps than this (a small data set)
    batch_images        samples a step, of all processes together; the learning rate follows it
    accumulation        parts that a process takes its share of a step in, one after the other: the same gradient in
                        less memory, but for batch norm, whose statistics are those of a part
    lr_per_256          learning rate for 256 samples a step; the peak rate is lr_per_256 * batch_images / 256
    warmup_epochs       linear from 0 to the peak
    warmup_steps        in their place, where it is not 0
    schedule            after the warm-up "cosine": to 0; "steps": constant, a tenth after each of the `drops`
    drops               parts of the run, ascending, in (0, 1)
    eval_epochs         the held-out samples are judged after every so many epochs, and after the last
    optimizer           "sgd", "adamw" or "lamb"
    momentum            SGD's momentum (no Nesterov), or the others' beta1
    clip_norm           the gradient is scaled down to this norm where it is larger; 0: never
    weight_decay        on matrices and kernels only: not on biases, norms and relative tables (optim.parameter_groups)
    decay_everything    weight decay on those too
    ema_decay           the evaluated weights are a running average with this decay (warmed up); 0: the last weights
    batch_norm          "local": statistics of a process's own samples, running ones averaged over the processes;
                        "sync": of all processes' samples; "frozen": the running ones, left as they are (fine-tuning)
    precision           "auto": bfloat16 autocast where the device is a GPU, float32 on a CPU; "float16": autocast with
                        loss scaling; "bfloat16", "float32"; "float64": everything, to check the others. Weights,
                        optimiser, loss and evaluation are float32

    Raises BadRecipe where a value cannot be used; the message starts with the argument's name.
    """

    name: str
    model: str
    epochs: int
    batch_images: int
    lr_per_256: float
    warmup_epochs: float = 0.0
    accumulation: int = 1
    steps: int = 0
    min_steps: int = 0
    warmup_steps: int = 0
    schedule: Schedule = "cosine"
    drops: tuple[float, ...] = ()
    eval_epochs: int = 1
    optimizer: Optimizer = "sgd"
    momentum: float = 0.9
    clip_norm: float = 0.0
    weight_decay: float = 0.0
    decay_everything: bool = False
    ema_decay: float = 0.0
    batch_norm: BatchNorm = "local"
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        for field in fields(self):  # a recipe read back from JSON holds lists
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
            for number in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(number, float) and not math.isfinite(number):
                    raise BadRecipe(f"{field.name} must be a finite number, not {number}")
            if isinstance(value, (int, float)) and value > (largest := _LARGEST.get(field.name, _ANY)):
                raise BadRecipe(f"{field.name} must be at most {largest:,}, not {value:,}")
        self._check()

    def _need(self, ok: bool, argument: str, wanted: str) -> None:
        if not ok:
            raise BadRecipe(f"{argument} must be {wanted}, not {getattr(self, argument)!r}")

    def _check(self) -> None:
        need = self._need
        need(re.fullmatch(r"[A-Za-z0-9_.-]+", self.name) is not None, "name", "letters, digits, '_', '.' or '-'")
        for argument in ("epochs", "batch_images", "accumulation", "eval_epochs"):
            need(getattr(self, argument) >= 1, argument, "at least 1")
        need(self.lr_per_256 > 0, "lr_per_256", "greater than 0")
        *others, last = map(repr, get_args(Optimizer))
        need(self.optimizer in get_args(Optimizer), "optimizer", f"{', '.join(others)} or {last}")
        for argument in ("steps", "min_steps", "warmup_steps"):
            need(getattr(self, argument) >= 0, argument, "at least 0")
        need(self.schedule in get_args(Schedule), "schedule", "'cosine' or 'steps'")
        rising = all(0 < drop < 1 for drop in self.drops) and list(self.drops) == sorted(set(self.drops))
        need(rising, "drops", "parts of the run, ascending, in (0, 1)")
        if self.drops and self.schedule != "steps":
            raise BadRecipe(f"drops is {self.drops}, but they go with schedule='steps' only")
        if self.steps:
            need(self.warmup_steps < self.steps, "warmup_steps", f"less than the steps, here {self.steps}")
        need(self.batch_norm in get_args(BatchNorm), "batch_norm", "'local', 'sync' or 'frozen'")
        need(self.precision in get_args(Precision), "precision", f"one of {', '.join(get_args(Precision))}")
        for argument in ("momentum", "ema_decay"):
            need(0 <= getattr(self, argument) < 1, argument, "in [0, 1)")
        for argument in ("weight_decay", "clip_norm"):
            need(getattr(self, argument) >= 0, argument, "at least 0")
        need(
            0 <= self.warmup_epochs < self.epochs,
            "warmup_epochs",
            f"at least 0 and less than the epochs, here {self.epochs}",
        )

    @property
    def peak_lr(self) -> float:
        """The learning rate after the warm-up: lr_per_256 * batch_images / 256 (docs/paper.md section 4)."""
        return self.lr_per_256 * self.batch_images / 256

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """The recipe of a run.json. Raises BadRecipe or TypeError where it is none; 0.1.0's `amp` is understood."""
        record = dict(record)
        if "amp" in record:
            record["precision"] = "auto" if record.pop("amp") else "float32"
        return cls(**record)

    def differences(self, other: TrainingRecipe) -> list[str]:
        """What another recipe has that this one has not: "epochs 90, not 30" for each field."""
        own, others = asdict(self), asdict(other)
        return [f"{name} {others[name]!r}, not {own[name]!r}" for name in own if own[name] != others[name]]

    def with_epochs(self, epochs: int) -> Self:
        """The same run over that many epochs, however many steps they are; the warm-up keeps its share of them."""
        share = self.warmup_epochs * epochs / self.epochs
        return replace(self, epochs=epochs, steps=0, min_steps=0, warmup_epochs=share)

    def length(self, batches: int) -> tuple[int, int, int]:
        """Epochs, steps and steps of warm-up of a run whose epoch has that many batches. The last epoch may be short.

        A warm-up of steps is a fifth of a run that is shorter than five of it.
        """
        steps = self.steps or max(self.epochs * batches, self.min_steps)
        warmup = min(self.warmup_steps, steps // 5) if self.warmup_steps else round(self.warmup_epochs * batches)
        return -(-steps // batches), steps, warmup


@dataclass(frozen=True, kw_only=True)
class Recipe(TrainingRecipe):
    """Everything that decides what a run of classification learns, apart from the images, the seed and the device.

    model               a name of `lambdanets.list_models()`
    image_px            side of the square that the model sees, training and evaluation, pixels
    label_smoothing     share of the target spread evenly over the classes, in [0, 1)
    augment             "none"; "imagenet": random resized crop and flip; "digits": a mild rotation, shift and zoom
    flip_frac           share of the images that "imagenet" flips from left to right, in [0, 1]; 0 where left and right
                        tell classes apart (a left and a right shoe, b and d)
    min_crop_frac       the smallest crop of "imagenet", as a part of the picture's area, in (0, 1]
    randaugment_ops     RandAugment operations an image, 0 for none
    randaugment_magnitude  their level in the TensorFlow code that the paper's numbers belong to, 3 to 15
    erase_frac          share of the images of which a random rectangle is erased, in [0, 1]
    mixup_alpha, cutmix_alpha   of the Beta distribution of the share in mixup and cutmix; 0: never; both: a step takes
                        either
    drop_rate           dropout before the classifier, in [0, 1)
    drop_path_rate      stochastic depth of the last block, in [0, 1)
    in_channels         1: images are read as grey; 3: as RGB
    mean, std           of each channel, in [0, 1], subtracted and divided
    crop_frac           evaluation resizes the shorter side to image_px / crop_frac and takes the middle
    interpolation       of that resize: "bilinear" or "bicubic"
    eval_batch_images   images a batch in evaluation; changes memory and time, not the result

    >>> from lambdanets.recipes import imagenet
    >>> imagenet.layer_comparison().peak_lr          # 0.1 * 4096 / 256
    1.6
    """

    image_px: int
    label_smoothing: float = 0.0
    augment: Literal["none", "imagenet", "digits"] = "none"
    flip_frac: float = 0.5
    min_crop_frac: float = 0.08
    randaugment_ops: int = 0
    randaugment_magnitude: int = 0
    erase_frac: float = 0.0
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    in_channels: int = 3
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    crop_frac: float = 0.875
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    eval_batch_images: int = 256

    def _check(self) -> None:
        super()._check()
        need = self._need
        for argument in ("image_px", "eval_batch_images"):
            need(getattr(self, argument) >= 1, argument, "at least 1")
        need(self.in_channels in (1, 3), "in_channels", "1 (grey) or 3 (RGB)")
        need(self.augment in ("none", "imagenet", "digits"), "augment", "'none', 'imagenet' or 'digits'")
        need(self.interpolation in ("bilinear", "bicubic"), "interpolation", "'bilinear' or 'bicubic'")
        for argument in ("label_smoothing", "drop_rate", "drop_path_rate"):
            need(0 <= getattr(self, argument) < 1, argument, "in [0, 1)")
        for argument in ("mixup_alpha", "cutmix_alpha"):
            need(getattr(self, argument) >= 0, argument, "at least 0")
        for argument in ("erase_frac", "flip_frac"):
            need(0 <= getattr(self, argument) <= 1, argument, "in [0, 1]")
        for argument in ("crop_frac", "min_crop_frac"):
            need(0 < getattr(self, argument) <= 1, argument, "in (0, 1]")
        need(self.randaugment_ops >= 0, "randaugment_ops", "at least 0")
        if self.randaugment_ops:  # below 3 its posterize, as published, keeps no bit
            need(3 <= self.randaugment_magnitude <= 15, "randaugment_magnitude", "in 3 to 15")
        if self.randaugment_ops and self.augment != "imagenet":
            raise BadRecipe(
                f"randaugment_ops is {self.randaugment_ops}, but RandAugment goes with augment='imagenet' only"
            )
        need(len(self.mean) == self.in_channels, "mean", f"one number for each of in_channels = {self.in_channels}")
        need(len(self.std) == self.in_channels, "std", f"one number for each of in_channels = {self.in_channels}")
        need(all(s > 0 for s in self.std), "std", "greater than 0")


@dataclass(frozen=True)
class Options:
    """How a run is computed, saved, watched and shown. What it learns is the recipe's; a resumed run may change these.

    save_minutes      minutes between checkpoints; 0: none by the clock
    save_steps        steps between checkpoints; 0: none by the count
    keep_checkpoints  newest ones that are kept
    milestone_epochs  every so many epochs a checkpoint that is kept for ever; 0: none
    keep_best         a checkpoint of each epoch that was better on the held-out images than all before (top-1; AP of
                      masks, or of boxes without masks); the newest of them is kept. The result of a run stays its last
                      epoch: what is picked by its accuracy on some images has no longer an honest accuracy on them
    skip_non_finite   steps in a row whose loss or gradient is not finite that are left out, at most 10; 0: the first
                      ends the run
    hang_timeout_s    seconds without a step, or a batch of the evaluation, after which the process writes its stacks
                      and ends; 0: never
    log_steps         steps between lines of log.jsonl
    tensorboard       write its events too
    channels_last     images and kernels with the channels innermost
    compile_model     torch.compile
    recompute         activations of a block are computed again in the backward pass instead of kept
    fsdp              weights, gradients and the optimiser's state are divided among the processes (FSDP2) instead of
                      repeated in each (DDP); the checkpoints are the same
    """

    save_minutes: float = 10.0
    save_steps: int = 0
    keep_checkpoints: int = 3
    milestone_epochs: int = 0
    keep_best: bool = False
    skip_non_finite: int = 0
    hang_timeout_s: float = 1800.0
    log_steps: int = 10
    tensorboard: bool = False
    channels_last: bool = False
    compile_model: bool = False
    recompute: bool = False
    fsdp: bool = False

    def __post_init__(self) -> None:
        smallest = {"keep_checkpoints": 1, "log_steps": 1}
        for name in ("save_minutes", "save_steps", "milestone_epochs", "hang_timeout_s", *smallest):
            if not smallest.get(name, 0) <= getattr(self, name) < math.inf:
                finite = "" if getattr(self, name) < math.inf else " and finite (0: for ever)"
                raise BadRecipe(f"{name} must be at least {smallest.get(name, 0)}{finite}, not {getattr(self, name)}")
        if not 0 <= self.skip_non_finite <= 10:
            raise BadRecipe(f"skip_non_finite must be in 0 to 10 steps, not {self.skip_non_finite}")
