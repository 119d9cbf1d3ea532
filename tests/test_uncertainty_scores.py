"""Scores on cases worked by hand, and metrics against brute force."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import average_precision_score, roc_auc_score

from lib.uncertainty import lid_score, msp, odin, ood_metrics


def test_msp():
    logits = torch.tensor([[0.0, math.log(3)], [5.0, 5.0]])
    torch.testing.assert_close(msp(logits), torch.tensor([0.75, 0.5]))
    torch.testing.assert_close(msp(2 * logits, 2.0), msp(logits))
    assert msp(torch.tensor([[1e4, 0.0]])) == 1
    for bad in (logits[0], logits.long()):
        with pytest.raises(ValueError, match="logits"):
            msp(bad)
    with pytest.raises(ValueError, match="temperature"):
        msp(logits, 0.0)


def test_odin_moves_against_the_gradient_of_the_loss():
    weights = torch.tensor([[1.0, -2.0], [0.0, 1.0]])

    def model(x):
        return x @ weights.T

    inputs = torch.tensor([[0.7, 0.1], [0.1, 0.9]])
    torch.testing.assert_close(odin(model, inputs, temperature=1.0, eps=0.0), msp(model(inputs)))
    # the linear margin to the other class grows by eps times the sum of |w|
    towards = torch.tensor([[0.1, -0.1], [-0.1, 0.1]])
    torch.testing.assert_close(odin(model, inputs, temperature=1.0, eps=0.1), msp(model(inputs + towards)))
    torch.testing.assert_close(
        odin(model, inputs, temperature=1.0, eps=0.05, scale=0.5), msp(model(inputs + towards))
    )
    assert (odin(model, inputs, eps=0.1) > odin(model, inputs, eps=0.0)).all()
    assert odin(model, inputs).unique().numel() == 2  # distinguishable at temperature 1000
    for options in ({"eps": -1.0}, {"temperature": 0.0}):
        with pytest.raises(ValueError):
            odin(model, inputs, **options)


def test_lid_by_hand():
    reference = torch.tensor([[1.0], [2.0], [4.0], [-100.0]])
    expected = 3 / (math.log(1 / 4) + math.log(2 / 4) + 0)
    torch.testing.assert_close(lid_score(torch.zeros(1, 1), reference, 3), torch.tensor([expected]))
    same = lid_score(reference[:1], reference, 2, exclude_self=True)  # distances 1, 3
    torch.testing.assert_close(same, torch.tensor([2 / math.log(1 / 3)]))
    assert lid_score(torch.ones(1, 1), torch.ones(5, 1), 3).isneginf().all()
    assert lid_score(torch.ones(1, 1), reference, 3).isfinite().all()
    for k in (1, 5):
        with pytest.raises(ValueError, match="k must"):
            lid_score(reference, reference, k)
    with pytest.raises(ValueError, match="features"):
        lid_score(reference, torch.ones(5, 2), 3)


@pytest.mark.parametrize("d", [2, 5])
def test_lid_recovers_the_dimension_of_uniform_data(d):
    points = torch.rand(6000, d, generator=torch.Generator().manual_seed(0))
    embedded = torch.cat([points, torch.zeros(6000, 4)], 1)
    centre = embedded[(points - 0.5).abs().amax(1) < 0.2][:50]
    assert abs(-lid_score(centre, embedded, 100, exclude_self=True).mean() - d) < 0.12 * d


values = arrays(float, st.integers(1, 12), elements=st.integers(-4, 4).map(float))


@settings(max_examples=60)
@given(values, values)
def test_metrics_against_brute_force(familiar, others):
    found = ood_metrics(torch.from_numpy(familiar), torch.from_numpy(others))
    pairs = [(a > b) + 0.5 * (a == b) for a in familiar for b in others]
    assert math.isclose(found["auroc"], np.mean(pairs), abs_tol=1e-12)
    levels = np.concatenate([familiar, others])
    threshold = max(t for t in familiar if (familiar >= t).mean() >= 0.95)
    assert found["tnr_at_tpr95"] == (others < threshold).mean()
    best = max([((familiar >= t).mean() + (others < t).mean()) / 2 for t in levels])
    assert math.isclose(found["accuracy"], best, abs_tol=1e-12)
    kinds = np.repeat([1, 0], [len(familiar), len(others)])
    assert math.isclose(found["auroc"], roc_auc_score(kinds, levels), abs_tol=1e-12)
    assert math.isclose(found["aupr_in"], average_precision_score(kinds, levels), abs_tol=1e-12)
    assert math.isclose(found["aupr_out"], average_precision_score(1 - kinds, -levels), abs_tol=1e-12)
    mirrored = ood_metrics(-torch.from_numpy(others), -torch.from_numpy(familiar))
    assert math.isclose(mirrored["auroc"], found["auroc"], abs_tol=1e-12)
    assert math.isclose(mirrored["aupr_in"], found["aupr_out"], abs_tol=1e-12)


def test_metrics_at_the_extremes():
    high, low = torch.arange(20.0) + 100, torch.arange(20.0)
    assert set(ood_metrics(high, low).values()) == {1.0}
    worst = ood_metrics(low, high)
    assert worst["auroc"] == worst["tnr_at_tpr95"] == 0 and worst["accuracy"] == 0.5
    # 19 of 20 are exactly 95 %: the threshold may drop one
    assert ood_metrics(low, torch.tensor([0.5])).get("tnr_at_tpr95") == 1.0
    assert ood_metrics(low, torch.tensor([-torch.inf]))["auroc"] == 1.0


def test_metrics_reject_bad_input():
    good = torch.ones(3)
    for bad in (torch.ones(0), torch.ones(2, 2)):
        with pytest.raises(ValueError, match="non-empty"):
            ood_metrics(good, bad)
    with pytest.raises(ValueError, match="NaN"):
        ood_metrics(good, good * torch.nan)
