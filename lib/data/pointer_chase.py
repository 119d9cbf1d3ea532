"""Panels of images in which each image names the cell to look at next."""

from typing import NamedTuple

import torch


class PointerChase(NamedTuple):
    """Panels and their tours.

    Attributes:
        panels: what shows in each cell, rows of the given images: (batch, num_symbols, ...).
        following: the symbol in each cell, which is the number of the next cell: int64, (batch, num_symbols).
        start: the first cell, int64, (batch,).
        hops: how many hops are asked for, int64, (batch,).
        walk: the symbols that are read, walk[:, j] after j hops: int64, (batch, max(hops) + 1).
        answer: walk[:, hops], int64, (batch,).
    """

    panels: torch.Tensor
    following: torch.Tensor
    start: torch.Tensor
    hops: torch.Tensor
    walk: torch.Tensor
    answer: torch.Tensor


def visual_pointer_chase(
    num_symbols: int,
    hops: int | tuple[int, ...],
    images: torch.Tensor,
    labels: torch.Tensor,
    batch: int,
    generator: torch.Generator | None = None,
) -> PointerChase:
    """Draw panels of `num_symbols` cells, each with another symbol; the symbol d sends you to the cell d.

    Start at a cell and read its symbol. That is the answer after 0 hops. Go to the cell of this number and read: 1 hop. The
    symbols form one tour through all cells, so that no walk returns before it has read every cell, and no answer can be
    guessed from the start.

    Args:
        num_symbols: cells of a panel, and the symbols 0 .. num_symbols - 1.
        hops: the number of hops, or several numbers from which each row draws one.
        images: (n, ...), the images, or their features.
        labels: which symbol each one shows, (n,). Others than the first `num_symbols` are not used.
        batch: the number of panels.
        generator: of the random choices.

    Raises:
        ValueError: fewer than 2 symbols, a number of hops that is negative or no less than `num_symbols`, a batch below 1,
            or a symbol without an image.
    """
    hops = (hops,) if isinstance(hops, int) else tuple(hops)
    if num_symbols < 2 or batch < 1:
        raise ValueError(f"need num_symbols >= 2 and batch >= 1, got {num_symbols} and {batch}")
    if not hops or min(hops) < 0 or max(hops) >= num_symbols:
        raise ValueError(f"hops must be within 0 .. {num_symbols - 1}, got {hops}")
    if len(images) != len(labels):
        raise ValueError(f"images and labels differ in number: {len(images)} and {len(labels)}")
    order = torch.rand(batch, num_symbols, generator=generator).argsort(1)  # the tour
    following = torch.empty_like(order).scatter_(1, order, order.roll(-1, 1))
    panels = torch.empty_like(order)
    for symbol in range(num_symbols):
        rows = (labels == symbol).nonzero()[:, 0].cpu()
        if len(rows) == 0:
            raise ValueError(f"no image shows the symbol {symbol}")
        drawn = rows[torch.randint(len(rows), order.shape, generator=generator)]
        panels = torch.where(following == symbol, drawn, panels)
    start = torch.randint(num_symbols, (batch,), generator=generator)
    asked = torch.tensor(hops)[torch.randint(len(hops), (batch,), generator=generator)]
    walk = [start]
    for _ in range(max(hops) + 1):
        walk.append(following.gather(1, walk[-1][:, None])[:, 0])
    walk = torch.stack(walk[1:], 1)
    answer = walk.gather(1, asked[:, None])[:, 0]
    tensors = (images[panels.to(images.device)], following, start, asked, walk, answer)
    return PointerChase(*(tensor.to(images.device) for tensor in tensors))
