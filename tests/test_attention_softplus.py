"""lib.attention.softplus against NumPy, torch's attention, finite differences and the chapter's reference cells."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lib.attention import normalised_positive_attention, softplus_attention
from lib.attention.kinds import KINDS
from lib.book import load_reference
from lib.train import PeakTensor

SLUG = "softplus-attention"


def tensors(*shapes, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
        for shape in shapes
    ]


def oracle(q, k, v, allowed, p=None, offset=1.0, warm_rows=3):
    """The two formulas for one head, row by row, in NumPy; `allowed` (queries, keys)."""
    q, k, v = (x.detach().double().numpy() for x in (q, k, v))
    out, weights = np.zeros((len(q), v.shape[1])), np.zeros((len(q), len(k)))
    for i in range(len(q)):
        seen = np.flatnonzero(allowed[i])
        n = len(seen)
        if not n:
            continue
        cosines = k[seen] @ q[i] / np.linalg.norm(k[seen], axis=1) / np.linalg.norm(q[i])
        a = np.log1p(np.exp(math.log(q.shape[1]) * math.log(n) * cosines))
        a /= a.sum()
        if p is not None:
            kept = np.maximum(a * n - (0 if n <= warm_rows else offset), 0)
            if kept.max() > 1e-13:
                a = (kept / kept.max()) ** p
                a /= a.sum()
        weights[i, seen] = a
        out[i] = a @ v[seen]
    return out, weights


@pytest.mark.parametrize("p", [None, 1, 15])
@pytest.mark.parametrize("queries, keys", [(1, 1), (3, 11), (9, 4), (13, 13)])
@pytest.mark.parametrize("kind", ["full", "causal", "mask", "both"])
def test_oracle_both_forms(p, queries, keys, kind):
    q, k, v = tensors((2, 2, queries, 6), (2, 2, keys, 6), (2, 2, keys, 5))
    causal, mask = kind in ("causal", "both"), None
    allowed = torch.ones(2, 1, queries, keys, dtype=torch.bool)
    if kind in ("mask", "both"):
        mask = torch.rand(2, 1, queries, keys, generator=torch.Generator().manual_seed(2)) > 0.4
        mask[:, :, queries // 2] = False
        allowed = allowed & mask
    if causal:
        allowed = allowed & torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    options = {"causal": causal, "mask": mask, "p": p}
    out, weights = softplus_attention(q, k, v, return_weights=True, **options)
    for b in range(2):
        for h in range(2):
            expected = oracle(q[b, h], k[b, h], v[b, h], allowed[b, 0], p)
            np.testing.assert_allclose(weights[b, h].detach(), expected[1], atol=1e-12)
            np.testing.assert_allclose(out[b, h].detach(), expected[0], atol=1e-12)
    grad = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    expected = torch.autograd.grad(out, (q, k, v), grad)
    for block_size in (3, 100):
        lean = softplus_attention(q, k, v, block_size=block_size, **options)
        torch.testing.assert_close(lean, out)
        for a, b in zip(torch.autograd.grad(lean, (q, k, v), grad), expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("p", [None, 3])
@pytest.mark.parametrize("block_size", [None, 2])
def test_gradcheck(p, block_size):
    inputs = tensors((1, 5, 4), (1, 6, 4), (1, 6, 2))
    assert torch.autograd.gradcheck(
        lambda q, k, v: softplus_attention(q, k, v, causal=True, p=p, block_size=block_size), inputs
    )


def test_rows_without_anything_above_average():
    q, k, v = tensors((8, 16), (8, 16), (8, 3))
    out = softplus_attention(q, k, v, causal=True, p=15)
    torch.testing.assert_close(out[0], v[0])  # row 1: n a - 1 = 0
    for dtype in (torch.float64, torch.float32, torch.float16):
        same = k[:1].expand(8, 16).to(dtype)  # every row uniform, up to rounding
        for block_size in (None, 3):
            args = (q.to(dtype), same, v.to(dtype))
            options = {"causal": True, "p": 15, "block_size": block_size}
            out = softplus_attention(*args, warm_rows=0, **options)
            expected = v.to(dtype).double().cumsum(0) / torch.arange(1, 9)[:, None]
            torch.testing.assert_close(out.double(), expected, atol=2e-3, rtol=1e-3)
            gradients = torch.autograd.grad(out.sum(), (q, v))
            assert all(g.isfinite().all() for g in gradients)
    # with an offset that nothing reaches every row falls back
    torch.testing.assert_close(
        softplus_attention(q, k, v, p=15, offset=8.0), softplus_attention(q, k, v), atol=1e-12, rtol=0
    )


def test_warm_rows_have_no_offset():
    q, k, v = tensors((6, 16), (6, 16), (6, 3))
    first = softplus_attention(q, k, v, causal=True, return_weights=True)[1]
    for warm in (0, 2, 5):
        sharp = softplus_attention(q, k, v, causal=True, p=3, warm_rows=warm, return_weights=True)[1]
        for row in range(1, 6):
            kept = first[row] ** 3 if row < warm else torch.relu(first[row] * (row + 1) - 1) ** 3
            torch.testing.assert_close(sharp[row], kept / kept.sum())


def test_large_powers_take_the_maximum():
    q, k, v = tensors((5, 16), (40, 16), (40, 3))
    cosines = F.cosine_similarity(q[:, None], k[None], dim=-1)
    out = softplus_attention(q, k, v, p=1e5)
    torch.testing.assert_close(out, v[cosines.argmax(1)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_at_the_fifteenth_power(dtype):
    q, k, v = tensors((2, 300, 32), (2, 300, 32), (2, 300, 8), dtype=dtype)
    scaled = [x.detach().double() for x in (q, k, v)]
    out = softplus_attention(q, k, v, causal=True, p=15)
    assert out.dtype == dtype and out.isfinite().all()
    expected = softplus_attention(*scaled, causal=True, p=15)
    torch.testing.assert_close(out.double(), expected, atol=0.02, rtol=0.02)
    out.float().square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_only_directions_count_and_scale_is_of_the_cosines():
    q, k, v = tensors((4, 16), (9, 16), (9, 3))
    torch.testing.assert_close(softplus_attention(3 * q, 0.1 * k, v), softplus_attention(q, k, v))
    scale = math.log(16) * math.log(9)
    torch.testing.assert_close(
        softplus_attention(q, k, v, scale=scale, p=3), softplus_attention(q, k, v, p=3)
    )
    twice = softplus_attention(q, k, v, scale=0.0)
    torch.testing.assert_close(twice, v.mean(0).expand_as(twice))


def test_memory_grows_with_the_length_only():
    peaks = {}
    for length in (256, 1024):
        for block_size in (None, 64):
            q, k, v = tensors((length, 8), (length, 8), (length, 8), dtype=torch.float32)
            with PeakTensor() as memory:
                out = softplus_attention(q, k, v, causal=True, p=15, block_size=block_size)
                out.sum().backward()
            peaks[length, block_size] = memory.peak_bytes
    assert peaks[1024, 64] < 5 * peaks[256, 64]
    assert peaks[1024, None] > 14 * peaks[256, None]


@pytest.mark.parametrize("masked", [False, True])
def test_softmax_is_exp_and_an_l1_norm(masked):
    q, k, v = tensors((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4))
    mask = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(1)) > 0.4 if masked else None
    if masked:
        mask[..., 0] = True
    ours = normalised_positive_attention(q, k, v, mask=mask)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(ours, theirs)
    grad = torch.ones_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, (q, k, v), grad), torch.autograd.grad(theirs, (q, k, v), grad), strict=True
    ):
        torch.testing.assert_close(a, b)
    huge = normalised_positive_attention(1e4 * q, k, v, causal=True)
    assert huge.isfinite().all()


@pytest.mark.parametrize("phi", ["exp", "softplus", "relu", "sigmoid", "identity"])
@pytest.mark.parametrize("l1", [True, False])
def test_other_maps(phi, l1):
    q, k, v = tensors((2, 6, 8), (2, 6, 8), (2, 6, 4))
    out, weights = normalised_positive_attention(q, k, v, phi=phi, l1=l1, causal=True, return_weights=True)
    maps = {
        "exp": torch.exp, "softplus": lambda x: torch.log1p(x.exp()), "relu": lambda x: x.clamp(min=0),
        "sigmoid": lambda x: 1 / (1 + (-x).exp()), "identity": lambda x: x,
    }  # fmt: skip
    expected = maps[phi](q @ k.mT / math.sqrt(8)).tril()
    if l1:
        expected = expected / expected.abs().sum(-1, keepdim=True).clamp(min=1e-300)
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(out, expected @ v)
    nothing = torch.zeros(6, 6, dtype=torch.bool)
    assert (normalised_positive_attention(q, k, v, phi=phi, l1=l1, mask=nothing) == 0).all()


def test_kinds_sharpen_after_training():
    q, k, v = tensors((2, 3, 7, 8), (2, 3, 7, 8), (2, 3, 7, 8))
    shape = {"dim": 24, "num_heads": 3, "context": 7, "layer": 0, "depth": 1}
    plain, sharp = KINDS["lssa"](**shape), KINDS["lssar"](**shape)
    assert (plain.p, sharp.p) == (None, 15)
    plain.p = 15
    torch.testing.assert_close(plain(q, k, v), sharp(q, k, v))
    torch.testing.assert_close(sharp(q, k, v), softplus_attention(q, k, v, causal=True, p=15))


def test_empty_and_broadcast():
    q, k, v = tensors((2, 1, 4, 8), (3, 6, 8), (3, 6, 5))
    assert softplus_attention(q, k, v, p=15).shape == (2, 3, 4, 5)
    assert softplus_attention(q, k, v, p=15, block_size=2).shape == (2, 3, 4, 5)
    assert (softplus_attention(q, k[:, :0], v[:, :0], p=15) == 0).all()
    assert softplus_attention(q[..., :0, :], k, v, p=15).shape == (2, 3, 0, 5)
    strided = torch.randn(3, 8, 6).mT
    torch.testing.assert_close(
        softplus_attention(strided, strided, strided), softplus_attention(*[strided.contiguous()] * 3)
    )


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"p": 0.5}, ValueError, "power of at least 1"),
        ({"p": math.inf}, ValueError, "power of at least 1"),
        ({"p": math.nan}, ValueError, "power of at least 1"),
        ({"warm_rows": -1}, ValueError, "warm_rows"),
        ({"block_size": 0}, ValueError, "block_size"),
        ({"block_size": 2, "return_weights": True}, ValueError, "no weights to return"),
        ({"mask": torch.ones(4, 4)}, TypeError, "boolean"),
    ],
)
def test_bad_options(options, error, message):
    q, k, v = tensors((4, 8), (4, 8), (4, 8))
    with pytest.raises(error, match=message):
        softplus_attention(q, k, v, **options)


def test_bad_shapes():
    q, k, v = tensors((4, 8), (5, 8), (5, 3))
    for function in (softplus_attention, normalised_positive_attention):
        for args in ((q, k, v[:4]), (q[:, :7], k, v), (q[0], k, v), (q[:, :0], k[:, :0], v)):
            with pytest.raises(ValueError, match="do not fit together"):
                function(*args)
    with pytest.raises(ValueError, match="phi must be one of"):
        normalised_positive_attention(q, k, v, phi="tanh")


def test_reference_cells():
    q, k, v = tensors((2, 3, 20, 8), (2, 3, 20, 8), (2, 3, 20, 8))
    lssar = load_reference(SLUG, "softplus_attention")
    for p in (None, 1, 3, 15):
        theirs, ours = lssar(q, k, v, p=p), softplus_attention(q, k, v, causal=True, p=p)
        torch.testing.assert_close(theirs, ours, atol=1e-8, rtol=1e-7)
        grad = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        for a, b in zip(
            torch.autograd.grad(theirs, (q, k, v), grad),
            torch.autograd.grad(ours, (q, k, v), grad),
            strict=True,
        ):
            torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-6)
    positive = load_reference(SLUG, "positive_attention")
    for phi, l1 in (("exp", True), ("exp", False), ("softplus", True)):
        torch.testing.assert_close(
            positive(q, k, v, {"exp": torch.exp, "softplus": F.softplus}[phi], l1),
            normalised_positive_attention(q, k, v, phi=phi, l1=l1, causal=True),
        )
