"""Rotary positions: a rotation of queries and keys after which their product knows how far apart they are."""

import math

import torch
from torch import nn


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


class RoPE2D(nn.Module):
    """Rotary positions on a grid, with a learned base for each axis.

    The pair i of n at row y and column x turns by x * theta_x ** (-i / n) + y * theta_y ** (-(n - 1 - i) / n): the pairs that turn fast
    along one axis turn slowly along the other. With the exponents in one order on both axes and equal bases, no pair
    would see a step along the anti-diagonal. Products of a query and a key depend on the differences of rows and columns
    only.

    Args:
        dim: of queries and keys, even.
        theta: what both bases start with.

    Raises:
        ValueError: an odd `dim`, or `theta` that is not positive.
    """

    def __init__(self, dim: int, *, theta: float = 10000.0):
        super().__init__()
        if dim < 2 or dim % 2 or theta <= 0:
            raise ValueError(f"needs an even dim and theta > 0, got {dim} and {theta}")
        self.dim = dim
        self.log_theta = nn.Parameter(torch.full((2,), math.log(theta)))  # of columns, of rows

    def frequencies(self) -> torch.Tensor:
        """Radians a step, (2, dim / 2): along columns, along rows."""
        half = self.dim // 2
        exponents = torch.arange(half, device=self.log_theta.device, dtype=self.log_theta.dtype) / half
        return torch.exp(-self.log_theta[:, None] * torch.stack([exponents, exponents.flip(0)]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate x, (..., dim, height, width).

        Raises:
            ValueError: another dim.
        """
        if x.ndim < 3 or x.shape[-3] != self.dim:
            raise ValueError(f"x must be (..., {self.dim}, height, width), got {tuple(x.shape)}")
        rows, columns = (torch.arange(n, device=x.device, dtype=x.dtype) for n in x.shape[-2:])
        along_x, along_y = self.frequencies().to(x.dtype)
        angles = along_x[:, None, None] * columns + along_y[:, None, None] * rows[:, None]
        cos, sin = angles.cos(), angles.sin()
        first, second = x.chunk(2, -3)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -3)
