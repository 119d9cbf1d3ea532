"""Entropy of activations and its functional derivative against closed forms and finite differences."""

import numpy as np
import pytest
from scipy.stats import logistic, norm

from lib.book import load_reference
from lib.information import activation_entropy, entropy_functional_gradient

GRID = np.linspace(-7, 7, 4001)


@pytest.mark.parametrize("law", [norm(), norm(0.5, 0.7), logistic(scale=0.3)])
def test_affine_activations_have_the_entropy_of_the_input(law):
    for scale, shift in ((1.0, 0.0), (3.0, -2.0), (0.2, 1.0)):
        entropy = activation_entropy(lambda x, a=scale, b=shift: a * x + b, law.pdf, GRID)
        assert entropy == pytest.approx(law.entropy() + np.log(scale), abs=1e-4)


@pytest.mark.parametrize("law", [norm(), logistic(scale=0.5)])
def test_the_cdf_is_uniform_and_has_no_gradient(law):
    grid = np.linspace(-4, 4, 4001)
    for low, high in ((0, 1), (-1, 3)):
        worst = lambda x, low=low, high=high: low + (high - low) * law.cdf(x)  # noqa: E731
        assert activation_entropy(worst, law.pdf, grid) == pytest.approx(np.log(high - low), abs=2e-3)
        assert np.abs(entropy_functional_gradient(worst, law.pdf, grid)).max() < 1e-3


def test_exponential_makes_a_lognormal():
    grid = np.linspace(-7, 7, 8001)
    expected = 0.5 * np.log(2 * np.pi * np.e)  # the log-normal with mu = 0 and sigma = 1 has mu + this
    assert activation_entropy(np.exp, norm.pdf, grid) == pytest.approx(expected, abs=1e-4)


def test_relu_has_minus_infinity():
    assert activation_entropy(lambda x: np.maximum(x, 0), norm.pdf, GRID) == -np.inf
    # but not where the density is zero
    half = lambda x: np.where(x > 0, norm.pdf(x), 0)  # noqa: E731
    entropy = activation_entropy(lambda x: np.maximum(x, 0), half, GRID)
    assert entropy == pytest.approx(0.5 * np.log(2 * np.pi * np.e) - np.log(2), abs=1e-2)


@pytest.mark.parametrize("centre", [-1.0, 0.2, 1.5])
def test_gradient_is_the_functional_derivative(centre):
    grid = np.linspace(-5, 5, 8001)
    bump = 1e-4 * np.exp(-((grid - centre) ** 2) * 4)
    moved = np.interp(grid, grid + bump, np.tanh(grid))  # the inverse moved by the bump, turned round
    change = activation_entropy(lambda x: moved, norm.pdf, grid) - activation_entropy(np.tanh, norm.pdf, grid)
    eta = entropy_functional_gradient(np.tanh, norm.pdf, grid)
    assert change == pytest.approx(np.trapezoid(eta * bump, np.tanh(grid)), rel=0.03)


def test_agrees_with_the_reference():
    reference = load_reference("activation-search", "output_entropy")
    for f in (np.tanh, lambda x: np.logaddexp(0, x)):
        mine = activation_entropy(f, norm.pdf, np.linspace(-5, 5, 2001))
        assert mine == pytest.approx(reference(f, norm.pdf, np.linspace(-5, 5, 2001)), abs=1e-3)


def test_bad_input():
    with pytest.raises(ValueError, match="increasing"):
        activation_entropy(np.tanh, norm.pdf, GRID[::-1])
    with pytest.raises(ValueError, match="n >= 5"):
        activation_entropy(np.tanh, norm.pdf, GRID[:3])
    with pytest.raises(ValueError, match="must not decrease"):
        activation_entropy(np.cos, norm.pdf, GRID)
    with pytest.raises(ValueError, match="density must be"):
        activation_entropy(np.tanh, np.sin, GRID)
    with pytest.raises(ValueError, match="the activation must return"):
        activation_entropy(lambda x: 1.0, norm.pdf, GRID)
    with pytest.raises(ValueError, match="strictly"):
        entropy_functional_gradient(lambda x: np.maximum(x, 0), norm.pdf, GRID)
