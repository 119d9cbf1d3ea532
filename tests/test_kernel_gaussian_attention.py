"""The kernel of Gaussian attention against dense float64 formulas and the chapter's reference cell."""

import pytest
import torch
from kernel_support import DEVICE, assert_near, every_dtype, far_rows, poison, randn  # noqa: F401

from kernels.gaussian_attention import gaussian_attention_backward, gaussian_attention_forward
from lib.attention import gaussian_kernel_attention
from lib.book import load_reference


def dense(q, k, v, causal=False, mask=None, scale=None):
    square = (q.unsqueeze(-2) - k.unsqueeze(-3)).square().sum(-1)
    weights = torch.exp(-square * (q.shape[-1] ** -0.5 if scale is None else scale) / 2)
    if causal:
        n, keys = weights.shape[-2:]
        weights = weights * torch.ones(n, keys, dtype=torch.bool, device=q.device).tril(keys - n)
    if mask is not None:
        weights = weights * mask
    return weights @ v


def compare(q, k, v, factor=1.0, dtype=None, **options):
    """Values and gradients of the kernel against float64, for a random upstream gradient."""
    inputs = [each.detach().requires_grad_() for each in (q, k, v)]
    exact = [each.detach().double().requires_grad_() for each in (q, k, v)]
    found, wanted = gaussian_kernel_attention(*inputs, impl="triton", **options), dense(*exact, **options)
    assert found.dtype == q.dtype
    upstream = randn(*wanted.shape, dtype=q.dtype, seed=5)
    assert_near(found, wanted, dtype, factor)
    pairs = zip(
        torch.autograd.grad(found, inputs, upstream),
        torch.autograd.grad(wanted, exact, upstream.double()),
        strict=True,
    )
    for ours, theirs in pairs:
        assert_near(ours, theirs, dtype, 2 * factor)


def problem(*lead, n=37, keys=45, dim=12, value_dim=7, dtype=torch.float32):
    return (
        randn(*lead, n, dim, dtype=dtype, seed=1),
        randn(*lead, keys, dim, dtype=dtype, seed=2),
        randn(*lead, keys, value_dim, dtype=dtype, seed=3),
    )


@every_dtype
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.usefixtures("poison")
def test_values_and_gradients(dtype, causal, masked):
    q, k, v = problem(2, 2, dtype=dtype)
    mask = randn(2, 1, 37, 45, seed=4) > -0.5 if masked else None  # one mask for both heads
    if masked:
        mask[0, 0, [3, 36]] = False  # queries that see nothing
        mask[1, 0, :, 8] = False  # and a key that nobody sees
    compare(q, k, v, causal=causal, mask=mask)


@pytest.mark.parametrize(
    "n,keys,dim,value_dim",
    [(1, 1, 1, 1), (1, 53, 17, 2), (31, 31, 3, 20), (32, 64, 16, 16), (33, 16, 40, 33)],
)
@pytest.mark.usefixtures("poison")
def test_odd_sizes(n, keys, dim, value_dim):
    compare(*problem(1, n=n, keys=keys, dim=dim, value_dim=value_dim))
    if n <= keys:
        compare(*problem(1, n=n, keys=keys, dim=dim, value_dim=value_dim), causal=True)


@pytest.mark.parametrize("lead", [(), (3,), (2, 1, 2)])
def test_leading_dimensions_that_broadcast(lead):
    q, k, v = problem(*lead, n=9, keys=11)
    compare(q, k[..., :1, :, :] if len(lead) == 3 else k, v)
    if len(lead) == 1:
        mask = randn(9, 11) > 0
        compare(q, k[:1], v[0], mask=mask)  # `expand` inside, and gradients summed


def test_scale_and_tied_keys():
    q, _, v = problem(2, n=20, keys=20)
    compare(q, q, v, scale=0.1)
    tied, values = q.clone().requires_grad_(), v.clone().requires_grad_()
    exact, exact_values = (each.detach().double().requires_grad_() for each in (q, v))
    upstream = randn(2, 20, 7, seed=6)
    found = gaussian_kernel_attention(tied, tied, values, impl="triton")
    wanted = load_reference("softmax-free-attention", "gaussian_attention")(exact, exact_values)
    assert_near(found, wanted)
    for ours, theirs in zip(
        torch.autograd.grad(found, (tied, values), upstream),
        torch.autograd.grad(wanted, (exact, exact_values), upstream.double()),
        strict=True,
    ):
        assert_near(ours, theirs, factor=2)


@every_dtype
def test_no_kernel_exceeds_one_and_far_keys_vanish(dtype):
    """Rounding may make a squared distance negative; beyond the dtype's exponents a weight is 0, not nan."""
    q = randn(1, 1, 20, 16, dtype=dtype, scale=30.0)
    eye = torch.eye(20, 256, dtype=dtype, device=DEVICE).expand(1, 1, 20, 256)
    weights = gaussian_attention_forward(q, q, eye, scale=1.0)[..., :20]
    assert weights.max() <= 1
    assert_near(weights, torch.eye(20, device=DEVICE).expand(1, 1, 20, 20), torch.bfloat16)


def test_non_contiguous_and_expanded():
    q, k, v = problem(2, 2, n=20, keys=20)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    k = k.mT.contiguous().mT
    v = v.repeat(1, 1, 1, 2)[..., ::2]
    mask = (randn(20, 20) > 0).T
    compare(q, k, v, mask=mask)
    compare(q[:, :1].expand(2, 2, 20, 12), k[0].expand(2, 2, 20, 12), v, causal=True)
    found = [each.detach().requires_grad_() for each in (q, k, v)]
    exact = [each.detach().double().requires_grad_() for each in (q, k, v)]
    gaussian_kernel_attention(*found, impl="triton").sum().backward()  # an upstream gradient without strides
    dense(*exact).sum().backward()
    for ours, theirs in zip(found, exact, strict=True):
        assert_near(ours.grad, theirs.grad, factor=2)


def test_empty():
    q, k, v = problem(2, 2)
    for inputs in (
        (q[:0], k[:0], v[:0]),
        (q[:, :, :0], k, v),
        (q, k[:, :, :0], v[:, :, :0]),
        (q, k, v[..., :0]),
    ):
        inputs = [each.detach().requires_grad_() for each in inputs]
        out = gaussian_kernel_attention(*inputs, impl="triton")
        assert out.shape == (*inputs[0].shape[:-1], inputs[2].shape[-1])
        grads = torch.autograd.grad(out.sum(), inputs)
        assert not out.any() and not any(each.any() for each in grads)
        assert [each.shape for each in grads] == [each.shape for each in inputs]


@pytest.mark.filterwarnings("ignore:overflow")  # of the gradients that are beyond float16
@pytest.mark.parametrize(
    "upstream_size,value_size,scale,spread", [(1e-6, 1.0, 3e3, 0.01), (60000.0, 15000.0, 1e-4, 1.0)]
)
def test_float16_neither_vanishes_nor_overflows(upstream_size, value_size, scale, spread):
    """g.v is beyond float16 on either side; what is compared are the gradients that are not."""
    q, k, v = problem(1, 1, n=20, keys=20, value_dim=16)
    q, k = (q * spread).half(), (k * spread).half()
    v = (v / v.abs().max() * value_size).half()
    upstream = randn(1, 1, 20, 16, seed=5)
    upstream = (upstream / upstream.abs().max() * upstream_size).half()
    exact = [each.double().requires_grad_() for each in (q, k, v)]
    wanted = torch.autograd.grad(dense(*exact, scale=scale), exact, upstream.double())
    found = gaussian_attention_backward(q, k, v, upstream, scale=scale)
    for ours, theirs in zip(found, wanted, strict=True):
        representable = theirs.abs() < 60000
        assert ours.isfinite()[representable].all()
        error = torch.where(representable, ours.double() - theirs, 0.0).abs().max()
        assert error <= 6e-3 * (theirs * representable).abs().max() + 6e-8


@pytest.mark.filterwarnings("ignore:invalid value")
def test_nan_stays_where_it_belongs():
    q, k, v = problem(1, 1, n=5, keys=40)
    broken = q.clone()
    broken[0, 0, 2] = torch.nan
    out = gaussian_attention_forward(broken, k, v, scale=1.0)
    assert out[0, 0, 2].isnan().all()
    assert torch.equal(
        out[0, 0, [0, 1, 3, 4]], gaussian_attention_forward(q, k, v, scale=1.0)[0, 0, [0, 1, 3, 4]]
    )
    far = k.clone()
    far[0, 0, 3] = torch.inf  # |q - k|^2 by a product: inf - inf where signs agree, as in the PyTorch path
    theirs = gaussian_kernel_attention(q, far, v, impl="torch", scale=1.0)
    assert torch.equal(gaussian_attention_forward(q, far, v, scale=1.0).isnan(), theirs.isnan())


@pytest.mark.parametrize("which", range(3))
@every_dtype
def test_indices_beyond_32_bits(which, dtype):
    inputs = list(problem(1, 1, n=5, keys=5, dtype=dtype))
    near = inputs[which]
    inputs[which] = far_rows(near[0, 0])[None, None]
    upstream = randn(1, 1, 5, 7, dtype=dtype, seed=5)
    found = gaussian_attention_backward(*inputs, upstream, scale=0.3)
    inputs[which] = near
    wanted = gaussian_attention_backward(*inputs, upstream, scale=0.3)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


def test_mask_and_heads_beyond_32_bits():
    q, k, v = problem(1, 1, n=5, keys=6)
    mask = randn(5, 6) > 0
    stride = 2**31 // 4 + 6
    whole = torch.zeros(1, dtype=torch.bool, device=DEVICE)
    if DEVICE == "cuda":
        whole = torch.empty(4 * stride + 6, dtype=torch.bool, device=DEVICE)
    else:
        import numpy as np

        whole = torch.from_numpy(np.zeros(4 * stride + 6, np.bool_))
    far = whole.as_strided((5, 6), (stride, 1)).copy_(mask)
    found = gaussian_attention_forward(q, k, v, scale=0.3, mask=far[None, None])
    assert torch.equal(found, gaussian_attention_forward(q, k, v, scale=0.3, mask=mask[None, None]))
    heads = far_rows(q.reshape(5, 12))[None, :, None]  # five heads of one query each
    k, v = k.expand(1, 5, 6, 12), v.expand(1, 5, 6, 7)
    near = q.reshape(1, 5, 1, 12)
    assert torch.equal(
        gaussian_attention_forward(heads, k, v, scale=0.3), gaussian_attention_forward(near, k, v, scale=0.3)
    )
    assert torch.equal(
        gaussian_attention_forward(heads.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), scale=0.3),
        gaussian_attention_forward(near, k, v, scale=0.3).transpose(0, 1),
    )


def test_same_bits_every_time():
    inputs = [each.requires_grad_() for each in problem(2, 2)]
    runs = []
    for _ in range(2):
        out = gaussian_kernel_attention(*inputs, causal=True, impl="triton")
        runs.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("needed", range(3))
def test_gradient_of_one_input_alone(needed):
    inputs = [each.requires_grad_(number == needed) for number, each in enumerate(problem(2))]
    exact = [each.detach().double().requires_grad_(number == needed) for number, each in enumerate(inputs)]
    upstream = randn(2, 37, 7, seed=5)
    found = torch.autograd.grad(gaussian_kernel_attention(*inputs, impl="triton"), inputs[needed], upstream)
    wanted = torch.autograd.grad(dense(*exact), exact[needed], upstream.double())
    assert_near(found[0], wanted[0], factor=2)


def test_a_second_derivative_raises():
    q, k, v = (each.requires_grad_() for each in problem(1, n=4, keys=4))
    out = gaussian_kernel_attention(q, k, v, impl="triton")
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_auto_falls_back_and_triton_says_why():
    q, k, v = problem(2)
    assert_near(gaussian_kernel_attention(q, k, v), gaussian_kernel_attention(q, k, v, impl="torch"))
    wide = (q.repeat(1, 1, 30), k.repeat(1, 1, 30), v)
    deep = tuple(each[:, None, None] for each in (q, k, v))
    deep_mask = torch.ones(2, 1, 1, 37, 45, dtype=torch.bool, device=DEVICE)
    for inputs, options, error, match in (
        ((q.double(), k.double(), v.double()), {}, TypeError, "one dtype"),
        ((q, k, v.bfloat16().double()), {}, TypeError, "one dtype"),
        ((q, k, v), {"return_weights": True}, ValueError, "no weights"),
        (wide, {}, ValueError, "up to 256"),
        (deep, {"mask": deep_mask}, ValueError, "two leading"),
    ):
        with pytest.raises(error, match=match):
            gaussian_kernel_attention(*inputs, impl="triton", **options)
        if inputs[2].dtype == inputs[0].dtype:
            gaussian_kernel_attention(*inputs, impl="auto", **options)
    with pytest.raises(ValueError, match="impl must be"):
        gaussian_kernel_attention(q, k, v, impl="flash")
    with pytest.raises(ValueError, match="scale must be positive"):
        gaussian_kernel_attention(q, k, v, scale=0.0, impl="triton")
    with pytest.raises(ValueError, match="more queries|as many"):
        gaussian_kernel_attention(k, q, q, causal=True, impl="triton")


def test_bad_input_raises_before_launch():
    q, k, v = problem(2, 2)
    good = dict(scale=1.0)
    mask = torch.ones(2, 2, 37, 45, dtype=torch.bool, device=DEVICE)
    for error, match, call in (
        (ValueError, "q must be", lambda: gaussian_attention_forward(q[0], k, v, **good)),
        (ValueError, "q must be", lambda: gaussian_attention_forward(q[..., :3], k, v, **good)),
        (ValueError, "q must be", lambda: gaussian_attention_forward(q, k, v[:, :, 1:], **good)),
        (ValueError, "q must be", lambda: gaussian_attention_forward(q, k[:1], v, **good)),
        (TypeError, "k must be too", lambda: gaussian_attention_forward(q, k.bfloat16(), v, **good)),
        (TypeError, "q must be float32", lambda: gaussian_attention_forward(q.double(), k, v, **good)),
        (TypeError, "q must be a tensor", lambda: gaussian_attention_forward([1.0], k, v, **good)),
        (ValueError, "v must be too", lambda: gaussian_attention_forward(q, k, v.to("meta"), **good)),
        (ValueError, "scale must be positive", lambda: gaussian_attention_forward(q, k, v, scale=-1.0)),
        (ValueError, "causal needs", lambda: gaussian_attention_forward(k, q, q, causal=True, **good)),
        (TypeError, "boolean", lambda: gaussian_attention_forward(q, k, v, mask=mask.float(), **good)),
        (ValueError, "mask must be", lambda: gaussian_attention_forward(q, k, v, mask=mask[:1], **good)),
        (ValueError, "upstream must be", lambda: gaussian_attention_backward(q, k, v, q, **good)),
        (
            ValueError,
            "at most 256",
            lambda: gaussian_attention_forward(q.repeat(1, 1, 1, 30), k.repeat(1, 1, 1, 30), v, **good),
        ),
    ):
        with pytest.raises(error, match=match):
            call()
