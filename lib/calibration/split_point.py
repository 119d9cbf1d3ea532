"""Calibration of class probabilities by the residuals on both sides of them (Zhao and Chen 2025, arXiv 2509.13262)."""

import torch


def split_point_recalibrate(
    probabilities: torch.Tensor,
    total: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    *,
    tolerance: float = 0.05,
) -> torch.Tensor:
    """Move each class probability towards the frequency that the residuals imply.

    With `q_k = P(y = k | x)` the unconditional residuals are `up = q (1 - p)`, `down = (1 - q) p` and `total = up + down`, so
    `q - p = up - down = total - 2 down = 2 up - total`. The smallest of the three estimates is added to `p`, where they agree
    (`|up + down - total| < tolerance`); then the row is clipped at zero and normalised, which the released code does not do.

    Args:
        probabilities: p, (n, C).
        total, up, down: mean absolute residuals of each class, (n, C), as `lib.uncertainty.SplitPointHeads` gives them for
            classification.
        tolerance: largest disagreement at which a class is corrected.

    Returns:
        Probabilities, (n, C).

    Raises:
        ValueError: shapes that differ, rows that are not probabilities, or a negative tolerance.
    """
    shapes = {tuple(part.shape) for part in (probabilities, total, up, down)}
    if len(shapes) != 1 or probabilities.ndim != 2:
        raise ValueError(f"all four must have one shape (n, C), got {sorted(shapes)}")
    if (probabilities < 0).any() or ((probabilities.sum(1) - 1).abs() > 1e-4).any():
        raise ValueError("probabilities must be at least 0 and sum to 1 in each row")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0, got {tolerance}")
    shift = torch.minimum(torch.minimum(up - down, total - 2 * down), 2 * up - total)
    shift = torch.where((up + down - total).abs() < tolerance, shift, torch.zeros_like(shift))
    corrected = (probabilities + shift).clamp_min(0)
    mass = corrected.sum(1, keepdim=True)
    return torch.where(mass > 0, corrected / mass.clamp_min(1e-12), probabilities)
