"""Noise in proportion to an activation, which makes the information of a layer finite."""

import torch
from torch import nn


class RelativeNoise(nn.Module):
    """x + sigma x z with standard normal z for each number: the ratio of noise to signal is `sigma`.

    Unlike dropout it stays on in eval mode by default: the network *is* the noisy one, and the mutual information of a layer
    with the input is finite only then. Where x is zero there is no noise.

    Args:
        sigma: the ratio, not negative.
        on_eval: whether the noise stays on in eval mode.

    Raises:
        ValueError: a negative ratio.
    """

    def __init__(self, sigma: float, on_eval: bool = True):
        super().__init__()
        if not sigma >= 0:
            raise ValueError(f"sigma must not be negative, got {sigma}")
        self.sigma, self.on_eval = sigma, on_eval

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape to the same shape."""
        if self.sigma == 0 or not (self.training or self.on_eval):
            return x
        return x + self.sigma * x * torch.randn_like(x)

    def extra_repr(self) -> str:
        return f"sigma={self.sigma}, on_eval={self.on_eval}"
