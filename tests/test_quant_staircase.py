"""lib.quant.staircase against a uniform quantiser in numpy."""

import numpy as np
import pytest
import torch

from lib.book import load_reference
from lib.quant import StaircaseKVCache, quantise


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(x, bits):
    """One group, (n,), in float64, with the range rounded to float16."""
    x = np.asarray(x, dtype=np.float64)
    low = float(np.float16(x.min()))
    step = float(np.float16(x.max()) - np.float16(x.min())) / (2**bits - 1)
    return low + step * np.clip(np.rint((x - low) / step), 0, 2**bits - 1)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("dim", [-1, -2])
def test_equals_numpy(bits, dim):
    x = draw(2, 3, 16, 24) * 5 + 1
    held = quantise(x, bits, group=8, dim=dim)
    back = held.dequantise()
    rows = x.transpose(dim, -1).reshape(-1, 8)
    expected = torch.from_numpy(np.stack([uniform(row, bits) for row in rows.numpy()])).float()
    torch.testing.assert_close(back.transpose(dim, -1).reshape(-1, 8), expected)
    assert held.nbytes == x.numel() * bits // 8 + x.numel() // 8 * 4


def test_widths_that_divide_each_other_lose_nothing_on_the_way():
    x = draw(5, 64, 32).double()
    for dim in (-1, -2):
        fine = quantise(x, 8, group=16, dim=dim)
        direct = quantise(x, 2, group=16, dim=dim).dequantise(torch.float64)
        assert torch.equal(fine.requantise(4).requantise(2).dequantise(torch.float64), direct)


def test_constant_groups():
    x = torch.full((4, 8), 0.25)
    assert torch.equal(quantise(x, 2, group=8).dequantise(), x)


def test_cache_by_hand():
    k, v = draw(2, 27, 16), draw(2, 27, 16, seed=1)
    cache = StaircaseKVCache((8, 4, 2), window=4, group=4)
    start = 0
    for new in (1, 2, 7, 1, 16):
        cache.append(k[:, start : start + new], v[:, start : start + new])
        start += new
        assert len(cache) == start
    assert [pair[0].bits for pair in cache.windows] == [2, 2, 2, 2, 4, 8]
    read_k, read_v = cache.read()
    assert torch.equal(read_k[:, 24:], k[:, 24:]) and torch.equal(read_v[:, 24:], v[:, 24:])
    for window, bits in enumerate([2, 2, 2, 2, 4, 8]):
        part = slice(4 * window, 4 * window + 4)
        for i in range(2):
            for c in range(16):
                expected = uniform(k[i, part, c].numpy(), bits)
                np.testing.assert_allclose(read_k[i, part, c].numpy(), expected, atol=1e-5)
            for t in range(4 * window, 4 * window + 4):
                for c in range(0, 16, 4):
                    expected = uniform(v[i, t, c : c + 4].numpy(), bits)
                    np.testing.assert_allclose(read_v[i, t, c : c + 4].numpy(), expected, atol=1e-5)
    one = 2 * 4 * 16  # numbers of a window
    assert cache.nbytes == 2 * (one * (4 * 2 + 4 + 8) // 8 + 6 * one // 4 * 4 + 2 * 3 * 16 * 4)


def test_cache_does_not_depend_on_the_portions():
    k, v = draw(3, 40, 8), draw(3, 40, 8, seed=1)
    whole, single = (StaircaseKVCache((4, 1), window=8, group=8) for _ in range(2))
    whole.append(k, v)
    for t in range(40):
        single.append(k[:, t : t + 1], v[:, t : t + 1])
    for a, b in zip(whole.read(), single.read(), strict=True):
        assert torch.equal(a, b)
    assert whole.nbytes == single.nbytes


def test_bad_input():
    for bits, group, dim, message in (
        (3, 8, -1, "bits must"),
        (8, 5, -1, "group must"),
        (2, 2, -1, "fill bytes"),
        (8, 8, 0, "dim must"),
    ):
        with pytest.raises(ValueError, match=message):
            quantise(draw(8, 16), bits, group=group, dim=dim)
    with pytest.raises(ValueError, match="float16"):
        quantise(torch.full((4, 8), 1e6), 8, group=8)
    for stairs in ((), (2, 4), (8, 5)):
        with pytest.raises(ValueError, match="stairs must"):
            StaircaseKVCache(stairs)
    with pytest.raises(ValueError, match="divide window"):
        StaircaseKVCache(window=8, group=3)
    with pytest.raises(ValueError, match="empty"):
        StaircaseKVCache().read()
    with pytest.raises(ValueError, match="same tokens"):
        StaircaseKVCache().append(draw(2, 3, 8), draw(2, 4, 8))


def test_reference_cell():
    reference = load_reference("probabilistic-flash-attention", "staircase")
    keys = draw(45, 16).half().float()
    cache = StaircaseKVCache((8, 4, 2), window=8, group=8)
    cache.append(keys, keys)
    # a range in float16 moves a number over a border now and then
    off = (cache.read()[0] - reference(keys, (8, 4, 2), 8)).abs()
    assert (off < 1e-2).double().mean() > 0.98 and off.mean() < 0.01
