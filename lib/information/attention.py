"""The entropy of attention weights, and how large that of a causal head can be."""

import math

import torch


def attention_entropy(weights: torch.Tensor, eps: float = 1e-9) -> torch.Tensor:
    """Shannon entropy of each row of attention weights, in nats: -sum_j a_ij log(a_ij + eps).

    The mean over positions is the entropy of a head. With `eps=0` the entropy is exact: a weight of 0 counts 0, and its
    gradient is 0. The `eps` of the paper makes it at most `S * eps` too small, for S keys, and gives a weight of 0 the
    gradient -log(eps).

    Source: arXiv 2501.03489, Shannon entropy of attention; the released code has eps = 1e-9.

    Args:
        weights: (..., T, S), non-negative rows that sum to 1 (or to 0, where a row sees nothing: entropy 0).
        eps: added inside the logarithm.

    Returns:
        (..., T).

    Raises:
        TypeError: weights that are not floating point.
        ValueError: no dimension of keys, or a negative `eps`.
    """
    if not weights.is_floating_point():
        raise TypeError(f"weights must be floating point, got {weights.dtype}")
    if not weights.ndim or not eps >= 0:
        raise ValueError(f"expected weights (..., S) and eps >= 0, got {tuple(weights.shape)} and {eps}")
    inside = weights + eps
    # log 1 in place of log 0: both the product and its gradient are 0 there
    return -(weights * inside.masked_fill(inside == 0, 1.0).log()).sum(-1)


def causal_entropy_bound(length: int) -> float:
    """The largest mean entropy of a causal head over `length` positions, in nats: log(length!) / length.

    Row i sees i keys, so its entropy is at most log i. The bound is reached by even weights; it lies below log(length).

    Raises:
        ValueError: a length below 1.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    return math.lgamma(length + 1) / length
