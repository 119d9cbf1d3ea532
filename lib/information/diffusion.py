"""Spectral entropy of a data set: the eigenvalues of a random walk between its points, read as a distribution.

Points are rows of an array or a tensor; everything is computed in float64 on the tensor's device. Formulas: Liao, Liu
et al., "Assessing Neural Network Representations During Training Using Noise-Resilient Diffusion Spectral Entropy"
(arXiv 2312.04823). Cost: O(N^2 d) for the kernel, O(N^3) for its eigenvalues, 8 N^2 bytes.
"""

import math
import numbers
import warnings

import numpy as np
import torch

NORMALISATIONS = ("paper", "released")


def diffusion_operator(
    x, sigma: float, alpha: float = 0.5, symmetric: bool = True, normalisation: str = "paper"
) -> torch.Tensor:
    """The random walk between the rows of `x`, or a symmetric matrix with the same eigenvalues.

    With `G_ij = exp(-|x_i - x_j|^2 / (2 sigma^2))` and the row sums D of whatever they are the subscript of,

    - `"paper"`: `K = D_G^-alpha G D_G^-alpha` and `P = D_K^-1 K`; symmetric form `D_K^-1/2 K D_K^-1/2`;
    - `"released"`: what the authors' package takes the eigenvalues of, `D_G^-1/2 G D_G^-1/2`; it is the symmetric
      form of the walk `D_G^-1 G`, which has no anisotropic normalisation.

    Args:
        x: points, (N, d).
        sigma: bandwidth of the Gaussian kernel, in the units of `x`.
        alpha: exponent of the density normalisation; 0 leaves the sampling density in, 1 removes it.
        symmetric: whether to return the symmetric form (for `eigvalsh`) or the row-stochastic walk.
        normalisation: `"paper"` or `"released"`.

    Returns:
        (N, N), float64, on the device of `x`. Its eigenvalues lie in [0, 1] and the largest is 1.

    Raises:
        TypeError: `x` does not hold real numbers.
        ValueError: `x` is not (N, d) with N >= 1 and finite, sigma is not positive, alpha is not finite,
            the normalisation is unknown, or `"released"` comes with another alpha than 0.5.
    """
    x = _points(x)
    _positive(sigma, "sigma")
    if not math.isfinite(alpha):
        raise ValueError(f"alpha must be finite, got {alpha}")
    if normalisation not in NORMALISATIONS:
        raise ValueError(f"normalisation must be one of {NORMALISATIONS}, got {normalisation!r}")
    if normalisation == "released" and alpha != 0.5:
        raise ValueError(f"normalisation='released' has alpha = 0.5 built in, got {alpha}")
    kernel = torch.exp(_squared_distances(x) / (-2 * sigma**2))
    if normalisation == "paper":
        density = kernel.sum(1).pow(-alpha)
        kernel = density[:, None] * kernel * density
    degree = kernel.sum(1)
    if symmetric:
        root = degree.rsqrt()
        return root[:, None] * kernel * root
    return kernel / degree[:, None]


def spectrum(x, *, sigma: float, alpha: float = 0.5, normalisation: str = "paper") -> torch.Tensor:
    """The eigenvalues of `diffusion_operator`, largest first, (N,). Same arguments, same errors."""
    operator = diffusion_operator(x, sigma, alpha, normalisation=normalisation)
    return torch.linalg.eigvalsh(operator).flip(0)


def dse(
    x=None,
    *,
    sigma: float | None = None,
    t: float = 1,
    max_n: int | None = None,
    spectrum=None,
    base: float = 2,
    normalisation: str = "paper",
    generator: torch.Generator | None = None,
) -> float:
    """Diffusion spectral entropy: the entropy of `|eigenvalue|^t`, normalised to sum 1.

    It lies between 0 and log N, so only sets of equal size can be compared.

    Args:
        x: points, (N, d).
        sigma: bandwidth, in the units of `x`. Keep it fixed over whatever is to be compared.
        t: steps of the walk; more steps leave fewer, slower modes.
        max_n: use a random subset of so many points if there are more.
        spectrum: eigenvalues from `lib.information.spectrum`, instead of `x` and `sigma`, to read one spectrum at
            several t.
        base: of the logarithm; 2 gives bits.
        normalisation: as in `diffusion_operator`.
        generator: of the random subset, on the CPU.

    Raises:
        TypeError: `x` does not hold real numbers.
        ValueError: not exactly one of `x` and `spectrum`, no sigma for `x`, or a value out of its range.
    """
    if (x is None) == (spectrum is None):
        raise ValueError("give either x or spectrum")
    _positive(t, "t")
    _positive(base, "base")
    if base == 1:
        raise ValueError("base must not be 1")
    if spectrum is not None:
        eigenvalues = _eigenvalues(spectrum)
    else:
        if sigma is None:
            raise ValueError("dse of points needs sigma")
        x = _points(x)
        if max_n is not None:
            if max_n < 1:
                raise ValueError(f"max_n must be at least 1, got {max_n}")
            if len(x) > max_n:
                x = x[torch.randperm(len(x), generator=generator)[:max_n].to(x.device)]
        eigenvalues = torch.linalg.eigvalsh(diffusion_operator(x, sigma, normalisation=normalisation))
    magnitudes = eigenvalues.abs()  # rounding leaves eigenvalues of -1e-17
    weights = (magnitudes / magnitudes.max()).pow(t)  # the largest is 1: no underflow of the sum at large t
    share = weights / weights.sum()
    return float(-torch.xlogy(share, share).sum()) / math.log(base) + 0.0


def dsmi(
    a,
    b,
    *,
    sigma: float,
    t: float = 1,
    discrete: bool | None = None,
    n_clusters: int = 10,
    repeats: int = 5,
    clusters=None,
    base: float = 2,
    normalisation: str = "paper",
    generator: torch.Generator | None = None,
) -> tuple[float, torch.Tensor]:
    """Diffusion spectral mutual information of points and a second variable.

    `sum_b p(b) (DSE(A*_b) - DSE(A | B = b))`, where `A*_b` is a random subset of A of the size of `{B = b}`, drawn
    without replacement; its entropy is averaged over `repeats` draws. For labels independent of the points the
    expectation is exactly 0, and single values may be negative.

    Args:
        a: points, (N, d).
        b: labels (N,), scalars (N,) or vectors (N, d'); (N, 1) is read as (N,). Ignored, and may be None, if
            `clusters` is given.
        sigma: bandwidth for `a`.
        t: steps of the walk.
        discrete: whether `b` holds labels; by default, whether it is (N,) and of an integer or boolean type.
        n_clusters: equal-width bins of a scalar `b`, or spectral clusters of a vector `b` (over nearest neighbours).
        repeats: random subsets for each label.
        clusters: labels of the rows of `b`, (N,), from an earlier call: cluster a fixed set of inputs once.
        base: of the logarithm; 2 gives bits.
        normalisation: as in `diffusion_operator`.
        generator: of the random subsets, on the CPU.

    Returns:
        The information and the labels that were used, int64 (N,), from 0.

    Raises:
        TypeError: `a` or `b` does not hold real numbers.
        ValueError: sizes do not fit together or a value is out of its range.
    """
    a = _points(a, "a")
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    if clusters is None:
        if b is None:
            raise ValueError("give b or clusters")
        clusters = _clusters(b, discrete, n_clusters)
    clusters = _tensor(clusters)
    if clusters.shape != (len(a),):
        raise ValueError(f"a has {len(a)} rows; b or clusters must have as many, got {tuple(clusters.shape)}")
    clusters = torch.unique(clusters.to(a.device), return_inverse=True)[1]
    settings = {"sigma": sigma, "t": t, "base": base, "normalisation": normalisation}
    information = 0.0
    for members in (clusters == label for label in range(int(clusters.max()) + 1)):
        size = int(members.sum())
        draws = (torch.randperm(len(a), generator=generator)[:size] for _ in range(repeats))
        whole = math.fsum(dse(a[draw.to(a.device)], **settings) for draw in draws) / repeats
        information += size / len(a) * (whole - dse(a[members], **settings))
    return information, clusters


def shannon_binned(x, bins: int = 2, base: float = 2) -> float:
    """Entropy of the histogram of points with `bins` equal bins along each dimension, after min-max scaling.

    The classic estimate, kept as the baseline that it is: with many dimensions every point sits in a cell of its own
    and the result is log N whatever the data. Constant dimensions are ignored.

    Args:
        x: points, (N, d).
        bins: along each dimension.
        base: of the logarithm; 2 gives bits.

    Raises:
        TypeError: `x` does not hold real numbers.
        ValueError: `x` is not (N, d), or bins or base are out of their range.
    """
    x = _points(x)
    if not isinstance(bins, numbers.Integral) or bins < 1:
        raise ValueError(f"bins must be a whole number of at least 1, got {bins!r}")
    _positive(base, "base")
    low, high = x.amin(0), x.amax(0)
    scaled = (x - low) / torch.where(high > low, high - low, 1)
    cells = (scaled * bins).long().clamp(max=bins - 1)
    share = torch.unique(cells, dim=0, return_counts=True)[1].double() / len(x)
    return float(-torch.xlogy(share, share).sum()) / math.log(base) + 0.0


def sigma_rule(x, quantile: float = 0.5) -> float:
    """A bandwidth: the quantile of the distances between different rows of `x`, (N, d).

    Use it once, on a reference set, and keep the result. A bandwidth that follows the data cancels their scale, and
    with it the growth that you wanted to see.

    Raises:
        TypeError: `x` does not hold real numbers.
        ValueError: fewer than two points, a quantile outside (0, 1], or a distance of 0 at that quantile.
    """
    x = _points(x)
    if len(x) < 2:
        raise ValueError("sigma_rule needs at least two points")
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile must lie in (0, 1], got {quantile}")
    distances = np.sqrt(_squared_distances(x).cpu().numpy()[np.triu_indices(len(x), 1)])
    sigma = float(np.quantile(distances, quantile))
    if sigma == 0:
        raise ValueError(f"the {quantile} quantile of the distances is 0: the points coincide")
    return sigma


def t_rule(spectrum, share: float = 0.01, threshold: float = 0.01, max_t: int = 1000) -> int:
    """Steps of the walk: the smallest t at which at most a share of the eigenvalues keeps `|eigenvalue|^t > threshold`.

    At least one eigenvalue (the 1 that every walk has) always stays, so the share is rounded up to one.

    Args:
        spectrum: eigenvalues, (N,).
        share: of the eigenvalues that may stay.
        threshold: above which one stays.
        max_t: returned if no smaller t does it (several eigenvalues of 1: separated clusters).

    Raises:
        ValueError: the spectrum is not (N,), share or threshold lie outside (0, 1), or max_t is below 1.
    """
    magnitudes = _eigenvalues(spectrum).abs()
    if not (0 < share < 1 and 0 < threshold < 1):
        raise ValueError(f"share and threshold must lie in (0, 1), got {share} and {threshold}")
    if max_t < 1:
        raise ValueError(f"max_t must be at least 1, got {max_t}")
    allowed = max(1, math.floor(share * len(magnitudes)))
    if allowed >= len(magnitudes):
        return 1
    first_to_go = float(magnitudes.sort(descending=True).values[allowed])
    if first_to_go <= threshold:
        return 1
    if first_to_go >= 1:
        return max_t
    t = max(1, math.ceil(math.log(threshold) / math.log(first_to_go) - 1e-12))
    return min(t, max_t)


def _tensor(values) -> torch.Tensor:
    # by way of numpy, which reads lists of floats as float64
    return values if isinstance(values, torch.Tensor) else torch.from_numpy(np.array(values))


def _points(x, name: str = "x") -> torch.Tensor:
    x = _tensor(x)
    if x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name} must hold real numbers, got {x.dtype}")
    x = x.detach().to(torch.float64)
    if x.ndim != 2 or not len(x):
        raise ValueError(f"{name} must have shape (N, d) with N >= 1, got {tuple(x.shape)}")
    if not x.isfinite().all():
        raise ValueError(
            f"{name} must be finite; {int((~x.isfinite()).any(1).sum())} of {len(x)} rows are not"
        )
    return x


def _eigenvalues(spectrum) -> torch.Tensor:
    eigenvalues = _tensor(spectrum)
    if eigenvalues.is_complex() or eigenvalues.ndim != 1 or not len(eigenvalues):
        raise ValueError(f"spectrum must hold real numbers of shape (N,), got {tuple(eigenvalues.shape)}")
    eigenvalues = eigenvalues.detach().to(torch.float64)
    if not eigenvalues.isfinite().all() or not eigenvalues.any():
        raise ValueError("spectrum must be finite and not all zero")
    return eigenvalues


def _positive(value, name: str) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a positive number, got {value}")


def _squared_distances(x: torch.Tensor) -> torch.Tensor:
    x = x - x.mean(0)  # distances do not change, and the products below lose fewer digits
    norms = x.square().sum(1)
    squared = norms[:, None] + norms - 2 * (x @ x.T)
    return ((squared + squared.T) / 2).clamp(min=0).fill_diagonal_(0)


def _clusters(b, discrete: bool | None, n_clusters: int) -> torch.Tensor:
    b = _tensor(b)
    if b.ndim == 2 and b.shape[1] == 1:
        b = b[:, 0]
    whole = not b.is_floating_point() and not b.is_complex()
    if discrete is None:
        discrete = b.ndim == 1 and whole
    if discrete:
        if b.ndim != 1:
            raise ValueError(f"discrete labels must have shape (N,), got {tuple(b.shape)}")
        return b
    if n_clusters < 2:
        raise ValueError(f"n_clusters must be at least 2, got {n_clusters}")
    if b.ndim == 1:
        b = _points(b[:, None], "b")[:, 0]
        width = (b.max() - b.min()) / n_clusters
        return ((b - b.min()) / width).long().clamp(max=n_clusters - 1) if width > 0 else b.long()
    from sklearn.cluster import SpectralClustering  # only here: it takes a second to import

    b = _points(b.flatten(1), "b")
    neighbours = min(10, len(b) - 1)
    if n_clusters >= len(b):
        raise ValueError(f"b has {len(b)} rows, too few for n_clusters={n_clusters}")
    method = SpectralClustering(
        n_clusters,
        affinity="nearest_neighbors",
        n_neighbors=neighbours,
        assign_labels="cluster_qr",
        random_state=0,
    )
    with warnings.catch_warnings():
        # clusters without an edge between them are what is looked for
        warnings.filterwarnings("ignore", message="Graph is not fully connected")
        return torch.from_numpy(method.fit_predict(b.cpu().numpy()).astype(np.int64))
