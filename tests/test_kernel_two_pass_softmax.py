"""kernels.two_pass_softmax: values and gradients against float64, natively on CUDA, else in Triton's interpreter."""

import math

import numpy as np
import pytest
import torch

import kernels
from lib import numerics
from lib.book import load_reference

if not kernels.HAS_TRITON:
    pytest.skip("Triton is not installed", allow_module_level=True)

from kernels import two_pass_softmax as kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK = 128
# float32: a few units in the last place; the others: half a unit. The interpreter cuts bfloat16 off instead of rounding.
TOLERANCE = {
    torch.float32: 1e-6,
    torch.bfloat16: 2**-8 if DEVICE == "cuda" else 2**-7,
    torch.float16: 2**-10,
}
SHAPES = [(1, 1), (3, 7), (5, 128), (2, 129), (3, 257), (2, 1009), (130, 1), (67, 3)]

# nan made on purpose makes the interpreter's NumPy complain
pytestmark = pytest.mark.filterwarnings("ignore:(invalid|divide|overflow).*:RuntimeWarning")
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """Every output starts as nan, so that an element that is not written shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(math.nan) if made.is_floating_point() else made

    monkeypatch.setattr(kernel.torch, "empty", poisoned)


def logits(shape, dtype=torch.float32, spread=6.0):
    torch.manual_seed(shape[0] * 1000 + shape[-1])
    return (torch.randn(shape) * spread).to(DEVICE, dtype)


def check_softmax(y, x):
    tolerance = TOLERANCE[x.dtype]
    smallest = 2e-45 if x.dtype == torch.float32 else 1e-7
    torch.testing.assert_close(y.double(), x.double().softmax(-1), rtol=tolerance, atol=smallest)


@every_dtype
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(shape, dtype):
    x = logits(shape, dtype)
    y = kernel.softmax_forward(x, block=BLOCK)
    assert y.dtype == dtype and y.shape == x.shape and y.is_contiguous()
    check_softmax(y, x)
    assert torch.equal(y, kernel.softmax_forward(x, block=BLOCK))


@every_dtype
@pytest.mark.parametrize("shape", SHAPES)
def test_backward(shape, dtype):
    y = logits(shape).softmax(-1).to(dtype)
    g = logits(shape, dtype, spread=1.0)
    dx = kernel.softmax_backward(y, g, block=BLOCK)
    exact = y.double() * (g.double() - (y.double() * g.double()).sum(-1, keepdim=True))
    assert dx.dtype == dtype
    scale = (y.double() * g.double().abs()).sum(-1).max()
    torch.testing.assert_close(dx.double(), exact, rtol=TOLERANCE[dtype], atol=float(scale) * 1e-6)
    assert torch.equal(dx, kernel.softmax_backward(y, g, block=BLOCK))


@pytest.mark.parametrize("columns", [1, 128, 129, 300, 1009])
def test_pairs(columns):
    x = logits((2, columns), spread=200.0)
    m, n = kernel.row_pairs(x, block=BLOCK)
    assert m.shape == n.shape == (2,) and (n == n.round()).all() and (m >= 0.7).all()
    torch.testing.assert_close(
        torch.log(m.double()) + n.double() * math.log(2),
        torch.logsumexp(x.double(), -1),
        rtol=1e-7,
        atol=1e-6,
    )
    check_softmax(kernel.softmax_from_pairs(x, m, n, block=BLOCK), x)


@pytest.mark.parametrize("chunks, programs", [(1, 1), (3, 4096), (1024, 4096)])
def test_any_split_of_a_row(monkeypatch, chunks, programs):
    monkeypatch.setattr(kernel, "MAX_CHUNKS", chunks)
    monkeypatch.setattr(kernel, "PROGRAMS", programs)
    x = logits((2, 1000))
    y = kernel.softmax_forward(x, block=BLOCK)
    check_softmax(y, x)
    g = logits((2, 1000), spread=1.0)
    exact = y.double() * (g.double() - (y.double() * g.double()).sum(-1, keepdim=True))
    torch.testing.assert_close(
        kernel.softmax_backward(y, g, block=BLOCK).double(), exact, rtol=1e-5, atol=1e-7
    )
    check_softmax_baseline(kernel.three_pass_softmax(x, block=BLOCK), x)


def check_softmax_baseline(y, x):  # max subtraction rounds its argument
    torch.testing.assert_close(y.double(), x.double().softmax(-1), rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("shape", [(1, 1), (3, 257), (2, 1009)])
def test_three_pass_baseline(shape):
    x = logits(shape)
    check_softmax_baseline(kernel.three_pass_softmax(x, block=BLOCK), x)


@pytest.mark.parametrize("columns", [30, 150])
def test_strides(columns):
    wide = logits((6, 2 * columns))
    for x in (
        wide[::2, ::2],
        logits((columns, 4)).T,
        wide[:1, :columns].expand(3, columns),
        wide[:, :1].expand(6, columns),
    ):
        check_softmax(kernel.softmax_forward(x, block=BLOCK), x)
        y = x.softmax(-1)
        g = logits((columns, x.shape[0]), spread=1.0).T
        for grad in (g, g[:1].expand(x.shape)):
            exact = y.double() * (grad.double() - (y.double() * grad.double()).sum(-1, keepdim=True))
            for y_form in (y, y.T.contiguous().T):
                dx = kernel.softmax_backward(y_form, grad, block=BLOCK)
                torch.testing.assert_close(dx.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("padding", [0, 200], ids=["one launch", "several chunks"])
def test_extreme_rows(padding):
    inf, smallest = math.inf, torch.finfo(torch.float32).min
    rows = [
        [1e4, 1e4 + 1, 1e4 - 1], [-1e4, -1e4 - 1, -1e4 + 1], [1e30, 0, -1e30], [-inf, 0, 1], [-inf, -inf, 2],
        [smallest, 0, 1], [88, 89, 90], [-103, -104, -105], [0, -100, -103.2], [0, 0, -200], [2e38, 0, -2e38],
    ]  # fmt: skip
    bad = [[-inf] * 3, [inf, 0, 0], [math.nan, 0, 1], [0, math.nan, -inf], [inf, inf, -inf]]
    x = torch.cat([torch.full((len(rows + bad), padding), -inf), torch.tensor(rows + bad)], dim=1).to(DEVICE)
    y = kernel.softmax_forward(x, block=BLOCK)
    exact = x.double().softmax(-1)
    torch.testing.assert_close(y[: len(rows)].double(), exact[: len(rows)], rtol=1e-6, atol=2e-45)
    assert (y[: len(rows), :padding] == 0).all() and y[9, -1] == 0
    assert y[len(rows) :].isnan().all()
    m, n = kernel.row_pairs(x, block=BLOCK)
    assert (m[len(rows)], n[len(rows)]) == (0, -inf)


def test_a_power_of_two_row_is_exact():
    # e^0 = 1 exactly, and the sum of 128 or 512 ones is a power of two
    for columns in (BLOCK, 4 * BLOCK):
        y = kernel.softmax_forward(torch.zeros(1, columns, device=DEVICE), block=BLOCK)
        assert (y == 1 / columns).all()


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty(shape):
    x = torch.ones(shape, device=DEVICE)
    assert kernel.softmax_forward(x).shape == shape == kernel.softmax_backward(x, x).shape
    assert kernel.three_pass_softmax(x).shape == shape
    m, n = kernel.row_pairs(x)
    assert m.tolist() == [0] * shape[0] and n.tolist() == [-math.inf] * shape[0]


def test_bad_input():
    x = torch.ones(2, 3, device=DEVICE)
    pairs = torch.ones(2, device=DEVICE)
    for function in (kernel.softmax_forward, kernel.row_pairs, kernel.three_pass_softmax):
        with pytest.raises(ValueError, match=r"x must be \(rows, columns\), got \(3,\)"):
            function(x[0])
        with pytest.raises(TypeError, match="x must be float32, bfloat16 or float16, got torch.float64"):
            function(x.double())
        with pytest.raises(ValueError, match="block must be a power of two, got 100"):
            function(x, block=100)
        with pytest.raises(TypeError, match="got list"):
            function([[1.0]])
    with pytest.raises(ValueError, match=r"m must be float32 of shape \(2,\)"):
        kernel.softmax_from_pairs(x, pairs[:1], pairs)
    with pytest.raises(ValueError, match="n must be float32"):
        kernel.softmax_from_pairs(x, pairs, pairs.double())
    with pytest.raises(ValueError, match="grad must match y"):
        kernel.softmax_backward(x, x[:, :2])
    with pytest.raises(ValueError, match="grad must match y"):
        kernel.softmax_backward(x, x.bfloat16())
    if DEVICE == "cuda":
        with pytest.raises(ValueError, match="must be on a CUDA device"):
            kernel.softmax_forward(x.cpu())


def test_cpu_tensors_need_the_interpreter(monkeypatch):
    monkeypatch.setattr("kernels._launch.INTERPRETED", False)
    with pytest.raises(ValueError, match="x must be on a CUDA device, got cpu; set TRITON_INTERPRET=1"):
        kernel.softmax_forward(torch.ones(1, 2))


# --- through the library


@pytest.mark.parametrize("shape, dim", [((3, 40), -1), ((40, 3), 0), ((2, 5, 3), 1)])
def test_library_agrees_with_the_reference(monkeypatch, shape, dim):
    reference = load_reference("two-pass-softmax", "two_pass_softmax")
    x = logits(shape).requires_grad_()
    g = logits(shape, spread=1.0)
    mine = numerics.two_pass_softmax(x, dim, impl="triton")
    theirs = reference(x.cpu().movedim(dim, -1), chunk=17).movedim(-1, dim).to(DEVICE)
    torch.testing.assert_close(mine, theirs, rtol=3e-6, atol=0)
    torch.testing.assert_close(
        *(torch.autograd.grad(y, x, g)[0] for y in (mine, theirs)), rtol=1e-4, atol=1e-7
    )


def test_library_second_derivative():
    x = logits((2, 30)).requires_grad_()
    second = []
    for softmax in (lambda z: numerics.two_pass_softmax(z, impl="triton"), lambda z: z.softmax(-1)):
        (first,) = torch.autograd.grad((softmax(x) ** 2).sum(), x, create_graph=True)
        second.append(torch.autograd.grad((first**2).sum(), x)[0])
    torch.testing.assert_close(*second, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_library_logsumexp(dtype):
    x = logits((3, 40), dtype).requires_grad_()
    result = numerics.two_pass_logsumexp(x, impl="triton")
    wide = x.detach().double().requires_grad_()
    expected = torch.logsumexp(wide, -1)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), expected, rtol=TOLERANCE[dtype], atol=1e-6)
    (gradient,) = torch.autograd.grad(result.sum(), x)
    (exact,) = torch.autograd.grad(expected.sum(), wide)
    torch.testing.assert_close(gradient.double(), exact, rtol=2 * TOLERANCE[dtype], atol=1e-6)


@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")
@pytest.mark.parametrize("padding", [0, 5000])
def test_library_logsumexp_of_nan(monkeypatch, padding):
    """In the interpreter `tl.maximum` is made to pass over nan, as a GPU's does."""
    if DEVICE == "cpu":
        from triton.runtime.interpreter import InterpreterBuilder

        pass_over_nan = lambda builder, a, b: builder.binary_op(a, b, np.fmax)  # noqa: E731
        monkeypatch.setattr(InterpreterBuilder, "create_maxnumf", pass_over_nan)
    rows = torch.tensor([[math.nan, math.nan], [-math.inf, math.nan], [0, math.nan], [-math.inf, -math.inf]])
    x = torch.cat([torch.full((4, padding), -math.inf), rows], dim=1).to(DEVICE)
    found = numerics.two_pass_logsumexp(x, impl="triton")
    assert found[:3].isnan().all() and found[3] == -math.inf
    assert numerics.two_pass_softmax(x, impl="triton").isnan().all()


def test_library_rejects_what_the_kernel_cannot_take():
    x = torch.ones(2, 3, dtype=torch.float64, device=DEVICE)
    with pytest.raises(TypeError, match="float32, bfloat16 or float16"):
        numerics.two_pass_softmax(x, impl="triton")
    assert numerics.two_pass_softmax(x).dtype == torch.float64  # "auto" falls back
