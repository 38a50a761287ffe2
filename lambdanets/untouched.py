"""Is this module exactly what it seems? `fuse`, `accelerate` and the layers ask before they read its weights instead of
calling it; and what they answer to a person: which modules were changed, which were left, and why.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules import module as _torchs

CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_METHODS = ("forward", "_conv_forward", "_call_impl", "_wrapped_call_impl")  # what a call of a module runs


def hooked(module: nn.Module) -> bool:
    """Whether somebody listens to a module's calls, or to those of all modules."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _torchs._global_forward_hooks
        or _torchs._global_forward_pre_hooks
        or _torchs._global_backward_hooks
        or _torchs._global_backward_pre_hooks
    )


def touched(module: nn.Module, kinds: Sequence[type]) -> str | None:
    """What keeps a module from being exactly one of these kinds, computed from its own weights; None: nothing.

    A subclass may have another forward, as every parametrised module has (weight and spectral norm, LoRA); hooks see or
    change what goes in and out (pruning is one); tools replace `forward` on the object (offloading) or put tensors of
    a class of their own in the weights' place (quantisation).
    """
    if type(module) not in kinds:
        kind = next((kind for kind in kinds if isinstance(module, kind)), kinds[0])
        return f"is no {kind.__name__} itself but a {type(module).__name__}"
    if hooked(module):
        return "has hooks"
    for method in _METHODS:
        if method in module.__dict__:
            return f"has a {method} of its own"
    for name, weight in module._parameters.items():
        if weight is not None and hasattr(type(weight), "__tensor_flatten__"):
            return f"has a {type(weight).__name__} as {name}"
    return None


def why_called(part: nn.Module | None) -> str | None:
    """Why a part of a lambda layer (a 1x1 projection, a batch norm, nothing) has to be called; None: it may be read."""
    if part is None:
        return None
    if (why := touched(part, (*CONV, *BATCH_NORM, nn.Identity))) is not None or isinstance(part, nn.Identity):
        return why
    if isinstance(part, CONV):
        weight: Tensor = part.weight
        padded = part.padding not in ("same", "valid") and any(part.padding)
        if padded or weight[0, 0].numel() != 1 or part.groups != 1 or max(part.stride) != 1:
            return "is no 1x1 convolution of stride 1"
        return None
    return why_not_folded(part)


def why_not_folded(norm: nn.Module) -> str | None:
    """Why a batch norm is no multiplication and addition by numbers that it holds, in evaluation; None: it is."""
    for name in ("running_mean", "running_var", "weight", "bias"):
        if getattr(norm, name) is None:
            return f"has no {name}"
    return None


class Change(NamedTuple):
    """What became of one module: its path, its class, "replaced", "folded" or "left", and into what or why."""

    path: str
    kind: str
    what: str
    why: str


class Changes(list[Change]):
    """What `fuse` or `accelerate` did to a model, module by module; `print` it."""

    def of(self, path: str) -> Change | None:
        """The row of one module."""
        return next((row for row in self if row.path == path), None)

    def add(self, path: str, module: nn.Module, what: str, why: str) -> None:
        self.append(Change(path or "(the model itself)", type(module).__name__, what, why))

    def __str__(self) -> str:
        if not self:
            return "nothing here is a lambda layer or a batch norm"
        counts = {what: sum(row.what == what for row in self) for what in ("replaced", "folded", "left")}
        head = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        width = [max(len(row[i]) for row in self) for i in range(3)]
        rows = (f"{r.what:{width[2]}}  {r.path:{width[0]}}  {r.kind:{width[1]}}  {r.why}" for r in self)
        return "\n".join([head, *rows])
