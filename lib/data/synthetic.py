"""Constructed datasets on which a method's behaviour can be computed by hand."""

import torch


def perceptron_hard_case(n: int, *, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """The dataset on which averaging over all samples costs a factor n (arXiv 2412.08424, lower bound).

    One sample (1/2, -1) of class 1 and n - 1 samples (-1/2, -1) of class -1. Its margin is 1/2 and R^2 is 5/4.
    `batch_perceptron` of `lib.optim` needs floor((3n + 2) / 10) + 1 steps, in exact
    arithmetic: where 10 divides 3n + 2 a point passes exactly through the boundary, and rounding may decide.

    Args:
        n: the number of samples, at least 2.
        dtype: of the features.

    Returns:
        `features` of shape `(n, 2)` and `targets` of shape `(n,)` with values -1 and 1.

    Raises:
        ValueError: `n` is below 2.
    """
    if n < 2:
        raise ValueError(f"n must be at least 2, one sample of each class, got {n}")
    features = torch.tensor([[-0.5, -1.0]], dtype=dtype).repeat(n, 1)
    features[0, 0] = 0.5
    targets = -torch.ones(n, dtype=torch.int64)
    targets[0] = 1
    return features, targets


def diverging_loss_pair(*, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Two samples on which the loss diverges with the step size one step before they are separated.

    (1, -1) of class 1 and (-1, -4) of class -1 (arXiv 2412.08424). Returns `features` of shape `(2, 2)` and
    `targets` of shape `(2,)`.
    """
    return torch.tensor([[1.0, -1.0], [-1.0, -4.0]], dtype=dtype), torch.tensor([1, -1])
