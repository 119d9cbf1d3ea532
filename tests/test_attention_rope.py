"""lib.attention.rope against rotations of the complex plane."""

import pytest
import torch

from lib.attention import rope


def test_rope_is_a_rotation_of_the_complex_plane():
    x = torch.randn(2, 3, 7, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turned = rope(x, start=4, base=100.0)
    as_complex = torch.complex(x[..., :5], x[..., 5:])
    for position in range(7):
        for pair in range(5):
            angle = torch.tensor((4 + position) * 100.0 ** (-2 * pair / 10), dtype=torch.float64)
            expected = as_complex[..., position, pair] * torch.polar(torch.ones_like(angle), angle)
            torch.testing.assert_close(turned[..., position, pair], expected.real)
            torch.testing.assert_close(turned[..., position, pair + 5], expected.imag)


def test_products_depend_on_the_distance_only():
    q, k = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    products = [
        (rope(q[None], start=start + 6) @ rope(k[None], start=start).T).item() for start in (0, 11, 4000)
    ]
    assert products == pytest.approx([products[0]] * 3, abs=1e-10)
    assert abs(products[0] - (q @ k).item()) > 1e-3
    torch.testing.assert_close(rope(q[None]), q[None])  # position 0 is not turned


def test_rope_of_late_positions_in_low_precision():
    x = torch.randn(1, 16, generator=torch.Generator().manual_seed(2))
    exact = rope(x.double(), start=100_003)
    torch.testing.assert_close(rope(x, start=100_003).double(), exact, rtol=0, atol=1e-5)
    assert rope(x.bfloat16(), start=3).dtype == torch.bfloat16


def test_rope_of_an_odd_dimension():
    with pytest.raises(ValueError, match="even dim, got 7"):
        rope(torch.zeros(3, 7))
