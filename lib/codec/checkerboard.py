"""The checkerboard: half of the places are coded first (anchors), the other half with their help."""

import torch

ANCHOR, OTHER = 0, 1


def checkerboard(height: int, width: int, parity: int = ANCHOR, device=None) -> torch.Tensor:
    """Which places belong to a parity, (height, width) bool: i + j odd for anchors, even for the others.

    Raises:
        ValueError: a parity that is neither 0 nor 1.
    """
    if parity not in (ANCHOR, OTHER):
        raise ValueError(f"parity must be 0 (anchors) or 1 (others), got {parity!r}")
    rows, columns = (torch.arange(n, device=device) for n in (height, width))
    return (rows[:, None] + columns) % 2 == (1 if parity == ANCHOR else 0)


def keep(x: torch.Tensor, parity: int) -> torch.Tensor:
    """`x` (..., height, width) with zeros at the places of the other parity."""
    return x * checkerboard(*x.shape[-2:], parity, x.device)


def squeeze(x: torch.Tensor, parity: int) -> torch.Tensor:
    """The values at the places of a parity alone, (..., places), row by row. Coding `keep(x)` would code zeros."""
    return x[..., checkerboard(*x.shape[-2:], parity, x.device)]


def unsqueeze(values: torch.Tensor, parity: int, height: int, width: int) -> torch.Tensor:
    """Undo `squeeze`: (..., height, width), zeros at the other places.

    Raises:
        ValueError: a number of values that is not the number of places.
    """
    places = checkerboard(height, width, parity, values.device)
    if values.shape[-1] != places.sum():
        raise ValueError(f"{values.shape[-1]} values for {int(places.sum())} places")
    x = values.new_zeros(*values.shape[:-1], height, width)
    x[..., places] = values
    return x
