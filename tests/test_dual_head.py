"""The two logit-level losses, the second head, the projection and the cosines, against float64 and brute force."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lib.book import load_reference
from lib.distill import DualHead, binary_kl, binary_kl_norm
from lib.interp import gradient_conflict
from lib.optim import align_gradients, aligned_backward
from lib.train import fit_ensemble

CHAPTER = "dual-head-distillation"
LOSSES = {"binary_kl": binary_kl, "binary_kl_norm": binary_kl_norm}


def pair(count=6, classes=7, scale=3.0, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        (scale * torch.randn(count, classes, generator=generator, dtype=torch.float64)).to(dtype)
        for _ in range(2)
    )
    return student.requires_grad_(), teacher


def explicit(name, student, teacher, temperature):
    """Kullback-Leibler divergences of two coins, written out; rows."""
    if name == "binary_kl":
        p, q = torch.sigmoid(teacher / temperature), torch.sigmoid(student / temperature)
    else:
        q = torch.sigmoid((student - teacher) / temperature)
        p = torch.full_like(q, 0.5)
    coins = F.kl_div(q.log(), p, reduction="none") + F.kl_div((1 - q).log(), 1 - p, reduction="none")
    return temperature**2 * coins.sum(1)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("temperature", [0.7, 2.0, 5.0])
def test_value_and_gradient_of_the_definition(name, temperature):
    student, teacher = pair()
    loss = LOSSES[name](student, teacher, temperature=temperature)
    wanted = explicit(name, student, teacher, temperature).mean()
    assert torch.allclose(loss, wanted, atol=1e-12)
    for a, b in zip(torch.autograd.grad(loss, student), torch.autograd.grad(wanted, student), strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    assert torch.autograd.gradcheck(lambda z: LOSSES[name](z, teacher, temperature=temperature), (student,))


def test_worked_values():
    student = torch.tensor([[2.0, 3, 4]], dtype=torch.float64, requires_grad=True)
    teacher = student.detach() - 4
    for loss, value, slope in (
        (binary_kl, 5.472612, (0.9242, 0.8801, 0.7616)),
        (binary_kl_norm, 12 * math.log(math.cosh(1)), (math.tanh(1),) * 3),
    ):
        result = loss(student, teacher)
        (gradient,) = torch.autograd.grad(result, student)
        assert abs(result.item() - value) < 1e-6
        assert torch.allclose(gradient, torch.tensor([slope], dtype=torch.float64), atol=5e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_reference_cell(name):
    student, teacher = pair(seed=2)
    reference = load_reference(CHAPTER, name)(student, teacher, 3.0)
    loss = LOSSES[name](student, teacher, temperature=3.0)
    assert torch.allclose(reference, loss, atol=1e-12)
    wanted = torch.autograd.grad(reference, student)[0]
    assert torch.allclose(torch.autograd.grad(loss, student)[0], wanted, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_logits_and_half_precision(name, dtype):
    student = torch.tensor([[60.0, -60.0, 0.0], [500.0, -500.0, 3.0]]).to(dtype).requires_grad_()
    teacher = torch.tensor([[-60.0, 60.0, 0.0], [500.0, -500.0, 3.0]]).to(dtype)
    loss = LOSSES[name](student, teacher, reduction="none")
    assert (
        loss.dtype == torch.float32 and loss.isfinite().all() and loss[1].item() == pytest.approx(0, abs=1e-5)
    )
    # far out: t |S| where the teacher is as sure of the opposite, and t / 2 |S - T| less a constant
    assert loss[0].item() == pytest.approx(240 if name == "binary_kl" else 240 - 8 * math.log(2), rel=1e-4)
    loss.sum().backward()
    assert student.grad.dtype == dtype and student.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_reductions_layout_and_teacher(name):
    loss = LOSSES[name]
    student, teacher = pair(classes=5)
    teacher = teacher.requires_grad_()
    rows = loss(student, teacher, reduction="none")
    assert rows.shape == (6,)
    assert torch.allclose(rows.sum(), loss(student, teacher, reduction="sum"))
    assert torch.allclose(rows.mean(), loss(student, teacher))
    rows.sum().backward()
    assert teacher.grad is None
    strided = student.detach().T.contiguous().T
    assert torch.allclose(loss(strided, teacher), rows.mean())
    assert loss(student[:0], teacher[:0], reduction="sum") == 0
    # classes are summed: a class on which both agree changes nothing
    wider = [torch.cat([x, torch.ones(6, 1)], 1) for x in (student, teacher)]
    assert torch.allclose(loss(*wider), rows.mean())


@pytest.mark.parametrize("name", LOSSES)
def test_losses_bad_input(name):
    loss = LOSSES[name]
    student, teacher = pair()
    with pytest.raises(TypeError, match="floating"):
        loss(student.long(), teacher)
    with pytest.raises(ValueError, match="both be"):
        loss(student, teacher[:, 1:])
    with pytest.raises(ValueError, match="temperature"):
        loss(student, teacher, temperature=0.0)
    with pytest.raises(ValueError, match="reduction"):
        loss(student, teacher, reduction="average")


def dual(aux="linear", seed=0):
    torch.manual_seed(seed)
    return DualHead(nn.Sequential(nn.Linear(6, 5), nn.ReLU()), 5, 4, aux=aux, width=8)


@pytest.mark.parametrize("aux", ["linear", "mlp"])
def test_each_head_hears_one_loss(aux):
    model = dual(aux)
    x, y, teacher = torch.randn(9, 6), torch.randint(4, (9,)), torch.randn(9, 4)
    first, second = model(x)
    binary_kl_norm(second, teacher).backward(retain_graph=True)
    assert model.head.weight.grad is None
    assert all(p.grad is not None for p in [*model.aux.parameters(), *model.backbone.parameters()])
    model.zero_grad()
    F.cross_entropy(first, y).backward()
    assert all(p.grad is None for p in model.aux.parameters())


@pytest.mark.parametrize("aux", ["linear", "mlp"])
def test_export_drops_the_auxiliary_head(aux):
    model = dual(aux).eval()
    x = torch.randn(3, 6)
    exported = model.export()
    assert torch.equal(exported(x), model(x)[0])
    names = {id(p) for p in exported.parameters()}
    assert names.isdisjoint(id(p) for p in model.aux.parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(x)  # in evaluation mode no statistic moves
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_dual_head_under_vmap_and_bad_input():
    models = [dual("mlp", seed) for seed in range(2)]
    x, teacher = torch.randn(12, 6), torch.randn(12, 4)
    losses = fit_ensemble(
        models, lambda model, x, t: binary_kl_norm(model(x)[1], t), [v.expand(2, *v.shape) for v in (x, teacher)],
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05), epochs=5, seeds=[0, 1], progress=False,
    )  # fmt: skip
    assert (losses[-1] < losses[0]).all()
    with pytest.raises(ValueError, match="aux"):
        DualHead(nn.Identity(), 3, 4, aux="conv")
    with pytest.raises(ValueError, match="at least 1"):
        DualHead(nn.Identity(), 0, 4)


def gradients(inner_sign, seed=0):
    generator = torch.Generator().manual_seed(seed)
    g = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 4), (5,))]
    h = [torch.randn(x.shape, generator=generator, dtype=torch.float64) + 2 * inner_sign * x for x in g]
    return g, h


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def test_projection_is_one_sided():
    g, h = gradients(-1)
    projected, alignment = align_gradients(g, h)
    a, b, c = flat(g), flat(h), flat(projected)
    assert torch.allclose(c, b - (a @ b) / (a @ a) * a)
    assert abs(a @ c) < 1e-10 and abs(alignment.after) < 1e-10
    assert alignment.before.item() == pytest.approx(F.cosine_similarity(a, b, dim=0).item())
    g, h = gradients(1)
    projected, alignment = align_gradients(g, h)  # no conflict: as it was
    assert all(torch.equal(x, y) for x, y in zip(projected, h, strict=True))
    assert alignment.before == alignment.after > 0
    zero = [torch.zeros_like(x) for x in g]
    assert torch.equal(flat(align_gradients(zero, h)[0]), flat(h))
    with pytest.raises(ValueError, match="same parameters"):
        align_gradients(g, h[:1])


def test_projection_of_each_member_under_vmap():
    pairs = [gradients(-1, 1), gradients(1, 2)]
    g, h = ([torch.stack(parts) for parts in zip(*side, strict=True)] for side in zip(*pairs, strict=True))
    together, cosines = torch.vmap(lambda g, h: align_gradients(g, h))(tuple(g), tuple(h))
    for member, (one_g, one_h) in enumerate(pairs):
        alone, alignment = align_gradients(one_g, one_h)
        assert torch.allclose(flat([t[member] for t in together]), flat(alone))
        assert torch.allclose(cosines.before[member], alignment.before)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_aligned_backward(sign):
    model = dual().double()
    x, y = torch.randn(9, 6, dtype=torch.float64), torch.randint(4, (9,))
    first, second = model(x)
    # the auxiliary head is the primary one, so that the auxiliary loss can be turned against the primary one
    losses = (
        F.cross_entropy(first, y),
        sign * F.cross_entropy(first, y) + binary_kl_norm(second, torch.zeros_like(second)),
    )
    params = list(model.parameters())
    g, h = (
        flat(torch.autograd.grad(loss, params, retain_graph=True, materialize_grads=True)) for loss in losses
    )
    for parameter in params:
        parameter.grad = torch.ones_like(parameter)  # must not be added to
    alignment = aligned_backward(losses, params)
    result = flat([p.grad for p in params])
    wanted = g + h - min(0.0, (g @ h).item()) / (g @ g) * g
    assert torch.allclose(result, wanted)
    assert result @ g >= g @ g - 1e-10  # never slower along the primary gradient
    assert alignment.after >= -1e-12 and (alignment.before < 0) == (sign < 0)


def test_aligned_backward_reference_and_bad_input():
    model = dual().double()
    x, y = torch.randn(9, 6, dtype=torch.float64), torch.randint(4, (9,))
    first, second = model(x)
    losses = F.cross_entropy(first, y), -3 * F.cross_entropy(first + second, y)
    params = list(model.parameters())
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    aligned_backward(losses, [*params, frozen])
    result = flat([p.grad for p in params])
    load_reference(CHAPTER, "aligned_step")(*losses, params)
    assert torch.allclose(result, flat([p.grad for p in params])) and frozen.grad is None
    with pytest.raises(ValueError, match="two scalars"):
        aligned_backward(losses[:1], params)
    with pytest.raises(ValueError, match="two scalars"):
        aligned_backward((losses[0], torch.ones(2)), params)
    with pytest.raises(ValueError, match="requires a gradient"):
        aligned_backward(losses, [frozen])


def test_gradient_conflict():
    model = dual().double()
    x, y = torch.randn(9, 6, dtype=torch.float64), torch.randint(4, (9,))
    first, second = model(x)
    a, b = F.cross_entropy(first, y), binary_kl(first, torch.randn(9, 4, dtype=torch.float64))
    cosines = gradient_conflict(model, a, b)
    assert list(cosines) == ["backbone", "head", "aux"] and math.isnan(cosines["aux"])
    for name in ("backbone", "head"):
        params = list(getattr(model, name).parameters())
        g, h = (flat(torch.autograd.grad(loss, params, retain_graph=True)) for loss in (a, b))
        assert cosines[name] == pytest.approx(F.cosine_similarity(g, h, dim=0).item())
    assert gradient_conflict(model, a, -a)["head"] == pytest.approx(-1)
    one = gradient_conflict(model, a, b, groups={"weight": [model.head.weight]})
    assert list(one) == ["weight"]
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match="scalars"):
        gradient_conflict(model, first, b)
    with pytest.raises(ValueError, match="needs parameters"):
        gradient_conflict(model, a, b, groups={"nothing": []})
