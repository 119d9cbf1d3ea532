"""BLEU: how many n-grams of a translation occur in its references."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence


def corpus_bleu(
    hypotheses: Sequence[Sequence[Hashable]],
    references: Sequence[Sequence[Sequence[Hashable]]],
    *,
    max_n: int = 4,
) -> float:
    """BLEU of a corpus of tokenised sentences (Papineni et al. 2002), without smoothing.

    The geometric mean of the n-gram precisions, n = 1..`max_n`, each counted over the whole corpus and clipped to the largest
    count in one reference, times exp(1 - r / c) where the hypotheses (c tokens) are shorter than the closest references (r).

    Args:
        hypotheses: sequences of tokens (words, numbers).
        references: for each hypothesis a list of one or more references, each a sequence of tokens.
        max_n: the longest n-gram.

    Returns:
        From 0 to 100; 0 when one of the precisions is 0.

    Raises:
        ValueError: no hypotheses, other numbers of hypotheses and references, a hypothesis without references, or a
            `max_n` below 1.
    """
    if not len(hypotheses) or len(hypotheses) != len(references) or not all(map(len, references)):
        raise ValueError(
            f"each hypothesis needs its list of references, got {len(hypotheses)} and {len(references)}"
        )
    if max_n < 1:
        raise ValueError(f"max_n must be at least 1, got {max_n}")
    matches, totals, length, closest = [0] * max_n, [0] * max_n, 0, 0
    for hypothesis, candidates in zip(hypotheses, references, strict=True):
        size = len(hypothesis)
        length += size
        closest += min((abs(len(candidate) - size), len(candidate)) for candidate in candidates)[1]
        for n in range(1, max_n + 1):
            allowed = Counter()
            for candidate in candidates:
                allowed |= _ngrams(candidate, n)  # the larger count of the two
            counts = _ngrams(hypothesis, n)
            matches[n - 1] += (counts & allowed).total()
            totals[n - 1] += counts.total()
    if not all(matches):
        return 0.0
    precision = sum(math.log(m / t) for m, t in zip(matches, totals, strict=True)) / max_n
    return 100 * math.exp(precision + min(0.0, 1 - closest / length))


def _ngrams(tokens, n):
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
