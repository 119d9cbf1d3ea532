"""Losses that weigh the samples of a batch: by the diversity of their feature maps, or by how hard they are."""

import math

import torch
from torch import nn

from lib.geometry import feature_diversity
from lib.losses._classification import reduce_rows, rows


def bias_loss(
    features: torch.Tensor,
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    s: float = 0.3,
    z0: float = 0.7,
    norm: str = "local",
    state: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy, each sample weighted by the variance of its last feature maps (arXiv:2107.11170).

    With v the unbiased variance of all activations of a sample, and u = (v - min v) / (max v - min v) over the batch, the
    weight is z = exp(s u) - 1 + z0. No gradient goes through z. The paper's form exp(alpha u) - beta with
    alpha = beta = 0.3 is `s=0.3, z0=0.7`; the authors' code had `s=0.3, z0=0.3` at first. Where all variances are
    equal, u is 0 for every sample.

    At a glance:
        formula: `-z log p_y`, `z = exp(s u) - 1 + z0`, u in [0, 1] the scaled variance of the sample's features
        gradient: `z (p - e_y)`; none with respect to z
        consistency: p is the label distribution given the input, for any z above 0 that is a function of the input:
            Bayes and top-k consistent
        cost: `O(C + F)` per row for F activations; the log-softmax is stored

    Args:
        features: last feature maps, before pooling, (N, ...) with at least two activations a sample.
        logits: (N, C), floating point; half precision is computed in float32.
        targets: class indices (N,), in [0, C) or `ignore_index`.
        s: how fast the weight grows with diversity, finite.
        z0: the weight of the least diverse sample, finite. `s=0, z0=1` is cross-entropy. A negative weight would reward
            wrong answers, so `z0` and `exp(s) - 1 + z0` must be at least 0.
        norm: `"local"` takes minimum and maximum from the batch; `"global"` takes the smallest variance seen so far, from
            `state`, and the maximum from the batch.
        state: a scalar buffer, the smallest variance so far (start with infinity), lowered in place; for `"global"`.
        weight: of each class, (C,).
        ignore_index: targets that have no loss, no gradient and no part in minimum and maximum.
        reduction: `"mean"` divides by the number of rows that count (their class weights with `weight`), not by the sum
            of z; `"sum"` or `"none"`.

    Returns:
        The loss, a scalar or (N,), and the weights z, (N,), 0 at ignored targets.

    Raises:
        TypeError: features, logits, targets or weight of another kind.
        ValueError: shapes that do not fit, targets out of range, numbers that make a weight negative, an unknown norm or
            reduction, a `state` that is missing or not wanted.
    """
    if logits.dim() != 2:
        raise ValueError(f"logits must be (N, C), got {tuple(logits.shape)}")
    if features.dim() < 2 or len(features) != len(logits):
        raise ValueError(f"features must be (N, ...) with N = {len(logits)}, got {tuple(features.shape)}")
    _check_bias(s, z0, norm)
    if (norm == "global") != (state is not None):
        raise ValueError("state must be given for norm='global', and only for it")
    outputs, labels, valid = rows(
        logits, targets, weight=weight, ignore_index=ignore_index, reduction=reduction
    )
    variance = feature_diversity(features.detach()).to(outputs.dtype)
    low = torch.where(valid, variance, torch.inf).amin() if len(variance) else variance.new_tensor(torch.inf)
    high = torch.where(valid, variance, -torch.inf).amax() if len(variance) else -low
    if norm == "global":
        low = torch.minimum(low, state.to(low))
        state.copy_(low)
    span = high - low
    scaled = torch.where(span > 0, (variance - low) / span, 0.0)
    z = torch.where(valid, torch.expm1(s * scaled) + z0, 0.0)
    log_p = outputs.log_softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1)
    loss = reduce_rows(-z * log_p, labels, valid, targets.shape, weight=weight, reduction=reduction)
    return loss, z


class BiasLoss(nn.Module):
    """`bias_loss` as a module; keeps the smallest variance seen so far in the buffer `smallest`.

    The minimum is lowered in training mode only.

    Args:
        s: as for `bias_loss`.
        z0: as for `bias_loss`.
        norm: `"global"` or `"local"`.
        weight: of each class, (C,).
        ignore_index: targets that do not count.
        reduction: `"mean"`, `"sum"` or `"none"`.

    Raises:
        ValueError: as `bias_loss`.
    """

    def __init__(
        self,
        s: float = 0.3,
        z0: float = 0.7,
        norm: str = "global",
        *,
        weight: torch.Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ):
        super().__init__()
        _check_bias(s, z0, norm)
        self.s, self.z0, self.norm = s, z0, norm
        self.ignore_index, self.reduction = ignore_index, reduction
        self.register_buffer("weight", weight)
        self.register_buffer("smallest", torch.tensor(torch.inf))

    def forward(
        self, features: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss and the weights of the samples, see `bias_loss`."""
        state = None
        if self.norm == "global":
            state = self.smallest if self.training else self.smallest.clone()
        return bias_loss(
            features, logits, targets, s=self.s, z0=self.z0, norm=self.norm, state=state,
            weight=self.weight, ignore_index=self.ignore_index, reduction=self.reduction,
        )  # fmt: skip


def focal(
    logits: torch.Tensor,
    targets: torch.Tensor,
    gamma: float = 2.0,
    *,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    """Focal loss (Lin et al. 2017, arXiv:1708.02002): cross-entropy with little weight on what is right already.

    At a glance:
        formula: `-(1 - p_y)^gamma log p_y`
        gradient: `(1 - p_y)^(gamma-1) (1 - p_y - gamma p_y log p_y) (p - e_y)`
        consistency: its minimiser ranks the labels as the label distribution does, but is flatter for gamma > 0: Bayes
            consistent, not proper
        cost: `O(C)` per row; the log-softmax is stored

    Args:
        logits: (C,), (N, C) or (N, C, d1, ...), floating point; half precision is computed in float32.
        targets: class indices of that shape without C, in [0, C) or `ignore_index`.
        gamma: how strongly easy samples are discounted, 0 (cross-entropy) or at least 1, where the gradient is finite
            everywhere.
        weight: of each class, (C,).
        ignore_index: targets that have no loss and no gradient.
        reduction: `"mean"`, `"sum"` or `"none"`.

    Returns:
        A scalar, or losses of the shape of `targets`.

    Raises:
        TypeError: logits, targets or weight of another kind.
        ValueError: a gamma outside its range, shapes that do not fit, targets out of range, an unknown reduction.
    """
    if not (gamma == 0 or 1 <= gamma < math.inf):
        raise ValueError(f"gamma must be 0 or at least 1, and finite, got {gamma}")
    z, labels, valid = rows(logits, targets, weight=weight, ignore_index=ignore_index, reduction=reduction)
    log_p = z.log_softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1)
    losses = -log_p
    if gamma:
        losses = (-torch.expm1(log_p)) ** gamma * losses
    return reduce_rows(losses, labels, valid, targets.shape, weight=weight, reduction=reduction)


def _check_bias(s, z0, norm):
    if norm not in ("local", "global"):
        raise ValueError(f"norm must be 'local' or 'global', got {norm!r}")
    if not (math.isfinite(s) and math.isfinite(z0) and s < 700):
        raise ValueError(f"s and z0 must be finite, and s below 700, got s={s}, z0={z0}")
    if min(z0, math.expm1(s) + z0) < 0:
        raise ValueError(f"s={s}, z0={z0} give negative weights; z0 and exp(s) - 1 + z0 must be at least 0")
