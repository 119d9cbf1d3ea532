"""lib.ranking.utility against autograd, scipy and its reference."""

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau

from lib.book import load_reference
from lib.ranking import order_agreement, preference_decomposition


def test_pairwise_identity_in_a_network():
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5)).double()
    x = torch.randn(1, 4, generator=generator, dtype=torch.float64)
    parameters = list(model.parameters())
    logits, target = model(x)[0], 3

    def gradient(value):
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters, retain_graph=True)])

    weights = preference_decomposition(logits.detach(), torch.tensor(target))
    pairs = sum(weights[y] * gradient(logits[target] - logits[y]) for y in range(5) if y != target)
    torch.testing.assert_close(pairs, gradient(torch.log_softmax(logits, 0)[target]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(3,), (7, 4), (2, 3, 6), (0, 5)])
def test_weights(shape):
    generator = torch.Generator().manual_seed(1)
    logits = 30 * torch.randn(*shape, generator=generator, dtype=torch.float64)
    targets = torch.randint(shape[-1], shape[:-1], generator=generator)
    weights = preference_decomposition(logits, targets)
    chosen = torch.softmax(logits, -1).gather(-1, targets.unsqueeze(-1))[..., 0]
    torch.testing.assert_close(weights.sum(-1), 1 - chosen)
    assert (weights.gather(-1, targets.unsqueeze(-1)) == 0).all()
    reference = load_reference("utility-probability-duality", "preference_weights")
    for row, target, expected in zip(
        logits.reshape(-1, shape[-1]), targets.flatten(), weights.reshape(-1, shape[-1]), strict=True
    ):
        torch.testing.assert_close(reference(row, int(target)), expected)


def test_impossible_outcomes_have_no_weight():
    weights = preference_decomposition(torch.tensor([0.0, -torch.inf, 0.0]), torch.tensor(0))
    torch.testing.assert_close(weights, torch.tensor([0.0, 0.0, 0.5]))


def test_bad_preferences():
    with pytest.raises(TypeError, match="floating"):
        preference_decomposition(torch.tensor([1, 2]), torch.tensor(0))
    with pytest.raises(TypeError, match="integers"):
        preference_decomposition(torch.zeros(2), torch.tensor(0.0))
    with pytest.raises(ValueError, match="expected"):
        preference_decomposition(torch.zeros(3, 2), torch.tensor(0))
    with pytest.raises(ValueError, match=r"0\.\.1"):
        preference_decomposition(torch.zeros(2), torch.tensor(2))


@pytest.mark.parametrize("ties", [False, True])
def test_kendall_is_scipys(ties):
    rng = np.random.default_rng(2)
    for size in (2, 3, 17, 50):
        a, b = rng.normal(size=(2, size))
        if ties:
            a, b = np.round(a), np.round(b)
        found = order_agreement(torch.tensor(a), torch.tensor(b)).item()
        expected = kendalltau(a, b).statistic
        assert found == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_kendall_knows_only_the_order():
    u, p = torch.randn(4, 9), torch.rand(9)
    torch.testing.assert_close(order_agreement(u, p), order_agreement(3 * u**3 + 1, p.exp()))
    assert order_agreement(u, p).shape == (4,)
    assert order_agreement(torch.tensor([1.0, -torch.inf]), torch.tensor([2, 1])) == 1
    assert order_agreement(torch.zeros(3), torch.arange(3)).isnan()


def test_bad_orders():
    with pytest.raises(ValueError, match="agree"):
        order_agreement(torch.zeros(3), torch.zeros(4))
    with pytest.raises(ValueError, match="at least two"):
        order_agreement(torch.zeros(3, 1), torch.zeros(1))
