"""Associative recall: data on which a sequence model must look something up."""

import torch


def mqar(
    vocabulary: int,
    length: int,
    pairs: int,
    batch: int,
    generator: torch.Generator | None = None,
    *,
    power: float = 0.01,
    random_filler: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Multi-query associative recall (Arora et al., Zoology, 2023).

    Each sequence starts with `pairs` keys, each followed by its value. Later every key appears once more, as a query, at an even
    distance from the pairs drawn from a power law; the target there is the key's value. Keys are different tokens from 1 to
    vocabulary // 2 - 1, values tokens from vocabulary // 2 on. All other positions hold token 0.

    Args:
        vocabulary: the number of tokens.
        length: of a sequence, at least 4 * pairs.
        pairs: keys and values a sequence, fewer than vocabulary // 2.
        batch: sequences.
        generator: of random numbers.
        power: of the law by which distances are drawn; small values prefer short ones.
        random_filler: random tokens instead of 0. With a small vocabulary these repeat keys before wrong values.

    Returns:
        `tokens` and `targets`, (batch, length) each; targets are -100 except at the queries.

    Raises:
        ValueError: a vocabulary or a length too small for the pairs.
    """
    half = vocabulary // 2
    if not 1 <= pairs < half:
        raise ValueError(f"pairs must be between 1 and vocabulary // 2 - 1 = {half - 1}, got {pairs}")
    slots = (length - 2 * pairs) // 2
    if slots < pairs:
        raise ValueError(f"length must be at least 4 * pairs = {4 * pairs}, got {length}")
    if power <= 0:
        raise ValueError(f"power must be positive, got {power}")
    keys = 1 + torch.rand(batch, half - 1, generator=generator).argsort(1)[:, :pairs]
    values = half + torch.rand(batch, vocabulary - half, generator=generator).argsort(1)[:, :pairs]
    weights = torch.arange(1, slots + 1, dtype=torch.float64) ** (power - 1)
    slot = torch.multinomial(weights.expand(batch, -1), pairs, generator=generator)
    where = 2 * pairs + 2 * slot
    tokens = torch.zeros(batch, length, dtype=torch.int64)
    if random_filler:
        tokens = torch.randint(vocabulary, (batch, length), generator=generator)
    tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
    tokens.scatter_(1, where, keys)
    targets = torch.full((batch, length), -100).scatter_(1, where, values)
    return tokens, targets
