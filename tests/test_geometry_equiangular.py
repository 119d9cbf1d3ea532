"""Equiangular vectors against the Welch bound and known optimal sets; the fixed head; the loss on the sphere."""

import math

import pytest
import torch
import torch.nn.functional as F

from lib.book import load_reference
from lib.geometry import equiangular_basis, extend_basis, largest_cosine, welch_bound
from lib.losses import normalized_softmax
from lib.models import EBVHead


def test_welch_bound_is_met_by_equiangular_tight_frames():
    simplex = torch.eye(5, dtype=torch.float64) - 0.2  # five vectors in four dimensions
    assert largest_cosine(simplex) == pytest.approx(welch_bound(5, 4))
    golden = (1 + math.sqrt(5)) / 2
    rows = [[0, 1, golden], [0, 1, -golden], [1, golden, 0], [1, -golden, 0], [golden, 0, 1], [-golden, 0, 1]]
    assert largest_cosine(torch.tensor(rows)) == pytest.approx(welch_bound(6, 3))
    assert welch_bound(4, 4) == 0 and welch_bound(1, 3) == 0
    for _ in range(5):
        assert largest_cosine(torch.randn(30, 6)) > welch_bound(30, 6)


def test_opposite_vectors_count_as_close():
    assert largest_cosine(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])) == pytest.approx(1)
    vectors, reached = equiangular_basis(3, 2, 0.51, steps=500)
    assert (
        reached <= 0.5102 and largest_cosine(vectors) == reached
    )  # three lines at 60 degrees, not a simplex


@pytest.mark.parametrize("penalty, rate", [("squared", 0.02), ("hinge", 0.01)])
def test_orthonormal_where_possible(penalty, rate):
    vectors, reached = equiangular_basis(12, 20, 0.005, penalty=penalty, learning_rate=rate, steps=2000)
    assert reached <= 0.0052
    assert torch.allclose(vectors.norm(dim=1), torch.ones(12), atol=1e-5)


def test_generator_reaches_the_known_sets():
    assert equiangular_basis(6, 3, steps=1000, restarts=3)[1] == pytest.approx(1 / math.sqrt(5), abs=1e-3)
    assert equiangular_basis(5, 4, steps=1000, restarts=3)[1] == pytest.approx(0.25, abs=1e-3)
    assert equiangular_basis(80, 40, 1.2 * welch_bound(80, 40), steps=800)[1] <= 1.25 * welch_bound(80, 40)


def test_slices_and_seeds_do_not_matter_and_matter():
    whole, _ = equiangular_basis(23, 8, 0.2, steps=20, seed=1)
    sliced, _ = equiangular_basis(23, 8, 0.2, steps=20, seed=1, slice_size=5)
    assert torch.allclose(whole, sliced, atol=1e-5)
    assert not torch.allclose(whole, equiangular_basis(23, 8, 0.2, steps=20, seed=2)[0])
    torch.manual_seed(4)
    expected = torch.rand(1)
    torch.manual_seed(4)
    equiangular_basis(3, 3, steps=2)
    assert torch.equal(torch.rand(1), expected)


def test_a_step_is_the_reference():
    start = F.normalize(torch.randn(9, 4, generator=torch.Generator().manual_seed(3)), dim=1)
    one, _ = equiangular_basis(9, 4, 0.1, steps=1, learning_rate=0.2, seed=3)
    reference = load_reference("equiangular-basis-vectors", "push_apart")
    assert torch.allclose(one, reference(start, 0.1, 0.2), atol=1e-6)


def test_extension_keeps_the_old_vectors():
    basis, before = equiangular_basis(10, 16, 0.05, steps=500)
    extended, reached = extend_basis(basis, 5, 0.05, steps=500)
    assert torch.equal(extended[:10], basis) and extended.shape == (15, 16)
    assert reached <= 0.06 and largest_cosine(extended) == reached
    crowded, reached = extend_basis(basis, 20, steps=800)
    assert torch.equal(crowded[:10], basis) and reached < 2 * welch_bound(30, 16)


def test_head_is_cosines_and_has_nothing_to_train():
    basis, _ = equiangular_basis(7, 5, steps=200)
    head = EBVHead(basis, temperature=0.1)
    features = torch.randn(4, 5)
    expected = F.cosine_similarity(features[:, None], basis[None], dim=-1) / 0.1
    assert torch.allclose(head(features), expected, atol=1e-5)
    assert torch.allclose(
        head(features),
        load_reference("equiangular-basis-vectors", "basis_logits")(features, basis, 0.1),
        atol=1e-5,
    )
    assert torch.equal(head.predict(features), expected.argmax(1)) and torch.equal(
        head(3 * features), head(3 * features)
    )
    assert torch.allclose(head(features), head(5 * features), atol=1e-4)
    assert not list(head.parameters()) and set(head.state_dict()) == {"basis"}
    twin = EBVHead(F.normalize(torch.randn(7, 5), dim=1))
    twin.load_state_dict(head.state_dict())
    assert torch.equal(twin.basis, basis)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_is_cross_entropy_of_the_cosines(reduction):
    features, prototypes = torch.randn(6, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    targets, weight = (
        torch.tensor([0, 3, -100, 1, 2, 0]),
        torch.tensor([1.0, 2.0, 0.5, 1.0], dtype=torch.float64),
    )
    cosines = F.cosine_similarity(features[:, None], prototypes[None], dim=-1)
    expected = F.cross_entropy(8 * cosines, targets, weight=weight, reduction=reduction)
    found = normalized_softmax(features, prototypes, targets, scale=8, weight=weight, reduction=reduction)
    assert torch.allclose(found, expected)


def test_loss_gradient_is_orthogonal_and_margin_is_subtracted():
    features = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    prototypes = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(4, (6,))
    (gradient,) = torch.autograd.grad(normalized_softmax(features, prototypes, targets), features)
    assert (gradient * features).sum(1).abs().max() < 1e-12
    assert torch.autograd.gradcheck(
        lambda z, w: normalized_softmax(z, w, targets, margin=0.2), (features, prototypes)
    )
    cosines = F.normalize(features, dim=1) @ F.normalize(prototypes, dim=1).T
    expected = F.cross_entropy(16 * (cosines - 0.2 * F.one_hot(targets, 4)), targets)
    assert torch.allclose(normalized_softmax(features, prototypes, targets, margin=0.2), expected)


def test_loss_at_a_simplex_has_its_closed_form():
    corners = F.normalize(torch.eye(10, dtype=torch.float64) - 0.1, dim=1)
    for scale, value in ((1.0, 1.3769), (16.0, None)):
        loss = normalized_softmax(corners, corners, torch.arange(10), scale=scale).item()
        assert loss == pytest.approx(math.log1p(9 * math.exp(-scale * 10 / 9)), rel=1e-6)
        if value:
            assert loss == pytest.approx(value, abs=1e-4)


def test_bad_input():
    for arguments in ((0, 3), (3, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            welch_bound(*arguments)
    with pytest.raises(ValueError, match="penalty"):
        equiangular_basis(3, 3, penalty="cubic")
    with pytest.raises(ValueError, match="alpha"):
        equiangular_basis(3, 3, 1.0)
    with pytest.raises(ValueError, match="slice_size"):
        equiangular_basis(3, 3, slice_size=0)
    with pytest.raises(ValueError, match="steps"):
        equiangular_basis(3, 3, steps=0)
    with pytest.raises(ValueError, match="unit rows"):
        extend_basis(2 * torch.eye(3), 1)
    with pytest.raises(ValueError, match="extra"):
        extend_basis(torch.eye(3), 0)
    with pytest.raises(ValueError, match="unit rows"):
        EBVHead(torch.ones(2, 2))
    with pytest.raises(ValueError, match="temperature"):
        EBVHead(torch.eye(2), 0.0)
    z, w, y = torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"\(N, d\)"):
        normalized_softmax(z, w.T, y)
    with pytest.raises(ValueError, match=r"\(2,\)"):
        normalized_softmax(z, w, y[:1])
    with pytest.raises(TypeError, match="integer"):
        normalized_softmax(z, w, y.float())
    with pytest.raises(ValueError, match="scale"):
        normalized_softmax(z, w, y, scale=0.0)
    with pytest.raises(ValueError, match="reduction"):
        normalized_softmax(z, w, y, reduction="median")
