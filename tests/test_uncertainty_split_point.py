"""Split-point heads, scores and intervals against closed forms and the chapter's reference."""

import math

import pytest
import torch

from lib.book import load_reference
from lib.calibration import split_point_recalibrate
from lib.uncertainty import Residuals, SplitPointHeads, conformal_quantile, sds, split_interval


def test_score_vanishes_at_the_harmonic_mean_and_by_hand():
    up, down = torch.rand(2, 30, dtype=torch.float64)
    harmonic = 2 / (1 / up + 1 / down)
    assert torch.allclose(sds(up, down, harmonic), torch.zeros(30, dtype=torch.float64), atol=1e-12)
    assert sds(torch.tensor(3.0), torch.tensor(1.0), torch.tensor(2.0)).item() == 2
    reference = load_reference("split-point-uncertainty", "discrepancy")
    total = torch.rand(30, dtype=torch.float64)
    assert torch.equal(sds(up, down, total), reference(up, down, total))
    probabilities = torch.randn(6, 4).softmax(1)
    total = torch.rand(6, 4)
    reference = load_reference("split-point-uncertainty", "discrepancy_of_classes")
    assert torch.allclose(
        sds(1 - probabilities, probabilities, total).sum(1), reference(probabilities, total)
    )


@pytest.mark.parametrize(
    "draw, up, down",
    [
        (lambda n, g: torch.where(torch.rand(n, generator=g) < 0.25, 3.0, -1.0), 3.0, 1.0),
        (lambda n, g: torch.empty(n).exponential_(generator=g) - 1, 1.0, 1 / (math.e - 1)),
        (
            lambda n, g: 5 * torch.randn(n, generator=g),
            5 * math.sqrt(2 / math.pi),
            5 * math.sqrt(2 / math.pi),
        ),
    ],
)
def test_heads_find_the_closed_forms(draw, up, down):
    residual = draw(4000, torch.Generator().manual_seed(0))
    heads = SplitPointHeads(hidden=(16,), steps=500, learning_rate=3e-2).fit(
        torch.ones(4000, 1), torch.full((4000,), 7.0), 7 + residual
    )
    found = heads.predict(torch.ones(2, 1))
    assert found.up[0].item() == pytest.approx(up, rel=0.06)
    assert found.down[0].item() == pytest.approx(down, rel=0.06)
    assert found.total[0].item() == pytest.approx(2 * up * down / (up + down), rel=0.06)
    above, below = residual[residual > 0], -residual[residual <= 0]
    assert found.q_up[0].item() == pytest.approx(above.quantile(0.95).item(), rel=0.08)
    assert found.q_down[0].item() == pytest.approx(below.quantile(0.95).item(), rel=0.08)


def test_heads_depend_on_the_features_and_scale_with_the_residuals():
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(3000, 1, generator=generator)
    residual = (1 + 4 * x[:, 0]) * torch.randn(3000, generator=generator)
    ends = torch.tensor([[0.05], [0.95]])
    small = SplitPointHeads(hidden=(16,), steps=200).fit(x, torch.zeros(3000), residual).predict(ends)
    assert small.total[1] > 2.5 * small.total[0]
    large = SplitPointHeads(hidden=(16,), steps=200).fit(x, torch.zeros(3000), 100 * residual).predict(ends)
    assert torch.allclose(large.total, 100 * small.total, rtol=1e-3)


def test_predictor_gets_no_gradient_and_the_global_generator_is_untouched():
    prediction = torch.zeros(50, requires_grad=True)
    features = torch.randn(50, 3, requires_grad=True)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    SplitPointHeads(hidden=(4,), steps=2).fit(
        features, prediction, torch.randn(50, generator=torch.Generator().manual_seed(0))
    )
    assert torch.equal(torch.rand(1), expected)
    assert prediction.grad is None and features.grad is None


def test_classification_heads_learn_the_unconditional_sides():
    generator = torch.Generator().manual_seed(2)
    true = torch.tensor([0.6, 0.3, 0.1])
    labels = torch.multinomial(true, 5000, replacement=True, generator=generator)
    logits = torch.tensor([0.8, 0.15, 0.05]).log().expand(5000, 3)
    p = logits[0].softmax(0)
    heads = SplitPointHeads("classification", hidden=(8,), steps=400, learning_rate=3e-2).fit(
        torch.ones(5000, 1), logits, labels
    )
    total, up, down = (part[0] for part in heads.predict(torch.ones(1, 1))[:3])
    assert torch.allclose(up, true * (1 - p), atol=0.02)
    assert torch.allclose(down, (1 - true) * p, atol=0.02)
    assert torch.allclose(total, up + down, atol=0.02)
    restored = split_point_recalibrate(p[None], total[None], up[None], down[None], tolerance=1.0)
    assert torch.allclose(restored[0], true, atol=0.04)


def test_interval_widens_only_where_the_residuals_disagree():
    up, down = torch.rand(2, 40, dtype=torch.float64) + 0.2
    harmonic = 2 * up * down / (up + down)
    quantiles = torch.rand(2, 40, dtype=torch.float64)
    for factor in (0.9, 1.0, 1.1):
        residuals = Residuals(factor * harmonic, up, down, *quantiles)
        low, high = split_interval(torch.zeros(40, dtype=torch.float64), residuals)
        k_up = factor * harmonic * down / ((2 * down - factor * harmonic) * up)
        valid = 2 * down > factor * harmonic
        assert torch.allclose(high[valid], (quantiles[0] * k_up.clamp(1, 10))[valid])
        assert (high >= quantiles[0] - 1e-12).all() and (low <= -quantiles[1] + 1e-12).all()
    broken = Residuals(3 * harmonic, up, down, *quantiles)
    assert torch.isfinite(torch.stack(split_interval(torch.zeros(40), broken, largest=4.0))).all()
    plain = split_interval(torch.full((40,), 2.0), broken, recalibrate=False)
    assert torch.allclose(plain[1] - 2, quantiles[0]) and torch.allclose(2 - plain[0], quantiles[1])


def test_recalibration_restores_exact_probabilities():
    generator = torch.Generator().manual_seed(4)
    true = torch.randn(50, 5, generator=generator, dtype=torch.float64).softmax(1)
    p = (2 * true.log()).softmax(1)
    up, down = true * (1 - p), (1 - true) * p
    assert torch.allclose(split_point_recalibrate(p, up + down, up, down), true)
    # where the three estimates disagree nothing happens
    assert torch.allclose(split_point_recalibrate(p, up + down + 0.2, up, down), p)


def test_conformal_quantile_covers():
    generator = torch.Generator().manual_seed(5)
    covered = []
    for _ in range(400):
        scores = torch.empty(40).exponential_(generator=generator)
        covered.append(1 - math.exp(-conformal_quantile(scores, 0.9)))  # exact coverage of this threshold
    mean = sum(covered) / 400
    # the expected coverage is ceil(41 * 0.9) / 41 exactly
    assert mean == pytest.approx(37 / 41, abs=0.012)
    assert conformal_quantile(torch.arange(1.0, 10.0), 0.9) == 9.0
    assert conformal_quantile(torch.arange(1.0, 9.0), 0.9) == math.inf


def test_bad_input():
    with pytest.raises(ValueError, match="at least 0"):
        sds(torch.tensor(-1.0), torch.tensor(1.0), torch.tensor(1.0))
    with pytest.raises(ValueError, match="no quantiles"):
        split_interval(torch.zeros(1), Residuals(*torch.ones(3, 1)))
    with pytest.raises(ValueError, match="largest"):
        split_interval(torch.zeros(1), Residuals(*torch.ones(5, 1)), largest=0.5)
    with pytest.raises(ValueError, match="task"):
        SplitPointHeads("ranking")
    with pytest.raises(ValueError, match="level"):
        SplitPointHeads(level=1.0)
    with pytest.raises(ValueError, match="at least 1"):
        SplitPointHeads(steps=0)
    heads = SplitPointHeads(hidden=(4,), steps=1)
    with pytest.raises(ValueError, match="call fit"):
        heads.predict(torch.ones(1, 1))
    with pytest.raises(ValueError, match="n rows"):
        heads.fit(torch.ones(4, 1), torch.zeros(3), torch.zeros(4))
    with pytest.raises(ValueError, match=r"shape \(n,\)"):
        heads.fit(torch.ones(4, 1), torch.zeros(4, 2), torch.zeros(4))
    with pytest.raises(ValueError, match="one side"):
        heads.fit(torch.ones(4, 1), torch.zeros(4), torch.ones(4))
    with pytest.raises(ValueError, match="finite"):
        heads.fit(torch.ones(4, 1), torch.tensor([0.0, 1.0, math.nan, 0.0]), torch.ones(4))
    heads.fit(torch.randn(6, 2), torch.zeros(6), torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0]))
    with pytest.raises(ValueError, match=r"\(m, 2\)"):
        heads.predict(torch.ones(1, 3))
    p = torch.full((2, 2), 0.5)
    with pytest.raises(ValueError, match="one shape"):
        split_point_recalibrate(p, p, p, p[:1])
    with pytest.raises(ValueError, match="sum to 1"):
        split_point_recalibrate(2 * p, p, p, p)
    with pytest.raises(ValueError, match="tolerance"):
        split_point_recalibrate(p, p, p, p, tolerance=-1.0)
    with pytest.raises(ValueError, match="level"):
        conformal_quantile(torch.ones(3), 1.0)
    with pytest.raises(ValueError, match="non-empty"):
        conformal_quantile(torch.ones(0), 0.5)
