"""Losses over the pairs of a batch, against loops over all pairs."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from lib.losses import (
    constellation,
    pairwise_contrastive,
    prototypical,
    triplet_batch_all,
    triplet_batch_hard,
)

generator = torch.Generator().manual_seed(0)
Z = torch.randn(9, 3, generator=generator, dtype=torch.float64)
Y = torch.tensor([5, 2, 5, 2, 7, 7, 2, 9, 5])  # class 9 has one member
LOSSES = {
    "triplet": triplet_batch_hard,
    "all triplets": triplet_batch_all,
    "contrastive": pairwise_contrastive,
    "constellation": constellation,
    "prototypical": lambda z, y: prototypical(z, y, shots=1),
}


def test_triplet_takes_the_hardest_of_all_triplets():
    values = []
    for a in range(9):
        triplets = [
            0.6 + (Z[a] - Z[p]).norm() - (Z[a] - Z[n]).norm()
            for p, n in itertools.product(range(9), repeat=2)
            if p != a and Y[p] == Y[a] and Y[n] != Y[a]
        ]
        if triplets:
            values.append(max(0.0, max(triplets).item()))
    assert len(values) == 8
    assert math.isclose(triplet_batch_hard(Z, Y, margin=0.6).item(), sum(values) / 8, rel_tol=1e-6)


def test_all_triplets_are_averaged_where_they_violate():
    values = [
        0.6 + (Z[a] - Z[p]).norm().item() - (Z[a] - Z[n]).norm().item()
        for a, p, n in itertools.permutations(range(9), 3)
        if Y[p] == Y[a] and Y[n] != Y[a]
    ]
    violated = [value for value in values if value > 0]
    assert 0 < len(violated) < len(values)
    mean = sum(violated) / len(violated)
    assert math.isclose(triplet_batch_all(Z, Y, margin=0.6).item(), mean, rel_tol=1e-6)


def test_contrastive_is_the_mean_over_both_kinds_of_pairs():
    pull, push = [], []
    for i, j in itertools.combinations(range(9), 2):
        distance = (Z[i] - Z[j]).norm().item()
        if Y[i] == Y[j]:
            pull.append(distance**2)
        else:
            push.append(max(0.0, 2.5 - distance) ** 2)
    expected = sum(pull) / len(pull) + sum(push) / len(push)
    assert math.isclose(pairwise_contrastive(Z, Y, margin=2.5).item(), expected, rel_tol=1e-6)


def test_constellation_sets_each_positive_against_all_negatives():
    values = [
        math.log1p(sum(math.exp(0.7 * (Z[a] @ Z[n] - Z[a] @ Z[p]).item()) for n in range(9) if Y[n] != Y[a]))
        for a, p in itertools.permutations(range(9), 2)
        if Y[a] == Y[p]
    ]
    assert math.isclose(constellation(Z, Y, scale=0.7).item(), sum(values) / len(values), rel_tol=1e-9)


def test_prototypical_takes_the_first_shots_as_support():
    z, y = Z[:7], Y[:7]
    support = {5: [0], 2: [1], 7: [4]}
    order = sorted(support)
    means = torch.stack([z[support[c]].mean(0) for c in order])
    values = [
        F.cross_entropy(-(z[i] - means).square().sum(1)[None], torch.tensor([order.index(y[i].item())]))
        for i in (2, 3, 5, 6)
    ]
    assert torch.isclose(prototypical(z, y), sum(values) / 4)
    y = torch.tensor([1, 1, 0, 0, 1, 0, 0])
    means = torch.stack([z[[2, 3]].mean(0), z[[0, 1]].mean(0)])
    logits = -torch.cdist(z[[4, 5, 6]], means).square()
    expected = F.cross_entropy(logits, torch.tensor([1, 0, 0]))
    assert torch.isclose(prototypical(z, y, shots=2), expected)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients(name):
    rows = slice(0, 7) if name == "prototypical" else slice(None)
    z = Z[rows].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: LOSSES[name](z, Y[rows]), z)


@pytest.mark.parametrize("name", ["triplet", "all triplets", "contrastive"])
def test_coincident_members_have_a_finite_gradient(name):
    z = torch.zeros(4, 2, requires_grad=True)
    LOSSES[name](z, torch.tensor([0, 0, 1, 1])).backward()
    assert z.grad.isfinite().all()


def test_nothing_to_compare_is_zero():
    alone = torch.arange(9)
    assert triplet_batch_hard(Z, alone) == 0 and constellation(Z, alone) == 0
    assert triplet_batch_hard(Z, 0 * alone) == 0
    assert triplet_batch_all(Z, alone) == 0 and triplet_batch_all(Z, 0 * alone) == 0


@pytest.mark.parametrize("name", LOSSES)
def test_bad_shapes(name):
    for z, y in ((Z[0], Y), (Z, Y[:4]), (Z[:1], Y[:1])):
        with pytest.raises(ValueError, match="embeddings and labels"):
            LOSSES[name](z, y)


def test_bad_parameters():
    with pytest.raises(ValueError, match="margin"):
        triplet_batch_hard(Z, Y, margin=-1.0)
    with pytest.raises(ValueError, match="margin"):
        triplet_batch_all(Z, Y, margin=-1.0)
    with pytest.raises(ValueError, match="margin"):
        pairwise_contrastive(Z, Y, margin=0.0)
    with pytest.raises(ValueError, match="scale"):
        constellation(Z, Y, scale=0.0)
    with pytest.raises(ValueError, match="the smallest has 1"):
        prototypical(Z, Y)
    with pytest.raises(ValueError, match="shots"):
        prototypical(Z, Y, shots=0)
