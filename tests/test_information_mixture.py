"""Pairwise Gaussian sums and entropy bounds against dense formulas, Monte Carlo and the chapter's reference cells."""

import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import lib.information.mixture as mixture
from lib.book import load_reference
from lib.information import akde_mi, gaussian_logsumexp, mixture_entropy_bounds

SLUG = "adaptive-information-estimators"


def cloud(n=30, d=3, seed=0, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def dense(x, y, variance):
    return ((x[:, None] - y[None]).square().sum(-1) / (-2 * variance)).logsumexp(1)


@pytest.mark.parametrize("block", [2**22, 64, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_in_blocks(monkeypatch, block, dtype):
    monkeypatch.setattr(mixture, "BLOCK", block)
    x, y = cloud(dtype=dtype).requires_grad_(), cloud(17, seed=1, dtype=dtype).requires_grad_()
    variance = torch.tensor(0.7, dtype=dtype, requires_grad=True)
    weights = cloud(30, 1, seed=2, dtype=dtype)[:, 0]
    found = gaussian_logsumexp(x, y, variance)
    assert found.dtype == dtype
    expected = dense(x, y, variance)
    torch.testing.assert_close(found, expected)
    pairs = [torch.autograd.grad((out * weights).sum(), (x, y, variance)) for out in (found, expected)]
    for ours, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_gradcheck_of_the_points_against_themselves(monkeypatch):
    """Both roles of a point get their gradient: as the one that looks and as the one that is seen."""
    monkeypatch.setattr(mixture, "BLOCK", 8)
    variance = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda t, v: gaussian_logsumexp(t, variance=v), (cloud(6, 2).requires_grad_(), variance))
    assert gradcheck(lambda t, v: mixture_entropy_bounds(t, v), (cloud(5, 2).requires_grad_(), variance))


def test_no_tensor_is_as_large_as_all_pairs(monkeypatch):
    monkeypatch.setattr(mixture, "BLOCK", 400)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for part in out if isinstance(out, tuple | list) else (out,):
                if isinstance(part, torch.Tensor):
                    largest = max(largest, part.numel())
            return out

    x = cloud(100).requires_grad_()
    with Watch():
        gaussian_logsumexp(x).sum().backward()
    assert largest <= 1300  # 400 pairs by 3 dimensions, against 10,000 pairs
    assert x.grad.isfinite().all()


def test_coinciding_points_are_at_distance_zero():
    x = 1e3 + cloud(5, 3).repeat(4, 1)
    torch.testing.assert_close(gaussian_logsumexp(x, variance=1e-20), torch.full((20,), math.log(4)).double())
    x.requires_grad_()
    gaussian_logsumexp(x).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("variance", [0.01, 0.3, 3.0])
def test_entropy_of_a_mixture_lies_between_the_bounds(variance):
    points = cloud(8, 2)
    lower, upper = mixture_entropy_bounds(points, variance)
    generator = torch.Generator().manual_seed(3)
    centre = points[torch.randint(0, 8, (100_000,), generator=generator)]
    sample = centre + math.sqrt(variance) * torch.randn(
        centre.shape, generator=generator, dtype=torch.float64
    )
    density = dense(sample, points, variance) - math.log(8) - math.log(2 * math.pi * variance)
    entropy, error = -density.mean(), density.std() / len(sample) ** 0.5
    assert lower - 3 * error < entropy < upper + 3 * error


def test_bounds_meet_at_both_ends():
    noise = 3 / 2 * (math.log(2 * math.pi * 0.2) + 1)
    for points, entropy in ((torch.ones(7, 3), noise), (1e3 * cloud(7), noise + math.log(7))):
        for bound in mixture_entropy_bounds(points.double(), 0.2):
            assert float(bound) == pytest.approx(entropy, abs=1e-9)


def test_information_in_bits():
    layer, labels = cloud(64, 3), torch.arange(64) % 4
    for bound in ("upper", "lower", "mean"):
        assert akde_mi(layer, labels, scale=1e-12, bound=bound) == pytest.approx((6.0, 2.0))
        assert akde_mi(torch.ones(9, 2), torch.arange(9), bound=bound) == pytest.approx((0, 0), abs=1e-12)
    assert akde_mi(torch.zeros(9, 2), torch.arange(9)) == (0.0, 0.0)
    variance = 1e-2 * float(layer.abs().max())
    assert akde_mi(layer, labels, scale=1e-2) == akde_mi(layer, labels, variance=variance)
    lower, upper = mixture_entropy_bounds(layer, variance)
    noise = 3 / 2 * (math.log(2 * math.pi * variance) + 1)
    for bound, entropy in (("lower", lower), ("upper", upper), ("mean", (lower + upper) / 2)):
        found = akde_mi(layer, labels, 1e-2, bound)[0]
        assert found == pytest.approx((float(entropy) - noise) / math.log(2))


def test_information_of_a_gaussian_channel_is_bracketed():
    """T = X + noise with many Gaussian inputs: log2(1 + SNR) / 2 bits, and the label is the input's sign."""
    x = cloud(4000, 1)
    exact = math.log2(1 + 1 / 0.1) / 2
    lower, upper = (
        akde_mi(x, (x[:, 0] > 0).long(), variance=0.1, bound=bound)[0] for bound in ("lower", "upper")
    )
    assert lower - 0.03 < exact < upper + 0.03


def test_bad_input():
    x, labels = cloud(6), torch.arange(6)
    with pytest.raises(TypeError):
        gaussian_logsumexp(x.long())
    for bad in (x[:, 0], x[:0]):
        with pytest.raises(ValueError):
            gaussian_logsumexp(bad)
    with pytest.raises(ValueError, match="same d"):
        gaussian_logsumexp(x, x[:, :2])
    for variance in (0, -1, math.inf, torch.ones(3)):
        with pytest.raises(ValueError, match="variance"):
            gaussian_logsumexp(x, variance=variance)
    with pytest.raises(ValueError, match="bound"):
        akde_mi(x, labels, bound="best")
    with pytest.raises(ValueError, match="scale"):
        akde_mi(x, labels, scale=0)
    with pytest.raises(TypeError, match="labels"):
        akde_mi(x, labels.double())
    with pytest.raises(ValueError, match="labels"):
        akde_mi(x, labels[:2])
    with pytest.raises(ValueError, match="finite"):
        akde_mi(x / 0, labels)


@pytest.mark.parametrize("bound", ["upper", "lower"])
def test_reference_agrees(bound):
    reference = load_reference(SLUG, "akde_information")
    layer, labels = cloud(40, 3), torch.arange(40) % 3
    expected = akde_mi(layer, labels, 1e-2, bound)
    assert [float(v) for v in reference(layer, labels, 1e-2, bound)] == pytest.approx(expected)
