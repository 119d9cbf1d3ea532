"""Prediction of volumes that are larger than what a network was trained on."""

import itertools

import torch
from torch import nn


@torch.no_grad()
def sliding_window_predict(
    model: nn.Module,
    volumes: torch.Tensor,
    size: int | tuple[int, ...],
    *,
    stride: int | tuple[int, ...] | None = None,
    batch_size: int = 32,
) -> torch.Tensor:
    """Class probabilities of whole volumes: the mean over all windows that see a voxel.

    The model is put into its eval mode meanwhile. The last window of each axis is moved back to end at the border.

    Args:
        model: maps (batch, channels, *size) to logits (batch, classes, *size).
        volumes: (n, channels, d1, ..., dk).
        size: of the window, one number or one for each axis.
        stride: of the window, the same; half its size by default.
        batch_size: how many volumes go through the model at a time, one window of each.

    Returns:
        (n, classes, d1, ..., dk).

    Raises:
        ValueError: a window that is larger than the volumes, or a stride outside 1 to the window's size.
    """
    shape = volumes.shape[2:]
    size = (size,) * len(shape) if isinstance(size, int) else tuple(size)
    stride = tuple(max(1, edge // 2) for edge in size) if stride is None else stride
    stride = (stride,) * len(shape) if isinstance(stride, int) else tuple(stride)
    if len(size) != len(shape) or any(
        not 1 <= edge <= length for edge, length in zip(size, shape, strict=False)
    ):
        raise ValueError(f"size must be within 1 and {tuple(shape)}, got {size}")
    if len(stride) != len(size) or any(
        not 1 <= step <= edge for step, edge in zip(stride, size, strict=False)
    ):
        raise ValueError(f"stride must be from 1 to the size {size} on each axis, got {stride}")
    starts = [
        sorted({*range(0, length - edge, step), length - edge})
        for length, edge, step in zip(shape, size, stride, strict=True)
    ]
    was_training = model.training
    model.eval()
    try:
        results = []
        for batch in volumes.split(batch_size):
            total, seen = None, volumes.new_zeros(shape)
            for corner in itertools.product(*starts):
                window = (..., *(slice(t, t + edge) for t, edge in zip(corner, size, strict=True)))
                probs = model(batch[window]).softmax(1)
                if total is None:
                    total = probs.new_zeros(len(batch), probs.shape[1], *shape)
                total[window] += probs
                seen[window[1:]] += 1
            results.append(total / seen)
    finally:
        model.train(was_training)
    return torch.cat(results)
