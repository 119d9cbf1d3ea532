"""Activations with a learnable correction, how entropy proposes one, and Top-k thresholding."""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from scipy.interpolate import CubicSpline
from torch import nn

from lib.information.activation import entropy_functional_gradient


class CRReLU(nn.Module):
    """Correction regularised ReLU, `max(0, x) + eps * x * exp(-x^2 / 2)` (Sun et al. 2024, equation of the method).

    The correction acts on the whole line: negative inputs keep a gradient, except at `x = -1`. It is at most
    `|eps| exp(-1/2)` in size. The function increases on `x > 0` for `-1 <= eps <= exp(3/2) / 2`. Each layer needs an
    instance of its own, and `eps` no weight decay.

    Args:
        eps: size of the correction at the start.
        learnable: whether `eps` is a parameter (one number) or a buffer.

    Raises:
        ValueError: an `eps` that is not finite.
    """

    def __init__(self, eps: float = 0.01, learnable: bool = True):
        super().__init__()
        if not math.isfinite(eps):
            raise ValueError(f"eps must be finite, got {eps}")
        if learnable:
            self.eps = nn.Parameter(torch.tensor(float(eps)))
        else:
            self.register_buffer("eps", torch.tensor(float(eps)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x) + self.eps * x * torch.exp(-x.square() / 2)


class CorrectedActivation(nn.Module):
    """Any activation plus a learnable multiple of a correction given on a grid: `f(x) + eps * correction(x)`.

    Args:
        base: the activation f.
        grid: where the correction is known, shape (n,), evenly spaced and increasing.
        correction: its values there, shape (n,); linear in between, zero outside.
        eps: its size at the start, one number; learnable.

    Raises:
        ValueError: shapes that differ, fewer than two points, or a grid that is not evenly spaced.
    """

    def __init__(self, base: nn.Module, grid: np.ndarray, correction: np.ndarray, eps: float = 0.01):
        super().__init__()
        grid, correction = np.asarray(grid, dtype=np.float64), np.asarray(correction, dtype=np.float64)
        if grid.ndim != 1 or grid.shape != correction.shape or len(grid) < 2:
            raise ValueError(
                f"grid and correction must both have shape (n,) with n >= 2, got {grid.shape} and {correction.shape}"
            )
        spacing = (grid[-1] - grid[0]) / (len(grid) - 1)
        if not spacing > 0 or not np.allclose(np.diff(grid), spacing, rtol=1e-6, atol=0):
            raise ValueError("grid must be increasing and evenly spaced")
        self.base = base
        self.start, self.spacing = float(grid[0]), float(spacing)
        self.register_buffer("values", torch.tensor(correction, dtype=torch.get_default_dtype()))
        self.eps = nn.Parameter(torch.tensor(float(eps)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        position = (x - self.start) / self.spacing
        last = len(self.values) - 1
        left = position.detach().floor().clamp(0, last - 1).long()
        share = position - left
        inside = (position >= 0) & (position <= last)
        correction = torch.lerp(self.values[left], self.values[left + 1], share)
        return self.base(x) + self.eps * torch.where(inside, correction, 0.0)


class TopK(nn.Module):
    """Keep the k largest entries along a dimension and set all others to zero (Top-k thresholding, Li et al. 2022).

    Put it behind the ReLU, as in `nn.Sequential(nn.ReLU(), TopK(32))`: of at most k entries that are not zero, the gradient
    flows through those kept, unchanged. Exactly k entries are kept; of equal ones those with the lowest index.
    A NaN is kept, so that it stays visible.

    Args:
        k: how many; a dimension of k entries or fewer passes unchanged.
        dim: the dimension of the neurons, so that every token has its own k.

    Raises:
        ValueError: k below 1.
    """

    def __init__(self, k: int, dim: int = -1):
        super().__init__()
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        self.k, self.dim = k, dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[self.dim] <= self.k:
            return x
        threshold = x.detach().topk(self.k, self.dim).values.amin(self.dim, keepdim=True)
        below, ties = x < threshold, x == threshold
        spare = self.k - (~(below | ties)).sum(
            self.dim, keepdim=True
        )  # places left for entries at the threshold
        return x.masked_fill(below | (ties & (ties.cumsum(self.dim) > spare)), 0)

    def extra_repr(self) -> str:
        return f"k={self.k}, dim={self.dim}"


def topk_linear(
    hidden: torch.Tensor, weight: torch.Tensor, k: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The linear map behind a `TopK`, which reads only the weights of the k neurons that a token keeps (Li et al. 2022).

    Equal to `TopK(k)(hidden) @ weight + bias`, but for which of equal neurons are kept. PyTorch's embedding bag does the sum:
    k rows of `weight` are read for each token, where the dense product reads all rows once for all tokens. So it pays for few
    tokens, as in decoding: with one of them k / neurons of the traffic.

    Args:
        hidden: what the neurons give, (..., neurons), behind the ReLU.
        weight: one row a neuron, (neurons, dim), contiguous; an `nn.Linear` stores its transpose.
        k: how many neurons a token keeps, from 1 to their number.
        bias: (dim,).

    Returns:
        (..., dim).

    Raises:
        ValueError: shapes that do not fit, or k out of range.
        TypeError: `hidden` and `weight` of different dtypes.
    """
    if weight.ndim != 2 or hidden.shape[-1:] != weight.shape[:1]:
        raise ValueError(
            f"hidden must be (..., neurons) and weight (neurons, dim), got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if hidden.dtype != weight.dtype:
        raise TypeError(f"hidden and weight must have one dtype, got {hidden.dtype} and {weight.dtype}")
    if not 1 <= k <= len(weight):
        raise ValueError(f"k must be from 1 to the {len(weight)} neurons, got {k}")
    values, neurons = hidden.reshape(-1, len(weight)).topk(k, sorted=False)
    out = F.embedding_bag(neurons, weight, per_sample_weights=values, mode="sum")
    out = out.view(*hidden.shape[:-1], weight.shape[1])
    return out if bias is None else out + bias


def eafo_correction(
    activation: Callable[[np.ndarray], np.ndarray],
    density: Callable[[np.ndarray], np.ndarray],
    grid: np.ndarray,
) -> np.ndarray:
    """The change of f that lowers the entropy of its output fastest: `f'(x) * eta(x)` (Sun et al. 2024).

    Moving the inverse `g` against its functional gradient, `g - c eta`, is to first order the activation
    `f + c f' eta`. For f = identity and a standard normal density it is `-x exp(-x^2 / 2) / sqrt(2 pi)`, the shape of CRReLU.

    Args:
        activation: f, strictly increasing, called with the grid.
        density: of the pre-activation, called with the grid.
        grid: shape (n,), increasing.

    Returns:
        The correction on the grid, shape (n,).

    Raises:
        ValueError: as `lib.information.entropy_functional_gradient`.
    """
    slope = CubicSpline(grid, activation(np.asarray(grid, dtype=np.float64)))(grid, 1)
    return slope * entropy_functional_gradient(activation, density, grid)


def eafo_step(
    activation: Callable[[np.ndarray], np.ndarray],
    density: Callable[[np.ndarray], np.ndarray],
    grid: np.ndarray,
    step: float,
) -> CubicSpline:
    """One step of entropy-based activation optimisation, `f + step * f' eta`, as a spline through the grid.

    Args:
        activation: f, strictly increasing, called with the grid.
        density: of the pre-activation, called with the grid.
        grid: shape (n,), increasing.
        step: positive; small enough that the result increases.

    Returns:
        The corrected activation, to be called with points inside the grid.

    Raises:
        ValueError: as `eafo_correction`; a step that is not positive, or so large that the result is not increasing.
    """
    if not step > 0:
        raise ValueError(f"step must be positive, got {step}")
    grid = np.asarray(grid, dtype=np.float64)
    corrected = activation(grid) + step * eafo_correction(activation, density, grid)
    if not (np.diff(corrected) > 0).all():
        raise ValueError(f"step {step} is too large: the corrected activation is not increasing")
    return CubicSpline(grid, corrected)
