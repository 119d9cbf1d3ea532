"""lib.models.nonlinearity: counts by hand, and the scaled perceptron against its formula."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from lib.models import GPT, ScaledPerceptron, count_nonlinear_ops


def gpt(**options):
    torch.manual_seed(0)
    return GPT(11, 8, dim=8, depth=3, num_heads=2, **options)


def parameters_of(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu", "identity"])
@pytest.mark.parametrize("norm", ["layer", "rms", "none"])
def test_counts_by_hand(activation, norm):
    expected = dict.fromkeys(("softmax", "norm", "gelu", "relu", "silu", "tanh", "sigmoid"), 0)
    expected["softmax"] = 3 * 2 * 5  # depth, heads, positions
    expected["norm"] = 0 if norm == "none" else (2 * 3 + 1) * 5
    if activation != "identity":
        expected[activation] = 3 * 5 * 4 * 8
    for attention in ("softmax", "entropy"):
        model = gpt(norm=norm, activation=activation, attention=attention).train()
        assert count_nonlinear_ops(model, 5) == expected
        assert model.training and not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError, match="context"):
        count_nonlinear_ops(model, 9)
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError, match="length"):
        count_nonlinear_ops(model, 0)


def test_scaled_perceptron_is_its_formula():
    torch.manual_seed(0)
    for fused in (False, True):
        layer = ScaledPerceptron(4, fused=fused, std=0.5).double()
        x = torch.randn(2, 3, 4, dtype=torch.float64)
        torch.testing.assert_close(x + layer(x), x + layer.ffn(x))  # at the start both scales are 1
        layer.alpha.data.fill_(4.0), layer.beta.data.fill_(0.7)
        torch.testing.assert_close(x + layer(x), 0.7 * x + layer.ffn(x) / 4)
    assert parameters_of(ScaledPerceptron(4, fused=True)) == 16 + 4 + 2
    assert parameters_of(ScaledPerceptron(4, "relu", scaled=False)) == 8 * 16 + 4 + 16
    plain = ScaledPerceptron(4, "relu", scaled=False)
    x = torch.randn(5, 4)
    torch.testing.assert_close(plain(x), plain.ffn[2](plain.ffn[0](x).relu()))


@pytest.mark.parametrize("normalisation", ["weight", "spectral"])
def test_static_normalisation(normalisation):
    torch.manual_seed(0)
    layer = ScaledPerceptron(6, "relu", normalisation=normalisation, std=0.5)
    x = torch.randn(3, 6)
    for _ in range(60):  # power iteration runs in training
        layer(x)
    layer.eval()
    weight = layer.ffn[0].weight
    if normalisation == "spectral":
        assert torch.linalg.matrix_norm(weight, 2).item() == pytest.approx(1, abs=1e-3)
    else:
        lengths = layer.ffn[0].parametrizations.weight.original0
        torch.testing.assert_close(weight.norm(dim=1, keepdim=True), lengths)
    before = layer(x)
    for linear in (layer.ffn[0], layer.ffn[2]):
        parametrize.remove_parametrizations(linear, "weight")
        assert type(linear) is nn.Linear
    torch.testing.assert_close(layer(x), before)


def test_in_a_model():
    model = gpt(norm="none", activation="identity", mlp=lambda d, a: ScaledPerceptron(d, a, fused=True))
    tokens = torch.randint(11, (2, 8))
    model(tokens, tokens)[1].backward()
    assert all(p.grad is not None for block in model.blocks for p in block.mlp.parameters())
    full = gpt(norm="none", activation="identity")
    weights = [sum(p.numel() for p in m.blocks[0].mlp.parameters() if p.ndim == 2) for m in (full, model)]
    assert weights[0] == 8 * weights[1]


def test_bad_input():
    with pytest.raises(ValueError, match="without activation"):
        ScaledPerceptron(4, "relu", fused=True)
    with pytest.raises(ValueError, match="normalisation must be"):
        ScaledPerceptron(4, normalisation="layer")
    with pytest.raises(ValueError, match="activation must be"):
        ScaledPerceptron(4, "swish")
