"""The kernels of attention against float64, through the library: natively on CUDA, else interpreted."""

import math

import pytest
import torch
from kernel_support import DEVICE, assert_near, every_dtype, far_rows, poison, randn  # noqa: F401

from kernels._launch import dot_options
from kernels.flash_attention import (
    flash_attention_backward,
    flash_attention_forward,
    kept_blocks,
)
from kernels.hopfield_attention import hopfield_forward
from kernels.softplus_attention import softplus_attention_backward, softplus_attention_forward
from lib.attention import (
    draw_blocks,
    entropy_attention,
    harmonic_numbers,
    hopfield_retrieve,
    pr_flash_attention,
    rope_alibi,
    softplus_attention,
)
from lib.attention.fused import FlashAttention, with_heads
from lib.book import load_reference


def draw(queries, keys, dim, dim_v=None, *, dtype=torch.float32, lead=(1, 2), scale=1.0):
    sizes = ((queries, dim), (keys, dim), (keys, dim if dim_v is None else dim_v))
    return [
        randn(*lead, *size, dtype=dtype, seed=seed, scale=scale, grad=True) for seed, size in enumerate(sizes)
    ]


def exact(inputs):
    return [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]


def compare(found, wanted, inputs, doubles, dtype=None, factor=1.0, around=0.0):
    """Tensors of the kernel and of float64, and their gradients under the same random gradients from above.

    Gradients that are 0 up to rounding are compared around 1.
    """
    dtype = inputs[0].dtype if dtype is None else dtype
    upstream = [randn(*x.shape, seed=9 + i) for i, x in enumerate(found)]
    results = []
    for outs, ins in ((found, inputs), (wanted, doubles)):
        total = sum(
            (out.to(up.dtype if outs is found else torch.float64) * up).sum()
            for out, up in zip(outs, upstream, strict=True)
        )
        results.append(torch.autograd.grad(total, ins))
    for a, b in zip(found, wanted, strict=True):
        assert_near(a, b, dtype, factor)
    for a, b, x in zip(*results, inputs, strict=True):
        assert a.dtype == x.dtype
        assert_near(a + around, b + around, dtype, factor)


def naive(q, k, v, factor=None, *, scale=None, causal=False, lengths=None, slopes=None, distances=None):
    """Output, log-sum-exp and entropy with all weights."""
    queries, keys = q.shape[-2], k.shape[-2]
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if factor is None else scores * factor[..., None]
    position = torch.arange(keys - queries, keys, device=q.device)[:, None]
    column = torch.arange(keys, device=q.device)
    if slopes is not None:
        lost = (position - column).abs()
        lost = lost if distances is None else distances.double()[lost]
        scores = scores - slopes.double()[:, None, None] * lost
    hidden = torch.zeros(q.shape[0], 1, queries, keys, dtype=torch.bool, device=q.device)
    if causal:
        hidden = hidden | (column > position)
    if lengths is not None:
        hidden = hidden | (column >= lengths[:, None, None, None])
    scores = scores.masked_fill(hidden, -torch.inf)
    weights = scores.softmax(-1).masked_fill(hidden, 0)
    entropy = -torch.where(weights > 0, weights * weights.clamp_min(1e-300).log(), 0).sum(-1)
    return weights @ v, scores.logsumexp(-1), entropy


# --- softmax


@every_dtype
def test_entropy_against_the_reference(dtype):
    q, k, v = draw(37, 37, 24, dtype=dtype)
    t = (0.5 + randn(2, 37).abs()).requires_grad_()
    found = entropy_attention(q, k, v, t, causal=True, impl="triton")
    doubles = exact([q, k, v, t])
    wanted = load_reference("entropy-guided-attention", "entropy_guided_attention")(*doubles, eps=1e-12)
    compare(found, wanted, [q, k, v, t], doubles, dtype)


@pytest.mark.parametrize(
    "queries,keys,dim,dim_v,causal,options",
    [
        (1, 1, 1, 1, True, ()),
        (1, 5, 3, 40, False, ("slopes", "distances")),
        (33, 70, 16, 5, False, ("factor", "slopes", "lengths")),
        (19, 67, 24, 24, True, ("slopes", "distances", "lengths")),
        (48, 48, 48, 16, True, ("factor",)),
        (2, 33, 128, 128, False, ()),
    ],
)
def test_options_together(queries, keys, dim, dim_v, causal, options):
    q, k, v = draw(queries, keys, dim, dim_v, lead=(2, 1) if "lengths" in options else (1, 2))
    inputs, factor, given = [q, k, v], None, {"scale": 0.3, "causal": causal}
    if "factor" in options:
        factor = (0.5 + randn(*q.shape[:3]).abs()).requires_grad_()
        inputs.append(factor)
    if "slopes" in options:
        given["slopes"] = torch.tensor([0.5, 0.1], device=DEVICE)[: q.shape[1]]
    if "distances" in options:
        given["distances"] = harmonic_numbers(keys + 3).float().to(DEVICE)
    if "lengths" in options:  # the second entry sees nothing
        given["lengths"] = torch.tensor([keys - 9, 0], device=DEVICE)
    found = FlashAttention.apply(q, k, v, factor, True, given)
    doubles = exact(inputs)
    out, lse, entropy = naive(*doubles, **given)
    compare(found, (out, entropy), inputs, doubles, around=float(keys == 1))
    _, again, none = flash_attention_forward(q.detach(), k.detach(), v.detach(), factor=factor, **given)
    assert none is None
    torch.testing.assert_close(again.double(), lse, rtol=1e-5, atol=1e-5)


def test_no_entries_no_queries_and_no_keys():
    for lead, queries, keys in (((0, 2), 3, 4), ((1, 2), 0, 4), ((1, 2), 3, 0)):
        q, k, v = draw(queries, keys, 8, 5, lead=lead)
        out, entropy = entropy_attention(q, k, v, impl="triton")
        assert out.shape == (*lead, queries, 5) and entropy.shape == (*lead, queries)
        assert not out.any() and not entropy.any()
        for gradient, x in zip(
            torch.autograd.grad(out.sum() + entropy.sum(), (q, k, v)), (q, k, v), strict=True
        ):
            assert gradient.shape == x.shape and not gradient.any()
        out = softplus_attention(q, k, v, impl="triton")
        assert out.shape == (*lead, queries, 5) and not out.any()
        assert not any(g.any() for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_strides_and_broadcasting():
    q = randn(2, 19, 3, 8).transpose(1, 2).requires_grad_()
    k = randn(3, 8, 21, seed=1).mT.requires_grad_()  # one for all entries of the batch
    v = randn(2, 1, 21, 10, seed=2)[..., ::2].requires_grad_()  # and one for all heads
    doubles = exact([q, k, v])
    given = dict(causal=True, scale=0.5)
    found = entropy_attention(q, k, v, impl="triton", **given)
    compare(found, entropy_attention(*doubles, impl="torch", **given), [q, k, v], doubles)
    found = softplus_attention(q, k, v, causal=True, p=2.0, impl="triton")
    compare([found], [softplus_attention(*doubles, causal=True, p=2.0)], [q, k, v], doubles)
    for lead in ((), (3,), (1, 2, 3)):
        shape = with_heads(lead, randn(*lead, 4, 8))[0].shape
        assert shape == (math.prod(lead[:-1]), lead[-1] if lead else 1, 4, 8)
    single = entropy_attention(q[0, 0], k[0], v[0, 0], impl="triton")[0]
    torch.testing.assert_close(single, entropy_attention(q[0, 0], k[0], v[0, 0], impl="torch")[0])


@pytest.mark.parametrize("bias", ["linear", "harmonic", "none"])
def test_rotations_and_biases(bias):
    inputs = draw(23, 39, 16)
    given = dict(slopes=torch.tensor([0.7, 0.2], device=DEVICE), bias=bias, causal=True)
    found = rope_alibi(*inputs, impl="triton", **given)
    doubles = exact(inputs)
    compare([found], [rope_alibi(*doubles, impl="torch", **given)], inputs, doubles)


def test_harmonic_reference():
    q, k, v = draw(21, 21, 8, lead=(1, 1))
    doubles = [x.cpu() for x in exact([q, k, v])]  # the reference makes its masks there
    wanted = load_reference("probabilistic-flash-attention", "harmonic_attention")(*doubles, 0.4).to(DEVICE)
    slopes = torch.tensor([0.4], device=DEVICE)
    assert_near(rope_alibi(q, k, v, slopes=slopes, rotate=False, causal=True, impl="triton"), wanted)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, in the interpreter
def test_large_scores_and_infinities():
    q, k, v = (x.detach() for x in draw(17, 35, 8))
    q *= 300
    k[..., 20, :] *= 40  # scores of thousands
    out, entropy = entropy_attention(q, k, v, impl="triton")
    wanted = entropy_attention(*exact([q, k, v]), impl="torch")
    assert_near(out, wanted[0], factor=10)
    assert_near(entropy, wanted[1], factor=100)
    q = q.abs()
    k[..., 3, :], k[..., :16, 0] = -torch.inf, -torch.inf  # a whole tile of scores of -inf
    out, lse, _ = flash_attention_forward(q, k, v, scale=1e-3)
    weights = (q.double() @ k.double().mT * 1e-3).softmax(-1)
    assert_near(out, weights @ v.double(), factor=10)
    v[..., 34, 1] = torch.inf
    out = flash_attention_forward(q, k, v, scale=1e-3)[0]
    assert out[..., 1].isposinf().all() and out[..., 0].isfinite().all()
    q[..., 2, 3] = torch.nan
    assert flash_attention_forward(q, k, v, scale=1e-3)[0][..., 2, 0].isnan().all()
    k[:] = -torch.inf  # rows that see no finite score read zeros
    assert flash_attention_forward(q[..., :2, :], k, v)[0][..., 0].abs().max() == 0


# --- sampled blocks


def keep(distance):
    return 1.0 if distance < 1 else 0.6


@every_dtype
def test_blocks_against_the_reference(dtype):
    block, length = 20, 55
    inputs = draw(length, length, 24, dtype=dtype)
    found = pr_flash_attention(*inputs, block=block, keep=keep, seed=2, reweight=True, impl="triton")
    doubles = exact(inputs)
    reference = load_reference("probabilistic-flash-attention", "random_block_attention")
    kept = draw_blocks(3, keep, seed=2)
    assert 3 < kept.sum() < 6
    chances = torch.tensor([keep(r) for r in range(3)], dtype=torch.float64)
    # the reference begins its sums on the CPU
    wanted = [reference(*(x[0, head].cpu() for x in doubles), kept, block, chances) for head in (0, 1)]
    compare([found], [torch.stack(wanted)[None].to(DEVICE)], inputs, doubles, dtype)


@pytest.mark.parametrize("block,queries,keys", [(3, 7, 17), (16, 30, 53), (40, 30, 75), (128, 1, 20)])
def test_block_sizes_and_fewer_queries(block, queries, keys):
    inputs = draw(queries, keys, 8, lead=(1, 1))
    given = dict(block=block, keep=keep, seed=0, reweight=block == 16)
    found = pr_flash_attention(*inputs, impl="triton", **given)
    doubles = exact(inputs)
    compare([found], [pr_flash_attention(*doubles, impl="torch", **given)], inputs, doubles)


# --- Hopfield networks


@every_dtype
@pytest.mark.parametrize("steps", [1, 3])
def test_steps_against_the_reference(steps, dtype):
    state, stored, values = draw(9, 19, 24, 7, dtype=dtype, scale=0.7)
    found, info = hopfield_retrieve(state, stored, beta=0.4, steps=steps, impl="triton")
    doubles = exact([state, stored])
    reference = load_reference("hopfield-attention", "retrieve")
    # half precision rounds the state after each step
    compare([found], [reference(*doubles, 0.4, steps)], [state, stored], doubles, dtype, factor=1 + steps)
    _, wanted = hopfield_retrieve(*doubles, beta=0.4, steps=steps, impl="torch")
    assert torch.equal(info["steps"], wanted["steps"])
    assert_near(info["change"], wanted["change"], dtype, factor=steps)
    assert_near(info["query"], wanted["query"], dtype, factor=steps)
    if dtype == torch.float32:
        found, info = hopfield_retrieve(state, stored, values=values, beta=0.4, steps=steps, impl="triton")
        doubles = exact([state, stored, values])
        wanted = hopfield_retrieve(*doubles[:2], values=doubles[2], beta=0.4, steps=steps, impl="torch")
        compare([found], wanted[:1], [state, stored, values], doubles)
        torch.testing.assert_close(
            info["change"].double(), wanted[1]["change"], equal_nan=True, rtol=1e-5, atol=0
        )


def test_a_temperature_of_each_head():
    state, stored, _ = draw(5, 20, 8)
    beta = torch.tensor([0.3, 1.1], device=DEVICE, requires_grad=True)
    doubles = exact([state, stored, beta])
    wanted, _ = hopfield_retrieve(*doubles[:2], beta=doubles[2], steps=2, impl="torch")
    found, _ = hopfield_retrieve(state, stored, beta=beta, steps=2, impl="triton")
    compare([found], [wanted], [state, stored, beta], doubles)


# --- softplus


@every_dtype
@pytest.mark.parametrize("p", [None, 1.0, 15.0])
def test_softplus_against_the_reference(p, dtype):
    inputs = draw(35, 35, 24, 20, dtype=dtype)
    found = softplus_attention(*inputs, causal=True, p=p, impl="triton")
    doubles = exact(inputs)
    reference = load_reference("softplus-attention", "softplus_attention")
    compare([found], [reference(*doubles, p)], inputs, doubles, dtype, factor=1 if p is None else 3)


@pytest.mark.parametrize(
    "queries,keys,dim,options",
    [
        (1, 1, 1, dict(p=2.0)),
        (19, 45, 8, dict(p=2.5, offset=0.7, warm_rows=30, causal=True)),
        (33, 33, 3, dict(scale=20.0)),  # far from 0 in both directions
        (7, 50, 17, dict(p=1.0, warm_rows=0)),
    ],
)
def test_softplus_options(queries, keys, dim, options):
    inputs = draw(queries, keys, dim, 5)
    found = softplus_attention(*inputs, impl="triton", **options)
    doubles = exact(inputs)
    compare(
        [found],
        [softplus_attention(*doubles, impl="torch", **options)],
        inputs,
        doubles,
        factor=3,
        around=float(keys == 1),
    )


def test_softplus_rows_of_which_nothing_is_left():
    q, k, v = draw(9, 9, 8)
    with torch.no_grad():
        k[:] = k[:, :, :1]  # all weights are equal, and none exceeds their mean
        q[..., 3, :] = 0.0  # a query without direction
    found = softplus_attention(q, k, v, p=3.0, impl="triton")
    assert_near(found, v.double().mean(2, keepdim=True).expand(found.shape))
    dead = torch.autograd.grad((found * randn(*found.shape)).sum(), v)[0]
    first = softplus_attention(q, k, v, impl="triton")
    assert_near(torch.autograd.grad((first * randn(*found.shape)).sum(), v)[0], dead)


@pytest.mark.parametrize("p", [None, 2.0])
def test_softplus_at_the_limits_of_float16(p):
    q, k, v = (x.detach() for x in draw(5, 19, 8, dtype=torch.float16, lead=(1, 1)))
    q[..., 1, :], k[..., 3, :] = 0.0, 0.0  # no direction: 1 / length is inf
    inputs = [x.requires_grad_() for x in (q, k, v)]
    found = softplus_attention(*inputs, p=p, impl="triton")
    up = randn(*found.shape)
    gradients = torch.autograd.grad((found * up).sum(), inputs)
    doubles = exact(inputs)
    wanted = torch.autograd.grad((softplus_attention(*doubles, p=p, impl="torch") * up).sum(), doubles)
    for gradient, exactly, row in zip(gradients, wanted, (1, 3, 19), strict=True):
        exactly[..., row : row + 1, :] = 0.0
        assert_near(gradient, exactly)
    one = q.detach()[..., :1, :]
    against = (0.2 * randn(1, 1, 19, 8) - one).half()  # all weights are about 1e-8
    inputs = [x.detach().requires_grad_() for x in (one.expand_as(q), against, v)]
    doubles = exact(inputs)
    given = dict(p=p, scale=20.0)
    found = softplus_attention(*inputs, impl="triton", **given)
    compare([found], [softplus_attention(*doubles, impl="torch", **given)], inputs, doubles)
    found = softplus_attention(one, -one.expand_as(v), v, impl="triton", **given)  # none exceeds the average
    assert_near(found, v.double().mean(2, keepdim=True))


# --- all of them


def calls(inputs, impl="triton"):
    q, k, v = inputs
    given = dict(causal=True, impl=impl)
    yield lambda: (lambda out, entropy: out.sum(-1) + entropy)(*entropy_attention(q, k, v, **given))
    yield lambda: pr_flash_attention(q, k, v, block=16, keep=keep, seed=0, impl=impl)
    yield lambda: hopfield_retrieve(q, k, steps=2, impl=impl)[0] + 0 * v[..., :1].sum()
    yield lambda: softplus_attention(q, k, v, **given)
    yield lambda: softplus_attention(q, k, v, p=4.0, **given)


def test_same_bits_every_time_and_nothing_left_unwritten(poison):  # noqa: F811
    inputs = draw(19, 35, 8, 5, lead=(1, 1))
    for call in calls(inputs):
        runs = []
        for _ in range(2):
            out = call()
            runs.append([out, *torch.autograd.grad((out * randn(*out.shape)).sum(), inputs)])
        assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(*runs, strict=True))


def test_gradient_of_one_input_alone_and_only_once():
    inputs = draw(5, 19, 8, 5, lead=(1, 1))
    for number, call in enumerate(calls(inputs)):
        out = call()
        whole = torch.autograd.grad(out.sum(), inputs)
        for needed, wanted in enumerate(whole):
            if number == 2 and needed == 2:
                continue
            alone = [x.detach().requires_grad_(i == needed) for i, x in enumerate(inputs)]
            out = list(calls(alone))[number]()
            torch.testing.assert_close(torch.autograd.grad(out.sum(), alone[needed])[0], wanted)
        out = call()
        gradient = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)[0]
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()
    entropy = entropy_attention(*inputs, impl="triton")[1]  # the output is not used
    doubles = exact(inputs)
    compare([entropy], [entropy_attention(*doubles, impl="torch")[1]], inputs, doubles)


@pytest.mark.parametrize("far", range(4))
def test_rows_beyond_the_reach_of_32_bits(far):
    def lay(x, number):
        return far_rows(x.detach()[0, 0])[None, None] if number == far else x.detach()

    inputs = draw(5, 19, 8, lead=(1, 1))
    grad = randn(1, 1, 5, 8, seed=5)
    scale = torch.ones(5, device=DEVICE)
    results = []
    for place in (lay, lambda x, number: x.detach()):
        q, k, v, g = (place(x, number) for number, x in enumerate((*inputs, grad)))
        out, lse, _ = flash_attention_forward(q, k, v)
        states, _ = hopfield_forward(q, k, steps=2)
        flat, saved = softplus_attention_forward(q, k, v, scale)
        found = [out, *flash_attention_backward(q, k, v, out, lse, g)[:3], states, flat]
        results.append(found + [*softplus_attention_backward(q, k, v, scale, flat, saved, g)])
        del q, k, v, g
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_columns_and_heads_beyond_the_reach_of_32_bits():
    q, k, v = (x.detach() for x in draw(3, 3, 3, lead=(1, 3)))
    out = flash_attention_forward(q, k, v)[0]
    apart = far_rows(k[0].flatten(1)).unflatten(1, (3, 3))[None]  # heads far from each other
    assert (
        2**30 < apart.stride(1) < 2**31
    )  # a stride that itself needs 64 bits would hide a product that does
    assert torch.equal(flash_attention_forward(q, apart, v)[0], out)
    wide = far_rows(k[0].flatten(0, 1).T).T.unflatten(0, (3, 3))[None]  # columns
    assert 2**30 < wide.stride(3) < 2**31
    torch.testing.assert_close(flash_attention_forward(q, wide, v)[0], out)  # loaded in another order


@pytest.mark.parametrize("owner", [torch.backends.cuda.matmul, torch.backends], ids=["matmul", "all"])
def test_precision_set_by_the_newer_interface_of_torch(owner):
    before = owner.fp32_precision
    try:
        for precision in ("tf32", "ieee"):  # `torch.get_float32_matmul_precision` raises
            owner.fp32_precision = precision
            assert dot_options(torch.ones(1))["PRECISION"] == precision
    finally:
        owner.fp32_precision = before


def test_auto_falls_back_and_triton_says_why():
    inputs = [x.detach() for x in draw(5, 9, 8)]
    mask = torch.ones(5, 9, dtype=torch.bool, device=DEVICE)
    doubles = [x.double() for x in inputs]
    for function, bad in (
        (entropy_attention, dict(mask=mask)),
        (entropy_attention, dict(return_weights=True)),
        (softplus_attention, dict(mask=mask)),
        (softplus_attention, dict(return_weights=True)),
        (rope_alibi, dict(mask=mask)),
        (rope_alibi, dict(slopes=torch.ones(2, device=DEVICE, requires_grad=True))),
        (lambda q, k, v, **given: hopfield_retrieve(q, k, values=v, **given), dict(mask=mask)),
        (lambda q, k, v, **given: hopfield_retrieve(q, k, values=v, **given), dict(steps=None)),
    ):
        function(*inputs, **bad)
        with pytest.raises(ValueError, match="impl='triton' does not take"):
            function(*inputs, impl="triton", **bad)
        with pytest.raises(ValueError, match="float64"):
            function(*doubles, impl="triton")
        with pytest.raises(ValueError, match="impl must be"):
            function(*inputs, impl="cuda")
    with pytest.raises(ValueError, match="dims above 128"):
        pr_flash_attention(*draw(3, 3, 130), block=2, keep=keep, seed=0, impl="triton")
    with pytest.raises(ValueError, match="different dtypes"):
        entropy_attention(inputs[0], inputs[1].bfloat16(), inputs[2], impl="triton")
    with pytest.raises(ValueError, match="at least as many keys"):
        entropy_attention(inputs[1], inputs[0], inputs[0], causal=True, impl="triton")


def test_bad_input_raises_before_launch():
    q, k, v = (x.detach() for x in draw(5, 9, 8))
    good, scale = torch.ones(2, device=DEVICE), torch.ones(5, device=DEVICE)
    forward = flash_attention_forward
    for raised, match, call in (
        (TypeError, "must be a tensor", lambda: forward(1, k, v)),
        (ValueError, "must be .batch, heads", lambda: forward(q[0], k, v)),
        (TypeError, "must be too", lambda: forward(q, k.half(), v)),
        (TypeError, "must be float32, bfloat16", lambda: forward(q.double(), k.double(), v.double())),
        (ValueError, "must be too", lambda: forward(q, k.to("meta"), v)),
        (ValueError, "do not fit together", lambda: forward(q, k[:, :1], v)),
        (ValueError, "from 1 to 128", lambda: forward(*(x.repeat(1, 1, 1, 17) for x in (q, k, v)))),
        (ValueError, "at least as many keys", lambda: forward(k, q, v[:, :, :5], causal=True)),
        (ValueError, "give both", lambda: forward(q, k, v, distances=good)),
        (ValueError, "distances need", lambda: forward(k, q, v[:, :, :5], slopes=good, distances=torch.ones(9))),
        (ValueError, "slopes must be", lambda: forward(q, k, v, slopes=good[:1])),
        (ValueError, "lengths must be", lambda: forward(q, k, v, lengths=good[:1])),
        (ValueError, "factor must be", lambda: forward(q, k, v, factor=good)),
        (ValueError, "at least 9 entries", lambda: forward(q, k, v, slopes=good, distances=good)),
        (ValueError, "diagonal", lambda: kept_blocks(torch.zeros(2, 2).bool(), 4, good, DEVICE)),
        (ValueError, "boolean matrix", lambda: kept_blocks(torch.zeros(2, 2), 4, good, DEVICE)),
        (ValueError, "log_weight must be", lambda: kept_blocks(torch.eye(2).bool(), 4, good[:1], DEVICE)),
        (ValueError, "at least 1 token", lambda: kept_blocks(torch.eye(2).bool(), 0, good, DEVICE)),
        (ValueError, "do not fit 5 queries", lambda: forward(q, k, v, blocks=kept_blocks(torch.eye(2).bool(), 4, good, DEVICE))),
        (ValueError, "need at least 1 step", lambda: hopfield_forward(q, k, steps=0)),
        (ValueError, "1 pattern", lambda: hopfield_forward(q, k[:, :, :0], steps=1)),
        (ValueError, "grad must be", lambda: flash_attention_backward(q, k, v, q, q[..., 0], k)),
        (ValueError, "lse must be", lambda: flash_attention_backward(q, k, v, q, q, q)),
        (ValueError, "go together", lambda: flash_attention_backward(q, k, v, q, q[..., 0], q, entropy=q[..., 0])),
        (ValueError, "scale must be", lambda: softplus_attention_forward(q, k, v, good)),
        (ValueError, "power of at least 1", lambda: softplus_attention_forward(q, k, v, scale, p=0.5)),
        (ValueError, "warm_rows", lambda: softplus_attention_forward(q, k, v, scale, warm_rows=-1)),
        (ValueError, "do not fit together", lambda: softplus_attention_forward(q, k, v[:, :, :5], scale)),
        (ValueError, "grad must be", lambda: softplus_attention_backward(q, k, v, scale, q, (q,), k)),
    ):  # fmt: skip
        with pytest.raises(raised, match=match):
            call()
