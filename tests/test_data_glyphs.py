"""Letters in matplotlib's fonts."""

import unicodedata

import pytest
import torch

from lib.data import GLYPH_STYLES, glyphs


def test_one_class_a_letter_in_every_style():
    images, labels, letters = glyphs(jitter=0.0)
    assert len(letters) == len(set(letters)) > 250
    assert images.shape == (16 * len(letters), 1, 14, 14) and len(GLYPH_STYLES) == 16
    assert torch.equal(labels, torch.arange(len(letters)).repeat_interleave(16))
    assert images.dtype == torch.float32 and images.min() == 0 and images.max() <= 1
    assert (images.flatten(1).sum(1) > 1).all(), "a letter is missing in a style"
    assert all(unicodedata.category(letter) in ("Lu", "Ll", "Lo") for letter in letters)
    assert "A" in letters and "я" in letters
    assert not {"А", "Α"} & set(letters), "Cyrillic and Greek capital A look like the Latin one"
    plain = images[::16].flatten(1)  # of different letters, in the first style
    assert (torch.cdist(plain, plain) + torch.eye(len(plain)) > 0).all()


def test_letters_are_white_on_black_and_upright():
    images, _, letters = glyphs(size=56, jitter=0.0)
    i = images[16 * letters.index("I"), 0]
    rows, columns = i.sum(1).nonzero()[:, 0], i.sum(0).nonzero()[:, 0]
    assert rows.max() - rows.min() > 3 * (columns.max() - columns.min())
    assert (rows.float().mean() - 27.5).abs() < 6 and (columns.float().mean() - 27.5).abs() < 3
    t = images[16 * letters.index("T"), 0]
    assert t[:28].sum() > t[28:].sum(), "the bar of T is above"


def test_jitter_and_copies_are_seeded():
    a, labels, letters = glyphs(5, copies=3, seed=4)
    b, _, same = glyphs(5, copies=3, seed=4)
    c, _, others = glyphs(5, copies=3, seed=5)
    assert a.shape == (5 * 16 * 3, 1, 14, 14) and labels.bincount().tolist() == [48] * 5
    assert torch.equal(a, b) and letters == same and letters != others
    assert not torch.equal(a, c)
    styles = a.view(5, 16, 3, -1)
    assert (styles[:, :, 0] - styles[:, :, 1]).abs().amax(-1).min() > 0.05
    ink = glyphs(5, seed=4, jitter=0.0)[0].sum() * 3
    assert abs(a.sum() - ink) < 0.15 * ink, "letters keep their ink: nothing is cut off"


def test_jitter_moves_a_letter_by_its_bounds_and_no_more():
    images, _, _ = glyphs(20, copies=2, size=56, seed=1)
    still, _, _ = glyphs(20, copies=1, size=56, seed=1, jitter=0.0)
    axis = torch.arange(56.0) - 27.5

    def centres(x):
        mass = x.sum((1, 2, 3))
        return torch.stack([(x * axis).sum((1, 2, 3)), (x * axis[:, None]).sum((1, 2, 3))]) / mass

    moved = centres(images) - centres(still).repeat_interleave(2, 1)
    assert 2 < moved.abs().max() < 0.08 * 56 * 1.5 + 3
    assert moved.mean(1).abs().max() < 0.6


@pytest.mark.parametrize(
    "bad",
    [{"num_classes": 0}, {"num_classes": 10**4}, {"copies": 0}, {"size": 15}, {"size": 0}, {"jitter": -1.0}],
)
def test_bad_input(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        glyphs(**bad)


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    glyphs(2)
    assert torch.equal(torch.rand(1), expected)
