"""lib.attention.softmax_free and lib.models.soft_vit against cdist, linalg.pinv, scikit-learn, gradcheck and the chapter's cells."""

import numpy as np
import pytest
import torch
from sklearn.gaussian_process.kernels import RBF
from sklearn.kernel_approximation import Nystroem

from lib.attention import (
    SOFTAttention,
    gaussian_kernel,
    gaussian_kernel_attention,
    newton_pinv,
    softmax_free_attention,
)
from lib.book import load_reference
from lib.models import SOFTViT
from lib.train import PeakTensor

SLUG = "softmax-free-attention"


def tensors(*shapes, dtype=torch.float64, seed=0, grad=False):
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes]
    return [tensor.requires_grad_(grad) for tensor in made]


def oracle(q, k, v, mask=None, scale=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    distance = (q.unsqueeze(-2) - k.unsqueeze(-3)).square().sum(-1)
    weights = torch.exp(-scale * distance / 2)
    return (weights if mask is None else weights * mask) @ v


# --- the kernel and the exact attention


def test_kernel_is_that_of_cdist_and_of_sklearn():
    x, y = tensors((2, 7, 5), (2, 4, 5))
    torch.testing.assert_close(
        gaussian_kernel(x, y, scale=0.7), torch.exp(-0.35 * torch.cdist(x, y).square())
    )
    theirs = torch.from_numpy(RBF(5**0.25)(x[0].numpy(), y[0].numpy()))
    torch.testing.assert_close(gaussian_kernel(x, y)[0], theirs)


def test_distances_are_not_rounded_inside_of_autocast():
    x, y = tensors((20, 32), (9, 32), dtype=torch.float32)
    wanted = gaussian_kernel(3 * x, 3 * y), gaussian_kernel(3 * x, 3 * x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gaussian_kernel(3 * x, 3 * y), gaussian_kernel(3 * x, 3 * x)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_never_exceeds_one(dtype):
    (x,) = tensors((200, 3), dtype=torch.float32)
    x = (1000 + x).to(dtype)
    kernel = gaussian_kernel(x, x)
    assert kernel.dtype == dtype and kernel.max() <= 1


@pytest.mark.parametrize("block_size", [1, 4, 100])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_and_its_gradients_are_the_oracle(block_size, masked, causal):
    q, k, v = tensors((2, 3, 5, 4), (3, 9, 4), (2, 1, 9, 6), grad=True)
    mask = visible = None
    if masked:
        mask = visible = torch.rand(5, 9, generator=torch.Generator().manual_seed(1)) > 0.4
    if causal:
        triangle = torch.ones(5, 9).tril(4).bool()
        visible = triangle if mask is None else mask & triangle
    ours = gaussian_kernel_attention(q, k, v, mask=mask, causal=causal, block_size=block_size)
    theirs = oracle(q, k, v, visible)
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn_like(theirs)
    for a, b in zip(*(torch.autograd.grad(o, (q, k, v), weight) for o in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)
    again, weights = gaussian_kernel_attention(q, k, v, mask=mask, causal=causal, return_weights=True)
    torch.testing.assert_close(again, ours)
    torch.testing.assert_close(weights @ v, ours)


def test_tied_keys_non_contiguous_and_gradcheck():
    q, v = tensors((1, 2, 4, 6), (1, 2, 6, 3), grad=True)
    assert torch.autograd.gradcheck(
        lambda q, v: gaussian_kernel_attention(q.mT, q.mT, v, block_size=4), (q, v)
    )


def test_attention_in_half_precision_and_empty():
    q, v = tensors((2, 33, 8), (2, 33, 8), dtype=torch.bfloat16)
    out = gaussian_kernel_attention(q, q, v)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), oracle(q.double(), q.double(), v.double()), rtol=2e-2, atol=2e-2)
    assert gaussian_kernel_attention(q[:, :0], q, v).shape == (2, 0, 8)
    assert gaussian_kernel_attention(q, q[:, :0], v[:, :0]).abs().sum() == 0


def test_attention_keeps_no_square():
    q, v = tensors((1, 512, 4), (1, 512, 4), dtype=torch.float32, grad=True)
    with PeakTensor() as memory:
        gaussian_kernel_attention(q, q, v, block_size=32).sum().backward()
    assert memory.largest_bytes <= 4 * 512 * 32


def test_reference_of_exact_attention():
    q, v = tensors((2, 9, 4), (2, 9, 3), grad=True)
    ours, theirs = gaussian_kernel_attention(q, q, v), load_reference(SLUG, "gaussian_attention")(q, v)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(*(torch.autograd.grad(o.square().sum(), (q, v)) for o in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)


# --- Newton's inverse


def kernel_matrices(*lead, m=12, seed=0):
    (x,) = tensors((*lead, m, 8), seed=seed)
    return gaussian_kernel(x, x)


def test_newton_is_pinv():
    matrices = kernel_matrices(2, 3)
    torch.testing.assert_close(newton_pinv(matrices), torch.linalg.pinv(matrices))
    torch.testing.assert_close(
        newton_pinv(matrices, ridge=0.3), torch.linalg.inv(matrices + 0.3 * torch.eye(12))
    )
    (general,) = tensors((5, 5))  # neither symmetric nor definite
    torch.testing.assert_close(newton_pinv(general, iters=40), torch.linalg.inv(general))
    rank_two = kernel_matrices(m=2).repeat_interleave(2, 0).repeat_interleave(2, 1)
    torch.testing.assert_close(newton_pinv(rank_two, iters=12), torch.linalg.pinv(rank_two))
    assert torch.equal(newton_pinv(torch.zeros(3, 3)), torch.zeros(3, 3))


def test_newton_filter():
    matrix = torch.diag(torch.tensor([1.0, 0.1, 1e-3], dtype=torch.float64))
    found = newton_pinv(matrix, iters=7, damping=0.8).diagonal() * matrix.diagonal()
    expected = 1 - (1 - 1.6 * matrix.diagonal() ** 2) ** 128
    torch.testing.assert_close(found, expected)


def test_damping_is_what_makes_equal_row_sums_converge():
    matrix = torch.tensor([[1, 0.5], [0.5, 1]], dtype=torch.float64)
    left = lambda damping: torch.eye(2) - matrix @ newton_pinv(matrix, damping=damping)  # noqa: E731
    assert left(0.9).abs().max() < 1e-12
    torch.testing.assert_close(left(1.0).abs(), torch.full((2, 2), 0.5, dtype=torch.float64))


def test_newton_gradient():
    matrices = kernel_matrices(2, m=4).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: newton_pinv(a, iters=30), matrices)
    reference = load_reference(SLUG, "newton_inverse")
    ours, theirs = newton_pinv(matrices, iters=30), reference(matrices, 30)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(*(torch.autograd.grad(o.square().sum(), matrices) for o in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)


def test_newton_keeps_one_matrix():
    matrix = kernel_matrices(m=16).requires_grad_()
    with PeakTensor() as memory:
        newton_pinv(matrix, iters=20)
    assert memory.peak_bytes <= 8 * matrix.numel() * 8


# --- through landmarks


def test_landmarks_are_nystrom_of_sklearn():
    q, v = tensors((20, 4), (20, 3))
    rows = [0, 4, 8, 12, 16]
    ours = softmax_free_attention(q, q[rows], v, iters=40, ridge=0.0)
    theirs = Nystroem(kernel="rbf", gamma=0.25, n_components=5)
    theirs.fit(q[rows].numpy())  # as many rows as components: all of them, in some order
    features = torch.from_numpy(theirs.transform(q.numpy()))
    torch.testing.assert_close(ours, features @ (features.T @ v))
    torch.testing.assert_close(ours[rows], gaussian_kernel_attention(q, q, v)[rows])


def test_all_tokens_as_landmarks_is_exact():
    q, v = tensors((2, 3, 15, 8), (2, 3, 15, 4))
    ours = softmax_free_attention(q, q, v, iters=30, ridge=0.0)
    torch.testing.assert_close(ours, gaussian_kernel_attention(q, q, v))


@pytest.mark.parametrize("norm", ["none", "symmetric"])
def test_reference_of_landmark_attention(norm):
    q, marks, v = tensors((2, 20, 6), (2, 5, 6), (2, 20, 3), grad=True)
    ours = softmax_free_attention(q, marks, v, norm=norm)
    theirs = load_reference(SLUG, "soft_attention")(q, marks, v, norm == "symmetric")
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(
        *(torch.autograd.grad(o.square().sum(), (q, marks, v)) for o in (ours, theirs)), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_landmark_gradient():
    q, marks, v = tensors((7, 4), (3, 4), (7, 2), grad=True)
    assert torch.autograd.gradcheck(
        lambda q, marks, v: softmax_free_attention(q, marks, v, norm="symmetric", iters=30), (q, marks, v)
    )


# --- the layer and the network


@pytest.mark.parametrize("norm", ["none", "symmetric"])
def test_layer_by_hand(norm):
    torch.manual_seed(0)
    layer = SOFTAttention(8, 2, 2, norm=norm).double()
    (x,) = tensors((3, 24, 8))
    out = layer(x, (4, 6))
    q = layer.query(x).reshape(3, 24, 2, 4)
    v = layer.value(x).reshape(3, 24, 2, 4)
    heads = []
    for head in range(2):
        tokens = q[:, :, head] / 4**0.25
        marks = layer.sample(tokens.mT.reshape(3, 4, 4, 6)).flatten(2).mT
        marks = torch.nn.functional.gelu(layer.sample_norm(marks))
        image = v[:, :, head].mT.reshape(3, 4, 4, 6)
        kernel = layer.local.weight[head].expand(4, 1, 3, 3)
        local = torch.nn.functional.conv2d(image, kernel, padding=1, groups=4).flatten(2).mT
        heads.append(softmax_free_attention(tokens, marks, v[:, :, head], norm=norm, scale=1.0) + local)
    torch.testing.assert_close(out, layer.out(torch.cat(heads, -1)))
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_layer_with_its_tokens_as_landmarks_is_exact():
    torch.manual_seed(0)
    layer = SOFTAttention(8, 2, 1, conv_size=0, landmarks="subset", iters=40, ridge=0.0).double()
    (x,) = tensors((1, 9, 8))
    q, v = (
        projection(x).reshape(1, 9, 2, 4).mT.mT.transpose(1, 2) for projection in (layer.query, layer.value)
    )
    exact = gaussian_kernel_attention(q, q, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer(x, (3, 3)), layer.out(exact), rtol=1e-4, atol=1e-4)


def test_average_landmarks():
    layer = SOFTAttention(8, 2, 2, landmarks="average")
    q = torch.randn(1, 2, 16, 4)
    marks = layer.sample_landmarks(q, (4, 4))
    torch.testing.assert_close(marks[:, :, 0], q[:, :, [0, 1, 4, 5]].mean(2))


def test_network():
    torch.manual_seed(0)
    model = SOFTViT(
        5, in_channels=1, image_size=16, dims=(8, 16), depths=(1, 2), heads=(2, 4), ratios=(4, 2),
        conv_sizes=(5, 3), strides=(1, 2), norm="symmetric",
    )  # fmt: skip
    logits = model(torch.randn(3, 1, 16, 16))
    assert logits.shape == (3, 5) and len(model.stages[1]) == 2
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.eval()(torch.randn(1, 1, 32, 32)).shape == (1, 5)
    with torch.device("meta"):
        tiny = SOFTViT()
    assert 11e6 < sum(parameter.numel() for parameter in tiny.parameters()) < 15e6


# --- bad input


@pytest.mark.parametrize(
    ("error", "call"),
    [
        (ValueError, lambda x: gaussian_kernel(x, x[..., :2])),
        (ValueError, lambda x: gaussian_kernel(x, x, scale=0.0)),
        (TypeError, lambda x: gaussian_kernel(x.long(), x)),
        (ValueError, lambda x: gaussian_kernel_attention(x, x, x[:2])),
        (TypeError, lambda x: gaussian_kernel_attention(x, x, x.long())),
        (TypeError, lambda x: gaussian_kernel_attention(x, x, x, mask=torch.ones(4, 4))),
        (ValueError, lambda x: gaussian_kernel_attention(x, x, x, mask=torch.ones(4, 3).bool())),
        (ValueError, lambda x: gaussian_kernel_attention(x, x, x, block_size=0)),
        (ValueError, lambda x: newton_pinv(x[:2])),
        (ValueError, lambda x: newton_pinv(x @ x.T, damping=1.5)),
        (ValueError, lambda x: newton_pinv(x @ x.T, iters=-1)),
        (ValueError, lambda x: newton_pinv(x @ x.T, ridge=np.nan)),
        (TypeError, lambda x: newton_pinv(x.long() @ x.long().T)),
        (ValueError, lambda x: softmax_free_attention(x, x, x, norm="softmax")),
        (ValueError, lambda x: softmax_free_attention(x, x, x[:2])),
        (TypeError, lambda x: softmax_free_attention(x, x, x.long())),
        (ValueError, lambda x: SOFTAttention(8, 3, 2)),
        (ValueError, lambda x: SOFTAttention(8, 2, 2, conv_size=2)),
        (ValueError, lambda x: SOFTAttention(8, 2, 2, norm="row")),
        (ValueError, lambda x: SOFTAttention(8, 2, 2)(torch.ones(1, 9, 8), (3, 3))),
        (ValueError, lambda x: SOFTAttention(8, 2, 2)(torch.ones(1, 9, 8), (2, 4))),
        (ValueError, lambda x: SOFTViT(dims=(8,))),
        (ValueError, lambda x: SOFTViT(image_size=100)),
    ],
)
def test_bad_input(error, call):
    with pytest.raises(error):
        call(torch.randn(4, 3))
