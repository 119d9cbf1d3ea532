"""Mixtures of equal Gaussians: pairwise sums of kernels without the n x n matrix, bounds on entropy, information.

Sums and entropies are in nats and differentiable; `akde_mi`, the measurement, is in bits. Bounds: Kolchinsky and Tracey,
"Estimating Mixture Entropy with Pairwise Distances" (2017). Use for layers: Chelombiev, Houghton and O'Donnell, "Adaptive
Estimators Show Information Compression in Deep Neural Networks" (arXiv 1902.09037).
"""

import math

import torch
from torch.utils.checkpoint import checkpoint

BOUNDS = ("upper", "lower", "mean")
BLOCK = 2**22  # pairs held at once


def gaussian_logsumexp(
    x: torch.Tensor, y: torch.Tensor | None = None, variance: float | torch.Tensor = 1.0
) -> torch.Tensor:
    """`log sum_j exp(-|x_i - y_j|^2 / (2 variance))` for every row i, in blocks of rows.

    Neither the forward nor the backward pass holds more than some four million pairs at once: each block is computed anew
    for its gradient. Differences are taken before they are squared, so that coinciding points are at distance 0 exactly,
    however small the variance.

    Args:
        x: points, (n, d).
        y: points, (m, d); `x` itself by default.
        variance: of the kernel in every dimension, > 0; a number or a scalar tensor, which may need a gradient.

    Returns:
        (n,), in nats, in the dtype of `x`; differentiable in `x`, `y` and `variance`.

    Raises:
        TypeError: `x` or `y` is not a floating-point tensor.
        ValueError: they are not (n, d) and (m, d) with n, m >= 1, or the variance is not positive.
    """
    y = x if y is None else y
    for name, points in (("x", x), ("y", y)):
        _check_points(points, name)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x and y must have the same d, got {tuple(x.shape)} and {tuple(y.shape)}")
    _check_variance(variance)
    again = torch.is_grad_enabled() and any(
        isinstance(value, torch.Tensor) and value.requires_grad for value in (x, y, variance)
    )
    blocks = x.split(max(1, BLOCK // len(y)))
    if again and len(blocks) > 1:
        return torch.cat(
            [checkpoint(_one_block, block, y, variance, use_reentrant=False) for block in blocks]
        )
    return torch.cat([_one_block(block, y, variance) for block in blocks])


def mixture_entropy_bounds(
    points: torch.Tensor, variance: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lower and upper bound on the differential entropy, in nats, of the mixture of Gaussians around `points`.

    `upper = d/2 - mean_i log((1/n) sum_j N(t_i; t_j, variance))`, from Kullback-Leibler divergences of the components.
    `lower` is the same with four times the variance inside the exponential, from their Bhattacharyya distances.
    Both are equal to the entropy when all points coincide and, up to what still overlaps, when all are far apart.

    Args:
        points: centres of equal weight, (n, d).
        variance: of each Gaussian in every dimension, > 0.

    Returns:
        Two scalars (lower, upper), differentiable.

    Raises:
        TypeError, ValueError: as `gaussian_logsumexp`.
    """
    n_log = math.log(len(points)) if isinstance(points, torch.Tensor) and len(points) else 0.0
    upper = n_log - gaussian_logsumexp(points, variance=variance).mean()
    lower = n_log - gaussian_logsumexp(points, variance=4 * variance).mean()
    noise = points.shape[1] / 2 * (torch.log(2 * math.pi * torch.as_tensor(variance, dtype=points.dtype)) + 1)
    return lower + noise, upper + noise


def akde_mi(
    layer: torch.Tensor,
    labels: torch.Tensor,
    scale: float = 1e-3,
    bound: str = "upper",
    variance: float | None = None,
) -> tuple[float, float]:
    """I(X;T) and I(T;Y), in bits, of a layer with Gaussian noise whose variance follows the layer's activity.

    Every row is another, equally likely input; T is its activity plus noise of variance `scale * max |layer|` in every
    neuron. I(X;T) = H(T) - H(noise), at most log2 n, and I(T;Y) = H(T) - sum_y p(y) H(T|y). The entropies are the
    bounds of `mixture_entropy_bounds`. The variance is linear in the activity, not quadratic, so that doubling a layer
    does change the result.

    Args:
        layer: activity, (n, d) or (n, ...). Computed in float64.
        labels: of the rows, (n,), of a discrete type.
        scale: variance of the noise for a maximal activity of 1.
        bound: `"upper"`, `"lower"`, or `"mean"` of the two. For I(X;T) the first two are bounds as well; for I(T;Y),
            a difference of two of them, they are not.
        variance: of the noise, instead of the adaptive one: the older estimator, or a layer with known noise.

    Raises:
        TypeError: the layer is not a floating-point tensor, or labels are not of a discrete type.
        ValueError: sizes do not fit together, the layer is not finite, or an argument is out of its range.
    """
    if isinstance(layer, torch.Tensor) and layer.ndim > 2:
        layer = layer.flatten(1)
    _check_points(layer, "layer")
    if not layer.isfinite().all():
        raise ValueError("layer must be finite")
    if bound not in BOUNDS:
        raise ValueError(f"bound must be one of {BOUNDS}, got {bound!r}")
    labels = torch.as_tensor(labels, device=layer.device)
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"labels must be of a discrete type, got {labels.dtype}")
    if labels.shape != (len(layer),):
        raise ValueError(f"labels must have shape ({len(layer)},), got {tuple(labels.shape)}")
    points = layer.detach().double()
    if variance is None:
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale must be a positive number, got {scale}")
        variance = scale * float(points.abs().max())
        if variance == 0:
            return 0.0, 0.0  # all zero: one place, and nothing to know
    _check_variance(variance)

    def information(rows: torch.Tensor) -> float:
        """Of the rows and the inputs: the entropy minus that of the noise, in bits."""
        factors = {"upper": (1,), "lower": (4,), "mean": (1, 4)}[bound]
        values = [math.log(len(rows)) - float(gaussian_logsumexp(rows, variance=factor * variance).mean()) for factor in factors]  # fmt: skip
        return sum(values) / len(values) / math.log(2)

    whole = information(points)
    within = sum(
        float((labels == label).sum()) / len(points) * information(points[labels == label])
        for label in labels.unique()
    )
    return whole, whole - within


def _one_block(x: torch.Tensor, y: torch.Tensor, variance) -> torch.Tensor:
    distance = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    return (distance.square() / (-2 * variance)).logsumexp(1)


def _check_points(points: torch.Tensor, name: str) -> None:
    if not isinstance(points, torch.Tensor) or not points.is_floating_point():
        got = points.dtype if isinstance(points, torch.Tensor) else type(points).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {got}")
    if points.ndim != 2 or not points.numel():
        raise ValueError(f"{name} must have shape (n, d) with n, d >= 1, got {tuple(points.shape)}")


def _check_variance(variance) -> None:
    if isinstance(variance, torch.Tensor) and variance.ndim:
        raise ValueError(f"variance must be one number, got a tensor of shape {tuple(variance.shape)}")
    value = float(variance.detach() if isinstance(variance, torch.Tensor) else variance)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"variance must be a positive number, got {value}")
