"""Losses of the spherical family, against closed forms, by hand and by their invariances."""

import math

import pytest
import torch
import torch.nn.functional as F

from lib.book import load_reference
from lib.losses import spherical_softmax_nll, taylor_softmax_nll, z_loss

LOSSES = (z_loss, taylor_softmax_nll, spherical_softmax_nll)


def test_by_hand():
    logits, targets = torch.tensor([[0.0, 0.0, 0.0, 4.0]]), torch.tensor([3])
    # mean 1, standard deviation sqrt(3): the target stands at z = sqrt(3), the largest possible
    expected = math.log1p(math.exp(2 * (1 - math.sqrt(3)))) / 2
    assert z_loss(logits, targets, a=2.0, b=1.0).item() == pytest.approx(expected, rel=1e-6)
    logits = torch.tensor([[1.0, 2.0, -1.0]])  # 1 + o + o^2/2 = 2.5, 5, 0.5
    assert taylor_softmax_nll(logits, torch.tensor([1])).item() == pytest.approx(math.log(8 / 5), rel=1e-6)
    assert spherical_softmax_nll(logits, torch.tensor([2]), eps=0.5).item() == pytest.approx(
        math.log(7.5 / 1.5), rel=1e-6
    )


def test_invariances_of_the_z_loss():
    logits = torch.randn(50, 11, dtype=torch.float64)
    targets = torch.randint(11, (50,))
    each = z_loss(logits, targets, a=0.7, b=2.0, reduction="none")
    torch.testing.assert_close(z_loss(3 * logits - 7, targets, a=0.7, b=2.0, reduction="none"), each)
    torch.testing.assert_close(z_loss(1e-6 * logits, targets, a=0.7, b=2.0, reduction="none"), each)
    floor = F.softplus(torch.tensor(0.7 * (2.0 - math.sqrt(10)), dtype=torch.float64)) / 0.7
    assert (each >= floor).all()
    assert z_loss(F.one_hot(targets, 11).double(), targets, a=0.7, b=2.0).item() == pytest.approx(
        floor.item()
    )


def test_gradient_is_orthogonal_to_the_invariances():
    logits = torch.randn(20, 9, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(z_loss(logits, torch.randint(9, (20,)), reduction="sum"), logits)
    assert gradient.norm() > 0.1
    torch.testing.assert_close(gradient.sum(1), torch.zeros(20).double())
    torch.testing.assert_close((gradient * logits).sum(1), torch.zeros(20).double())


def test_two_classes_have_no_gradient():
    logits = torch.tensor([[0.3, -1.0], [-2.0, 5.0]], dtype=torch.float64, requires_grad=True)
    loss = z_loss(logits, torch.tensor([0, 0]), a=1.0, b=0.0, reduction="none")
    torch.testing.assert_close(loss, F.softplus(torch.tensor([-1.0, 1.0], dtype=torch.float64)))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("value", [0.0, 0.1, -3e4])
def test_equal_logits_have_a_finite_gradient(value):
    logits = torch.full((1, 7), value, requires_grad=True)
    loss = z_loss(logits, torch.tensor([2]), a=1.0, b=0.0)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-4)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient[0, 2] < 0 and gradient[0].sum().abs() < 1e-6


@pytest.mark.parametrize("loss", LOSSES)
def test_options_of_a_classification_loss(loss):
    logits = torch.randn(6, 4, 5, dtype=torch.float64)
    targets = torch.randint(4, (6, 5))
    targets[0] = -100
    logits[0] = math.inf  # ignored, whatever it holds
    weight = torch.rand(4, dtype=torch.float64)
    each = loss(logits, targets, weight=weight, reduction="none")
    assert each.shape == targets.shape and (each[0] == 0).all()
    torch.testing.assert_close(loss(logits, targets, weight=weight), each.sum() / weight[targets[1:]].sum())
    (gradient,) = torch.autograd.grad(loss(logits.requires_grad_(), targets), logits)
    assert gradient.isfinite().all() and (gradient[0] == 0).all()
    small = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: loss(z, torch.tensor([0, 3, 1])), small)


@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_and_vmap(loss):
    logits, targets = torch.randn(3, 8, 6), torch.randint(6, (3, 8))
    together = torch.vmap(loss)(logits, targets)
    torch.testing.assert_close(
        together, torch.stack([loss(z, y) for z, y in zip(logits, targets, strict=True)])
    )
    assert loss(logits[0].bfloat16(), targets[0]).dtype == torch.float32


def test_agrees_with_the_reference_cell():
    reference = load_reference("spherical-z-loss", "z_loss")
    logits = torch.randn(9, 12, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(12, (9,))
    pair = (z_loss(logits, targets, a=0.5, b=1.5), reference(logits, targets, a=0.5, b=1.5))
    torch.testing.assert_close(*pair)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in pair))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda z, y: z_loss(z, y, a=0.0), "a must be finite and above 0"),
        (lambda z, y: z_loss(z, y, b=math.inf), "b must be finite"),
        (lambda z, y: spherical_softmax_nll(z, y, eps=-1.0), "eps must be"),
        (lambda z, y: taylor_softmax_nll(z, y, reduction="all"), "'all'"),
        (lambda z, y: z_loss(z[:, :1], y * 0), "at least 2 classes"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))
