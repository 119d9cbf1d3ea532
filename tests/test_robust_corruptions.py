import pytest
import torch

from lib.data import glyphs
from lib.robust import AUGMIX_OPERATIONS, CORRUPTIONS, augmix, corruptions
from lib.robust.augmix import _OPERATIONS

IMAGES = glyphs(4, copies=1, seed=1)[0]


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_each_corruption_is_seeded_in_range_and_grows(kind):
    state = torch.get_rng_state()
    moved = []
    for severity in range(1, 6):
        first = corruptions(IMAGES, kind, severity, seed=3)
        assert first.shape == IMAGES.shape and 0 <= first.min() and first.max() <= 1
        assert torch.equal(first, corruptions(IMAGES, kind, severity, seed=3))
        moved.append((first - IMAGES).square().mean().item())
    # coarse grids that fit the pixels are milder than their size says, so the steps between need not all rise
    assert 0 < moved[0] < moved[-1] == max(moved)
    assert torch.equal(state, torch.get_rng_state())


def test_random_corruptions_follow_the_seed():
    for kind in ("gaussian_noise", "shot_noise", "occlusion", "shift"):
        assert not torch.equal(corruptions(IMAGES, kind, 3, seed=0), corruptions(IMAGES, kind, 3, seed=1))


def test_shot_noise_has_the_mean_and_variance_of_counted_photons():
    grey = torch.full((200, 1, 10, 10), 0.3)
    noisy = corruptions(grey, "shot_noise", 1)
    assert noisy.mean() == pytest.approx(0.3, abs=0.01)
    assert noisy.var() == pytest.approx(0.3 / 40, rel=0.1)


def test_pixelate_leaves_blocks_and_the_mean():
    fine = torch.rand(2, 1, 14, 14, generator=torch.Generator().manual_seed(0))
    coarse = corruptions(fine, "pixelate", 3)  # 7 x 7
    assert (
        torch.equal(coarse[..., ::2, ::2], coarse[..., 1::2, 1::2])
        and len(torch.unique(coarse[0, 0], dim=0)) == 7
    )
    assert coarse.mean() == pytest.approx(fine.mean().item(), abs=0.01)
    flat = torch.full((1, 1, 14, 14), 0.4)
    assert torch.allclose(corruptions(flat, "pixelate", 5), flat)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "fog"},
        {"severity": 0},
        {"severity": 6},
        {"severity": True},
        {"images": IMAGES[0]},
        {"images": IMAGES * 2},
    ],
)
def test_corruptions_reject_bad_arguments(change):
    with pytest.raises(ValueError):
        corruptions(**{"images": IMAGES, "kind": "blur", "severity": 1} | change)


def test_augmix_is_seeded_in_range_and_changes_images():
    draw = [augmix(IMAGES, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])
    assert draw[0].shape == IMAGES.shape and 0 <= draw[0].min() and draw[0].max() <= 1
    assert (draw[0] != IMAGES).flatten(1).any(1).float().mean() > 0.9
    assert torch.equal(augmix(IMAGES, strength=0), IMAGES)
    assert augmix(IMAGES[:0]).shape == IMAGES[:0].shape
    assert augmix(IMAGES.expand(-1, 3, -1, -1)[..., :10], width=1, depth=2).shape == (64, 3, 14, 10)


def test_augmix_operations_are_no_test_corruptions():
    assert not set(AUGMIX_OPERATIONS) & set(CORRUPTIONS)
    forbidden = ("noise", "blur", "contrast", "bright", "pixel", "occlu", "shift", "translate")
    assert not [name for name in AUGMIX_OPERATIONS if any(word in name for word in forbidden)]


def test_operations_at_level_zero_are_the_identity_up_to_interpolation():
    zero, one = torch.zeros(len(IMAGES)), torch.ones(len(IMAGES))
    for name, operation in _OPERATIONS.items():
        gap = (operation(IMAGES, zero, one) - IMAGES).abs().max()
        assert gap < (0.07 if name == "posterize" else 1e-5), name
        for sign in (one, -one):
            assert (operation(IMAGES, one, sign) - IMAGES).abs().mean() > 1e-3, name


def test_posterize_solarize_and_thicken_by_hand():
    row = torch.tensor([[[[0.0, 0.2, 0.3, 0.9]]]])
    one = torch.ones(1)
    assert _OPERATIONS["posterize"](row, one, one)[0, 0, 0].tolist() == [0.0, 0.0, 0.5, 1.0]
    solar = _OPERATIONS["solarize"](row, 0.5 * one, one)[0, 0, 0]
    assert torch.allclose(solar, torch.tensor([0.0, 0.2, 0.3, 0.1]))
    assert torch.allclose(_OPERATIONS["thicken"](row, one, one)[0, 0, 0], torch.tensor([0.2, 0.3, 0.9, 0.9]))
    assert torch.allclose(_OPERATIONS["thicken"](row, one, -one)[0, 0, 0], torch.tensor([0.0, 0.0, 0.2, 0.3]))


@pytest.mark.parametrize(
    "change", [{"width": 0}, {"depth": 0}, {"strength": -1.0}, {"images": IMAGES[0]}, {"images": -IMAGES}]
)
def test_augmix_rejects_bad_arguments(change):
    with pytest.raises(ValueError):
        augmix(**{"images": IMAGES} | change)
