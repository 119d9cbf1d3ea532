"""Tasks about which tokens of a context matter, and how many."""

from collections.abc import Sequence

import torch


def graph_transitions(edges: Sequence[tuple[int, int]], n: int) -> torch.Tensor:
    """The next-token distributions of a walk on a graph: from each node evenly to its neighbours.

    Args:
        edges: undirected, pairs of different nodes in 0..n-1.
        n: the number of nodes; each has at least one edge.

    Returns:
        Probabilities (n, n), float32, row i those after node i.

    Raises:
        ValueError: a node out of range, a loop, or a node without an edge.
    """
    adjacent = torch.zeros(n, n)
    for a, b in edges:
        if a == b or not (0 <= a < n and 0 <= b < n):
            raise ValueError(f"edges must join different nodes in 0..{n - 1}, got {(a, b)}")
        adjacent[a, b] = adjacent[b, a] = 1
    if not adjacent.any(1).all():
        raise ValueError(
            f"every node needs an edge, {adjacent.any(1).logical_not().nonzero()[0].item()} has none"
        )
    return adjacent / adjacent.sum(1, keepdim=True)


def relevance_denoising(
    n: int,
    length: int = 16,
    dim: int = 16,
    *,
    threshold: float = 0.6745,
    noise: float = 1.0,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Contexts of which some tokens carry a common signal and the others none.

    The first coordinate of a token is a standard normal number, and the token is relevant where its absolute value exceeds
    `threshold` (half of them at the default), which no linear function of the token tells. The other coordinates are
    u + noise * e in a relevant token and independent, of the same variance, in the others; u and e are standard normal.

    Args:
        n: the number of contexts.
        length: tokens in each.
        dim: of a token, at least 2.
        threshold: of relevance.
        noise: the standard deviation around u.
        generator: of the random numbers.

    Returns:
        Tokens, (n, length, dim), the signal u, (n, dim - 1), and whether a token is relevant, (n, length).

    Raises:
        ValueError: a size below 1, `dim` below 2, or a negative threshold or noise.
    """
    if n < 1 or length < 1 or dim < 2 or threshold < 0 or noise < 0:
        raise ValueError(
            f"n and length must be positive, dim at least 2, threshold and noise not negative; got {n}, {length}, {dim}, "
            f"{threshold}, {noise}"
        )
    marker = torch.randn(n, length, 1, generator=generator)
    signal = torch.randn(n, dim - 1, generator=generator)
    relevant = marker.abs() > threshold
    error = torch.randn(n, length, dim - 1, generator=generator)
    carried = torch.where(relevant, signal[:, None] + noise * error, (1 + noise**2) ** 0.5 * error)
    return torch.cat([marker, carried], -1), signal, relevant[..., 0]
