"""A penalty on the entropy of attention heads that leave a learned range (Jha and Reagen, 2025)."""

import math
from collections.abc import Sequence

import torch


def entropy_regulariser(
    entropies: Sequence[torch.Tensor],
    theta: torch.Tensor,
    *,
    gamma: float = 0.2,
    e_max: float | None = None,
    reduce: str = "mean_position",
) -> torch.Tensor:
    """How far attention heads are from their own thresholds of entropy, where farther than a margin.

    Gradients flow into the entropies (and so into temperatures, queries and keys) and into `theta`. The penalty is not
    continuous: it jumps from 0 to (gamma e_max)^2 at the edge of the margin, where its gradient jumps to 2 gamma e_max.

    At a glance:
        formula: `mean over layers and heads of d^2 [abs(d) > gamma e_max]`, d = E - theta e_max
        gradient: `2 d [abs(d) > gamma e_max] / (layers * heads * batch)` with respect to a head's mean entropy E
        consistency: no loss of predictions but a term beside one; it is 0 while every head is within its margin
        cost: `O(L H B T)` beside the attention; the entropies are stored

    Source: arXiv 2501.03489, Algorithm 1.

    Args:
        entropies: of each layer, (batch, heads, positions), in nats, as `lib.attention.entropy_attention` returns them.
        theta: threshold of each head as a share of `e_max`, (layers, heads).
        gamma: the margin as a share of `e_max`, at least 0.
        e_max: the reference; by default log(positions), as in the paper. A causal head cannot reach that one, see
            `lib.information.causal_entropy_bound`.
        reduce: "mean_position" penalises a head's entropy averaged over positions, and averages the penalties over the
            batch (Algorithm 1, where a batch does not occur). "released" penalises every position by itself and sums over
            batch and positions, as the published code does: values are not comparable.

    Returns:
        A scalar, to be multiplied by a coefficient and added to the loss.

    Raises:
        ValueError: shapes that do not fit, a negative `gamma`, an `e_max` that is not positive, or an unknown `reduce`.
    """
    if reduce not in ("mean_position", "released"):
        raise ValueError(f"reduce must be mean_position or released, got {reduce!r}")
    if not gamma >= 0:
        raise ValueError(f"gamma must be at least 0, got {gamma}")
    shapes = [tuple(entropy.shape) for entropy in entropies]
    if not shapes or len(shapes[0]) != 3 or len(set(shapes)) > 1 or 0 in shapes[0]:
        raise ValueError(
            f"entropies must be (batch, heads, positions) of every layer, alike and not empty, got {shapes}"
        )
    if tuple(theta.shape) != (len(shapes), shapes[0][1]):
        raise ValueError(
            f"theta must be (layers, heads) = {(len(shapes), shapes[0][1])}, got {tuple(theta.shape)}"
        )
    e_max = math.log(shapes[0][2]) if e_max is None else e_max
    if not e_max > 0:
        raise ValueError(f"e_max must be positive (give it where there is a single position), got {e_max}")
    stacked = torch.stack(tuple(entropies))  # (layers, batch, heads, positions)
    if reduce == "mean_position":
        stacked = stacked.mean(-1, keepdim=True)
    deviation = stacked - theta[:, None, :, None] * e_max
    penalty = torch.where(deviation.abs() > gamma * e_max, deviation.square(), 0.0)
    return penalty.mean() if reduce == "mean_position" else penalty.sum((1, 3)).mean()
