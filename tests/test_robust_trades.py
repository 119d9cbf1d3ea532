"""TRADES against its definition and the exact maximum on a linear model."""

import math

import pytest
import torch
import torch.nn.functional as F

from lib.models import mlp
from lib.robust import trades

INPUTS, TARGETS = torch.rand(6, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])


def small_model():
    torch.manual_seed(0)
    return mlp((5, 8, 3)).double()


def test_without_perturbation_it_is_cross_entropy():
    model = small_model()
    for reduction in ("mean", "sum", "none"):
        ours = trades(model, INPUTS, TARGETS, eps=0.0, reduction=reduction)
        torch.testing.assert_close(ours, F.cross_entropy(model(INPUTS), TARGETS, reduction=reduction))
    ours = trades(model, INPUTS, TARGETS, eps=0.3, beta=0.0)
    torch.testing.assert_close(ours, F.cross_entropy(model(INPUTS), TARGETS))


def test_two_class_linear_model():
    """With one margin the divergence is largest at an end of the interval that the margin can reach."""
    torch.manual_seed(1)
    w = torch.randn(5, dtype=torch.float64)

    def model(x):
        return torch.stack([x @ w, torch.zeros(len(x), dtype=x.dtype)], 1)

    targets = torch.tensor([0, 1, 0, 1, 0, 1])
    for norm, reach in (("linf", w.abs().sum()), ("l2", w.norm())):
        losses = torch.stack(
            [
                trades(model, INPUTS, targets, eps=0.1, beta=2.0, norm=norm, step_size=1.0, bounds=None,
                       generator=torch.Generator().manual_seed(start), reduction="none")
                for start in range(8)
            ]
        ).amax(0)  # fmt: skip
        here = model(INPUTS)
        ends = torch.stack(
            [
                F.kl_div((here + shift).log_softmax(1), here.softmax(1), reduction="none").sum(1)
                for shift in (torch.tensor([0.1 * reach, 0.0]), torch.tensor([-0.1 * reach, 0.0]))
            ]
        )
        expected = F.cross_entropy(here, targets, reduction="none") + 2 * ends.amax(0)
        torch.testing.assert_close(losses, expected)


def test_both_predictions_are_differentiated():
    model = small_model()

    def loss():
        return trades(model, INPUTS, TARGETS, eps=0.2, steps=4, generator=torch.Generator().manual_seed(0))

    (gradient,) = torch.autograd.grad(loss(), model[-1].weight)
    ends, step = [], 1e-5
    for sign in (1, -1):
        with torch.no_grad():
            model[-1].weight[1, 2] += sign * step
        ends.append(loss().item())
        with torch.no_grad():
            model[-1].weight[1, 2] -= sign * step
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(gradient[1, 2].item(), rel=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_search_beats_random_points():
    model, generator = small_model(), torch.Generator().manual_seed(3)
    model.requires_grad_(False)
    found = trades(model, INPUTS, TARGETS, eps=0.2, beta=1.0, generator=generator, reduction="none")
    found = found - F.cross_entropy(model(INPUTS), TARGETS, reduction="none")
    here = model(INPUTS).log_softmax(1)
    for _ in range(20):
        noise = 0.4 * torch.rand(INPUTS.shape, generator=generator, dtype=torch.float64) - 0.2
        other = model((INPUTS + noise).clamp(0, 1)).log_softmax(1)
        assert found.mean() > (here.exp() * (here - other)).sum(1).mean()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"beta": -1.0}, "beta"),
        ({"beta": math.nan}, "beta"),
        ({"eps": -1.0}, "eps"),
        ({"norm": "l1"}, "norm"),
        ({"reduction": "median"}, "median"),
        ({"targets": TARGETS[:3]}, "targets"),
        ({"inputs": INPUTS + 1}, "bounds"),
    ],
)
def test_bad_input(change, words):
    arguments = {"model": small_model(), "inputs": INPUTS, "targets": TARGETS, "eps": 0.1} | change
    with pytest.raises(ValueError, match=words):
        trades(**arguments)
