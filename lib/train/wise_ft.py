"""Between two sets of weights."""

from collections.abc import Mapping

import torch


def wise_ft(
    theta0: Mapping[str, torch.Tensor], theta1: Mapping[str, torch.Tensor], alpha: float
) -> dict[str, torch.Tensor]:
    """WiSE-FT: the mean `(1 - alpha) theta0 + alpha theta1` of two states of one network.

    Between a pre-trained and a fine-tuned state it often has most of what both can do; nothing is trained.

    Args:
        theta0: the state at `alpha=0`, usually the pre-trained one.
        theta1: the state at `alpha=1`, usually the fine-tuned one.
        alpha: in [0, 1].

    Returns:
        A new state; entries that are not floating point, such as counters, are those of `theta1`.

    Raises:
        ValueError: states with other names, shapes or types, or an alpha out of range.

    Wortsman et al. (2022, arXiv:2109.01903), equation 1.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    if set(theta0) != set(theta1):
        raise ValueError(f"the states differ in their names: {sorted(set(theta0) ^ set(theta1))}")
    mixed = {}
    for name, end in theta1.items():
        start = theta0[name]
        if (start.shape, start.dtype) != (end.shape, end.dtype):
            raise ValueError(f"{name} has another shape or type: {tuple(start.shape)} and {tuple(end.shape)}")
        mixed[name] = ((1 - alpha) * start + alpha * end if end.is_floating_point() else end).detach().clone()
    return mixed
