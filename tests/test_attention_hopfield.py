"""lib.attention against torch's attention, SciPy, finite differences, closed forms and the chapter's reference cells."""

import math

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.attention import (
    Hopfield,
    HopfieldLayer,
    HopfieldPooling,
    fixed_point_kind,
    hopfield_capacity,
    hopfield_energy,
    hopfield_retrieve,
    online_softmax_update,
)
from lib.book import load_reference
from lib.train import PeakTensor

SLUG = "hopfield-attention"
both = pytest.mark.parametrize("impl", ["torch", "streaming"])


def tensors(*shapes, dtype=torch.float64, seed=0, grad=True):
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes]
    return [tensor.requires_grad_(grad) for tensor in made]


def orthonormal(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator)).Q


# --- retrieval


@both
@pytest.mark.parametrize("masked", [False, True])
def test_one_step_is_torch_attention(impl, masked):
    q, k, v = tensors((2, 3, 5, 8), (2, 3, 37, 8), (2, 3, 37, 4))
    mask = None
    if masked:
        mask = torch.rand(2, 1, 5, 37, generator=torch.Generator().manual_seed(1)) > 0.5
        mask[..., 0] = True
    ours, info = hopfield_retrieve(q, k, values=v, mask=mask, impl=impl, block_size=8)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(ours, theirs)
    assert info["steps"].tolist() == [1, 1, 1] and torch.equal(info["query"], q)
    weight = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, (q, k, v), weight),
        torch.autograd.grad(theirs, (q, k, v), weight),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@both
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_agrees_with_the_reference_cell(impl, steps):
    reference = load_reference(SLUG, "retrieve")
    q, k, v = tensors((4, 6, 8), (4, 50, 8), (4, 50, 3))
    for values in (None, v):
        ours, info = hopfield_retrieve(q, k, values=values, beta=0.7, steps=steps, impl=impl, block_size=16)
        theirs = reference(q, k, 0.7, steps=steps, values=values)
        torch.testing.assert_close(ours, theirs)
        assert (info["steps"] == steps).all()
        inputs = (q, k) if values is None else (q, k, v)
        weight = torch.randn_like(ours)
        for a, b in zip(
            torch.autograd.grad(ours, inputs, weight),
            torch.autograd.grad(theirs, inputs, weight),
            strict=True,
        ):
            torch.testing.assert_close(a, b)
    resting, _ = hopfield_retrieve(q, k, beta=2.0, steps=None, tol=1e-8, impl=impl, block_size=16)
    torch.testing.assert_close(resting, reference(q, k, 2.0, steps=None, tol=1e-8), atol=1e-6, rtol=0)


@both
def test_gradients_by_finite_differences_with_mask_and_beta_of_each_head(impl):
    q, k, v, b = tensors((2, 3, 2, 4), (3, 7, 4), (2, 1, 7, 3), (3,))
    mask = torch.rand(2, 1, 2, 7, generator=torch.Generator().manual_seed(2)) > 0.4
    mask[0, 0, 0] = False  # a state that sees nothing

    def run(q, k, v, b):
        return hopfield_retrieve(q, k, values=v, beta=b.exp(), mask=mask, steps=3, impl=impl, block_size=3)[0]

    assert torch.autograd.gradcheck(run, (q, k, v, b))
    assert (run(q, k, v, b)[0, :, 0] == 0).all()


@both
@pytest.mark.parametrize(
    "dtype, atol", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)]
)
def test_precision(impl, dtype, atol):
    q, k = tensors((3, 9, 16), (3, 70, 16), dtype=dtype)
    ours, info = hopfield_retrieve(q, k, steps=2, impl=impl, block_size=32)
    assert ours.dtype == dtype and info["query"].dtype == dtype
    exact, _ = hopfield_retrieve(q.double(), k.double(), steps=2, impl="torch")
    torch.testing.assert_close(ours.double(), exact, atol=atol, rtol=0)
    gradients = [
        torch.autograd.grad(result.double().square().sum(), (q, k), retain_graph=True)
        for result in (ours, exact)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a.double(), b.double(), atol=8 * atol, rtol=2e-2)


@both
def test_large_scores_do_not_overflow(impl):
    q, k = (tensor * 1e3 for tensor in tensors((4, 8), (30, 8), dtype=torch.float32, grad=False))
    ours, _ = hopfield_retrieve(q, k, beta=1.0, impl=impl, block_size=7)
    torch.testing.assert_close(ours, k[(q @ k.T).argmax(1)])


def test_each_head_stops_by_itself():
    patterns, betas = orthonormal(8), torch.tensor([1.0, 6.0, 7.5, 30.0], dtype=torch.float64)
    mean = patterns.mean(0)
    start = (mean + 0.01 * (patterns[:3] - mean)).expand(4, 3, 8)
    together, info = hopfield_retrieve(start, patterns, beta=betas, steps=None, tol=1e-7)
    assert len(set(info["steps"].tolist())) == 4
    for head, beta in enumerate(betas.tolist()):
        alone, one = hopfield_retrieve(start[head], patterns, beta=beta, steps=None, tol=1e-7)
        torch.testing.assert_close(together[head], alone, atol=1e-12, rtol=0)
        assert one["steps"].item() == info["steps"][head].item()
        again, _ = hopfield_retrieve(alone, patterns, beta=beta)
        assert (again - alone).norm(dim=1).max() < 1e-7
    assert (info["change"] < 1e-7).all()


def test_one_head_that_travels_is_not_hidden_by_many_that_rest():
    patterns = orthonormal(8)
    start = patterns.mean(0).expand(50, 1, 8).clone()  # 50 heads at a fixed point
    start[17] += 0.01 * (patterns[0] - patterns.mean(0))
    end, info = hopfield_retrieve(start, patterns, beta=20.0, steps=None, tol=1e-6)
    assert info["steps"][17] > 3 and (info["steps"].sum() - info["steps"][17]) == 49 * 2
    assert fixed_point_kind(end, patterns, 20.0)[1][17] == ["single"]


def test_gradient_through_convergence_is_that_of_the_fixed_point():
    # by the implicit function theorem d xi*/d beta = (1 - J)^-1 df/dbeta; for patterns +1 and -1, f = tanh(beta xi)
    beta = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    pair = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    end, _ = hopfield_retrieve(pair[:1] * 0.5, pair, beta=beta, steps=None, tol=1e-12)
    (ours,) = torch.autograd.grad(end.sum(), beta)
    slope = 1 - end.item() ** 2
    assert abs(ours.item() - slope * end.item() / (1 - 2 * slope)) < 1e-8


def test_streaming_keeps_no_weights():
    q, k = tensors((16, 8), (4096, 8), dtype=torch.float32)
    peaks = {}
    for impl in ("torch", "streaming"):
        with PeakTensor(ignore=(q.shape, k.shape)) as memory:
            hopfield_retrieve(q, k, impl=impl, block_size=128)[0].sum().backward()
        peaks[impl] = memory.largest_bytes
    assert peaks["torch"] >= 4 * 16 * 4096 and peaks["streaming"] < 4 * 16 * 4096 / 8


def test_auto_streams_beyond_a_block(monkeypatch):
    from lib.attention import hopfield

    used = []
    monkeypatch.setattr(hopfield, "_stream", lambda q, *rest: used.append("streaming") or q)
    q, k = tensors((2, 4), (10, 4))
    hopfield_retrieve(q, k, block_size=10)
    assert used == []
    hopfield_retrieve(q, k, block_size=9)
    assert used == ["streaming"]


@both
def test_shapes(impl):
    for lead_q, lead_k, lead in [((), (), ()), ((3,), (), (3,)), ((2, 1), (5,), (2, 5)), ((), (4,), (4,))]:
        q, k, v = tensors((*lead_q, 6, 8), (*lead_k, 11, 8), (11, 2))
        assert hopfield_retrieve(q, k, values=v, impl=impl, steps=2)[0].shape == (*lead, 6, 2)
        assert hopfield_energy(q, k).shape == (*lead, 6)
        assert hopfield_retrieve(q, k, impl=impl)[1]["steps"].shape == lead[-1:]
    q, k = tensors((0, 8), (11, 8))
    assert hopfield_retrieve(q, k, impl=impl, steps=None)[0].shape == (0, 8)
    q, k = tensors((8, 6), (8, 11))  # not contiguous
    torch.testing.assert_close(
        hopfield_retrieve(q.T, k.T, impl=impl, block_size=4)[0],
        hopfield_retrieve(q.T.contiguous(), k.T.contiguous(), impl="torch")[0],
    )


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"beta": 0.0}, ValueError, "beta must be a positive"),
        ({"beta": torch.ones(2)}, ValueError, r"beta must be a number or \(heads,\)"),
        ({"steps": 0}, ValueError, "steps must be a positive integer"),
        ({"steps": 1.5}, ValueError, "steps must be a positive integer"),
        ({"tol": 0.0}, ValueError, "tol, max_steps and block_size"),
        ({"impl": "fast"}, ValueError, "impl must be 'auto' or one of"),
        ({"mask": torch.ones(5, 9)}, TypeError, "boolean"),
        ({"mask": torch.ones(5, 8, dtype=torch.bool)}, ValueError, "do not broadcast"),
        ({"mask": torch.ones(4, 9, dtype=torch.bool)}, ValueError, "do not broadcast"),
        ({"values": torch.ones(8, 3)}, ValueError, "8 values for 9 stored"),
        ({"state": torch.ones(5, 3)}, ValueError, "same d"),
        ({"state": torch.ones(4)}, ValueError, "shape"),
        ({"state": torch.ones(5, 4, dtype=torch.long)}, TypeError, "floating-point"),
        ({"stored": torch.ones(0, 4)}, ValueError, "no patterns"),
        ({"state": torch.ones(2, 5, 4), "stored": torch.ones(3, 9, 4)}, ValueError, "do not broadcast"),
    ],
)
def test_bad_input(change, error, words):
    arguments = {"state": torch.randn(5, 4), "stored": torch.randn(9, 4)} | change
    with pytest.raises(error, match=words):
        hopfield_retrieve(**arguments)


def test_no_convergence_is_an_error():
    patterns = orthonormal(4)
    start = patterns.mean(0, keepdim=True) + 1e-3 * patterns[:1]
    with pytest.raises(RuntimeError, match=r"heads \[0\] have not converged after 3 steps"):
        hopfield_retrieve(start, patterns, beta=4.5, steps=None, tol=1e-12, max_steps=3)


# --- the online softmax


@settings(max_examples=30)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.integers(0, 1000))
def test_online_softmax_over_any_blocks(blocks, seed):
    generator = torch.Generator().manual_seed(seed)
    total = sum(blocks)
    scores = torch.randn(3, total, generator=generator, dtype=torch.float64) * 20
    scores[torch.rand(3, total, generator=generator) < 0.3] = -torch.inf
    values = torch.randn(total, 2, generator=generator, dtype=torch.float64)
    m, l, acc = torch.full((3,), -torch.inf).double(), torch.zeros(3).double(), torch.zeros(3, 2).double()
    for s, v in zip(scores.split(blocks, 1), values.split(blocks, 0), strict=True):
        m, l, acc = online_softmax_update(m, l, acc, s, v)
    seen = (scores > -torch.inf).any(1)
    assert (l[~seen] == 0).all() and (acc[~seen] == 0).all() and (m[~seen] == -torch.inf).all()
    torch.testing.assert_close((acc / l[:, None])[seen], scores[seen].softmax(1) @ values)
    torch.testing.assert_close((m + l.log())[seen], scores[seen].logsumexp(1))


def test_online_softmax_gradients_and_errors():
    scores, values = tensors((2, 6), (6, 3))

    def run(scores, values):
        m, l, acc = torch.full((2,), -torch.inf).double(), torch.zeros(2).double(), torch.zeros(2, 3).double()
        for part in (slice(0, 4), slice(4, 6)):
            m, l, acc = online_softmax_update(m, l, acc, scores[:, part], values[part])
        return acc / l[:, None], m + l.log()

    assert torch.autograd.gradcheck(run, (scores, values))
    zeros = torch.zeros(2)
    with pytest.raises(ValueError, match="do not fit together"):
        online_softmax_update(zeros, zeros, torch.zeros(2, 3), torch.zeros(2, 5), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="one shape"):
        online_softmax_update(zeros, torch.zeros(3), torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(4, 3))


def test_reference_of_the_online_softmax():
    q, k, v = tensors((2, 5, 8), (2, 40, 8), (2, 40, 3), dtype=torch.float32, grad=False)
    ours, _ = hopfield_retrieve(q, k, values=v, beta=0.4, impl="streaming", block_size=16)
    torch.testing.assert_close(ours, load_reference(SLUG, "online_attention")(q, k, v, 0.4, block=16))


# --- energy


def test_energy_bounds_gradient_and_descent():
    (X,) = tensors((20, 6), grad=False)
    M = X.norm(dim=1).max()
    generator = torch.Generator().manual_seed(3)
    direction = F.normalize(torch.randn(100, 6, dtype=torch.float64, generator=generator), dim=1)
    xi = (direction * M * torch.rand(100, 1, dtype=torch.float64, generator=generator)).requires_grad_()
    reference = load_reference(SLUG, "energy")
    for beta in (0.05, 0.5, 5.0):
        E = hopfield_energy(xi, X, beta)
        torch.testing.assert_close(E, reference(xi, X, beta))
        assert E.min() >= 0 and E.max() <= 2 * M**2
        new, _ = hopfield_retrieve(xi, X, beta=beta)
        torch.testing.assert_close(torch.autograd.grad(E.sum(), xi)[0], xi - new)
        drop = E - hopfield_energy(new, X, beta)
        assert (drop >= (new - xi).square().sum(1) / 2 - 1e-9).all()


def test_energy_with_a_mask_is_that_of_the_visible_patterns():
    state, X = tensors((3, 5), (9, 5), grad=False)
    mask = torch.tensor([True] * 4 + [False] * 5)
    torch.testing.assert_close(hopfield_energy(state, X, 0.8, mask=mask), hopfield_energy(state, X[:4], 0.8))
    assert hopfield_energy(state, X, 0.8, mask=torch.zeros(9, dtype=torch.bool)).tolist() == [math.inf] * 3


def test_minimising_the_energy_finds_the_same_fixed_point():
    (X,) = tensors((30, 8), grad=False)
    X = 3 * F.normalize(X, dim=1)
    for i in range(3):
        start = X[i] + 0.1
        found = scipy.optimize.minimize(
            lambda v: hopfield_energy(torch.tensor(v)[None], X, 1.5).item(), start.numpy(), tol=1e-10
        )
        end, _ = hopfield_retrieve(start[None], X, beta=1.5, steps=None, tol=1e-10)
        np.testing.assert_allclose(found.x, end[0].numpy(), atol=1e-4)


# --- capacity


def test_capacity_of_the_paper():
    reference = load_reference(SLUG, "capacity")
    for (d, K), printed, sign in (((20, 3.0), 3.1546, 1.27), ((75, 1.0), 1.3718, -0.94)):
        ours = hopfield_capacity(d, K, 1.0, 0.001)
        assert printed <= ours["c"] < printed + 1e-4 and ours["proven"]
        assert abs(ours["a_plus_log_b"] - sign) < 0.005
        c, n = reference(d, K, 1.0, 0.001)
        assert math.isclose(ours["c"], c) and math.isclose(ours["n_patterns"], n)


@settings(max_examples=50)
@given(st.integers(2, 300), st.floats(0.3, 5), st.floats(0.1, 5), st.floats(1e-4, 1))
def test_capacity_solves_its_equation_and_agrees_with_lambertw(d, K, beta, p):
    ours = hopfield_capacity(d, K, beta, p)
    a = 2 / (d - 1) * (1 + math.log(2 * beta * K**2 * p * (d - 1)))
    b = 2 * K**2 * beta / 5
    assert math.isclose(b / ours["c"], a + math.log(ours["c"]), rel_tol=1e-9, abs_tol=1e-9)
    assert math.isclose(ours["c"], b / scipy.special.lambertw(math.exp(a + math.log(b))).real, rel_tol=1e-8)


def test_capacity_at_the_edges():
    many = hopfield_capacity(100_000, 40.0, 1.0, 0.001)
    assert many["n_patterns"] == math.inf and many["log_n_patterns"] > 709 and math.isfinite(many["c"])
    huge = hopfield_capacity(20, 1e154, 1.0, 0.001)  # exp(a + log b) is beyond float64
    assert huge["a_plus_log_b"] > 710 and math.isfinite(huge["c"])
    # at tiny beta everything satisfies (13), and all fixed points are the mean
    vacuous = hopfield_capacity(20, 1.0, 1e-9, 0.001)
    assert vacuous["n_patterns"] > 1000 and not vacuous["proven"]
    assert not hopfield_capacity(20, 1.0, 1.0, 0.001)["proven"]
    for bad in (
        (1, 1, 1, 0.1),
        (5, 0, 1, 0.1),
        (5, 1, -1, 0.1),
        (5, 1, 1, 0),
        (5, 1, 1, 1.5),
        (5, math.inf, 1, 0.1),
    ):
        with pytest.raises(ValueError, match="need d >= 2"):
            hopfield_capacity(*bad)


# --- kinds of fixed point


def test_kinds():
    patterns = orthonormal(10)
    mean = patterns.mean(0)
    pair = patterns[:2].mean(0)
    state = torch.stack([mean, pair, patterns[0]])
    k, kinds = fixed_point_kind(state, patterns, 50.0)
    assert k.tolist() == [9, 2, 1] and kinds == ["global", "metastable", "single"]
    k, _ = fixed_point_kind(mean[None], patterns, 1.0, mass=1.0)
    assert k.item() == 10
    k, _ = fixed_point_kind(mean[None], patterns, 1.0, mass=0.91)
    assert k.item() == 10
    mask = torch.arange(10) < torch.tensor([[2], [1], [0]])
    k, kinds = fixed_point_kind(mean.expand(3, 10), patterns, 1.0, mask=mask)
    assert k.tolist() == [2, 1, 0] and kinds == ["global", "single", "none"]
    with pytest.raises(ValueError, match="mass"):
        fixed_point_kind(state, patterns, 1.0, mass=0.0)


@settings(max_examples=40)
@given(st.integers(1, 30), st.floats(0.05, 0.999), st.integers(0, 1000))
def test_k_is_the_least_number_that_reaches_the_mass(n, mass, seed):
    q, k = tensors((5, 6), (n, 6), seed=seed, grad=False)
    ours, _ = fixed_point_kind(q, k, 1.0, mass)
    for state, count in zip(q, ours.tolist(), strict=True):
        weights = torch.softmax(k @ state, 0).sort(descending=True).values.cumsum(0)
        assert weights[count - 1] >= mass - 1e-12 and (count == 1 or weights[count - 2] < mass)


@pytest.mark.parametrize("n", [2, 5, 12])
def test_the_mean_attracts_below_beta_n_only(n):
    patterns = orthonormal(n)
    mean = patterns.mean(0)
    start = (mean + 1e-4 * (patterns[0] - patterns[1]))[None]
    for factor, attracts in ((0.98, True), (1.02, False)):
        end, _ = hopfield_retrieve(start, patterns, beta=factor * n, steps=200)
        assert ((end - mean).norm() < 1e-4) == attracts


# --- layers


@pytest.mark.parametrize("values", ["connected", "free"])
def test_hopfield_layer_by_hand(values):
    torch.manual_seed(0)
    layer = Hopfield(
        6, num_heads=2, hidden_size=5, value_size=4, output_size=3, values=values, steps=2
    ).double()
    R, Y = tensors((2, 3, 6), (2, 7, 6), grad=False)
    q = layer.query(layer.state_norm(R)).view(2, 3, 2, 5)
    k = layer.key(layer.stored_norm(Y)).view(2, 7, 2, 5)
    raw = layer.projection_norm(Y)
    joined = []
    for head in range(2):
        source = layer.key(raw).view(2, 7, 2, 5)[:, :, head] if values == "connected" else raw
        state = q[:, :, head]
        for _ in range(1):
            state = torch.softmax(state @ k[:, :, head].mT / math.sqrt(5), -1) @ k[:, :, head]
        weights = torch.softmax(state @ k[:, :, head].mT / math.sqrt(5), -1)
        torch.testing.assert_close(layer.association(R, Y)[:, head], weights)
        joined.append(weights @ (source @ layer.value[head]))
    torch.testing.assert_close(layer(R, Y), layer.out(torch.cat(joined, -1)))


def test_layer_agrees_with_the_reference_cell():
    torch.manual_seed(0)
    reference = load_reference(SLUG, "HopfieldAttention")(6, 4, steps=3)
    layer = Hopfield(
        6, hidden_size=4, value_size=6, steps=3, bias=False, learn_beta=True,
        normalize_state=False, normalize_stored=False, normalize_projection=False,
    )  # fmt: skip
    with torch.no_grad():
        layer.query.weight.copy_(reference.query.weight)
        layer.key.weight.copy_(reference.key.weight)
        layer.value.copy_(reference.value.weight.T[None])
        layer.out.weight.copy_(torch.eye(6))
    R, Y = tensors((2, 3, 6), (2, 7, 6), dtype=torch.float32, grad=False)
    ours, theirs = layer(R, Y), reference(R, Y)
    torch.testing.assert_close(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    torch.testing.assert_close(layer.key.weight.grad, reference.key.weight.grad)
    torch.testing.assert_close(layer.log_beta.grad[0], reference.log_beta.grad)


def test_each_head_keeps_its_own_beta():
    torch.manual_seed(0)
    layer = Hopfield(8, num_heads=2, beta=torch.tensor([1e-6, 50.0]))
    weights = layer.association(torch.randn(1, 4, 8), torch.randn(1, 9, 8))
    torch.testing.assert_close(weights[:, 0], torch.full((1, 4, 9), 1 / 9), atol=1e-4, rtol=0)
    assert weights[:, 1].amax(-1).min() > 0.6
    assert not layer.log_beta.requires_grad and Hopfield(8, learn_beta=True).log_beta.requires_grad


@pytest.mark.parametrize("steps", [1, 3, None])
def test_padding_makes_no_difference(steps):
    torch.manual_seed(0)
    pooling = HopfieldPooling(8, quantity=2, num_heads=2, steps=steps)
    bag = torch.randn(2, 6, 8)
    bag[1, 4:] = 100.0
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    torch.testing.assert_close(
        pooling(bag, mask=mask)[1], pooling(bag[1:, :4])[0], atol=2e-3 if steps is None else 1e-5, rtol=0
    )
    weights = pooling.association(bag, mask=mask)
    assert weights.shape == (2, 2, 2, 6) and (weights[1, ..., 4:] == 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 2))
    order = torch.randperm(6)
    if steps is not None:  # a set has no order
        torch.testing.assert_close(pooling(bag[:, order], mask=mask[:, order]), pooling(bag, mask=mask))


def test_lookup_table():
    table = HopfieldLayer(6, 10, values="free", projection_size=3, output_size=2, num_heads=3)
    state = torch.randn(4, 5, 6)
    result = table(state)
    assert result.shape == (4, 5, 2) and table.association(state).shape == (4, 3, 5, 10)
    result.sum().backward()
    assert table.stored.grad.abs().sum() > 0 and table.projection.grad.abs().sum() > 0
    assert HopfieldLayer(6, 10).projection is None


def test_layer_masks_and_bad_layers():
    layer = Hopfield(6)
    state, stored = torch.randn(2, 3, 6), torch.randn(2, 7, 6)
    mask = torch.rand(2, 3, 7) > 0.3
    mask[..., 0] = True
    assert ((layer.association(state, stored, mask=mask)[:, 0] > 0) == mask).all()
    assert layer(state).shape == state.shape
    with pytest.raises(ValueError, match="mask must be"):
        layer(state, stored, mask=torch.ones(7, dtype=torch.bool))
    for arguments, words in [
        ({"input_size": 6, "num_heads": 4}, "multiple of num_heads"),
        ({"input_size": 6, "values": "mine"}, "values must be"),
        ({"input_size": 6, "projection_size": 3}, "connected values"),
        ({"input_size": 6, "beta": -1.0}, "beta must be positive"),
        ({"input_size": 6, "output_size": 0}, "at least 1"),
    ]:
        with pytest.raises(ValueError, match=words):
            Hopfield(**arguments)
    with pytest.raises(ValueError, match="quantity"):
        HopfieldPooling(6, quantity=0)
    with pytest.raises(ValueError, match="num_stored"):
        HopfieldLayer(6, 0)
