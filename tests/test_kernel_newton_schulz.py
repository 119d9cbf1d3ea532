"""kernels.newton_schulz and lib.optim.newton_schulz: against float64 products and the singular value decomposition."""

import pytest
import torch
from kernel_support import DEVICE, TOLERANCE, Grid, assert_near, every_dtype, far_rows, poison, randn

import kernels.newton_schulz
from kernels.newton_schulz import newton_schulz_step, symmetric_product
from lib.optim import MUON_COEFFICIENTS, ROOT_COEFFICIENTS, newton_schulz

pytestmark = pytest.mark.usefixtures(poison.__name__)
SHAPES = [(1, 1, 1), (2, 3, 5), (1, 31, 40), (3, 33, 7), (1, 64, 64), (2, 97, 101)]


def symmetric(*shape, **options):
    c = randn(*shape, **options)
    return c + c.mT


@every_dtype
@pytest.mark.parametrize("shape", SHAPES)
def test_symmetric_product(shape, dtype):
    x = randn(*shape, dtype=dtype)
    c = symmetric(shape[0], shape[1], shape[1], dtype=dtype, seed=1)
    wide, wide_c = x.double(), c.double()
    found = symmetric_product(x)
    assert found.dtype == dtype and found.is_contiguous()
    assert_near(found, wide @ wide.mT)
    mixed = symmetric_product(x, -0.7, c, 1.9)
    assert_near(mixed, -0.7 * wide @ wide.mT + 1.9 * wide_c)
    assert torch.equal(mixed, symmetric_product(x, -0.7, c, 1.9))


def test_strides_and_expanded_batches():
    x = randn(6, 70, 80)
    for view in (x[::2, ::3, ::2], x.mT, x[:1].expand(4, -1, -1), x[:, :1].expand(-1, 40, -1)):
        c = symmetric(1, view.shape[1], view.shape[1], seed=2).expand(len(view), -1, -1)
        wide = view.double()
        assert_near(symmetric_product(view, 1.0, c.mT, 0.5), wide @ wide.mT + 0.5 * c.double())


def test_rows_beyond_32_bits():
    x = randn(37, 5)
    exact = (x.double() @ x.double().T)[None]
    assert_near(symmetric_product(far_rows(x)[None]), exact)
    c = symmetric(37, 37, seed=3)
    assert_near(symmetric_product(x[None], 1.0, far_rows(c)[None]), exact + c.double())


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4)])
def test_empty(shape):
    x = torch.ones(shape, device=DEVICE)
    assert symmetric_product(x).shape == (shape[0], shape[1], shape[1])
    assert newton_schulz(x, impl="triton").shape == shape


def test_a_batch_beyond_the_grid_of_cuda(monkeypatch):
    monkeypatch.setattr(kernels.newton_schulz, "_symmetric_kernel", grid := Grid())
    symmetric_product(torch.ones(1, 2, 3, device=DEVICE).expand(2**16, -1, -1))
    assert grid.fits()


def test_no_columns():
    assert (symmetric_product(torch.ones(2, 3, 0, device=DEVICE)) == 0).all()


def test_infinity_and_nan_are_not_lost():
    x = randn(1, 40, 10)
    x[0, 35, 2] = torch.nan
    found = symmetric_product(x)[0].isnan()
    assert found[35].all() and found[:, 35].all() and found.sum() == 79


@every_dtype
def test_step(dtype):
    x = randn(2, 37, 53, dtype=dtype, scale=0.1)
    wide = x.double()
    gram = wide @ wide.mT
    exact = 1.5 * wide - 0.8 * gram @ wide + 0.3 * gram @ gram @ wide
    assert_near(newton_schulz_step(x, 1.5, -0.8, 0.3), exact, factor=2)


def test_bad_input_raises_before_launch():
    x = randn(2, 3, 4)
    with pytest.raises(ValueError, match=r"x must be \(batch, m, n\), got \(3, 4\)"):
        symmetric_product(x[0])
    with pytest.raises(TypeError, match="float32, bfloat16 or float16, got torch.float64"):
        symmetric_product(x.double())
    with pytest.raises(ValueError, match=r"c must be \(2, 3, 3\) for x \(2, 3, 4\), got \(2, 4, 4\)"):
        symmetric_product(x, 1.0, randn(2, 4, 4))
    with pytest.raises(TypeError, match="x is torch.float32, c must be too"):
        symmetric_product(x, 1.0, randn(2, 3, 3, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="c must be too, got meta"):
        symmetric_product(x, 1.0, torch.empty(2, 3, 3, device="meta"))


# --- the library


def polynomial(matrix, triples):
    """The steps on the singular values alone."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.square().sum(-1, keepdim=True).sqrt()
    for a, b, c in triples:
        s = a * s + b * s**3 + c * s**5
    return u @ (s[..., None] * v)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("shape", [(12, 12), (2, 3, 20, 33), (3, 33, 20), (1, 7), (5, 1)])
def test_it_acts_on_the_singular_values(shape, impl):
    matrix = randn(*shape, scale=3.0)
    exact = polynomial(matrix, 5 * [MUON_COEFFICIENTS])
    found = newton_schulz(matrix, impl=impl)
    assert found.dtype == matrix.dtype
    assert_near(found, exact, factor=20)  # five steps of products
    triples = [(1.5, -0.5, 0.0), (2.0, -1.5, 0.5)]
    assert_near(newton_schulz(matrix, triples, steps=2, impl=impl), polynomial(matrix, triples), factor=20)


def test_float64_is_exact_and_converges():
    matrix = randn(2, 20, 30).double()
    exact = polynomial(matrix, 5 * [ROOT_COEFFICIENTS[2048, 3072]])
    found = newton_schulz(matrix, ROOT_COEFFICIENTS[2048, 3072])
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-11)
    limit = newton_schulz(matrix, (1.5, -0.5, 0.0), steps=40)
    torch.testing.assert_close(
        limit @ limit.mT, torch.eye(20, dtype=torch.float64, device=DEVICE).expand(2, -1, -1)
    )


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, impl):
    matrix = randn(40, 60, dtype=dtype, scale=100.0)
    assert_near(newton_schulz(matrix, impl=impl), polynomial(matrix, 5 * [MUON_COEFFICIENTS]), factor=10)
    assert newton_schulz(matrix, impl=impl).dtype == dtype


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_scale_transpose_and_zeros(impl):
    matrix = randn(20, 30)
    found = newton_schulz(matrix, impl=impl)
    torch.testing.assert_close(newton_schulz(1e4 * matrix, impl=impl), found, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(newton_schulz(matrix.T, impl=impl), found.T, rtol=1e-5, atol=1e-6)
    both = newton_schulz(torch.stack([matrix, torch.zeros_like(matrix)]), impl=impl)
    torch.testing.assert_close(both[0], found, rtol=1e-5, atol=1e-6)
    assert (both[1] == 0).all()
    normalised = newton_schulz(matrix, steps=0, impl=impl)
    torch.testing.assert_close(normalised, matrix / matrix.norm(), rtol=TOLERANCE[torch.float32], atol=0)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_autocast_does_not_change_the_dtype(impl):
    matrix = randn(6, 9)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = newton_schulz(matrix, impl=impl)
    assert torch.equal(found, newton_schulz(matrix, impl=impl))


def test_library_rejects():
    matrix = randn(3, 4)
    assert not newton_schulz(matrix.requires_grad_()).requires_grad
    with pytest.raises(TypeError, match="matrix must be floating point"):
        newton_schulz(torch.ones(2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"matrix must be \(..., m, n\)"):
        newton_schulz(matrix[0])
    for coefficients, steps in (((1.0, 2.0), 5), ([MUON_COEFFICIENTS] * 4, 5), (MUON_COEFFICIENTS, -1)):
        with pytest.raises(ValueError, match="one such triple for each"):
            newton_schulz(matrix, coefficients, steps=steps)
    with pytest.raises(TypeError, match="use impl='torch' for float64"):
        newton_schulz(matrix.double(), impl="triton")
    with pytest.raises(ValueError, match="impl must be"):
        newton_schulz(matrix, impl="cuda")
