"""Mixtures against enumeration, closed forms and the chapter's reference."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.book import load_reference
from lib.models import BernoulliMixture, ContextTreeWeighting, FiniteMixture


def trees(depth):
    """All binary context trees up to a depth, as frozensets of leaves (newest bit first)."""
    if depth == 0:
        return [frozenset({()})]
    smaller = trees(depth - 1)
    grown = [
        frozenset({(0, *leaf) for leaf in left} | {(1, *leaf) for leaf in right})
        for left, right in itertools.product(smaller, smaller)
    ]
    return [frozenset({()}), *grown]


def tree_log_prob(bits, leaves, depth):
    past, counts, total = [0] * depth, {leaf: [0.5, 0.5] for leaf in leaves}, 0.0
    for bit in bits:
        leaf = next(leaf for leaf in leaves if all(past[-1 - i] == leaf[i] for i in range(len(leaf))))
        total += math.log(counts[leaf][bit] / sum(counts[leaf]))
        counts[leaf][bit] += 1
        past.append(bit)
    return total


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 1), max_size=25), st.integers(0, 3))
def test_context_trees_are_the_sum_over_all_trees(bits, depth):
    total, prior = 0.0, 0.0
    for leaves in trees(depth):
        nodes = 2 * len(leaves) - 1 - sum(len(leaf) == depth for leaf in leaves)
        prior += 2.0**-nodes
        total += 2.0**-nodes * math.exp(tree_log_prob(bits, leaves, depth))
    assert prior == pytest.approx(1)
    assert ContextTreeWeighting(depth).fit(bits).log_evidence == pytest.approx(math.log(total), abs=1e-9)


def test_context_trees_agree_with_the_reference_and_sum_to_one():
    reference = load_reference("universality-lens", "context_tree_log_prob")
    total = 0.0
    for bits in itertools.product((0, 1), repeat=6):
        log_prob = ContextTreeWeighting(2).fit(bits).log_evidence
        assert log_prob == pytest.approx(reference(list(bits), 2), abs=1e-10)
        total += math.exp(log_prob)
    assert total == pytest.approx(1)


def test_context_trees_predict_what_they_then_charge():
    learner, total = ContextTreeWeighting(4, context=[1, 0, 1, 1, 0]), 0.0
    for bit in [0, 1, 1] * 50:
        chance = learner.prob()
        total += math.log(chance if bit else 1 - chance)
        learner.update(bit)
    assert learner.log_evidence == pytest.approx(total)
    # the period of three is learnt: 150 bits cost a few nats only
    assert -learner.log_evidence < 25


def test_context_trees_survive_long_certain_runs():
    learner = ContextTreeWeighting(8).fit([0] * 3000)
    assert 0 < learner.prob() < 1e-3
    learner.update(1)
    assert math.isfinite(learner.log_evidence)


def test_an_early_context_matters():
    bits = [0, 1, 1, 0, 1]
    with_ones = ContextTreeWeighting(2, context=[1, 1]).fit(bits).log_evidence
    assert with_ones != pytest.approx(ContextTreeWeighting(2).fit(bits).log_evidence)
    assert ContextTreeWeighting(2, context=[0, 1, 1]).fit(bits).log_evidence == pytest.approx(with_ones)


@pytest.mark.parametrize("ones, zeros", [(1.0, 1.0), (0.5, 0.5), (2.0, 3.5)])
def test_bernoulli_mixture_is_the_beta_integral(ones, zeros):
    learner = BernoulliMixture(ones, zeros)
    bits = [1, 0, 0, 1, 1, 1, 0]
    for bit in bits:
        learner.update(bit)
    grid = torch.linspace(0, 1, 2_000_003, dtype=torch.float64)[1:-1]
    prior = torch.distributions.Beta(torch.tensor(ones).double(), torch.tensor(zeros).double())
    density = prior.log_prob(grid).exp() * grid**4 * (1 - grid) ** 3
    assert learner.log_evidence == pytest.approx(torch.trapezoid(density, grid).log().item(), abs=1e-5)
    assert learner.prob() == pytest.approx((4 + ones) / (7 + ones + zeros))


def test_finite_mixture_is_bayes_rule():
    log_prior = torch.randn(3, 5, dtype=torch.float64)
    mixture = FiniteMixture(log_prior)
    likelihoods = torch.rand(2, 3, 5, dtype=torch.float64)
    for likelihood in likelihoods:
        mixture.update(likelihood.log())
    joint = log_prior.softmax(-1) * likelihoods.prod(0)
    assert torch.allclose(mixture.log_evidence.exp(), joint.sum(-1))
    posterior = joint / joint.sum(-1, keepdim=True)
    assert torch.allclose(mixture.log_posterior.exp(), posterior)
    outcomes = torch.rand(3, 5, 4, dtype=torch.float64)
    assert torch.allclose(mixture.predict(outcomes.log()).exp(), (posterior[..., None] * outcomes).sum(-2))


def test_finite_mixture_drops_what_is_refuted():
    mixture = FiniteMixture(torch.tensor([0.5, 0.5]).log())
    mixture.update(torch.tensor([0.0, -math.inf]))
    assert mixture.log_posterior.exp().tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="probability zero"):
        mixture.update(torch.tensor([-math.inf, 0.0]))


def test_bad_input():
    with pytest.raises(ValueError, match="0 or 1"):
        BernoulliMixture().update(2)
    with pytest.raises(ValueError, match="positive"):
        BernoulliMixture(0.0, 1.0)
    with pytest.raises(ValueError, match="at least 0"):
        ContextTreeWeighting(-1)
    with pytest.raises(ValueError, match="depth=3"):
        ContextTreeWeighting(3, context=[0, 1])
    with pytest.raises(ValueError, match="0 or 1"):
        ContextTreeWeighting(1).update(0.5)
    with pytest.raises(ValueError, match="shape"):
        FiniteMixture(torch.tensor(0.0))
    with pytest.raises(ValueError, match="not all zero"):
        FiniteMixture(torch.full((3,), -math.inf))
    with pytest.raises(ValueError, match="of 2 models, got 3"):
        FiniteMixture(torch.zeros(2)).update(torch.zeros(3))
