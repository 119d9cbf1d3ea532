"""The kernels of `kernels.linear_scan` against the loop in float64: natively on CUDA, else interpreted."""

import pytest
import torch
from kernel_support import DEVICE, assert_near, every_dtype, far_rows, poison, randn  # noqa: F401

from lib.attention import diagonal_scan

pytest.importorskip("triton")
from kernels.linear_scan import linear_scan_backward, linear_scan_forward  # noqa: E402


def exact(decay, inputs, initial=None):
    """The loop over (outer, length, inner)."""
    state = torch.zeros_like(inputs[:, 0]) if initial is None else initial
    states = []
    for factor, value in zip(decay.unbind(1), inputs.unbind(1), strict=True):
        state = factor * state + value
        states.append(state)
    return torch.stack(states, 1)


def problem(outer=2, length=7, inner=5, dtype=torch.float32, initial=True):
    decay = torch.sigmoid(randn(outer, length, inner, seed=1) + 1).to(dtype)
    decay[:, length // 2] = 0
    decay[:, -1] = -1.5
    tensors = [decay, randn(outer, length, inner, dtype=dtype, seed=2)]
    tensors += [randn(outer, inner, dtype=dtype, seed=3)] if initial else []
    return [tensor.requires_grad_() for tensor in tensors]


def compare(given, dim=1, wanted=exact, dtype=None):
    results = []
    for found in (True, False):
        tensors = given if found else [x.detach().double().requires_grad_() for x in given]
        out = diagonal_scan(*tensors, dim=dim, impl="triton") if found else wanted(*tensors)
        probe = randn(*out.shape, dtype=given[0].dtype, seed=4).to(out.dtype)
        results.append([out, *torch.autograd.grad(out, tensors, probe)])
    for a, b in zip(*results, strict=True):
        assert_near(a, b, dtype)


@every_dtype
@pytest.mark.parametrize("initial", [True, False])
def test_values_and_gradients(dtype, initial, poison):  # noqa: F811
    compare(problem(dtype=dtype, initial=initial))


@pytest.mark.parametrize("outer, length, inner", [(1, 1, 1), (1, 5, 67), (3, 4, 64), (70, 3, 1), (5, 2, 13)])
def test_sizes(outer, length, inner, poison):  # noqa: F811
    compare(problem(outer, length, inner))


def test_any_dimension_and_broadcasting():
    for dim in (0, 1, 2, -1, -2):
        tensors = [x.detach() for x in problem(3, 4, 2)]
        moved = [tensors[0].movedim(1, dim), tensors[1].movedim(1, dim), tensors[2]]
        compare(
            [x.requires_grad_() for x in moved],
            dim,
            lambda a, b, c, dim=dim: exact(a.movedim(dim, 1), b.movedim(dim, 1), c).movedim(1, dim),
        )
    decay = torch.tensor(0.9, device=DEVICE, requires_grad=True)
    inputs, initial = randn(2, 3, 4, 5, grad=True), randn(5, seed=1, grad=True)
    compare(
        [decay, inputs, initial],
        2,
        lambda a, b, c: exact(
            a.expand(6, 4, 5), b.reshape(6, 4, 5), c.expand(6, 5)
        ).reshape(2, 3, 4, 5),
    )  # fmt: skip
    one = diagonal_scan(torch.tensor(0.5, device=DEVICE), torch.ones(2, device=DEVICE), dim=0, impl="triton")
    assert one.tolist() == [1.0, 1.5]


def test_no_product_of_decays():
    """A tree of products would make nan of inf * 0, and lose what a decay of zero cuts off."""
    decay = torch.full((1, 40, 2), 1e20, device=DEVICE)
    decay[..., 1] = 1e-20
    inputs = torch.zeros(1, 40, 2, device=DEVICE)
    inputs[:, -1] = 3.0
    out = linear_scan_forward(decay, inputs)
    assert torch.equal(out, inputs)
    inputs[:, 0] = torch.inf
    decay[:, 1] = 0.5
    assert linear_scan_forward(decay, inputs)[0, :, 0].isinf().all()


def test_states_are_rounded_only_when_stored():
    decay = torch.ones(1, 300, 1, dtype=torch.bfloat16, device=DEVICE)
    assert linear_scan_forward(decay, decay)[0, -1, 0] == 300  # in bfloat16 the sum stops at 256


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("axis", range(3))
def test_beyond_32_bit_indices(which, axis):
    """A view of one argument whose dimension `axis` has a stride beyond 2^31 elements."""

    def placed(x):
        return {0: x[:, None], 1: x[None], 2: x.T[None]}[axis]  # (4, 3): what is far apart, and what is near

    values = [randn(4, 3, seed=n) for n in range(3)]
    near = [placed(x).contiguous() for x in values]
    far = [placed(far_rows(x)) if n == which else placed(x) for n, x in enumerate(values)]
    states = linear_scan_forward(*near[:2])
    if which < 2:
        assert torch.equal(linear_scan_forward(*far[:2]), states)
    given = [far[0], placed(far_rows(values[1])) if which == 1 else near[1], far[2]]
    wanted = linear_scan_backward(near[0], near[1], near[2])
    for a, b in zip(linear_scan_backward(*given), wanted, strict=True):
        assert torch.equal(a, b)


def test_same_bits_every_time_and_empty():
    given = problem(3, 6, 20)
    runs = [diagonal_scan(*given, impl="triton") for _ in range(2)]
    runs = [[out, *torch.autograd.grad(out.square().sum(), given)] for out in runs]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    given = problem(0, 6, 20)
    out = diagonal_scan(*given, impl="triton")
    assert out.shape == (0, 6, 20)
    assert torch.autograd.grad(out.sum(), given[1])[0].shape == (0, 6, 20)


@pytest.mark.parametrize("needed", range(3))
def test_gradient_of_one_input_alone(needed):
    given = [x.detach().requires_grad_(n == needed) for n, x in enumerate(problem())]
    double = [x.detach().double().requires_grad_(n == needed) for n, x in enumerate(given)]
    out = diagonal_scan(*given, impl="triton")
    probe = randn(*out.shape, seed=4)
    found = torch.autograd.grad(out, given[needed], probe)[0]
    assert_near(found, torch.autograd.grad(exact(*double), double[needed], probe.double())[0])


def test_no_second_derivative():
    given = problem()
    (first,) = torch.autograd.grad(
        diagonal_scan(*given, impl="triton").square().sum(), given[1], create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_auto_falls_back():
    decay, inputs, initial = (x.detach() for x in problem())
    assert_near(diagonal_scan(decay, inputs, initial), exact(decay, inputs, initial))
    assert diagonal_scan(decay.double(), inputs, initial).dtype == torch.float64
    assert diagonal_scan(decay, inputs.bfloat16(), impl="triton").dtype == torch.float32
    with pytest.raises(TypeError, match="float32, bfloat16 or float16"):
        diagonal_scan(decay.double(), inputs, impl="triton")
    with pytest.raises(ValueError, match="impl must be"):
        diagonal_scan(decay, inputs, impl="fast")
    with pytest.raises(ValueError, match="at least one step"):
        diagonal_scan(decay[:, :0], inputs[:, :0], impl="triton")


def test_bad_input_raises_before_launch():
    decay, inputs, initial = (x.detach() for x in problem())
    for arguments, kind, message in (
        ((decay[0], inputs), ValueError, "decay must be"),
        ((decay, inputs[:, :3]), ValueError, "inputs must be"),
        ((decay, inputs.half()), TypeError, "inputs must be too"),
        ((decay.double(), inputs), TypeError, "float32, bfloat16 or float16"),
        ((decay, inputs.to("meta")), ValueError, "inputs must be too"),
        ((decay, inputs, initial[:1]), ValueError, "initial must be"),
        ((decay, inputs, initial.half()), TypeError, "initial must be too"),
        ((decay, [1.0]), TypeError, "inputs must be a tensor"),
    ):
        with pytest.raises(kind, match=message):
            linear_scan_forward(*arguments)
    with pytest.raises(ValueError, match="grad must be"):
        linear_scan_backward(decay, inputs, inputs[:1])
    with pytest.raises(TypeError, match="states must be too"):
        linear_scan_backward(decay, inputs.half(), inputs)
