"""Distributions of quantised latents: likelihoods for training, integer tables for coding."""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import ndtr
from torch import nn

from lib.codec.coder import Tables, integer_frequencies

SCALE_MIN, SCALE_MAX, SCALE_LEVELS = 0.11, 256.0, 64
SMALLEST = 1e-9  # likelihoods below this are not computed as differences: 30 bits a symbol


def gaussian_bits(residual: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Bits of values under a Gaussian of that standard deviation, integrated over an interval of length one.

    -log2(Phi((r + 1/2) / s) - Phi((r - 1/2) / s)), with the sign of r chosen so that the difference is one of small
    numbers in the tail. With rounded residuals it is the price of a symbol; with uniform noise in place of
    rounding, what training uses.

    Args:
        residual: latent minus mean, any shape.
        scale: broadcastable, clamped to at least 0.11.

    Returns:
        Bits, in the broadcast shape. Beyond 30 bits, where the difference loses its digits, those of the density at the
        nearer end of the interval, so that the gradient never vanishes.
    """
    r, scale = residual.abs(), scale.clamp_min(SCALE_MIN)
    near, far = (r - 0.5) / scale, (r + 0.5) / scale
    mass = 0.5 * (torch.erfc(near / math.sqrt(2)) - torch.erfc(far / math.sqrt(2)))
    density = near.square() / (2 * math.log(2)) + torch.log2(scale * math.sqrt(2 * math.pi))
    return torch.where(mass > SMALLEST, -torch.log2(mass.clamp_min(SMALLEST)), density)


def scale_levels() -> torch.Tensor:
    """The 64 standard deviations for which there are tables, evenly spaced in the logarithm, (64,) float64."""
    return torch.linspace(math.log(SCALE_MIN), math.log(SCALE_MAX), SCALE_LEVELS, dtype=torch.float64).exp()


def scale_index(scale: torch.Tensor) -> torch.Tensor:
    """The level nearest in the logarithm, int64. From here on encoder and decoder compare integers."""
    levels = scale_levels()
    borders = (levels[1:] * levels[:-1]).sqrt().to(scale.device)
    return torch.bucketize(scale.double().contiguous(), borders)


@functools.cache
def gaussian_tables() -> Tables:
    """One table of integer frequencies for each of `scale_levels()`, for rounded residuals.

    A table reaches 8 steps, or as far as a symbol is worth a 2**16-th, and has an escape for the tails.
    """
    frequencies, offsets = [], []
    for scale in scale_levels().tolist():
        reach = max(8, math.ceil(4.2 * scale))  # a rare symbol costs 16 bits, an escape 48
        k = np.arange(-reach, reach + 1)
        pmf = ndtr((0.5 - abs(k)) / scale) - ndtr((-0.5 - abs(k)) / scale)
        tails = 2 * ndtr((-reach - 0.5) / scale)
        frequencies.append(integer_frequencies(np.append(pmf, tails)))
        offsets.append(-reach)
    return Tables(frequencies, offsets)


class FactorizedPrior(nn.Module):
    """A density for each channel, the same at every place: a mixture of logistic distributions.

    Its distribution function is monotone by construction. Quantisation is centred at the medians, which are found
    by bisection.

    Args:
        channels: how many.
        components: of each mixture.
        spread: the standard deviation that the components start with.
    """

    def __init__(self, channels: int, *, components: int = 3, spread: float = 1.0):
        super().__init__()
        if channels < 1 or components < 1:
            raise ValueError(f"channels and components must be positive, got {channels} and {components}")
        self.location = nn.Parameter(torch.linspace(-1, 1, components).repeat(channels, 1) * spread / 2)
        self.log_scale = nn.Parameter(torch.full((channels, components), math.log(spread / 1.8)))
        self.weight = nn.Parameter(torch.zeros(channels, components))

    def bits(self, z: torch.Tensor) -> torch.Tensor:
        """Bits of z, (batch, channels, height, width), integrated over intervals of length one: the same shape."""
        z = z[..., None]
        shape = (-1, 1, 1, self.location.shape[1])
        location, scale = self.location.view(shape), self.log_scale.exp().view(shape)
        centre = (z - location).abs()
        mass = torch.sigmoid((0.5 - centre) / scale) - torch.sigmoid((-0.5 - centre) / scale)
        likelihood = (self.weight.softmax(-1).view(shape) * mass).sum(-1)
        return -torch.log2(likelihood.clamp_min(SMALLEST))

    def quantise(self, z: torch.Tensor) -> torch.Tensor:
        """round(z - median) + median, with the gradient of z: what decoder and hyper-decoder see."""
        medians = self.medians().view(-1, 1, 1)
        return z + (torch.round(z - medians) + medians - z).detach()

    @torch.no_grad()
    def medians(self) -> torch.Tensor:
        """Where each channel's distribution function is 1/2, (channels,), to float32's precision."""
        location, scale = self.location.double(), self.log_scale.double().exp()
        weight = self.weight.double().softmax(-1)
        low, high = location.min(-1).values, location.max(-1).values
        for _ in range(40):
            middle = (low + high) / 2
            below = (weight * torch.sigmoid((middle[:, None] - location) / scale)).sum(-1) < 0.5
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return ((low + high) / 2).to(self.location.dtype)

    @torch.no_grad()
    def tables(self, *, reach: int = 64) -> Tables:
        """One table a channel for round(z - median), from -reach to reach, with an escape."""
        location, scale = self.location.double(), self.log_scale.double().exp()
        weight, medians = self.weight.double().softmax(-1), self.medians().double()
        edges = medians[:, None] + torch.arange(-reach, reach + 2, dtype=torch.float64) - 0.5
        cdf = (weight[:, None] * torch.sigmoid((edges[..., None] - location[:, None]) / scale[:, None])).sum(
            -1
        )
        pmf = F.pad(cdf.diff(dim=1), (0, 1))
        pmf[:, -1] = cdf[:, 0] + 1 - cdf[:, -1]
        return Tables([integer_frequencies(row) for row in pmf.numpy().clip(0)], [-reach] * len(pmf))
