"""The kernels of `kernels.lightning_attention` against the matrix of all weights in float64: natively on CUDA, else interpreted."""

import pytest
import torch
from kernel_support import DEVICE, assert_near, every_dtype, far_rows, poison, randn  # noqa: F401

from lib.attention import lightning_attention, lightning_step
from lib.book import load_reference

pytest.importorskip("triton")
from kernels.lightning_attention import lightning_backward, lightning_forward  # noqa: E402

DECAY = torch.tensor([0.9, 0.0, 1.0, 0.997], dtype=torch.float64, device=DEVICE)


def exact(q, k, v, decay, state=None, documents=None):
    """out and the last state of (batch, heads, length, .), from the matrix of all weights."""
    place = torch.arange(q.shape[-2], device=q.device)
    gap = place[:, None] - place
    decay = decay.to(torch.float64)[..., None, None]
    matrix = decay ** gap.clamp(min=0) * (gap >= 0)
    if documents is not None:
        matrix = matrix * (documents[..., :, None] == documents[..., None, :])
    out = ((q @ k.mT) * matrix) @ v
    end = (k * matrix[..., -1, :, None]).mT @ v
    if state is not None:
        out = out + decay ** (place[:, None] + 1) * (q @ state)
        end = end + decay ** len(place) * state
    return out, end


def problem(batch=1, heads=2, length=37, dim=20, width=19, dtype=torch.float32, state=False):
    shapes = [(batch, heads, length, n) for n in (dim, dim, width)]
    tensors = [randn(*shape, dtype=dtype, seed=n, grad=True) for n, shape in enumerate(shapes)]
    return [*tensors, randn(batch, heads, dim, width, grad=True)] if state else tensors


def compare(inputs, decay, documents=None, with_end=True, dtype=None):
    """Values and gradients of the library's hook and the kernel in it, with random upstream gradients."""
    results = []
    for impl in ("triton", "exact"):
        if impl == "triton":
            given = inputs
            out, end = lightning_attention(
                *given[:3], decay, state=given[3] if len(given) > 3 else None, documents=documents,
                return_state=True, impl=impl,
            )  # fmt: skip
            assert out.dtype == given[0].dtype and end.dtype == torch.float32
        else:
            given = [x.detach().double().requires_grad_() for x in inputs]
            out, end = exact(*given[:3], decay, given[3] if len(given) > 3 else None, documents)
        total = (out.double() * randn(*out.shape, seed=5).double()).sum()
        if with_end:
            total = total + (end.double() * randn(*end.shape, seed=6).double()).sum()
        results.append([out, end, *torch.autograd.grad(total, given)])
    dtype = inputs[0].dtype if dtype is None else dtype
    for found, wanted in zip(*results, strict=True):
        assert_near(found, wanted, dtype)


@every_dtype
def test_values_and_gradients(dtype, poison):  # noqa: F811
    compare(problem(dtype=dtype, heads=2, length=71, state=True), DECAY[::3])


@pytest.mark.parametrize(
    "batch, length, dim, width", [(1, 1, 1, 1), (2, 5, 3, 2), (1, 32, 16, 16), (1, 33, 33, 7), (1, 67, 7, 33)]
)
def test_sizes(batch, length, dim, width, poison):  # noqa: F811
    compare(problem(batch, 1, length, dim, width), DECAY[:1])


def test_decays_of_zero_and_one():
    compare(problem(1, 2, 35, 5, 6, state=True), DECAY[1:3])
    q, k, v = (x.detach() for x in problem(1, 1, 35, 5, 6))
    out, end = lightning_forward(q, k, v, DECAY[1])  # 0^0 = 1: a token sees itself
    assert_near(out, (q * k).sum(-1, keepdim=True) * v)
    assert_near(end, k[..., -1, :, None] * v[..., -1, None, :])


def test_slow_and_fast_decays_over_many_chunks():
    decay = torch.tensor([0.9999, 1e-300], dtype=torch.float64, device=DEVICE)
    compare(problem(1, 2, 131, 3, 2), decay)


def test_a_decay_is_not_rounded_to_float32():
    decay = torch.tensor([0.9999], device=DEVICE).double() + 2.5e-8  # less than half a unit in the last place
    zeros, state = torch.zeros(1, 1, 640, 1, device=DEVICE), torch.ones(1, 1, 1, 1, device=DEVICE)
    _, end = lightning_forward(zeros, zeros, zeros, decay, state=state)
    assert end.item() == pytest.approx(decay.item() ** 640, rel=4e-6)


@every_dtype
def test_documents(dtype, poison):  # noqa: F811
    # borders inside a block, on that of a chunk, and a document over more than two chunks
    lengths = torch.tensor([3, 29, 1, 39, 2], device=DEVICE)
    documents = torch.tensor([4, 0, 7, 1, 9], device=DEVICE).repeat_interleave(lengths)[:74]
    compare(problem(1, 1, 74, 5, 6, dtype=dtype), DECAY[2:3], documents)
    compare(problem(1, 1, 74, 5, 6, dtype=dtype), DECAY[:1], documents.to(torch.int16))


def test_documents_of_each_sequence():
    documents = torch.tensor([[0] * 32 + [1] * 3, [2] * 5 + [2**40] * 30], device=DEVICE)
    compare(problem(2, 1, 35, 4, 3), DECAY[:1], documents[:, None])


def test_fewer_queries_than_keys_and_a_state_handed_on():
    q, k, v = problem(1, 2, 45, 4, 3)
    decay = DECAY[::3]
    wanted, _ = exact(*(x.double() for x in (q, k, v)), decay)
    probe = randn(1, 2, 8, 3, seed=9).double()
    wanted = [wanted[..., 37:, :], *torch.autograd.grad((wanted[..., 37:, :] * probe).sum(), (q, k, v))]
    last = lightning_attention(q[..., 37:, :], k, v, decay, impl="triton")
    _, state = lightning_attention(
        *(x[..., :37, :] for x in (q, k, v)), decay, impl="triton", return_state=True
    )
    rest = lightning_attention(*(x[..., 37:, :] for x in (q, k, v)), decay, state=state, impl="triton")
    for out in (last, rest):
        found = [out, *torch.autograd.grad((out.double() * probe).sum(), (q, k, v))]
        for a, b in zip(found, wanted, strict=True):
            assert_near(a, b, torch.float32)
    step, _ = lightning_step(state, *(x[..., 37, :] for x in (q, k, v)), decay)
    assert_near(step, wanted[0][..., 0, :])


@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_states_are_float32_inside_of_autocast(impl):
    q, k, v = (x.detach() for x in problem(1, 2, 45, 4, 3))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        _, whole = lightning_attention(q, k, v, 0.9, impl=impl, chunk=64, return_state=True)
        _, parts = lightning_attention(q[..., 37:, :], k, v, 0.9, impl=impl, return_state=True)
    wanted = exact(*(x.double() for x in (q, k, v)), DECAY[:1])[1]
    for state in (whole, parts):
        assert state.dtype == torch.float32
        assert_near(state, wanted)


def test_reference_cell():
    reference = load_reference("lightning-attention", "lightning_parallel")
    q, k, v = (x.detach().requires_grad_() for x in problem(1, 1, 40, 6, 5))
    results = []
    for found in (True, False):
        given = [x.detach() if found else x.detach()[0, 0].double().cpu() for x in (q, k, v)]
        given = [x.requires_grad_() for x in given]
        out = lightning_attention(*given, 0.8, impl="triton") if found else reference(*given, 0.8)
        grads = torch.autograd.grad((out.reshape(40, 5).cpu() * randn(40, 5, seed=3).cpu()).sum(), given)
        results.append([x.reshape(x.shape[-2:]).cpu() for x in (out, *grads)])
    for found, wanted in zip(*results, strict=True):
        assert_near(found, wanted)


def test_any_leading_dimensions_and_broadcasting():
    q, k, v = (x.detach() for x in problem(1, 1, 9, 3, 4))
    wanted = exact(*(x.double() for x in (q, k, v)), DECAY[:1])[0][0, 0]
    assert_near(lightning_attention(q[0, 0], k[0, 0], v[0, 0], 0.9, impl="triton"), wanted)
    out = lightning_attention(q[0].expand(2, 1, 9, 3)[:, None], k, v[0], DECAY[:2], impl="triton")
    assert out.shape == (2, 1, 2, 9, 4)
    assert_near(out[1, 0, 0], wanted)
    assert_near(out[0, 0, 1], exact(*(x.double() for x in (q, k, v)), DECAY[1:2])[0][0, 0])


def test_empty():
    q, k, v = problem(0, 2, 9, 3, 4)
    out, state = lightning_attention(q, k, v, DECAY[:2], impl="triton", return_state=True)
    assert out.shape == (0, 2, 9, 4) and state.shape == (0, 2, 3, 4)
    assert torch.autograd.grad(out.sum() + state.sum(), v)[0].shape == v.shape
    q, k, v = problem(1, 2, 9, 0, 4)
    assert lightning_attention(q, k, v, DECAY[:2], impl="triton").count_nonzero() == 0


def test_strides():
    q, k, v = (x.detach() for x in problem(2, 2, 18, 5, 6))
    q = q.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()  # the layout of a model
    k = k[:1].mT.contiguous().mT.expand(2, 2, 18, 5).detach().requires_grad_()
    v = v.repeat_interleave(2, -1)[..., ::2].requires_grad_()
    assert k.stride(0) == 0 and k.stride(3) != 1 and v.stride(3) == 2
    compare([q, k, v], DECAY[::3])
    out = lightning_attention(q, k, v, DECAY[::3], impl="triton")
    expanded = torch.autograd.grad(out.sum(), (q, k, v))  # an upstream gradient without strides
    again = lightning_attention(q, k, v, DECAY[::3], impl="triton")
    written = torch.autograd.grad(again, (q, k, v), torch.ones_like(again))
    assert all(torch.equal(a, b) for a, b in zip(expanded, written, strict=True))


@pytest.mark.parametrize("far", range(4))
def test_rows_beyond_32_bit_indices(far):
    tensors = [randn(4, 3, seed=n) for n in range(4)]
    tensors[far] = far_rows(tensors[far])
    q, k, v, grad = (x[None, None] for x in tensors)
    out, end = lightning_forward(q, k, v, DECAY[:1])
    inputs = [x.detach().double().requires_grad_() for x in (q, k, v)]
    wanted = exact(*inputs, DECAY[:1])
    assert_near(out, wanted[0].detach())
    assert_near(end, wanted[1].detach())
    found = lightning_backward(q, k, v, DECAY[:1], grad)[:3]
    for a, b in zip(found, torch.autograd.grad(wanted[0], inputs, grad.double()), strict=True):
        assert_near(a, b)


@pytest.mark.parametrize("view", ["batch", "heads", "columns"])
def test_other_strides_beyond_32_bit_indices(view):
    def placed(x):  # (4, 3) as the dimensions that are far apart and near, the others of size 1
        far = far_rows(x)
        return {"batch": far[:, None, None], "heads": far[None, :, None], "columns": far.T[None, None]}[view]

    values = [randn(4, 3, seed=n) for n in range(3)]
    far = [placed(x) for x in values]
    near = [x.contiguous() for x in far]
    grad = torch.ones_like(near[2])
    for a, b in zip(lightning_forward(*far, DECAY[:1]), lightning_forward(*near, DECAY[:1]), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(
        lightning_backward(*far, DECAY[:1], placed(torch.ones_like(values[2]))),
        lightning_backward(*near, DECAY[:1], grad),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_far_documents():
    q, k, v = (x.detach() for x in problem(1, 1, 4, 3, 3))
    documents = torch.tensor([[0], [0], [1], [1]], dtype=torch.int32, device=DEVICE)
    far = far_rows(documents.view(torch.float32)).view(torch.int32)[None, None, :, 0]
    out, _ = lightning_forward(q, k, v, DECAY[:1], documents=far)
    assert_near(out, exact(*(x.double() for x in (q, k, v)), DECAY[:1], documents=documents.mT[None])[0])


def test_float16_neither_overflows_nor_vanishes():
    q, k, v = (x.detach() for x in problem(1, 1, 35, 16, 4, dtype=torch.float16))
    large = [(128 * q).requires_grad_(), (64 * k).requires_grad_(), (v / 1024).requires_grad_()]
    given = [x.detach().double().requires_grad_() for x in large]
    out, wanted = lightning_attention(*large, 0.9, impl="triton"), exact(*given, DECAY[:1])[0]
    assert (given[0] @ given[1].mT).abs().max() > 65504
    assert_near(out, wanted.detach())
    small = 1e-4 * randn(*out.shape, seed=8)
    small = small.half()  # products with v are below the smallest number of float16
    found = torch.autograd.grad(out, large, small)
    for a, b in zip(found, torch.autograd.grad(wanted, given, small.double()), strict=True):
        assert_near(a, b)


def test_same_bits_every_time():
    inputs = problem(1, 2, 37, 20, 7)
    runs = []
    for _ in range(2):
        out, end = lightning_attention(*inputs, DECAY[::3], impl="triton", return_state=True)
        runs.append([out, end, *torch.autograd.grad((out * out).sum() + end.sum(), inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("needed", range(4))
def test_gradient_of_one_input_alone(needed):
    inputs = [
        x.detach().requires_grad_(n == needed) for n, x in enumerate(problem(1, 1, 35, 4, 3, state=True))
    ]
    given = [x.detach().double().requires_grad_(n == needed) for n, x in enumerate(inputs)]
    out = lightning_attention(*inputs[:3], 0.9, state=inputs[3], impl="triton")
    probe = randn(*out.shape, seed=4)
    found = torch.autograd.grad(out, inputs[needed], probe)[0]
    wanted = torch.autograd.grad(exact(*given[:3], DECAY[:1], given[3])[0], given[needed], probe.double())[0]
    assert_near(found, wanted)


def test_gradient_of_the_last_state_alone_and_no_second_derivative():
    q, k, v = problem(1, 1, 35, 4, 3)
    out, end = lightning_attention(q, k, v, 0.9, impl="triton", return_state=True)
    probe = randn(*end.shape, seed=4)
    found = torch.autograd.grad(end, (k, v), probe, retain_graph=True)
    given = [x.detach().double().requires_grad_() for x in (q, k, v)]
    wanted = torch.autograd.grad(exact(*given, DECAY[:1])[1], given[1:], probe.double())
    for a, b in zip(found, wanted, strict=True):
        assert_near(a, b)
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_auto_falls_back():
    q, k, v = (x.detach() for x in problem(1, 1, 9, 4, 3))
    chunked = lightning_attention(q, k, v, 0.9, impl="chunked")
    assert_near(lightning_attention(q, k, v, 0.9), chunked)
    assert lightning_attention(q.double(), k.double(), v.double(), 0.9).dtype == torch.float64
    numbers = torch.zeros(9, device=DEVICE)
    assert_near(lightning_attention(q, k, v, 0.9, documents=numbers), chunked)
    with pytest.raises(ValueError, match="integers only"):
        lightning_attention(q, k, v, 0.9, documents=numbers, impl="triton")
    with pytest.raises(TypeError, match="float32, bfloat16 or float16"):
        lightning_attention(q.double(), k.double(), v.double(), 0.9, impl="triton")
    with pytest.raises(TypeError, match="must be too"):
        lightning_attention(q, k.bfloat16(), v, 0.9, impl="triton")
    with pytest.raises(ValueError, match="impl must be"):
        lightning_attention(q, k, v, 0.9, impl="fast")


def test_bad_input_raises_before_launch():
    q, k, v = (x.detach() for x in problem(1, 2, 9, 4, 3))
    decay, state = DECAY[:2], torch.zeros(1, 2, 4, 3, device=DEVICE)
    numbers = torch.zeros(1, 2, 9, dtype=torch.int64, device=DEVICE)
    for arguments, options, kind, message in (
        ((q[0], k, v, decay), {}, ValueError, "q must be"),
        ((q, k[:, :1], v, decay), {}, ValueError, "q, k must be"),
        ((q, k, v[:, :, :5], decay), {}, ValueError, "q, k must be"),
        ((q, k.half(), v, decay), {}, TypeError, "k must be too"),
        ((q.double(), k, v, decay), {}, TypeError, "float32, bfloat16 or float16"),
        ((q, k, v.to("meta"), decay), {}, ValueError, "v must be too"),
        ((q, k, v, 0.9), {}, TypeError, "decay must be"),
        ((q, k, v, DECAY[:3]), {}, ValueError, "decay must broadcast"),
        ((q, k, v, decay.to("meta")), {}, ValueError, "decay must be too"),
        ((q, k, v, decay), {"state": state.half()}, TypeError, "state must be a float32"),
        ((q, k, v, decay), {"state": state[:, :1]}, ValueError, "state must be"),
        ((q, k, v, decay), {"state": state.to("meta")}, ValueError, "state must be too"),
        ((q, k, v, decay), {"documents": numbers.float()}, TypeError, "integers"),
        ((q, k, v, decay), {"documents": numbers[0]}, ValueError, "documents must be"),
        ((q, k, v, decay), {"documents": numbers, "state": state}, ValueError, "no state before"),
    ):
        with pytest.raises(kind, match=message):
            lightning_forward(*arguments, **options)
    with pytest.raises(ValueError, match="grad must be"):
        lightning_backward(q, k, v, decay, q)
    with pytest.raises(TypeError, match="grad must be too"):
        lightning_backward(q, k, v, decay, v.half())
    with pytest.raises(ValueError, match="grad_state must be"):
        lightning_backward(q, k, v, decay, v, grad_state=state[..., :1])
