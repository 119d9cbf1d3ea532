"""lib.distill.active against the chapter's reference, linear programmes by hand, and brute force over mistake sets."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lib.book import load_reference
from lib.distill import (
    active_distill,
    entropy_gains,
    k_center,
    margin_gains,
    rad_sample,
    rad_weights,
    select_queries,
    worst_case_value,
)
from lib.models import mlp

CHAPTER = "robust-active-distillation"
HAND = torch.tensor([0.5, 1.0, 0.1, 0.9, 0.4], dtype=torch.float64)


def worst_by_brute_force(q, gains, mistakes):
    return min(
        sum(q[i] * gains[i] for i in range(len(gains)) if i not in wrong)
        for wrong in itertools.combinations(range(len(gains)), mistakes)
    )


def test_worked_cases():
    one, two = rad_weights(HAND, 1), rad_weights(HAND, 2)
    assert one.support == 3 and math.isclose(one.value, 18 / 37)
    assert torch.allclose(
        one.probabilities, torch.tensor([18, 9, 0, 10, 0], dtype=torch.float64) / 37, atol=1e-12
    )
    assert two.support == 4 and math.isclose(two.value, 36 / 119)
    assert torch.allclose(
        two.probabilities, torch.tensor([36, 18, 0, 20, 45], dtype=torch.float64) / 119, atol=1e-12
    )


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=6), st.data())
def test_value_is_the_worst_case_and_the_dual_bound(gains, data):
    mistakes = data.draw(st.integers(0, len(gains) - 1))
    q, value, support = rad_weights(torch.tensor(gains, dtype=torch.float64), mistakes)
    assert math.isclose(float(q.sum()), 1, rel_tol=1e-12) and int((q > 0).sum()) == support
    assert math.isclose(worst_by_brute_force(q.tolist(), gains, mistakes), value, rel_tol=1e-9)
    assert math.isclose(
        worst_case_value(q, torch.tensor(gains, dtype=torch.float64), mistakes), value, rel_tol=1e-9
    )
    # weak duality: an adversary that takes point i with these chances, which are legal, leaves at most the value of any point
    chances = [max(0.0, 1 - value / g) for g in gains]
    assert sum(chances) <= mistakes + 1e-9
    assert max(g * (1 - c) for g, c in zip(gains, chances, strict=True)) <= value * (1 + 1e-9)


def test_reference_agrees():
    reference = load_reference(CHAPTER, "robust_weights")
    generator = torch.Generator().manual_seed(0)
    for n, mistakes in ((1, 0), (7, 0), (7, 3), (101, 100), (101, 20)):
        gains = torch.rand(n, generator=generator) + 0.01
        q, value = reference(gains, mistakes)
        ours = rad_weights(gains, mistakes)
        torch.testing.assert_close(ours.probabilities, q)
        assert math.isclose(ours.value, value, rel_tol=1e-9)


def test_edges():
    nothing = rad_weights(torch.tensor([0.3, 0.0, 0.0]), 1)
    assert nothing.value == 0 and torch.allclose(
        nothing.probabilities, torch.full((3,), 1 / 3, dtype=torch.float64)
    )
    assert rad_weights(torch.tensor([0.3, 0.7]), 2).value == 0
    assert rad_weights(torch.zeros(4), 0).support == 4
    greedy = rad_weights(HAND.float(), 0)
    assert greedy.support == 1 and greedy.probabilities[1] == 1
    some_zero = rad_weights(torch.tensor([0.0, 0.5, 0.5]), 1)
    assert some_zero.probabilities.tolist() == [0, 0.5, 0.5] and some_zero.value == 0.25
    expanded = torch.tensor([0.5]).expand(6)
    assert torch.allclose(
        rad_weights(expanded, 2).probabilities, torch.full((6,), 1 / 6, dtype=torch.float64)
    )


def test_gains_by_hand():
    p = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    assert torch.allclose(margin_gains(p), torch.tensor([0.75, 0.0, 1.0]))
    assert torch.allclose(entropy_gains(p), torch.tensor([1.5 * math.log(2) / math.log(3), 0.0, 1.0]))


def test_sample_frequencies_and_small_supports():
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([rad_sample(HAND, 1, 1, generator=generator)[0] for _ in range(4000)])
    share = draws.bincount(minlength=5) / 4000
    assert torch.allclose(share, torch.tensor([18, 9, 0, 10, 0]) / 37, atol=0.03)
    assert rad_sample(HAND, 0, 3).tolist() == [1, 3, 0]
    assert sorted(rad_sample(HAND, 1, 3).tolist()) == [0, 1, 3]
    assert sorted(rad_sample(HAND, 1, 5).tolist()) == [0, 1, 2, 3, 4]
    assert sorted(rad_sample(HAND, 5, 5).tolist()) == [0, 1, 2, 3, 4]


def test_k_center_by_hand():
    features = torch.tensor([[0.0], [1.0], [5.0], [9.0], [9.5]])
    assert k_center(features, torch.tensor([[0.0]]), 3).tolist() == [4, 2, 1]
    assert sorted(k_center(torch.zeros(4, 2), torch.zeros(1, 2), 4).tolist()) == [0, 1, 2, 3]


def test_strategies():
    p = torch.tensor([[0.59, 0.41, 0.0], [0.5, 0.3, 0.2], [0.98, 0.01, 0.01], [0.4, 0.35, 0.25]])
    assert select_queries("margin", p, 2).tolist() == [
        3,
        0,
    ]  # margins .05 and .18
    assert select_queries("entropy", p, 2).tolist() == [3, 1]
    assert sorted(select_queries("uniform", p, 4).tolist()) == [0, 1, 2, 3]
    assert select_queries("rad", p, 1, mistakes=0).tolist() == [3]
    with pytest.raises(ValueError, match="one of rad, margin"):
        select_queries("best", p, 1)
    with pytest.raises(ValueError, match="needs mistakes"):
        select_queries("rad", p, 1)
    with pytest.raises(ValueError, match="features and centers"):
        select_queries("coreset", p, 1)
    with pytest.raises(ValueError, match="budget"):
        select_queries("margin", p, 5)


def test_active_distill_pays_once_and_trains_on_what_it_was_told():
    torch.manual_seed(0)
    members, n = 3, 30
    pool = torch.randn(members, n, 2)
    inputs = torch.randn(members, 4, 2)
    labels = (inputs[:, :, 0] > 0).long()
    asked, seen = [], []

    def query(member, chosen):
        asked.append((member, tuple(chosen.tolist())))
        return F.one_hot((pool[member, chosen, 1] > 0).long(), 2).float()

    def look(done, students, queried):
        seen.append((done, queried.clone(), [student(pool[0]).argmax(1) for student in students]))

    queried = active_distill(
        lambda seed: torch.random.manual_seed(seed) and mlp((2, 8, 2)),
        query,
        (inputs, labels),
        pool,
        strategies=["margin", "uniform", "coreset"],
        rounds=3,
        budget=9,
        error_rates=[0.1] * 3,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.05),
        epochs=100,
        seeds=[0, 1, 2],
        callback=look,
    )
    assert queried.shape == (3, 27) and all(len(set(row.tolist())) == 27 for row in queried)
    assert len(asked) == 9 and sum(len(chosen) for _, chosen in asked) == 81
    assert [done for done, *_ in seen] == [0, 1, 2, 3] and seen[2][1].shape == (3, 18)
    told = (pool[0, :, 1] > 0).long()  # the teacher's rule, which contradicts the four labels
    first, last = seen[0][2][0], seen[-1][2][0]
    assert (last == told).float().mean() > 0.85 > (first == told).float().mean()


def test_mistakes_follow_the_points_that_are_left(monkeypatch):
    told = []

    def spy(strategy, probabilities, budget, *, mistakes, **_):
        told.append((len(probabilities), mistakes))
        return torch.arange(budget)

    monkeypatch.setattr("lib.distill.active.select_queries", spy)
    active_distill(
        lambda seed: mlp((2, 4, 2)),
        lambda member, chosen: torch.full((len(chosen), 2), 0.5),
        (torch.zeros(1, 2, 2), torch.zeros(1, 2, dtype=torch.long)),
        torch.zeros(1, 30, 2),
        strategies=["rad"],
        rounds=2,
        budget=9,
        error_rates=[0.31],
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.05),
        epochs=1,
        seeds=[0],
    )
    assert told == [(30, 10), (21, 7)]


def test_bad_input():
    with pytest.raises(ValueError, match="finite and not negative"):
        rad_weights(torch.tensor([0.1, -0.1]), 0)
    with pytest.raises(ValueError, match="vector"):
        rad_weights(torch.zeros(0), 0)
    with pytest.raises(TypeError, match="integer"):
        rad_weights(HAND, 1.5)
    with pytest.raises(ValueError, match="from 0 to"):
        rad_weights(HAND, 6)
    with pytest.raises(ValueError, match="shape of gains"):
        worst_case_value(torch.ones(3) / 3, HAND, 1)
    with pytest.raises(ValueError, match="distributions"):
        worst_case_value(torch.ones(5), HAND, 1)
    with pytest.raises(ValueError, match="C at least 2"):
        margin_gains(torch.ones(3, 1))
    with pytest.raises(ValueError, match="distributions"):
        entropy_gains(torch.ones(3, 2))
    with pytest.raises(ValueError, match="budget"):
        rad_sample(HAND, 0, 6)
    with pytest.raises(ValueError, match="c >= 1"):
        k_center(torch.zeros(3, 2), torch.zeros(0, 2), 1)
    arguments = dict(rounds=1, budget=1, optimizer=None, epochs=1)
    x, y = torch.zeros(1, 2, 2), torch.zeros(1, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="one length"):
        active_distill(
            None, None, (x, y), x, strategies=["rad"], error_rates=[0.1, 0.1], seeds=[0], **arguments
        )
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        active_distill(None, None, (x, y), x, strategies=["rad"], error_rates=[2], seeds=[0], **arguments)
    with pytest.raises(ValueError, match="at most 2"):
        active_distill(
            None,
            None,
            (x, y),
            x,
            strategies=["rad"],
            error_rates=[0.1],
            seeds=[0],
            **(arguments | {"budget": 3}),
        )
