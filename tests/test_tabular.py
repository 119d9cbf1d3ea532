import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lib.tabular import (
    Categorical,
    Hopular,
    HopularBlock,
    Numeric,
    TabularSpec,
    corrupt,
    decode,
    encode,
    feature_loss_weight,
    hopular_loss,
)

NAN = math.nan
ROWS = torch.tensor([[1.0, 0.0, 2.0], [3.0, 2.0, 0.0], [5.0, NAN, 1.0], [NAN, 1.0, 2.0]])
SPEC = TabularSpec((Numeric(3.0, 2.0), Categorical(3), Categorical(3)), 2)


def model_of(rows=ROWS, spec=SPEC, **options):
    torch.manual_seed(0)
    return Hopular(spec, encode(rows, spec)[0], **({"size": 4, "num_heads": 2, "num_blocks": 2} | options))


def test_fit_uses_the_values_that_are_there():
    spec = TabularSpec.fit(ROWS, target=2, categorical={1: 3, 2: 3})
    assert spec.columns[0].mean == 3 and math.isclose(spec.columns[0].std, math.sqrt(8 / 3))
    assert spec.sizes == (1, 3, 3) and spec.width == 10 and spec.target == (2,)
    assert spec.slots() == [slice(0, 2), slice(2, 6), slice(6, 10)]
    constant = TabularSpec.fit(torch.ones(3, 2), target=[1])
    assert constant.columns[0] == Numeric(1.0, 1.0)


def test_encode_by_hand():
    x, missing = encode(ROWS, SPEC)
    assert x[0].tolist() == [-1, 0, 1, 0, 0, 0, 0, 0, 1, 0]
    assert x[2].tolist() == [1, 0, 0, 0, 0, 0, 0, 1, 0, 0]  # missing: zeros, also in the mask slot
    assert missing.nonzero().tolist() == [[2, 1], [3, 0]]
    hidden, _ = encode(ROWS, SPEC, hide_target=True)
    assert torch.equal(hidden[:, :6], x[:, :6]) and (hidden[:, 6:] == torch.tensor([0, 0, 0, 1])).all()


def test_decode_undoes_encode():
    rows = ROWS[:2]
    out = torch.cat([part[:, :-1] for part in encode(rows, SPEC)[0].split([2, 4, 4], 1)], 1)
    assert torch.equal(decode(out, SPEC), rows)


def test_corrupt_frequencies_and_targets():
    generator = torch.Generator().manual_seed(0)
    rows = torch.stack([torch.full((20000,), 7.0), torch.zeros(20000), torch.ones(20000)], 1)
    x, _ = encode(rows, SPEC)
    missing = torch.zeros(20000, 3, dtype=torch.bool)
    missing[:100] = True
    noisy, selected = corrupt(
        x, SPEC, missing=missing, p_noise=0.5, p_mask=0.2, p_replace=0.4, generator=generator
    )
    assert (x == encode(rows, SPEC)[0]).all(), "the input is left alone"
    assert selected[:, 2].all() and (noisy[:, 6:] == torch.tensor([0, 0, 0, 1])).all()
    assert torch.equal(noisy[:100, :6], x[:100, :6])
    assert abs(selected[:, 0].double().mean() - 0.5) < 0.02
    for slot, changed in ((1, noisy[:, 0] != x[:, 0]), (5, (noisy[:, 2:5] != x[:, 2:5]).any(1))):
        masked = noisy[:, slot] == 1
        assert abs(masked.double().mean() - 0.1) < 0.01 and not (masked & ~selected[:, slot // 4]).any()
        replaced = (changed & ~masked).double().mean()
        assert abs(replaced - (0.2 if slot == 1 else 0.2 * 2 / 3)) < 0.015  # a third draws its own code again
    fresh = noisy[(noisy[:, 0] != x[:, 0]) & (noisy[:, 1] == 0), 0]
    assert abs(fresh.mean()) < 0.06 and abs(fresh.std() - 1) < 0.05


@pytest.mark.parametrize("masked", [False, True])
def test_block_against_pytorch_attention(masked):
    torch.manual_seed(1)
    block = HopularBlock(5, 8, num_heads=4, scaling=1.7).double()
    state, tokens, memory = (torch.randn(n, 40).double().requires_grad_() for n in (6, 6, 9))
    mask = torch.rand(6, 9) < 0.7 if masked else None

    def attention(lookup, size):
        other = nn.MultiheadAttention(size, 4, batch_first=True).double()
        with torch.no_grad():
            value = lookup.value.transpose(1, 2).flatten(0, 1)  # one matrix for all heads
            weights = (1.7 * lookup.query.weight, lookup.key.weight, value)
            other.in_proj_weight.copy_(torch.cat(weights))
            other.in_proj_bias.copy_(torch.cat([1.7 * lookup.query.bias, lookup.key.bias, torch.zeros(size)]))
            other.out_proj.load_state_dict(lookup.out.state_dict())
        return other

    def oracle():
        s, m = F.layer_norm(state, (40,)), F.layer_norm(memory, (40,))
        hide = None if mask is None else ~mask
        s = s + attention(block.sample_lookup, 40)(s[None], m[None], m[None], attn_mask=hide)[0][0]
        t, stored = (F.layer_norm(each.view(6, 5, 8), (8,)) for each in (s, tokens))
        return (t + attention(block.feature_lookup, 8)(t, stored, stored)[0]).flatten(1)

    mine, theirs = block(state, memory, tokens, mask), oracle()
    assert torch.allclose(mine, theirs, atol=1e-10)
    inputs, weight = (state, memory, tokens), torch.randn(6, 40).double()
    for a, b in zip(
        torch.autograd.grad((mine * weight).sum(), inputs),
        torch.autograd.grad((theirs * weight).sum(), inputs),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-7)  # beta is kept in float32


def test_one_head_and_identities_are_kernel_regression():
    block = HopularBlock(3, 4, num_heads=1, scaling=2.0, features=False).double()
    lookup = block.sample_lookup
    with torch.no_grad():
        for linear in (lookup.query, lookup.key, lookup.out):
            linear.weight.copy_(torch.eye(12))
            linear.bias.zero_()
        lookup.value.copy_(torch.eye(12)[None])
    state, memory = torch.randn(5, 12).double(), torch.randn(7, 12).double()
    s, m = F.layer_norm(state, (12,)), F.layer_norm(memory, (12,))
    beta = 2.0 / math.sqrt(12)
    kernel = torch.exp(-beta / 2 * torch.cdist(s, m) ** 2)  # layer norm makes all lengths nearly equal
    kernel = kernel / kernel.sum(1, keepdim=True)
    assert torch.allclose(block.association(state, memory)[0], (beta * s @ m.T).softmax(1))
    assert torch.allclose(block.association(state, memory)[0], kernel, atol=1e-4)
    assert torch.allclose(block(state, memory, state), s + (beta * s @ m.T).softmax(1) @ m)


def test_own_row_is_never_read():
    x, _ = encode(ROWS, SPEC, hide_target=True)
    ids = torch.arange(4)
    model = model_of(dropouts=(0.0, 0.0, 0.0))
    before, open_mask = model(x, ids), torch.ones(4, 4, dtype=torch.bool)
    before_open = model(x, memory_mask=open_mask)
    model.memory_x[1, 6:9] = torch.tensor([0.0, 1.0, 0.0])
    after = model(x, ids)
    assert torch.equal(before[1], after[1]) and not torch.equal(before[0], after[0])
    assert not torch.equal(before_open[1], model(x, memory_mask=open_mask)[1])
    weights = model.association(x, ids)
    assert weights.shape == (2, 2, 4, 4) and (weights.diagonal(dim1=2, dim2=3) == 0).all()
    assert torch.allclose(weights.sum(-1), torch.ones(2, 2, 4))
    with pytest.raises(ValueError, match="own target"):
        model(x)
    model.eval()(x)


def test_dropout_and_ablations():
    x, _ = encode(ROWS, SPEC, hide_target=True)
    ids = torch.arange(4)
    model = model_of(dropouts=(0.0, 0.5, 0.0))
    assert not torch.equal(model(x, ids), model(x, ids))
    model.eval()
    out, states = model(x, return_blocks=True)
    assert len(states) == 3 and torch.equal(model.summary(states[-1]), out)
    assert model_of(samples=False, features=False, num_blocks=1).eval()(x).shape == (4, 7)
    alone = model_of(samples=False).eval()
    before = alone(x)
    alone.memory_x.zero_()
    assert torch.equal(before, alone(x)), "without H_s the memory plays no part"
    with pytest.raises(ValueError, match="does not read"):
        alone.association(x)


def test_memory_and_input_have_gradients():
    model = model_of()
    x, _ = encode(ROWS, SPEC, hide_target=True)
    model(x, torch.arange(4)).square().sum().backward()
    for name, p in model.named_parameters():
        if p.requires_grad and "key.bias" not in name:  # a constant in all scores changes nothing
            assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_loss_by_hand():
    x, missing = encode(ROWS, SPEC)
    out = torch.randn(4, 7)
    selected = torch.ones(4, 3, dtype=torch.bool)
    numbers = ((out[:3, 0] - torch.tensor([-1.0, 0.0, 1.0])) ** 2).mean()
    codes = F.cross_entropy(out[[0, 1, 3], 1:4], torch.tensor([0, 2, 1]))
    target = F.cross_entropy(out[:, 4:], torch.tensor([2, 0, 1, 2]))
    for weight in (0.0, 0.3, 1.0):
        loss = hopular_loss(out, x, SPEC, selected, missing, weight=weight)
        assert torch.allclose(loss, weight * (numbers + codes) / 2 + (1 - weight) * target)
    only = selected.clone()
    only[:, :2] = False
    assert torch.allclose(hopular_loss(out, x, SPEC, only, missing, weight=1.0), target)
    with pytest.raises(ValueError, match="nothing to count"):
        hopular_loss(out, x, SPEC, ~selected, missing, weight=0.5)


def test_weight_goes_from_features_to_targets():
    weights = [feature_loss_weight(i, 11) for i in range(11)]
    assert weights[0] == 1 and abs(weights[5] - 0.5) < 1e-12 and abs(weights[-1]) < 1e-12
    assert weights == sorted(weights, reverse=True) and feature_loss_weight(0, 1) == 1


def test_bad_input():
    with pytest.raises(ValueError, match="positive std"):
        Numeric(0.0, 0.0)
    with pytest.raises(ValueError, match="num_classes"):
        Categorical(1)
    with pytest.raises(TypeError, match="Numeric or Categorical"):
        TabularSpec((3, Numeric()), 0)
    for target in ((), (0, 1), 5, (0, 0)):
        with pytest.raises(ValueError):
            TabularSpec((Numeric(), Numeric()), target)
    with pytest.raises(ValueError, match="no values"):
        TabularSpec.fit(torch.full((2, 2), NAN), target=1)
    with pytest.raises(ValueError, match="codes"):
        encode(torch.tensor([[0.0, 3.0, 0.0]]), SPEC)
    with pytest.raises(TypeError):
        encode(torch.ones(2, 3).long(), SPEC)
    with pytest.raises(ValueError, match="infinities"):
        encode(torch.full((2, 3), math.inf), SPEC)
    with pytest.raises(ValueError, match="shape"):
        decode(torch.ones(2, 3), SPEC)
    x, missing = encode(ROWS, SPEC)
    with pytest.raises(ValueError, match="probabilities"):
        corrupt(x, SPEC, p_mask=0.6, p_replace=0.6)
    with pytest.raises(ValueError, match="missing"):
        corrupt(x, SPEC, missing=missing[:2])
    with pytest.raises(ValueError, match="multiple"):
        model_of(size=5)
    with pytest.raises(ValueError, match="scaling"):
        model_of(scaling=0.0)
    with pytest.raises(ValueError, match="one id"):
        Hopular(SPEC, x, torch.arange(3))
    model = model_of()
    with pytest.raises(ValueError, match="not both"):
        model(x, torch.arange(4), memory_mask=torch.ones(4, 4).bool())
    with pytest.raises(ValueError, match="ids"):
        model(x, torch.arange(3))
    with pytest.raises(ValueError, match="memory_mask"):
        model(x, memory_mask=torch.ones(4, 3).bool())
    with pytest.raises(ValueError, match="weight"):
        hopular_loss(torch.ones(4, 7), x, SPEC, missing, weight=1.5)
    with pytest.raises(ValueError, match="step"):
        feature_loss_weight(3, 3)


def test_gradient_flows_through_the_memory():
    model = model_of(dropouts=(0, 0, 0)).double()
    x = encode(ROWS, SPEC, hide_target=True)[0].double()

    def loss():
        return model(x, torch.arange(4)).square().sum()

    (gradient,) = torch.autograd.grad(loss(), model.embed_weight)
    place, step = gradient.abs().argmax().item(), 1e-6
    flat = model.embed_weight.detach().view(-1)  # shares memory with the parameter
    with torch.no_grad():
        flat[place] += step
        up = loss()
        flat[place] -= 2 * step
        down = loss()
    assert math.isclose(gradient.view(-1)[place].item(), ((up - down) / (2 * step)).item(), rel_tol=1e-6)
