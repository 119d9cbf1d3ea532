"""Closed forms and metrics of neural collapse against brute force, optimisation from random starts, and exact frames."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from lib.book import load_reference
from lib.geometry import nc_metrics, target_gram, ufm_closed_form
from lib.models import UnconstrainedFeatures, fit_ufm


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=4),
    st.lists(st.floats(1e-4, 5e-2), min_size=1, max_size=4),
    st.floats(1e-4, 5e-2),
)
def test_mode_is_the_global_minimum_of_the_scalar_problem(counts, layers, feature_decay):
    solution = ufm_closed_form(counts, layers, feature_decay)
    depth, total = len(layers), sum(counts)
    for n, mode in zip(counts, solution.mode.tolist(), strict=True):
        c = feature_decay * n * math.prod(layers)

        def g(s, n=n, c=c):
            return n / (2 * total) * (s - 1) ** 2 + (depth + 1) / 2 * (c * s**2) ** (1 / (depth + 1))

        grid = np.linspace(0, 1, 2001)
        near = grid[np.argmin(g(grid))]
        found = minimize_scalar(g, bounds=(max(near - 1e-3, 0), min(near + 1e-3, 1)), method="bounded")
        assert g(mode) <= min(found.fun, g(0.0)) + 1e-9


def test_balance_and_one_layer_identities():
    counts, lam_w, lam_h = torch.tensor([100.0, 50.0, 10.0, 2.0]).double(), 0.01, 0.02
    solution = ufm_closed_form(counts, [lam_w], lam_h)
    expected = load_reference("neural-collapse", "one_layer")(counts, lam_w, lam_h)
    for mine, other in zip(solution[:3], expected, strict=True):
        assert torch.allclose(mine, other)
    alive = ~solution.collapsed
    assert torch.allclose(
        (solution.mode + counts.sum() * torch.sqrt(lam_w * lam_h / counts))[alive], torch.ones(1).double()
    )
    assert torch.allclose(
        (solution.weight_norm2 / solution.feature_norm2)[alive], (counts * lam_h / lam_w)[alive]
    )
    # the boundary: n <= N^2 l_W l_H collapses
    assert ufm_closed_form([4, 96], [0.02], 0.02).collapsed.tolist() == [True, False]
    assert ufm_closed_form([5, 95], [0.02], 0.02).collapsed.tolist() == [False, False]


@pytest.mark.parametrize("depth", [1, 2, 3, 6])
def test_the_switch_and_the_form_of_the_released_code(depth):
    decay, feature_decay, total = 2e-3, 3e-3, 2000
    scale = total * (total * feature_decay * decay**depth) ** (1 / depth)
    smallest = depth**2 / (depth - 1) ** ((depth - 1) / depth) * scale
    counts = [smallest * factor for factor in (0.5, 0.999, 1.001, 1.5)]
    counts.append(total - sum(counts))
    solution = ufm_closed_form(counts, [decay] * depth, feature_decay)
    assert solution.collapsed.tolist() == [True, True, False, False, False]
    for n, mode in list(zip(counts, solution.mode.tolist(), strict=True))[2:]:
        assert mode > (depth - 1) / depth
        x = (mode / (1 - mode)) ** (1 / depth)
        assert scale / n == pytest.approx(x ** (depth - 1) / (x**depth + 1) ** 2, rel=1e-6)


def test_deep_modes_are_the_reference():
    for layers in ([0.004, 0.004], [0.002, 0.008, 0.004]):
        mine = ufm_closed_form([60, 30, 6, 1], layers, 0.005)
        naive = [load_reference("neural-collapse", "deep_mode")(n, 97, layers, 0.005) for n in (60, 30, 6, 1)]
        assert np.allclose(mine.mode, naive, atol=2e-5)
        assert torch.equal(mine.collapsed, mine.mode == 0)


@pytest.mark.parametrize("layers", [[0.02], [0.006, 0.009], [0.004, 0.006, 0.005]])
def test_norms_are_those_of_the_best_of_many_starts(layers):
    counts, feature_decay = (20, 9, 3), 0.006
    runs = []
    for start in range(8):
        torch.manual_seed(start)
        model = UnconstrainedFeatures(counts, 5, len(layers), std=10 ** (-1 + start / 6)).double()
        runs.append((fit_ufm(model, layers, feature_decay, max_iterations=400, tolerance=1e-8), start, model))
    model = min(runs)[2]
    solution = ufm_closed_form(counts, layers, feature_decay)
    rows = model.weights[-1].detach().square().sum(1)
    features = torch.stack(
        [model.features.detach()[model.labels == k].square().sum(1).mean() for k in range(3)]
    )
    assert torch.allclose(rows, solution.weight_norm2, atol=1e-4)
    assert torch.allclose(features, solution.feature_norm2, atol=1e-4)


def test_model_is_the_product_of_its_layers():
    model = UnconstrainedFeatures((2, 3), 4, 3, bias=True)
    expected = model.features
    for weight in model.weights:
        expected = expected @ weight.T
    assert torch.allclose(model(), expected + model.bias)
    assert model.product().shape == (2, 4) and model.labels.tolist() == [0, 0, 1, 1, 1]


def test_cross_entropy_reaches_a_simplex():
    torch.manual_seed(0)
    model = UnconstrainedFeatures((5, 5, 5), 4, 2, bias=True, std=0.5).double()
    fit_ufm(model, [3e-3, 3e-3], 3e-3, loss="ce", max_iterations=800, tolerance=1e-8)
    metrics = nc_metrics(model.features, model.labels, model.product())
    assert max(metrics.values()) < 1e-3


@pytest.mark.parametrize("kind", ["etf", "of", "gof"])
def test_metrics_vanish_on_exact_frames(kind):
    norms = torch.tensor([3.0, 2.0, 1.0, 0.5])
    rows = {"of": torch.eye(4, 6), "gof": norms.sqrt()[:, None] * torch.eye(4, 6)}.get(kind)
    if rows is None:
        rows = F.pad(torch.eye(4) - 0.25, (0, 2))
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))[0]
    rows = rows @ rotation
    labels = torch.arange(12) % 4
    metrics = nc_metrics(
        2.5 * rows[labels], labels, 0.7 * rows, target=kind, norms=norms if kind == "gof" else None
    )
    assert max(metrics.values()) < 1e-5
    noisy = nc_metrics(2.5 * rows[labels] + 0.3 * torch.randn(12, 6), labels, rows + 0.3 * torch.randn(4, 6), target=kind,
                       norms=norms if kind == "gof" else None)  # fmt: skip
    assert min(noisy.values()) > 0.01


def test_nc1_is_the_reference():
    features, labels = torch.randn(40, 6).double(), torch.arange(40) % 5
    mine = nc_metrics(features, labels, torch.randn(5, 6))["nc1"]
    assert mine == pytest.approx(
        load_reference("neural-collapse", "variability")(features, labels, 5), rel=1e-6
    )


def test_target_gram():
    frame = target_gram("etf", 4)
    assert torch.allclose(frame / frame[0, 0], torch.full((4, 4), -1 / 3).double().fill_diagonal_(1))
    assert torch.equal(
        target_gram("gof", 2, torch.tensor([2.0, 3.0])), torch.diag(torch.tensor([2.0, 3.0]).double())
    )


def test_bad_input():
    for counts, layers, decay in (
        ([], [0.1], 0.1),
        ([0, 2], [0.1], 0.1),
        ([3], [], 0.1),
        ([3], [-0.1], 0.1),
        ([3], [0.1], 0.0),
    ):
        with pytest.raises(ValueError, match="positive"):
            ufm_closed_form(counts, layers, decay)
    with pytest.raises(ValueError, match="kind"):
        target_gram("simplex", 3)
    with pytest.raises(ValueError, match="squared lengths"):
        target_gram("gof", 3)
    with pytest.raises(ValueError, match="at least 2"):
        target_gram("etf", 1)
    with pytest.raises(ValueError, match=r"\(n, d\)"):
        nc_metrics(torch.zeros(4, 3), torch.zeros(4, dtype=torch.long), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="cover exactly"):
        nc_metrics(torch.zeros(4, 3), torch.zeros(4, dtype=torch.long), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="n_per_class"):
        UnconstrainedFeatures((2, 0), 4)
    with pytest.raises(ValueError, match="dim"):
        UnconstrainedFeatures((2, 2, 2), 2)
    model = UnconstrainedFeatures((2, 2), 3, 2)
    with pytest.raises(ValueError, match="loss"):
        fit_ufm(model, [0.1, 0.1], 0.1, loss="hinge")
    with pytest.raises(ValueError, match="2 layers"):
        fit_ufm(model, [0.1], 0.1)
