"""Votes of a crowd turned into a distribution over the classes of each item: votes counted and weighted, and distributions
aggregated. `lib.noise.crowd_models` holds the methods with a likelihood."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

_AGGREGATES = ("mean", "product", "js_centroid", "majority")


class Votes(NamedTuple):
    """Checked votes: one entry of `tasks`, `workers` and `labels` for each, and how many of each there are."""

    tasks: torch.Tensor
    workers: torch.Tensor
    labels: torch.Tensor
    num_tasks: int
    num_workers: int
    num_classes: int

    def count(self, weights: torch.Tensor | None = None) -> torch.Tensor:
        """The sum of the weights (1 by default) of an item's votes for each class, (num_tasks, num_classes), float64."""
        size = self.num_tasks * self.num_classes
        index = self.tasks * self.num_classes + self.labels
        total = torch.bincount(index, weights=weights, minlength=size)
        return total.double().reshape(self.num_tasks, self.num_classes)

    def by_worker(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of one number a vote over each worker's votes, (num_workers,)."""
        return torch.bincount(self.workers, weights=values, minlength=self.num_workers)


def check_votes(tasks: torch.Tensor, workers: torch.Tensor, labels: torch.Tensor, num_classes: int) -> Votes:
    """What every method demands of the votes.

    Raises:
        TypeError: indices that are not integers.
        ValueError: not three vectors of one length, no votes, fewer than 2 classes, labels out of range, or a task or
            worker between 0 and the largest index without a vote.
    """
    named = {"tasks": tasks, "workers": workers, "labels": labels}
    for name, values in named.items():
        if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise TypeError(f"{name} must be integers, got {values.dtype}")
    shapes = [tuple(values.shape) for values in named.values()]
    if tasks.dim() != 1 or len(set(shapes)) > 1 or not len(tasks):
        raise ValueError(f"tasks, workers and labels must be vectors of one length above 0, got {shapes}")
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    if bool(((labels < 0) | (labels >= num_classes)).any()):
        raise ValueError(
            f"labels must be in [0, {num_classes}), got values from {labels.min()} to {labels.max()}"
        )
    sizes = []
    for name, values in (("task", tasks), ("worker", workers)):
        if bool((values < 0).any()) or bool((torch.bincount(values) == 0).any()):
            raise ValueError(
                f"every {name} from 0 to the largest index must have a vote; "
                "torch.unique(..., return_inverse=True) numbers them so"
            )
        sizes.append(int(values.max()) + 1)
    return Votes(tasks.long(), workers.long(), labels.long(), *sizes, num_classes)


def normalised(
    tasks: torch.Tensor, workers: torch.Tensor, labels: torch.Tensor, num_classes: int
) -> torch.Tensor:
    """The share of each class among an item's votes.

    Args:
        tasks: the item of each vote, (votes,), numbered from 0 without gaps.
        workers: who voted, (votes,), numbered from 0 without gaps.
        labels: the class that was voted for, (votes,), in [0, num_classes).
        num_classes: K, at least 2.

    Returns:
        (items, K), float64, rows with sum 1.

    Raises:
        TypeError, ValueError: as `lib.noise.crowd.check_votes`.
    """
    counts = check_votes(tasks, workers, labels, num_classes).count()
    return counts / counts.sum(1, keepdim=True)


def softmax_counts(
    tasks: torch.Tensor, workers: torch.Tensor, labels: torch.Tensor, num_classes: int
) -> torch.Tensor:
    """The softmax of an item's counts.

    The posterior under workers who are right with probability e / (e + K - 1) and err evenly; more votes sharpen it.
    Arguments, result and errors as `normalised`.
    """
    return check_votes(tasks, workers, labels, num_classes).count().softmax(1)


def majority_vote(
    tasks: torch.Tensor,
    workers: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    *,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """The class with most votes as a one-hot row; ties are broken at random.

    Args:
        generator: of the ties; the global source of randomness when None. The other arguments, the result and the errors
            are those of `normalised`.
    """
    counts = check_votes(tasks, workers, labels, num_classes).count()
    lots = torch.rand(counts.shape, generator=generator, dtype=torch.float64)  # below 1: decides ties only
    return torch.nn.functional.one_hot((counts + lots).argmax(1), num_classes).double()


def wawa(
    tasks: torch.Tensor,
    workers: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    *,
    return_parameters: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Worker agreement with the aggregate: a vote weighs as much as its worker agrees with the majority.

    Where classes tie for the majority, agreeing with one of them counts as one over their number.

    Args:
        return_parameters: also return the workers' skills. The other arguments are those of `normalised`.

    Returns:
        (items, K), float64; with `return_parameters` also the skills, (workers,), in [0, 1].

    Raises:
        TypeError, ValueError: as `lib.noise.crowd.check_votes`.
    """
    votes = check_votes(tasks, workers, labels, num_classes)
    skill = _agreement(votes, votes.count())
    shares = _shares(votes, skill)
    return (shares, skill) if return_parameters else shares


def zero_based_skill(
    tasks: torch.Tensor,
    workers: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    *,
    iterations: int = 100,
    learning_rate: float = 1.0,
    halve_every: int = 20,
    return_parameters: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """A weighted vote whose weights follow the workers' agreement with the weighted vote.

    From equal skills, s <- s + rate * (agreement with the winner of the vote weighted by s - s); the rate is halved every
    `halve_every` iterations. (The name and the schedule are crowd-kit's.)

    Args:
        iterations: of the update, at least 1.
        learning_rate: the first rate, in (0, 1].
        halve_every: at least 1.
        return_parameters: also return the workers' skills. The other arguments are those of `normalised`.

    Returns:
        (items, K), float64; with `return_parameters` also the skills, (workers,), in [0, 1].

    Raises:
        TypeError, ValueError: as `lib.noise.crowd.check_votes`; options out of range.
    """
    votes = check_votes(tasks, workers, labels, num_classes)
    if iterations < 1 or halve_every < 1 or not 0 < learning_rate <= 1:
        raise ValueError(
            "iterations and halve_every must be at least 1 and learning_rate in (0, 1], "
            f"got {iterations}, {halve_every} and {learning_rate}"
        )
    skill = torch.full((votes.num_workers,), 1 / num_classes, dtype=torch.float64)
    for step in range(1, iterations + 1):
        rate = learning_rate * 0.5 ** (step // halve_every)
        skill = skill + rate * (_agreement(votes, votes.count(skill[votes.workers])) - skill)
    shares = _shares(votes, skill)
    return (shares, skill) if return_parameters else shares


def aggregate(distributions: Sequence[torch.Tensor], *, method: str = "mean") -> torch.Tensor:
    """One distribution for each item out of several.

    With P_1, ..., P_M at an item, in the order of `method`:

    - "mean": (1/M) sum_m P_m, the minimiser of sum_m KL(P_m || q) (Wright and Augenstein, arXiv 2212.09409);
    - "product": prod_m P_m, renormalised (conflation); a probability counts as at least 1e-12;
    - "js_centroid": the minimiser of sum_m JSD(P_m, q), by the fixed point q ~ prod_m ((P_m + q) / 2)^(1/M);
    - "majority": one-hot at the class that most P_m rank first; the mean decides ties.

    Args:
        distributions: tensors (items, K), rows with sum 1.
        method: "mean", "product", "js_centroid" or "majority".

    Returns:
        (items, K), rows with sum 1, float64.

    Raises:
        ValueError: an unknown method, no distributions, different shapes, or rows that are not distributions.
    """
    if method not in _AGGREGATES:
        raise ValueError(f"method must be one of {_AGGREGATES}, got {method!r}")
    if (
        not len(distributions)
        or len({tuple(p.shape) for p in distributions}) > 1
        or distributions[0].dim() != 2
    ):
        raise ValueError(
            f"distributions must be tensors of one shape (items, K), got {[tuple(p.shape) for p in distributions]}"
        )
    stack = torch.stack([p.double() for p in distributions])  # (M, items, K)
    sums = stack.sum(2)
    if bool((stack < 0).any()) or not torch.allclose(sums, torch.ones_like(sums), atol=1e-5):
        raise ValueError("every row must be a distribution: at least 0 and with sum 1")
    if method == "mean":
        return stack.mean(0)
    if method == "product":
        return stack.clamp_min(1e-12).log().sum(0).softmax(1)
    if method == "majority":
        firsts = torch.nn.functional.one_hot(stack.argmax(2), stack.shape[2]).sum(0)
        return torch.nn.functional.one_hot((firsts + 0.5 * stack.mean(0)).argmax(1), stack.shape[2]).double()
    centroid = stack.mean(0)
    for _ in range(1000):
        # a class that no distribution allows stays at 0: log 0 is -inf, and its softmax 0
        update = ((stack + centroid) / 2).log().mean(0).softmax(1)
        change = (update - centroid).abs().max()
        centroid = update
        if change < 1e-10:
            break
    return centroid


def _agreement(votes, scores):
    """How often each worker votes for the class with the highest score, (workers,); a tie of t classes counts 1/t."""
    best = (scores >= scores.max(1, keepdim=True).values - 1e-9).double()
    best = best / best.sum(1, keepdim=True)
    agreed = votes.by_worker(best[votes.tasks, votes.labels])
    return agreed / votes.by_worker(torch.ones_like(votes.tasks, dtype=torch.float64))


def _shares(votes, skill):
    counts = votes.count(skill[votes.workers])
    total = counts.sum(1, keepdim=True)
    # an item all of whose workers have skill 0 keeps its plain counts
    counts = torch.where(total > 0, counts, votes.count())
    return counts / counts.sum(1, keepdim=True)
