"""The Triton kernels behind `fused.py`, which chooses their tiles and launches them.

A lower-case letter is a size in the paper's letters, an upper-case one the power of two that a program takes of it: N
queries, M contexts, B examples, V values, K keys, H heads. (N·K) at a line's end is the shape of what it makes.
Everything is contiguous: q (b, n, h, k), values (b, u, n, v), table (u, ry, rx, k), dy (b, n, h, v), lam_c (b, k, v).
"""

import os

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

_WIDEN = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # as triton.jit reads it below


@triton.jit
def _dot(a, b, precision: tl.constexpr, acc=None):  # type: ignore[no-untyped-def]
    if _WIDEN:  # the interpreter holds bfloat16 as bare bits
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=precision)


@triton.jit
def _tile(tile, N: tl.constexpr, strip, per_strip, height, width, ry, rx):  # type: ignore[no-untyped-def]
    """First position of a tile in its strip, the strip's left and columns; top, rows, left and columns of its box."""
    left = tile // per_strip * strip
    first, across = tile % per_strip * N, tl.minimum(strip, width - left)
    top = tl.maximum(first // across - ry // 2, 0)
    bottom = tl.minimum((first + N - 1) // across + ry // 2, height - 1)
    start = tl.maximum(left - rx // 2, 0)
    stop = tl.minimum(left + across - 1 + rx // 2, width - 1)
    return first, left, across, top, tl.maximum(bottom - top + 1, 0), start, stop - start + 1


@triton.jit
def _near(my, mx, qy, qx, ry, rx):  # type: ignore[no-untyped-def]
    """Whether the table reaches from query to context: (m), (n) -> (m, n)."""
    y, x = my[:, None] - qy[None, :] + ry // 2, mx[:, None] - qx[None, :] + rx // 2
    return (y.to(tl.uint32) < ry) & (x.to(tl.uint32) < rx)  # unsigned, what is below 0 is large


@triton.jit
def lambda_kernel(  # type: ignore[no-untyped-def]
    given, values, table, lam_c, out, b, n, u, height, width, ry, rx, strip, per_strip, tiles,
    h: tl.constexpr, k: tl.constexpr, v: tl.constexpr, B: tl.constexpr, V: tl.constexpr, N: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr, CONTENT: tl.constexpr, GRADIENT: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """λ of N queries and B examples, then y = Σ_k q·λ; or, GRADIENT, dq = Σ_v λ·dy, a partial sum for each V."""
    tile, part = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    chunks: tl.constexpr = (v + V - 1) // V
    first_b, first_v = part // chunks * B, part % chunks * V
    first, left, across, top, rows, start, columns = _tile(tile, N, strip, per_strip, height, width, ry, rx)
    area, inverse = rows * columns, 1.0 / columns
    c, w = tl.arange(0, N * K), tl.arange(0, B * V)
    qy, qx = (first + c // K) // across, left + (first + c // K) % across  # (N·K)
    wb, wv = first_b + w // V, first_v + w % V  # (B·V)
    real = (wb < b) & (wv < v)

    # The axis that the last sum runs over, k for y and v for dq, must lie along the registers of a thread.
    acc = tl.zeros((N * K, B * V) if GRADIENT else (B * V, N * K), tl.float32)
    for i in range(u):
        for step in range(0, area, M):
            j = step + tl.arange(0, M)
            my = ((j + 0.5) * inverse).to(tl.int32)  # j // columns: exact below 2²⁰, and much cheaper
            mx = start + j - my * columns
            my += top
            seen = _near(my, mx, qy, qx, ry, rx) & (j < area)[:, None] & (c % K < k)[None, :]
            at = table + (((my + ry // 2) * rx + mx + rx // 2) * k + i * (ry * rx * k))[:, None]
            e = tl.load(at + (c % K - (qy * rx + qx) * k)[None, :], seen, 0.0, cache_modifier=".ca")  # (M, N·K)
            at = values + ((my * width + mx) * v + i * (n * v))[:, None]
            x = tl.load(at + (wb * (u * n * v) + wv)[None, :], (j < area)[:, None] & real[None, :], 0.0)  # (M, B·V)
            acc = _dot(tl.trans(e), x, precision, acc) if GRADIENT else _dot(tl.trans(x), e, precision, acc)

    nn, bb, vv, kk = first + tl.arange(0, N), first_b + tl.arange(0, B), first_v + tl.arange(0, V), tl.arange(0, K)
    place, here = nn // across * width + left + nn % across, nn < height * across
    if CONTENT:
        content = lam_c + (wb * (k * v) + wv)[:, None] + kk[None, :] * v
        lam = tl.load(content, real[:, None] & (kk < k)[None, :], 0.0)  # (B·V, K)
        if GRADIENT:
            acc = tl.reshape(acc, (N, K, B * V)) + tl.trans(lam)[None, :, :]
        else:
            acc = tl.reshape(acc, (B * V, N, K)) + lam[:, None, :]
    # Either sum is Σ_z λ[a,y,c,z] given[a,c,z] -> (a, y, c), with (a, y, c, z) = (b, v, n, k) or (n, k, b, v).
    if GRADIENT:
        acc = tl.reshape(acc, (N, K, B, V))
        head, real = bb[None, :] * n + place[:, None], here[:, None] & (bb < b)[None, :]
        yy, zz, depth_y, depth_z = kk, vv, k, v
        out += part % chunks * (b * n * h * k)
    else:
        acc = tl.reshape(acc, (B, V, N, K))
        head, real = bb[:, None] * n + place[None, :], (bb < b)[:, None] & here[None, :]
        yy, zz, depth_y, depth_z = vv, kk, v, k
    at = given + (head * (h * depth_z))[:, :, None] + zz[None, None, :]
    there = real[:, :, None] & (zz < depth_z)[None, None, :]
    g = tl.load(at, there, 0.0)
    for i in range(h):
        ahead = tl.load(at + (i + 1) * depth_z, there & (i + 1 < h), 0.0)  # no load may pass the store below
        y = tl.sum(acc * g.to(tl.float32)[:, None, :, :], 3)
        target = out + ((head * h + i) * depth_y)[:, None, :] + yy[None, :, None]
        tl.store(target, y.to(out.dtype.element_ty), real[:, None, :] & (yy < depth_y)[None, :, None])
        g = ahead


@triton.jit
def _rows(B: tl.constexpr, N: tl.constexpr, H: tl.constexpr, G: tl.constexpr):  # type: ignore[no-untyped-def]
    """What `_dlam` sums over, (B·G, N/G·H), or (N·H) if B·G is 1: the example, the query and the head of each row."""
    r = tl.arange(0, N // G * H)
    g = tl.zeros_like(r)
    if B * G > 1:
        g, r = tl.arange(0, B * G)[:, None], r[None, :]
    return g // G + r * 0, g % G * (N // G) + r // H, g * 0 + r % H


@triton.jit
def _dlam(  # type: ignore[no-untyped-def]
    q, dy, place, seen, first_b, first_v, b, n, h: tl.constexpr, k: tl.constexpr, v: tl.constexpr, B: tl.constexpr,
    V: tl.constexpr, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, G: tl.constexpr, TURNED: tl.constexpr,
    precision: tl.constexpr,
):  # fmt: skip
    """dλ[b,n,k,v] = Σ_h q·dy of B examples and N queries, (B·V, N·K), or TURNED (N·K, B·V).

    A product of depth h would starve the tensor cores, so N/G queries share one: the heads of all are its depth, and
    q lies in it block by block with zeros between. place, seen: of `_rows`, the position and if it exists.

    The loads have the shape of the product: a reshape between the two would keep Triton from loading ahead.
    """
    example, query, head = _rows(B, N, H, G)
    c, vv = tl.arange(0, N // G * K), first_v + tl.arange(0, V)
    row = ((first_b + example) * n + place) * h + head
    seen = seen & (head < h) & (first_b + example < b)
    own = query % (N // G)
    if B * G == 1:
        d = tl.load(dy + row[:, None] * v + vv[None, :], seen[:, None] & (vv < v)[None, :], 0.0)
        w = q + row[None, :] * k + (c % K)[:, None]
        w = tl.load(w, (own[None, :] == (c // K)[:, None]) & seen[None, :] & (c % K < k)[:, None], 0.0)
    else:
        d = dy + row[:, :, None] * v + vv[None, None, :]
        d = tl.load(d, seen[:, :, None] & (vv < v)[None, None, :], 0.0)  # (B·G, N/G·H, V)
        w = q + row[:, None, :] * k + (c % K)[None, :, None]
        real = (own[:, None, :] == (c // K)[None, :, None]) & (c % K < k)[None, :, None]
        w = tl.load(w, real & seen[:, None, :], 0.0)  # (B·G, N/G·K, N/G·H)
    lam = _dot(w, d, precision)
    lam = tl.reshape(lam.to(q.dtype.element_ty), (B, G, N // G * K, V))
    if TURNED:
        lam = tl.reshape(tl.permute(lam, (1, 2, 0, 3)), (N * K, B * V))
    else:
        lam = tl.reshape(tl.permute(lam, (0, 3, 1, 2)), (B * V, N * K))
    return lam


@triton.jit
def values_kernel(  # type: ignore[no-untyped-def]
    q, table, dy, out, b, n, u, height, width, ry, rx, strip, per_strip, tiles, parts,
    h: tl.constexpr, k: tl.constexpr, v: tl.constexpr, B: tl.constexpr, V: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, G: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """dV[b,m,v,i] = Σ_{n,k} E[n,m,k,i] dλ[b,n,k,v] of M contexts, B examples and one i of the intra-depth."""
    tile, part = tl.program_id(0) % tiles, tl.program_id(0) // tiles % parts
    i = tl.program_id(0) // tiles // parts
    chunks: tl.constexpr = (v + V - 1) // V
    first_b, first_v = part // chunks * B, part % chunks * V
    first, left, across, top, rows, start, columns = _tile(tile, M, strip, per_strip, height, width, ry, rx)
    m, c, w = tl.arange(0, M), tl.arange(0, N * K), tl.arange(0, B * V)
    my, mx = (first + m) // across, left + (first + m) % across
    from_context = table + (((my + ry // 2) * rx + mx + rx // 2) * k + i * (ry * rx * k))[:, None]
    area = rows * columns
    acc = tl.zeros((B * V, M), tl.float32)
    for step in range(0, area, N):
        j = step + c // K
        qy, qx = top + j // columns, start + j % columns  # (N·K)
        seen = _near(my, mx, qy, qx, ry, rx) & ((j < area) & (c % K < k))[None, :]
        to_query = (c % K - (qy * rx + qx) * k)[None, :]
        e = tl.load(from_context + to_query, seen, 0.0, cache_modifier=".ca")  # (M, N·K)
        j = step + _rows(B, N, H, G)[1]
        place = (top + j // columns) * width + start + j % columns
        lam = _dlam(q, dy, place, j < area, first_b, first_v, b, n, h, k, v, B, V, N, K, H, G, False, precision)
        acc = _dot(lam, tl.trans(e), precision, acc)
    wb, wv = first_b + w // V, first_v + w % V
    at = out + ((wb * u + i) * (n * v) + wv)[:, None] + ((my * width + mx) * v)[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), ((wb < b) & (wv < v))[:, None] & (first + m < height * across)[None, :])


@triton.jit
def table_kernel(  # type: ignore[no-untyped-def]
    q, values, dy, out, b, n, u, height, width, low_y, low_x, down, across, splits, parts,
    h: tl.constexpr, k: tl.constexpr, v: tl.constexpr, B: tl.constexpr, V: tl.constexpr, N: tl.constexpr,
    Y: tl.constexpr, X: tl.constexpr, K: tl.constexpr, H: tl.constexpr, G: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Σ_{b,v,n} V[b,m,v,i] dλ[b,n,k,v] at a fixed shift from a row of N queries to a box of Y x X contexts.

    A program owns one shift and meets every row whose box touches the map, or its split of them.
    out (splits, u, down·Y, across·X, N·K), float32; `fold_kernel` adds what belongs to the same offset.
    """
    shift = tl.program_id(0)
    to_x, shift = shift % across * X, shift // across
    to_y, shift = shift % down * Y, shift // down
    i, split = shift % u, shift // u
    y_first = tl.maximum(0, 1 - low_y - to_y - Y)
    y_count = tl.minimum(height, height - low_y - to_y) - y_first
    x_first = tl.maximum(0, N - low_x - to_x - X) // N  # rows of queries start at multiples of N
    x_count = tl.minimum((width + N - 1) // N, (width - 1 - low_x - to_x) // N + 1) - x_first
    total = tl.maximum(y_count, 0) * tl.maximum(x_count, 0) * parts
    share = (total + splits - 1) // splits
    chunks: tl.constexpr = (v + V - 1) // V
    m, w, c = tl.arange(0, Y * X), tl.arange(0, B * V), tl.arange(0, N * K)
    acc = tl.zeros((N * K, Y * X), tl.float32)
    for step in range(split * share, tl.minimum(total, split * share + share)):
        part, row = step % parts, step // parts
        first_b, first_v = part // chunks * B, part % chunks * V
        y, x = y_first + row // x_count, (x_first + row % x_count) * N
        my, mx = y + low_y + to_y + m // X, x + low_x + to_x + m % X
        wb, wv = first_b + w // V, first_v + w % V
        seen = ((my >= 0) & (my < height) & (mx >= 0) & (mx < width))[:, None] & ((wb < b) & (wv < v))[None, :]
        at = values + ((my * width + mx) * v + i * (n * v))[:, None] + (wb * (u * n * v) + wv)[None, :]
        s = tl.load(at, seen, 0.0)  # (Y·X, B·V)
        x += _rows(B, N, H, G)[1]
        lam = _dlam(q, dy, y * width + x, x < width, first_b, first_v, b, n, h, k, v, B, V, N, K, H, G, True, precision)
        acc = _dot(lam, tl.trans(s), precision, acc)
    line = ((split * u + i) * (down * Y) + to_y + m // X) * (across * X) + to_x + m % X
    tl.store(out + (line * (N * K))[None, :] + c[:, None], acc)


@triton.jit
def fold_kernel(  # type: ignore[no-untyped-def]
    sums, out, u, ry, rx, low_y, low_x, tall, wide, splits,
    k: tl.constexpr, N: tl.constexpr, K: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """dR[o,k,i] = Σ over splits, and over the N queries of a row, of `table_kernel`'s sums at shift o + query."""
    o, kk = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, K)  # o runs over (u, ry, rx)
    i, y, x = o // (ry * rx), o // rx % ry - ry // 2 - low_y, o % rx - rx // 2 - low_x
    acc = tl.zeros((M, K), tl.float32)
    for split in range(splits):
        for query in tl.static_range(N):
            ok = (i < u) & (y >= 0) & (y < tall) & (x + query >= 0) & (x + query < wide)
            line = ((split * u + i) * tall + y) * wide + x + query
            acc += tl.load(sums + (line * (N * K) + query * K)[:, None] + kk[None, :], ok[:, None], 0.0)
    at = out + (o * k)[:, None] + kk[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), (i < u)[:, None] & (kk < k)[None, :])


@triton.jit
def content_kernel(  # type: ignore[no-untyped-def]
    q, dy, out, n, h: tl.constexpr, k: tl.constexpr, v: tl.constexpr, V: tl.constexpr, K: tl.constexpr,
    M: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """dλc[b,k,v] = Σ_{n,h} q·dy of one example, M of the (n, h) a step."""
    chunks: tl.constexpr = (v + V - 1) // V
    example, kk = tl.program_id(0) // chunks, tl.arange(0, K)
    vv = tl.program_id(0) % chunks * V + tl.arange(0, V)
    acc = tl.zeros((V, K), tl.float32)
    for step in range(0, n * h, M):
        r = step + tl.arange(0, M)
        row, seen = (example * (n * h) + r)[:, None], (r < n * h)[:, None]
        d = tl.load(dy + row * v + vv[None, :], seen & (vv < v)[None, :], 0.0)
        w = tl.load(q + row * k + kk[None, :], seen & (kk < k)[None, :], 0.0)
        acc = _dot(tl.trans(d), w, precision, acc)
    tl.store(out + example * (k * v) + kk[None, :] * v + vv[:, None], acc, (kk < k)[None, :] & (vv < v)[:, None])
