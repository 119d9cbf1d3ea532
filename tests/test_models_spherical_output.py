"""The factored output layer, against dense automatic differentiation and torch.optim.SGD."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from lib.book import load_reference
from lib.losses import spherical_softmax_nll, taylor_softmax_nll, z_loss
from lib.models import SphericalOutput

D, d = 300, 9
DENSE = {
    "z": lambda o, y: z_loss(o, y, a=0.5, b=3.0),
    "taylor": taylor_softmax_nll,
    "spherical": lambda o, y: spherical_softmax_nll(o, y, eps=0.05),
    "mse": lambda o, y: 0.5 * (o - torch.nn.functional.one_hot(y, o.shape[1])).square().sum(1).mean(),
}
OPTIONS = {"a": 0.5, "b": 3.0, "eps": 0.05}
RATE = {"z": 2.0, "taylor": 0.3, "spherical": 0.3, "mse": 0.02}


def dense_step(weight, hidden, targets, lr, loss):
    weight = weight.detach().requires_grad_()
    hidden = hidden.detach().requires_grad_()
    value = loss(hidden @ weight.T, targets)
    by_weight, by_hidden = torch.autograd.grad(value, (weight, hidden))
    return value.detach(), by_hidden, weight.detach() - lr * by_weight


@pytest.mark.parametrize("fold_every", [None, 7])
@pytest.mark.parametrize("loss", DENSE)
def test_is_gradient_descent_on_the_dense_weight(loss, fold_every):
    layer = SphericalOutput(d, D, loss=loss, fold_every=fold_every, dtype=torch.float64, **OPTIONS)
    weight = torch.randn(D, d, dtype=torch.float64)
    layer.load_weight(weight)
    for step in range(40):
        batch = (1, 3, 20)[step % 3]
        hidden = torch.randn(batch, d, dtype=torch.float64) + 0.3
        targets = torch.randint(12, (batch,))  # few classes, so that they meet within a batch
        value, gradient, weight = dense_step(weight, hidden, targets, RATE[loss], DENSE[loss])
        ours, ours_gradient = layer.step(hidden, targets, RATE[loss])
        torch.testing.assert_close(ours, value, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(ours_gradient, gradient, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(layer.materialize(), weight, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(layer.Q, weight.T @ weight, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(layer.wbar, weight.sum(0), rtol=1e-9, atol=1e-9)
    inverse = torch.linalg.inv(layer.U)
    torch.testing.assert_close(layer.U_inverse, inverse, rtol=1e-7, atol=1e-9)
    assert layer.folds == (0 if fold_every is None else 40 // 7)


def test_z_loss_leaves_the_sum_of_rows_alone():
    layer = SphericalOutput(d, D, dtype=torch.float64)
    before = layer.wbar.clone()
    layer.step(torch.randn(16, d).double(), torch.randint(D, (16,)), 5.0)
    torch.testing.assert_close(layer.wbar, before)
    assert layer.materialize().norm() > layer.V.norm() * 0.5


def test_a_step_that_makes_the_factor_singular():
    """For half the squared error L_q is 1/2, and lr = 1 / |h|^2 projects W: U loses its inverse."""
    layer = SphericalOutput(4, 20, loss="mse", dtype=torch.float64)
    weight, hidden = layer.materialize(), torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    targets = torch.tensor([3])
    _, _, expected = dense_step(weight, hidden, targets, 1.0, DENSE["mse"])
    layer.step(hidden, targets, 1.0)
    assert layer.folds == 1 and layer.U_inverse.isfinite().all()
    torch.testing.assert_close(layer.materialize(), expected)
    torch.testing.assert_close(layer.Q, expected.T @ expected)


def test_a_step_touches_no_tensor_with_all_classes():
    """Of the operations of a step only indexing sees V; none makes a tensor with D entries."""

    class Largest(TorchFunctionMode):
        size = 0

        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and function is not torch.Tensor.index_add_:
                if result.data_ptr() != layer.V.data_ptr():
                    self.size = max(self.size, result.numel())
            return result

    layer = SphericalOutput(8, 5000)
    with Largest() as mode:
        layer.step(torch.randn(3, 8), torch.tensor([1, 4999, 1]), 0.5)
    assert 0 < mode.size <= 64


def test_inference_and_state():
    layer = SphericalOutput(d, D)
    hidden = torch.randn(5, d)
    for _ in range(3):
        layer.step(hidden, torch.arange(5), 1.0)
    torch.testing.assert_close(layer(hidden), hidden @ layer.materialize().T, rtol=1e-4, atol=1e-5)
    assert torch.equal(layer.topk(hidden, 4).indices, layer(hidden).topk(4).indices)
    before = layer.materialize()
    layer.step(hidden, torch.arange(5), 0.0)
    assert torch.equal(layer.materialize(), before)
    copy = SphericalOutput(d, D)
    copy.load_state_dict(layer.state_dict())
    assert torch.equal(copy.materialize(), before) and layer.inverse_error() < 1e-4
    layer.fold()
    torch.testing.assert_close(layer.materialize(), before)
    assert not list(layer.parameters())


def test_agrees_with_the_reference_cell():
    reference = load_reference("spherical-z-loss", "factored_step")
    weight = torch.randn(50, 6, dtype=torch.float64)
    layer = SphericalOutput(6, 50, a=0.5, b=2.0, dtype=torch.float64)
    layer.load_weight(weight)
    state = {
        "V": weight.clone(), "U": torch.eye(6).double(), "U_inverse": torch.eye(6).double(),
        "w": torch.zeros(6).double(), "Q": weight.T @ weight, "wbar": weight.sum(0),
    }  # fmt: skip
    for target in (3, 9, 3, 0):
        hidden = torch.randn(6, dtype=torch.float64)
        loss, gradient = reference(state, hidden, target, 1.5, a=0.5, b=2.0)
        ours, ours_gradient = layer.step(hidden[None], torch.tensor([target]), 1.5)
        torch.testing.assert_close(ours, loss)
        torch.testing.assert_close(ours_gradient[0], gradient)
    for name, value in state.items():
        torch.testing.assert_close(getattr(layer, name), value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss": "softmax"}, "loss must be one of"),
        ({"num_classes": 1}, "2 classes"),
        ({"a": 0.0}, "a and eps"),
        ({"fold_every": 0}, "fold_every"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"dtype": torch.float16}, "dtype"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        SphericalOutput(**{"in_features": 4, "num_classes": 10, **options})


def test_bad_steps():
    layer, hidden, targets = SphericalOutput(4, 10), torch.randn(3, 4), torch.tensor([0, 1, 9])
    for error, arguments in (
        (TypeError, (hidden.double(), targets, 0.1)),
        (TypeError, (hidden, targets.float(), 0.1)),
        (ValueError, (hidden[:, :3], targets, 0.1)),
        (ValueError, (hidden, targets[:2], 0.1)),
        (ValueError, (hidden, targets + 1, 0.1)),
        (ValueError, (hidden, targets, -0.1)),
        (ValueError, (hidden[:0], targets[:0], 0.1)),
    ):
        with pytest.raises(error):
            layer.step(*arguments)
    with pytest.raises(ValueError, match="weight must be"):
        layer.load_weight(torch.zeros(4, 10))
