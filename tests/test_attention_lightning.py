"""lib.attention.lightning and lib.models.transnormer against sums written out."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.attention import lightning_attention, lightning_step, lrpe, transnormer_decay
from lib.models import GLA, SGLU, TransNormer, greedy, srms_norm


def qkv(*lead, length, dim=4, value_dim=3, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [
        torch.randn(*lead, length, n, dtype=torch.float64, generator=draw).to(dtype)
        for n in (dim, dim, value_dim)
    ]


def written_out(q, k, v, decay, documents=None):
    """Sum over all pairs, one at a time."""
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    past = k.shape[-2] - q.shape[-2]
    for s in range(q.shape[-2]):
        for t in range(s + past + 1):
            if documents is not None and documents[s] != documents[t]:
                continue
            weight = (q[..., s, :] * k[..., t, :]).sum(-1) * decay ** (s + past - t)
            out[..., s, :] += weight[..., None] * v[..., t, :]
    return out


DECAY = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)


@pytest.mark.parametrize("impl", ["naive", "blocked", "chunked"])
@pytest.mark.parametrize("length, chunk", [(1, 4), (8, 4), (9, 4), (7, 1), (5, 64)])
def test_values_and_gradients(impl, length, chunk):
    q, k, v = (x.requires_grad_() for x in qkv(2, 3, length=length))
    out = lightning_attention(q, k, v, DECAY, chunk=chunk, impl=impl)
    expected = written_out(q, k, v, DECAY)
    probe = torch.randn(out.shape, dtype=out.dtype)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
    for got, want in zip(
        *(torch.autograd.grad((y * probe).sum(), (q, k, v)) for y in (out, expected)), strict=True
    ):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("impl", ["naive", "blocked", "chunked"])
def test_documents_past_and_state(impl):
    documents = torch.tensor([3, 3, 3, 1, 1, 1, 1, 1, 2, 2, 5])
    q, k, v = (x.requires_grad_() for x in qkv(3, length=11))
    out, state = lightning_attention(
        q, k, v, DECAY, chunk=4, impl=impl, documents=documents, return_state=True
    )
    torch.testing.assert_close(out, written_out(q, k, v, DECAY, documents))
    torch.testing.assert_close(state, k[..., -1, :, None] * v[..., -1, None, :])
    grads = torch.autograd.grad((out**2).sum(), (q, k, v))
    wanted = torch.autograd.grad((written_out(q, k, v, DECAY, documents) ** 2).sum(), (q, k, v))
    for got, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, want)
    # fewer queries than keys, and the same through a state that is handed on, with its gradient
    whole, end = lightning_attention(q, k, v, DECAY, chunk=4, impl=impl, return_state=True)
    last = lightning_attention(q[..., 5:, :], k, v, DECAY, chunk=4, impl=impl)
    torch.testing.assert_close(last, whole[..., 5:, :])
    first, state = lightning_attention(*(x[..., :5, :] for x in (q, k, v)), DECAY, impl=impl, return_state=True)  # fmt: skip
    rest, state = lightning_attention(
        *(x[..., 5:, :] for x in (q, k, v)), DECAY, chunk=4, impl=impl, state=state, return_state=True
    )
    torch.testing.assert_close(torch.cat([first, rest], -2), whole)
    torch.testing.assert_close(state, end)
    for got, want in zip(
        torch.autograd.grad((rest**2).sum() + state.sum(), (k, v)),
        torch.autograd.grad((whole[..., 5:, :] ** 2).sum() + end.sum(), (k, v)),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_gradcheck_with_state():
    q, k, v = (x.requires_grad_() for x in qkv(3, length=5, dim=2, value_dim=2))
    state = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *x: lightning_attention(*x[:3], DECAY, chunk=2, state=x[3], return_state=True),
        (q, k, v, state),
    )


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 20), st.integers(1, 9), st.floats(0, 1), st.sampled_from(["naive", "blocked", "chunked"])
)
def test_steps_are_the_sequence(length, chunk, decay, impl):
    q, k, v = qkv(2, length=length)
    decay = torch.tensor(decay, dtype=torch.float64)
    state = torch.zeros(2, 4, 3, dtype=torch.float64)
    rows = []
    for s in range(length):
        out, state = lightning_step(state, q[:, s], k[:, s], v[:, s], decay)
        rows.append(out)
    torch.testing.assert_close(
        torch.stack(rows, 1), lightning_attention(q, k, v, decay, chunk=chunk, impl=impl)
    )


@pytest.mark.parametrize("impl", ["blocked", "chunked"])
def test_bfloat16_sums_in_float32(impl):
    q, k, v = qkv(1, 2, length=1500, dtype=torch.bfloat16)
    decay = torch.tensor([0.99, 1.0])
    exact, state = lightning_attention(*(x.double() for x in (q, k, v)), decay, impl=impl, return_state=True)
    out, low = lightning_attention(q, k, v, decay, impl=impl, return_state=True)
    assert out.dtype == torch.bfloat16 and low.dtype == torch.float32
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-3)
    torch.testing.assert_close(low.double(), state, rtol=1e-4, atol=1e-3)


def test_broadcast_and_layout():
    q, k, v = qkv(2, 3, length=6)
    out = lightning_attention(q, k[:, :1], v, 0.5)
    torch.testing.assert_close(out, lightning_attention(q, k[:, :1].expand_as(k), v, torch.full((3,), 0.5)))
    swapped = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    torch.testing.assert_close(lightning_attention(*swapped, DECAY), lightning_attention(q, k, v, DECAY))


def test_a_number_as_decay_is_exact():
    q, k, v = qkv(40, length=9)
    exact = written_out(q, k, v, torch.tensor(0.9, dtype=torch.float64))
    torch.testing.assert_close(lightning_attention(q, k, v, 0.9), exact, rtol=1e-12, atol=1e-12)


def test_bad_input():
    q, k, v = qkv(2, length=5)
    for arguments, options, message in (
        ((q, k[..., :3], v, 0.5), {}, "do not fit"),
        ((q, k[:, :4], v[:, :4], 0.5), {}, "as many keys"),
        ((q, k, v, 1.5), {}, "in \\[0, 1\\]"),
        ((q, k, v, torch.tensor(0.5, requires_grad=True)), {}, "gradient"),
        ((q, k, v, torch.ones(3)), {}, "broadcast"),
        ((q, k, v, 0.5), {"impl": "fast"}, "impl"),
        ((q, k, v, 0.5), {"chunk": 0}, "chunk"),
        ((q[:, 1:], k, v, 0.5), {"documents": torch.zeros(5)}, "documents"),
    ):
        with pytest.raises(ValueError, match=message):
            lightning_attention(*arguments, **options)
    with pytest.raises(ValueError, match="do not fit"):
        lightning_step(torch.zeros(2, 4, 3), q[:, 0], k[:, 0], q[:, 0], torch.tensor(0.5))
    with pytest.raises(ValueError, match="do not fit"):
        lrpe(q, torch.ones(3), torch.arange(5))
    for arguments in ((0, 1), (1, 0), (2, 2, "linear")):
        with pytest.raises(ValueError, match="at least 1|schedule"):
            transnormer_decay(*arguments)


def test_decay_by_hand():
    torch.testing.assert_close(
        transnormer_decay(2, 3), torch.tensor([[-4.0, -8], [-2, -4], [0, 0]], dtype=torch.float64).exp()
    )
    alibi = transnormer_decay(2, 2, "alibi")
    torch.testing.assert_close(alibi, torch.tensor([[-1 / 16, -1 / 256], [0, 0]], dtype=torch.float64).exp())
    torch.testing.assert_close(transnormer_decay(1, 1)[0, 0].item(), math.exp(-8))


def test_lrpe_is_a_cosine_of_the_distance():
    q, k, _ = qkv(2, 3, length=6)
    theta = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    positions = torch.arange(6)
    product = lrpe(q, theta, positions) @ lrpe(k, theta, positions + 2).mT
    gap = positions[:, None] - (positions + 2)
    cosine = torch.cos(theta[:, None, None] * gap[..., None])
    torch.testing.assert_close(product, torch.einsum("bhsc,bhtc,hstc->bhst", q, k, cosine))
    assert torch.autograd.gradcheck(lambda angle: lrpe(q, angle, positions), theta)
    rows = lrpe(q, theta, torch.tensor([[[0]], [[7]]]) + positions)
    torch.testing.assert_close(rows[1], lrpe(q[1], theta, positions + 7))


def test_layers_by_hand():
    x = torch.tensor([3.0, 4.0])
    torch.testing.assert_close(srms_norm(x), x / 5 * 2**0.5)
    assert srms_norm(torch.zeros(3)).eq(0).all()
    layer = SGLU(4, 5).double()
    v, u = layer.vu.weight.split(5)
    x = torch.randn(2, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x), ((x @ v.T) * (x @ u.T)) @ layer.out.weight.T)
    attention = GLA(6, 3, DECAY).double()
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    wq, wk, wv, wu = attention.qkvu.weight.split(6)
    heads = [
        (part.unflatten(-1, (3, 2)).transpose(1, 2))
        for part in (F.silu(x @ wq.T), F.silu(x @ wk.T), x @ wv.T)
    ]
    mixed = written_out(*heads, DECAY).transpose(1, 2).flatten(2)
    mixed = mixed / (mixed.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(attention(x)[0], (mixed * (x @ wu.T)) @ attention.out.weight.T)


@pytest.mark.parametrize("options", [{}, {"phase": "all", "decay": "alibi"}, {"phase": "none", "gate": False, "decay": None}])  # fmt: skip
def test_transnormer(options):
    torch.manual_seed(0)
    model = TransNormer(11, dim=12, depth=3, num_heads=2, **options).double()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    tokens = torch.randint(11, (2, 9))
    logits = model(tokens)
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 11
    moved = (model(changed) - logits).abs().amax((0, 2)) > 1e-12
    assert moved.tolist() == [False] * 5 + [True] * 4
    state, pieces = model.start(2), []
    for piece in tokens.split([4, 1, 3, 1], 1):
        out, state = model.extend(piece, state)
        pieces.append(out)
    torch.testing.assert_close(torch.cat(pieces, 1), logits)
    assert state[-1].tolist() == [9, 9]
    loss = model(tokens, tokens)[1]
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), tokens.flatten()))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    decoded = greedy(model.step, model.start(2), start=tokens[:, 0], end=10, max_length=4)
    assert decoded.tokens[:, 0].equal(logits[:, 0].argmax(-1))
    assert [attention.theta is not None for attention in model.attentions] == {
        "first": [True, False, False], "all": [True] * 3, "none": [False] * 3,
    }[options.get("phase", "first")]  # fmt: skip


def test_transnormer_bad_input():
    for arguments, options, message in (
        ((0,), {}, "sizes"),
        ((5,), {"dim": 6}, "multiple"),
        ((5,), {"phase": "second"}, "phase"),
        ((5,), {"decay": torch.ones(3, 4)}, "decay must be"),
        ((5,), {"decay": torch.ones(2, 3)}, "one a head"),
    ):
        with pytest.raises(ValueError, match=message):
            TransNormer(*arguments, **options)
    with pytest.raises(ValueError, match="tokens"):
        TransNormer(5)(torch.zeros(2, 0, dtype=torch.int64))
