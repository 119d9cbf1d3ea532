"""Shift, gamma and occlusion of images."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.data import change_gamma, occlude, shift


def pictures(n=3, height=5, width=7):
    return torch.rand(n, 2, height, width, generator=torch.Generator().manual_seed(0))


def test_shift_by_hand():
    image = torch.arange(6.0).reshape(1, 1, 2, 3)
    assert shift(image, down=1).tolist() == [[[[0, 0, 0], [0, 1, 2]]]]
    assert shift(image, right=-1).tolist() == [[[[1, 2, 0], [4, 5, 0]]]]
    assert shift(image, down=-1, right=2).tolist() == [[[[0, 0, 3], [0, 0, 0]]]]


@settings(max_examples=30)
@given(st.integers(-8, 8), st.integers(-8, 8))
def test_shift_moves_every_pixel(down, right):
    images = pictures()
    moved = shift(images, down, right)
    assert moved.shape == images.shape
    for row in range(5):
        for column in range(7):
            inside = 0 <= row - down < 5 and 0 <= column - right < 7
            expected = images[:, :, row - down, column - right] if inside else torch.zeros(3, 2)
            assert torch.equal(moved[:, :, row, column], expected)


def test_gamma():
    images = pictures()
    assert torch.equal(change_gamma(images, 1.0), images)
    torch.testing.assert_close(change_gamma(change_gamma(images, 2.0), 0.5), images)
    assert (change_gamma(images, 0.5) >= images).all() and (change_gamma(images, 2.0) <= images).all()


def test_occlude_covers_one_square_inside_each_image():
    images = pictures(200) + 0.1
    covered = occlude(images, 3, generator=torch.Generator().manual_seed(1))
    hidden = covered[:, 0] == 0
    assert torch.equal(hidden, covered[:, 1] == 0)
    assert (hidden.sum((1, 2)) == 9).all()
    assert (hidden.any(2).sum(1) == 3).all() and (
        hidden.any(1).sum(1) == 3
    ).all()  # a square, not nine pixels
    assert torch.equal(covered[:, 0][~hidden], images[:, 0][~hidden])
    assert hidden.any(0).all()  # every place is reached
    again = occlude(images, 3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(covered, again)
    assert (occlude(images, 2, value=0.5) == 0.5).sum() >= 200 * 2 * 4


def test_edges():
    images = pictures()
    assert torch.equal(occlude(images, 0), images)
    assert (occlude(torch.rand(2, 1, 4, 4), 4) == 0).all()
    empty = images[:0]
    assert shift(empty, 1).shape == change_gamma(empty, 2.0).shape == occlude(empty, 1).shape == empty.shape


@pytest.mark.parametrize(
    "call",
    [
        lambda: shift(torch.rand(5, 7), 1),
        lambda: shift(torch.zeros(1, 1, 2, 2, dtype=torch.long), 1),
        lambda: change_gamma(pictures(), 0.0),
        lambda: change_gamma(pictures() * 2, 2.0),
        lambda: occlude(pictures(), 6),
        lambda: occlude(pictures(), -1),
    ],
)
def test_bad_values(call):
    with pytest.raises(ValueError):
        call()


def test_shift_takes_whole_pixels():
    with pytest.raises(TypeError, match="integer"):
        shift(pictures(), 0.5)
