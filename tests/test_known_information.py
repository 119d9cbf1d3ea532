"""Samples of known mutual information, relative noise, nearest-neighbour estimates and lossy compression."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import differential_entropy, gamma, multivariate_normal
from sklearn.feature_selection import mutual_info_classif, mutual_info_regression

from lib.book import load_reference
from lib.data import gaussian_images, gaussian_pair, rectangle_images
from lib.information import (
    AutoencoderCompressor,
    PCACompressor,
    kde_entropy,
    kl_entropy,
    kl_weights,
    lossy_mi,
    mine,
    mutual_information,
)
from lib.models import RelativeNoise


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- data ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dim_x", "dim_y"), [(1, 1), (3, 3), (2, 5), (4, 1)])
def test_gaussian_pair_has_the_information_it_says(dim_x, dim_y):
    x, y = gaussian_pair(200_000, dim_x, dim_y, 1.3, generator=seeded())
    joint = torch.cat([x, y], 1).T
    log_det = torch.logdet(torch.cov(joint)) - torch.logdet(torch.atleast_2d(torch.cov(x.T)))
    log_det -= torch.logdet(torch.atleast_2d(torch.cov(y.T)))
    assert abs(-0.5 * log_det - 1.3) < 0.02
    assert torch.allclose(torch.atleast_2d(torch.cov(x.T)), torch.eye(dim_x).double(), atol=0.02)


def test_gaussian_pair_edges():
    x, y = gaussian_pair(50_000, 2, 2, 0.0, mix=False, dtype=torch.float32, generator=seeded())
    assert x.dtype == torch.float32 and abs(torch.corrcoef(torch.stack([x[:, 0], y[:, 0]]))[0, 1]) < 0.02
    x, y = gaussian_pair(1000, 1, 1, 1e-12, generator=seeded())  # no cancellation in 1 - exp
    assert x.isfinite().all() and y.isfinite().all()
    for bad in ((0, 1, 1, 1.0), (5, 0, 1, 1.0), (5, 1, 1, -0.1), (5, 1, 1, math.inf)):
        with pytest.raises(ValueError):
            gaussian_pair(*bad)


def test_images_determine_their_numbers():
    normals = torch.randn(500, 4, generator=seeded(), dtype=torch.float64)
    images = rectangle_images(normals, 16, min_side=0.2)
    assert images.shape == (500, 1, 16, 16) and images.min() >= 0 and images.max() <= 1 + 1e-6
    uniform = torch.special.ndtr(normals)
    low = 0.8 * (1 - (1 - uniform[:, 0]).sqrt())
    height = 0.2 + uniform[:, 1] * (0.8 - low)
    profile = images[:, 0].max(2).values.double() / images[:, 0].amax((1, 2)).double()[:, None]
    assert torch.allclose(profile.sum(1) / 16, height, atol=1e-5)  # covered length is not rounded to pixels
    centre = (profile * (torch.arange(16) + 0.5) / 16).sum(1) / profile.sum(1)
    assert (centre - (low + height / 2)).abs().max() < 1 / 32
    bumps = gaussian_images(normals[:, :2], 16)
    where = (bumps[:, 0].sum(2) * (torch.arange(16) + 0.5) / 16).sum(1) / bumps[:, 0].sum((1, 2))
    inside = (uniform[:, 0] > 0.3) & (uniform[:, 0] < 0.7)
    assert torch.allclose(where[inside].double(), 0.12 + 0.76 * uniform[inside, 0], atol=0.01)
    for bad in (lambda: gaussian_images(normals), lambda: rectangle_images(normals[:, :2])):
        with pytest.raises(ValueError, match="shape"):
            bad()
    with pytest.raises(ValueError):
        gaussian_images(normals[:, :2], width=0.5)
    with pytest.raises(ValueError):
        rectangle_images(normals, min_side=1.0)


def test_rectangle_segments_are_uniform_over_the_triangle():
    images = rectangle_images(
        torch.randn(20_000, 4, generator=seeded(), dtype=torch.float64), 32, min_side=0.2
    )
    side = (
        images[:, 0].amax(2).sum(1) / images[:, 0].amax((1, 2)) / 32
    )  # length: density falls linearly from 0.2 to 1
    assert abs(side.mean() - (0.2 + 0.8 / 3)) < 0.01


def test_relative_noise():
    layer = RelativeNoise(0.1)
    x = torch.cat([torch.zeros(1000), torch.full((100_000,), 3.0)])
    torch.manual_seed(0)
    noisy = layer(x)
    assert (
        noisy[:1000].eq(0).all()
        and abs(noisy[1000:].std() - 0.3) < 0.01
        and abs(noisy[1000:].mean() - 3) < 0.01
    )
    assert not layer.eval()(x).equal(x) and RelativeNoise(0.1, on_eval=False).eval()(x).equal(x)
    assert RelativeNoise(0.0)(x).equal(x)
    leaf = torch.ones(5, requires_grad=True)
    layer(leaf).sum().backward()
    assert leaf.grad.ne(1).all()  # the noise is part of the map
    with pytest.raises(ValueError):
        RelativeNoise(-1.0)


# ---- estimators ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 3, 4, 7, 8, 13])
def test_weights_meet_their_conditions(dim):
    w = kl_weights(10, dim)
    assert w.sum() == pytest.approx(1)
    for l in range(1, dim // 4 + 1):
        ratio = [math.gamma(j + 2 * l / dim) / math.gamma(j) for j in range(1, 11)]
        assert w @ ratio == pytest.approx(0, abs=1e-9)
    if dim >= 4:
        assert (w < 0).any()
    else:
        assert w == pytest.approx(0.1)


def test_weights_need_enough_neighbours():
    for k, dim in ((1, 4), (2, 8), (3, 0)):
        with pytest.raises(ValueError):
            kl_weights(k, dim)


@pytest.mark.parametrize("dim", [1, 2, 3, 5])
def test_entropy_of_a_normal(dim):
    root = torch.randn(dim, dim, generator=seeded(3), dtype=torch.float64)
    x = torch.randn(2000, dim, generator=seeded(), dtype=torch.float64) @ root
    exact = multivariate_normal(cov=(root.T @ root).numpy(), allow_singular=False).entropy()
    for value, error in (
        kl_entropy(x),
        kl_entropy(x, weighted=False),
        kl_entropy(x, k=10),
        kde_entropy(x[:800]),
    ):
        assert abs(value - exact) < 4 * error + 0.1


def test_entropy_agrees_with_scipy_and_with_brute_force():
    x = gamma.rvs(2.0, size=3000, random_state=0)
    assert abs(kl_entropy(x)[0] - differential_entropy(x)) < 0.05
    assert abs(kl_entropy(x)[0] - gamma(2.0).entropy()) < 0.06
    points = np.random.default_rng(0).normal(size=(40, 2)) * [1, 5]
    distance = np.sort(np.linalg.norm(points[:, None] - points, axis=2), axis=1)[:, 3]
    harmonic = -np.euler_gamma + 1 + 1 / 2  # psi(3)
    by_hand = np.log(39 * math.pi * distance**2) - harmonic
    value, error = kl_entropy(points, k=3, weighted=False, rescale=False)
    assert value == pytest.approx(by_hand.mean()) and error == pytest.approx(by_hand.std() / math.sqrt(40))


@pytest.mark.parametrize("estimate", [kl_entropy, kde_entropy])
def test_entropy_moves_with_an_affine_map_by_log_det(estimate):
    x = torch.rand(400, 3, generator=seeded(), dtype=torch.float64)
    A = torch.randn(3, 3, generator=seeded(1), dtype=torch.float64)
    assert estimate(x @ A + 7)[0] == pytest.approx(estimate(x)[0] + A.det().abs().log().item(), abs=1e-3)


def test_kde_matches_brute_force_and_picks_the_likeliest_width():
    x = np.random.default_rng(0).normal(size=(60, 2))
    kernel = multivariate_normal(cov=0.16 * np.eye(2))
    density = np.array([kernel.pdf(np.delete(x, i, 0) - x[i]).mean() for i in range(60)])
    assert kde_entropy(x, 0.4, rescale=False)[0] == pytest.approx(-np.log(density).mean())
    chosen = kde_entropy(x)[0]
    assert all(chosen <= kde_entropy(x, width)[0] + 1e-3 for width in (0.1, 0.3, 0.5, 1.0))


@pytest.mark.parametrize("method", ["kl", "ksg", "kde"])
@pytest.mark.parametrize("mi", [0.0, 1.0, 1.8])
def test_information_of_normals(method, mi):
    n = 1000 if method == "kde" else 3000
    x, y = gaussian_pair(n, 2, 1, mi, generator=seeded(5))
    value, error = mutual_information(x, y, method=method)
    assert abs(value - mi) < 4 * error + 0.1 and 0.005 < error < 0.1
    assert mutual_information(y, x, method=method)[0] == pytest.approx(value, abs=1e-6)


def test_ksg_is_that_of_scikit_learn():
    x, y = gaussian_pair(1500, 1, 1, 0.8, generator=seeded())
    theirs = mutual_info_regression(x.numpy(), y[:, 0].numpy(), n_neighbors=4, random_state=0)[0]
    assert mutual_information(x, y, method="ksg", k=4)[0] == pytest.approx(theirs, abs=1e-3)
    labels = (y[:, 0] > 0.3).long() + (y[:, 0] > 1).long()
    theirs = mutual_info_classif(x.numpy(), labels.numpy(), n_neighbors=4, random_state=0)[0]
    ours = mutual_information(x, labels, method="ksg", k=4, y_discrete=True)[0]
    assert ours == pytest.approx(theirs, abs=5e-3)


@pytest.mark.parametrize("method", ["kl", "ksg", "kde"])
def test_discrete_labels(method):
    labels = torch.arange(1500) % 3
    far = 50.0 * torch.eye(3, dtype=torch.float64)[labels][:, :2]
    x = far + torch.randn(1500, 2, generator=seeded(), dtype=torch.float64)
    kwargs = {"method": method, "y_discrete": True}
    value, _ = mutual_information(x, labels, **kwargs)
    assert abs(value - math.log(3)) < 0.1
    turned, _ = mutual_information(labels, x, method=method, x_discrete=True)
    assert turned == pytest.approx(value)
    noise = torch.randn(1500, 2, generator=seeded(1), dtype=torch.float64)
    assert abs(mutual_information(noise, labels, **kwargs)[0]) < 0.08


def test_two_discrete_variables():
    x = torch.tensor([0, 0, 1, 1] * 25)
    y = torch.tensor([3, 3, 9, 9] * 25)
    assert mutual_information(x, y, x_discrete=True, y_discrete=True) == pytest.approx((math.log(2), 0))
    z = torch.tensor([0, 1, 0, 1] * 25)
    assert mutual_information(x, z, x_discrete=True, y_discrete=True)[0] == pytest.approx(0)


def test_bad_samples_are_refused():
    x = torch.randn(50, 2, generator=seeded(), dtype=torch.float64)
    with pytest.raises(ValueError, match="repeat"):
        kl_entropy(torch.cat([x, x]))
    assert math.isfinite(kl_entropy(torch.cat([x, x]), jitter=1e-10)[0])
    with pytest.raises(ValueError, match="singular"):
        kl_entropy(torch.cat([x, x], 1))
    with pytest.raises(ValueError, match="finite"):
        kl_entropy(torch.where(x > 1, torch.nan, x))
    with pytest.raises(ValueError, match="k must"):
        kl_entropy(x, k=50, weighted=False)
    with pytest.raises(TypeError):
        kl_entropy(np.array(["a", "b"]))
    with pytest.raises(ValueError, match="shape"):
        kl_entropy(x[None])
    with pytest.raises(ValueError, match="one length"):
        mutual_information(x, x[:40])
    with pytest.raises(ValueError, match="method"):
        mutual_information(x, x + 1, method="mine")
    with pytest.raises(ValueError, match="bandwidth"):
        kde_entropy(x, 0.0)
    with pytest.raises(ValueError, match="discrete"):
        mutual_information(x, x, y_discrete=True)


# ---- compression ---------------------------------------------------------------------------------------------------


def test_pca_keeps_the_largest_variances():
    x = torch.randn(300, 5, generator=seeded(), dtype=torch.float64) * torch.tensor([5.0, 1, 3, 0.1, 0.1])
    x = x.view(300, 5, 1)
    pca = PCACompressor(2).fit(x)
    codes = pca.transform(x)
    assert codes.shape == (300, 2) and codes.mean(0).abs().max() < 1e-9
    assert codes.var(0) == pytest.approx(pca.variance_[:2].numpy())
    lost = (pca.inverse_transform(codes) - x.flatten(1)).square().sum() / 299
    assert lost == pytest.approx(pca.variance_[2:].sum().item())
    wide = torch.randn(20, 100, generator=seeded())
    assert PCACompressor(19).fit(wide).transform(wide).shape == (20, 19)
    with pytest.raises(ValueError):
        PCACompressor(21).fit(wide)
    with pytest.raises(ValueError):
        PCACompressor(0)
    with pytest.raises(ValueError, match="fit"):
        PCACompressor(2).transform(wide)


def test_autoencoder_is_better_than_pca_on_a_curve_and_leaves_the_random_state():
    t = 6 * torch.rand(500, 1, generator=seeded())
    x = torch.cat([torch.cos(t), torch.sin(t), t / 3], 1)
    state = torch.random.get_rng_state()
    codes = AutoencoderCompressor(1, hidden=(32, 32), epochs=60, batch_size=50, lr=1e-2).fit(x)
    assert torch.equal(state, torch.random.get_rng_state())
    pca = PCACompressor(1).fit(x)
    linear = (pca.inverse_transform(pca.transform(x)) - x).square().mean() / x.var(0).mean()
    assert codes.error_ < 0.3 * linear
    rebuilt = codes.inverse_transform(codes.transform(x))
    share = (rebuilt - x).square().mean() / x.var(0, correction=0).mean()
    assert share.item() == pytest.approx(codes.error_, rel=0.2)  # the scale is put back
    with pytest.raises(ValueError, match="fit"):
        AutoencoderCompressor(1).transform(x)
    with pytest.raises(ValueError):
        AutoencoderCompressor(0)


def test_lossy_information_is_that_of_the_codes_and_compressors_see_other_rows():
    x, y = gaussian_pair(2000, 2, 2, 1.5, generator=seeded())
    frame = torch.linalg.qr(torch.randn(30, 30, generator=seeded(1), dtype=torch.float64))[0]
    wide_x, wide_y = x @ frame[:2], y @ frame[2:4]
    seen = []

    class Watching(PCACompressor):
        def fit(self, samples):
            seen.append(samples)
            return super().fit(samples)

    value, _ = lossy_mi(wide_x, wide_y, Watching(2), Watching(2), fit_share=0.25)
    assert [len(s) for s in seen] == [500, 500] and seen[0].equal(wide_x[:500])
    assert value == pytest.approx(mutual_information(x[500:], y[500:])[0], abs=1e-6)
    assert lossy_mi(x, y) == mutual_information(x, y)
    labels = (y[:, 0] > 0).long()
    assert lossy_mi(wide_x, labels, PCACompressor(2).fit(wide_x), y_discrete=True, method="ksg")[0] > 0.2
    with pytest.raises(ValueError, match="one length"):
        lossy_mi(x, y[:10])
    with pytest.raises(ValueError, match="fit_share"):
        lossy_mi(x, y, fit_share=1.0)


def test_mine_follows_the_truth_and_stays_below_it():
    x, y = gaussian_pair(3000, 1, 1, 1.0, generator=seeded())
    state = torch.random.get_rng_state()
    value, error = mine(x, y, steps=400, lr=3e-3)
    assert torch.equal(state, torch.random.get_rng_state())
    assert 0.8 < value < 1.15 and 0 < error < 0.15
    value, error = mine(x, torch.randn(3000, 1, generator=seeded(8)), steps=200)
    assert abs(value) < 0.05
    with pytest.raises(ValueError):
        mine(x[:10], y[:10], held_out=0.9)
    with pytest.raises(ValueError):
        mine(x, y[:10])


@pytest.mark.parametrize(("dim", "k"), [(1, 4), (2, 10), (4, 12)])
def test_reference_of_the_chapter_agrees(dim, k):
    reference = load_reference("lossy-information-bottleneck", "information")
    x, y = gaussian_pair(300, dim, 1, 0.7, generator=seeded(2))
    x, y = torch.special.ndtr(x), y**3
    assert mutual_information(x, y, k=k)[0] == pytest.approx(reference(x, y, k).item(), abs=1e-6)
    entropy = load_reference("lossy-information-bottleneck", "neighbour_entropy")
    assert kl_entropy(x, k)[0] == pytest.approx(entropy(x, k).item(), abs=1e-6)
