"""What the risk of a comp-sum loss says about the error rate: H-consistency bounds and minimizability gaps.

Source: Mao, Mohri, Zhong 2023 (arXiv:2304.07288). For scores that can take any value at every input,

    error(h) - best error + gap of the error <= regret_bound(risk(h) - best risk + gap of the risk, tau, num_classes),

where "best" is within the hypothesis set, a gap is what `minimizability_gap` computes, and `regret_bound` is the inverse of
`regret_transformation`. All logarithms are natural.
"""

import math

import torch


def regret_transformation(beta: torch.Tensor | float, tau: float = 1.0, num_classes: int = 2) -> torch.Tensor:
    """The least conditional regret of the comp-sum loss at which the predicted label can be `beta` worse than the best.

    The paper's T_tau. Attained for tau <= 1, by two labels of probability (1 + beta)/2 and (1 - beta)/2;
    above, a lower bound of it.

    Args:
        beta: conditional regret of the error rate, in [0, 1], any shape.
        tau: exponent of the loss, finite and at least 0.
        num_classes: at least 2; matters only for tau > 1.

    Returns:
        Of the shape of `beta`, float64, in nats for tau = 1.

    Raises:
        ValueError: a number outside its range.
    """
    beta = _numbers("beta", beta, 1.0)
    _check(tau, num_classes)
    if tau >= 2:
        return beta / ((tau - 1) * num_classes ** (tau - 1))
    if tau == 1:
        return (torch.special.xlog1py(1 + beta, beta) + torch.special.xlog1py(1 - beta, -beta)) / 2
    # log of the mean of (1 + beta)^power and (1 - beta)^power: by expm1, so that small beta keep their digits;
    # a large power would overflow there
    power = 1 / (2 - tau)
    up, down = power * beta.log1p(), power * (-beta).log1p()
    if power <= 50:
        log_mean = torch.log1p((up.expm1() + down.expm1()) / 2)
    else:
        log_mean = torch.logaddexp(up, down) - math.log(2)
    scale = 2.0 if tau < 1 else num_classes
    return scale ** (1 - tau) * -torch.expm1((2 - tau) * log_mean) / (1 - tau)


def regret_bound(excess: torch.Tensor | float, tau: float = 1.0, num_classes: int = 2) -> torch.Tensor:
    """The largest regret of the error rate that an excess risk of the comp-sum loss allows: the paper's Gamma_tau.

    Args:
        excess: risk(h) - best risk + minimizability gap, at least 0, any shape.
        tau: exponent of the loss, finite and at least 0.
        num_classes: at least 2.

    Returns:
        The inverse of `regret_transformation`, in [0, 1], of the shape of `excess`, float64.

    Raises:
        ValueError: a number outside its range.
    """
    excess = _numbers("excess", excess, math.inf)
    _check(tau, num_classes)
    if tau >= 2:
        return (excess * (tau - 1) * num_classes ** (tau - 1)).clamp_max(1.0)
    low, high = torch.zeros_like(excess), torch.ones_like(excess)
    for _ in range(60):  # bisection: the transformation increases
        middle = (low + high) / 2
        below = regret_transformation(middle, tau, num_classes) <= excess
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    # the whole of [0, 1] is reached where the excess is larger than anything attained
    reached = regret_transformation(torch.ones_like(excess), tau, num_classes) <= excess
    return torch.where(reached, 1.0, high)


def regret_bound_simple(excess: torch.Tensor | float, tau: float = 1.0, num_classes: int = 2) -> torch.Tensor:
    """A closed form that is never below `regret_bound`: for cross-entropy sqrt(2 excess), whatever the number of classes.

    Args:
        excess: at least 0, any shape.
        tau: exponent of the loss, finite and at least 0.
        num_classes: at least 2.

    Returns:
        `sqrt(2^tau (2 - tau) excess)` for tau < 1, `sqrt(2 n^(tau-1) excess)` for 1 <= tau < 2 and
        `(tau - 1) n^(tau-1) excess` from 2 on; not cut at 1. Float64, of the shape of `excess`.

    Raises:
        ValueError: a number outside its range.
    """
    excess = _numbers("excess", excess, math.inf)
    _check(tau, num_classes)
    if tau >= 2:
        return (tau - 1) * num_classes ** (tau - 1) * excess
    scale = 2.0**tau * (2 - tau) if tau < 1 else 2.0 * num_classes ** (tau - 1)
    return (scale * excess).sqrt()


def conditional_minimum(probabilities: torch.Tensor, tau: float = 1.0) -> torch.Tensor:
    """The smallest expected comp-sum loss over all scores, given the probabilities of the labels.

    Entropy in nats for tau = 1, (sum of the roots)^2 - 1 for tau = 0, 1 - max for tau = 2.

    Args:
        probabilities: (..., C), at least 0, summing to 1 along the last dimension.
        tau: exponent of the loss, finite and at least 0.

    Returns:
        (...), float64.

    Raises:
        ValueError: not probabilities, or a bad `tau`.
    """
    p = torch.as_tensor(probabilities, dtype=torch.float64)
    if p.dim() == 0 or p.shape[-1] < 2:
        raise ValueError(f"probabilities must be (..., C) with at least two classes, got {tuple(p.shape)}")
    _check(tau, p.shape[-1])
    if not bool((p >= 0).all()) or not bool(((p.sum(-1) - 1).abs() <= 1e-6).all()):
        raise ValueError("probabilities must be at least 0 and sum to 1 along the last dimension")
    if tau >= 2:
        return (1 - p.amax(-1)) / (tau - 1)
    if tau == 1:
        return torch.special.entr(p).sum(-1)
    log_norm = (2 - tau) * torch.logsumexp(p.log() / (2 - tau), -1)  # of the p-norm with exponent 1/(2 - tau)
    return torch.expm1(log_norm) / (1 - tau)


def minimizability_gap(
    best_risk: float, probabilities: torch.Tensor, tau: float = 1.0, weights: torch.Tensor | None = None
) -> float:
    """What a hypothesis set loses because one hypothesis has to serve all inputs.

    The least risk within the set minus the expectation over the inputs of the least conditional risk. It is 0 for a set that
    can reach the pointwise minimum everywhere at once.

    Args:
        best_risk: the least expected comp-sum loss within the hypothesis set.
        probabilities: of the labels at each input, (inputs, C).
        tau: exponent of the loss.
        weights: probabilities of the inputs, (inputs,), summing to 1; uniform when None.

    Returns:
        The gap, at least 0 up to rounding.

    Raises:
        ValueError: not probabilities, or a best risk below the pointwise minimum.
    """
    minima = conditional_minimum(probabilities, tau)
    if minima.dim() != 1:
        raise ValueError(
            f"probabilities must be (inputs, C), got {tuple(torch.as_tensor(probabilities).shape)}"
        )
    if weights is None:
        weights = torch.full_like(minima, 1 / len(minima))
    weights = torch.as_tensor(weights, dtype=torch.float64)
    if (
        weights.shape != minima.shape
        or not bool((weights >= 0).all())
        or abs(float(weights.sum()) - 1) > 1e-6
    ):
        raise ValueError(f"weights must be ({len(minima)},), at least 0 and sum to 1")
    floor = float((weights * minima).sum())
    if not best_risk >= floor - 1e-6 * (1 + abs(floor)):
        raise ValueError(
            f"best_risk must be at least the pointwise minimum {floor:.6g}, got {float(best_risk):.6g}"
        )
    return float(best_risk) - floor


def _numbers(name, values, largest):
    values = torch.as_tensor(values, dtype=torch.float64)
    if not bool(((values >= 0) & (values <= largest)).all()):
        words = "at least 0" if largest == math.inf else f"in [0, {largest:g}]"
        raise ValueError(f"{name} must be {words}, got values from {values.min():.3g} to {values.max():.3g}")
    return values


def _check(tau, num_classes):
    if not (math.isfinite(tau) and tau >= 0):
        raise ValueError(f"tau must be finite and at least 0, got {tau}")
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
