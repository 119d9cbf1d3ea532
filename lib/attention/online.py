"""The online softmax: a softmax-weighted sum over blocks, exact, in one pass."""

import torch
from torch.autograd.function import once_differentiable


def online_softmax_update(
    m: torch.Tensor, l: torch.Tensor, acc: torch.Tensor, scores: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Add one block of scores and values to a running softmax-weighted sum.

    Start with m = -inf, l = 0 and acc = 0. After the last block `acc / l` is softmax(all scores) @ (all values) and
    `m + log(l)` is the log-sum-exp of all scores. Blocks may come in any order and size. A score of -inf is masked; as
    long as all scores were masked, m stays -inf and l stays 0.

    Gradients flow through l, acc, scores and values. m counts as a constant, since it cancels in both results.

    Args:
        m: the running maximum, (..., S).
        l: the running sum of exp(score - m), (..., S).
        acc: the running sum of exp(score - m) * value, (..., S, dim).
        scores: of this block, (..., S, block).
        values: of this block, (..., block, dim).

    Returns:
        m, l and acc with the block included.

    Raises:
        ValueError: the shapes do not fit together.
    """
    if (
        scores.ndim < 1
        or values.ndim < 2
        or scores.shape[-1] != values.shape[-2]
        or acc.shape[-1] != values.shape[-1]
    ):
        raise ValueError(
            f"scores (..., S, block), values (..., block, dim) and acc (..., S, dim) do not fit together: "
            f"{tuple(scores.shape)}, {tuple(values.shape)}, {tuple(acc.shape)}"
        )
    if m.shape != l.shape or acc.shape[:-1] != m.shape or scores.shape[:-1] != m.shape:
        raise ValueError(
            f"m, l, acc without its last and scores without its last dimension must have one shape, got "
            f"{tuple(m.shape)}, {tuple(l.shape)}, {tuple(acc.shape[:-1])}, {tuple(scores.shape[:-1])}"
        )
    if scores.shape[-1] == 0:
        return m, l, acc
    larger = torch.maximum(m, scores.amax(-1)).detach()
    shift = larger.masked_fill(larger == -torch.inf, 0.0)  # -inf - (-inf) would be nan
    old = torch.exp(m.detach() - shift)
    new = torch.exp(scores - shift.unsqueeze(-1))
    return larger, l * old + new.sum(-1), acc * old.unsqueeze(-1) + new @ values


class StreamingAttention(torch.autograd.Function):
    """softmax(beta q k^T) v over blocks of k and v, in both directions. Keeps the output and one number a query.

    All tensors have the same leading dimensions; `beta` broadcasts against (..., S, 1), `mask` against (..., S, N).
    """

    @staticmethod
    def forward(ctx, q, k, v, beta, mask, block_size):
        m = q.new_full(q.shape[:-1], -torch.inf)
        l, acc = torch.zeros_like(m), q.new_zeros(*q.shape[:-1], v.shape[-1])
        for part, part_mask in _blocks(k.shape[-2], mask, block_size):
            scores = _scores(q * beta, k[..., part, :], part_mask)
            m, l, acc = online_softmax_update(m, l, acc, scores, v[..., part, :])
        total = l.masked_fill(l == 0, 1.0)  # queries that may attend to nothing read zeros
        out, lse = acc / total.unsqueeze(-1), m + torch.log(total)
        ctx.save_for_backward(q, k, v, beta, mask, out, lse)
        ctx.block_size = block_size
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, beta, mask, out, lse = ctx.saved_tensors
        dq, dk, dv = torch.zeros_like(q), torch.empty_like(k), torch.empty_like(v)
        scaled, inner = q * beta, (grad * out).sum(-1, keepdim=True)
        shift = lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)
        for part, part_mask in _blocks(k.shape[-2], mask, ctx.block_size):
            keys = k[..., part, :]
            weights = torch.exp(_scores(scaled, keys, part_mask) - shift)  # (..., S, block)
            dscores = weights * (grad @ v[..., part, :].mT - inner)
            dv[..., part, :] = weights.mT @ grad
            dk[..., part, :] = dscores.mT @ scaled
            dq += dscores @ keys
        dbeta = (dq * q).sum_to_size(beta.shape) if ctx.needs_input_grad[3] else None
        return dq * beta, dk, dv, dbeta, None, None


def _blocks(length, mask, block_size):
    for start in range(0, length, block_size):
        part = slice(start, min(start + block_size, length))
        whole = mask is None or mask.shape[-1] == 1
        yield part, mask if whole else mask[..., part]


def _scores(scaled_q, k, mask):
    scores = scaled_q @ k.mT
    return scores if mask is None else scores.masked_fill(~mask, -torch.inf)
