"""The content part where it is one lambda an example, q·(K̄ᵀV), or a running sum of them; keys over what is visible.

Where each query sees a context of its own, it is `blockwise.content_masked`.
"""

import torch
from torch import Tensor


def content_lambda(keys: Tensor, values: Tensor, key_norm: str, visible: Tensor | None) -> Tensor:
    """λc = K̄ᵀV (b, k, v): one an example, shared by all its queries.

    `visible` (b, 1, m) or None hides contexts from every query. float16 sums in float32, where all of it fits.
    """
    values = values.float() if values.dtype == torch.float16 else values
    keys_bar = normalise(keys, None if visible is None else visible.transpose(1, 2)[..., None], key_norm, 1)
    b, m, k, u = keys_bar.shape
    keys_bar = keys_bar.to(values.dtype).permute(0, 2, 1, 3).reshape(b, k, m * u)
    return torch.bmm(keys_bar, values.permute(0, 1, 3, 2).reshape(b, m * u, values.shape[2]))


def content_causal(q: Tensor, keys: Tensor, values: Tensor, key_norm: str) -> Tensor:
    """The content part in causal order (query n sees contexts m <= n) as a running sum: work and memory linear in n.

    The state carried from block to block is the lambda normalised at the last position seen, so every exponent is
    at most zero and nothing can overflow.
    """
    b, n, k, u = keys.shape
    block = 64  # each block builds (b, 64, 64, k, u)
    work = torch.float64 if keys.dtype == torch.float64 else torch.float32
    keys, wide = keys.to(work), values.to(work)
    if key_norm == "softmax":
        norms = keys.logcumsumexp(1)  # (b, n, k, u), log of the sum up to n
    elif key_norm == "l2":
        norms = keys.square().cumsum(1).clamp_min(1e-24).sqrt()
    else:
        norms = torch.ones_like(keys)

    def weight(x: Tensor, norm: Tensor) -> Tensor:
        return (x - norm).exp() if key_norm == "softmax" else x / norm

    # What a past position weighs in the state, normalised at `before`, must be renormalised at n.
    state = wide.new_zeros(b, k, u, wide.shape[2])
    outputs = []
    for lo in range(0, n, block):
        hi = min(n, lo + block)
        now = norms[:, lo:hi]  # (b, block, k, u)
        seen = torch.ones(hi - lo, hi - lo, dtype=torch.bool, device=q.device).tril()[..., None, None]
        # Fill before the exponential: exp of a future key could be infinite, and infinity times zero has no gradient.
        inner = torch.where(seen, keys[:, None, lo:hi], torch.finfo(work).min if key_norm == "softmax" else 0)
        inside = weight(inner, now[:, :, None]) * seen
        lam = torch.einsum("bnmku,bmvu->bnkv", inside, wide[:, lo:hi])
        if lo:
            before = norms[:, lo - 1 : lo]
            faded = (before - now).exp() if key_norm == "softmax" else before / now
            lam = lam + torch.einsum("bnku,bkuv->bnkv", faded, state)
            state = state * faded[:, -1, :, :, None]
        state = state + torch.einsum("bmku,bmvu->bkuv", inside[:, -1], wide[:, lo:hi])
        outputs.append(torch.einsum("bnhk,bnkv->bnhv", q[:, lo:hi], lam.to(q.dtype)))
    return torch.cat(outputs, 1)


def normalise(keys: Tensor, visible: Tensor | None, key_norm: str, axis: int) -> Tensor:
    """Normalise over the context axis, in float32 or better; zero where not visible, also where nothing is."""
    keys = keys.to(torch.float64 if keys.dtype == torch.float64 else torch.float32)
    if key_norm == "softmax":
        if visible is None:
            return keys.softmax(axis)
        # A finite fill keeps a fully masked row finite; the second mask makes it zero.
        return torch.where(visible, keys, torch.finfo(keys.dtype).min).softmax(axis) * visible
    if visible is not None:
        keys = keys * visible
    return keys / keys.square().sum(axis, keepdim=True).clamp_min(1e-24).sqrt() if key_norm == "l2" else keys
