"""Nearly orthogonal unit vectors, more of them than dimensions, as fixed targets of classes.

The method is that of Shen, Sun and Wei, "Equiangular Basis Vectors" (arXiv 2303.11637).
"""

import math

import torch
import torch.nn.functional as F

_RATES = {"hinge": 0.01, "squared": 0.2}


def welch_bound(n: int, dim: int) -> float:
    """The least possible largest `|cosine|` among n unit vectors: `sqrt((n - d) / (d (n - 1)))` for n > d, else 0 (Welch 1974).

    It is attained only by equiangular tight frames, which exist for few (n, d) and for none with n > d (d + 1) / 2.

    Raises:
        ValueError: n or dim below 1.
    """
    if n < 1 or dim < 1:
        raise ValueError(f"n and dim must be at least 1, got {n} and {dim}")
    return math.sqrt((n - dim) / (dim * (n - 1))) if n > dim else 0.0


def largest_cosine(vectors: torch.Tensor) -> float:
    """The largest `|cosine|` between two different rows of (n, d); 0 for a single row."""
    unit = F.normalize(vectors.double(), dim=1)
    return (unit @ unit.T).fill_diagonal_(0).abs().max().item()


def equiangular_basis(
    n: int,
    dim: int,
    alpha: float | None = None,
    *,
    penalty: str = "squared",
    slice_size: int | None = None,
    steps: int = 2000,
    learning_rate: float | None = None,
    restarts: int = 1,
    seed: int = 0,
) -> tuple[torch.Tensor, float]:
    """Unit vectors whose pairwise `|cosines|` are all at most alpha, as nearly as that can be reached.

    Minimises the sum over pairs of `max(0, |cosine| - alpha)` or its square, by gradient descent with a rate that decays to zero;
    every vector is normalised after each step. Stops early once the largest `|cosine|` is at most `alpha + 1e-4`.

    Args:
        n, dim: number and dimension of the vectors.
        alpha: the bound; None takes the Welch bound.
        penalty: `"squared"`, or `"hinge"` as in the paper. The hinge's force does not grow with the violation, so that under a
            tight bound with n > d two vectors can stay on one line; under a loose bound (twice the Welch bound) it works.
        slice_size: rows that are compared with all others at a time; None takes all. The result is the same, the memory smaller.
        steps: of gradient descent, for each start.
        learning_rate: at the first step, positive; None takes 0.2 for the squared penalty and 0.01 for the hinge.
        restarts: random starts, of which the best is returned.
        seed: of the starts; the global random state is not touched.

    Returns:
        Vectors (n, dim) float32, and the largest `|cosine|` that was reached.

    Raises:
        ValueError: an argument out of range, or an unknown penalty.
    """
    alpha = welch_bound(n, dim) if alpha is None else alpha
    learning_rate = _RATES.get(penalty) if learning_rate is None else learning_rate
    _check(n, dim, alpha, penalty, slice_size, steps, learning_rate, restarts)
    generator = torch.Generator().manual_seed(seed)
    best = None
    for _ in range(restarts):
        start = torch.randn(n, dim, generator=generator)
        found = _descend(start, 0, alpha, penalty, slice_size, steps, learning_rate)
        cosine = largest_cosine(found)
        if best is None or cosine < best[1]:
            best = found, cosine
        if cosine <= alpha + 1e-4:
            break
    return best


def extend_basis(
    basis: torch.Tensor,
    extra: int,
    alpha: float | None = None,
    *,
    steps: int = 2000,
    learning_rate: float | None = None,
    seed: int = 0,
) -> tuple[torch.Tensor, float]:
    """More vectors under the same bound; the old ones stay where they are.

    Args:
        basis: (n, dim), unit rows.
        extra: how many to add, at least 1.
        alpha: the bound; None takes the Welch bound of all n + extra.
        steps, learning_rate, seed: as in `equiangular_basis`, with the squared penalty.

    Returns:
        All vectors, (n + extra, dim), the old ones first and unchanged, and the largest `|cosine|` among them.

    Raises:
        ValueError: rows that are not unit vectors, or an argument out of range.
    """
    if basis.ndim != 2 or ((basis.norm(dim=1) - 1).abs() > 1e-4).any():
        raise ValueError(f"basis must be unit rows of shape (n, dim), got shape {tuple(basis.shape)}")
    total = len(basis) + extra
    alpha = welch_bound(total, basis.shape[1]) if alpha is None else alpha
    if extra < 1:
        raise ValueError(f"extra must be at least 1, got {extra}")
    learning_rate = _RATES["squared"] if learning_rate is None else learning_rate
    _check(total, basis.shape[1], alpha, "squared", None, steps, learning_rate, 1)
    generator = torch.Generator().manual_seed(seed)
    start = torch.cat([basis.float(), torch.randn(extra, basis.shape[1], generator=generator)])
    found = _descend(start, len(basis), alpha, "squared", None, steps, learning_rate)
    return found, largest_cosine(found)


def _descend(start, fixed, alpha, penalty, slice_size, steps, learning_rate):
    """Gradient descent from `start`, whose first `fixed` rows do not move."""
    vectors = F.normalize(start, dim=1)
    vectors[:fixed] = start[:fixed]
    rows = len(vectors) if slice_size is None else slice_size
    for step in range(steps):
        gradient = torch.empty_like(vectors)
        worst = 0.0
        for first in range(0, len(vectors), rows):
            cosines = vectors[first : first + rows] @ vectors.T
            index = torch.arange(len(cosines))
            cosines[index, first + index] = 0.0
            excess = cosines.abs() - alpha
            worst = max(worst, excess.max().item())
            pull = (excess > 0).to(cosines.dtype) if penalty == "hinge" else excess.clamp_min(0)
            gradient[first : first + rows] = (cosines.sign() * pull) @ vectors
        if worst <= 1e-4:
            break
        rate = learning_rate * (1 + math.cos(math.pi * step / steps)) / 2
        moved = F.normalize(vectors - rate * gradient, dim=1)
        vectors = torch.cat([vectors[:fixed], moved[fixed:]])
    return vectors


def _check(n, dim, alpha, penalty, slice_size, steps, learning_rate, restarts):
    if penalty not in _RATES:
        raise ValueError(f"penalty must be 'hinge' or 'squared', got {penalty!r}")
    if n < 1 or dim < 1 or steps < 1 or restarts < 1 or not learning_rate > 0:
        raise ValueError(
            "n, dim, steps and restarts must be at least 1 and learning_rate positive, "
            f"got {n}, {dim}, {steps}, {restarts} and {learning_rate}"
        )
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha must lie in [0, 1), got {alpha}")
    if slice_size is not None and slice_size < 1:
        raise ValueError(f"slice_size must be at least 1, got {slice_size}")
