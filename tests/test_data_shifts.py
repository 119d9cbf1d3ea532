"""Foreign images and image shifts: ranges, determinism, and cases with a known result."""

import math

import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.ndimage import rotate as scipy_rotate

from lib.data import add_noise, blur, change_contrast, digits, photo_patches, rotate, strokes


@pytest.mark.parametrize("make", [photo_patches, strokes])
def test_foreign_images(make):
    state = torch.get_rng_state()
    images = make(20, size=8, seed=3)
    assert images.shape == (20, 1, 8, 8) and images.dtype == torch.float32
    assert 0 <= images.min() and images.max() <= 1 and images.flatten(1).std(1).min() > 0
    assert torch.equal(images, make(20, size=8, seed=3)) and not torch.equal(images, make(20, seed=4))
    assert torch.equal(make(5, seed=3), images[:5])
    assert torch.equal(state, torch.get_rng_state())
    assert make(0).shape == (0, 1, 8, 8) and make(2, size=11).shape == (2, 1, 11, 11)
    with pytest.raises(ValueError, match="n must"):
        make(-1)
    with pytest.raises(ValueError, match="size"):
        make(1, size=0)


def test_strokes_have_the_ink_of_digits():
    ink, drawn = digits((500,))[0][0].mean(), strokes(200).mean()
    assert 0.6 * ink < drawn < 1.4 * ink


def test_rotate():
    images = digits((6,))[0][0]
    torch.testing.assert_close(rotate(images, 0), images, atol=1e-5, rtol=0)
    torch.testing.assert_close(rotate(images, 90), images.rot90(1, (2, 3)), atol=1e-5, rtol=0)
    torch.testing.assert_close(rotate(images, -180), images.rot90(2, (2, 3)), atol=1e-5, rtol=0)
    expected = scipy_rotate(images.numpy(), 30, axes=(2, 3), reshape=False, order=1, mode="constant")
    inner = (slice(None), slice(None), slice(2, 6), slice(2, 6))
    torch.testing.assert_close(
        rotate(images, 30)[inner], torch.from_numpy(expected)[inner], atol=1e-4, rtol=0
    )
    wide = torch.zeros(1, 1, 9, 15)
    wide[0, 0, 4, 11] = 1.0  # four to the right of the centre goes four up
    assert rotate(wide, 90)[0, 0].flatten().argmax() == 0 * 15 + 7


def test_blur():
    images = digits((4,))[0][0].double()
    assert torch.equal(blur(images, 0), images)
    for sigma in (0.5, 1.3, 4.0):  # the last one is wider than the image
        found = blur(images, sigma)
        expected = gaussian_filter(
            images.numpy(), (0, 0, sigma, sigma), mode="nearest", radius=(0, 0, *[math.ceil(3 * sigma)] * 2)
        )
        torch.testing.assert_close(found, torch.from_numpy(expected))
    colour = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(blur(colour, 1.0)[:, 1:2], blur(colour[:, 1:2], 1.0))


def test_noise_and_contrast():
    images = torch.full((50, 1, 8, 8), 0.5)
    noisy = add_noise(images, 0.05, generator=torch.Generator().manual_seed(0))
    assert abs((noisy - images).std() - 0.05) < 0.003
    again = add_noise(images, 0.05, generator=torch.Generator().manual_seed(0))
    assert torch.equal(noisy, again) and torch.equal(add_noise(images, 0.0), images)
    assert add_noise(images, 5.0).max() == 1 and add_noise(images, 5.0, bounds=None).max() > 1
    faded = change_contrast(digits((5,))[0][0], 0.25)
    torch.testing.assert_close(faded.mean((1, 2, 3)), digits((5,))[0][0].mean((1, 2, 3)))
    assert change_contrast(torch.rand(2, 1, 4, 4), 0.0).flatten(1).std(1).max() < 1e-6


@pytest.mark.parametrize("shift", [rotate, add_noise, blur, change_contrast])
def test_bad_input(shift):
    for bad in (torch.ones(8, 8), torch.ones(1, 1, 8, 8, dtype=torch.int64)):
        with pytest.raises(ValueError, match="images"):
            shift(bad, 0.5)
    if shift is not rotate:
        with pytest.raises(ValueError):
            shift(torch.ones(1, 1, 8, 8), -1.0)
