"""lib.calibration.utility against closed forms, its reference and sklearn."""

import math

import pytest
import torch
from sklearn.isotonic import IsotonicRegression

from lib.book import load_reference
from lib.calibration import TemperatureScaling, UtilityToProbability


def problem(rows=400, classes=6, power=2.5, seed=0):
    """Logits, and outcomes drawn from their power."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    outcome = torch.multinomial(torch.softmax(power * logits, 1), 1, generator=generator)[:, 0]
    return logits, outcome


def test_power_by_hand():
    # two outcomes with odds 4; preferred 16 times of 17, odds 16 = 4 ** 2
    logits = torch.tensor([[math.log(4), 0.0]], dtype=torch.float64).expand(17, 2)
    outcome = torch.tensor([0] * 16 + [1])
    assert UtilityToProbability().fit(logits, outcome).beta_ == pytest.approx(2, abs=1e-6)


def test_power_is_the_references_and_an_inverse_temperature():
    logits, outcome = problem()
    beta = UtilityToProbability().fit(logits, outcome).beta_
    reference = load_reference("utility-probability-duality", "fit_power")
    assert beta == pytest.approx(reference(torch.log_softmax(logits, 1), outcome), rel=1e-6)
    assert beta == pytest.approx(1 / TemperatureScaling().fit(logits, outcome).temperature_, rel=1e-6)


def test_sets_are_likelihoods_of_sets():
    logits, outcome = problem()
    one = torch.nn.functional.one_hot(outcome, 6).bool()
    single, masked = UtilityToProbability().fit(logits, outcome), UtilityToProbability().fit(logits, one)
    assert single.beta_ == masked.beta_
    wide = one | torch.nn.functional.one_hot((outcome + 1) % 6, 6).bool()
    fitted = UtilityToProbability().fit(logits, wide)

    def likelihood(beta):
        return torch.where(wide, torch.softmax(beta * logits, 1), 0).sum(1).log().mean().item()

    for beta in torch.logspace(-2, 2, 101).tolist():
        assert likelihood(fitted.beta_) >= likelihood(beta) - 1e-9


def test_power_without_a_maximum_ends_at_the_limit():
    logits, _ = problem()
    assert UtilityToProbability().fit(logits, logits.argmax(1)).beta_ == pytest.approx(100, rel=0.02)


@pytest.mark.parametrize("kind", ["power", "isotonic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_distribution_of_the_same_order(kind, dtype):
    logits, outcome = problem()
    fitted = UtilityToProbability(kind)
    assert fitted.fit(logits.to(dtype), outcome) is fitted
    new = 3 * torch.randn(50, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)
    q = fitted.transform(new)
    assert q.dtype == dtype and q.shape == new.shape
    torch.testing.assert_close(q.exp().sum(1), torch.ones(50, dtype=dtype))
    assert (q.argmax(1) == new.argmax(1)).all()
    if dtype == torch.float64:
        assert (q.argsort(1) == new.argsort(1)).all()
    torch.testing.assert_close(fitted.transform(new + 7), q, rtol=1e-4, atol=1e-4)


def test_isotonic_is_sklearns():
    logits, outcome = problem()
    fitted = UtilityToProbability("isotonic").fit(logits, outcome)
    u = torch.log_softmax(logits, 1)
    own = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip")
    g = own.fit_transform(u.flatten(), torch.nn.functional.one_hot(outcome, 6).flatten().double())
    weights = torch.as_tensor(g).view_as(u).clamp(min=fitted.floor_) * torch.exp(1e-3 * u)
    torch.testing.assert_close(fitted.transform(logits).exp(), weights / weights.sum(1, keepdim=True))
    reference = load_reference("utility-probability-duality", "isotonic_probabilities")
    preferred = torch.nn.functional.one_hot(outcome, 6).bool()
    torch.testing.assert_close(reference(u, preferred, u), fitted.transform(logits))


def test_gradients_pass_through_the_power():
    logits, outcome = problem()
    fitted = UtilityToProbability().fit(logits, outcome)
    assert torch.autograd.gradcheck(fitted.transform, logits[:4].clone().requires_grad_())


def test_bad_input():
    logits, outcome = problem(5)
    with pytest.raises(ValueError, match="kind"):
        UtilityToProbability("platt")
    with pytest.raises(RuntimeError, match="not fitted"):
        UtilityToProbability().transform(logits)
    with pytest.raises(TypeError, match="floating"):
        UtilityToProbability().fit(logits.long(), outcome)
    with pytest.raises(TypeError, match="integer"):
        UtilityToProbability().fit(logits, outcome.double())
    with pytest.raises(ValueError, match="shape"):
        UtilityToProbability().fit(logits, torch.ones(5, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="at least one preferred"):
        UtilityToProbability().fit(logits, torch.zeros(5, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match="no rows"):
        UtilityToProbability().fit(logits[:0], torch.ones(0, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match="finite"):
        UtilityToProbability().fit(logits / 0, outcome)
