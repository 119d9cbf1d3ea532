"""lib.attention.dsf: every system against its model's own loop (the chapter's reference cells) and brute-force products."""

import pytest
import torch

from lib.attention import (
    LinearSystem,
    feature_map,
    from_linear_attention,
    from_normalized_attention,
    from_qlstm,
    from_rglru,
    from_s6,
    from_ssd,
    linear_attention,
)
from lib.book import load_reference

SLUG = "dynamical-systems-view"
L, D, N = 7, 3, 2


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


U = randn(2, L, D)
W = [randn(D, D, seed=seed) for seed in range(1, 6)]
Q, K, B, C = (randn(N, D, seed=seed) for seed in range(6, 10))
LOG_A = randn(D, N, seed=10)
ROW = randn(D, seed=11)


def loops(name, *args):
    function = load_reference(SLUG, name)
    return torch.stack([function(u, *args) for u in U])


def systems():
    phi = feature_map("elu1")
    q, k, v = phi(U @ Q.T), phi(U @ K.T), U @ W[0].T
    attend = load_reference(SLUG, "separable_attention")
    plain = torch.stack([attend(*rows) for rows in zip(q, k, v, strict=True)])
    eta = torch.nn.functional.softplus(U @ ROW)
    normal = torch.stack([attend(*rows) for rows in zip(q, k, v, eta, strict=True)])
    for fold in (False, True):
        yield f"linear {fold}", from_linear_attention(U, Q, K, W[0], fold=fold), plain
        yield (
            f"normalized {fold}",
            from_normalized_attention(U, Q, K, W[0], ROW, normalizer="softplus", fold=fold),
            normal,
        )
    yield "s6", from_s6(U, W[0], LOG_A, B, C), loops("s6", W[0], LOG_A, B, C)
    yield "s6 skip", from_s6(U, W[0], LOG_A, B, C, skip=ROW), loops("s6", W[0], LOG_A, B, C) + ROW * U
    yield "ssd", from_ssd(U, ROW, LOG_A[0, 0], B, C), loops("ssd", ROW, LOG_A[0, 0], B, C)
    yield "qlstm", from_qlstm(U, *W[:4]), loops("qlstm", *W[:4])
    yield "reversed", from_qlstm(U, *W[:4], forget="reversed"), loops("qlstm", -W[0], *W[1:4])
    yield "coupled", from_qlstm(U, None, *W[1:4], forget="coupled"), loops("qlstm", -W[1], *W[1:4])
    yield "rglru", from_rglru(U, W[0], W[1], ROW), loops("rglru", W[0], W[1], ROW)


@pytest.mark.parametrize(
    "name, system, expected", list(systems()), ids=lambda x: x if isinstance(x, str) else ""
)
def test_system_equals_its_model(name, system, expected):
    torch.testing.assert_close(system.scan(U), expected, rtol=1e-10, atol=1e-10)
    phi = system.unroll()
    torch.testing.assert_close(torch.einsum("bipjd,bjd->bip", phi, U), expected, rtol=1e-10, atol=1e-10)
    brute = load_reference(SLUG, "dsf_matrix")
    for row in range(2):
        D_row = None if system.D is None else system.D[row]
        found = brute(system.decay[row], system.B[row], system.C[row], D_row)  # (L, L, p, d)
        torch.testing.assert_close(phi[row], found.permute(0, 2, 1, 3), rtol=1e-10, atol=1e-10)


def test_attention_has_a_matrix_and_s6_has_none():
    system = from_linear_attention(U, Q, K, W[0])
    _, weights = linear_attention(U @ Q.T, U @ K.T, U, causal=True, return_weights=True)
    torch.testing.assert_close(system.to_matrix(W[0]), weights)
    from_ssd(U, ROW, LOG_A[0, 0], B, C).to_matrix()
    with pytest.raises(ValueError, match="no scalar attention matrix"):
        from_s6(U, W[0], LOG_A, B, C).to_matrix()
    with pytest.raises(ValueError, match="value must be"):
        system.to_matrix(Q)


def test_reversed_power_is_the_decay_of_s6():
    z = U @ W[0].T
    system = from_qlstm(U, *W[:4], forget="reversed", power=2.5)
    torch.testing.assert_close(system.decay, torch.sigmoid(-z) ** 2.5)
    assert system.state_size == D


def test_gradients_flow_through_a_system():
    weight = W[0].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda w: from_rglru(U, w, W[1], ROW).scan(U), (weight,))


def test_rejections():
    with pytest.raises(ValueError, match="normalizer must be"):
        from_normalized_attention(U, Q, K, W[0], ROW, normalizer="tanh")
    with pytest.raises(ValueError, match="forget must be"):
        from_qlstm(U, *W[:4], forget="backwards")
    with pytest.raises(ValueError, match="decay .batch"):
        LinearSystem(torch.ones(1, 3, 2), torch.ones(1, 3, 3, 1), torch.ones(1, 3, 1, 2))
    with pytest.raises(ValueError, match="u must be"):
        from_qlstm(U, *W[:4]).scan(U[:, 1:])
