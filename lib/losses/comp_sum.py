"""Comp-sum losses: one exponent between the sum-exponential loss, cross-entropy and the mean absolute error.

Source: Mao, Mohri, Zhong 2023 (arXiv:2304.07288). With u the sum over the wrong classes of exp(z_j - z_y) and p the softmax
of the logits, 1 + u = 1 / p_y, so that every member is a function of `log p_y` alone. The theory of the family is in
`lib.losses.h_consistency`.
"""

import math
from collections.abc import Callable

import torch

from lib.attacks import pgd
from lib.losses._classification import check_reduction, reduce, reduce_rows, rows


def comp_sum(
    logits: torch.Tensor,
    targets: torch.Tensor,
    tau: float = 1.0,
    *,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    """The comp-sum loss with exponent `tau` (Mao et al. 2023).

    `tau = 0` is the sum-exponential loss 1/p_y - 1, `tau = 1` cross-entropy, `tau` between 1 and 2 the generalized
    cross-entropy with q = tau - 1, and `tau = 2` half the mean absolute error, 1 - p_y. Computed from `log p_y` by `expm1`,
    which stays exact as `tau` tends to 1. Below `tau = 1` the loss itself grows as exp((1 - tau) d) for a row whose own logit
    lies d below the largest, and overflows where that does.

    At a glance:
        formula: `(p_y^(tau-1) - 1) / (1 - tau)`; `-log p_y` at tau = 1
        gradient: `p_y^(tau-1) (p - e_y)`
        consistency: for tau < 2 p is proportional to the label distribution raised to 1/(2 - tau), from tau = 2 on it is
            one-hot at the best label: Bayes consistent for every tau; keeps the order of all labels for tau < 2
        cost: `O(C)` per row; the log-softmax is stored

    Args:
        logits: (C,), (N, C) or (N, C, d1, ...), floating point; half precision is computed in float32.
        targets: class indices of that shape without C, in [0, C) or `ignore_index`.
        tau: the exponent, finite and at least 0.
        weight: of each class, (C,).
        ignore_index: targets that have no loss and no gradient.
        reduction: `"mean"` (over the weight of the rows that count), `"sum"` or `"none"`.

    Returns:
        A scalar, or losses of the shape of `targets`.

    Raises:
        TypeError: logits, targets or weight of another kind.
        ValueError: shapes that do not fit, targets out of range, a negative or infinite `tau`, an unknown reduction.
    """
    _check_number("tau", tau)
    z, labels, valid = rows(logits, targets, weight=weight, ignore_index=ignore_index, reduction=reduction)
    log_p = z.log_softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1)  # (rows,)
    losses = -log_p if tau == 1 else torch.expm1((tau - 1) * log_p) / (1 - tau)
    return reduce_rows(losses, labels, valid, targets.shape, weight=weight, reduction=reduction)


def generalized_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, q: float = 0.7, **options
) -> torch.Tensor:
    """Generalized cross-entropy (Zhang and Sabuncu 2018, arXiv:1805.07836): `comp_sum` with `tau = 1 + q`.

    At a glance:
        formula: `(1 - p_y^q) / q`
        gradient: `p_y^q (p - e_y)`
        consistency: for q < 1 p is proportional to the label distribution raised to 1/(1 - q), at q = 1 one-hot at the
            best label: Bayes consistent; keeps the order of all labels for q < 1
        cost: `O(C)` per row; the log-softmax is stored

    Args:
        logits: as for `comp_sum`.
        targets: as for `comp_sum`.
        q: in (0, 1]; towards 0 it becomes cross-entropy, at 1 it is half the mean absolute error.
        options: `weight`, `ignore_index` and `reduction` of `comp_sum`.

    Returns:
        A scalar, or losses of the shape of `targets`.

    Raises:
        TypeError: as `comp_sum`.
        ValueError: q outside (0, 1], and as `comp_sum`.
    """
    if not 0 < q <= 1:
        raise ValueError(f"q must be in (0, 1], got {q}")
    return comp_sum(logits, targets, 1 + q, **options)


def mean_absolute_error(logits: torch.Tensor, targets: torch.Tensor, **options) -> torch.Tensor:
    """Absolute difference of softmax and one-hot target, summed over the classes (Ghosh et al. 2017, arXiv:1712.09482).

    Twice `comp_sum` with `tau = 2`. Under this loss all labels together cost the same whatever the logits are, which is what
    makes it indifferent to uniform label noise, and slow to learn.

    At a glance:
        formula: `sum_j |p_j - [j = y]| = 2 (1 - p_y)`
        gradient: `2 p_y (p - e_y)`
        consistency: p is one-hot at the best label: Bayes consistent, not top-k
        cost: `O(C)` per row; the log-softmax is stored

    Args:
        logits: as for `comp_sum`.
        targets: as for `comp_sum`.
        options: `weight`, `ignore_index` and `reduction` of `comp_sum`.

    Returns:
        A scalar, or losses of the shape of `targets`.

    Raises:
        TypeError: as `comp_sum`.
        ValueError: as `comp_sum`.
    """
    return 2 * comp_sum(logits, targets, 2.0, **options)


def smooth_adversarial_comp_sum(
    model: Callable[[torch.Tensor], torch.Tensor],
    inputs: torch.Tensor,
    targets: torch.Tensor,
    *,
    eps: float,
    tau: float = 1.0,
    rho: float = 1.0,
    nu: float = 1.0,
    norm: str = "linf",
    steps: int = 10,
    step_size: float | None = None,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    generator: torch.Generator | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """The smooth adversarial comp-sum loss (Mao et al. 2023): clean loss, plus how far the margins can be moved.

    With D(x) the vector of margins z_y - z_j over the wrong classes j, and x' in the ball around x,

        comp_sum(z / rho, y, tau) + nu * max over x' of the Euclidean norm of D(x') - D(x).

    For nu >= sqrt(C - 1) / rho it bounds the worst case in the ball of the same loss with clipped margins in place of
    exponentials. The maximum is sought by `lib.attacks.pgd` on the distance itself, from a random start (at x the
    distance has no gradient); its value is then differentiated through x and x' alike. Together with weight decay in the
    optimizer this is the algorithm that the paper calls ADV-COMP-SUM.

    At a glance:
        formula: `comp_sum(z / rho, y, tau) + nu max_x' |D(x') - D(x)|`, D = z_y - z
        gradient: on the clean logits at eps = 0: `p_y^(tau-1) (p - e_y) / rho`, p = softmax(z / rho)
        consistency: bounds the adversarial margin loss for nu >= sqrt(C - 1) / rho; at eps = 0 that of `comp_sum`
        cost: `steps + 2` forward and `steps + 1` backward passes of the model

    Args:
        model: from inputs to logits (N, C). It is used in the mode it is in, the search for x' included.
        inputs: (N, ...), floating point, within `bounds`.
        targets: class indices (N,).
        eps: radius of the ball, at least 0.
        tau: exponent of the comp-sum loss, at least 0.
        rho: scale of the margins in the first term, above 0.
        nu: weight of the second term, at least 0.
        norm: `"linf"` or `"l2"`, of the ball.
        steps: gradient steps of the search, at least 1.
        step_size: of the search; `2.5 * eps / steps` when None.
        bounds: smallest and largest legal value of an input, or None.
        generator: of the random start.
        reduction: `"mean"`, `"sum"` or `"none"`.

    Returns:
        A scalar, or one loss an input, (N,).

    Raises:
        TypeError: inputs, logits or targets of another kind.
        ValueError: a number outside its range, shapes that do not fit, inputs outside the bounds, an unknown norm or
            reduction.
    """
    check_reduction(reduction)
    for name, value, positive in (("tau", tau, False), ("rho", rho, True), ("nu", nu, False)):
        _check_number(name, value, positive)
    logits = model(inputs)
    if logits.dim() != 2:
        raise ValueError(f"model must return logits (N, C), got {tuple(logits.shape)}")
    first = comp_sum(logits / rho, targets, tau, reduction="none")
    if bool((targets < 0).any()):
        raise ValueError(f"targets must be in [0, {logits.shape[1]}), got {targets.min()}")
    clean = _margins(logits, targets)
    fixed = clean.detach()
    moved = pgd(
        model, inputs, targets, eps=eps, steps=steps, step_size=step_size, norm=norm, bounds=bounds,
        generator=generator, loss_fn=lambda z, y: (_margins(z, y) - fixed).square().sum(1),
    )  # fmt: skip
    second = torch.linalg.vector_norm(_margins(model(moved), targets) - clean, dim=1)
    return reduce(first + nu * second, reduction)


def _margins(logits, targets):
    """z_y - z_j for all j, (N, C); the entry of the target is 0 and does not count in a norm."""
    return logits.gather(1, targets.unsqueeze(1)) - logits


def _check_number(name, value, positive=False):
    if not (math.isfinite(value) and (value > 0 if positive else value >= 0)):
        raise ValueError(f"{name} must be finite and {'above' if positive else 'at least'} 0, got {value}")
