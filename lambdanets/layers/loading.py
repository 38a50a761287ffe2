"""Loading a layer's weights: tables of another size, unknown and missing keys."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lambdanets.errors import mismatch

_AVG_POOL = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
_RESIZE = ("linear", "bicubic", "trilinear")


def resize_table(table: Tensor, size: Sequence[int]) -> Tensor:
    """Interpolate a relative table to the offsets of another map size, as position embeddings are in transfer.

    table    (r_1, ..., r_d, k, u), every r odd
    size     new map sizes, d of them (1, 2 or 3)
    returns  (2·size_1 - 1, ..., 2·size_d - 1, k, u), offset 0 still in the middle

    >>> resize_table(torch.ones(13, 13, 16, 1), (14, 10)).shape
    torch.Size([27, 19, 16, 1])
    """
    d = len(size)
    if table.dim() != d + 2 or min(size) < 1:
        raise ValueError(f"a table of shape {tuple(table.shape)} is for maps of {table.dim() - 2} axes, size is {size}")
    wide = torch.promote_types(table.dtype, torch.float32)  # 16 bits are rounded once, 64 keep theirs
    channels = table.flatten(d).movedim(-1, 0)[None].to(wide)  # (1, k·u, r...)
    sides = [2 * s - 1 for s in size]
    out = F.interpolate(channels, size=sides, mode=_RESIZE[d - 1], align_corners=True)
    return out[0].movedim(0, -1).reshape(*sides, *table.shape[d:]).to(table.dtype)


class StrictLoading(nn.Module):
    """A module whose `load_state_dict` says in a few lines what does not fit, and what to do."""

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's, hooks and versions of modules included, but an error of keys and shapes names at most ten a
        kind, with shapes, and the remedy."""
        try:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        except RuntimeError as error:
            own = {k: tuple(v.shape) for k, v in self.state_dict().items() if isinstance(v, Tensor)}
            theirs = {k: tuple(v.shape) for k, v in state_dict.items() if isinstance(v, Tensor)}
            wrong = {k: (own[k], theirs[k]) for k in own.keys() & theirs.keys() if own[k] != theirs[k]}
            missing = [k for k in sorted(own.keys() - theirs.keys()) if k in str(error)] if strict else []
            extra = [k for k in sorted(theirs.keys() - own.keys()) if k in str(error)] if strict else []
            if not (wrong or missing or extra):  # somebody's hook or extra state
                raise
            raise RuntimeError(mismatch(type(self).__name__, dict(sorted(wrong.items())), missing, extra)) from error
