"""Regression through a bottleneck: encoder, representation with or without noise, decoder."""

from typing import NamedTuple

import torch
from torch import nn

from lib.models.mlp import mlp

NOISES = ("none", "shared", "input")


class Bottleneck(NamedTuple):
    """What `IBRegressor` returns: representation (N, d_t), prediction (N, d_out), and the law of the representation.

    `log_variance` is None without noise, a scalar for shared noise, else (N, d_t).
    """

    t: torch.Tensor
    prediction: torch.Tensor
    mean: torch.Tensor
    log_variance: torch.Tensor | None


class IBRegressor(nn.Module):
    """An encoder d_in-hidden-hidden-d_t and a decoder d_t-hidden-d_out, with ReLU between (Yu et al. 2024, released code).

    Noise is drawn in training mode only; in evaluation mode `t` is the mean, so that predictions and attacks are
    deterministic.

    Args:
        d_in: width of the inputs.
        d_t: width of the representation.
        hidden: width of the hidden layers.
        d_out: width of the prediction.
        noise: `"none"`; `"shared"`, Gaussian noise of one learned variance, as in the nonlinear information bottleneck; or
            `"input"`, of a variance for each input and coordinate from a second head, as in the variational one.

    Raises:
        ValueError: an unknown noise, or a width below 1.
    """

    def __init__(self, d_in: int, d_t: int = 128, hidden: int = 128, d_out: int = 1, noise: str = "none"):
        super().__init__()
        if noise not in NOISES:
            raise ValueError(f"noise must be one of {NOISES}, got {noise!r}")
        self.noise, self.d_t = noise, d_t
        self.encoder = mlp((d_in, hidden, hidden, d_t * (2 if noise == "input" else 1)))
        self.decoder = mlp((d_t, hidden, d_out))
        if noise == "shared":
            self.log_variance = nn.Parameter(torch.tensor(-2.0))

    def forward(self, inputs: torch.Tensor) -> Bottleneck:
        """Of inputs (N, d_in)."""
        encoded = self.encoder(inputs)
        mean = encoded[:, : self.d_t]
        log_variance = {
            "none": lambda: None,
            "shared": lambda: self.log_variance,
            "input": lambda: encoded[:, self.d_t :] - 2,  # little noise at the start
        }[self.noise]()
        t = mean
        if self.training and log_variance is not None:
            t = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        return Bottleneck(t, self.decoder(t), mean, log_variance)
