"""Three more ways to change an image and keep its meaning; `lib.data.shifts` holds the others."""

import torch


def shift(images: torch.Tensor, down: int = 0, right: int = 0) -> torch.Tensor:
    """Move images by whole pixels; what comes in from outside is 0.

    Args:
        images: (n, channels, height, width), floating point.
        down: pixels downwards; negative is upwards.
        right: pixels to the right; negative is to the left.

    Returns:
        Images of the same shape. A move by the whole height or width leaves nothing.

    Raises:
        TypeError: a move that is not an integer.
        ValueError: not (n, channels, height, width) floating point.
    """
    _check_images(images)
    for name, move in (("down", down), ("right", right)):
        if isinstance(move, bool) or not isinstance(move, int):
            raise TypeError(f"{name} must be an integer number of pixels, got {move!r}")
    height, width = images.shape[2:]
    moved = torch.zeros_like(images)
    if abs(down) < height and abs(right) < width:
        target = images[..., max(-down, 0) : height - max(down, 0), max(-right, 0) : width - max(right, 0)]
        moved[..., max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = target
    return moved


def change_gamma(images: torch.Tensor, gamma: float) -> torch.Tensor:
    """Raise each pixel to a power: below 1 the dark parts become lighter, above 1 darker; 0 and 1 stay.

    Args:
        images: (n, channels, height, width), floating point with values in [0, 1].
        gamma: the exponent, positive and finite.

    Raises:
        ValueError: another shape or dtype, values outside [0, 1], or a gamma that is not positive.
    """
    _check_images(images)
    if not 0 < gamma < float("inf"):
        raise ValueError(f"gamma must be positive and finite, got {gamma}")
    if images.numel() and not (images.amin() >= 0 and images.amax() <= 1):
        raise ValueError(
            f"images must lie in [0, 1], got values from {images.amin():.3g} to {images.amax():.3g}"
        )
    return images**gamma


def occlude(
    images: torch.Tensor, size: int, *, value: float = 0.0, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Cover a square of each image, at a random place that lies within the image.

    Args:
        images: (n, channels, height, width), floating point.
        size: height and width of the square in pixels, from 0 to the smaller side of the image.
        value: what the square is filled with.
        generator: of the places; the same seed gives the same squares.

    Raises:
        ValueError: not (n, channels, height, width) floating point, or a size out of range.
    """
    _check_images(images)
    n, _, height, width = images.shape
    if not 0 <= size <= min(height, width):
        raise ValueError(f"size must be from 0 to {min(height, width)}, got {size}")
    top = torch.randint(0, height - size + 1, (n, 1), generator=generator).to(images.device)
    left = torch.randint(0, width - size + 1, (n, 1), generator=generator).to(images.device)
    row = torch.arange(height, device=images.device)
    column = torch.arange(width, device=images.device)
    rows = (row >= top) & (row < top + size)  # (n, height)
    columns = (column >= left) & (column < left + size)  # (n, width)
    covered = rows[:, None, :, None] & columns[:, None, None, :]
    return images.masked_fill(covered, value)


def _check_images(images):
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(
            f"images must be floating point (n, channels, height, width), got {images.dtype} {tuple(images.shape)}"
        )
