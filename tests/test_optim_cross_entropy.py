"""lib.optim.cross_entropy_method."""

import math

import pytest
import torch

from lib.book import load_reference
from lib.optim import cross_entropy_method

SPACE = {"x": [-2, -1, 0, 1, 2], "y": ["a", "b", "c"]}


def score(choice):
    return -((choice["x"] - 1) ** 2) - 3 * (choice["y"] != "b")


def test_finds_the_best():
    pi, history = cross_entropy_method(
        score, SPACE, samples=30, elite=0.2, iterations=8, generator=torch.Generator().manual_seed(0)
    )
    assert SPACE["x"][pi["x"].argmax()] == 1 and SPACE["y"][pi["y"].argmax()] == "b"
    assert max(history[-1].scores) == 0 and len(history) == 8 and len(history[0].choices) == 30


def test_the_update_is_the_elite_frequency():
    pi, (first, second) = cross_entropy_method(
        score,
        SPACE,
        samples=10,
        elite=0.35,
        smoothing=0.6,
        iterations=2,
        generator=torch.Generator().manual_seed(3),
    )
    expected = {name: torch.full((len(values),), 1 / len(values)) for name, values in SPACE.items()}
    for generation in (first, second):
        assert len(generation.elite) == 4
        bar = min(generation.scores[i] for i in generation.elite)
        assert all(s <= bar for i, s in enumerate(generation.scores) if i not in generation.elite)
        for name, values in SPACE.items():
            chosen = [generation.choices[i][name] for i in generation.elite]
            frequency = torch.tensor([chosen.count(value) / 4 for value in values])
            expected[name] = 0.4 * expected[name] + 0.6 * frequency
    for name in SPACE:
        torch.testing.assert_close(pi[name], expected[name])


def test_scores_once_and_takes_minus_infinity():
    seen = []
    cross_entropy_method(
        lambda choice: seen.append(tuple(choice.values())) or -math.inf,
        SPACE,
        samples=20,
        generator=torch.Generator(),
    )
    assert len(seen) == len(set(seen)) <= 15


@pytest.mark.parametrize(
    "options",
    [{"samples": 0}, {"iterations": 0}, {"elite": 0}, {"elite": 1.1}, {"smoothing": 0}, {"space": {}}],
)
def test_bad_input(options):
    with pytest.raises(ValueError, match="must"):
        cross_entropy_method(score, **({"space": SPACE} | options))
    with pytest.raises(ValueError, match="nan"):
        cross_entropy_method(lambda choice: math.nan, SPACE)


def test_reference_cell():
    reference = load_reference("probabilistic-flash-attention", "elite_update")
    pi, (only,) = cross_entropy_method(score, SPACE, samples=9, elite=1 / 3, smoothing=0.5, iterations=1)
    drawn = [[SPACE["x"].index(c["x"]), SPACE["y"].index(c["y"])] for c in only.choices]
    expected = reference([[0.2] * 5, [1 / 3] * 3], drawn, only.scores, 3, 0.5)
    for name, p in zip(SPACE, expected, strict=True):
        torch.testing.assert_close(pi[name], torch.tensor(p))
