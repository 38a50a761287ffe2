"""The main job: a recipe and a task in, a folder with weights, numbers and pictures out. One process or many.

1. What can be wrong is looked for first (preflight.py): folder, extras, device, samples, model. Then something is
   written.
2. Every rank comes to the same decisions, from numbers summed over all of them; an error on one is an error on all.
   Rank 0 alone writes. What a rank must draw, it draws from (seed, step, rank); its part of the
   samples is one of (seed, epoch).
3. Before a step the run may end or be saved: the state is that of a whole number of steps. A signal (SIGTERM, Ctrl-C,
   SIGHUP) is answered there, with a checkpoint; an error that comes there, on all ranks at once, leaves one too. A
   resumed run computes what the killed one would have, to the bit.
4. A step: samples -> loss -> gradients. If either is not finite on any rank, all stop there, before the weights change;
   or they leave the step out, where that was asked for.
5. An epoch: the running average is evaluated on the held-out samples, its weights are written, then run.json.
6. The end: the last epoch's weights are the result. No epoch is picked by its accuracy on held-out samples.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from lambdanets.errors import SHOWN, BadRun, EvaluationStopped, NonFiniteLoss, Terminated, lost_reader, printable, some
from lambdanets.files import to_stderr, write_json
from lambdanets.recipes.recipe import Options, TrainingRecipe
from lambdanets.runs.checkpoints import Checkpoints
from lambdanets.runs.folder import WEIGHTS, versions
from lambdanets.runs.log import Log
from lambdanets.runs.record import RUN_JSON
from lambdanets.runs.weights import save_weights
from lambdanets.training import optim
from lambdanets.training.distributed import Ranks
from lambdanets.training.learner import Gradients, Learner, RunState, train_mode
from lambdanets.training.preflight import Start, prepare
from lambdanets.training.progress import Progress
from lambdanets.training.task import Batch, Scores, Task
from lambdanets.training.watchdog import Interrupted, Watchdog


class Outcome(NamedTuple):
    """Of `train`: the run's folder, its run.json and seconds; its scores, None where it was finished before."""

    folder: Path
    record: dict[str, Any]
    scores: Scores | None
    seconds: float


def train(
    recipe: TrainingRecipe,
    task: Task,
    *,
    out: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    resume: bool = False,
    init_from: str | Path | None = None,
    options: Options | None = None,
) -> Outcome:
    """Train a task by `recipe` and write the folder of the run (runs/folder.py lists its files).

    Under torchrun every process calls it with the same arguments, and the run is one: the batch is divided.

    out       a new or empty folder; None: the next runs/NAME-N
    seed      decides first weights and dropout; the task has its own, of the order of its samples
    device    "cpu", "cuda", "cuda:1"; "auto": the first GPU, or else the CPU. Of several processes each has its own GPU
    resume    go on with the run in `out` from its newest good checkpoint: recipe, seed and samples must be the same. If
              it is finished, there is nothing to do; if there is none yet, it starts, and says so
    init_from a safetensors file or the folder of a run: the first weights, but for a classifier of other classes
    options   how it is computed, saved and watched; a resumed run may have others
    Raises, before the first step and before anything is written: BadRun (folder, device, missing extra), BadRecipe
    (model or its image size), and what the task raises. Later: NonFiniteLoss; Terminated and KeyboardInterrupt,
    after a checkpoint; LostProcess (another rank failed, or a process that reads samples was killed); BadRun where
    three checkpoints in a row, or the last epoch's results, could not be written; BadData where too many samples are
    bad; DiskFault where one cannot be read. The steps that were done before such an error are saved, where it came
    between two of them. Notes on the error say that, and which weights the folder holds.
    """
    options = options or Options()
    ranks = Ranks(watched=True)
    with (
        torch.inference_mode(False),  # the caller's modes stay the caller's
        torch.enable_grad(),
        contextlib.ExitStack() as made,
        Watchdog(hang_timeout_s=options.hang_timeout_s, words=ranks.words, tell=ranks.tell) as watch,
        ranks,
        contextlib.ExitStack() as opened,
    ):
        try:
            with watch.interruptible():
                watch.beat()
                start = prepare(
                    recipe, task, out=out, seed=seed, device=device, resume=resume, init_from=init_from,
                    options=options, ranks=ranks, watch=watch, made=made,
                )  # fmt: skip
                if start.old is not None and start.old["status"] == "finished":
                    if ranks.first:
                        print(f"{printable(start.folder)} is finished: there is nothing to go on with")
                    return Outcome(start.folder, start.old, None, 0.0)
                cuda = [start.device] if start.device.type == "cuda" else []
                opened.enter_context(torch.random.fork_rng(devices=cuda))  # the caller's randomness stays
                run = _begun(start, ranks, watch, opened, resume=resume, init_from=init_from)
            return run.to_the_end()
        except Interrupted:
            raise watch.stopped("stopped before a step was done: give the same command, with --resume") from None
        except RuntimeError as error:
            if (lost := lost_reader(error)) is None:
                raise
            raise lost from error


def _begun(
    start: Start,
    ranks: Ranks,
    watch: Watchdog,
    opened: contextlib.ExitStack,
    *,
    resume: bool,
    init_from: str | Path | None,
) -> _Run:
    """The run before its next step: the newest checkpoint is read, the model is there, run.json is written."""
    recipe, seed, state, store = start.recipe, start.record["seed"], None, None
    stores = {"run": start.record["id"], "keep_last": start.options.keep_checkpoints}
    with ranks.together():
        if ranks.first and start.old is not None:
            store = opened.enter_context(Checkpoints(start.folder, **stores))
            if (found := store.newest()) is not None:
                state = found.load()
    watch.beat()
    state = ranks.from_first(state)
    with ranks.together(), watch.working():
        torch.manual_seed(seed % 2**63)
        learner = Learner(
            recipe,
            start.task,
            batch_images=start.task.train.batch_images,
            seed=seed,
            device=start.device,
            ranks=ranks,
            init_from=init_from if state is None else None,
            channels_last=start.options.channels_last,
            recompute=start.options.recompute,
        )
        if state is not None:
            learner.load_state(state["learner"])
        weights = learner.fingerprint() if ranks.ranks > 1 else ""
    if differing := ranks.differences({"the sha256 of the first weights": weights}):
        raise BadRun(f"the processes begin with different weights: {differing}. Is --init-from the same file for all?")
    with ranks.together():
        if ranks.first:  # the first thing that is written
            if store is None:
                store = opened.enter_context(Checkpoints(start.folder, **stores))
            start.begin(learner.began_from)
    with ranks.together():  # stacks and bad images are listed on the machine of the rank
        start.folder.mkdir(parents=True, exist_ok=True)
    watch.write_to(start.folder / f"stacks-rank{ranks.rank}.txt")
    watch.beat()
    learner.parallelise(compile_model=start.options.compile_model, fsdp=start.options.fsdp)
    run = _Run(start, ranks, watch, learner, store)
    with ranks.together():
        run.go_on_from(state, asked=resume)
    watch.beat()
    return run


class _Run:
    """The loop. `record` becomes run.json; it is written after every epoch and at every way out."""

    def __init__(
        self, start: Start, ranks: Ranks, watch: Watchdog, learner: Learner, store: Checkpoints | None
    ) -> None:
        recipe, task, batches = start.recipe, start.task, start.task.train
        self.recipe, self.options, self.ranks, self.watch, self.learner = recipe, start.options, ranks, watch, learner
        self.task, self.batches = task, batches
        self.record, self.folder, self.store = start.record, start.folder, store
        self.at = RunState()
        self.epochs, self.total_steps, self.warmup_steps = recipe.length(len(batches))
        self.unwritten = 0  # epochs since the one whose weights are on the disk
        self.between_steps = True  # the state is that of a whole number of steps
        self.bad = 0  # of the samples in `batches.bad`, those that came before the last whole step

    def go_on_from(self, state: dict[str, Any] | None, *, asked: bool) -> None:
        """Take the position of a checkpoint, or the first step, and say which."""
        if state is not None:
            try:
                self.at = RunState.from_json(state["position"])
                self.batches.bad.update(state["bad"])
            except (KeyError, TypeError, ValueError) as error:
                raise BadRun(f"the checkpoint of {self.folder} is not one of this version: {error!r}") from error
        self.bad = len(self.batches.bad)
        at = self.at
        self.record["history"] = at.history
        if self.ranks.first:
            begins = f"goes on after step {at.step} of {self.total_steps}"
            if state is None:
                begins = "has no checkpoint to go on from and starts at its first step" if asked else "starts"
            on = self.learner.device if self.ranks.ranks == 1 else f"{self.ranks.ranks} processes"
            print(f"{self.task.title}, {self.epochs} epochs on {on}: {printable(self.folder)} {begins}", flush=True)
            self.record["starts"].append({"step": at.step, "ranks": self.ranks.ranks, "versions": versions()})

    def to_the_end(self) -> Outcome:
        """Every step and epoch that is left, then the result."""
        at = self.at
        self.began_s = time.monotonic() - at.total_s
        self.saved_s, self.saved_step, self.first_step = time.monotonic(), at.step, at.step
        self.progress: Progress | None = None  # rank 0's, as the log
        self.log: Log | None = None
        scores: Scores | None = None
        try:
            with self.ranks.together():
                if self.ranks.first:
                    self.log = Log(self.folder, first_step=at.step, tensorboard=self.options.tensorboard)
                    self.progress = Progress(self.epochs, len(self.batches) * self.batches.batch_images)
                    self._write_record()
            while at.epoch < self.epochs:
                scores = self._epoch()
            if scores is None:  # the last epoch was over when this run was killed
                scores = self._evaluate()
                with self.ranks.together():
                    if self.ranks.first:
                        self._write_weights()  # maybe that was what failed
            with self.ranks.together():
                if self.store is not None:
                    self.store.wait()
            return self._finish(scores)
        except BaseException as given:
            error = lost_reader(given) or given
            stopped_by_hand = isinstance(error, (KeyboardInterrupt, Terminated))
            self.record["status"] = "interrupted" if stopped_by_hand else "stopped"
            self.record["error"] = repr(error)
            epoch = min(at.epoch + 1, self.epochs)
            error.add_note(f"{self.record['status']} in epoch {epoch} of {self.epochs}: {self._kept()}")
            all_here = self.ranks.ranks == 1 or given is self.ranks.agreed
            if isinstance(error, Exception) and not isinstance(error, Terminated) and self.between_steps and all_here:
                error.add_note(self._saved_at_the_end())
            with contextlib.suppress(OSError):  # a full disk must not hide the first error
                self._write_record()
            raise error from error.__cause__
        finally:
            for shown in (self.progress, self.log):
                if shown is not None:
                    shown.close()

    def _epoch(self) -> Scores | None:
        """Its steps; then what the held-out samples say, if they are asked after this epoch."""
        at = self.at
        train_mode(self.learner.model, self.recipe)
        stream = self.batches.epoch(at.epoch, first_batch=at.batch)
        while at.batch < len(self.batches) and at.step < self.total_steps:
            started = time.monotonic()
            batch, wait_s = self._next_batch(stream)
            self.between_steps = False
            self._step(batch, wait_s)
            self.between_steps, self.bad = True, len(self.batches.bad)
            at.train_s += time.monotonic() - started
            self.watch.beat()
        asked = (at.epoch + 1) % self.recipe.eval_epochs == 0 or at.epoch + 1 == self.epochs
        scores = self._evaluate() if asked else None
        if scores is not None and not math.isfinite(scores.loss):
            raise NonFiniteLoss(f"the loss on the held-out images is {scores.loss} after epoch {at.epoch + 1}")
        seen = max(1, at.seen)
        trained, found = self.task.train_row(at.counts, seen), {} if scores is None else scores.row()
        row = {
            "epoch": at.epoch + 1,
            "lr": self._rate(at.step - 1),
            "train_loss": at.loss_sum / seen,
            **trained,
            **found,
            "train_s": round(at.train_s, 3),
            "data_wait_s": round(at.wait_s, 3),
            "images_per_s": round(at.seen / at.train_s, 1),
        }
        at.end_epoch(row)
        with self.ranks.together():
            if self.ranks.first:
                self._warn(self.task.warning(at.history))
                self._write_weights()
                assert self.progress is not None
                assert self.log is not None
                best = found.get(self.task.best)
                held_out = None if best is None else self.task.held_out_said(best)
                self.progress.epoch(row, self.task.said(trained), held_out)
                self.log.write(at.step - 1, **found, epoch=at.epoch)
        if any(self._marks()):
            self._save()
        return scores

    def _warn(self, said: str | None) -> None:
        """On stderr, and in run.json, where it stays; what stands there is not said again."""
        if said is not None and said not in self.record.setdefault("warnings", []):
            self.record["warnings"].append(said)
            to_stderr(said)

    def _marks(self) -> tuple[bool, bool]:
        """Whether a checkpoint of this moment is of the best epoch so far, and a milestone."""
        at, options = self.at, self.options
        if at.batch or not at.history:  # in an epoch, or before its evaluation
            return False, False
        tops = [row.get(self.task.best, -math.inf) for row in at.history]
        best = options.keep_best and tops[-1] > max(tops[:-1], default=-math.inf)
        return best, options.milestone_epochs > 0 and at.epoch % options.milestone_epochs == 0

    def _next_batch(self, stream: Iterator[Batch]) -> tuple[Batch, float]:
        """The next batch and the seconds waited for it; what is due between two steps is done here, on all ranks."""
        batch, failed = None, None
        started = time.monotonic()
        try:
            with self.watch.interruptible():
                batch = next(stream)
            if self.store is not None:
                self.store.check()
        except Interrupted:
            pass
        except Exception as error:
            failed = lost_reader(error) or error
        wait_s = time.monotonic() - started
        due = self.ranks.first and self._save_is_due()
        stops, failures, saves = self.ranks.sum(self.watch.signal is not None, failed is not None, due)
        if stops:
            self._stop()
        if failures:
            self.ranks.fail_together(failed)
        if saves:
            self._save()
        assert batch is not None
        return batch, wait_s

    def _step(self, batch: Batch, wait_s: float) -> None:
        at, ranks = self.at, self.ranks
        lr = self._rate(at.step)
        found = self.learner.gradients(batch, at.step)
        numbers, form = tree_flatten(found.counts)
        loss_sum, seen, waited_s, *summed = ranks.sum(found.loss_sum, len(batch.ids), wait_s, *numbers)
        loss = loss_sum / seen
        if math.isfinite(loss) and math.isfinite(found.norm):
            self.learner.apply(at.step, lr, found.norm)
            at.learnt_from(int(seen), loss_sum, tree_unflatten(summed, form))
        else:
            self._not_finite(batch, found, loss)
            self.learner.leave_out()
        at.step, at.batch, at.wait_s = at.step + 1, at.batch + 1, at.wait_s + waited_s / ranks.ranks
        if self.progress is not None and self.log is not None:
            shown = max(1, at.seen)
            said = self.task.said(self.task.train_row(at.counts, shown))
            self.progress.step(int(seen), at.epoch, at.loss_sum / shown, said)
            if at.step % self.options.log_steps == 0 or at.batch == len(self.batches):
                self.log.write(
                    at.step - 1, loss=loss, lr=lr, norm=found.norm,
                    images_per_s=round(at.seen / at.train_s if at.train_s else 0.0, 1),
                    data_wait_s=round(at.wait_s, 4), **self.task.log_row(at.since_logged()),
                )  # fmt: skip

    def _not_finite(self, batch: Batch, found: Gradients, loss: float) -> None:
        """Raise NonFiniteLoss, on every rank the same, unless such a step may be left out."""
        at = self.at
        if math.isfinite(loss) and found.scale > 1:  # float16: this is how its scale is found
            at.left_out += 1
            return
        names = [self.batches.names[i] for i in batch.ids]
        told = self.ranks.all([math.isfinite(found.loss_sum), names])
        suspects = [name for finite, theirs in told if not finite for name in theirs]
        suspects = suspects or [name for _, theirs in told for name in theirs]
        what = {
            "step": at.step,
            "epoch": at.epoch + 1,
            "loss": str(loss),  # JSON has no NaN
            "gradient_norm": str(found.norm),
            "counts": {name: str(value) for name, value in found.counts.items()},
            "images": suspects,
        }
        if self.log is not None:
            self.log.write(at.step, non_finite=what)
        if at.left_out_in_a_row < self.options.skip_non_finite:
            at.left_out, at.left_out_in_a_row = at.left_out + 1, at.left_out_in_a_row + 1
            return
        self.learner.leave_out()
        self.between_steps = True
        self.record["non_finite"] = what
        more = f" (all: {self.folder / RUN_JSON})" if len(suspects) > SHOWN else ""
        self.ranks.agreed = NonFiniteLoss(
            f"step {at.step}: the loss is {loss}, the gradient's norm {found.norm}. "
            f"The images were {some(suspects)}{more}. "
            "Look at them, try a lower --lr-per-256, or leave such steps out: --skip-non-finite"
        )
        raise self.ranks.agreed

    def _evaluate(self) -> Scores:
        def go_on() -> bool:
            self.watch.beat()
            return self.watch.signal is None

        try:
            model = self.learner.average.up_to_date()
            return self.task.scores(model, self.learner.device, self.ranks, go_on)
        except EvaluationStopped:
            self._stop()
            raise

    def _save_is_due(self) -> bool:
        steps, minutes = self.at.step - self.saved_step, (time.monotonic() - self.saved_s) / 60
        by_step = self.options.save_steps and steps >= self.options.save_steps
        by_time = self.options.save_minutes and minutes >= self.options.save_minutes
        return steps > 0 and bool(by_step or by_time)

    def _save(self, *, wait: bool = False) -> None:
        """Save the state of `at.step` steps; the thread of the store writes it, unless it is waited for."""
        own = dict(itertools.islice(self.batches.bad.items(), self.bad))
        bad = {name: reason for theirs in self.ranks.all(own) for name, reason in theirs.items()}
        best, milestone = self._marks()
        self.at.total_s = time.monotonic() - self.began_s
        learnt = self.learner.state()
        with self.ranks.together():
            if self.store is not None:
                state = {"learner": learnt, "position": dataclasses.asdict(self.at), "bad": bad}
                self.store.save(self.at.step, state, best=best, milestone=milestone)
                if wait:
                    self.store.wait()
        self.saved_s, self.saved_step = time.monotonic(), self.at.step
        self.watch.beat()

    def _stop(self) -> None:
        self._save(wait=True)
        text = f"stopped after step {self.at.step} of {self.total_steps}, which is saved: go on with --resume"
        raise self.watch.stopped(text)

    def _saved_at_the_end(self) -> str:
        """Save what is whole before an error ends the run, on all ranks at once; gives a sentence on it."""
        if self.at.step == self.first_step:
            return "no step was done since the start"
        try:
            self._save(wait=True)
        except Exception as error:  # the first error is the one to raise
            return f"the state after step {self.at.step} of {self.total_steps} could not be saved: {error}"
        return f"the state after step {self.at.step} of {self.total_steps} is saved: go on with --resume"

    def _rate(self, step: int) -> float:
        drops = self.recipe.drops if self.recipe.schedule == "steps" else None
        return optim.learning_rate(
            step, self.recipe.peak_lr, warmup_steps=self.warmup_steps, total_steps=self.total_steps, drops=drops
        )

    def _write_weights(self) -> None:
        """The weights as evaluated, and the record. After the last epoch they must be there; before, a full disk costs
        nothing but itself: the next epoch is the next try."""
        epoch, self.unwritten = self.at.epoch, self.unwritten + 1
        try:
            save_weights(self.learner.average.module, self.folder / WEIGHTS)
            self.unwritten = 0
            self._write_record()
        except OSError as error:
            why = self._not_written(f"after epoch {epoch}", error)
            if epoch == self.epochs:
                raise BadRun(f"{why}; mend that, then go on with --resume") from error
            to_stderr(f"{why}; tried again after the next epoch")

    def _not_written(self, when: str, error: OSError) -> str:
        return f"{self.folder}: {when} a file was not written: {error.strerror or error}; {self._kept()}"

    def _kept(self) -> str:
        history = self.at.history[: len(self.at.history) - self.unwritten]
        if not history:
            return f"no epoch was finished and written, so {self.folder} holds no weights"
        return f"the weights of epoch {history[-1]['epoch']} are in {self.folder / WEIGHTS}"

    def _write_record(self) -> None:
        if self.ranks.first:
            write_json(self.folder / RUN_JSON, self.record)

    def _finish(self, scores: Scores) -> Outcome:
        seconds = time.monotonic() - self.began_s
        bad = {name for theirs in self.ranks.all(list(self.batches.bad)) for name in theirs}
        self.record["status"] = "finished"
        self.record["result"] = {
            **scores.json(),
            "seconds": round(seconds, 1),
            "bad_train_images": len(bad),
            "left_out_steps": self.at.left_out,
        }
        stopped = False
        with self.ranks.together():
            if self.ranks.first:
                try:
                    with self.watch.working(), self.watch.interruptible():
                        self.task.report(self.folder, self.record, scores)
                    self._write_record()  # last: once it says "finished", a resumed run does nothing any more
                except Interrupted:
                    stopped = True
                except OSError as error:
                    why = self._not_written("all epochs are done, but", error)
                    raise BadRun(f"{why}; mend that, then go on with --resume") from error
        if any(self.ranks.sum(stopped)):
            self._stop()
        return Outcome(self.folder, self.record, scores, seconds)
