"""Edits that spoil a sequence: shuffled words, blanks, repetitions, deletions."""

import torch

_KINDS = ("shuffle", "blank", "repetition", "delete")


def sequence_noise(
    tokens: torch.Tensor,
    kind: str,
    level: float,
    *,
    pad_id: int = 0,
    blank_id: int | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Spoil each row of tokens once.

    With L real tokens in a row, in the order of `kind`:

    - "shuffle": `round(level * L)` adjacent tokens, at a random place, in random order;
    - "blank": each token becomes `blank_id` with probability `level`;
    - "repetition": each token is written twice with probability `level`;
    - "delete": each token is left out with probability `level`; a row that would be empty keeps one of its tokens.

    Args:
        tokens: integers, (N, S), padded on the right.
        kind: "shuffle", "blank", "repetition" or "delete".
        level: in [0, 1].
        pad_id: the padding, which is never touched.
        blank_id: needed for "blank"; not `pad_id`.
        generator: source of randomness; the global one when None.

    Returns:
        A new tensor like `tokens`, (N, S'), padded on the right: S' is S, except for "repetition", where it is the longest
        new row (at least S).

    Raises:
        TypeError: tokens that are not integers.
        ValueError: a wrong shape, an unknown kind, a level outside [0, 1], or no proper `blank_id` for "blank".
    """
    if tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise TypeError(f"tokens must be integers, got {tokens.dtype}")
    if tokens.ndim != 2:
        raise ValueError(f"tokens must be (N, S), got {tuple(tokens.shape)}")
    if kind not in _KINDS:
        raise ValueError(f"kind must be one of {_KINDS}, got {kind!r}")
    if not 0 <= level <= 1:
        raise ValueError(f"level must be in [0, 1], got {level}")
    if kind == "blank" and (blank_id is None or blank_id == pad_id):
        raise ValueError(f"kind 'blank' needs a blank_id that is not the padding, got {blank_id}")
    rows = []
    for row in tokens.cpu():
        row = row[row != pad_id]
        hit = torch.rand(len(row), generator=generator) < level
        if kind == "shuffle":
            rows.append(_shuffle(row, level, generator))
        elif kind == "blank":
            rows.append(row.masked_fill(hit, blank_id) if len(row) else row)
        elif kind == "repetition":
            rows.append(row.repeat_interleave(1 + hit.long()))
        else:
            if len(row) and bool(hit.all()):
                hit[torch.randint(len(row), (), generator=generator)] = False
            rows.append(row[~hit])
    width = max([tokens.shape[1], *map(len, rows)])
    result = tokens.new_full((len(rows), width), pad_id)
    for target, row in zip(result, rows, strict=True):
        target[: len(row)] = row.to(target)
    return result


def _shuffle(row, level, generator):
    size = round(level * len(row))
    if size < 2:
        return row
    start = int(torch.randint(len(row) - size + 1, (), generator=generator))
    order = torch.arange(len(row))
    order[start : start + size] = start + torch.randperm(size, generator=generator)
    return row[order]
