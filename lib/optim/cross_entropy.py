"""The cross-entropy method: search by fitting a sampling distribution to the best of its own samples."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass
class Generation:
    """One round of `cross_entropy_method`: what was drawn, how it scored, which of it was elite."""

    choices: list[dict]
    scores: list[float]
    elite: list[int]


def cross_entropy_method(
    score: Callable[[dict], float],
    space: Mapping[str, Sequence],
    *,
    samples: int = 8,
    elite: float = 0.25,
    smoothing: float = 0.7,
    iterations: int = 5,
    generator: torch.Generator | None = None,
) -> tuple[dict[str, torch.Tensor], list[Generation]]:
    """Look for the choice with the highest score, each dimension of the choice drawn from its own categorical.

    All start even. After a round, each categorical moves to the frequencies among the elite, the best samples:
    pi <- (1 - smoothing) pi + smoothing * frequency. The frequencies are the product distribution that is closest,
    in KL divergence, to the law of the samples given that they are elite.

    Source: Rubinstein, The cross-entropy method for combinatorial and continuous optimization (1999).

    Args:
        score: a number for a choice, {name: value}; higher is better, -inf is allowed. A choice drawn again is not
            scored again.
        space: the values of each dimension.
        samples: draws in a round.
        elite: the fraction of a round that is elite; at least one sample is.
        smoothing: the weight of the new frequencies, in (0, 1].
        iterations: rounds.
        generator: where the draws come from; the global random state without it.

    Returns:
        The last probabilities, {name: tensor (values,)}, and the rounds.

    Raises:
        ValueError: an empty space or dimension, sizes below 1, `elite` or `smoothing` outside (0, 1], or a score that is nan.
    """
    if not space or any(len(values) < 1 for values in space.values()):
        raise ValueError("space must have at least one dimension, and each at least one value")
    if samples < 1 or iterations < 1:
        raise ValueError(f"samples and iterations must be at least 1, got {samples} and {iterations}")
    if not 0 < elite <= 1 or not 0 < smoothing <= 1:
        raise ValueError(f"elite and smoothing must be in (0, 1], got {elite} and {smoothing}")
    pi = {name: torch.full((len(values),), 1 / len(values)) for name, values in space.items()}
    known, history = {}, []
    for _ in range(iterations):
        drawn = {
            name: p.multinomial(samples, replacement=True, generator=generator) for name, p in pi.items()
        }
        rows = list(zip(*(column.tolist() for column in drawn.values()), strict=True))
        choices = [{name: space[name][i] for name, i in zip(space, row, strict=True)} for row in rows]
        for row, choice in zip(rows, choices, strict=True):
            if row not in known:
                known[row] = float(score(choice))
                if math.isnan(known[row]):
                    raise ValueError(f"the score of {choice} is nan")
        scores = [known[row] for row in rows]
        best = sorted(range(samples), key=lambda i: -scores[i])[: max(1, round(elite * samples))]
        for name, column in drawn.items():
            frequency = column[best].bincount(minlength=len(space[name])) / len(best)
            pi[name] = (1 - smoothing) * pi[name] + smoothing * frequency
        history.append(Generation(choices, scores, best))
    return pi, history
