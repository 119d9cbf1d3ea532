"""The frame around every classification loss, against `torch.nn.functional.cross_entropy`."""

import pytest
import torch
import torch.nn.functional as F

from lib.losses import _classification as frame


def cross_entropy(logits, targets, *, weight=None, ignore_index=-100, reduction="mean"):
    """Cross-entropy written with the frame, as other losses are."""
    z, labels, valid = frame.rows(
        logits, targets, weight=weight, ignore_index=ignore_index, reduction=reduction
    )
    losses = z.logsumexp(1) - z.gather(1, labels.unsqueeze(1)).squeeze(1)
    return frame.reduce_rows(losses, labels, valid, targets.shape, weight=weight, reduction=reduction)


@pytest.mark.parametrize("shape", [(5,), (7, 5), (1, 2), (3, 5, 4), (2, 3, 4, 2), (0, 4)])
@pytest.mark.parametrize("reduction", frame.REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_agrees_with_pytorch(shape, reduction, weighted):
    torch.manual_seed(0)
    classes = shape[0] if len(shape) == 1 else shape[1]
    logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(classes, shape[:1] + shape[2:] if len(shape) > 1 else ())
    if targets.dim() and targets.numel() > 2:
        targets.view(-1)[::3] = -7
    weight = torch.rand(classes, dtype=torch.float64) if weighted else None
    options = {"weight": weight, "ignore_index": -7, "reduction": reduction}
    ours, theirs = cross_entropy(logits, targets, **options), F.cross_entropy(logits, targets, **options)
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    upstream = torch.randn_like(ours)
    gradients = [torch.autograd.grad(loss, logits, upstream)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, equal_nan=True)


def test_ignored_rows_may_hold_anything():
    logits = torch.tensor([[1.0, 2.0], [torch.inf, torch.nan]], requires_grad=True)
    cross_entropy(logits, torch.tensor([0, -100])).backward()
    assert logits.grad[1].eq(0).all() and logits.grad[0].isfinite().all()


def test_half_precision_is_computed_in_float32():
    logits = torch.randn(6, 3).bfloat16()
    targets = torch.randint(3, (6,))
    torch.testing.assert_close(cross_entropy(logits, targets), F.cross_entropy(logits.float(), targets))


def test_under_vmap_and_on_meta():
    logits, targets = torch.randn(4, 6, 3), torch.randint(3, (4, 6))
    mapped = torch.vmap(cross_entropy)(logits, targets)
    torch.testing.assert_close(
        mapped, torch.stack([F.cross_entropy(*pair) for pair in zip(logits, targets, strict=True)])
    )
    assert cross_entropy(logits[0].to("meta"), targets[0].to("meta")).shape == ()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"logits": torch.zeros(2, 3).long()}, TypeError, "floating point"),
        ({"targets": torch.zeros(2)}, TypeError, "integer class indices"),
        ({"targets": torch.zeros(2, dtype=torch.bool)}, TypeError, "integer class indices"),
        ({"targets": torch.zeros(3).long()}, ValueError, r"must be \(2,\)"),
        ({"targets": torch.tensor([0, 3])}, ValueError, r"in \[0, 3\) or -100, got 3"),
        ({"targets": torch.tensor([0, -1])}, ValueError, "got -1"),
        ({"logits": torch.zeros(2, 1)}, ValueError, "at least 2 classes"),
        ({"logits": torch.tensor(1.0)}, ValueError, "got a scalar"),
        ({"weight": [1.0, 1.0, 1.0]}, TypeError, "got list"),
        ({"weight": torch.ones(2)}, ValueError, "one number a class"),
        ({"weight": -torch.ones(3)}, ValueError, "at least 0"),
        ({"reduction": "median"}, ValueError, "'median'"),
    ],
)
def test_bad_input(change, error, words):
    arguments = {"logits": torch.zeros(2, 3), "targets": torch.zeros(2).long()} | change
    with pytest.raises(error, match=words):
        frame.rows(**arguments)


def test_plain_reduction():
    values = torch.arange(4.0)
    assert frame.reduce(values, "mean") == 1.5 and frame.reduce(values, "sum") == 6
    assert frame.reduce(values, "none") is values
    with pytest.raises(ValueError, match="'max'"):
        frame.reduce(values, "max")
