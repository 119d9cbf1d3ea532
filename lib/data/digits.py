"""The 1797 handwritten digits of scikit-learn as tensors, split without overlap."""

from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def digits(
    parts: Sequence[int] | Sequence[float] = (1200, 597), *, seed: int = 0, flat: bool = False
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The scikit-learn digits, split into disjoint parts.

    One seed means one permutation of the images, and the parts are consecutive pieces of it. So the last 597
    images are the same test set in `digits((1200, 597))` and in `digits((300, 900, 597))`.

    Args:
        parts: the sizes of the parts, either all whole numbers (images) or all floats (fractions of the 1797).
        seed: of the permutation; the global random state is neither read nor changed.
        flat: images as rows of 64 numbers instead of 1 x 8 x 8.

    Returns:
        One pair (images, labels) for each part: float32 images in [0, 1] of shape (n, 1, 8, 8), or (n, 64) when
        `flat`, and int64 labels of shape (n,).

    Raises:
        ValueError: no parts, a part without images, or more images than there are.
        TypeError: whole numbers mixed with fractions, or other things.
    """
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().div(16).unsqueeze(1)  # (1797, 1, 8, 8)
    labels = torch.from_numpy(bunch.target).long()
    total = len(labels)
    parts = list(parts)
    if all(type(part) is int for part in parts):
        counts = parts
    elif all(isinstance(part, float) for part in parts):
        edges = [round(total * sum(parts[:end])) for end in range(len(parts) + 1)]
        counts = [stop - start for start, stop in zip(edges, edges[1:], strict=False)]
    else:
        raise TypeError(f"parts must be all integers (images) or all floats (fractions), got {parts}")
    if not parts or min(counts) < 1 or sum(counts) > total:
        raise ValueError(f"parts must be positive and sum to at most {total} images, or to 1.0; got {parts}")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[: sum(counts)]
    if flat:
        images = images.flatten(1)
    return [(images[index], labels[index]) for index in order.split(counts)]
