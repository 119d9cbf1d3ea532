"""Losses of the spherical family: functions of the sum of the outputs, the sum of their squares and the target's output.

Sources: the Z-loss of de Brébisson and Vincent 2016 (arXiv:1604.08859); the Taylor and the spherical softmax of de Brébisson
and Vincent 2015 (arXiv:1511.05042). These functions take all logits and cost `O(C)` per row, as any loss does;
`lib.models.SphericalOutput` trains an output layer on the same losses at a cost that does not depend on C.
"""

import math

import torch
import torch.nn.functional as F

from lib.losses._classification import reduce_rows, rows


def z_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    a: float = 1.0,
    b: float = 10.0,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    """The Z-loss (de Brébisson and Vincent 2016): how many standard deviations the target's logit lies above the mean.

    It does not change when all logits of a row are shifted, or multiplied by a positive number; so it scores a ranking, and
    no probabilities can be read from it. It is not the penalty on the squared log-partition function, which carries the same
    name in later work. z_y is at most sqrt(C - 1): a `b` well above that makes the loss nearly linear in z_y. For C = 2 z_y is
    1 or -1, and the gradient 0. A row of equal logits has no z-scores; its loss is that of z_y = 0, and its gradient that of
    a row with standard deviation 1, so that training can leave such a point.

    At a glance:
        formula: `softplus(a (b - z_y)) / a`, z = (logits - mean) / sd over the C logits of the row
        gradient: `sigmoid(a (b - z_y)) (1/C + z_y z/C - e_y) / sd`
        consistency: scores a ranking, not a distribution; `b` sets how far above the mean is enough
        cost: `O(C)` per row, `O(d^2)` in `SphericalOutput`; the centred logits are stored

    Args:
        logits: (C,), (N, C) or (N, C, d1, ...), floating point; half precision is computed in float32.
        targets: class indices of that shape without C, in [0, C) or `ignore_index`.
        a: sharpness of the bend, above 0; a large one makes a hinge at `b`.
        b: the z-score that the target should reach, finite.
        weight: of each class, (C,).
        ignore_index: targets that have no loss and no gradient.
        reduction: `"mean"` (over the weight of the rows that count), `"sum"` or `"none"`.

    Returns:
        A scalar, or losses of the shape of `targets`.

    Raises:
        TypeError: logits, targets or weight of another kind.
        ValueError: shapes that do not fit, targets out of range, `a` or `b` outside its range, an unknown reduction.
    """
    _check_positive("a", a)
    if not math.isfinite(b):
        raise ValueError(f"b must be finite, got {b}")
    outputs, labels, valid = rows(
        logits, targets, weight=weight, ignore_index=ignore_index, reduction=reduction
    )
    centred = outputs - outputs.mean(1, keepdim=True)
    # equal logits, up to rounding: guarded before the root, whose derivative is infinite at 0
    rounding = 4 * torch.finfo(outputs.dtype).eps * outputs.detach().abs().amax(1)
    flat = centred.detach().abs().amax(1) <= rounding
    variance = centred.square().mean(1)
    deviation = torch.where(flat, 1.0, variance).sqrt()
    score = centred.gather(1, labels.unsqueeze(1)).squeeze(1) / deviation
    losses = F.softplus(a * (b - score)) / a
    return reduce_rows(losses, labels, valid, targets.shape, weight=weight, reduction=reduction)


def taylor_softmax_nll(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    """Negative log-likelihood of the Taylor softmax (de Brébisson and Vincent 2015): exp cut after its second-order term.

    The polynomial 1 + o + o^2/2 is at least 1/2, so the probabilities are positive; but it falls until o = -1 and rises
    again below, so a very negative logit has a large probability.

    At a glance:
        formula: `log(sum_k t(z_k)) - log t(z_y)`, t(z) = 1 + z + z^2 / 2
        gradient: `(1 + z) / sum_k t(z_k) - e_y (1 + z_y) / t(z_y)`
        consistency: a log-likelihood of p = t(z) / sum t, so p is the label distribution where z can reach it; z and -2 - z
            give the same p, so the order of the logits need not be that of p
        cost: `O(C)` per row, `O(d^2)` in `SphericalOutput`; the polynomial is stored

    Args:
        logits: as for `z_loss`.
        targets: as for `z_loss`.
        weight: of each class, (C,).
        ignore_index: targets that have no loss and no gradient.
        reduction: `"mean"`, `"sum"` or `"none"`.

    Returns:
        A scalar, or losses of the shape of `targets`.

    Raises:
        TypeError: as `z_loss`.
        ValueError: shapes that do not fit, targets out of range, an unknown reduction.
    """
    outputs, labels, valid = rows(
        logits, targets, weight=weight, ignore_index=ignore_index, reduction=reduction
    )
    polynomial = ((1 + outputs).square() + 1) / 2  # 1 + o + o^2/2 without its cancellation near o = -1
    losses = _log_share(polynomial, labels)
    return reduce_rows(losses, labels, valid, targets.shape, weight=weight, reduction=reduction)


def spherical_softmax_nll(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    eps: float = 1e-2,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    """Negative log-likelihood of the spherical softmax (Vincent et al. 2015): squares in place of exponentials.

    It does not see the signs of the logits: predict by the largest absolute value.

    At a glance:
        formula: `log(sum_k (z_k^2 + eps)) - log(z_y^2 + eps)`
        gradient: `2 z / sum_k (z_k^2 + eps) - 2 e_y z_y / (z_y^2 + eps)`
        consistency: a log-likelihood of p = (z^2 + eps) / sum, so p is the label distribution where z can reach it; ranks by
            the absolute value of the logits
        cost: `O(C)` per row, `O(d^2)` in `SphericalOutput`; the squares are stored

    Args:
        logits: as for `z_loss`.
        targets: as for `z_loss`.
        eps: added to every square, above 0; it keeps the logarithm finite at 0.
        weight: of each class, (C,).
        ignore_index: targets that have no loss and no gradient.
        reduction: `"mean"`, `"sum"` or `"none"`.

    Returns:
        A scalar, or losses of the shape of `targets`.

    Raises:
        TypeError: as `z_loss`.
        ValueError: shapes that do not fit, targets out of range, an `eps` that is not above 0, an unknown reduction.
    """
    _check_positive("eps", eps)
    outputs, labels, valid = rows(
        logits, targets, weight=weight, ignore_index=ignore_index, reduction=reduction
    )
    losses = _log_share(outputs.square() + eps, labels)
    return reduce_rows(losses, labels, valid, targets.shape, weight=weight, reduction=reduction)


def _log_share(positive, labels):
    """log(sum_k positive_k) - log positive_y of each row."""
    own = positive.gather(1, labels.unsqueeze(1)).squeeze(1)
    return positive.sum(1).log() - own.log()


def _check_positive(name, value):
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be finite and above 0, got {value}")
