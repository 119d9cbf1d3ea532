"""lib.numerics against float64, mpmath, SciPy, finite differences and the chapter's reference cells."""

import math

import mpmath
import numpy as np
import pytest
import scipy.special
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import numerics
from lib.book import load_reference

ALGORITHMS = {
    "two-pass": numerics.two_pass_softmax,
    "recompute": numerics.three_pass_softmax,
    "reload": lambda x, dim=-1: numerics.three_pass_softmax(x, dim, variant="reload"),
    "online": numerics.online_softmax,
}
every_algorithm = pytest.mark.parametrize("softmax", ALGORITHMS.values(), ids=ALGORITHMS.keys())


@pytest.fixture(scope="module")
def reference():
    return load_reference("two-pass-softmax", "two_pass_softmax")


@pytest.fixture(params=[None, 64], ids=["default block", "block of 64"])
def block(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(numerics, "BLOCK", request.param)


def relative_error(y, x, dim=-1):
    exact = x.double().softmax(dim)
    return ((y.double() - exact).abs() / exact)[exact > 1e-30].max().item()


# --- pairs


@pytest.mark.parametrize("dtype, digits", [(torch.float32, 2e-7), (torch.float64, 4e-16)])
def test_ext_exp_against_fifty_digits(dtype, digits):
    mpmath.mp.dps = 50
    values = torch.from_numpy(np.random.default_rng(0).uniform(-2e4, 2e4, 100)).to(dtype)
    m, n = numerics.ext_exp(values)
    assert m.dtype == n.dtype == dtype and (n == n.round()).all()
    assert m.min() >= 0.70 and m.max() <= 1.42
    for x, mantissa, exponent in zip(values.tolist(), m.tolist(), n.tolist(), strict=True):
        ratio = mpmath.mpf(mantissa) * mpmath.mpf(2) ** int(exponent) / mpmath.exp(mpmath.mpf(x))
        assert abs(ratio - 1) < digits


def test_ext_exp_is_frexp_up_to_a_factor_of_two():
    x = torch.linspace(-80, 80, 999)
    m, n = numerics.ext_exp(x)
    fraction, exponent = np.frexp(np.exp(x.double().numpy()))
    assert set((exponent - n.numpy()).astype(int)) <= {0, 1}
    np.testing.assert_allclose(
        np.ldexp(m.double().numpy(), n.numpy().astype(int)), np.ldexp(fraction, exponent), rtol=2e-7
    )


def test_ext_exp_of_the_extremes():
    x = torch.tensor([-math.inf, math.inf, math.nan, 0.0, 1e30, -1e30, 3.4e38, -3.4e38, 1e8, 1e-45])
    m, n = numerics.ext_exp(x)
    assert (
        (m[0], n[0]) == (0, -math.inf) and m[1].isnan() and n[1] == math.inf and m[2].isnan() and n[2].isnan()
    )
    assert (m[3], n[3]) == (1, 0) and m[9] == 1
    assert (m[3:] >= 0.5).all() and (m[3:] <= 2).all() and torch.isfinite(n[3:]).all()


def test_ext_exp_stays_precise_until_exponents_stop_being_every_whole_number():
    x = torch.cat([torch.rand(2000) * 2.0**k for k in range(24)])
    x = torch.cat([x, -x])
    m, n = numerics.ext_exp(x[x.abs() < 1.1e7])
    t = x[x.abs() < 1.1e7].double() - n.double() * math.log(2)
    assert ((m.double() / t.exp() - 1).abs() < 2e-7).all() and t.abs().max() < math.log(2)


def test_ext_exp_gradient():
    x = torch.tensor([0.3, -5.0, 100.0, -math.inf], requires_grad=True)
    m, n = numerics.ext_exp(x)
    assert not n.requires_grad
    (gradient,) = torch.autograd.grad(m.sum(), x)
    assert torch.equal(gradient, m.detach())  # d m / d x = m while n stands still; 0 for -inf


pairs = st.tuples(
    st.floats(-2, 2, width=32, allow_subnormal=False), st.integers(-300, 300).map(float) | st.just(-math.inf)
).map(
    lambda pair: tuple(
        torch.tensor(0.0 if pair[1] == -math.inf and i == 0 else v) for i, v in enumerate(pair)
    )
)


def exact_value(pair):
    m, n = pair[0].item(), pair[1].item()
    return mpmath.mpf(0) if n == -math.inf else mpmath.mpf(m) * mpmath.mpf(2) ** int(n)


@settings(max_examples=60)
@given(pairs, pairs, pairs)
def test_pair_add_is_a_commutative_monoid(a, b, c):
    zero = (torch.tensor(0.0), torch.tensor(-math.inf))
    assert numerics.pair_add(a, b) == numerics.pair_add(b, a)
    assert numerics.pair_add(a, zero) == a == numerics.pair_add(zero, a)
    left, right = numerics.pair_add(numerics.pair_add(a, b), c), numerics.pair_add(a, numerics.pair_add(b, c))
    assert left[1] == right[1] == max(a[1], b[1], c[1])
    assert abs(left[0] - right[0]) <= 8 * 2.0**-24 * 6
    exact = exact_value(a) + exact_value(b)
    largest = max(a[1], b[1]).item()
    if largest > -math.inf:  # correct to a unit in the last place of the larger summand
        assert abs(exact_value(numerics.pair_add(a, b)) - exact) <= mpmath.mpf(2) ** int(largest) * 4 * 2**-23


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factors_are_exact_powers_of_two(dtype):
    # 1.5 * 2^e, shifted by every e down to where it vanishes
    low = -160 if dtype == torch.float32 else -1100
    n = torch.arange(low, 1, dtype=dtype)
    one = (torch.tensor(0.0, dtype=dtype), torch.tensor(0.0, dtype=dtype))
    m, k = numerics.pair_add((torch.ones_like(n), n), one)
    with np.errstate(under="ignore"):
        expected = np.ldexp(np.ones(len(n), n.numpy().dtype), n.numpy().astype(int))
    assert (k == 0).all() and torch.equal(m, torch.from_numpy(expected)) and m[0] == 0


def test_pair_sum_over_any_dimension():
    x = torch.randn(3, 50, 4, dtype=torch.float64) * 500
    for dim in (0, 1, 2, -1, -3):
        m, n = numerics.pair_sum(*numerics.ext_exp(x), dim=dim)
        np.testing.assert_allclose(
            torch.log(m) + n * math.log(2), scipy.special.logsumexp(x, axis=dim), rtol=1e-14
        )
    empty = numerics.pair_sum(torch.ones(3, 0), torch.ones(3, 0))
    assert empty[0].tolist() == [0] * 3 and empty[1].tolist() == [-math.inf] * 3
    masked = numerics.pair_sum(*numerics.ext_exp(torch.full((2, 5), -math.inf)))
    assert masked[0].tolist() == [0] * 2 and masked[1].tolist() == [-math.inf] * 2


# --- softmax


@every_algorithm
@pytest.mark.parametrize(
    "shape, dim", [((1,), 0), ((7,), -1), ((5, 131), 1), ((4, 3, 67), 1), ((2, 65, 2), -2), ((3, 1), 1)]
)
def test_softmax_values(softmax, shape, dim, block):
    torch.manual_seed(0)
    x = torch.randn(shape) * 10
    y = softmax(x, dim)
    assert y.shape == x.shape and y.dtype == x.dtype
    assert relative_error(y, x, dim) < 5e-6
    np.testing.assert_allclose(y, scipy.special.softmax(x.double().numpy(), axis=dim), rtol=5e-6)


def test_two_pass_is_precise_far_from_the_maximum():
    torch.manual_seed(0)
    x = 3.3 - 69 * torch.rand(1, 5000)
    assert relative_error(numerics.two_pass_softmax(x), x) < 5e-7
    assert relative_error(numerics.three_pass_softmax(x), x) > 1e-6  # max subtraction rounds x - max


@pytest.mark.parametrize("offset", [-1e6, -3.3e4, -64.0, 17.0, 1e4, 1e5, 4e6])
def test_common_offset(offset):
    torch.manual_seed(0)
    x = torch.randn(4, 300) + offset
    assert relative_error(numerics.two_pass_softmax(x), x) < 1e-6
    if abs(offset) <= 64:
        torch.testing.assert_close(
            numerics.two_pass_softmax(x - offset), numerics.two_pass_softmax(x), rtol=2e-5, atol=0
        )


def test_powers_of_two_by_hand():
    k = torch.tensor([3, 0, -2, 5, 5, -40], dtype=torch.float64)
    y = numerics.two_pass_softmax(k * math.log(2))
    torch.testing.assert_close(y, 2**k / (2**k).sum(), rtol=1e-14, atol=0)


@every_algorithm
def test_extreme_rows(softmax, block):
    inf = math.inf
    rows = torch.tensor(
        [
            [1e4, 1e4 + 1, 1e4 - 1], [-1e4, -1e4 - 1, -1e4 + 1], [1e30, 0, -1e30], [-inf, 0, 1], [-inf, -inf, 2],
            [torch.finfo(torch.float32).min, 0, 1], [88, 89, 90], [-103, -104, -105], [0, -100, -103.2], [0, 0, -200],
        ]
    )  # fmt: skip
    torch.testing.assert_close(softmax(rows), rows.double().softmax(-1).float(), rtol=2e-6, atol=2e-45)
    assert softmax(rows)[9, 2] == 0
    for bad in ([-inf] * 3, [inf, 0, 0], [math.nan, 0, 1], [0, math.nan, -inf]):
        x = torch.tensor([bad, [0.0, 1.0, 2.0]])
        assert softmax(x)[0].isnan().all() and torch.equal(torch.softmax(x, -1).isnan(), softmax(x).isnan())


def test_a_block_of_masked_logits_before_the_first_finite_one(block):
    x = torch.randn(2, 300)
    x[:, :130] = -math.inf
    for softmax in ALGORITHMS.values():
        torch.testing.assert_close(softmax(x), x.softmax(-1), rtol=2e-6, atol=0)


@every_algorithm
def test_strides_and_empty(softmax):
    x = torch.randn(6, 10, 4)
    torch.testing.assert_close(softmax(x.transpose(0, 2), 0), x.transpose(0, 2).softmax(0))
    torch.testing.assert_close(softmax(x[::2, ::3]), x[::2, ::3].softmax(-1))
    torch.testing.assert_close(softmax(x[:1].expand(5, 10, 4), 1), x[:1].expand(5, 10, 4).softmax(1))
    for shape in ((0, 5), (5, 0), (0,), (2, 0, 3)):
        assert softmax(torch.empty(shape)).shape == shape


@every_algorithm
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.bfloat16, 2**-8), (torch.float16, 2**-10), (torch.float64, 1e-13)]
)
def test_dtypes(softmax, dtype, tolerance):
    torch.manual_seed(0)
    x = (torch.randn(5, 200) * 4).to(dtype)
    y = softmax(x)
    assert y.dtype == dtype
    torch.testing.assert_close(
        y.double(), x.double().softmax(-1), rtol=2.1 * tolerance, atol=1e-7 if tolerance > 1e-6 else 0
    )


@settings(max_examples=40)
@given(
    st.lists(st.floats(-(2.0**126), 2.0**126, width=32) | st.just(-math.inf), min_size=1, max_size=40),
    st.integers(0, 2**16),
)
def test_two_pass_never_overflows(row, seed):
    x = torch.tensor([row])
    y = numerics.two_pass_softmax(x)
    if (x == -math.inf).all():
        assert y.isnan().all()
    else:
        assert torch.isfinite(y).all() and (y >= 0).all() and abs(y.sum() - 1) < 1e-5
        assert (y[x == -math.inf] == 0).all()
    shuffled = torch.randperm(len(row), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(numerics.two_pass_softmax(x[:, shuffled]), y[:, shuffled], equal_nan=True)


# --- against the reference, gradients


def test_agrees_with_the_reference(reference, block):
    torch.manual_seed(0)
    x = torch.randn(5, 777) * 6
    x[1, ::3] = -math.inf
    x.requires_grad_()
    g = torch.randn(5, 777)
    mine, theirs = numerics.two_pass_softmax(x), reference(x, chunk=100)
    torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=0)
    torch.testing.assert_close(
        *(torch.autograd.grad(y, x, g)[0] for y in (mine, theirs)), rtol=2e-5, atol=1e-8
    )


@pytest.mark.parametrize("name, mine", [("three_pass_softmax", "recompute"), ("online_softmax", "online")])
def test_baselines_agree_with_their_references(name, mine):
    x = torch.randn(3, 301) * 5
    function = load_reference("two-pass-softmax", name)
    torch.testing.assert_close(ALGORITHMS[mine](x), function(x, chunk=64), rtol=5e-6, atol=0)
    if name == "three_pass_softmax":
        torch.testing.assert_close(
            ALGORITHMS["reload"](x), function(x, chunk=64, reload=True), rtol=5e-6, atol=0
        )


@every_algorithm
@pytest.mark.parametrize("dim", [0, 1])
def test_gradcheck(softmax, dim, block):
    torch.manual_seed(0)
    x = (torch.randn(3, 6, dtype=torch.float64) * 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: softmax(z, dim), x)
    assert torch.autograd.gradgradcheck(lambda z: softmax(z, dim), x)


@pytest.mark.parametrize("dim", [0, 1])
def test_logsumexp_gradcheck(dim, block):
    torch.manual_seed(0)
    x = (torch.randn(4, 70, dtype=torch.float64) * 3)[:, ::10].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: numerics.two_pass_logsumexp(z, dim), x)
    assert torch.autograd.gradgradcheck(lambda z: numerics.two_pass_logsumexp(z, dim), x)


def test_half_precision_gradients():
    torch.manual_seed(0)
    x = torch.randn(3, 50, dtype=torch.bfloat16, requires_grad=True)
    (gradient,) = torch.autograd.grad(numerics.two_pass_softmax(x)[:, :5].sum(), x)
    wide = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(wide.softmax(-1)[:, :5].sum(), wide)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient.double(), expected, rtol=0.02, atol=1e-4)


def test_logsumexp_values(block):
    torch.manual_seed(0)
    x = torch.randn(3, 4, 200) * 40
    for dim in (0, 1, 2, -1):
        torch.testing.assert_close(
            numerics.two_pass_logsumexp(x, dim), torch.logsumexp(x, dim), rtol=1e-6, atol=1e-6
        )
    extremes = torch.tensor(
        [[-math.inf, -math.inf], [math.inf, 0], [1e30, 1e30], [math.nan, 0], [-5e3, -5e3]]
    )
    result = numerics.two_pass_logsumexp(extremes)
    torch.testing.assert_close(result, torch.logsumexp(extremes, -1), equal_nan=True)
    assert numerics.two_pass_logsumexp(torch.empty(0, 3)).shape == (0,)
    assert numerics.two_pass_logsumexp(torch.empty(2, 0)).tolist() == [-math.inf] * 2
    x = torch.randn(4, 300, requires_grad=True)
    (gradient,) = torch.autograd.grad(numerics.two_pass_logsumexp(x).sum(), x)
    torch.testing.assert_close(gradient, x.softmax(-1))


def test_results_repeat_and_the_input_is_left_alone():
    x = torch.randn(3, 100)
    copy = x.clone()
    for function in (*ALGORITHMS.values(), numerics.two_pass_logsumexp):
        assert torch.equal(function(x), function(x)) and torch.equal(x, copy)


# --- bad input


@pytest.mark.parametrize("function", [*ALGORITHMS.values(), numerics.two_pass_logsumexp])
def test_bad_input(function):
    with pytest.raises(TypeError, match="x must be a floating-point tensor, got torch.int64"):
        function(torch.arange(3))
    with pytest.raises(TypeError, match="got list"):
        function([1.0, 2.0])
    with pytest.raises(ValueError, match="dim must be one of the 2 dimensions"):
        function(torch.ones(2, 3), 2)
    with pytest.raises(ValueError, match="dim must be one of the 0 dimensions"):
        function(torch.tensor(1.0))


def test_bad_options():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="variant must be 'recompute' or 'reload', got 'cached'"):
        numerics.three_pass_softmax(x, variant="cached")
    with pytest.raises(ValueError, match="impl must be 'auto' or one of"):
        numerics.two_pass_softmax(x, impl="cuda")
    with pytest.raises(TypeError, match="must be a floating-point tensor"):
        numerics.ext_exp(torch.arange(2))
    with pytest.raises(TypeError, match="first must be a pair"):
        numerics.pair_add(x, (x, x))
    with pytest.raises(TypeError, match="n of second"):
        numerics.pair_add((x, x), (x, torch.ones(2, 3, dtype=torch.int8)))
    with pytest.raises(ValueError, match="one shape"):
        numerics.pair_sum(torch.ones(2), torch.ones(3))
