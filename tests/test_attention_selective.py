"""lib.attention.selective against torch's attention, the chapter's reference cells and closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from lib.attention import SelectiveAttention, Temperature, selective_attention, spikiness
from lib.book import load_reference

DOUBLE = {"dtype": torch.float64}


def draw(*shape, seed=0):
    return torch.randn(*shape, **DOUBLE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(5, 5), (2, 7), (1, 1)])
def test_equals_attention_of_scaled_arguments(causal, lengths):
    new, total = lengths
    q, k, v = draw(2, 3, new, 4), draw(2, 3, total, 4, seed=1), draw(2, 3, total, 5, seed=2)
    tau_q, tau_k, tau_v = (draw(2, 3, n, 1, seed=n + i) for i, n in enumerate((new, total, total)))
    expected = torch.empty(2, 3, new, 5, **DOUBLE)
    for i in range(new):
        last = total - new + i + 1 if causal else total
        scores = [
            (q[..., i, :] * tau_q[..., i, :] * k[..., j, :] * tau_k[..., j, :]).sum(-1) / 2
            for j in range(last)
        ]
        weights = torch.stack(scores, -1).exp()
        weights = weights / weights.sum(-1, keepdim=True)
        expected[..., i, :] = sum(
            weights[..., j, None] * tau_v[..., j, :] * v[..., j, :] for j in range(last)
        )
    out, weights = selective_attention(q, k, v, tau_q, tau_k, tau_v, causal=causal, return_weights=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(selective_attention(q, k, v, tau_q, tau_k, tau_v, causal=causal), expected)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, new, **DOUBLE))


def test_masks_and_rows_that_see_nothing():
    q, k, v = draw(1, 4, 3), draw(1, 5, 3, seed=1), draw(1, 5, 3, seed=2)
    mask = torch.tensor(
        [[1, 0, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]], dtype=torch.bool
    )
    out, weights = selective_attention(
        q, k, v, tau_q=torch.full((4, 1), 2.0, **DOUBLE), mask=mask, return_weights=True
    )
    assert (weights[0][~mask] == 0).all() and (out[0, 1] == 0).all()
    torch.testing.assert_close(out[0, 3], v[0, 4])
    fused = selective_attention(q, k, v, tau_q=torch.full((4, 1), 2.0, **DOUBLE), mask=mask)
    torch.testing.assert_close(fused[0, [0, 2, 3]], out[0, [0, 2, 3]])


def test_gradients():
    inputs = [draw(2, 4, 3, seed=i).requires_grad_() for i in range(3)]
    taus = [draw(2, 4, 1, seed=i).requires_grad_() for i in range(3, 6)]
    assert torch.autograd.gradcheck(
        lambda *a: selective_attention(*a, causal=True, return_weights=True)[0], (*inputs, *taus)
    )


def test_temperature_by_hand():
    layer = Temperature(3, 2, width=4).double()
    torch.nn.init.normal_(layer.weight)
    layer.alpha.data = torch.tensor([0.0, 2.0], **DOUBLE)
    x = draw(2, 5, 3)
    tau = layer(x)
    assert tau.shape == (2, 2, 5, 1)
    for head in range(2):
        for position in range(5):
            inner = F.gelu(x[1, position] @ layer.hidden.weight.T + layer.hidden.bias)
            slope = 1 / (1 + math.exp(-layer.alpha[head].item()))
            expected = 1 + math.tanh((inner @ layer.weight[head]).item()) + slope * math.log(position + 1)
            assert tau[1, head, position, 0].item() == pytest.approx(expected)
    torch.testing.assert_close(layer(x[:, 3:], torch.tensor([4, 5])), tau[:, :, 3:])  # as with a cache
    ragged = layer(x, torch.tensor([[1, 1, 1, 1, 1], [1, 2, 3, 4, 5]]))  # each context its own counts
    torch.testing.assert_close(ragged[1], tau[1])
    assert (ragged[0, :, 1:] < tau[0, :, 1:]).all()


def test_temperature_starts_at_one():
    assert (Temperature(4, 2, mode="token")(torch.randn(3, 2, 6, 4)) == 1).all()
    tau = Temperature(4, 2)(torch.randn(3, 2, 6, 4))
    assert (tau[:, :, 0] == 1).all() and ((tau - 1).abs() < 2e-3).all()
    position = Temperature(4, 1, mode="position", alpha=0.0)
    assert position(torch.randn(1, 1, 3, 4)).flatten().tolist() == pytest.approx(
        [1, 1 + math.log(2) / 2, 1 + math.log(3) / 2]
    )


@pytest.mark.parametrize("temperatures", ["", "q", "qv", "qkv"])
@pytest.mark.parametrize("width", [None, 5])
@pytest.mark.parametrize("causal", [False, True])
def test_layer(temperatures, width, causal):
    torch.manual_seed(0)
    layer = SelectiveAttention(6, 2, temperatures=temperatures, causal=causal, width=width).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = draw(2, 4, 6)
    q, k, v = (part.view(2, 4, 2, 3).transpose(1, 2) for part in layer.qkv(x).chunk(3, -1))
    taus = {}
    for name, projected in zip("qkv", (q, k, v), strict=True):
        if name in temperatures:
            tau = layer.temperatures[name]
            inner = F.gelu(projected) if width is None else F.gelu(tau.hidden(x))[:, None]
            value = 1 + torch.tanh((inner * tau.weight[:, None]).sum(-1))
            if name == "q":
                n = torch.arange(1.0, 5, **DOUBLE) if causal else torch.full((4,), 4.0, **DOUBLE)
                value = value + torch.sigmoid(tau.alpha)[:, None] * n.log()
            taus[name] = value[..., None]
    mixed = F.scaled_dot_product_attention(
        q * taus.get("q", 1), k * taus.get("k", 1), v * taus.get("v", 1), is_causal=causal
    )
    torch.testing.assert_close(layer(x), layer.out(mixed.transpose(1, 2).flatten(2)))


def test_reference_cell():
    reference = load_reference("selective-attention", "selective_self_attention")
    temperature = load_reference("selective-attention", "temperature")
    x, W, w = draw(2, 5, 3), [draw(3, 4, seed=i) for i in range(3)], draw(2, 4, seed=9)
    alpha = torch.tensor(-0.5, **DOUBLE)
    visible = torch.arange(1, 6, **DOUBLE)
    inputs = [t.requires_grad_() for t in (x, *W)]
    theirs = reference(x, *W, *w, alpha)
    tau_q = temperature(x, W[0], w[0], alpha, visible)
    tau_v = temperature(x, W[2], w[1], alpha, torch.ones_like(visible))
    mine = selective_attention(x @ W[0], x @ W[1], x @ W[2], tau_q, tau_v=tau_v, causal=True)
    torch.testing.assert_close(mine, theirs)
    probe = draw(2, 5, 4, seed=3)
    for a, b in zip(
        torch.autograd.grad((mine * probe).sum(), inputs),
        torch.autograd.grad((theirs * probe).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=9))
def test_spikiness_bounds(values):
    weights = torch.tensor(values, **DOUBLE)
    found = spikiness(weights / weights.sum())
    assert 1 / len(values) - 1e-9 <= found <= 1 + 1e-9


def test_spikiness_by_hand():
    assert spikiness(torch.tensor([[0.0, 1, 0, 0], [0.25] * 4, [0.5, 0.5, 0, 0]])).tolist() == [0.25, 1, 0.5]
    for bad in (torch.zeros(2, 3), torch.tensor([0.5, -0.5, 1])):
        with pytest.raises(ValueError, match="non-negative"):
            spikiness(bad)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Temperature(3, mode="time"), "mode must be token, position or both"),
        (lambda: Temperature(0), "at least 1"),
        (lambda: Temperature(3)(torch.zeros(2, 5, 3)), r"features must be \(batch, 1, length, 3\)"),
        (lambda: Temperature(3, width=2)(torch.zeros(2, 1, 5, 3)), r"features must be \(batch, length, 3\)"),
        (lambda: SelectiveAttention(5, 2), "multiple of num_heads"),
        (lambda: SelectiveAttention(4, 2, temperatures="qx"), "letters q, k and v"),
        (lambda: selective_attention(*[torch.zeros(2, 3)] * 3, tau_v=torch.zeros(2, 3)), "tau_v must be one number"),
        (
            lambda: selective_attention(torch.zeros(4, 3), torch.zeros(2, 3), torch.zeros(2, 3), causal=True),
            "as many keys as queries",
        ),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
