"""Votes of a crowd explained by a model of its workers: Dawid and Skene, GLAD and MACE, each fitted by EM."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.distributions import Dirichlet, kl_divergence

from lib.noise.crowd import check_votes


class DawidSkeneParameters(NamedTuple):
    """prior (K,); confusion (workers, K true, K voted), rows with sum 1; objective (iterations,), never falling."""

    prior: torch.Tensor
    confusion: torch.Tensor
    objective: torch.Tensor


class GladParameters(NamedTuple):
    """ability (workers,); easiness (items,), positive; objective (iterations,), never falling."""

    ability: torch.Tensor
    easiness: torch.Tensor
    objective: torch.Tensor


class MaceParameters(NamedTuple):
    """competence (workers,), the chance not to spam; spam (workers, K), what is voted when spamming; objective
    (iterations,) of the best restart, never falling; finals (restarts,), the objective each restart ended at."""

    competence: torch.Tensor
    spam: torch.Tensor
    objective: torch.Tensor
    finals: torch.Tensor


def dawid_skene(
    tasks: torch.Tensor,
    workers: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    *,
    smoothing: float = 0.01,
    iterations: int = 100,
    tolerance: float = 1e-6,
    return_parameters: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, DawidSkeneParameters]:
    """Posterior of the true class when every worker has a confusion matrix (Dawid and Skene, 1979).

    P(vote = l | truth = k, worker j) = confusion[j, k, l]. Expectation-maximisation starts from the shares of the votes,
    which ties the names of the latent classes to the names of the labels, and climbs the log-likelihood plus
    `smoothing` times the sum of all log-parameters.

    Args:
        tasks: the item of each vote, (votes,), numbered from 0 without gaps.
        workers: who voted, (votes,), numbered from 0 without gaps.
        labels: the class that was voted for, (votes,), in [0, num_classes).
        num_classes: K, at least 2.
        smoothing: votes added to every cell of every confusion matrix, positive.
        iterations: at most so many, each an M and an E step.
        tolerance: stop when an iteration gains less than this for each item.
        return_parameters: also return `DawidSkeneParameters`.

    Returns:
        (items, K), float64, rows with sum 1; with `return_parameters` also the parameters.

    Raises:
        TypeError, ValueError: as `lib.noise.crowd.check_votes`; smoothing or iterations out of range.
    """
    votes = check_votes(tasks, workers, labels, num_classes)
    _check_options(smoothing, iterations)
    counts = votes.count()
    posterior, objective = counts / counts.sum(1, keepdim=True), []
    cell = votes.workers * num_classes + votes.labels
    for _ in range(iterations):
        prior = posterior.sum(0) + smoothing
        prior = prior / prior.sum()
        joint = posterior.new_zeros(votes.num_workers * num_classes, num_classes)
        joint.index_add_(0, cell, posterior[votes.tasks])
        joint = (
            joint.reshape(votes.num_workers, num_classes, num_classes) + smoothing
        )  # (worker, voted, true)
        log_confusion = (joint / joint.sum(1, keepdim=True)).log()
        scores = prior.log().repeat(votes.num_tasks, 1)
        scores.index_add_(0, votes.tasks, log_confusion[votes.workers, votes.labels])
        posterior = scores.softmax(1)
        value = scores.logsumexp(1).sum() + smoothing * (log_confusion.sum() + prior.log().sum())
        objective.append(value.item())
        if len(objective) > 1 and objective[-1] - objective[-2] < tolerance * votes.num_tasks:
            break
    if not return_parameters:
        return posterior
    confusion = log_confusion.exp().transpose(1, 2)
    return posterior, DawidSkeneParameters(prior, confusion, torch.tensor(objective, dtype=torch.float64))


def glad(
    tasks: torch.Tensor,
    workers: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    *,
    iterations: int = 100,
    tolerance: float = 1e-6,
    return_parameters: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, GladParameters]:
    """Posterior of the true class when workers have an ability and items an easiness (Whitehill et al., 2009).

    P(vote = truth) = sigmoid(ability_j * easiness_i), the wrong classes share the rest evenly. Ability and the logarithm of
    easiness have normal priors with mean 1 and variance 1; the classes are equally likely. An M step is one Newton step for
    all abilities and one scoring step for all easinesses, halved wherever it would lose: given the other block they do not
    interact, so the objective (the log-likelihood plus the log-priors up to constants) never falls.

    Args:
        iterations: at most so many, each an M and an E step.
        tolerance: stop when an iteration gains less than this for each item.
        return_parameters: also return `GladParameters`. The other arguments are those of `dawid_skene`.

    Returns:
        (items, K), float64, rows with sum 1; with `return_parameters` also the parameters.

    Raises:
        TypeError, ValueError: as `lib.noise.crowd.check_votes`; iterations out of range.
    """
    votes = check_votes(tasks, workers, labels, num_classes)
    _check_options(1.0, iterations)
    ability = torch.ones(votes.num_workers, dtype=torch.float64)
    log_easiness = torch.ones(votes.num_tasks, dtype=torch.float64)
    others, objective = math.log(num_classes - 1), []

    def e_step():
        odds = ability[votes.workers] * log_easiness.exp()[votes.tasks]
        scores = votes.count(odds + others)  # a vote's log-odds for its class
        wrong = torch.bincount(votes.tasks, weights=F.logsigmoid(-odds) - others, minlength=votes.num_tasks)
        value = (scores.logsumexp(1) + wrong).sum() - votes.num_tasks * math.log(num_classes)
        value = value - 0.5 * ((ability - 1).square().sum() + (log_easiness - 1).square().sum())
        return scores.softmax(1), value.item()

    posterior, _ = e_step()
    for _ in range(iterations):
        right = posterior[votes.tasks, votes.labels]  # that the vote is the truth
        easiness = log_easiness.exp()[votes.tasks]
        ability = _climb(
            ability, votes.workers, right, lambda values, e=easiness: (values[votes.workers] * e, e)
        )
        able = ability[votes.workers]

        def odds_of_items(values, able=able):
            odds = able * values.exp()[votes.tasks]
            return odds, odds

        log_easiness = _climb(log_easiness, votes.tasks, right, odds_of_items)
        posterior, value = e_step()
        objective.append(value)
        if len(objective) > 1 and objective[-1] - objective[-2] < tolerance * votes.num_tasks:
            break
    if not return_parameters:
        return posterior
    trace = torch.tensor(objective, dtype=torch.float64)
    return posterior, GladParameters(ability, log_easiness.exp(), trace)


def mace(
    tasks: torch.Tensor,
    workers: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    *,
    method: str = "vb",
    smoothing: float = 0.1,
    restarts: int = 10,
    iterations: int = 50,
    seed: int = 0,
    return_parameters: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, MaceParameters]:
    """Posterior of the true class when every vote is either the truth or spam (Hovy et al., 2013).

    P(vote = l | truth = k, worker j) = competence_j [l = k] + (1 - competence_j) spam_jl. All restarts run as one batch; the
    one that ends with the highest objective is returned.

    Args:
        method: "vb": variational Bayes with Beta(1/2, 1/2) competences and symmetric Dirichlet(10) spam, objective the
            evidence bound. "em": `smoothing` votes are added to every count, objective the log-likelihood plus
            `smoothing` times the log-parameters.
        smoothing: for "em", positive.
        restarts: from random competences, at least 1.
        iterations: of each restart, each an M and an E step.
        seed: of the restarts; the global random state is not touched.
        return_parameters: also return `MaceParameters`. The other arguments are those of `dawid_skene`.

    Returns:
        (items, K), float64, rows with sum 1; with `return_parameters` also the parameters.

    Raises:
        TypeError, ValueError: as `lib.noise.crowd.check_votes`; an unknown method, or options out of range.
    """
    votes = check_votes(tasks, workers, labels, num_classes)
    _check_options(smoothing, iterations)
    if method not in ("vb", "em"):
        raise ValueError(f"method must be 'vb' or 'em', got {method!r}")
    if restarts < 1:
        raise ValueError(f"restarts must be at least 1, got {restarts}")
    cell = votes.workers * num_classes + votes.labels
    item = votes.tasks * num_classes + votes.labels
    own = (votes.count() / votes.count().sum(1, keepdim=True))[votes.tasks, votes.labels]
    start = torch.rand(
        restarts, votes.num_workers, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    copied = start[:, votes.workers] * own  # (restarts, votes): that the vote is the truth and no spam
    total = votes.by_worker(torch.ones_like(own))
    trace = []
    for _ in range(iterations):
        spammed = own.new_zeros(restarts, votes.num_workers * num_classes)
        spammed = spammed.index_add_(1, cell, 1 - copied).reshape(restarts, -1, num_classes)
        split = torch.stack([total - spammed.sum(2), spammed.sum(2)], 2)  # (restarts, workers, 2)
        log_split, log_spam, penalty = _mace_parameters(split, spammed, method, smoothing)
        know, guess = log_split[:, votes.workers].unbind(2)
        guess = guess + log_spam.flatten(1)[:, cell]
        either = torch.logaddexp(know, guess)
        scores = own.new_zeros(restarts, votes.num_tasks * num_classes).index_add_(1, item, either - guess)
        scores = scores.reshape(restarts, votes.num_tasks, num_classes)
        posterior = scores.softmax(2)
        value = scores.logsumexp(2).sum(1) + guess.sum(1) - votes.num_tasks * math.log(num_classes)
        trace.append(value + penalty)
        copied = posterior.flatten(1)[:, item] * (know - either).exp()
    best = int(trace[-1].argmax())
    if not return_parameters:
        return posterior[best]
    competence = log_split[best].softmax(1)[:, 0]
    objective = torch.stack([value[best] for value in trace])
    return posterior[best], MaceParameters(competence, log_spam[best].softmax(1), objective, trace[-1])


def _mace_parameters(split, spammed, method, smoothing):
    """Logarithms of competence and its complement, and of spam, with what the objective adds for each restart."""
    if method == "em":
        logs = [
            ((counts + smoothing) / (counts + smoothing).sum(2, keepdim=True)).log()
            for counts in (split, spammed)
        ]
        return *logs, smoothing * sum(log.sum((1, 2)) for log in logs)
    # MACE's own hyperparameters; exp(E[log p]) replaces p, and its rows sum to less than 1
    logs, penalty = [], 0.0
    for counts, prior in ((split, 0.5), (spammed, 10.0)):
        posterior = counts + prior
        logs.append(torch.digamma(posterior) - torch.digamma(posterior.sum(2, keepdim=True)))
        divergence = kl_divergence(Dirichlet(posterior), Dirichlet(torch.full_like(posterior, prior)))
        penalty = penalty - divergence.sum(1)
    return *logs, penalty


def _climb(values, owner, right, odds_of):
    """One Newton-like step up sum of right log s + (1 - right) log(1 - s) - (value - 1)^2 / 2, each value by itself.

    `odds_of(values)` gives the log-odds of every vote and their derivative with respect to its owner's value.
    """

    def gain(values):
        odds, slope = odds_of(values)
        # log s(x) = x + log s(-x)
        each = torch.bincount(owner, weights=right * odds + F.logsigmoid(-odds), minlength=len(values))
        return each - 0.5 * (values - 1).square(), odds, slope

    before, odds, slope = gain(values)
    sigmoid = odds.sigmoid()
    gradient = torch.bincount(owner, weights=(right - sigmoid) * slope, minlength=len(values)) - (values - 1)
    curvature = (
        torch.bincount(owner, weights=sigmoid * (1 - sigmoid) * slope * slope, minlength=len(values)) + 1
    )
    step = gradient / curvature
    for _ in range(20):
        lost = gain(values + step)[0] < before
        if not bool(lost.any()):
            break
        step = torch.where(lost, step / 2, step)
    else:
        step = torch.where(lost, torch.zeros_like(step), step)
    return values + step


def _check_options(smoothing, iterations):
    if not smoothing > 0:
        raise ValueError(
            f"smoothing must be positive, got {smoothing}: a probability of 0 excludes a class for good"
        )
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
