"""Rate and distortion: peak signal-to-noise ratio, structural similarity, Bjontegaard's rate difference."""

import math
import warnings

import bjontegaard
import torch
import torch.nn.functional as F


def psnr(x: torch.Tensor, y: torch.Tensor) -> float:
    """Peak signal-to-noise ratio of images in [0, 1], over all their pixels, in decibel; infinite if they are equal.

    Raises:
        ValueError: shapes that differ.
    """
    if x.shape != y.shape:
        raise ValueError(f"images must have one shape, got {tuple(x.shape)} and {tuple(y.shape)}")
    error = (x.double() - y.double()).square().mean().item()
    return -10 * math.log10(error) if error else math.inf


def ms_ssim(x: torch.Tensor, y: torch.Tensor, *, levels: int = 5) -> torch.Tensor:
    """Multi-scale structural similarity of images in [0, 1] (Wang, Simoncelli, Bovik 2003).

    Gaussian window of 11 pixels and standard deviation 1.5, no padding; contrast and structure at every scale,
    luminance at the coarsest one; with one level it is SSIM.

    Args:
        x, y: (batch, channels, height, width).
        levels: scales, 1 to 5; the standard weights, normalised over those used.

    Returns:
        (batch,), the mean over channels; differentiable.

    Raises:
        ValueError: shapes that differ, or images smaller than 11 * 2**(levels - 1).
    """
    if x.shape != y.shape or x.ndim != 4:
        raise ValueError(f"two batches of images of one shape, got {tuple(x.shape)} and {tuple(y.shape)}")
    if not 1 <= levels <= 5 or min(x.shape[2:]) < 11 * 2 ** (levels - 1):
        raise ValueError(
            f"{levels} levels need sides of at least {11 * 2 ** (levels - 1)}, got {tuple(x.shape)}"
        )
    weights = torch.tensor([0.0448, 0.2856, 0.3001, 0.2363, 0.1333][:levels], dtype=x.dtype, device=x.device)
    weights = weights / weights.sum()
    taps = torch.exp(-(torch.arange(-5, 6, dtype=x.dtype, device=x.device) ** 2) / (2 * 1.5**2))
    taps, channels = taps / taps.sum(), x.shape[1]

    def smooth(image):
        image = F.conv2d(image, taps.view(1, 1, 11, 1).expand(channels, 1, 11, 1), groups=channels)
        return F.conv2d(image, taps.view(1, 1, 1, 11).expand(channels, 1, 1, 11), groups=channels)

    product = 1.0
    for level in range(levels):
        mx, my = smooth(x), smooth(y)
        vx, vy, cov = smooth(x * x) - mx**2, smooth(y * y) - my**2, smooth(x * y) - mx * my
        value = (2 * cov + 0.03**2) / (vx + vy + 0.03**2)
        if level == levels - 1:
            value = value * (2 * mx * my + 0.01**2) / (mx**2 + my**2 + 0.01**2)
        value = value.mean((2, 3))
        product = product * (value.clamp_min(0) ** weights[level] if levels > 1 else value)
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return product.mean(1)


def bd_rate(anchor, test, *, method: str = "pchip") -> float:
    """Bjontegaard's rate difference: by how many per cent `test` needs more bits than `anchor` at equal quality.

    The package `bjontegaard` interpolates the logarithm of the rate over quality and averages the difference over the
    qualities that both curves have. Negative: `test` is better.

    Args:
        anchor, test: pairs (rates, qualities) of at least four points each, with rising quality.
        method: "pchip", "akima" or "cubic".

    Raises:
        ValueError: fewer than four points, rates that are not positive, qualities that do not rise, or two curves that
            share less than half of the smaller range of qualities: then there is nothing to compare.
    """
    curves = []
    for name, (rates, qualities) in (("anchor", anchor), ("test", test)):
        rates, qualities = [float(r) for r in rates], [float(q) for q in qualities]
        if len(rates) != len(qualities) or len(rates) < 4:
            raise ValueError(f"{name} needs at least four points, got {len(rates)} and {len(qualities)}")
        if min(rates) <= 0 or any(b <= a for a, b in zip(qualities, qualities[1:], strict=False)):
            raise ValueError(f"{name}: rates must be positive and qualities must rise")
        curves += [rates, qualities]
    low, high = max(curves[1][0], curves[3][0]), min(curves[1][-1], curves[3][-1])
    if high - low < 0.5 * min(curves[1][-1] - curves[1][0], curves[3][-1] - curves[3][0]):
        raise ValueError(f"the curves share qualities from {low:.4g} to {high:.4g} only")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about overlaps below 75 per cent: checked above
        return float(
            bjontegaard.bd_rate(*curves, method=method, require_matching_points=False, min_overlap=0)
        )
