"""One optimiser step: a batch, in parts -> loss -> gradients -> weights; and all that such steps leave behind."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from lambdanets.data.order import hash_of
from lambdanets.errors import BadRun
from lambdanets.recipes.recipe import TrainingRecipe
from lambdanets.training import optim
from lambdanets.training.distributed import Ranks, gathered, part_like
from lambdanets.training.ema import RunningAverage
from lambdanets.training.sync_batch_norm import sync_batch_norm
from lambdanets.training.task import Counts, Place, Task

_COMPUTED_IN = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Gradients:
    """What `Learner.gradients` found.

    loss_sum   summed over this rank's samples
    counts     the task's, summed over them: numbers, and lists of them
    norm       of the gradient of the mean loss over the batch of all ranks, before clipping; equal on every rank
    scale      what the loss was multiplied with, 1 but for float16. A norm that is not finite while the loss is, at a
               scale above 1, is the scale's fault: the step is to be left out, and the next one has half the scale
    """

    loss_sum: float
    counts: Counts
    norm: float
    scale: float


class Learner:
    """A model, its running average and its optimiser; a step is `gradients`, then `apply` or `leave_out`.

    recipe, task      how and what is learnt; the first weights are drawn from torch's generator
    batch_images      samples of a full batch, all ranks together
    seed              of dropout, with the step and the rank
    init_from         where the first weights come from instead (`task.load_weights`); `began_from`: what was found
    channels_last, recompute   how it is computed: memory format, and activations that are computed again in the
                      backward pass instead of kept
    Before the first step comes `parallelise`.
    """

    def __init__(
        self,
        recipe: TrainingRecipe,
        task: Task,
        *,
        batch_images: int,
        seed: int,
        device: torch.device,
        ranks: Ranks,
        init_from: str | Path | None = None,
        channels_last: bool = False,
        recompute: bool = False,
    ) -> None:
        self.recipe, self.task, self.seed, self.device, self.ranks = recipe, task, seed, device, ranks
        self.batch_images = batch_images
        self.place = Place(
            device,
            torch.float64 if recipe.precision == "float64" else torch.float32,
            torch.channels_last if channels_last else torch.contiguous_format,
        )
        precision = recipe.precision
        if precision == "auto":
            precision = "bfloat16" if device.type == "cuda" else "float32"
        self._computed_in = _COMPUTED_IN.get(precision)
        model = task.create_model()
        self.began_from = None if init_from is None else task.load_weights(model, init_from)
        model = model.to(device, self.place.dtype).to(memory_format=self.place.memory_format)
        self.average = RunningAverage(model, recipe.ema_decay)
        synced = recipe.batch_norm == "sync" and ranks.ranks > 1
        self.model = sync_batch_norm(model, device) if synced else model
        self.optimizer = optim.optimizer(model, recipe)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "float16")
        self._unscaled = False  # whether the scaler has seen gradients that it is to be updated for
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        self._statistics = [b for norm in norms for b in norm.buffers() if b.is_floating_point()]
        self._buffers = list(model.buffers())
        self._buffers_before = [b.clone() for b in self._buffers]
        if recompute:
            for block in residual_blocks(model):
                block.forward = functools.partial(_recomputed, block, block.forward)

    def parallelise(self, *, compile_model: bool = False, fsdp: bool = False) -> None:
        """Join the other ranks, once the weights are there. All ranks call it; then torch.compile, on request.

        fsdp   the state is divided among the ranks: each has had the whole of it until now, and has again for a save
        DDP rearranges its buckets after the first backward pass, and with them the order in which a ring sums. That
        pass is made here, on nothing: a resumed run would else differ, in its first step, from what it continues.
        """
        if fsdp and self.ranks.ranks > 1:
            self._shard()
        else:
            self.parallel = self.ranks.parallel(self.model, self.device)
        if self.ranks.ranks > 1:
            _copy(self._buffers_before, self._buffers)
            train_mode(self.model, self.recipe)
            place = self.place._replace(memory_format=torch.contiguous_format)
            found = tree_leaves(self.parallel(*self.task.example(2, place)))
            torch.stack([y.sum() for y in found if isinstance(y, Tensor) and y.requires_grad]).sum().backward()
            self.leave_out()
        self.forward: Any = self.parallel
        if compile_model and hasattr(self.model, "compile_parts"):  # what has static shapes, by the model's own word
            self.model.compile_parts()  # type: ignore[operator]
        elif compile_model:
            self.forward = torch.compile(self.parallel)

    def _shard(self) -> None:
        undivided = self.optimizer.state_dict()
        self.model.to(memory_format=torch.contiguous_format)  # it divides no others
        self.ranks.shard(self.model, residual_blocks(self.model) if hasattr(self.model, "stages") else [], self.device)
        self.average.shard(self.model)
        self.optimizer = optim.optimizer(self.model, self.recipe)
        owners = [p for group in self.optimizer.param_groups for p in group["params"]]
        for index, state in undivided["state"].items():
            shape = owners[index].shape
            undivided["state"][index] = {
                name: part_like(value, owners[index]) if isinstance(value, Tensor) and value.shape == shape else value
                for name, value in state.items()
            }
        self.optimizer.load_state_dict(undivided)
        self.parallel = self.model

    def gradients(self, batch: Any, step: int) -> Gradients:
        """The gradient of the mean loss over all ranks' samples, in the parameters' `grad`; the weights stay.

        batch   this rank's part of it. The task takes it in `accumulation` parts, each with batch norm's own
                statistics; sums are divided by the samples of the whole batch, so parts of unequal size count right
        step    0 for the first: with the seed and the rank, the seed of dropout
        """
        _copy(self._buffers_before, self._buffers)
        torch.manual_seed(hash_of("dropout", self.seed, step, self.ranks.rank) % 2**63)
        parts = self.task.parts(batch, self.place, step=step)
        self.optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        counts: dict[str, Tensor] = {}
        for part, held in enumerate(parts):
            with self._gradients_stay_here(part + 1 < len(parts)):
                found = self.task.loss(self._computed, held)
                # DDP divides by the ranks
                self.scaler.scale(found.loss * (self.ranks.ranks / self.batch_images)).backward()
            total += found.loss.detach()
            for name, count in found.counts.items():
                counts[name] = counts.get(name, 0) + count.detach().double()
        if self.recipe.batch_norm == "local":
            self.ranks.average_(self._statistics)
        self.scaler.unscale_(self.optimizer)
        self._unscaled = True
        total_norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        total_norm = gathered(total_norm).to(total)
        every = [total, total_norm, *counts.values()]
        parts_of_all = torch.cat([t.reshape(-1) for t in every]).cpu().split([t.numel() for t in every])  # one wait
        loss_sum, norm, *sums = (part.view(t.shape).tolist() for t, part in zip(every, parts_of_all, strict=True))
        return Gradients(loss_sum, dict(zip(counts, sums, strict=True)), norm, self.scaler.get_scale())

    def _computed(self, *inputs: Any) -> Any:
        """The model's answer, in the precision of the recipe."""
        with torch.autocast(self.device.type, self._computed_in, enabled=self._computed_in is not None):
            return self.forward(*inputs)

    def apply(self, step: int, lr: float, norm: float) -> None:
        """Clip, move the weights and the running average."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.recipe.clip_norm:
            given = [p for p in self.model.parameters() if p.grad is not None]
            torch.nn.utils.clip_grads_with_norm_(given, self.recipe.clip_norm, torch.tensor(norm, device=self.device))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._unscaled = False
        self.average.update(self.model, step)

    def leave_out(self) -> None:
        """Take the step back: the gradients are dropped, and batch norm's statistics are what they were before it."""
        self.optimizer.zero_grad()
        _copy(self._buffers, self._buffers_before)
        if self._unscaled:
            self.scaler.update()
            self._unscaled = False

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on. All ranks call it; where the state is divided, rank 0 gets it."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average.up_to_date().state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        found: dict[str, Any] = gathered(state, keep=self.ranks.first)
        return found

    def fingerprint(self) -> str:
        """64 hexadecimal digits that change with any weight or statistic of the model."""
        digest = hashlib.sha256()
        for name, value in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def load_state(self, state: dict[str, Any]) -> None:
        """Put back what `state` gave. Raises BadRun where it does not fit this model."""
        try:
            self.model.load_state_dict(state["model"])
            self.average.module.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise BadRun(f"the checkpoint does not fit {self.recipe.model} and this recipe: {error}") from error

    @contextlib.contextmanager
    def _gradients_stay_here(self, more_follow: bool) -> Iterator[None]:
        """DDP and FSDP send gradients once a step, with the last part."""
        if isinstance(self.parallel, FSDPModule):
            self.parallel.set_requires_gradient_sync(not more_follow)
        if more_follow and isinstance(self.parallel, DistributedDataParallel):
            with self.parallel.no_sync():
                yield
        else:
            yield


def _copy(to: list[Tensor], of: list[Tensor]) -> None:
    if to:  # a model may have no buffers
        torch._foreach_copy_(to, of)


def train_mode(model: nn.Module, recipe: TrainingRecipe) -> None:
    """Put the model in training mode; batch norms of a "frozen" recipe stay as in evaluation."""
    model.train()
    if recipe.batch_norm == "frozen":
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


def residual_blocks(model: nn.Module) -> list[nn.Module]:
    """The residual blocks: what is recomputed as one."""
    stages: Any = model.stages  # timm's models have a module of that name, ours a method
    found: Any = stages if isinstance(stages, nn.Module) else stages()
    return [block for stage in found for block in stage]


def _recomputed(block: nn.Module, forward: Any, *inputs: Tensor) -> Tensor:
    """forward(*inputs), whose activations are computed again in the backward pass; the statistics are updated once."""

    @contextlib.contextmanager
    def again() -> Iterator[None]:
        norms = [m for m in block.modules() if isinstance(m, _BatchNorm)]
        before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
        for norm in norms:
            # A momentum of 0 moves the running statistics by nothing; without them autograd would notice.
            norm.momentum = 0.0
            norm.num_batches_tracked = None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone()
        try:
            yield
        finally:
            for norm, (momentum, count) in zip(norms, before, strict=True):
                norm.momentum, norm.num_batches_tracked = momentum, count

    def contexts() -> tuple[Any, Any]:
        return contextlib.nullcontext(), again()

    if not torch.is_grad_enabled():
        return forward(*inputs)
    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts)


@dataclass
class RunState:
    """Where a run is: with the learner's state, all that it needs to go on. Sums are of this epoch, over all ranks."""

    step: int = 0  # batches taken, the left-out ones too
    epoch: int = 0
    batch: int = 0
    seen: int = 0
    counts: Counts = field(default_factory=dict)
    logged: Counts = field(default_factory=dict)  # the counts at the last line of the log
    loss_sum: float = 0.0
    train_s: float = 0.0
    wait_s: float = 0.0
    total_s: float = 0.0
    left_out: int = 0
    left_out_in_a_row: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def from_json(cls, held: dict[str, Any]) -> RunState:
        """What a checkpoint holds. In those of 0.1.0 `right` was the one count. Raises TypeError where it is none."""
        held = dict(held)
        if "right" in held:
            held["counts"] = {"right": held.pop("right")}
        return cls(**held)

    def learnt_from(self, samples: int, loss_sum: float, counts: Counts) -> None:
        """Of a step, all ranks together."""
        self.seen, self.loss_sum, self.left_out_in_a_row = self.seen + samples, self.loss_sum + loss_sum, 0
        for name, count in counts.items():
            self.counts[name] = tree_map(operator.add, self.counts[name], count) if name in self.counts else count

    def since_logged(self) -> Counts:
        """The counts of the steps since this was asked last, in this epoch."""
        before, self.logged = self.logged, dict(self.counts)
        return {
            name: tree_map(operator.sub, count, before[name]) if name in before else count
            for name, count in self.counts.items()
        }

    def end_epoch(self, row: dict[str, Any]) -> None:
        """Its line of the history; what is summed over an epoch begins anew."""
        self.history.append(row)
        self.epoch, self.batch, self.seen, self.counts, self.logged = self.epoch + 1, 0, 0, {}, {}
        self.loss_sum, self.train_s, self.wait_s = 0.0, 0.0, 0.0
