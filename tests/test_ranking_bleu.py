"""BLEU against values worked by hand."""

import math

import pytest

from lib.ranking import corpus_bleu


def test_by_hand():
    # unigrams 5/6, bigrams 3/5, trigrams 1/4, no penalty
    hypothesis, reference = "the cat sat on a mat".split(), "the cat is on a mat".split()
    value = corpus_bleu([hypothesis], [[reference]], max_n=3)
    assert value == pytest.approx(100 * (5 / 6 * 3 / 5 * 1 / 4) ** (1 / 3))
    assert corpus_bleu([hypothesis], [[reference]]) == 0  # no common 4-gram
    # clipping: "the" counts twice at most
    assert corpus_bleu([["the"] * 7], [["the cat is on the mat".split()]], max_n=1) == pytest.approx(200 / 7)
    # four of eight words: all precisions 1, penalty exp(1 - 8 / 4)
    assert corpus_bleu(["abcd"], [["abcdefgh"]]) == pytest.approx(100 * math.exp(-1))
    assert corpus_bleu([[1, 2, 3, 4, 5]], [[[1, 2, 3, 4, 5]]]) == pytest.approx(100)


def test_counts_are_pooled_over_the_corpus():
    # 1 + 3 of 2 + 4 unigrams, 0 + 2 of 1 + 3 bigrams; the lengths agree
    value = corpus_bleu(["ax", "abcy"], [["ab"], ["abcd"]], max_n=2)
    assert value == pytest.approx(100 * math.sqrt(4 / 6 * 2 / 4))


def test_several_references():
    # each reference covers one half; the closest length is 4 (a tie of 4 and 6 would take 4)
    assert corpus_bleu(["abcd"], [["abxx", "yycd"]], max_n=1) == pytest.approx(100)
    assert corpus_bleu(["abcde"], [["abcd", "abcdef"]], max_n=2) == pytest.approx(100)


def test_bad_input():
    for hypotheses, references in [([], []), (["a"], []), (["a"], [[]])]:
        with pytest.raises(ValueError):
            corpus_bleu(hypotheses, references)
    with pytest.raises(ValueError):
        corpus_bleu(["a"], [["a"]], max_n=0)
