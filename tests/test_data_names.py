"""Unicode character names as a classification problem."""

import unicodedata
from collections import Counter

import pytest

from lib.data import character_names


def test_names_and_labels_put_together_are_names_of_characters():
    texts, labels, words = character_names()
    assert len(texts) == len(labels) > 20_000
    assert len(words) > 150 and len(set(words)) == len(words)
    for text, label in list(zip(texts, labels, strict=True))[::97]:
        unicodedata.lookup(f"{words[label]} {text}")  # raises where there is no such character
    assert not {"CJK", "HANGUL", "TANGUT"} & set(words)
    a = texts.index("SMALL LETTER A WITH ACUTE")
    assert words[labels[a]] == "LATIN"


def test_counts_are_at_least_the_minimum_and_in_order():
    _, labels, words = character_names(200)
    counts = [Counter(labels)[label] for label in range(len(words))]
    assert min(counts) >= 200 and counts == sorted(counts, reverse=True)
    assert len(character_names(1)[2]) > len(words)


@pytest.mark.parametrize(("count", "words"), [(0, "at least 1, got 0"), (10**6, "the largest has")])
def test_bad_input(count, words):
    with pytest.raises(ValueError, match=words):
        character_names(count)
