"""Refining the latents of one image: stochastic Gumbel annealing. The decoder stays as it is."""

import math
from typing import NamedTuple

import torch

from lib.codec.checkerboard import keep
from lib.codec.likelihood import gaussian_bits
from lib.codec.model import MULTIPLE, ImageCodec

METHODS = ("gumbel", "straight-through")
_EDGE = 1e-4  # atanh is infinite at 1


class Refined(NamedTuple):
    """What `sga_refine` found.

    Attributes:
        y, z: latents and hyper-latents, to be rounded by `ImageCodec.encode_latents`.
        history: for each step the relaxed bits a pixel, the squared error and the temperature, (steps, 3).
    """

    y: torch.Tensor
    z: torch.Tensor
    history: torch.Tensor


def rounding_logits(v: torch.Tensor, tau: float) -> torch.Tensor:
    """Unnormalised logarithms of the chances to round down and up: -atanh(v - floor v) / tau, -atanh(ceil v - v) / tau.

    Returns:
        (..., 2). Distances are clamped to at most 1 - 1e-4.
    """
    below = v - v.detach().floor()
    distances = torch.stack([below, 1 - below], -1).clamp(0, 1 - _EDGE)
    return -torch.atanh(distances) / tau


def gumbel_round(v: torch.Tensor, tau: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """A random number between the floor of v and the next integer: a Gumbel-softmax sample of `rounding_logits`.

    For tau towards zero it is the nearest integer; it has a gradient at every tau.

    Raises:
        ValueError: a temperature that is not positive.
    """
    if tau <= 0:
        raise ValueError(f"tau must be positive, got {tau}")
    logits = rounding_logits(v, tau)
    uniform = torch.rand(logits.shape, generator=generator, dtype=v.dtype).clamp(1e-9, 1 - 1e-7)
    gumbel = -torch.log(-torch.log(uniform))
    return v.detach().floor() + ((logits + gumbel) / tau).softmax(-1)[..., 1]


def annealed_temperature(step: int, steps: int, *, rate: float = 1e-3, start: float = 0.35) -> float:
    """min(0.5, 0.5 exp(-rate (step - start steps))): constant first, then falling."""
    return min(0.5, 0.5 * math.exp(-rate * (step - start * steps)))


def sga_refine(
    model: ImageCodec,
    image: torch.Tensor,
    rate: int = 0,
    *,
    steps: int = 2000,
    lr: float = 5e-3,
    method: str = "gumbel",
    anneal: float | None = None,
    generator: torch.Generator | None = None,
) -> Refined:
    """Latents and hyper-latents of one image that cost less than those of the analysis transform.

    Adam on (y, z) for bits a pixel + lambda 255**2 MSE, where both are rounded by `gumbel_round` at a falling temperature, or, for
    comparison, by rounding whose gradient is that of the identity. Nothing of the model changes.

    Args:
        model: with `entropy.walk`, in any mode.
        image: (3, height, width) in [0, 1], sides divisible by 64.
        rate: index of the rate point.
        steps, lr: of Adam.
        method: `"gumbel"` or `"straight-through"`.
        anneal: of `annealed_temperature`; by default such that the last temperature is that of 2000 steps at 1e-3.
        generator: of the samples.

    Raises:
        ValueError: an unknown method, or sides that are not divisible.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if image.ndim != 3 or image.shape[1] % MULTIPLE or image.shape[2] % MULTIPLE:
        raise ValueError(
            f"an image must be (3, height, width), sides divisible by {MULTIPLE}, got {tuple(image.shape)}"
        )
    anneal = 2.0 / steps if anneal is None else anneal
    with torch.no_grad():
        start = model.latents(image[None], rate)
        y, z = start.clone(), model.hyper_analysis(start / model.entropy.spread)
        medians = model.prior.medians().view(-1, 1, 1)
    y, z = y.requires_grad_(), z.requires_grad_()
    optimizer, pixels, weight = torch.optim.Adam([y, z], lr=lr), image[0].numel(), model.lambdas[rate]
    history = []
    for step in range(steps):
        tau = annealed_temperature(step, steps, rate=anneal)

        def relax(v, tau=tau):
            if method == "gumbel":
                return gumbel_round(v, tau, generator)
            return v + (torch.round(v) - v).detach()

        parts, bits = y.chunk(model.entropy.slices, 1), []

        def quantise(i, parity, mean, scale, relax=relax, parts=parts, bits=bits):
            symbols = relax(parts[i] - mean)
            places = scale > 0
            price = gaussian_bits(symbols, scale)
            bits.append(keep(torch.where(places, price, torch.zeros_like(price)), parity).sum())
            return symbols + mean

        z_hat = relax(z - medians) + medians
        decoded = model.entropy.walk(model.hyper_synthesis(z_hat), quantise)[0]
        shown = model.reconstruct(decoded, rate)[0].clamp(0, 1)  # as the decoder shows it
        total = model.prior.bits(z_hat).sum() + sum(bits)
        error = (shown - image).square().mean()
        loss = total / pixels + weight * 255**2 * error
        optimizer.zero_grad()
        y.grad, z.grad = torch.autograd.grad(loss, (y, z))
        optimizer.step()
        history.append([(total / pixels).item(), error.item(), tau])
    return Refined(y.detach(), z.detach(), torch.tensor(history))
