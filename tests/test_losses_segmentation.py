"""lib.losses.segmentation: Dice, confident cross-entropy of co-training, agreement of two crops."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import rel_entr

from lib.book import load_reference
from lib.data import paired_crops
from lib.losses import confident_bce, dice_loss, translation_consistency

SLUG = "translation-consistent-segmentation"


def logits(*shape, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, dtype=torch.float64, generator=generator)).requires_grad_()


def boxes(volumes, size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pairs = [paired_crops(torch.zeros(9, 8, 10), size, generator=generator)[2:] for _ in range(volumes)]
    return [torch.stack(parts) for parts in zip(*pairs, strict=True)]


def test_dice_of_half_overlapping_cubes():
    first, second = torch.zeros(2, 6, 6, 6)
    first[:4, 1:5, 1:5], second[2:, 1:5, 1:5] = 1, 1
    for squared in (True, False):
        assert dice_loss(first, second, squared=squared).item() == pytest.approx(0.5, abs=1e-6)
    assert dice_loss(first, first.bool()).item() == pytest.approx(0, abs=1e-6)
    assert dice_loss(torch.zeros(3), torch.zeros(3)).item() == 0  # the smoothing rule
    assert dice_loss(torch.full((3,), 0.5), torch.zeros(3)).item() == pytest.approx(1, abs=1e-4)


def test_dice_gradients_and_half_precision():
    p, g = torch.rand(2, 3, 4, dtype=torch.float64).requires_grad_(), torch.randint(2, (2, 3, 4))
    for squared in (True, False):
        torch.autograd.gradcheck(lambda p, squared=squared: dice_loss(p, g, squared=squared), p)
    assert dice_loss(p.detach().bfloat16(), g).dtype == torch.float32


def test_confident_bce_of_a_certain_peer_is_cross_entropy():
    student, labels = logits(3, 4, 5, 2), torch.randint(4, (3, 5, 2))
    peer = 200.0 * F.one_hot(labels, 4).movedim(-1, 1).double()
    value = confident_bce(student, peer, pos=0, neg=0.1)
    torch.testing.assert_close(value, F.cross_entropy(student, labels))


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 5), st.floats(0, 1), st.floats(0, 1), st.integers(0, 99))
def test_confident_bce_by_loops(classes, pos, neg, seed):
    student, peer = logits(6, classes, seed=seed), logits(6, classes, seed=seed + 100)
    p, q = student.detach().softmax(1).numpy(), peer.detach().softmax(1).numpy()
    positive, negative = [], []
    for p_w, q_w in zip(p, q, strict=True):
        y = q_w.argmax()
        if q_w[y] >= pos:
            positive.append(-q_w[y] * np.log(p_w[y]))
        for c in range(classes):
            if c != y and q_w[c] < neg:
                negative.append(-q_w.min() * np.log1p(-p_w[c]))
    expected = sum(np.mean(terms) for terms in (positive, negative) if terms)
    value = confident_bce(student, peer, pos=pos, neg=neg)
    assert value.item() == pytest.approx(expected, abs=1e-10)
    value.backward()
    assert peer.grad is None or not peer.grad.any()


def test_confident_bce_is_finite_where_the_student_is_surely_wrong():
    student = torch.tensor([[300.0, 0.0, -300.0]], requires_grad=True)
    value = confident_bce(student, torch.tensor([[0.0, 9.0, 0.0]]), pos=0.5, neg=0.5)
    value.backward()
    assert value.item() > 290 and student.grad.isfinite().all()
    assert confident_bce(student, torch.zeros(1, 3), pos=0.9, neg=0.1).item() == 0
    torch.autograd.gradcheck(lambda z: confident_bce(z, logits(4, 3, seed=7), pos=0.4, neg=0.3), logits(4, 3))


def test_reference_cells_agree():
    a, b = logits(3, 3, 4, 4, 4), logits(3, 3, 4, 4, 4, seed=1)
    at_a, at_b = boxes(3)
    pairs = [
        (confident_bce, load_reference(SLUG, "confident_cross_entropy"), (a, b), {}),
        (translation_consistency, load_reference(SLUG, "agreement"), (a, b, at_a, at_b), {"ent": 0.1}),
    ]
    for ours, reference, inputs, options in pairs:
        value, expected = ours(*inputs, **options), reference(*inputs)
        torch.testing.assert_close(value, expected)
        for tensor in (a, b):
            ours_grad, grad = (
                torch.autograd.grad(loss, tensor, retain_graph=True, allow_unused=True)[0]
                for loss in (value, expected)
            )
            torch.testing.assert_close(ours_grad, grad) if grad is not None else None
    probs, mask = a.softmax(1)[:, 1], torch.randint(2, (3, 4, 4, 4))
    dice = load_reference(SLUG, "supervised_loss")
    labels = torch.randint(2, (2, 4, 4, 4))
    two = logits(2, 2, 4, 4, 4)
    expected = 0.5 * (F.cross_entropy(two, labels) + dice_loss(two.softmax(1)[:, 1], labels))
    torch.testing.assert_close(dice(two, labels), expected)
    assert dice_loss(probs, mask).item() > 0


def test_translation_consistency_against_scipy():
    a, b = logits(3, 3, 4, 4, 4), logits(3, 3, 4, 4, 4, seed=1)
    at_a, at_b = boxes(3, seed=4)
    at_a[1], at_b[1] = 0, 0  # no overlap
    total = []
    for i in (0, 2):
        inside_a, inside_b = (
            (slice(None), *(slice(*edge) for edge in box[i].tolist())) for box in (at_a, at_b)
        )
        p, q = a[i].softmax(0)[inside_a].detach().numpy(), b[i].softmax(0)[inside_b].detach().numpy()
        entropy = (p * np.log(p)).sum(0).mean() / 2 + (q * np.log(q)).sum(0).mean() / 2
        total.append(rel_entr(q, p).sum(0).mean() + 0.3 * entropy)
    value = translation_consistency(a, b, at_a, at_b, ent=0.3)
    assert value.item() == pytest.approx(np.mean(total))
    only_a = torch.autograd.grad(value, a, retain_graph=True)[0]
    assert not only_a[1].any() and only_a[0].any() and torch.autograd.grad(value, b)[0][0].any()


def test_translation_consistency_gradients_and_edges():
    at_a, at_b = boxes(1, seed=2)
    torch.autograd.gradcheck(
        lambda a, b: translation_consistency(a, b, at_a, at_b),
        (logits(1, 2, 4, 4, 4), logits(1, 2, 4, 4, 4, seed=5)),
    )
    nothing = torch.zeros(1, 3, 2, dtype=torch.long)
    a = logits(1, 2, 4, 4, 4)
    value = translation_consistency(a, a.detach(), nothing, nothing)
    value.backward()
    assert value.item() == 0 and not a.grad.any()
    same = torch.tensor([[[0, 4]] * 3])
    assert translation_consistency(a, a, same, same, ent=0).item() == pytest.approx(0, abs=1e-12)
    plane = logits(2, 2, 4, 4)  # any number of axes
    assert translation_consistency(plane, plane, same[:, :2].repeat(2, 1, 1), same[:, :2].repeat(2, 1, 1)) < 0


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: dice_loss(torch.ones(3, dtype=int), torch.ones(3)), TypeError, "floating"),
        (lambda: dice_loss(torch.ones(3), torch.ones(1, 3)), ValueError, "one shape"),
        (lambda: dice_loss(torch.ones(0), torch.ones(0)), ValueError, "not empty"),
        (lambda: dice_loss(torch.ones(3), torch.ones(3), smooth=0), ValueError, "smooth"),
        (lambda: confident_bce(torch.ones(2, 2).long(), torch.ones(2, 2)), TypeError, "floating"),
        (lambda: confident_bce(torch.ones(2, 2), torch.ones(2, 3)), ValueError, "one shape"),
        (lambda: confident_bce(torch.ones(2, 1), torch.ones(2, 1)), ValueError, "two classes"),
        (lambda: confident_bce(torch.ones(2, 2), torch.ones(2, 2), pos=1.1), ValueError, "pos"),
        (lambda: confident_bce(torch.ones(2, 2), torch.ones(2, 2), neg=-0.1), ValueError, "neg"),
    ],
)
def test_bad_input(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_bad_boxes():
    z = torch.zeros(1, 2, 4, 4, 4)
    box = torch.tensor([[[0, 3]] * 3])
    for at_a, at_b, error, says in [
        (box.float(), box, TypeError, "integers"),
        (box[:, :2], box, ValueError, "box_a must be"),
        (box + 2, box, ValueError, "leaves the crop"),
        (box, box - 1, ValueError, "leaves the crop"),
        (box, box - torch.tensor([0, 1]), ValueError, "same size"),
    ]:
        with pytest.raises(error, match=says):
            translation_consistency(z, z, at_a, at_b)
    with pytest.raises(ValueError, match="ent"):
        translation_consistency(z, z, box, box, ent=-1)
