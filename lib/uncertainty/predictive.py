"""Predictions averaged over several states of one model."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.func import functional_call


def posterior_predictive(
    model: nn.Module, states: Sequence[Mapping[str, torch.Tensor]], inputs: torch.Tensor
) -> torch.Tensor:
    """Log probabilities of the ensemble: the mean of the members' PROBABILITIES, `log (1/M) sum_m softmax(logits_m)`.

    This is the mixture `Q(y | x; S)` when the states are samples of the posterior (Feder et al. 2025). The mean of the
    logits, or one network with the mean of the weights, is something else.

    Args:
        model: maps inputs to logits, shape (..., classes); only its structure is used, its own state is untouched.
        states: state dictionaries of the members, as `lib.train.sgld` returns them.
        inputs: what the model takes.

    Returns:
        Log probabilities, shape (..., classes), without gradient.

    Raises:
        ValueError: no states.
    """
    if not states:
        raise ValueError("posterior_predictive needs at least one state")
    total = None
    with torch.no_grad():
        for state in states:
            log_probs = functional_call(model, dict(state), (inputs,)).log_softmax(-1)
            total = log_probs if total is None else torch.logaddexp(total, log_probs)
    return total - torch.log(torch.tensor(float(len(states)), dtype=total.dtype))
