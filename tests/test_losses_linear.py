"""`lib.losses.linear` against explicit logits in float64, against the chapter's reference, and under bad input."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

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
from lib.train.memory import PeakTensor

SLUG = "cut-cross-entropy"


def problem(count=252, num_classes=507, dim=123, dtype=torch.float64, ignored=0.2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    weight = torch.randn(num_classes, dim, generator=generator, dtype=torch.float64) * 3 / dim**0.5
    bias = torch.randn(num_classes, generator=generator, dtype=torch.float64)
    targets = torch.randint(num_classes, (count,), generator=generator)
    targets[torch.rand(count, generator=generator) < ignored] = -100
    return *(x.to(dtype).requires_grad_() for x in (hidden, weight, bias)), targets


def explicit(hidden, weight, targets, bias=None, softcap=None, reduction="mean", **options):
    logits = hidden @ weight.T + (0 if bias is None else bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, reduction=reduction, **options)


def gradients(loss, *inputs):
    generator = torch.Generator().manual_seed(5)
    upstream = torch.randn(loss.shape, generator=generator, dtype=torch.float64).to(loss.dtype)  # never one
    return torch.autograd.grad(loss, inputs, upstream, retain_graph=True)


@pytest.mark.parametrize("impl", ["torch", "chunked"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("block_size", [None, (32, 128), (1, 1000)])
def test_equals_explicit_logits(impl, reduction, softcap, with_bias, block_size):
    hidden, weight, bias, targets = problem()
    bias = bias if with_bias else None
    inputs = [x for x in (hidden, weight, bias) if x is not None]
    options = dict(bias=bias, softcap=softcap, reduction=reduction)
    found = linear_cross_entropy(hidden, weight, targets, impl=impl, block_size=block_size, **options)
    wanted = explicit(hidden, weight, targets, **options)
    torch.testing.assert_close(found, wanted)
    for ours, theirs in zip(gradients(found, *inputs), gradients(wanted, *inputs), strict=True):
        torch.testing.assert_close(ours, theirs)


@settings(max_examples=25)
@given(
    count=st.integers(1, 40), num_classes=st.integers(1, 40), dim=st.integers(1, 9),
    rows=st.integers(1, 50), columns=st.integers(1, 50), seed=st.integers(0, 99),
    reduction=st.sampled_from(["mean", "sum", "none"]), ignored=st.sampled_from([0.0, 0.5]),
)  # fmt: skip
def test_any_shape_and_any_tile(count, num_classes, dim, rows, columns, seed, reduction, ignored):
    hidden, weight, bias, targets = problem(count, num_classes, dim, seed=seed, ignored=ignored)
    targets[0] = num_classes - 1  # at least one row is kept
    found = linear_cross_entropy(
        hidden, weight, targets, bias=bias, reduction=reduction, block_size=(rows, columns), impl="chunked"
    )
    wanted = explicit(hidden, weight, targets, bias, reduction=reduction)
    torch.testing.assert_close(found, wanted)
    for ours, theirs in zip(
        gradients(found, hidden, weight, bias), gradients(wanted, hidden, weight, bias), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(reduction, softcap):
    hidden, weight, bias, targets = problem(7, 11, 3)

    def loss(hidden, weight, bias):
        return linear_cross_entropy(
            hidden, weight, targets, bias=bias, reduction=reduction, softcap=softcap, block_size=(2, 4),
            impl="chunked",
        )  # fmt: skip

    # the scalar's second backward pass recomputes what the first had at hand: equal up to rounding
    assert torch.autograd.gradcheck(loss, (hidden, weight, bias), nondet_tol=1e-12)


def test_gradcheck_of_the_lse_output():
    hidden, weight, bias, targets = problem(6, 9, 3)

    def both(hidden, weight, bias):
        return linear_cross_entropy(
            hidden, weight, targets, bias=bias, return_lse=True, block_size=(4, 4), impl="chunked"
        )

    assert torch.autograd.gradcheck(both, (hidden, weight, bias))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_gradient_of_one_input_alone(reduction, which):
    inputs = list(problem(30, 50, 5))
    for number in range(3):
        inputs[number] = inputs[number].detach().requires_grad_(number == which)
    hidden, weight, bias, targets = inputs
    found = linear_cross_entropy(hidden, weight, targets, bias=bias, reduction=reduction, impl="chunked")
    wanted = explicit(hidden, weight, targets, bias, reduction=reduction)
    torch.testing.assert_close(*(gradients(loss, inputs[which])[0] for loss in (found, wanted)))


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_second_backward_through_a_retained_graph(smoothing):
    hidden, weight, bias, targets = problem(30, 50, 5)
    loss = linear_cross_entropy(hidden, weight, targets, bias=bias, label_smoothing=smoothing, impl="chunked")
    first = torch.autograd.grad(2 * loss, (hidden, weight, bias), retain_graph=True)
    second = torch.autograd.grad(2 * loss, (hidden, weight, bias), retain_graph=True)
    third = torch.autograd.grad(-3 * loss, (hidden, weight, bias))
    for a, b, c in zip(first, second, third, strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(-1.5 * a, c)


def test_gradients_accumulate_and_are_not_shared():
    hidden, weight, _, targets = problem(30, 50, 5)
    for _ in range(2):
        linear_cross_entropy(hidden, weight, targets, impl="chunked").backward()
    once = torch.autograd.grad(explicit(hidden, weight, targets), (hidden, weight))
    torch.testing.assert_close(hidden.grad, 2 * once[0])
    torch.testing.assert_close(weight.grad, 2 * once[1])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_differentiating_twice_raises(reduction):
    hidden, weight, _, targets = problem(5, 7, 3, ignored=0)
    loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction, impl="chunked").sum()
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    other = weight.sum()  # a penalty on the gradient beside another term must not be dropped in silence
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        (gradient.sum() + other).backward()


def test_no_grad_does_not_form_gradients():
    hidden, weight, bias, targets = problem(64, 300, 5)
    with torch.no_grad(), PeakTensor() as memory:
        loss = linear_cross_entropy(hidden, weight, targets, bias=bias, block_size=(4, 300), impl="chunked")
    torch.testing.assert_close(loss, explicit(hidden, weight, targets, bias).detach())
    assert memory.largest_bytes == 4 * 300 * 8 and not loss.requires_grad


@pytest.mark.parametrize("impl", ["torch", "chunked"])
def test_all_rows_ignored_is_as_in_torch(impl):
    hidden, weight, _, targets = problem(6, 9, 3)
    targets[:] = 7
    options = dict(ignore_index=7, impl=impl)
    assert linear_cross_entropy(hidden, weight, targets, **options).isnan()
    assert linear_cross_entropy(hidden, weight, targets, reduction="sum", **options) == 0
    loss = linear_cross_entropy(hidden, weight, targets, reduction="none", **options)
    assert loss.tolist() == [0] * 6
    loss.sum().backward()
    assert hidden.grad.abs().max() == 0 and weight.grad.abs().max() == 0


@pytest.mark.parametrize("impl", ["torch", "chunked"])
def test_no_tokens_at_all(impl):
    hidden, weight = torch.randn(0, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    targets = torch.empty(0, dtype=torch.long)
    loss = linear_cross_entropy(hidden, weight, targets, reduction="sum", impl=impl)
    loss.backward()
    assert loss == 0 and hidden.grad.shape == (0, 3) and weight.grad.abs().max() == 0


@pytest.mark.parametrize("impl", ["torch", "chunked"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_shift_equals_cutting_by_hand(impl, reduction):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 10, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(20, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(20, (3, 10), generator=generator)
    targets[0, 4] = targets[2, 9] = targets[1, 0] = -100
    found, lse = linear_cross_entropy(
        hidden, weight, targets, shift=1, reduction=reduction, return_lse=True, impl=impl
    )
    logits = hidden[:, :-1] @ weight.T
    wanted = F.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), reduction=reduction)
    torch.testing.assert_close(found.flatten(), wanted.flatten() if reduction == "none" else wanted[None])
    torch.testing.assert_close(lse, logits.logsumexp(-1).masked_fill(targets[:, 1:] == -100, 0))
    assert lse.shape == (3, 9)
    for ours, theirs in zip(
        gradients(found, hidden, weight), gradients(wanted.view_as(found), hidden, weight), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    if reduction == "mean":  # the path without the log-sum-exp output is another one
        alone = linear_cross_entropy(hidden, weight, targets, shift=1, impl=impl)
        for ours, theirs in zip(
            gradients(alone, hidden, weight), gradients(wanted, hidden, weight), strict=True
        ):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_z_loss_through_the_lse(reduction):
    hidden, weight, bias, targets = problem(40, 70, 6)

    def total(impl, **options):
        loss, lse = linear_cross_entropy(
            hidden, weight, targets, bias=bias, reduction=reduction, return_lse=True, impl=impl, **options
        )
        return loss.sum() * 0.7 + 0.1 * lse.square().mean()

    wanted = torch.autograd.grad(total("torch"), (hidden, weight, bias))
    found = torch.autograd.grad(total("chunked", block_size=(16, 16)), (hidden, weight, bias))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("impl", ["torch", "chunked"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("smoothing", [0.1, 1.0])
@pytest.mark.parametrize("z_loss", [0.0, 0.02])
def test_label_smoothing_and_z_loss(impl, reduction, softcap, smoothing, z_loss):
    hidden, weight, bias, targets = problem(40, 70, 6)
    options = dict(bias=bias, softcap=softcap, reduction=reduction, label_smoothing=smoothing)
    found = linear_cross_entropy(
        hidden, weight, targets, z_loss=z_loss, impl=impl, block_size=(16, 32), **options
    )
    wanted = explicit(hidden, weight, targets, **options)
    if z_loss:
        logits = hidden @ weight.T + bias
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        squares = logits.logsumexp(1).square() * (targets != -100)
        number = (targets != -100).sum() if reduction == "mean" else 1
        wanted = wanted + z_loss * (squares if reduction == "none" else squares.sum() / number)
    torch.testing.assert_close(found, wanted)
    inputs = (hidden, weight, bias)
    torch.testing.assert_close(gradients(found, *inputs), gradients(wanted, *inputs))


@pytest.mark.parametrize("return_lse", [False, True])
def test_the_filter_bounds_the_difference_from_the_smoothed_target(return_lse):
    """Every skipped entry of |softmax - target distribution| is below eps, so each row's error is below V eps |w|."""
    hidden, weight, _, targets = problem(50, 400, 6, ignored=0)
    hidden, eps, stats = hidden.detach().mul(3).requires_grad_(), 2.0**-6, CutCrossEntropyStats()
    grads = []
    for options in (
        dict(impl="torch"),
        dict(impl="chunked", filter_eps=eps, block_size=(8, 16), stats=stats),
    ):
        out = linear_cross_entropy(
            hidden, weight, targets, label_smoothing=0.2, reduction="sum", return_lse=return_lse, **options
        )
        total = out[0] + 2 * out[1].sum() if return_lse else out
        grads.append(torch.autograd.grad(total, hidden)[0])
    assert 0 < stats.blocks_skipped < stats.blocks_seen
    assert not torch.allclose(*grads)
    # with the log-sum-exp, 2 softmax entries below eps are lost as well
    assert (
        (grads[0] - grads[1]).norm(dim=1) <= (3 if return_lse else 1) * eps * weight.norm(dim=1).sum()
    ).all()


@pytest.mark.parametrize("impl", ["torch", "chunked"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.7, 2.0])
def test_linear_comp_sum_is_comp_sum_of_the_logits(impl, reduction, tau):
    hidden, weight, bias, targets = problem(30, 50, 5)
    options = dict(reduction=reduction)
    found = linear_comp_sum(hidden, weight, targets, tau, bias=bias, impl=impl, **options)
    wanted = comp_sum(hidden @ weight.T + bias, targets, tau, **options)
    torch.testing.assert_close(found, wanted)
    inputs = (hidden, weight, bias)
    torch.testing.assert_close(gradients(found, *inputs), gradients(wanted, *inputs))


@pytest.mark.parametrize("impl", ["torch", "chunked"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("lam,margin", [(1.0, 0.0), (3.0, 0.5), (0.05, 0.3), (50.0, 2.0)])
@pytest.mark.parametrize("softcap", [None, 8.0])
def test_linear_ldr_kl_is_ldr_kl_of_the_logits(impl, reduction, lam, margin, softcap):
    hidden, weight, bias, targets = problem(30, 50, 5)
    options = dict(margin=margin, reduction=reduction)
    found = linear_ldr_kl(hidden, weight, targets, lam, bias=bias, softcap=softcap, impl=impl, **options)
    logits = hidden @ weight.T + bias
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    wanted = ldr_kl(logits, targets, lam, **options)
    torch.testing.assert_close(found, wanted)
    inputs = (hidden, weight, bias)
    torch.testing.assert_close(gradients(found, *inputs), gradients(wanted, *inputs))


def test_linear_ldr_kl_of_certain_rows():
    """Rows whose loss is at its bounds: the target has all the mass, or almost none."""
    hidden = torch.tensor([[300.0], [-300.0], [0.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    targets = torch.tensor([0, 0, 0])
    for margin in (0.0, 1.0, 10.0):
        found = linear_ldr_kl(hidden, weight, targets, margin=margin, reduction="none", impl="chunked")
        wanted = ldr_kl((hidden @ weight.T).double(), targets, margin=margin, reduction="none")
        torch.testing.assert_close(found.double(), wanted)
        pair = [torch.autograd.grad(loss.sum(), hidden)[0] for loss in (found, wanted)]
        torch.testing.assert_close(*pair)


def test_linear_losses_shift_and_all_rows_ignored():
    hidden, weight, _, targets = problem(24, 50, 5)
    hidden, targets = hidden.view(2, 12, 5), targets.view(2, 12)
    for linear, plain, number in ((linear_comp_sum, comp_sum, 1.5), (linear_ldr_kl, ldr_kl, 2.0)):
        found = linear(hidden, weight, targets, number, shift=2)
        wanted = plain((hidden @ weight.T)[:, :-2].flatten(0, 1), targets[:, 2:].flatten(), number)
        torch.testing.assert_close(found, wanted)
        nothing = torch.full_like(targets, -100)
        assert linear(hidden, weight, nothing, number).isnan()
        assert linear(hidden, weight, nothing, number, reduction="sum") == 0


@pytest.mark.parametrize(
    "change,error,words",
    [
        (dict(return_lse=True), TypeError, "return_lse has no meaning"),
        (dict(label_smoothing=0.1), TypeError, "label_smoothing has no meaning"),
        (dict(reduction="max"), ValueError, "reduction must be"),
        (dict(impl="fast"), ValueError, "impl must be"),
        (dict(softcap=-1.0), ValueError, "softcap must be"),
        (dict(bias=torch.zeros(5)), ValueError, "bias must be"),
    ],
)
def test_linear_losses_bad_input(change, error, words):
    inputs = torch.randn(4, 3), torch.randn(6, 3), torch.zeros(4, dtype=torch.long)
    for function in (linear_comp_sum, linear_ldr_kl):
        with pytest.raises(error, match=words):
            function(*inputs, **change)
    for wrong in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="tau must be"):
            linear_comp_sum(*inputs, wrong)
        with pytest.raises(ValueError, match="lam must be"):
            linear_ldr_kl(*inputs, wrong)
        with pytest.raises(ValueError, match="margin must be"):
            linear_ldr_kl(*inputs, margin=wrong)


def test_filter_keeps_the_lse_gradient_of_a_certain_target():
    hidden = torch.full((1, 1), 30.0, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], dtype=torch.float64, requires_grad=True)
    _, lse = linear_cross_entropy(
        hidden, weight, torch.tensor([0]), filter_eps=1e-3, block_size=(1, 1), return_lse=True, impl="chunked"
    )
    lse.sum().backward()
    assert hidden.grad.item() == pytest.approx(1)  # softmax - onehot is tiny there, the softmax itself is one


def test_masked_classes_and_large_logits():
    hidden, weight, bias, targets = problem(20, 40, 4, ignored=0)
    bias = bias.detach().clone()
    bias[:16] = -torch.inf
    targets = targets.clamp(min=16)
    hidden = (hidden.detach() * 1e4).requires_grad_()
    for reduction in ("mean", "none"):
        found = linear_cross_entropy(
            hidden, weight, targets, bias=bias, reduction=reduction, block_size=(8, 8), impl="chunked"
        )
        wanted = explicit(hidden, weight, targets, bias, reduction=reduction)
        torch.testing.assert_close(found, wanted)
        assert found.isfinite().all()
        torch.testing.assert_close(gradients(found, weight), gradients(wanted, weight))


def test_nan_is_not_filtered_away():
    hidden, weight, _, targets = problem(8, 40, 4, ignored=0)
    hidden = hidden.detach().clone()
    hidden[3] = torch.nan
    linear_cross_entropy(
        hidden, weight, targets, filter_eps=0.01, block_size=(4, 8), impl="chunked"
    ).backward()
    assert weight.grad.isnan().all()


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_non_contiguous(layout, reduction):
    hidden, weight, _, targets = problem(30, 50, 6)
    if layout == "transposed":
        hidden, weight = hidden.detach().T.contiguous().T, weight.detach().T.contiguous().T
    elif layout == "strided":
        hidden, weight = hidden.detach().repeat(2, 2)[::2, ::2], weight.detach().repeat(1, 2)[:, ::2]
    else:
        hidden, weight = hidden.detach()[:1].expand(30, 6), weight.detach()
    hidden.requires_grad_(), weight.requires_grad_()
    found = linear_cross_entropy(hidden, weight, targets, reduction=reduction, impl="chunked")
    wanted = explicit(hidden, weight, targets, reduction=reduction)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(gradients(found, hidden, weight), gradients(wanted, hidden, weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lower_precision_inputs(dtype):
    hidden, weight, bias, targets = problem(60, 90, 16, dtype)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    wanted = explicit(exact[0], exact[1], targets, exact[2])
    found = linear_cross_entropy(hidden, weight, targets, bias=bias, filter_eps=None, impl="chunked")
    assert found.dtype == torch.float32  # the loss is never summed in half precision
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)
    unit = torch.finfo(dtype).eps
    for ours, theirs in zip(
        torch.autograd.grad(found, (hidden, weight, bias)), torch.autograd.grad(wanted, exact), strict=True
    ):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).norm() <= 4 * unit * theirs.norm()


def test_autocast():
    hidden, weight, bias, targets = problem(20, 40, 8, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight.bfloat16(), targets, bias=bias, impl="chunked")
    loss.backward()
    assert loss.dtype == torch.float32 and hidden.grad.dtype == torch.float32
    torch.testing.assert_close(
        loss.double(),
        explicit(*(x.double() for x in (hidden, weight)), targets, bias.double()),
        rtol=1e-2,
        atol=1e-2,
    )


def test_filter_defaults_follow_the_precision():
    hidden, weight, _, targets = problem(16, 4000, 8, torch.bfloat16, ignored=0)
    hidden = hidden.detach().mul(8).requires_grad_()
    for dtype, skips in ((torch.bfloat16, True), (torch.float32, False)):
        stats = CutCrossEntropyStats()
        linear_cross_entropy(
            hidden.to(dtype), weight.to(dtype), targets, reduction="none", block_size=(4, 16), stats=stats,
            impl="chunked",
        ).sum().backward()  # fmt: skip
        assert stats.blocks_seen == 4 * 250
        assert (stats.blocks_skipped > 0) == skips


@pytest.mark.parametrize("sort_vocab", [False, True])
def test_filtered_gradient_equals_the_reference_and_its_bound(sort_vocab):
    reference = load_reference(SLUG, "cut_cross_entropy")
    hidden, weight, _, targets = problem(50, 400, 6, ignored=0)
    hidden = hidden.detach().mul(3).requires_grad_()
    eps, block, stats = 2.0**-8, (8, 16), CutCrossEntropyStats()
    loss = linear_cross_entropy(
        hidden, weight, targets, filter_eps=eps, sort_vocab=sort_vocab, block_size=block, stats=stats,
        impl="chunked",
    )  # fmt: skip
    assert stats.skip_fraction == 0  # nothing is counted before backward
    found = torch.autograd.grad(loss, (hidden, weight))
    wanted = torch.autograd.grad(
        reference(hidden, weight, targets, block=block, eps=eps, sort=sort_vocab), (hidden, weight)
    )
    exact = torch.autograd.grad(explicit(hidden, weight, targets), (hidden, weight))
    assert 0 < stats.blocks_skipped < stats.blocks_seen == 7 * 25
    for ours, theirs, unfiltered in zip(found, wanted, exact, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert not torch.allclose(ours, unfiltered)
    assert ((found[0] - exact[0]).norm(dim=1) <= eps / 50 * weight.norm(dim=1).sum()).all()
    assert ((found[1] - exact[1]).norm(dim=1) <= eps / 50 * hidden.norm(dim=1).sum()).all()


def test_filtering_one_gradient_alone():
    hidden, weight, bias, targets = problem(50, 400, 6, ignored=0)
    hidden = hidden.detach().mul(3).requires_grad_()
    inputs, exact = (
        (hidden, weight, bias),
        torch.autograd.grad(explicit(hidden, weight, targets, bias), (hidden, weight, bias)),
    )
    options = dict(bias=bias, filter_eps=2.0**-8, block_size=(8, 16), impl="chunked")
    only_hidden = torch.autograd.grad(
        linear_cross_entropy(hidden, weight, targets, filter_weight=False, **options), inputs
    )
    only_weight = torch.autograd.grad(
        linear_cross_entropy(hidden, weight, targets, filter_hidden=False, **options), inputs
    )
    torch.testing.assert_close(only_hidden[1:], exact[1:])
    torch.testing.assert_close(only_weight[0], exact[0])
    assert not torch.allclose(only_hidden[0], exact[0]) and not torch.allclose(only_weight[1], exact[1])


def test_reference_cells():
    hidden, weight, _, targets = problem(23, 41, 5, ignored=0)
    dot = load_reference(SLUG, "indexed_neg_dot")
    torch.testing.assert_close(indexed_neg_dot(hidden, weight, targets), dot(hidden, weight, targets))
    loss = load_reference(SLUG, "cut_cross_entropy")(hidden, weight, targets, block=(4, 8))
    found = linear_cross_entropy(hidden, weight, targets, impl="chunked")
    torch.testing.assert_close(found, loss)
    torch.testing.assert_close(gradients(found, hidden, weight), gradients(loss, hidden, weight))


def test_indexed_neg_dot_shapes_and_gradient():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(7, (2, 3), generator=generator)
    assert indexed_neg_dot(hidden, weight, targets).shape == (2, 3)
    assert torch.autograd.gradcheck(lambda h, w: indexed_neg_dot(h, w, targets), (hidden, weight))
    with pytest.raises(ValueError, match="must lie in"):
        indexed_neg_dot(hidden, weight, targets - 1 - targets)
    with pytest.raises(TypeError, match="one dtype"):
        indexed_neg_dot(hidden.float(), weight, targets)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_memory_does_not_grow_with_the_logits(reduction):
    hidden, weight, _, targets = problem(512, 4096, 8, torch.float32, ignored=0)
    peaks = {}
    for impl in ("torch", "chunked"):
        with PeakTensor(ignore=(hidden.shape, weight.shape)) as memory:
            linear_cross_entropy(
                hidden, weight, targets, reduction=reduction, block_size=(8, 4096), impl=impl
            ).sum().backward()
        peaks[impl] = memory.peak_bytes
    assert peaks["torch"] >= 2 * 512 * 4096 * 4
    assert peaks["chunked"] <= 512 * 4096 * 4 / 30


def test_meta_tensors_measure_the_paper_shape():
    hidden = torch.empty(8192, 2304, device="meta", requires_grad=True)
    weight = torch.empty(256000, 2304, device="meta", requires_grad=True)
    targets = torch.empty(8192, dtype=torch.long, device="meta")
    with PeakTensor(ignore=(hidden.shape, weight.shape)) as memory:
        linear_cross_entropy(hidden, weight, targets, impl="chunked").backward()
    assert memory.peak_bytes < 40e6


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(hidden=torch.randn(4, 5)), ValueError, "hidden must be"),
        (dict(hidden=torch.randn(4, 3).long()), TypeError, "hidden must be of a floating dtype"),
        (dict(weight=torch.randn(6)), ValueError, "hidden must be"),
        (dict(weight=torch.randn(0, 3)), ValueError, "at least one row"),
        (dict(weight=torch.randn(6, 3).double()), TypeError, "one dtype"),
        (dict(weight=torch.empty(6, 3, device="meta")), ValueError, "one device"),
        (dict(bias=torch.randn(5)), ValueError, "bias must be"),
        (dict(bias=torch.randn(6).double()), TypeError, "one dtype"),
        (dict(targets=torch.zeros(5, dtype=torch.long)), ValueError, "targets must have the shape"),
        (dict(targets=torch.zeros(4)), TypeError, "integer dtype"),
        (dict(targets=torch.full((4,), 6)), ValueError, r"\[0, 6\)"),
        (dict(targets=torch.full((4,), -1)), ValueError, "ignore_index=-100"),
        (dict(reduction="max"), ValueError, "reduction must be"),
        (dict(label_smoothing=-0.1), ValueError, "label_smoothing must be"),
        (dict(label_smoothing=float("nan")), ValueError, "label_smoothing must be"),
        (dict(z_loss=-1.0), ValueError, "z_loss must be"),
        (dict(softcap=0.0), ValueError, "softcap must be positive"),
        (dict(shift=-1), ValueError, "shift must be a non-negative"),
        (dict(shift=4), ValueError, "shift must be below"),
        (dict(filter_eps="often"), ValueError, "filter_eps must be"),
        (dict(filter_eps=1.5), ValueError, "filter_eps must be"),
        (dict(block_size=(0, 4)), ValueError, "block_size must be"),
        (dict(impl="fast"), ValueError, "impl must be"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("impl", ["torch", "chunked", "triton"])
def test_bad_input_says_what_was_expected(change, error, words, impl):
    inputs = dict(
        hidden=torch.randn(4, 3), weight=torch.randn(6, 3), targets=torch.zeros(4, dtype=torch.long)
    )
    with pytest.raises(error, match=words):
        linear_cross_entropy(**{**inputs, "impl": impl, **change})
