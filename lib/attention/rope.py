"""Rotary positions: a rotation of queries and keys after which their product knows how far apart they are."""

import torch


def rope(x: torch.Tensor, *, start: int = 0, base: float = 10000.0) -> torch.Tensor:
    """Rotate each pair of coordinates by an angle that grows with the position.

    Coordinates i and i + dim / 2 of the vector at position p turn by `p * base ** (-2 * i / dim)`. The product of a query
    and a key rotated so depends on the difference of their positions only; norms stay what they were.

    Source: Su et al., RoFormer (2021), equation 34, with the halves as pairs.

    Args:
        x: queries or keys, (..., length, dim).
        start: the position of the first vector, as when earlier ones are cached.
        base: of the wavelengths, from 2 pi to 2 pi * base positions.

    Returns:
        The rotated vectors, of the shape and dtype of `x`.

    Raises:
        ValueError: an odd `dim`.
    """
    dim = x.shape[-1]
    if dim % 2:
        raise ValueError(f"rotary positions need an even dim, got {dim}")
    half = dim // 2
    # angles in float64: in lower precision those of late positions are wrong
    rates = base ** -(torch.arange(half, device=x.device, dtype=torch.float64) / half)
    positions = torch.arange(start, start + x.shape[-2], device=x.device, dtype=torch.float64)
    angles = positions[:, None] * rates
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
