"""Cauchy-Schwarz quantities against triple loops, closed forms of Gaussians, and the chapter's reference cells."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import rbf_kernel
from torch.autograd import gradcheck

import lib.information.mixture as mixture
from lib.book import load_reference
from lib.information import conditional_cs, cs_divergence, cs_qmi, gaussian_gram, hsic
from lib.losses import cs_ib
from lib.models import IBRegressor
from lib.train import fit, fit_ensemble

SLUG = "cauchy-schwarz-bottleneck"


def cloud(n=12, d=3, seed=0, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def kernel(a, b, sigma):
    return math.exp(-sum((float(p) - float(q)) ** 2 for p, q in zip(a, b, strict=True)) / (2 * sigma**2))


def loops_conditional(x, y, p, sigma_x, sigma_y, denominator):
    def term(a, b):
        total = 0.0
        for j in range(len(x)):
            weights = [kernel(x[j], x[i], sigma_x) for i in range(len(x))]
            product = sum(w * kernel(a[j], b[i], sigma_y) for i, w in enumerate(weights))
            total += product / (
                sum(weights) ** 2 if denominator == "squared_sum" else sum(w * w for w in weights)
            )
        return math.log(total)

    return term(y, y) + term(p, p) - 2 * term(p, y)


def loops_qmi(x, t, sigma_x, sigma_t):
    n = len(x)
    K = [[kernel(a, b, sigma_x) for b in x] for a in x]
    Q = [[kernel(a, b, sigma_t) for b in t] for a in t]
    joint = sum(K[i][j] * Q[i][j] for i in range(n) for j in range(n)) / n**2
    product = sum(map(sum, K)) * sum(map(sum, Q)) / n**4
    cross = sum(K[i][j] * Q[i][k] for i in range(n) for j in range(n) for k in range(n)) / n**3
    return math.log(joint) + math.log(product) - 2 * math.log(cross)


@pytest.mark.parametrize("normalised", [False, True])
def test_hsic_in_blocks(monkeypatch, normalised):
    x, t = cloud(10, 2).requires_grad_(), cloud(10, 3, seed=1).requires_grad_()
    centre = torch.eye(10, dtype=x.dtype) - 0.1
    K, Q = (centre @ gaussian_gram(*each) @ centre for each in ((x, None, 0.8), (t, None, 1.2)))
    wanted = (K * Q).mean()
    if normalised:
        wanted = wanted / (K.square().mean() * Q.square().mean()).sqrt()
    monkeypatch.setattr(mixture, "BLOCK", 30)

    def found(x, t):
        return hsic(x, t, 0.8, 1.2, normalised)

    torch.testing.assert_close(found(x, t), wanted)
    for ours, theirs in zip(
        torch.autograd.grad(found(x, t), (x, t)), torch.autograd.grad(wanted, (x, t)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("sigma", [0.05, 1.0, 7.0])
def test_gram(sigma):
    x, y = cloud(), cloud(7, seed=1)
    for a, b in ((x, None), (x, y)):
        expected = rbf_kernel(a.numpy(), None if b is None else b.numpy(), gamma=1 / (2 * sigma**2))
        np.testing.assert_allclose(gaussian_gram(a, b, sigma).numpy(), expected, atol=1e-12)
    narrow = gaussian_gram(1000 + cloud(dtype=torch.float32), sigma=1e-3)
    assert (narrow.diagonal() == 1).all()


@pytest.mark.parametrize("block", [2**22, 20])
@pytest.mark.parametrize("sigma", [0.3, 1.0])
def test_divergence(monkeypatch, block, sigma):
    monkeypatch.setattr(mixture, "BLOCK", block)
    x, y = cloud(), cloud(7, seed=1) + 0.5
    xx, yy, xy = (np.mean([[kernel(a, b, sigma) for b in q] for a in p]) for p, q in ((x, x), (y, y), (x, y)))
    assert float(cs_divergence(x, y, sigma)) == pytest.approx(math.log(xx * yy / xy**2), abs=1e-12)
    assert float(cs_divergence(x, y, sigma)) == pytest.approx(float(cs_divergence(y, x, sigma)), abs=1e-12)
    assert float(cs_divergence(x, x.flip(0), sigma)) == pytest.approx(0, abs=1e-12)
    assert gradcheck(lambda a, b: cs_divergence(a, b, sigma), (x.requires_grad_(), y.requires_grad_()))


def test_divergence_of_gaussians():
    found = [
        float(cs_divergence(cloud(1500, 2, 2 * s), cloud(1500, 2, 2 * s + 1) + 0.9, 0.5)) for s in range(4)
    ]
    assert np.mean(found) == pytest.approx(2 * 0.9**2 / (2 + 0.25), rel=0.12)


def test_far_apart_does_not_underflow():
    x, y = cloud(dtype=torch.float32), cloud(dtype=torch.float32) + 100
    x.requires_grad_()
    value = cs_divergence(x, y, 0.5)
    (gradient,) = torch.autograd.grad(value, x)
    assert value.isfinite() and gradient.isfinite().all() and gradient.abs().max() > 1


@pytest.mark.parametrize("denominator", ["squared_sum", "released"])
def test_conditional(denominator):
    x, y, p = cloud(8, 2), cloud(8, 1, 1), cloud(8, 1, 2)
    options = (0.8, 0.6, denominator)
    expected = loops_conditional(x, y, p, *options)
    assert float(conditional_cs(x, y, p, *options)) == pytest.approx(expected, abs=1e-12)
    assert float(conditional_cs(x, y, y, *options)) == pytest.approx(0, abs=1e-12)
    assert gradcheck(lambda *a: conditional_cs(*a, *options), tuple(v.requires_grad_() for v in (x, y, p)))


def test_conditional_limits():
    x, y, p = cloud(20, 2), cloud(20, 1, 1), cloud(20, 1, 2)
    narrow = -2 * (-((y - p) ** 2) / (2 * 0.7**2)).exp().mean().log()
    torch.testing.assert_close(conditional_cs(x, y, p, 1e-3, 0.7), narrow)
    torch.testing.assert_close(conditional_cs(x, y, p, 1e6, 0.7), cs_divergence(p, y, 0.7))


@pytest.mark.parametrize("widths", [(0.5, 1.5), (1.0, 1.0)])
def test_qmi(widths):
    x, t = cloud(9, 2), cloud(9, 3, 1)
    value, own_x, own_t = (
        loops_qmi(x, t, *widths),
        loops_qmi(x, x, widths[0], widths[0]),
        loops_qmi(t, t, widths[1], widths[1]),
    )
    assert float(cs_qmi(x, t, *widths)) == pytest.approx(value, abs=1e-12)
    assert float(cs_qmi(x, t, *widths, base=2)) == pytest.approx(value / math.log(2), abs=1e-12)
    found = float(cs_qmi(x, t, *widths, normalised=True))
    assert found == pytest.approx(value / math.sqrt(own_x * own_t), abs=1e-12)
    inputs = (x.requires_grad_(), t.requires_grad_())
    assert gradcheck(lambda a, b: cs_qmi(a, b, *widths), inputs)
    assert gradcheck(lambda a, b: cs_qmi(a, b, *widths, normalised=True), inputs)


def test_qmi_limits_and_gaussian():
    x, t = cloud(40, 2), cloud(40, 2, 1)
    assert float(cs_qmi(x, t, 1e-4, 1e-4)) == pytest.approx(math.log(40), abs=1e-9)
    assert float(cs_qmi(x, t, 1e4, 1e4)) == pytest.approx(0, abs=1e-9)
    assert float(cs_qmi(t, t, 0.7, 0.7, normalised=True)) == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(cs_qmi(x, 10 * t, 1.0, 10.0), cs_qmi(x, t))
    constant = torch.ones(40, 2, dtype=torch.float64, requires_grad=True)
    value = cs_qmi(x, constant, normalised=True)
    assert abs(float(value.detach())) < 1e-12 and torch.autograd.grad(value, constant)[0].isfinite().all()
    r, blur = (
        0.8,
        0.5**2 / 2,
    )  # the joint density is a Gaussian whose covariance is blurred by half the squared width
    pair = cloud(3000, 2, 3)
    second = r * pair[:, :1] + math.sqrt(1 - r**2) * pair[:, 1:]
    r = r / (1 + blur)
    closed = -0.5 * math.log(1 - r**2) + math.log((4 - r**2) / 4)
    assert float(cs_qmi(pair[:, :1], second, 0.5, 0.5)) == pytest.approx(closed, abs=0.03)


def test_hsic():
    x, t = cloud(9, 2), cloud(9, 3, 1)
    K, Q = rbf_kernel(x.numpy(), gamma=0.5), rbf_kernel(t.numpy(), gamma=2)
    H = np.eye(9) - 1 / 9
    expected = [np.trace(a @ H @ b @ H) / 81 for a, b in ((K, Q), (K, K), (Q, Q))]
    assert float(hsic(x, t, 1.0, 0.5)) == pytest.approx(expected[0], abs=1e-12)
    found = hsic(x, t, 1.0, 0.5, normalised=True)
    assert float(found) == pytest.approx(expected[0] / math.sqrt(expected[1] * expected[2]), abs=1e-12)
    assert gradcheck(lambda a, b: hsic(a, b, normalised=True), (x.requires_grad_(), t.requires_grad_()))
    assert float(hsic(x, torch.ones(9, 1, dtype=torch.float64), normalised=True).detach()) == 0


def test_reference_cells():
    reference_divergence = load_reference(SLUG, "cauchy_schwarz")
    reference_loss = load_reference(SLUG, "cs_bottleneck")
    x, t, y, p = cloud(15, 3), cloud(15, 4, 1), cloud(15, 1, 2), cloud(15, 1, 3)
    leaves = [t.requires_grad_(), p.requires_grad_()]
    pairs = [(cs_ib(x, t, y, p, 0.3), reference_loss(x, t, y, p, 0.3))]
    pairs.append((cs_divergence(t[:, :1], p, 0.8), reference_divergence(t[:, :1], p, 0.8)))
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs)
        gradients = [torch.autograd.grad(out, leaves, allow_unused=True) for out in (ours, theirs)]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b)


def test_bad_input():
    x, y = cloud(5), cloud(5, 1, 1)
    for call in (
        lambda: gaussian_gram(x, y),
        lambda: cs_divergence(x, y),
        lambda: cs_divergence(x, x, 0.0),
        lambda: conditional_cs(x, y, y[:4]),
        lambda: conditional_cs(x, y, y, sigma_y=-1.0),
        lambda: conditional_cs(x, y, y, denominator="square"),
        lambda: cs_qmi(x, y[:4]),
        lambda: cs_qmi(x, y, base=1),
        lambda: hsic(x, y[:4]),
        lambda: hsic(x, y, sigma_t=math.nan),
        lambda: cs_ib(x, x, y, y, -1.0),
        lambda: cs_qmi(x[:, 0], y),
        lambda: IBRegressor(3, noise="both"),
    ):
        with pytest.raises(ValueError):
            call()
    for call in (lambda: cs_qmi(x.long(), y), lambda: cs_divergence([1.0], x)):
        with pytest.raises(TypeError):
            call()


def test_one_batch_of_members_is_as_single_training():
    x, y = cloud(24, 3), cloud(24, 1, 1)

    def loss(model, x, y):
        out = model(x)
        return cs_ib(x, out.t, y, out.prediction, 0.1)

    def make(seed):
        torch.manual_seed(seed)
        return IBRegressor(3, 4, 8).double()

    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=0.05)

    models = [make(0), make(1)]
    fit_ensemble(
        models,
        loss,
        [v.expand(2, *v.shape) for v in (x, y)],
        optimizer=sgd,
        epochs=3,
        seeds=[0, 1],
        batch_size=8,
    )
    for seed, model in enumerate(models):
        single = make(seed)
        fit(single, loss, (x, y), optimizer=sgd(single.parameters()), epochs=3, batch_size=8, seed=seed)
        for a, b in zip(model.parameters(), single.parameters(), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("noise", ["none", "shared", "input"])
def test_regressor(noise):
    model, x = IBRegressor(3, 4, 8, noise=noise), cloud(5, dtype=torch.float32)
    first, second = model(x), model(x)
    assert first.t.shape == (5, 4) and first.prediction.shape == (5, 1)
    assert torch.equal(first.t, second.t) == (noise == "none")
    out = model.eval()(x)
    assert torch.equal(out.t, out.mean) and torch.equal(out.prediction, model(x).prediction)
    shape = {"none": None, "shared": (), "input": (5, 4)}[noise]
    assert (out.log_variance is None) if shape is None else out.log_variance.shape == shape
