"""Attention with a temperature for each query that returns the entropy of its rows (Jha and Reagen, 2025)."""

import math

import torch
from torch.autograd.function import once_differentiable

from lib.attention.causal import causal_mask
from lib.attention.fused import FlashAttention, fused_impl, with_heads
from lib.attention.online import online_softmax_update


def entropy_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    temperature: torch.Tensor | None = None,
    *,
    causal: bool = False,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    block_size: int = 512,
    return_weights: bool = False,
    impl: str = "auto",
) -> tuple[torch.Tensor, ...]:
    """Softmax attention whose logits are divided by a temperature, with the entropy of every row.

    A row with logits s and weights a has the entropy log(sum_j exp(s_j)) - sum_j a_j s_j, and since s_j = q . k_j / t the
    second term is q / t times the mean key sum_j a_j k_j. So the entropy comes out of one pass over blocks of keys, with
    the keys beside the values: no weights are stored. The backward pass takes gradients of the output and of the entropy, and computes the weights of a
    block again. Differentiable once.

    Source: arXiv 2501.03489, entropy-guided attention; the entropy from the mean key is this book's.

    Args:
        q: queries, (..., L, dim).
        k: keys, (..., S, dim).
        v: values, (..., S, dim_v).
        temperature: divides the logits, positive, broadcasting with (..., L); (heads, L) in the paper. Above 1 rows spread.
        causal: whether a query sees only keys up to its own place; fewer queries than keys are the last ones.
        mask: boolean, broadcasting with (..., L, S), True where a pair may attend.
        scale: of the products, 1 / sqrt(dim) by default.
        block_size: how many keys at a time.
        return_weights: whether to return the weights as well, which takes the memory that is spared otherwise.
        impl: "triton" is a fused kernel, which takes neither `mask` nor `return_weights`, and dims up to 128. Half precision
            is multiplied as it is and added up in float32, and the entropy is float32. "torch" is the path over blocks.
            "auto" is the kernel for CUDA tensors where it takes what is given.

    Returns:
        The output, (..., L, dim_v), the entropy in nats, (..., L), and on request the weights, (..., L, S). A row that may
        attend to nothing has output, entropy and weights 0.

    Raises:
        ValueError: a temperature that is not positive, a `block_size` below 1, more queries than keys with `causal=True`,
            or `impl="triton"` with something that the kernel does not take.
    """
    new, total = q.shape[-2], k.shape[-2]
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    if temperature is not None and not bool((temperature > 0).all()):
        raise ValueError("temperature must be positive: it divides the logits")
    unfit = {"mask": mask is not None, "return_weights": return_weights}
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if fused_impl(impl, q, k, v, unfit) == "triton":
        return _fused(q, k, v, temperature, causal, scale)
    scaled = q * scale
    if temperature is not None:
        scaled = scaled / temperature[..., None]
    leading = torch.broadcast_shapes(
        scaled.shape[:-2], k.shape[:-2], v.shape[:-2], () if mask is None else mask.shape[:-2]
    )
    scaled, k, v = (part.expand(*leading, *part.shape[-2:]) for part in (scaled, k, v))
    hidden = _hidden(mask, new, total, causal, q.device)
    out, entropy = _EntropyAttention.apply(scaled, k, v, hidden, block_size)
    if not return_weights:
        return out, entropy
    scores = scaled @ k.mT
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    weights = scores.softmax(-1)
    return out, entropy, weights if mask is None else weights.masked_fill(hidden, 0)  # rows without any key


def _fused(q, k, v, temperature, causal, scale):
    lead = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    factor = None
    if temperature is not None:
        lead = torch.broadcast_shapes(lead, temperature.shape[:-1])
        factor = (1 / temperature.float()).expand(*lead, q.shape[-2])[..., None]
    q, k, v, factor = with_heads(lead, q, k, v, factor)
    factor = None if factor is None else factor[..., 0]
    out, entropy = FlashAttention.apply(q, k, v, factor, True, dict(scale=scale, causal=causal))
    return out.reshape(*lead, *out.shape[-2:]), entropy.reshape(*lead, entropy.shape[-1])


def _hidden(mask, new, total, causal, device):
    """What may not be seen, (..., new, total), or None."""
    hidden = None if mask is None else ~mask.expand(*mask.shape[:-2], new, total)
    if causal:
        later = ~causal_mask(new, total, device)
        hidden = later if hidden is None else hidden | later
    return hidden


class _EntropyAttention(torch.autograd.Function):
    """softmax(q k^T) v and the entropy of its rows, over blocks of k and v in both directions. `q` is scaled already."""

    @staticmethod
    def forward(ctx, q, k, v, hidden, block_size):
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        if k.shape[-2] <= block_size:
            scores = _scores(q, k, hidden, slice(0, k.shape[-2]), torch.finfo(q.dtype).min)
            weights = scores.softmax(-1)  # faster than the exponentials of a mask's infinities
            lse = scores.amax(-1) - weights.amax(-1).log()
            out, mean_key = weights @ v, weights @ k
            blind = None if hidden is None else hidden.all(-1)
        else:
            m = q.new_full(q.shape[:-1], -torch.inf)
            l, acc = torch.zeros_like(m), q.new_zeros(*q.shape[:-1], v.shape[-1] + k.shape[-1])
            for part in _parts(k.shape[-2], block_size):
                both = torch.cat([v[..., part, :], k[..., part, :]], -1)
                m, l, acc = online_softmax_update(m, l, acc, _scores(q, k, hidden, part), both)
            blind, lse = l == 0, m + l.log()
            out, mean_key = (acc / l[..., None]).split([v.shape[-1], k.shape[-1]], -1)
        mean_score = (q * mean_key).sum(-1)
        if blind is not None and bool(blind.any()):  # rows that may attend to nothing
            out = out.masked_fill(blind[..., None], 0.0)
            lse, mean_score = lse.masked_fill(blind, 0.0), mean_score.masked_fill(blind, 0.0)
        ctx.save_for_backward(q, k, v, hidden, out, lse, mean_score)
        ctx.block_size = block_size
        return out, lse - mean_score

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_entropy):
        q, k, v, hidden, out, lse, mean_score = ctx.saved_tensors
        grad = grad.contiguous()
        dq, dk, dv = torch.zeros_like(q), torch.empty_like(k), torch.empty_like(v)
        # dE/ds_j = -a_j (s_j - mean score)
        constant = (grad_entropy * mean_score - (grad * out).sum(-1))[..., None]
        for part in _parts(k.shape[-2], ctx.block_size):
            scores = _scores(q, k, hidden, part, 0.0)  # not -inf: 0 * inf would be nan
            weights = torch.exp(scores - lse[..., None])
            if hidden is not None:
                weights = weights.masked_fill(hidden[..., part], 0.0)
            dscores = weights * (grad @ v[..., part, :].mT + constant - grad_entropy[..., None] * scores)
            dv[..., part, :] = weights.mT @ grad
            dk[..., part, :] = dscores.mT @ q
            dq += dscores @ k[..., part, :]
        return dq, dk, dv, None, None


def _parts(length, block_size):
    return (slice(start, min(start + block_size, length)) for start in range(0, length, block_size))


def _scores(q, k, hidden, part, fill=-torch.inf):
    scores = q @ k[..., part, :].mT
    return scores if hidden is None else scores.masked_fill(hidden[..., part], fill)
