"""Row sums of a Gaussian kernel over all pairs, in logarithms: log sum_j exp(-|x_i - y_j|^2 / (2 variance)).

The one primitive of the kernel estimators of entropy (Kolchinsky and Tracey 2017) and of the Cauchy-Schwarz divergence and
its relatives (arXiv 2404.17951): a product of Gaussian kernels is the Gaussian kernel of the joined samples, each divided by
its width. No pair is written to memory.

Forward: a program owns a block of rows, walks over the columns and keeps a running maximum and a running sum, rescaled when
the maximum grows. Backward, with p_ij the softmax of row i, g the upstream gradient and W_ij = g_i p_ij, computed anew:

    dx_i = sum_j W_ij (y_j - x_i) / variance          dy_j = sum_i W_ij (x_i - y_j) / variance
    dvariance = sum_ij W_ij |x_i - y_j|^2 / (2 variance^2)

One kernel does both sides: the program owns rows of one and walks over the other. No atomics: results are the same in every run.

Squared distances are sums of squared differences in float32, one dimension after the other, not norms and a product: points
that coincide are at distance 0 exactly, whatever their offset, and the relative error is (dim + 2) 2^-24. That costs two
instructions for each pair and dimension where a float32 product without TF32 costs one. In the gradient sum_j W_ij (y_j - x_i)
is taken as two sums about c, the middle of three rows of the block: sum_j W_ij (y_j - c) - (x_i - c) sum_j W_ij. The product
is a float32 one, its error about 2^-23 of |x_i - c| sum W / variance. Samples are copied to float32 with the dimension first, which makes
all loads contiguous: 4 (n + m) dim bytes. A program keeps up to 128 dimensions of a gradient; for more, several programs each
compute the distances.

For n rows, m columns:

    traffic    forward 4 (n + m) dim bytes, with the copies twice that; backward three times as much as forward
    operations forward 3 n m dim + 8 n m; backward 5 n m dim + 8 n m for each side (3 n m dim times dim / 128 beyond 128)

Explicit torch writes 4 n m bytes of distances, reads them for the square, the maximum and the sum (fused at best: 8 n m more),
and moves some 20 n m backward. At n = m = 32768, dim = 16 in float32: 4.3 GB a matrix, three alive in the backward pass,
13 GB and 3.8 ms forward, 21 GB and 6.4 ms backward, and some 2 ms for the products, if distances may come from a product;
`torch.cdist` without one takes far longer. Here 8 MB and, at a third of the 30 T instructions a second of an H100, 4.5 ms and
13 ms. It earns its place by memory: over 1000 (13 GB against some 12 MB), at 0.7 to 1 in time against an ideal torch.
"""

import math

import torch
import triton
import triton.language as tl

from kernels._launch import check_tensor

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)

# --- the mathematics of one tile


@triton.jit
def _tile_squares(
    a, b, row, row_ok, column, column_ok, rows, columns, dim, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr
):
    """|a_i - b_j|^2 of float32 samples (dim, rows) and (dim, columns)."""
    left = a + row
    right = b + column
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for _ in range(dim):
        difference = (
            tl.load(left, mask=row_ok, other=0.0)[:, None]
            - tl.load(right, mask=column_ok, other=0.0)[None, :]
        )
        total += difference * difference
        left += rows  # the pointer moves: dim * rows may be beyond 2^31
        right += columns
    return total


# --- the kernels


@triton.jit
def _logsumexp_kernel(x, y, out, rows, columns, dim, exponent, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = row < rows
    top = tl.full((BLOCK_N,), -3.4e38, dtype=tl.float32)  # finite: exp2(-inf - top) is 0, not nan
    mass = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for start in range(0, columns, BLOCK_M):
        column = start + tl.arange(0, BLOCK_M)
        column_ok = column < columns
        square = _tile_squares(x, y, row, row_ok, column, column_ok, rows, columns, dim, BLOCK_N, BLOCK_M)
        score = tl.where(column_ok[None, :], square * exponent, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        mass = mass * tl.exp2(top - new_top) + tl.sum(tl.exp2(score - new_top[:, None]), 1)
        top = new_top
    tl.store(out + row, (top + tl.log2(mass)) * _LN2, mask=row_ok)


@triton.jit
def _gradient_kernel(
    own, other, lse, upstream, gradient, spread, rows, columns, dim, exponent, factor,
    OWN_ROWS: tl.constexpr, NEED_SPREAD: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of the rows of `own`; OWN_ROWS where `lse` and `upstream` belong to them, not to `other`."""
    first = tl.program_id(0) * BLOCK_N
    row = first + tl.arange(0, BLOCK_N)
    row_ok = row < rows
    depth = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    depth_ok = depth < dim
    # of three rows, the middle value in each dimension: one row far away does not move it
    where = own + depth.to(tl.int64) * rows
    low = tl.load(where + first, mask=depth_ok, other=0.0)
    high = tl.load(where + tl.minimum(first + BLOCK_N, rows) - 1, mask=depth_ok, other=0.0)
    middle = tl.load(where + tl.minimum(first + BLOCK_N // 2, rows - 1), mask=depth_ok, other=0.0)
    centre = tl.maximum(tl.minimum(low, high), tl.minimum(tl.maximum(low, high), middle))
    total = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    weight_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    square_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if OWN_ROWS:
        own_lse = tl.load(lse + row, mask=row_ok, other=0.0) * _LOG2_E
        own_upstream = tl.load(upstream + row, mask=row_ok, other=0.0)
    for start in range(0, columns, BLOCK_M):
        column = start + tl.arange(0, BLOCK_M)
        column_ok = column < columns
        square = _tile_squares(
            own, other, row, row_ok, column, column_ok, rows, columns, dim, BLOCK_N, BLOCK_M
        )
        score = square * exponent
        if OWN_ROWS:
            shift, g = own_lse[:, None], own_upstream[:, None]
        else:
            shift = tl.load(lse + column, mask=column_ok, other=0.0)[None, :] * _LOG2_E
            g = tl.load(upstream + column, mask=column_ok, other=0.0)[None, :]
        # a row whose kernels all vanish has an lse of -inf and no gradient
        shift = tl.where(shift == float("-inf"), 0.0, shift)
        weight = tl.where(row_ok[:, None] & column_ok[None, :], tl.exp2(score - shift) * g, 0.0)
        weight_sum += tl.sum(weight, 1)
        if NEED_SPREAD:  # 0 * inf for a pair too far apart
            square_sum += tl.sum(tl.where(weight == 0.0, 0.0, weight * square), 1)
        b = tl.load(
            other + depth.to(tl.int64)[None, :] * columns + column[:, None],
            mask=column_ok[:, None] & depth_ok[None, :],
            other=0.0,
        )
        # always exact products: TF32 would show in what is left of the difference of two large sums
        total = tl.dot(weight, b - centre[None, :], total, input_precision="ieee")
    where = depth.to(tl.int64)[None, :] * rows + row[:, None]
    ok = row_ok[:, None] & depth_ok[None, :]
    a = tl.load(own + where, mask=ok, other=0.0)
    tl.store(gradient + where, factor * (total - weight_sum[:, None] * (a - centre[None, :])), mask=ok)
    if NEED_SPREAD:
        if tl.program_id(1) == 0:
            tl.store(spread + row, square_sum, mask=row_ok)


# --- launch shapes: speed only, no mathematics


def _shape(tensor: torch.Tensor, dim: int, gradient: bool) -> dict:
    """Tile sizes and warps; BLOCK_D, the dimensions of a gradient that one program keeps."""
    if not tensor.is_cuda:  # the interpreter
        shape = dict(BLOCK_N=32, BLOCK_M=32)
    else:
        shape = dict(BLOCK_N=64, BLOCK_M=32 if gradient else 64, num_warps=4, num_stages=2)
    if gradient:
        shape["BLOCK_D"] = min(128 if tensor.is_cuda else 32, max(16, triton.next_power_of_2(dim)))
        if tensor.is_cuda and shape["BLOCK_D"] > 16:  # what the product keeps in registers
            shape.update(BLOCK_N=64 if shape["BLOCK_D"] <= 64 else 32, num_warps=8)
    return shape


# --- checks


def _check(x, y, variance, **vectors) -> None:
    """Check everything that a launch relies on."""
    check_tensor("x", x, "rows, dim")
    check_tensor("y", y, "columns, dim", ("x", x))
    if x.shape[1] != y.shape[1] or not x.shape[1] or not len(y):
        raise ValueError(
            "x must be (rows, dim) and y (columns, dim) with columns and dim at least 1, "
            f"got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if isinstance(variance, torch.Tensor) or not (math.isfinite(variance) and variance > 0):
        raise ValueError(f"variance must be a positive number and no tensor, got {variance!r}")
    for name, vector in vectors.items():
        if vector.shape != x.shape[:1] or vector.device != x.device:
            raise ValueError(
                f"{name} must be ({len(x)},), one entry a row, on {x.device}, "
                f"got {tuple(vector.shape)} on {vector.device}"
            )


def _columns_first(points: torch.Tensor) -> torch.Tensor:
    return points.T.to(torch.float32).contiguous()


# --- the operations


def gaussian_kernel_sum_forward(x, y, variance) -> torch.Tensor:
    """log sum_j exp(-|x_i - y_j|^2 / (2 variance)) for every row i.

    Args:
        x: `(rows, dim)`, any strides; float32, bfloat16 or float16.
        y: `(columns, dim)`, same dtype.
        variance: positive number.

    Returns:
        `(rows,)` in float32; -inf where all kernels of a row vanish, which takes squared distances beyond float32.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit; raised before anything is launched.
    """
    _check(x, y, variance)
    (rows, dim), columns = x.shape, len(y)
    out = x.new_empty(rows, dtype=torch.float32)
    if rows:
        shape = _shape(x, dim, False)
        _logsumexp_kernel[(triton.cdiv(rows, shape["BLOCK_N"]),)](
            _columns_first(x),
            _columns_first(y),
            out,
            rows,
            columns,
            dim,
            -0.5 * _LOG2_E.value / variance,
            **shape,
        )
    return out


def gaussian_kernel_sum_backward(x, y, variance, lse, upstream, *, needs=(True, True, True)):
    """The gradients of `gaussian_kernel_sum_forward`, whose arguments it takes.

    Args:
        lse: `(rows,)` float32, what the forward pass returned.
        upstream: `(rows,)`, gradient with respect to it.
        needs: which of the gradients with respect to `x`, `y`, `variance` are wanted.

    Returns:
        The gradients in the shapes and dtype of `x` and `y`, and a float32 scalar tensor for `variance`; None for one not
        wanted.

    Raises:
        TypeError, ValueError: as `gaussian_kernel_sum_forward`.
    """
    _check(x, y, variance, lse=lse, upstream=upstream)
    need_x, need_y, need_variance = needs
    dim = x.shape[1]
    if not len(x):
        zero = x.new_zeros((), dtype=torch.float32)
        return (
            torch.zeros_like(x) if need_x else None,
            torch.zeros_like(y) if need_y else None,
            zero if need_variance else None,
        )
    shape = _shape(x, dim, True)
    vectors = lse.to(torch.float32).contiguous(), upstream.to(torch.float32).contiguous()
    left, right = _columns_first(x), _columns_first(y)
    spread = torch.empty_like(vectors[0]) if need_variance else None
    gradients = [None, None]
    for side, (own, other, need) in enumerate(
        ((left, right, need_x or need_variance), (right, left, need_y))
    ):
        if not need:
            continue
        gradient = torch.empty_like(own)
        (rows, columns), chunks = (own.shape[1], other.shape[1]), triton.cdiv(dim, shape["BLOCK_D"])
        _gradient_kernel[(triton.cdiv(rows, shape["BLOCK_N"]), chunks)](
            own, other, *vectors, gradient, spread, rows, columns, dim, -0.5 * _LOG2_E.value / variance, 1 / variance,
            OWN_ROWS=side == 0, NEED_SPREAD=side == 0 and need_variance, **shape,
        )  # fmt: skip
        gradients[side] = gradient.T.to(x.dtype)
    # divided twice: the square of a small variance is below what float32 holds
    d_variance = spread.sum() / variance / (2 * variance) if need_variance else None
    return gradients[0] if need_x else None, gradients[1], d_variance
