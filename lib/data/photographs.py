"""Colour photographs that ship with scikit-learn and scikit-image, with a fixed split, and crops of them."""

import functools

import skimage.data
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_image

PHOTOGRAPHS = {
    "train": ("astronaut", "china", "flower", "hubble", "ihc", "motorcycle", "retina", "rocket"),
    "held out": ("chelsea", "coffee"),
}


def photograph(name: str, *, shrink: int = 1) -> torch.Tensor:
    """One colour photograph, (3, height, width), float32 in [0, 1].

    Args:
        name: one of those in `PHOTOGRAPHS`.
        shrink: average blocks of so many by so many pixels. Some of the pictures are JPEGs, whose traces
            vanish then.

    Raises:
        ValueError: a name that is not there, or a `shrink` that is not a positive integer.
    """
    names = [each for part in PHOTOGRAPHS.values() for each in part]
    if name not in names:
        raise ValueError(f"no photograph {name!r}: there are {names}")
    if not isinstance(shrink, int) or shrink < 1:
        raise ValueError(f"shrink must be a positive integer, got {shrink!r}")
    image = _load(name)
    return F.avg_pool2d(image, shrink) if shrink > 1 else image.clone()


def photographs(part: str = "train", *, shrink: int = 1) -> dict[str, torch.Tensor]:
    """The photographs of one part of the fixed split, by name; see `photograph`.

    No picture is in both parts, so that a codec trained on crops of "train" has seen nothing of "held out".

    Raises:
        ValueError: a part that is neither "train" nor "held out".
    """
    if part not in PHOTOGRAPHS:
        raise ValueError(f"part must be one of {list(PHOTOGRAPHS)}, got {part!r}")
    return {name: photograph(name, shrink=shrink) for name in PHOTOGRAPHS[part]}


def photograph_crops(
    n: int, *, size: int = 64, part: str = "train", shrink: int = 1, seed: int = 0
) -> torch.Tensor:
    """Random square crops, (n, 3, size, size): the photographs in turn, each crop mirrored with chance 1/2.

    Raises:
        ValueError: `n` or `size` below 1, or a photograph smaller than `size`.
    """
    if n < 1 or size < 1:
        raise ValueError(f"n and size must be positive, got {n} and {size}")
    pictures = list(photographs(part, shrink=shrink).values())
    smallest = min(min(picture.shape[1:]) for picture in pictures)
    if size > smallest:
        raise ValueError(f"size is {size}, but the smallest side of a photograph is {smallest}")
    generator, crops = torch.Generator().manual_seed(seed), []
    for i in range(n):
        picture = pictures[i % len(pictures)]
        top, left, mirror = (
            torch.randint(high, (), generator=generator)
            for high in (picture.shape[1] - size + 1, picture.shape[2] - size + 1, 2)
        )
        crop = picture[:, top : top + size, left : left + size]
        crops.append(crop.flip(-1) if mirror else crop)
    return torch.stack(crops)


@functools.cache
def _load(name: str) -> torch.Tensor:
    if name in ("china", "flower"):
        pixels = load_sample_image(f"{name}.jpg")
    else:
        source = {"ihc": "immunohistochemistry", "hubble": "hubble_deep_field"}.get(name, name)
        pixels = (
            skimage.data.stereo_motorcycle()[0] if name == "motorcycle" else getattr(skimage.data, source)()
        )
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255
