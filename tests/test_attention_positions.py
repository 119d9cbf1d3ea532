"""lib.attention.positions against loops and scipy."""

import pytest
import scipy.special
import torch
import torch.nn.functional as F

from lib.attention import alibi_slopes, distance_bias, harmonic_numbers, rope, rope_alibi
from lib.book import load_reference

DOUBLE = {"dtype": torch.float64}


def draw(*shape, seed=0):
    return torch.randn(*shape, **DOUBLE, generator=torch.Generator().manual_seed(seed))


def test_harmonic_numbers():
    h = harmonic_numbers(500)
    expected = scipy.special.digamma(torch.arange(1, 501, **DOUBLE).numpy()) + 0.5772156649015329
    torch.testing.assert_close(h, torch.from_numpy(expected), atol=1e-12, rtol=1e-12)
    assert harmonic_numbers(0).shape == (0,) and harmonic_numbers(1).tolist() == [0.0]


def test_slopes():
    torch.testing.assert_close(alibi_slopes(8), torch.tensor([2.0**-h for h in range(1, 9)]))
    with pytest.raises(ValueError, match="num_heads"):
        alibi_slopes(0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bias", ["linear", "harmonic", "none"])
@pytest.mark.parametrize("lengths", [(6, 6), (2, 7), (1, 1)])
def test_equals_a_loop(lengths, bias, causal):
    queries, keys = lengths
    q, k, v = draw(2, 3, queries, 4), draw(2, 3, keys, 4, seed=1), draw(2, 3, keys, 5, seed=2)
    slopes = torch.tensor([0.5, 1.0, 2.0], **DOUBLE)
    rotated = rope(torch.cat([q.new_zeros(2, 3, keys - queries, 4), q], 2))[:, :, keys - queries :]
    scores = rotated @ rope(k).mT / 2
    for h in range(3):
        for i in range(queries):
            for j in range(keys):
                r = keys - queries + i - j
                lost = {"linear": abs(r), "harmonic": sum(1 / n for n in range(1, abs(r) + 1)), "none": 0}[
                    bias
                ]
                scores[:, h, i, j] -= slopes[h] * lost
                if causal and r < 0:
                    scores[:, h, i, j] = -torch.inf
    out, weights = rope_alibi(q, k, v, slopes=slopes, bias=bias, causal=causal, return_weights=True)
    torch.testing.assert_close(weights, scores.softmax(-1))
    torch.testing.assert_close(out, scores.softmax(-1) @ v)


def test_mask_and_no_rotation():
    q, k, v = draw(1, 2, 5, 4), draw(1, 2, 5, 4, seed=1), draw(1, 2, 5, 4, seed=2)
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[2] = False
    out = rope_alibi(q, k, v, bias="none", rotate=False, causal=False, mask=mask)
    full = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out[:, :, [0, 1, 3, 4]], full[:, :, [0, 1, 3, 4]])
    assert (out[:, :, 2] == 0).all()


def test_bad_input():
    q = draw(1, 2, 5, 4)
    with pytest.raises(ValueError, match="bias must be"):
        distance_bias(3, 3, torch.ones(2), bias="square")
    with pytest.raises(ValueError, match="slopes must be"):
        distance_bias(3, 3, torch.ones(2, 1))
    with pytest.raises(ValueError, match=r"slopes must be \(2,\)"):
        rope_alibi(q, q, q, slopes=torch.ones(3))


def test_reference_cell():
    reference = load_reference("probabilistic-flash-attention", "harmonic_attention")
    q, k, v = draw(1, 2, 9, 4), draw(1, 2, 9, 4, seed=1), draw(1, 2, 9, 4, seed=2)
    out = rope_alibi(q, k, v, slopes=torch.tensor([0.5, 0.5]), causal=True)
    torch.testing.assert_close(out, reference(rope(q), rope(k), v, 0.5), atol=1e-6, rtol=1e-6)
