"""The weight near the truth and the regret bound, against enumeration."""

import itertools
import math

import pytest
import torch

from lib.book import load_reference
from lib.information import kl_ball_log_weight, universality_bound


def test_bound_is_the_best_radius_of_a_fine_grid():
    generator = torch.Generator().manual_seed(0)
    log_prior = torch.randn(30, generator=generator, dtype=torch.float64).log_softmax(0)
    kl = torch.rand(30, generator=generator, dtype=torch.float64)
    for n in (1, 7, 200):
        bound, radius = universality_bound(log_prior, kl, n)
        grid = [e - kl_ball_log_weight(log_prior, kl, e) / n for e in torch.linspace(0, 1, 20001).tolist()]
        assert bound <= min(grid) + 1e-12
        assert bound == pytest.approx(min(grid), abs=1e-4)
        assert bound == pytest.approx(radius - kl_ball_log_weight(log_prior, kl, radius) / n)
        assert bound == pytest.approx(load_reference("universality-lens", "regret_bound")(log_prior, kl, n))


def test_exact_regret_never_exceeds_the_bound():
    n, thetas = 8, torch.tensor([0.1, 0.3, 0.35, 0.8]).double()
    sequences = torch.tensor(list(itertools.product((0.0, 1.0), repeat=n))).double()
    ones = sequences.sum(1, keepdim=True)
    log_probs = ones * thetas.log() + (n - ones) * (1 - thetas).log()
    log_prior = torch.tensor([0.05, 0.05, 0.4, 0.5]).double().log()
    log_mixture = (log_probs + log_prior).logsumexp(1)
    for truth in range(4):
        p = thetas[truth]
        kl = p * (p / thetas).log() + (1 - p) * ((1 - p) / (1 - thetas)).log()
        regret = (log_probs[:, truth].exp() * (log_probs[:, truth] - log_mixture)).sum() / n
        bound, _ = universality_bound(log_prior, kl, n)
        assert regret <= bound
        if truth == 1:  # its heavy neighbour at 0.35 makes the ball better than the point
            assert bound < -log_prior[truth].item() / n


def test_infinite_divergences_never_enter():
    log_prior = torch.tensor([0.5, 0.5]).log()
    bound, radius = universality_bound(log_prior, torch.tensor([0.25, math.inf]), 10)
    assert bound == pytest.approx(0.25 + math.log(2) / 10) and radius == 0.25
    assert kl_ball_log_weight(log_prior, torch.tensor([0.25, math.inf]), 0.1) == -math.inf


def test_bad_input():
    log_prior = torch.zeros(3)
    with pytest.raises(ValueError, match=r"\(models,\)"):
        universality_bound(log_prior, torch.zeros(2), 5)
    with pytest.raises(ValueError, match=r"\(models,\)"):
        universality_bound(torch.zeros(0), torch.zeros(0), 5)
    with pytest.raises(ValueError, match="divergences"):
        universality_bound(log_prior, torch.tensor([0.0, -1.0, 0.0]), 5)
    with pytest.raises(ValueError, match="divergences"):
        universality_bound(log_prior, torch.tensor([0.0, math.nan, 0.0]), 5)
    with pytest.raises(ValueError, match="n must"):
        universality_bound(log_prior, torch.zeros(3), 0)
    with pytest.raises(ValueError, match="radius"):
        kl_ball_log_weight(log_prior, torch.zeros(3), -0.1)
