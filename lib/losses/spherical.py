"""Cross-entropy on the sphere: features and prototypes of length one."""

import torch
import torch.nn.functional as F

from lib.losses._classification import reduce_rows, rows


def normalized_softmax(
    features: torch.Tensor,
    prototypes: torch.Tensor,
    targets: torch.Tensor,
    *,
    scale: float = 16.0,
    margin: float = 0.0,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    """Cross-entropy of the cosines between normalised features and normalised class vectors, times a scale.

    With trained prototypes this is the normalised softmax loss (Pereira et al. 2021, arXiv 2102.03243); with fixed ones and
    `scale = 1 / temperature` the loss of equiangular basis vectors (Shen et al. 2023, arXiv 2303.11637).

    At a glance:
        formula: `-log(e^(s cos_y) / sum_k e^(s cos_k))`, cos_k the cosine of the feature z and the class vector w_k
        gradient: `(s / |z|) (I - z^ z^T) sum_k (p_k - 1[k = y]) w_k^` on the feature, with z^ and w^ of length one: orthogonal to z
        consistency: bounded logits: at a small scale the posterior cannot come near 0 or 1
        cost: `O(C d)` per row, like a linear layer and softmax

    Args:
        features: z, (N, d), floating point.
        prototypes: w, one row a class, (C, d); give a buffer to keep them fixed.
        targets: class indices, (N,).
        scale: s, positive; the cosines span only [-1, 1], so it has to be well above 1.
        margin: subtracted from the cosine of the target, at least 0.
        weight: of each class, (C,).
        ignore_index: targets that have no loss and no gradient, and do not count in the mean.
        reduction: `"mean"`, `"sum"` or `"none"`.

    Returns:
        A scalar, or losses (N,) under `"none"`.

    Raises:
        TypeError: features that are not floating point, or targets that are not integers.
        ValueError: shapes that do not fit, targets out of range, a scale that is not positive, a negative margin or weight, or
            an unknown reduction.
    """
    if features.ndim != 2 or prototypes.ndim != 2 or features.shape[1] != prototypes.shape[1]:
        raise ValueError(
            f"features and prototypes must be (N, d) and (C, d), got {tuple(features.shape)} and {tuple(prototypes.shape)}"
        )
    if not scale > 0 or not margin >= 0:
        raise ValueError(f"scale must be positive and margin at least 0, got {scale} and {margin}")
    if features.is_floating_point() and features.dtype.itemsize < 4:
        features, prototypes = features.float(), prototypes.float()
    cosines = F.normalize(features, dim=1) @ F.normalize(prototypes, dim=1).T
    logits, labels, valid = rows(
        scale * cosines, targets, weight=weight, ignore_index=ignore_index, reduction=reduction
    )
    if margin:
        own = torch.arange(logits.shape[1], device=labels.device) == labels[:, None]
        logits = logits - scale * margin * own
    losses = F.cross_entropy(logits, labels, reduction="none")
    return reduce_rows(losses, labels, valid, targets.shape, weight=weight, reduction=reduction)
