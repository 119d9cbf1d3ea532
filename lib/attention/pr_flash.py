"""Causal attention over a random part of the blocks of keys: near blocks surely, far ones with a probability."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from lib.attention.fused import FlashAttention, fused_impl, with_heads
from lib.attention.online import online_softmax_update


def keep_probabilities(blocks: int, keep: Callable[[int], float]) -> torch.Tensor:
    """`keep` at block distances 0..blocks - 1, checked: float64, shape (blocks,).

    Raises:
        ValueError: `keep(0)` is not 1 (the first rows would see nothing), or a value outside [0, 1].
    """
    chances = [float(keep(r)) for r in range(blocks)]
    if blocks and chances[0] != 1:
        raise ValueError(f"keep(0) must be 1: the diagonal block is always kept; got {chances[0]}")
    if not all(0 <= chance <= 1 for chance in chances):
        raise ValueError(f"keep must return probabilities in [0, 1], got {chances}")
    return torch.tensor(chances, dtype=torch.float64)


def draw_blocks(blocks: int, keep: Callable[[int], float], *, seed: int) -> torch.Tensor:
    """Which key blocks each query block reads: boolean, (blocks, blocks), lower triangular with a full diagonal.

    Block (I, J) is kept with probability `keep(I - J)`, all independently. The draw belongs to the seed alone: the rows of a
    shorter sequence are the first rows of a longer one, and whoever draws again, as a backward pass may, gets the same.

    Args:
        blocks: of the whole sequence.
        keep: the probability at a block distance.
        seed: of the draw.

    Raises:
        ValueError: as `keep_probabilities`.
    """
    chances = keep_probabilities(blocks, keep)
    row, column = torch.tril_indices(blocks, blocks)  # row after row
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(len(row), generator=generator, dtype=torch.float64)
    kept = torch.zeros(blocks, blocks, dtype=torch.bool)
    kept[row, column] = uniform < chances[row - column]
    return kept


def pr_flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    block: int = 64,
    keep: Callable[[int], float],
    seed: int,
    reweight: bool = False,
    scale: float | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Causal softmax attention that reads each key block with a probability of its block distance.

    A kept block enters the online softmax; a dropped one is never touched, so weights of a row sum to one over what was
    kept. One draw serves all leading dimensions, so that the kept blocks of all query blocks form a dense list of slots.
    Memory is linear in the length, forward and backward; the backward pass walks the same blocks as the forward pass.

    Source: Li (2024), arXiv 2410.18441; the law of `keep` and the reweighted form are the book's reconstruction.

    Args:
        q: (..., queries, dim); the queries are the last positions.
        k: (..., keys, dim), at least as many.
        v: (..., keys, anything).
        block: tokens in a block.
        keep: the probability of a block at distance 0, 1, 2, ...; `keep(0)` must be 1.
        seed: of the draw, see `draw_blocks`; one for each layer and step.
        reweight: divide the exponentials of a block by its probability, in numerator and denominator. The output is then
            consistent for full attention; without it, it leans to near tokens.
        scale: of the products; 1 / sqrt(dim) by default.
        impl: "triton" is a fused kernel for dims up to 128, which multiplies half precision as it is and adds up in
            float32. "torch" walks over the slots. "auto" is the kernel for CUDA tensors that it takes.

    Returns:
        (..., queries, anything).

    Raises:
        ValueError: `block` below 1, more queries than keys, `keep` as in `keep_probabilities`, or `impl="triton"` with
            something that the kernel does not take.
    """
    queries, keys = q.shape[-2], k.shape[-2]
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    if queries > keys:
        raise ValueError(f"the queries are the last positions: got {queries} of them for {keys} keys")
    blocks = math.ceil(keys / block)
    kept = draw_blocks(blocks, keep, seed=seed)
    first = (keys - queries) // block  # the block of the first query
    chances = keep_probabilities(blocks, keep)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if fused_impl(impl, q, k, v, {}) == "triton":
        log_weight = -chances.log() if reweight else torch.zeros(blocks)
        return _fused(q, k, v, kept[first:], block, log_weight, scale)
    front, back = (keys - queries) % block, blocks * block - keys
    # whole blocks: what is added before is dropped again, what is added after lies in the future
    q = F.pad(q, (0, 0, front, back)).unflatten(-2, (-1, block))
    k, v = (F.pad(x, (0, 0, 0, back)).unflatten(-2, (blocks, block)) for x in (k, v))
    lead = torch.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    q, k, v = (x.expand(*lead, *x.shape[-3:]) for x in (q, k, v))
    log_weight = -chances.log().to(q) if reweight else torch.zeros(blocks, dtype=q.dtype, device=q.device)
    out = _BlockAttention.apply(q * scale, k, v, _slots(kept[first:], first), log_weight)
    return out.flatten(-3, -2)[..., front : front + queries, :]


def _fused(q, k, v, kept, block, log_weight, scale):
    from kernels.flash_attention import kept_blocks

    lead = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    q, k, v = with_heads(lead, q, k, v)
    blocks = kept_blocks(kept, block, log_weight, q.device)
    out, _ = FlashAttention.apply(q, k, v, None, False, dict(scale=scale, blocks=blocks))
    return out.reshape(*lead, *out.shape[-2:])


def _slots(kept, first):
    """The ragged lists of kept blocks, turned: slot s holds the s-th kept block of every query block that has so many.

    Each slot is (query blocks, key blocks, distances). The diagonal comes first, so that no row starts with nothing.
    """
    lists = [row.nonzero()[:, 0].flip(0).tolist() for row in kept]
    slots = []
    for s in range(max(map(len, lists), default=0)):
        rows = torch.tensor([i for i, columns in enumerate(lists) if len(columns) > s])
        columns = torch.tensor([columns[s] for columns in lists if len(columns) > s])
        slots.append((rows, columns, rows + first - columns))
    return slots


def _block_scores(q, k, distance, log_weight):
    scores = q @ k.mT + log_weight[distance][:, None, None]
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill((distance == 0)[:, None, None] & future, -torch.inf)


class _BlockAttention(torch.autograd.Function):
    """q (..., query blocks, block, dim) over the slots' key blocks; keeps the output and one number a query."""

    @staticmethod
    def forward(ctx, q, k, v, slots, log_weight):
        m = q.new_full(q.shape[:-1], -torch.inf)
        l, acc = torch.zeros_like(m), q.new_zeros(*q.shape[:-1], v.shape[-1])
        slots = [tuple(index.to(q.device) for index in slot) for slot in slots]
        for rows, columns, distance in slots:
            scores = _block_scores(q[..., rows, :, :], k[..., columns, :, :], distance, log_weight)
            state = m[..., rows, :], l[..., rows, :], acc[..., rows, :, :]
            new = online_softmax_update(*state, scores, v[..., columns, :, :])
            m[..., rows, :], l[..., rows, :], acc[..., rows, :, :] = new
        out, lse = acc / l.unsqueeze(-1), m + l.log()
        ctx.save_for_backward(q, k, v, out, lse, log_weight)
        ctx.slots = slots
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, out, lse, log_weight = ctx.saved_tensors
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        inner = (grad * out).sum(-1, keepdim=True)
        for rows, columns, distance in ctx.slots:
            queries, keys = q[..., rows, :, :], k[..., columns, :, :]
            scores = _block_scores(queries, keys, distance, log_weight)
            weights = (scores - lse[..., rows, :].unsqueeze(-1)).exp()
            above = grad[..., rows, :, :]
            dscores = weights * (above @ v[..., columns, :, :].mT - inner[..., rows, :, :])
            dq[..., rows, :, :] += dscores @ keys
            # two query blocks may share a key block in one slot
            dk.index_add_(-3, columns, dscores.mT @ queries)
            dv.index_add_(-3, columns, weights.mT @ above)
        return dq, dk, dv, None, None
