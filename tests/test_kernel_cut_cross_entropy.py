"""The kernels of `kernels.cut_cross_entropy` against explicit logits in float64: natively on CUDA, else interpreted."""

import pytest
import torch
import torch.nn.functional as F
from kernel_support import DEVICE, TOLERANCE, assert_near, every_dtype, far_rows, poison, randn  # noqa: F401

from kernels import cut_cross_entropy as kernel
from kernels._launch import dot_options
from lib.book import load_reference
from lib.losses import (
    CutCrossEntropyStats,
    comp_sum,
    indexed_neg_dot,
    ldr_kl,
    linear_comp_sum,
    linear_cross_entropy,
    linear_ldr_kl,
)

BLOCKS = (16, 32)


@pytest.fixture
def short_strips(monkeypatch):
    """One tile of classes after the other, as with a vocabulary far larger than the tests'."""
    monkeypatch.setattr(kernel, "_SCRATCH", 1)
    monkeypatch.setattr(kernel, "_LEAST_STRIP", 64)


def problem(count=37, num_classes=150, dim=24, dtype=torch.float32, ignored=0.2, spread=2.0):
    hidden = randn(count, dim, dtype=dtype, scale=spread)
    weight = randn(num_classes, dim, dtype=dtype, scale=dim**-0.5, seed=1)
    bias = randn(num_classes, dtype=dtype, seed=2)
    generator = torch.Generator().manual_seed(count + num_classes)
    targets = torch.randint(num_classes, (count,), generator=generator)
    targets[torch.rand(count, generator=generator) < ignored] = -100
    return *(x.requires_grad_() for x in (hidden, weight, bias)), targets.to(DEVICE)


def run(inputs, targets, upstream_scale=1.0, **options):
    """Loss, log-sum-exp or None, and the gradients, with an upstream gradient that is not one."""
    hidden, weight, *bias = inputs
    out = linear_cross_entropy(hidden, weight, targets, bias=bias[0] if bias else None, **options)
    loss, lse = out if options.get("return_lse") else (out, None)
    upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    total = upstream_scale * (loss * upstream).sum() + (0 if lse is None else 0.1 * lse.square().sum())
    return loss, lse, *torch.autograd.grad(total, [x for x in inputs if x.requires_grad])


def doubled(inputs):
    return [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]


def compare(inputs, targets, filter_eps=None, block_size=None, **options):
    """The kernel against explicit logits in float64, with nothing skipped unless `filter_eps` says so."""
    found = run(inputs, targets, impl="triton", filter_eps=filter_eps, block_size=block_size, **options)
    exact = run(doubled(inputs), targets, impl="torch", **options)
    for number, (ours, theirs) in enumerate(zip(found, exact, strict=True)):
        if theirs is not None:  # values are float32 whatever the inputs are
            assert_near(ours, theirs, torch.float32 if number < 2 else inputs[0].dtype)


OPTIONS = [
    dict(),
    dict(reduction="none", softcap=5.0),
    dict(reduction="sum", label_smoothing=0.2),
    dict(label_smoothing=1.0, softcap=5.0, return_lse=True),
    dict(reduction="none", z_loss=0.03, label_smoothing=0.1),
]


@every_dtype
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
def test_values_and_gradients(dtype, options, short_strips):
    *inputs, targets = problem(dtype=dtype)
    compare(inputs if "softcap" in options else inputs[:2], targets, upstream_scale=-3.0, **options)


@every_dtype
def test_filter_that_skips_nothing(dtype, short_strips):
    """The tiles come from a list then, and the classes in sorted order."""
    *inputs, targets = problem(dtype=dtype)
    compare(inputs, targets, filter_eps=1e-30, return_lse=True)
    compare(inputs, targets, filter_eps=1e-30, block_size=BLOCKS, label_smoothing=0.3, sort_vocab=False)


@pytest.mark.parametrize(
    "count,num_classes,dim", [(1, 1, 1), (1, 53, 17), (31, 2, 3), (16, 32, 16), (33, 64, 40), (64, 131, 32)]
)
@pytest.mark.parametrize("filter_eps", [None, 1e-30])
def test_odd_sizes(count, num_classes, dim, filter_eps):
    *inputs, targets = problem(count, num_classes, dim, ignored=0)
    # with one class or nearly all mass on it gradients are rounding errors of numbers near 1
    compare(inputs, targets, filter_eps=filter_eps, return_lse=True, label_smoothing=0.1)


def test_half_precision_with_a_tiny_upstream_gradient():
    *inputs, targets = problem(dtype=torch.float16)
    small, whole = (
        run(inputs, targets, impl="triton", filter_eps=None, upstream_scale=scale)[3] for scale in (1e-3, 1.0)
    )
    wanted = 1e-3 * whole.double()  # up to rounding, on float16's coarse grid of smallest numbers
    assert ((small.double() - wanted).abs() <= 2.0**-24 + 2.0**-10 * wanted.abs()).all()


def test_all_rows_ignored_and_no_rows():
    hidden, weight, bias, targets = problem()
    targets[:] = -100
    assert linear_cross_entropy(hidden, weight, targets, impl="triton").isnan()
    loss = linear_cross_entropy(
        hidden, weight, targets, bias=bias, reduction="none", label_smoothing=0.1, z_loss=1.0, impl="triton"
    )
    loss.sum().backward()
    assert loss.abs().max() == 0
    assert all(x.grad.abs().max() == 0 for x in (hidden, weight, bias))
    empty = linear_cross_entropy(hidden[:0], weight, targets[:0], reduction="sum", impl="triton")
    assert empty == 0


def test_ignored_rows_may_hold_anything():
    hidden, weight, bias, targets = problem()
    hidden = hidden.detach().clone()
    hidden[0], targets[0] = torch.nan, -100
    found = run([hidden.requires_grad_(), weight, bias], targets, impl="triton")
    assert all(x.isfinite().all() for x in found if x is not None)


def test_non_contiguous_and_expanded_inputs():
    hidden, weight, bias, targets = problem(dim=9)
    hidden = hidden.detach().T.contiguous().T.requires_grad_()
    weight = weight.detach().repeat(1, 2)[:, ::2].requires_grad_()
    bias = bias.detach().repeat_interleave(3)[::3].requires_grad_()
    targets = targets.repeat_interleave(2)[::2]
    compare([hidden, weight, bias], targets, reduction="none", label_smoothing=0.1)
    hidden = hidden.detach()[:1].expand(37, 9).requires_grad_()
    bias = bias.detach()[:1].expand(150).requires_grad_()
    compare([hidden, weight.detach().T.contiguous().T.requires_grad_(), bias], targets, filter_eps=1e-30)


@pytest.mark.parametrize("needed", [0, 1, 2])
@pytest.mark.parametrize("filter_eps", [None, 2.0**-5])
def test_gradient_of_one_input_alone(needed, filter_eps):
    *inputs, targets = problem(spread=8.0)
    alone = [x.detach().requires_grad_(number == needed) for number, x in enumerate(inputs)]
    options = dict(impl="triton", filter_eps=filter_eps)
    (found,) = run(alone, targets, **options)[2:]
    assert torch.equal(found, run(inputs, targets, **options)[2 + needed])


def test_shift():
    hidden, weight = randn(2, 9, 8, grad=True), randn(30, 8, grad=True)
    targets = torch.randint(30, (2, 9), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    targets[1, 3] = -100
    compare([hidden, weight], targets, shift=1, return_lse=True)


@pytest.mark.parametrize(
    "block_size,options",
    [
        ((16, 16), dict(sort_vocab=False, label_smoothing=0.3)),
        ((16, 16), dict(filter_weight=False)),
        (None, dict()),
        (None, dict(filter_hidden=False, return_lse=True)),
        (None, dict(return_lse=True, softcap=60.0, label_smoothing=0.1)),
    ],
)
def test_filter_skips_the_same_tiles_as_the_pytorch_path(options, block_size, short_strips, poison):  # noqa: F811
    *inputs, targets = problem(40, 250, 6, spread=9.0, ignored=0.1)
    if DEVICE == "cuda" and block_size is None:
        pytest.skip("another tile there")
    stats, results = [CutCrossEntropyStats(), CutCrossEntropyStats()], []
    for impl, tile, count in zip(
        ("triton", "chunked"), (block_size, block_size or (32, 32)), stats, strict=True
    ):
        options = {**options, "filter_eps": 2.0**-5, "block_size": tile, "stats": count}
        results.append(run(inputs, targets, impl=impl, **options))
    assert stats[0] == stats[1]
    one_is_whole = "filter_weight" in options or "filter_hidden" in options
    assert (stats[0].blocks_skipped > 0) == (not one_is_whole)
    for ours, theirs in zip(*results, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


def test_filter_keeps_nan_and_the_lse_gradient_of_a_certain_target():
    hidden = torch.full((1, 1), 30.0, device=DEVICE, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], device=DEVICE, requires_grad=True)
    target = torch.tensor([0], device=DEVICE)
    _, lse = linear_cross_entropy(hidden, weight, target, filter_eps=1e-3, return_lse=True, impl="triton")
    assert torch.autograd.grad(lse.sum(), hidden)[0].item() == pytest.approx(1)
    broken = torch.full((1, 1), torch.nan, device=DEVICE)
    linear_cross_entropy(broken, weight, target, filter_eps=1e-3, impl="triton").backward()
    assert weight.grad.isnan().all()


def test_smoothing_does_not_hide_a_large_difference_from_the_filter():
    """A softmax of 0 differs from the target distribution by the uniform share: more than this eps."""
    hidden = torch.full((1, 1), 30.0, device=DEVICE, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], device=DEVICE, requires_grad=True)
    target, options = torch.tensor([0], device=DEVICE), dict(label_smoothing=0.4, impl="triton")
    for eps, kept in ((0.1, 1), (0.3, 0)):
        loss = linear_cross_entropy(hidden, weight, target, filter_eps=eps, **options)
        gradient = torch.autograd.grad(loss, hidden)[0].item()
        assert gradient == pytest.approx(0.4 * kept, abs=1e-6)


@every_dtype
def test_same_bits_every_time_and_nothing_left_unwritten(dtype, poison):  # noqa: F811
    *inputs, targets = problem(64, 150, 16, dtype=dtype, spread=8.0)
    options = dict(impl="triton", filter_eps=1e-3, return_lse=True, label_smoothing=0.1)
    runs = [run(inputs, targets, **options) for _ in range(2)]
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(*runs, strict=True))


@pytest.mark.filterwarnings("ignore:divide by zero")  # the interpreter's logarithm of a tile without mass
def test_masked_classes(short_strips):
    hidden, weight, bias, targets = problem(20, 170, 8, ignored=0)
    bias = bias.detach().clone()
    bias[:70] = -torch.inf
    compare([hidden, weight, bias.requires_grad_()], targets.clamp(min=70), return_lse=True)


@pytest.mark.parametrize("which", [0, 1])
def test_rows_beyond_the_reach_of_32_bits(which, short_strips):
    *inputs, targets = problem(5, 7, 6, ignored=0)
    far = [x.detach() for x in inputs[:2]]
    far[which] = far_rows(far[which])
    far = [x.requires_grad_() for x in far]
    for filter_eps in (None, 1e-30):
        options = dict(impl="triton", filter_eps=filter_eps, label_smoothing=0.1)
        for ours, theirs in zip(
            run(far, targets, **options), run(inputs[:2], targets, **options), strict=True
        ):
            if theirs is not None:  # not the same bits: `torch.mm` may go another way for other strides
                assert_near(ours, theirs)


def test_differentiating_twice_raises():
    hidden, weight, _, targets = problem(5, 7, 3, ignored=0)
    loss = linear_cross_entropy(hidden, weight, targets, impl="triton")
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        (gradient.sum() + weight.sum()).backward()


def test_auto_falls_back_for_what_the_kernel_does_not_take():
    hidden, weight, _, targets = problem(5, 7, 3)
    for h, w, options in (
        (hidden.double(), weight.double(), {}),
        (hidden, weight, dict(block_size=(24, 3), filter_eps=0.0)),
    ):
        found = linear_cross_entropy(h, w, targets, **options)
        torch.testing.assert_close(found, F.cross_entropy(h @ w.T, targets))


@pytest.mark.parametrize("tau", [0.5, 1.0, 1.7])
def test_comp_sum_through_the_kernel(tau):
    *inputs, targets = problem(20, 70, 8)
    results = []
    for (hidden, weight, bias), linear in ((inputs, True), (doubled(inputs), False)):
        if linear:
            loss = linear_comp_sum(hidden, weight, targets, tau, bias=bias, impl="triton")
        else:
            loss = comp_sum(hidden @ weight.T + bias, targets, tau)
        results.append([loss, *torch.autograd.grad(-2 * loss, (hidden, weight, bias))])
    for found, exact in zip(*results, strict=True):
        assert_near(found, exact, factor=3)


def test_ldr_kl_through_the_kernel():
    *inputs, targets = problem(20, 70, 8)
    results = []
    for (hidden, weight, bias), linear in ((inputs, True), (doubled(inputs), False)):
        options = dict(margin=0.5, reduction="sum")
        if linear:
            loss = linear_ldr_kl(hidden, weight, targets, 2.0, bias=bias, impl="triton", **options)
        else:
            loss = ldr_kl(hidden @ weight.T + bias, targets, 2.0, **options)
        results.append([loss, *torch.autograd.grad(-2 * loss, (hidden, weight, bias))])
    for found, exact in zip(*results, strict=True):
        assert_near(found, exact, factor=3)


@every_dtype
def test_operations_alone(dtype, poison):  # noqa: F811
    hidden, weight, bias, targets = (x.detach() for x in problem(ignored=0, dtype=dtype))
    rows = torch.tensor([5, 0, 36], device=DEVICE)
    logits = hidden.double() @ weight.double().T + bias.double()
    lse, mean = kernel.lse_forward(hidden, weight, bias=bias, rows=rows, with_mean=True)
    assert_near(lse, logits[rows].logsumexp(1))
    assert_near(mean, logits[rows].mean(1), factor=3)
    dot = kernel.indexed_neg_dot(hidden, weight, targets[rows], bias=bias, rows=rows)
    assert_near(dot, -logits[rows, targets[rows]])
    wrong = kernel.indexed_neg_dot(hidden, weight, targets + 150 * (targets > 9))
    assert torch.equal(wrong.isnan(), targets > 9)
    found = indexed_neg_dot(hidden, weight, targets, impl="triton")
    reference = load_reference("cut-cross-entropy", "indexed_neg_dot")
    assert_near(found, reference(hidden.double(), weight.double(), targets))
    with pytest.raises(ValueError, match="no gradient"):
        indexed_neg_dot(hidden.requires_grad_(), weight, targets, impl="triton")


@pytest.mark.parametrize("eps", [0.0, 2.0**-5])
def test_reference_values_and_gradients(eps):
    reference = load_reference("cut-cross-entropy", "cut_cross_entropy")
    hidden, weight, _, targets = problem(ignored=0, spread=6.0)
    results = []
    for loss in (
        linear_cross_entropy(hidden, weight, targets, block_size=BLOCKS, filter_eps=eps, impl="triton"),
        reference(hidden, weight, targets, block=BLOCKS, eps=eps),
    ):
        results.append([loss, *torch.autograd.grad(2 * loss, (hidden, weight))])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


def test_float32_products_follow_torch():
    one, half = torch.ones(1, 1, device=DEVICE), torch.ones(1, 1, device=DEVICE, dtype=torch.bfloat16)
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for setting, wanted in (("high", "tf32"), ("medium", "tf32"), ("highest", "ieee")):
            torch.set_float32_matmul_precision(setting)
            assert dot_options(one)["PRECISION"] == wanted
        matmul.fp32_precision = "tf32"
        assert dot_options(one)["PRECISION"] == "tf32" and dot_options(half)["PRECISION"] == "ieee"
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = before


def test_scratch_does_not_grow_with_the_classes(monkeypatch):
    monkeypatch.setattr(kernel, "_LEAST_STRIP", 16)
    monkeypatch.setattr(kernel, "_SCRATCH", 64 * 64 * 4)
    sizes, make = [], torch.Tensor.new_empty

    def counted(*args, **kwargs):
        tensor = make(*args, **kwargs)
        sizes.append(tensor.numel())
        return tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", counted)
    hidden, weight, _, targets = problem(64, 500, 4, ignored=0)  # one tile of tokens, or two
    linear_cross_entropy(hidden, weight, targets, filter_eps=1e-3, impl="triton").backward()
    assert max(sizes) <= 64 * 64


def test_bad_input_raises_before_launch():
    hidden, weight, bias, targets = (x.detach() for x in problem(ignored=0))
    lse = torch.zeros(37, device=DEVICE)
    with pytest.raises(ValueError, match="hidden must be"):
        kernel.lse_forward(hidden[:, :5], weight)
    with pytest.raises(ValueError, match="at least one class"):
        kernel.lse_forward(hidden, weight[:0])
    with pytest.raises(TypeError, match="must be too"):
        kernel.lse_forward(hidden, weight.bfloat16())
    with pytest.raises(TypeError, match="float32, bfloat16 or float16"):
        kernel.lse_forward(hidden.double(), weight.double())
    with pytest.raises(TypeError, match="impl='chunked' for float64"):
        linear_cross_entropy(hidden.double(), weight.double(), targets, impl="triton")
    with pytest.raises(ValueError, match="powers of two"):
        kernel.lse_forward(hidden, weight, blocks=(24, 32))
    with pytest.raises(ValueError, match="softcap must be positive"):
        kernel.lse_forward(hidden, weight, softcap=-1.0)
    with pytest.raises(ValueError, match="must be too"):
        kernel.lse_forward(hidden, weight.to("meta"))
    with pytest.raises(ValueError, match="bias must be"):
        kernel.lse_forward(hidden, weight, bias=bias[:3])
    with pytest.raises(ValueError, match="one entry a row"):
        kernel.cut_cross_entropy_backward(hidden, weight, targets[:5], lse, lse)
    with pytest.raises(TypeError, match="targets must be int64"):
        kernel.indexed_neg_dot(hidden, weight, targets.int())
    with pytest.raises(TypeError, match="lse must be of a floating dtype"):
        kernel.cut_cross_entropy_backward(hidden, weight, targets, targets, lse)
    with pytest.raises(ValueError, match="order must hold"):
        kernel.cut_cross_entropy_backward(hidden, weight, targets, lse, lse, order=targets)
