"""Cross-entropy on the sphere: features and prototypes of length one."""

import torch
import torch.nn.functional as F

from lib.losses._classification import check_reduction


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
        TypeError: targets that are not integers.
        ValueError: shapes that do not fit, a scale that is not positive, a negative margin, or an unknown reduction.
    """
    check_reduction(reduction)
    if features.ndim != 2 or prototypes.ndim != 2 or features.shape[1] != prototypes.shape[1]:
        raise ValueError(
            f"features and prototypes must be (N, d) and (C, d), got {tuple(features.shape)} and {tuple(prototypes.shape)}"
        )
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise TypeError(f"targets must be integer class indices, got {targets.dtype}")
    if targets.shape != features.shape[:1]:
        raise ValueError(f"targets must be ({len(features)},), got {tuple(targets.shape)}")
    if not scale > 0 or not margin >= 0:
        raise ValueError(f"scale must be positive and margin at least 0, got {scale} and {margin}")
    cosines = F.normalize(features, dim=1) @ F.normalize(prototypes, dim=1).T
    if margin:
        own = torch.arange(cosines.shape[1], device=targets.device) == targets[:, None]
        cosines = cosines - margin * own.to(cosines.dtype)
    return F.cross_entropy(
        scale * cosines, targets, weight=weight, ignore_index=ignore_index, reduction=reduction
    )
