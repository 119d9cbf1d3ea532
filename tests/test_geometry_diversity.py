"""Diversity of feature maps against singular values and closed forms."""

import math

import numpy as np
import pytest
import torch

from lib.geometry import feature_diversity


@pytest.mark.parametrize("shape", [(5, 3, 4, 4), (5, 8, 2, 1), (5, 3, 7), (5, 6)])
def test_against_singular_values(shape):
    features = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = {kind: feature_diversity(features, kind) for kind in ("variance", "effective_rank", "entropy")}
    for i, sample in enumerate(features.numpy()):
        share = np.linalg.svd(sample.reshape(shape[1], -1), compute_uv=False) ** 2
        share = share / share.sum()
        expected = (np.var(sample, ddof=1), 1 / (share**2).sum(), -(share * np.log(share)).sum())
        np.testing.assert_allclose([values[kind][i] for kind in values], expected, rtol=1e-9, atol=1e-12)


def test_closed_forms():
    flat = torch.ones(1, 4, 3, 3)
    apart = torch.eye(4).reshape(1, 4, 2, 2)  # each channel at a place of its own
    for kind, same, different in (
        ("variance", 0.0, 0.2),
        ("effective_rank", 1.0, 4.0),
        ("entropy", 0.0, math.log(4)),
    ):
        assert feature_diversity(flat, kind).item() == pytest.approx(same, abs=1e-5)
        assert feature_diversity(apart, kind).item() == pytest.approx(different, abs=1e-5)
        assert feature_diversity(torch.zeros(2, 4, 3, 3), kind).tolist() == [0, 0]
        assert feature_diversity(torch.zeros(0, 4, 3, 3), kind).shape == (0,)


def test_scale():
    features = torch.rand(3, 4, 2, 2, dtype=torch.float64)
    for kind, factor in (("variance", 9), ("effective_rank", 1), ("entropy", 1)):
        torch.testing.assert_close(
            feature_diversity(3 * features, kind), factor * feature_diversity(features, kind)
        )


@pytest.mark.parametrize("kind", ["variance", "effective_rank", "entropy"])
def test_gradient_and_half_precision(kind):
    features = torch.rand(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: feature_diversity(x, kind), features)
    half = feature_diversity(features.detach().bfloat16(), kind)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, feature_diversity(features.detach(), kind).float(), rtol=5e-2, atol=5e-2)


def test_bad_input():
    with pytest.raises(ValueError, match="kind must be"):
        feature_diversity(torch.rand(2, 3), "rank")
    with pytest.raises(TypeError, match="floating point"):
        feature_diversity(torch.ones(2, 3, dtype=torch.long))
    for shape in ((3,), (3, 1)):
        with pytest.raises(ValueError, match="two activations"):
            feature_diversity(torch.rand(shape))
