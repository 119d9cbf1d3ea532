"""Attention with a Gaussian kernel and no softmax: out_i = sum_j exp(-scale |q_i - k_j|^2 / 2) v_j.

The exact form of the attention that SOFT approximates (Lu et al. 2021, arXiv 2207.03341, equation 4; q = k there). No weight
is written to memory. With S_ij the weight of a pair, g the upstream gradient and W_ij = S_ij (g_i . v_j),

    dv_j = sum_i S_ij g_i      dq_i = scale sum_j W_ij (k_j - q_i)      dk_j = scale sum_i W_ij (q_i - k_j)

S and W are the same whichever side looks, so one kernel does all of it. A program owns a block of rows (queries, or keys)
and walks over the blocks of the other side: `sum_b S w_b`, with w the other side's values (v, or g), is the output or dv;
`sum_b S (u . w_b) (b - a)`, with u its own values (g, or v), is dq or dk. There is nothing to rescale on the way, since there
is no row maximum, and nothing to save for the backward pass. No atomics: results are the same in every run.

The squared distance is |a|^2 + |b|^2 - 2 a.b, clamped at 0, as in the PyTorch path: its absolute error is a few units of
rounding (2^-24; half-precision products are exact) of |a|^2 + |b|^2. The sum of W in `sum W b - a sum W` is that of W as it was
rounded for the product with b, so that the difference b - a is exact for each pair. W of float16 is divided by max |g| max |v|
first, so that it neither overflows nor vanishes.

For n queries and keys of `dim` (values too), e bytes an element, and each head:

    traffic    forward 4 n dim e                      backward 11 n dim e (two launches: q, k, v, g twice; three gradients)
    operations forward 4 n^2 dim, 8 n^2 at the tile   backward 6 n^2 dim for dq, 8 n^2 dim for dk and dv

Rereading the other side for each block of rows comes from the L2 cache. Compiled torch writes and reads the matrix: distances
out of the product, weights out of the pointwise kernel, both read again, so 4 n^2 e forward, and some 10 n^2 e backward with
e n^2 saved between; at n = 4096, dim = 64 in bfloat16 that is 134 MB and 335 MB a head against 2 MB and 6 MB. At 3.35 TB/s and
half of 990 TFLOP/s: 49 and 118 us a head by torch (products included), 9 and 31 us here.
It earns its place, by this count: 3 to 5 in time, over 15 in memory (33 MB saved and as much temporary a head, against 2 MB).
"""

import torch
import triton
import triton.language as tl

from kernels._launch import check_tensor, dot, dot_options

MAX_DIM = 256  # a row is held whole

# --- the kernel


@triton.jit
def _load_tile(
    pointer, outer, inner, index, index_ok, width, stride_o, stride_i, stride_n, stride_d, BLOCK: tl.constexpr
):
    """Rows `index` of one head, (len(index), BLOCK), zeros outside."""
    depth = tl.arange(0, BLOCK)
    pointer += outer * stride_o + inner * stride_i
    return tl.load(
        pointer + index.to(tl.int64)[:, None] * stride_n + depth.to(tl.int64)[None, :] * stride_d,
        mask=index_ok[:, None] & (depth[None, :] < width),
        other=0.0,
    )


@triton.jit
def _store_tile(pointer, tile, batch, rows, row, row_ok, width, BLOCK: tl.constexpr):
    depth = tl.arange(0, BLOCK)
    where = (batch.to(tl.int64) * rows + row)[:, None] * width + depth[None, :]
    tl.store(
        pointer + where,
        tile.to(pointer.dtype.element_ty),
        mask=row_ok[:, None] & (depth[None, :] < width),
    )


@triton.jit
def _weighted_sums_kernel(
    own, own_value, other, other_value, mask, value_out, gradient_out, peak,
    rows, columns, dim, value_dim, heads, row_blocks, shift, scale, exponent,
    own_o, own_i, own_n, own_d, own_value_o, own_value_i, own_value_n, own_value_d,
    other_o, other_i, other_n, other_d, other_value_o, other_value_i, other_value_n, other_value_d,
    mask_o, mask_i, mask_row, mask_column,
    VALUES: tl.constexpr, GRADIENT: tl.constexpr, CAUSAL: tl.constexpr, OWN_QUERIES: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_PEAK: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) % row_blocks
    batch = tl.program_id(0) // row_blocks
    outer = (batch // heads).to(tl.int64)
    inner = (batch % heads).to(tl.int64)
    row = block * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = row < rows
    a = _load_tile(own, outer, inner, row, row_ok, dim, own_o, own_i, own_n, own_d, BLOCK_D)
    a_wide = a.to(tl.float32)
    a_square = tl.sum(a_wide * a_wide, 1)
    if VALUES:
        total = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    if GRADIENT:
        u = _load_tile(
            own_value, outer, inner, row, row_ok, value_dim,
            own_value_o, own_value_i, own_value_n, own_value_d, BLOCK_V,
        )  # fmt: skip
        gradient = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
        weight_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
        inverse = 1.0
        if HAS_PEAK:
            inverse = 1.0 / tl.load(peak)
    # of a causal triangle only the blocks that hold a visible pair: key <= query + shift
    first = 0
    last = columns
    if CAUSAL:
        if OWN_QUERIES:
            last = tl.minimum(columns, (block + 1) * BLOCK_N + shift)
        else:
            first = tl.maximum(block * BLOCK_N - shift, 0) // BLOCK_M * BLOCK_M
    for start in range(first, last, BLOCK_M):
        column = start + tl.arange(0, BLOCK_M)
        column_ok = column < columns
        b = _load_tile(
            other, outer, inner, column, column_ok, dim, other_o, other_i, other_n, other_d, BLOCK_D
        )
        w = _load_tile(
            other_value, outer, inner, column, column_ok, value_dim,
            other_value_o, other_value_i, other_value_n, other_value_d, BLOCK_V,
        )  # fmt: skip
        b_wide = b.to(tl.float32)
        b_square = tl.sum(b_wide * b_wide, 1)
        zeros = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        square = a_square[:, None] + b_square[None, :] - 2.0 * dot(a, tl.trans(b), zeros, UPCAST, PRECISION)
        square = tl.maximum(square, 0.0, propagate_nan=tl.PropagateNan.ALL)
        s = tl.exp2(square * exponent)
        visible = row_ok[:, None] & column_ok[None, :]
        if CAUSAL:
            if OWN_QUERIES:
                visible = visible & (column[None, :] <= row[:, None] + shift)
            else:
                visible = visible & (row[:, None] <= column[None, :] + shift)
        if HAS_MASK:
            seen = tl.load(
                mask + outer * mask_o + inner * mask_i
                + row.to(tl.int64)[:, None] * mask_row + column.to(tl.int64)[None, :] * mask_column,
                mask=visible, other=0,
            )  # fmt: skip
            visible = visible & (seen != 0)
        s = tl.where(visible, s, 0.0)
        if VALUES:
            total = dot(s.to(w.dtype), w, total, UPCAST, PRECISION)
        if GRADIENT:
            weight = s * dot(u, tl.trans(w), zeros, UPCAST, PRECISION)
            weight = (weight * inverse).to(b.dtype)
            weight_sum += tl.sum(weight.to(tl.float32), 1)
            gradient = dot(weight, b, gradient, UPCAST, PRECISION)
    if VALUES:
        _store_tile(value_out, total, batch, rows, row, row_ok, value_dim, BLOCK_V)
    if GRADIENT:
        gradient = (scale / inverse) * (gradient - weight_sum[:, None] * a.to(tl.float32))
        _store_tile(gradient_out, gradient, batch, rows, row, row_ok, dim, BLOCK_D)


# --- launch shapes: speed only, no mathematics


def _shape(tensor: torch.Tensor, dim: int, value_dim: int, gradient: bool) -> dict:
    """Tile sizes, warps and stages: rows owned, rows of the other side, and whole vectors."""
    depth, width = (max(16, triton.next_power_of_2(size)) for size in (dim, value_dim))
    if not tensor.is_cuda:  # the interpreter
        return dict(BLOCK_N=32, BLOCK_M=16, BLOCK_D=depth, BLOCK_V=width)
    widest = max(depth, width)
    if tensor.dtype.itemsize == 2:
        rows, columns = (64 if gradient or widest > 128 else 128), (64 if widest <= 128 else 32)
        warps, stages = (4, 2) if gradient and widest <= 64 else (8, 2 if gradient else 3)
    else:
        rows, columns = (64 if widest <= 64 else 32), (16 if gradient or widest > 128 else 32)
        warps, stages = 8, 1
    return dict(
        BLOCK_N=rows, BLOCK_M=columns, BLOCK_D=depth, BLOCK_V=width, num_warps=warps, num_stages=stages
    )


# --- checks


def _check(q, k, v, mask, causal, scale, upstream=None) -> None:
    """Check everything that a launch relies on."""
    check_tensor("q", q, "batch, heads, queries, dim")
    check_tensor("k", k, "batch, heads, keys, dim", ("q", q))
    check_tensor("v", v, "batch, heads, keys, value_dim", ("q", q))
    if not q.shape[:2] == k.shape[:2] == v.shape[:2] or q.shape[3] != k.shape[3] or k.shape[2] != v.shape[2]:
        raise ValueError(
            "q must be (batch, heads, queries, dim), k (batch, heads, keys, dim) and v (batch, heads, keys, value_dim), "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if max(q.shape[3], v.shape[3]) > MAX_DIM:
        raise ValueError(f"dim and value_dim must be at most {MAX_DIM}, got {q.shape[3]} and {v.shape[3]}")
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale!r}")
    if causal and q.shape[2] > k.shape[2]:
        raise ValueError(f"causal needs as many keys as queries, got {k.shape[2]} and {q.shape[2]}")
    if mask is not None:
        if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
            raise TypeError(
                f"mask must be a boolean tensor, got {getattr(mask, 'dtype', type(mask).__name__)}"
            )
        if mask.shape != (*q.shape[:3], k.shape[2]) or mask.device != q.device:
            raise ValueError(
                f"mask must be {(*q.shape[:3], k.shape[2])} on {q.device}, got {tuple(mask.shape)} on {mask.device}"
            )
    if upstream is not None:
        check_tensor("upstream", upstream, "batch, heads, queries, value_dim", ("q", q))
        if upstream.shape != (*q.shape[:3], v.shape[3]):
            raise ValueError(f"upstream must be {(*q.shape[:3], v.shape[3])}, got {tuple(upstream.shape)}")


def _launch(own, own_value, other, other_value, mask, causal, scale, own_queries, values, gradient, peak):
    """The two sums of the module's docstring that belong to the rows of `own`; None for one not asked for."""
    batch, heads, rows, dim = own.shape
    columns, value_dim = other_value.shape[2:]
    value_out = own.new_empty(batch, heads, rows, value_dim) if values else None
    gradient_out = own.new_empty(own.shape) if gradient else None
    shape = _shape(own, dim, value_dim, gradient)
    row_blocks = triton.cdiv(rows, shape["BLOCK_N"])
    strides = (0, 0, 0, 0)
    if mask is not None:
        strides = mask.stride() if own_queries else (*mask.stride()[:2], mask.stride(3), mask.stride(2))
        mask = mask.view(torch.uint8)
    shift = columns - rows if own_queries else rows - columns
    if row_blocks * batch * heads:
        _weighted_sums_kernel[(row_blocks * batch * heads,)](
            own, own_value, other, other_value, mask, value_out, gradient_out, peak,
            rows, columns, dim, value_dim, heads, row_blocks, shift, float(scale), -0.7213475204444817 * scale,
            *own.stride(), *own_value.stride(), *other.stride(), *other_value.stride(), *strides,
            VALUES=values, GRADIENT=gradient, CAUSAL=bool(causal), OWN_QUERIES=own_queries, HAS_MASK=mask is not None,
            HAS_PEAK=peak is not None, **dot_options(own), **shape,
        )  # fmt: skip
    return value_out, gradient_out


# --- the operations


def gaussian_attention_forward(q, k, v, *, scale, causal=False, mask=None) -> torch.Tensor:
    """out_i = sum_j exp(-scale |q_i - k_j|^2 / 2) v_j over the keys that a query sees.

    Args:
        q: `(batch, heads, queries, dim)`, any strides; float32, bfloat16 or float16.
        k: `(batch, heads, keys, dim)`, same dtype.
        v: `(batch, heads, keys, value_dim)`, same dtype.
        scale: positive.
        causal: query i sees the keys j <= i + keys - queries.
        mask: boolean `(batch, heads, queries, keys)`, any strides, True where a query sees a key; or None.

    Returns:
        `(batch, heads, queries, value_dim)` in the dtype of `q`, contiguous; zeros for a query that sees nothing.

    Raises:
        TypeError, ValueError: dtypes, shapes, devices or options that do not fit; raised before anything is launched.
    """
    _check(q, k, v, mask, causal, scale)
    return _launch(q, v[:, :, :0], k, v, mask, causal, scale, True, True, False, None)[0]


def gaussian_attention_backward(
    q, k, v, upstream, *, scale, causal=False, mask=None, needs=(True, True, True)
):
    """The gradients of `gaussian_attention_forward`, whose arguments it takes.

    Args:
        upstream: `(batch, heads, queries, value_dim)`, gradient with respect to the output, in the dtype of `q`.
        needs: which of the gradients with respect to `q`, `k`, `v` are wanted.

    Returns:
        The three gradients, contiguous, in the shapes and dtype of `q`, `k`, `v`; None for one not wanted.

    Raises:
        TypeError, ValueError: as `gaussian_attention_forward`.
    """
    _check(q, k, v, mask, causal, scale, upstream)
    need_q, need_k, need_v = needs
    peak = None
    if q.dtype == torch.float16 and upstream.numel() and v.numel():
        peak = upstream.abs().amax().float() * v.abs().amax().float()
        peak = torch.where(peak.isfinite() & (peak > 0), peak, 1.0)
    d_q = d_k = d_v = None
    if need_q:
        d_q = _launch(q, upstream, k, v, mask, causal, scale, True, False, True, peak)[1]
    if need_k or need_v:
        d_v, d_k = _launch(k, v, q, upstream, mask, causal, scale, False, need_v, need_k, peak)
    return d_q, d_k, d_v
