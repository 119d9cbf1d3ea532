"""Maximum likelihood read as a lesson in preferences, and whether a utility has learned an order.

After Huang and Yuan (2023), "Utility-Probability Duality of Neural Networks", arXiv 2305.14859.
"""

import torch


def preference_decomposition(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Weights of the pairwise preferences "the target over y" that one step of maximum likelihood teaches.

    With utilities f = `logits`, P = softmax(f) and an observed outcome t, for any parameters w behind f,

        grad_w log P(t) = sum over y of weight[y] * (grad_w f(t) - grad_w f(y)),   weight[y] = P(y) for y != t.

    The weights sum to 1 - P(t): the better the target is separated, the less there is left to teach.

    Args:
        logits: floating point, (..., V); minus infinity marks an outcome that is not possible and gets weight 0.
        targets: integers, (...), the index of the observed outcome.

    Returns:
        The weights, shape and dtype of `logits`, 0 at the target.

    Raises:
        TypeError: logits that are not floating point, targets that are not integers.
        ValueError: shapes that do not fit, or a target outside 0..V-1.
    """
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise TypeError(f"targets must be integers, got {targets.dtype}")
    if logits.ndim < 1 or logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"logits (..., V) and targets (...) expected, got {tuple(logits.shape)} and {tuple(targets.shape)}"
        )
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < logits.shape[-1]:
        raise ValueError(
            f"targets must lie in 0..{logits.shape[-1] - 1}, got {targets.min()}..{targets.max()}"
        )
    return torch.softmax(logits, -1).scatter(-1, targets.long().unsqueeze(-1), 0.0)


def order_agreement(utility: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Kendall's tau-b between two scores of the same outcomes: 1 if they order them alike, -1 if reversed.

    Strictly increasing transforms of either score change nothing. Ties count as in `scipy.stats.kendalltau`; the result is
    nan where one of the scores is constant. Time and memory are quadratic in V.

    Args:
        utility: real, (..., V) with V at least 2.
        reference: real, broadcastable against `utility`, for example true probabilities of shape (V,).

    Returns:
        float64, the batch shape.

    Raises:
        ValueError: fewer than two outcomes, or different numbers of them.
    """
    if utility.ndim < 1 or reference.ndim < 1 or utility.shape[-1] != reference.shape[-1]:
        raise ValueError(
            f"the last dimensions must agree, got {tuple(utility.shape)} and {tuple(reference.shape)}"
        )
    size = utility.shape[-1]
    if size < 2:
        raise ValueError(f"an order needs at least two outcomes, got {size}")
    first, second = torch.triu_indices(size, size, offset=1, device=utility.device)

    # comparisons, not differences: the difference of two huge or infinite scores is not a number
    def signs(score):
        left, right = score[..., first], score[..., second]
        return (left > right).double() - (left < right).double()

    a, b = signs(utility), signs(reference)
    return (a * b).sum(-1) / (a.abs().sum(-1) * b.abs().sum(-1)).sqrt()
