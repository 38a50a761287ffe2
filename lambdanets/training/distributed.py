"""The ranks of a run: what they know of each other, what they agree on, and how they leave together.

A run of one process is a run of one rank, and nothing is set up for it. Of several, gloo carries what is decided and
whatever lives on CPUs, NCCL the gradients of GPUs.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from lambdanets.errors import BadRun, LostProcess, some
from lambdanets.runs.nested_state import flatten, unflatten

_WORDS = "why a rank left"
_FOR_EVER = timedelta(days=365)


class Ranks:
    """This process among those of the run, as torchrun's variables say: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_*.

        with Ranks() as ranks:
            with ranks.together():       # an error on one rank is an error on all
                data = read()
            total, = ranks.sum(mine)

    An exception that leaves the block is told to the other ranks, which raise LostProcess with its text: where they
    next wait for this one, or by `words`, which a watchdog asks for.
    watched  a watchdog decides how long a rank waits for another; else torch does, after half an hour
    Raises BadRun where the variables cannot be those of a run, or the ranks do not find each other.
    """

    agreed: BaseException | None = None
    """The error that all ranks raised last, at the same place: what they do next they may do together."""

    def __init__(self, *, watched: bool = False) -> None:
        self.ranks = _number("WORLD_SIZE", 1, least=1)
        if self.ranks > 1 and "RANK" not in os.environ:
            raise BadRun(f"WORLD_SIZE is {self.ranks} and RANK is not set: start the processes with torchrun")
        self.rank = _number("RANK", 0)
        self.local_rank = _number("LOCAL_RANK", self.rank)
        if self.rank >= self.ranks:
            raise BadRun(f"RANK is {self.rank} and WORLD_SIZE {self.ranks}: ranks run from 0 to WORLD_SIZE - 1")
        self._timeout = _FOR_EVER if watched else None
        self._store: dist.Store | None = None
        self._asking: dist.Store | None = None  # its own connection: the watchdog's thread waits for nobody

    @classmethod
    def alone(cls) -> Ranks:
        """One rank, whatever the variables say."""
        ranks = cls.__new__(cls)
        ranks.rank, ranks.ranks, ranks.local_rank, ranks._store, ranks._asking = 0, 1, 0, None, None
        ranks._timeout = None
        return ranks

    def __enter__(self) -> Ranks:
        if self.ranks == 1:
            return self
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        try:
            found, rank, ranks = next(iter(dist.rendezvous("env://", self.rank, self.ranks)))
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun keeps its store over restarts
            store = dist.PrefixStore(f"attempt {attempt}", found)
            if store.add(f"processes of rank {rank}", 1) > 1:
                raise BadRun(f"two processes have RANK={rank}: each needs its own, as torchrun gives them")
            store.wait([f"processes of rank {other}" for other in range(ranks)])  # 5 minutes
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(
                backend, store=dist.PrefixStore("group", store), rank=rank, world_size=ranks, timeout=self._timeout
            )
        except BadRun:
            raise
        except (RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError
            why = str(error).splitlines()[0]
            remedy = "is another run there, do two processes have one RANK, are all started?"
            if "EADDRINUSE" in str(error):
                remedy = "the port is in use by another run or by a second process with RANK=0: give another one"
            me = f"rank {self.rank} of {self.ranks}"
            raise BadRun(f"{me} cannot meet the others at {place} ({why}): {remedy}") from error
        self._store = store
        self._asking = store.clone()
        self._asking.set_timeout(timedelta(seconds=5))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._store is None:
            return
        words = None
        if error is None:
            self.sum(0)  # rank 0 may host the store: it leaves last
        else:
            words = self.words()
            if words is None and not isinstance(error, LostProcess) and not _lost_contact(error):
                self.tell(f"rank {self.rank} failed: {type(error).__name__}: {error}")
        self._asking = None  # the watch asks no more: from here on others are expected to be gone
        if error is None or not torch.cuda.is_available():  # NCCL would wait for the others to finish
            # The group's destructor joins gloo's thread while it holds the interpreter's lock (torch 2.11), and that
            # thread may still need the lock to drop the last collective's Python objects: let it, or both wait forever.
            time.sleep(0.2)
            dist.destroy_process_group()
        self._store = None
        if error is not None and _lost_contact(error):
            lost = LostProcess(words or "the connection to another rank broke: it was killed, or its machine is gone")
            lost.__notes__ = list(getattr(error, "__notes__", []))
            raise lost from error

    @property
    def first(self) -> bool:
        """Whether this is rank 0, the one that writes and prints."""
        return self.rank == 0

    def tell(self, words: str) -> None:
        """Leave word of why this rank ends; the first word stays."""
        if self._asking is not None:
            with contextlib.suppress(RuntimeError):  # nobody is left to read it
                self._asking.compare_set(_WORDS, "", words)

    def words(self) -> str | None:
        """What a rank said before it left, or that rank 0 cannot be reached; None while all is well."""
        if self._asking is None:
            return None
        try:
            return self._asking.get(_WORDS).decode() if self._asking.check([_WORDS]) else None
        except RuntimeError as error:
            return f"rank 0 is gone: {str(error).splitlines()[0]}"

    def sum(self, *numbers: float) -> list[float]:
        """The sum of each number over the ranks, in float64: every rank gets the same bits."""
        if self.ranks == 1:
            return [float(number) for number in numbers]
        total = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def all(self, value: Any) -> list[Any]:
        """Every rank's value, by rank; anything that JSON holds (dictionaries keep string keys)."""
        if self.ranks == 1:
            return [value]
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.ranks)]
        dist.all_gather(sizes, torch.tensor([len(own)]))
        longest = int(max(size.item() for size in sizes))
        texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.ranks)]
        dist.all_gather(texts, nn.functional.pad(own, (0, longest - len(own))))
        return [json.loads(t[: int(n)].numpy().tobytes()) for t, n in zip(texts, sizes, strict=True)]

    def from_first(self, state: Any) -> Any:
        """Rank 0's nested state (what `state.flatten` takes), on every rank, tensors on the CPU; others give None."""
        if self.ranks == 1:
            return state
        tensors, tree = flatten(state) if self.first else ({}, None)
        forms = {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()}
        tree, forms = self.all([tree, forms] if self.first else None)[0]
        shared = {}
        for name, (dtype, shape) in forms.items():
            here = tensors[name].cpu().contiguous() if self.first else torch.empty(shape, dtype=getattr(torch, dtype))
            dist.broadcast(here.view(-1).view(torch.uint8), 0)
            shared[name] = here
        return unflatten(shared, tree)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Where the block fails on one rank it fails on all: with its own error there, with LostProcess elsewhere.

        Nothing in the block may wait for another rank.
        """
        if self.ranks == 1:
            yield
            return
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            own = error
        self.fail_together(own)

    def fail_together(self, own: Exception | None) -> None:
        """Where one rank has an error, all raise: that one its own, the others LostProcess. All ranks call it."""
        told = self.all(None if own is None else f"{type(own).__name__}: {own}")
        failed = next((f"rank {rank} failed: {text}" for rank, text in enumerate(told) if text is not None), None)
        if failed is not None:
            self.agreed = LostProcess(failed) if own is None else own
            raise self.agreed

    def differences(self, what: dict[str, Any]) -> str:
        """What is not equal on all ranks, in words: "seed is 1 on rank 0 and 2 on rank 1"; "" where all is.

        what  name -> anything that JSON holds, the same names on every rank
        """
        told = self.all(what)
        found = []
        for name in what:
            holders: dict[str, list[int]] = {}
            for rank, theirs in enumerate(told):
                holders.setdefault(json.dumps(theirs.get(name), sort_keys=True), []).append(rank)
            if len(holders) > 1:
                each = [
                    f"{json.loads(value)} on rank{'s' * (len(ranks) > 1)} {some(ranks)}"
                    for value, ranks in holders.items()
                ]
                found.append(f"{name} is {some(each, between=' and ')}")
        return "; ".join(found)

    def parallel(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model whose backward pass averages the gradients over the ranks (DDP)."""
        if self.ranks == 1:
            return model
        # `average_` keeps the buffers equal, and uses every rank's batch. The older argument warns in newer torch.
        newer = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
        synchronise: dict[str, Any] = {"forward_sync_buffers" if newer else "broadcast_buffers": False}
        return DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **synchronise,
        )

    def shard(self, model: nn.Module, blocks: Iterable[nn.Module], device: torch.device) -> None:
        """Divide the parameters among the ranks, in place (FSDP2): those of a block are whole while it computes.

        A block that shares a parameter with another is not a unit of its own: it goes with what lies outside blocks.
        """
        mesh = init_device_mesh(device.type, (self.ranks,))
        blocks = list(blocks)
        users = Counter(p for block in blocks for p in block.parameters())
        for block in blocks:
            if all(users[p] == 1 for p in block.parameters()):
                fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)

    def average_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor (floats, one device) by its mean over the ranks."""
        tensors = list(tensors)
        if self.ranks == 1 or not tensors:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        flat /= self.ranks
        for t, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.copy_(mean.view_as(t))


def _number(name: str, otherwise: int, *, least: int = 0) -> int:
    """A number that a launcher left in the environment. Raises BadRun where it is none."""
    text = os.environ.get(name)
    if text is None:
        return otherwise
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) >= least):
        raise BadRun(f"{name} is {text!r} and should be a whole number from {least}, as torchrun sets it: unset it")
    return int(text)


def _lost_contact(error: BaseException) -> bool:
    """Whether it is the transport's complaint about another rank. gloo has no type of its own for that."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def part_like(t: Tensor, like: Tensor) -> Tensor:
    """`t`, the same on every process, divided among them as `like` is, if `like` is."""
    if not isinstance(like, DTensor):
        return t
    return distribute_tensor(t.contiguous(), like.device_mesh, like.placements, src_data_rank=None)


def gathered(value: Any, *, keep: bool = True) -> Any:
    """A nested state with every divided tensor put together again; all processes call it, in the same order.

    keep   False: the tensors are dropped as soon as another process has them
    """
    if isinstance(value, DTensor):
        together = value.full_tensor()
        return together if keep else None
    if isinstance(value, dict):
        return type(value)((key, gathered(item, keep=keep)) for key, item in value.items())
    if isinstance(value, list):
        return [gathered(item, keep=keep) for item in value]
    return value
