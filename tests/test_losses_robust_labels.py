"""Label-distributionally robust losses and their rivals, against the dual problem, limits, autograd and scikit-learn."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from sklearn.metrics import hinge_loss

from lib.book import load_reference
from lib.losses import (
    ALDRKL,
    crammer_singer,
    generalized_cross_entropy,
    jensen_shannon,
    ldr_kl,
    mean_absolute_error,
    nce_agce,
    nce_rce,
    symmetric_cross_entropy,
    weston_watkins,
)

LOSSES = (
    ldr_kl, crammer_singer, weston_watkins, symmetric_cross_entropy, nce_rce, nce_agce, jensen_shannon,
)  # fmt: skip


def draw(rows=9, classes=5, scale=3.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    logits = scale * torch.randn(rows, classes, generator=generator, dtype=dtype)
    return logits, torch.randint(classes, (rows,), generator=generator)


@pytest.mark.parametrize("lam", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("margin", [0.0, 0.7])
def test_ldr_is_the_maximum_over_label_weights(lam, margin):
    logits, targets = draw(rows=3)
    values = ldr_kl(logits, targets, lam, margin=margin, reduction="none")
    for z, y, value in zip(logits.numpy(), targets.numpy(), values, strict=True):
        d = z - z[y] + margin * (np.arange(5) != y)

        def negative_dual(p, d=d):
            return -(p @ d - lam * (p * np.log(5 * np.maximum(p, 1e-300))).sum())

        found = minimize(
            negative_dual, np.full(5, 0.2), bounds=[(1e-12, 1)] * 5,
            constraints={"type": "eq", "fun": lambda p: p.sum() - 1}, method="SLSQP", options={"ftol": 1e-14},
        )  # fmt: skip
        assert -found.fun == pytest.approx(value.item(), abs=1e-5)


def test_ldr_is_scaled_cross_entropy():
    logits, targets = draw()
    for lam in (0.3, 1.0, 10.0):
        expected = lam * (F.cross_entropy(logits / lam, targets) - math.log(5))
        torch.testing.assert_close(ldr_kl(logits, targets, lam), expected)


def test_ldr_limits():
    logits, targets = draw(dtype=torch.float32)
    small = ldr_kl(logits, targets, 1e-4, margin=1.0, reduction="none")
    torch.testing.assert_close(small, crammer_singer(logits, targets, reduction="none"), atol=1e-3, rtol=0)
    d = logits - logits.gather(1, targets[:, None]) + 1 - F.one_hot(targets, 5)
    large = ldr_kl(logits, targets, 1e6, margin=1.0, reduction="none")
    torch.testing.assert_close(large, d.mean(1), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("normalize", [False, True])
def test_ldr_gradcheck(normalize):
    logits, targets = draw(rows=4)
    assert torch.autograd.gradcheck(
        lambda z: ldr_kl(z, targets, 2.0, margin=0.3, normalize=normalize), logits.requires_grad_()
    )


def test_normalized_does_not_see_scale():
    logits, targets = draw()
    once, thrice = (ldr_kl(c * logits, targets, 2.0, normalize=True) for c in (1, 3))
    torch.testing.assert_close(once, thrice)
    assert ldr_kl(torch.zeros(2, 4), torch.tensor([0, 1]), normalize=True).item() == pytest.approx(0)


def test_references_agree():
    logits, targets = draw()
    z = [logits.clone().requires_grad_() for _ in range(2)]
    reference = load_reference("label-distribution-robust-loss", "ldr_kl_reference")
    values = reference(z[0], targets, 3.0, 0.2), ldr_kl(z[1], targets, 3.0, margin=0.2)
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(v, x)[0] for v, x in zip(values, z, strict=True)))
    stored = torch.full((9,), 2.0)
    loss = ALDRKL(9, 2.0, margin=0.2, normalize=False)
    reference = load_reference("label-distribution-robust-loss", "aldr_kl_reference")
    for _ in range(3):
        pair = [f(x, targets, torch.arange(9)) for f, x in ((loss, z[1]),)]
        pair.append(reference(z[0], targets, torch.arange(9), stored, 2.0, 2.0, 0.2))
        torch.testing.assert_close(*pair, check_dtype=False)
        torch.testing.assert_close(loss.lambdas, stored)


def test_aldr_lambda_stays_in_its_range_and_follows_the_sample():
    loss = ALDRKL(6, 3.0, alpha=2.0, normalize=False)
    logits = torch.tensor([[0.0, 0.0, 0.0], [60.0, 0.0, 0.0]])
    loss(logits, torch.tensor([1, 0]), torch.tensor([4, 2]))
    assert loss.lambdas.tolist() == pytest.approx([3, 3, 1.5, 3, 3, 3], abs=1e-4)
    loss.eval()
    loss(logits, torch.tensor([1, 0]), torch.tensor([2, 4]))
    assert loss.lambdas[4] == pytest.approx(3.0)
    again = ALDRKL(6, 3.0)
    again.load_state_dict(loss.state_dict())
    assert torch.equal(again.lambdas, loss.lambdas)


def test_aldr_gradient_does_not_pass_through_lambda():
    logits, targets = draw()
    logits.requires_grad_()
    loss = ALDRKL(9, 1.0, margin=0.1, normalize=False, reduction="sum").double()
    (found,) = torch.autograd.grad(loss(logits, targets, torch.arange(9)), logits)
    wrong = 1 - F.one_hot(targets, 5).double()
    p = ((logits.detach() + 0.1 * wrong) / loss.lambdas[:, None]).softmax(1)
    torch.testing.assert_close(found, p - F.one_hot(targets, 5))


def test_aldr_stationary_lambda_is_the_best_for_its_weights():
    p = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    divergence = (p * (3 * p).log()).sum()
    loss = ALDRKL(1, 2.0, margin=0.0, normalize=False).double()
    loss((2.0 * p.log())[None], torch.tensor([0]), torch.tensor([0]))
    grid = torch.linspace(0.5, 2.5, 20001, dtype=torch.float64)
    value = -grid * divergence - 2.0 * math.log(3) / 4.0 * (grid - 2.0) ** 2
    assert loss.lambdas.item() == pytest.approx(grid[value.argmax()].item(), abs=2e-4)


def test_hinges():
    logits, targets = draw(rows=30)
    expected = hinge_loss(targets.numpy(), logits.numpy(), labels=range(5))
    assert crammer_singer(logits, targets).item() == pytest.approx(expected)
    by_hand = torch.tensor([[2.0, 1.5, 0.0, 3.0]])
    assert weston_watkins(by_hand, torch.tensor([0])).item() == pytest.approx(0.5 + 2.0)
    assert crammer_singer(by_hand, torch.tensor([0])).item() == pytest.approx(2.0)


def test_robust_rivals_from_their_definitions():
    logits, targets = draw()
    p, onehot = logits.softmax(1), F.one_hot(targets, 5).double()
    reverse = -(p * torch.where(onehot > 0, 0.0, -4.0)).sum(1)
    ce = -(p.log())
    own = ce.gather(1, targets[:, None])[:, 0]
    normalized = own / ce.sum(1)
    p_y = p.gather(1, targets[:, None])[:, 0]
    cases = (
        (symmetric_cross_entropy, (0.3, 0.7), 0.3 * own + 0.7 * reverse),
        (nce_rce, (2.0, 0.7), 2 * normalized + 0.7 * reverse),
        (nce_agce, (2.0, 0.7), 2 * normalized + 0.7 * (2.0**2 - (1 + p_y) ** 2) / 2),
    )
    for loss, options, expected in cases:
        torch.testing.assert_close(loss(logits, targets, *options, reduction="none"), expected)
    m = 0.3 * onehot + 0.7 * p
    both = 0.3 * -(m.log() * onehot).sum(1) + 0.7 * (p * (p / m).log()).sum(1)
    expected = both / -(0.7 * math.log(0.7))
    torch.testing.assert_close(jensen_shannon(logits, targets, 0.3, reduction="none"), expected)
    torch.testing.assert_close(
        jensen_shannon(logits, targets, 1e-5), F.cross_entropy(logits, targets), rtol=1e-3, atol=1e-3
    )


def test_symmetric_losses_sum_to_a_constant():
    logits, _ = draw(rows=6)
    every = logits.repeat_interleave(5, 0), torch.arange(5).repeat(6)
    for loss in (mean_absolute_error, nce_rce):
        sums = loss(*every, reduction="none").view(6, 5).sum(1)
        assert sums.max() - sums.min() < 1e-9
    for loss in (ldr_kl, generalized_cross_entropy, symmetric_cross_entropy):
        sums = loss(*every, reduction="none").view(6, 5).sum(1)
        assert sums.max() - sums.min() > 0.1


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_conventions(loss):
    logits, targets = draw(dtype=torch.float32)
    logits = 30 * logits
    logits.requires_grad_()
    value = loss(logits, targets)
    value.backward()
    assert value.isfinite() and logits.grad.isfinite().all()
    half = loss(logits.detach().bfloat16(), targets)
    assert half.dtype == torch.float32
    ignored = targets.clone()
    ignored[0] = -100
    rest = loss(logits[1:], targets[1:])
    torch.testing.assert_close(loss(logits, ignored), rest)
    transposed = logits.detach().T.contiguous().T
    torch.testing.assert_close(loss(transposed, targets), value.detach())
    torch.testing.assert_close(
        torch.func.vmap(lambda z: loss(z, targets))(torch.stack([logits, -logits]))[0], value
    )
    with pytest.raises(TypeError, match="logits"):
        loss(targets[:, None].expand(9, 5), targets)
    with pytest.raises(ValueError, match="reduction"):
        loss(logits, targets, reduction="average")


def test_bad_input():
    logits, targets = draw()
    for options in ({"lam": 0.0}, {"lam": math.inf}, {"margin": -1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            ldr_kl(logits, targets, **options)
    with pytest.raises(ValueError, match="pi"):
        jensen_shannon(logits, targets, 1.0)
    with pytest.raises(ValueError, match="floor"):
        nce_rce(logits, targets, floor=1.0)
    with pytest.raises(ValueError, match="q must"):
        nce_agce(logits, targets, q=0.0)
    for options in ({"lam0": 0.0}, {"lam0": 1.0, "alpha": 1.0}, {"lam0": 1.0, "margin": -1.0}):
        with pytest.raises(ValueError):
            ALDRKL(9, **options)
    with pytest.raises(ValueError, match="n_samples"):
        ALDRKL(0, 1.0)
    loss = ALDRKL(9, 1.0)
    with pytest.raises(ValueError, match="indices"):
        loss(logits, targets, torch.arange(1, 10))
    with pytest.raises(ValueError, match="once"):
        loss(logits, targets, torch.zeros(9, dtype=torch.long))
    with pytest.raises(TypeError, match="indices"):
        loss(logits, targets, torch.arange(9.0))
    with pytest.raises(ValueError, match="indices"):
        loss(logits, targets, torch.arange(8))
