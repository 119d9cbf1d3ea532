"""Information bottleneck for regression with Cauchy-Schwarz divergences (Yu et al., 2024)."""

import torch

from lib.information.cauchy_schwarz import conditional_cs, cs_qmi


def cs_ib(
    x: torch.Tensor,
    t: torch.Tensor,
    y: torch.Tensor,
    y_pred: torch.Tensor,
    beta: float | torch.Tensor = 0.01,
    *,
    sigma_x: float = 1.0,
    sigma_y: float = 1.0,
    sigma_t: float = 1.0,
    denominator: str = "squared_sum",
) -> torch.Tensor:
    """Conditional Cauchy-Schwarz divergence of the predictions plus `beta` times normalised quadratic information.

    At a glance:
        formula: `D_CS(p(y|x); q(y_pred|x)) + beta I_CS(x;t) / sqrt(I_CS(x;x) I_CS(t;t))`
        gradient: `sum_i (P_ij + P_ji)(v_i - v_j) / s^2 - 2 sum_i C_ji (y_i - v_j) / s^2` with respect to a prediction v_j,
            P and C being the summands of the terms of predictions and of the cross term, each divided by their sum
        consistency: for regression. With an input width that separates all inputs it is the correntropy loss, whose
            minimiser is the mode of p(y|x) blurred by s, and near the mean squared error over s^2 when residuals are small
        cost: `O(N^2 (d_x + d_t))` per batch of N; no matrix of all pairs is kept beyond blocks

    In nats; the published code takes logarithms to base 2 in the first term (the second has no base), which is the same
    as dividing `beta` by 1.44.

    Source: arXiv 2404.17951. Works under `torch.func.vmap`.

    Args:
        x: inputs, standardised, (N, d_x).
        t: their representation, (N, d_t).
        y: targets, (N, d_y).
        y_pred: predictions made from `t`, (N, d_y).
        beta: weight of the compression, at least 0; a tensor is not checked.
        sigma_x: width of the kernel of inputs, in both terms.
        sigma_y: width of the kernel of targets and predictions.
        sigma_t: width of the kernel of the representation. It is fixed: a representation at a smaller scale counts as
            compressed.
        denominator: see `lib.information.conditional_cs`.

    Returns:
        A scalar.

    Raises:
        TypeError, ValueError: as `lib.information.conditional_cs` and `lib.information.cs_qmi`; a negative `beta`.
    """
    if not isinstance(beta, torch.Tensor) and not beta >= 0:
        raise ValueError(f"beta must be at least 0, got {beta}")
    prediction = conditional_cs(x, y, y_pred, sigma_x, sigma_y, denominator)
    return prediction + beta * cs_qmi(x, t, sigma_x, sigma_t, normalised=True)
