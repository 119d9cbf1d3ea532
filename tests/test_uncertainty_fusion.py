"""Fusion weights against scipy and closed forms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy, kurtosis

from lib.book import load_reference
from lib.uncertainty import fusion_weight, kurtosis_weight
from lib.uncertainty.fusion import FUSION_KINDS


def test_kurtosis_is_scipys_of_the_probabilities():
    logits = 3 * torch.randn(12, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = torch.softmax(logits, 1)
    expected = (torch.from_numpy(kurtosis(p.numpy(), axis=1, fisher=False)) / 2.0) ** -0.6
    assert torch.allclose(kurtosis_weight(logits, 2.0, 0.6).squeeze(1), expected)
    assert torch.allclose(kurtosis_weight(logits), kurtosis_weight(logits, 7 / 4, 0.4))
    reference = load_reference("few-shot-logit-bias", "kurtosis")(logits)
    assert torch.allclose(kurtosis_weight(logits, 1.0, 1.0), 1 / reference)
    assert torch.equal(kurtosis_weight(logits, power=0.0), torch.ones(12, 1).double())


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 40), st.data())
def test_ties_have_the_closed_form(num_classes, data):
    m = data.draw(st.integers(1, num_classes - 1))
    logits = torch.full((1, num_classes), -500.0)
    logits[0, :m] = 0
    q = m / num_classes
    assert kurtosis_weight(logits, 1.0, 1.0).item() == pytest.approx(1 / (1 / (q * (1 - q)) - 3), rel=1e-5)


def test_kurtosis_at_the_edges():
    assert kurtosis_weight(torch.zeros(2, 10)).flatten().tolist() == pytest.approx([2.5**0.4] * 2)
    nearly = torch.zeros(1, 10)
    nearly[0, 3] = 1e-5  # one against the rest, however little
    assert kurtosis_weight(nearly).item() == pytest.approx((73 / 9 / 2.5) ** -0.4, rel=1e-3)
    assert kurtosis_weight(torch.tensor([[1e4, 0.0, -1e4]])).isfinite().all()
    logits = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(kurtosis_weight, logits)
    flat = torch.zeros(1, 4, requires_grad=True)
    kurtosis_weight(flat).sum().backward()
    assert flat.grad.isfinite().all()
    assert kurtosis_weight(torch.zeros(0, 4)).shape == (0, 1)
    assert kurtosis_weight(torch.randn(2, 4).bfloat16()).dtype == torch.bfloat16


def test_other_kinds():
    logits = torch.tensor([[2.0, 0.5, -1.0], [0.1, 0.0, 0.2]]).double()
    p = torch.softmax(logits, 1)
    found = {kind: fusion_weight(logits, kind, 0.7).squeeze(1) for kind in FUSION_KINDS}
    h = torch.from_numpy(entropy(p.numpy(), axis=1)) / math.log(3)
    assert torch.allclose(found["entropy"], (0.7 * h).exp())
    assert torch.allclose(found["energy"], (2 * (p / 2).exp().sum(1).log()) ** -0.7)
    assert torch.allclose(found["max"], p.amax(1) ** -0.7)
    top = p.sort(1, descending=True).values
    assert torch.allclose(found["margin"], (top[:, 0] - top[:, 1]) ** -0.7)
    assert torch.allclose(found["kurtosis"], kurtosis_weight(logits, power=0.7).squeeze(1))
    for kind in ("entropy", "energy", "max", "margin"):
        assert found[kind][0] < found[kind][1]  # sure: less
    assert fusion_weight(torch.zeros(1, 3), "margin").isfinite().all()


def test_bad_input():
    good = torch.zeros(2, 3)
    for function in (kurtosis_weight, fusion_weight):
        for bad in (good[0], good.long(), torch.zeros(2, 1)):
            with pytest.raises(ValueError, match="logits"):
                function(bad)
        with pytest.raises(ValueError, match="power"):
            function(good, power=-1.0)
    with pytest.raises(ValueError, match="ref"):
        kurtosis_weight(good, 0.0)
    with pytest.raises(ValueError, match="kind"):
        fusion_weight(good, "kurt")
