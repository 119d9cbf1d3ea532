"""Attention without exponentials: a positive map, an l1 norm, and a power that sharpens what is above average."""

import math

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from lib.attention.fused import SoftplusAttention, fused_impl, with_heads

PHI = {
    "exp": torch.exp,
    "softplus": F.softplus,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "identity": lambda scores: scores,
}


def softplus_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    p: float | None = None,
    offset: float = 1.0,
    warm_rows: int = 3,
    block_size: int | None = None,
    return_weights: bool = False,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Length-scaled softplus attention (LSSA), and with a power `p` its re-weighted form (LSSAR).

    A query that sees n keys weighs them in two stages:

        a_j = softplus(log(dim) * log(n) * cos(q, k_j)),        a <- a / sum(a)
        w_j = max(a_j * n - offset, 0) ** p,                    w <- w / sum(w)

    LSSA stops after the first. In the second, a * n has the mean 1, so that an offset of 1 keeps what is above average.
    Rows that see at most `warm_rows` keys have offset 0, and a row of which nothing is left (a uniform one, up to rounding)
    keeps its weights of the first stage. The power is taken of shares of the row's largest term: nothing overflows.

    Source: Gao, Spratling and Gionfrida, Softplus Attention with Re-weighting (2025). The two rules for rows of which
    nothing is left are this library's.

    Args:
        q: queries, (..., queries, dim). Lengths do not matter, only directions.
        k: keys, (..., keys, dim).
        v: values, (..., keys, value_dim).
        causal: whether a query sees no later keys. The last query stands at the last key.
        mask: boolean, broadcasts to (..., queries, keys), True where a query may attend. A row without any reads zeros.
        scale: of the cosines, instead of log(dim) * log(n).
        p: the power of the second stage, at least 1; None leaves the stage out.
        offset: what is subtracted before the power.
        warm_rows: rows that see at most so many keys have offset 0.
        block_size: keys at a time. Memory then grows with the length, not its square, in both directions, for the price
            of computing the weights twice for gradients. None takes all keys at once.
        return_weights: whether to return the weights too, (..., queries, keys); not with `block_size`.
        impl: "triton" is a fused kernel that keeps no weights, whatever `block_size`, and multiplies half precision as it
            is. It takes neither `mask`, `return_weights` nor more causal queries than keys, and dims up to 128; it is
            differentiable once, and in float16 the gradient of a query or key of zeros is 0. "torch" is all else. "auto" is
            the kernel for CUDA tensors where it takes what is given.

    Returns:
        (..., queries, value_dim) in the dtype of `v`, or a pair with the weights. Half precision is computed in float32,
        by the kernel all but the products.

    Raises:
        ValueError: shapes that do not fit, a power below 1, an option out of range, or `impl="triton"` with something
            that the kernel does not take.
        TypeError: a mask that is not boolean.
    """
    _check(q, k, v, mask)
    if p is not None and not 1 <= p < math.inf:
        raise ValueError(f"p must be None or a finite power of at least 1, got {p}")
    if warm_rows < 0:
        raise ValueError(f"warm_rows must not be negative, got {warm_rows}")
    if block_size is not None and (block_size < 1 or return_weights):
        raise ValueError(f"block_size must be at least 1 and has no weights to return, got {block_size}")
    unfit = {
        "mask": mask is not None,
        "return_weights": return_weights,
        "more causal queries than keys": causal and q.shape[-2] > k.shape[-2],
    }
    if fused_impl(impl, q, k, v, unfit) == "triton":
        counts = _visible(q, k, None, causal)[1][:, 0].float()
        scales = (
            math.log(q.shape[-1]) * counts.clamp(min=1).log()
            if scale is None
            else counts.new_full(counts.shape, scale)
        )
        lead = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
        options = dict(causal=causal, p=p, offset=offset, warm_rows=warm_rows)
        out = SoftplusAttention.apply(*with_heads(lead, q, k, v), scales, options)
        return out.reshape(*lead, *out.shape[-2:])
    dtype = torch.promote_types(torch.promote_types(q.dtype, v.dtype), torch.float32)
    queries, keys, values = F.normalize(q.to(dtype), dim=-1), F.normalize(k.to(dtype), dim=-1), v.to(dtype)
    visible, counts = _visible(q, k, mask, causal)
    counts = counts.to(dtype)
    if scale is None:
        scale = math.log(q.shape[-1]) * counts.clamp(min=1).log()
    length = k.shape[-2]
    size = length if block_size is None else block_size
    spans = [(start, min(start + size, length)) for start in range(0, length, size)] if length else [(0, 0)]

    def first(queries, keys, start, stop):
        weights = F.softplus(scale * (queries @ keys.mT), threshold=40)  # the default of 20 shows in float64
        seen = visible(start, stop)
        return weights if seen is None else weights * seen  # softplus(-inf) is 0 as well, but has no gradient

    def sums(weights, values):
        return weights.sum(-1, keepdim=True), weights @ values

    def first_sums(queries, keys, values, start, stop):
        return sums(first(queries, keys, start, stop), values)

    def second(weights, total, largest):
        return (_excess(weights, counts, total, offset, warm_rows) / largest).pow(p)

    def second_sums(queries, keys, values, total, largest, start, stop):
        return sums(second(first(queries, keys, start, stop), total, largest), values)

    def add_up(part, *shared):
        if len(spans) == 1:
            return part(queries, keys, values, *shared, *spans[0])
        total = mixed = 0
        for start, stop in spans:
            block = (keys[..., start:stop, :], values[..., start:stop, :])
            new = checkpoint(part, queries, *block, *shared, start, stop, use_reentrant=False)
            total, mixed = total + new[0], mixed + new[1]
        return total, mixed

    whole = first(queries, keys, 0, length) if len(spans) == 1 else None
    total, mixed = add_up(first_sums) if whole is None else sums(whole, values)
    total = total + (total == 0)  # rows that see nothing
    out, weights = mixed / total, None if whole is None else whole / total
    if p is not None and length:
        with torch.no_grad():  # the largest term cancels: it is a constant
            tops = [
                (first(queries, keys[..., start:stop, :], start, stop) if whole is None else whole).amax(
                    -1, keepdim=True
                )
                for start, stop in spans
            ]
            top = torch.stack(tops).amax(0)
            largest = _excess(top, counts, total, offset, warm_rows)
            dead = largest <= 64 * torch.finfo(dtype).eps
            largest = largest.masked_fill(dead, 1.0)
        if whole is None:
            rest, mixed = add_up(second_sums, total, largest)
        else:
            sharp = second(whole, total, largest)
            rest, mixed = sums(sharp, values)
        rest = rest.masked_fill(dead, 1.0)
        out = torch.where(dead, out, mixed / rest)
        if return_weights:
            weights = torch.where(dead, weights, sharp / rest)
    return (out.to(v.dtype), weights.to(v.dtype)) if return_weights else out.to(v.dtype)


def normalised_positive_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    phi: str = "exp",
    l1: bool = True,
    causal: bool = False,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    return_weights: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention taken apart: any map `phi` of the scores in place of exp, and the l1 norm to be left out.

        a_j = phi(scale * q . k_j),        a <- a / sum(|a|)

    With `phi="exp"` and `l1=True` this is softmax attention.

    Source: Gao, Spratling and Gionfrida, Softplus Attention with Re-weighting (2025).

    Args:
        q: queries, (..., queries, dim).
        k: keys, (..., keys, dim).
        v: values, (..., keys, value_dim).
        phi: "exp", "softplus", "relu", "sigmoid" or "identity".
        l1: whether to divide each row by the sum of its absolute values. A row of zeros stays one.
        causal: whether a query sees no later keys. The last query stands at the last key.
        mask: boolean, broadcasts to (..., queries, keys), True where a query may attend. A row without any reads zeros.
        scale: of the scores, by default dim ** -0.5.
        return_weights: whether to return the weights too, (..., queries, keys).

    Returns:
        (..., queries, value_dim), or a pair with the weights.

    Raises:
        ValueError: shapes that do not fit, or an unknown `phi`.
        TypeError: a mask that is not boolean.
    """
    _check(q, k, v, mask)
    if phi not in PHI:
        raise ValueError(f"phi must be one of {sorted(PHI)}, got {phi!r}")
    scores = (q.shape[-1] ** -0.5 if scale is None else scale) * (q @ k.mT)
    seen = _visible(q, k, mask, causal)[0](0, k.shape[-2])
    if phi == "exp" and l1 and k.shape[-2]:  # a shift of the row cancels, and nothing overflows
        shift = scores if seen is None else scores.masked_fill(~seen, -math.inf)
        shift = shift.amax(-1, keepdim=True).detach()
        scores = scores - shift.masked_fill(shift == -math.inf, 0.0)
    if seen is not None:
        scores = scores.masked_fill(~seen, 0.0)  # exp of what is not seen could be inf, and inf * 0 is nan
    weights = PHI[phi](scores)
    if seen is not None:
        weights = weights * seen
    if l1:
        total = weights.abs().sum(-1, keepdim=True)
        weights = weights / (total + (total == 0))
    out = weights @ v
    return (out, weights) if return_weights else out


def _excess(
    weights: torch.Tensor, counts: torch.Tensor, total: torch.Tensor, offset: float, warm_rows: int
) -> torch.Tensor:
    """How far weights of the sum `total` exceed `offset` averages: max(n * weights / total - offset, 0)."""
    return torch.relu(weights * (counts / total) - offset * (counts > warm_rows))


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> None:
    fits = min(q.ndim, k.ndim, v.ndim) >= 2
    fits = fits and q.shape[-1] == k.shape[-1] >= 1 and k.shape[-2] == v.shape[-2]
    if not fits:
        raise ValueError(
            "q (..., queries, dim), k (..., keys, dim) and v (..., keys, value_dim) do not fit together: "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask must be boolean, True where a query may attend, got {mask.dtype}")


def _visible(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, causal: bool):
    """Which of the keys start..stop each query sees, as a function (None for all), and how many in all, (..., queries, 1)."""
    rows, columns = q.shape[-2], k.shape[-2]
    last = torch.arange(columns - rows, columns, device=q.device)[
        :, None
    ]  # the last key that each query sees
    if mask is not None:
        mask = mask.expand(torch.broadcast_shapes(mask.shape, (rows, columns)))
        if causal:
            mask = mask & (torch.arange(columns, device=q.device) <= last)
        return lambda start, stop: mask[..., start:stop], mask.sum(-1, keepdim=True)
    if causal:
        return lambda start, stop: torch.arange(start, stop, device=q.device) <= last, (last + 1).clamp(min=0)
    return lambda start, stop: None, torch.full((rows, 1), columns, device=q.device)
