"""The kernels of `kernels.cut_cross_entropy` against explicit logits in float64: natively on CUDA, else interpreted."""

import pytest
import torch
import torch.nn.functional as F

from lib.book import load_reference
from lib.losses import CutCrossEntropyStats, indexed_neg_dot, linear_cross_entropy

pytest.importorskip("triton")
from kernels import cut_cross_entropy as kernel  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCKS = (16, 32)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def problem(count=37, num_classes=101, dim=24, dtype=torch.float32, ignored=0.2, spread=2.0):
    generator = torch.Generator().manual_seed(count + num_classes)
    hidden = torch.randn(count, dim, generator=generator) * spread
    weight = torch.randn(num_classes, dim, generator=generator) / dim**0.5
    bias = torch.randn(num_classes, generator=generator)
    targets = torch.randint(num_classes, (count,), generator=generator)
    targets[torch.rand(count, generator=generator) < ignored] = -100
    return *(x.to(DEVICE, dtype).requires_grad_() for x in (hidden, weight, bias)), targets.to(DEVICE)


def compare(options, dtype, scale, *inputs_and_targets):
    """Values and gradients of the kernel against float64, with an upstream gradient that is not one."""
    *inputs, targets = inputs_and_targets
    exact = [x.detach().double().requires_grad_() for x in inputs]
    results = []
    for impl, (hidden, weight, *bias) in (("triton", inputs), ("torch", exact)):
        extra = dict(block_size=BLOCKS, filter_eps=None) if impl == "triton" else {}
        out = linear_cross_entropy(
            hidden, weight, targets, bias=bias[0] if bias else None, impl=impl, **options, **extra
        )
        loss, lse = out if options.get("return_lse") else (out, None)
        generator = torch.Generator().manual_seed(1)
        upstream = torch.randn(loss.shape, generator=generator).to(DEVICE)
        total = scale * (loss * upstream).sum() + (0 if lse is None else 0.1 * lse.square().sum())
        results.append([loss, lse, *torch.autograd.grad(total, [hidden, weight, *bias])])
    for number, (found, wanted) in enumerate(zip(*results, strict=True)):
        if wanted is not None:
            tolerance = 1e-5 if number < 2 else TOLERANCE[dtype]  # values are float32 whatever the inputs are
            assert found.shape == wanted.shape
            assert (found.double() - wanted).abs().max() <= tolerance * max(wanted.abs().max(), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("return_lse", [False, True])
def test_values_and_gradients(dtype, reduction, softcap, return_lse):
    hidden, weight, bias, targets = problem(dtype=dtype)
    bias = [bias] if softcap else []
    options = dict(reduction=reduction, softcap=softcap, return_lse=return_lse)
    compare(options, dtype, -3.0, hidden, weight, *bias, targets)


def test_half_precision_with_a_tiny_upstream_gradient():
    hidden, weight, bias, targets = problem(dtype=torch.float16)
    compare(dict(reduction="sum"), torch.float16, 1.0, hidden, weight, bias, targets)
    small = torch.autograd.grad(
        linear_cross_entropy(hidden, weight, targets, impl="triton", filter_eps=None) * 1e-3, weight
    )[0]
    whole = torch.autograd.grad(
        linear_cross_entropy(hidden, weight, targets, impl="triton", filter_eps=None), weight
    )[0]
    wanted = 1e-3 * whole.double()  # up to rounding, on float16's coarse grid of smallest numbers
    assert ((small.double() - wanted).abs() <= 2.0**-24 + 2.0**-10 * wanted.abs()).all()


@pytest.mark.parametrize(
    "count,num_classes,dim", [(1, 1, 1), (1, 53, 17), (31, 2, 3), (16, 32, 16), (33, 64, 40)]
)
def test_odd_sizes(count, num_classes, dim):
    hidden, weight, bias, targets = problem(count, num_classes, dim, ignored=0)
    compare(dict(reduction="mean"), torch.float32, 1.0, hidden, weight, bias, targets)


def test_default_tiles():
    hidden, weight, bias, targets = problem()
    found = linear_cross_entropy(hidden, weight, targets, bias=bias, impl="triton")
    wanted = linear_cross_entropy(
        *(x.double() for x in (hidden, weight)), targets, bias=bias.double(), impl="torch"
    )
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_all_rows_ignored_and_no_rows():
    hidden, weight, bias, targets = problem()
    targets[:] = -100
    assert linear_cross_entropy(hidden, weight, targets, impl="triton").isnan()
    loss = linear_cross_entropy(hidden, weight, targets, bias=bias, reduction="none", impl="triton")
    loss.sum().backward()
    assert loss.abs().max() == 0
    assert all(x.grad.abs().max() == 0 for x in (hidden, weight, bias))
    empty = linear_cross_entropy(hidden[:0], weight, targets[:0], reduction="sum", impl="triton")
    assert empty == 0


def test_non_contiguous_inputs():
    hidden, weight, bias, targets = problem()
    hidden = hidden.detach().T.contiguous().T.requires_grad_()
    weight = weight.detach().repeat(1, 2)[:, ::2].requires_grad_()
    bias = bias.detach().repeat_interleave(3)[::3].requires_grad_()
    targets = targets.repeat_interleave(2)[::2]
    compare(dict(reduction="none"), torch.float32, 1.0, hidden, weight, bias, targets)


@pytest.mark.parametrize("needed", [0, 1, 2])
def test_gradient_of_one_input_alone(needed):
    *inputs, targets = problem()
    inputs = [x.detach().requires_grad_(number == needed) for number, x in enumerate(inputs)]
    exact = [x.detach().double().requires_grad_(number == needed) for number, x in enumerate(inputs)]
    results = [
        torch.autograd.grad(linear_cross_entropy(h, w, targets, bias=b, impl=impl), (h, w, b)[needed])[0]
        for impl, (h, w, b) in (("triton", inputs), ("torch", exact))
    ]
    torch.testing.assert_close(results[0].double(), results[1], rtol=1e-4, atol=1e-6)


def test_shift():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 9, 8, generator=generator).to(DEVICE).requires_grad_()
    weight = torch.randn(30, 8, generator=generator).to(DEVICE).requires_grad_()
    targets = torch.randint(30, (2, 9), generator=generator).to(DEVICE)
    targets[1, 3] = -100
    results = []
    for impl in ("triton", "torch"):
        loss = linear_cross_entropy(hidden, weight, targets, shift=1, impl=impl)
        results.append([loss, *torch.autograd.grad(loss, (hidden, weight))])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sort_vocab", [False, True])
@pytest.mark.parametrize("filter_weight", [False, True])
def test_filter_skips_the_same_tiles_as_the_pytorch_path(sort_vocab, filter_weight):
    hidden, weight, bias, targets = problem(40, 330, 8, spread=8.0, ignored=0.1)
    results = []
    for impl in ("triton", "chunked"):
        stats = CutCrossEntropyStats()
        loss = linear_cross_entropy(
            hidden, weight, targets, bias=bias, filter_eps=2.0**-5, filter_weight=filter_weight, sort_vocab=sort_vocab,
            block_size=(16, 16), stats=stats, impl=impl,
        )  # fmt: skip
        results.append([*torch.autograd.grad(loss, (hidden, weight, bias)), stats])
    assert results[0][3] == results[1][3]
    assert (results[0][3].blocks_skipped > 0) == filter_weight
    torch.testing.assert_close(results[0][:3], results[1][:3], rtol=1e-4, atol=1e-7)


def test_filter_keeps_nan_and_the_lse_gradient_of_a_certain_target():
    hidden = torch.full((1, 1), 30.0, device=DEVICE, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], device=DEVICE, requires_grad=True)
    target = torch.tensor([0], device=DEVICE)
    _, lse = linear_cross_entropy(hidden, weight, target, filter_eps=1e-3, return_lse=True, impl="triton")
    assert torch.autograd.grad(lse.sum(), hidden)[0].item() == pytest.approx(1)
    broken = torch.full((1, 1), torch.nan, device=DEVICE)
    linear_cross_entropy(broken, weight, target, filter_eps=1e-3, impl="triton").backward()
    assert weight.grad.isnan().all()


def test_same_bits_every_time():
    hidden, weight, bias, targets = problem(64, 150, 16, ignored=0)
    runs = []
    for _ in range(2):
        loss = linear_cross_entropy(
            hidden, weight, targets, bias=bias, filter_eps=1e-4, block_size=BLOCKS, impl="triton"
        )
        runs.append([loss, *torch.autograd.grad(loss, (hidden, weight, bias))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.filterwarnings("ignore:divide by zero")  # the interpreter's logarithm of a tile without mass
def test_masked_classes():
    hidden, weight, bias, targets = problem(20, 70, 8, ignored=0)
    bias = bias.detach().clone()
    bias[:32] = -torch.inf
    lse = kernel.lse_forward(hidden.detach(), weight.detach(), bias=bias, blocks=(16, 16))
    torch.testing.assert_close(lse, (hidden @ weight.T + bias).logsumexp(1).detach(), rtol=1e-5, atol=1e-5)


def test_operations_alone():
    hidden, weight, bias, targets = problem(ignored=0)
    hidden, weight, bias = hidden.detach(), weight.detach(), bias.detach()
    rows = torch.tensor([5, 0, 36], device=DEVICE)
    logits = hidden @ weight.T + bias
    torch.testing.assert_close(
        kernel.lse_forward(hidden, weight, bias=bias, rows=rows),
        logits[rows].logsumexp(1),
        rtol=1e-5,
        atol=1e-5,
    )
    dot = kernel.indexed_neg_dot(hidden, weight, targets[rows], bias=bias, rows=rows)
    torch.testing.assert_close(dot, -logits[rows, targets[rows]], rtol=1e-5, atol=1e-5)
    reference = load_reference("cut-cross-entropy", "indexed_neg_dot")
    torch.testing.assert_close(
        indexed_neg_dot(hidden, weight, targets, impl="triton"),
        reference(hidden, weight, targets),
        rtol=1e-5,
        atol=1e-5,
    )
    with pytest.raises(ValueError, match="no gradient"):
        indexed_neg_dot(hidden.requires_grad_(), weight, targets, impl="triton")


def test_reference_values_and_gradients():
    reference = load_reference("cut-cross-entropy", "cut_cross_entropy")
    hidden, weight, _, targets = problem(ignored=0)
    results = []
    for loss in (
        linear_cross_entropy(hidden, weight, targets, block_size=BLOCKS, impl="triton"),
        reference(hidden, weight, targets, block=BLOCKS),
    ):
        results.append([loss, *torch.autograd.grad(2 * loss, (hidden, weight))])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


def test_cross_entropy_is_the_sum_of_the_two_operations():
    hidden, weight, _, targets = (x.detach() for x in problem(ignored=0))
    loss = (kernel.lse_forward(hidden, weight) + kernel.indexed_neg_dot(hidden, weight, targets)).mean()
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.T, targets), rtol=1e-5, atol=1e-5)


def test_bad_input_raises_before_launch():
    hidden, weight, bias, targets = (x.detach() for x in problem(ignored=0))
    lse = torch.zeros(37, device=DEVICE)
    with pytest.raises(ValueError, match="hidden must be"):
        kernel.lse_forward(hidden[:, :5], weight)
    with pytest.raises(TypeError, match="must be too"):
        kernel.lse_forward(hidden, weight.bfloat16())
    with pytest.raises(TypeError, match="float16, bfloat16 or float32"):
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
        kernel.backward_dE(hidden, weight, targets[:5], lse, lse)
    with pytest.raises(ValueError, match=r"\[0, 101\)"):
        kernel.indexed_neg_dot(hidden, weight, targets + 101)
    with pytest.raises(ValueError, match="order must hold"):
        kernel.backward_dC(hidden, weight, targets, lse, lse, order=targets)
