"""Logistic regression by full-batch gradient descent, the perceptrons that are its limits, and the margin.

Everything here classifies through the origin: a threshold is a constant column of `features`. The paper is
Tyurin (2024), "From Logistic Regression to the Perceptron Algorithm", arXiv 2412.08424.
"""

import math
from typing import NamedTuple

import torch
from torch.nn.functional import logsigmoid


class GradientTrace(NamedTuple):
    """What `logistic_gd` returns. Entry `k` of each record belongs to iterate `theta_k`; entry 0 is the start.

    Attributes:
        theta: the last iterate, shape `(d,)`.
        loss: mean logistic loss in nats, shape `(steps + 1,)`.
        grad_norm: Euclidean norm of the gradient of that loss (never the normalized step), shape `(steps + 1,)`.
        accuracy: fraction of samples with a strictly positive margin, shape `(steps + 1,)`.
        iterations: the first `k` whose iterate separates the data, or None if no iterate did.
        path: all iterates, shape `(steps + 1, d)`, or None.
    """

    theta: torch.Tensor
    loss: torch.Tensor
    grad_norm: torch.Tensor
    accuracy: torch.Tensor
    iterations: int | None
    path: torch.Tensor | None


class PerceptronTrace(NamedTuple):
    """What `batch_perceptron` returns.

    Attributes:
        theta: the last iterate, shape `(d,)`.
        mistakes: how many samples each step added, integers of shape `(steps,)`.
        iterations: the first `k` whose iterate separates the data, or None if no iterate did. With
            `normalization="single"` an iteration is an update, so this is the number of mistakes.
        path: all iterates, shape `(steps + 1, d)`, or None.
    """

    theta: torch.Tensor
    mistakes: torch.Tensor
    iterations: int | None
    path: torch.Tensor | None


class Margin(NamedTuple):
    """What `margin` returns: the margin and the unit vector of shape `(d,)` that attains it."""

    value: float
    direction: torch.Tensor


def logistic_gd(
    features: torch.Tensor,
    targets: torch.Tensor,
    *,
    step_size: float,
    normalized: bool = False,
    max_iter: int = 1000,
    theta0: torch.Tensor | None = None,
    stop: bool = True,
    path: bool = False,
) -> GradientTrace:
    """Minimise the logistic loss by full-batch gradient descent with a constant step size of any magnitude.

    The loss is f(theta) = mean_i log(1 + exp(-m_i)) with margins m_i = y_i a_i^T theta. A plain step adds
    step_size times mean_i sigmoid(-m_i) y_i a_i. A normalized step (arXiv 2412.08424, Normalized LR+GD) adds
    step_size times the weighted mean of y_i a_i with weights sigmoid(-m_i) / sum_j sigmoid(-m_j), computed as
    softmax(logsigmoid(-m)): it stays finite where every sigmoid underflows.

    Args:
        features: samples a_i, shape `(n, d)`, floating point. Use float64: at large step sizes the margins
            have to be right relative to the step size, not relative to one.
        targets: labels of shape `(n,)`, each -1 or 1.
        step_size: positive and finite; in units of theta per unit of gradient.
        normalized: take normalized steps.
        max_iter: the largest number of steps.
        theta0: the start, shape `(d,)`; zeros by default, which is what the theorems assume.
        stop: stop at the first iterate that separates the data.
        path: keep all iterates; costs `max_iter * d` numbers.

    Returns:
        A `GradientTrace`.

    Raises:
        TypeError: `features` is not a floating-point tensor or `targets` is not a tensor.
        ValueError: shapes do not agree, targets other than -1 and 1, values that are not finite, a step size that
            is not positive, or a negative `max_iter`.
    """
    signed = _signed(features, targets)
    if not (math.isfinite(step_size) and step_size > 0):
        raise ValueError(f"step_size must be positive and finite, got {step_size!r}")
    theta = _start(theta0, signed)
    _check_count("max_iter", max_iter)
    losses, norms, accuracies, iterates, solved = [], [], [], [], None
    with torch.no_grad():
        for step in range(max_iter + 1):
            margins = signed @ theta  # (n,)
            log_wrong = logsigmoid(-margins)  # log of the probability given to the wrong class
            gradient = log_wrong.exp() @ signed / len(signed)  # minus the gradient of the loss
            correct = margins > 0
            losses.append(logsigmoid(margins).mean().abs())  # minus, without a negative zero
            norms.append(gradient.norm())
            accuracies.append(correct.to(signed.dtype).mean())
            if path:
                iterates.append(theta)
            if solved is None and bool(correct.all()):
                solved = step
            if step == max_iter or (stop and solved is not None):
                break
            theta = theta + step_size * (torch.softmax(log_wrong, 0) @ signed if normalized else gradient)
    return GradientTrace(
        theta,
        torch.stack(losses),
        torch.stack(norms),
        torch.stack(accuracies),
        solved,
        torch.stack(iterates) if path else None,
    )


def batch_perceptron(
    features: torch.Tensor,
    targets: torch.Tensor,
    *,
    normalization: str = "n",
    max_iter: int = 1000,
    path: bool = False,
) -> PerceptronTrace:
    """Run a perceptron from the origin until it separates the data.

    With S_k = {i : y_i a_i^T u_k <= 0}, a point on the boundary counting as wrong:

    - `"n"`: u_1 = sum_i y_i a_i / (2n), then u_{k+1} = u_k + sum_{i in S_k} y_i a_i / n. The limit of
      `logistic_gd` divided by the step size (arXiv 2412.08424, Batch Perceptron). At most n R^2 / mu^2 steps.
    - `"misclassified"`: u_{k+1} = u_k + mean of y_i a_i over S_k, from the first step on. The limit of
      `logistic_gd(normalized=True)` divided by the step size. At most R^2 / mu^2 steps.
    - `"single"`: Rosenblatt's algorithm: cycle through the samples in their order, add y_i a_i when sample i is
      in S_k. At most R^2 / mu^2 updates.

    Args:
        features: samples a_i, shape `(n, d)`, floating point.
        targets: labels of shape `(n,)`, each -1 or 1.
        normalization: `"n"`, `"misclassified"` or `"single"`.
        max_iter: the largest number of steps (`"single"`: of updates).
        path: keep all iterates.

    Returns:
        A `PerceptronTrace`.

    Raises:
        TypeError: `features` is not a floating-point tensor or `targets` is not a tensor.
        ValueError: shapes do not agree, targets other than -1 and 1, values that are not finite, an unknown
            normalization, or a negative `max_iter`.
    """
    signed = _signed(features, targets)
    if normalization not in ("n", "misclassified", "single"):
        raise ValueError(f"normalization must be 'n', 'misclassified' or 'single', got {normalization!r}")
    _check_count("max_iter", max_iter)
    theta = torch.zeros(signed.shape[1], dtype=signed.dtype, device=signed.device)
    counts, iterates, solved, cursor = [], [theta], None, 0
    for step in range(max_iter + 1):
        wrong = signed @ theta <= 0  # (n,)
        if not bool(wrong.any()):
            solved = step
            break
        if step == max_iter:
            break
        if normalization == "single":
            later = wrong.roll(-cursor).nonzero()[0, 0]  # the next mistake in the cycle
            index = int((later + cursor) % len(signed))
            counts.append(1)
            theta, cursor = theta + signed[index], (index + 1) % len(signed)
        else:
            total = wrong.to(signed.dtype) @ signed
            counts.append(int(wrong.sum()))
            divisor = counts[-1] if normalization == "misclassified" else len(signed)
            half = 0.5 if normalization == "n" and step == 0 else 1.0  # a sigmoid at the origin is one half
            theta = theta + half * total / divisor
        if path:
            iterates.append(theta)
    return PerceptronTrace(
        theta,
        torch.tensor(counts, dtype=torch.int64),
        solved,
        torch.stack(iterates) if path else None,
    )


def margin(features: torch.Tensor, targets: torch.Tensor, *, tolerance: float = 1e-6) -> Margin:
    """The hard margin through the origin: mu = max over unit theta of min_i y_i a_i^T theta.

    By duality mu is the distance from the origin to the convex hull of the points y_i a_i. The nearest point is
    found by non-negative least squares (Lawson and Hanson's active set, exact up to rounding) on the CPU in
    float64, and certified: the margin attained is compared with the distance.

    Args:
        features: samples a_i, shape `(n, d)`, floating point.
        targets: labels of shape `(n,)`, each -1 or 1.
        tolerance: the largest duality gap accepted, relative to R = max_i ||a_i||.

    Returns:
        A `Margin`; its direction has the dtype and device of `features`.

    Raises:
        TypeError: `features` is not a floating-point tensor or `targets` is not a tensor.
        ValueError: bad shapes or values, or the data is not separable through the origin.
        RuntimeError: the solver stopped with a duality gap above `tolerance`.
    """
    import numpy as np
    from scipy.optimize import nnls

    signed = _signed(features, targets)
    points = signed.detach().cpu().double().numpy()
    radius = np.linalg.norm(points, axis=1).max()
    if radius == 0:
        raise ValueError("the data is not separable through the origin: all features are zero")
    points = points / radius
    # min over p >= 0 of ||points^T p||^2 + (sum p - 1)^2: the direction of p is that of the nearest hull point
    system = np.vstack([points.T, np.ones(len(points))])
    weights, _ = nnls(system, np.append(np.zeros(points.shape[1]), 1.0), maxiter=30 * len(points))
    nearest = weights / weights.sum() @ points
    distance = np.linalg.norm(nearest)  # at least the margin, whatever the weights are
    attained = (points @ nearest).min() / distance if distance > tolerance else -math.inf
    if attained <= 0:
        raise ValueError(
            "the data is not separable through the origin: the convex hull of targets * features comes within "
            f"{distance * radius:.2g} of it; a constant column in features lets the plane move off the origin"
        )
    if distance - attained > tolerance:
        raise RuntimeError(
            f"the margin is only known to lie between {attained * radius} and {distance * radius}; "
            "scale the columns of features alike"
        )
    direction = torch.from_numpy(nearest / distance).to(features.device, features.dtype)
    return Margin(float(attained * radius), direction)


def _signed(features: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The rows y_i a_i, shape (n, d), after checking both arguments."""
    if not isinstance(features, torch.Tensor) or not features.is_floating_point():
        kind = features.dtype if isinstance(features, torch.Tensor) else type(features).__name__
        raise TypeError(f"features must be a floating-point tensor, got {kind}")
    if not isinstance(targets, torch.Tensor):
        raise TypeError(f"targets must be a tensor, got {type(targets).__name__}")
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"features must have shape (n, d), neither of them 0, got {tuple(features.shape)}")
    if targets.shape != features.shape[:1]:
        raise ValueError(
            f"targets must have shape ({len(features)},) like the rows of features, got {tuple(targets.shape)}"
        )
    if not bool(((targets == 1) | (targets == -1)).all()):
        raise ValueError("targets must be -1 or 1; map labels {0, 1} by 2 * labels - 1")
    if not bool(features.isfinite().all()):
        raise ValueError("features must be finite, got infinities or NaNs")
    return targets.to(features.device, features.dtype)[:, None] * features


def _start(theta0: torch.Tensor | None, signed: torch.Tensor) -> torch.Tensor:
    if theta0 is None:
        return torch.zeros(signed.shape[1], dtype=signed.dtype, device=signed.device)
    if not isinstance(theta0, torch.Tensor):
        raise TypeError(f"theta0 must be a tensor, got {type(theta0).__name__}")
    if theta0.shape != signed.shape[1:]:
        raise ValueError(f"theta0 must have shape ({signed.shape[1]},), got {tuple(theta0.shape)}")
    return theta0.detach().to(signed.device, signed.dtype)


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} must be a non-negative integer, got {value!r}")
