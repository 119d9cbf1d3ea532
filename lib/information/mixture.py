"""Mixtures of equal Gaussians: pairwise sums of kernels without the n x n matrix, bounds on entropy, information.

Sums and entropies are in nats and differentiable; `akde_mi`, the measurement, is in bits. Bounds: Kolchinsky and Tracey,
"Estimating Mixture Entropy with Pairwise Distances" (2017). Use for layers: Chelombiev, Houghton and O'Donnell, "Adaptive
Estimators Show Information Compression in Deep Neural Networks" (arXiv 1902.09037).
"""

import math

import torch
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from lib.backend import choose_impl

BOUNDS = ("upper", "lower", "mean")
BLOCK = 2**22  # pairs held at once
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def gaussian_logsumexp(
    x: torch.Tensor,
    y: torch.Tensor | None = None,
    variance: float | torch.Tensor = 1.0,
    *,
    impl: str = "auto",
) -> torch.Tensor:
    """`log sum_j exp(-|x_i - y_j|^2 / (2 variance))` for every row i, without a matrix of all pairs.

    In blocks of rows, neither the forward nor the backward pass holds more than some four million pairs at once: each block
    is computed anew for its gradient. Differences are taken before they are squared, so that coinciding points are at distance 0 exactly,
    however small the variance.

    Args:
        x: points, (n, d).
        y: points, (m, d); `x` itself by default.
        variance: of the kernel in every dimension, > 0; a number or a scalar tensor, which may need a gradient.
        impl: `"torch"` holds all pairs; `"blockwise"` is the lean path in PyTorch; `"triton"` the kernel, which computes in
            float32 and is once differentiable; `"auto"` the kernel on CUDA, `"blockwise"` elsewhere and for float64.

    Returns:
        (n,), in nats, in the dtype of `x`; differentiable in `x`, `y` and `variance`.

    Raises:
        TypeError: `x` or `y` is not a floating-point tensor, or, for the kernel, not float32, bfloat16 or float16 both.
        ValueError: they are not (n, d) and (m, d) with n, m >= 1, the variance is not positive, or `impl` is unknown.
        RuntimeError: `impl="triton"` where Triton cannot be imported.
    """
    y = x if y is None else y
    for name, points in (("x", x), ("y", y)):
        _check_points(points, name)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x and y must have the same d, got {tuple(x.shape)} and {tuple(y.shape)}")
    number = _check_variance(variance)
    if impl == "auto" and not (x.dtype == y.dtype and x.dtype in KERNEL_DTYPES):
        impl = "blockwise"
    impl = choose_impl(impl, x, options=("torch", "blockwise", "triton"), cpu="blockwise")
    if impl == "triton":
        return _KernelSum.apply(x, y, variance, number)
    if impl == "torch":
        return _one_block(x, y, variance)
    return torch.cat(_in_blocks(_one_block, (x,), y, variance))


def mixture_entropy_bounds(
    points: torch.Tensor, variance: float | torch.Tensor, *, impl: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lower and upper bound on the differential entropy, in nats, of the mixture of Gaussians around `points`.

    `upper = d/2 - mean_i log((1/n) sum_j N(t_i; t_j, variance))`, from Kullback-Leibler divergences of the components.
    `lower` is the same with four times the variance inside the exponential, from their Bhattacharyya distances.
    Both are equal to the entropy when all points coincide and, up to what still overlaps, when all are far apart.

    Args:
        points: centres of equal weight, (n, d).
        variance: of each Gaussian in every dimension, > 0.
        impl: as `gaussian_logsumexp`.

    Returns:
        Two scalars (lower, upper), differentiable.

    Raises:
        TypeError, ValueError: as `gaussian_logsumexp`.
    """
    n_log = math.log(len(points)) if isinstance(points, torch.Tensor) and len(points) else 0.0
    upper = n_log - gaussian_logsumexp(points, variance=variance, impl=impl).mean()
    lower = n_log - gaussian_logsumexp(points, variance=4 * variance, impl=impl).mean()
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


class _KernelSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, variance, number):
        from kernels.gaussian_kernel_sum import gaussian_kernel_sum_forward

        out = gaussian_kernel_sum_forward(x, y, number)
        ctx.save_for_backward(x, y, out)
        ctx.number = number
        ctx.like = variance.detach() if isinstance(variance, torch.Tensor) else None
        return out.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        from kernels.gaussian_kernel_sum import gaussian_kernel_sum_backward

        x, y, out = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        d_x, d_y, d_variance = gaussian_kernel_sum_backward(x, y, ctx.number, out, grad, needs=needs)
        if d_variance is not None:
            d_variance = d_variance.to(ctx.like)
        return d_x, d_y, d_variance, None


def _in_blocks(function, rows: tuple[torch.Tensor, ...], *whole) -> list:
    """`function(*rows, *whole)` for blocks of the rows with BLOCK pairs each; computed anew for its gradient.

    The first of `whole` has the columns.
    """
    parts = list(zip(*(each.split(max(1, BLOCK // len(whole[0]))) for each in rows), strict=True))
    again = torch.is_grad_enabled() and any(
        isinstance(value, torch.Tensor) and value.requires_grad for value in (*rows, *whole)
    )
    if again and len(parts) > 1:
        return [checkpoint(function, *part, *whole, use_reentrant=False) for part in parts]
    return [function(*part, *whole) for part in parts]


def _one_block(x: torch.Tensor, y: torch.Tensor, variance) -> torch.Tensor:
    distance = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    return (distance.square() / (-2 * variance)).logsumexp(1)


def _check_points(points: torch.Tensor, name: str) -> None:
    if not isinstance(points, torch.Tensor) or not points.is_floating_point():
        got = points.dtype if isinstance(points, torch.Tensor) else type(points).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {got}")
    if points.ndim != 2 or not points.numel():
        raise ValueError(f"{name} must have shape (n, d) with n, d >= 1, got {tuple(points.shape)}")


def _check_variance(variance) -> float:
    if isinstance(variance, torch.Tensor) and variance.ndim:
        raise ValueError(f"variance must be one number, got a tensor of shape {tuple(variance.shape)}")
    value = float(variance.detach() if isinstance(variance, torch.Tensor) else variance)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"variance must be a positive number, got {value}")
    return value
