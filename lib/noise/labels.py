"""Wrong labels by rule: uniform, or class by class through a transition matrix."""

from collections.abc import Iterable

import torch


def uniform_flip(
    targets: torch.Tensor, rate: float, num_classes: int, *, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Replace each label, with probability `rate`, by one of the other classes, all equally likely (symmetric noise).

    A flipped label is always wrong: at rate (C - 1) / C the labels say nothing any more.

    Args:
        targets: class indices of any shape, in [0, num_classes).
        rate: probability of a flip, in [0, 1].
        num_classes: at least 2.
        generator: source of randomness; the global one when None.

    Returns:
        The noisy labels, a new tensor like `targets`.

    Raises:
        TypeError: targets that are not integers.
        ValueError: a rate outside [0, 1], fewer than 2 classes, or targets out of range.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must be in [0, 1], got {rate}")
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    rows = torch.full((num_classes, num_classes), rate / (num_classes - 1), dtype=torch.float64)
    return class_dependent_flip(targets, rows.fill_diagonal_(1 - rate), generator=generator)


def class_dependent_flip(
    targets: torch.Tensor, transition: torch.Tensor, *, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Draw each label anew from the row of the transition matrix that belongs to the true class.

    Args:
        targets: class indices of any shape, in [0, C).
        transition: P(noisy label = column | true label = row), (C, C); rows sum to 1.
        generator: source of randomness; the global one when None.

    Returns:
        The noisy labels, a new tensor like `targets`.

    Raises:
        TypeError: targets that are not integers.
        ValueError: a transition matrix that is not square, has negative entries or rows that do not sum to 1; targets
            out of range.
    """
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise TypeError(f"targets must be integer class indices, got {targets.dtype}")
    if transition.dim() != 2 or transition.shape[0] != transition.shape[1]:
        raise ValueError(f"transition must be square, got {tuple(transition.shape)}")
    transition = transition.double().cpu()
    if bool((transition < 0).any()) or not torch.allclose(
        transition.sum(1), torch.ones(len(transition), dtype=torch.float64), atol=1e-6
    ):
        raise ValueError("every row of transition must be a distribution: at least 0 and with sum 1")
    labels = targets.reshape(-1).cpu().long()
    if labels.numel() == 0:
        return targets.clone()
    if bool(((labels < 0) | (labels >= len(transition))).any()):
        raise ValueError(
            f"targets must be in [0, {len(transition)}), got values from {labels.min()} to {labels.max()}"
        )
    draws = torch.rand(len(labels), 1, dtype=torch.float64, generator=generator)
    noisy = (draws > transition.cumsum(1)[labels]).sum(1).clamp_max(len(transition) - 1)
    return noisy.to(targets).reshape(targets.shape)


def pair_transition(pairs: Iterable[tuple[int, int]], rate: float, num_classes: int) -> torch.Tensor:
    """The transition matrix of classes that are taken for one another: (a, b) flips a to b and b to a.

    Args:
        pairs: of classes, no class in two of them.
        rate: probability of the flip, in [0, 1].
        num_classes: size of the matrix.

    Returns:
        (num_classes, num_classes), float64, rows with sum 1.

    Raises:
        ValueError: a rate outside [0, 1], a class out of range or in two pairs.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must be in [0, 1], got {rate}")
    matrix, seen = torch.eye(num_classes, dtype=torch.float64), set()
    for a, b in pairs:
        if a == b or not {a, b} <= set(range(num_classes)) or seen & {a, b}:
            raise ValueError(
                f"pairs must name different classes in [0, {num_classes}), each once; got {(a, b)}"
            )
        seen |= {a, b}
        for true, other in ((a, b), (b, a)):
            matrix[true, true], matrix[true, other] = 1 - rate, rate
    return matrix
