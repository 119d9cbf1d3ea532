"""Spoiled sequences: what each kind keeps and what it changes."""

import pytest
import torch

from lib.noise import sequence_noise

ROWS = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [3, 4, 5, 6, 7, 0, 0, 0, 0, 0]])


def spoiled(kind, level, seed=0, tokens=ROWS):
    return sequence_noise(tokens, kind, level, blank_id=1, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["shuffle", "blank", "repetition", "delete"])
def test_level_zero_changes_nothing_and_seeds_count(kind):
    assert torch.equal(spoiled(kind, 0.0), ROWS)
    many = ROWS.repeat(20, 1)
    assert torch.equal(spoiled(kind, 0.5, 1, many), spoiled(kind, 0.5, 1, many))
    first, second = spoiled(kind, 0.5, 1, many), spoiled(kind, 0.5, 2, many)
    assert first.shape != second.shape or not torch.equal(first, second)


def test_shuffle_moves_one_block():
    for seed in range(20):
        out = spoiled("shuffle", 0.4, seed)
        assert torch.equal(out.sort(1).values, ROWS.sort(1).values)
        moved = (out[0] != ROWS[0]).nonzero()
        assert len(moved) == 0 or moved.max() - moved.min() < 4
        assert (out[1, 5:] == 0).all()


def test_rates():
    rows = torch.arange(2, 52).repeat(200, 1)
    assert abs((spoiled("blank", 0.3, tokens=rows) == 1).float().mean() - 0.3) < 0.02
    assert abs((spoiled("delete", 0.3, tokens=rows) != 0).float().mean() - 0.7) < 0.02
    longer = spoiled("repetition", 0.3, tokens=rows)
    assert abs((longer != 0).sum() / rows.numel() - 1.3) < 0.02
    assert torch.equal(longer[0][longer[0] != 0].unique_consecutive(), rows[0])
    kept = spoiled("delete", 1.0)
    assert ((kept != 0).sum(1) == 1).all()


def test_bad_input():
    with pytest.raises(TypeError):
        sequence_noise(ROWS.float(), "shuffle", 0.1)
    for tokens, kind, level, options in [
        (ROWS[0], "shuffle", 0.1, {}),
        (ROWS, "swap", 0.1, {}),
        (ROWS, "shuffle", 1.1, {}),
        (ROWS, "blank", 0.1, {}),
        (ROWS, "blank", 0.1, {"blank_id": 0}),
    ]:
        with pytest.raises(ValueError):
            sequence_noise(tokens, kind, level, **options)
    assert sequence_noise(ROWS[:0], "delete", 0.5).shape == (0, 10)
