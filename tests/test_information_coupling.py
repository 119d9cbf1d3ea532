import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.stats import entropy

from lib.book import load_reference
from lib.information import (
    binary_entropy_bits,
    cell_masses,
    ebim,
    ebim_curve,
    entropy_bits,
    majorisation_meet,
    mec_bottleneck,
    minimum_entropy_coupling,
    mutual_information_bits,
    set_partitions,
)

SLUG = "minimum-entropy-coupling"
PAPER_LAW = [0.7, 0.2, 0.1]


def laws(max_size=9):
    masses = st.lists(st.integers(0, 50), min_size=1, max_size=max_size).filter(lambda m: sum(m) > 0)
    return masses.map(lambda m: np.array(m) / sum(m))


def marginal_error(joint, p, q):
    return max(np.abs(joint.sum(-1) - p).max(), np.abs(joint.sum(-2) - q).max())


# --- entropies


def test_entropies_agree_with_scipy():
    p = np.random.default_rng(0).dirichlet(np.ones(6), 5)
    assert np.allclose(entropy_bits(p), entropy(p, base=2, axis=1))
    assert np.allclose(entropy_bits(p / 5, None), entropy((p / 5).ravel(), base=2))
    assert entropy_bits([1.0, 0.0]) == 0 and entropy_bits([0.5, 0.5]) == 1
    assert binary_entropy_bits([0.0, 0.5, 1.0]).tolist() == [0, 1, 0]


def test_mutual_information_is_the_divergence_from_independence():
    joint = np.random.default_rng(1).dirichlet(np.ones(12), 3).reshape(3, 3, 4)
    for one, value in zip(joint, mutual_information_bits(joint), strict=True):
        independent = np.outer(one.sum(1), one.sum(0))
        assert np.isclose(value, entropy(one.ravel(), independent.ravel(), base=2))


# --- couplings


@settings(max_examples=60)
@given(laws(), laws(), st.sampled_from(["max", "zero"]))
def test_couplings_keep_marginals_are_sparse_and_above_the_bound(p, q, method):
    joint = minimum_entropy_coupling(p, q, method)
    assert joint.shape == (len(p), len(q)) and (joint >= 0).all()
    assert marginal_error(joint, p, q) < 1e-12
    assert (joint > 0).sum() <= len(p) + len(q) - 1
    meet = entropy_bits(majorisation_meet(p, q))
    assert max(entropy_bits(p), entropy_bits(q)) - 1e-9 <= meet
    assert meet - 1e-9 <= entropy_bits(joint, None) <= entropy_bits(p) + entropy_bits(q) + 1e-9
    assert entropy_bits(joint, None) <= meet + np.log2(np.e) + 1e-9


def test_max_seeking_is_the_reference_singly_and_in_batches():
    couple = load_reference(SLUG, "couple")
    rng = np.random.default_rng(2)
    p, q = rng.dirichlet(np.ones(7), (4, 5)), rng.dirichlet(np.ones(3), 5)
    batch = minimum_entropy_coupling(p, q)  # (4, 5, 7) against (5, 3)
    for i in range(4):
        for j in range(5):
            assert np.array_equal(batch[i, j], couple(p[i, j], q[j]))
    ties = np.full(8, 1 / 8), np.full(4, 1 / 4)
    assert np.array_equal(minimum_entropy_coupling(*ties), couple(*ties))
    strided = rng.dirichlet(np.ones(6), 4).T[:, 1] / rng.dirichlet(np.ones(6), 4).T[:, 1].sum()
    strided = np.asfortranarray(np.stack([strided / strided.sum()] * 2, 1))[:, 0]
    assert np.array_equal(minimum_entropy_coupling(strided, q[0]), couple(strided, q[0]))
    assert minimum_entropy_coupling(np.empty((0, 3)), q[0]).shape == (0, 3, 3)


def test_inputs_are_left_alone():
    p, q = np.array([0.5, 0.5]), np.array([0.25, 0.75])
    minimum_entropy_coupling(p, q)
    minimum_entropy_coupling(p, q, "zero")
    assert p.tolist() == [0.5, 0.5] and q.tolist() == [0.25, 0.75]


def test_zero_seeking_uses_up_both_entries_where_it_can():
    p, q = [0.5, 0.3, 0.2], [0.3, 0.45, 0.25]
    joint = minimum_entropy_coupling(p, q, "zero")
    assert joint[1, 0] == 0.3  # an exact match, though larger entries were left
    assert (joint > 0).sum() <= 4


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 3), (3, 3), (3, 4)])
def test_brute_force_is_the_best_vertex(n, m):
    rng = np.random.default_rng(n + m)
    p, q = rng.dirichlet(np.ones(n)), rng.dirichlet(np.ones(m))
    joint = minimum_entropy_coupling(p, q, "brute")
    assert marginal_error(joint, p, q) < 1e-12
    best = entropy_bits(joint, None)
    margins = np.vstack([np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))])
    reached = []
    for _ in range(60):  # random linear programmes end in random vertices
        vertex = linprog(rng.normal(size=n * m), A_eq=margins, b_eq=np.concatenate([p, q]), method="highs").x
        reached.append(entropy_bits(vertex.clip(0)))
    assert best <= min(reached) + 1e-9
    again = linprog(
        -(joint.ravel() > 0).astype(float), A_eq=margins, b_eq=np.concatenate([p, q]), method="highs"
    ).x
    assert np.allclose(again.clip(0), joint.ravel(), atol=1e-9)  # its support determines it: a vertex
    for method in ("max", "zero"):
        assert best <= entropy_bits(minimum_entropy_coupling(p, q, method), None) + 1e-12


def test_brute_force_couples_equal_laws_by_the_identity_up_to_order():
    p = np.array([0.4, 0.3, 0.2, 0.1])
    assert np.isclose(entropy_bits(minimum_entropy_coupling(p, p[::-1], "brute"), None), entropy_bits(p))


# --- encoders


def test_partitions_are_counted_by_bell_numbers():
    for n, bell in ((1, 1), (2, 2), (3, 5), (5, 52), (8, 4140)):
        partitions = set_partitions(n)
        assert partitions.shape == (bell, n) and len(np.unique(partitions, axis=0)) == bell
        previous = np.maximum.accumulate(partitions, axis=1)
        assert (partitions[:, 0] == 0).all() and (partitions[:, 1:] <= previous[:, :-1] + 1).all()


def test_cell_masses_against_bincount():
    p = np.random.default_rng(3).dirichlet(np.ones(5))
    for assign in set_partitions(5)[::7]:
        assert np.allclose(cell_masses(p, assign), np.bincount(assign, p, minlength=5))


@settings(max_examples=40)
@given(laws(), st.floats(0, 3.5), st.sampled_from(["best", "absorb", "search", "huffman"]))
def test_encoders_meet_the_rate_and_the_guarantee(p, rate, method):
    found = ebim(p, rate, method)
    assert np.isclose(found["H"], entropy_bits(cell_masses(p, found["assign"])), atol=1e-12)
    assert found["I"] == found["H"] <= rate + 1e-9
    first = np.maximum.accumulate(found["assign"])
    assert found["assign"][0] == 0 and (found["assign"][1:] <= first[:-1] + 1).all()
    if method != "huffman":
        assert min(rate, entropy_bits(p)) - found["I"] <= found["gap_bound"] + 1e-9


def test_absorb_is_the_reference():
    encode = load_reference(SLUG, "encode")
    rng = np.random.default_rng(4)
    for n in (1, 2, 5, 9):
        p = rng.dirichlet(np.ones(n))
        for rate in (0.0, 0.7, 1.4, 4.0):
            expected = np.unique(encode(p, rate), return_inverse=True)[1]
            found = ebim(p, rate, "absorb")["assign"]
            same = expected[:, None] == expected[None]
            assert np.array_equal(found[:, None] == found[None], same)


def test_best_comes_close_to_all_partitions_and_never_beats_them():
    rng = np.random.default_rng(5)
    gaps = []
    for _ in range(20):
        p = rng.dirichlet(np.ones(6))
        rates = np.linspace(0.2, 2, 6)
        bits = entropy_bits(cell_masses(p, set_partitions(6)))
        found = ebim(p, rates)
        assert found["assign"].shape == (6, 6)
        gaps.extend(
            [bits[bits <= rate + 1e-12].max() - value for rate, value in zip(rates, found["I"], strict=True)]
        )
        assert np.isclose(ebim(p, rates[2])["I"], found["I"][2])
        assert all(
            (ebim(p, rates, method)["I"] <= found["I"] + 1e-9).all()
            for method in ("absorb", "search", "huffman")
        )
    assert min(gaps) >= -1e-9 and np.mean(gaps) < 0.02


def test_encoder_extremes():
    p = [0.5, 0.25, 0.25]
    assert ebim(p, 1.5)["assign"].tolist() == [0, 1, 2]  # the rate is met exactly
    assert ebim(p, 0)["assign"].tolist() == [0, 0, 0]
    assert ebim([1.0], 0)["assign"].tolist() == [0]
    assert ebim([0.0, 1.0, 0.0], 0.0)["H"] == 0
    large = np.full(512, 1 / 512)
    assert abs(ebim(large, 4.5, "search")["I"] - 4.5) < 0.05


def test_huffman_breaks_the_guarantee_that_the_others_keep():
    p = np.full(64, 1 / 64)
    found = ebim(p, 0.99, "huffman")
    assert 0.99 - found["I"] > found["gap_bound"]
    assert 0.99 - ebim(p, 0.99, "search")["I"] <= found["gap_bound"]


# --- the curve


def test_curve_couplings_are_what_they_say():
    rng = np.random.default_rng(6)
    for n in (1, 2, 3, 5):
        p = rng.dirichlet(np.ones(n))
        rates = rng.permutation(np.linspace(0, 1.1 * entropy_bits(p) + 0.1, 30))
        values, joints = ebim_curve(p, rates)
        assert joints.shape == (30, n, n + 1) and (joints >= 0).all()
        assert np.abs(joints.sum(2) - p).max() < 1e-12
        assert (entropy_bits(joints.sum(1)) <= rates + 1e-9).all()
        assert np.allclose(mutual_information_bits(joints), values, atol=1e-9)
        assert (np.diff(values[np.argsort(rates)]) >= -1e-12).all()
        assert (values <= rates + 1e-9).all() and (values >= ebim(p, rates)["I"] - 1e-9).all()


def test_curve_touches_the_rate_at_partitions_only():
    p = np.array(PAPER_LAW)
    attainable = np.sort(entropy_bits(cell_masses(p, set_partitions(3))).clip(0))
    assert np.allclose(attainable, [0, 0.4690, 0.7219, 0.8813, 1.1568], atol=5e-5)
    assert np.allclose(ebim_curve(p, attainable)[0], attainable, atol=1e-9)
    between = (attainable[1:] + attainable[:-1]) / 2
    assert (ebim_curve(p, between)[0] < between - 0.03).all()


@pytest.mark.parametrize(
    "p", [[0.42, 0.25, 0.18, 0.11, 0.04], [0.4, 0.25, 0.2, 0.1, 0.05]]
)  # the second has ties
def test_rays_beat_every_other_single_move_nearby(p):
    p, cells = np.array(p), np.array([0, 1, 0, 2, 2])
    base = p[:, None] * np.eye(4)[cells]
    start = entropy_bits(base.sum(0))
    for change in (0.01, -0.01):
        value = ebim_curve(p, [start + change], maps=cells[None])[0][0]
        for x in range(5):
            for target in range(4):
                joints = np.repeat(base[None], 4000, 0)
                mass = np.geomspace(1e-7, p[x], 4000)
                joints[:, x, cells[x]] -= mass
                joints[:, x, target] += mass
                near = entropy_bits(joints.sum(1)) <= start + change
                near &= mass < 0.02
                assert mutual_information_bits(joints[near]).max(initial=0) <= value + 1e-6


def test_curve_of_a_larger_source_starts_from_found_maps():
    p = np.random.default_rng(7).dirichlet(np.ones(12))
    rates = np.linspace(0, 3, 7)
    values, joints = ebim_curve(p, rates)
    assert (values >= ebim(p, rates)["I"] - 1e-9).all() and joints.shape == (7, 12, 13)


# --- with a bottleneck


@settings(max_examples=30)
@given(laws(6), laws(6), st.floats(0, 2.6), st.sampled_from(["max", "zero"]))
def test_bottleneck_system(p_x, p_y, rate, method):
    system = mec_bottleneck(p_x, p_y, rate, method)
    encoder, decoder, joint = system["encoder"], system["decoder"], system["joint"]
    assert np.allclose(encoder.sum(1), 1) and np.allclose(decoder.sum(1), 1)
    assert marginal_error(joint, p_x, p_y) < 1e-12
    p_t = p_x @ encoder
    assert entropy_bits(p_t) <= rate + 1e-9
    assert np.allclose(joint, p_x[:, None] * (encoder @ decoder))
    coupled = mutual_information_bits(p_t[:, None] * decoder)
    assert abs(system["I"] - coupled) < 1e-9  # a deterministic encoder loses nothing of I(Y; T)


def test_meet_by_hand():
    assert np.allclose(majorisation_meet([0.5, 0.5], [0.2, 0.6, 0.2]), [0.5, 0.3, 0.2])
    assert np.allclose(majorisation_meet([1.0], [0.25] * 4), [0.25] * 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: minimum_entropy_coupling([0.5, 0.6], [1.0]), "p must sum to 1"),
        (lambda: minimum_entropy_coupling([1.0], [1.5, -0.5]), "q must hold finite"),
        (lambda: minimum_entropy_coupling([np.nan, 1.0], [1.0]), "p must hold finite"),
        (lambda: minimum_entropy_coupling([], [1.0]), "n >= 1"),
        (lambda: minimum_entropy_coupling([1.0], [1.0], "greedy"), "method must be"),
        (lambda: minimum_entropy_coupling([[1.0]], [1.0], "zero"), "must have shape"),
        (lambda: minimum_entropy_coupling([0.1] * 10, [0.1] * 10, "brute"), "tiny laws"),
        (lambda: ebim([0.5, 0.5], -1), "rate must be"),
        (lambda: ebim([0.5, 0.5], math.nan), "rate must be"),
        (lambda: ebim([0.5, 0.5], 1, "merge"), "method must be"),
        (lambda: ebim([0.5, 0.6], 1), "p must sum to 1"),
        (lambda: ebim_curve(PAPER_LAW, [-0.1]), "rate must be"),
        (lambda: ebim_curve(PAPER_LAW, [1.0], maps=np.zeros((1, 2), dtype=int)), "maps must have shape"),
        (lambda: ebim_curve(PAPER_LAW, [1.0], maps=np.full((1, 3), 3)), "maps must have shape"),
        (lambda: mec_bottleneck([0.5], [1.0], 1), "p_x must sum to 1"),
        (lambda: majorisation_meet([1.0], [[1.0]]), "q must have shape"),
        (lambda: set_partitions(0), "n must be in"),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
