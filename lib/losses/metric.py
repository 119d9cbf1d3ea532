"""Losses that compare the embeddings of a batch with each other. Every batch needs classes with at least two members."""

import torch
import torch.nn.functional as F

_EXACT = "donot_use_mm_for_euclid_dist"  # the fast mode loses small distances to cancellation


def triplet_batch_hard(
    embeddings: torch.Tensor, labels: torch.Tensor, *, margin: float = 0.2
) -> torch.Tensor:
    """Triplet loss with the hardest positive and the hardest negative of each anchor in the batch (Hermans et al. 2017).

    The mean over anchors of `max(0, margin + farthest positive - nearest negative)`, Euclidean distances.

    Args:
        embeddings: (N, d); normalise them first if angles are meant.
        labels: (N,), class indices.
        margin: at least 0, in units of distance.

    Returns:
        A scalar; 0 if no anchor has both a positive and a negative.

    Raises:
        ValueError: shapes that do not fit, or a negative margin.
    """
    same, other = _pairs(embeddings, labels)
    if not margin >= 0:
        raise ValueError(f"margin must be at least 0, got {margin}")
    distance = torch.cdist(embeddings, embeddings, compute_mode=_EXACT)
    far = distance.masked_fill(~same, -torch.inf).amax(1)
    near = distance.masked_fill(~other, torch.inf).amin(1)
    valid = same.any(1) & other.any(1)
    return (margin + far - near)[valid].clamp_min(0).sum() / valid.sum().clamp_min(1)


def triplet_batch_all(embeddings: torch.Tensor, labels: torch.Tensor, *, margin: float = 0.2) -> torch.Tensor:
    """Triplet loss over all triplets of the batch that violate the margin (Hermans et al. 2017, "batch all, non-zero").

    The mean of `margin + positive distance - negative distance` over the triplets where it is positive. Where the hardest
    triplets alone pull all embeddings into one point, this average often does not.

    Args:
        embeddings: (N, d); normalise them first if angles are meant.
        labels: (N,), class indices.
        margin: at least 0, in units of distance.

    Returns:
        A scalar; 0 if no triplet violates the margin.

    Raises:
        ValueError: shapes that do not fit, or a negative margin.
    """
    same, other = _pairs(embeddings, labels)
    if not margin >= 0:
        raise ValueError(f"margin must be at least 0, got {margin}")
    distance = torch.cdist(embeddings, embeddings, compute_mode=_EXACT)
    anchor, positive = same.nonzero().T
    violations = margin + distance[anchor, positive].unsqueeze(1) - distance[anchor]
    violations = violations.masked_fill(~other[anchor], 0.0).clamp_min(0)
    return violations.sum() / (violations > 0).sum().clamp_min(1)


def pairwise_contrastive(
    embeddings: torch.Tensor, labels: torch.Tensor, *, margin: float = 1.0
) -> torch.Tensor:
    """Contrastive loss over all pairs of the batch (Hadsell et al. 2006).

    The mean of squared distance over pairs of one class, plus the mean of `max(0, margin - distance)^2` over all other pairs.

    Args:
        embeddings: (N, d).
        labels: (N,), class indices.
        margin: positive, in units of distance.

    Returns:
        A scalar.

    Raises:
        ValueError: shapes that do not fit, or a margin that is not positive.
    """
    same, other = _pairs(embeddings, labels)
    if not margin > 0:
        raise ValueError(f"margin must be positive, got {margin}")
    distance = torch.cdist(embeddings, embeddings, compute_mode=_EXACT)
    pull = distance[same].square().sum() / same.sum().clamp_min(1)
    push = (margin - distance[other]).clamp_min(0).square().sum() / other.sum().clamp_min(1)
    return pull + push


def prototypical(embeddings: torch.Tensor, labels: torch.Tensor, *, shots: int = 1) -> torch.Tensor:
    """Prototypical loss of one episode (Snell et al. 2017): the first `shots` of each class are its support.

    Cross-entropy of the queries over the negative squared distances to the mean of each class's support.

    Args:
        embeddings: (N, d).
        labels: (N,), class indices; every class needs more than `shots` members.
        shots: size of the support of each class, at least 1.

    Returns:
        A scalar, the mean over queries.

    Raises:
        ValueError: shapes that do not fit, or a class without a query.
    """
    _pairs(embeddings, labels)
    classes, index, counts = labels.unique(return_inverse=True, return_counts=True)
    if shots < 1 or (counts <= shots).any():
        raise ValueError(
            f"every class needs more than shots={shots} members, the smallest has {int(counts.min())}"
        )
    order = index.argsort(stable=True)
    first = torch.cat([counts.new_zeros(1), counts.cumsum(0)[:-1]])
    position = torch.empty_like(index)
    position[order] = torch.arange(len(index), device=index.device) - first[index[order]]
    support = position < shots
    one_hot = F.one_hot(index, len(classes)).to(embeddings.dtype)
    means = (one_hot[support].T @ embeddings[support]) / shots
    squared = (embeddings[~support][:, None] - means).square().sum(2)
    return F.cross_entropy(-squared, index[~support])


def constellation(embeddings: torch.Tensor, labels: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
    """Constellation loss (Medela and Picon 2019): each positive pair against all negatives of the anchor at once.

    The mean over pairs (a, p) of one class of `log(1 + sum_n exp(scale (a . n - a . p)))`.

    Args:
        embeddings: (N, d).
        labels: (N,), class indices.
        scale: of the inner products, positive.

    Returns:
        A scalar; 0 without a positive pair.

    Raises:
        ValueError: shapes that do not fit, or a scale that is not positive.
    """
    same, other = _pairs(embeddings, labels)
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    inner = scale * embeddings @ embeddings.T
    negatives = inner.masked_fill(~other, -torch.inf).logsumexp(1, keepdim=True)
    return F.softplus(negatives - inner)[same].sum() / same.sum().clamp_min(1)


def _pairs(embeddings, labels):
    if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1] or len(labels) < 2:
        raise ValueError(
            f"embeddings and labels must be (N, d) and (N,) with N >= 2, got {tuple(embeddings.shape)}, {tuple(labels.shape)}"
        )
    equal = labels[:, None] == labels
    return equal & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device), ~equal
