"""The kernels of `kernels.linear_distillation` against explicit logits in float64: natively on CUDA, else interpreted."""

import pytest
import torch
from kernel_support import DEVICE, assert_near, every_dtype, far_rows, poison, randn  # noqa: F401

from kernels import linear_distillation as kernel
from lib.book import load_reference
from lib.distill import binary_kl, kd_loss, linear_distillation, nkd_loss

every_loss = pytest.mark.parametrize("loss", kernel.LOSSES)
BLOCKS = (16, 32)
# the interpreter computes with numpy, which warns of what the kernels take into account
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def small_strips(monkeypatch):
    """Strips of 24 tokens and 48 classes (float32), so that small problems have several of them."""
    monkeypatch.setattr(kernel, "CHUNK", 24)
    monkeypatch.setattr(kernel, "SCRATCH_BYTES", 24 * 48 * 12)


def problem(count=37, classes=101, dim=24, teacher_dim=10, dtype=torch.float32, scale=2.0, biased=True):
    """Student (hidden, weight, bias), teacher (hidden, weight, bias) and targets."""
    student = [randn(count, dim, dtype=dtype, scale=scale), randn(classes, dim, dtype=dtype, scale=dim**-0.5)]
    teacher = [
        randn(count, teacher_dim, dtype=dtype, scale=scale, seed=1),
        randn(classes, teacher_dim, dtype=dtype, scale=teacher_dim**-0.5, seed=1),
    ]
    student.append(randn(classes, dtype=dtype, seed=2) if biased else None)
    teacher.append(randn(classes, dtype=dtype, seed=3) if biased else None)
    generator = torch.Generator().manual_seed(count)
    return student, teacher, torch.randint(classes, (count,), generator=generator).to(DEVICE)


def on_logits(loss, s, t, targets, temperature, gamma, reduction="none"):
    if loss == "nkd":
        return nkd_loss(s, t, targets, gamma=gamma, temperature=temperature, reduction=reduction)
    return {"kd": kd_loss, "binary_kl": binary_kl}[loss](s, t, temperature=temperature, reduction=reduction)


def exact_logits(side):
    hidden, weight, bias = (None if x is None else x.double() for x in side)
    return torch.nn.functional.linear(hidden, weight, bias)


def fused(student, teacher, targets, **options):
    return linear_distillation(
        *student[:2],
        *teacher[:2],
        targets,
        bias=student[2],
        teacher_bias=teacher[2],
        impl="triton",
        **options,
    )


def leaves(side, double=False):
    return [None if x is None else (x.double() if double else x).detach().requires_grad_() for x in side]


def compare(loss, student, teacher, targets, temperature=2.5, gamma=0.7, blocks=BLOCKS, factor=1.0):
    """Values of rows and gradients against float64, with random upstream gradients."""
    options = dict(temperature=temperature, gamma=gamma)
    found_inputs, exact_inputs = leaves(student), leaves(student, double=True)
    found = fused(found_inputs, teacher, targets, loss=loss, reduction="none", block_size=blocks, **options)
    exact = on_logits(loss, exact_logits(exact_inputs), exact_logits(teacher), targets, temperature, gamma)
    assert found.dtype == torch.float32
    assert_near(found, exact, factor=factor)
    upstream = randn(len(targets), seed=9)
    wanted = [x for x in exact_inputs if x is not None]
    given = [x for x in found_inputs if x is not None]
    for got, right in zip(
        torch.autograd.grad(found, given, upstream),
        torch.autograd.grad(exact, wanted, upstream.double()),
        strict=True,
    ):
        assert_near(got, right, factor=factor)


@every_loss
@every_dtype
@pytest.mark.parametrize("biased", [False, True])
def test_values_and_gradients(loss, dtype, biased):
    compare(loss, *problem(dtype=dtype, biased=biased))


@every_loss
@pytest.mark.parametrize("temperature,gamma", [(1.0, 1.5), (0.3, 2.0), (4.0, 0.0)])
def test_temperature_and_gamma(loss, temperature, gamma):
    compare(loss, *problem(20, 60), temperature=temperature, gamma=gamma, factor=5)


@every_loss
@pytest.mark.parametrize(
    "count,classes,dim,teacher_dim",
    [(1, 2, 1, 1), (1, 53, 17, 3), (31, 3, 3, 5), (16, 48, 16, 16), (33, 97, 40, 8), (17, 49, 8, 8)],
)
def test_odd_sizes(loss, count, classes, dim, teacher_dim):
    compare(loss, *problem(count, classes, dim, teacher_dim))


def test_one_class():
    compare("binary_kl", *problem(5, 1))
    student, teacher, targets = problem(5, 1)
    value = fused(leaves(student), teacher, targets, loss="kd", reduction="none")
    assert value.abs().max() < 1e-5


@every_loss
def test_default_tiles_and_one_strip(loss, monkeypatch):
    monkeypatch.undo()
    compare(loss, *problem(70, 300), blocks=None)


@every_loss
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_rows_and_reductions(loss, reduction):
    student, teacher, targets = problem(21, 60)
    targets[::4] = -7
    kept = targets != -7
    student[0][0] = torch.nan  # an ignored row may hold anything
    found_inputs, exact_inputs = leaves(student), leaves(student, double=True)
    found = fused(
        found_inputs, teacher, targets, loss=loss, reduction=reduction, ignore_index=-7, block_size=BLOCKS
    )
    s = exact_logits([exact_inputs[0][kept], *exact_inputs[1:]])
    exact = on_logits(loss, s, exact_logits(teacher)[kept], targets[kept], 1.0, 1.5, reduction)
    upstream = randn(*found.shape, seed=4)
    if reduction == "none":
        assert found[~kept].abs().max() == 0
        gradients = torch.autograd.grad(found, found_inputs, upstream)
        assert_near(found[kept], exact)
        upstream = upstream[kept]
    else:
        gradients = torch.autograd.grad(found, found_inputs, upstream)
        assert_near(found, exact)
    for got, right in zip(
        gradients, torch.autograd.grad(exact, exact_inputs, upstream.double()), strict=True
    ):
        assert_near(got, right)


@every_loss
def test_all_rows_ignored_and_no_rows(loss):
    student, teacher, targets = problem(9, 20)
    targets[:] = -100
    inputs = leaves(student)
    assert fused(inputs, teacher, targets, loss=loss).isnan()
    rows = fused(inputs, teacher, targets, loss=loss, reduction="none")
    assert rows.shape == (9,) and rows.abs().max() == 0
    rows.sum().backward()
    assert all(x.grad.abs().max() == 0 for x in inputs)
    empty = [inputs[0][:0], *inputs[1:]], [teacher[0][:0], *teacher[1:]], targets[:0]
    total = fused(*empty, loss=loss, reduction="sum")
    assert total == 0
    assert torch.autograd.grad(total, inputs[1])[0].abs().max() == 0


@every_loss
def test_leading_dimensions_and_strides(loss):
    student, teacher, targets = problem(12, 60)
    student[0] = student[0].T.contiguous().T
    student[1] = student[1].repeat(1, 2)[:, ::2]
    student[2] = student[2].repeat_interleave(3)[::3]
    teacher[0] = teacher[0].flip(1).flip(1).repeat(2, 1)[:12]
    teacher[1] = teacher[1].T.contiguous().T
    teacher[2] = teacher[2][:1].expand(60)
    compare(loss, student, teacher, targets.repeat_interleave(2)[::2])
    stacked = [student[0].reshape(3, 4, -1), *student[1:]], [teacher[0].reshape(3, 4, -1), *teacher[1:]]
    found = fused(*stacked, targets.reshape(3, 4), loss=loss, reduction="none")
    exact = on_logits(loss, exact_logits(student), exact_logits(teacher), targets, 1.0, 1.5)
    assert_near(found, exact.reshape(3, 4))


@every_loss
def test_expanded_inputs(loss):
    student, teacher, targets = problem(18, 60)
    student[0] = student[0][:1].expand(18, -1)
    teacher[0] = teacher[0][:1].expand(18, -1)
    student[1] = student[1][:, :1].expand(-1, 24)
    compare(loss, student, teacher, targets[:1].expand(18))


@every_loss
def test_expanded_upstream_gradient(loss):
    student, teacher, targets = problem(18, 60)
    found_inputs, exact_inputs = leaves(student), leaves(student, double=True)
    rows = fused(found_inputs, teacher, targets, loss=loss, reduction="none", block_size=BLOCKS)
    (3 * rows.sum()).backward()
    exact = on_logits(loss, exact_logits(exact_inputs), exact_logits(teacher), targets, 1.0, 1.5)
    (3 * exact.sum()).backward()
    for got, right in zip(found_inputs, exact_inputs, strict=True):
        assert_near(got.grad, right.grad)


@pytest.mark.parametrize("loss", ["kd", "nkd"])
def test_masked_classes_of_the_teacher(loss):
    student, teacher, targets = problem(20, 150)
    teacher[2][:70] = -torch.inf  # a whole strip and a part of the next
    teacher[2][140:] = -torch.inf
    compare(loss, student, teacher, targets % 70 + 70)
    teacher[2][:] = -torch.inf
    assert fused(student, teacher, targets, loss=loss, reduction="none").isnan().all()


@every_loss
def test_what_is_not_finite_stays_so_and_in_its_row(loss):
    student, teacher, targets = problem(20, 60)
    student[0][3], teacher[0][5], student[0][7] = torch.nan, torch.nan, torch.inf
    found = fused(student, teacher, targets, loss=loss, reduction="none", block_size=BLOCKS)
    exact = on_logits(loss, exact_logits(student), exact_logits(teacher), targets, 1.0, 1.5)
    assert found[[3, 5]].isnan().all() and not found[7].isfinite()
    rest = torch.arange(20, device=DEVICE)[[0, 1, 2, 4, 6, *range(8, 20)]]
    assert_near(found[rest], exact[rest])


def test_small_divergences_keep_their_digits():
    """With a vector of ones the weights are the logits: nothing is rounded before the loss."""
    ones = torch.ones(1, 1, device=DEVICE)
    for level in (-25.0, 25.0):  # both coins nearly certain, on the same side
        s, t = (level + randn(40, 1, seed=seed) for seed in (1, 2))
        inputs, exact = s.clone().requires_grad_(), s.double().requires_grad_()
        found = linear_distillation(ones, inputs, ones, t, loss="binary_kl", impl="triton", block_size=BLOCKS)
        right = binary_kl(exact.T, t.double().T, temperature=1.0)
        assert_near(found, right, factor=10)
        assert abs(found.item() / right.item() - 1) < 1e-4
        pair = torch.autograd.grad(found, inputs)[0], torch.autograd.grad(right, exact)[0]
        torch.testing.assert_close(pair[0].double(), pair[1], rtol=1e-4, atol=0)
    s = torch.zeros(40, 1, device=DEVICE)
    s[3] = 30.0  # 1 - S_y is far below float32's resolution at 1
    inputs, exact, target = (
        s.clone().requires_grad_(),
        s.double().requires_grad_(),
        torch.tensor([3]).to(DEVICE),
    )
    found = linear_distillation(
        ones, inputs, ones, s, target, loss="nkd", gamma=0.0, impl="triton", block_size=BLOCKS
    )
    right = nkd_loss(exact.T, s.double().T, target, gamma=0.0)
    assert abs(found.item() / right.item() - 1) < 1e-4
    pair = torch.autograd.grad(found, inputs)[0], torch.autograd.grad(right, exact)[0]
    torch.testing.assert_close(pair[0].double(), pair[1], rtol=1e-4, atol=0)


@pytest.mark.parametrize("loss", ["kd", "nkd"])
def test_large_logits_in_any_order(loss):
    """The running maxima rise in every tile, or fall, of student and teacher apart."""
    ones = torch.ones(2, 1, device=DEVICE)
    ramp = torch.linspace(-60, 60, 120, device=DEVICE)[:, None]
    for s, t in ((ramp, ramp), (ramp, -ramp), (-ramp, ramp), (-ramp, -ramp)):
        compare(loss, [ones, s, None], [ones, t, None], torch.tensor([0, 119]).to(DEVICE), factor=20)


@every_loss
def test_poisoned_memory(loss, poison):  # noqa: F811
    compare(loss, *problem())


@every_loss
def test_rows_far_apart(loss):
    student, teacher, targets = problem(5, 40, dtype=torch.bfloat16)
    far = [far_rows(x) for x in student[:2]], [far_rows(x) for x in teacher[:2]]
    bias, teacher_bias = (far_rows(side[2][:, None])[:, 0] for side in (student, teacher))
    compare(loss, [*far[0], bias], [*far[1], teacher_bias], targets)


@every_loss
def test_strips_with_rows_far_apart(loss):
    """Both kernels alone, on strips whose last row begins beyond element 2^31."""
    s, t, targets = randn(5, 30), randn(5, 30, seed=1), torch.tensor([10, 29, 0, 12, 11]).to(DEVICE)
    found = []
    for far in (False, True):
        pair = [far_rows(x) if far else x for x in (s, t)]
        sums = torch.zeros(kernel._SUMS[loss], 5, device=DEVICE)
        rows = randn(5, 5, seed=2)
        gradient = torch.zeros(5, 30, device=DEVICE)
        gradient = far_rows(gradient) if far else gradient
        where = (slice(0, 5), slice(10, 40), loss, 2.0, BLOCKS)
        kernel._add_strip(*pair, None, None, targets, sums, *where)
        kernel._strip_gradient(*pair, None, None, targets, rows, gradient, *where)
        found.append((sums, gradient.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert found[0][1].abs().min() > 0


@every_loss
def test_same_bits_every_time(loss):
    student, teacher, targets = problem()
    runs = []
    for _ in range(2):
        inputs = leaves(student)
        value = fused(inputs, teacher, targets, loss=loss, block_size=BLOCKS)
        runs.append([value, *torch.autograd.grad(value, inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@every_loss
@pytest.mark.parametrize("needed", [0, 1, 2])
def test_gradient_of_one_input_alone(loss, needed):
    student, teacher, targets = problem(20, 60)
    whole = leaves(student)
    every = torch.autograd.grad(fused(whole, teacher, targets, loss=loss), whole)
    student[needed].requires_grad_()
    teacher[0].requires_grad_()  # which gets none
    value = fused(student, teacher, targets, loss=loss)
    alone, none = torch.autograd.grad(value, (student[needed], teacher[0]), allow_unused=True)
    assert torch.equal(alone, every[needed]) and none is None


def test_no_second_derivative():
    student, teacher, targets = problem(6, 20)
    inputs = leaves(student)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(fused(inputs, teacher, targets), inputs, create_graph=True)


def test_half_precision_with_a_tiny_upstream_gradient():
    student, teacher, targets = problem(dtype=torch.float16)
    inputs = leaves(student)
    value = fused(inputs, teacher, targets, loss="nkd", block_size=BLOCKS)
    whole = torch.autograd.grad(value, inputs, retain_graph=True)
    small = torch.autograd.grad(value * 1e-3, inputs)
    for found, right in zip(small, whole, strict=True):
        wanted = 1e-3 * right.double()  # up to rounding, on float16's coarse grid of smallest numbers
        assert ((found.double() - wanted).abs() <= 2.0**-24 + 2.0**-9 * wanted.abs()).all()


@every_loss
def test_teacher_of_another_dtype(loss):
    student, _, targets = problem(20, 60)
    _, teacher, _ = problem(20, 60, dtype=torch.bfloat16)
    compare(loss, student, teacher, targets)


def test_autocast():
    student, teacher, targets = problem(20, 60)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found_inputs = leaves(student)
        found = fused(found_inputs, teacher, targets, loss="nkd")
        found.backward()
    lower = [[x.bfloat16() for x in side] for side in (student, teacher)]
    assert_near(found, nkd_loss(*map(exact_logits, lower), targets))
    assert found_inputs[1].grad.dtype == torch.float32


def test_references():
    student, teacher, targets = problem(20, 60)
    options = dict(temperature=3.0)
    chapters = {
        "kd": ("normalized-distillation", "kd", (), options),
        "nkd": ("normalized-distillation", "nkd", (targets,), options | {"gamma": 0.5}),
        "binary_kl": ("dual-head-distillation", "binary_kl", (), options),
    }
    for loss, (slug, name, more, settings) in chapters.items():
        inputs, exact = leaves(student), leaves(student, double=True)
        found = fused(inputs, teacher, targets, loss=loss, block_size=BLOCKS, **settings)
        right = load_reference(slug, name)(exact_logits(exact), exact_logits(teacher), *more, **settings)
        assert_near(found, right)
        pairs = zip(
            torch.autograd.grad(-2 * found, inputs), torch.autograd.grad(-2 * right, exact), strict=True
        )
        for got, wanted in pairs:
            assert_near(got, wanted)


def test_operations_alone():
    (hidden, weight, bias), (other, teacher_weight, teacher_bias), targets = problem(20, 60)
    inputs, options = (hidden, weight, other, teacher_weight), dict(bias=bias, teacher_bias=teacher_bias)
    losses, statistics = kernel.linear_distillation_forward(*inputs, loss="kd", **options)
    s, t = exact_logits((hidden, weight, bias)), exact_logits((other, teacher_weight, teacher_bias))
    assert_near(statistics, torch.stack([s.logsumexp(1), t.logsumexp(1)]))
    assert_near(losses, kd_loss(s, t, reduction="none"))
    nothing = kernel.linear_distillation_backward(
        *inputs, None, statistics, losses, loss="kd", need_hidden=False, need_weight=False, **options
    )
    assert nothing == (None, None, None)


def test_bad_input_raises_before_launch():
    (hidden, weight, bias), (other, teacher_weight, _), targets = problem(20, 60)
    inputs = (hidden, weight, other, teacher_weight)
    forward, backward = kernel.linear_distillation_forward, kernel.linear_distillation_backward
    with pytest.raises(ValueError, match="loss must be one of"):
        forward(*inputs, loss="mse")
    with pytest.raises(ValueError, match="temperature must be above 0"):
        forward(*inputs, loss="kd", temperature=0.0)
    with pytest.raises(ValueError, match="powers of two"):
        forward(*inputs, loss="kd", blocks=(8, 24))
    with pytest.raises(ValueError, match=r"weight must be \(60, 5\)"):
        forward(hidden[:, :5], *inputs[1:], loss="kd")
    with pytest.raises(ValueError, match="teacher_hidden must be"):
        forward(hidden, weight, other[:3], teacher_weight, loss="kd")
    with pytest.raises(ValueError, match="teacher_weight must be"):
        forward(hidden, weight, other, teacher_weight[:3], loss="kd")
    with pytest.raises(ValueError, match="bias must be"):
        forward(*inputs, loss="kd", bias=bias[:3])
    with pytest.raises(TypeError, match="hidden is torch.float32, weight must be too"):
        forward(hidden, weight.bfloat16(), other, teacher_weight, loss="kd")
    with pytest.raises(TypeError, match="float32, bfloat16 or float16"):
        forward(hidden.double(), weight.double(), other, teacher_weight, loss="kd")
    with pytest.raises(ValueError, match="must be"):
        forward(hidden, weight.to("meta"), other, teacher_weight, loss="kd")
    with pytest.raises(TypeError, match="targets must be an int64 tensor"):
        forward(*inputs, loss="nkd")
    with pytest.raises(ValueError, match=r"targets must be \(20,\)"):
        forward(*inputs, targets[:3], loss="nkd")
    with pytest.raises(ValueError, match="needs more classes"):
        forward(hidden, weight[:1], other, teacher_weight[:1], targets, loss="nkd")
    losses, statistics = forward(*inputs, loss="kd")
    with pytest.raises(ValueError, match=r"statistics must be \(2, 20\)"):
        backward(*inputs, None, statistics[:1], losses, loss="kd")
    with pytest.raises(ValueError, match=r"upstream must be \(20,\)"):
        backward(*inputs, None, statistics, losses[:1], loss="kd")
    with pytest.raises(ValueError, match="use impl='chunked' for float64"):
        linear_distillation(*(x.double() for x in inputs), impl="triton")
    assert linear_distillation(*(x.double() for x in inputs)).dtype == torch.float64
