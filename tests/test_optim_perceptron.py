"""The dynamics of logistic regression at large step sizes, against references, scikit-learn and exact results."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Perceptron
from sklearn.svm import SVC
from torch.nn.functional import softplus

from lib.book import load_reference
from lib.data.synthetic import diverging_loss_pair, perceptron_hard_case
from lib.optim import batch_perceptron, logistic_gd, margin


def separable(n=40, d=5, seed=0, gap=0.1):
    """Random data that the first coordinate axis, rotated, separates with margin at least `gap`."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, 2, (n,), generator=generator) * 2 - 1
    features = torch.randn(n, d, generator=generator, dtype=torch.float64)
    features[:, 0] = targets * (features[:, 0].abs() + gap)
    rotation = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    return features @ rotation, targets


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("step_size", [1e-2, 1.0, 1e4])
def test_logistic_gd_agrees_with_the_reference(normalized, step_size):
    features, targets = separable()
    reference = load_reference("logistic-to-perceptron", "lr_gd")
    expected = reference(features, targets, step_size, 15, normalized)
    trace = logistic_gd(
        features, targets, step_size=step_size, normalized=normalized, max_iter=15, stop=False, path=True
    )
    torch.testing.assert_close(trace.path, expected, rtol=1e-10, atol=1e-10 * step_size)
    torch.testing.assert_close(trace.theta, expected[-1], rtol=1e-10, atol=1e-10 * step_size)


@pytest.mark.parametrize("normalization", ["n", "misclassified"])
def test_batch_perceptron_agrees_with_the_reference(normalization):
    features, targets = separable(seed=1, gap=0.01)
    reference = load_reference("logistic-to-perceptron", "perceptron")
    expected = reference(features, targets, by_mistakes=normalization == "misclassified")
    run = batch_perceptron(features, targets, normalization=normalization, path=True)
    torch.testing.assert_close(run.path, expected)
    assert run.iterations == len(expected) - 1 == len(run.mistakes)


def test_records_are_those_of_autograd():
    features, targets = separable()
    trace = logistic_gd(features, targets, step_size=30.0, max_iter=6, stop=False, path=True)
    for k, start in enumerate(trace.path):
        theta = start.clone().requires_grad_()
        margins = targets * (features @ theta)
        loss = softplus(-margins).mean()
        loss.backward()
        torch.testing.assert_close(trace.loss[k], loss.detach(), rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(trace.grad_norm[k], theta.grad.norm())
        assert trace.accuracy[k] == (margins > 0).double().mean()
        if k + 1 < len(trace.path):
            torch.testing.assert_close(trace.path[k + 1], theta.detach() - 30.0 * theta.grad)


def test_normalized_step_is_the_gradient_step_over_the_mean_weight():
    features, targets = separable()
    start = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    plain = logistic_gd(features, targets, step_size=1.0, max_iter=1, theta0=start, stop=False)
    soft = logistic_gd(
        features, targets, step_size=1.0, max_iter=1, theta0=start, stop=False, normalized=True
    )
    mean_weight = torch.sigmoid(-targets * (features @ start)).mean()
    torch.testing.assert_close((soft.theta - start) * mean_weight, plain.theta - start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stays_finite_where_every_sigmoid_underflows(dtype):
    features, targets = (part.to(dtype) if part.is_floating_point() else part for part in separable())
    trace = logistic_gd(features, targets, step_size=1e8, normalized=True, max_iter=40, stop=False)
    assert trace.theta.dtype == dtype
    assert all(record.isfinite().all() for record in (trace.theta, trace.loss, trace.grad_norm))
    assert trace.loss[-1] == 0 and not torch.signbit(trace.loss[-1])


def test_stops_at_the_first_separating_iterate():
    features, targets = separable()
    trace = logistic_gd(features, targets, step_size=0.5, max_iter=5000)
    assert trace.iterations == len(trace.loss) - 1
    assert trace.accuracy[-1] == 1 and (trace.accuracy[:-1] < 1).all()
    assert trace.path is None
    longer = logistic_gd(features, targets, step_size=0.5, max_iter=trace.iterations + 5, stop=False)
    assert longer.iterations == trace.iterations and len(longer.loss) == trace.iterations + 6
    shorter = logistic_gd(features, targets, step_size=0.5, max_iter=trace.iterations - 1)
    assert shorter.iterations is None and len(shorter.loss) == trace.iterations
    solved = logistic_gd(features, targets, step_size=0.5, theta0=trace.theta)
    assert solved.iterations == 0 and torch.equal(solved.theta, trace.theta)


@pytest.mark.parametrize("normalized, normalization", [(False, "n"), (True, "misclassified")])
def test_the_limit_is_the_perceptron(normalized, normalization):
    features, targets = separable(n=60, d=8, seed=2, gap=0.01)
    run = batch_perceptron(features, targets, normalization=normalization, path=True)
    assert run.iterations >= 3
    trace = logistic_gd(
        features,
        targets,
        step_size=1e10,
        normalized=normalized,
        max_iter=run.iterations,
        stop=False,
        path=True,
    )
    torch.testing.assert_close(trace.path / 1e10, run.path, rtol=0, atol=1e-10)


@pytest.mark.parametrize("n", [n for n in range(2, 60) if (3 * n + 2) % 10] + [1000])
def test_hard_case_takes_the_predicted_number_of_steps(n):
    features, targets = perceptron_hard_case(n)
    run = batch_perceptron(features, targets, path=True)
    assert run.iterations == (3 * n + 2) // 10 + 1
    k = torch.arange(1, run.iterations + 1, dtype=torch.float64)
    expected = torch.stack([0.25 + (k - 1) / (2 * n), (n - 2 * k) / (2 * n)], 1)
    torch.testing.assert_close(run.path[1:], expected)
    assert (run.mistakes[1:] == 1).all() and run.mistakes[0] == n
    assert batch_perceptron(features, targets, normalization="misclassified").iterations <= 5


def test_a_point_exactly_on_the_boundary_is_wrong():
    # n = 16: coordinates are dyadic, so the fifth iterate has margin exactly zero at the lone point
    run = batch_perceptron(*perceptron_hard_case(16), path=True)
    assert run.path[5] @ torch.tensor([0.5, -1.0], dtype=torch.float64) == 0
    assert run.iterations == 6


def test_the_paper_s_iteration_counts_on_the_worst_case():
    data = perceptron_hard_case(1000)
    counts = [
        logistic_gd(*data, step_size=step, normalized=True).iterations for step in (100.0, 10.0, 1.0, 0.1)
    ]
    assert counts == [2, 2, 16, 157]
    assert logistic_gd(*data, step_size=100.0).iterations == 308


def test_the_loss_diverges_before_success():
    data = diverging_loss_pair()
    for step in (10.0, 1e3, 1e5):
        trace = logistic_gd(*data, step_size=step, path=True)
        assert trace.iterations == 2
        exact = (np.logaddexp(0, step / 4) + np.logaddexp(0, -3.5 * step)) / 2
        assert trace.loss[1].item() == pytest.approx(exact, rel=1e-12)
    torch.testing.assert_close(trace.path[2] / 1e5, torch.tensor([1.0, 0.25], dtype=torch.float64))


def test_single_sample_variant_is_scikit_learn_s():
    features, targets = separable(n=70, d=6, seed=4, gap=0.01)
    run = batch_perceptron(features, targets, normalization="single", max_iter=100_000, path=True)
    judge = Perceptron(shuffle=False, fit_intercept=False, tol=None, max_iter=500)
    judge.fit(features.numpy(), targets.numpy())
    np.testing.assert_allclose(judge.coef_[0], run.theta.numpy(), atol=1e-10)
    assert run.iterations == len(run.path) - 1 == int(run.mistakes.sum())
    assert batch_perceptron(features, targets, normalization="single", max_iter=1).iterations is None


@settings(max_examples=25)
@given(
    n=st.integers(1, 30),
    d=st.integers(1, 6),
    seed=st.integers(0, 10_000),
    step_size=st.sampled_from([0.05, 1.0, 50.0, 1e6]),
)
def test_every_method_stays_within_its_bound(n, d, seed, step_size):
    features, targets = separable(n, d, seed, gap=0.3)
    mu, radius = margin(features, targets).value, features.norm(dim=1).max().item()
    assert mu >= 0.3 - 1e-9
    ratio = radius**2 / mu**2 * (1 + 1e-9)
    soft = logistic_gd(features, targets, step_size=step_size, normalized=True, max_iter=20_000)
    assert soft.iterations <= ratio + 2 * math.log(2 * n - 1) / (step_size * mu**2)
    assert batch_perceptron(features, targets, max_iter=20_000).iterations <= max(n, 2) * ratio
    for normalization in ("misclassified", "single"):
        run = batch_perceptron(features, targets, normalization=normalization, max_iter=20_000)
        assert run.iterations <= ratio
        assert (targets * (features @ run.theta) > 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_margin_is_the_hard_margin_svm_s(seed):
    features, targets = separable(n=50, d=6, seed=seed)
    found = margin(features, targets)
    signed = (targets[:, None] * features).numpy()
    mirrored = np.vstack([signed, -signed])  # symmetric, so that the intercept is zero
    machine = SVC(kernel="linear", C=1e6, tol=1e-10).fit(mirrored, np.repeat([1, -1], len(signed)))
    assert found.value == pytest.approx(1 / np.linalg.norm(machine.coef_), rel=1e-5)
    assert found.direction.norm().item() == pytest.approx(1)
    assert (signed @ found.direction.numpy()).min() == pytest.approx(found.value)


def test_margin_of_known_data():
    assert margin(*perceptron_hard_case(9)).value == pytest.approx(0.5)
    assert margin(*diverging_loss_pair()).value == pytest.approx(1.0)  # along (1, 0)
    one = margin(torch.tensor([[3.0, 4.0]]), torch.tensor([-1]))
    assert one.value == pytest.approx(5) and one.direction.dtype == torch.float32
    assert margin(1e6 * perceptron_hard_case(9)[0], perceptron_hard_case(9)[1]).value == pytest.approx(5e5)


@pytest.mark.parametrize(
    "features, targets",
    [
        ([[1.0, 0.0], [1.0, 0.0]], [1, -1]),  # the same point in both classes
        ([[1.0, 0.0], [-1.0, 1.0], [-1.0, -1.0]], [1, 1, 1]),  # the origin inside the hull
        ([[0.0, 0.0]], [1]),
        ([[0.0, 0.0], [1.0, 1.0]], [1, 1]),
    ],
)
def test_margin_refuses_data_that_is_not_separable(features, targets):
    with pytest.raises(ValueError, match="not separable"):
        margin(torch.tensor(features), torch.tensor(targets))
    assert batch_perceptron(torch.tensor(features), torch.tensor(targets), max_iter=50).iterations is None


def test_layout_and_target_types_do_not_matter():
    features, targets = separable()
    expected = logistic_gd(features, targets, step_size=3.0, max_iter=5, stop=False).theta
    strided = torch.empty(80, 10, dtype=torch.float64)[::2, ::2].copy_(features)
    assert not strided.is_contiguous()
    for rows, signs in ((strided, targets), (features.T.contiguous().T, targets.float())):
        torch.testing.assert_close(
            logistic_gd(rows, signs, step_size=3.0, max_iter=5, stop=False).theta, expected
        )
    kept = features.clone().requires_grad_()
    assert not logistic_gd(kept, targets, step_size=3.0, max_iter=5).theta.requires_grad


DATA = (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), torch.tensor([1, -1]))


@pytest.mark.parametrize("function", [lambda *a: logistic_gd(*a, step_size=1.0), batch_perceptron, margin])
@pytest.mark.parametrize(
    "features, targets, error, message",
    [
        ([[1.0, 2.0]], DATA[1], TypeError, "features must be a floating-point tensor"),
        (DATA[0].long(), DATA[1], TypeError, "int64"),
        (DATA[0], [1, -1], TypeError, "targets must be a tensor"),
        (DATA[0][0], DATA[1], ValueError, r"shape \(n, d\)"),
        (DATA[0][:0], DATA[1][:0], ValueError, r"shape \(n, d\)"),
        (DATA[0], DATA[1][:1], ValueError, r"shape \(2,\)"),
        (DATA[0], torch.tensor([0, 1]), ValueError, "2 \\* labels - 1"),
        (DATA[0] * float("inf"), DATA[1], ValueError, "finite"),
        (DATA[0] * float("nan"), DATA[1], ValueError, "finite"),
    ],
)
def test_bad_data_is_refused(function, features, targets, error, message):
    with pytest.raises(error, match=message):
        function(features, targets)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"step_size": 0.0}, ValueError, "step_size must be positive"),
        ({"step_size": float("inf")}, ValueError, "step_size must be positive"),
        ({"step_size": float("nan")}, ValueError, "step_size must be positive"),
        ({"step_size": 1.0, "max_iter": -1}, ValueError, "max_iter"),
        ({"step_size": 1.0, "max_iter": 2.5}, ValueError, "max_iter"),
        ({"step_size": 1.0, "theta0": [0.0, 0.0]}, TypeError, "theta0"),
        ({"step_size": 1.0, "theta0": torch.zeros(3)}, ValueError, r"theta0 must have shape \(2,\)"),
    ],
)
def test_bad_settings_of_gradient_descent_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        logistic_gd(*DATA, **arguments)


def test_other_bad_settings_are_refused():
    with pytest.raises(ValueError, match="'misclassified'"):
        batch_perceptron(*DATA, normalization="mean")
    with pytest.raises(ValueError, match="max_iter"):
        batch_perceptron(*DATA, max_iter=-3)
    with pytest.raises(ValueError, match="at least 2"):
        perceptron_hard_case(1)


def test_no_steps_are_allowed():
    assert batch_perceptron(*DATA, max_iter=0).iterations is None
    trace = logistic_gd(*DATA, step_size=1.0, max_iter=0, path=True)
    assert trace.iterations is None and trace.path.shape == (1, 2)
    assert trace.loss.item() == pytest.approx(math.log(2))
