"""Exponentials that cannot overflow: softmax and log-sum-exp in two sweeps over memory.

A number e^x is held as a pair (m, n) of floats that stands for m * 2^n. Pairs can be added without knowing any
maximum, so one sweep is enough for the normaliser of a softmax and a second one for its output.

Reference: M. Dukhan and A. Ablavatski, The Two-Pass Softmax Algorithm, 2020, arXiv:2001.04438.
"""

import math
from collections.abc import Iterator

import torch

from lib.backend import choose_impl

Pair = tuple[torch.Tensor, torch.Tensor]

BLOCK = 2**16  # elements worked on at a time: the temporaries of a block stay in the cache
LN2 = math.log(2.0)
# ln 2 in two parts for float64: the first has 32 significant bits, so its product with n is exact for |n| < 2^21
LN2_HIGH, LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
LIMIT = {torch.float32: 2.3e38, torch.float64: 1.2e308}  # x / ln 2 must not overflow


def ext_exp(x: torch.Tensor) -> Pair:
    """The exponential of every element as a pair: e^x = m * 2^n.

    n = round(x / ln 2), t = x - n ln 2, m = e^t. No value of x makes m or n overflow: m lies between about
    2^(-1/2) and 2^(1/2), and never outside [1/2, 2]. The argument t is found with one rounding, as a fused
    multiply-add would; it is precise up to |x| = 2^24 ln 2, about 1.1e7, in float32. Beyond that a float n is not
    every whole number, t is clipped to [-ln 2, ln 2], and only the size of the result is right.
    Gradients flow through m; n is a step function.

    Args:
        x: floating-point tensor of any shape; half precision is computed in float32. Finite values beyond
            2.3e38 in magnitude (1.2e308 in float64) count as that limit.

    Returns:
        m and n, of the shape of x, in float32 (float64 for float64). -inf gives the neutral pair (0, -inf),
        +inf gives (nan, inf), nan gives (nan, nan).

    Raises:
        TypeError: x is not a floating-point tensor.
    """
    _check_floating("x", x)
    x = x if x.dtype == torch.float64 else x.float()
    clipped = x.detach().clamp(-LIMIT[x.dtype], LIMIT[x.dtype])
    n = torch.round(clipped * (1.0 / LN2))
    if x.dtype == torch.float64:
        t = (x - n * LN2_HIGH) - n * LN2_LOW
    else:
        t = (x.double() - n.double() * LN2).float()
    m = torch.exp(t.clamp(-LN2, LN2))
    m = m.masked_fill(x == math.inf, math.nan).masked_fill(x == -math.inf, 0.0)
    return m, torch.where(x.isinf(), x.detach(), n)


def pair_add(first: Pair, second: Pair) -> Pair:
    """The sum of two pairs, m1 2^n1 + m2 2^n2, at the larger of the two exponents.

    Commutative, and associative up to the rounding of the mantissas' sum: the factors are exact powers of two.
    The neutral element is (0, -inf).

    Args:
        first, second: pairs (m, n) of floating-point tensors of shapes that broadcast; each n holds whole
            numbers or -inf.

    Returns:
        The pair (m1 2^(n1 - k) + m2 2^(n2 - k), k) with k = max(n1, n2).

    Raises:
        TypeError: a part is not a floating-point tensor.
    """
    for name, pair in (("first", first), ("second", second)):
        _check_pair(name, pair)
    (m1, n1), (m2, n2) = first, second
    k = torch.maximum(n1, n2)
    return m1 * _power_of_two(n1, k) + m2 * _power_of_two(n2, k), k


def pair_sum(m: torch.Tensor, n: torch.Tensor, dim: int = -1) -> Pair:
    """The sum of the pairs along a dimension, at their largest exponent.

    Args:
        m, n: floating-point tensors of one shape; n holds whole numbers or -inf.
        dim: the dimension to sum over.

    Returns:
        The pair (M, K), without that dimension; (0, -inf) where there is nothing to sum.

    Raises:
        TypeError: m or n is not a floating-point tensor.
        ValueError: the shapes differ, or the dimension does not exist.
    """
    _check_pair("(m, n)", (m, n))
    if m.shape != n.shape:
        raise ValueError(f"m and n must have one shape, got {tuple(m.shape)} and {tuple(n.shape)}")
    _check_dim(m, dim)
    if m.shape[dim] == 0:
        return m.sum(dim), n.sum(dim).fill_(-math.inf)
    k = n.amax(dim, keepdim=True)
    return (m * _power_of_two(n, k)).sum(dim), k.squeeze(dim)


def two_pass_softmax(x: torch.Tensor, dim: int = -1, impl: str = "auto") -> torch.Tensor:
    """Softmax along `dim` that reads every element twice and writes it once (Algorithm 3 of the paper).

    Sweep 1 adds up the pairs of e^x to (M, K); sweep 2 computes y = (m / M) 2^(n - K). No maximum is
    subtracted. Differentiable any number of times: dx = y * (g - sum(g * y)).

    Where it is less precise than `torch.softmax`: float32 logits of magnitude beyond 1.1e7, see `ext_exp`.

    Args:
        x: logits, floating point, of any shape with at least one dimension.
        dim: the dimension that sums to one. A dimension other than the last is copied first.
        impl: `"torch"` works through blocks that fit in the cache, with temporaries of one block; `"triton"`
            is the fused kernel (float32, bfloat16, float16); `"auto"` takes the kernel on CUDA.

    Returns:
        Probabilities of the shape and dtype of x. Slices that are -inf everywhere, or hold nan or +inf, are nan,
        as in `torch.softmax`.

    Raises:
        TypeError: x is not a floating-point tensor, or not of a dtype that the kernel takes.
        ValueError: x has no dimension, `dim` does not exist, or `impl` is unknown.
        RuntimeError: `impl="triton"` without Triton.
    """
    _check_floating("x", x)
    _check_dim(x, dim)
    return _along(x, dim, "two-pass-triton" if _impl(impl, x) == "triton" else "two-pass")


def two_pass_logsumexp(x: torch.Tensor, dim: int = -1, impl: str = "auto") -> torch.Tensor:
    """The logarithm of the sum of exponentials along `dim`, ln M + K ln 2, from the first sweep alone.

    Differentiable any number of times; the gradient is the softmax, for which the second sweep suffices.

    Args:
        x: logits, floating point, of any shape with at least one dimension.
        dim: the dimension to sum over.
        impl: as in `two_pass_softmax`.

    Returns:
        A tensor without that dimension, in the dtype of x; -inf for slices that are -inf everywhere, +inf for
        slices that hold +inf.

    Raises:
        TypeError, ValueError, RuntimeError: as in `two_pass_softmax`.
    """
    _check_floating("x", x)
    _check_dim(x, dim)
    rows = x.movedim(dim, -1)
    flat = rows.reshape(rows.shape[:-1].numel(), rows.shape[-1])
    return _LogSumExp.apply(flat, _impl(impl, x)).reshape(rows.shape[:-1])


def three_pass_softmax(x: torch.Tensor, dim: int = -1, variant: str = "recompute") -> torch.Tensor:
    """The usual softmax: a sweep for the maximum, one for the sum, one for the output.

    Args:
        x: logits, floating point, of any shape with at least one dimension.
        dim: the dimension that sums to one.
        variant: `"recompute"` exponentiates in the second and again in the third sweep (3 reads, 1 write);
            `"reload"` stores the exponentials in the second and rescales them in the third (3 reads, 2 writes).

    Returns:
        Probabilities of the shape and dtype of x, differentiable.

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: x has no dimension, `dim` does not exist, or `variant` is unknown.
    """
    _check_floating("x", x)
    _check_dim(x, dim)
    if variant not in ("recompute", "reload"):
        raise ValueError(f"variant must be 'recompute' or 'reload', got {variant!r}")
    return _along(x, dim, variant)


def online_softmax(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Softmax in two sweeps with a running maximum: when it grows, the sum so far is rescaled.

    Milakov and Gimelshein, Online normalizer calculation for softmax, 2018, arXiv:1805.02867, Algorithm 3.

    Args:
        x: logits, floating point, of any shape with at least one dimension.
        dim: the dimension that sums to one.

    Returns:
        Probabilities of the shape and dtype of x, differentiable.

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: x has no dimension, or `dim` does not exist.
    """
    _check_floating("x", x)
    _check_dim(x, dim)
    return _along(x, dim, "online")


class _Softmax(torch.autograd.Function):
    """Any of the algorithms on a matrix (rows, columns); the gradient is the same for all."""

    @staticmethod
    def forward(ctx, x, algorithm):
        if algorithm == "two-pass-triton":
            from kernels.two_pass_softmax import softmax_forward

            y = softmax_forward(x)
        else:
            y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            for x_rows, y_rows in _row_blocks(x, y) if x.numel() else ():
                _FORWARD[algorithm](x_rows, y_rows)
        ctx.algorithm = algorithm
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        if ctx.algorithm == "two-pass-triton" and not torch.is_grad_enabled():
            from kernels.two_pass_softmax import softmax_backward

            return softmax_backward(y, grad), None
        # y is an output, so when gradients are recorded this expression is differentiable again
        wide = torch.promote_types(y.dtype, torch.float32)
        y, grad = y.to(wide), grad.to(wide)
        return (y * (grad - (y * grad).sum(dim=1, keepdim=True))).to(ctx.saved_tensors[0].dtype), None


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, impl):
        if impl == "triton":
            from kernels.two_pass_softmax import row_pairs

            m, n = row_pairs(x)
        else:
            pairs = [_sum_of_row_block(block) for (block,) in _row_blocks(x)]
            m, n = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        ctx.impl = impl
        ctx.save_for_backward(x, m, n)
        # a row of -inf and nan may come from the kernel as (nan, -inf): a GPU's maximum passes over nan
        return torch.where(n == math.inf, n, torch.log(m) + n * LN2).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, m, n = ctx.saved_tensors
        if torch.is_grad_enabled():
            return grad[:, None] * two_pass_softmax(x, impl=ctx.impl), None
        if ctx.impl == "triton":
            from kernels.two_pass_softmax import softmax_from_pairs

            return softmax_from_pairs(x, m, n) * grad[:, None], None
        y = torch.empty_like(x)
        for x_rows, y_rows, *pair in _row_blocks(x, y, m, n):
            _write_from_pair(x_rows, y_rows, pair)
        return y.mul_(grad[:, None]), None


def _sum_of_row_block(x: torch.Tensor) -> Pair:
    total = None
    for block in x.split(BLOCK, dim=1):
        pair = pair_sum(*ext_exp(block), dim=1)
        total = pair if total is None else pair_add(total, pair)
    return total


def _write_from_pair(x: torch.Tensor, y: torch.Tensor, pair: Pair) -> None:
    total, k = (part[:, None] for part in pair)
    for block, out in zip(x.split(BLOCK, dim=1), y.split(BLOCK, dim=1), strict=True):
        m, n = ext_exp(block)
        out.copy_((m / total) * _power_of_two(n, k))


def _two_pass(x: torch.Tensor, y: torch.Tensor) -> None:
    _write_from_pair(x, y, _sum_of_row_block(x))


def _three_pass(x: torch.Tensor, y: torch.Tensor, reload: bool) -> None:
    blocks, outs = x.split(BLOCK, dim=1), y.split(BLOCK, dim=1)
    largest = torch.stack([_wide(block).amax(dim=1) for block in blocks]).amax(dim=0)[:, None]
    total = torch.zeros_like(largest)
    for block, out in zip(blocks, outs, strict=True):
        exponential = torch.exp(_wide(block) - largest)
        total += exponential.sum(dim=1, keepdim=True)
        if reload:
            out.copy_(exponential)
    for block, out in zip(blocks, outs, strict=True):
        out.copy_((_wide(out) if reload else torch.exp(_wide(block) - largest)) / total)


def _online(x: torch.Tensor, y: torch.Tensor) -> None:
    blocks = [_wide(block) for block in x.split(BLOCK, dim=1)]
    largest = torch.full_like(blocks[0][:, :1], -math.inf)
    total = torch.zeros_like(largest)
    for block in blocks:
        larger = torch.maximum(largest, block.amax(dim=1, keepdim=True))
        finite = larger.masked_fill(larger == -math.inf, 0.0)  # nothing seen yet: -inf - (-inf) is nan
        total = total * torch.exp(largest - finite) + torch.exp(block - finite).sum(dim=1, keepdim=True)
        largest = larger
    for block, out in zip(blocks, y.split(BLOCK, dim=1), strict=True):
        out.copy_(torch.exp(block - largest) / total)


_FORWARD = {
    "two-pass": _two_pass,
    "recompute": lambda x, y: _three_pass(x, y, reload=False),
    "reload": lambda x, y: _three_pass(x, y, reload=True),
    "online": _online,
}


def _along(x: torch.Tensor, dim: int, algorithm: str) -> torch.Tensor:
    rows = x.movedim(dim, -1)
    flat = rows.reshape(rows.shape[:-1].numel(), rows.shape[-1])
    return _Softmax.apply(flat, algorithm).reshape(rows.shape).movedim(-1, dim)


def _row_blocks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same rows of all tensors, some `BLOCK` elements of the first one at a time; at least one block."""
    rows = max(1, BLOCK // max(1, tensors[0].shape[1]))
    for start in range(0, max(1, tensors[0].shape[0]), rows):
        yield tuple(tensor[start : start + rows] for tensor in tensors)


def _power_of_two(n: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """2^(n - k) for whole numbers n <= k, exact: put together from its bits, 0 where it is too small."""
    e = (n - k).masked_fill(n == k, 0.0)  # also for -inf - (-inf)
    bits, bias, whole = (52, 1023, torch.int64) if e.dtype == torch.float64 else (23, 127, torch.int32)
    e = e.clamp(min=2.0 - 2.0 * bias)
    half = torch.floor(e / 2)  # two factors, so that subnormal powers are reached

    def power(exponent: torch.Tensor) -> torch.Tensor:
        return ((exponent.to(whole) + bias) << bits).view(e.dtype)

    return power(half) * power(e - half)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _impl(impl: str, x: torch.Tensor) -> str:
    if impl == "auto" and x.dtype == torch.float64:  # the kernel computes in float32
        return "torch"
    return choose_impl(impl, x, options=("torch", "triton"), cpu="torch")


def _check_floating(name: str, x: torch.Tensor) -> None:
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {got}")


def _check_pair(name: str, pair: Pair) -> None:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise TypeError(f"{name} must be a pair (m, n) of tensors, got {type(pair).__name__}")
    for part, value in zip("mn", pair, strict=True):
        _check_floating(f"{part} of {name}", value)


def _check_dim(x: torch.Tensor, dim: int) -> None:
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim must be one of the {x.dim()} dimensions of x {tuple(x.shape)}, got {dim}")
