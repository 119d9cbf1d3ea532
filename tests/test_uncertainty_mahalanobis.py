"""Tied Gaussians against the reference, scikit-learn and SciPy; the detector against the formula layer by layer."""

import math

import pytest
import torch
from scipy.spatial.distance import mahalanobis
from scipy.stats import norm
from sklearn.covariance import EmpiricalCovariance, ShrunkCovariance
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from lib.book import load_reference
from lib.models import CNN
from lib.uncertainty import MahalanobisDetector, TiedGaussian, layer_weights


def blobs(n=120, d=5, num_classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % num_classes
    mixing = torch.randn(d, d, generator=generator, dtype=torch.float64)
    centres = 2 * torch.randn(num_classes, d, generator=generator, dtype=torch.float64)
    return centres[labels] + torch.randn(n, d, generator=generator, dtype=torch.float64) @ mixing, labels


def test_agrees_with_the_reference_in_values_and_gradients():
    fit_tied = load_reference("mahalanobis-detection", "fit_tied")
    confidence = load_reference("mahalanobis-detection", "confidence")
    features, labels = blobs()
    means, covariance = fit_tied(features, labels)
    tied = TiedGaussian().fit(features, labels)
    torch.testing.assert_close(tied.means, means)
    torch.testing.assert_close(tied.covariance, covariance)
    ours, theirs = (features[:9].clone().requires_grad_() for _ in range(2))
    tied.score(ours).sum().backward()
    confidence(theirs, means, covariance).sum().backward()
    torch.testing.assert_close(tied.score(ours), confidence(theirs, means, covariance))
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_agrees_with_scikit_learn_and_scipy():
    features, labels = blobs(n=99)
    tied = TiedGaussian().fit(features, labels)
    judge = LinearDiscriminantAnalysis(solver="lsqr", store_covariance=True, priors=[1 / 3] * 3)
    judge.fit(features.numpy(), labels.numpy())
    torch.testing.assert_close(tied.covariance, torch.from_numpy(judge.covariance_))
    assert tied.predict(features).tolist() == judge.predict(features.numpy()).tolist()
    centred = (features - tied.means[labels]).numpy()
    direct = EmpiricalCovariance(assume_centered=True).fit(centred).covariance_
    torch.testing.assert_close(tied.covariance, torch.from_numpy(direct))
    inverse = torch.linalg.inv(tied.covariance)
    for row, found in zip(features[:4], tied.distances(features[:4]), strict=True):
        expected = [mahalanobis(row, mean, inverse) ** 2 for mean in tied.means]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_shrinkage_is_that_of_scikit_learn():
    features, labels = blobs()
    tied = TiedGaussian(0.3).fit(features, labels)
    shrunk = ShrunkCovariance(assume_centered=True, shrinkage=0.3).fit(
        (features - tied.means[labels]).numpy()
    )
    difference = features[:6].unsqueeze(1) - tied.means
    expected = torch.einsum("ncd,de,nce->nc", difference, torch.from_numpy(shrunk.precision_), difference)
    torch.testing.assert_close(tied.distances(features[:6]), expected)


def test_gradient_is_that_of_the_formula():
    features, labels = blobs()
    tied = TiedGaussian().fit(features, labels)
    point = features[:5].clone().requires_grad_()
    tied.score(point).sum().backward()
    nearest = tied.means[tied.predict(point)]
    torch.testing.assert_close(
        point.grad, -2 * torch.linalg.solve(tied.covariance, (point - nearest).T).T.detach()
    )
    assert torch.autograd.gradcheck(tied.distances, features[:3].clone().requires_grad_())
    at_mean = tied.means.clone().requires_grad_()  # the distance has no kink once it is squared
    tied.score(at_mean).sum().backward()
    assert at_mean.grad.isfinite().all()


def test_mean_own_distance_on_the_training_set_is_the_dimension():
    features, labels = blobs(n=77, d=6)
    own = TiedGaussian().fit(features, labels).distances(features)[torch.arange(77), labels]
    assert math.isclose(own.mean(), 6, rel_tol=1e-9)


def test_accuracy_on_two_gaussians_is_phi_of_half_the_distance():
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(40_000) % 2
    features = torch.randn(40_000, 3, generator=generator)
    features[:, 0] += 1.5 * labels
    tied = TiedGaussian().fit(features[:20_000], labels[:20_000])
    found = (tied.predict(features[20_000:]) == labels[20_000:]).double().mean().item()
    assert abs(found - norm.cdf(0.75)) < 4 * math.sqrt(0.18 / 20_000)


def test_far_away_no_digits_are_lost():
    features, labels = blobs()
    tied = TiedGaussian().fit(features, labels)
    shift = torch.full((5,), 1e8, dtype=torch.float64)
    expected = tied.distances(features[:4])
    moved = TiedGaussian().fit(features + shift, labels).distances(features[:4] + shift)
    torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-5)
    assert tied.distances(features[:4].float()).dtype == torch.float32
    strided = torch.stack([features, features], 2)[..., 0]
    torch.testing.assert_close(tied.distances(strided), tied.distances(features))
    assert tied.distances(features[:0]).shape == (0, 3)


def test_add_class_with_its_share_of_samples_is_a_fit_from_scratch():
    features, labels = blobs(n=90)
    old = labels < 2
    whole = TiedGaussian().fit(features, labels)
    grown = TiedGaussian().fit(features[old], labels[old])
    grown.add_class(features[~old], weight=float((~old).double().mean()))
    torch.testing.assert_close(grown.means, whole.means)
    torch.testing.assert_close(grown.covariance, whole.covariance)
    torch.testing.assert_close(grown.distances(features), whole.distances(features))
    assert grown.counts.tolist() == [30, 30, 30]


def test_add_class_agrees_with_the_reference():
    add_class = load_reference("mahalanobis-detection", "add_class")
    features, labels = blobs(n=90)
    old = labels < 2
    grown = TiedGaussian().fit(features[old], labels[old])
    means, covariance = add_class(grown.means, grown.covariance, features[~old][:7])
    grown.add_class(features[~old][:7])
    torch.testing.assert_close(grown.means, means)
    torch.testing.assert_close(grown.covariance, covariance)


def test_a_singular_covariance_is_an_error_that_names_the_rank():
    features, labels = blobs()
    dead = torch.cat([features, torch.zeros(len(features), 2, dtype=torch.float64)], 1)
    with pytest.raises(ValueError, match="rank 5 of 7"):
        TiedGaussian().fit(dead, labels)
    tied = TiedGaussian(0.01).fit(dead, labels)
    assert tied.rank == 5 and tied.distances(dead).isfinite().all()


@pytest.mark.parametrize("shrinkage", [-0.1, 1.1, float("nan")])
def test_bad_shrinkage(shrinkage):
    with pytest.raises(ValueError, match="shrinkage"):
        TiedGaussian(shrinkage)


def test_bad_input_of_the_gaussian():
    features, labels = blobs()
    for bad in (features.unsqueeze(2), features.long(), features * torch.nan):
        with pytest.raises(ValueError, match="features"):
            TiedGaussian().fit(bad, labels)
    for bad in (labels[:-1], labels.double(), labels - 1):
        with pytest.raises(ValueError, match="labels"):
            TiedGaussian().fit(features, bad)
    with pytest.raises(ValueError, match="class 1 has no samples"):
        TiedGaussian().fit(features, labels * 2)
    with pytest.raises(ValueError, match="not fitted"):
        TiedGaussian().score(features)
    tied = TiedGaussian().fit(features, labels)
    with pytest.raises(ValueError, match="5 columns"):
        tied.distances(features[:, :4])
    with pytest.raises(ValueError, match="weight"):
        tied.add_class(features, weight=1.5)
    with pytest.raises(ValueError, match="n > 0"):
        tied.add_class(features[:0])


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = CNN(3).requires_grad_(False)
    inputs = torch.rand(90, 1, 8, 8)
    return model, inputs, torch.arange(90) % 3


LAYERS = ("stem.1", "hidden")


def test_layers_are_averaged_over_space(network):
    model, inputs, labels = network
    detector = MahalanobisDetector(model, LAYERS, shrinkage=0.1)
    torch.testing.assert_close(detector.features(inputs, 0), model.stem[:2](inputs).mean((2, 3)))
    torch.testing.assert_close(detector.features(inputs, 1), model.hidden(model.stem(inputs).flatten(1)))
    by_function = MahalanobisDetector(model, [lambda x: model.stem[:2](x)], shrinkage=0.1)
    torch.testing.assert_close(by_function.features(inputs, 0), detector.features(inputs, 0))
    assert not any(module._forward_hooks for module in model.modules())


def test_layer_scores_are_those_of_the_reference(network):
    model, inputs, labels = network
    preprocess = load_reference("mahalanobis-detection", "preprocess")
    detector = MahalanobisDetector(model, LAYERS, eps=0.01, shrinkage=0.1)
    detector.fit([(inputs[:50], labels[:50]), (inputs[50:], labels[50:])])
    whole = MahalanobisDetector(model, LAYERS, eps=0.01, shrinkage=0.1).fit([(inputs, labels)])
    scores = detector.layer_scores(inputs[:20])
    torch.testing.assert_close(scores, whole.layer_scores(inputs[:20]))
    for k, gaussian in enumerate(detector.gaussians):

        def score(x, k=k, gaussian=gaussian):
            return gaussian.score(detector.features(x, k))

        moved = preprocess(inputs[:20], score, 0.01)
        torch.testing.assert_close(detector.perturb(inputs[:20], k), moved)
        torch.testing.assert_close(scores[:, k], score(moved))
        assert (score(moved) > score(inputs[:20])).float().mean() > 0.9
    torch.testing.assert_close(detector.score(inputs[:20]), scores.sum(1))


def test_the_step_is_rescaled_for_standardised_inputs(network):
    model, inputs, labels = network
    detector = MahalanobisDetector(model, LAYERS, eps=0.01, shrinkage=0.1, scale=0.25).fit([(inputs, labels)])
    step = (detector.perturb(inputs, 1) - inputs).abs()
    torch.testing.assert_close(step[step > 0.001], torch.full_like(step[step > 0.001], 0.04))


def test_fit_weights_gives_the_log_odds(network):
    model, inputs, labels = network
    detector = MahalanobisDetector(model, LAYERS, shrinkage=0.1).fit([(inputs, labels)])
    far = inputs[:30] * 3
    detector.fit_weights(inputs[:40], far)
    raw = detector.layer_scores(inputs) @ detector.weights + detector.bias
    torch.testing.assert_close(detector.score(inputs), raw)
    assert detector.score(inputs[:40]).median() > 0 > detector.score(far).median()


def test_layer_weights_prefers_the_layer_that_separates():
    generator = torch.Generator().manual_seed(0)
    familiar, others = (torch.randn(200, 2, generator=generator) * torch.tensor([1.0, 100.0]) for _ in "ab")
    others[:, 0] -= 4
    others[0, 0] = -1e6  # one absurd sample must not set the scale
    weights, bias = layer_weights(familiar, others)
    assert weights[0] > 1 and abs(100 * weights[1]) < 0.5
    assert ((familiar @ weights + bias > 0).float().mean() > 0.9) and (
        (others @ weights + bias < 0).float().mean() > 0.9
    )
    with pytest.raises(ValueError, match="scores"):
        layer_weights(familiar, others[:, :1])
    with pytest.raises(ValueError, match="at least one"):
        layer_weights(familiar, others[:0])


def test_bad_input_of_the_detector(network):
    model, inputs, labels = network
    with pytest.raises(ValueError, match="layer"):
        MahalanobisDetector(model, [])
    with pytest.raises(ValueError, match="eps"):
        MahalanobisDetector(model, LAYERS, eps=-1)
    with pytest.raises(AttributeError):
        MahalanobisDetector(model, ["no such layer"])
    with pytest.raises(ValueError, match="not fitted"):
        MahalanobisDetector(model, LAYERS).score(inputs)
    with pytest.raises(ValueError, match="no batches"):
        MahalanobisDetector(model, LAYERS).fit([])
