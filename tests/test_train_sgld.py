"""Langevin sampling against Gaussian closed forms, and predictions averaged over states."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lib.train import sgld
from lib.uncertainty import posterior_predictive


class Point(nn.Module):
    def __init__(self, start):
        super().__init__()
        self.t = nn.Parameter(start.clone())


def square_loss(model, x):
    """Mean of (t - x)^2 / 2 over the data: the posterior of a mean with unit noise; t holds independent walkers."""
    return (model.t - x[:, None]).square().mean(0).sum() / 2


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_gaussian_posterior_mean_and_variance(temperature):
    data = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)
    model, step = Point(torch.zeros(20_000, dtype=torch.float64)), 0.02
    (state,) = sgld(
        model, square_loss, (data,), step=step, num_samples=1, burn_in=100, prior_precision=2.0,
        temperature=temperature, progress=False,
    )  # fmt: skip
    precision = 4 + 2.0
    assert state["t"].mean().item() == pytest.approx(data.sum().item() / precision, abs=0.02)
    # the discretised chain has this variance exactly; the posterior's is its limit for small steps
    variance = temperature / (precision * (1 - step * precision / 2))
    assert state["t"].var().item() == pytest.approx(variance, rel=0.04)


def test_minibatches_leave_the_mean():
    data = torch.linspace(-1, 4, 12, dtype=torch.float64)
    model = Point(torch.zeros(8_000, dtype=torch.float64))
    states = sgld(
        model,
        square_loss,
        (data,),
        step=2e-3,
        num_samples=40,
        burn_in=300,
        thin=5,
        batch_size=4,
        progress=False,
    )
    mean = torch.stack([state["t"] for state in states]).mean()
    assert mean.item() == pytest.approx(data.mean().item(), abs=0.02)


def test_without_temperature_it_is_gradient_descent():
    model, data = nn.Linear(2, 3).double(), (torch.randn(6, 2).double(), torch.randint(3, (6,)))
    twin = copy.deepcopy(model)
    sgld(
        model, lambda m, x, y: F.cross_entropy(m(x), y), data, step=0.01, num_samples=3, thin=4, burn_in=2,
        prior_precision=0.5, temperature=0.0, progress=False,
    )  # fmt: skip
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.01, weight_decay=0.5)
    for _ in range(2 + 3 * 4):
        optimizer.zero_grad()
        F.cross_entropy(twin(data[0]), data[1], reduction="sum").backward()
        optimizer.step()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(mine, theirs)


def test_states_are_copies_and_the_global_generator_is_untouched():
    model, data = nn.Linear(1, 1), (torch.ones(3, 1),)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    runs = [
        sgld(
            copy.deepcopy(model),
            lambda m, x: m(x).mean() ** 2,
            data,
            step=0.1,
            num_samples=4,
            seed=3,
            progress=False,
        )
        for _ in range(2)
    ]
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(a["weight"], b["weight"]) for a, b in zip(*runs, strict=True))
    weights = [state["weight"].item() for state in runs[0]]
    assert len(set(weights)) == 4 and not runs[0][0]["weight"].requires_grad


def test_frozen_parameters_stay():
    model = nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    before = model.bias.clone()
    sgld(
        model, lambda m, x: m(x).square().mean(), (torch.ones(3, 2),), step=0.1, num_samples=2, progress=False
    )
    assert torch.equal(model.bias, before)


def test_predictive_averages_probabilities():
    model = nn.Linear(3, 4).double()
    before = copy.deepcopy(model.state_dict())
    states = [{name: torch.randn_like(value) for name, value in before.items()} for _ in range(5)]
    inputs = torch.randn(7, 3).double()
    expected = sum((inputs @ s["weight"].T + s["bias"]).softmax(-1) for s in states) / 5
    mixed = posterior_predictive(model, states, inputs)
    assert torch.allclose(mixed.exp(), expected) and not mixed.requires_grad
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="at least one"):
        posterior_predictive(model, [], inputs)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"step": 0.0}, "step must be positive"),
        ({"temperature": -1.0}, "temperature"),
        ({"prior_precision": -1.0}, "prior_precision"),
        ({"num_samples": 0}, "num_samples"),
        ({"thin": 0}, "thin"),
        ({"burn_in": -1}, "burn_in"),
        ({"batch_size": 4}, r"1\.\.3"),
    ],
)
def test_bad_input(change, message):
    arguments = {"step": 0.1, "num_samples": 1, "progress": False, **change}
    with pytest.raises(ValueError, match=message):
        sgld(nn.Linear(1, 1), lambda m, x: m(x).mean(), (torch.ones(3, 1),), **arguments)


def test_bad_data_and_divergence():
    loss = lambda model, *batch: model(batch[0]).square().mean()  # noqa: E731
    with pytest.raises(ValueError, match="data"):
        sgld(nn.Linear(1, 1), loss, (), step=0.1, num_samples=1)
    with pytest.raises(ValueError, match="data"):
        sgld(nn.Linear(1, 1), loss, (torch.ones(3, 1), torch.ones(2)), step=0.1, num_samples=1)
    with pytest.raises(RuntimeError, match="smaller step"):
        sgld(nn.Linear(1, 1), loss, (torch.ones(3, 1),), step=1e6, num_samples=500, progress=False)
