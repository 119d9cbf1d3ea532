"""lib.attention.linear against loops, brute force, math.comb, gradcheck and the chapter's reference cells."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.attention import diagonal_scan, feature_map, linear_attention, taylor_features
from lib.book import load_reference

SLUG = "dynamical-systems-view"


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loop(decay, inputs, initial):
    states, state = [], initial
    for factor, value in zip(decay.unbind(1), inputs.unbind(1), strict=True):
        state = factor * state + value
        states.append(state)
    return torch.stack(states, 1)


@settings(max_examples=15, deadline=None)
@given(length=st.integers(1, 9), seed=st.integers(0, 99))
def test_scan_equals_the_loop_in_values_and_gradients(length, seed):
    decay, inputs = randn(2, length, 3, seed=seed), randn(2, length, 3, seed=seed + 1)
    decay[:, length // 2] = 0.0
    initial = randn(2, 3, seed=seed + 2)
    tensors = [tensor.requires_grad_() for tensor in (decay, inputs, initial)]
    expected, found = loop(*tensors), diagonal_scan(*tensors)
    torch.testing.assert_close(found, expected)
    weights = randn(2, length, 3, seed=seed + 3)
    for a, b in zip(
        torch.autograd.grad((found * weights).sum(), tensors),
        torch.autograd.grad((expected * weights).sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_scan_broadcasts_takes_any_dim_and_passes_gradcheck():
    inputs = randn(4, 2, 5).transpose(0, 1)  # not contiguous
    decay = torch.sigmoid(randn(2, 1, 1))
    torch.testing.assert_close(
        diagonal_scan(decay, inputs),
        loop(decay.expand(2, 4, 5), inputs, torch.zeros(2, 5, dtype=torch.float64)),
    )
    last = diagonal_scan(torch.tensor(0.5), torch.ones(3, 2), dim=-1)
    torch.testing.assert_close(last, torch.tensor([[1.0, 1.5]]).expand(3, 2))
    args = [randn(2, 3, 1).requires_grad_(), randn(2, 3, 4).requires_grad_(), randn(4).requires_grad_()]
    assert torch.autograd.gradcheck(diagonal_scan, args)


def test_scan_does_not_divide():
    decay = torch.full((1, 500, 1), 1e-3)
    assert torch.isfinite(diagonal_scan(decay, torch.ones(1, 500, 1))).all()


def test_scan_rejects():
    with pytest.raises(ValueError, match="do not fit"):
        diagonal_scan(torch.ones(1, 3, 2), torch.ones(1, 4, 2))
    with pytest.raises(ValueError, match="do not fit"):
        diagonal_scan(torch.ones(1, 4, 2), torch.ones(1, 4, 2), torch.ones(3))
    with pytest.raises(ValueError, match="at least one step"):
        diagonal_scan(torch.ones(1, 0, 2), torch.ones(1, 0, 2))


@pytest.mark.parametrize("dim, degree", [(1, 0), (1, 4), (3, 2), (4, 5)])
def test_taylor_features_are_the_polynomial_kernel(dim, degree):
    q, k = randn(5, dim), randn(6, dim, seed=1)
    features = taylor_features(q, degree)
    assert features.shape == (5, math.comb(dim + degree, degree))
    products = q @ k.T
    expected = sum(products**p / math.factorial(p) for p in range(degree + 1))
    torch.testing.assert_close(features @ taylor_features(k, degree).T, expected)
    reference = load_reference(SLUG, "taylor_kron")
    torch.testing.assert_close(reference(q[0], degree) @ reference(k[0], degree), expected[0, 0])


def brute(q, k, v, phi, eta, causal, mask=None):
    weights = phi(q) @ phi(k).transpose(-1, -2)
    if causal:
        weights = weights.tril(k.shape[-2] - q.shape[-2])
    if mask is not None:
        weights = weights * mask
    if eta == "query":
        weights = weights / weights.sum(-1, keepdim=True)
    elif eta is not None:
        weights = weights / eta[..., None]
    return weights @ v, weights


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("feature", ["elu1", "identity", "taylor", torch.exp])
@pytest.mark.parametrize("eta", ["query", "input", None])
def test_linear_attention_equals_its_matrix(causal, feature, eta):
    q, k, v = randn(2, 3, 5, 4), randn(2, 1, 9, 4, seed=1), randn(3, 9, 2, seed=2)
    tensors = [tensor.requires_grad_() for tensor in (q, k, v)]
    eta = torch.exp(randn(2, 1, 5, seed=3)) if eta == "input" else eta
    phi = feature_map(feature)
    scaled = q * 0.5 if feature == "taylor" else q
    expected, weights = brute(scaled, k, v, phi, eta, causal)
    for chunk in (2, 64):
        found = linear_attention(q, k, v, causal=causal, feature=feature, eta=eta, chunk=chunk)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    for a, b in zip(
        torch.autograd.grad(found.sin().sum(), tensors),
        torch.autograd.grad(expected.sin().sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    out, matrix = linear_attention(q, k, v, causal=causal, feature=feature, eta=eta, return_weights=True)
    torch.testing.assert_close(matrix, weights, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(out, expected, rtol=1e-8, atol=1e-8)


def test_linear_attention_masks_and_empty_rows():
    q, k, v = randn(1, 3, 2), randn(1, 3, 2, seed=1), randn(1, 3, 2, seed=2)
    mask = torch.tensor([[True, False, True], [False, False, False], [True, True, False]])
    found = linear_attention(q, k, v, mask=mask)
    expected, _ = brute(q, k, v, feature_map("elu1"), None, False, mask)
    sums = brute(q, k, torch.ones_like(v), feature_map("elu1"), None, False, mask)[0]
    torch.testing.assert_close(found[:, ::2], (expected / sums)[:, ::2])
    assert (found[:, 1] == 0).all()
    both = linear_attention(q, k, v, mask=mask, causal=True)
    torch.testing.assert_close(both[:, 0], v[:, 0])
    zero = linear_attention(-torch.ones(1, 2), torch.ones(3, 2), torch.ones(3, 1), feature="relu")
    assert (zero == 0).all()


def test_reference_loop_agrees():
    reference = load_reference(SLUG, "separable_attention")
    q, k, v = randn(6, 3), randn(6, 3, seed=1), randn(6, 2, seed=2)
    phi = feature_map("elu1")
    torch.testing.assert_close(linear_attention(q, k, v, causal=True), reference(phi(q), phi(k), v))
    eta = torch.exp(randn(6, seed=4))
    torch.testing.assert_close(
        linear_attention(q, k, v, causal=True, eta=eta), reference(phi(q), phi(k), v, eta)
    )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"feature": "cosine"}, "feature must be"),
        ({"eta": "key"}, "eta must be"),
        ({"chunk": 0}, "chunk must be"),
        ({"feature": "taylor", "degree": -1}, "degree must be"),
    ],
)
def test_linear_attention_rejects_options(options, message):
    q = randn(1, 3, 2)
    with pytest.raises(ValueError, match=message):
        linear_attention(q, q, q, **options)


def test_linear_attention_rejects_shapes():
    with pytest.raises(ValueError, match="do not fit"):
        linear_attention(randn(3, 2), randn(3, 4), randn(3, 4))
    with pytest.raises(ValueError, match="at least as many keys"):
        linear_attention(randn(4, 2), randn(3, 2), randn(3, 2), causal=True)
