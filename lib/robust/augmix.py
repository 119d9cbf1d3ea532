"""AugMix: random chains of simple operations, mixed with each other and with the image."""

import math

import torch
import torch.nn.functional as F


def augmix(
    images: torch.Tensor,
    width: int = 3,
    depth: int | None = None,
    generator: torch.Generator | None = None,
    *,
    strength: float = 1.0,
) -> torch.Tensor:
    """Augment images by AugMix, `m x + (1 - m) sum_i w_i chain_i(x)`.

    A chain is a row of operations, each drawn for each image out of `AUGMIX_OPERATIONS` with its own strength; the weights w are
    uniform on the simplex and m on [0, 1], the paper's Dirichlet and Beta at their usual parameter 1. None of the operations is a kind of `lib.robust.corruptions`: no noise,
    blur, contrast, brightness, resolution, occlusion or translation. The loss that goes with it in the paper is not here.

    Args:
        images: (n, channels, height, width), floating point in [0, 1].
        width: how many chains.
        depth: operations in each chain; None draws 1, 2 or 3 for each image and chain.
        generator: the random draws; the global random state where None.
        strength: factor of the range of every operation, at least 0; 0 leaves the images as they are.

    Returns:
        Images of the same shape in [0, 1].

    Raises:
        ValueError: another shape or dtype, values outside [0, 1], or an option out of range.

    Hendrycks et al. (2020, arXiv:1912.02781), algorithm 1.
    """
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            f"images must be floating point (n, channels, height, width), got {images.dtype} {tuple(images.shape)}"
        )
    if images.numel() and not (images.amin() >= 0 and images.amax() <= 1):
        raise ValueError("images must lie in [0, 1]")
    if width < 1 or (depth is not None and depth < 1):
        raise ValueError(f"width and depth must be at least 1, got {width} and {depth}")
    if not strength >= 0:
        raise ValueError(f"strength must be at least 0, got {strength}")
    if strength == 0 or not len(images):
        return images.clone()
    # independent exponentials over their sum are uniform on the simplex
    draws = -torch.rand(len(images), width, generator=generator).clamp_min(1e-9).log()
    weights = (draws / draws.sum(1, keepdim=True)).to(images)
    keep = torch.rand(len(images), generator=generator).to(images)
    mixed = torch.zeros_like(images)
    for chain in range(width):
        depths = torch.randint(1, 4, (len(images),), generator=generator)
        if depth is not None:
            depths.fill_(depth)
        changed = images.clone()
        for step in range(int(depths.max())):
            chosen = torch.randint(0, len(AUGMIX_OPERATIONS), (len(images),), generator=generator)
            level = strength * torch.rand(len(images), generator=generator)
            sign = 2.0 * torch.randint(0, 2, (len(images),), generator=generator) - 1
            for number, operation in enumerate(_OPERATIONS.values()):
                rows = ((chosen == number) & (step < depths)).nonzero().squeeze(1)
                if len(rows):
                    changed[rows] = operation(changed[rows], level[rows].to(images), sign[rows].to(images))
        mixed += weights[:, chain, None, None, None] * changed
    keep = keep[:, None, None, None]
    return (keep * images + (1 - keep) * mixed).clamp(0, 1)


# --- operations: (rows, channels, height, width), level in [0, strength], sign -1 or 1, each (rows,)


def _warp(images, rows):
    """Affine maps given by two rows of four coefficients a side, (n,) each."""
    zero = torch.zeros_like(rows[0])
    theta = torch.stack(
        [torch.stack([rows[0], rows[1], zero], 1), torch.stack([rows[2], rows[3], zero], 1)], 1
    )
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def _rotate(images, level, sign):
    angle = math.radians(25) * level * sign
    return _warp(images, (angle.cos(), -angle.sin(), angle.sin(), angle.cos()))


def _shear_x(images, level, sign):
    one = torch.ones_like(level)
    return _warp(images, (one, 0.4 * level * sign, 0 * one, one))


def _shear_y(images, level, sign):
    one = torch.ones_like(level)
    return _warp(images, (one, 0 * one, 0.4 * level * sign, one))


def _zoom(images, level, sign):
    factor = 1 + 0.3 * level * sign
    return _warp(images, (factor, 0 * factor, 0 * factor, factor))


def _wave(images, level, sign):
    """A wave of one to two periods moves each row sideways: the nearest this has to AugMix's lens-like distortions."""
    n, _, height, width = images.shape
    identity = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).to(images).expand(n, 2, 3)
    grid = F.affine_grid(identity, list(images.shape), align_corners=False).clone()
    grid[..., 0] += (0.25 * level)[:, None, None] * torch.sin(
        math.pi * (1 + level)[:, None, None] * sign[:, None, None] * grid[..., 1] + 3 * level[:, None, None]
    )
    return F.grid_sample(images, grid, align_corners=False)


def _posterize(images, level, sign):
    steps = (8 - 6 * level.clamp(max=1)).round()[:, None, None, None]  # 8 down to 2
    return (images * steps).round() / steps


def _solarize(images, level, sign):
    threshold = 1 - level.clamp(max=1)[:, None, None, None]
    return torch.where(images > threshold, 1 - images, images)


def _thicken(images, level, sign):
    """Strokes grow (sign 1) or shrink (-1) by a part of a pixel."""
    grown = sign[:, None, None, None] * F.max_pool2d(sign[:, None, None, None] * images, 3, 1, 1)
    level = level.clamp(max=1)[:, None, None, None]
    return (1 - level) * images + level * grown


_OPERATIONS = {
    "rotate": _rotate,
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "zoom": _zoom,
    "wave": _wave,
    "posterize": _posterize,
    "solarize": _solarize,
    "thicken": _thicken,
}
AUGMIX_OPERATIONS = tuple(_OPERATIONS)
