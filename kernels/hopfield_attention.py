"""Several updates of a Hopfield network, state <- softmax(beta state stored^T) stored, in one launch.

Source: arXiv 2008.02217, equation 3. A program keeps its states in registers from step to step and walks over the stored
patterns with the online softmax; these are keys and values in one, so that a step reads them once. The states after each
step are written, since the gradient of a step is that of `kernels.flash_attention` with the patterns for keys and values.

Traffic for B heads (batch included), L states, S patterns of dim d, w bytes a number, as long as the states of a head fit in one
tile (64): w B d (steps S + (steps + 1) L) bytes, or w B d (S + (steps + 1) L) where the patterns of a head stay in the cache,
and 4 B d L S operations of products a step.

SDPA does a step as attention and reads the patterns as keys and as values: for the few states of a pooling layer, bound
by reading, 2.0 in time, 1.0 in memory. For thousands of states both are bound by the products: 1.0, and the weights (w B L S
bytes, twice) that plain torch writes and keeps are 40 times the rest at L = S = 8192, d = 64.
"""

import torch
import triton
import triton.language as tl

from kernels._attention import LOW, check_shapes, load_rows, online, row_multiplier
from kernels._launch import dot, dot_options

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _hopfield_kernel(
    state, stored, factor, states, lse, tiles, heads, lines, queries, keys, scale, steps,
    q_b, q_h, q_r, q_d, k_b, k_h, k_r, k_d, f_b, f_h, f_r,
    HAS_FACTOR: tl.constexpr, DIM: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) % tiles
    entry = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = entry // heads, entry % heads
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = row < queries
    depth = tl.arange(0, BLOCK_D).to(tl.int64)
    k_base = stored + batch * k_b + head * k_h
    q_tile = load_rows(state + batch * q_b + head * q_h, row, row_ok, depth, q_r, q_d, True, DIM, BLOCK_D)
    multiplier = row_multiplier(factor, batch, head, row, row_ok, scale * _LOG2_E, f_b, f_h, f_r, HAS_FACTOR)
    line = entry * queries + row
    for _ in range(steps):
        m = tl.full((BLOCK_M,), LOW, dtype=tl.float32)
        l = tl.zeros((BLOCK_M,), dtype=tl.float32)
        t = tl.zeros((BLOCK_M,), dtype=tl.float32)
        acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
        for start in range(0, keys, BLOCK_N):
            column = start + tl.arange(0, BLOCK_N)
            k_tile = load_rows(k_base, column, column < keys, depth, k_r, k_d, True, DIM, BLOCK_D)
            product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            scores = dot(q_tile, tl.trans(k_tile), product, UPCAST, PRECISION) * multiplier[:, None]
            scores = tl.where(column[None, :] < keys, scores, float("-inf"))
            m, l, t, acc = online(scores, k_tile, m, l, t, acc, False, UPCAST, PRECISION)
        q_tile = (acc / l[:, None]).to(q_tile.dtype)
        where = states + line[:, None] * DIM + depth[None, :]
        tl.store(where, q_tile, mask=row_ok[:, None] & (depth[None, :] < DIM))
        tl.store(lse + line, (m + tl.log2(l)) * _LN2, mask=row_ok)
        line += lines  # counted by the host: the product may need 64 bits


def _shape(tensor, dim) -> dict:
    """Tile sizes and warps: speed only, no mathematics."""
    width, options = max(16, triton.next_power_of_2(dim)), {}
    if not tensor.is_cuda:  # the interpreter
        states, patterns = 32, 16
    elif tensor.dtype.itemsize == 2:
        states, patterns, options = 64, 64, dict(num_warps=4, num_stages=3)
    elif dot_options(tensor)["PRECISION"] == "tf32":
        states, patterns, options = 64, 32, dict(num_warps=4, num_stages=2)
    else:
        states, patterns, options = 32, 32, dict(num_warps=8, num_stages=1)
    return dict(BLOCK_M=states, BLOCK_N=patterns, BLOCK_D=width, **options)


def hopfield_forward(state, stored, *, steps, scale=None, factor=None):
    """Several steps state <- softmax(scale * factor * state stored^T) stored, in one launch.

    The gradient of a step is that of `flash_attention_forward` with stored patterns for keys and for values.

    Args:
        state: (batch, heads, states, dim), any strides; float32, bfloat16 or float16.
        stored: (batch, heads, patterns, dim), same dtype, at least one pattern.
        steps: how many, at least 1.
        scale: of the products; 1 / sqrt(dim) by default.
        factor: of the products of each state besides `scale`, (batch, heads, states) float32, or None.

    Returns:
        The states after each step, (steps, batch, heads, states, dim) in the dtype of `state`, and the log-sum-exps of
        the steps, (steps, batch, heads, states) float32.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit, no patterns, or `steps` below 1.
    """
    batch, heads, queries, keys, dim, _ = check_shapes(state, stored, stored, False)
    if factor is not None and (factor.shape != state.shape[:3] or factor.dtype != torch.float32):
        raise ValueError(
            f"factor must be float32 of shape {tuple(state.shape[:3])}, got {factor.dtype} of {tuple(factor.shape)}"
        )
    if factor is not None and factor.device != state.device:
        raise ValueError(f"state is on {state.device}, factor must be too, got {factor.device}")
    if steps < 1 or not keys:
        raise ValueError(f"need at least 1 step and 1 pattern, got {steps} and {keys}")
    states = state.new_empty(steps, *state.shape)
    lse = torch.empty(states.shape[:-1], dtype=torch.float32, device=state.device)
    if lse.numel():
        shape = _shape(state, dim)
        tiles = triton.cdiv(queries, shape["BLOCK_M"])
        strides = (*state.stride(), *stored.stride(), *((0, 0, 0) if factor is None else factor.stride()))
        _hopfield_kernel[(tiles * batch * heads,)](
            state, stored, factor, states, lse, tiles, heads, batch * heads * queries, queries, keys,
            float(dim**-0.5 if scale is None else scale), steps, *strides,
            HAS_FACTOR=factor is not None, DIM=dim, **dot_options(state), **shape,
        )  # fmt: skip
    return states, lse
