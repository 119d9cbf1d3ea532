"""Label-distributionally robust losses, and the losses against wrong labels that they are compared with.

Source: Zhu, Ying, Yang 2023 (arXiv:2112.14869). Generalized cross-entropy and the mean absolute error are in
`lib.losses.comp_sum`, hinge losses of one class against the rest in `lib.losses.svm`.
"""

import math

import torch
import torch.nn.functional as F

from lib.losses._classification import check_reduction, reduce_rows, rows


def ldr_kl(
    logits: torch.Tensor,
    targets: torch.Tensor,
    lam: float = 1.0,
    *,
    margin: float = 0.0,
    normalize: bool = False,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    """The label-distributionally robust loss with a KL penalty, LDR-KL (Zhu et al. 2023).

    The largest value over label weights p of sum_k p_k d_k - lam KL(p || uniform), where
    d_k = z_k - z_y + margin for k != y and d_y = 0. Without a margin it is lam (CE(z / lam, y) - log C): cross-entropy with
    a temperature, times that temperature, so that the gradient keeps its scale for every `lam`. Computed in float64 inside,
    because at a large `lam` the logarithm is a small difference.

    At a glance:
        formula: `lam log(mean_k exp(d_k / lam))`, d_k = z_k - z_y + margin [k != y]
        gradient: `p - e_y` with p = softmax((z + margin [k != y]) / lam), times no factor of lam
        consistency: without margin z / lam is the log of the label distribution up to a constant: Bayes consistent and
            keeps the order of all labels; as lam grows the loss becomes linear and symmetric
        cost: `O(C)` per row; one log-sum-exp

    Args:
        logits: (C,), (N, C) or (N, C, d1, ...), floating point; half precision is computed in float32.
        targets: class indices of that shape without C, in [0, C) or `ignore_index`.
        lam: weight of the penalty, finite and above 0; the temperature of the label weights.
        margin: added to every wrong class, at least 0.
        normalize: divide the logits of each row by their mean absolute value first (and differentiate through that).
        weight: of each class, (C,).
        ignore_index: targets that have no loss and no gradient.
        reduction: `"mean"` (over the weight of the rows that count), `"sum"` or `"none"`.

    Returns:
        A scalar, or losses of the shape of `targets`.

    Raises:
        TypeError: logits, targets or weight of another kind.
        ValueError: shapes that do not fit, targets out of range, a number outside its range, an unknown reduction.
    """
    _positive("lam", lam)
    _at_least_zero("margin", margin)
    z, labels, valid = rows(logits, targets, weight=weight, ignore_index=ignore_index, reduction=reduction)
    losses = _ldr(_normalized(z) if normalize else z, labels, lam, margin)
    return reduce_rows(losses, labels, valid, targets.shape, weight=weight, reduction=reduction)


class ALDRKL(torch.nn.Module):
    """LDR-KL with a temperature of its own for each training sample, ALDR-KL (Zhu et al. 2023).

    The penalty (alpha log C / (2 lam0)) (lam - lam0)^2 draws each lam towards `lam0`. For given label weights p the best one is
    lam = lam0 (1 - KL(p || uniform) / (alpha log C)): near `lam0` where the model is undecided, down to
    lam0 (1 - 1/alpha) where it is certain. A call in training mode takes p from the stored lam of each sample (without
    margin), stores the new lam, and returns the loss at it. No gradient flows through lam. In eval mode the stored values
    are used and left alone.

    Args:
        n_samples: size of the training set.
        lam0: the temperature without information, above 0; the start of every lam.
        alpha: above 1; how little lam moves.
        margin: as for `ldr_kl`.
        normalize: as for `ldr_kl`; a `lam0` of 10 is meant for normalised logits.
        reduction: `"mean"`, `"sum"` or `"none"`.

    Attributes:
        lambdas: (n_samples,), a buffer: saved and moved with the module.

    Raises:
        TypeError: logits, targets or indices of another kind.
        ValueError: a number outside its range, shapes that do not fit, indices out of range or twice in one batch.
    """

    def __init__(
        self,
        n_samples: int,
        lam0: float,
        *,
        alpha: float = 2.0,
        margin: float = 0.1,
        normalize: bool = True,
        reduction: str = "mean",
    ):
        super().__init__()
        if n_samples < 1:
            raise ValueError(f"n_samples must be at least 1, got {n_samples}")
        _positive("lam0", lam0)
        _at_least_zero("margin", margin)
        check_reduction(reduction)
        if not (math.isfinite(alpha) and alpha > 1):
            raise ValueError(f"alpha must be finite and above 1, so that lam stays positive, got {alpha}")
        self.lam0, self.alpha, self.margin = lam0, alpha, margin
        self.normalize, self.reduction = normalize, reduction
        self.register_buffer("lambdas", torch.full((n_samples,), float(lam0)))

    def forward(self, logits: torch.Tensor, targets: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """The loss of samples `indices` (N,), whose logits are (N, C) and labels (N,)."""
        z, labels, valid = rows(logits, targets, reduction=self.reduction)
        if logits.dim() != 2:
            raise ValueError(f"logits must be (N, C), got {tuple(logits.shape)}")
        if indices.is_floating_point() or indices.dtype == torch.bool:
            raise TypeError(f"indices must be integers, got {indices.dtype}")
        if indices.shape != targets.shape:
            raise ValueError(f"indices must be {tuple(targets.shape)}, got {tuple(indices.shape)}")
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < len(self.lambdas):
            raise ValueError(f"indices must be in [0, {len(self.lambdas)})")
        if len(indices.unique()) != len(indices):
            raise ValueError("indices must name each sample once in a batch: they are not positions in it")
        if self.normalize:
            z = _normalized(z)
        lam, log_classes = self.lambdas[indices], math.log(z.shape[1])
        if self.training:
            log_p = (z.detach() / lam.to(z)[:, None]).log_softmax(1)
            divergence = log_classes + (log_p.exp() * log_p).sum(1)
            lam = (self.lam0 * (1 - divergence / (self.alpha * log_classes))).to(self.lambdas)
            with torch.no_grad():  # an ignored label says nothing, its sample keeps its lam
                lam = torch.where(valid, lam, self.lambdas[indices])
                self.lambdas[indices] = lam
        lam = lam.to(z)
        penalty = self.alpha * log_classes / (2 * self.lam0) * (lam - self.lam0).square()
        losses = _ldr(z, labels, lam[:, None], self.margin) - penalty
        return reduce_rows(losses, labels, valid, targets.shape, reduction=self.reduction)

    def extra_repr(self) -> str:
        return (
            f"{len(self.lambdas)}, lam0={self.lam0}, alpha={self.alpha}, margin={self.margin}, "
            f"normalize={self.normalize}, reduction={self.reduction!r}"
        )


def crammer_singer(
    logits: torch.Tensor,
    targets: torch.Tensor,
    margin: float = 1.0,
    *,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    """The multi-class hinge loss of the worst wrong class (Crammer and Singer 2001): `ldr_kl` as lam tends to 0.

    Arguments, result and errors are those of `ldr_kl`.

    At a glance:
        formula: `max(0, max_(k != y) (margin + z_k - z_y))`
        gradient: `e_k - e_y` for the worst k, 0 where the margin is kept
        consistency: not Bayes consistent where no class has more than half
        cost: `O(C)` per row, no exponential
    """
    _at_least_zero("margin", margin)
    z, labels, valid = rows(logits, targets, weight=weight, ignore_index=ignore_index, reduction=reduction)
    losses = _differences(z, labels, margin).amax(1)
    return reduce_rows(losses, labels, valid, targets.shape, weight=weight, reduction=reduction)


def weston_watkins(
    logits: torch.Tensor,
    targets: torch.Tensor,
    margin: float = 1.0,
    *,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    """The multi-class hinge loss summed over the wrong classes (Weston and Watkins 1999).

    Arguments, result and errors are those of `ldr_kl`.

    At a glance:
        formula: `sum_(k != y) max(0, margin + z_k - z_y)`
        gradient: `1` for each wrong class inside the margin, minus their number for y
        consistency: not Bayes consistent in general
        cost: `O(C)` per row, no exponential
    """
    _at_least_zero("margin", margin)
    z, labels, valid = rows(logits, targets, weight=weight, ignore_index=ignore_index, reduction=reduction)
    losses = _differences(z, labels, margin).clamp_min(0).sum(1)  # d_y = 0 adds nothing
    return reduce_rows(losses, labels, valid, targets.shape, weight=weight, reduction=reduction)


def symmetric_cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    alpha: float = 0.1,
    beta: float = 1.0,
    *,
    floor: float = -4.0,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    """Cross-entropy plus reverse cross-entropy, with the log of 0 replaced by `floor` (Wang et al. 2019, arXiv:1908.06112).

    `alpha`, `beta` and `-floor` are at least 0; the other arguments, result and errors are those of `ldr_kl`.

    At a glance:
        formula: `-alpha log p_y - beta floor (1 - p_y)`
        gradient: `(alpha - beta floor p_y) (p - e_y)`
        consistency: each term puts the best label first, and so does the sum; the reverse term is symmetric
        cost: `O(C)` per row; the log-softmax is stored
    """
    for name, value in (("alpha", alpha), ("beta", beta), ("-floor", -floor)):
        _at_least_zero(name, value)
    z, labels, valid = rows(logits, targets, weight=weight, ignore_index=ignore_index, reduction=reduction)
    log_p = _log_p(z, labels)
    losses = -alpha * log_p + beta * floor * torch.expm1(log_p)
    return reduce_rows(losses, labels, valid, targets.shape, weight=weight, reduction=reduction)


def nce_rce(
    logits: torch.Tensor,
    targets: torch.Tensor,
    alpha: float = 1.0,
    beta: float = 1.0,
    *,
    floor: float = -4.0,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    """Normalized cross-entropy plus reverse cross-entropy (Ma et al. 2020, arXiv:2006.13554).

    Normalized: divided by the sum of the cross-entropies of all labels. `alpha`, `beta` and `-floor` are at least 0; the
    other arguments, result and errors are those of `ldr_kl`.

    At a glance:
        formula: `alpha l_y / S - beta floor (1 - p_y)`, l = -log p, S = sum_k l_k
        gradient: `alpha ((p - e_y) / S - l_y (C p - 1) / S^2) - beta floor p_y (p - e_y)`
        consistency: both terms are symmetric (the losses of all labels sum to a constant): tolerant to uniform noise,
            not top-k consistent
        cost: `O(C)` per row; the log-softmax is stored
    """
    for name, value in (("alpha", alpha), ("beta", beta), ("-floor", -floor)):
        _at_least_zero(name, value)
    z, labels, valid = rows(logits, targets, weight=weight, ignore_index=ignore_index, reduction=reduction)
    normalized, log_p = _nce(z, labels)
    losses = alpha * normalized + beta * floor * torch.expm1(log_p)
    return reduce_rows(losses, labels, valid, targets.shape, weight=weight, reduction=reduction)


def nce_agce(
    logits: torch.Tensor,
    targets: torch.Tensor,
    alpha: float = 1.0,
    beta: float = 1.0,
    *,
    a: float = 1.0,
    q: float = 2.0,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    """Normalized cross-entropy plus asymmetric generalized cross-entropy (Zhou et al. 2021, arXiv:2106.03110).

    `a` and `q` are above 0, `alpha` and `beta` at least 0; the other arguments, result and errors are those of `ldr_kl`.

    At a glance:
        formula: `alpha l_y / S + beta ((a + 1)^q - (a + p_y)^q) / q`, l = -log p, S = sum_k l_k
        gradient: `alpha ((p - e_y) / S - l_y (C p - 1) / S^2) + beta (a + p_y)^(q-1) p_y (p - e_y)`
        consistency: p is one-hot at the best label where the asymmetric term rules (q >= 1): not top-k
        cost: `O(C)` per row; the log-softmax is stored
    """
    _positive("a", a)
    _positive("q", q)
    _at_least_zero("alpha", alpha)
    _at_least_zero("beta", beta)
    z, labels, valid = rows(logits, targets, weight=weight, ignore_index=ignore_index, reduction=reduction)
    normalized, log_p = _nce(z, labels)
    losses = alpha * normalized + beta * ((a + 1) ** q - (a + log_p.exp()) ** q) / q
    return reduce_rows(losses, labels, valid, targets.shape, weight=weight, reduction=reduction)


def jensen_shannon(
    logits: torch.Tensor,
    targets: torch.Tensor,
    pi: float = 0.5,
    *,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    """Jensen-Shannon divergence between the one-hot label and softmax (Englesson and Azizpour 2021, arXiv:2105.04522).

    With m = pi e_y + (1 - pi) p: pi KL(e_y || m) + (1 - pi) KL(p || m), divided by -(1 - pi) log(1 - pi). It leads from
    cross-entropy (pi to 0) to half the mean absolute error (pi to 1). `pi` is in (0, 1); the other arguments, result and errors
    are those of `ldr_kl`.

    At a glance:
        formula: `[(1 - pi) p_y log(p_y / m_y) - pi log m_y] / Z + 1 - p_y`, m_y = pi + (1 - pi) p_y,
            Z = -(1 - pi) log(1 - pi)
        gradient: `(1 - pi) / Z (log(m_y / p_y) - log(1 - pi)) p_y (p - e_y)`
        consistency: between cross-entropy, which keeps the order of all labels, and the mean absolute error, which does not
        cost: `O(C)` per row; the log-softmax is stored
    """
    if not 0 < pi < 1:
        raise ValueError(f"pi must be in (0, 1), got {pi}")
    z, labels, valid = rows(logits, targets, weight=weight, ignore_index=ignore_index, reduction=reduction)
    log_p = _log_p(z, labels)
    p = log_p.exp()
    log_m = torch.log1p((1 - pi) * torch.expm1(log_p))
    losses = ((1 - pi) * p * (log_p - log_m) - pi * log_m) / (-(1 - pi) * math.log1p(-pi)) + 1 - p
    return reduce_rows(losses, labels, valid, targets.shape, weight=weight, reduction=reduction)


def _ldr(z, labels, lam, margin):
    """One loss a row; `lam` a number or (rows, 1)."""
    d = _differences(z.double(), labels, margin)
    lam = lam.double() if isinstance(lam, torch.Tensor) else lam
    logarithm = (d / lam).logsumexp(1, keepdim=True) - math.log(z.shape[1])
    return (lam * logarithm).squeeze(1).to(z.dtype)


def _differences(z, labels, margin):
    """d_k = z_k - z_y + margin for k != y, and 0 for k = y."""
    wrong = 1 - F.one_hot(labels, z.shape[1]).to(z.dtype)
    return z - z.gather(1, labels.unsqueeze(1)) + margin * wrong


def _normalized(z):
    return z / z.abs().mean(1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny ** 0.5)


def _log_p(z, labels):
    return z.log_softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1)


def _nce(z, labels):
    log_p = z.log_softmax(1)
    own = log_p.gather(1, labels.unsqueeze(1)).squeeze(1)
    return own / log_p.sum(1), own


def _positive(name, value):
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be finite and above 0, got {value}")


def _at_least_zero(name, value):
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and at least 0, got {value}")
