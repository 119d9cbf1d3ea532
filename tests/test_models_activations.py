"""Activations with corrections against autograd, closed forms and the chapter's reference."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import nn

from lib.book import load_reference
from lib.models import CorrectedActivation, CRReLU, TopK, ViT, eafo_correction, eafo_step, topk_linear


def test_crrelu_values_by_hand():
    module = CRReLU()
    assert module(torch.tensor(-1.0)).item() == pytest.approx(-0.01 * math.exp(-0.5))
    assert module(torch.tensor(0.0)).item() == 0
    assert module(torch.tensor(2.0)).item() == pytest.approx(2 + 0.02 * math.exp(-2))
    assert [name for name, _ in module.named_parameters()] == ["eps"]
    fixed = CRReLU(0.2, learnable=False)
    assert not list(fixed.parameters()) and "eps" in fixed.state_dict()


def test_crrelu_agrees_with_the_reference_and_its_gradients_are_right():
    reference = load_reference("activation-search", "crrelu")
    x = torch.randn(7, 5, dtype=torch.float64).t().requires_grad_()  # not contiguous
    module = CRReLU(-0.4).double()
    assert torch.allclose(module(x), reference(x, module.eps))
    assert torch.autograd.gradcheck(
        lambda x, eps: torch.func.functional_call(module, {"eps": eps}, (x,)), (x, module.eps)
    )
    (slope,) = torch.autograd.grad(
        module(torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)), module.eps
    )
    assert slope.item() == pytest.approx(-math.exp(-0.5))


def test_corrected_activation_interpolates_and_vanishes_outside():
    grid = np.linspace(-2, 2, 5)
    module = CorrectedActivation(nn.Tanh(), grid, grid**2, eps=0.5).double()
    x = torch.tensor([-3.0, -2.0, -1.5, 0.25, 2.0, 2.01], dtype=torch.float64)
    expected = np.where(np.abs(x) <= 2, np.interp(x, grid, grid**2), 0)
    assert torch.allclose(module(x), torch.tanh(x) + 0.5 * torch.tensor(expected))
    x = torch.tensor([-1.7, -0.3, 0.9, 4.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, (x,))


def test_crrelu_is_the_corrected_relu():
    grid = np.linspace(-9, 9, 20_001)
    general = CorrectedActivation(nn.ReLU(), grid, grid * np.exp(-(grid**2) / 2), eps=0.3).double()
    x = torch.randn(200, dtype=torch.float64)
    assert torch.allclose(general(x), CRReLU(0.3).double()(x), atol=1e-6)


def test_correction_of_the_identity_is_the_shape_of_crrelu():
    grid = np.linspace(-6, 6, 2001)
    assert np.allclose(eafo_correction(lambda x: x, norm.pdf, grid), -grid * norm.pdf(grid), atol=1e-5)
    assert np.allclose(
        eafo_correction(lambda x: 3 * x - 1, norm.pdf, grid), -grid * norm.pdf(grid), atol=1e-5
    )  # a scale and a shift of f change nothing


def test_correction_agrees_with_the_closed_form_and_the_reference():
    grid = np.linspace(-6, 6, 4001)
    closed = -grid * norm.pdf(grid) + 2 * np.tanh(grid) * norm.pdf(grid)  # p' - p f''/f'
    assert np.allclose(eafo_correction(np.tanh, norm.pdf, grid), closed, atol=1e-4)
    reference = load_reference("activation-search", "entropy_correction")
    assert np.allclose(
        eafo_correction(np.tanh, norm.pdf, grid)[5:-5], reference(np.tanh, norm.pdf, grid)[5:-5], atol=1e-3
    )


def test_step_is_the_first_order_of_the_moved_inverse():
    grid, step = np.linspace(-5, 5, 4001), 1e-3
    stepped = eafo_step(np.tanh, norm.pdf, grid, step)
    assert np.allclose(
        stepped(grid) - np.tanh(grid), step * eafo_correction(np.tanh, norm.pdf, grid), atol=1e-12
    )


def test_vit_shapes_and_own_activations():
    model = ViT(7, CRReLU, image_size=12, patch_size=3, in_channels=3, dim=16, depth=3, num_heads=2)
    images = torch.randn(2, 3, 12, 12)
    assert model(images).shape == (2, 7) and model.features(images).shape == (2, 16)
    assert len({id(layer.activation) for layer in model.layers}) == 3
    model(images).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_vit_uses_the_activation():
    torch.manual_seed(0)
    model, images = ViT(activation=CRReLU).eval(), torch.rand(3, 1, 8, 8)
    before = model(images)
    with torch.no_grad():
        model.layers[1].activation.eps += 1
    assert not torch.allclose(before, model(images))
    # the position of a patch matters
    assert not torch.allclose(model(images), model(images.flip(-1)))


def test_bad_input():
    with pytest.raises(ValueError, match="finite"):
        CRReLU(math.nan)
    with pytest.raises(ValueError, match="shape"):
        CorrectedActivation(nn.Tanh(), np.arange(3), np.arange(4))
    with pytest.raises(ValueError, match="evenly"):
        CorrectedActivation(nn.Tanh(), np.array([0.0, 1.0, 3.0]), np.zeros(3))
    grid = np.linspace(-4, 4, 101)
    with pytest.raises(ValueError, match="positive"):
        eafo_step(np.tanh, norm.pdf, grid, 0.0)
    with pytest.raises(ValueError, match="too large"):
        eafo_step(np.tanh, norm.pdf, grid, 100.0)
    with pytest.raises(ValueError, match="strictly increasing"):
        eafo_correction(lambda x: np.maximum(x, 0), norm.pdf, grid)
    with pytest.raises(ValueError, match="patch_size"):
        ViT(patch_size=3)
    with pytest.raises(ValueError, match="num_heads"):
        ViT(dim=30, num_heads=4)


@pytest.mark.parametrize("dim", [-1, 0, 1])
def test_topk_keeps_exactly_k_and_passes_their_gradient(dim):
    reference = load_reference("lazy-neurons", "top_k")
    x = torch.randn(9, 7, 5, dtype=torch.float64).transpose(0, 2).requires_grad_()  # not contiguous
    kept = TopK(3, dim)(x)
    assert ((kept != 0).sum(dim) == 3).all()
    assert torch.equal(kept, reference(x.movedim(dim, -1), 3).movedim(-1, dim))
    weight = torch.randn_like(kept)
    (gradient,) = torch.autograd.grad((kept * weight).sum(), x)
    assert torch.equal(gradient, weight * (kept != 0))


def test_topk_breaks_ties_by_index_and_shows_nans():
    x = torch.tensor([[2.0, 1.0, 1.0, 1.0, 3.0], [-1.0, -1.0, -1.0, -1.0, -1.0]])
    assert TopK(3)(x).tolist() == [[2, 1, 0, 0, 3], [-1, -1, -1, 0, 0]]
    assert TopK(5)(x) is x and TopK(9)(x) is x
    assert TopK(1)(torch.tensor([1.0, float("nan"), 2.0])).isnan().tolist() == [False, True, False]
    assert TopK(2)(torch.zeros(0, 4)).shape == (0, 4)
    with pytest.raises(ValueError, match="at least 1"):
        TopK(0)


@pytest.mark.parametrize("lead", [(), (7,), (2, 3), (0,)])
def test_topk_linear_is_the_dense_map_behind_top_k(lead):
    torch.manual_seed(0)
    before = torch.randn(*lead, 12, dtype=torch.float64, requires_grad=True)
    hidden = (
        before.relu()
    )  # its zeros may be kept or not: they give nothing, and get no gradient behind the ReLU
    weight = torch.randn(12, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    for k in (1, 4, 12):
        out, dense = topk_linear(hidden, weight, k, bias), TopK(k)(hidden) @ weight + bias
        assert out.shape == (*lead, 5)
        torch.testing.assert_close(out, dense)
        upstream = torch.randn_like(dense)
        torch.testing.assert_close(
            torch.autograd.grad(out, (before, weight, bias), upstream, retain_graph=True),
            torch.autograd.grad(dense, (before, weight, bias), upstream, retain_graph=True),
        )
    torch.testing.assert_close(topk_linear(hidden, weight, 3), TopK(3)(hidden) @ weight)


def test_topk_linear_reads_only_what_it_keeps():
    hidden, weight = torch.tensor([0.0, 3.0, 1.0, 2.0]), torch.full((4, 2), torch.nan)
    weight[[1, 3]] = torch.tensor([[1.0, 2.0], [5.0, 7.0]])
    assert topk_linear(hidden, weight, 2).tolist() == [13, 20]


def test_topk_linear_rejects():
    hidden, weight = torch.ones(3, 4), torch.ones(4, 2)
    with pytest.raises(ValueError, match=r"weight \(neurons, dim\), got \(3, 4\) and \(2, 4\)"):
        topk_linear(hidden, weight.T, 2)
    with pytest.raises(ValueError, match="k must be from 1 to the 4 neurons, got 5"):
        topk_linear(hidden, weight, 5)
    with pytest.raises(TypeError, match="one dtype, got torch.float32 and torch.float64"):
        topk_linear(hidden, weight.double(), 2)
