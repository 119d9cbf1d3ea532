"""Binned and adaptive information against counting by hand, numpy's quantiles and the chapter's reference cells."""

import math
from collections import Counter

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.book import load_reference
from lib.information import (
    binned_mi,
    compression_score,
    ebab_edges,
    ebab_mi,
    fixed_edges,
    mutual_information_bits,
)

SLUG = "adaptive-information-estimators"


def layer_and_labels(n=200, d=4, seed=0, relu=True):
    generator = torch.Generator().manual_seed(seed)
    layer = torch.randn(n, d, generator=generator)
    return layer.relu() if relu else layer, torch.randint(0, 3, (n,), generator=generator)


def counted(rows):
    return scipy.stats.entropy(list(Counter(rows).values()), base=2)


def by_hand(layer, labels, edges):
    codes = [tuple(int(c) for c in row) for row in np.digitize(layer.numpy(), np.asarray(edges))]
    joint = counted([(code, int(y)) for code, y in zip(codes, labels, strict=True)])
    return counted(codes), counted(codes) + counted(labels.tolist()) - joint


@pytest.mark.parametrize("d", [1, 4, 70])
@pytest.mark.parametrize("low", [None, 0.0])
def test_information_is_that_of_counted_tuples(d, low):
    layer, labels = layer_and_labels(d=d)
    edges = ebab_edges(layer, 5, low)
    assert binned_mi(layer, labels, edges) == pytest.approx(by_hand(layer, labels, edges))
    assert ebab_mi(layer, labels, 5, low) == binned_mi(layer, labels, edges)
    equal = fixed_edges(-1, 1, 6)
    assert binned_mi(layer, labels, equal) == pytest.approx(by_hand(layer, labels, equal))
    strided = torch.stack([layer, layer], 2)[..., 0]
    assert not strided.is_contiguous() or d == 1
    assert ebab_mi(strided, labels, 5, low) == ebab_mi(layer, labels, 5, low)


def test_many_wide_rows_are_told_apart():
    """200 columns of 31 codes: no whole number holds the product, and one bit in the last column counts."""
    layer = torch.rand(1, 200).repeat(4, 1)
    layer[1, -1], layer[2, 0] = 2.0, 3.0
    assert ebab_mi(layer, torch.tensor([0, 1, 0, 1]), 300)[0] == pytest.approx(counted([0, 1, 2, 0]))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(-40, 40), min_size=1, max_size=120),
    st.integers(1, 12),
    st.sampled_from([None, -50.0, 0.0]),
)
def test_bins_hold_equal_numbers_of_unique_values(values, bins, low):
    layer = torch.tensor(values, dtype=torch.float64)[:, None]
    edges = ebab_edges(layer, bins, low)
    assert (edges.diff() > 0).all() and len(edges) <= bins + (low is not None)
    unique = layer.unique()
    counted_values = unique if low is None else unique[unique > low]
    held = torch.bincount(torch.bucketize(counted_values, edges, right=True)).tolist()
    held = [count for count in held if count]
    if held:
        assert max(held) - min(held) <= 1
        assert len(held) == min(bins, len(counted_values))
    if low is not None and len(counted_values):
        apart = torch.bucketize(counted_values, edges, right=True).min()
        assert apart > torch.bucketize(torch.tensor([low], dtype=torch.float64), edges, right=True)


def test_edges_are_quantiles_of_unique_values():
    layer, _ = layer_and_labels(n=300, d=3, relu=False)
    unique = np.unique(layer.numpy())
    expected = np.quantile(unique, np.arange(10) / 10, method="higher")
    found = ebab_edges(layer, 10).numpy()
    assert np.abs(np.searchsorted(unique, found) - np.searchsorted(unique, expected)).max() <= 1


def test_duplicates_do_not_move_edges_and_zeros_have_their_bin():
    layer, _ = layer_and_labels()
    more = torch.cat([layer, torch.zeros(500, 4), layer[:50]])
    assert torch.equal(ebab_edges(layer, 8, 0.0), ebab_edges(more, 8, 0.0))
    codes = torch.bucketize(layer, ebab_edges(layer, 8, 0.0), right=True)
    assert ((codes == 1) == (layer == 0)).all()


@pytest.mark.parametrize("transform", [torch.exp, torch.atan, lambda t: 100 * t + 3, lambda t: t**3])
def test_only_ranks_matter(transform):
    layer, labels = layer_and_labels(relu=False)
    layer = layer.double()
    assert ebab_mi(transform(layer), labels, 7) == ebab_mi(layer, labels, 7)
    low = -1.0
    moved = float(transform(torch.tensor(low, dtype=torch.float64)))
    assert ebab_mi(transform(layer), labels, 7, moved) == ebab_mi(layer, labels, 7, low)


def test_edges_are_shared_by_the_neurons():
    """Per-neuron edges would split a quiet neuron too; shared edges leave it in one bin."""
    loud = torch.linspace(1, 2, 64)
    layer = torch.stack([loud, torch.full((64,), 0.5) + torch.arange(64) * 1e-4], 1)
    labels = torch.arange(64) % 2
    assert ebab_mi(layer[:, 1:], labels, 2)[0] == 1.0
    assert ebab_mi(layer, labels, 2)[0] == 0.0  # 64 quiet values in one bin, 64 loud ones in the other


def test_limits():
    labels = torch.arange(4096) % 2
    assert ebab_mi(torch.ones(4096, 3), labels) == (0.0, 0.0)
    grid = ((torch.arange(4096)[:, None] >> torch.arange(12)) & 1).float()
    assert ebab_mi(grid, labels) == (12.0, 1.0)
    assert ebab_mi(torch.zeros(5, 2), torch.arange(5), low=0.0) == (0.0, 0.0)
    assert ebab_mi(torch.tensor([[1.0]]), torch.tensor([0])) == (0.0, 0.0)


def test_repeated_inputs_give_the_information_of_a_discrete_channel():
    joint = np.array([[4, 1, 1], [0, 2, 8]])
    x, t = (torch.tensor(part) for part in np.nonzero(joint))
    repeats = torch.tensor(joint[joint > 0])
    x, t = x.repeat_interleave(repeats), t.repeat_interleave(repeats).float()[:, None]
    ixt, ity = ebab_mi(t, x, inputs=x)
    assert ixt == ity == pytest.approx(mutual_information_bits(joint / joint.sum()))
    assert ebab_mi(t, x)[0] > ixt


def test_compression_score():
    assert compression_score([1.0, 4.0, 3.0]) == 0.25
    assert compression_score([1.0, 4.0]) == 0.0 and compression_score([0.0, 0.0]) == 0.0
    np.testing.assert_allclose(compression_score([[2.0, 0.0], [1.0, 1.0]]), [1.0, 0.0])
    for bad in ([], 3.0, [-1.0], [math.nan]):
        with pytest.raises(ValueError):
            compression_score(bad)


def test_bad_input():
    layer, labels = layer_and_labels(n=6)
    for bad in (layer.long(), "layer"):
        with pytest.raises(TypeError, match="floating"):
            ebab_edges(bad)
    for bad in (torch.empty(0, 3), torch.tensor([[math.nan]])):
        with pytest.raises(ValueError):
            ebab_edges(bad)
    for bins in (0, 2.5, True):
        with pytest.raises(ValueError, match="bins"):
            ebab_edges(layer, bins)
    with pytest.raises(ValueError, match="low"):
        ebab_edges(layer, low=math.inf)
    for limits in ((1, 1), (0, math.inf)):
        with pytest.raises(ValueError, match="low"):
            fixed_edges(*limits)
    with pytest.raises(TypeError, match="labels"):
        binned_mi(layer, labels.float(), fixed_edges(0, 1))
    with pytest.raises(ValueError, match="labels"):
        binned_mi(layer, labels[:3], fixed_edges(0, 1))
    with pytest.raises(ValueError, match="inputs"):
        binned_mi(layer, labels, fixed_edges(0, 1), labels[:3])
    with pytest.raises(ValueError, match="ascending"):
        binned_mi(layer, labels, torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize("low", [None, 0.0])
def test_reference_agrees(low):
    namespace = load_reference(SLUG, "ebab_information")
    layer, labels = layer_and_labels()
    assert namespace(layer, labels, 7, low) == pytest.approx(ebab_mi(layer, labels, 7, low))
