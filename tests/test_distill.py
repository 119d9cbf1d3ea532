"""lib.distill against explicit distributions in float64, the chapter's reference cells and the closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.book import load_reference
from lib.distill import USKD, dkd_loss, kd_decomposition, kd_loss, nkd_loss
from lib.train import PeakTensor

CHAPTER = "normalized-distillation"


def batch(count=6, classes=7, dtype=torch.float64, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        torch.randn(count, classes, generator=generator, dtype=torch.float64) * scale for _ in "st"
    )
    targets = torch.randint(classes, (count,), generator=generator)
    return student.to(dtype), teacher.to(dtype), targets


def others(logits, targets):
    """The C - 1 logits that are not the target's, explicitly."""
    keep = torch.ones_like(logits, dtype=torch.bool).scatter(1, targets[:, None], False)
    return logits[keep].reshape(len(logits), -1)


def explicit_nkd(student, teacher, targets, gamma, temperature):
    rows = torch.arange(len(targets))
    target = -teacher.softmax(1)[rows, targets] * student.log_softmax(1)[rows, targets]
    soft = (others(teacher, targets) / temperature).softmax(1)
    log_student = (others(student, targets) / temperature).log_softmax(1)
    return target - gamma * temperature**2 * (soft * log_student).sum(1)


def explicit_dkd(student, teacher, targets, alpha, beta, temperature):
    rows = torch.arange(len(targets))
    pairs = []
    for logits in (student, teacher):
        probability = (logits / temperature).softmax(1)[rows, targets]
        pairs.append(torch.stack([probability, 1 - probability], 1))
    binary = F.kl_div(pairs[0].log(), pairs[1], reduction="none").sum(1)
    rest = F.kl_div(
        (others(student, targets) / temperature).log_softmax(1),
        (others(teacher, targets) / temperature).softmax(1),
        reduction="none",
    ).sum(1)
    return temperature**2 * (alpha * binary + beta * rest)


LOSSES = {
    "nkd": (
        lambda s, t, y, **k: nkd_loss(s, t, y, gamma=1.5, temperature=3.0, **k),
        lambda s, t, y: explicit_nkd(s, t, y, 1.5, 3.0),
    ),
    "nkd, temperature 1": (nkd_loss, lambda s, t, y: explicit_nkd(s, t, y, 1.5, 1.0)),
    "dkd": (
        lambda s, t, y, **k: dkd_loss(s, t, y, alpha=0.5, beta=2.0, temperature=4.0, **k),
        lambda s, t, y: explicit_dkd(s, t, y, 0.5, 2.0, 4.0),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", [(6, 7), (1, 2), (33, 3), (3, 129)])
def test_losses_equal_explicit_distributions_and_gradients(name, shape):
    loss, explicit = LOSSES[name]
    student, teacher, targets = batch(*shape)
    student.requires_grad_()
    ours, expected = loss(student, teacher, targets, reduction="none"), explicit(student, teacher, targets)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    weights = torch.linspace(0.5, 2, shape[0], dtype=torch.float64)
    mine = torch.autograd.grad((ours * weights).sum(), student)[0]
    theirs = torch.autograd.grad((expected * weights).sum(), student)[0]
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(loss(student, teacher, targets), expected.mean())
    torch.testing.assert_close(loss(student, teacher, targets, reduction="sum"), expected.sum())


def test_worked_value():
    student = torch.tensor([[2.0, 1, 0, -1]], dtype=torch.float64)
    teacher = torch.tensor([[1.0, 2, 0.5, 0]], dtype=torch.float64)
    target = torch.tensor([0])
    assert nkd_loss(student, teacher, target).item() == pytest.approx(1.250461, abs=5e-7)
    assert kd_loss(student, teacher).item() == pytest.approx(1.513131, abs=5e-7)
    terms = kd_decomposition(student, teacher, target)
    assert (terms.nontarget + terms.mass).item() == pytest.approx(1.419327, abs=5e-7)


def test_kd_is_scaled_cross_entropy():
    student, teacher, _ = batch()
    expected = -9 * ((teacher / 3).softmax(1) * (student / 3).log_softmax(1)).sum(1)
    torch.testing.assert_close(kd_loss(student, teacher, temperature=3.0, reduction="none"), expected)
    hard = torch.full((4, 5), -1e4).scatter(1, torch.tensor([[0], [1], [2], [4]]), 0.0).double()
    torch.testing.assert_close(
        kd_loss(student[:4, :5], hard), F.cross_entropy(student[:4, :5], hard.argmax(1))
    )


@settings(max_examples=25)
@given(st.integers(1, 9), st.integers(2, 12), st.integers(0, 999), st.sampled_from([0.1, 2.0, 20.0]))
def test_the_three_terms_sum_to_kd_with_their_gradients(count, classes, seed, scale):
    student, teacher, targets = batch(count, classes, seed=seed, scale=scale)
    student.requires_grad_()
    terms = sum(kd_decomposition(student, teacher, targets, reduction="none"))
    whole = kd_loss(student, teacher, reduction="none")
    torch.testing.assert_close(terms, whole, rtol=1e-11, atol=1e-11)
    first, second = (torch.autograd.grad(x.sum(), student)[0] for x in (terms, whole))
    torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-11)


@settings(max_examples=20)
@given(st.integers(0, 999), st.sampled_from([0.5, 1.0, 3.0]))
def test_the_nontarget_part_never_moves_the_target_logit(seed, temperature):
    student, teacher, targets = batch(5, 6, seed=seed)
    student.requires_grad_()
    both = nkd_loss(student, teacher, targets, gamma=2.0, temperature=temperature)
    target_only = nkd_loss(student, teacher, targets, gamma=0.0)
    gradient = torch.autograd.grad(both - target_only, student)[0]
    assert gradient.gather(1, targets[:, None]).abs().max() < 1e-15
    assert gradient.sum(1).abs().max() < 1e-14


@pytest.mark.parametrize("name", [*LOSSES, "kd", "terms"])
def test_gradcheck(name):
    student, teacher, targets = batch(4, 5)
    student.requires_grad_()

    def function(student):
        if name == "kd":
            return kd_loss(student, teacher, temperature=2.0, reduction="none")
        if name == "terms":
            return tuple(kd_decomposition(student, teacher, targets, reduction="none"))
        return LOSSES[name][0](student, teacher, targets, reduction="none")

    assert torch.autograd.gradcheck(function, student)
    assert torch.autograd.gradgradcheck(function, student)


@pytest.mark.parametrize("name", LOSSES)
def test_the_teacher_gets_no_gradient(name):
    student, teacher, targets = batch()
    student.requires_grad_()
    teacher.requires_grad_()
    LOSSES[name][0](student, teacher, targets).backward()
    (kd_loss(student, teacher) + sum(kd_decomposition(student, teacher, targets))).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("name", LOSSES)
def test_the_teacher_gets_no_gradient_of_second_order(name):
    """A gradient penalty on the student must not train the teacher either."""
    student, teacher, targets = batch()
    student.requires_grad_()
    teacher.requires_grad_()
    (slope,) = torch.autograd.grad(LOSSES[name][0](student, teacher, targets), student, create_graph=True)
    slope.square().sum().backward()
    assert student.grad.abs().max() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_low_precision(name, dtype):
    student, teacher, targets = batch(8, 50, dtype)
    student.requires_grad_()
    exact = student.detach().double().requires_grad_()
    ours = LOSSES[name][0](student, teacher, targets)
    expected = LOSSES[name][1](exact, teacher.double(), targets).mean()
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-4)
    ours.backward()
    expected.backward()
    assert student.grad.dtype == dtype
    loose = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=loose, atol=loose)


@pytest.mark.parametrize("name", LOSSES)
def test_a_student_sure_of_the_target_is_no_problem(name):
    student = torch.tensor([[1000.0, 3, 1, 2]], requires_grad=True)  # S_y is 1 in every floating-point format
    teacher = torch.tensor([[90.0, 1, 3, 2]])
    targets = torch.tensor([0])
    loss = LOSSES[name][0](student, teacher, targets)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()
    assert student.grad[0, 2] < 0 < student.grad[0, 1]  # still told which of the others is likelier
    terms = kd_decomposition(student, teacher, targets)
    assert all(term.isfinite() for term in terms)


def test_ignored_rows_have_neither_loss_nor_gradient():
    student, teacher, targets = batch()
    student.requires_grad_()
    masked = targets.clone()
    masked[[1, 4]] = -100
    kept = torch.tensor([0, 2, 3, 5])
    for loss, _ in LOSSES.values():
        ours = loss(student, teacher, masked)
        torch.testing.assert_close(ours, loss(student[kept], teacher[kept], targets[kept]))
        gradient = torch.autograd.grad(ours, student)[0]
        assert (gradient[[1, 4]] == 0).all() and (gradient[kept] != 0).any()
    assert (kd_decomposition(student, teacher, masked, reduction="none").mass[[1, 4]] == 0).all()
    assert nkd_loss(student, teacher, torch.full_like(targets, -100)).isnan()  # as in torch


def test_label_distributions_count_as_their_largest_entry():
    student, teacher, targets = batch()
    soft = F.one_hot(targets, 7) * 0.6 + 0.4 / 7
    for loss, _ in LOSSES.values():
        torch.testing.assert_close(
            loss(student, teacher, soft.double()), loss(student, teacher, targets), rtol=0, atol=0
        )


def test_empty_and_not_contiguous():
    student, teacher, targets = batch(0, 5)
    student.requires_grad_()
    total = nkd_loss(student, teacher, targets, reduction="sum")
    total.backward()
    assert total == 0 and student.grad.shape == (0, 5)
    student, teacher, targets = batch(6, 14)
    torch.testing.assert_close(
        nkd_loss(student[:, ::2], teacher[:, ::2], targets // 2),
        explicit_nkd(student[:, ::2], teacher[:, ::2], targets // 2, 1.5, 1.0).mean(),
    )


def test_rows_are_worked_on_in_parts(monkeypatch):
    student, teacher, targets = batch(11, 6)
    whole = nkd_loss(student, teacher, targets, temperature=2.0)
    monkeypatch.setattr("lib.distill.normalized.ELEMENTS", 13)
    torch.testing.assert_close(nkd_loss(student, teacher, targets, temperature=2.0), whole)


def test_vmap_equals_a_loop():
    groups = [batch(5, 4, seed=seed) for seed in range(3)]
    stacked = [torch.stack(tensors) for tensors in zip(*groups, strict=True)]
    for loss, _ in LOSSES.values():
        gradient = torch.func.vmap(torch.func.grad(loss))(*stacked)
        for row, group in zip(gradient, groups, strict=True):
            torch.testing.assert_close(row, torch.func.grad(loss)(*group))


def test_nothing_of_the_size_of_the_logits_waits_for_the_backward_pass():
    count, classes = 64, 4096
    student, teacher, targets = batch(count, classes, torch.float32)
    student.requires_grad_()
    with PeakTensor() as memory:
        loss = nkd_loss(student, teacher, targets, temperature=3.0)
        assert memory.live_bytes < 4 * count * classes / 50
        loss.backward()
    with PeakTensor() as naive:
        loss = explicit_nkd(student, teacher, targets, 1.5, 3.0).mean()
        assert naive.live_bytes > 3 * 4 * count * classes
        loss.backward()
    assert memory.peak_bytes < 2.5 * 4 * count * classes < 0.6 * naive.peak_bytes


@pytest.mark.parametrize(
    "change, error, words",
    [
        (
            {"student_logits": torch.zeros(2, 3, dtype=torch.long)},
            TypeError,
            "student_logits must be floating",
        ),
        ({"teacher_logits": torch.zeros(2, 4)}, ValueError, r"student \(2, 3\) and teacher \(2, 4\)"),
        ({"student_logits": torch.zeros(3), "teacher_logits": torch.zeros(3)}, ValueError, r"\(N, C\)"),
        ({"student_logits": torch.zeros(2, 1), "teacher_logits": torch.zeros(2, 1)}, ValueError, "no class"),
        ({"targets": torch.tensor([0, 3])}, ValueError, r"in \[0, 3\), got 3"),
        ({"targets": torch.tensor([0, -1])}, ValueError, "got -1"),
        ({"targets": torch.tensor([0, 1, 2])}, ValueError, r"targets must be \(2,\)"),
        ({"targets": torch.tensor([True, False])}, TypeError, "class indices"),
        ({"targets": torch.zeros(2)}, ValueError, r"label distributions must be \(2, 3\)"),
        ({"temperature": 0.0}, ValueError, "temperature must be above 0"),
        ({"temperature": math.nan}, ValueError, "temperature must be above 0"),
        ({"reduction": "average"}, ValueError, "reduction must be"),
    ],
)
def test_bad_input(change, error, words):
    good = {
        "student_logits": torch.zeros(2, 3),
        "teacher_logits": torch.zeros(2, 3),
        "targets": torch.tensor([0, 2]),
    }
    for loss in (nkd_loss, dkd_loss, kd_decomposition, kd_loss):
        if loss is kd_decomposition and "temperature" in change:
            continue
        arguments = good | change
        if loss is kd_loss:
            if "targets" in change or words == "no class":
                continue
            arguments.pop("targets")
        with pytest.raises(error, match=words):
            loss(**arguments)


def test_bad_weights():
    student, teacher, targets = batch()
    for loss, name in ((nkd_loss, "gamma"), (dkd_loss, "alpha"), (dkd_loss, "beta")):
        for value in (-1.0, math.inf, math.nan):
            with pytest.raises(ValueError, match=f"{name} must be at least 0"):
                loss(student, teacher, targets, **{name: value})


# --- self-distillation


def explicit_uskd(module, feature, logits, targets):
    """Row by row with Python's sort; hard targets."""
    weak_logits = feature @ module.weak.weight.T + module.weak.bias
    student, weak = logits.softmax(1), weak_logits.softmax(1)
    count, classes = logits.shape
    own = student[torch.arange(count), targets].detach()
    loss = 0.0
    for n, y in enumerate(targets.tolist()):
        label = own[n] ** 2 + 1 - (own**2).mean()
        rest = [i for i in range(classes) if i != y]
        if module.rank_mode == "paper":
            score = weak[n] / (1 - weak[n, y]) + student[n] / (1 - student[n, y])
        else:
            score = weak[n] / (1 - weak[n, y]) + student[n].log() / (1 - student[n, y].log())
        order = sorted(range(classes), key=lambda i: (-score[i].item(), i))
        zipf = {i: 1 / (order.index(i) + 1) for i in rest}
        total = sum(zipf.values())
        log_rest = dict(zip(rest, logits[n, rest].log_softmax(0), strict=True))
        smooth = F.one_hot(torch.tensor(y), classes).double() * 0.9 + 0.1 / classes
        loss = loss - module.alpha * label * student[n, y].log()
        loss = loss - module.beta * sum(zipf[i] / total * log_rest[i] for i in rest)
        loss = loss - module.mu * (smooth * weak_logits[n].log_softmax(0)).sum()
    return loss / count


def uskd_batch(rank_mode="paper", classes=6, **weights):
    torch.manual_seed(1)
    module = USKD(3, classes, rank_mode=rank_mode, **weights).double()
    feature = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(5, classes, dtype=torch.float64, requires_grad=True)
    return module, feature, logits, torch.randint(classes, (5,))


@pytest.mark.parametrize("rank_mode", ["paper", "official"])
def test_uskd_equals_the_loop_with_all_gradients(rank_mode):
    module, feature, logits, targets = uskd_batch(rank_mode, alpha=0.7, beta=0.4, mu=0.3)
    inputs = (feature, logits, module.weak.weight, module.weak.bias)
    ours, expected = module(feature, logits, targets), explicit_uskd(module, feature, logits, targets)
    torch.testing.assert_close(ours, expected)
    for mine, theirs in zip(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_uskd_labels():
    module, feature, logits, targets = uskd_batch()
    target_labels, zipf = module.labels(feature, logits, targets)
    assert not target_labels.requires_grad and not zipf.requires_grad
    assert target_labels.shape == (5, 1) and target_labels.mean().item() == pytest.approx(1)
    own = logits.softmax(1).gather(1, targets[:, None])
    assert (target_labels.argsort(0) == own.argsort(0)).all()  # surer rows get the larger label
    assert (zipf.gather(1, targets[:, None]) == 0).all()
    torch.testing.assert_close(zipf.sum(1), torch.ones(5, dtype=torch.float64))


def test_uskd_ranks_keep_the_targets_position_and_order_ties_by_index():
    module = USKD(1, 4)
    torch.nn.init.zeros_(module.weak.weight)
    torch.nn.init.zeros_(module.weak.bias)
    feature = torch.zeros(2, 1)
    logits = torch.tensor([[5.0, 1, 1, 2], [1, 3, 2, -1]])
    _, zipf = module.labels(feature, logits, torch.tensor([0, 3]))
    # first row: the target is first, so the others have ranks 3, 4, 2; second row: it is last, so 3, 1, 2
    first, second = torch.tensor([0, 1 / 3, 1 / 4, 1 / 2]), torch.tensor([1 / 3, 1, 1 / 2, 0])
    torch.testing.assert_close(zipf, torch.stack([first / first.sum(), second / second.sum()]))


def test_uskd_mixed_labels():
    module, feature, logits, _ = uskd_batch()
    mixed = torch.zeros(5, 6, dtype=torch.float64)
    mixed[:, 2], mixed[:, 4] = 0.7, 0.3
    target_labels, zipf = module.labels(feature, logits, mixed)
    student = logits.softmax(1).detach()
    expected = torch.stack([student[:, 2] ** 2 + 0.7, student[:, 4] ** 2 + 0.3], 1)
    expected = expected - torch.stack([student[:, 2] ** 2, student[:, 4] ** 2], 1).mean(0)
    torch.testing.assert_close(target_labels, expected)
    assert (zipf[:, [2, 4]] == 0).all() and (zipf[:, [0, 1, 3, 5]] > 0).all()
    module(feature, logits, mixed).backward()
    assert logits.grad.isfinite().all()


def test_one_hot_labels_equal_indices():
    module, feature, logits, targets = uskd_batch()
    torch.testing.assert_close(
        module(feature, logits, F.one_hot(targets, 6).double()), module(feature, logits, targets)
    )


def test_uskd_averages_feature_maps_and_survives_certainty():
    torch.manual_seed(0)
    module = USKD(3, 5)
    maps, logits, targets = torch.randn(4, 3, 2, 2), torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    torch.testing.assert_close(module(maps, logits, targets), module(maps.mean((2, 3)), logits, targets))
    sure = (F.one_hot(targets, 5) * 1000.0).requires_grad_()
    loss = module(maps, sure, targets)
    loss.backward()
    assert loss.isfinite() and sure.grad.isfinite().all()


def test_uskd_bad_input():
    with pytest.raises(ValueError, match="rank_mode"):
        USKD(3, 5, rank_mode="best")
    with pytest.raises(ValueError, match="num_classes at least 2"):
        USKD(3, 1)
    with pytest.raises(ValueError, match="beta must be"):
        USKD(3, 5, beta=-1)
    module, logits, targets = USKD(3, 5), torch.zeros(4, 5), torch.tensor([0, 1, 2, 3])
    with pytest.raises(ValueError, match=r"feature must be \(N, 3"):
        module(torch.zeros(4, 2), logits, targets)
    with pytest.raises(ValueError, match=r"logits must be \(4, 5\)"):
        module(torch.zeros(4, 3), torch.zeros(4, 6), targets)
    with pytest.raises(ValueError, match=r"in \[0, 5\)"):
        module(torch.zeros(4, 3), logits, targets + 2)
    with pytest.raises(ValueError, match="three classes"):
        USKD(3, 2)(torch.zeros(4, 3), torch.zeros(4, 2), torch.full((4, 2), 0.5))


# --- the chapter's reference cells


def test_reference_losses():
    nkd, dkd, kd = (load_reference(CHAPTER, name) for name in ("nkd", "dkd", "kd"))
    student, teacher, targets = batch(9, 11)
    student.requires_grad_()
    pairs = [
        (nkd(student, teacher, targets, 1.5, 3.0), nkd_loss(student, teacher, targets, temperature=3.0)),
        (dkd(student, teacher, targets, 1.0, 8.0, 4.0), dkd_loss(student, teacher, targets, beta=8.0)),
        (kd(student, teacher, 4.0), kd_loss(student, teacher, temperature=4.0)),
    ]
    for theirs, ours in pairs:
        torch.testing.assert_close(ours, theirs)
        first, second = (torch.autograd.grad(x, student)[0] for x in (ours, theirs))
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-12)


def test_reference_uskd():
    uskd = load_reference(CHAPTER, "uskd")
    module, feature, logits, targets = uskd_batch()
    theirs = uskd(logits, module.weak(feature), targets, module.alpha, module.beta, module.mu)
    ours = module(feature, logits, targets)
    torch.testing.assert_close(ours, theirs)
    inputs = (feature, logits, module.weak.weight)
    for first, second in zip(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True
    ):
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-12)
