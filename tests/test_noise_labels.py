"""Label noise against the frequencies that it promises."""

import pytest
import torch

from lib.noise import class_dependent_flip, pair_transition, uniform_flip


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def frequencies(clean, noisy, classes):
    return torch.stack(
        [torch.bincount(noisy[clean == c], minlength=classes) / (clean == c).sum() for c in range(classes)]
    )


def test_uniform_noise_is_uniform_over_the_wrong_classes():
    clean = torch.arange(4).repeat(20_000)
    noisy = uniform_flip(clean, 0.3, 4, generator=draw())
    expected = torch.full((4, 4), 0.1) + 0.6 * torch.eye(4)
    torch.testing.assert_close(frequencies(clean, noisy, 4), expected, atol=0.015, rtol=0)


def test_transition_matrix_is_followed():
    matrix = torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.2, 0.3, 0.5]])
    clean = torch.arange(3).repeat(20_000)
    noisy = class_dependent_flip(clean, matrix, generator=draw(1))
    torch.testing.assert_close(frequencies(clean, noisy, 3), matrix, atol=0.015, rtol=0)


def test_extremes_and_shapes():
    clean = torch.randint(3, (4, 5), generator=draw())
    assert torch.equal(uniform_flip(clean, 0.0, 3), clean)
    assert (uniform_flip(clean, 1.0, 3) != clean).all()
    assert uniform_flip(clean.int(), 0.5, 3).dtype == torch.int32
    assert uniform_flip(clean[:0], 0.5, 3).shape == (0, 5)
    assert torch.equal(
        uniform_flip(clean, 0.5, 3, generator=draw(2)), uniform_flip(clean, 0.5, 3, generator=draw(2))
    )


def test_pairs():
    assert pair_transition([(0, 2)], 0.4, 3).tolist() == [[0.6, 0, 0.4], [0, 1, 0], [0.4, 0, 0.6]]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: uniform_flip(torch.tensor([0]), 1.5, 3), ValueError, "got 1.5"),
        (lambda: uniform_flip(torch.tensor([0]), 0.5, 1), ValueError, "at least 2, got 1"),
        (lambda: uniform_flip(torch.tensor([3]), 0.5, 3), ValueError, "from 3 to 3"),
        (lambda: uniform_flip(torch.tensor([0.0]), 0.5, 3), TypeError, "integer class indices"),
        (lambda: class_dependent_flip(torch.tensor([0]), torch.ones(2, 3)), ValueError, "square"),
        (lambda: class_dependent_flip(torch.tensor([0]), torch.ones(2, 2)), ValueError, "a distribution"),
        (lambda: pair_transition([(0, 0)], 0.1, 3), ValueError, "different classes"),
        (lambda: pair_transition([(0, 1), (1, 2)], 0.1, 3), ValueError, "each once"),
        (lambda: pair_transition([(0, 1)], -0.1, 3), ValueError, "got -0.1"),
    ],
)  # fmt: skip
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
