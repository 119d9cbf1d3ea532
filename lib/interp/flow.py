"""Which coordinates of the hidden vectors carry their mass, and for how long."""

from typing import NamedTuple

import torch


class ActivationFlow(NamedTuple):
    """What `activation_flow` finds.

    Attributes:
        active: bool, (batch, seq, dim): whether the coordinate belongs to the token's active set.
        active_fraction: the mean size of the active sets over dim.
        persistence: the share of a token's active set that is in the next token's as well, averaged over neighbouring
            tokens. Sets drawn at random give about `active_fraction`.
        shared_index: the coordinates that are active for at least the asked share of all tokens, ascending.
    """

    active: torch.Tensor
    active_fraction: float
    persistence: float
    shared_index: torch.Tensor


def activation_flow(
    hidden: torch.Tensor, mass: float = 0.9, *, power: float = 2.0, share: float = 0.9
) -> ActivationFlow:
    """The active coordinates of each token and how long they stay active (Chen et al. 2024, section 2).

    A token's active set is the smallest set of coordinates that holds the share `mass` of `sum |x_i| ** power`.

    Args:
        hidden: floating point, (batch, seq, dim), seq at least 2.
        mass: in (0, 1].
        power: 2 for the squared mass, 1 for the sum of absolute values.
        share: a coordinate is shared if at least this share of the tokens has it in the active set.

    Returns:
        An `ActivationFlow`.

    Raises:
        TypeError: hidden is not floating point.
        ValueError: a wrong shape, a vector of zeros or one that is not finite, or a parameter out of range.
    """
    if not hidden.is_floating_point():
        raise TypeError(f"hidden must be floating point, got {hidden.dtype}")
    if hidden.ndim != 3 or hidden.shape[1] < 2 or 0 in hidden.shape:
        raise ValueError(f"hidden must be (batch, seq >= 2, dim), not empty, got {tuple(hidden.shape)}")
    if not 0 < mass <= 1 or not 0 < share <= 1 or power <= 0:
        raise ValueError(
            f"mass and share must be in (0, 1] and power positive, got {mass}, {share} and {power}"
        )
    weight = hidden.detach().double().abs()
    weight = (weight / weight.amax(-1, keepdim=True)) ** power
    if not weight.isfinite().all():
        raise ValueError("hidden must be finite, and no token's vector all zeros")
    ordered, order = weight.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered  # a coordinate is needed while those before it hold too little
    needed = (before < mass * ordered.sum(-1, keepdim=True) * (1 - 1e-12)) & (ordered > 0)
    active = torch.zeros_like(needed).scatter(-1, order, needed)
    stays = (active[:, 1:] & active[:, :-1]).sum(-1) / active[:, :-1].sum(-1)
    often = active.double().mean((0, 1)) >= share
    return ActivationFlow(
        active, active.double().mean().item(), stays.double().mean().item(), often.nonzero()[:, 0]
    )
