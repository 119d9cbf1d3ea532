"""The SDM activation, its neighbours and its region against loops, closed forms and the chapter's reference."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import ecdf

from lib.book import load_reference
from lib.uncertainty import SDM, CDFRescaler, ClassECDF, depth_match, high_reliability_region, sdm_activation


def blobs(n, seed, spread=0.6):
    """Three Gaussian classes in five dimensions."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    centres = 2 * torch.eye(5)[:3]
    return centres[labels] + spread * torch.randn(n, 5, generator=generator), labels


def test_activation_has_its_special_cases_and_agrees_with_the_reference():
    z = torch.randn(7, 4, dtype=torch.float64)
    one, none = torch.ones(7, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)
    assert torch.allclose(sdm_activation(z, one * (math.e - 2), one), z.softmax(1))
    assert torch.allclose(sdm_activation(z, 5 * one, none), torch.full_like(z, 0.25))
    q, d = torch.randint(0, 50, (7,)).double(), torch.rand(7, dtype=torch.float64)
    by_powers = (2 + q)[:, None] ** (d[:, None] * z)
    assert torch.allclose(sdm_activation(z, q, d), by_powers / by_powers.sum(1, keepdim=True))
    assert torch.allclose(
        sdm_activation(z, q, d), load_reference("similarity-distance-magnitude", "sdm")(z, q, d)
    )
    assert torch.allclose(sdm_activation(z, q, d, log=True, base_change=False).exp(), sdm_activation(z, q, d))
    base = sdm_activation(z, q, d, log=True)
    assert torch.allclose((2 + q)[:, None] ** base, sdm_activation(z, q, d))


def test_the_base_cancels_in_the_gradient():
    z = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    q, d = torch.randint(0, 500, (9,)).double(), torch.rand(9, dtype=torch.float64)
    y = torch.randint(3, (9,))
    (gradient,) = torch.autograd.grad(F.nll_loss(sdm_activation(z, q, d, log=True), y, reduction="sum"), z)
    assert torch.allclose(gradient, d[:, None] * (sdm_activation(z, q, d) - F.one_hot(y, 3)))
    assert torch.autograd.gradcheck(lambda z: sdm_activation(z, q, d, log=True), (z,))


def test_activation_survives_large_values():
    z = torch.tensor([[1e4, -1e4, 0.0]])
    log_probs = sdm_activation(z, torch.tensor([1e6]), torch.tensor([1.0]), log=True)
    assert log_probs.isfinite().all() and log_probs[0, 0] == 0


def test_depth_match_is_the_loop():
    support, labels = blobs(60, 0)
    predictions = torch.where(torch.arange(60) % 7 == 0, (labels + 1) % 3, labels)
    points, own = blobs(40, 1)
    q, nearest = depth_match(points, own, support, labels, predictions)
    reference = load_reference("similarity-distance-magnitude", "similarity_and_distance")
    for row in range(40):
        count, gap = reference(points[row], own[row], support, labels, predictions)
        assert q[row] == count and nearest[row].item() == pytest.approx(gap.item(), rel=1e-5)
    assert q.max() > 3 and (q == 0).any()


def test_depth_match_can_leave_itself_out():
    support, labels = blobs(50, 2)
    q, nearest = depth_match(support, labels, support, labels, labels, skip_self=True)
    for row in range(50):
        others = torch.arange(50) != row
        count, gap = depth_match(
            support[row : row + 1], labels[row : row + 1], support[others], labels[others], labels[others]
        )
        assert (q[row], nearest[row]) == (count[0], gap[0])
    with_self, zero = depth_match(support, labels, support, labels, labels)
    assert torch.equal(with_self, q + 1) and (zero == 0).all()


def test_depth_match_in_blocks():
    support, labels = blobs(1100, 3)
    q, nearest = depth_match(support, labels, support, labels, labels, skip_self=True)
    last = torch.arange(1100) != 1099
    count, gap = depth_match(support[1099:], labels[1099:], support[last], labels[last], labels[last])
    assert (q[1099], nearest[1099]) == (count[0], gap[0])


def test_class_ecdf_is_scipys():
    values, labels = torch.rand(30, dtype=torch.float64), torch.arange(30) % 3
    queries = torch.cat([values, torch.tensor([-1.0, 2.0])])
    expected = np.stack([ecdf(values[labels == c]).cdf.evaluate(queries) for c in range(3)], 1)
    assert np.allclose(ClassECDF(values, labels, 4)(queries)[:, :3], expected)
    assert (ClassECDF(values, labels, 4)(queries)[:, 3] == 1).all()


def test_region_is_the_reference_and_keeps_its_promise():
    generator = torch.Generator().manual_seed(4)
    reference = load_reference("similarity-distance-magnitude", "region")
    found = 0
    for _ in range(20):
        labels = torch.randint(3, (150,), generator=generator)
        rescaled = torch.randint(0, 12, (150,), generator=generator).double()
        logits = 0.7 * rescaled[:, None] * F.one_hot(labels, 3) + torch.randn(150, 3, generator=generator)
        probabilities = logits.softmax(1).double()
        threshold, psi = high_reliability_region(rescaled, probabilities, labels, 0.9)
        expected = reference(rescaled, probabilities, labels, 0.9)
        if expected is None:
            assert math.isinf(threshold) and (psi == 1).all()
            continue
        found += 1
        assert threshold == expected[0] and torch.allclose(psi, expected[1])
        kept = rescaled >= threshold
        for c in range(3):
            own = probabilities[kept & (labels == c)]
            assert (own.argmax(1) == c).double().mean() >= 0.9
    assert found > 5


def test_estimator_admits_what_it_knows_and_refuses_strangers():
    model = SDM(3, 8, epochs=10).fit(*blobs(300, 5), *blobs(300, 6))
    points, labels = blobs(300, 7)
    found = model.predict(points, use_lower=False)
    assert found.reliable.double().mean() > 0.3
    assert (found.prediction == labels)[found.reliable].double().mean() >= 0.95
    far = model.predict(points + 20, use_lower=False)
    assert not far.reliable.any() and (far.distance == 0).all()
    assert torch.allclose(far.probabilities, torch.full((300, 3), 1 / 3))
    cautious = model.predict(points)
    assert (cautious.reliable <= found.reliable).all()
    expected = torch.sqrt(math.log(2 / 0.05) / (2 * found.effective_size)).clamp_max(1)
    assert torch.allclose(found.band, expected)
    again = SDM(3, 8, epochs=10).fit(*blobs(300, 5), *blobs(300, 6)).predict(points)
    assert torch.equal(again.probabilities, cautious.probabilities)


def test_effective_size_counts_calibration_points_below():
    calibration, labels = blobs(120, 8)
    model = SDM(3, 8, epochs=5).fit(*blobs(150, 9), calibration, labels)
    cal = model.predict(calibration)
    new = model.predict(blobs(20, 10)[0])
    for row in range(20):
        below = [int(((cal.rescaled < new.rescaled[row]) & (labels == c)).sum()) for c in range(3)]
        assert new.effective_size[row] == min(below)


def test_rescaler_is_calibrated_where_the_output_is_not():
    generator = torch.Generator().manual_seed(11)
    logits = torch.randn(3000, 3, generator=generator)
    labels = torch.multinomial((2 * logits).softmax(1), 1, generator=generator)[:, 0]
    timid = (0.3 * logits).softmax(1)
    rescaler = CDFRescaler().fit(timid[:1500], labels[:1500])
    after = rescaler.transform(timid[1500:])
    assert torch.allclose(after.exp().sum(1), torch.ones(1500), atol=1e-5)
    before = F.nll_loss(timid[1500:].log(), labels[1500:])
    assert F.nll_loss(after, labels[1500:]) < before - 0.1


def test_bad_input():
    z, one = torch.zeros(2, 3), torch.ones(2)
    with pytest.raises(ValueError, match="shape of the logits"):
        sdm_activation(z, torch.ones(3), one)
    with pytest.raises(ValueError, match="at least 0"):
        sdm_activation(z, -one, one)
    with pytest.raises(ValueError, match="within"):
        sdm_activation(z, one, 2 * one)
    y = torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"\(s, m\)"):
        depth_match(z, y, torch.zeros(2, 4), y, y)
    with pytest.raises(ValueError, match="one prediction"):
        depth_match(z, y[:1], z, y, y)
    with pytest.raises(ValueError, match="skip_self"):
        depth_match(z[:1], y[:1], z, y, y, skip_self=True)
    with pytest.raises(ValueError, match=r"\(n,\)"):
        ClassECDF(torch.zeros(3), y, 2)
    with pytest.raises(ValueError, match="alpha"):
        high_reliability_region(one, z, y, 0.5)
    with pytest.raises(ValueError, match="one row"):
        high_reliability_region(one, z[:1], y, 0.9)
    with pytest.raises(ValueError, match="num_classes"):
        SDM(1)
    with pytest.raises(ValueError, match="alpha"):
        SDM(2, alpha=0.4)
    with pytest.raises(ValueError, match="call fit"):
        SDM(2).predict(z)
    with pytest.raises(ValueError, match=r"0\.\.1"):
        SDM(2).fit(z, torch.tensor([0, 2]), z, y)
    with pytest.raises(ValueError, match="finite"):
        SDM(2).fit(z / 0, y, z, y)
    model = SDM(2, 2, epochs=1).fit(
        torch.randn(8, 3), torch.arange(8) % 2, torch.randn(8, 3), torch.arange(8) % 2
    )
    with pytest.raises(ValueError, match=r"\(n, 3\)"):
        model.predict(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="penalty"):
        CDFRescaler(0.0)
    with pytest.raises(ValueError, match="no calibration points"):
        CDFRescaler().fit(torch.full((2, 3), 1 / 3), y)
    with pytest.raises(ValueError, match="call fit"):
        CDFRescaler().transform(z)
