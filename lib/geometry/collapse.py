"""Neural collapse: its metrics, and the closed-form minimisers of deep linear networks on free features.

Formulas are those of Dang et al., "Neural Collapse in Deep Linear Networks" (arXiv 2301.00437) and of Papyan, Han and Donoho
(2020) for the metrics.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch


class UFMSolution(NamedTuple):
    """Global minimiser by class, each (classes,): see `ufm_closed_form`."""

    mode: torch.Tensor
    weight_norm2: torch.Tensor
    feature_norm2: torch.Tensor
    collapsed: torch.Tensor


def ufm_closed_form(
    n_per_class: Sequence[int], weight_decay: Sequence[float], feature_decay: float
) -> UFMSolution:
    """Global minimiser of the bias-free squared loss of a deep linear network on free features.

    The objective is `1/(2N) |W_M ... W_1 H - Y|^2 + sum_j l_j/2 |W_j|^2 + l_H/2 |H|^2`, with one free feature for each of the
    `N` examples. It splits into one scalar problem for each class, whose unknown is the class's mode `s_k`, the output at the
    right class (all other outputs are 0):

        g(s) = n_k/(2N) (s - 1)^2 + (M + 1)/2 (c_k s^2)^(1/(M+1)),   c_k = l_H n_k prod_j l_j.

    For one layer `s_k = max(0, 1 - N sqrt(l_W l_H / n_k))`. For more layers it is the larger root of `g' = 0`, or 0 where that is
    lower, which is for `n_k <= M^2 (M - 1)^((1 - M)/M) N (N l_H prod_j l_j)^(1/M)`. The switch is discontinuous: a class that
    is kept has a mode above `(M - 1)/M` (Dang et al. 2023).

    Args:
        n_per_class: examples of each class, n_k.
        weight_decay: l_1, ..., l_M, one positive number a layer, from the features outwards.
        feature_decay: l_H, positive, for each single feature.

    Returns:
        For each class s_k; the squared norm of its row in the LAST layer; the squared norm of its features `|h_k|^2`; and whether
        it collapsed to zero.

    Raises:
        ValueError: no classes or layers, or a number that is not positive.
    """
    counts = torch.as_tensor(n_per_class, dtype=torch.float64)
    layers = torch.as_tensor(weight_decay, dtype=torch.float64)
    if counts.ndim != 1 or not len(counts) or not (counts > 0).all():
        raise ValueError(f"n_per_class must be positive numbers, got {list(n_per_class)}")
    if layers.ndim != 1 or not len(layers) or not (layers > 0).all() or not feature_decay > 0:
        raise ValueError(
            f"weight_decay and feature_decay must be positive, got {weight_decay} and {feature_decay}"
        )
    total, depth = counts.sum(), len(layers)
    strength = feature_decay * counts * layers.prod()  # c_k

    # a class that is kept has its mode between the height of the jump, (M - 1) / M, and 1; the slope of g changes its sign once there
    scale = total * (total * feature_decay * layers.prod()) ** (1 / depth)
    kept = counts > depth**2 * (depth - 1) ** ((1 - depth) / depth) * scale if depth > 1 else counts > scale
    pull = total / counts * strength ** (1 / (depth + 1))
    low = torch.full_like(counts, (depth - 1) / depth)
    high = torch.ones_like(counts)
    for _ in range(60):
        middle = (low + high) / 2
        rising = middle - 1 + pull * middle ** ((1 - depth) / (1 + depth)) > 0
        low, high = torch.where(rising, low, middle), torch.where(rising, middle, high)
    mode = torch.where(kept, high, 0.0)
    shared = (strength * mode**2) ** (1 / (depth + 1))
    return UFMSolution(mode, shared / layers[-1], shared / (feature_decay * counts), mode == 0)


def target_gram(kind: str, num_classes: int, norms: torch.Tensor | None = None) -> torch.Tensor:
    """The Gram matrix that collapse leads to, up to scale, (C, C).

    Args:
        kind: `"etf"`: a simplex equiangular tight frame, all cosines `-1/(C - 1)`. `"of"`: an orthogonal frame. `"gof"`: a
            general orthogonal frame, orthogonal with squared lengths `norms`.
        num_classes: C, at least 2.
        norms: squared lengths, (C,), for `"gof"` only.

    Raises:
        ValueError: an unknown kind, fewer than two classes, or norms that are missing, negative or of another number.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    if kind == "gof":
        if norms is None or norms.shape != (num_classes,) or (norms < 0).any():
            raise ValueError(
                f"a general orthogonal frame needs {num_classes} squared lengths of at least 0, got {norms}"
            )
        return torch.diag(norms.double())
    eye = torch.eye(num_classes, dtype=torch.float64)
    if kind == "of":
        return eye
    if kind == "etf":
        return eye - 1 / num_classes
    raise ValueError(f"kind must be 'etf', 'of' or 'gof', got {kind!r}")


def nc_metrics(
    features: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    *,
    target: str = "etf",
    norms: torch.Tensor | None = None,
) -> dict[str, float]:
    """How far features and classifier are from neural collapse: three numbers that go to zero.

    Args:
        features: last hidden layer, (n, d).
        labels: class indices, (n,); every class must occur.
        weights: of the linear classifier on them, (C, d). For deep linear heads give the product of the layers.
        target: the frame, see `target_gram`.
        norms: squared lengths of the class rows for `"gof"`.

    Returns:
        A dictionary:

        - `nc1`: `tr(S_W S_B^+) / C`, variability within the classes against that of their means;
        - `nc2`: distance of the normalised Gram matrix of the classifier from the target's;
        - `nc3`: distance of the normalised product of classifier and class means from the target. For `"etf"` the means are
          centred; for `"gof"` the target is the diagonal of the product itself.

    Raises:
        ValueError: shapes that do not fit, or a class without examples.
    """
    if (
        features.ndim != 2
        or weights.ndim != 2
        or features.shape[1] != weights.shape[1]
        or len(labels) != len(features)
    ):
        raise ValueError(
            "features, labels and weights must be (n, d), (n,) and (C, d), got "
            f"{tuple(features.shape)}, {tuple(labels.shape)} and {tuple(weights.shape)}"
        )
    num_classes = len(weights)
    counts = torch.bincount(labels, minlength=num_classes)
    if len(counts) != num_classes or (counts == 0).any():
        raise ValueError(f"labels must cover exactly the classes 0 to {num_classes - 1}, each at least once")
    features, weights = features.detach().double(), weights.detach().double()
    one_hot = torch.nn.functional.one_hot(labels, num_classes).double()
    means = (one_hot / counts).T @ features
    centre = means.mean(0)
    within = features - means[labels]
    between = means - centre
    within = within.T @ within / len(features)
    between = between.T @ between / num_classes
    nc1 = torch.trace(within @ torch.linalg.pinv(between, rtol=1e-8, hermitian=True)) / num_classes
    gram = target_gram(target, num_classes, norms)
    product = weights @ (means - centre if target == "etf" else means).T
    aligned = torch.diag(product.diagonal()) if target == "gof" else gram
    return {
        "nc1": nc1.item(),
        "nc2": _distance(weights @ weights.T, gram),
        "nc3": _distance(product, aligned),
    }


def _distance(matrix, target):
    norms = matrix.norm(), target.norm()
    if min(norms) == 0:
        return math.sqrt(2.0)
    return (matrix / norms[0] - target / norms[1]).norm().item()
