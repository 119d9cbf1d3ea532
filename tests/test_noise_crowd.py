"""Soft labels of a crowd against loops, closed forms, monotone likelihoods and symmetries."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from lib.book import load_reference
from lib.data import simulated_crowd
from lib.noise import (
    aggregate,
    dawid_skene,
    glad,
    mace,
    majority_vote,
    normalised,
    softmax_counts,
    wawa,
    zero_based_skill,
)

METHODS = {
    "normalised": normalised,
    "softmax": softmax_counts,
    "dawid_skene": dawid_skene,
    "glad": glad,
    "mace_vb": lambda *votes, **more: mace(*votes, restarts=2, iterations=20, **more),
    "mace_em": lambda *votes, **more: mace(*votes, restarts=2, iterations=20, method="em", **more),
    "wawa": wawa,
    "zbs": zero_based_skill,
}
MODELS = ("dawid_skene", "glad", "mace_vb", "mace_em")


def crowd(seed=0, n=60, classes=4, kind="mixed", **more):
    targets = torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))
    votes = simulated_crowd(targets, classes, workers=8, kind=kind, pairs=((0, 1),), seed=seed, **more)
    return targets, (*votes, classes)


def loops(votes):
    """The votes as a list of (item, worker, label), with the numbers of items, workers and classes."""
    t, w, labels, classes = votes
    rows = list(zip(t.tolist(), w.tolist(), labels.tolist(), strict=True))
    return rows, max(t.tolist()) + 1, max(w.tolist()) + 1, classes


def test_three_votes_to_one():
    votes = (torch.zeros(4, dtype=torch.long), torch.arange(4), torch.tensor([0, 0, 1, 0]), 2)
    torch.testing.assert_close(normalised(*votes), torch.tensor([[0.75, 0.25]], dtype=torch.float64))
    expected = torch.tensor([[0.880797, 0.119203]], dtype=torch.float64)
    torch.testing.assert_close(softmax_counts(*votes), expected, atol=1e-6, rtol=0)
    assert majority_vote(*votes).tolist() == [[1.0, 0.0]]
    # skills 1, 1, 0, 1: the outvoted one has no weight left
    assert wawa(*votes).tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("seed", [0, 1])
def test_dawid_skene_equals_em_in_loops(seed):
    _, votes = crowd(seed)
    rows, n, workers, k = loops(votes)
    s, posterior = 0.01, normalised(*votes).numpy()
    for _ in range(7):
        prior = (posterior.sum(0) + s) / (n + k * s)
        theta = np.full((workers, k, k), s)
        for i, j, label in rows:
            theta[j, :, label] += posterior[i]
        theta /= theta.sum(2, keepdims=True)
        new, value = np.empty((n, k)), 0.0
        for i in range(n):
            p = prior.copy()
            for item, j, label in rows:
                if item == i:
                    p *= theta[j, :, label]
            value += np.log(p.sum())
            new[i] = p / p.sum()
        posterior = new
        value += s * (np.log(theta).sum() + np.log(prior).sum())
    result, parameters = dawid_skene(*votes, iterations=7, tolerance=-1.0, return_parameters=True)
    np.testing.assert_allclose(result, posterior, atol=1e-12)
    np.testing.assert_allclose(parameters.confusion, theta, atol=1e-12)
    np.testing.assert_allclose(parameters.prior, prior, atol=1e-12)
    assert parameters.objective[-1].item() == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["mixed", "confusion", "glad", "spam"])
def test_objectives_never_fall_and_rows_are_distributions(name, kind):
    _, votes = crowd(3, kind=kind)
    posterior, parameters = METHODS[name](*votes, return_parameters=True)
    assert len(parameters.objective) > 2
    assert parameters.objective.diff().min() > -1e-8
    assert parameters.objective[-1] > parameters.objective[0]
    torch.testing.assert_close(posterior.sum(1), torch.ones(60, dtype=torch.float64))


def test_glad_ends_where_a_general_optimiser_of_the_marginal_likelihood_ends():
    _, votes = crowd(4, n=25, classes=3)
    rows, n, workers, k = loops(votes)

    def objective(x):
        alpha, b = x[:workers], x[workers:]
        scores = np.zeros((n, k))
        for i, j, label in rows:
            p = 1 / (1 + math.exp(-alpha[j] * math.exp(b[i])))
            scores[i] += np.log((1 - p) / (k - 1))
            scores[i, label] += np.log(p) - np.log((1 - p) / (k - 1))
        value = np.log(np.exp(scores).mean(1)).sum()
        return -(value - 0.5 * ((alpha - 1) ** 2).sum() - 0.5 * ((b - 1) ** 2).sum())

    _, found = glad(*votes, iterations=400, tolerance=1e-14, return_parameters=True)
    x = np.concatenate([found.ability, found.easiness.log()])
    assert found.objective[-1].item() == pytest.approx(-objective(x), abs=1e-9)
    best = minimize(objective, x, method="L-BFGS-B")
    assert -best.fun <= found.objective[-1].item() + 1e-6


def test_mace_posterior_and_likelihood_in_loops():
    _, votes = crowd(5, n=30)
    rows, n, workers, k = loops(votes)
    posterior, parameters = mace(*votes, method="em", smoothing=0.2, restarts=3, return_parameters=True)
    theta, xi = parameters.competence.numpy(), parameters.spam.numpy()
    p = np.full((n, k), 1 / k)
    for i, j, label in rows:
        for z in range(k):
            p[i, z] *= theta[j] * (label == z) + (1 - theta[j]) * xi[j, label]
    np.testing.assert_allclose(posterior, p / p.sum(1, keepdims=True), atol=1e-10)
    value = np.log(p.sum(1)).sum() + 0.2 * (np.log(theta) + np.log(1 - theta)).sum() + 0.2 * np.log(xi).sum()
    assert parameters.objective[-1].item() == pytest.approx(value, abs=1e-8)
    assert parameters.finals.max() == parameters.objective[-1] and parameters.finals.shape == (3,)
    # a fixed point of EM: the expected copies give the competences again
    copies, total = np.full(workers, 0.2), np.full(workers, 0.4)
    for i, j, label in rows:
        chance = theta[j] + (1 - theta[j]) * xi[j, label]
        copies[j] += posterior[i, label] * theta[j] / chance
        total[j] += 1
    np.testing.assert_allclose(copies / total, theta, atol=2e-2)


def test_skills_in_loops():
    _, votes = crowd(6)
    rows, n, workers, k = loops(votes)

    def agreement(weights):
        scores = np.zeros((n, k))
        for i, j, label in rows:
            scores[i, label] += weights[j]
        agreed, total = np.zeros(workers), np.zeros(workers)
        for i, j, label in rows:
            winners = [c for c in range(k) if scores[i, c] >= scores[i].max() - 1e-9]
            agreed[j] += (label in winners) / len(winners)
            total[j] += 1
        return agreed / total, scores / scores.sum(1, keepdims=True)

    shares, skill = wawa(*votes, return_parameters=True)
    expected = agreement(np.ones(workers))[0]
    np.testing.assert_allclose(skill, expected, atol=1e-12)
    np.testing.assert_allclose(shares, agreement(expected)[1], atol=1e-12)
    skill, rate = np.full(workers, 1 / k), 0.8
    for step in range(1, 12):
        rate *= 0.5 if step % 4 == 0 else 1
        skill = skill + rate * (agreement(skill)[0] - skill)
    shares, found = zero_based_skill(
        *votes, iterations=11, learning_rate=0.8, halve_every=4, return_parameters=True
    )
    np.testing.assert_allclose(found, skill, atol=1e-12)
    np.testing.assert_allclose(shares, agreement(skill)[1], atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
@given(seed=st.integers(0, 50))
@settings(max_examples=4, deadline=None)
def test_order_of_votes_items_and_workers_does_not_matter(name, seed):
    _, (t, w, labels, k) = crowd(seed, n=20)
    g = torch.Generator().manual_seed(seed)
    before = METHODS[name](t, w, labels, k)
    shuffle = torch.randperm(len(t), generator=g)
    items = torch.randperm(20, generator=g)
    after = METHODS[name](items[t][shuffle], w[shuffle], labels[shuffle], k)
    torch.testing.assert_close(after[items], before, atol=1e-9, rtol=0)
    if name not in ("mace_vb", "mace_em"):  # the restarts are drawn worker by worker
        people = torch.randperm(int(w.max()) + 1, generator=g)
        torch.testing.assert_close(METHODS[name](t, people[w], labels, k), before, atol=1e-9, rtol=0)
    classes = torch.randperm(k, generator=g)
    torch.testing.assert_close(METHODS[name](t, w, classes[labels], k)[:, classes], before, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", ["dawid_skene", "glad", "mace_vb", "mace_em", "wawa", "zbs"])
def test_spammers_lose_their_say(name):
    targets = torch.randint(5, (200,), generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(1)
    honest = targets.repeat_interleave(4)
    honest = torch.where(torch.rand(800, generator=g) < 0.1, torch.randint(5, (800,), generator=g), honest)
    labels = torch.cat([honest.reshape(200, 4), torch.randint(5, (200, 3), generator=g)], 1)
    t, w = torch.arange(200).repeat_interleave(7), torch.arange(7).repeat(200)
    posterior, parameters = METHODS[name](t, w, labels.flatten(), 5, return_parameters=True)
    # competence may be at most a third of the honest workers'
    skill = {
        "dawid_skene": lambda: parameters.confusion.diagonal(dim1=1, dim2=2).mean(1) - 0.2,
        "glad": lambda: parameters.ability,
        "wawa": lambda: parameters - 0.2,
        "zbs": lambda: parameters - 0.2,
    }.get(name, lambda: parameters.competence)()
    assert skill[4:].max() < 0.34 * skill[:4].min()
    assert (posterior.argmax(1) == targets).double().mean() > 0.97


def test_perfect_workers_are_believed_and_confusion_matrices_are_found():
    targets = torch.arange(3).repeat(200)
    t = torch.arange(600).repeat_interleave(5)
    labels = targets.repeat(5, 1).T.clone()
    liar = torch.rand(600, generator=torch.Generator().manual_seed(0)) < 0.8
    labels[:, 4] = torch.where(liar & (targets == 0), 1, targets)  # says 1 for most 0
    posterior, parameters = dawid_skene(
        t, torch.arange(5).repeat(600), labels.flatten(), 3, return_parameters=True
    )
    assert (posterior[torch.arange(600), targets] > 1 - 1e-6).all()
    share = liar[targets == 0].double().mean()
    assert parameters.confusion[4, 0, 1].item() == pytest.approx(share.item(), abs=1e-3)
    assert (parameters.confusion[:4].diagonal(dim1=1, dim2=2) > 0.999).all()


def test_aggregates():
    p = torch.tensor([[[0.5, 0.5, 0.0]], [[0.8, 0.1, 0.1]], [[0.2, 0.7, 0.1]]], dtype=torch.float64)
    torch.testing.assert_close(aggregate(list(p)), p.mean(0))
    product = aggregate(list(p), method="product")
    expected = torch.tensor([[0.08, 0.035, 0.0]], dtype=torch.float64) / 0.115
    torch.testing.assert_close(product, expected, atol=1e-9, rtol=0)
    assert aggregate(list(p), method="majority").tolist() == [[1.0, 0.0, 0.0]]
    # one first place each for two classes: the mean decides
    assert aggregate([p[1], p[2]], method="majority").tolist() == [[1.0, 0.0, 0.0]]
    # vetoes all around are still a distribution
    torch.testing.assert_close(
        aggregate([torch.eye(2).double()[:1], torch.eye(2).double()[1:]], method="product"),
        torch.full((1, 2), 0.5, dtype=torch.float64),
    )


def test_centroid_minimises_the_summed_jensen_shannon_divergence():
    g = torch.Generator().manual_seed(0)
    p = torch.rand(4, 6, 3, generator=g, dtype=torch.float64) ** 3
    p[0, :, 0] = 0.0
    p = p / p.sum(2, keepdim=True)
    centroid = aggregate(list(p), method="js_centroid")

    def divergence(x, i):
        q = np.exp(x) / np.exp(x).sum()
        total = 0.0
        for row in p[:, i].numpy():
            m = (row + q) / 2
            total += (row[row > 0] * np.log(row[row > 0] / m[row > 0])).sum() + (q * np.log(q / m)).sum()
        return total

    for i in range(6):
        found = minimize(divergence, np.zeros(3), args=(i,), tol=1e-12)
        assert divergence(centroid[i].log().numpy(), i) <= found.fun + 1e-9
        q = np.exp(found.x) / np.exp(found.x).sum()
        np.testing.assert_allclose(centroid[i], q, atol=1e-4)
    only = torch.tensor([[0.3, 0.7, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(aggregate([only, only], method="js_centroid"), only)


def test_majority_breaks_ties_at_random():
    votes = (
        torch.arange(2000).repeat_interleave(2),
        torch.arange(2).repeat(2000),
        torch.arange(2).repeat(2000),
        3,
    )
    rows = majority_vote(*votes, generator=torch.Generator().manual_seed(0))
    assert rows.sum() == 2000 and rows[:, 2].sum() == 0
    assert 0.45 < rows[:, 0].mean() < 0.55


def test_bad_input():
    t, w, labels = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0]), torch.tensor([0, 1, 1])
    for method in METHODS.values():
        with pytest.raises(TypeError, match="integers"):
            method(t.float(), w, labels, 2)
        with pytest.raises(ValueError, match=r"in \[0, 2\)"):
            method(t, w, labels + 1, 2)
        with pytest.raises(ValueError, match="every task"):
            method(t * 2, w, labels, 2)
        with pytest.raises(ValueError, match="every worker"):
            method(t, w + 1, labels, 2)
        with pytest.raises(ValueError, match="length above 0"):
            method(t[:2], w, labels, 2)
        with pytest.raises(ValueError, match="at least 2"):
            method(t, w, labels * 0, 1)
    for call in (
        lambda: dawid_skene(t, w, labels, 2, smoothing=0.0),
        lambda: glad(t, w, labels, 2, iterations=0),
        lambda: mace(t, w, labels, 2, method="gibbs"),
        lambda: mace(t, w, labels, 2, restarts=0),
        lambda: zero_based_skill(t, w, labels, 2, learning_rate=2.0),
        lambda: aggregate([]),
        lambda: aggregate([torch.ones(2, 2) / 2], method="median"),
        lambda: aggregate([torch.ones(2, 2)]),
        lambda: aggregate([torch.ones(2, 2) / 2, torch.ones(3, 2) / 2]),
    ):
        with pytest.raises(ValueError):
            call()


def test_reference_cells_of_the_chapter():
    def reference(name):
        return load_reference("crowd-soft-labels", name)

    _, votes = crowd(8)
    posterior, objective = reference("dawid_skene")(*votes, iterations=9)
    ours, parameters = dawid_skene(*votes, iterations=9, tolerance=-1.0, return_parameters=True)
    torch.testing.assert_close(ours, posterior, atol=1e-10, rtol=0)
    torch.testing.assert_close(parameters.objective, objective)
    torch.testing.assert_close(wawa(*votes), reference("wawa")(*votes))
    torch.testing.assert_close(zero_based_skill(*votes), reference("zero_based_skill")(*votes))
    start = torch.rand(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(mace(*votes, method="em", restarts=1), reference("mace")(*votes, start))
    found = glad(*votes, iterations=500, tolerance=1e-13)
    torch.testing.assert_close(found, reference("glad")(*votes), atol=1e-3, rtol=0)
    stack = torch.stack([found, ours, normalised(*votes)])
    for method, name in (("mean", "mean"), ("product", "product"), ("js_centroid", "centroid")):
        torch.testing.assert_close(
            aggregate(list(stack), method=method), reference(name)(stack), atol=1e-8, rtol=0
        )
