"""Histogram losses for scalar targets: against scipy, loops, closed forms and the chapter's reference cells."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from lib.book import load_reference
from lib.losses import C51Projection, HLGauss, TwoHot

SLUG = "classified-value-functions"
HEADS = (HLGauss(-2, 3, 17), TwoHot(-2, 3, 17))


def test_hl_gauss_is_the_difference_of_scipy_distribution_functions():
    head = HLGauss(-2, 3, 17, sigma_ratio=0.9)
    values = torch.linspace(-2, 3, 31, dtype=torch.float64)
    width = 5 / 17
    edges = -2 + width * torch.arange(18, dtype=torch.float64)
    cdf = torch.tensor(norm.cdf(edges, loc=values[:, None], scale=0.9 * width))
    expected = (cdf[:, 1:] - cdf[:, :-1]) / (cdf[:, -1:] - cdf[:, :1])
    torch.testing.assert_close(head.to_probs(values), expected, atol=1e-14, rtol=1e-9)
    assert head.edges.shape == (18,) and head.centers.shape == (17,)
    torch.testing.assert_close(head.centers, (edges[1:] + edges[:-1]) / 2)


def test_hl_gauss_keeps_its_digits_in_both_tails_in_float32():
    head = HLGauss(-5, 5, 50)
    single = head.to_probs(torch.zeros(1))[0]
    torch.testing.assert_close(single, single.flip(0), atol=0, rtol=2e-4)
    survival = norm.sf((head.edges[25:] / head.sigma).numpy())
    expected = torch.tensor(survival[:-1] - survival[1:])
    normal = expected > 1e-35  # above the subnormal numbers of float32
    assert normal.sum() >= 9
    torch.testing.assert_close(single[25:][normal].double(), expected[normal], atol=0, rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.floats(0.3, 1.5), st.integers(20, 90), st.floats(0, 1))
def test_hl_gauss_mean_is_the_target_up_to_the_aliasing_bound(ratio, bins, share):
    head = HLGauss(-1, 2, bins, sigma_ratio=ratio)
    width, margin = 3 / bins, 6.5 * head.sigma
    value = torch.tensor(-1 + margin + share * (3 - 2 * margin), dtype=torch.float64)
    if margin >= 1.5:  # no value is far from both ends
        return
    mean = (head.to_probs(value) * head.centers).sum()
    bound = width / math.pi * sum(math.exp(-2 * (math.pi * k * ratio) ** 2) / k for k in range(1, 9))
    assert abs(mean - value) <= bound + 1e-9


def test_hl_gauss_mean_within_a_ten_thousandth_of_a_bin():
    head = HLGauss(0, 1, 51)
    values = torch.linspace(4.5 * head.sigma, 1 - 4.5 * head.sigma, 400, dtype=torch.float64)
    mean = head.to_probs(values) @ head.centers
    assert (mean - values).abs().max() < 1e-4 / 51


def test_hl_gauss_at_the_end_is_half_a_normal_law():
    head = HLGauss(0, 1, 4000, sigma_ratio=40)  # fine bins, so that the mean is that of the half-normal law
    mean = head.to_probs(torch.tensor([0.0, 1.0], dtype=torch.float64)) @ head.centers
    expected = head.sigma * math.sqrt(2 / math.pi)
    torch.testing.assert_close(mean, torch.tensor([expected, 1 - expected], dtype=torch.float64), atol=1e-6, rtol=0)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 60), st.floats(0, 1))
def test_two_hot_mean_is_the_target(bins, share):
    head = TwoHot(-3, 1, bins)
    value = torch.tensor(-3 + 4 * share, dtype=torch.float64)
    probs = head.to_probs(value)
    assert (probs > 0).sum() <= 2 and probs.min() >= 0
    torch.testing.assert_close(probs.sum(), torch.ones((), dtype=torch.float64))
    torch.testing.assert_close((probs * head.centers).sum(), value, atol=1e-12, rtol=0)


def test_c51_against_a_double_loop():
    head = C51Projection(-2, 3, 11)
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(9, dtype=torch.float64, generator=generator) * 2
    discounts = torch.tensor([0.9, 0.0, 0.5] * 3, dtype=torch.float64)
    next_probs = torch.randn(9, 11, dtype=torch.float64, generator=generator).softmax(1)
    rewards[3:5], discounts[3:5] = 0.5, 1.0  # places that fall exactly on places
    expected = torch.zeros(9, 11, dtype=torch.float64)
    for n in range(9):
        for j in range(11):
            moved = min(max((rewards[n] + discounts[n] * head.centers[j]).item(), -2.0), 3.0)
            for i in range(11):  # the triangle of height 1 and half width 0.5 around each place
                expected[n, i] += next_probs[n, j] * max(0, 1 - abs(moved - head.centers[i].item()) / 0.5)
    probs = head.to_probs(rewards, discounts, next_probs)
    torch.testing.assert_close(probs, expected)
    torch.testing.assert_close(probs.sum(1), torch.ones(9, dtype=torch.float64))
    certain = head.to_probs(rewards, torch.zeros_like(discounts), next_probs)
    torch.testing.assert_close(certain, TwoHot(-2, 3, 11).to_probs(rewards))


@pytest.mark.parametrize("head", HEADS)
def test_loss_is_cross_entropy_with_soft_targets(head):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 3, 17, dtype=torch.float64, generator=generator, requires_grad=True)
    values = torch.randn(4, 3, dtype=torch.float64, generator=generator) * 2
    probs = head.to_probs(values)
    expected = torch.nn.functional.cross_entropy(logits.reshape(-1, 17), probs.reshape(-1, 17))
    torch.testing.assert_close(head.loss(logits, values), expected)
    torch.testing.assert_close(head(logits, values, "sum"), expected * 12)
    assert head.loss(logits, values, reduction="none").shape == (4, 3)
    (gradient,) = torch.autograd.grad(head.loss(logits, values, reduction="sum"), logits)
    torch.testing.assert_close(gradient, logits.softmax(-1) - probs)
    assert torch.autograd.gradcheck(lambda z: head.loss(z, values), (logits,))
    assert torch.autograd.gradcheck(head.to_value, (logits,))
    strided = logits.detach().transpose(0, 1)
    torch.testing.assert_close(head.loss(strided, values.T), expected.detach())


@pytest.mark.parametrize("head", HEADS)
def test_no_gradient_flows_into_the_target_and_outsiders_are_clamped(head):
    values = torch.tensor([-50.0, 1.0, 1e30], requires_grad=True)
    head.loss(torch.zeros(3, 17, requires_grad=True), values).backward()
    assert values.grad is None
    ends = torch.tensor([-2.0, 1.0, 3.0])
    torch.testing.assert_close(head.to_probs(values.detach()), head.to_probs(ends))


@pytest.mark.parametrize("head", HEADS)
def test_half_precision_vmap_and_empty(head):
    logits = torch.linspace(-3, 3, 34, dtype=torch.bfloat16).reshape(2, 17)
    values = torch.tensor([0.3, -0.7])
    assert head.loss(logits, values).dtype == torch.float32
    torch.testing.assert_close(head.loss(logits, values), head.loss(logits.float(), values))
    assert head.to_value(logits).dtype == torch.float32
    each = torch.vmap(lambda z, y: head.loss(z, y))(logits.float()[:, None], values[:, None])
    torch.testing.assert_close(each, head.loss(logits.float(), values, reduction="none"))
    assert head.loss(torch.zeros(0, 17), torch.zeros(0), reduction="none").shape == (0,)
    assert head.to_probs(torch.zeros(0)).shape == (0, 17)
    assert not head.state_dict()


def test_to_value_is_the_mean():
    head = HLGauss(-1, 1, 4)
    torch.testing.assert_close(head.to_value(torch.zeros(3, 4)), torch.zeros(3), atol=1e-7, rtol=0)
    assert head.to_value(torch.tensor([0.0, 0, 0, 50])).item() == pytest.approx(0.75)


def test_bad_input_is_named():
    for cls in (HLGauss, TwoHot, C51Projection):
        for ends in ((1, 1), (2, 1), (0, math.inf), (math.nan, 1)):
            with pytest.raises(ValueError, match="v_min"):
                cls(*ends, 5)
        with pytest.raises(ValueError, match="num_bins"):
            cls(0, 1, 1)
    for ratio in (0, -1, math.inf, math.nan):
        with pytest.raises(ValueError, match="sigma_ratio"):
            HLGauss(0, 1, 5, ratio)
    head = HLGauss(0, 1, 5)
    with pytest.raises(ValueError, match=r"\(\.\.\., 5\)"):
        head.loss(torch.zeros(2, 4), torch.zeros(2))
    with pytest.raises(ValueError, match="targets"):
        head.loss(torch.zeros(2, 5), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="finite"):
        head.to_probs(torch.tensor([0.0, math.nan]))
    with pytest.raises(ValueError, match="reduction"):
        head.loss(torch.zeros(2, 5), torch.zeros(2), reduction="average")
    with pytest.raises(TypeError, match="values"):
        head.to_probs(torch.tensor([1]))
    with pytest.raises(TypeError, match="logits"):
        head.to_value(torch.ones(5, dtype=torch.long))
    projection = C51Projection(0, 1, 5)
    with pytest.raises(ValueError, match="next_probs"):
        projection.to_probs(torch.zeros(2), torch.zeros(2), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="discounts"):
        projection.to_probs(torch.zeros(2), torch.zeros(1), torch.zeros(2, 5))
    with pytest.raises(TypeError, match="next_probs"):
        projection.to_probs(torch.zeros(2), torch.zeros(2), torch.zeros(2, 5).long())


def test_reference_cells_agree_in_value_and_gradient():
    hl_gauss_loss, histogram_mean, two_hot_probs, c51_probs = (
        load_reference(SLUG, name)
        for name in ("hl_gauss_loss", "histogram_mean", "two_hot_probs", "c51_probs")
    )
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(9, 17, dtype=torch.float64, generator=generator, requires_grad=True)
    values = torch.randn(9, dtype=torch.float64, generator=generator) * 2
    head, two = HEADS
    for ours, reference in (
        (head.loss(logits, values), hl_gauss_loss(logits, values, head.edges, head.sigma)),
        (head.to_value(logits).sum(), histogram_mean(logits, head.edges).sum()),
    ):
        torch.testing.assert_close(ours, reference)
        torch.testing.assert_close(*(torch.autograd.grad(f, logits)[0] for f in (ours, reference)))
    torch.testing.assert_close(two.to_probs(values), two_hot_probs(values, two.centers))
    discounts = torch.rand(9, dtype=torch.float64, generator=generator)
    next_probs = logits.detach().softmax(1)
    projected = C51Projection(-2, 3, 17).to_probs(values, discounts, next_probs)
    torch.testing.assert_close(projected, c51_probs(values, discounts, next_probs, two.centers))
