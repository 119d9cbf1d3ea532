"""lib.interp.activation_flow by hand, by brute force and against the Gaussian's closed form."""

from itertools import combinations

import pytest
import torch
from scipy import optimize, stats

from lib.book import load_reference
from lib.interp import activation_flow


def test_by_hand():
    hidden = torch.tensor([[[3.0, 0.0, -1.0, 0.0], [3.0, 1.0, 0.0, 0.0], [0.0, 2.0, 2.0, 0.0]]])
    found = activation_flow(hidden, 0.9)
    expected = [[True, False, False, False]] * 2 + [[False, True, True, False]]
    assert found.active[0].tolist() == expected
    assert found.active_fraction == pytest.approx(4 / 12) and found.persistence == 0.5
    assert found.shared_index.tolist() == []
    assert activation_flow(hidden, 0.9, share=0.6).shared_index.tolist() == [0]
    assert activation_flow(hidden, 1.0).active[0].sum(-1).tolist() == [2, 2, 2]
    assert activation_flow(hidden, 0.7, power=1).active[0, :, 0].tolist() == [True, True, False]


@pytest.mark.parametrize("power, mass", [(1.0, 0.6), (2.0, 0.9), (3.0, 0.99)])
def test_no_smaller_set_would_do(power, mass):
    hidden = torch.randn(1, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    active = activation_flow(hidden, mass, power=power).active
    assert torch.equal(
        active, load_reference("mixture-of-hidden-dimensions", "active_set")(hidden, mass, power)
    )
    for vector, mask in zip(hidden[0].abs() ** power, active[0], strict=True):
        total, size = vector.sum(), int(mask.sum())
        assert vector[mask].sum() >= mass * total
        assert all(sum(some) < mass * total for some in combinations(vector.tolist(), size - 1))


def test_gaussian():
    hidden = torch.randn(4, 50, 400, generator=torch.Generator().manual_seed(0))
    found = activation_flow(hidden, 0.9)
    t = optimize.brentq(lambda t: 2 * t * stats.norm.pdf(t) + 2 * stats.norm.sf(t) - 0.9, 0, 3)
    assert found.active_fraction == pytest.approx(2 * stats.norm.sf(t), abs=0.01)
    assert found.persistence == pytest.approx(found.active_fraction, abs=0.01)
    assert len(found.shared_index) == 0


def test_bad_input():
    good = torch.randn(1, 2, 3)
    with pytest.raises(TypeError, match="floating"):
        activation_flow(good.long())
    for hidden in (good[0], good[:, :1], good[:0], good * 0, good * torch.nan):
        with pytest.raises(ValueError, match="hidden"):
            activation_flow(hidden)
    for bad in ({"mass": 0}, {"mass": 1.1}, {"power": 0}, {"share": 0}):
        with pytest.raises(ValueError, match="mass"):
            activation_flow(good, **bad)
