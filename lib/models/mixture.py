"""Bayesian mixtures that predict with log-loss: coins, finite classes, and all context trees of a depth.

Everything is in nats. The three learners have one manner: `prob()` or `predict(...)` before a symbol is seen, `update(...)`
after it, and `log_evidence`, the logarithm of the probability that the mixture gave to all that it has seen.
"""

import math
from collections.abc import Iterable

import torch


def _check_bit(bit: int) -> int:
    if bit not in (0, 1):
        raise ValueError(f"a symbol must be 0 or 1, got {bit!r}")
    return int(bit)


class BernoulliMixture:
    """All coins, mixed with a Beta prior: the rule of Laplace (1, 1) or of Krichevsky and Trofimov (1/2, 1/2).

    Args:
        ones, zeros: the two parameters of the Beta prior, positive.

    Attributes:
        log_evidence: log probability of all bits seen, in nats.

    Raises:
        ValueError: a parameter that is not positive.
    """

    def __init__(self, ones: float = 1.0, zeros: float = 1.0):
        if not (ones > 0 and zeros > 0):
            raise ValueError(f"the Beta prior needs two positive parameters, got {ones} and {zeros}")
        self.weight = [zeros, ones]
        self.log_evidence = 0.0

    def prob(self) -> float:
        """Probability that the next bit is 1."""
        return self.weight[1] / (self.weight[0] + self.weight[1])

    def update(self, bit: int) -> None:
        """Learn one bit. Raises ValueError for anything but 0 and 1."""
        bit = _check_bit(bit)
        self.log_evidence += math.log(self.weight[bit] / sum(self.weight))
        self.weight[bit] += 1


class FiniteMixture:
    """Finitely many models with a prior, for any kind of observation (Feder et al. 2025, the mixture Q).

    Args:
        log_prior: logarithms of the prior weights, shape (..., models); normalised here. Leading dimensions are
            independent learners.

    Attributes:
        log_posterior: logarithms of the normalised weights given all that was seen, shape (..., models).
        log_evidence: log probability of all that was seen, in nats, shape (...).

    Raises:
        ValueError: no models, or weights that are all zero.
    """

    def __init__(self, log_prior: torch.Tensor):
        log_prior = torch.as_tensor(log_prior)
        if log_prior.ndim == 0 or log_prior.shape[-1] == 0:
            raise ValueError(f"log_prior must have shape (..., models), got {tuple(log_prior.shape)}")
        total = log_prior.logsumexp(-1, keepdim=True)
        if not total.isfinite().all():
            raise ValueError("the prior weights must be finite, and not all zero")
        self.log_posterior = log_prior - total
        self.log_evidence = torch.zeros_like(total[..., 0])

    def predict(self, log_probs: torch.Tensor) -> torch.Tensor:
        """Log probabilities of the mixture: the PROBABILITIES of the models are averaged, not their logarithms.

        Args:
            log_probs: log probabilities by each model, shape (..., models, outcomes), outcomes last.

        Returns:
            Log probabilities by the mixture, shape (..., outcomes).
        """
        return (self.log_posterior[..., None] + log_probs).logsumexp(-2)

    def update(self, log_likelihood: torch.Tensor) -> None:
        """Learn one observation, or several at once.

        Args:
            log_likelihood: its log probability by each model, shape (..., models).

        Raises:
            ValueError: another number of models, or an observation that no model with weight allows.
        """
        if log_likelihood.shape[-1] != self.log_posterior.shape[-1]:
            raise ValueError(
                f"expected the log likelihood of {self.log_posterior.shape[-1]} models, got {log_likelihood.shape[-1]}"
            )
        joint = self.log_posterior + log_likelihood
        step = joint.logsumexp(-1)
        if not step.isfinite().all():
            raise ValueError("the observation has probability zero under every model that has weight")
        self.log_posterior = joint - step[..., None]
        self.log_evidence = self.log_evidence + step


class ContextTreeWeighting:
    """The mixture over ALL binary context trees up to a depth, in `O(depth)` per bit.

    A context tree says how much of the past matters: the next bit is a coin of the leaf that the last bits lead to.
    Tree `S` has the prior weight `2^-(2 leaves - 1)` (leaves at the full depth are not counted in it), every leaf the
    Beta(1/2, 1/2) prior of Krichevsky and Trofimov. Doubly exponentially many trees are mixed exactly, by the ratio
    form of the recursion of Willems, Shtarkov and Tjalkens (1995): each node stores only the odds of stopping there.

    Args:
        depth: number of past bits that may matter; memory grows by at most `depth + 1` nodes per bit.
        context: the bits before the first one, the most recent last; zeros by default.

    Attributes:
        log_evidence: log probability of all bits seen, in nats.

    Raises:
        ValueError: a negative depth, or a context that is shorter than the depth or not made of 0 and 1.
    """

    def __init__(self, depth: int, context: Iterable[int] | None = None):
        if depth < 0:
            raise ValueError(f"depth must be at least 0, got {depth}")
        past = [0] * depth if context is None else [_check_bit(bit) for bit in context]
        if len(past) < depth:
            raise ValueError(f"the context must have at least depth={depth} bits, got {len(past)}")
        self.depth = depth
        self._past = past[len(past) - depth :]
        self._nodes: dict[
            tuple[int, int], list[float]
        ] = {}  # (level, suffix) -> zeros, ones, log odds of stopping
        self.log_evidence = 0.0

    def _path(self) -> list[tuple[int, int]]:
        suffix, keys = 1, [(0, 1)]
        for level in range(1, self.depth + 1):
            suffix = 2 * suffix + self._past[-level]
            keys.append((level, suffix))
        return keys

    def _predict(self) -> tuple[list, list[float]]:
        """The path's nodes from the root, and at each the mixture's probability of a one."""
        nodes = [self._nodes.get(key) or [0.0, 0.0, 0.0] for key in self._path()]
        below = [0.0] * (self.depth + 1)
        for level in range(self.depth, -1, -1):
            zeros, ones, odds = nodes[level]
            estimate = (ones + 0.5) / (zeros + ones + 1.0)
            if level == self.depth:
                below[level] = estimate
            else:
                stop = 1.0 / (1.0 + math.exp(-odds)) if odds > -700 else 0.0
                below[level] = stop * estimate + (1.0 - stop) * below[level + 1]
        return nodes, below

    def prob(self) -> float:
        """Probability that the next bit is 1."""
        return self._predict()[1][0]

    def update(self, bit: int) -> None:
        """Learn one bit. Raises ValueError for anything but 0 and 1."""
        bit = _check_bit(bit)
        nodes, below = self._predict()
        self.log_evidence += math.log(below[0] if bit else 1.0 - below[0])
        for level, (key, node) in enumerate(zip(self._path(), nodes, strict=True)):
            estimate = (node[bit] + 0.5) / (node[0] + node[1] + 1.0)
            if level < self.depth:
                child = below[level + 1] if bit else 1.0 - below[level + 1]
                node[2] += math.log(estimate / child)
            node[bit] += 1.0
            self._nodes[key] = node
        if self.depth:
            self._past = [*self._past[1:], bit]

    def fit(self, bits: Iterable[int]) -> "ContextTreeWeighting":
        """Learn a sequence of bits in order; returns self."""
        for bit in bits:
            self.update(bit)
        return self
