"""Scores that say how familiar an input is to a classifier. Larger is more familiar, for every one of them."""

from collections.abc import Callable

import torch


def msp(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """The largest softmax probability (Hendrycks and Gimpel 2017, arXiv:1610.02136), (n, C) to (n,).

    Args:
        logits: (n, C), floating point.
        temperature: by which the logits are divided, positive.

    Raises:
        ValueError: logits of another shape, or a temperature that is not positive.
    """
    if logits.dim() != 2 or not logits.is_floating_point() or logits.shape[1] < 1:
        raise ValueError(f"logits must be floating point (n, C), got {logits.dtype} {tuple(logits.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    return torch.softmax(logits / temperature, 1).amax(1)


def odin(
    model: Callable[[torch.Tensor], torch.Tensor],
    inputs: torch.Tensor,
    *,
    temperature: float = 1000.0,
    eps: float = 0.0014,
    scale: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """The largest softmax probability at a high temperature, after a step that raises it (Liang et al. 2018,
    arXiv:1706.02690), (n, ...) to (n,).

    At temperature 1000 the probabilities of C classes differ from 1/C by little, so they are computed in double precision.

    Args:
        model: from inputs to logits (n, C).
        inputs: (n, ...), floating point.
        temperature: positive.
        eps: length of the step on each input value, at least 0; 0 leaves the inputs as they are.
        scale: standard deviations by which the inputs were divided, or None; the step is divided by them too.

    Raises:
        ValueError: an option out of range.
    """
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    moved = inputs.detach()
    if eps > 0:
        moved = moved.clone().requires_grad_(True)
        with torch.enable_grad():
            score = msp(model(moved).double(), temperature).log().sum()
            (gradient,) = torch.autograd.grad(score, moved)
        step = gradient.sign() if scale is None else gradient.sign() / scale
        moved = moved.detach() + eps * step
    with torch.no_grad():
        return msp(model(moved).double(), temperature).to(inputs.dtype)


def lid_score(
    features: torch.Tensor, reference: torch.Tensor, k: int = 20, *, exclude_self: bool = False
) -> torch.Tensor:
    """Minus the local intrinsic dimensionality, by maximum likelihood over k neighbours (Ma et al. 2018,
    arXiv:1801.02613, equation 4), (n, d) to (n,).

    With r_1 <= ... <= r_k the distances to the nearest reference points, the dimensionality is
    `-1 / mean_i log(r_i / r_k)`: in d dimensions the number of points within r grows as r^d. Adversarial inputs have a
    higher one, hence the minus.

    Args:
        features: (n, d).
        reference: (m, d), features of clean inputs.
        k: number of neighbours, at least 2.
        exclude_self: leave out the nearest point, for features that are in `reference` themselves.

    Returns:
        The scores, all negative; minus infinity where all k distances are equal.

    Raises:
        ValueError: shapes that do not match, or fewer than k neighbours.
    """
    if features.dim() != 2 or reference.dim() != 2 or features.shape[1] != reference.shape[1]:
        raise ValueError(
            f"features and reference must be (n, d) and (m, d), got {tuple(features.shape)}, {tuple(reference.shape)}"
        )
    if not 2 <= k <= len(reference) - exclude_self:
        raise ValueError(f"k must be from 2 to {len(reference) - exclude_self}, got {k}")
    rows, points = features.double(), reference.double()
    found = torch.cdist(rows, points, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = found.topk(k + exclude_self, largest=False).values[:, int(exclude_self) :]  # ascending
    nearest = nearest.clamp_min(torch.finfo(torch.float64).tiny)  # duplicates of a reference point
    return (-1 / (nearest[:, -1:] / nearest).log().mean(1)).to(features.dtype)
