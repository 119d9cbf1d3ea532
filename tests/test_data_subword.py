"""lib.data.subword against exhaustive search and recounting from scratch."""

import itertools
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.book import load_reference
from lib.data import refit_subwords, segment, train_subwords

WORDS = st.dictionaries(st.text("abc", min_size=1, max_size=7), st.integers(1, 9), min_size=1, max_size=8)


def all_cuts(word):
    for cuts in itertools.product((False, True), repeat=len(word) - 1):
        pieces, start = [], 0
        for i, cut in enumerate(cuts, 1):
            if cut:
                pieces.append(word[start:i])
                start = i
        yield [*pieces, word[start:]]


def likelihood(pieces, logp):
    return sum(logp.get(piece, -math.inf) for piece in pieces)


def plain_train(words, vocab_size, objective):
    """Everything counted anew before every merge."""
    pieces = {word: list(word) for word in words}
    vocabulary = set("".join(words))

    def merged(split, a, b):
        out = []
        for piece in split:
            if out and out[-1] == a and piece == b:
                out[-1] = (a, b)  # closed: takes part in no further merge
            else:
                out.append(piece)
        return ["".join(piece) for piece in out]

    def log_likelihood(pieces):
        n = Counter()
        for word, split in pieces.items():
            for piece in split:
                n[piece] += words[word]
        return sum(c * math.log(c / n.total()) for c in n.values()), n

    while len(vocabulary) < vocab_size:
        before, n = log_likelihood(pieces)
        gains = {}
        for a, b in {pair for split in pieces.values() for pair in itertools.pairwise(split)}:
            after = {word: merged(split, a, b) for word, split in pieces.items()}
            count = sum(words[w] * (len(pieces[w]) - len(after[w])) for w in words)
            gains[a, b] = {
                "count": count,
                "likelihood": count * math.log(count * n.total() / (n[a] * n[b])),
                "exact": log_likelihood(after)[0] - before,
            }[objective]
        gain, pair = max(((gain, pair) for pair, gain in gains.items()), default=(0, None))
        if gain <= 1e-9:
            break
        pieces = {word: merged(split, *pair) for word, split in pieces.items()}
        vocabulary.add("".join(pair))
    return pieces, log_likelihood(pieces)[0]


@settings(max_examples=40, deadline=None)
@given(WORDS, st.sampled_from(["count", "likelihood", "exact"]), st.integers(0, 5))
def test_training_equals_counting_anew(words, objective, merges):
    size = len(set("".join(words))) + merges
    _, expected = plain_train(words, size, objective)
    logp = train_subwords(words, size, objective=objective)
    counts = [math.exp(x) for x in logp.values()]
    assert math.isclose(sum(counts), 1)
    pieces, _ = plain_train(words, size, objective)
    n = Counter()
    for word, split in pieces.items():
        for piece in split:
            n[piece] += words[word]
    entropy = sum(p * math.log(p) for p in counts if p)
    assert entropy == pytest.approx(
        expected / n.total(), abs=1e-9
    )  # ties may pick another pair, not another gain


@settings(max_examples=40, deadline=None)
@given(WORDS, st.text("abc", max_size=8))
def test_segment_equals_all_cuts(words, word):
    logp = train_subwords(words | {"abc": 1}, 6, smoothing=0.5)
    best = max((likelihood(pieces, logp) for pieces in all_cuts(word)), default=0) if word else 0
    pieces = segment(word, logp)
    assert "".join(pieces) == word
    assert likelihood(pieces, logp) == pytest.approx(best)


@settings(max_examples=20, deadline=None)
@given(WORDS)
def test_refitting_raises_the_likelihood(words):
    logp = train_subwords(words, len(set("".join(words))) + 3)
    values = []
    for _ in range(4):
        values.append(sum(n * likelihood(segment(w, logp), logp) for w, n in words.items()))
        logp = refit_subwords(words, logp)
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(values))


def test_known_merges():
    words = {"aaab": 3, "aab": 1}
    assert set(train_subwords(words, 3, objective="count")) in ({"a", "b", "aa"}, {"a", "b", "ab"})
    assert segment("", {"a": 0.0}) == []


def test_bad_input():
    with pytest.raises(ValueError, match="objective"):
        train_subwords({"a": 1}, 3, objective="loss")
    for words in ({}, {"": 1}, {"a": 0}):
        with pytest.raises(ValueError, match="words must"):
            train_subwords(words, 3)
    with pytest.raises(ValueError, match="at least the 2 characters"):
        train_subwords({"ab": 1}, 1)
    with pytest.raises(ValueError, match="smoothing"):
        train_subwords({"ab": 1}, 3, smoothing=-1.0)
    with pytest.raises(ValueError, match="cannot make 'abx'"):
        segment("abx", {"a": -1.0, "b": -1.0})


def test_reference_cell():
    best_cut = load_reference("probabilistic-flash-attention", "best_cut")
    logp = {"a": -1.0, "b": -1.2, "ab": -2.0, "ba": -1.5, "aab": -2.2}
    for word in ("aabab", "bbaab", "babab", ""):
        assert likelihood(best_cut(word, logp), logp) == pytest.approx(likelihood(segment(word, logp), logp))
