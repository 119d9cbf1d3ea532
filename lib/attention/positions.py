"""Positions in the scores: rotations, linear and harmonic biases, and their product."""

import torch

from lib.attention.fused import FlashAttention, fused_impl, with_heads
from lib.attention.rope import rope


def alibi_slopes(num_heads: int) -> torch.Tensor:
    """The slopes 2 ** (-8 h / num_heads) of heads h = 1..num_heads, shape (num_heads,).

    Source: Press et al., Train Short, Test Long (2022).

    Raises:
        ValueError: `num_heads` below 1.
    """
    if num_heads < 1:
        raise ValueError(f"num_heads must be at least 1, got {num_heads}")
    return 2.0 ** (-8 * torch.arange(1, num_heads + 1) / num_heads)


def harmonic_numbers(count: int) -> torch.Tensor:
    """H_0 = 0, H_1 = 1, H_2 = 1 + 1/2, ...: the first `count` of them, float64, shape (count,)."""
    terms = 1 / torch.arange(1, max(count, 1), dtype=torch.float64)
    return torch.cat([terms.new_zeros(1), terms.cumsum(0)])[:count]


def distance_bias(
    queries: int,
    keys: int,
    slopes: torch.Tensor,
    *,
    bias: str = "harmonic",
    causal: bool = False,
) -> torch.Tensor:
    """What each pair's score loses by its distance: -slope * distance, or -slope * H_distance.

    Args:
        queries: their number; they are the last of the `keys` positions.
        keys: their number.
        slopes: one for each head, (heads,).
        bias: "linear" (ALiBi), "harmonic" (a power law in the weights), or "none".
        causal: -inf where the key comes after the query. Otherwise the distance counts in both directions.

    Returns:
        To be added to scores, (heads, queries, keys), of the dtype of `slopes`.

    Raises:
        ValueError: an unknown `bias`, or `slopes` not (heads,).
    """
    if bias not in ("linear", "harmonic", "none"):
        raise ValueError(f"bias must be linear, harmonic or none, got {bias!r}")
    if slopes.ndim != 1:
        raise ValueError(f"slopes must be (heads,), got {tuple(slopes.shape)}")
    where = torch.arange(keys - queries, keys, device=slopes.device)[:, None]
    ahead = where - torch.arange(keys, device=slopes.device)  # (queries, keys), negative in the future
    distance = ahead.abs()
    if bias == "harmonic":
        lost = harmonic_numbers(int(distance.max()) + 1 if distance.numel() else 1)
        lost = lost.to(slopes.device)[distance].to(slopes.dtype)
    else:
        lost = (
            distance.to(slopes.dtype) if bias == "linear" else torch.zeros_like(distance, dtype=slopes.dtype)
        )
    added = -slopes[:, None, None] * lost
    return added.masked_fill(ahead < 0, -torch.inf) if causal else added


def rope_alibi(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    slopes: torch.Tensor | None = None,
    bias: str = "harmonic",
    rotate: bool = True,
    causal: bool = False,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    return_weights: bool = False,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention whose scores are rotary products less a bias that grows with the distance.

    Source: Li (2024), arXiv 2410.18441, combines the two with a harmonic series; the form here is the book's reconstruction.

    Args:
        q: (batch, heads, queries, dim), the last of the positions.
        k: (batch, heads, keys, dim).
        v: (batch, heads, keys, anything).
        slopes: of the heads, (heads,); by default `alibi_slopes(heads)`.
        bias: "linear", "harmonic" or "none".
        rotate: whether to apply `rope` to queries and keys.
        causal: whether a query sees only keys up to its own position.
        mask: boolean, True where a pair may attend.
        scale: of the products; 1 / sqrt(dim) by default.
        return_weights: whether to return the weights as well.
        impl: "triton" is a fused kernel that keeps no weights. It takes neither `mask`, `return_weights` nor slopes that need
            a gradient, and dims up to 128; it is differentiable once. "torch" keeps them. "auto" is the kernel for CUDA
            tensors where it takes what is given.

    Returns:
        (batch, heads, queries, anything), and on request the weights (batch, heads, queries, keys).

    Raises:
        ValueError: as `distance_bias`, slopes that do not fit the heads, or `impl="triton"` with something that the kernel
            does not take.
    """
    queries, keys = q.shape[-2], k.shape[-2]
    heads = q.shape[-3] if q.ndim > 2 else 1
    slopes = alibi_slopes(heads) if slopes is None else slopes
    if slopes.shape not in ((heads,), (1,)):
        raise ValueError(f"slopes must be ({heads},) for these queries, got {tuple(slopes.shape)}")
    if rotate:
        q, k = rope(q, start=keys - queries), rope(k)
    unfit = {
        "mask": mask is not None,
        "return_weights": return_weights,
        "slopes that need a gradient": slopes.requires_grad,
        "more queries than keys": queries > keys,
        f"bias {bias!r}": bias not in ("linear", "harmonic", "none"),
    }
    if fused_impl(impl, q, k, v, unfit) == "triton":
        return _fused(q, k, v, slopes, bias, causal, scale)
    added = distance_bias(queries, keys, slopes.to(q), bias=bias, causal=causal)
    scores = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores + (added if q.ndim > 2 else added[0])
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    shift = scores.amax(-1, keepdim=True).detach()  # rows that see nothing read zeros
    weights = (scores - shift.masked_fill(shift == -torch.inf, 0.0)).exp()
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    return (weights @ v, weights) if return_weights else weights @ v


def _fused(q, k, v, slopes, bias, causal, scale):
    lead = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    q, k, v = with_heads(lead, q, k, v)
    options = dict(scale=scale, causal=causal)
    if bias != "none":
        options["slopes"] = slopes.to(q.device, torch.float32).expand(q.shape[1])
    if bias == "harmonic":
        options["distances"] = harmonic_numbers(k.shape[-2]).to(q.device, torch.float32)
    out, _ = FlashAttention.apply(q, k, v, None, False, options)
    return out.reshape(*lead, *out.shape[-2:])
