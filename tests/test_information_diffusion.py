"""Spectral entropy against the authors' package, explicit eigenvalues, closed forms and the chapter's reference cells."""

import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lib.book import load_reference
from lib.information import diffusion_operator, dse, dsmi, shannon_binned, sigma_rule, spectrum, t_rule
from lib.models import mlp
from lib.train import DSECallback, fit

SLUG = "diffusion-spectral-entropy"


def cloud(n=40, d=5, seed=0, scale=1.0):
    return scale * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def explicit(x, sigma, alpha=0.5):
    """The walk of the paper, written with loops over numpy."""
    x = np.asarray(x)
    kernel = np.array([[math.exp(-np.sum((a - b) ** 2) / (2 * sigma**2)) for b in x] for a in x])
    weight = np.diag(kernel.sum(1) ** -alpha)
    kernel = weight @ kernel @ weight
    return kernel / kernel.sum(1, keepdims=True)


@pytest.mark.parametrize("alpha", [0, 0.5, 1])
def test_operator_and_spectrum_against_explicit_walk(alpha):
    x = cloud()
    walk = explicit(x, 1.3, alpha)
    torch.testing.assert_close(diffusion_operator(x, 1.3, alpha, symmetric=False), torch.from_numpy(walk))
    eigenvalues = np.sort(np.linalg.eigvals(walk).real)[::-1]
    found = spectrum(x, sigma=1.3, alpha=alpha)
    np.testing.assert_allclose(found, eigenvalues, atol=1e-12)
    assert float(found[0]) == pytest.approx(1) and float(found[-1]) > -1e-12
    symmetric = diffusion_operator(x, 1.3, alpha)
    assert torch.equal(symmetric, symmetric.T) or (symmetric - symmetric.T).abs().max() < 1e-15


def test_released_matrix_is_another_walk():
    """Three points with affinities 2^-(distance^2): the trace of K is a rational number, that of P differs."""
    x = torch.tensor([[0.0], [1.0], [3.0]], dtype=torch.float64)
    sigma = math.sqrt(1 / (2 * math.log(2)))
    affinity = [[Fraction(1, 2 ** ((a - b) ** 2)) for b in (0, 1, 3)] for a in (0, 1, 3)]
    trace = float(sum(1 / sum(row) for row in affinity))
    released = spectrum(x, sigma=sigma, normalisation="released")
    assert float(released.sum()) == pytest.approx(trace, abs=1e-12)
    torch.testing.assert_close(released, spectrum(x, sigma=sigma, alpha=0))
    assert abs(float(spectrum(x, sigma=sigma).sum()) - trace) > 0.004
    walk = diffusion_operator(x, sigma, symmetric=False, normalisation="released")
    np.testing.assert_allclose(walk.sum(1), 1)
    np.testing.assert_allclose(np.sort(np.linalg.eigvals(walk).real)[::-1], released, atol=1e-12)


@pytest.mark.parametrize(("sigma", "t"), [(0.7, 1), (2.0, 1), (2.0, 3), (10.0, 2)])
def test_against_the_authors_package(sigma, t):
    package = pytest.importorskip("dse_dsmi")
    x = cloud(60, 8)
    theirs = package.diffusion_spectral_entropy(x.numpy(), gaussian_kernel_sigma=sigma, t=t)
    assert dse(x, sigma=sigma, t=t, normalisation="released") == pytest.approx(theirs, abs=1e-8)
    labels = np.arange(60) % 3
    shifted = x.numpy() + 2.0 * labels[:, None]
    theirs, _ = package.diffusion_spectral_mutual_information(
        shifted, labels, gaussian_kernel_sigma=sigma, t=t, num_repetitions=200
    )
    mine, _ = dsmi(
        shifted, labels, sigma=sigma, t=t, repeats=200, normalisation="released",
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert mine == pytest.approx(theirs, abs=0.03)
    assert shannon_binned(x) == pytest.approx(
        package.diffusion_spectral_entropy(x.numpy(), classic_shannon_entropy=True), abs=1e-8
    )


def test_adjacency_entropy_of_the_package_is_dse_of_the_kernel_spectrum():
    package = pytest.importorskip("dse_dsmi")
    x = cloud(30, 4)
    kernel = torch.exp(-(torch.cdist(x, x) ** 2) / (2 * 1.5**2))
    theirs = package.adjacency_spectral_entropy(x.numpy(), gaussian_kernel_sigma=1.5)
    assert dse(spectrum=torch.linalg.eigvalsh(kernel)) == pytest.approx(theirs, abs=1e-8)


def test_dse_against_scipy_and_reference():
    x = cloud(50, 6)
    reference = load_reference(SLUG, "diffusion_spectral_entropy")
    for sigma, t in ((0.5, 1), (2.0, 2), (5.0, 7)):
        powers = np.abs(np.linalg.eigvals(explicit(x, sigma))) ** t
        expected = scipy.stats.entropy(powers, base=2)
        assert dse(x, sigma=sigma, t=t) == pytest.approx(expected, abs=1e-9)
        assert float(reference(x, sigma, t)) == pytest.approx(expected, abs=1e-9)
        assert dse(spectrum=spectrum(x, sigma=sigma), t=t) == pytest.approx(expected, abs=1e-9)
        assert dse(x, sigma=sigma, t=t, base=math.e) == pytest.approx(expected * math.log(2), abs=1e-9)


def test_dsmi_against_reference():
    x, labels = cloud(60, 4), torch.arange(60) % 4
    x = x + 2.0 * labels[:, None]
    reference = load_reference(SLUG, "information_of_equal_sets")
    torch.manual_seed(0)
    expected = reference(x, labels, lambda z: dse(z, sigma=2.0), repeats=200)
    found, used = dsmi(x, labels, sigma=2.0, repeats=200, generator=torch.Generator().manual_seed(1))
    assert found == pytest.approx(expected, abs=0.03)
    assert torch.equal(used, labels)


def test_closed_limits():
    x = cloud(32, 3)
    assert dse(x, sigma=1e-3) == pytest.approx(5, abs=1e-9)
    assert dse(x, sigma=1e4) == pytest.approx(0, abs=1e-5)
    assert dse(x[:1], sigma=1.0) == 0
    assert dse(torch.zeros(9, 2), sigma=1.0) == pytest.approx(0, abs=1e-9)
    group = torch.repeat_interleave(torch.arange(5), torch.tensor([20, 1, 2, 7, 3]))
    blobs = 100 * torch.eye(5, dtype=torch.float64)[group] + 0.1 * cloud(33, 5)
    assert dse(blobs, sigma=3.0, t=20) == pytest.approx(math.log2(5), abs=1e-6)  # counted, not weighed


@settings(max_examples=20)
@given(st.integers(1, 25), st.integers(1, 6), st.floats(0.05, 20), st.floats(0.5, 30), st.integers(0, 5))
def test_bounds_and_invariances(n, d, sigma, t, seed):
    x = cloud(n, d, seed)
    value = dse(x, sigma=sigma, t=t)
    assert -1e-9 <= value <= math.log2(n) + 1e-9
    rotation = torch.linalg.qr(cloud(d, d, seed + 1))[0]
    moved = (x @ rotation + 3.0).flip(0)
    assert dse(moved, sigma=sigma, t=t) == pytest.approx(value, abs=1e-6)
    assert dse(10 * x, sigma=10 * sigma, t=t) == pytest.approx(value, abs=1e-6)


def test_numbers_far_from_zero_large_t_and_other_layouts():
    x = cloud(30, 4)
    assert dse(x + 1e6, sigma=1.5) == pytest.approx(dse(x, sigma=1.5), abs=1e-6)
    assert dse(x.T.contiguous().T, sigma=1.5) == dse(x, sigma=1.5)  # not contiguous
    assert dse(x.numpy().tolist(), sigma=1.5) == dse(x, sigma=1.5)
    assert dse(x.float(), sigma=1.5) == pytest.approx(dse(x, sigma=1.5), abs=1e-5)
    assert dse(x, sigma=1.5, t=1e6) == pytest.approx(0, abs=1e-9)
    assert dse(spectrum=[1.0, -1e-17, 0.0]) == pytest.approx(0, abs=1e-12)
    assert dse(spectrum=[0.5, -0.5], t=3) == pytest.approx(1)
    assert dse(spectrum=[1e-200, 1e-200], t=5) == pytest.approx(1)


def test_max_n_takes_a_seeded_subset():
    x = cloud(50, 3)
    rows = torch.randperm(50, generator=torch.Generator().manual_seed(4))[:20]
    value = dse(x, sigma=1.0, max_n=20, generator=torch.Generator().manual_seed(4))
    assert value == pytest.approx(dse(x[rows], sigma=1.0))
    assert dse(x, sigma=1.0, max_n=50) == dse(x, sigma=1.0)


def test_dsmi_is_unbiased_for_meaningless_labels_and_sees_blobs():
    generator = torch.Generator().manual_seed(0)
    x, labels = cloud(60, 3), torch.arange(60) % 3
    values = [
        dsmi(x, labels[torch.randperm(60, generator=generator)], sigma=1.5, generator=generator)[0]
        for _ in range(40)
    ]
    assert abs(np.mean(values)) < 4 * np.std(values) / math.sqrt(40) + 1e-3
    blobs = 50 * torch.eye(3, dtype=torch.float64)[labels] + 0.1 * x
    assert dsmi(blobs, labels, sigma=3.0, t=4, generator=generator)[0] == pytest.approx(
        math.log2(3), abs=0.05
    )


def test_dsmi_makes_labels_of_every_kind():
    x = cloud(40, 3)
    floats = torch.linspace(0, 1, 40)
    assert dsmi(x, floats, sigma=1.0, n_clusters=4)[1].bincount().tolist() == [10] * 4
    assert dsmi(x, floats[:, None], sigma=1.0, n_clusters=4)[1].bincount().tolist() == [10] * 4
    assert dsmi(x, torch.arange(40) % 2 + 7, sigma=1.0)[1].unique().tolist() == [0, 1]
    assert dsmi(x, torch.arange(40), sigma=1.0, discrete=False, n_clusters=5)[1].max() == 4
    assert dsmi(x, torch.ones(40), sigma=1.0)[0] == pytest.approx(0, abs=1e-9)
    group = torch.arange(40) % 2
    vectors = 20 * group[:, None] + cloud(40, 3, 9)
    found = dsmi(x, vectors, sigma=1.0, n_clusters=2)[1]
    assert torch.equal(found, group) or torch.equal(found, 1 - group)
    again = dsmi(x, None, sigma=1.0, clusters=found)[1]
    assert torch.equal(again, found)
    assert dsmi(x.numpy(), np.arange(40) % 2, sigma=1.0)[1].tolist() == group.tolist()


def test_shannon_binned():
    x = torch.tensor([[0.0, 5.0], [0.1, 5.0], [0.9, 5.0], [1.0, 5.0]])
    assert shannon_binned(x) == pytest.approx(1)  # the constant column is ignored
    assert shannon_binned(x, bins=1) == 0
    assert shannon_binned(cloud(64, 40)) == pytest.approx(6)


def test_sigma_rule_and_t_rule():
    assert sigma_rule([[0.0], [1.0], [3.0]]) == 2
    assert sigma_rule([[0.0], [1.0], [3.0]], quantile=1) == 3
    values = torch.cat([torch.tensor([1.0]), torch.full((99,), 0.5)])
    assert t_rule(values) == 7  # 0.5^7 < 0.01 < 0.5^6
    for n, power in ((200, 2), (500, 4)):
        values = torch.linspace(1, 0, n).double() ** power
        t = t_rule(values)
        assert (values**t > 0.01).float().mean() <= 0.01 < (values ** (t - 1) > 0.01).float().mean()
    assert t_rule([1.0, 1.0, 0.5]) == 1000 and t_rule([1.0, 1.0, 0.5], max_t=9) == 9
    assert t_rule([1.0, 0.001]) == 1 and t_rule([1.0]) == 1


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda x: dse(x, sigma=0), ValueError),
        (lambda x: dse(x, sigma=math.nan), ValueError),
        (lambda x: dse(x), ValueError),
        (lambda x: dse(x, sigma=1.0, spectrum=[1.0]), ValueError),
        (lambda x: dse(x, sigma=1.0, t=0), ValueError),
        (lambda x: dse(x, sigma=1.0, base=1), ValueError),
        (lambda x: dse(x, sigma=1.0, max_n=0), ValueError),
        (lambda x: dse(x[0], sigma=1.0), ValueError),
        (lambda x: dse(x[:0], sigma=1.0), ValueError),
        (lambda x: dse(x * math.inf, sigma=1.0), ValueError),
        (lambda x: dse(x > 0, sigma=1.0), TypeError),
        (lambda x: dse(x + 1j, sigma=1.0), TypeError),
        (lambda x: dse(spectrum=[0.0, 0.0]), ValueError),
        (lambda x: dse(spectrum=[[1.0]]), ValueError),
        (lambda x: diffusion_operator(x, 1.0, normalisation="other"), ValueError),
        (lambda x: diffusion_operator(x, 1.0, 1.0, normalisation="released"), ValueError),
        (lambda x: diffusion_operator(x, 1.0, math.inf), ValueError),
        (lambda x: dsmi(x, torch.arange(3), sigma=1.0), ValueError),
        (lambda x: dsmi(x, None, sigma=1.0), ValueError),
        (lambda x: dsmi(x, x, sigma=1.0, discrete=True), ValueError),
        (lambda x: dsmi(x, x[:, 0], sigma=1.0, n_clusters=1), ValueError),
        (lambda x: dsmi(x, x, sigma=1.0, n_clusters=len(x)), ValueError),
        (lambda x: dsmi(x, torch.arange(len(x)), sigma=1.0, repeats=0), ValueError),
        (lambda x: shannon_binned(x, bins=0), ValueError),
        (lambda x: shannon_binned(x, bins=2.5), ValueError),
        (lambda x: sigma_rule(x[:1]), ValueError),
        (lambda x: sigma_rule(x, quantile=0), ValueError),
        (lambda x: sigma_rule(torch.zeros(4, 2)), ValueError),
        (lambda x: t_rule([1.0], share=0), ValueError),
        (lambda x: t_rule([1.0], max_t=0), ValueError),
    ],
)
def test_bad_input(call, error):
    with pytest.raises(error):
        call(cloud(12, 3))


def test_callback_records_what_the_functions_say():
    inputs, labels = cloud(30, 4).float(), torch.arange(30) % 3
    torch.manual_seed(0)
    model = mlp((4, 8, 6, 3))
    name = [name for name, _ in model.named_children()][-2]
    whole = DSECallback((inputs, labels), [name], n_clusters=3, rounds=[0, 2])
    batches = DSECallback(list(zip(inputs.split(7), labels.split(7), strict=True)), [name], sigma=sigma_rule)
    model.train()
    whole(model)
    assert model.training  # left as it was found
    features = model[:-1](inputs).detach()
    sigma = sigma_rule(features)
    generator = torch.Generator().manual_seed(0)
    assert whole.records[name]["sigma"] == [sigma]
    assert whole.records[name]["dse"] == [dse(features, sigma=sigma)]
    assert whole.records[name]["dsmi_y"] == [dsmi(features, labels, sigma=sigma, generator=generator)[0]]
    clusters = whole.clusters
    torch.manual_seed(1)
    state = torch.get_rng_state()
    fit(
        model, lambda model, x, y: nn.functional.cross_entropy(model(x), y), (inputs, labels),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1), epochs=3, callbacks=[whole, batches], progress=False,
    )  # fmt: skip
    assert torch.equal(state, torch.get_rng_state())
    assert whole.measured == [0, 2] and batches.measured == [0, 1, 2]
    assert whole.records[name]["sigma"] == [sigma, sigma]  # fixed at the first measurement
    assert len(set(batches.records[name]["sigma"])) == 3
    assert whole.clusters is clusters or torch.equal(whole.clusters, clusters)
    assert len(whole.records[name]["dsmi_x"]) == 2
    after = model[:-1](inputs).detach()
    assert batches.records[name]["dse"][-1] == pytest.approx(dse(after, sigma=sigma_rule(after)), abs=1e-6)
    assert not any(module._forward_hooks for module in model.modules())


def test_callback_refuses():
    inputs, labels = torch.randn(6, 4), torch.arange(6)
    with pytest.raises(ValueError, match="no layer"):
        DSECallback((inputs, labels), ["nowhere"])(mlp((4, 3, 2)))
    for loader in ((inputs, labels[:3]), []):
        with pytest.raises(ValueError, match="loader"):
            DSECallback(loader, ["0"])
    for layers in ("0", []):
        with pytest.raises(ValueError, match="layers"):
            DSECallback((inputs, labels), layers)


def test_train_does_not_import_information():
    """`lib.train` stays usable by `lib.information`: no import at module level."""
    code = "import sys, lib.train; assert 'lib.information' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
