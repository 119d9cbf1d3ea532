"""Active distillation: which points of a pool to send to a teacher that is expensive and sometimes wrong.

Reference: Baykal et al., Robust Active Distillation, 2022, arXiv:2210.01213.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from lib.train.ensemble import fit_ensemble

STRATEGIES = ("rad", "margin", "entropy", "uniform", "coreset")


class RADWeights(NamedTuple):
    """The solution of the game between a sampler and a teacher.

    Attributes:
        probabilities: what the sampler plays, float64 (n,), summing to 1.
        value: the expected gain that it is sure of, whatever points the teacher gets wrong.
        support: on how many points, those of largest gain, the probabilities are not zero.
    """

    probabilities: torch.Tensor
    value: float
    support: int


def margin_gains(probabilities: torch.Tensor) -> torch.Tensor:
    """One minus the margin: what a student may learn from a point, 1 - (largest - second largest probability).

    Args:
        probabilities: the student's, (n, C) with C at least 2.

    Returns:
        (n,), in [0, 1].

    Raises:
        ValueError: not a matrix with two columns or more, or rows that are not distributions.
    """
    _check_probabilities(probabilities)
    top = probabilities.topk(2, 1).values
    return (1 - (top[:, 0] - top[:, 1])).clamp(0, 1)


def entropy_gains(probabilities: torch.Tensor) -> torch.Tensor:
    """The student's entropy over log C, (n,) in [0, 1]. Arguments and errors as of `margin_gains`."""
    _check_probabilities(probabilities)
    entropy = torch.special.entr(probabilities).sum(1)
    return (entropy / math.log(probabilities.shape[1])).clamp(0, 1)


def rad_weights(gains: torch.Tensor, mistakes: int) -> RADWeights:
    """The sampling distribution that is sure of the largest expected gain when any `mistakes` points may be worthless.

    It maximises, over distributions q, the minimum over all sets of at most `mistakes` points of the sum of q_i g_i
    outside the set. On the k points of largest gain q_i is proportional to 1 / g_i, so that every product q_i g_i is
    the same and no point is a better target than another; k maximises (k - mistakes) / sum of 1 / g_i. Cost O(n log n).
    Points without gain are never drawn, unless nothing can be gained at all: then q is uniform and the value 0.

    Args:
        gains: (n,), finite and not negative.
        mistakes: m, how many of the n points the teacher may get wrong, from 0 to n.

    Raises:
        TypeError: mistakes that are not an integer.
        ValueError: gains that are empty, negative, not finite or not a vector; mistakes out of range.

    Reference: Baykal et al. (2022), the min-max game of their section on robust sampling.
    """
    gains = _check_gains(gains, mistakes)
    ranked, order = gains.sort(descending=True, stable=True)
    count = torch.arange(1, len(gains) + 1, dtype=torch.float64)
    sure = (count - mistakes) / (1 / ranked).cumsum(0)  # 1 / 0 = inf makes the value of such a support 0
    best = int(sure.argmax())
    if sure[best] <= 0:
        return RADWeights(torch.full_like(gains, 1 / len(gains)), 0.0, len(gains))
    weights = torch.zeros_like(gains)
    weights[order[: best + 1]] = (1 / ranked[: best + 1]) / (1 / ranked[: best + 1]).sum()
    return RADWeights(weights, sure[best].item(), best + 1)


def worst_case_value(probabilities: torch.Tensor, gains: torch.Tensor, mistakes: int) -> float:
    """The expected gain when the adversary, who sees the distribution, makes the `mistakes` most valuable points worthless.

    Args:
        probabilities: (n,), a distribution.
        gains: (n,), as of `rad_weights`.
        mistakes: as of `rad_weights`.

    Raises:
        TypeError, ValueError: as `rad_weights`; probabilities that are no distribution over the points.
    """
    gains = _check_gains(gains, mistakes)
    probabilities = torch.as_tensor(probabilities, dtype=torch.float64)
    if probabilities.shape != gains.shape:
        raise ValueError(
            f"probabilities must have the shape of gains, {tuple(gains.shape)}, got {tuple(probabilities.shape)}"
        )
    _check_probabilities(probabilities[None], least=1)
    products = (probabilities * gains).sort(descending=True).values
    return products[mistakes:].sum().item()


def rad_sample(
    gains: torch.Tensor, mistakes: int, budget: int, *, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Draw `budget` different points by `rad_weights`.

    A support smaller than the budget is taken whole, and the game is played again on the points that are left. So
    `mistakes=0`, whose support is one point, gives the points of largest gain.

    Args:
        gains: (n,).
        mistakes: as of `rad_weights`; at most the number of points left in later games.
        budget: how many points, from 1 to n.
        generator: of the draws.

    Returns:
        Indices, int64 (budget,), all different.

    Raises:
        TypeError, ValueError: as `rad_weights`; a budget out of range.
    """
    gains = _check_gains(gains, mistakes)
    if not 1 <= budget <= len(gains):
        raise ValueError(f"budget must be from 1 to the number of points, {len(gains)}, got {budget}")
    left, chosen = torch.arange(len(gains)), []
    while budget:
        weights = rad_weights(gains[left], min(mistakes, len(left)))
        draws = min(budget, weights.support)
        if draws == weights.support:
            places = weights.probabilities.topk(draws).indices
        else:
            places = weights.probabilities.multinomial(draws, generator=generator)
        chosen.append(left[places])
        keep = torch.ones(len(left), dtype=torch.bool).index_fill(0, places, False)
        left, budget = left[keep], budget - draws
    return torch.cat(chosen)


def k_center(features: torch.Tensor, centers: torch.Tensor, budget: int) -> torch.Tensor:
    """Greedy k-center: `budget` times the point farthest from all centers and all points chosen before.

    Args:
        features: of the pool, (n, d).
        centers: what is covered already, (c, d) with c at least 1.
        budget: how many points, from 1 to n.

    Returns:
        Indices into features, int64 (budget,), all different.

    Raises:
        ValueError: shapes that do not fit, no centers, a budget out of range.

    Reference: Sener and Savarese, Active Learning for Convolutional Neural Networks: A Core-Set Approach, 2018.
    """
    if features.ndim != 2 or centers.ndim != 2 or features.shape[1] != centers.shape[1] or not len(centers):
        raise ValueError(
            f"features and centers must be (n, d) and (c, d) with c >= 1, got {tuple(features.shape)} and "
            f"{tuple(centers.shape)}"
        )
    if not 1 <= budget <= len(features):
        raise ValueError(f"budget must be from 1 to the number of points, {len(features)}, got {budget}")
    distance, chosen = torch.cdist(features, centers).amin(1), []
    for _ in range(budget):
        chosen.append(int(distance.argmax()))
        distance = torch.minimum(distance, (features - features[chosen[-1]]).norm(dim=1))
        distance[chosen] = -1
    return torch.tensor(chosen)


def select_queries(
    strategy: str,
    probabilities: torch.Tensor,
    budget: int,
    *,
    mistakes: int | None = None,
    features: torch.Tensor | None = None,
    centers: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Points of a pool to send to the teacher, chosen by what the student says of them.

    Args:
        strategy: `"rad"` draws by the game with gains of one minus the margin; `"margin"` and `"entropy"` take the
            points of smallest margin or largest entropy; `"uniform"` draws evenly; `"coreset"` is `k_center`.
        probabilities: the student's, (n, C).
        budget: how many points, from 1 to n.
        mistakes: of `"rad"`: how many of the n points the teacher may get wrong.
        features, centers: of `"coreset"`, see `k_center`.
        generator: of the draws of `"rad"` and `"uniform"`.

    Returns:
        Indices, int64 (budget,), all different.

    Raises:
        TypeError, ValueError: an unknown strategy, an argument that its strategy lacks or does not accept, or what the
            functions named above raise.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    _check_probabilities(probabilities)
    if not 1 <= budget <= len(probabilities):
        raise ValueError(f"budget must be from 1 to the number of points, {len(probabilities)}, got {budget}")
    if strategy == "rad":
        if mistakes is None:
            raise ValueError(
                "strategy 'rad' needs mistakes, the number of points that the teacher may get wrong"
            )
        return rad_sample(margin_gains(probabilities), mistakes, budget, generator=generator)
    if strategy == "coreset":
        if features is None or centers is None:
            raise ValueError("strategy 'coreset' needs features and centers")
        return k_center(features, centers, budget)
    if strategy == "uniform":
        return torch.randperm(len(probabilities), generator=generator)[:budget]
    gains = margin_gains(probabilities) if strategy == "margin" else entropy_gains(probabilities)
    return gains.topk(budget).indices


def active_distill(
    make_student: Callable[[int], nn.Sequential],
    query: Callable[[int, torch.Tensor], torch.Tensor],
    labelled: tuple[torch.Tensor, torch.Tensor],
    pool: torch.Tensor,
    *,
    strategies: Sequence[str],
    rounds: int,
    budget: int,
    error_rates: Sequence[float],
    optimizer: Callable,
    epochs: int,
    seeds: Sequence[int],
    callback: Callable[[int, list[nn.Sequential], torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Rounds of active distillation: choose, ask the teacher, train a new student on all labels so far.

    All members, each with its own strategy, seed and data, are trained in one vmapped loop (`lib.train.fit_ensemble`),
    full batches, on the cross-entropy with one-hot labels of the labelled set and soft labels of the queried points.

    Args:
        make_student: seed -> new student; an `nn.Sequential` whose part before the last layer gives the features.
        query: member and pool indices (b,) -> the teacher's probabilities (b, C). Called once a round and member: every
            row is a query that is paid for.
        labelled: inputs (members, n_0, ...) and labels (members, n_0).
        pool: inputs (members, n, ...).
        strategies: one per member, see `select_queries`.
        rounds: how many times to choose.
        budget: queries per round.
        error_rates: one per member, the teacher's estimated share of wrong labels; `mistakes` of a round is the
            smallest integer not below this share of the points that are left.
        optimizer: as of `lib.train.fit_ensemble`.
        epochs: of each training.
        seeds: one per member: of the student's weights and of the draws.
        callback: called after each training with the number of rounds done (0 to rounds), the students and the pool
            indices queried so far (members, queries).

    Returns:
        The pool indices in the order of the queries, (members, rounds * budget).

    Raises:
        ValueError: lengths that do not fit, error rates outside [0, 1], more queries than points, and what
            `select_queries` raises.
    """
    inputs, labels = labelled
    members = len(pool)
    lengths = {len(each) for each in (inputs, labels, strategies, error_rates, seeds)}
    if lengths != {members}:
        raise ValueError(
            f"pool, labelled, strategies, error_rates and seeds must have one length, got {members} and {lengths}"
        )
    if not all(0 <= rate <= 1 for rate in error_rates):
        raise ValueError(f"error_rates must lie in [0, 1], got {list(error_rates)}")
    if rounds < 1 or budget < 1 or rounds * budget > pool.shape[1]:
        raise ValueError(
            f"rounds and budget must be positive and rounds * budget at most {pool.shape[1]}, got {rounds} and {budget}"
        )
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    queried = torch.empty(members, 0, dtype=torch.long)
    soft = []  # the teacher's answers, (members, budget, C) a round
    for done in range(rounds + 1):
        students = [make_student(seed) for seed in seeds]
        classes = students[0][-1].out_features
        rows = torch.arange(members)[:, None]
        targets = torch.cat([F.one_hot(labels, classes).to(pool.dtype), *soft], 1)
        data = (torch.cat([inputs, pool[rows, queried]], 1), targets)
        fit_ensemble(
            students,
            lambda model, x, target: F.cross_entropy(model(x), target),
            data,
            optimizer=optimizer,
            epochs=epochs,
            seeds=list(seeds),
            progress=False,
        )
        if callback is not None:
            callback(done, students, queried)
        if done == rounds:
            return queried
        chosen, answers = [], []
        for member, student in enumerate(students):
            free = torch.ones(pool.shape[1], dtype=torch.bool).index_fill(0, queried[member], False)
            left = free.nonzero()[:, 0]
            with torch.no_grad():
                features = student[:-1](pool[member, left])
                probabilities = student[-1](features).softmax(1)
                extras = {}
                if strategies[member] == "rad":
                    extras["mistakes"] = math.ceil(error_rates[member] * len(left))
                if strategies[member] == "coreset":
                    extras |= {"features": features, "centers": student[:-1](data[0][member])}
            places = select_queries(
                strategies[member], probabilities, budget, generator=generators[member], **extras
            )
            chosen.append(left[places])
            answers.append(query(member, chosen[-1]))
        queried = torch.cat([queried, torch.stack(chosen)], 1)
        soft.append(torch.stack(answers).detach())


def _check_gains(gains, mistakes):
    gains = torch.as_tensor(gains).detach().to(torch.float64)
    if gains.ndim != 1 or not len(gains):
        raise ValueError(f"gains must be a vector of at least one point, got shape {tuple(gains.shape)}")
    if not gains.isfinite().all() or (gains < 0).any():
        raise ValueError("gains must be finite and not negative")
    if isinstance(mistakes, bool) or not isinstance(mistakes, int):
        raise TypeError(f"mistakes must be an integer, got {mistakes!r}")
    if not 0 <= mistakes <= len(gains):
        raise ValueError(f"mistakes must be from 0 to the number of points, {len(gains)}, got {mistakes}")
    return gains


def _check_probabilities(probabilities, least=2):
    if probabilities.ndim != 2 or probabilities.shape[1] < least:
        raise ValueError(
            f"probabilities must be (n, C) with C at least {least}, got shape {tuple(probabilities.shape)}"
        )
    if not (
        (probabilities >= 0).all()
        and torch.allclose(probabilities.sum(1), probabilities.new_tensor(1.0), atol=1e-4)
    ):
        raise ValueError("the rows of probabilities must be distributions: not negative, with sum 1")
