"""lib.attention.retention and lib.models.encoder against brute force, PyTorch's FLOP counter and the chapter's cells."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from lib.attention import (
    column_scores,
    column_scores_streaming,
    context_contribution,
    encoder_flops,
    encoder_speedup,
    keep_top,
    retention_profile,
    solve_retention,
)
from lib.book import load_reference
from lib.models import Encoder

SLUG = "adjustable-latency-encoder"


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def padding(lengths, length):
    return torch.arange(length) < torch.tensor(lengths)[:, None]


def encoder(seed=0, depth=3, **options):
    torch.manual_seed(seed)
    return Encoder(30, 12, 4, dim=16, depth=depth, num_heads=2, **options).double().eval()


def tokens(batch=3, length=12, seed=1):
    return torch.randint(30, (batch, length), generator=torch.Generator().manual_seed(seed))


# --- scores


def test_column_scores_by_hand():
    weights = torch.tensor([[[0.9, 0.1, 0.0], [0.4, 0.6, 0.0], [0.2, 0.8, 0.0]]])
    torch.testing.assert_close(column_scores(weights), torch.tensor([1.5, 1.5, 0.0]))
    mask = torch.tensor([True, True, False])
    torch.testing.assert_close(column_scores(weights, mask), torch.tensor([1.3, 0.7, 0.0]))


@pytest.mark.parametrize("block_size", [1, 3, 100])
@pytest.mark.parametrize("masked", [False, True])
def test_streaming_scores_are_column_scores(block_size, masked):
    q, k = rand(2, 3, 7, 4).requires_grad_(), rand(2, 3, 7, 4, seed=1).requires_grad_()
    mask = padding([7, 4], 7) if masked else None
    logits = q @ k.mT / 2
    if masked:
        logits = logits.masked_fill(~mask[:, None, None], -torch.inf)
    expected = column_scores(logits.softmax(-1), mask)
    ours = column_scores_streaming(q, k, token_mask=mask, block_size=block_size)
    torch.testing.assert_close(ours, expected)
    weight = rand(2, 7, seed=2)
    for a, b in zip(
        torch.autograd.grad(ours, (q, k), weight), torch.autograd.grad(expected, (q, k), weight), strict=True
    ):
        torch.testing.assert_close(a, b)
    if masked:
        torch.testing.assert_close(ours.sum(1), torch.tensor([7.0, 4.0], dtype=torch.float64))
        assert (ours[1, 4:] == 0).all()


def test_streaming_scores_half_precision_strided_and_bare():
    q, k = rand(2, 7, 3, 4).transpose(1, 2), rand(2, 7, 3, 4, seed=1).transpose(1, 2)
    half = column_scores_streaming(q.bfloat16(), k.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), column_scores_streaming(q, k), rtol=0.05, atol=0.05)
    assert column_scores_streaming(q[0], k[0]).shape == (7,)


# --- who stays


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 9), st.data())
def test_keep_top_is_the_best_set_with_the_first(seed, length, data):
    keep = data.draw(st.integers(1, length))
    scores = rand(length, seed=seed)
    kept = keep_top(scores, keep).tolist()
    sets = [(0, *rest) for rest in itertools.combinations(range(1, length), keep - 1)]
    assert tuple(kept) == max(sets, key=lambda chosen: sum(scores[i].item() for i in chosen))


def test_keep_top_leaves_padding_out():
    scores = torch.tensor([[0.1, 0.5, 0.2, 9.0], [0.1, 0.5, 0.2, 9.0]])
    mask = padding([3, 2], 4)
    assert keep_top(scores, 2, mask).tolist() == [[0, 1], [0, 1]]
    assert keep_top(scores, 3, mask)[0].tolist() == [0, 1, 2]
    assert keep_top(scores, 2).tolist() == [[0, 3], [0, 3]]


# --- how many stay


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 1.0))
def test_context_contribution_is_brute_force(seed, rho):
    scores = [rand(4, 6, seed=seed + layer).exp() for layer in range(2)]
    mask = padding([6, 5, 1, 3], 6)
    for token_mask in (None, mask):
        ours = context_contribution(scores, rho, token_mask=token_mask)
        for layer, value in zip(scores, ours, strict=True):
            shares = []
            for row in range(4):
                real = layer[row] if token_mask is None else layer[row][mask[row]]
                size = next(
                    k
                    for k in range(1, len(real) + 1)
                    if max(sum(c) for c in itertools.combinations(real.tolist(), k))
                    >= rho * real.sum().item() - 1e-9
                )
                shares.append(size / len(real))
            assert value.item() == pytest.approx(sum(shares) / 4)


def test_context_contribution_at_the_ends():
    equal, spike = torch.ones(2, 8), F.one_hot(torch.tensor([3, 5]), 8).float()
    assert context_contribution([equal, spike], 1.0).tolist() == [1.0, 0.125]
    assert context_contribution([equal], 0.5).tolist() == [0.5]


def test_profile_by_hand():
    assert retention_profile([0.8, 0.4, 0.6], 10, 1.0) == [8, 4, 4]
    assert retention_profile([0.8, 0.4, 0.6], 10, 0.5) == [4, 2, 2]
    assert retention_profile([0.8, 0.4, 0.6], 10, 9.0) == [10, 10, 10]
    assert retention_profile([0.8, 0.4, 0.6], 10, 0.0, minimum=2) == [2, 2, 2]


# --- what it costs


def test_flops_of_bert_base():
    layers = encoder_flops([128] * 12, 768, 128)
    assert layers == [24 * 128 * 768**2 + 4 * 128**2 * 768] * 12
    assert sum(layers) == 22_347_251_712


@pytest.mark.parametrize("profile", [[12, 12, 12], [9, 5, 2], [1, 1, 1]])
def test_counter_counts_what_is_predicted(profile):
    model = encoder().set_retention(profile)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens(batch=1))
    assert counter.get_total_flops() == sum(encoder_flops(profile, 16, 12)) + 2 * 16 * 4


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.05, 1.0), min_size=1, max_size=5), st.floats(1.0, 3.0))
def test_solved_profile_is_the_mildest(shares, target):
    length, dim = 17, 8
    most = encoder_speedup([1] * len(shares), dim, length)
    if target > most:
        with pytest.raises(ValueError, match="speedup must be"):
            solve_retention(shares, length, dim, target)
        return
    strength, profile, predicted = solve_retention(shares, length, dim, target)
    assert predicted >= target and profile == retention_profile(shares, length, strength)
    milder = retention_profile(shares, length, strength + 1e-6)
    if profile != [length] * len(shares):
        assert milder != profile and encoder_speedup(milder, dim, length) < target


# --- the encoder


def test_keeping_everything_changes_no_bit():
    plain, full = encoder(), encoder(retention=[12, 12, 12])
    assert torch.equal(plain(tokens()), full(tokens()))
    mask = padding([12, 7, 3], 12)
    assert torch.equal(plain(tokens(), mask), full(tokens(), mask))


def test_layer_is_torchs_own():
    model = encoder()
    theirs = torch.nn.TransformerEncoderLayer(
        16, 2, 64, dropout=0.0, activation="gelu", batch_first=True
    ).double()
    ours = model.layers[0]
    pairs = {
        "self_attn.in_proj_weight": ours.qkv.weight,
        "self_attn.in_proj_bias": ours.qkv.bias,
        "self_attn.out_proj.weight": ours.out.weight,
        "self_attn.out_proj.bias": ours.out.bias,
        **{f"norm1.{n}": p for n, p in ours.attention_norm.named_parameters()},
        **{f"norm2.{n}": p for n, p in ours.ffn_norm.named_parameters()},
        **{f"linear1.{n}": p for n, p in ours.ffn[0].named_parameters()},
        **{f"linear2.{n}": p for n, p in ours.ffn[2].named_parameters()},
    }
    theirs.load_state_dict({name: value.detach() for name, value in pairs.items()})
    hidden, mask = rand(3, 12, 16), padding([12, 7, 3], 12)
    expected = theirs(hidden, src_key_padding_mask=~mask)
    torch.testing.assert_close(ours(hidden, mask)[0][mask], expected[mask])


def test_padding_is_invisible():
    model, mask = encoder(), padding([12, 7, 3], 12)
    short = model(tokens()[1:2, :7])
    torch.testing.assert_close(model(tokens(), mask)[1:2], short)
    model.set_retention([5, 4, 2])
    torch.testing.assert_close(model(tokens(), mask)[1:2], model(tokens()[1:2, :7]))
    encoded = model.encode(tokens(), mask)
    assert (encoded.scores[0][~mask] == 0).all()
    assert encoded.hidden.shape == (3, 2, 16)


def test_vectors_leave_for_good_in_order_and_by_the_scores_of_their_layer():
    model = encoder().set_retention([7, 4, 2])
    encoded = model.encode(tokens())
    before = torch.arange(12).expand(3, -1)
    for scores, positions, count in zip(encoded.scores, encoded.positions, (7, 4, 2), strict=True):
        assert scores.shape == before.shape and positions.shape == (3, count)
        torch.testing.assert_close(positions, before.gather(1, keep_top(scores, count)))
        assert (positions[:, 0] == 0).all() and (positions.diff() > 0).all()
        before = positions
    last = model.encode(tokens()).positions[-1]
    model.set_retention([7, 4, 2], ranking=lambda scores: -torch.arange(scores.shape[1]).expand_as(scores))
    assert model.encode(tokens()).positions[-1].tolist() == [[0, 1]] * 3 != last.tolist()


def test_retention_changes_no_weight_and_back():
    model = encoder()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = model(tokens())
    model.set_retention([3, 2, 1])(tokens())
    assert torch.equal(model.set_retention(None)(tokens()), plain)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    logits, scores = model(tokens(), return_scores=True)
    assert torch.equal(logits, plain) and [s.shape for s in scores] == [(3, 12)] * 3


def test_gradient_flows_through_the_kept_only():
    torch.manual_seed(0)
    layer = encoder(depth=1).layers[0]
    hidden = rand(1, 12, 16).requires_grad_()
    out, _, kept = layer(hidden, keep=4)
    attended, _ = layer.attend(hidden)
    torch.testing.assert_close(
        out, layer.ffn_norm(attended + layer.ffn(attended))[:, kept[0]], rtol=1e-12, atol=1e-12
    )
    (gradient,) = torch.autograd.grad(out.sum(2).square().sum() + out.square().sum(), hidden)
    assert (gradient.abs().sum(2) > 0).all()  # the dropped ones still were attended to


def test_reference_cells():
    weights = rand(3, 2, 6, 6).softmax(-1)
    reference_scores = load_reference(SLUG, "column_scores")
    torch.testing.assert_close(reference_scores(weights), column_scores(weights))
    scores = [rand(5, 6, seed=s).exp() for s in range(3)]
    contribution = load_reference(SLUG, "context_contribution")
    ours = context_contribution(scores, 0.8)
    torch.testing.assert_close(contribution(scores, 0.8), ours, check_dtype=False)
    profile = load_reference(SLUG, "retention_profile")
    assert profile(ours.tolist(), 20, 0.7) == retention_profile(ours, 20, 0.7)
    assert load_reference(SLUG, "flops")([9, 5, 2], 16, 12) == encoder_flops([9, 5, 2], 16, 12)


def test_reference_layer_has_the_values_and_gradients_of_the_library():
    layer = encoder(depth=1).layers[0]
    reference = load_reference(SLUG, "EliminatingLayer")(16, 2).double()
    renamed = {
        name.replace("attention_norm", "norm1").replace("ffn_norm", "norm2"): value
        for name, value in layer.state_dict().items()
    }
    reference.load_state_dict(renamed)
    hidden = rand(3, 12, 16).requires_grad_()
    for keep in (12, 5, 1):
        ours, scores, _ = layer(hidden, keep=keep)
        theirs, their_scores = reference(hidden, keep)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(scores, their_scores)
        weight = rand(*ours.shape, seed=4)
        torch.testing.assert_close(*(torch.autograd.grad(out, hidden, weight)[0] for out in (ours, theirs)))


# --- bad input


def bad(error, match, function, *arguments, **options):
    with pytest.raises(error, match=match):
        function(*arguments, **options)


def test_bad_input():
    weights = torch.ones(1, 2, 3, 3) / 3
    bad(ValueError, "weights must be", column_scores, torch.ones(3, 3))
    bad(TypeError, "boolean", column_scores, weights, torch.ones(1, 3))
    bad(ValueError, "shape", column_scores, weights, torch.ones(1, 4, dtype=torch.bool))
    bad(ValueError, "q and k", column_scores_streaming, torch.ones(1, 2, 3, 4), torch.ones(1, 2, 4, 4))
    bad(ValueError, "block_size", column_scores_streaming, weights, weights, block_size=0)
    bad(ValueError, "keep", keep_top, torch.ones(3), 4)
    bad(ValueError, "keep", keep_top, torch.ones(3), 0)
    bad(ValueError, "rho", context_contribution, [torch.ones(2, 3)], 0.0)
    bad(ValueError, "scores", context_contribution, [])
    bad(ValueError, "scores", context_contribution, [torch.ones(3)])
    bad(ValueError, "contribution", retention_profile, [0.5, 0.0], 8, 1.0)
    bad(ValueError, "minimum", retention_profile, [0.5], 8, 1.0, minimum=9)
    bad(ValueError, "strength", retention_profile, [0.5], 8, -1.0)
    bad(ValueError, "profile", encoder_flops, [4, 5], 8, 8)
    bad(ValueError, "profile", encoder_flops, [9], 8, 8)
    bad(ValueError, "profile", encoder_flops, [], 8, 8)
    bad(ValueError, "at least 1", encoder_flops, [4], 0, 8)
    bad(ValueError, "speedup must be 1 to", solve_retention, [0.5], 8, 8, 99.0)


def test_bad_encoder_input():
    bad(ValueError, "multiple", Encoder, 9, 8, 2, dim=10, num_heads=4)
    bad(ValueError, "depth", Encoder, 9, 8, 2, depth=0)
    bad(ValueError, "retention", Encoder, 9, 8, 2, depth=2, retention=[3, 4])
    bad(ValueError, "retention", encoder().set_retention, [3, 2])
    bad(ValueError, "retention", encoder().set_retention, [3, 2, 0])
    bad(ValueError, "tokens", encoder(), tokens(length=13))
    bad(TypeError, "boolean", encoder(), tokens(), torch.ones(3, 12))
    bad(ValueError, "first token", encoder(), tokens(), torch.zeros(3, 12, dtype=torch.bool))
