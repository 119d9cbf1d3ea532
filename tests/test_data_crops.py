"""Random resized crops with stored parameters, and boxes of crops pasted into others."""

import pytest
import torch
import torch.nn.functional as F

from lib.data import crop_parameters, cutmix, paste_box, random_resized_crop, selfmix


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", [1, 5, 12, 31])
def test_crops_are_those_of_interpolate(size):
    images = torch.rand(40, 2, 17, 23, generator=rng(), dtype=torch.float64)
    parameters = crop_parameters(40, 17, 23, area=(0.02, 1.0), generator=rng(1))
    crops = random_resized_crop(images, parameters, size)
    for image, crop, (top, left, tall, wide, flip) in zip(images, crops, parameters.tolist(), strict=True):
        box = image[None, :, top : top + tall, left : left + wide]
        expected = F.interpolate(box, (size, size), mode="bilinear", antialias=True)[0]
        torch.testing.assert_close(crop, expected.flip(2) if flip else expected)
    assert 0 < parameters[:, 4].sum() < 40


def test_crop_by_hand():
    image = torch.arange(12.0).reshape(1, 1, 3, 4)
    whole = torch.tensor([[1, 2, 2, 2, 0]])
    assert random_resized_crop(image, whole, 2).tolist() == [[[[6, 7], [10, 11]]]]
    whole[0, 4] = 1
    assert random_resized_crop(image, whole, 2).tolist() == [[[[7, 6], [11, 10]]]]


def test_crops_are_repeated_bitwise_and_pass_gradients():
    images = torch.rand(5, 1, 9, 9, generator=rng(), requires_grad=True)
    parameters = crop_parameters(5, 9, 9, generator=rng(1))
    crops = random_resized_crop(images, parameters, 6)
    assert torch.equal(crops, random_resized_crop(images, parameters.to(torch.int16), 6))
    crops.sum().backward()
    top, left, tall, wide, _ = parameters[0].tolist()
    outside = torch.ones(9, 9, dtype=torch.bool)
    outside[top : top + tall, left : left + wide] = False
    assert (images.grad[0, 0][outside] == 0).all() and (images.grad[0, 0][~outside] > 0).all()


def test_parameters_have_the_distribution_they_say():
    parameters = crop_parameters(4000, 60, 60, area=(0.1, 0.5), flip=0.25, generator=rng())
    top, left, tall, wide, flip = parameters.double().unbind(1)
    assert (top >= 0).all() and (left >= 0).all() and (top + tall <= 60).all() and (left + wide <= 60).all()
    area = tall * wide / 3600
    assert area.min() > 0.09 and area.max() < 0.52 and abs(area.mean() - 0.3) < 0.01
    ratio = (wide / tall).log()
    assert abs(ratio.mean()) < 0.01 and ratio.abs().max() < torch.log(torch.tensor(4 / 3)) + 0.06
    assert abs(flip.mean() - 0.25) < 0.03
    assert abs((top / (60 - tall).clamp_min(1)).mean() - 0.5) < 0.03
    assert (
        crop_parameters(50, 8, 8, area=(1.0, 1.0), ratio=(1.0, 1.0), flip=0)[:, :4]
        == torch.tensor([0, 0, 8, 8])
    ).all()
    assert crop_parameters(0, 8, 8).shape == (0, 5)
    assert random_resized_crop(torch.rand(0, 1, 8, 8), crop_parameters(0, 8, 8), 3).shape == (0, 1, 3, 3)


def test_labels_are_mixed_by_the_pixels_that_are_there():
    first, second = torch.zeros(300, 2, 6, 9), torch.ones(300, 2, 6, 9)
    one, two = torch.eye(3)[[0]].expand(300, 3), torch.eye(3)[[1]].expand(300, 3)
    images, labels = paste_box(first, second, one, two, generator=rng())
    assert torch.equal(images[:, 0], images[:, 1])
    pasted = images.mean((1, 2, 3))
    torch.testing.assert_close(labels, torch.stack([1 - pasted, pasted, 0 * pasted], 1))
    assert abs(pasted.mean() - 0.5) < 0.05 and pasted.min() == 0 and pasted.max() == 1
    for image in images[:, 0]:  # a box: a product of rows and columns
        assert torch.equal(image, image.amax(1, keepdim=True) * image.amax(0, keepdim=True))
    assert (images > 0).any(0).all()
    again = paste_box(first, second, one, two, generator=rng())
    assert torch.equal(images, again[0]) and torch.equal(labels, again[1])


def numbered(images=5, crops=4):
    """Crops that carry the numbers of their image and their place, and labels that say the same."""
    image = torch.arange(images)[:, None].expand(images, crops)
    place = torch.arange(crops).expand(images, crops)
    pixels = torch.stack([image, place], 2).float()[..., None, None].expand(-1, -1, -1, 8, 8)
    return pixels.contiguous(), F.one_hot(image * crops + place, images * crops).float()


@pytest.mark.parametrize("mix", [selfmix, cutmix])
def test_partners(mix):
    crops, labels = numbered()
    partners = set()
    for seed in range(40):
        mixed, mixed_labels = mix(crops, labels, generator=rng(seed))
        torch.testing.assert_close(mixed_labels.sum(-1), torch.ones(5, 4))
        for i in range(5):
            for r in range(4):
                pixels = mixed[i, r].flatten(1).long()
                sources = (pixels[0] * 4 + pixels[1]).bincount(minlength=20) / 64
                torch.testing.assert_close(mixed_labels[i, r], sources)
                partners |= {(j // 4 - i, j % 4 - r) for j in sources.nonzero()[:, 0].tolist()}
    partners -= {(0, 0)}
    if mix is selfmix:
        assert partners == {(0, move) for move in (-3, -2, -1, 1, 2, 3)}
    else:
        assert partners == {(move, 0) for move in range(-4, 5) if move}


def test_mixing_under_vmap():
    crops, labels = numbered(3, 2)
    crops, labels = (each.expand(6, *each.shape) for each in (crops, labels))
    torch.manual_seed(0)
    mixed, mixed_labels = torch.vmap(selfmix, randomness="different")(crops, labels)
    assert mixed.shape == crops.shape
    torch.testing.assert_close(mixed_labels.sum(-1), torch.ones(6, 3, 2))
    assert any(not torch.equal(mixed[0], each) for each in mixed[1:])


def test_bad_input():
    images, good = torch.rand(2, 1, 8, 8), torch.tensor([[0, 0, 8, 8, 0], [1, 2, 3, 4, 1]])
    for change in ([-1, 0, 4, 4, 0], [0, 0, 0, 4, 0], [0, 5, 4, 4, 0], [0, 0, 4, 4, 2]):
        with pytest.raises(ValueError, match="box"):
            random_resized_crop(images, torch.tensor([good[0].tolist(), change]), 4)
    with pytest.raises(TypeError):
        random_resized_crop(images, good.float(), 4)
    with pytest.raises(ValueError, match="parameters"):
        random_resized_crop(images, good[:1], 4)
    with pytest.raises(ValueError, match="images"):
        random_resized_crop(images[0], good, 4)
    with pytest.raises(ValueError, match="size"):
        random_resized_crop(images, good, 0)
    for options in ({"area": (0.0, 1.0)}, {"area": (0.5, 0.4)}, {"ratio": (0, 1)}, {"flip": 1.5}):
        with pytest.raises(ValueError):
            crop_parameters(3, 8, 8, **options)
    with pytest.raises(ValueError):
        crop_parameters(3, 0, 8)
    crops, labels = numbered(3, 2)
    with pytest.raises(ValueError, match="crops of each image"):
        selfmix(crops[:, :1], labels[:, :1])
    with pytest.raises(ValueError, match="images"):
        cutmix(crops[:1], labels[:1])
    with pytest.raises(ValueError, match="labels"):
        selfmix(crops, labels[:, 0])
    with pytest.raises(ValueError):
        paste_box(crops[0], crops[0, :1], labels[0], labels[0])
    with pytest.raises(ValueError, match="labels"):
        paste_box(crops[0], crops[0], labels[0], labels[0, :1])
