"""Sub-word vocabularies: merges of pieces, chosen by count or by likelihood, and the most likely segmentation of a word."""

import math
from collections import Counter
from collections.abc import Mapping


def train_subwords(
    words: Mapping[str, int], vocab_size: int, *, objective: str = "likelihood", smoothing: float = 0.0
) -> dict[str, float]:
    """Grow a vocabulary from single characters by merging adjacent pieces.

    Every word starts as its characters. Each step merges one pair everywhere, the one with the largest score:

    - `"count"`: n(ab), as byte-pair encoding does.
    - `"likelihood"`: n(ab) * log(p(ab) / (p(a) p(b))), the gain of the training data's log-likelihood at fixed probabilities
      p = n / N, as WordPiece means it.
    - `"exact"`: the gain when all probabilities are estimated anew after the merge.

    Ties go to the pair that sorts last. Training stops early when no pair has a positive gain.

    Source: Li (2024), arXiv 2410.18441, in the form that the book reconstructs.

    Args:
        words: how often each word occurs.
        vocab_size: the number of pieces, characters included.
        objective: how the next pair is chosen.
        smoothing: added to the count of every piece. With 0, a character that occurs in larger pieces only has no
            probability left; for words that were not trained on, choose it positive.

    Returns:
        The natural logarithm of each piece's probability, by its count in the merged words; -inf where that is 0.

    Raises:
        ValueError: no words, an empty word, a count below 1, fewer pieces than characters, negative smoothing, or an
            unknown objective.
    """
    if objective not in ("count", "likelihood", "exact"):
        raise ValueError(f"objective must be count, likelihood or exact, got {objective!r}")
    _check_words(words)
    pieces = {word: list(word) for word in words}
    counts = Counter()
    pairs, where = Counter(), {}
    for word, split in pieces.items():
        for piece in split:
            counts[piece] += words[word]
        _add_pairs(pairs, where, word, split, words[word])
    if vocab_size < len(counts):
        raise ValueError(f"vocab_size must be at least the {len(counts)} characters, got {vocab_size}")
    total = sum(counts.values())

    def gain(pair):
        a, b = pair
        n = pairs[pair]
        if objective == "count":
            return n
        if objective == "likelihood":
            return n * math.log(n * total / (counts[a] * counts[b]))
        before = _xlogx(total - n) - _xlogx(total)
        if a == b:  # each merge uses up two of them
            return _xlogx(counts[a] - 2 * n) - _xlogx(counts[a]) + _xlogx(n) - before
        return sum(_xlogx(counts[x] - n) - _xlogx(counts[x]) for x in pair) + _xlogx(n) - before

    while len(counts) < vocab_size:
        best = max(((gain(pair), pair) for pair, n in pairs.items() if n > 0), default=(0, None))
        if best[0] <= 0:
            break
        a, b = best[1]
        counts[a + b] += 0
        for word in sorted(where[best[1]]):
            split, times = pieces[word], words[word]
            merged = _merge(split, a, b)
            if len(merged) == len(split):
                continue  # an earlier merge took the pair away
            _add_pairs(pairs, where, word, split, -times)
            _add_pairs(pairs, where, word, merged, times)
            found = len(split) - len(merged)
            counts[a] -= found * times
            counts[b] -= found * times
            counts[a + b] += found * times
            total -= found * times
            pieces[word] = merged
    return _log_probabilities(counts, smoothing)


def segment(word: str, logp: Mapping[str, float]) -> list[str]:
    """The most likely way to cut a word into pieces, by dynamic programming over its prefixes.

    best[i] = max over j < i of best[j] + log p(word[j:i]). The cost is that of the pieces' greatest length times the
    word's. Of equally likely cuts one with fewer pieces is taken.

    Args:
        word: any string.
        logp: the logarithm of each piece's probability.

    Returns:
        The pieces, whose concatenation is `word`.

    Raises:
        ValueError: no cut has a positive probability.
    """
    longest = max(map(len, logp), default=0)
    best, last = [(0.0, 0)] + [(-math.inf, 0)] * len(word), [0] * (len(word) + 1)
    for i in range(1, len(word) + 1):
        for j in range(max(0, i - longest), i):
            score = best[j][0] + logp.get(word[j:i], -math.inf)
            if (score, best[j][1] - 1) > best[i]:
                best[i], last[i] = (score, best[j][1] - 1), j
    if best[-1][0] == -math.inf:
        raise ValueError(f"the pieces cannot make {word!r}")
    pieces, i = [], len(word)
    while i:
        pieces.append(word[last[i] : i])
        i = last[i]
    return pieces[::-1]


def refit_subwords(
    words: Mapping[str, int], logp: Mapping[str, float], *, steps: int = 1, smoothing: float = 0.0
) -> dict[str, float]:
    """Estimate the pieces' probabilities anew: cut all words, count, repeat. Without smoothing no step lowers the likelihood.

    Args:
        words: how often each word occurs.
        logp: as for `segment`; its pieces are kept.
        steps: how often.
        smoothing: added to the count of every piece.

    Returns:
        The logarithm of each piece's probability.

    Raises:
        ValueError: as `train_subwords` and `segment`.
    """
    _check_words(words)
    logp = dict(logp)
    for _ in range(steps):
        counts = Counter(dict.fromkeys(logp, 0))
        for word, times in words.items():
            for piece in segment(word, logp):
                counts[piece] += times
        logp = _log_probabilities(counts, smoothing)
    return logp


def _check_words(words):
    if not words or any(not word for word in words) or min(words.values()) < 1:
        raise ValueError("words must map at least one word, none of them empty, to counts of at least 1")


def _add_pairs(pairs, where, word, split, times):
    """Count pairs as a merge would take them: "aaa" holds "aa" once."""
    run = 0
    for i in range(len(split) - 1):
        pair = split[i], split[i + 1]
        run = run + 1 if pair[0] == pair[1] else 0
        if run % 2 == 0 and pair[0] == pair[1]:
            continue  # its first half belongs to the pair before
        pairs[pair] += times
        where.setdefault(pair, set()).add(word)


def _merge(split, a, b):
    merged, i = [], 0
    while i < len(split):
        both = i + 1 < len(split) and split[i] == a and split[i + 1] == b
        merged.append(a + b if both else split[i])
        i += 1 + both
    return merged


def _xlogx(n):
    return n * math.log(n) if n else 0.0


def _log_probabilities(counts, smoothing):
    if smoothing < 0:
        raise ValueError(f"smoothing must not be negative, got {smoothing}")
    total = sum(counts.values()) + smoothing * len(counts)
    return {
        piece: math.log((n + smoothing) / total) if n + smoothing else -math.inf
        for piece, n in counts.items()
    }
