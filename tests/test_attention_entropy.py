"""Attention that returns its entropy, the measures of it and the penalty: against scipy, brute force and the reference cells."""

import copy
import math

import pytest
import torch
from scipy.special import gammaln
from scipy.stats import entropy as scipy_entropy
from torch.autograd import grad, gradcheck

from lib.attention import entropy_attention
from lib.attention.kinds import Entropy
from lib.book import load_reference
from lib.information import attention_entropy, causal_entropy_bound
from lib.losses import entropy_regulariser
from lib.models import GPT

DOUBLE = {"dtype": torch.float64}


def draw(*shape, seed=0):
    return torch.randn(*shape, **DOUBLE, generator=torch.Generator().manual_seed(seed))


def temperatures(*shape, seed=9):
    return 0.2 + draw(*shape, seed=seed).abs()


@pytest.mark.parametrize("block_size", [1, 3, 512])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(5, 5), (2, 7), (1, 1)])
def test_equals_explicit_weights(lengths, causal, block_size):
    new, total = lengths
    q, k, v = draw(2, 3, new, 4), draw(2, 3, total, 4, seed=1), draw(2, 3, total, 5, seed=2)
    t = temperatures(3, new)
    scores = q @ k.mT / 2 / t[..., None]
    if causal:
        scores = scores.masked_fill(torch.ones(new, total).triu(total - new + 1).bool(), -torch.inf)
    expected = scores.softmax(-1)
    out, entropy, weights = entropy_attention(
        q, k, v, t, causal=causal, block_size=block_size, return_weights=True
    )
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(out, expected @ v)
    torch.testing.assert_close(entropy, torch.tensor(scipy_entropy(expected.numpy(), axis=-1)))
    torch.testing.assert_close(entropy, attention_entropy(expected, eps=0), atol=1e-12, rtol=0)


def test_masks_broadcasting_and_rows_that_see_nothing():
    q, k, v = draw(2, 1, 4, 3), draw(3, 5, 3, seed=1), draw(5, 2, seed=2)
    mask = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]).bool()
    for block_size in (2, 512):
        out, entropy, weights = entropy_attention(
            q, k, v, mask=mask, block_size=block_size, return_weights=True
        )
        assert out.shape == (2, 3, 4, 2) and entropy.shape == (2, 3, 4)
        assert (weights[..., ~mask] == 0).all() and (out[:, :, 1] == 0).all()
        assert (entropy[..., 1] == 0).all() and entropy[..., 3].abs().max() < 1e-12
        torch.testing.assert_close(entropy, attention_entropy(weights, 0), atol=1e-12, rtol=0)
        torch.testing.assert_close(out, weights @ v)


@pytest.mark.parametrize("block_size", [2, 512])
def test_gradients(block_size):
    inputs = [draw(2, 5, 3, seed=i).requires_grad_() for i in range(3)]
    inputs.append(temperatures(2, 5).requires_grad_())
    assert gradcheck(lambda *a: entropy_attention(*a, causal=True, block_size=block_size), inputs)


def test_gradients_through_masks_and_broadcasting():
    mask = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]).bool()
    inputs = [draw(2, 1, 4, 3), draw(2, 5, 3, seed=1), draw(5, 2, seed=2)]
    assert gradcheck(
        lambda *a: entropy_attention(*a, mask=mask, block_size=2), [x.requires_grad_() for x in inputs]
    )


def test_even_rows_reach_the_bound():
    for length in (1, 2, 9, 128):
        q = torch.zeros(1, 2, length, 4, **DOUBLE)
        _, entropy = entropy_attention(q, q, q, causal=True)
        assert entropy.mean().item() == pytest.approx(causal_entropy_bound(length), abs=1e-9)
        assert causal_entropy_bound(length) == pytest.approx(float(gammaln(length + 1)) / length)


def test_attention_entropy():
    weights = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]], **DOUBLE)
    exact = torch.tensor([math.log(2), 0, 0], **DOUBLE)
    torch.testing.assert_close(attention_entropy(weights, 0), exact)
    assert ((exact - attention_entropy(weights)) <= 3e-9).all()
    rows = draw(4, 6).softmax(-1)
    torch.testing.assert_close(attention_entropy(rows, 0), torch.tensor(scipy_entropy(rows.numpy(), axis=-1)))
    for eps in (0, 1e-9):  # masked zeros have finite gradients
        weights.requires_grad_()
        (slope,) = grad(attention_entropy(weights, eps).sum(), weights)
        assert slope.isfinite().all()
    assert gradcheck(attention_entropy, [rows.requires_grad_()])


def test_the_kind_keeps_its_entropy():
    torch.manual_seed(0)
    model = GPT(11, 6, dim=8, depth=2, num_heads=2, attention="entropy", positions="none")
    kinds = [block.attention.kind for block in model.blocks]
    assert [tuple(kind.temperature.shape) for kind in kinds] == [(2, 6)] * 2
    model(torch.randint(11, (3, 6)))
    assert all(kind.entropy.shape == (3, 2, 6) and kind.entropy.requires_grad for kind in kinds)
    copied = copy.deepcopy(model)
    assert copied.blocks[0].attention.kind.entropy is None
    # the last temperature serves the positions beyond the context
    with torch.no_grad():
        for kind in kinds:
            kind.temperature.uniform_(0.5, 2)
    q = torch.randn(1, 2, 9, 4)
    t = torch.cat([kinds[0].temperature, kinds[0].temperature[:, -1:].expand(2, 3)], 1)
    torch.testing.assert_close(kinds[0](q, q, q), entropy_attention(q, q, q, t, causal=True)[0])
    torch.testing.assert_close(kinds[0](q[:, :, 8:], q, q), kinds[0](q, q, q)[:, :, 8:])


def test_the_kind_without_learning_is_plain_attention():
    kind = Entropy(dim=8, num_heads=2, context=6, layer=0, depth=1, learn=False)
    q, k, v = (torch.randn(2, 2, 5, 4) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(kind(q, k, v), expected)
    assert not list(kind.parameters()) and kind.entropy.shape == (2, 2, 5)


def released_loss(attentions, thresholds, gamma):
    """What the published code computes without its coefficient, in loops; one row of thresholds for all layers."""
    total = 0.0
    for weights in attentions:
        e_max = math.log(weights.shape[-1])
        for head in range(weights.shape[1]):
            for sequence in weights[:, head]:
                for row in sequence:
                    found = -sum(a * math.log(a + 1e-9) for a in row.tolist())
                    deviation = found - thresholds[head] * e_max
                    total += deviation**2 if abs(deviation) > gamma * e_max else 0.0
    return total / attentions[0].shape[1] / len(attentions)


def test_regulariser_in_loops():
    attentions = [
        (3 * draw(2, 3, 5, 5, seed=i)).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf).softmax(-1)
        for i in range(2)
    ]
    entropies = [attention_entropy(weights) for weights in attentions]
    thresholds = torch.tensor([0.3, 0.5, 0.7], **DOUBLE)
    theta = thresholds.expand(2, 3)
    assert entropy_regulariser(entropies, theta, reduce="released").item() == pytest.approx(
        released_loss(attentions, thresholds.tolist(), 0.2)
    )
    theta = torch.tensor([[0.3, 0.5, 0.7], [0.1, 0.2, 0.9]], **DOUBLE)
    expected = 0.0
    for layer in range(2):
        for head in range(3):
            for sequence in range(2):
                d = entropies[layer][sequence, head].mean() - theta[layer, head] * 2.0
                expected += d**2 / 12 if abs(d) > 0.1 * 2.0 else 0.0
    found = entropy_regulariser(entropies, theta, gamma=0.1, e_max=2.0)
    torch.testing.assert_close(found, expected)


def test_regulariser_gradients_and_edge():
    entropies = [draw(2, 3, 5, seed=i).abs().requires_grad_() for i in range(2)]
    theta = draw(2, 3, seed=7).requires_grad_()
    for reduce in ("mean_position", "released"):
        assert gradcheck(
            lambda theta, *e, reduce=reduce: entropy_regulariser(e, theta, gamma=0.05, reduce=reduce),
            (theta, *entropies),
        )
    one = torch.full((1, 1, 4), 1.0, **DOUBLE)
    inside, outside = (
        entropy_regulariser([one], torch.tensor([[share]], **DOUBLE), gamma=0.25, e_max=2.0).item()
        for share in (0.26, 0.24)
    )
    assert inside == 0 and outside == pytest.approx(0.52**2)


def test_reference_cells():
    reference = load_reference("entropy-guided-attention", "entropy_guided_attention")
    penalty = load_reference("entropy-guided-attention", "entropy_penalty")
    inputs = [draw(2, 3, 6, 4, seed=i).requires_grad_() for i in range(3)]
    inputs.append(temperatures(3, 6).requires_grad_())
    theta = torch.tensor([[0.2, 0.5, 0.9]], **DOUBLE)
    results = []
    for attend, regularise in (
        (reference, lambda e: penalty(e.mean((0, 2))[None], theta, math.log(6))),
        (
            lambda *a: entropy_attention(*a, causal=True, block_size=4),
            lambda e: entropy_regulariser([e.mean(0, keepdim=True)], theta),
        ),
    ):
        out, entropy = attend(*inputs)
        loss = out.square().sum() + regularise(entropy)
        results.append([out, entropy, loss, *grad(loss, inputs)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-7, rtol=1e-6)  # eps inside the reference's logarithm


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: entropy_attention(*[torch.ones(2, 3)] * 3, torch.zeros(2)), "temperature must be positive"),
        (lambda: entropy_attention(*[torch.ones(2, 3)] * 3, block_size=0), "block_size"),
        (lambda: entropy_attention(torch.ones(3, 2), *[torch.ones(2, 2)] * 2, causal=True), "as many keys"),
        (lambda: attention_entropy(torch.ones(2), -1.0), "eps >= 0"),
        (lambda: attention_entropy(torch.tensor(1.0)), "expected weights"),
        (lambda: causal_entropy_bound(0), "length must be at least 1"),
        (lambda: entropy_regulariser([], torch.ones(0, 2)), "entropies must be"),
        (lambda: entropy_regulariser([torch.ones(2, 3, 4), torch.ones(2, 3, 5)], torch.ones(2, 3)), "alike"),
        (lambda: entropy_regulariser([torch.ones(2, 3, 4)], torch.ones(3)), r"theta must be \(layers, heads\)"),
        (lambda: entropy_regulariser([torch.ones(2, 3, 1)], torch.ones(1, 3)), "e_max must be positive"),
        (lambda: entropy_regulariser([torch.ones(2, 3, 4)], torch.ones(1, 3), gamma=-1), "gamma"),
        (lambda: entropy_regulariser([torch.ones(2, 3, 4)], torch.ones(1, 3), reduce="mean"), "reduce"),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_weights_must_be_floating_point():
    with pytest.raises(TypeError, match="floating point"):
        attention_entropy(torch.ones(2, 2, dtype=torch.long))
