"""`lib.distill.linear_distillation` on its PyTorch paths, against the losses on explicit logits."""

import pytest
import torch
import torch.nn.functional as F

from lib.distill import binary_kl, kd_loss, linear_distillation, nkd_loss

LOSSES = {
    "kd": lambda s, t, y, **more: kd_loss(s, t, temperature=2.0, **more),
    "nkd": lambda s, t, y, **more: nkd_loss(s, t, y, temperature=2.0, gamma=0.5, **more),
    "binary_kl": lambda s, t, y, **more: binary_kl(s, t, temperature=2.0, **more),
}
every_loss = pytest.mark.parametrize("loss", LOSSES)
lean_and_explicit = pytest.mark.parametrize("impl", ["torch", "chunked"])


def problem(rows=23, classes=31, dtype=torch.float64):
    generator = torch.Generator().manual_seed(rows)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    student = [
        normal(rows, 7).requires_grad_(),
        normal(classes, 7).requires_grad_(),
        normal(classes).requires_grad_(),
    ]
    teacher = [normal(rows, 5), normal(classes, 5), normal(classes)]
    return student, teacher, torch.randint(classes, (rows,), generator=generator)


def run(student, teacher, targets, **options):
    return linear_distillation(
        *student[:2], *teacher[:2], targets, bias=student[2], teacher_bias=teacher[2], temperature=2.0, gamma=0.5,
        **options,
    )  # fmt: skip


@every_loss
@lean_and_explicit
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("step", [None, 1, 5])
def test_values_and_gradients(loss, impl, reduction, step):
    student, teacher, targets = problem()
    targets[::3] = -100
    kept = targets != -100
    blocks = None if step is None else (step, 1)
    found = run(student, teacher, targets, loss=loss, impl=impl, reduction=reduction, block_size=blocks)
    logits = F.linear(student[0][kept], *student[1:]), F.linear(teacher[0][kept], *teacher[1:])
    exact = LOSSES[loss](*logits, targets[kept], reduction=reduction)
    torch.testing.assert_close(found[kept] if reduction == "none" else found, exact)
    upstream = torch.randn(found.shape, dtype=found.dtype, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad(exact, student, upstream[kept] if reduction == "none" else upstream)
    for _ in range(2):  # the second time through the retained graph
        torch.testing.assert_close(torch.autograd.grad(found, student, upstream, retain_graph=True), wanted)


@every_loss
@pytest.mark.parametrize("needed", [0, 1, 2])
def test_gradient_of_one_input_alone(loss, needed):
    student, teacher, targets = problem()
    every = torch.autograd.grad(run(student, teacher, targets, loss=loss, impl="torch"), student)
    student = [x.detach().requires_grad_(number == needed) for number, x in enumerate(student)]
    value = run(student, teacher, targets, loss=loss)
    torch.testing.assert_close(torch.autograd.grad(value, student[needed])[0], every[needed])


@every_loss
def test_half_precision_and_no_gradient(loss):
    student, teacher, targets = problem(dtype=torch.bfloat16)
    exact = LOSSES[loss](
        *(F.linear(*[x.detach().double() for x in side]) for side in (student, teacher)), targets
    )
    with torch.no_grad():
        torch.testing.assert_close(
            run(student, teacher, targets, loss=loss).double(), exact, rtol=1e-5, atol=0
        )
    value = run(student, teacher, targets, loss=loss)
    assert value.dtype == torch.float32
    assert all(x.dtype == torch.bfloat16 for x in torch.autograd.grad(value, student))


@lean_and_explicit
def test_no_rows_counted(impl):
    student, teacher, targets = problem()
    targets[:] = -100
    for loss in LOSSES:
        assert run(student, teacher, targets, loss=loss, impl=impl).isnan()
        rows = run(student, teacher, targets, loss=loss, impl=impl, reduction="none")
        assert rows.abs().max() == 0
        assert all(x.abs().max() == 0 for x in torch.autograd.grad(rows.sum(), student))


def test_second_derivative_only_on_explicit_logits():
    student, teacher, targets = problem()
    torch.autograd.grad(run(student, teacher, targets, impl="torch"), student, create_graph=True)
    with pytest.raises(RuntimeError, match="impl='torch'"):
        torch.autograd.grad(run(student, teacher, targets), student, create_graph=True)


def test_bad_input_raises():
    student, teacher, targets = problem()
    for match, options in (
        ("loss must be one of", {"loss": "mse"}),
        ("reduction must be", {"reduction": "max"}),
        ("block_size must be", {"block_size": (0, 4)}),
        ("impl must be", {"impl": "fast"}),
    ):
        with pytest.raises(ValueError, match=match):
            run(student, teacher, targets, **options)
    for match, options in (("temperature", {"temperature": 0.0}), ("gamma", {"gamma": -1.0})):
        with pytest.raises(ValueError, match=match):
            linear_distillation(*student[:2], *teacher[:2], **options)
    with pytest.raises(ValueError, match="'nkd' needs targets"):
        run(student, teacher, None, loss="nkd")
    with pytest.raises(ValueError, match=r"targets must lie in \[0, 31\)"):
        run(student, teacher, targets + 31)
    with pytest.raises(ValueError, match="targets must have the shape"):
        run(student, teacher, targets[:3])
    with pytest.raises(TypeError, match="integer dtype"):
        run(student, teacher, targets.double())
    with pytest.raises(ValueError, match="same rows and classes"):
        run(student, [teacher[0], teacher[1][:4], teacher[2][:4]], targets)
    with pytest.raises(ValueError, match="teacher_bias must be"):
        run(student, [*teacher[:2], teacher[2][:4]], targets)
    with pytest.raises(ValueError, match="needs more classes"):
        run([student[0], student[1][:1], student[2][:1]], [teacher[0], teacher[1][:1], teacher[2][:1]], targets, loss="nkd")  # fmt: skip
    with pytest.raises(TypeError, match="teacher_hidden is torch.float32, teacher_weight must be too"):
        run(student, [teacher[0].float(), *teacher[1:]], targets)
    with pytest.raises(TypeError, match="hidden must be of a floating dtype"):
        run([student[0].detach().long(), *student[1:]], teacher, targets)
    with pytest.raises(ValueError, match="one device"):
        run(student, [teacher[0], teacher[1].to("meta"), teacher[2]], targets)
