"""How well a score separates familiar samples from others."""

import numpy as np
import torch


def ood_metrics(in_scores: torch.Tensor, out_scores: torch.Tensor) -> dict[str, float]:
    """The five threshold-free figures of Lee et al. 2018 (arXiv:1807.03888, section 3.1).

    Args:
        in_scores: (n,), scores of in-distribution samples, which should be the larger ones.
        out_scores: (m,), scores of the others.

    Returns:
        A dictionary with numbers in [0, 1]:

        - `tnr_at_tpr95`: share of the others below the largest threshold that keeps at least 95 % of the familiar ones
          (at or above it);
        - `auroc`: probability that a familiar sample scores higher than another one, ties counting half;
        - `accuracy`: the largest mean of both rates over all thresholds;
        - `aupr_in`, `aupr_out`: average precision with the familiar samples, or the others, as positives.

    Raises:
        ValueError: not two non-empty vectors, or NaN among the scores.
    """
    familiar, others = (
        np.asarray(torch.as_tensor(part).detach().cpu(), dtype=float) for part in (in_scores, out_scores)
    )
    if familiar.ndim != 1 or others.ndim != 1 or not familiar.size or not others.size:
        raise ValueError(f"scores must be two non-empty vectors, got shapes {familiar.shape}, {others.shape}")
    if np.isnan(familiar).any() or np.isnan(others).any():
        raise ValueError("scores must not be NaN")
    # keep ceil(0.95 n) familiar samples; the small number undoes the rounding of 0.95 n
    threshold = np.sort(familiar)[len(familiar) - int(np.ceil(0.95 * len(familiar) - 1e-9))]
    # (levels,) shares at or above, and below, each value that occurs
    levels = np.unique(np.concatenate([familiar, others]))
    in_below = np.searchsorted(np.sort(familiar), levels) / len(familiar)
    out_below = np.searchsorted(np.sort(others), levels) / len(others)
    in_upto = np.append(in_below[1:], 1.0)
    out_upto = np.append(out_below[1:], 1.0)
    # familiar samples at a level win against the others below it, and half of those at it
    auroc = ((in_upto - in_below) * (out_below + out_upto) / 2).sum()
    return {
        "tnr_at_tpr95": float((others < threshold).mean()),
        "auroc": float(auroc),
        "accuracy": float(((1 - in_below + out_below) / 2).max()),
        "aupr_in": _average_precision(
            len(familiar) * (1 - in_below)[::-1], len(others) * (1 - out_below)[::-1]
        ),
        "aupr_out": _average_precision(len(others) * out_upto, len(familiar) * in_upto),
    }


def _average_precision(true, false):
    """Mean precision over the positives, from the numbers of both kinds accepted at ever looser thresholds."""
    gained = np.diff(true, prepend=0.0)
    return float((gained * true / (true + false)).sum() / true[-1])
