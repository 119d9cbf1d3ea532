"""How many different things the feature maps of one sample say: three numbers."""

import torch

KINDS = ("variance", "effective_rank", "entropy")


def feature_diversity(features: torch.Tensor, kind: str = "variance") -> torch.Tensor:
    """Diversity of the feature maps of each sample.

    - `"variance"`: the unbiased variance of all activations of the sample (arXiv:2107.11170). It grows with the square of
      the scale of the activations.
    - `"effective_rank"`: the participation ratio (sum l)^2 / sum l^2 of the eigenvalues l of the Gram matrix F F^T of the
      channels, F = (C, H W): between 1 and min(C, H W), whatever the scale.
    - `"entropy"`: the entropy, in nats, of these eigenvalues divided by their sum: between 0 and log(min(C, H W)). Its
      exponential is the effective rank of Roy and Vetterli (2007) for squared singular values.

    Samples whose activations are all zero have diversity 0 in every kind.

    Args:
        features: (N, C, ...), floating point; what follows C is flattened, (N, C) counts as one position. Half precision
            is computed in float32.
        kind: one of the three.

    Returns:
        One number a sample, (N,); differentiable.

    Raises:
        TypeError: features that are not floating point.
        ValueError: fewer than two dimensions, fewer than two activations a sample, an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    if not features.is_floating_point():
        raise TypeError(f"features must be floating point, got {features.dtype}")
    if features.dim() < 2 or features.shape[1:].numel() < 2:
        raise ValueError(
            f"features must be (N, C, ...) with two activations a sample or more, got {tuple(features.shape)}"
        )
    if features.dtype.itemsize < 4:
        features = features.float()
    if not len(features):
        return features.flatten(1).sum(1)
    if kind == "variance":
        return features.flatten(1).var(1)
    maps = features.flatten(2) if features.dim() > 2 else features.unsqueeze(2)  # (N, C, positions)
    gram = maps @ maps.mT if maps.shape[1] <= maps.shape[2] else maps.mT @ maps  # same nonzero eigenvalues
    total = gram.diagonal(dim1=1, dim2=2).sum(1)  # trace
    positive = total > 0
    gram = gram / torch.where(positive, total, 1.0)[:, None, None]
    if kind == "effective_rank":
        purity = gram.square().sum((1, 2))  # the sum of squared eigenvalues, without computing them
        return torch.where(positive, 1 / torch.where(positive, purity, 1.0), 0.0)
    share = torch.linalg.eigvalsh(gram).clamp_min(0)
    return torch.special.entr(share).sum(1)
