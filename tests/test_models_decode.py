"""lib.models.decode against brute force, and the encoder-decoder of lib.models.gru."""

import itertools
import math

import pytest
import torch

from lib.book import load_reference
from lib.models import GPT, Seq2Seq
from lib.models.decode import (
    ancestral_sample,
    beam_search,
    edit_similarity,
    exact_map,
    greedy,
    minimum_bayes_risk,
    select_rows,
    strip_end,
    transform_step,
)

SYMBOLS, LENGTH, END = 6, 5, 5
CALL = dict(start=0, end=END, max_length=LENGTH)


def random_model(seed, sharpness=2.0):
    """Logits that depend on the whole prefix; the prefix is the state."""
    table = sharpness * torch.randn(SYMBOLS**LENGTH, SYMBOLS, generator=torch.Generator().manual_seed(seed))
    powers = SYMBOLS ** torch.arange(LENGTH)

    def step(tokens, prefix):
        prefix = torch.cat([prefix, tokens[:, None]], 1)
        return table[(prefix * powers[: prefix.shape[1]]).sum(1)].double(), prefix

    return step


def empty_prefix(rows=1):
    return torch.zeros(rows, 0, dtype=torch.long)


def sequence_log_prob(step, sequence):
    state, total, last = empty_prefix(), 0.0, 0
    for token in sequence:
        logits, state = step(torch.tensor([last]), state)
        total, last = total + torch.log_softmax(logits, 1)[0, token].item(), token
    return total


def every_sequence():
    """All finished sequences of at most LENGTH tokens, the end token counted."""
    for length in range(LENGTH):
        for body in itertools.product(range(SYMBOLS - 1), repeat=length):
            yield (*body, END)


def brute_force(step):
    return max((sequence_log_prob(step, s), s) for s in every_sequence())


@pytest.mark.parametrize("seed", range(3))
def test_exact_map_is_brute_force(seed):
    step = random_model(seed)
    log_prob, sequence = brute_force(step)
    found = exact_map(step, empty_prefix(), **CALL)
    assert found.tokens[0].tolist() == list(sequence)
    assert found.log_prob.item() == pytest.approx(log_prob, abs=1e-10)
    wide = beam_search(step, empty_prefix(), SYMBOLS**LENGTH, **CALL)
    assert wide.tokens[0, : len(sequence)].tolist() == list(sequence)
    assert wide.log_prob.item() == pytest.approx(log_prob, abs=1e-10)
    reference = load_reference("utility-probability-duality", "most_probable")

    def next_log_probs(prefix):
        last, state = 0, empty_prefix()
        for token in (*prefix, None):
            logits, state = step(torch.tensor([last]), state)
            last = token
        return torch.log_softmax(logits, 1)[0].tolist()

    value, best = reference(next_log_probs, END, LENGTH)
    assert best == sequence and value == pytest.approx(log_prob, abs=1e-10)


def test_rows_do_not_disturb_each_other():
    step = random_model(4)
    starts = torch.tensor([0, 1, 2, 3])
    call = CALL | {"start": starts}
    searches = [
        lambda state, call: greedy(step, state, **call),
        lambda state, call: beam_search(step, state, 3, **call),
        lambda state, call: beam_search(step, state, 3, length_penalty=0.7, **call),
        lambda state, call: exact_map(step, state, **call),
    ]
    for search in searches:
        together = search(empty_prefix(4), call)
        for row in range(4):
            alone = search(empty_prefix(), call | {"start": starts[row : row + 1]})
            assert strip_end(alone.tokens, END) == strip_end(together.tokens[row : row + 1], END)
            torch.testing.assert_close(alone.log_prob[0], together.log_prob[row])


@pytest.mark.parametrize("seed", range(4))
def test_width_one_is_greedy_and_scores_are_right(seed):
    step = random_model(seed, sharpness=1.0)
    first, beam = greedy(step, empty_prefix(), **CALL), beam_search(step, empty_prefix(), 1, **CALL)
    assert first.tokens.tolist() == beam.tokens.tolist()
    for found in (first, beam, beam_search(step, empty_prefix(), 4, **CALL)):
        body = strip_end(found.tokens, END)[0]
        closed = (*body, END) if END in found.tokens[0] else body
        assert found.log_prob.item() == pytest.approx(sequence_log_prob(step, closed), abs=1e-9)


def test_beam_by_a_plain_twin():
    """The same search on lists: finished hypotheses compete with their score."""
    for seed, k, penalty in itertools.product(range(3), (2, 3, 7), (None, 1.0)):
        step = random_model(seed, sharpness=1.0)

        def score(item, penalty=penalty):
            return item[0] if penalty is None else item[0] / len(item[1]) ** penalty

        beam = [(0.0, ())]
        for _ in range(LENGTH):
            grown = []
            for total, sequence in beam:
                if sequence and sequence[-1] == END:
                    grown.append((total, sequence))
                else:
                    grown += [
                        (sequence_log_prob(step, (*sequence, token)), (*sequence, token))
                        for token in range(SYMBOLS)
                    ]
            beam = sorted(grown, key=score, reverse=True)[:k]
        finished = [item for item in beam if item[1][-1] == END] or beam
        best = max(finished, key=score)
        found = beam_search(step, empty_prefix(), k, length_penalty=penalty, **CALL)
        assert found.tokens[0, : len(best[1])].tolist() == list(best[1])
        assert found.log_prob.item() == pytest.approx(best[0], abs=1e-9)


def test_empty_output_and_its_threshold():
    """One step decides about the empty output; exact search prefers it from the predicted length on, greedy never."""
    r, a = 0.06, 0.7

    def step(tokens, state):  # state: position and length
        place, length = state[:, 0], state[:, 1]
        inside = torch.tensor([0.0, a, 1 - a]).expand(len(state), 3).clone()
        inside[place == 0] = torch.tensor([r, (1 - r) * a, (1 - r) * (1 - a)])
        inside[place == length] = torch.tensor([1.0, 0.0, 0.0])
        return inside.log(), torch.stack([place + 1, length], 1)

    lengths = torch.arange(1, 13)
    state = torch.stack([torch.zeros_like(lengths), lengths], 1)
    call = dict(start=1, end=0, max_length=13)
    found = strip_end(exact_map(step, state, **call).tokens, 0)
    threshold = math.log((1 - r) / r) / math.log(1 / a)
    assert [len(s) for s in found] == [0 if T > threshold else T for T in range(1, 13)]
    assert [len(s) for s in strip_end(greedy(step, state, **call).tokens, 0)] == lengths.tolist()
    for k in (1, 6):
        assert len(strip_end(beam_search(step, state[-1:], k, **call).tokens, 0)[0]) == 12
    assert strip_end(beam_search(step, state[-1:], 7, **call).tokens, 0)[0] == ()
    assert len(strip_end(beam_search(step, state[-1:], 64, length_penalty=1.0, **call).tokens, 0)[0]) == 12


def test_sampling():
    step, generator = random_model(7, 1.0), torch.Generator().manual_seed(0)
    drawn = ancestral_sample(step, empty_prefix(2), num_samples=4000, generator=generator, **CALL)
    assert drawn.tokens.shape[0] == 8000
    first = torch.bincount(drawn.tokens[:, 0], minlength=SYMBOLS) / 8000
    expected = torch.softmax(step(torch.tensor([0]), empty_prefix())[0][0], 0)
    assert (first - expected).abs().max() < 0.03
    cold = ancestral_sample(step, empty_prefix(), temperature=1e-4, generator=generator, **CALL)
    sure = greedy(step, empty_prefix(), **CALL)
    assert strip_end(cold.tokens, END) == strip_end(sure.tokens, END)
    torch.testing.assert_close(cold.log_prob, sure.log_prob)
    half = ancestral_sample(
        step, empty_prefix(), temperature=0.5, num_samples=8000, generator=generator, **CALL
    )
    share = torch.bincount(half.tokens[:, 0], minlength=SYMBOLS) / 8000
    assert (share - torch.softmax(2 * expected.log(), 0)).abs().max() < 0.03
    starts = torch.tensor([1, 2])
    tokens = ancestral_sample(
        step, empty_prefix(2), num_samples=3, generator=generator, **(CALL | {"start": starts})
    ).tokens
    assert tokens.shape[0] == 6


def test_transform_step_and_select_rows():
    step = random_model(1)
    flat = transform_step(step, torch.neg)
    logits, _ = flat(torch.tensor([0]), empty_prefix())
    torch.testing.assert_close(logits, -step(torch.tensor([0]), empty_prefix())[0])
    state = (torch.arange(3), [torch.arange(6).view(3, 2)])
    picked = select_rows(state, torch.tensor([2, 2, 0]))
    assert picked[0].tolist() == [2, 2, 0] and picked[1][0].tolist() == [[4, 5], [4, 5], [0, 1]]
    with pytest.raises(TypeError, match="state"):
        select_rows({"h": torch.zeros(1)}, torch.tensor([0]))


def test_minimum_bayes_risk():
    samples = ["cat", "cart", "cat", "dog"]
    assert minimum_bayes_risk(samples) == "cat"
    assert minimum_bayes_risk(["a", "b"]) == "a"
    assert minimum_bayes_risk([1, 2, 9], gain=lambda a, b: -abs(a - b)) == 2
    assert edit_similarity("kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert edit_similarity("", "") == 1 and edit_similarity("", "ab") == 0
    with pytest.raises(ValueError, match="at least one"):
        minimum_bayes_risk([])


def test_bad_searches():
    step, state = random_model(0), empty_prefix()
    with pytest.raises(ValueError, match="k, the width"):
        beam_search(step, state, 0, **CALL)
    with pytest.raises(ValueError, match="max_length"):
        greedy(step, state, start=0, end=END, max_length=0)
    with pytest.raises(ValueError, match="end must"):
        greedy(step, state, start=0, end=6, max_length=2)
    with pytest.raises(ValueError, match="start"):
        greedy(step, state, start=torch.tensor([0, 1]), end=END, max_length=2)
    with pytest.raises(ValueError, match="temperature"):
        ancestral_sample(step, state, temperature=0.0, **CALL)
    with pytest.raises(ValueError, match="num_samples"):
        ancestral_sample(step, state, num_samples=0, **CALL)
    with pytest.raises(ValueError, match="at least one hypothesis"):
        greedy(step, torch.zeros(0, 0, dtype=torch.long), **CALL)
    with pytest.raises(RuntimeError, match="max_expansions"):
        exact_map(random_model(0, 0.01), state, max_expansions=1, **CALL)
    never = transform_step(step, lambda logits: logits.index_fill(1, torch.tensor([END]), -torch.inf))
    with pytest.raises(ValueError, match="no sequence ends"):
        exact_map(never, state, start=0, end=END, max_length=2)


def test_gpt_by_its_prefix():
    torch.manual_seed(0)
    model = GPT(6, 5, dim=8, depth=1, num_heads=2).double().eval()

    def step(tokens, prefix):
        prefix = torch.cat([prefix, tokens[:, None]], 1)
        return model(prefix)[:, -1], prefix

    found = exact_map(step, empty_prefix(), **CALL)
    assert found.log_prob.item() == pytest.approx(brute_force(step)[0], abs=1e-9)


# --- the encoder-decoder


def test_seq2seq_steps_are_its_forward():
    torch.manual_seed(0)
    model = Seq2Seq(9, 7, dim=12).double()
    sources = torch.tensor([[3, 4, 5, 0], [8, 1, 0, 0], [2, 2, 2, 2]])
    inputs = torch.randint(7, (3, 6))
    whole, state = model(sources, inputs), model.start(sources)
    for place in range(6):
        logits, state = model.step(inputs[:, place], state)
        torch.testing.assert_close(logits, whole[:, place])
    alone = model(sources[1:2, :2], inputs[1:2])
    torch.testing.assert_close(alone, whole[1:2])  # padding is not looked at
    (gradient,) = torch.autograd.grad(whole.sum(), model.source_embedding.weight)
    assert (gradient[[6, 7]] == 0).all() and (gradient[3] != 0).any()
    assert model.step(inputs[:, 0], state)[0].isfinite().all()


def test_seq2seq_attention_by_hand():
    torch.manual_seed(1)
    model = Seq2Seq(5, 4, dim=6).double()
    hidden, memory, real = model.start(torch.tensor([[1, 2, 3]]))
    assert real.all() and hidden.shape == (1, 6)
    query = model.decoder(model.target_embedding(torch.tensor([[2]])), hidden[None])[0][0, 0]
    weights = torch.softmax(torch.stack([query @ memory[0, s] for s in range(3)]), 0)
    mixed = sum(weights[s] * memory[0, s] for s in range(3))
    expected = model.head(torch.tanh(model.combine(torch.cat([query, mixed]))))
    found, _ = model.step(torch.tensor([2]), (hidden, memory, real))
    torch.testing.assert_close(found[0], expected)


def test_seq2seq_bad_input():
    for arguments, word in (
        ((0, 3), "at least 1"),
        ((3, 3, 5), "even"),
        ((3, 3, 4, 3), "padding"),
    ):
        source, target, *rest = arguments
        with pytest.raises(ValueError, match=word):
            Seq2Seq(source, target, **dict(zip(("dim", "padding"), rest, strict=False)))
    model = Seq2Seq(4, 4, dim=4)
    with pytest.raises(ValueError, match="sources must"):
        model.start(torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="not padding"):
        model.start(torch.tensor([[1, 2], [0, 0]]))
