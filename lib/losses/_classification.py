"""What every classification loss does before and after its own formula: check, flatten, ignore, weigh, reduce.

The conventions are those of `torch.nn.functional.cross_entropy`: logits (C,), (N, C) or (N, C, d1, ...), class indices
of that shape without C, class weights that also enter the mean's denominator, ignored targets. Half precision is computed
in float32.
"""

import torch

REDUCTIONS = ("mean", "sum", "none")


def rows(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    min_classes: int = 2,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The logits as rows, with labels that can be gathered; everything is checked.

    Args:
        logits: (C,), (N, C) or (N, C, d1, ...), floating point.
        targets: class indices (), (N,) or (N, d1, ...), in [0, C) or `ignore_index`.
        weight: of each class, (C,), finite and at least 0.
        ignore_index: targets that do not count.
        reduction: `"mean"`, `"sum"` or `"none"`.
        min_classes: below this many classes the loss has no meaning.

    Returns:
        logits (rows, C) in at least float32, with zeros in ignored rows; labels (rows,), 0 where ignored; valid
        (rows,), False where ignored.

    Raises:
        TypeError: logits that are not floating point, targets that are not integers, a weight of another kind.
        ValueError: shapes that do not fit, targets out of range, a negative weight, an unknown reduction.
    """
    check_reduction(reduction)
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise TypeError(f"targets must be integer class indices, got {targets.dtype}")
    if logits.dim() == 0:
        raise ValueError("logits must have a dimension of classes, got a scalar")
    axis = 0 if logits.dim() == 1 else 1
    classes = logits.shape[axis]
    expected = logits.shape[:axis] + logits.shape[axis + 1 :]
    if classes < min_classes:
        raise ValueError(f"logits must have at least {min_classes} classes, got shape {tuple(logits.shape)}")
    if targets.shape != expected:
        raise ValueError(
            f"targets must be {tuple(expected)} for logits {tuple(logits.shape)} (classes in dimension {axis}), "
            f"got {tuple(targets.shape)}"
        )
    if weight is not None:
        _check_weight(weight, classes, logits)
    labels = targets.reshape(-1).long()
    valid = labels != ignore_index
    if _readable(labels) and bool(((labels < 0) | (labels >= classes)).logical_and(valid).any()):
        wrong = labels[valid & ((labels < 0) | (labels >= classes))][0].item()
        raise ValueError(f"targets must be in [0, {classes}) or {ignore_index}, got {wrong}")
    logits = logits.movedim(axis, -1).reshape(-1, classes)
    if logits.dtype.itemsize < 4:
        logits = logits.float()
    if not _readable(valid) or not bool(valid.all()):  # an ignored row may hold anything, infinities included
        logits = torch.where(valid.unsqueeze(1), logits, 0.0)
        labels = torch.where(valid, labels, 0)
    return logits, labels, valid


def reduce_rows(
    losses: torch.Tensor,
    labels: torch.Tensor,
    valid: torch.Tensor,
    shape: torch.Size,
    *,
    weight: torch.Tensor | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """Weigh the losses of the rows by class, drop the ignored ones and reduce.

    Args:
        losses: one number a row, (rows,).
        labels: (rows,), as from `rows`.
        valid: (rows,), as from `rows`.
        shape: of the targets; the shape of the result under `"none"`.
        weight: of each class, (C,).
        reduction: `"mean"` divides by the weight of the rows that count (NaN where there are none, as in PyTorch).

    Returns:
        A scalar, or losses of the given shape with 0 at ignored targets.
    """
    if weight is None:
        weights = valid.to(losses.dtype)
    else:
        weights = torch.where(valid, weight.to(losses.dtype)[labels], 0.0)
    losses = losses * weights
    if reduction == "none":
        return losses.reshape(shape)
    return losses.sum() if reduction == "sum" else losses.sum() / weights.sum()


def reduce(values: torch.Tensor, reduction: str) -> torch.Tensor:
    """Plain mean, sum, or the values themselves.

    Raises:
        ValueError: an unknown reduction.
    """
    check_reduction(reduction)
    return values if reduction == "none" else values.sum() if reduction == "sum" else values.mean()


def check_reduction(reduction: str) -> None:
    """Raises a ValueError for an unknown reduction."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")


def _check_weight(weight, classes, logits):
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        kind = weight.dtype if isinstance(weight, torch.Tensor) else type(weight).__name__
        raise TypeError(f"weight must be a floating-point tensor, got {kind}")
    if weight.shape != (classes,):
        raise ValueError(f"weight must be ({classes},), one number a class, got {tuple(weight.shape)}")
    if weight.device != logits.device:
        raise ValueError(f"weight must be on {logits.device} like the logits, got {weight.device}")
    if _readable(weight) and not bool((weight.isfinite() & (weight >= 0)).all()):
        raise ValueError("weight must be finite and at least 0 for every class")


def _readable(tensor):
    """Whether values can be looked at: not under vmap, nor on the meta device."""
    return not (torch._C._functorch.is_functorch_wrapped_tensor(tensor) or tensor.is_meta)
