"""lib.interp.activation_sparsity against exact counts."""

import numpy as np
import pytest
import torch
from torch import nn

from lib.book import load_reference
from lib.interp import activation_sparsity
from lib.models import GPT, TopK, ViT, mlp


def test_counts_by_hand():
    model = nn.Sequential(nn.Identity(), nn.ReLU())
    x = torch.tensor([[1.0, -1.0, 0.0, 2.0], [3.0, -1.0, 0.5, -2.0], [-1.0, -1.0, -1.0, -1.0]])
    (found,) = activation_sparsity(model, [x[:2], (x[2:], "a label")]).values()
    assert found.nonzero == 4 / 12 and found.dead == 1 / 4
    assert found.per_neuron.tolist() == pytest.approx([2 / 3, 0, 1 / 3, 1 / 3])
    assert found.per_input.tolist() == [0.5, 0.5, 0]


def test_agrees_with_numpy_and_with_the_reference_on_a_perceptron():
    torch.manual_seed(0)
    model, x = mlp((6, 33, 17, 3)), torch.randn(50, 6)
    found = activation_sparsity(model, x.split(7))
    hidden = x.numpy()
    reference = load_reference("lazy-neurons", "nonzero_share")
    for name, layer in (("2", model[1]), ("4", model[3])):
        hidden = np.maximum(hidden @ layer.weight.detach().numpy().T + layer.bias.detach().numpy(), 0)
        assert (
            found[name].nonzero == np.count_nonzero(hidden) / hidden.size == reference(torch.tensor(hidden))
        )
        assert found[name].dead == (hidden == 0).all(0).mean()
        assert found[name].per_neuron.numpy() == pytest.approx((hidden != 0).mean(0))


def test_tokens_are_inputs_in_transformers_and_the_model_is_left_alone():
    gpt, vit = GPT(11, 8, dim=16, depth=2, num_heads=2, activation="relu"), ViT(4, nn.ReLU, dim=16, depth=3)
    gpt.train()
    gpt.blocks[0].eval()
    found = activation_sparsity(gpt, [torch.randint(11, (5, 8))])
    assert list(found) == ["blocks.0.mlp.1", "blocks.1.mlp.1"]
    assert all(len(each.per_input) == 40 and len(each.per_neuron) == 64 for each in found.values())
    assert gpt.training and not gpt.blocks[0].mlp[1].training and gpt.blocks[1].mlp[1].training
    found = activation_sparsity(
        vit.eval(), [torch.rand(5, 1, 8, 8)]
    )  # also without the fused path of PyTorch's layers
    assert len(found) == 3 and all(len(each.per_input) == 80 for each in found.values())
    assert all(not module._forward_hooks for model in (gpt, vit) for module in model.modules())


def test_topk_is_counted_and_layers_can_be_named():
    model = nn.Sequential(nn.Linear(4, 20), nn.ReLU(), TopK(3), nn.Linear(20, 2))
    x = torch.randn(9, 4)
    assert set(activation_sparsity(model, [x])) == {"1", "2"}
    found = activation_sparsity(model, [x], layers=["2"])
    assert list(found) == ["2"] and found["2"].per_input.max() <= 3 / 20


def test_refuses():
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match="no nn.ReLU"):
        activation_sparsity(nn.Linear(4, 4), [x])
    model = mlp((4, 5, 2))
    with pytest.raises(ValueError, match="'nowhere'"):
        activation_sparsity(model, [x], layers=["nowhere"])
    with pytest.raises(ValueError, match="saw no inputs"):
        activation_sparsity(model, [])
    with pytest.raises(TypeError, match="floating-point"):
        activation_sparsity(nn.Sequential(nn.Identity()), [torch.arange(3)], layers=["0"])
    assert all(not module._forward_hooks for module in model.modules())
