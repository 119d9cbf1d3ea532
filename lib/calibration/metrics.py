"""How far a confidence is from what happens: calibration errors, Brier scores, reliability diagrams.

All take either probabilities of classes, (n, C), with class indices as targets, or the probability of one event, (n,),
with outcomes 0 or 1. Where a function judges the confidence of the prediction, the largest probability of a row is
the confidence and the event is that the prediction is right. Scores are plain floats, computed in float64.
"""

from typing import NamedTuple

import torch

KINDS = ("equal", "adaptive")


class Bins(NamedTuple):
    """The bins of a reliability diagram; empty bins have a count of 0 and NaN for both means."""

    confidence: torch.Tensor
    accuracy: torch.Tensor
    count: torch.Tensor
    edges: torch.Tensor


def top_label(probabilities: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The confidence of each prediction and whether it is right.

    Args:
        probabilities: (n, C) of the classes, or (n,) of one event.
        targets: class indices (n,), or outcomes 0 or 1 (also booleans).

    Returns:
        confidence (n,) in float64 and correctness (n,) as booleans. Probabilities of one event are returned as they
        are, with the outcomes.

    Raises:
        TypeError: probabilities that are not floating point, or targets that are neither integers nor booleans.
        ValueError: shapes that do not fit, no samples, probabilities outside [0, 1] or rows that do not sum to 1,
            targets out of range.
    """
    probabilities, targets = _check(probabilities, targets)
    if probabilities.dim() == 1:
        return probabilities, targets.bool()
    confidence, prediction = probabilities.max(1)
    return confidence, prediction == targets


def reliability_diagram(
    probabilities: torch.Tensor, targets: torch.Tensor, *, bins: int = 15, kind: str = "equal"
) -> Bins:
    """The numbers of a reliability diagram: mean confidence against accuracy, bin by bin.

    Args:
        probabilities: (n, C), or (n,) of one event.
        targets: class indices or outcomes, (n,).
        bins: how many.
        kind: `"equal"`: bins of equal width on [0, 1], closed on the right. `"adaptive"`: bins with equally many
            samples, as nearly as that can be; samples of one confidence may be torn apart.

    Returns:
        `Bins`: mean confidence, accuracy and count of each bin, (bins,), and the edges, (bins + 1,).

    Raises:
        TypeError, ValueError: as `top_label`; fewer than one bin or an unknown kind.
    """
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise ValueError(f"bins must be an integer of at least 1, got {bins!r}")
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    return _bin(*top_label(probabilities, targets), bins, kind)


def ece(probabilities: torch.Tensor, targets: torch.Tensor, *, bins: int = 15, kind: str = "equal") -> float:
    """Expected calibration error: the mean distance of confidence and accuracy over bins, weighted by their counts.

    Binning hides errors that cancel within a bin and, with few samples a bin, adds noise to a calibrated model: compare
    models at one number of bins, and look at more than one number.

    Args:
        probabilities: (n, C), or (n,) of one event.
        targets: class indices or outcomes, (n,).
        bins: how many.
        kind: `"equal"` width (Guo et al., 2017) or `"adaptive"`, equal mass.

    Raises:
        TypeError, ValueError: as `reliability_diagram`.
    """
    return _gap(reliability_diagram(probabilities, targets, bins=bins, kind=kind))


def classwise_ece(
    probabilities: torch.Tensor, targets: torch.Tensor, *, bins: int = 15, kind: str = "equal"
) -> float:
    """Mean over the classes of the calibration error of "it is this class" (Kull et al., 2019).

    Args:
        probabilities: (n, C).
        targets: class indices, (n,).
        bins: how many.
        kind: as in `ece`.

    Raises:
        TypeError, ValueError: as `reliability_diagram`; probabilities that are not (n, C).
    """
    probabilities, targets = _check(probabilities, targets)
    if probabilities.dim() != 2:
        raise ValueError("classwise_ece needs the probabilities of all classes, (n, C)")
    errors = [
        ece(column, targets == label, bins=bins, kind=kind) for label, column in enumerate(probabilities.T)
    ]
    return sum(errors) / len(errors)


def brier(probabilities: torch.Tensor, targets: torch.Tensor) -> float:
    """Brier score: the mean squared distance to what happened.

    For classes, (n, C), the squares are summed over the classes, so that the score lies in [0, 2]. For one event, (n,),
    it is the mean of (probability - outcome)^2. The Brier score of *correctness* is `brier(*top_label(p, targets))`.

    Raises:
        TypeError, ValueError: as `top_label`.
    """
    probabilities, targets = _check(probabilities, targets)
    if probabilities.dim() == 1:
        return ((probabilities - targets.double()) ** 2).mean().item()
    wanted = torch.nn.functional.one_hot(targets.long(), probabilities.shape[1])
    return ((probabilities - wanted) ** 2).sum(1).mean().item()


def auroc_correctness(probabilities: torch.Tensor, targets: torch.Tensor) -> float:
    """The probability that a right prediction has more confidence than a wrong one; ties count one half.

    One half is chance. It depends on the order of the confidences only, so no monotone recalibration of the
    confidence changes it.

    Returns:
        The area under the ROC curve; NaN where all predictions are right or all are wrong.

    Raises:
        TypeError, ValueError: as `top_label`.
    """
    confidence, correct = top_label(probabilities, targets)
    right, wrong = int(correct.sum()), int((~correct).sum())
    if not right or not wrong:
        return float("nan")
    # midranks by counting: the sum of the ranks of the right ones is Mann and Whitney's statistic
    values, inverse, counts = torch.unique(confidence, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2.0)[inverse]
    return (ranks[correct].sum().item() - right * (right + 1) / 2) / (right * wrong)


def _bin(confidence, outcome, bins, kind):
    outcome = outcome.double()
    if kind == "equal":
        edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=confidence.device)
        index = (torch.bucketize(confidence, edges) - 1).clamp(0, bins - 1)  # closed on the right
    else:
        order = confidence.argsort(stable=True)
        index = torch.empty_like(order)
        index[order] = torch.arange(len(order), device=order.device) * bins // len(order)
        ordered = confidence[order]
        starts = torch.tensor([-(-b * len(order) // bins) for b in range(1, bins)], device=order.device)
        inner = ordered[starts.long().clamp(max=len(order) - 1)]
        edges = torch.cat([ordered[:1], inner, ordered[-1:]])
    count = torch.zeros(bins, dtype=torch.float64, device=confidence.device)
    count.index_add_(0, index, torch.ones_like(confidence))
    sums = torch.zeros(2, bins, dtype=torch.float64, device=confidence.device)
    sums.index_add_(1, index, torch.stack([confidence, outcome]))
    means = sums / count  # 0/0 is NaN: an empty bin has no mean
    return Bins(means[0], means[1], count.long(), edges)


def _gap(binned):
    filled = binned.count > 0
    distance = (binned.confidence - binned.accuracy).abs()[filled]
    return (distance * binned.count[filled]).sum().item() / binned.count.sum().item()


def _check(probabilities, targets):
    if not probabilities.is_floating_point():
        raise TypeError(f"probabilities must be floating point, got {probabilities.dtype}")
    if targets.is_floating_point() or targets.is_complex():
        raise TypeError(f"targets must be integers or booleans, got {targets.dtype}")
    if probabilities.dim() not in (1, 2) or targets.shape != probabilities.shape[:1]:
        raise ValueError(
            "probabilities must be (n, C) or (n,) with targets (n,), "
            f"got {tuple(probabilities.shape)} and {tuple(targets.shape)}"
        )
    if not len(probabilities):
        raise ValueError("there are no samples to judge")
    wide = probabilities.detach().double()
    slack = 1e-6 + 4 * torch.finfo(probabilities.dtype).eps * probabilities.shape[-1] * (wide.dim() == 2)
    if not bool(((wide >= 0) & (wide <= 1 + slack)).all()):
        raise ValueError("probabilities must lie in [0, 1]; these are not (log-probabilities need .exp())")
    classes = 2
    if wide.dim() == 2:
        classes = wide.shape[1]
        worst = (wide.sum(1) - 1).abs().max().item()
        if worst > 10 * slack:
            raise ValueError(f"rows of probabilities must sum to 1, one is off by {worst:.3g}")
    if bool(((targets < 0) | (targets >= classes)).any() if targets.dtype != torch.bool else False):
        raise ValueError(f"targets must be in [0, {classes}), got {targets.min()} to {targets.max()}")
    return wide.clamp(max=1), targets.to(wide.device)
