import pytest
import torch

from lib.data import photograph, photograph_crops, photographs


def test_split_and_sizes():
    train, held_out = photographs("train"), photographs("held out")
    assert len(train) == 8 and len(held_out) == 2 and not set(train) & set(held_out)
    for image in (*train.values(), *held_out.values()):
        assert image.dtype == torch.float32 and len(image) == 3 and min(image.shape[1:]) >= 256
        assert 0 <= image.min() and image.max() <= 1 and image.std() > 0.05
    small = photograph("chelsea", shrink=2)
    assert small.shape[1] == held_out["chelsea"].shape[1] // 2
    assert torch.allclose(small[:, 0, 0], held_out["chelsea"][:, :2, :2].mean((1, 2)))


def test_crops():
    crops = photograph_crops(9, size=32, seed=3)
    assert crops.shape == (9, 3, 32, 32)
    assert torch.equal(crops, photograph_crops(9, size=32, seed=3))
    assert not torch.equal(crops, photograph_crops(9, size=32, seed=4))
    patch = photograph_crops(1, size=20, part="held out")[0]
    image = photograph("chelsea")
    places = image.unfold(1, 20, 1).unfold(2, 20, 1)[0]
    assert any((places == p[0]).flatten(2).all(-1).any() for p in (patch, patch.flip(-1)))


def test_photographs_reject():
    for call in (
        lambda: photograph("lena"),
        lambda: photograph("coffee", shrink=0),
        lambda: photographs("test"),
        lambda: photograph_crops(0),
        lambda: photograph_crops(1, size=4000),
    ):
        with pytest.raises(ValueError):
            call()
