"""Pairs of samples whose mutual information is known: correlated normals, and images made from them."""

import math

import torch


def gaussian_pair(
    n: int,
    dim_x: int,
    dim_y: int,
    mi: float,
    *,
    mix: bool = True,
    dtype: torch.dtype = torch.float64,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal x and y with a given mutual information, in nats; x and y are standard normal by themselves.

    The first m = min(dim_x, dim_y) coordinates are correlated in pairs, each with rho = sqrt(1 - exp(-2 mi / m)), so that
    -(m / 2) log(1 - rho^2) = mi. A random rotation of x and one of y hide the pairs; it changes neither the law of x, nor
    that of y, nor the information. So does any invertible function of a coordinate, e.g. `torch.special.ndtr` (uniform)
    or the third power.

    Args:
        n: how many pairs.
        dim_x: of x, at least 1.
        dim_y: of y, at least 1.
        mi: the mutual information in nats, not negative.
        mix: whether to rotate.
        dtype: of the result.
        generator: of the random numbers.

    Returns:
        x (n, dim_x) and y (n, dim_y).

    Raises:
        ValueError: a size below 1, or an information that is negative or not finite.
    """
    if min(n, dim_x, dim_y) < 1:
        raise ValueError(f"n, dim_x and dim_y must be at least 1, got {n}, {dim_x} and {dim_y}")
    if not (math.isfinite(mi) and mi >= 0):
        raise ValueError(f"mi must be a number of nats, not negative, got {mi}")
    shared = min(dim_x, dim_y)
    keep = math.exp(-mi / shared)  # sqrt(1 - rho^2)
    x = torch.randn(n, dim_x, dtype=torch.float64, generator=generator)
    y = torch.randn(n, dim_y, dtype=torch.float64, generator=generator)
    y[:, :shared] = math.sqrt(-math.expm1(-2 * mi / shared)) * x[:, :shared] + keep * y[:, :shared]
    if mix:
        x, y = x @ _rotation(dim_x, generator), y @ _rotation(dim_y, generator)
    return x.to(dtype), y.to(dtype)


def gaussian_images(normals: torch.Tensor, size: int = 16, *, width: float = 0.12) -> torch.Tensor:
    """Images of a bright bump, whose place is an invertible function of two standard normals.

    Each normal becomes uniform by its cumulative distribution and then a coordinate of the bump's centre, between `width`
    and 1 - `width` of the image's side. The image determines the two numbers, so the mutual information of two such images
    is that of the normals.

    Args:
        normals: (n, 2).
        size: height and width, at least 2.
        width: the bump's standard deviation, in units of the side; above 0 and below one half.

    Returns:
        Images (n, 1, size, size) in (0, 1], float32.

    Raises:
        ValueError: another shape, or a size or width out of range.
    """
    _check(normals, 2, size)
    if not 0 < width < 0.5:
        raise ValueError(f"width must be between 0 and 0.5, got {width}")
    centres = width + (1 - 2 * width) * torch.special.ndtr(normals.double())  # (n, 2)
    pixels = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    profile = torch.exp(-0.5 * ((pixels - centres[..., None]) / width).square())  # (n, 2, size)
    return (profile[:, 0, :, None] * profile[:, 1, None, :])[:, None].float()


def rectangle_images(normals: torch.Tensor, size: int = 16, *, min_side: float = 0.2) -> torch.Tensor:
    """Images of a filled rectangle, whose four edges are an invertible function of four standard normals.

    Two normals make the vertical extent and two the horizontal one: both become uniform, the first u gives the lower end
    a = (1 - min_side) (1 - sqrt(1 - u)), the second v the upper end a + min_side + v (1 - min_side - a). (a, b) is then
    uniform over all segments of at least that length. A pixel is as bright as the share of its area that is covered, so
    that the image determines the edges.

    Args:
        normals: (n, 4): lower and upper end of the vertical extent, then of the horizontal one.
        size: height and width, at least 2.
        min_side: the shortest side, in units of the image's; between 0 and 1. At less than two pixels both ends may lie in
            one pixel, which then tells the length only.

    Returns:
        Images (n, 1, size, size) in [0, 1], float32.

    Raises:
        ValueError: another shape, or a size or side out of range.
    """
    _check(normals, 4, size)
    if not 0 < min_side < 1:
        raise ValueError(f"min_side must be between 0 and 1, got {min_side}")
    uniform = torch.special.ndtr(normals.double()).view(-1, 2, 2)
    room = 1 - min_side
    low = room * (1 - (1 - uniform[..., 0]).sqrt())
    high = low + min_side + uniform[..., 1] * (room - low)
    edge = torch.arange(size, dtype=torch.float64) / size
    covered = torch.minimum(high[..., None], edge + 1 / size) - torch.maximum(low[..., None], edge)
    covered = covered.clamp(min=0) * size  # (n, 2, size)
    return (covered[:, 0, :, None] * covered[:, 1, None, :])[:, None].float()


def _rotation(dim, generator):
    q, r = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=generator))
    return q * r.diagonal().sign()


def _check(normals, columns, size):
    if normals.ndim != 2 or normals.shape[1] != columns:
        raise ValueError(f"normals must have shape (n, {columns}), got {tuple(normals.shape)}")
    if size < 2:
        raise ValueError(f"size must be at least 2, got {size}")
