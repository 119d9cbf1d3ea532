"""Split conformal prediction."""

import math

import torch


def conformal_quantile(scores: torch.Tensor, level: float) -> float:
    """The threshold below which a fresh score falls with probability of at least `level`, whatever their law.

    It is the `ceil((n + 1) level)`-th smallest of `n` exchangeable scores (split conformal prediction; Vovk et al. 2005).
    For an interval take absolute residuals on data that the predictor has not seen, and add the result on both sides.

    Args:
        scores: (n,), nonconformity scores on calibration data.
        level: coverage in (0, 1).

    Returns:
        The threshold; infinity if there are too few scores for the level.

    Raises:
        ValueError: scores that are not a non-empty vector or hold NaN, or a level outside (0, 1).
    """
    if scores.ndim != 1 or not len(scores) or scores.isnan().any():
        raise ValueError(f"scores must be a non-empty vector without NaN, got shape {tuple(scores.shape)}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")
    rank = math.ceil((len(scores) + 1) * level - 1e-9)
    return scores.sort().values[rank - 1].item() if rank <= len(scores) else math.inf
