"""Cauchy-Schwarz divergence between samples, conditional divergence, quadratic mutual information, and HSIC.

Everything is a sum of products of Gaussian kernels, and a product of Gaussian kernels is one Gaussian kernel on the
joined coordinates, each divided by its width. So everything here but HSIC is `gaussian_logsumexp`: in logarithms, which
cannot underflow, and without a matrix of all pairs. HSIC is small differences of kernels, which it takes in blocks of rows,
computed anew for the gradient, so without that matrix too. Source: Yu, Yu, Loekse, Jenssen and Principe,
"Cauchy-Schwarz Divergence Information Bottleneck for Regression" (arXiv 2404.17951).
"""

import math

import torch

from lib.information.mixture import _check_points, _in_blocks, gaussian_logsumexp

DENOMINATORS = ("squared_sum", "released")


def gaussian_gram(x: torch.Tensor, y: torch.Tensor | None = None, sigma: float = 1.0) -> torch.Tensor:
    """The matrix `exp(-|x_i - y_j|^2 / (2 sigma^2))` of all pairs, with an exact 1 where points coincide.

    Args:
        x: points, (n, d).
        y: points, (m, d); `x` itself by default.
        sigma: width of the kernel, > 0, in the units of the points.

    Returns:
        (n, m), without a unit, differentiable in `x` and `y`.

    Raises:
        TypeError: `x` or `y` is not a floating-point tensor.
        ValueError: they are not (n, d) and (m, d) with n, m >= 1, or the width is not positive.
    """
    y = x if y is None else y
    _check(sigma, x=x, y=y)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x and y must have the same d, got {tuple(x.shape)} and {tuple(y.shape)}")
    return _gram(x, y, sigma)


def cs_divergence(
    x: torch.Tensor, y: torch.Tensor, sigma: float = 1.0, *, impl: str = "auto"
) -> torch.Tensor:
    """Cauchy-Schwarz divergence between the laws of two samples: `log mean K_xx + log mean K_yy - 2 log mean K_xy`.

    It is exactly the divergence of the two kernel density estimates with kernels of variance `sigma^2 / 2`; of the laws it
    is the divergence after both are blurred by that kernel, up to a bias of order 1/n from each point's kernel with itself.
    Symmetric, at least 0, and 0 for equal samples.

    Args:
        x: sample of the first law, (n, d).
        y: sample of the second, (m, d); n and m may differ.
        sigma: width of the kernel, > 0, the same for both.
        impl: as `gaussian_logsumexp`.

    Returns:
        A scalar in nats, differentiable in `x` and `y`.

    Raises:
        TypeError, ValueError: as `gaussian_gram`.
    """
    _check(sigma, x=x, y=y)
    within = _log_mean(gaussian_logsumexp(x, variance=sigma**2, impl=impl), len(x))
    within = within + _log_mean(gaussian_logsumexp(y, variance=sigma**2, impl=impl), len(y))
    return within - 2 * _log_mean(gaussian_logsumexp(x, y, variance=sigma**2, impl=impl), len(y))


def conditional_cs(
    x: torch.Tensor,
    y: torch.Tensor,
    y_pred: torch.Tensor,
    sigma_x: float = 1.0,
    sigma_y: float = 1.0,
    denominator: str = "squared_sum",
    *,
    impl: str = "auto",
) -> torch.Tensor:
    """Cauchy-Schwarz divergence between p(y|x) and the law of the predictions given the same x, from pairs.

    With K = k(x, x) and the mean over rows j of `sum_i K_ji k(a_j, b_i) / (sum_i K_ji)^2` written as m(a, b), it is
    `log m(y, y) + log m(y_pred, y_pred) - 2 log m(y_pred, y)`. Zero for `y_pred = y`. It is not bounded below by zero:
    the weights belong to one point of each pair only. For a width sigma_x that separates all inputs it becomes
    `-2 log mean_j k(y_j, y_pred_j)`, the correntropy loss; for a very large one, `cs_divergence(y, y_pred)`, which does
    not see which prediction belongs to which target.

    Args:
        x: inputs, (n, d_x).
        y: targets, (n, d_y).
        y_pred: predictions, (n, d_y).
        sigma_x: width of the kernel of inputs, > 0.
        sigma_y: width of the kernel of targets and predictions, > 0.
        denominator: `"squared_sum"` is (sum_i K_ji)^2, as derived; `"released"` is sum_i K_ji^2, as in the published code.
        impl: as `gaussian_logsumexp`.

    Returns:
        A scalar in nats, differentiable in all three.

    Raises:
        TypeError: something is not a floating-point tensor.
        ValueError: shapes that do not fit together, a width that is not positive, or an unknown denominator.
    """
    _check(sigma_x, x=x, y=y, y_pred=y_pred)
    _check(sigma_y)
    if y.shape != y_pred.shape or len(x) != len(y):
        raise ValueError(
            f"y and y_pred must have one shape and a row for each of x, got {tuple(x.shape)}, {tuple(y.shape)} and {tuple(y_pred.shape)}"
        )
    if denominator not in DENOMINATORS:
        raise ValueError(f"denominator must be one of {DENOMINATORS}, got {denominator!r}")
    if denominator == "squared_sum":
        weight = 2 * gaussian_logsumexp(x, variance=sigma_x**2, impl=impl)
    else:  # the square of a Gaussian kernel is one of half the variance
        weight = gaussian_logsumexp(x, variance=sigma_x**2 / 2, impl=impl)
    true = torch.cat([x / sigma_x, y / sigma_y], 1)
    predicted = torch.cat([x / sigma_x, y_pred / sigma_y], 1)
    terms = [
        (gaussian_logsumexp(a, b, impl=impl) - weight).logsumexp(0)
        for a, b in ((true, true), (predicted, predicted), (predicted, true))
    ]
    return terms[0] + terms[1] - 2 * terms[2]


def cs_qmi(
    x: torch.Tensor,
    t: torch.Tensor,
    sigma_x: float = 1.0,
    sigma_t: float = 1.0,
    normalised: bool = False,
    base: float = math.e,
    *,
    impl: str = "auto",
) -> torch.Tensor:
    """Quadratic mutual information: the Cauchy-Schwarz divergence between p(x, t) and p(x) p(t), from pairs.

    It is at least 0, near 0 for independent variables, and symmetric, but it is NOT Shannon's mutual information: it obeys no
    chain rule and no data processing inequality, and it depends on both widths: a very small pair gives log n, a large one 0.
    Scaling `t` is the same as scaling `sigma_t` the other way. For jointly Gaussian variables it has a closed form that
    differs from Shannon's -1/2 log(1 - r^2).

    Args:
        x: (n, d_x).
        t: (n, d_t), row i belonging to row i of `x`.
        sigma_x: width of the kernel of `x`, > 0.
        sigma_t: width of the kernel of `t`, > 0.
        normalised: divide by `sqrt(I(x; x) I(t; t))`, which has no unit and no base; it is 1
            for `t = x` with one width, but can be above 1 otherwise.
        base: of the logarithm: e for nats, 2 for bits.
        impl: as `gaussian_logsumexp`.

    Returns:
        A scalar in units of log `base`, or without a unit if normalised; differentiable. A constant variable has
        information 0, also normalised.

    Raises:
        TypeError: `x` or `t` is not a floating-point tensor.
        ValueError: shapes that do not fit together, a width that is not positive, or a base not above 1.
    """
    _check(sigma_x, x=x, t=t)
    _check(sigma_t)
    if len(x) != len(t):
        raise ValueError(f"x and t must have as many rows, got {tuple(x.shape)} and {tuple(t.shape)}")
    if not (math.isfinite(base) and base > 1):
        raise ValueError(f"base must be a number above 1, got {base}")
    rows_x, rows_t = (
        gaussian_logsumexp(points, variance=width**2, impl=impl)
        for points, width in ((x, sigma_x), (t, sigma_t))
    )
    joint = gaussian_logsumexp(torch.cat([x / sigma_x, t / sigma_t], 1), impl=impl)
    information = _qmi(joint, rows_x, rows_t)
    if not normalised:
        return information / math.log(base)
    # k(x, x) k(x, x) is the kernel of half the variance
    own = [
        _qmi(gaussian_logsumexp(points, variance=width**2 / 2, impl=impl), rows, rows)
        for points, width, rows in ((x, sigma_x, rows_x), (t, sigma_t, rows_t))
    ]
    return _normalised(information, *own)


def hsic(
    x: torch.Tensor,
    t: torch.Tensor,
    sigma_x: float = 1.0,
    sigma_t: float = 1.0,
    normalised: bool = False,
) -> torch.Tensor:
    """Hilbert-Schmidt independence criterion `tr(K H Q H) / n^2` with Gaussian kernels, H the centring matrix.

    The squared distance, where `cs_qmi` is the logarithm of a ratio, between the same two laws. In blocks of rows.

    Args:
        x: (n, d_x).
        t: (n, d_t), row i belonging to row i of `x`.
        sigma_x: width of the kernel of `x`, > 0.
        sigma_t: width of the kernel of `t`, > 0.
        normalised: divide by `sqrt(HSIC(x, x) HSIC(t, t))`: centred kernel alignment, in [0, 1].

    Returns:
        A scalar without a unit, differentiable; 0 for a constant variable, also normalised.

    Raises:
        TypeError: `x` or `t` is not a floating-point tensor.
        ValueError: shapes that do not fit together, or a width that is not positive.
    """
    _check(sigma_x, x=x, t=t)
    _check(sigma_t)
    if len(x) != len(t):
        raise ValueError(f"x and t must have as many rows, got {tuple(x.shape)} and {tuple(t.shape)}")
    # the means of the rows first, then, block by block, what is left without them: a small difference of large sums otherwise
    means = [
        torch.cat(
            _in_blocks(
                lambda rows, points, sigma: _gram(rows, points, sigma).mean(1), (points,), points, sigma
            )
        )
        for points, sigma in ((x, sigma_x), (t, sigma_t))
    ]
    options = (sigma_x, sigma_t, normalised)
    parts = _in_blocks(_centred_products, (x, t, *means), x, t, *means, *options)
    value, *own = torch.stack(parts).sum(0) / len(x) ** 2
    return _normalised(value, *own) if normalised else value


def _centred_products(
    x, t, row_x, row_t, all_x, all_t, mean_x, mean_t, sigma_x, sigma_t, own
) -> torch.Tensor:
    """Sum over a block of rows of the product of the two centred kernels, and with `own` of their squares."""
    K = _gram(x, all_x, sigma_x) - mean_x - row_x[:, None] + mean_x.mean()
    Q = _gram(t, all_t, sigma_t) - mean_t - row_t[:, None] + mean_t.mean()
    return torch.stack([(a * b).sum() for a, b in (((K, Q), (K, K), (Q, Q)) if own else ((K, Q),))])


def _gram(x: torch.Tensor, y: torch.Tensor, sigma: float) -> torch.Tensor:
    distance = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    return (distance.square() / (-2 * sigma**2)).exp()


def _qmi(joint: torch.Tensor, rows_x: torch.Tensor, rows_t: torch.Tensor) -> torch.Tensor:
    """Log of tr(KQ) (1'K1)(1'Q1) / (1'KQ1)^2 from logarithms of row sums; the powers of n cancel."""
    return joint.logsumexp(0) + rows_x.logsumexp(0) + rows_t.logsumexp(0) - 2 * (rows_x + rows_t).logsumexp(0)


def _normalised(value: torch.Tensor, own_x: torch.Tensor, own_t: torch.Tensor) -> torch.Tensor:
    """Divided by the geometric mean; 0, with gradient 0, where a variable is constant up to rounding."""
    rounding = 16 * torch.finfo(value.dtype).eps
    usable = (own_x > rounding) & (own_t > rounding)
    scale = torch.where(usable, own_x, 1.0) * torch.where(usable, own_t, 1.0)
    return torch.where(usable, value, 0.0) / scale.sqrt()


def _log_mean(rows: torch.Tensor, columns: int) -> torch.Tensor:
    return rows.logsumexp(0) - math.log(len(rows) * columns)


def _check(sigma: float, **points: torch.Tensor) -> None:
    for name, value in points.items():
        _check_points(value, name)
    if not (math.isfinite(sigma) and sigma > 0):
        raise ValueError(f"the width must be a positive number, got {sigma}")
