"""Softmax over the rows of a matrix in two sweeps, with the three-sweep form as a baseline.

Algorithm (Dukhan and Ablavatski, 2020). Every e^x is held as a pair (m, n) that stands for m * 2^n:
n = round(x / ln 2) kept as a float, t = x - n ln 2 in two steps (Cody-Waite), m = e^t by a polynomial of degree 5.
Pairs are added at the larger of the two exponents, so no maximum has to be known in advance::

    sweep 1   grid (row, chunk): every program adds up the pairs of its chunk; a second, tiny launch adds the
              partial pairs of a row to (M, K), so that sum_j e^(x_j) = M * 2^K
    sweep 2   grid (row, chunk): y_i = (m_i / M) * 2^(n_i - K), with the pair of x_i computed again

A row that fits in one block stays in registers: one launch, one read, one write.
The backward pass is dx = y * (g - sum_j g_j y_j), split in the same way.

Memory traffic of N elements a row, in words of the input's size (C partial results a row are of no weight)::

    two sweeps    2 N reads + N writes     three sweeps  3 N reads + N writes
    one launch      N reads + N writes     backward      4 N reads + N writes (2 N + N when a row fits in a block)

Floating-point operations of one element and sweep, a fused multiply-add counted as two: 11 for n and t, clipping
included, 10 for the polynomial, 4 to 6 to scale and to add; so about 50 N for the two sweeps of a row. The factor
2^e is put together from its bits, which is exact.

Inputs are matrices of any strides in float32, bfloat16 or float16; arithmetic is in float32. A row of -inf
everywhere, or with a nan or +inf in it, gives nan, as in `torch.softmax`. Finite values beyond 2.3e38 in
magnitude count as 2.3e38, because x / ln 2 would overflow.
"""

import torch
import triton
import triton.language as tl

from kernels._launch import check_tensor

BLOCK = 4096  # elements that one program holds at a time
MAX_CHUNKS = 1024  # partial results of a row, added up by one program
PROGRAMS = 4096  # programs worth launching: enough to fill a large GPU several times over

_LIMIT = tl.constexpr(2.3e38)
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
# ln 2 in two parts. The first is 355 / 512, so n * _LN2_HIGH is exact up to |n| = 2^24 / 355 even without a fused
# multiply-add (the interpreter has none).
_LN2_HIGH = tl.constexpr(0.693359375)
_LN2_LOW = tl.constexpr(-2.12194440054690583e-4)
# e^t on [-ln 2 / 2, ln 2 / 2]: 1 + t (c1 + t (c2 + ...)), minimax in the relative error; the chapter fits it
_C1 = tl.constexpr(0.9999997071895316)
_C2 = tl.constexpr(0.4999914953071292)
_C3 = tl.constexpr(0.1666763619461443)
_C4 = tl.constexpr(0.04189792929648374)
_C5 = tl.constexpr(0.008290314728168874)


@triton.jit
def _ext_exp(x):
    clipped = tl.maximum(x, -_LIMIT, propagate_nan=tl.PropagateNan.ALL)
    clipped = tl.minimum(clipped, _LIMIT, propagate_nan=tl.PropagateNan.ALL)
    n = tl.floor(clipped * _LOG2_E + 0.5)
    t = tl.fma(n, -_LN2_HIGH, clipped)
    t = tl.fma(n, -_LN2_LOW, t)
    # For |n| beyond 2^24 t is rounding noise. Clipping at ln 2, not at half of it: the rounding of
    # x / ln 2 alone moves |t| a little past ln 2 / 2.
    t = tl.maximum(t, -_LN2, propagate_nan=tl.PropagateNan.ALL)
    t = tl.minimum(t, _LN2, propagate_nan=tl.PropagateNan.ALL)
    m = tl.fma(t, _C5, _C4)
    m = tl.fma(t, m, _C3)
    m = tl.fma(t, m, _C2)
    m = tl.fma(t, m, _C1)
    m = tl.fma(t, m, 1.0)
    m = tl.where(x == float("inf"), float("nan"), m)
    m = tl.where(x == float("-inf"), 0.0, m)
    return m, tl.where(tl.abs(x) == float("inf"), x, n)


@triton.jit
def _bits_to_power(e):  # 2^e for whole numbers -127 < e < 128, and 0 for e = -127
    return ((e.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _power_of_two(e):  # e <= 0; terms of a sum: below 2^-126 they are nothing beside a sum of at least 1/2
    return _bits_to_power(tl.maximum(e, -127.0))


@triton.jit
def _scale(m, e):  # m * 2^e for e <= 0, down to the smallest subnormal number, below it exactly 0
    e = tl.maximum(e, -252.0)
    half = tl.floor(e * 0.5)
    return m * _bits_to_power(half) * _bits_to_power(e - half)


@triton.jit
def _finite(k):  # the exponent to subtract: that of an empty sum is -inf, and -inf - (-inf) would be nan
    return tl.where(k == float("-inf"), 0.0, k)


@triton.jit
def _small_rows_kernel(
    x_ptr, y_ptr, rows, columns, x_row, x_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, COLUMNS)[None, :].to(tl.int64)
    inside = (row < rows) & (column < columns)
    # rows past the end hold zeros, not -inf, so that they do not divide by zero
    x = tl.load(x_ptr + row * x_row + column * x_column, mask=inside, other=0.0).to(tl.float32)
    m, n = _ext_exp(tl.where(column < columns, x, float("-inf")))
    k = _finite(tl.max(n, axis=1))[:, None]
    total = tl.sum(m * _power_of_two(n - k), axis=1)[:, None]
    y = _scale(m * (1.0 / total), n - k)
    tl.store(y_ptr + row * columns + column, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _partial_pairs_kernel(x_ptr, m_ptr, n_ptr, columns, x_row, x_column, steps, BLOCK: tl.constexpr):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    total_m = 0.0  # the neutral pair
    total_n = float("-inf")
    for step in range(steps):
        column = (chunk * steps + step) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * x_row + column * x_column, mask=column < columns, other=float("-inf"))
        m, n = _ext_exp(x.to(tl.float32))
        largest = tl.maximum(total_n, tl.max(n, axis=0))
        k = _finite(largest)
        total_m = total_m * _power_of_two(total_n - k) + tl.sum(m * _power_of_two(n - k), axis=0)
        total_n = largest
    tl.store(m_ptr + row * tl.num_programs(1) + chunk, total_m)
    tl.store(n_ptr + row * tl.num_programs(1) + chunk, total_n)


@triton.jit
def _combine_pairs_kernel(m_ptr, n_ptr, m_out_ptr, n_out_ptr, chunks, CHUNKS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNKS)
    m = tl.load(m_ptr + row * chunks + chunk, mask=chunk < chunks, other=0.0)
    n = tl.load(n_ptr + row * chunks + chunk, mask=chunk < chunks, other=float("-inf"))
    largest = tl.max(n, axis=0)
    tl.store(m_out_ptr + row, tl.sum(m * _power_of_two(n - _finite(largest)), axis=0))
    tl.store(n_out_ptr + row, largest)


@triton.jit
def _from_pairs_kernel(x_ptr, m_ptr, n_ptr, y_ptr, columns, x_row, x_column, steps, BLOCK: tl.constexpr):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    inverse = 1.0 / tl.load(m_ptr + row)
    k = _finite(tl.load(n_ptr + row))
    for step in range(steps):
        column = (chunk * steps + step) * BLOCK + tl.arange(0, BLOCK)
        inside = column < columns
        x = tl.load(x_ptr + row * x_row + column * x_column, mask=inside, other=0.0)
        m, n = _ext_exp(x.to(tl.float32))
        y = _scale(m * inverse, n - k)
        tl.store(y_ptr + row * columns + column, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _small_rows_backward_kernel(
    y_ptr, g_ptr, dx_ptr, rows, columns, y_row, y_column, g_row, g_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, COLUMNS)[None, :].to(tl.int64)
    inside = (row < rows) & (column < columns)
    y = tl.load(y_ptr + row * y_row + column * y_column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + row * g_row + column * g_column, mask=inside, other=0.0).to(tl.float32)
    dx = y * (g - tl.sum(y * g, axis=1)[:, None])
    tl.store(dx_ptr + row * columns + column, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _partial_dots_kernel(
    y_ptr, g_ptr, dot_ptr, columns, y_row, y_column, g_row, g_column, steps, BLOCK: tl.constexpr
):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    total = 0.0
    for step in range(steps):
        column = (chunk * steps + step) * BLOCK + tl.arange(0, BLOCK)
        inside = column < columns
        y = tl.load(y_ptr + row * y_row + column * y_column, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + row * g_row + column * g_column, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(y * g, axis=0)
    tl.store(dot_ptr + row * tl.num_programs(1) + chunk, total)


@triton.jit
def _backward_kernel(
    y_ptr, g_ptr, dot_ptr, dx_ptr, columns, y_row, y_column, g_row, g_column, steps, BLOCK: tl.constexpr
):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    dot = tl.load(dot_ptr + row)
    for step in range(steps):
        column = (chunk * steps + step) * BLOCK + tl.arange(0, BLOCK)
        inside = column < columns
        y = tl.load(y_ptr + row * y_row + column * y_column, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + row * g_row + column * g_column, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * columns + column, (y * (g - dot)).to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _partial_maxima_kernel(x_ptr, max_ptr, columns, x_row, x_column, steps, BLOCK: tl.constexpr):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    largest = float("-inf")
    for step in range(steps):
        column = (chunk * steps + step) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * x_row + column * x_column, mask=column < columns, other=float("-inf"))
        largest = tl.maximum(largest, tl.max(x.to(tl.float32), axis=0))
    tl.store(max_ptr + row * tl.num_programs(1) + chunk, largest)


@triton.jit
def _partial_sums_kernel(x_ptr, max_ptr, sum_ptr, columns, x_row, x_column, steps, BLOCK: tl.constexpr):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    largest = tl.load(max_ptr + row)
    total = 0.0
    for step in range(steps):
        column = (chunk * steps + step) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * x_row + column * x_column, mask=column < columns, other=float("-inf"))
        total += tl.sum(tl.exp(x.to(tl.float32) - largest), axis=0)
    tl.store(sum_ptr + row * tl.num_programs(1) + chunk, total)


@triton.jit
def _normalise_kernel(x_ptr, max_ptr, sum_ptr, y_ptr, columns, x_row, x_column, steps, BLOCK: tl.constexpr):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    largest = tl.load(max_ptr + row)
    inverse = 1.0 / tl.load(sum_ptr + row)
    for step in range(steps):
        column = (chunk * steps + step) * BLOCK + tl.arange(0, BLOCK)
        inside = column < columns
        x = tl.load(x_ptr + row * x_row + column * x_column, mask=inside, other=0.0)
        y = tl.exp(x.to(tl.float32) - largest) * inverse
        tl.store(y_ptr + row * columns + column, y.to(y_ptr.dtype.element_ty), mask=inside)


def _check(name: str, x: torch.Tensor, block: int) -> None:
    check_tensor(name, x, "rows, columns")
    if block < 1 or block & (block - 1):
        raise ValueError(f"block must be a power of two, got {block}")


def _split(rows: int, columns: int, block: int) -> tuple[int, int]:
    """The chunks a row is cut into, and the blocks that one program walks through."""
    blocks = triton.cdiv(columns, block)
    chunks = min(blocks, MAX_CHUNKS, max(1, triton.cdiv(PROGRAMS, rows)))
    steps = triton.cdiv(blocks, chunks)
    return triton.cdiv(blocks, steps), steps


def _tile(columns: int, block: int) -> tuple[int, int]:
    """Rows and columns of the tile of the one-launch kernels."""
    width = triton.next_power_of_2(columns)
    return max(1, min(block // width, 64)), width


def row_pairs(x: torch.Tensor, block: int = BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """The first sweep: for every row the pair (M, K) with sum_j e^(x_j) = M * 2^K.

    Args:
        x: a matrix (rows, columns) of any strides, in float32, bfloat16 or float16.
        block: elements that a program holds at a time, a power of two.

    Returns:
        M and K, float32 of shape (rows,); (0, -inf) for a row of -inf everywhere.

    Raises:
        TypeError, ValueError: a wrong dtype, device, shape or block.
    """
    _check("x", x, block)
    rows, columns = x.shape
    if not x.numel():
        return x.new_zeros(rows, dtype=torch.float32), x.new_full((rows,), float("-inf"), dtype=torch.float32)
    chunks, steps = _split(rows, columns, block)
    partial = torch.empty((2, rows, chunks), dtype=torch.float32, device=x.device)
    _partial_pairs_kernel[(rows, chunks)](x, partial[0], partial[1], columns, *x.stride(), steps, BLOCK=block)
    if chunks == 1:
        return partial[0, :, 0], partial[1, :, 0]
    total = torch.empty((2, rows), dtype=torch.float32, device=x.device)
    _combine_pairs_kernel[(rows,)](
        partial[0], partial[1], total[0], total[1], chunks, CHUNKS=triton.next_power_of_2(chunks)
    )
    return total[0], total[1]


def softmax_from_pairs(x: torch.Tensor, m: torch.Tensor, n: torch.Tensor, block: int = BLOCK) -> torch.Tensor:
    """The second sweep: y_i = (m_i / M) * 2^(n_i - K), in the dtype of x.

    Args:
        x: a matrix (rows, columns), as in `row_pairs`.
        m, n: what `row_pairs` returned for it, float32 of shape (rows,).
        block: elements that a program holds at a time, a power of two.

    Raises:
        TypeError, ValueError: a wrong dtype, device, shape or block.
    """
    _check("x", x, block)
    for name, value in (("m", m), ("n", n)):
        if value.shape != (x.shape[0],) or value.dtype != torch.float32 or value.device != x.device:
            raise ValueError(
                f"{name} must be float32 of shape ({x.shape[0]},) on {x.device}, "
                f"got {value.dtype} of shape {tuple(value.shape)} on {value.device}"
            )
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        chunks, steps = _split(*x.shape, block)
        _from_pairs_kernel[(x.shape[0], chunks)](
            x, m.contiguous(), n.contiguous(), y, x.shape[1], *x.stride(), steps, BLOCK=block
        )
    return y


def softmax_forward(x: torch.Tensor, block: int = BLOCK) -> torch.Tensor:
    """Softmax of every row, in the dtype of x: one launch when a row fits in a block, two sweeps otherwise.

    Args:
        x: a matrix (rows, columns) of any strides, in float32, bfloat16 or float16.
        block: elements that a program holds at a time, a power of two.

    Raises:
        TypeError, ValueError: a wrong dtype, device, shape or block.
    """
    _check("x", x, block)
    rows, columns = x.shape
    if columns > block:
        return softmax_from_pairs(x, *row_pairs(x, block), block)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        tile_rows, width = _tile(columns, block)
        _small_rows_kernel[(triton.cdiv(rows, tile_rows),)](
            x, y, rows, columns, *x.stride(), ROWS=tile_rows, COLUMNS=width
        )
    return y


def softmax_backward(y: torch.Tensor, grad: torch.Tensor, block: int = BLOCK) -> torch.Tensor:
    """The gradient with respect to x: dx = y * (grad - sum_j grad_j y_j), in the dtype of y.

    Args:
        y: what `softmax_forward` returned, (rows, columns).
        grad: the gradient with respect to y, same shape and dtype, any strides.
        block: elements that a program holds at a time, a power of two.

    Raises:
        TypeError, ValueError: a wrong dtype, device, shape or block, or tensors that do not match.
    """
    _check("y", y, block)
    _check("grad", grad, block)
    if grad.shape != y.shape or grad.dtype != y.dtype or grad.device != y.device:
        raise ValueError(
            f"grad must match y: {y.dtype} of shape {tuple(y.shape)} on {y.device}, "
            f"got {grad.dtype} of shape {tuple(grad.shape)} on {grad.device}"
        )
    rows, columns = y.shape
    dx = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    if not y.numel():
        return dx
    strides = (*y.stride(), *grad.stride())
    if columns <= block:
        tile_rows, width = _tile(columns, block)
        _small_rows_backward_kernel[(triton.cdiv(rows, tile_rows),)](
            y, grad, dx, rows, columns, *strides, ROWS=tile_rows, COLUMNS=width
        )
        return dx
    chunks, steps = _split(rows, columns, block)
    partial = torch.empty((rows, chunks), dtype=torch.float32, device=y.device)
    _partial_dots_kernel[(rows, chunks)](y, grad, partial, columns, *strides, steps, BLOCK=block)
    _backward_kernel[(rows, chunks)](y, grad, partial.sum(dim=1), dx, columns, *strides, steps, BLOCK=block)
    return dx


def three_pass_softmax(x: torch.Tensor, block: int = BLOCK) -> torch.Tensor:
    """The baseline with the same tiling: sweeps for the maximum, for the sum, and for the output.

    Args:
        x: a matrix (rows, columns) of any strides, in float32, bfloat16 or float16.
        block: elements that a program holds at a time, a power of two.

    Raises:
        TypeError, ValueError: a wrong dtype, device, shape or block.
    """
    _check("x", x, block)
    rows, columns = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    chunks, steps = _split(rows, columns, block)
    partial = torch.empty((2, rows, chunks), dtype=torch.float32, device=x.device)
    shape = (columns, *x.stride(), steps)
    _partial_maxima_kernel[(rows, chunks)](x, partial[0], *shape, BLOCK=block)
    largest = partial[0].amax(dim=1)
    _partial_sums_kernel[(rows, chunks)](x, largest, partial[1], *shape, BLOCK=block)
    _normalise_kernel[(rows, chunks)](x, largest, partial[1].sum(dim=1), y, *shape, BLOCK=block)
    return y
