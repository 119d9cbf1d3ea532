"""Comp-sum losses and their consistency bounds, against closed forms, brute force and the chapter's cells."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize, minimize_scalar

from lib.book import load_reference
from lib.losses import (
    comp_sum,
    conditional_minimum,
    generalized_cross_entropy,
    mean_absolute_error,
    minimizability_gap,
    regret_bound,
    regret_bound_simple,
    regret_transformation,
    smooth_adversarial_comp_sum,
)
from lib.models import mlp

TAUS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)


def draw(rows=9, classes=5, scale=3.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    logits = scale * torch.randn(rows, classes, generator=generator, dtype=dtype)
    return logits, torch.randint(classes, (rows,), generator=generator)


def from_definition(logits, targets, tau):
    """The definition, from differences of scores."""
    own = logits.gather(1, targets[:, None])
    others = F.one_hot(targets, logits.shape[1]) == 0
    u = ((logits - own).exp() * others).sum(1)
    return u.log1p() if tau == 1 else ((1 + u) ** (1 - tau) - 1) / (1 - tau)


@pytest.mark.parametrize("tau", TAUS)
def test_definition_and_gradient(tau):
    logits, targets = draw()
    logits.requires_grad_()
    losses = comp_sum(logits, targets, tau, reduction="none")
    torch.testing.assert_close(losses, from_definition(logits, targets, tau))
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    p = logits.softmax(1)
    closed = p.gather(1, targets[:, None]) ** (tau - 1) * (p - F.one_hot(targets, 5))
    torch.testing.assert_close(gradient, closed.detach())
    assert torch.autograd.gradcheck(lambda z: comp_sum(z, targets, tau), logits)


@pytest.mark.parametrize("tau", TAUS)
def test_chapter(tau):
    reference = load_reference("comp-sum-losses", "comp_sum_reference")
    logits, targets = (x.requires_grad_() if x.is_floating_point() else x for x in draw())
    ours, theirs = comp_sum(logits, targets, tau), reference(logits, targets, tau)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)))
    bound = load_reference("comp-sum-losses", "transformation_reference")
    grid = torch.linspace(0, 0.999, 9, dtype=torch.float64)
    torch.testing.assert_close(
        regret_transformation(grid, tau, 4),
        torch.tensor([bound(float(b), tau, 4) for b in grid], dtype=torch.float64),
        rtol=1e-8,
        atol=1e-12,
    )


def test_chapter_adversarial():
    """Two classes and a linear model: the search has one answer, a corner of the cube."""
    reference = load_reference("comp-sum-losses", "smooth_adversarial_reference")
    torch.manual_seed(0)
    matrix = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    inputs, targets = 0.3 + 0.4 * torch.rand(4, 6, dtype=torch.float64), torch.tensor([0, 1, 1, 0])
    values = [
        function(lambda x: x @ matrix.T, inputs, targets, eps=0.1, tau=0.5, rho=2.0, nu=0.7)
        for function in (smooth_adversarial_comp_sum, reference)
    ]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(value, matrix)[0] for value in values))


def test_members():
    logits, targets = draw()
    weight = torch.rand(5, dtype=torch.float64)
    targets[2] = -100
    for reduction in ("mean", "sum", "none"):
        options = {"weight": weight, "reduction": reduction}
        torch.testing.assert_close(
            comp_sum(logits, targets, **options), F.cross_entropy(logits, targets, **options)
        )
    p = logits.softmax(1).gather(1, targets.clamp_min(0)[:, None])[:, 0]
    kept = (targets >= 0).double()
    torch.testing.assert_close(
        generalized_cross_entropy(logits, targets, 0.7, reduction="none"), kept * (1 - p**0.7) / 0.7
    )
    absolute = (logits.softmax(1) - F.one_hot(targets.clamp_min(0), 5)).abs().sum(1)
    torch.testing.assert_close(mean_absolute_error(logits, targets, reduction="none"), kept * absolute)
    assert mean_absolute_error(logits, torch.full((9,), -100), reduction="sum") == 0
    image = logits[:8].reshape(2, 4, 5).transpose(1, 2)  # (2, 5, 4)
    torch.testing.assert_close(
        comp_sum(image, targets[:8].reshape(2, 4), 0.5), comp_sum(logits[:8], targets[:8], 0.5)
    )


def test_limits_and_extremes():
    logits, targets = draw()
    for tau, distance in ((1 + 1e-13, 1e-11), (1 - 1e-9, 1e-7), (2 - 1e-9, 1e-8)):
        near, limit = comp_sum(logits, targets, tau), comp_sum(logits, targets, round(tau))
        assert abs(near - limit) < distance
    far = torch.tensor([[0.0, 2e4], [2e4, 0.0]], requires_grad=True)
    for tau in (1.0, 1.5, 2.0, 3.0):
        value = comp_sum(far, torch.tensor([0, 0]), tau)
        (gradient,) = torch.autograd.grad(value, far)
        assert value.isfinite() and gradient.isfinite().all()


def test_half_precision_and_vmap():
    logits, targets = draw(dtype=torch.float32)
    assert comp_sum(logits.bfloat16(), targets, 1.5).dtype == torch.float32
    stacked, labels = logits.expand(3, 9, 5), targets.expand(3, 9)
    mapped = torch.vmap(lambda z, y: comp_sum(z, y, 1.5))(stacked, labels)
    torch.testing.assert_close(mapped, comp_sum(logits, targets, 1.5).expand(3))


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.5, 2.0])
def test_conditional_minimum_is_the_minimum(tau):
    generator = np.random.default_rng(3)
    for classes in (2, 4):
        p = torch.from_numpy(generator.dirichlet(np.ones(classes)))

        def risk(scores, p=p, classes=classes):
            z = torch.tensor(scores).expand(classes, classes)
            return float(p @ comp_sum(z, torch.arange(classes), tau, reduction="none"))

        start = p.log().numpy() * (1 if tau < 2 else 20)
        found = minimize(risk, start, method="BFGS", options={"gtol": 1e-9}).fun
        assert found == pytest.approx(float(conditional_minimum(p, tau)), abs=1e-6)
    roots = torch.tensor([0.36, 0.64, 0.0], dtype=torch.float64)
    assert conditional_minimum(roots, 0.0).item() == pytest.approx(1.4**2 - 1)
    assert conditional_minimum(roots, 3.0).item() == pytest.approx(0.18)


@pytest.mark.parametrize("tau", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("beta", [0.02, 0.4, 0.95])
def test_transformation_is_the_two_class_regret(tau, beta):
    """Two labels, the worse one predicted: the constrained minimum over one margin minus the free one."""
    p = torch.tensor([(1 + beta) / 2, (1 - beta) / 2], dtype=torch.float64)

    def risk(margin):
        z = torch.tensor([[margin, 0.0]] * 2, dtype=torch.float64)
        return float(p @ comp_sum(z, torch.arange(2), tau, reduction="none"))

    free = minimize_scalar(risk, bounds=(-30, 30), method="bounded", options={"xatol": 1e-10}).fun
    held = minimize_scalar(risk, bounds=(-30, 0), method="bounded", options={"xatol": 1e-10}).fun
    assert held - free == pytest.approx(float(regret_transformation(beta, tau)), abs=1e-9)


def test_transformation_pinsker_limits_and_digits():
    beta = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert (regret_transformation(beta, 1.0) >= beta**2 / 2 - 1e-15).all()
    assert regret_transformation(1.0, 1.0).item() == pytest.approx(math.log(2))
    for tau in (1 - 1e-7, 1 + 1e-7):
        torch.testing.assert_close(
            regret_transformation(beta, tau, 2), regret_transformation(beta, 1.0), atol=1e-6, rtol=0
        )
    torch.testing.assert_close(
        regret_transformation(beta, 2 - 1e-4, 7), regret_transformation(beta, 2.0, 7), atol=1e-3, rtol=0
    )
    tiny = regret_transformation(1e-7, 0.5).item()  # beta^2 / (2^tau (2 - tau)) for small beta
    assert tiny == pytest.approx(1e-14 / (2**0.5 * 1.5), rel=1e-6)


@given(st.floats(0, 4), st.integers(2, 50), st.lists(st.floats(0, 1), min_size=1, max_size=8))
@settings(max_examples=40)
def test_bound_inverts_the_transformation(tau, classes, betas):
    betas = torch.tensor(betas, dtype=torch.float64)
    excess = regret_transformation(betas, tau, classes)
    assert (excess >= -1e-15).all()
    excess = excess.clamp_min(0)
    again = regret_transformation(regret_bound(excess, tau, classes), tau, classes)
    torch.testing.assert_close(again, excess, atol=1e-12, rtol=1e-6)
    assert (regret_bound_simple(excess, tau, classes) >= regret_bound(excess, tau, classes) - 1e-6).all()
    assert regret_bound(1e3 * float(classes) ** max(tau, 1), tau, classes) == 1


def test_minimizability_gap():
    p = torch.tensor([[0.5, 0.5], [1.0, 0.0]], dtype=torch.float64)
    assert minimizability_gap(0.5 * math.log(2), p) == pytest.approx(0, abs=1e-12)
    assert minimizability_gap(0.7, p, 2.0, torch.tensor([0.8, 0.2])) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="at least the pointwise minimum"):
        minimizability_gap(0.1, p)
    with pytest.raises(ValueError, match="weights"):
        minimizability_gap(0.7, p, weights=torch.tensor([1.0, 1.0]))
    with pytest.raises(ValueError, match=r"\(inputs, C\)"):
        minimizability_gap(0.7, p[0])


def test_adversarial_on_a_linear_model():
    """For two classes the margin moves by eps times the l1 (linf ball) or l2 norm of w_y - w_j: the exact maximum."""
    torch.manual_seed(0)
    matrix, inputs = torch.randn(2, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    targets = torch.tensor([0, 1, 1, 0])
    difference = matrix[0] - matrix[1]
    for norm, reach in (("linf", difference.abs().sum()), ("l2", difference.norm())):
        losses = smooth_adversarial_comp_sum(
            lambda x: x @ matrix.T, inputs, targets, eps=0.1, tau=0.5, rho=2.0, nu=3.0, norm=norm, step_size=1.0,
            bounds=None, reduction="none",
        )  # fmt: skip
        expected = comp_sum(inputs @ matrix.T / 2, targets, 0.5, reduction="none") + 3 * 0.1 * reach
        torch.testing.assert_close(losses, expected)


def test_adversarial_is_differentiated_through_both_points():
    torch.manual_seed(0)
    model, inputs = mlp((6, 8, 4)).double(), torch.rand(5, 6, dtype=torch.float64)
    targets = torch.tensor([0, 1, 2, 3, 0])

    def loss():
        return smooth_adversarial_comp_sum(
            model, inputs, targets, eps=0.2, nu=2.0, steps=3, generator=torch.Generator().manual_seed(0)
        )

    gradients = torch.autograd.grad(loss(), list(model.parameters()))
    weight, step = model[-1].weight, 1e-5
    for position in ((0, 1), (3, 7)):
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[position] += sign * step
            ends.append(loss().item())
            with torch.no_grad():
                weight[position] -= sign * step
        # the points found do not move with so small a step: they are corners of the cube
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(gradients[-2][position].item(), rel=1e-4)


def test_adversarial_bounds_the_clipped_loss():
    """nu = sqrt(C - 1)/rho: no point of the ball has a clipped-margin loss above the smooth loss."""
    torch.manual_seed(0)
    classes, rho, tau = 5, 0.7, 0.6
    model, inputs = mlp((3, 16, classes)).double(), torch.rand(20, 3, dtype=torch.float64)
    for parameter in model.parameters():
        parameter.requires_grad_(False).mul_(4)
    targets = torch.randint(classes, (20,))
    losses = smooth_adversarial_comp_sum(
        model, inputs, targets, eps=0.1, tau=tau, rho=rho, nu=math.sqrt(classes - 1) / rho, steps=40,
        reduction="none",
    )  # fmt: skip
    moved = (inputs + 0.1 * (2 * torch.rand(500, 20, 3, dtype=torch.float64) - 1)).clamp(0, 1)
    logits = model(moved.reshape(-1, 3)).reshape(500, 20, classes)
    margins = logits.gather(2, targets.expand(500, 20)[..., None]) - logits
    clipped = (1 - margins / rho).clamp(0, 1)
    clipped = clipped.scatter(2, targets.expand(500, 20)[..., None], 0.0).sum(2)
    worst = (((1 + clipped) ** (1 - tau) - 1) / (1 - tau)).amax(0)
    assert (worst <= losses + 1e-9).all() and (worst > 0.1).any()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda z, y: comp_sum(z, y, -0.1), "tau"),
        (lambda z, y: comp_sum(z, y, math.inf), "tau"),
        (lambda z, y: comp_sum(z, y, math.nan), "tau"),
        (lambda z, y: generalized_cross_entropy(z, y, 0.0), "q must"),
        (lambda z, y: generalized_cross_entropy(z, y, 1.1), "q must"),
        (lambda z, y: mean_absolute_error(z, y, reduction="median"), "median"),
        (lambda z, y: regret_transformation(1.1), "beta"),
        (lambda z, y: regret_transformation(0.1, -1.0), "tau"),
        (lambda z, y: regret_bound(-0.1), "excess"),
        (lambda z, y: regret_bound(0.1, 1.0, 1), "num_classes"),
        (lambda z, y: regret_bound_simple(math.nan), "excess"),
        (lambda z, y: conditional_minimum(torch.tensor([0.5, 0.6])), "sum to 1"),
        (lambda z, y: conditional_minimum(torch.tensor([1.0])), "two classes"),
    ],
)
def test_bad_numbers(call, words):
    with pytest.raises(ValueError, match=words):
        call(*draw())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rho": 0.0}, "rho"),
        ({"nu": -1.0}, "nu"),
        ({"tau": -1.0}, "tau"),
        ({"eps": -0.1}, "eps"),
        ({"norm": "l1"}, "norm"),
        ({"steps": 0}, "steps"),
        ({"reduction": "median"}, "median"),
        ({"targets": torch.tensor([0, 4])}, r"\[0, 4\)"),
        ({"targets": torch.tensor([0, -100])}, r"\[0, 4\)"),
        ({"model": lambda x: x.sum(1)}, "logits"),
        ({"inputs": torch.full((2, 4), 1.5)}, "bounds"),
    ],
)
def test_adversarial_bad_input(change, words):
    arguments = {
        "model": lambda x: x, "inputs": torch.rand(2, 4), "targets": torch.tensor([0, 1]), "eps": 0.1
    }  # fmt: skip
    with pytest.raises(ValueError, match=words):
        smooth_adversarial_comp_sum(**(arguments | change))
