"""Softmax attention without its weights, with what fused attention elsewhere leaves out.

The scores of query i, which stands at position i + keys - queries, are

    s_ij = scale * factor_i * (q_i . k_j) - slope_head * lost(|position_i - j|) + log_weight(block distance)

every term optional. Out come `softmax(s) v`, the log-sum-exp of each row and, on request, its entropy. Key blocks pass by
once, under the online softmax: a running maximum m, the sum l of exp(s - m), the sum of exp(s - m) v, and for the entropy

    t = sum_j exp(s_j - m) (s_j - m),      a new maximum m':   t <- exp(m - m') (t + (m - m') l)

so that the entropy is log(l) - t / l: no large numbers cancel. Blocks that no row sees are not read. With `blocks` only
listed pairs of blocks are (a random part of causal attention, with a weight by block distance). Sources: Dao et al. 2022,
arXiv 2205.14135 (tiles, online softmax); Press et al. 2022 (slopes); arXiv 2501.03489 (entropy); arXiv 2410.18441 (blocks).

The backward pass computes the weights a of a tile again from the log-sum-exp, with upstream gradients g and h of output
and entropy, and dE/ds_j = -a_j (s_j - mean), mean = lse - E:

    ds_j = a_j (g . v_j - h s_j + c),      c = h mean - g . out

One kernel owns blocks of queries (c, dq and the gradient of `factor`), one blocks of keys (dk, dv). No atomics, so results
are equal in every run.

Traffic for B heads (batch included), L queries, S keys of dim d, P pairs that are seen (L S, half of it where causal, the
listed ones with `blocks`), w bytes a number:

    forward    w B d (2 L + 2 S) + 4 B L bytes,      4 B d P operations of products
    backward   w B d (5 L + 6 S) + 12 B L bytes,    14 B d P (scores twice, g v twice, dq, dk, dv)

K and V of one head stay in the second-level cache while its query blocks pass. torch, eager or compiled, writes the B L S
scores, reads them for the softmax, writes the weights, and reads them for the output and for the entropy: 4 w B L S bytes
forward and about 9 backward, and keeps w B L S of them. For the entropy at L = S = 8192, d = 64, 64 heads in bfloat16 that
is 34 GB forward, 10 ms at 3.35 TB/s, against 1.1e12 operations, 2.2 ms at half of an H100's peak: 4.6 in time, and 8.6 GB
kept against 0.27 (32 in memory). FlexAttention has no entropy. Listed blocks of 64 tokens, a fifth of the causal pairs of the
same tensors: compiled torch moves as much as before, 1.2e11 operations are left, more than 10 in time; FlexAttention skips
what a mask leaves empty, but its blocks of 128 tokens are empty only where four of these are: it computes 60% of the
pairs, 2.8 in time. A slope alone is nothing that FlexAttention lacks (1.0 in time); slopes and lengths come along as
compile-time choices. In float32 products stay outside the tensor cores, unless torch's matmul precision allows tf32:
there the kernel saves memory, and time only against what is bound by memory.
"""

import torch
import triton
import triton.language as tl

from kernels._attention import (
    LOW,
    KeptBlocks,
    check_shapes,
    float32_tiles,
    kept_blocks,
    load_rows,
    online,
    row_multiplier,
)
from kernels._launch import check_tensor, dot, dot_options

__all__ = ["KeptBlocks", "flash_attention_backward", "flash_attention_forward", "kept_blocks"]

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


# --- the mathematics of a tile


@triton.jit
def _score(product, multiplier, position, column, slope, table, keys, weight,
           HAS_SLOPE: tl.constexpr, HAS_TABLE: tl.constexpr):  # fmt: skip
    """Scores in units of ln 2; `multiplier` and `weight` come in them. The last but products may be broadcast."""
    scores = product * multiplier + weight
    if HAS_SLOPE:
        distance = tl.abs(position - column)
        if HAS_TABLE:
            lost = tl.load(table + distance, mask=distance < keys, other=0.0)
        else:
            lost = distance.to(tl.float32)
        scores -= slope * lost
    return scores


@triton.jit
def _rows(tile, first, keys, queries, LISTED: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Positions and row numbers of a tile of queries, and which of them exist. Listed blocks count from position 0."""
    inner = tl.arange(0, BLOCK)
    if LISTED:
        parts = (SIZE + BLOCK - 1) // BLOCK
        inner += tile % parts * BLOCK
        position = (first + tile // parts) * SIZE + inner
        row = position - (keys - queries)
        row_ok = (inner < SIZE) & (row >= 0) & (row < queries)
    else:
        row = tile * BLOCK + inner
        position = row + (keys - queries)
        row_ok = row < queries
    return position, row, row_ok


@triton.jit
def _columns(s, listed, limit, LISTED: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Columns of the s-th tile of keys, which of them exist, and the block that they are in."""
    inner = tl.arange(0, BLOCK)
    place = s
    column_ok = inner >= 0
    if LISTED:
        parts = (SIZE + BLOCK - 1) // BLOCK
        place = tl.load(listed + s // parts)
        inner += s % parts * BLOCK
        column = place * SIZE + inner
        column_ok = (inner < SIZE) & (column < limit)
    else:
        column = place * BLOCK + inner
        column_ok = column < limit
    return column, column_ok, place


@triton.jit
def _key_tiles(tile, starts, limit, shift, CAUSAL: tl.constexpr, LISTED: tl.constexpr, SIZE: tl.constexpr,
               BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Which tiles of keys a tile of queries sees: start to full without a mask, full to stop with one."""
    if LISTED:
        parts = (SIZE + BLOCK_N - 1) // BLOCK_N
        block = tile // ((SIZE + BLOCK_M - 1) // BLOCK_M)
        start = tl.load(starts + block) * parts
        stop = tl.load(starts + block + 1) * parts
        full = start
        if SIZE % BLOCK_N == 0:
            full = tl.maximum(start, stop - parts)  # the last block is the diagonal
    else:
        start = tile * 0
        stop = tl.cdiv(limit, BLOCK_N)
        full = limit // BLOCK_N
        if CAUSAL:
            stop = tl.minimum(stop, (tile * BLOCK_M + BLOCK_M - 1 + shift) // BLOCK_N + 1)
            full = tl.minimum(full, (tile * BLOCK_M + shift + 1) // BLOCK_N)
    return start, full, stop


# --- the kernels


@triton.jit
def _forward_kernel(
    q, k, v, factor, slopes, table, lengths, starts, listed, log_weight, out, lse, entropy,
    tiles, heads, queries, keys, scale, first,
    q_b, q_h, q_r, q_d, k_b, k_h, k_r, k_d, v_b, v_h, v_r, v_d, f_b, f_h, f_r,
    CAUSAL: tl.constexpr, HAS_FACTOR: tl.constexpr, HAS_SLOPE: tl.constexpr, HAS_TABLE: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, LISTED: tl.constexpr, SIZE: tl.constexpr, ENTROPY: tl.constexpr,
    DIM: tl.constexpr, DIM_V: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    tile = tiles - 1 - tl.program_id(0) % tiles  # the longest rows of causal attention first
    entry = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = entry // heads, entry % heads
    position, row, row_ok = _rows(tile, first, keys, queries, LISTED, SIZE, BLOCK_M)
    position_block = first + tile // ((SIZE + BLOCK_M - 1) // BLOCK_M)  # of listed blocks
    depth, depth_v = tl.arange(0, BLOCK_D).to(tl.int64), tl.arange(0, BLOCK_V).to(tl.int64)
    q_tile = load_rows(q + batch * q_b + head * q_h, row, row_ok, depth, q_r, q_d, True, DIM, BLOCK_D)
    multiplier = row_multiplier(factor, batch, head, row, row_ok, scale * _LOG2_E, f_b, f_h, f_r, HAS_FACTOR)
    slope = 0.0
    if HAS_SLOPE:
        slope = tl.load(slopes + head) * _LOG2_E
    limit = keys
    if HAS_LENGTHS:
        limit = tl.minimum(tl.load(lengths + batch), keys)
    start, full, stop = _key_tiles(
        tile, starts, limit, keys - queries, CAUSAL, LISTED, SIZE, BLOCK_M, BLOCK_N
    )
    m = tl.full((BLOCK_M,), LOW, dtype=tl.float32)
    l = tl.zeros((BLOCK_M,), dtype=tl.float32)
    t = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_V), dtype=tl.float32)
    k_base, v_base = k + batch * k_b + head * k_h, v + batch * v_b + head * v_h
    low, high = start, full
    for masked in tl.static_range(2):
        for s in range(low, high):
            column, column_ok, block = _columns(s, listed, limit, LISTED, SIZE, BLOCK_N)
            k_tile = load_rows(k_base, column, column_ok, depth, k_r, k_d, masked, DIM, BLOCK_D)
            product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            product = dot(q_tile, tl.trans(k_tile), product, UPCAST, PRECISION)
            weight = 0.0
            if LISTED:
                weight = tl.load(log_weight + position_block - block) * _LOG2_E
            scores = _score(
                product, multiplier[:, None], position[:, None], column[None, :], slope, table, keys, weight,
                HAS_SLOPE, HAS_TABLE,
            )  # fmt: skip
            if masked:
                seen = column_ok[None, :]
                if CAUSAL:
                    seen = seen & (column[None, :] <= position[:, None])
                scores = tl.where(seen, scores, float("-inf"))
            v_tile = load_rows(v_base, column, column_ok, depth_v, v_r, v_d, masked, DIM_V, BLOCK_V)
            m, l, t, acc = online(scores, v_tile, m, l, t, acc, ENTROPY, UPCAST, PRECISION)
        low, high = full, stop
    blind = l == 0  # rows that see nothing read zeros
    total = tl.where(blind, 1.0, l)
    line = entry * queries + row
    tl.store(lse + line, tl.where(blind, float("-inf"), (m + tl.log2(total)) * _LN2), mask=row_ok)
    if ENTROPY:
        tl.store(entropy + line, (tl.log2(total) - t / total) * _LN2, mask=row_ok)
    where = out + line[:, None] * DIM_V + depth_v[None, :]
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(where, result, mask=row_ok[:, None] & (depth_v[None, :] < DIM_V))


@triton.jit
def _tile_gradient(product, upstream, scores, lse, constant, grad_entropy, seen, MASKED: tl.constexpr,
                   ENTROPY: tl.constexpr):  # fmt: skip
    """Weights of a tile, and the gradient with respect to its scores."""
    weights = tl.exp2(scores - lse)
    if MASKED:
        weights = tl.where(seen, weights, 0.0)
    change = upstream + constant
    if ENTROPY:
        change -= grad_entropy * scores * _LN2
    gradient = weights * change
    if MASKED:  # where inputs are huge, a hidden score may be inf
        gradient = tl.where(seen, gradient, 0.0)
    return weights, gradient


@triton.jit
def _query_gradient_kernel(
    q, k, v, out, grad, factor, slopes, table, lengths, starts, listed, log_weight, lse, entropy, grad_entropy,
    constants, dq, d_factor,
    tiles, heads, queries, keys, scale, first,
    q_b, q_h, q_r, q_d, k_b, k_h, k_r, k_d, v_b, v_h, v_r, v_d, f_b, f_h, f_r, g_b, g_h, g_r, g_d,
    CAUSAL: tl.constexpr, HAS_FACTOR: tl.constexpr, HAS_SLOPE: tl.constexpr, HAS_TABLE: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, LISTED: tl.constexpr, SIZE: tl.constexpr, ENTROPY: tl.constexpr,
    NEEDED: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    tile = tiles - 1 - tl.program_id(0) % tiles
    entry = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = entry // heads, entry % heads
    position, row, row_ok = _rows(tile, first, keys, queries, LISTED, SIZE, BLOCK_M)
    position_block = first + tile // ((SIZE + BLOCK_M - 1) // BLOCK_M)  # of listed blocks
    depth, depth_v = tl.arange(0, BLOCK_D).to(tl.int64), tl.arange(0, BLOCK_V).to(tl.int64)
    line = entry * queries + row
    g_tile = load_rows(grad + batch * g_b + head * g_h, row, row_ok, depth_v, g_r, g_d, True, DIM_V, BLOCK_V)
    out_tile = load_rows(out, line, row_ok, depth_v, DIM_V, 1, True, DIM_V, BLOCK_V)
    constant = -tl.sum(g_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    row_lse = tl.load(lse + line, mask=row_ok, other=0.0)
    row_lse = tl.where(row_lse == float("-inf"), 0.0, row_lse)
    h = tl.zeros((BLOCK_M,), dtype=tl.float32)
    if ENTROPY:
        h = tl.load(grad_entropy + line, mask=row_ok, other=0.0)
        constant += h * (row_lse - tl.load(entropy + line, mask=row_ok, other=0.0))
    tl.store(constants + line, constant, mask=row_ok)
    if NEEDED:
        q_tile = load_rows(q + batch * q_b + head * q_h, row, row_ok, depth, q_r, q_d, True, DIM, BLOCK_D)
        multiplier = row_multiplier(
            factor, batch, head, row, row_ok, scale * _LOG2_E, f_b, f_h, f_r, HAS_FACTOR
        )
        slope = 0.0
        if HAS_SLOPE:
            slope = tl.load(slopes + head) * _LOG2_E
        limit = keys
        if HAS_LENGTHS:
            limit = tl.minimum(tl.load(lengths + batch), keys)
        start, full, stop = _key_tiles(
            tile, starts, limit, keys - queries, CAUSAL, LISTED, SIZE, BLOCK_M, BLOCK_N
        )
        acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
        k_base, v_base = k + batch * k_b + head * k_h, v + batch * v_b + head * v_h
        low, high = start, full
        for masked in tl.static_range(2):
            for s in range(low, high):
                column, column_ok, block = _columns(s, listed, limit, LISTED, SIZE, BLOCK_N)
                k_tile = load_rows(k_base, column, column_ok, depth, k_r, k_d, masked, DIM, BLOCK_D)
                v_tile = load_rows(v_base, column, column_ok, depth_v, v_r, v_d, masked, DIM_V, BLOCK_V)
                empty = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
                product = dot(q_tile, tl.trans(k_tile), empty, UPCAST, PRECISION)
                upstream = dot(g_tile, tl.trans(v_tile), empty, UPCAST, PRECISION)
                weight = 0.0
                if LISTED:
                    weight = tl.load(log_weight + position_block - block) * _LOG2_E
                scores = _score(
                    product, multiplier[:, None], position[:, None], column[None, :], slope, table, keys, weight,
                    HAS_SLOPE, HAS_TABLE,
                )  # fmt: skip
                seen = column_ok[None, :]
                if CAUSAL:
                    seen = seen & (column[None, :] <= position[:, None])
                weights, gradient = _tile_gradient(
                    product, upstream, scores, row_lse[:, None] * _LOG2_E, constant[:, None], h[:, None], seen,
                    masked, ENTROPY,
                )  # fmt: skip
                acc = dot(gradient.to(k_tile.dtype), k_tile, acc, UPCAST, PRECISION)
            low, high = full, stop
        if HAS_FACTOR:
            tl.store(d_factor + line, scale * tl.sum(acc * q_tile.to(tl.float32), 1), mask=row_ok)
        result = (acc * (multiplier * _LN2)[:, None]).to(dq.dtype.element_ty)
        where = dq + line[:, None] * DIM + depth[None, :]
        tl.store(where, result, mask=row_ok[:, None] & (depth[None, :] < DIM))


@triton.jit
def _key_gradient_kernel(
    q, k, v, grad, factor, slopes, table, lengths, starts, listed, log_weight, lse, grad_entropy, constants, dk, dv,
    tiles, query_tiles, heads, queries, keys, scale, first,
    q_b, q_h, q_r, q_d, k_b, k_h, k_r, k_d, v_b, v_h, v_r, v_d, f_b, f_h, f_r, g_b, g_h, g_r, g_d,
    CAUSAL: tl.constexpr, HAS_FACTOR: tl.constexpr, HAS_SLOPE: tl.constexpr, HAS_TABLE: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, LISTED: tl.constexpr, SIZE: tl.constexpr, ENTROPY: tl.constexpr,
    DIM: tl.constexpr, DIM_V: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Tiles are transposed here: keys down, queries across. `starts` and `listed` are those of the key blocks."""
    tile = tl.program_id(0) % tiles
    entry = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = entry // heads, entry % heads
    depth, depth_v = tl.arange(0, BLOCK_D).to(tl.int64), tl.arange(0, BLOCK_V).to(tl.int64)
    limit = keys
    if HAS_LENGTHS:
        limit = tl.minimum(tl.load(lengths + batch), keys)
    inner = tl.arange(0, BLOCK_N)
    shift = keys - queries
    if LISTED:
        block = tile // ((SIZE + BLOCK_N - 1) // BLOCK_N)
        inner += tile % ((SIZE + BLOCK_N - 1) // BLOCK_N) * BLOCK_N
        column = block * SIZE + inner
        own = (column < keys) & (inner < SIZE)
        parts = (SIZE + BLOCK_M - 1) // BLOCK_M
        start = tl.load(starts + block) * parts
        stop = tl.load(starts + block + 1) * parts
        full = tl.minimum(start + parts, stop)  # the first block may be the diagonal
    else:
        block = tile
        column = tile * BLOCK_N + inner
        own = column < keys
        start = tile * 0
        full = start
        stop = tl.where(tile * BLOCK_N < limit, query_tiles, 0)
        if CAUSAL:
            start = tl.minimum(tl.maximum(tile * BLOCK_N - shift, 0) // BLOCK_M, stop)
            full = tl.minimum(tl.cdiv(tl.maximum(tile * BLOCK_N + BLOCK_N - 1 - shift, 0), BLOCK_M), stop)
    k_tile = load_rows(k + batch * k_b + head * k_h, column, own, depth, k_r, k_d, True, DIM, BLOCK_D)
    v_tile = load_rows(v + batch * v_b + head * v_h, column, own, depth_v, v_r, v_d, True, DIM_V, BLOCK_V)
    slope = 0.0
    if HAS_SLOPE:
        slope = tl.load(slopes + head) * _LOG2_E
    dk_acc = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    dv_acc = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    q_base, g_base = q + batch * q_b + head * q_h, grad + batch * g_b + head * g_h
    low, high = start, full
    for unmasked in tl.static_range(2):
        for s in range(low, high):
            number = s
            if LISTED:
                number = tl.load(listed + s // parts) * parts + s % parts
            position, row, row_ok = _rows(number, first, keys, queries, LISTED, SIZE, BLOCK_M)
            q_tile = load_rows(q_base, row, row_ok, depth, q_r, q_d, True, DIM, BLOCK_D)
            g_tile = load_rows(g_base, row, row_ok, depth_v, g_r, g_d, True, DIM_V, BLOCK_V)
            line = entry * queries + row
            row_lse = tl.load(lse + line, mask=row_ok, other=float("inf"))  # no weight for rows past the end
            row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse) * _LOG2_E
            constant = tl.load(constants + line, mask=row_ok, other=0.0)
            h = constant
            if ENTROPY:
                h = tl.load(grad_entropy + line, mask=row_ok, other=0.0)
            multiplier = row_multiplier(
                factor, batch, head, row, row_ok, scale * _LOG2_E, f_b, f_h, f_r, HAS_FACTOR
            )
            empty = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
            product = dot(k_tile, tl.trans(q_tile), empty, UPCAST, PRECISION)
            weight = 0.0
            if LISTED:
                weight = tl.load(log_weight + first + number // parts - block) * _LOG2_E
            scores = _score(
                product, multiplier[None, :], position[None, :], column[:, None], slope, table, keys, weight,
                HAS_SLOPE, HAS_TABLE,
            )  # fmt: skip
            upstream = dot(v_tile, tl.trans(g_tile), empty, UPCAST, PRECISION)
            seen = column[:, None] <= position[None, :]
            weights, gradient = _tile_gradient(
                product, upstream, scores, row_lse[None, :], constant[None, :], h[None, :], seen,
                unmasked == 0, ENTROPY,
            )  # fmt: skip
            dv_acc = dot(weights.to(g_tile.dtype), g_tile, dv_acc, UPCAST, PRECISION)
            gradient *= (multiplier * _LN2)[None, :]
            dk_acc = dot(gradient.to(q_tile.dtype), q_tile, dk_acc, UPCAST, PRECISION)
        low, high = full, stop
    line = entry * keys + column
    seen = column[:, None] < limit  # beyond the length of this entry nothing was seen
    where = dk + line[:, None] * DIM + depth[None, :]
    result = tl.where(seen, dk_acc, 0.0).to(dk.dtype.element_ty)
    tl.store(where, result, mask=own[:, None] & (depth[None, :] < DIM))
    where = dv + line[:, None] * DIM_V + depth_v[None, :]
    result = tl.where(seen, dv_acc, 0.0).to(dv.dtype.element_ty)
    tl.store(where, result, mask=own[:, None] & (depth_v[None, :] < DIM_V))


# --- launch shapes: speed only, no mathematics


def _shape(tensor, kind, dim, dim_v, size, table) -> dict:
    """Tile sizes and warps of the kernel `kind`; tiles are no larger than a listed block of `size` tokens.

    A tile of what a `table` holds lies in shared memory and in registers besides.
    """
    width, depth_v = (max(16, triton.next_power_of_2(n)) for n in (dim, dim_v))
    wide, options = max(width, depth_v) > 64, {}
    if not tensor.is_cuda:  # the interpreter
        queries, keys = (16, 32) if kind == "keys" else (32, 16)
    elif tensor.dtype.itemsize == 2 and table and wide:
        queries, keys = dict(forward=(128, 32), queries=(64, 32), keys=(32, 64))[kind]
        options = dict(num_warps=8, num_stages=2)
    elif tensor.dtype.itemsize == 2:
        queries, keys, warps, stages = {
            "forward": (128, 64, 8, 3),
            "queries": (64, 64, 4, 2) if wide else (128, 64, 8, 3),
            "keys": (64, 64, 8, 2) if wide else (64, 128, 8, 2),
        }[kind]
        options = dict(num_warps=warps, num_stages=stages)
    else:
        queries, keys, options = float32_tiles(tensor, kind, wide)
    if size is not None:
        queries, keys = (min(n, max(16, triton.next_power_of_2(size))) for n in (queries, keys))
    return dict(BLOCK_M=queries, BLOCK_N=keys, BLOCK_D=width, BLOCK_V=depth_v, **options)


# --- options and their checks


def _check(q, k, v, scale, factor, causal, lengths, slopes, distances, blocks) -> dict:
    """Check everything that a launch relies on. Returns arguments that the kernels share."""
    batch, heads, queries, keys, dim, dim_v = check_shapes(q, k, v, causal or blocks is not None)
    if distances is not None and slopes is None:
        raise ValueError("distances are multiplied by slopes: give both")
    if distances is not None and queries > keys:
        raise ValueError(f"distances need at least as many keys as queries, got {keys} and {queries}")
    vectors = dict(
        factor=(factor, (batch, heads, queries)), lengths=(lengths, (batch,)), slopes=(slopes, (heads,))
    )
    for name, (vector, shape) in vectors.items():
        if vector is not None:
            kinds = (torch.int32, torch.int64) if name == "lengths" else (torch.float32,)
            if vector.shape != shape or vector.dtype not in kinds or vector.device != q.device:
                raise ValueError(
                    f"{name} must be {' or '.join(map(str, kinds))} of shape {shape} on {q.device}, "
                    f"got {vector.dtype} of shape {tuple(vector.shape)} on {vector.device}"
                )
    if distances is not None:
        fits = distances.dim() == 1 and len(distances) >= keys and distances.is_contiguous()
        if not fits or distances.dtype != torch.float32 or distances.device != q.device:
            raise ValueError(
                f"distances must be a contiguous float32 vector of at least {keys} entries on {q.device}, "
                f"got {distances.dtype} of shape {tuple(distances.shape)} on {distances.device}"
            )
    lists = (None,) * 3
    if blocks is not None:
        if lengths is not None:
            raise ValueError("blocks and lengths do not go together")
        counts = (triton.cdiv(keys, blocks.size) - blocks.first + 1, triton.cdiv(keys, blocks.size) + 1)
        if (
            counts != (len(blocks.starts), len(blocks.column_starts))
            or blocks.first != (keys - queries) // blocks.size
        ):
            raise ValueError(
                f"blocks of {blocks.size} tokens, {len(blocks.starts) - 1} of queries and "
                f"{len(blocks.column_starts) - 1} of keys, do not fit {queries} queries and {keys} keys"
            )
        if blocks.starts.device != q.device:
            raise ValueError(f"q is on {q.device}, blocks must be too, got {blocks.starts.device}")
        lists = (blocks.starts, blocks.columns, blocks.log_weight)
    return dict(
        tensors=(factor, None if slopes is None else slopes.contiguous(), distances,
                 None if lengths is None else lengths.contiguous(), *lists),
        sizes=(heads, queries, keys, float(dim**-0.5 if scale is None else scale), 0 if blocks is None else blocks.first),
        strides=(*q.stride(), *k.stride(), *v.stride(), *((0, 0, 0) if factor is None else factor.stride())),
        constants=dict(
            CAUSAL=bool(causal) or blocks is not None, HAS_FACTOR=factor is not None, HAS_SLOPE=slopes is not None,
            HAS_TABLE=distances is not None, HAS_LENGTHS=lengths is not None, LISTED=blocks is not None,
            SIZE=16 if blocks is None else blocks.size, DIM=dim, DIM_V=dim_v, **dot_options(q),
        ),
    )  # fmt: skip


def _tiles(length, size, first, block) -> int:
    """Tiles of `length` tokens, or of the listed blocks of `size` tokens from number `first` on."""
    if size is None:
        return triton.cdiv(length, block)
    return (triton.cdiv(length, size) - first) * triton.cdiv(size, block)


# --- the operations


def flash_attention_forward(
    q, k, v, *, scale=None, factor=None, causal=False, lengths=None, slopes=None, distances=None, blocks=None,
    entropy=False,
):  # fmt: skip
    """Softmax attention, the log-sum-exp of every row, and its entropy on request.

    Args:
        q: (batch, heads, queries, dim), any strides; float32, bfloat16 or float16. The queries are the last positions.
        k: (batch, heads, keys, dim), same dtype.
        v: (batch, heads, keys, dim_v), same dtype. Both dims are from 1 to 128.
        scale: of the products; 1 / sqrt(dim) by default.
        factor: of the products of each query besides `scale`, (batch, heads, queries) float32, or None.
        causal: whether a query sees no later keys.
        lengths: how many keys of each batch entry may be seen, (batch,) int32 or int64, or None.
        slopes: scores lose slope * distance, (heads,) float32, or None.
        distances: what is lost at distances 0, 1, 2, ... in place of the distance, (keys,) float32, or None.
        blocks: causal attention over these blocks only, from `kept_blocks`, or None.
        entropy: whether to compute it.

    Returns:
        The output (batch, heads, queries, dim_v) in the dtype of q; the log-sum-exp and the entropy in nats (or None),
        (batch, heads, queries) float32. A row that sees nothing has output and entropy 0 and log-sum-exp -inf.

    Raises:
        TypeError, ValueError: dtypes, shapes, devices or options that do not fit; raised before anything is launched.
    """
    plan = _check(q, k, v, scale, factor, causal, lengths, slopes, distances, blocks)
    (batch, heads, queries, dim), (keys, dim_v) = q.shape, v.shape[2:]
    out = q.new_empty(batch, heads, queries, dim_v)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    entropies = torch.empty_like(lse) if entropy else None
    size, first = (None, 0) if blocks is None else blocks[:2]
    shape = _shape(q, "forward", dim, dim_v, size, distances is not None)
    tiles = _tiles(keys if blocks else queries, size, first, shape["BLOCK_M"])
    if lse.numel():
        _forward_kernel[(tiles * batch * heads,)](
            q, k, v, *plan["tensors"], out, lse, entropies, tiles, *plan["sizes"], *plan["strides"],
            ENTROPY=entropy, **plan["constants"], **shape,
        )  # fmt: skip
    return out, lse, entropies


def flash_attention_backward(
    q, k, v, out, lse, grad, *, entropy=None, grad_entropy=None, scale=None, factor=None, causal=False, lengths=None,
    slopes=None, distances=None, blocks=None, need_queries=True, need_keys=True,
):  # fmt: skip
    """The gradients of `flash_attention_forward`, of which the options are the same.

    Args:
        q, k, v: as they were given.
        out, lse: as they came out.
        grad: with respect to the output, same shape and dtype, any strides.
        entropy, grad_entropy: the entropy, and the gradient with respect to it, float32; or None for both.
        need_queries: whether the gradients of q and `factor` are wanted.
        need_keys: whether those of k and v are.

    Returns:
        The gradients of q, k, v and `factor` in their dtypes, contiguous; None for what is missing or not wanted.

    Raises:
        TypeError, ValueError: as `flash_attention_forward`.
    """
    plan = _check(q, k, v, scale, factor, causal, lengths, slopes, distances, blocks)
    (batch, heads, queries, dim), (keys, dim_v) = q.shape, v.shape[2:]
    for name, tensor in (("out", out), ("grad", grad)):
        check_tensor(name, tensor, "batch, heads, queries, dim_v", like=("q", q))
        if tensor.shape != (batch, heads, queries, dim_v):
            raise ValueError(f"{name} must be {(batch, heads, queries, dim_v)}, got {tuple(tensor.shape)}")
    if (entropy is None) != (grad_entropy is None):
        raise ValueError("entropy and grad_entropy go together: give both or neither")
    for name, vector in (("lse", lse), ("entropy", entropy), ("grad_entropy", grad_entropy)):
        if vector is not None and (vector.shape != q.shape[:3] or vector.dtype != torch.float32):
            raise ValueError(
                f"{name} must be float32 of shape {tuple(q.shape[:3])}, got {vector.dtype} of {tuple(vector.shape)}"
            )
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device) if need_queries else None
    d_factor = torch.empty_like(lse) if need_queries and factor is not None else None
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_keys else None for x in (k, v))
    if not lse.numel() or not keys:
        return (*(None if x is None else x.zero_() for x in (dq, dk, dv, d_factor)),)
    constants = torch.empty_like(lse)
    grad_entropy = None if grad_entropy is None else grad_entropy.contiguous()
    strides = (*plan["strides"], *grad.stride())
    size, first = (None, 0) if blocks is None else blocks[:2]
    shape = _shape(q, "queries", dim, dim_v, size, distances is not None)
    tiles = _tiles(keys if blocks else queries, size, first, shape["BLOCK_M"])
    _query_gradient_kernel[(tiles * batch * heads,)](
        q, k, v, out.contiguous(), grad, *plan["tensors"], lse.contiguous(), entropy, grad_entropy, constants, dq,
        d_factor, tiles, *plan["sizes"], *strides, ENTROPY=entropy is not None, NEEDED=need_queries,
        **plan["constants"], **shape,
    )  # fmt: skip
    if need_keys:
        shape = _shape(q, "keys", dim, dim_v, size, distances is not None)
        tiles = _tiles(keys, size, 0, shape["BLOCK_N"])
        tensors = plan["tensors"]
        if blocks is not None:
            tensors = (*tensors[:4], blocks.column_starts, blocks.rows, blocks.log_weight)
        _key_gradient_kernel[(tiles * batch * heads,)](
            q, k, v, grad, *tensors, lse.contiguous(), grad_entropy, constants, dk, dv,
            tiles, triton.cdiv(queries, shape["BLOCK_M"]), *plan["sizes"], *strides, ENTROPY=entropy is not None,
            **plan["constants"], **shape,
        )  # fmt: skip
    return dq, dk, dv, d_factor
