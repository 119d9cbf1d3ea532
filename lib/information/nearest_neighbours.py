"""Differential entropy and mutual information of samples, by nearest neighbours and kernels. All values are in nats."""

import math

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.spatial import cKDTree
from scipy.special import digamma, gammaln
from sklearn.metrics import mutual_info_score

METHODS = ("kl", "ksg", "kde")


def kl_weights(k: int, dim: int) -> np.ndarray:
    """Weights of the first k neighbours that remove the leading biases of the Kozachenko-Leonenko estimate.

    The estimate from the j-th neighbour has biases in proportion to Gamma(j + 2 l / d) / Gamma(j) for l = 1, 2, ...; those with
    l <= d / 4 do not vanish faster than the standard error. The weights sum to one and cancel them:
    sum_j w_j Gamma(j + 2 l / d) / Gamma(j) = 0 for l = 1..floor(d / 4) (Berrett, Samworth, Yuan 2019). Among all such weights
    these have the smallest sum of squares. Below four dimensions that is 1 / k each; above, some are negative.

    Args:
        k: how many neighbours, at least 1 + floor(dim / 4).
        dim: of the points.

    Returns:
        Weights (k,), float64.

    Raises:
        ValueError: too few neighbours for the conditions, or a dimension below 1.
    """
    terms = dim // 4
    if dim < 1 or k < 1 + terms:
        raise ValueError(f"in {dim} dimensions the weights need at least {1 + terms} neighbours, got {k}")
    j = np.arange(1, k + 1)
    conditions = np.stack([np.exp(gammaln(j + 2 * l / dim) - gammaln(j)) for l in range(terms + 1)])
    return np.linalg.pinv(conditions)[:, 0]  # the condition l = 0 is that they sum to one


def kl_entropy(
    x, k: int = 5, *, weighted: bool = True, rescale: bool = True, jitter: float = 0.0
) -> tuple[float, float]:
    """Differential entropy in nats by distances to the nearest neighbours (Kozachenko, Leonenko 1987).

    h = (1 / N) sum_i log((N - 1) V_d r_ij^d) - psi(j) with r_ij the distance to the j-th neighbour and V_d the volume of the unit
    ball; averaged over j = 1..k with `kl_weights`, or for j = k alone.

    Args:
        x: samples (N, d), or (N,) for d = 1; tensor or array.
        k: neighbours; N must be larger.
        weighted: all neighbours up to the k-th, weighted, instead of the k-th alone.
        rescale: make the covariance the unit matrix first and add log det of what was divided out: the same quantity,
            estimated with less bias where coordinates have different scales or are correlated.
        jitter: standard deviation of noise that is added to the (rescaled) points. Points that repeat have distance 0, whose
            logarithm is infinite; 1e-10 then gives a finite number, which says little: repeated points have no density.

    Returns:
        The entropy and its standard error, both in nats. The error is that of a mean of N terms; it knows nothing of the bias.

    Raises:
        ValueError: another shape, numbers that are not finite, too few points, a covariance that is singular, or repeated
            points without `jitter`.
    """
    return _summary(_kl_terms(_points(x), k, weighted, rescale, jitter))


def kde_entropy(x, bandwidth: float | None = None, *, rescale: bool = True) -> tuple[float, float]:
    """Differential entropy in nats by a Gaussian kernel density, each point left out of its own.

    h = -(1 / N) sum_i log p_{-i}(x_i). The bandwidth maximises that likelihood unless it is given. Time and memory O(N^2).

    Args:
        x: samples (N, d), or (N,) for d = 1; tensor or array.
        bandwidth: the kernel's standard deviation, in units of the rescaled points.
        rescale: as in `kl_entropy`.

    Returns:
        The entropy and its standard error, both in nats.

    Raises:
        ValueError: as `kl_entropy`, or a bandwidth that is not positive.
    """
    return _summary(_kde_terms(_points(x), bandwidth, rescale))


def mutual_information(
    x,
    y,
    *,
    method: str = "kl",
    k: int = 5,
    x_discrete: bool = False,
    y_discrete: bool = False,
    weighted: bool = True,
    rescale: bool = True,
    jitter: float = 0.0,
) -> tuple[float, float]:
    """Mutual information of samples in nats, with its standard error.

    Two continuous variables: `"kl"` and `"kde"` are h(x) + h(y) - h(x, y) with `kl_entropy` and `kde_entropy`; `"ksg"` finds
    the k-th neighbour in the joint space by the largest difference of any coordinate, and counts how many points of x and of y
    are nearer (Kraskov, Stoegbauer, Grassberger 2004, estimator 1), psi(k) + psi(N) - <psi(n_x + 1) + psi(n_y + 1)>.

    One discrete variable: `"kl"` and `"kde"` are h(x) - sum_y p(y) h(x | y), fitted again in each class; `"ksg"` is its
    counterpart by Ross (2014), in which a class with a single point is left out. Two discrete variables: the counts.

    The terms of h(x), h(y) and h(x, y) are paired sample by sample before the error is computed. It measures the spread of
    their mean alone: the bias, which prevails in many dimensions, is not in it. Estimates may be negative.

    Args:
        x: samples (N, d_x) or (N,); tensor or array; integers or labels (N,) if `x_discrete`.
        y: samples (N, d_y) or (N,), row by row those of x; labels (N,) if `y_discrete`.
        method: "kl", "ksg" or "kde".
        k: neighbours; each class needs more points than that (but for "ksg").
        x_discrete: whether x holds labels.
        y_discrete: whether y holds labels.
        weighted: of "kl", see `kl_entropy`.
        rescale: of "kl" and "kde", see `kl_entropy`. For "ksg" every coordinate is divided by its standard deviation.
        jitter: of "kl", see `kl_entropy`.

    Returns:
        Information and standard error, both in nats.

    Raises:
        ValueError: an unknown method, different lengths, or what `kl_entropy` refuses.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if len(x) != len(y):
        raise ValueError(f"x and y must have one length, got {len(x)} and {len(y)}")
    if x_discrete and not y_discrete:  # information is symmetric
        x, y, x_discrete, y_discrete = y, x, False, True
    if x_discrete:
        return _counted(_labels(x), _labels(y))
    x = _points(x)
    if method == "ksg":
        return _summary(_ross(x, _labels(y), k, rescale) if y_discrete else _ksg(x, _points(y), k, rescale))

    def terms(points):
        if method == "kde":
            return _kde_terms(points, None, rescale)
        return _kl_terms(points, k, weighted, rescale, jitter)

    if y_discrete:
        labels = _labels(y)
        inside = np.empty(len(x))
        for label in np.unique(labels):
            own = labels == label
            inside[own] = terms(x[own])
        return _summary(terms(x) - inside)
    y = _points(y)
    return _summary(terms(x) + terms(y) - terms(np.hstack([x, y])))


def _kl_terms(x, k, weighted, rescale, jitter):
    n, dim = x.shape
    if not 1 <= k < n:
        raise ValueError(f"k must be between 1 and the number of points less one, got {k} for {n} points")
    x, log_det = _whiten(x) if rescale else (x, 0.0)
    if jitter:
        x = x + jitter * np.random.default_rng(0).standard_normal(x.shape)
    distance = cKDTree(x).query(x, k + 1)[0][:, 1:]  # (n, k), without the point itself
    if not distance[:, 0 if weighted else -1].all():
        raise ValueError(
            "points repeat, so there is no density: remove repeated rows, name the variable discrete, or pass jitter=1e-10"
        )
    if weighted:
        weights, order = kl_weights(k, dim), np.arange(1, k + 1)
    else:
        weights, order, distance = np.ones(1), np.array([k]), distance[:, -1:]
    log_ball = dim / 2 * math.log(math.pi) - gammaln(dim / 2 + 1)
    return (dim * np.log(distance) + math.log(n - 1) + log_ball - digamma(order)) @ weights + log_det


def _kde_terms(x, bandwidth, rescale):
    n, dim = x.shape
    if n < 2:
        raise ValueError("a kernel density needs at least two points")
    if bandwidth is not None and not bandwidth > 0:
        raise ValueError(f"bandwidth must be positive, got {bandwidth}")
    x, log_det = _whiten(x) if rescale else (x, 0.0)
    points = torch.from_numpy(np.ascontiguousarray(x))
    squared = torch.cdist(points, points).square().fill_diagonal_(torch.inf)  # leaves each point out

    def log_density(width):
        kernels = torch.logsumexp(squared / (-2 * width**2), 1)
        return kernels - math.log(n - 1) - dim * (math.log(width) + math.log(2 * math.pi) / 2)

    if bandwidth is None:
        best = minimize_scalar(
            lambda log_width: -log_density(math.exp(log_width)).mean().item(),
            bounds=(-5, 1),
            method="bounded",
            options={"xatol": 0.05},
        )
        bandwidth = math.exp(best.x)
    return -log_density(bandwidth).numpy() + log_det


def _ksg(x, y, k, rescale):
    n = len(x)
    if not 1 <= k < n:
        raise ValueError(f"k must be between 1 and the number of points less one, got {k} for {n} points")
    if rescale:
        x, y = _unit(x), _unit(y)
    joint = np.hstack([x, y])
    radius = np.nextafter(cKDTree(joint).query(joint, k + 1, p=np.inf)[0][:, -1], 0)  # strictly nearer
    near = [cKDTree(z).query_ball_point(z, radius, p=np.inf, return_length=True) for z in (x, y)]
    # the counts hold the point itself: n_x + 1
    return digamma(k) + digamma(n) - digamma(near[0]) - digamma(near[1])


def _ross(x, labels, k, rescale):
    if rescale:
        x = _unit(x)
    radius, own_size, own_k = np.zeros(len(x)), np.zeros(len(x)), np.zeros(len(x))
    for label in np.unique(labels):
        own = labels == label
        size = int(own.sum())
        use = min(k, size - 1)
        if use:
            radius[own] = np.nextafter(cKDTree(x[own]).query(x[own], use + 1, p=np.inf)[0][:, -1], 0)
            own_size[own], own_k[own] = size, use
    used = own_k > 0
    x, radius = x[used], radius[used]
    if not len(x):
        raise ValueError("no class has two points")
    near = cKDTree(x).query_ball_point(x, radius, p=np.inf, return_length=True)
    return digamma(len(x)) + digamma(own_k[used]) - digamma(own_size[used]) - digamma(near)


def _counted(x, y):
    pairs, inverse, joint = np.unique(np.stack([x, y]), axis=1, return_inverse=True, return_counts=True)
    sizes = [dict(zip(*np.unique(z, return_counts=True), strict=True)) for z in (x, y)]
    ratio = [n * len(x) / (sizes[0][a] * sizes[1][b]) for n, a, b in zip(joint, *pairs, strict=True)]
    error = np.log(ratio)[inverse.ravel()].std() / math.sqrt(len(x))
    return float(mutual_info_score(x, y)), float(error)


def _whiten(x):
    """Points with unit covariance, and log det of the matrix that was divided out."""
    x = x - x.mean(0)
    values, vectors = np.linalg.eigh(np.atleast_2d(np.cov(x, rowvar=False)))
    if values[0] <= 1e-12 * values[-1] or values[-1] == 0:
        raise ValueError(
            "the covariance is singular: the points lie in fewer dimensions, where they have no density; compress them first"
        )
    return x @ (vectors / np.sqrt(values)), 0.5 * float(np.log(values).sum())


def _unit(x):
    deviation = x.std(0)
    return x / np.where(deviation > 0, deviation, 1.0)


def _summary(terms):
    return float(terms.mean()), float(terms.std() / math.sqrt(len(terms)))


def _points(x):
    x = x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)
    if x.dtype.kind not in "fiu":
        raise TypeError(f"samples must be real numbers, got {x.dtype}")
    x = x.astype(np.float64)
    x = x[:, None] if x.ndim == 1 else x
    if x.ndim != 2 or len(x) < 2 or not x.shape[1]:
        raise ValueError(f"samples must have shape (N, d) or (N,) with N >= 2, got {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError(
            f"samples must be finite; {int((~np.isfinite(x)).any(1).sum())} of {len(x)} rows are not"
        )
    return x


def _labels(y):
    y = y.detach().cpu().numpy() if isinstance(y, torch.Tensor) else np.asarray(y)
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1:
        raise ValueError(f"a discrete variable must have shape (N,), got {y.shape}")
    return np.unique(y, return_inverse=True)[1]
