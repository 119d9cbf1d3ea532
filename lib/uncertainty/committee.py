"""The entropy of an averaged prediction, taken apart."""

from typing import NamedTuple

import torch


class CommitteeEntropy(NamedTuple):
    """What `committee_entropy` returns.

    Attributes:
        mean: the mean distribution, (..., C).
        entropy: of the mean, in nats, (...).
        mutual_information: entropy less the mean entropy of the members, in nats, at least 0, (...): how far they disagree.
    """

    mean: torch.Tensor
    entropy: torch.Tensor
    mutual_information: torch.Tensor


def committee_entropy(probabilities: torch.Tensor) -> CommitteeEntropy:
    """Uncertainty of several predictions for one input, for example of several dropout masks.

    Args:
        probabilities: (members, ..., C), each row a distribution.

    Returns:
        A `CommitteeEntropy`.

    Raises:
        ValueError: fewer than two dimensions or no members, negative values, or rows that do not sum to 1.
    """
    if probabilities.ndim < 2 or not len(probabilities):
        raise ValueError(f"probabilities must be (members >= 1, ..., C), got {tuple(probabilities.shape)}")
    sums = probabilities.sum(-1)
    if probabilities.amin() < 0 or not torch.allclose(sums, torch.ones_like(sums), atol=1e-4):
        raise ValueError("probabilities must be distributions in the last dimension")
    mean = probabilities.mean(0)
    entropy = torch.special.entr(mean).sum(-1)
    within = torch.special.entr(probabilities).sum(-1).mean(0)
    return CommitteeEntropy(mean, entropy, (entropy - within).clamp_min(0))
