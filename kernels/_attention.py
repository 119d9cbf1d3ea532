"""What the kernels of attention share: tiles of rows, the online softmax, checks, lists of blocks."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels._launch import check_tensor, dot, dot_options

MAX_DIM = 128
LOW = tl.constexpr(
    -1e38
)  # where a running maximum starts: below any score, but finite, so that no difference is nan


@triton.jit
def load_rows(base, row, row_ok, depth, stride_row, stride_depth,
               MASKED: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Rows of a matrix, padded with zeros from DIM columns to BLOCK; `depth` is int64."""
    where = base + row.to(tl.int64)[:, None] * stride_row + depth[None, :] * stride_depth
    if MASKED:
        return tl.load(where, mask=row_ok[:, None] & (depth[None, :] < DIM), other=0.0)
    elif DIM == BLOCK:
        return tl.load(where)
    else:
        return tl.load(where, mask=(depth[None, :] < DIM) & (row[:, None] >= 0), other=0.0)


@triton.jit
def row_multiplier(
    factor, batch, head, row, row_ok, scale, stride_b, stride_h, stride_r, HAS_FACTOR: tl.constexpr
):
    """scale * factor of each row, in units of ln 2 for `scale` given in them."""
    if HAS_FACTOR:
        where = factor + batch * stride_b + head * stride_h + row.to(tl.int64) * stride_r
        return scale * tl.load(where, mask=row_ok, other=0.0)
    else:
        return scale + tl.where(row_ok, 0.0, 0.0)


@triton.jit
def online(
    scores, values, m, l, t, acc, ENTROPY: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr
):
    new_m = tl.maximum(m, tl.max(scores, 1))
    weights = tl.exp2(scores - new_m[:, None])
    old = tl.exp2(m - new_m)
    if ENTROPY:  # what is hidden has the score -inf, and -inf * 0 is nan
        inner = weights * tl.where(weights > 0, scores - new_m[:, None], 0.0)
        t = old * (t + (m - new_m) * l) + tl.sum(inner, 1)
    l = l * old + tl.sum(weights, 1)
    acc = dot(weights.to(values.dtype), values, acc * old[:, None], UPCAST, PRECISION)
    return new_m, l, t, acc


# --- launch shapes: speed only, no mathematics


def float32_tiles(tensor: torch.Tensor, kind: str, wide: bool) -> tuple[int, int, dict]:
    """Queries and keys of a tile of float32 on a GPU, and warps and stages; `kind` is "forward", "queries" or "keys"."""
    if dot_options(tensor)["PRECISION"] == "tf32":
        queries, keys = (32, 64) if kind == "keys" else (64, 32)
        return queries, keys, dict(num_warps=8, num_stages=2)
    # products outside the tensor cores keep whole rows of their operands in registers
    queries, keys = {
        "forward": (32, 32) if wide else (64, 32),
        "queries": (16, 16) if wide else (32, 32),
        "keys": (16, 16) if wide else (32, 32),
    }[kind]
    return queries, keys, dict(num_warps=8, num_stages=1)


# --- checks


def check_shapes(q, k, v, causal) -> tuple[int, ...]:
    """Batch, heads, queries, keys, dim and dim_v of the tensors (batch, heads, length, dim) of an attention.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit, or more causal queries than keys.
    """
    check_tensor("q", q, "batch, heads, queries, dim")
    check_tensor("k", k, "batch, heads, keys, dim", like=("q", q))
    check_tensor("v", v, "batch, heads, keys, dim_v", like=("q", q))
    batch, heads, queries, dim = q.shape
    keys, dim_v = v.shape[2:]
    if k.shape != (batch, heads, keys, dim) or v.shape[:2] != (batch, heads):
        raise ValueError(
            "q (batch, heads, queries, dim), k (batch, heads, keys, dim) and v (batch, heads, keys, dim_v) do not "
            f"fit together: {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if not (1 <= dim <= MAX_DIM and 1 <= dim_v <= MAX_DIM):
        raise ValueError(f"dim and dim_v must be from 1 to {MAX_DIM}, got {dim} and {dim_v}")
    if max(queries, keys) >= 2**31 - 4096:
        raise ValueError(f"lengths must be below 2^31 - 4096, got {queries} queries and {keys} keys")
    if causal and queries > keys:
        raise ValueError(f"causal attention needs at least as many keys as queries, got {keys} and {queries}")
    return batch, heads, queries, keys, dim, dim_v


# --- blocks


class KeptBlocks(NamedTuple):
    """Which key blocks each query block reads, listed from both sides; made by `kept_blocks`."""

    size: int  # tokens of a block
    first: int  # the block of the first query
    starts: torch.Tensor  # (query blocks + 1,) int32: where the list of each query block begins in `columns`
    columns: torch.Tensor  # key blocks, ascending for each query block
    column_starts: torch.Tensor  # (key blocks + 1,) int32: where the list of each key block begins in `rows`
    rows: torch.Tensor  # query blocks, ascending for each key block
    log_weight: torch.Tensor  # (key blocks,) float32, added to scores by block distance


def kept_blocks(kept: torch.Tensor, size: int, log_weight: torch.Tensor, device) -> KeptBlocks:
    """The lists of a boolean matrix on the CPU, for causal attention over some of the blocks.

    Args:
        kept: (query blocks, key blocks), True for pairs to compute. The query blocks are the last of the key blocks.
            Each keeps its diagonal block, and none keeps a later one.
        size: tokens of a block, at least 1.
        log_weight: added to the scores of a pair by block distance, (key blocks,).
        device: where the lists are wanted.

    Raises:
        ValueError: a size below 1, a matrix of another kind, or one without its diagonal or with later blocks.
    """
    if size < 1:
        raise ValueError(f"a block must hold at least 1 token, got {size}")
    if kept.dim() != 2 or kept.dtype != torch.bool or kept.shape[0] > kept.shape[1]:
        raise ValueError(
            "kept must be a boolean matrix (query blocks, key blocks) with no more rows than columns, "
            f"got {kept.dtype} of shape {tuple(kept.shape)}"
        )
    if log_weight.shape != kept.shape[1:]:
        raise ValueError(f"log_weight must be ({kept.shape[1]},), got {tuple(log_weight.shape)}")
    first = kept.shape[1] - kept.shape[0]
    if (~kept.diagonal(first)).any() or kept.triu(first + 1).any():
        raise ValueError("every query block must keep its diagonal block and no later one")
    lists = []
    for side in (kept, kept.T):
        starts = torch.nn.functional.pad(side.sum(1).cumsum(0), (1, 0))
        lists += [starts.int().to(device), side.nonzero()[:, 1].int().to(device)]
    return KeptBlocks(size, first, *lists, log_weight.to(device, torch.float32))
