"""The paper's definition, one einsum a line. Read it first; every other file in `ops` must equal it.

Letters: b batch, n queries, m context, h queries per position (heads), k key depth, v value depth, u intra-depth.
It builds everything it names, a (b, n, m, k, u) tensor included, and is never made faster.
"""

import torch
from torch import Tensor


def relative_embeddings(table: Tensor, grid: tuple[int, ...], context_grid: tuple[int, ...] | None = None) -> Tensor:
    """Look up E[n, m] = R[t(m) - t(n)] for every query n and context m (paper, section 3.1 and appendix B.1).

    table         (r_1, ..., r_d, k, u), every r odd; the middle is offset 0; offsets outside the table give zero
    grid          sizes of the query grid, d of them
    context_grid  sizes of the context grid, the same d; the query grid unless given; both start at position 0
    returns       (n, m, k, u), n and m in row-major order
    """
    sides = table.shape[: len(grid)]
    queries = torch.cartesian_prod(*[torch.arange(s, device=table.device) for s in grid]).view(-1, len(grid))
    context = torch.cartesian_prod(*[torch.arange(s, device=table.device) for s in context_grid or grid])
    offsets = context.view(-1, len(grid))[None] - queries[:, None]  # (n, m, d)
    middle = torch.tensor([(r - 1) // 2 for r in sides], device=table.device)
    inside = (offsets.abs() <= middle).all(-1)
    index = torch.where(inside[..., None], offsets + middle, 0)
    return table[index.unbind(-1)] * inside[..., None, None]


def normalised_keys(keys: Tensor, visible: Tensor, key_norm: str) -> Tensor:
    """Normalise keys over the context positions that each query can see (paper, section 3.1).

    keys      (b, m, k, u);  visible (b, n, m), bool;  key_norm "softmax", "l2" or "none"
    returns   (b, n, m, k, u), zero where not visible
    """
    seen = visible[..., None, None]
    keys = keys[:, None]
    if key_norm == "softmax":
        return keys.masked_fill(~seen, torch.finfo(keys.dtype).min).softmax(2) * seen
    if key_norm == "l2":
        return keys * seen / (keys * seen).square().sum(2, keepdim=True).clamp_min(1e-24).sqrt()
    return keys * seen


def lambda_reference(
    q: Tensor,
    keys: Tensor | None,
    values: Tensor,
    embeddings: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    key_norm: str = "softmax",
) -> Tensor:
    """Turn the context into one linear function per query and apply it (paper, equations 1 to 3).

    y[b,n,h,v] = Σ_k q[b,n,h,k] · Σ_{m,u} (K̄[b,n,m,k,u] + E[n,m,k,u]) · V[b,m,v,u]

    q           (b, n, h, k)
    keys        (b, m, k, u), not yet normalised; None leaves the content part out
    values      (b, m, v, u)
    embeddings  (n, m, k, u); None leaves the position part out
    mask        (n, m) or (b, n, m), bool, True where query n sees context m
    returns     (b, n, h, v)
    """
    b, n, m = q.shape[0], q.shape[1], values.shape[1]
    visible = torch.ones(b, n, m, dtype=torch.bool, device=q.device) if mask is None else mask.expand(b, n, m)
    values = torch.where(visible.any(1)[..., None, None], values, 0)  # what nobody sees may hold anything, NaN too
    lambdas = q.new_zeros(b, n, q.shape[3], values.shape[2])
    if keys is not None:
        keys = torch.where(visible.any(1)[..., None, None], keys, 0)
        lambdas = lambdas + torch.einsum("bnmku,bmvu->bnkv", normalised_keys(keys, visible, key_norm), values)
    if embeddings is not None:
        seen = embeddings * visible[..., None, None]
        lambdas = lambdas + torch.einsum("bnmku,bmvu->bnkv", seen, values)
    return torch.einsum("bnhk,bnkv->bnhv", q, lambdas)
