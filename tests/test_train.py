"""lib.train.fit against loops written out by hand."""

import copy
import io
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from lib.models import CNN
from lib.train import accuracy, fit, fit_ensemble, progress


def squared(model, x, y):
    return F.mse_loss(model(x), y)


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 3, generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
    return model, x, x @ torch.tensor([[1.0], [-2.0], [0.5]])


def scripted(values):
    values = iter(values)
    return lambda model: next(values)


def test_full_batch_equals_gradient_descent_by_hand(problem):
    model, x, y = problem
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    # shuffling the rows changes the order of summation only
    history = fit(model, squared, (x, y), optimizer=torch.optim.SGD(model.parameters(), lr=0.1), steps=5)
    losses = []
    for _ in range(5):
        error = x @ weight.T + bias - y
        losses.append(error.square().mean().item())
        weight = weight - 0.1 * 2 * (error * x).mean(0, keepdim=True)
        bias = bias - 0.1 * 2 * error.mean(0)
    torch.testing.assert_close(model.weight.detach(), weight)
    torch.testing.assert_close(model.bias.detach(), bias)
    assert history.loss == pytest.approx(losses, rel=1e-4)
    assert history.rounds == [1, 2, 3, 4, 5] and history.validation == [] and history.best_step is None


def test_each_epoch_visits_every_row_once_in_the_order_of_the_seed(problem):
    model, x, y = problem

    def visits(seed):
        seen = []

        def loss_fn(model, rows, x):
            seen.append(rows.tolist())
            return squared(model, x, torch.zeros(len(x), 1))

        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        history = fit(
            model, loss_fn, [torch.arange(20), x], optimizer=optimizer, epochs=2, batch_size=8, seed=seed
        )
        assert history.rounds == [3, 6] and len(history.loss) == 6
        assert [len(batch) for batch in seen] == [8, 8, 4] * 2
        for start in (0, 3):
            assert sorted(sum(seen[start : start + 3], [])) == list(range(20))
        assert seen[:3] != seen[3:]
        return seen

    state = torch.get_rng_state()
    assert visits(1) == visits(1) != visits(2)
    assert torch.equal(torch.get_rng_state(), state)


def test_schedule_steps_each_step(problem):
    model, x, y = problem
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    rates = []

    def loss_fn(model, x, y):
        rates.append(optimizer.param_groups[0]["lr"])
        return 0 * squared(model, x, y)

    fit(model, loss_fn, (x, y), optimizer=optimizer, schedule=schedule, epochs=2, batch_size=10)
    assert rates == [1, 0.5, 0.25, 0.125]


def test_gradients_are_clipped_to_the_norm(problem):
    model, x, y = problem
    before = torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    fit(model, lambda *a: 1e3 * squared(*a), (x, y), optimizer=optimizer, steps=1, clip_norm=0.25)
    after = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    assert (after - before).norm().item() == pytest.approx(0.25, rel=1e-4)


def test_early_stopping_restores_the_best_weights(problem):
    model, x, y = problem
    snapshots = []
    history = fit(
        model,
        squared,
        (x, y),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
        epochs=10,
        batch_size=10,
        validate=scripted([5, 3, 4, 2, 2, 6, 1]),  # a tie is no improvement
        patience=2,
        callbacks=[lambda model, history: snapshots.append(copy.deepcopy(model.state_dict()))],
    )
    assert history.validation == [5, 3, 4, 2, 2, 6]
    assert history.rounds == [2, 4, 6, 8, 10, 12] and history.best_step == 8
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, snapshots[3][name])
        assert not torch.equal(tensor, snapshots[5][name])


def test_best_weights_also_when_training_ends_before_patience(problem):
    model, x, y = problem
    snapshots = []
    history = fit(
        model,
        squared,
        (x, y),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
        steps=3,
        validate=scripted([2, 1, 3]),
        patience=5,
        callbacks=[lambda model, history: snapshots.append(model.weight.detach().clone())],
    )
    assert history.best_step == 2 and torch.equal(model.weight, snapshots[1])


def test_without_patience_the_last_weights_stay(problem):
    model, x, y = problem
    last = []
    history = fit(
        model,
        squared,
        (x, y),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
        steps=3,
        validate=scripted([1, 2, 3]),
        callbacks=[lambda model, history: last.append(model.weight.detach().clone())],
    )
    assert history.best_step == 1 and torch.equal(model.weight, last[-1])


def test_rounds_modes_and_gradients(problem):
    model, x, y = problem
    modes = []

    def loss_fn(model, x, y):
        modes.append(("train", model.training, torch.is_grad_enabled()))
        return squared(model, x, y)

    def validate(model):
        modes.append(("validate", model.training, torch.is_grad_enabled()))
        return 0.0

    batches = ((x, y) for _ in range(100))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    history = fit(model, loss_fn, batches, optimizer=optimizer, steps=5, every=2, validate=validate)
    assert history.rounds == [2, 4, 5]  # the last round may be shorter
    train, check = ("train", True, True), ("validate", False, False)
    assert modes == [train, train, check, train, train, check, train, check]
    assert not model.training
    assert len(list(batches)) == 95  # no batch was drawn and thrown away


def test_iterables_start_again_each_epoch_and_single_tensors_are_batches(problem):
    model, x, _ = problem
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    history = fit(model, lambda m, x: m(x).square().mean(), iter([x, x, x]), optimizer=optimizer, epochs=1)
    assert history.rounds == [3]

    class Loader:
        def __iter__(self):
            return iter([x, x])

    history = fit(model, lambda m, x: m(x).square().mean(), Loader(), optimizer=optimizer, steps=5)
    assert history.rounds == [2, 4, 5]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_the_step(problem, bad):
    model, x, y = problem
    factors = scripted([1.0, 1.0, bad])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = []

    def loss_fn(model, x, y):
        before.append(model.weight.detach().clone())
        return squared(model, x, y) * factors(model)

    with pytest.raises(ValueError, match=rf"loss is {bad} at step 3"):
        fit(model, loss_fn, (x, y), optimizer=optimizer, steps=5)
    assert torch.equal(model.weight, before[-1])  # the bad step was not taken
    with pytest.raises(ValueError, match=rf"validation is {bad} at step 1"):
        fit(model, squared, (x, y), optimizer=optimizer, steps=5, validate=lambda model: bad)


def test_data_that_runs_dry(problem):
    model, x, y = problem
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with pytest.raises(ValueError, match="ran dry after 2 steps"):
        fit(model, squared, iter([(x, y)] * 2), optimizer=optimizer, steps=3)
    with pytest.raises(ValueError, match="ran dry after 0 steps"):
        fit(model, squared, iter([]), optimizer=optimizer, epochs=1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"steps": None}, "either epochs or steps"),
        ({"epochs": 1}, "either epochs or steps"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"patience": 2}, "patience needs validate"),
        ({"patience": 0, "validate": float}, "patience must be at least 1"),
        ({"every": 0}, "every must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"data": torch.zeros(4, 3)}, "data must be a tuple"),
        ({"data": (torch.zeros(4, 3), torch.zeros(5, 1))}, "equal first dimension"),
        ({"data": (torch.zeros(0, 3), torch.zeros(0, 1))}, "no examples"),
        ({"data": iter([]), "batch_size": 4}, "for tensors only"),
        ({"data": ()}, "data must be a tuple"),
    ],
)
def test_arguments_that_do_not_fit(problem, change, message):
    model, x, y = problem
    arguments = {
        "data": (x, y),
        "steps": 2,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
    } | change
    with pytest.raises(ValueError, match=message):
        fit(model, squared, **arguments)


def test_progress_bars_on_request(problem, monkeypatch):
    model, x, y = problem
    screen = io.StringIO()
    # the suite runs with TQDM_DISABLE=1, which an explicit `disable` overrules
    monkeypatch.setattr(sys.modules["lib.train.fit"], "tqdm", partial(tqdm, file=screen, disable=False))
    for desc, shown in ("shown", True), ("hidden", False):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        fit(model, squared, (x, y), optimizer=optimizer, epochs=2, batch_size=8, desc=desc, progress=shown)
    assert list(progress(range(3), "counting")) == [0, 1, 2]
    assert "shown" in screen.getvalue() and "/6" in screen.getvalue() and "counting" in screen.getvalue()
    assert "hidden" not in screen.getvalue()


def test_progress_bars_honour_tqdm_disable():
    code = "from lib.train import progress; print(list(progress(range(3), 'counting')))"
    environment = os.environ | {"TQDM_DISABLE": "1"}  # tqdm reads it when it is imported
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[0, 1, 2]" and done.stderr == ""


def test_progress_passes_everything_on():
    assert list(progress(iter("abc"), "letters", total=3)) == ["a", "b", "c"]


def test_accuracy_counts_and_leaves_the_mode():
    class Parity(nn.Module):
        def forward(self, x):
            assert not self.training and not torch.is_grad_enabled()
            return F.one_hot(x % 2, 2).float()

    model = Parity().train()
    labels = torch.tensor([0, 1, 0, 0, 0, 1, 1])  # wrong for 3 and 6
    assert accuracy(model, torch.arange(7), labels, batch_size=3) == 5 / 7
    assert model.training
    with pytest.raises(ValueError, match="7 inputs and 6 labels"):
        accuracy(model, torch.arange(7), labels[:6])
    with pytest.raises(ValueError, match="0 inputs"):
        accuracy(model, torch.arange(0), labels[:0])


# --- ensembles


def members(count, build):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return [build() for _ in range(count)]


@pytest.mark.parametrize("batch_size", [None, 8])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_an_ensemble_ends_where_its_members_would_alone(kind, batch_size):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 20, 5, generator=generator, dtype=torch.float64)  # each member has data of its own
    y = torch.randint(4, (20,), generator=generator).expand(3, 20)  # shared
    models = members(3, lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double())
    models[1][0].bias.data += 1
    alone = copy.deepcopy(models)

    def loss_fn(model, x, y):
        return F.cross_entropy(model(x), y) + 0.01 * model(-x).square().mean()

    def make(parameters):
        if kind == "sgd":
            return torch.optim.SGD(parameters, lr=0.2, momentum=0.9)
        return torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.1)

    def decay(optimizer):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    seen = []
    losses = fit_ensemble(
        models,
        loss_fn,
        (x, y),
        optimizer=make,
        schedule=decay,
        epochs=4,
        seeds=[5, 6, 5],
        batch_size=batch_size,
        callback=lambda models, epoch: seen.append((epoch, models[2][0].weight.clone(), models[2].training)),
    )
    for member, (model, other) in enumerate(zip(models, alone, strict=True)):
        optimizer = make(other.parameters())
        rounds = []
        history = fit(
            other,
            loss_fn,
            (x[member], y[member]),
            optimizer=optimizer,
            schedule=decay(optimizer),
            epochs=4,
            batch_size=batch_size,
            seed=[5, 6, 5][member],
            callbacks=[lambda model, history, rounds=rounds: rounds.append(model[0].weight.clone())],
        )
        torch.testing.assert_close(losses[:, member], torch.tensor(history.loss, dtype=torch.float64))
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs)
        assert not model.training
    assert [epoch for epoch, _, _ in seen] == [0, 1, 2, 3] and not any(training for _, _, training in seen)
    for (_, weight, _), expected in zip(seen, rounds, strict=True):
        torch.testing.assert_close(weight, expected)


def test_an_ensemble_of_convolutions_leaves_frozen_weights_alone():
    models = members(2, lambda: CNN(3, image_size=4, channels=(2, 3), width=5))
    for model in models:
        model.stem.requires_grad_(False)
    before = copy.deepcopy(models)
    data = torch.rand(2, 6, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2]).expand(2, 6)
    losses = fit_ensemble(
        models,
        lambda model, x, y: F.cross_entropy(model(x), y),
        data,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.02),
        epochs=30,
        seeds=[0, 1],
    )
    assert losses.shape == (30, 2) and (losses[-1] < losses[0]).all()
    for model, old in zip(models, before, strict=True):
        assert torch.equal(model.stem[0].weight, old.stem[0].weight)
        assert not torch.equal(model.head.weight, old.head.weight)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"models": []}, "at least one model"),
        ({"seeds": [1]}, "a seed for each"),
        ({"data": ()}, "must be tensors of shape"),
        ({"data": (torch.zeros(3, 4, 1),)}, "must be tensors of shape"),
        ({"data": (torch.zeros(2, 4, 1), torch.zeros(2, 5))}, "with one n"),
        ({"data": (torch.zeros(2),)}, "must be tensors of shape"),
        ({"data": (torch.zeros(2, 0, 1),)}, "at least 1"),
        ({"epochs": 0}, "at least 1"),
        ({"data": (torch.tensor([[[1.0]], [[float("inf")]]]),)}, "loss of member 1 is inf at step 1"),
    ],
)
def test_ensemble_arguments_that_do_not_fit(change, message):
    arguments = {
        "models": members(2, lambda: nn.Linear(1, 1)),
        "loss_fn": lambda model, x: model(x).square().mean(),
        "data": (torch.zeros(2, 4, 1),),
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        "epochs": 1,
        "seeds": [0, 1],
    }
    with pytest.raises(ValueError, match=message):
        fit_ensemble(**arguments | change)
