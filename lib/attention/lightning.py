"""Lightning attention: causal linear attention with decay and no denominator, and its inference with a state."""

import math

import torch
from torch.autograd.function import once_differentiable

from lib.backend import choose_impl

IMPLS = ("triton", "naive", "blocked", "chunked")
SCHEDULES = ("exp", "alibi")


def transnormer_decay(num_heads: int, depth: int, schedule: str = "exp") -> torch.Tensor:
    """The fixed decays of TransNormerLLM: one a head and layer, none at all in the deepest layer.

    lambda = exp(-s_h (1 - l / (L - 1))) for layer l = 0 .. L - 1, so that l = L - 1 has lambda = 1; a single layer
    counts as the first. Head h = 1 .. H has s_h = 8 h / H (`"exp"`, the paper) or s_h = 2 ** (-8 h / H) (`"alibi"`, the
    released models; they add 1e-5 to the bracket, this does not).

    Args:
        num_heads: H.
        depth: the number of layers, L.
        schedule: `"exp"` or `"alibi"`.

    Returns:
        float64, (depth, num_heads), in (0, 1].

    Raises:
        ValueError: a number below 1, or an unknown schedule.
    """
    if num_heads < 1 or depth < 1:
        raise ValueError(f"num_heads and depth must be at least 1, got {num_heads} and {depth}")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {SCHEDULES}, got {schedule!r}")
    slope = 8 * torch.arange(1, num_heads + 1, dtype=torch.float64) / num_heads
    if schedule == "alibi":  # `lib.attention.alibi_slopes`, in float64
        slope = 2**-slope
    left = 1 - torch.arange(depth, dtype=torch.float64) / max(depth - 1, 1)
    return torch.exp(-left[:, None] * slope)


def lrpe(x: torch.Tensor, theta: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Linearised relative positions: features whose product is sum_c q_c k_c cos(theta_c (s - t)).

    Each coordinate becomes a pair, x cos(theta p) and x sin(theta p), so that the product is the real part of
    sum_c q_c k_c exp(i theta_c (s - t)). Unlike `lib.attention.rope` it doubles the dimension, mixes no coordinates,
    and has a gradient for theta.

    Args:
        x: queries or keys, (..., L, dim).
        theta: radians a position, (dim,), or with leading dimensions that broadcast to those of `x`, as (heads, dim).
        positions: (L,), or with leading dimensions that broadcast to those of `x`.

    Returns:
        (..., L, 2 * dim), in the dtype of `x`.

    Raises:
        ValueError: shapes that do not fit.
    """
    if x.ndim < 2 or theta.shape[-1] != x.shape[-1] or positions.shape[-1] != x.shape[-2]:
        shapes = [tuple(tensor.shape) for tensor in (x, theta, positions)]
        raise ValueError(f"x (..., L, dim), theta (..., dim) and positions (..., L) do not fit: {shapes}")
    # angles in float64: in lower precision those of late positions are wrong
    angles = positions.to(torch.float64)[..., None] * theta.to(torch.float64)[..., None, :]
    return torch.cat([x * angles.cos().to(x.dtype), x * angles.sin().to(x.dtype)], -1)


def lightning_step(
    state: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor | float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of `lightning_attention`: state = decay * state + k v^T, out = q^T state.

    Work and memory do not depend on how many tokens came before. It computes in the state's dtype, which should be
    float32 or wider: in bfloat16 the sums drift.

    Args:
        state: (..., dim, value dim); zeros at the start of a sequence.
        q: (..., dim).
        k: (..., dim).
        v: (..., value dim).
        decay: a number, or what broadcasts to the leading dimensions, as (heads,).

    Returns:
        out, (..., value dim) in the dtype of `q`, and the new state.

    Raises:
        ValueError: shapes that do not fit, or a decay outside [0, 1].
    """
    if q.shape[-1:] != state.shape[-2:-1] or k.shape != q.shape or v.shape[-1:] != state.shape[-1:]:
        shapes = [tuple(tensor.shape) for tensor in (state, q, k, v)]
        raise ValueError(
            f"state (..., dim, value dim), q, k (..., dim) and v (..., value dim) do not fit: {shapes}"
        )
    decay = _checked_decay(decay, state.device)[..., None, None].to(state.dtype)
    state = decay * state + k.to(state.dtype)[..., :, None] * v.to(state.dtype)[..., None, :]
    out = (q.to(state.dtype)[..., None, :] @ state)[..., 0, :]
    return out.to(q.dtype), state


def lightning_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor | float,
    *,
    chunk: int = 64,
    impl: str = "auto",
    state: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
    return_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Causal linear attention with decay, out_s = sum over t <= s of decay^(s - t) (q_s . k_t) v_t, without a denominator.

    Nothing bounds the rows: normalise the output (`lib.models.srms_norm`). Three algorithms give the same:

    - `"naive"`: the matrix of all weights. Time and memory quadratic in the length.
    - `"blocked"`: tiles of that matrix, made anew in the backward pass (Lightning Attention as the paper has it). Memory linear,
      time quadratic.
    - `"chunked"`: tiles on the diagonal only; what lies before a chunk is a state of (dim, value dim) (the later Lightning
      Attention-2). Time and memory linear. The backward pass is one scan from the left, for q, and one from the right, for k and v.
    - `"triton"`: that as fused kernels (`kernels.lightning_attention`), with chunks of its own size. Takes q, k and v of one dtype,
      float32, bfloat16 or float16; it adds in float32 but multiplies in half precision what comes in half precision.

    `"blocked"` and `"chunked"` compute in float32 or wider, whatever the inputs are. All but the first keep q, k and v alone for
    the backward pass.
    No power of the decay has a negative exponent.

    Args:
        q: (..., Lq, dim).
        k: (..., Lk, dim), Lk >= Lq; with fewer queries than keys the queries are the last ones.
        v: (..., Lk, value dim); leading dimensions broadcast.
        decay: in [0, 1], a number or a tensor that broadcasts to the leading dimensions, as (heads,). It is a constant: no gradient.
        chunk: rows of a tile, of `"blocked"` and `"chunked"`.
        impl: the algorithm; `"auto"` is `"triton"` for CUDA tensors that it takes and `"chunked"` for all others.
        state: (..., dim, value dim), what `return_state` returned for the tokens before the first key.
        documents: integers (..., L), for packed sequences: a query sees the keys of equal number only, and the decay counts from
            there. Equal numbers must be neighbours. Needs as many queries as keys, and no `state`.
        return_state: also return the state after the last key, for `lightning_step` or the next call.

    Returns:
        (..., Lq, value dim) in the dtype of `q`; with `return_state` also (..., dim, value dim), float32 or wider.

    Raises:
        ValueError: shapes that do not fit, a decay outside [0, 1] or with a gradient, an unknown impl, a chunk below 1,
            documents that are no integers with `"triton"`.
        TypeError: `impl="triton"` with dtypes that it does not take.
        RuntimeError: `impl="triton"` without Triton.
    """
    shapes = [tuple(tensor.shape) for tensor in (q, k, v)]
    if min(q.ndim, k.ndim, v.ndim) < 2 or q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        raise ValueError(
            f"q (..., Lq, dim), k (..., Lk, dim), v (..., Lk, value dim) do not fit together: {shapes}"
        )
    past = k.shape[-2] - q.shape[-2]
    if past < 0 or q.shape[-2] < 1:
        raise ValueError(f"there must be at least one query and as many keys as queries, got {shapes}")
    one_dtype = q.dtype == k.dtype == v.dtype and q.dtype in (torch.float32, torch.bfloat16, torch.float16)
    whole = documents is None or not (documents.is_floating_point() or documents.is_complex())
    if impl == "triton" and not whole:
        raise ValueError(f"impl='triton' takes documents that are integers only, got {documents.dtype}")
    impl = choose_impl(impl, q, IMPLS if impl != "auto" or (one_dtype and whole) else IMPLS[1:], "chunked")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if documents is not None and (past or state is not None or documents.shape[-1] != k.shape[-2]):
        raise ValueError(
            "documents must be (..., L) for as many queries as keys, and there can be no state before"
        )
    decay = _checked_decay(decay, q.device)
    dtype = torch.promote_types(q.dtype, torch.float32)
    try:
        lead = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2], decay.shape)
        q, k, v = (tensor.expand(*lead, *tensor.shape[-2:]) for tensor in (q, k, v))
        if documents is not None:
            documents = documents.expand(*lead, -1)
        if state is not None:
            state = state.to(dtype).expand(*lead, q.shape[-1], v.shape[-1])
    except RuntimeError as error:
        raise ValueError(
            f"the leading dimensions do not broadcast: {shapes}, decay {tuple(decay.shape)}"
        ) from error

    before = state
    if past:  # keys that no query of this call stands at: they are a state
        before = _absorb(before, k[..., :past, :], v[..., :past, :], decay, dtype)
        k, v = k[..., past:, :], v[..., past:, :]
    if impl in ("chunked", "triton"):
        if impl == "chunked":
            with torch.autocast(q.device.type, enabled=False):
                out, after = _Chunked.apply(q, k, v, before, decay, documents, chunk)
        else:
            out, after = _fused(q, k, v, before, decay, documents)
        return (out, after) if return_state else out
    if impl == "naive":
        rows = torch.arange(q.shape[-2], device=q.device)
        weights = (q @ k.transpose(-1, -2)) * _tile(decay, rows, rows, documents, q.dtype)
        out = weights @ v
    else:
        out = _Blocked.apply(q, k, v, decay, documents, chunk)
    if before is not None:
        powers = _powers(decay, torch.arange(1, q.shape[-2] + 1, device=q.device), dtype)
        out = out + (powers[..., None] * (q.to(dtype) @ before)).to(q.dtype)
    if not return_state:
        return out
    if documents is not None:
        alive = (documents == documents[..., -1:])[..., None]
        k = k * alive
    return out, _absorb(before, k, v, decay, dtype)


def _checked_decay(decay, device) -> torch.Tensor:
    """The decay in float64, so that its powers are exact to the dtype they end in."""
    # a plain number must not pass through the default dtype
    decay = torch.as_tensor(decay, device=device, dtype=None if torch.is_tensor(decay) else torch.float64)
    if decay.requires_grad:
        raise ValueError("the decay is a constant of this attention, it cannot require a gradient")
    if ((decay < 0) | (decay > 1)).any():
        raise ValueError(
            f"every decay must be in [0, 1], got {decay.min().item():g} to {decay.max().item():g}"
        )
    return decay.to(torch.float64)


def _powers(decay, exponents, dtype) -> torch.Tensor:
    """decay ** exponents, (..., len(exponents)); the exponents are never negative.

    What is next to the smallest number of the dtype is zero: products with it would be subnormal, and slow.
    """
    powers = decay[..., None] ** exponents
    limit = torch.finfo(dtype)
    return powers.masked_fill(powers < limit.tiny / limit.eps, 0.0).to(dtype)


def _absorb(state, k, v, decay, dtype) -> torch.Tensor:
    """The state after these keys and values."""
    length = k.shape[-2]
    powers = _powers(decay, torch.arange(length - 1, -1, -1, device=k.device), dtype)
    with torch.autocast(k.device.type, enabled=False):  # which would round the sums
        new = (k.to(dtype) * powers[..., None]).transpose(-1, -2) @ v.to(dtype)
    if state is None:
        return new
    return new + (decay**length).to(dtype)[..., None, None] * state


def _tile(decay, rows, columns, documents, dtype) -> torch.Tensor:
    """M_st = decay^(s - t) for s >= t in one document, else 0, (..., rows, columns)."""
    gap = rows[:, None] - columns
    least = int(gap.min().clamp_min(0))
    # one power a distance, and the matrix by looking up
    powers = _powers(decay, torch.arange(least, int(gap.max()) + 1, device=gap.device), dtype)
    tile = powers[..., (gap - least).clamp_min(0)] * (gap >= 0)
    if documents is not None:
        tile = tile * (documents[..., rows, None] == documents[..., None, columns])
    return tile


class _Blocked(torch.autograd.Function):
    """All tiles on and below the diagonal, one at a time; the backward pass makes them again."""

    @staticmethod
    def forward(ctx, q, k, v, decay, documents, chunk):
        ctx.save_for_backward(q, k, v, decay, documents)
        ctx.chunk = chunk
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        for rows, columns in _pairs(q, chunk):
            sum_ = 0
            for cols in columns:
                a, b, c, tile = _tiles(q, k, v, decay, documents, rows, cols)
                sum_ = sum_ + ((a @ b.transpose(-1, -2)) * tile) @ c
            out[..., rows, :] = sum_.to(q.dtype)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, decay, documents = ctx.saved_tensors
        dtype = torch.promote_types(q.dtype, torch.float32)
        dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
        for rows, columns in _pairs(q, ctx.chunk):
            g = grad[..., rows, :].to(dtype)
            for cols in columns:
                a, b, c, tile = _tiles(q, k, v, decay, documents, rows, cols)
                weights = (a @ b.transpose(-1, -2)) * tile
                dweights = (g @ c.transpose(-1, -2)) * tile
                dq[..., rows, :] += dweights @ b
                dk[..., cols, :] += dweights.transpose(-1, -2) @ a
                dv[..., cols, :] += weights.transpose(-1, -2) @ g
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _pairs(q, chunk):
    """Each block of rows with the blocks of columns up to it."""
    blocks = torch.arange(q.shape[-2], device=q.device).split(chunk)
    for index, rows in enumerate(blocks):
        yield rows, blocks[: index + 1]


def _tiles(q, k, v, decay, documents, rows, cols):
    dtype = torch.promote_types(q.dtype, torch.float32)
    tile = _tile(decay, rows, cols, documents, dtype)
    return q[..., rows, :].to(dtype), k[..., cols, :].to(dtype), v[..., cols, :].to(dtype), tile


class _Chunked(torch.autograd.Function):
    """Tiles on the diagonal, and a state from one chunk to the next; nothing but q, k, v and the first state is kept."""

    @staticmethod
    def forward(ctx, q, k, v, state, decay, documents, chunk):
        ctx.save_for_backward(q, k, v, state, decay, documents)
        ctx.chunk = chunk
        ctx.set_materialize_grads(False)
        dtype = torch.promote_types(q.dtype, torch.float32)
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        for part, inner, enter, leave, keep in _chunks(q, decay, documents, chunk):
            a, b, c = (x[..., part, :].to(dtype) for x in (q, k, v))
            rows = ((a @ b.transpose(-1, -2)) * inner) @ c
            out[..., part, :] = rows if state is None else rows + enter * (a @ state)
            state = _then(keep, state, (leave * b).transpose(-1, -2) @ c)
        return out, state

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_state):
        q, k, v, state, decay, documents = ctx.saved_tensors
        dtype = torch.promote_types(q.dtype, torch.float32)
        if grad is None:
            grad = q.new_zeros(*q.shape[:-1], v.shape[-1])
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        # from the left, with the states made again: what reaches the queries
        for part, inner, enter, leave, keep in _chunks(q, decay, documents, ctx.chunk):
            b, c, g = (x[..., part, :].to(dtype) for x in (k, v, grad))
            rows = ((g @ c.transpose(-1, -2)) * inner) @ b
            dq[..., part, :] = rows if state is None else rows + enter * (g @ state.transpose(-1, -2))
            if part.stop < q.shape[-2]:
                state = _then(keep, state, (leave * b).transpose(-1, -2) @ c)
        # from the right: what reaches the keys and values, of their own chunk and through the state
        for part, inner, enter, leave, keep in _chunks(q, decay, documents, ctx.chunk, reverse=True):
            a, b, c, g = (x[..., part, :].to(dtype) for x in (q, k, v, grad))
            dkeys = ((g @ c.transpose(-1, -2)) * inner).transpose(-1, -2) @ a
            dvalues = ((a @ b.transpose(-1, -2)) * inner).transpose(-1, -2) @ g
            if grad_state is not None:
                dkeys = dkeys + leave * (c @ grad_state.transpose(-1, -2))
                dvalues = dvalues + (leave * b) @ grad_state
            dk[..., part, :], dv[..., part, :] = dkeys, dvalues
            if part.start or ctx.needs_input_grad[3]:
                grad_state = _then(keep, grad_state, a.transpose(-1, -2) @ (enter * g))
        return dq, dk, dv, grad_state if ctx.needs_input_grad[3] else None, None, None, None


def _fused(q, k, v, state, decay, documents):
    """`_Fused` for any leading dimensions: the last of them are the heads, the others one batch."""
    lead = q.shape[:-2]
    two = (math.prod(lead[:-1]), lead[-1] if lead else 1)
    q, k, v, state = (x if x is None else x.reshape(*two, *x.shape[-2:]) for x in (q, k, v, state))
    if documents is not None:
        documents = documents.reshape(*two, q.shape[-2])
    out, after = _Fused.apply(q, k, v, state, decay.expand(lead).reshape(two), documents)
    return out.reshape(*lead, *out.shape[-2:]), after.reshape(*lead, *after.shape[-2:])


class _Fused(torch.autograd.Function):
    """`_Chunked` by Triton kernels; q, k, v and the state are (batch, heads, ., .)."""

    @staticmethod
    def forward(ctx, q, k, v, state, decay, documents):
        from kernels.lightning_attention import lightning_forward

        ctx.save_for_backward(q, k, v, state, decay, documents)
        ctx.set_materialize_grads(False)
        return lightning_forward(q, k, v, decay, state=state, documents=documents)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_state):
        from kernels.lightning_attention import lightning_backward

        q, k, v, state, decay, documents = ctx.saved_tensors
        if grad is None and grad_state is None:
            return (None,) * 6
        if grad is None:
            grad = torch.zeros_like(v)
        grads = lightning_backward(
            q, k, v, decay, grad, state=state, documents=documents, grad_state=grad_state,
            needed=ctx.needs_input_grad[:4],
        )  # fmt: skip
        return *grads, None, None


def _then(keep, state, new):
    """What a state is after a chunk; None is a state of zeros."""
    return new if state is None else keep * state + new


def _chunks(q, decay, documents, chunk, reverse=False):
    """For each chunk: its slice, M within it, what the state is worth to each row, each key to the state, the state to the next."""
    length = q.shape[-2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    size = min(chunk, length)
    rows = torch.arange(size, device=q.device)
    inner, powers = (
        _tile(decay, rows, rows, None, dtype),
        _powers(decay, torch.arange(size + 1, device=q.device), dtype),
    )
    starts = range(0, length, chunk)
    for start in reversed(starts) if reverse else starts:
        n = min(chunk, length - start)
        part = slice(start, start + n)
        tile, enter = inner[..., :n, :n], powers[..., 1 : n + 1, None]
        leave, keep = powers[..., :n].flip(-1)[..., None], powers[..., n, None, None]
        if documents is not None:
            own = documents[..., part]
            tile = tile * (own[..., :, None] == own[..., None, :])
            leave = leave * (own == own[..., -1:])[..., None]
            if start:
                old = (own == documents[..., start - 1, None])[..., None]
                enter, keep = enter * old, keep * old[..., -1:, :]
        yield part, tile, enter, leave, keep
