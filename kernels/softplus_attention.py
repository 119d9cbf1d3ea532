"""Attention with softplus in place of the exponential, without its weights: LSSA, and LSSAR with a power.

Source: Gao, Spratling and Gionfrida, Softplus Attention with Re-weighting (2025). A query that sees n keys weighs them by

    z_j = scale_i * cos(q_i, k_j),    a_j = softplus(z_j),    out = sum_j a_j v_j / T,    T = sum_j a_j             (LSSA)
    x_j = n a_j / T - o,    u_j = max(x_j, 0) / M,    M = max_j x_j,    out = sum_j u_j^p v_j / W                   (LSSAR)

with W = sum_j u_j^p, and o = `offset` where n > `warm_rows`, else 0. Rows with M below 64 eps keep the weights of LSSA.
Softplus is bounded by its largest score, so LSSA is one sweep over the keys without a running maximum; float16 alone has
one, or small weights would be 0. LSSAR needs T and M before it can take the power: a first sweep over the keys alone, a
second over keys and values. Cosines are products of the raw q and k times inverse lengths in float32: no direction is
rounded to half precision.

Backward, with g the gradient of the output and e_j = g . v_j - g . out:

    LSSA     da_j = e_j / T
    LSSAR    da_j = h_j - (o / n) sum_k h_k,    h_j = p n u_j^(p-1) e_j / (T M W)
    both     dz_j = sigmoid(z_j) da_j

The sum over k is new: out does not change when all x grow by one factor, so that sum_k x_k h_k = 0, which leaves sum_k h_k
times o. dq is linear in it: the kernel of the queries adds up sum_j h_j z'_j k_j and sum_j z'_j k_j in the same sweep and joins
them at its end. M counts as a constant, since it cancels. What a cosine's gradient has along q or k is taken off at the end.

Traffic for B heads (batch included), L queries, S keys of dim d, P pairs that are seen, w bytes a number:

    forward    w B d (2 L + 2 S) bytes, LSSAR w B S d more;    4 B d P operations of products, LSSAR 6 B d P
    backward   w B d (5 L + 6 S) bytes;                       14 B d P, LSSAR 16 B d P

torch, eager or compiled, keeps B L S weights in float32 (LSSAR those of both stages): it writes scores, reads them for the sum,
writes the weights and reads them for the product, 16 B L S bytes forward and about 36 backward for LSSA, 28 and 60 for LSSAR.
At L = S = 4096, d = 64, 64 heads causal that is 17 GB and 5.1 ms forward at 3.35 TB/s, against 1.4e11 operations, 0.3 ms
at half of an H100's peak in bfloat16; the logarithm and the sigmoid of 5.4e8 pairs, 25 operations a pair, take as long:
more than 5 in time, and 4.3 GB kept against 0.1. Neither SDPA nor FlexAttention has another normaliser than the softmax's.
"""

import torch
import triton
import triton.language as tl

from kernels._attention import check_shapes, float32_tiles, load_rows
from kernels._launch import check_tensor, dot, dot_options

_SMALLEST_LENGTH = 1e-12  # of a vector that is divided by its length
_DEAD = tl.constexpr(64 * 1.1920929e-07)  # nothing exceeds the average: what is left is rounding


# --- the mathematics of a tile


@triton.jit
def _softplus(z):
    """softplus and its derivative. log(1 + e) for 0 <= e <= 1 as 2 artanh(e / (2 + e)): exact to rounding for small e too."""
    e = tl.exp(-tl.abs(z))
    s = e / (2.0 + e)
    x = s * s
    series = 1.0 / 13 + x * (1.0 / 15)
    series = 1.0 / 11 + x * series
    series = 1.0 / 9 + x * series
    series = 1.0 / 7 + x * series
    series = 0.2 + x * series
    series = 1.0 / 3 + x * series
    value = tl.maximum(z, 0.0) + 2.0 * s * (1.0 + x * series)
    return value, tl.where(z >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def _seen_keys(row, keys, queries, CAUSAL: tl.constexpr):
    """How many keys each query sees, as float32."""
    if CAUSAL:
        return tl.minimum(row + (keys - queries) + 1, keys).to(tl.float32)
    else:
        return tl.zeros_like(row).to(tl.float32) + keys


@triton.jit
def _power(share, exponent):
    """share ** exponent for 0 <= share, and 0 for share 0 whatever the exponent."""
    return tl.where(share > 0, tl.exp2(exponent * tl.log2(tl.where(share > 0, share, 1.0))), 0.0)


@triton.jit
def _without(gradient, along, smallest):
    """The gradient less its part along the vectors of a tile: lengths do not matter to a cosine."""
    along = along.to(tl.float32)
    square = tl.maximum(tl.sum(along * along, 1), smallest * smallest)
    return gradient - along * (tl.sum(gradient * along, 1) / square)[:, None]


# --- the kernels


@triton.jit
def _forward_kernel(
    q, k, v, across, down, out, norm, gain, less, tiles, heads, queries, keys, p, offset, warm_rows,
    q_b, q_h, q_r, q_d, k_b, k_h, k_r, k_d, v_b, v_h, v_r, v_d,
    CAUSAL: tl.constexpr, POWER: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """`across` holds scale / |q| for each query, `down` 1 / |k| for each key.

    What the gradient needs of a row is `norm`, 1 / T or 1 / W, and with a power `gain`, n / (T M), and `less`, o / M. A row
    that keeps the weights of LSSA has gain 0.
    """
    tile = tiles - 1 - tl.program_id(0) % tiles  # the longest rows of causal attention first
    entry = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = entry // heads, entry % heads
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = row < queries
    depth, depth_v = tl.arange(0, BLOCK_D).to(tl.int64), tl.arange(0, BLOCK_V).to(tl.int64)
    line = entry * queries + row
    q_tile = load_rows(q + batch * q_b + head * q_h, row, row_ok, depth, q_r, q_d, True, DIM, BLOCK_D)
    row_scale = tl.load(across + line, mask=row_ok, other=0.0)
    last = row + (keys - queries)
    stop = keys
    if CAUSAL:
        stop = tl.minimum(keys, (tile + 1) * BLOCK_M + (keys - queries))
    k_base, v_base = k + batch * k_b + head * k_h, v + batch * v_b + head * v_h
    count = _seen_keys(row, keys, queries, CAUSAL)
    taken = tl.where(count > warm_rows, offset, 0.0)
    first = tl.zeros((BLOCK_M,), dtype=tl.float32)
    weight_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
    top = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_V), dtype=tl.float32)
    row_gain = first
    row_less = first
    unit = first + 1.0
    alive = row_ok
    for sweep in tl.static_range(1 + POWER):
        for start in range(0, stop, BLOCK_N):
            column = start + tl.arange(0, BLOCK_N)
            column_ok = column < keys
            k_tile = load_rows(k_base, column, column_ok, depth, k_r, k_d, True, DIM, BLOCK_D)
            column_scale = tl.load(down + entry * keys + column, mask=column_ok, other=0.0)
            z = dot(
                q_tile, tl.trans(k_tile), tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32), UPCAST, PRECISION
            )
            weights, slope = _softplus(z * row_scale[:, None] * column_scale[None, :])
            seen = column_ok[None, :]
            if CAUSAL:
                seen = seen & (column[None, :] <= last[:, None])
            weights = tl.where(seen, weights, 0.0)
            before = top
            if sweep == 0:
                first += tl.sum(weights, 1)
                top = tl.maximum(top, tl.max(weights, 1))
            if sweep == POWER:
                if POWER:
                    share = tl.maximum(weights * row_gain[:, None] - row_less[:, None], 0.0)
                    weights = tl.where(alive[:, None], _power(share, p), weights * unit[:, None])
                    weight_sum += tl.sum(weights, 1)
                elif v.dtype.element_ty == tl.float16:
                    # it holds nothing below 6e-8: shares of the largest so far
                    unit = 1.0 / tl.where(top == 0, 1.0, top)
                    weights *= unit[:, None]
                    acc *= (before * unit)[:, None]
                v_tile = load_rows(v_base, column, column_ok, depth_v, v_r, v_d, True, DIM_V, BLOCK_V)
                acc = dot(weights.to(v_tile.dtype), v_tile, acc, UPCAST, PRECISION)
        if sweep == 0:
            if POWER:
                ratio = count / tl.where(first == 0, 1.0, first)
                top = top * ratio - taken
                alive = top > _DEAD
                top = tl.where(alive, top, 1.0)
                row_gain = tl.where(alive, ratio / top, 0.0)
                row_less = tl.where(alive, taken / top, 0.0)
                unit = tl.where(alive, 1.0, ratio)  # a mean of 1, which float16 holds
    if not POWER:
        weight_sum = first
        if v.dtype.element_ty == tl.float16:
            acc *= top[:, None]
    row_norm = 1.0 / tl.where(weight_sum == 0, 1.0, weight_sum)
    if POWER:
        tl.store(norm + line, row_norm * unit, mask=row_ok)
        tl.store(gain + line, row_gain, mask=row_ok)
        tl.store(less + line, row_less, mask=row_ok)
    else:
        tl.store(norm + line, row_norm, mask=row_ok)
    where = out + line[:, None] * DIM_V + depth_v[None, :]
    result = (acc * row_norm[:, None]).to(out.dtype.element_ty)
    tl.store(where, result, mask=row_ok[:, None] & (depth_v[None, :] < DIM_V))


@triton.jit
def _tile_gradient(z, upstream, delta, norm, gain, less, p, seen, POWER: tl.constexpr):
    """Weights, h of the docstring, and softplus'(z); all 0 where a pair is not seen."""
    weights, slope = _softplus(z)
    change = (upstream - delta) * norm
    if POWER:
        alive = gain > 0
        share = tl.maximum(weights * gain - less, 0.0)
        below = _power(share, p - 1.0)
        weights = tl.where(alive, share * below, weights)
        change *= tl.where(alive, p * gain * below, 1.0)
    return tl.where(seen, weights * norm, 0.0), tl.where(seen, change, 0.0), tl.where(seen, slope, 0.0)


@triton.jit
def _row_constants(norm, gain, less, line, row_ok, POWER: tl.constexpr):
    row_norm = tl.load(norm + line, mask=row_ok, other=0.0)
    row_gain, row_less = row_norm, row_norm
    if POWER:
        row_gain = tl.load(gain + line, mask=row_ok, other=0.0)
        row_less = tl.load(less + line, mask=row_ok, other=0.0)
    return row_norm, row_gain, row_less


@triton.jit
def _query_gradient_kernel(
    q, k, v, out, grad, across, down, norm, gain, less, delta, shift, dq,
    tiles, heads, queries, keys, p, offset, warm_rows, smallest,
    q_b, q_h, q_r, q_d, k_b, k_h, k_r, k_d, v_b, v_h, v_r, v_d, g_b, g_h, g_r, g_d,
    CAUSAL: tl.constexpr, POWER: tl.constexpr, NEEDED: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dq, and for the other kernel g . out and (o / n) sum_k h_k of every row."""
    tile = tiles - 1 - tl.program_id(0) % tiles
    entry = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = entry // heads, entry % heads
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = row < queries
    depth, depth_v = tl.arange(0, BLOCK_D).to(tl.int64), tl.arange(0, BLOCK_V).to(tl.int64)
    line = entry * queries + row
    g_tile = load_rows(grad + batch * g_b + head * g_h, row, row_ok, depth_v, g_r, g_d, True, DIM_V, BLOCK_V)
    out_tile = load_rows(out, line, row_ok, depth_v, DIM_V, 1, True, DIM_V, BLOCK_V)
    row_delta = tl.sum(g_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    tl.store(delta + line, row_delta, mask=row_ok)
    if NEEDED or POWER:
        q_tile = load_rows(q + batch * q_b + head * q_h, row, row_ok, depth, q_r, q_d, True, DIM, BLOCK_D)
        row_scale = tl.load(across + line, mask=row_ok, other=0.0)
        row_norm, row_gain, row_less = _row_constants(norm, gain, less, line, row_ok, POWER)
        last = row + (keys - queries)
        stop = keys
        if CAUSAL:
            stop = tl.minimum(keys, (tile + 1) * BLOCK_M + (keys - queries))
        k_base, v_base = k + batch * k_b + head * k_h, v + batch * v_b + head * v_h
        acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
        mean = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
        change_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
        # n / (T max(M, o)): slopes times it are below 2, and not all 0 in float16
        unit = tl.where(row_gain > 0, row_gain / tl.maximum(row_less, 1.0), 1.0)
        for start in range(0, stop, BLOCK_N):
            column = start + tl.arange(0, BLOCK_N)
            column_ok = column < keys
            k_tile = load_rows(k_base, column, column_ok, depth, k_r, k_d, True, DIM, BLOCK_D)
            v_tile = load_rows(v_base, column, column_ok, depth_v, v_r, v_d, True, DIM_V, BLOCK_V)
            column_scale = tl.load(down + entry * keys + column, mask=column_ok, other=0.0)
            empty = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            z = dot(q_tile, tl.trans(k_tile), empty, UPCAST, PRECISION)
            upstream = dot(g_tile, tl.trans(v_tile), empty, UPCAST, PRECISION)
            seen = column_ok[None, :]
            if CAUSAL:
                seen = seen & (column[None, :] <= last[:, None])
            weights, change, slope = _tile_gradient(
                z * row_scale[:, None] * column_scale[None, :], upstream, row_delta[:, None], row_norm[:, None],
                row_gain[:, None], row_less[:, None], p, seen, POWER,
            )  # fmt: skip
            slope *= column_scale[None, :]
            acc = dot((change * slope).to(k_tile.dtype), k_tile, acc, UPCAST, PRECISION)
            if POWER:
                change_sum += tl.sum(change, 1)
                mean = dot((slope * unit[:, None]).to(k_tile.dtype), k_tile, mean, UPCAST, PRECISION)
        if POWER:
            count = _seen_keys(row, keys, queries, CAUSAL)
            kept = (count > warm_rows) & (row_gain > 0)
            change_sum *= tl.where(kept, offset / tl.maximum(count, 1.0), 0.0)
            tl.store(shift + line, change_sum, mask=row_ok)
            acc -= (change_sum / unit)[:, None] * mean
        if NEEDED:
            result = _without(acc * row_scale[:, None], q_tile, smallest).to(dq.dtype.element_ty)
            where = dq + line[:, None] * DIM + depth[None, :]
            tl.store(where, result, mask=row_ok[:, None] & (depth[None, :] < DIM))


@triton.jit
def _key_gradient_kernel(
    q, k, v, grad, across, down, norm, gain, less, delta, shift, dk, dv,
    tiles, heads, queries, keys, p, offset, warm_rows, smallest,
    q_b, q_h, q_r, q_d, k_b, k_h, k_r, k_d, v_b, v_h, v_r, v_d, g_b, g_h, g_r, g_d,
    CAUSAL: tl.constexpr, POWER: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dk and dv. Tiles are transposed here: keys down, queries across."""
    tile = tl.program_id(0) % tiles
    entry = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = entry // heads, entry % heads
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    own = column < keys
    depth, depth_v = tl.arange(0, BLOCK_D).to(tl.int64), tl.arange(0, BLOCK_V).to(tl.int64)
    k_tile = load_rows(k + batch * k_b + head * k_h, column, own, depth, k_r, k_d, True, DIM, BLOCK_D)
    v_tile = load_rows(v + batch * v_b + head * v_h, column, own, depth_v, v_r, v_d, True, DIM_V, BLOCK_V)
    column_scale = tl.load(down + entry * keys + column, mask=own, other=0.0)
    q_base, g_base = q + batch * q_b + head * q_h, grad + batch * g_b + head * g_h
    dk_acc = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    dv_acc = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    begin = 0
    if CAUSAL:
        begin = tl.maximum(tile * BLOCK_N - (keys - queries), 0) // BLOCK_M * BLOCK_M
    for start in range(begin, queries, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        row_ok = row < queries
        line = entry * queries + row
        q_tile = load_rows(q_base, row, row_ok, depth, q_r, q_d, True, DIM, BLOCK_D)
        g_tile = load_rows(g_base, row, row_ok, depth_v, g_r, g_d, True, DIM_V, BLOCK_V)
        row_scale = tl.load(across + line, mask=row_ok, other=0.0)
        row_delta = tl.load(delta + line, mask=row_ok, other=0.0)
        row_norm, row_gain, row_less = _row_constants(norm, gain, less, line, row_ok, POWER)
        empty = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        z = dot(k_tile, tl.trans(q_tile), empty, UPCAST, PRECISION)
        upstream = dot(v_tile, tl.trans(g_tile), empty, UPCAST, PRECISION)
        seen = row_ok[None, :] & own[:, None]
        if CAUSAL:
            seen = seen & (column[:, None] <= (row + (keys - queries))[None, :])
        weights, change, slope = _tile_gradient(
            z * row_scale[None, :] * column_scale[:, None], upstream, row_delta[None, :], row_norm[None, :],
            row_gain[None, :], row_less[None, :], p, seen, POWER,
        )  # fmt: skip
        if POWER:
            change -= tl.load(shift + line, mask=row_ok, other=0.0)[None, :]
        dv_acc = dot(weights.to(g_tile.dtype), g_tile, dv_acc, UPCAST, PRECISION)
        change *= slope * row_scale[None, :]
        dk_acc = dot(change.to(q_tile.dtype), q_tile, dk_acc, UPCAST, PRECISION)
    line = entry * keys + column
    result = _without(dk_acc * column_scale[:, None], k_tile, smallest).to(dk.dtype.element_ty)
    where = dk + line[:, None] * DIM + depth[None, :]
    tl.store(where, result, mask=own[:, None] & (depth[None, :] < DIM))
    where = dv + line[:, None] * DIM_V + depth_v[None, :]
    tl.store(where, dv_acc.to(dv.dtype.element_ty), mask=own[:, None] & (depth_v[None, :] < DIM_V))


# --- launch shapes: speed only, no mathematics


def _shape(tensor, kind, dim, dim_v, power) -> dict:
    """Tile sizes and warps of the kernel `kind`."""
    width, depth_v = (max(16, triton.next_power_of_2(n)) for n in (dim, dim_v))
    wide, options = max(width, depth_v) > 64, {}
    if not tensor.is_cuda:  # the interpreter
        queries, keys = (16, 32) if kind == "keys" else (32, 16)
    elif tensor.dtype.itemsize == 2:
        # with a power, the gradient of the queries holds two sums
        queries, keys, warps, stages = {
            "forward": (128, 32, 8, 3) if wide else (128, 64, 8, 3),
            "queries": (64, 32, 8, 2) if wide else (64, 32, 4, 2),
            "keys": (32, 128, 8, 2) if not wide else (16, 64, 8, 2) if power else (32, 64, 8, 2),
        }[kind]
        options = dict(num_warps=warps, num_stages=stages)
    else:
        queries, keys, options = float32_tiles(tensor, kind, wide)
    return dict(BLOCK_M=queries, BLOCK_N=keys, BLOCK_D=width, BLOCK_V=depth_v, **options)


def _check(q, k, v, scale, causal, p, offset, warm_rows):
    """Check everything that a launch relies on. Returns arguments that the kernels share."""
    batch, heads, queries, keys, dim, dim_v = check_shapes(q, k, v, causal)
    if p is not None and not 1 <= p < float("inf"):
        raise ValueError(f"p must be None or a finite power of at least 1, got {p}")
    if warm_rows < 0:
        raise ValueError(f"warm_rows must not be negative, got {warm_rows}")
    if scale.shape != (queries,) or scale.dtype != torch.float32 or scale.device != q.device:
        raise ValueError(
            f"scale must be float32 of shape ({queries},) on {q.device}, "
            f"got {scale.dtype} of shape {tuple(scale.shape)} on {scale.device}"
        )
    lengths = [
        torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).clamp_min(_SMALLEST_LENGTH) for x in (q, k)
    ]
    if q.dtype == torch.float16:  # where 1 / _SMALLEST_LENGTH is inf, and inf * 0 nan
        lengths = [length.masked_fill(length <= _SMALLEST_LENGTH, torch.inf) for length in lengths]
    return dict(
        across=(scale / lengths[0]).contiguous(),
        down=(1 / lengths[1]).contiguous(),
        sizes=(heads, queries, keys, 1.0 if p is None else float(p), float(offset), int(warm_rows)),
        strides=(*q.stride(), *k.stride(), *v.stride()),
        constants=dict(CAUSAL=bool(causal), POWER=p is not None, DIM=dim, DIM_V=dim_v, **dot_options(q)),
    )


# --- the operations


def softplus_attention_forward(q, k, v, scale, *, causal=False, p=None, offset=1.0, warm_rows=3):
    """Attention with weights softplus(scale * cos(q, k)), and with a power `p` of what exceeds the average.

    Args:
        q: (batch, heads, queries, dim), any strides; float32, bfloat16 or float16. The queries are the last positions.
        k: (batch, heads, keys, dim), same dtype.
        v: (batch, heads, keys, dim_v), same dtype. Both dims are from 1 to 128.
        scale: of the cosines of each query, (queries,) float32.
        causal: whether a query sees no later keys.
        p: the power of the second stage, at least 1; None leaves the stage out.
        offset: what is subtracted from weights of the mean 1 before the power.
        warm_rows: rows that see at most so many keys have offset 0.

    Returns:
        The output (batch, heads, queries, dim_v) in the dtype of q, and a tuple of vectors that the gradient needs.

    Raises:
        TypeError, ValueError: dtypes, shapes, devices or options that do not fit; raised before anything is launched.
    """
    plan = _check(q, k, v, scale, causal, p, offset, warm_rows)
    (batch, heads, queries, dim), dim_v = q.shape, v.shape[3]
    out = q.new_empty(batch, heads, queries, dim_v)
    norm = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    gain, less = (None, None) if p is None else (torch.empty_like(norm), torch.empty_like(norm))
    shape = _shape(q, "forward", dim, dim_v, p is not None)
    if norm.numel():
        tiles = triton.cdiv(queries, shape["BLOCK_M"])
        _forward_kernel[(tiles * batch * heads,)](
            q, k, v, plan["across"], plan["down"], out, norm, gain, less, tiles, *plan["sizes"],
            *plan["strides"], **plan["constants"], **shape,
        )  # fmt: skip
    return out, (norm, gain, less)


def softplus_attention_backward(
    q, k, v, scale, out, saved, grad, *, causal=False, p=None, offset=1.0, warm_rows=3,
    need_queries=True, need_keys=True,
):  # fmt: skip
    """The gradients of `softplus_attention_forward`, of which the options are the same.

    Args:
        q, k, v, scale: as they were given.
        out, saved: as they came out.
        grad: with respect to the output, same shape and dtype, any strides.
        need_queries: whether the gradient of q is wanted.
        need_keys: whether those of k and v are.

    Returns:
        The gradients of q, k and v in their dtypes, contiguous; None for what is not wanted. In float16 the gradient of a
        query or key of zeros is 0, since that of its direction would be inf.

    Raises:
        TypeError, ValueError: as `softplus_attention_forward`.
    """
    plan = _check(q, k, v, scale, causal, p, offset, warm_rows)
    (batch, heads, queries, dim), (keys, dim_v) = q.shape, v.shape[2:]
    for name, tensor in (("out", out), ("grad", grad)):
        check_tensor(name, tensor, "batch, heads, queries, dim_v", like=("q", q))
        if tensor.shape != (batch, heads, queries, dim_v):
            raise ValueError(f"{name} must be {(batch, heads, queries, dim_v)}, got {tuple(tensor.shape)}")
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device) if need_queries else None
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_keys else None for x in (k, v))
    norm = saved[0]
    if not norm.numel() or not keys:
        return (*(None if x is None else x.zero_() for x in (dq, dk, dv)),)
    delta, shift = torch.empty_like(norm), None if p is None else torch.empty_like(norm)
    shared = (plan["across"], plan["down"], *saved, delta, shift)
    numbers = (*plan["sizes"], _SMALLEST_LENGTH, *plan["strides"], *grad.stride())
    shape = _shape(q, "queries", dim, dim_v, p is not None)
    tiles = triton.cdiv(queries, shape["BLOCK_M"])
    _query_gradient_kernel[(tiles * batch * heads,)](
        q,
        k,
        v,
        out.contiguous(),
        grad,
        *shared,
        dq,
        tiles,
        *numbers,
        NEEDED=need_queries,
        **plan["constants"],
        **shape,
    )
    if need_keys:
        shape = _shape(q, "keys", dim, dim_v, p is not None)
        tiles = triton.cdiv(keys, shape["BLOCK_N"])
        _key_gradient_kernel[(tiles * batch * heads,)](
            q, k, v, grad, *shared, dk, dv, tiles, *numbers, **plan["constants"], **shape
        )
    return dq, dk, dv
