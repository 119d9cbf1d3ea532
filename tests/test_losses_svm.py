"""Margin losses, against scikit-learn's linear SVM and by hand; and the recurrent network they were tried on."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.svm import LinearSVC

from lib.book import load_reference
from lib.losses import l1_svm, l2_svm
from lib.models import FeatureSequenceGRU


def test_by_hand():
    logits, targets = torch.tensor([[0.5, -0.2]]), torch.tensor([1])
    assert l2_svm(logits, targets, reduction="sum").item() == pytest.approx(1.845)  # (1.5^2 + 1.2^2) / 2
    assert l1_svm(logits, targets, reduction="sum").item() == pytest.approx(1.35)
    assert l2_svm(logits, 1 - targets, C=2.0).item() == pytest.approx(2 * (0.5**2 + 0.8**2))
    weight = torch.tensor([[3.0, 4.0]])
    penalised = l2_svm(logits, targets, head_weight=weight, reduction="sum").item()
    assert penalised == pytest.approx(1.845 + 12.5)


@pytest.mark.parametrize(("loss", "name"), [(l2_svm, "squared_hinge"), (l1_svm, "hinge")])
def test_minimiser_is_scikit_learns(loss, name):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(80, 4)), rng.integers(0, 3, 80)
    x[:, 0] += y
    svm = LinearSVC(loss=name, C=0.3, fit_intercept=False, dual=True, tol=1e-8, max_iter=200_000).fit(x, y)
    inputs, targets = torch.from_numpy(x), torch.from_numpy(y)

    def objective(weight):
        return loss(inputs @ weight.T, targets, C=0.3, head_weight=weight, reduction="sum")

    best = torch.from_numpy(svm.coef_).requires_grad_()
    value = objective(best)
    if name == "squared_hinge":  # smooth: the gradient vanishes at the minimum
        (gradient,) = torch.autograd.grad(value, best)
        assert gradient.abs().max() < 1e-3
    for scale in (1e-2, 1e-1):
        for _ in range(20):
            moved = best.detach() + scale * torch.randn(best.shape, dtype=torch.float64)
            assert objective(moved) > value - 1e-6


def test_agrees_with_the_reference_cell():
    reference = load_reference("gru-svm", "l2_svm_loss")
    logits = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    targets, weight = torch.randint(4, (9,)), torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    ours = l2_svm(logits, targets, head_weight=weight, reduction="sum")
    theirs = reference(logits, targets, weight)
    torch.testing.assert_close(ours, theirs)
    for pair in zip(*(torch.autograd.grad(loss, (logits, weight)) for loss in (ours, theirs)), strict=True):
        torch.testing.assert_close(*pair)


@pytest.mark.parametrize("loss", [l2_svm, l1_svm])
def test_options_of_a_classification_loss(loss):
    logits = torch.randn(6, 3, 5, dtype=torch.float64)
    targets = torch.randint(3, (6, 5))
    targets[0] = -100
    weight = torch.rand(3, dtype=torch.float64)
    each = loss(logits, targets, weight=weight, reduction="none")
    assert each.shape == targets.shape and (each[0] == 0).all()
    torch.testing.assert_close(loss(logits, targets, weight=weight, reduction="sum"), each.sum())
    torch.testing.assert_close(loss(logits, targets, weight=weight), each.sum() / weight[targets[1:]].sum())
    assert torch.autograd.gradcheck(lambda z: loss(z, targets), logits.requires_grad_())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"C": -1.0}, "C must be at least 0"),
        ({"C": float("nan")}, "C must be"),
        ({"head_weight": torch.ones(2, 2), "reduction": "none"}, "belongs to no single row"),
        ({"reduction": "all"}, "'all'"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        l2_svm(torch.zeros(2, 2), torch.tensor([0, 1]), **options)


# --- the network


def test_written_out_cell_is_torchs():
    cell = load_reference("gru-svm", "gru")
    model = FeatureSequenceGRU(6, 4, hidden=5, num_classes=3).double().eval()
    bins = torch.randint(4, (7, 6))
    state = cell(F.one_hot(bins, 4).double(), *model.gru.parameters())
    torch.testing.assert_close(state, model.features(bins))
    torch.testing.assert_close(model(bins), model.head(state))


def test_dropout_acts_in_training_only():
    model = FeatureSequenceGRU(20, 4, dropout=0.5)
    bins = torch.randint(4, (3, 20))
    assert not torch.equal(model(bins), model(bins))
    model.eval()
    assert torch.equal(model(bins), model(bins))
    assert model(bins[:0]).shape == (0, 2)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: FeatureSequenceGRU(0, 4), ValueError, "num_features must be at least 1, got 0"),
        (lambda: FeatureSequenceGRU(3, 4, dropout=1.0), ValueError, "got 1.0"),
        (lambda: FeatureSequenceGRU(3, 4)(torch.zeros(2, 3)), TypeError, "integer indices"),
        (lambda: FeatureSequenceGRU(3, 4)(torch.zeros(2, 4).long()), ValueError, r"\(batch, 3\)"),
        (lambda: FeatureSequenceGRU(3, 4)(torch.full((2, 3), 4)), RuntimeError, "smaller than num_classes"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
