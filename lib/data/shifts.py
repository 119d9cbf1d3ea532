"""Images that a digit classifier was not made for, and digits that are rotated, noisy, blurred or faded."""

import math

import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images


def photo_patches(n: int, *, size: int = 8, seed: int = 0) -> torch.Tensor:
    """Grey patches of the two photographs that come with scikit-learn.

    Squares of 2 to 16 times the size, at random places, are averaged down to `size` x `size`.

    Args:
        n: how many, at least 0.
        size: height and width, from 1 to 26.
        seed: of the places; the global random state is not touched.

    Returns:
        float32 images in [0, 1], (n, 1, size, size).

    Raises:
        ValueError: n or size out of range.
    """
    _check(n, size, 26)
    photos = [torch.tensor(photo).float().mean(2) / 255 for photo in load_sample_images().images]
    generator = torch.Generator().manual_seed(seed)
    patches = []
    for _ in range(n):
        photo = photos[_draw(0, len(photos), generator)]
        block = _draw(2, 17, generator)
        side = size * block
        top = _draw(0, photo.shape[0] - side + 1, generator)
        left = _draw(0, photo.shape[1] - side + 1, generator)
        patches.append(F.avg_pool2d(photo[None, top : top + side, left : left + side], block))
    return torch.stack(patches) if patches else torch.zeros(0, 1, size, size)


def strokes(n: int, *, size: int = 8, seed: int = 0) -> torch.Tensor:
    """White pen strokes on black that mean nothing: two or three random straight lines or arcs each.

    They have the look of handwritten digits (soft edges, a dark border on average, similar ink) but not their shapes.

    Args:
        n: how many, at least 0.
        size: height and width, at least 4.
        seed: of the shapes; the global random state is not touched.

    Returns:
        float32 images in [0, 1], (n, 1, size, size).

    Raises:
        ValueError: n or size out of range.
    """
    _check(n, size, None)
    if size < 4:
        raise ValueError(f"size must be at least 4, got {size}")
    generator = torch.Generator().manual_seed(seed)
    axis = torch.arange(size, dtype=torch.float32)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1)  # (size, size, 2)
    along = torch.linspace(0, 1, 24).unsqueeze(1)
    images = torch.zeros(n, 1, size, size)
    for image in images:
        for _ in range(_draw(2, 4, generator)):
            ends = torch.rand(2, 2, generator=generator) * (size - 2) + 0.5
            bend = (torch.rand(2, generator=generator) - 0.5) * size * 0.7
            points = (1 - along) * ends[0] + along * ends[1] + 4 * along * (1 - along) * bend / 2
            distance = (grid.unsqueeze(2) - points).norm(dim=-1).amin(2)
            width = size / 8
            ink = torch.exp(-((distance / (0.75 * width)) ** 2))
            image[0] = torch.maximum(image[0], ink)
    return images


def rotate(images: torch.Tensor, degrees: float) -> torch.Tensor:
    """Turn images counter-clockwise about their centre, bilinearly; what comes in from outside is 0.

    Args:
        images: (n, channels, height, width), floating point; square pixels.
        degrees: any angle. Multiples of 90 of a square image are exact up to rounding.
    """
    _check_images(images)
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    height, width = images.shape[2:]
    # from output to input coordinates, both in [-1, 1] with y down
    matrix = [[cosine, -sine * height / width, 0.0], [sine * width / height, cosine, 0.0]]
    theta = torch.tensor(matrix, dtype=images.dtype, device=images.device)
    grid = F.affine_grid(theta.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)


def add_noise(
    images: torch.Tensor,
    std: float,
    *,
    generator: torch.Generator | None = None,
    bounds: tuple[float, float] | None = (0.0, 1.0),
) -> torch.Tensor:
    """Gaussian noise on every pixel, clipped to `bounds` unless these are None.

    Raises:
        ValueError: not (n, channels, height, width) floating point, or a negative `std`.
    """
    _check_images(images)
    if not std >= 0:
        raise ValueError(f"std must be at least 0, got {std}")
    noise = torch.randn(images.shape, generator=generator, dtype=images.dtype).to(images.device)
    noisy = images + std * noise
    return noisy if bounds is None else noisy.clamp(*bounds)


def blur(images: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur with a standard deviation of `sigma` pixels; the border is repeated outwards.

    Raises:
        ValueError: not (n, channels, height, width) floating point, or a negative `sigma`.
    """
    _check_images(images)
    if not sigma >= 0:
        raise ValueError(f"sigma must be at least 0, got {sigma}")
    if sigma == 0:
        return images.clone()
    reach = math.ceil(3 * sigma)
    offsets = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
    kernel = torch.softmax(-(offsets**2) / (2 * sigma**2), 0)
    n, channels, height, width = images.shape
    planes = images.reshape(n * channels, 1, height, width)
    planes = F.conv2d(F.pad(planes, (reach, reach, 0, 0), mode="replicate"), kernel.reshape(1, 1, 1, -1))
    planes = F.conv2d(F.pad(planes, (0, 0, reach, reach), mode="replicate"), kernel.reshape(1, 1, -1, 1))
    return planes.reshape(images.shape)


def change_contrast(images: torch.Tensor, factor: float) -> torch.Tensor:
    """Scale the deviation of each pixel from its image's mean: 0 is flat grey, 1 the image itself.

    Raises:
        ValueError: not (n, channels, height, width) floating point, or a factor outside [0, 1].
    """
    _check_images(images)
    if not 0 <= factor <= 1:
        raise ValueError(f"factor must lie in [0, 1], so that values stay in range, got {factor}")
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + factor * (images - mean)


def _draw(low, high, generator):
    return int(torch.randint(low, high, (1,), generator=generator))


def _check(n, size, largest):
    if n < 0:
        raise ValueError(f"n must be at least 0, got {n}")
    if size < 1 or (largest is not None and size > largest):
        raise ValueError(f"size must be from 1 to {largest}, got {size}")


def _check_images(images):
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(
            f"images must be floating point (n, channels, height, width), got {images.dtype} {tuple(images.shape)}"
        )
