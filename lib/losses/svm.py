"""Margin losses of linear support vector machines, one class against the rest."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from lib.losses._classification import reduce_rows, rows


def l2_svm(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    C: float = 0.5,
    head_weight: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    """Squared hinge loss of every class against the rest, with the penalty of a linear SVM (Tang 2013, equation 10).

    The sum over the classes c of max(0, 1 - Y_c z_c)^2, times C, where Y_c is 1 for the target and -1 for every other
    class. With `head_weight` and `reduction="sum"` this is scikit-learn's
    `LinearSVC(loss="squared_hinge")`, and the loss of Agarap 2017 (arXiv 1709.03082).

    At a glance:
        formula: `C sum_c max(0, 1 - Y_c z_c)^2`, Y_c = 1 for the target and -1 otherwise; plus `|W|^2 / 2` once
        gradient: `-2 C Y_c max(0, 1 - Y_c z_c)`: zero for every class that has its margin
        consistency: `z_c = 2 P(c) - 1`: Bayes-consistent, and the probabilities can be read off
        cost: `O(C)` per row, no exponential

    Args:
        logits: (C,), (N, C) or (N, C, d1, ...), floating point; half precision is computed in float32.
        targets: class indices of that shape without C.
        C: weight of the data against the penalty, at least 0 (the authors take 0.5).
        head_weight: weight of the linear layer that made the logits, any shape; half its squared norm is added once,
            whatever the reduction. None: no penalty.
        weight: of each class, (C,).
        ignore_index: targets that have no loss and no gradient, and do not count in the mean.
        reduction: `"mean"`, `"sum"` (the authors') or `"none"`, which goes without a penalty only.

    Returns:
        A scalar, or losses of the shape of `targets` under `"none"`.

    Raises:
        TypeError: dtypes that do not fit.
        ValueError: shapes that do not fit, targets out of range, a negative C, an unknown reduction, or a penalty with
            `reduction="none"`.
    """
    options = {
        "head_weight": head_weight,
        "weight": weight,
        "ignore_index": ignore_index,
        "reduction": reduction,
    }
    return _svm(lambda slack: slack.square(), logits, targets, C, **options)


def l1_svm(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    C: float = 0.5,
    head_weight: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    """Hinge loss of every class against the rest: as `l2_svm`, without the square (Tang 2013, equation 5).

    Arguments, result and errors are those of `l2_svm`.

    At a glance:
        formula: `C sum_c max(0, 1 - Y_c z_c)`, Y_c = 1 for the target and -1 otherwise; plus `|W|^2 / 2` once
        gradient: `-C Y_c` for every class below its margin, 0 above it
        consistency: `z_c` is the sign of `P(c) - 1/2`: consistent only where one class has more than half
        cost: `O(C)` per row, no exponential
    """
    options = {
        "head_weight": head_weight,
        "weight": weight,
        "ignore_index": ignore_index,
        "reduction": reduction,
    }
    return _svm(lambda slack: slack, logits, targets, C, **options)


def _svm(
    power: Callable[[torch.Tensor], torch.Tensor],
    logits,
    targets,
    C,
    *,
    head_weight,
    weight,
    ignore_index,
    reduction,
):
    if not 0 <= C < float("inf"):
        raise ValueError(f"C must be at least 0 and finite, got {C}")
    if head_weight is not None and reduction == "none":
        raise ValueError("the penalty of head_weight belongs to no single row: use reduction 'mean' or 'sum'")
    z, labels, valid = rows(logits, targets, weight=weight, ignore_index=ignore_index, reduction=reduction)
    signs = 2.0 * F.one_hot(labels, z.shape[1]).to(z.dtype) - 1.0
    losses = C * power((1.0 - signs * z).clamp_min(0.0)).sum(1)
    loss = reduce_rows(losses, labels, valid, targets.shape, weight=weight, reduction=reduction)
    return loss if head_weight is None else loss + head_weight.square().sum() / 2
