"""kernels.newton_pinv and lib.attention.newton_pinv through it: against float64 iterations and exact inverses."""

import pytest
import torch
from kernel_support import DEVICE, TOLERANCE, assert_near, every_dtype, far_rows, poison, randn

from kernels.newton_pinv import MAX_ROWS, newton_inverse
from lib.attention import newton_pinv
from lib.book import load_reference

pytestmark = pytest.mark.usefixtures(poison.__name__)


def well_conditioned(batch, rows, dtype=torch.float32, seed=0):
    matrix = randn(batch, rows, rows, seed=seed) / (3 * rows**0.5) + torch.eye(rows, device=DEVICE)
    return matrix.to(dtype)


def iterate(matrix, iters, damping=0.9):
    a = matrix.double()
    v = 2 * damping * a.mT / (a.abs().sum(-1).amax(-1) * a.abs().sum(-2).amax(-1))[:, None, None]
    for _ in range(iters):
        v = 2 * v - v @ a @ v
    return v


@every_dtype
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (2, 16), (1, 17), (2, 49), (1, MAX_ROWS)])
def test_iteration(shape, dtype):
    matrix = well_conditioned(*shape, dtype=dtype)
    for iters in (0, 3):
        found = newton_inverse(matrix, iters, 0.8)
        assert found.dtype == dtype and found.is_contiguous()
        assert_near(found, iterate(matrix, iters, 0.8))
    inverse = newton_inverse(matrix)
    assert_near(inverse, matrix.double().inverse(), factor=3)
    assert torch.equal(inverse, newton_inverse(matrix))


def test_strides():
    wide = well_conditioned(3, 40)
    for view in (
        wide.mT,
        wide[:1].expand(4, -1, -1),
        wide[::2, ::3, ::3],
        wide.permute(1, 2, 0)[:3, :3].mT[:3],
    ):
        view = view[:, : min(view.shape[1:]), : min(view.shape[1:])]
        assert_near(newton_inverse(view, 2), iterate(view, 2))
    rows = far_rows(wide[0])[None]
    assert_near(newton_inverse(rows, 2), iterate(wide[:1], 2))


@pytest.mark.parametrize("shape", [(0, 5, 5), (3, 0, 0)])
def test_empty(shape):
    assert newton_inverse(torch.ones(shape, device=DEVICE)).shape == shape
    assert newton_pinv(torch.ones(shape, device=DEVICE), impl="triton").shape == shape


def test_zeros_and_nan():
    matrix = well_conditioned(3, 20)
    alone = newton_inverse(matrix[:1])
    matrix[1] = 0
    matrix[2, 3, 4] = torch.nan
    found = newton_inverse(matrix)
    assert torch.equal(found[:1], alone) and (found[1] == 0).all() and found[2].isnan().all()


def test_bad_input_raises_before_launch():
    matrix = well_conditioned(2, 5)
    with pytest.raises(ValueError, match=r"matrix must be \(batch, m, m\), got \(5, 5\)"):
        newton_inverse(matrix[0])
    with pytest.raises(ValueError, match=r"m at most 64, got \(2, 4, 5\)"):
        newton_inverse(matrix[:, 1:])
    with pytest.raises(ValueError, match=r"m at most 64, got \(1, 65, 65\)"):
        newton_inverse(well_conditioned(1, 65))
    with pytest.raises(TypeError, match="got torch.float64"):
        newton_inverse(matrix.double())
    for iters, damping in ((-1, 0.9), (3, 0.0), (3, 1.1)):
        with pytest.raises(ValueError, match="iters must be at least 0 and damping in"):
            newton_inverse(matrix, iters, damping)


# --- through the library


@pytest.mark.parametrize("lead", [(), (2, 3)])
def test_library_values_and_gradients(lead):
    matrix = (
        well_conditioned(6, 11)[: max(1, 3 * len(lead))].reshape(*lead, 11, 11)
        if lead
        else well_conditioned(1, 11)[0]
    )
    upstream = randn(*matrix.shape, seed=5)
    wide = matrix.double().requires_grad_()
    exact = torch.linalg.inv(wide + 0.05 * torch.eye(11, dtype=torch.float64, device=DEVICE))
    exact = [exact, *torch.autograd.grad(exact, wide, upstream.double())]
    for impl in ("triton", "torch"):
        a = matrix.clone().requires_grad_()
        inverse = newton_pinv(a, iters=12, ridge=0.05, impl=impl)
        for found, wanted in zip((inverse, *torch.autograd.grad(inverse, a, upstream)), exact, strict=True):
            assert_near(found, wanted)


def test_library_agrees_with_the_reference():
    reference = load_reference("softmax-free-attention", "newton_inverse")
    matrix = well_conditioned(1, 13)[0]
    found = newton_pinv(matrix, iters=15, damping=1.0, impl="triton")
    torch.testing.assert_close(
        found, reference(matrix.double(), 15).to(found), rtol=1e-4, atol=TOLERANCE[torch.float32]
    )


def test_library_limits():
    with pytest.raises(TypeError, match="float64"):
        newton_pinv(well_conditioned(1, 4).double(), impl="triton")
    with pytest.raises(ValueError, match="m at most 64"):
        newton_pinv(well_conditioned(1, 70), impl="triton")
    assert newton_pinv(well_conditioned(1, 70).double()).dtype == torch.float64
    with pytest.raises(ValueError, match="impl must be"):
        newton_pinv(well_conditioned(1, 4), impl="blocked")
