"""Common corruptions of small images: eight kinds, each in five severities, as ImageNet-C has them for large ones."""

import torch
import torch.nn.functional as F

from lib.data import add_noise, blur, change_contrast, occlude, shift

# one strength for each severity; sizes are shares of the side of the image
_STRENGTHS = {
    "gaussian_noise": (0.08, 0.14, 0.20, 0.28, 0.36),  # standard deviation
    "shot_noise": (40.0, 20.0, 12.0, 7.0, 4.0),  # photons of a white pixel
    "blur": (0.04, 0.06, 0.08, 0.10, 0.12),  # standard deviation
    "contrast": (0.5, 0.35, 0.25, 0.17, 0.1),  # factor
    "brightness": (0.15, 0.25, 0.35, 0.45, 0.55),  # added
    "pixelate": (0.75, 0.6, 0.5, 0.42, 0.35),  # side of the coarse image
    "occlusion": (0.15, 0.22, 0.29, 0.36, 0.43),  # side of the square
    "shift": (0.08, 0.12, 0.16, 0.20, 0.24),  # distance, in each direction
}
CORRUPTIONS = tuple(_STRENGTHS)


def corruptions(images: torch.Tensor, kind: str, severity: int, *, seed: int = 0) -> torch.Tensor:
    """Corrupt images in one of eight ways that keep their meaning.

    Gaussian and shot noise, Gaussian blur, less contrast, more brightness, a coarser grid (`pixelate`), a grey square at a
    random place (`occlusion`), and a diagonal move in one of four directions (`shift`).

    Args:
        images: (n, channels, height, width), floating point in [0, 1].
        kind: one of `CORRUPTIONS`.
        severity: 1 (mild) to 5.
        seed: of noise, places and directions; the same seed gives the same result, and the global random state is not touched.

    Returns:
        Images of the same shape in [0, 1].

    Raises:
        ValueError: an unknown kind or severity, another shape or dtype, or values outside [0, 1].

    The idea and most kinds are those of Hendrycks and Dietterich (2019, arXiv:1903.12261); the strengths are this book's.
    """
    if kind not in _STRENGTHS:
        raise ValueError(f"kind must be one of {CORRUPTIONS}, got {kind!r}")
    if isinstance(severity, bool) or severity not in (1, 2, 3, 4, 5):
        raise ValueError(f"severity must be from 1 to 5, got {severity!r}")
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            f"images must be floating point (n, channels, height, width), got {images.dtype} {tuple(images.shape)}"
        )
    if images.numel() and not (images.amin() >= 0 and images.amax() <= 1):
        raise ValueError("images must lie in [0, 1]")
    strength = _STRENGTHS[kind][severity - 1]
    side = min(images.shape[2:])
    generator = torch.Generator().manual_seed(seed)
    if kind == "gaussian_noise":
        return add_noise(images, strength, generator=generator)
    if kind == "shot_noise":
        photons = torch.poisson(strength * images.cpu(), generator=generator).to(images.device)
        return (photons / strength).clamp(max=1)
    if kind == "blur":
        return blur(images, strength * side)
    if kind == "contrast":
        return change_contrast(images, strength)
    if kind == "brightness":
        return (images + strength).clamp(max=1)
    if kind == "pixelate":
        coarse = [max(1, round(strength * length)) for length in images.shape[2:]]
        # antialiased: averages over the coarse cells, which need not be whole pixels
        small = F.interpolate(images, coarse, mode="bilinear", antialias=True, align_corners=False)
        return F.interpolate(small, images.shape[2:], mode="nearest").clamp(0, 1)
    if kind == "occlusion":
        return occlude(images, max(1, round(strength * side)), value=0.5, generator=generator)
    distance = max(1, round(strength * side))
    direction = torch.randint(0, 4, (len(images),), generator=generator).to(images.device)
    moved = torch.empty_like(images)
    for number, (down, right) in enumerate(((1, 1), (1, -1), (-1, 1), (-1, -1))):
        moved[direction == number] = shift(images[direction == number], down * distance, right * distance)
    return moved
