"""The loss of a chain of continuous thought."""

import torch
import torch.nn.functional as F


def thought_loss(
    head, hidden: torch.Tensor, targets: torch.Tensor, mu: float = 0.3
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Answer loss after the last thought, plus `mu` times the answer loss after each number of thoughts before it.

    total = l_n + mu sum_(k < n) l_k with l_k = -log p(target | prompt, first k thoughts): Pham and Ngo (2025,
    arXiv 2508.12587). The sum starts at k = 1, as in the paper: l_0, before any thought, has no part in it.

    Args:
        head: the unembedding, (batch, dim) to logits (batch, vocab_size).
        hidden: h_0 .. h_n as `lib.reasoning.continuous_thought` returns them, (batch, n + 1, dim).
        targets: the answer token, (batch,); -100 is ignored.
        mu: weight of the earlier losses, at least 0.

    Returns:
        The total, a scalar, and the list of l_0 .. l_n.

    Raises:
        ValueError: shapes that do not fit, or a negative `mu`.
    """
    if hidden.ndim != 3 or hidden.shape[1] < 1 or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden must be (batch, n + 1, dim) and targets (batch,), got {tuple(hidden.shape)}, {tuple(targets.shape)}"
        )
    if mu < 0:
        raise ValueError(f"mu must be at least 0, got {mu}")
    losses = [F.cross_entropy(head(hidden[:, step]), targets) for step in range(hidden.shape[1])]
    return losses[-1] + mu * sum(losses[1:-1], losses[-1] * 0), losses
