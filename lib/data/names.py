"""The names of Unicode characters: many small classes of real strings, in every Python."""

import unicodedata
from collections import Counter
from functools import cache

# series whose names only count or spell: thousands of names without a word to learn from
_SERIES = ("CJK", "HANGUL", "KHITAN", "NUSHU", "TANGUT")


@cache
def _all_names() -> tuple[tuple[str, str], ...]:
    names = (unicodedata.name(chr(code), "") for code in range(0x110000))
    pairs = (name.split(" ", 1) for name in names if " " in name and "HIEROGLYPH" not in name)
    return tuple((first, rest) for first, rest in pairs if not first.startswith(_SERIES))


def character_names(min_count: int = 40) -> tuple[list[str], list[int], list[str]]:
    """Unicode character names without their first word, labelled by that word.

    "LATIN SMALL LETTER A" becomes the text "SMALL LETTER A" with the label LATIN. The series of CJK, Hangul, Khitan,
    Nushu, Tangut and hieroglyphs are left out. Numbers follow the Unicode version of the running Python: about 25 500
    names with 162 labels in Python 3.11.

    Args:
        min_count: leave out labels with fewer names than this; at least 1.

    Returns:
        The texts, their labels as indices, and the words that the indices stand for, the most frequent first.

    Raises:
        ValueError: a `min_count` below 1, or above the size of the largest class.
    """
    if min_count < 1:
        raise ValueError(f"min_count must be at least 1, got {min_count}")
    names = _all_names()
    counts = Counter(first for first, _ in names)
    words = sorted(
        (word for word, count in counts.items() if count >= min_count), key=lambda w: (-counts[w], w)
    )
    if not words:
        raise ValueError(f"no label has {min_count} names; the largest has {max(counts.values())}")
    index = {word: number for number, word in enumerate(words)}
    kept = [(rest, index[first]) for first, rest in names if first in index]
    return [text for text, _ in kept], [label for _, label in kept], words
