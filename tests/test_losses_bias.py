"""Losses that weigh samples, against numpy, PyTorch's cross-entropy, closed forms and the chapter's cells."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lib.book import load_reference
from lib.losses import BiasLoss, bias_loss, focal


def draw(n=9, classes=5, maps=(4, 3, 2), dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(n, *maps, generator=generator, dtype=dtype)
    features = features * torch.rand(n, 1, 1, 1, generator=generator, dtype=dtype)
    logits = 3 * torch.randn(n, classes, generator=generator, dtype=dtype)
    return features, logits, torch.randint(classes, (n,), generator=generator)


def of_variance(variances):
    """Features of shape (n, 1, 1, 2) whose unbiased variances are given."""
    root = (torch.tensor(variances, dtype=torch.float64) / 2).sqrt()
    return torch.stack([root, -root], 1).reshape(len(root), 1, 1, 2)


@pytest.mark.parametrize("s, z0", [(0.3, 0.7), (0.3, 0.3), (2.0, 0.0), (-0.5, 1.0)])
def test_weights_by_numpy(s, z0):
    features, logits, targets = draw()
    loss, z = bias_loss(features, logits, targets, s=s, z0=z0, reduction="none")
    v = np.array([np.var(sample.numpy(), ddof=1) for sample in features])
    expected = np.exp(s * (v - v.min()) / (v.max() - v.min())) - 1 + z0
    np.testing.assert_allclose(z, expected, rtol=1e-12)
    np.testing.assert_allclose(loss, expected * F.cross_entropy(logits, targets, reduction="none").numpy())


def test_by_hand():
    features = of_variance([1.0, 2.0, 3.0])
    logits, targets = torch.zeros(3, 2, dtype=torch.float64), torch.tensor([0, 1, 0])
    for z0, expected in ((0.7, (0.7, 0.86183424, 1.04985881)), (0.3, (0.3, 0.46183424, 0.64985881))):
        loss, z = bias_loss(features, logits, targets, s=0.3, z0=z0)
        np.testing.assert_allclose(z, expected, atol=1e-8)
        assert loss.item() == pytest.approx(math.log(2) * sum(expected) / 3)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_without_bias_it_is_cross_entropy(reduction):
    features, logits, targets = draw()
    targets[3] = -100
    weight = torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    options = dict(weight=weight, reduction=reduction)
    expected = F.cross_entropy(logits, targets, **options)
    loss, z = bias_loss(features, logits, targets, s=0.0, z0=1.0, **options)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(z, (targets != -100).double())
    torch.testing.assert_close(focal(logits, targets, 0.0, **options), expected)


def test_no_gradient_through_the_weights():
    features, logits, targets = draw()
    features.requires_grad_()
    logits.requires_grad_()
    loss, z = bias_loss(features, logits, targets)
    assert not z.requires_grad
    (gradient,) = torch.autograd.grad(loss, logits)
    closed = z[:, None] * (logits.softmax(1) - F.one_hot(targets, 5)) / len(targets)
    torch.testing.assert_close(gradient, closed.detach())
    assert torch.autograd.grad(loss, features, allow_unused=True) == (None,)


def test_equal_variances_ignored_rows_and_empty_batches():
    features, logits, targets = draw()
    loss, z = bias_loss(torch.ones_like(features), logits, targets)
    torch.testing.assert_close(z, torch.full_like(z, 0.7))
    torch.testing.assert_close(loss, 0.7 * F.cross_entropy(logits, targets))
    extreme = features.clone()
    extreme[2] *= 1e6  # an ignored sample does not set the maximum
    targets[2] = -100
    rest = torch.arange(9) != 2
    loss, z = bias_loss(extreme, logits, targets)
    alone, weights = bias_loss(features[rest], logits[rest], targets[rest])
    torch.testing.assert_close(loss, alone)
    torch.testing.assert_close(z[rest], weights)
    assert z[2] == 0
    loss, z = bias_loss(features[:0], logits[:0], targets[:0], reduction="sum")
    assert loss == 0 and z.shape == (0,)
    assert bias_loss(features[:1], logits[:1], targets[:1])[1] == pytest.approx(0.7)


def test_global_minimum_and_batch_maximum():
    logits, targets = torch.zeros(3, 2, dtype=torch.float64), torch.tensor([0, 1, 0])
    module = BiasLoss(s=0.5, z0=0.5).double()
    for variances, low in (([2.0, 3.0, 4.0], 2.0), ([1.0, 2.0, 3.0], 1.0), ([4.0, 6.0, 9.0], 1.0)):
        _, z = module(of_variance(variances), logits, targets)
        scaled = (np.array(variances) - low) / (max(variances) - low)
        np.testing.assert_allclose(z, np.exp(0.5 * scaled) - 0.5, rtol=1e-12)
        assert module.smallest.item() == pytest.approx(low)
    module.eval()
    module(of_variance([0.1, 2.0, 3.0]), logits, targets)
    assert module.smallest.item() == pytest.approx(1.0)
    clone = BiasLoss(s=0.5, z0=0.5).double()
    clone.load_state_dict(module.state_dict())
    assert clone.smallest == module.smallest
    local = BiasLoss(norm="local")
    assert local(of_variance([1.0, 2.0]), logits[:2], targets[:2])[1].tolist() == pytest.approx(
        [0.7, math.exp(0.3) - 0.3]
    )
    assert local.smallest == math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precisions_and_strides(dtype):
    features, logits, targets = draw()
    expected, weights = bias_loss(features, logits, targets)
    strided = features.to(dtype).transpose(1, 3).contiguous().transpose(1, 3)
    loss, z = bias_loss(strided, logits.to(dtype), targets)
    assert z.dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(z.double(), weights, rtol=tolerance, atol=tolerance)


def test_under_vmap():
    features, logits, targets = draw()
    both = [torch.stack([x, x.flip(0)]) for x in (features, logits, targets)]
    mapped = torch.vmap(lambda *batch: bias_loss(*batch)[0])(*both)
    torch.testing.assert_close(mapped, bias_loss(features, logits, targets)[0].expand(2))


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 3.5])
def test_focal(gamma):
    _, logits, targets = draw()
    logits.requires_grad_()
    p = logits.softmax(1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(focal(logits, targets, gamma), (-((1 - p) ** gamma) * p.log()).mean())
    assert torch.autograd.gradcheck(lambda z: focal(z, targets, gamma), logits)
    sure = torch.tensor([[200.0, 0.0]], requires_grad=True)
    for label in (0, 1):
        (gradient,) = torch.autograd.grad(focal(sure, torch.tensor([label]), gamma), sure)
        assert gradient.isfinite().all()


def test_the_chapter_agrees():
    reference = load_reference("bias-loss", "bias_loss_reference")
    features, logits, targets = draw()
    logits.requires_grad_()
    pairs = [function(features, logits, targets) for function in (reference, bias_loss)]
    torch.testing.assert_close(*pairs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits) for loss, _ in pairs))


def test_bad_input():
    features, logits, targets = draw()
    for arguments, options, message in (
        ((features.long(), logits, targets), {}, "floating point"),
        ((features, logits, targets.double()), {}, "integer class indices"),
    ):
        with pytest.raises(TypeError, match=message):
            bias_loss(*arguments, **options)
    for arguments, options, message in (
        ((features[:3], logits, targets), {}, "N = 9"),
        ((features[:, 0, 0, :1], logits, targets), {}, "two activations"),
        ((features, logits[0], targets[0]), {}, r"\(N, C\)"),
        ((features, logits, targets + 5), {}, r"\[0, 5\)"),
        ((features, logits, targets), {"s": math.nan}, "finite"),
        ((features, logits, targets), {"z0": -0.1}, "negative weights"),
        ((features, logits, targets), {"s": -2.0}, "negative weights"),
        ((features, logits, targets), {"norm": "batch"}, "norm must be"),
        ((features, logits, targets), {"norm": "global"}, "state must be given"),
        ((features, logits, targets), {"state": torch.tensor(1.0)}, "state must be given"),
        ((features, logits, targets), {"reduction": "max"}, "reduction"),
    ):
        with pytest.raises(ValueError, match=message):
            bias_loss(*arguments, **options)
    for gamma in (0.5, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="gamma"):
            focal(logits, targets, gamma)
    with pytest.raises(ValueError, match="norm must be"):
        BiasLoss(norm="batch")
