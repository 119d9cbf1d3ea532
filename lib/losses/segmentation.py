"""Losses of semi-supervised segmentation: overlap, confident pseudo-labels, agreement of two crops.

Logits have their classes in dimension 1, (batch, classes, d1, ..., dn), as in `torch.nn.functional.cross_entropy`.
"""

import torch


def dice_loss(
    probs: torch.Tensor, onehot: torch.Tensor, *, squared: bool = True, smooth: float = 1e-5
) -> torch.Tensor:
    """One minus the soft Dice overlap of probabilities and a mask (Milletari 2016, arXiv 1606.04797).

    At a glance:
        formula: `1 - (2 sum p g + e) / (sum p^2 + sum g^2 + e)`, sums over all voxels given
        gradient: `-2 g / S + 2 p (2 sum p g + e) / S^2` with respect to `p`, S the denominator; the softmax follows
        consistency: its minimiser is the mask where labels are certain; it does not return probabilities
        cost: `O(1)` per voxel and class, three sums

    The sums run over everything handed in, so one volume without foreground in a batch does no harm; if there is no
    foreground at all, `smooth` makes the loss 0 for a prediction that is 0 everywhere.

    Args:
        probs: in [0, 1], any shape; usually one class of a softmax, `probs[:, 1]`.
        onehot: the mask, 0 or 1, of that shape; any dtype.
        squared: whether the denominator has squares; False gives the plain sums of Sorensen and Dice.
        smooth: added to numerator and denominator, above 0.

    Returns:
        A scalar in [0, 1].

    Raises:
        TypeError: `probs` is not floating point.
        ValueError: shapes differ, are empty, or `smooth` is not positive.
    """
    if not probs.is_floating_point():
        raise TypeError(f"probs must be floating point, got {probs.dtype}")
    if probs.shape != onehot.shape or not probs.numel():
        raise ValueError(
            f"probs and onehot need one shape that is not empty, got {tuple(probs.shape)} and {tuple(onehot.shape)}"
        )
    if not 0 < smooth < float("inf"):
        raise ValueError(f"smooth must be positive and finite, got {smooth}")
    if probs.dtype.itemsize < 4:
        probs = probs.float()
    mask = onehot.to(probs.dtype)
    overlap = (probs * mask).sum()
    size = probs.square().sum() + mask.square().sum() if squared else probs.sum() + mask.sum()
    return 1 - (2 * overlap + smooth) / (size + smooth)


def confident_bce(
    student_logits: torch.Tensor, peer_logits: torch.Tensor, *, pos: float = 0.65, neg: float = 0.1
) -> torch.Tensor:
    """Cross-entropy with the confident part of a peer's prediction (Liu 2022, arXiv 2203.14523).

    With the peer's probabilities q, its label y = argmax q and the student's probabilities p: a positive term where the
    peer is sure what a voxel is, and a negative term where it is sure what it is not. Nothing flows back into the peer.

    At a glance:
        formula: `mean over {max q >= pos} of -max(q) log p_y` + `mean over {c != y, q_c < neg} of -min(q) log(1 - p_c)`
        gradient: `max(q) (p - e_y)` and `min(q) p_c (e_c - p) / (1 - p_c)`, each divided by the number in its mean
        consistency: one-hot at the peer's label wherever the peer is sure; elsewhere it says nothing
        cost: `O(C^2)` per voxel, to have log(1 - p_c) without cancellation

    Args:
        student_logits: (N, C) or (N, C, d1, ...), floating point, at least two classes.
        peer_logits: the same shape; gets no gradient.
        pos: from which probability on the peer's label counts.
        neg: below which probability the peer rules out a class.

    Returns:
        A scalar; a term whose mean is over nothing is 0.

    Raises:
        TypeError: logits that are not floating point.
        ValueError: shapes differ or have fewer than two classes, or thresholds outside [0, 1].
    """
    _check_pair(student_logits, peer_logits)
    for name, value in (("pos", pos), ("neg", neg)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {value}")
    student = _float(student_logits).movedim(1, -1)  # (..., classes)
    peer = _float(peer_logits).detach().movedim(1, -1).softmax(-1)
    sure, label = peer.max(-1)
    least = peer.min(-1, keepdim=True).values
    log_probs = student.log_softmax(-1)
    own = log_probs.gather(-1, label.unsqueeze(-1)).squeeze(-1)
    # log(1 - p_c) as the logarithm of the sum of the others: exact where p_c is near one
    others = [student[..., [k for k in range(student.shape[-1]) if k != c]] for c in range(student.shape[-1])]
    log_rest = torch.stack([rest.logsumexp(-1) for rest in others], -1) - student.logsumexp(-1, keepdim=True)
    wrong = torch.ones_like(peer).scatter(-1, label.unsqueeze(-1), 0.0) * (peer < neg)
    return _mean(-sure * own, (sure >= pos).to(own.dtype)) + _mean(-least * log_rest, wrong)


def translation_consistency(
    logits_a: torch.Tensor,
    logits_b: torch.Tensor,
    box_a: torch.Tensor,
    box_b: torch.Tensor,
    *,
    ent: float = 0.1,
) -> torch.Tensor:
    """Divergence of two crops' predictions where the crops overlap (Liu 2022, arXiv 2203.14523).

    At a glance:
        formula: `mean over overlap of KL(p_b || p_a) + ent (sum p_a log p_a + sum p_b log p_b) / 2`
        gradient: `p_a - p_b + ent p_a (log p_a + H_a) / 2` with respect to logits a, over the size of the overlap
        consistency: equal predictions of both crops, as unsure as the other losses let them be
        cost: `O(C)` per voxel of the overlap

    Both crops get gradients. Volumes whose crops do not overlap are left out; the others count alike.

    Args:
        logits_a: (batch, classes, d1, ..., dn), of the first crops.
        logits_b: of that shape, of the second crops.
        box_a: the overlap within the first crops, (batch, n, 2) integers: start and stop on each axis, as from
            `lib.data.paired_crops`.
        box_b: the same overlap within the second crops.
        ent: weight of the negative entropy, at least 0; without it any map that is sure of itself will do.

    Returns:
        A scalar in nats; 0 if no volume has an overlap.

    Raises:
        TypeError: logits that are not floating point, boxes that are not integers.
        ValueError: shapes that do not fit, boxes outside the crop or of different sizes, a negative `ent`.
    """
    _check_pair(logits_a, logits_b)
    if not 0 <= ent < float("inf"):
        raise ValueError(f"ent must be at least 0 and finite, got {ent}")
    sizes = logits_a.shape[2:]
    for name, box in (("box_a", box_a), ("box_b", box_b)):
        if box.is_floating_point() or box.dtype == torch.bool:
            raise TypeError(f"{name} must hold integers, got {box.dtype}")
        if box.shape != (len(logits_a), len(sizes), 2):
            raise ValueError(f"{name} must be {(len(logits_a), len(sizes), 2)}, got {tuple(box.shape)}")
        if bool((box < 0).any() or (box > torch.tensor(sizes, device=box.device).view(-1, 1)).any()):
            raise ValueError(f"{name} leaves the crop of size {tuple(sizes)}")
    if not torch.equal((box_a[..., 1] - box_a[..., 0]).cpu(), (box_b[..., 1] - box_b[..., 0]).cpu()):
        raise ValueError("box_a and box_b must have the same size on every axis")
    terms = []
    for a, b, at_a, at_b in zip(
        _float(logits_a), _float(logits_b), box_a.tolist(), box_b.tolist(), strict=True
    ):
        if any(start >= stop for start, stop in at_a):
            continue
        log_a = a[(slice(None), *(slice(*edge) for edge in at_a))].log_softmax(0)
        log_b = b[(slice(None), *(slice(*edge) for edge in at_b))].log_softmax(0)
        divergence = (log_b.exp() * (log_b - log_a)).sum(0).mean()
        negative_entropy = ((log_a.exp() * log_a).sum(0) + (log_b.exp() * log_b).sum(0)).mean() / 2
        terms.append(divergence + ent * negative_entropy)
    if not terms:
        return 0 * (logits_a.sum() + logits_b.sum())
    return torch.stack(terms).mean()


def _mean(values, mask):
    return (values * mask).sum() / mask.sum().clamp_min(1)


def _float(logits):
    return logits.float() if logits.dtype.itemsize < 4 else logits


def _check_pair(first, second):
    for logits in (first, second):
        if not logits.is_floating_point():
            raise TypeError(f"logits must be floating point, got {logits.dtype}")
    if first.shape != second.shape or first.dim() < 2 or first.shape[1] < 2:
        raise ValueError(
            "both logits must be (batch, classes, ...) of one shape with at least two classes, got "
            f"{tuple(first.shape)} and {tuple(second.shape)}"
        )
