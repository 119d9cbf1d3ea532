"""kernels.grouped_gather_linear and lib.models.grouped_gather_linear: against one product a pair in float64."""

import pytest
import torch
from kernel_support import DEVICE, Grid, assert_near, every_dtype, far_rows, poison, randn

import kernels.grouped_gather_linear
from kernels.grouped_gather_linear import grouped_outer, grouped_product
from lib.models import MoHDFFN, grouped_gather_linear

pytestmark = pytest.mark.usefixtures(poison.__name__)
# tokens, choices of each, groups, outputs of a group, inputs
SHAPES = [(1, 1, 1, 1, 1), (5, 2, 3, 4, 7), (37, 3, 5, 33, 40), (50, 1, 2, 16, 32), (3, 4, 19, 5, 6)]


def ints(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def choices(tokens, chosen, groups, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, groups, generator=generator).topk(chosen).indices.to(DEVICE)


def exact(x, weight, choice):
    rows = x.double()[:, None].expand(-1, choice.shape[1], -1) if x.ndim == 2 else x.double()
    return torch.einsum("tcsd,tcd->tcs", weight.double()[choice], rows)


@every_dtype
@pytest.mark.parametrize("own_rows", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, own_rows, dtype):
    tokens, chosen, groups, width, depth = shape
    x = randn(*((tokens, chosen, depth) if own_rows else (tokens, depth)), dtype=dtype, grad=True)
    weight = randn(groups, width, depth, dtype=dtype, seed=1, grad=True)
    choice = choices(tokens, chosen, groups)
    upstream = randn(tokens, chosen, width, dtype=dtype, seed=2)
    wanted = exact(x, weight, choice)
    wanted = [wanted, *torch.autograd.grad(wanted, (x, weight), upstream.double())]
    runs = []
    for _ in range(2):
        found = grouped_gather_linear(x, weight, choice, impl="triton")
        assert found.dtype == dtype
        runs.append([found, *torch.autograd.grad(found, (x, weight), upstream)])
    for mine, again, theirs in zip(*runs, wanted, strict=True):
        assert_near(mine, theirs, dtype)
        assert torch.equal(mine, again)


@pytest.mark.parametrize("combine", [False, True])
def test_the_paths_agree(combine):
    x, weight = randn(23, 6).requires_grad_(), randn(4, 5, 6, seed=1).requires_grad_()
    choice = choices(23, 2, 4)
    results = []
    for impl in ("torch", "triton"):
        out = grouped_gather_linear(x, weight, choice, combine=combine, impl=impl)
        assert out.shape == ((23, 5) if combine else (23, 2, 5))
        upstream = randn(*out.shape, seed=2)
        results.append([out, *torch.autograd.grad(out, (x, weight), upstream)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    wanted = exact(x, weight, choice)
    assert_near(results[1][0], wanted.sum(1) if combine else wanted)


def test_groups_that_nobody_chose():
    x, weight = randn(40, 8).requires_grad_(), randn(6, 5, 8, seed=1).requires_grad_()
    choice = torch.full((40, 1), 4, device=DEVICE)
    choice[7] = 1
    out = grouped_gather_linear(x, weight, choice, impl="triton")
    assert_near(out, exact(x, weight, choice))
    (grad,) = torch.autograd.grad(out, weight, randn(40, 1, 5, seed=2))
    assert (grad[[0, 2, 3, 5]] == 0).all() and (grad[[1, 4]] != 0).all()


def test_strides():
    wide, weight = randn(30, 24), randn(12, 8, 10, seed=1)
    choice = choices(15, 2, 4)
    for x in (wide[::2, ::2], wide[:15, :12], randn(12, 15).T, wide[:1, :12].expand(15, -1)):
        for w in (weight[:4, :, :10].repeat(1, 1, 2)[..., :12], randn(12, 8, 4).permute(2, 1, 0)):
            x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
            out, wanted = grouped_gather_linear(x, w, choice, impl="triton"), exact(x, w, choice)
            assert_near(out, wanted)
            upstream = randn(8, 2, 15, seed=3).permute(2, 1, 0)
            for mine, theirs in zip(
                torch.autograd.grad(out, (x, w), upstream),
                torch.autograd.grad(wanted, (x, w), upstream.double()),
                strict=True,
            ):
                assert_near(mine, theirs)


def test_rows_beyond_32_bits():
    x, y = randn(40, 6), randn(40, 5, seed=1)
    weight, offsets = randn(3, 5, 6, seed=2), ints(0, 10, 10, 40)
    index = torch.arange(39, -1, -1, device=DEVICE, dtype=torch.int32)
    group = torch.tensor([0] * 10 + [2] * 30, device=DEVICE)
    rows = x.double()[index.long()]
    wanted = torch.einsum("psd,pd->ps", weight.double()[group], rows)
    assert_near(grouped_product(far_rows(x), weight, offsets, index), wanted)
    far = far_rows(weight.flatten(1)).unflatten(1, (5, 6))
    assert_near(grouped_product(x, far, offsets, index), wanted)
    outer = torch.zeros(3, 5, 6, dtype=torch.float64, device=DEVICE)
    outer.index_add_(0, group, torch.einsum("ps,pd->psd", y.double(), rows))
    assert_near(grouped_outer(far_rows(y), far_rows(x), offsets, None, index), outer)


def test_pairs_beyond_the_grid_of_cuda(monkeypatch):
    monkeypatch.setattr(kernels.grouped_gather_linear, "_product_kernel", grid := Grid())
    index = torch.zeros(2**22, dtype=torch.int32, device=DEVICE)
    grouped_product(randn(1, 2), randn(1, 1, 2), ints(0, 2**22), index)
    assert grid.fits()


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype, impl):
    x, weight, choice = (
        randn(9, 6, dtype=dtype, grad=True),
        randn(3, 5, 6, seed=1, grad=True),
        choices(9, 2, 3),
    )
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = grouped_gather_linear(x, weight, choice, impl=impl)
    assert out.dtype == torch.bfloat16
    assert_near(out, exact(x, weight, choice))
    grads = torch.autograd.grad(out, (x, weight), torch.ones_like(out))
    assert [grad.dtype for grad in grads] == [dtype, torch.float32]


def test_empty():
    weight = torch.ones(3, 2, 4, device=DEVICE, requires_grad=True)
    for tokens, chosen in ((0, 2), (5, 0)):
        choice = torch.zeros(tokens, chosen, dtype=torch.long, device=DEVICE)
        for impl in ("torch", "triton"):
            x = torch.ones(tokens, 4, device=DEVICE, requires_grad=True)
            out = grouped_gather_linear(x, weight, choice, impl=impl)
            assert out.shape == (tokens, chosen, 2)
            grads = torch.autograd.grad(out, (x, weight), torch.ones_like(out), allow_unused=True)
            assert all(grad is None or (grad == 0).all() for grad in grads)
    assert (
        grouped_outer(torch.ones(0, 2, device=DEVICE), torch.ones(0, 4, device=DEVICE), ints(0, 0))
        .eq(0)
        .all()
    )


def test_gradient_of_one_input_alone():
    choice = choices(9, 2, 3)
    for needed in (0, 1):
        inputs = [randn(9, 4), randn(3, 5, 4, seed=1)]
        inputs[needed].requires_grad_()
        results = [
            torch.autograd.grad(
                grouped_gather_linear(*inputs, choice, impl=impl).square().sum(), inputs[needed]
            )[0]
            for impl in ("torch", "triton")
        ]
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_nan_stays_in_its_row():
    x, choice = randn(20, 6), choices(20, 2, 3)
    x[4, 2] = torch.nan
    bad = grouped_gather_linear(x, randn(3, 5, 6), choice, impl="triton").isnan()
    assert bad[4].all() and bad.sum() == 10


@pytest.mark.parametrize("fusion", ["blockdiag", "monarch", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_of_the_book_inside_of_autocast(fusion, dtype):
    torch.manual_seed(0)
    ffn, x = MoHDFFN(6, 24, 4, 1, 3, fusion).to(DEVICE), randn(2, 9, 6, dtype=dtype)
    results = []
    for gather in (False, True):
        ffn.up.gather = gather
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            results.append(ffn(x))
    assert_near(*results)


@pytest.mark.parametrize("fusion", ["blockdiag", "monarch", None])
def test_the_layer_of_the_book(fusion, monkeypatch):
    torch.manual_seed(0)
    ffn = MoHDFFN(6, 24, 4, 1, 3, fusion, gather=True).to(DEVICE)
    x = randn(2, 9, 6)
    results = []
    for impl in ("torch", "triton"):
        monkeypatch.setattr("lib.models.mohd.choose_impl", lambda *_, impl=impl, **__: impl)
        out = ffn(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), list(ffn.parameters()))])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_bad_input_raises_before_launch():
    x, weight, offsets = randn(6, 4), randn(3, 5, 4), ints(0, 2, 4, 6)
    with pytest.raises(ValueError, match=r"weight must be \(groups, s, 4\)"):
        grouped_product(x, weight[..., :3], offsets)
    with pytest.raises(ValueError, match=r"groups \+ 1 = 4 entries, got 3"):
        grouped_product(x, weight, offsets[:3])
    with pytest.raises(TypeError, match="index must be a vector of int32, got torch.int64"):
        grouped_product(x, weight, offsets, torch.arange(6, device=DEVICE))
    with pytest.raises(TypeError, match="offsets must be a vector of int32"):
        grouped_product(x, weight, offsets.tolist())
    with pytest.raises(TypeError, match="x is torch.float32, weight must be too"):
        grouped_product(x, weight.bfloat16(), offsets)
    with pytest.raises(ValueError, match="out_index must have the 6 pairs, got 2"):
        grouped_product(x, weight, offsets, None, ints(0, 1))
    with pytest.raises(ValueError, match="same number of pairs, got 6 and 2"):
        grouped_outer(x, x, offsets, None, ints(0, 1))
    with pytest.raises(ValueError, match="offsets must be too, got meta"):
        grouped_outer(x, x, offsets.to("meta"))
    with pytest.raises(TypeError, match="got torch.float64"):
        grouped_gather_linear(x.double(), weight.double(), choices(6, 1, 3), impl="triton")


def test_the_library_rejects():
    x, weight, choice = randn(6, 4), randn(3, 5, 4), choices(6, 2, 3)
    with pytest.raises(ValueError, match=r"x must be \(tokens, d\)"):
        grouped_gather_linear(x[:, :3], weight, choice)
    with pytest.raises(ValueError, match=r"choice must be \(tokens, chosen\)"):
        grouped_gather_linear(x, weight, choice[:3])
    with pytest.raises(TypeError, match="choice must hold integers, got torch.float32"):
        grouped_gather_linear(x, weight, choice.float())
    with pytest.raises(ValueError, match=r"choice must lie in \[0, 3\), got 0 to 5"):
        grouped_gather_linear(x, weight, torch.tensor([[0, 5]] * 6, device=DEVICE), impl="torch")
