"""Calibration metrics, calibrators of logits, and the correctness-aware calibrator."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize, minimize_scalar
from scipy.special import logsumexp
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import brier_score_loss, roc_auc_score
from torch.nn import functional as F

from lib.book import load_reference
from lib.calibration import (
    EnsembleTemperatureScaling,
    IsotonicCalibration,
    TemperatureScaling,
    TransformCalibrator,
    auroc_correctness,
    brier,
    calibrated_log_likelihood,
    classwise_ece,
    correctness_aware_loss,
    ece,
    narrowly_wrong,
    reliability_diagram,
    top_label,
)

SLUG = "correctness-aware-calibration"


def sample(n=60, classes=5, spread=2.0, seed=0):
    """Logits whose labels are drawn from the softmax of half of them: overconfident."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    targets = torch.multinomial(torch.softmax(logits / 2, 1), 1, generator=generator).squeeze(1)
    return logits, targets


# metrics


def slow_ece(confidence, outcome, bins):
    total = 0.0
    for b in range(bins):
        inside = [
            i for i, c in enumerate(confidence) if b / bins < c <= (b + 1) / bins or (b == 0 and c == 0)
        ]
        if inside:
            gap = np.mean([confidence[i] for i in inside]) - np.mean([outcome[i] for i in inside])
            total += len(inside) / len(confidence) * abs(gap)
    return total


@settings(max_examples=30)
@given(st.integers(1, 20), st.integers(1, 40), st.integers(0, 1000))
def test_ece_is_the_loop_over_bins(bins, n, seed):
    logits, targets = sample(n, seed=seed)
    probabilities = torch.softmax(logits, 1)
    confidence, correct = top_label(probabilities, targets)
    expected = slow_ece(confidence.tolist(), correct.double().tolist(), bins)
    assert math.isclose(ece(probabilities, targets, bins=bins), expected, abs_tol=1e-12)
    binned = reliability_diagram(probabilities, targets, bins=bins)
    assert binned.count.sum() == n and torch.equal(binned.count == 0, binned.accuracy.isnan())


@settings(max_examples=30)
@given(st.integers(1, 20), st.integers(1, 40), st.integers(0, 1000))
def test_adaptive_bins_hold_equal_shares(bins, n, seed):
    logits, targets = sample(n, seed=seed)
    probabilities = torch.softmax(logits, 1)
    confidence, correct = (part.numpy() for part in top_label(probabilities, targets))
    binned = reliability_diagram(probabilities, targets, bins=bins, kind="adaptive")
    assert binned.count.max() - binned.count.min() <= 1 and len(binned.edges) == bins + 1
    order, start, total = np.argsort(confidence, kind="stable"), 0, 0.0
    for count in binned.count.tolist():
        inside = order[start : start + count]
        start += count
        if count:
            total += count / n * abs(confidence[inside].mean() - correct[inside].mean())
    assert math.isclose(ece(probabilities, targets, bins=bins, kind="adaptive"), total, abs_tol=1e-12)


def test_ece_by_hand():
    confidence = torch.tensor([0.1, 0.3, 0.35, 0.9])
    outcome = torch.tensor([0, 1, 0, 1])
    # two bins: the first with mean .25 and accuracy 1/3, the second with .9 and 1
    assert math.isclose(ece(confidence, outcome, bins=2), 0.75 * (1 / 3 - 0.25) + 0.25 * 0.1, rel_tol=1e-6)
    # adaptive: (.2, 1/2) and (.625, 1/2)
    assert math.isclose(
        ece(confidence, outcome, bins=2, kind="adaptive"), 0.5 * 0.3 + 0.5 * 0.125, rel_tol=1e-6
    )
    perfect = torch.tensor([0.0, 1.0, 1.0])
    assert ece(perfect, torch.tensor([False, True, True])) == 0.0


def test_edges_of_equal_bins_belong_to_the_left():
    binned = reliability_diagram(
        torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64), torch.tensor([0, 0, 1]), bins=2
    )
    assert binned.count.tolist() == [2, 1]


def test_classwise_ece():
    logits, targets = sample(80)
    probabilities = torch.softmax(logits, 1)
    columns = [slow_ece(probabilities[:, k].tolist(), (targets == k).double().tolist(), 10) for k in range(5)]
    assert math.isclose(classwise_ece(probabilities, targets, bins=10), np.mean(columns), abs_tol=1e-12)
    with pytest.raises(ValueError, match="all classes"):
        classwise_ece(probabilities[:, 0], targets == 0)


def test_brier_and_auroc_against_sklearn():
    logits, targets = sample(200)
    probabilities = torch.softmax(logits, 1)
    confidence, correct = top_label(probabilities, targets)
    assert math.isclose(brier(confidence, correct), brier_score_loss(correct.numpy(), confidence.numpy()))
    one_hot = np.eye(5)[targets.numpy()]
    assert math.isclose(brier(probabilities, targets), ((probabilities.numpy() - one_hot) ** 2).sum(1).mean())
    coarse = (confidence * 8).round() / 8  # with ties
    for score in (confidence, coarse):
        expected = roc_auc_score(correct.numpy(), score.numpy())
        assert math.isclose(auroc_correctness(score, correct), expected)
    assert math.isnan(auroc_correctness(torch.tensor([0.5, 0.6]), torch.tensor([1, 1])))


@pytest.mark.parametrize(
    ("probabilities", "targets", "error", "match"),
    [
        (torch.tensor([1, 0]), torch.tensor([1, 0]), TypeError, "floating"),
        (torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0]), TypeError, "targets"),
        (torch.tensor([0.5, 1.5]), torch.tensor([1, 0]), ValueError, "lie in"),
        (torch.tensor([0.5, math.nan]), torch.tensor([1, 0]), ValueError, "lie in"),
        (torch.tensor([[0.5, 0.4]]), torch.tensor([1]), ValueError, "sum to 1"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([2]), ValueError, "targets"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([0, 1]), ValueError, "probabilities must be"),
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), ValueError, "no samples"),
    ],
)
def test_metrics_refuse_bad_input(probabilities, targets, error, match):
    for metric in (ece, brier, auroc_correctness):
        with pytest.raises(error, match=match):
            metric(probabilities, targets)


def test_bins_are_checked():
    pair = torch.tensor([0.5]), torch.tensor([1])
    with pytest.raises(ValueError, match="bins"):
        ece(*pair, bins=0)
    with pytest.raises(ValueError, match="kind"):
        ece(*pair, kind="equal mass")


# calibrators of logits


@pytest.mark.parametrize("seed", range(3))
def test_temperature_against_scipy(seed):
    logits, targets = sample(150, seed=seed)
    array, labels = logits.numpy(), targets.numpy()

    def nll(log_temperature):
        scaled = array / math.exp(log_temperature)
        return (logsumexp(scaled, 1) - scaled[np.arange(len(labels)), labels]).mean()

    best = minimize_scalar(nll, bounds=(-4, 4), method="bounded", options={"xatol": 1e-10})
    fitted = TemperatureScaling().fit(logits, targets)
    assert math.isclose(fitted.temperature_, math.exp(best.x), rel_tol=1e-5)
    torch.testing.assert_close(fitted.transform(logits), torch.log_softmax(logits / fitted.temperature_, 1))


def test_temperature_at_the_ends_of_its_range():
    logits, _ = sample(20)
    assert math.isclose(TemperatureScaling().fit(logits, logits.argmax(1)).temperature_, 0.01)
    assert math.isclose(TemperatureScaling().fit(logits, logits.argmin(1)).temperature_, 100.0)


def test_ensemble_weights_against_scipy():
    logits, targets = sample(300, spread=4.0, seed=4)
    targets[:60] = torch.randint(0, 5, (60,), generator=torch.Generator().manual_seed(1))  # label noise
    fitted = EnsembleTemperatureScaling().fit(logits, targets)
    parts = torch.stack(
        [
            torch.softmax(logits / fitted.temperature_, 1),
            torch.softmax(logits, 1),
            torch.full_like(logits, 0.2),
        ]
    ).numpy()
    chosen = parts[:, np.arange(300), targets.numpy()]

    def nll(weights):
        return -np.log(weights @ chosen).mean()

    best = minimize(
        nll, [0.4, 0.3, 0.3], bounds=[(1e-9, 1)] * 3,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1}, options={"ftol": 1e-12},
    )  # fmt: skip
    assert math.isclose(fitted.weights_.sum(), 1, rel_tol=1e-9) and (fitted.weights_ >= 0).all()
    assert nll(fitted.weights_.numpy()) <= best.fun + 1e-6
    expected = np.log(np.einsum("w,wnk->nk", fitted.weights_.numpy(), parts))
    torch.testing.assert_close(fitted.transform(logits), torch.from_numpy(expected))


def test_isotonic_against_sklearn():
    logits, targets = sample(100, seed=2)
    probabilities = torch.softmax(logits, 1)
    oracle = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip")
    oracle.fit(probabilities.flatten().numpy(), np.eye(5)[targets.numpy()].ravel())
    fresh, _ = sample(40, seed=9)
    steps = oracle.predict(torch.softmax(fresh, 1).flatten().numpy()).reshape(40, 5)
    mixed = 0.99 * steps + 0.01 * torch.softmax(fresh, 1).numpy()
    expected = np.log(mixed / mixed.sum(1, keepdims=True))
    found = IsotonicCalibration(epsilon=0.01).fit(logits, targets).transform(fresh)
    torch.testing.assert_close(found, torch.from_numpy(expected))


CALIBRATORS = [TemperatureScaling, EnsembleTemperatureScaling, IsotonicCalibration]


@pytest.mark.parametrize("calibrator", CALIBRATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_calibrators_of_logits_share_one_convention(calibrator, dtype):
    logits, targets = sample(400, spread=3.0, seed=5)
    logits = logits.to(dtype).T.contiguous().T  # not contiguous
    fitted = calibrator()
    with pytest.raises(RuntimeError, match="fit"):
        fitted.transform(logits)
    assert fitted.fit(logits, targets) is fitted
    fresh, labels = sample(1000, spread=3.0, seed=6)
    fresh = fresh.to(dtype)
    found = fitted.transform(fresh)
    assert found.shape == fresh.shape and found.dtype == dtype and found.isfinite().all()
    torch.testing.assert_close(found.exp().sum(1), torch.ones(1000, dtype=dtype))
    assert torch.equal(found.argmax(1), fresh.argmax(1))
    assert F.nll_loss(found, labels) < F.cross_entropy(fresh, labels)
    assert ece(found.exp(), labels) < 0.7 * ece(torch.softmax(fresh, 1), labels)
    assert fitted.transform(fresh[:0]).shape == (0, 5)
    with pytest.raises(ValueError, match="no samples"):
        calibrator().fit(logits[:0], targets[:0])
    with pytest.raises(ValueError, match="finite"):
        calibrator().fit(logits * math.inf, targets)
    with pytest.raises(ValueError, match=r"\(n, C\)"):
        fitted.transform(fresh[0])
    with pytest.raises(ValueError, match="targets"):
        calibrator().fit(logits, targets + 1)
    with pytest.raises(TypeError, match="integer"):
        calibrator().fit(logits, targets.double())


def test_isotonic_keeps_the_prediction_where_it_is_flat_or_underflows():
    logits = torch.tensor([[300.0, 0.0, -2000.0], [0.0, 1e-3, 0.0]])
    fitted = IsotonicCalibration().fit(torch.randn(30, 3), torch.randint(0, 3, (30,)))
    found = fitted.transform(logits)
    assert found.isfinite().all() and found.argmax(1).tolist() == [0, 1]
    with pytest.raises(ValueError, match="epsilon"):
        IsotonicCalibration(epsilon=0.0)


# the correctness-aware loss


def test_loss_and_gradients_against_the_reference():
    reference = load_reference(SLUG, "ca_loss")
    logits, targets = sample(40)
    temperature = torch.rand(40, dtype=torch.float64) + 0.3
    found, expected = [], []
    for loss, results in ((correctness_aware_loss, found), (reference, expected)):
        z, t = logits.clone().requires_grad_(), temperature.clone().requires_grad_()
        value = loss(z, targets, t)
        results += [value.detach(), *torch.autograd.grad(value, (z, t))]
    torch.testing.assert_close(found, expected)


def test_narrowly_wrong_against_the_reference_and_autograd():
    logits, targets = sample(300, spread=1.0)
    mask = narrowly_wrong(logits, targets)
    assert torch.equal(mask, load_reference(SLUG, "narrowly_wrong")(logits, targets))
    assert mask.any() and (~mask).any()
    for temperature in (0.5, torch.linspace(0.5, 3, 300, dtype=torch.float64)):
        inverse = (1 / torch.as_tensor(temperature, dtype=torch.float64)).expand(300).clone().requires_grad_()
        log_likelihood = -F.cross_entropy(inverse[:, None] * logits, targets, reduction="sum")
        (slope,) = torch.autograd.grad(log_likelihood, inverse)
        expected = (slope > 0) & (logits.argmax(1) != targets)
        assert torch.equal(narrowly_wrong(logits, targets, temperature), expected)


def test_loss_gradcheck_is_a_brier_score_of_correctness():
    logits, targets = sample(12)
    temperature = torch.rand(12, dtype=torch.float64) + 0.5
    assert torch.autograd.gradcheck(
        lambda z, t: correctness_aware_loss(z, targets, t, reduction="none"),
        (logits.requires_grad_(), temperature.requires_grad_()),
    )
    confidence, correct = top_label(
        torch.softmax(logits.detach() / temperature.detach()[:, None], 1), targets
    )
    expected = brier_score_loss(correct.numpy(), confidence.numpy())
    assert math.isclose(correctness_aware_loss(logits, targets, temperature).item(), expected)


def test_gradient_is_the_closed_form():
    logits, targets = sample(30)
    (gradient,) = torch.autograd.grad(
        correctness_aware_loss(logits.requires_grad_(), targets, 1.5, reduction="sum"), logits
    )
    p = torch.softmax(logits.detach() / 1.5, 1)
    m, top = p.max(1, keepdim=True)
    correct = (top == targets[:, None]).double()
    expected = 2 * (m - correct) * m * (F.one_hot(top[:, 0], 5) - p) / 1.5
    torch.testing.assert_close(gradient, expected)


def test_loss_follows_cross_entropy_in_shapes_and_masks():
    logits, targets = sample(24)
    shaped, labels = logits.reshape(2, 3, 4, 5).movedim(3, 1), targets.reshape(2, 3, 4)
    flat = correctness_aware_loss(logits, targets, 2.0, reduction="none")
    torch.testing.assert_close(
        correctness_aware_loss(shaped, labels, 2.0, reduction="none"), flat.reshape(2, 3, 4)
    )
    torch.testing.assert_close(correctness_aware_loss(logits[0], targets[0], 2.0), flat[0])
    ignored = targets.clone()
    ignored[::2] = -100
    torch.testing.assert_close(correctness_aware_loss(logits, ignored, 2.0), flat[1::2].mean())
    weight = torch.rand(5, dtype=torch.float64)
    expected = (flat * weight[targets]).sum() / weight[targets].sum()
    torch.testing.assert_close(correctness_aware_loss(logits, targets, 2.0, weight=weight), expected)
    torch.testing.assert_close(correctness_aware_loss(logits, targets, 2.0, reduction="sum"), flat.sum())
    each = torch.func.vmap(lambda z, y: correctness_aware_loss(z[None], y[None], 2.0))(logits, targets)
    torch.testing.assert_close(each, flat)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_temperature_must_be_positive(temperature):
    logits, targets = sample(4)
    for function in (correctness_aware_loss, narrowly_wrong):
        with pytest.raises(ValueError, match="positive"):
            function(logits, targets, temperature)
    with pytest.raises(ValueError, match="broadcast"):
        correctness_aware_loss(logits, targets, torch.ones(3))


# the calibrator


class Reader(torch.nn.Module):
    """Logits are the first pixels; counts how often it runs in training mode."""

    trained = 0

    def forward(self, inputs):
        self.trained += self.training
        return inputs.flatten(1)[:, :5] * 4


def images(n=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.rand(n, 1, 3, 3, generator=generator)
    probabilities = torch.softmax(inputs.flatten(1)[:, :5] * 4, 1)
    return inputs, torch.multinomial(probabilities, 1, generator=generator).squeeze(1)


def flip(inputs):
    return inputs.flip(3)


@pytest.mark.parametrize("loss", ["ca", "ce", "mse"])
def test_calibrator_learns_and_keeps_predictions(loss):
    inputs, targets = images()
    model = Reader().train()
    state = torch.random.get_rng_state()
    fitted = TransformCalibrator([flip, lambda x: x + 0.1], k=3, hidden=8, steps=80).fit(
        model, inputs, targets, loss=loss
    )
    assert torch.equal(state, torch.random.get_rng_state()) and model.trained == 0 and model.training
    assert fitted.history_.loss[-1] < fitted.history_.loss[0]
    fresh, _ = images(50, seed=1)
    temperature, found = fitted.temperature(fresh), fitted.transform(fresh)
    assert temperature.shape == (50,) and (temperature >= 0.1).all() and temperature.std() > 0
    torch.testing.assert_close(found, torch.log_softmax(model(fresh) / temperature[:, None], 1))
    assert torch.equal(found.argmax(1), model(fresh).argmax(1))
    assert fitted.network_[0].in_features == 9
    again = TransformCalibrator([flip, lambda x: x + 0.1], k=3, hidden=8, steps=80)
    assert torch.equal(again.fit(model, inputs, targets, loss=loss).temperature(fresh), temperature)


def test_features_follow_the_order_of_the_original():
    inputs, targets = images(20)
    fitted = TransformCalibrator([flip], k=2, steps=1).fit(Reader(), inputs, targets)
    features, logits = fitted._features(inputs)
    original = torch.softmax(Reader()(inputs), 1)
    copies = torch.softmax(Reader()(flip(inputs)), 1)
    for row in range(20):
        leading = sorted(range(5), key=lambda label: -original[row, label])[:2]
        expected = [*original[row, leading], *copies[row, leading]]
        torch.testing.assert_close(features[row], torch.stack(expected))
    torch.testing.assert_close(logits, Reader()(inputs))


def test_calibrator_against_the_reference_network_input():
    inputs, targets = images(20)
    fitted = TransformCalibrator([flip], k=3, steps=1).fit(Reader(), inputs, targets)
    expected = load_reference(SLUG, "transform_features")(Reader(), inputs, [flip], 3)
    torch.testing.assert_close(fitted._features(inputs)[0], expected)


def test_calibrator_refuses_what_cannot_teach():
    inputs, targets = images(30)
    right = Reader()(inputs).argmax(1)
    with pytest.raises(ValueError, match="every prediction on this set is right"):
        TransformCalibrator(steps=1).fit(Reader(), inputs, right)
    with pytest.raises(ValueError, match="is wrong"):
        TransformCalibrator(steps=1).fit(Reader(), inputs, (right + 1) % 5)
    with pytest.raises(ValueError, match="loss"):
        TransformCalibrator(steps=1).fit(Reader(), inputs, targets, loss="nll")
    with pytest.raises(ValueError, match="number of classes"):
        TransformCalibrator(k=6, steps=1).fit(Reader(), inputs, targets)
    with pytest.raises(ValueError, match="keep the shape"):
        TransformCalibrator([lambda x: x[:, :, 1:]], steps=1).fit(Reader(), inputs, targets)
    with pytest.raises(RuntimeError, match="fit"):
        TransformCalibrator().temperature(inputs)
    for wrong in ({"k": 0}, {"hidden": 1.5}, {"min_temperature": 0.0}, {"weight_decay": -1.0}, {"lr": 0}):
        with pytest.raises(ValueError):
            TransformCalibrator(**wrong)


def test_calibrated_log_likelihood_takes_its_temperature_from_the_validation_set():
    g = torch.Generator().manual_seed(0)
    y = torch.randint(4, (60,), generator=g)
    logits = 5 * torch.randn(60, 4, generator=g) + 6 * F.one_hot(y, 4)
    value, temperature = calibrated_log_likelihood(logits[:30], y[:30], logits[30:], y[30:])
    assert temperature == TemperatureScaling().fit(logits[:30], y[:30]).temperature_
    expected = -torch.nn.functional.cross_entropy(logits[30:].double() / temperature, y[30:])
    assert value == pytest.approx(expected.item(), abs=1e-9)
    # the same temperature fitted on what is judged would flatter
    assert value < calibrated_log_likelihood(logits[30:], y[30:], logits[30:], y[30:])[0]
    # a global rescaling of the logits is undone
    assert calibrated_log_likelihood(7 * logits[:30], y[:30], 7 * logits[30:], y[30:])[0] == pytest.approx(
        value
    )
    with pytest.raises(ValueError, match="targets"):
        calibrated_log_likelihood(logits[:30], y[:30], logits[30:], y[:30] + 4)
