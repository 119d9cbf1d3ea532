"""The kernel of Gaussian log-sum-exps against dense float64 formulas and the chapters' reference cells."""

import math

import pytest
import torch
from kernel_support import DEVICE, TOLERANCE, assert_near, every_dtype, far_rows, poison, randn  # noqa: F401

import lib.information.mixture as mixture
from kernels.gaussian_kernel_sum import gaussian_kernel_sum_backward, gaussian_kernel_sum_forward
from lib.book import load_reference
from lib.information import conditional_cs, cs_divergence, cs_qmi, gaussian_logsumexp, mixture_entropy_bounds


def dense(x, y, variance):
    return ((x[:, None] - y[None]).square().sum(-1) / (-2 * variance)).logsumexp(1)


def compare(x, y, variance=0.7, factor=1.0):
    """Values and gradients of the kernel against float64, for a random upstream gradient."""
    width = torch.tensor(variance, dtype=x.dtype, device=DEVICE)
    upstream = randn(len(x), dtype=x.dtype, seed=7)
    inputs = [each.detach().requires_grad_() for each in (x, y, width)]
    exact = [each.detach().double().requires_grad_() for each in (x, y, width)]
    found, wanted = gaussian_logsumexp(*inputs, impl="triton"), dense(*exact)
    assert found.dtype == x.dtype
    assert_near(found, wanted, factor=factor)
    *ours, d_width = torch.autograd.grad(found, inputs, upstream)
    *theirs, exact_width = torch.autograd.grad(wanted, exact, upstream.double(), retain_graph=True)
    for mine, exactly in zip(ours, theirs, strict=True):
        assert_near(mine, exactly, factor=factor)
    # a sum over all pairs, with signs: near relative to the sum without them
    (size,) = torch.autograd.grad(wanted, exact[2], upstream.double().abs())
    assert (d_width.double() - exact_width).abs() <= factor * TOLERANCE[x.dtype] * size.abs() + 1e-12


@every_dtype
@pytest.mark.parametrize("variance", [0.1, 5.0])
@pytest.mark.usefixtures("poison")
def test_values_and_gradients(dtype, variance):
    compare(randn(37, 5, dtype=dtype, seed=1), randn(45, 5, dtype=dtype, seed=2), variance)


@pytest.mark.parametrize("rows,columns,dim", [(1, 1, 1), (1, 70, 3), (33, 1, 2), (32, 64, 16), (31, 37, 53)])
@pytest.mark.usefixtures("poison")
def test_odd_sizes(rows, columns, dim):
    compare(randn(rows, dim, seed=1), randn(columns, dim, seed=2), float(dim))


def test_empty():
    x, y = randn(0, 3, grad=True), randn(4, 3, grad=True)
    assert gaussian_kernel_sum_forward(x, y, 1.0).shape == (0,)
    lse = torch.zeros(0, device=DEVICE)
    d_x, d_y, d_variance = gaussian_kernel_sum_backward(x, y, 1.0, lse, lse)
    assert d_x.shape == (0, 3) and not d_y.any() and d_variance == 0


def test_one_sample_in_both_roles():
    x = randn(40, 3).requires_grad_()
    exact = x.detach().double().requires_grad_()
    upstream = randn(40, seed=7)
    found = gaussian_logsumexp(x, variance=0.5, impl="triton")
    wanted = dense(exact, exact, 0.5)
    assert_near(found, wanted)
    ours, theirs = (
        torch.autograd.grad(out, points, upstream.to(out.dtype))[0]
        for out, points in ((found, x), (wanted, exact))
    )
    assert_near(ours, theirs)


def test_coinciding_points_are_at_distance_zero_wherever_they_are():
    x = (1e3 + randn(5, 3)).repeat(8, 1).requires_grad_()
    out = gaussian_logsumexp(x, variance=1e-20, impl="triton")
    torch.testing.assert_close(out, torch.full((40,), math.log(8), device=DEVICE))
    compare(
        x.detach(), x.detach()[:7] + 0.5, variance=0.3, factor=3
    )  # the offset cancels in the gradient too
    far = torch.tensor([[1e4], [-1e4]], device=DEVICE)
    x = torch.cat(
        [far, randn(40, 1)]
    ).requires_grad_()  # a row far away costs the others of its block nothing
    exact = x.detach().double().requires_grad_()
    upstream = randn(42, seed=7)
    (found,) = torch.autograd.grad(gaussian_logsumexp(x, impl="triton"), x, upstream)
    (wanted,) = torch.autograd.grad(dense(exact, exact, 1.0), exact, upstream.double())
    assert_near(found[2:], wanted[2:])
    assert found[:2].abs().max() <= 1e4 * 2**-21 * upstream.abs().max()


def test_a_variance_whose_square_is_no_float32():
    x = randn(5, 3).repeat(2, 1)
    variance = torch.tensor(1e-23, device=DEVICE, requires_grad=True)
    (grad,) = torch.autograd.grad(gaussian_logsumexp(x, variance=variance, impl="triton").sum(), variance)
    assert grad == 0  # the derivative in the variance of a sum of kernels at distance 0


@pytest.mark.filterwarnings("ignore:overflow|invalid value|divide by zero")  # in lanes that are masked
def test_kernels_that_vanish():
    """exp(-1e8) is no float32, its logarithm is; and a distance beyond float32 is -inf without a nan."""
    x, y = torch.zeros(3, 2, device=DEVICE), torch.full((4, 2), 1e4, device=DEVICE)
    torch.testing.assert_close(
        gaussian_logsumexp(x, y, impl="triton"), torch.full((3,), -1e8 + math.log(4), device=DEVICE)
    )
    x[1] = 3e30
    x.requires_grad_()
    variance = torch.tensor(1.0, device=DEVICE, requires_grad=True)
    out = gaussian_logsumexp(x, y, variance, impl="triton")
    assert out[1] == -math.inf and out[[0, 2]].isfinite().all()
    grads = torch.autograd.grad(out[1], (x, variance))
    assert not any(grad.any() for grad in grads)
    broken = y.clone()
    broken[0, 0] = math.nan
    assert gaussian_logsumexp(x, broken, impl="triton").isnan().all()


def test_non_contiguous_and_expanded():
    x, y = randn(5, 20, seed=1).T, randn(30, 10, seed=2)[:, ::2]
    compare(x, y)
    compare(x[:1].expand(20, 5), y)
    compare(x, y[:, :1].expand(30, 5))
    points = x.detach().requires_grad_()
    gaussian_logsumexp(points, y, impl="triton").sum().backward()  # an upstream gradient without strides
    exact = x.detach().double().requires_grad_()
    dense(exact, y.double(), 1.0).sum().backward()
    assert_near(points.grad, exact.grad)


@every_dtype
def test_indices_beyond_32_bits(dtype):
    x, y = randn(5, 3, dtype=dtype, seed=1), randn(6, 3, dtype=dtype, seed=2)
    lse = gaussian_kernel_sum_forward(x, y, 1.0)
    assert torch.equal(gaussian_kernel_sum_forward(far_rows(x), y, 1.0), lse)
    assert torch.equal(gaussian_kernel_sum_forward(x, far_rows(y), 1.0), lse)
    near = gaussian_kernel_sum_backward(x, y, 1.0, lse, lse)
    far = gaussian_kernel_sum_backward(far_rows(x), y, 1.0, lse, lse)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(far, near, strict=True))


def test_same_bits_every_time():
    x, y = randn(70, 3, seed=1, grad=True), randn(50, 3, seed=2, grad=True)
    variance = torch.tensor(0.4, device=DEVICE, requires_grad=True)
    runs = []
    for _ in range(2):
        out = gaussian_logsumexp(x, y, variance, impl="triton")
        runs.append([out, *torch.autograd.grad(out.square().sum(), (x, y, variance))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("needed", range(3))
def test_gradient_of_one_input_alone(needed):
    inputs = [randn(37, 40, seed=1), randn(20, 40, seed=2), torch.tensor(40.0, device=DEVICE)]
    inputs[needed].requires_grad_()
    exact = [each.detach().double().requires_grad_(number == needed) for number, each in enumerate(inputs)]
    upstream = randn(37, seed=7)
    (found,) = torch.autograd.grad(gaussian_logsumexp(*inputs, impl="triton"), inputs[needed], upstream)
    (wanted,) = torch.autograd.grad(dense(*exact), exact[needed], upstream.double())
    assert_near(found, wanted)
    out = gaussian_kernel_sum_backward(
        inputs[0].detach(), inputs[1].detach(), 40.0, upstream, upstream,
        needs=[number == needed for number in range(3)],
    )  # fmt: skip
    assert [each is not None for each in out] == [number == needed for number in range(3)]


def test_a_second_derivative_raises():
    x = randn(4, 2, grad=True)
    (grad,) = torch.autograd.grad(gaussian_logsumexp(x, impl="triton").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_entropy_bounds():
    x = randn(40, 3, grad=True)
    variance = torch.tensor(0.3, device=DEVICE, requires_grad=True)
    results = []
    for impl, inputs in (
        ("triton", (x, variance)),
        ("torch", [each.detach().double().requires_grad_() for each in (x, variance)]),
    ):
        lower, upper = mixture_entropy_bounds(*inputs, impl=impl)
        results.append([lower, upper, *torch.autograd.grad(lower - 3 * upper, inputs)])
    for ours, theirs in zip(*results, strict=True):
        assert_near(ours, theirs, factor=3)


@pytest.mark.parametrize("name", ["divergence", "conditional", "released", "qmi", "normalised"])
def test_cauchy_schwarz(name):
    call = {
        "divergence": lambda x, y, p, impl: cs_divergence(x, y[:25, :2], 0.8, impl=impl),
        "conditional": lambda x, y, p, impl: conditional_cs(x, y, p, 0.9, 0.6, impl=impl),
        "released": lambda x, y, p, impl: conditional_cs(x, y, p, 0.9, 0.6, "released", impl=impl),
        "qmi": lambda x, y, p, impl: cs_qmi(x, y, 0.9, 0.6, impl=impl) + p.sum(),
        "normalised": lambda x, y, p, impl: cs_qmi(x, y, 0.9, 0.6, normalised=True, impl=impl) + p.sum(),
    }[name]
    inputs = [randn(33, width, seed=seed, grad=True) for seed, width in enumerate((2, 3, 3))]
    exact = [each.detach().double().requires_grad_() for each in inputs]
    used = 2 if name == "divergence" else 3
    results = []
    for impl, points in (("triton", inputs), ("torch", exact), ("blockwise", exact)):
        out = call(*points, impl)
        results.append([out, *torch.autograd.grad(-2 * out, points[:used])])
    for ours, theirs, blockwise in zip(*results, strict=True):
        assert_near(ours, theirs, factor=10)  # of the logarithms' scale, beside which a divergence is small
        torch.testing.assert_close(theirs, blockwise)


def test_reference_cells():
    x, y = randn(30, 2, seed=1), randn(20, 2, seed=2)
    reference = load_reference("cauchy-schwarz-bottleneck", "cauchy_schwarz")
    assert_near(cs_divergence(x, y, 0.7, impl="triton"), reference(x.double(), y.double(), 0.7), factor=10)


def test_auto_falls_back_and_unknown_raises(monkeypatch):
    x = randn(40, 3)
    assert torch.equal(gaussian_logsumexp(x), gaussian_logsumexp(x, impl="blockwise")) or DEVICE == "cuda"
    torch.testing.assert_close(gaussian_logsumexp(x, impl="torch"), gaussian_logsumexp(x))
    monkeypatch.setattr(mixture, "BLOCK", 64)
    torch.testing.assert_close(
        gaussian_logsumexp(x.double(), impl="auto"), gaussian_logsumexp(x.double(), impl="torch")
    )
    with pytest.raises(TypeError, match="float16"):
        gaussian_logsumexp(x.double(), impl="triton")
    with pytest.raises(ValueError, match="impl must be"):
        gaussian_logsumexp(x, impl="dense")
    with pytest.raises(ValueError, match="same d"):
        gaussian_logsumexp(x, x[:, :2], impl="triton")
    with pytest.raises(ValueError, match="positive"):
        gaussian_logsumexp(x, variance=0.0, impl="triton")


def test_bad_input_raises_before_launch():
    x, y, lse = randn(5, 3), randn(4, 3), torch.zeros(5, device=DEVICE)
    for error, match, call in (
        (ValueError, "x must be", lambda: gaussian_kernel_sum_forward(x[0], y, 1.0)),
        (ValueError, "x must be", lambda: gaussian_kernel_sum_forward(x, y[:, :2], 1.0)),
        (ValueError, "at least 1", lambda: gaussian_kernel_sum_forward(x, y[:0], 1.0)),
        (TypeError, "y must be too", lambda: gaussian_kernel_sum_forward(x, y.half(), 1.0)),
        (TypeError, "x must be float32", lambda: gaussian_kernel_sum_forward(x.double(), y, 1.0)),
        (ValueError, "y must be too", lambda: gaussian_kernel_sum_forward(x, y.to("meta"), 1.0)),
        (ValueError, "variance must be", lambda: gaussian_kernel_sum_forward(x, y, math.inf)),
        (ValueError, "variance must be", lambda: gaussian_kernel_sum_forward(x, y, lse[0])),
        (ValueError, "lse must be", lambda: gaussian_kernel_sum_backward(x, y, 1.0, lse[:4], lse)),
        (ValueError, "upstream must be", lambda: gaussian_kernel_sum_backward(x, y, 1.0, lse, lse[:4])),
    ):
        with pytest.raises(error, match=match):
            call()
