"""Guided selective compression: which symbols are worth their bits, as far as the decoder can tell."""

import math

import torch
from torch import nn

from lib.codec.likelihood import SCALE_MIN


def chance_of_nonzero(scale: torch.Tensor) -> torch.Tensor:
    """P(|r| > 1/2) for a Gaussian residual r of that standard deviation: that it does not round to zero."""
    return torch.special.erfc(0.5 / (scale.clamp_min(SCALE_MIN) * math.sqrt(2)))


class SelectiveMap(nn.Module):
    """Predicts which symbols will not be zero; the others are not coded.

    The prediction starts as the prior that the scale gives, `chance_of_nonzero`; a network of contexts, mean and scale is added to its
    logit. A symbol is coded if the chance is at least that of a symbol of scale `threshold`. The decision is made of integers.

    Args:
        inputs: channels of all contexts together.
        slice_channels: of the slice.
        threshold: the scale, in steps, above which the prior codes.
        hidden: channels of the network.
    """

    def __init__(self, inputs: int, slice_channels: int, *, threshold: float = 0.3, hidden: int = 24):
        super().__init__()
        self.threshold = threshold
        self.net = nn.Sequential(
            nn.Conv2d(inputs + 2 * slice_channels, hidden, 1), nn.GELU(), nn.Conv2d(hidden, slice_channels, 1)
        )
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, contexts: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Logit of the chance that a symbol is not zero.

        Args:
            contexts: (batch, inputs, h, w).
            mean, scale: (batch, slice_channels, h, w), in steps.

        Returns:
            (batch, slice_channels, h, w).
        """
        seen = torch.cat([contexts, torch.asinh(mean), scale.log()], 1)
        return torch.logit(chance_of_nonzero(scale), eps=1e-6) + self.net(seen)

    def coded(self, logits: torch.Tensor) -> torch.Tensor:
        """Which symbols are coded, bool: a comparison of integers, the same in encoder and decoder."""
        border = torch.logit(chance_of_nonzero(torch.tensor(self.threshold, dtype=logits.dtype)), eps=1e-6)
        return torch.round(64 * (logits - border)).long() >= 0
