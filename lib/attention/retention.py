"""Which vectors of a sequence an encoder layer keeps, how many, and what that costs (arXiv 2201.03327)."""

import math
from collections.abc import Sequence

import torch


def column_scores(weights: torch.Tensor, token_mask: torch.Tensor | None = None) -> torch.Tensor:
    """How much attention each vector receives: the mean over heads of the sum over the queries.

    With softmax weights whose keys were masked, padding scores exactly 0 and the scores of a sequence sum to the number
    of its real queries.

    Args:
        weights: attention weights, (..., heads, queries, keys); rows sum to 1.
        token_mask: boolean, (..., queries), True for real tokens. What padding attends to is not counted.

    Returns:
        Scores, (..., keys).

    Raises:
        ValueError: shapes that do not fit.
        TypeError: a mask that is not boolean.
    """
    if weights.ndim < 3:
        raise ValueError(f"weights must be (..., heads, queries, keys), got {tuple(weights.shape)}")
    per_query = weights.mean(-3)  # (..., queries, keys)
    if token_mask is not None:
        _check_mask(token_mask, per_query.shape[:-1], "(..., queries)")
        per_query = per_query.masked_fill(~token_mask[..., None], 0.0)
    return per_query.sum(-2)


def column_scores_streaming(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    token_mask: torch.Tensor | None = None,
    scale: float | None = None,
    block_size: int = 128,
) -> torch.Tensor:
    """The column scores of softmax attention, without ever holding all its weights.

    Goes over the queries in blocks, so it needs memory for `block_size` rows of weights; use it beside a fused attention
    that does not return weights. Half precision is computed in float32.

    Args:
        q, k: queries and keys of the same sequence, (..., heads, length, dim).
        token_mask: boolean, (..., length), True for real tokens: padding neither gives nor receives.
        scale: of the dot products; 1 / sqrt(dim) by default.
        block_size: queries at a time.

    Returns:
        Scores, (..., length), in the dtype of `q`.

    Raises:
        ValueError: shapes that do not fit, or a block size below 1.
        TypeError: a mask that is not boolean.
    """
    if q.ndim < 3 or q.shape != k.shape:
        raise ValueError(
            f"q and k must both be (..., heads, length, dim), got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    length = q.shape[-2]
    if token_mask is not None:
        _check_mask(token_mask, (*q.shape[:-3], length), "(..., length)")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    compute = torch.promote_types(q.dtype, torch.float32)
    keys = k.to(compute).transpose(-1, -2)
    total = torch.zeros(*q.shape[:-3], length, dtype=compute, device=q.device)
    for start in range(0, length, block_size):
        block = slice(start, start + block_size)
        logits = scale * q[..., block, :].to(compute) @ keys  # (..., heads, block, length)
        if token_mask is not None:
            logits = logits.masked_fill(~token_mask[..., None, None, :], -torch.inf)
        total = total + column_scores(
            logits.softmax(-1), None if token_mask is None else token_mask[..., block]
        )
    return total.to(q.dtype)


def keep_top(scores: torch.Tensor, keep: int, token_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Positions of the first vector and of the `keep` - 1 best others, in ascending order.

    Args:
        scores: (..., length).
        keep: how many, 1 to length.
        token_mask: boolean, (..., length). Padding is taken only where there are too few real tokens.

    Returns:
        int64, (..., keep).

    Raises:
        ValueError: `keep` out of range, or a mask of another shape.
        TypeError: a mask that is not boolean.
    """
    if not 1 <= keep <= scores.shape[-1]:
        raise ValueError(f"keep must be 1 to {scores.shape[-1]}, the length, got {keep}")
    ranked = scores.detach().to(torch.promote_types(scores.dtype, torch.float32))
    if token_mask is not None:
        _check_mask(token_mask, scores.shape, "that of the scores")
        ranked = ranked.masked_fill(~token_mask, -torch.inf)
    ranked = torch.cat([torch.full_like(ranked[..., :1], torch.inf), ranked[..., 1:]], -1)
    return ranked.topk(keep, -1).indices.sort(-1).values


def context_contribution(
    scores: Sequence[torch.Tensor], rho: float = 0.9, *, token_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The share of its vectors that carries the fraction `rho` of a layer's attention, for each layer.

    For each input the smallest k such that the k largest scores sum to at least `rho` of all, divided by the number of
    its real tokens; then the mean over the inputs. 1 in a layer with equal scores and `rho` = 1, near 0 where a few
    vectors receive everything.

    Args:
        scores: of each layer, (batch, length), measured with nothing eliminated.
        rho: above 0, at most 1.
        token_mask: boolean, (batch, length), True for real tokens.

    Returns:
        float64, (layers,).

    Raises:
        ValueError: no layers, `rho` out of range, scores that are not (batch, length), a mask of another shape.
        TypeError: a mask that is not boolean.
    """
    if not 0 < rho <= 1:
        raise ValueError(f"rho must be above 0 and at most 1, got {rho}")
    if not len(scores) or any(layer.ndim != 2 for layer in scores):
        raise ValueError("scores must be a tensor (batch, length) for each of one or more layers")
    shares = []
    for layer in scores:
        layer = layer.detach().double()
        real = torch.full_like(layer[:, 0], layer.shape[1])
        if token_mask is not None:
            _check_mask(token_mask, layer.shape, "that of the scores")
            layer, real = layer.masked_fill(~token_mask, 0.0), token_mask.sum(1)
        carried = layer.sort(1, descending=True).values.cumsum(1)
        # the k-th sum is enough where k - 1 sums fall short; the slack is for rounding at rho = 1
        short = carried < rho * carried[:, -1:] * (1 - 1e-12)
        shares.append(((short.sum(1) + 1) / real).mean())
    return torch.stack(shares)


def retention_profile(
    contribution: torch.Tensor | Sequence[float], length: int, strength: float, *, minimum: int = 1
) -> list[int]:
    """How many vectors each layer leaves: ceil(length * strength * running minimum of the contributions).

    Args:
        contribution: of each layer, from `context_contribution`, (layers,); positive.
        length: of the input, in tokens.
        strength: at least 0; fewer vectors stay when it is smaller.
        minimum: vectors that every layer leaves at least, 1 to `length`.

    Returns:
        A list of `layers` integers between `minimum` and `length` that never rises.

    Raises:
        ValueError: an argument out of its range.
    """
    shares = torch.as_tensor(contribution, dtype=torch.float64)
    if shares.ndim != 1 or not len(shares) or not (shares > 0).all():
        raise ValueError(f"contribution must be positive, one for each layer, got {contribution}")
    if not 1 <= minimum <= length:
        raise ValueError(f"minimum must be 1 to length={length}, got {minimum}")
    if not strength >= 0:
        raise ValueError(f"strength must be at least 0, got {strength}")
    falling = shares.cummin(0).values.tolist()
    # the slack keeps a product that is an integer up to rounding from being rounded up
    return [min(length, max(minimum, math.ceil(length * strength * share - 1e-9))) for share in falling]


def encoder_flops(profile: Sequence[int], dim: int, length: int, *, ffn_dim: int | None = None) -> list[int]:
    """Operations of each encoder layer for one input, a multiplication and an addition counted as two.

    8 n d^2 for the four projections and 4 n^2 d for the two products of the attention, on the n vectors that enter, and
    4 n' d f for the feed-forward network on the n' that stay. Biases, softmax, norms and activations are not counted.

    Args:
        profile: how many vectors each layer leaves; `[length] * layers` for an encoder that keeps all.
        dim: the width d.
        length: of the input.
        ffn_dim: the hidden width f; 4 * `dim` by default.

    Returns:
        A list of integers, one for each layer.

    Raises:
        ValueError: an empty profile, one that rises, exceeds `length` or falls below 1, or sizes below 1.
    """
    ffn_dim = 4 * dim if ffn_dim is None else ffn_dim
    if min(dim, length, ffn_dim) < 1:
        raise ValueError(f"dim, length and ffn_dim must be at least 1, got {dim}, {length} and {ffn_dim}")
    _check_profile(profile, length)
    entering = [length, *profile[:-1]]
    return [
        8 * n * dim**2 + 4 * n**2 * dim + 4 * left * dim * ffn_dim
        for n, left in zip(entering, profile, strict=True)
    ]


def encoder_speedup(profile: Sequence[int], dim: int, length: int, *, ffn_dim: int | None = None) -> float:
    """Operations of the encoder that keeps everything, divided by those with this profile (see `encoder_flops`)."""
    full = sum(encoder_flops([length] * len(profile), dim, length, ffn_dim=ffn_dim))
    return full / sum(encoder_flops(profile, dim, length, ffn_dim=ffn_dim))


def solve_retention(
    contribution: torch.Tensor | Sequence[float],
    length: int,
    dim: int,
    speedup: float,
    *,
    ffn_dim: int | None = None,
    minimum: int = 1,
) -> tuple[float, list[int], float]:
    """The mildest profile whose predicted speedup reaches the one asked for.

    The speedup falls with the strength, in steps, so bisection finds the largest strength that still reaches it.

    Args:
        contribution: of each layer, (layers,).
        length: of the input.
        dim: the encoder's width.
        speedup: at least 1.
        ffn_dim: 4 * `dim` by default.
        minimum: vectors that every layer leaves at least.

    Returns:
        The strength, the profile, and its predicted speedup.

    Raises:
        ValueError: a speedup below 1 or beyond what `minimum` vectors in every layer give (the message says how much
            that is), or an argument that `retention_profile` or `encoder_flops` refuses.
    """
    low = 0.0
    most = encoder_speedup(
        retention_profile(contribution, length, low, minimum=minimum), dim, length, ffn_dim=ffn_dim
    )
    if not 1 <= speedup <= most:
        raise ValueError(
            f"speedup must be 1 to {most:.3f}, which {minimum} vectors a layer give, got {speedup}"
        )
    high = 2 / float(torch.as_tensor(contribution, dtype=torch.float64).min())  # keeps everything
    for _ in range(60):
        middle = (low + high) / 2
        profile = retention_profile(contribution, length, middle, minimum=minimum)
        if encoder_speedup(profile, dim, length, ffn_dim=ffn_dim) >= speedup:
            low = middle
        else:
            high = middle
    profile = retention_profile(contribution, length, low, minimum=minimum)
    return low, profile, encoder_speedup(profile, dim, length, ffn_dim=ffn_dim)


def _check_mask(mask: torch.Tensor, shape: Sequence[int], words: str) -> None:
    if mask.dtype != torch.bool:
        raise TypeError(f"token_mask must be boolean, True for real tokens, got {mask.dtype}")
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(f"token_mask must have the shape {words}, {tuple(shape)}, got {tuple(mask.shape)}")


def _check_profile(profile: Sequence[int], length: int) -> None:
    counts = [length, *profile]
    if len(counts) < 2 or counts[-1] < 1 or any(b > a for a, b in zip(counts, counts[1:], strict=False)):
        raise ValueError(
            f"a profile is one count for each layer, from at most length={length} never rising to at least 1, "
            f"got {list(profile)}"
        )
