"""Differential entropy of an activation's output, and how it changes with the activation.

For a pre-activation X with density p and a strictly increasing activation f, all on a grid and in nats. The formulas are
those of Sun et al., "A Method on Searching Better Activation Functions" (arXiv 2405.12954).
"""

from collections.abc import Callable

import numpy as np
from scipy.interpolate import CubicSpline


def activation_entropy(
    activation: Callable[[np.ndarray], np.ndarray],
    density: Callable[[np.ndarray], np.ndarray],
    grid: np.ndarray,
) -> float:
    """Differential entropy of `f(X)`: `H(X) + E log f'(X)`, in nats.

    It is not invariant to scale: `c f` has `log c` more. Compare activations of one range, or one scale.

    Args:
        activation: f, called with the grid.
        density: p, called with the grid; it need not be normalised on it.
        grid: where to integrate, shape (n,), increasing, and wide enough to hold nearly all of p.

    Returns:
        The entropy; minus infinity if f is constant on a part of the grid where p is positive, as ReLU is.

    Raises:
        ValueError: a grid that is not increasing or has fewer than 5 points, values that are not finite, a negative
            density, or an activation that decreases.
    """
    grid, f, p = _on_grid(activation, density, grid)
    slope = np.gradient(f, grid, edge_order=2)
    flat = np.diff(f) == 0
    if np.any(flat & (p[1:] + p[:-1] > 0)):
        return -np.inf
    with np.errstate(divide="ignore"):
        log_p = np.where(p > 0, np.log(np.where(p > 0, p, 1.0)), 0.0)
        log_slope = np.where(p > 0, np.log(np.maximum(slope, np.finfo(float).tiny)), 0.0)
    return float(np.trapezoid(p * (log_slope - log_p), grid))


def entropy_functional_gradient(
    activation: Callable[[np.ndarray], np.ndarray],
    density: Callable[[np.ndarray], np.ndarray],
    grid: np.ndarray,
) -> np.ndarray:
    """Functional derivative `eta` of the output entropy with respect to the INVERSE activation, at `y = f(x)`.

    With `g` the inverse of f, `eta = p'(g) g' + p(g) g'' / g'`, which is `d/dx [p(x) / f'(x)]`: the slope, along x, of the
    output density. A change `delta g` changes the entropy by the integral of `eta * delta g` over y.

    Args:
        activation: f, strictly increasing, called with the grid.
        density: p, called with the grid; normalised here.
        grid: shape (n,), increasing.

    Returns:
        `eta` at `f(grid)`, shape (n,), zero everywhere exactly if the output is uniform.

    Raises:
        ValueError: as in `activation_entropy`, or an activation that is constant somewhere.
    """
    grid, f, p = _on_grid(activation, density, grid)
    slope = CubicSpline(grid, f)(grid, 1)
    if not (slope > 0).all():
        raise ValueError("the activation must be strictly increasing on the grid")
    return CubicSpline(grid, p / slope)(grid, 1)


def _on_grid(activation, density, grid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    grid = np.asarray(grid, dtype=np.float64)
    if grid.ndim != 1 or len(grid) < 5 or not (np.diff(grid) > 0).all():
        raise ValueError(f"grid must be increasing, of shape (n,) with n >= 5, got shape {grid.shape}")
    f, p = (np.asarray(function(grid), dtype=np.float64) for function in (activation, density))
    for name, values in {"activation": f, "density": p}.items():
        if values.shape != grid.shape or not np.isfinite(values).all():
            raise ValueError(
                f"the {name} must return finite values of shape {grid.shape}, got shape {values.shape}"
            )
    if (p < 0).any() or not p.any():
        raise ValueError("the density must be at least 0, and positive somewhere")
    if (np.diff(f) < 0).any():
        raise ValueError("the activation must not decrease on the grid")
    return grid, f, p / np.trapezoid(p, grid)
