"""A loss between sequences that looks for target n-grams anywhere in the output.

After Liu et al. (2022), "Don't Take It Literally: An Edit-Invariant Sequence Loss for Text Generation", arXiv 2106.15078.
"""

from collections.abc import Sequence

import torch


def ngram_match_map(log_probs: torch.Tensor, targets: torch.Tensor, n: int) -> torch.Tensor:
    """Log-probability of every target n-gram at every output position.

    Entry (t, i) is the sum over j < n of `log_probs[t + j, targets[i + j]]`. The target columns are gathered first, so that
    nothing of size T x V is made; then n shifted views of the T x S matrix are added, which is a sum along its diagonals.

    Args:
        log_probs: floating point, (B, T, V).
        targets: integers, (B, S), in [0, V).
        n: length of the n-grams, from 1 to the smaller of T and S.

    Returns:
        (B, T - n + 1, S - n + 1), in nats.

    Raises:
        TypeError: log-probabilities that are not floating point, targets that are not integers.
        ValueError: shapes that do not fit, or n out of range.
    """
    return _diagonal_sums(_gather(log_probs, targets), n)


def eisl(
    log_probs: torch.Tensor,
    targets: torch.Tensor,
    *,
    ngrams: Sequence[int] = (2, 3, 4),
    weights: Sequence[float] | None = None,
    tau: float = 1.0,
    gumbel: bool = True,
    floor: float = -20.0,
    pad_id: int | None = None,
    output_lengths: torch.Tensor | None = None,
    detach_q: bool = False,
    generator: torch.Generator | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """Edit-invariant sequence loss: each target n-gram is matched with all positions of the output (Liu et al. 2022).

    With the map g of `ngram_match_map` and a weight q over *output positions*, one for each target n-gram,

        eisl_n = - mean over i of sum over t of q[t, i] * g[t, i] / n,   q[:, i] = softmax((g[:, i] / n + noise) / tau)

    and the loss is the weighted sum of eisl_n over `ngrams`. Nothing asks different n-grams to use different positions: train
    with cross-entropy first.

    At a glance:
        formula: `- sum_n w_n mean_i sum_t q[t,i] g_n[t,i] / n`, `g_n[t,i] = sum_j log p[t+j, y[i+j]]`
        gradient: `p c - r`, with the soft counts `r[t,v]` of token v at position t and `c = sum_v r[t,v]` (q fixed)
        consistency: for clean targets and n = T it is cross-entropy; shorter n-grams do not fix the order of blocks
        cost: `O(B T S n)`; stores `B T S` numbers for each n, never `T V n`

    Args:
        log_probs: (B, T, V), the output of a log-softmax.
        targets: (B, S); S may differ from T.
        ngrams: the lengths n, each at least 1. Lengths above T or S (or above the real length of a row) are left out, and
            the weights of the others are scaled up.
        weights: of the lengths, equal by default; at least 0 and not all 0. They are scaled to sum 1.
        tau: temperature of q, positive. Towards 0 it becomes the best match.
        gumbel: add Gumbel noise to the scores behind q. Without it the loss is deterministic.
        floor: log-probabilities below are set to it, and get no gradient. Minus infinity for none; then all must be finite.
        pad_id: target token of the padding; n-grams that touch it are dropped.
        output_lengths: integers (B,), real positions of each output, counted from the left; all T by default.
        detach_q: whether q counts as a constant in the gradient. The released code differentiates it.
        generator: source of the Gumbel noise; the global one when None.
        reduction: "mean" over the rows that have an n-gram left, "sum", or "none" for a (B,) tensor. Rows without count 0.

    Returns:
        A scalar, or (B,).

    Raises:
        TypeError: log-probabilities that are not floating point, targets that are not integers.
        ValueError: shapes that do not fit, or an argument out of its range.
    """
    ngrams = tuple(ngrams)
    weights = (1.0,) * len(ngrams) if weights is None else tuple(weights)
    if not ngrams or min(ngrams) < 1:
        raise ValueError(f"ngrams must hold lengths of at least 1, got {ngrams}")
    if len(weights) != len(ngrams) or min(weights) < 0 or sum(weights) <= 0:
        raise ValueError(f"weights must be {len(ngrams)} numbers of at least 0 and not all 0, got {weights}")
    if not tau > 0:
        raise ValueError(f"tau must be positive, got {tau}")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    gathered = _gather(log_probs, targets).clamp_min(floor)
    batch, outputs, length = gathered.shape
    if output_lengths is not None and output_lengths.shape != (batch,):
        raise ValueError(f"output_lengths must have shape ({batch},), got {tuple(output_lengths.shape)}")
    total, weight_sum = gathered.new_zeros(batch), gathered.new_zeros(batch)
    for n, weight in zip(ngrams, weights, strict=True):
        if n > min(outputs, length):
            continue
        scores = _diagonal_sums(gathered, n) / n
        behind_q = scores.detach() if detach_q else scores
        if gumbel:
            behind_q = behind_q - torch.empty_like(scores).exponential_(generator=generator).log()
        kept = torch.ones_like(scores[:, 0], dtype=torch.bool)  # (B, S - n + 1): target n-grams
        if pad_id is not None:
            kept = ~(targets == pad_id).unfold(1, n, 1).any(-1)
        if output_lengths is not None:
            starts = torch.arange(outputs - n + 1, device=scores.device)
            real = starts + n <= output_lengths.unsqueeze(1)  # (B, T - n + 1): output positions
            # the lowest number, not minus infinity: a row without any position must stay finite
            behind_q = behind_q.masked_fill(~real.unsqueeze(-1), torch.finfo(scores.dtype).min)
            kept = kept & real.any(1, keepdim=True)
        q = torch.softmax(behind_q / tau, 1)
        matched = (q * scores).sum(1).masked_fill(~kept, 0.0)
        count = kept.sum(1)
        total = total - weight * matched.sum(1) / count.clamp_min(1)
        weight_sum = weight_sum + weight * (count > 0)
    used = weight_sum > 0
    losses = total / torch.where(used, weight_sum, 1.0)
    if reduction == "none":
        return losses
    return losses.sum() / (used.sum().clamp_min(1) if reduction == "mean" else 1)


def _gather(log_probs, targets):
    """G[b, t, i] = log_probs[b, t, targets[b, i]]."""
    if not log_probs.is_floating_point():
        raise TypeError(f"log_probs must be floating point, got {log_probs.dtype}")
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise TypeError(f"targets must be integers, got {targets.dtype}")
    if log_probs.ndim != 3 or targets.ndim != 2 or log_probs.shape[0] != targets.shape[0]:
        raise ValueError(
            f"log_probs (B, T, V) and targets (B, S) expected, got {tuple(log_probs.shape)} and {tuple(targets.shape)}"
        )
    if not (log_probs.shape[1] and targets.shape[1]):
        raise ValueError("output and target need at least one position")
    index = targets.long().unsqueeze(1).expand(-1, log_probs.shape[1], -1)
    return log_probs.gather(2, index)


def _diagonal_sums(gathered, n):
    rows, columns = gathered.shape[1] - n + 1, gathered.shape[2] - n + 1
    if n < 1 or min(rows, columns) < 1:
        raise ValueError(f"n must be from 1 to {min(gathered.shape[1:])}, got {n}")
    total = gathered[:, :rows, :columns]
    for j in range(1, n):
        total = total + gathered[:, j : j + rows, j : j + columns]
    return total
