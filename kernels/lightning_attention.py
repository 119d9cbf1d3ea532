"""Causal linear attention with a decay per head, in chunks: Lightning Attention-2 (Qin et al. 2024, arXiv 2401.04658).

Algorithm. out_s = sum_{t <= s} decay^(s - t) (q_s . k_t) v_t. Tokens are cut into chunks of C = 128. With S the state
before a chunk, (dim, width), a row r = 0 .. n - 1 of the chunk, M_rt = decay^(r - t) for t <= r and 0 else::

    out = ((q k^T) * M) v + decay^(r + 1) q S           S' = decay^n S + sum_r decay^(n - 1 - r) k_r v_r^T

The backward pass has the same form. With D the gradient of the state after a chunk, g that of out, R = M^T::

    dq = ((g v^T) * M) k + decay^(r + 1) g S^T          D' = decay^n D + sum_r decay^(r + 1) q_r g_r^T, from the right
    dk = ((v g^T) * R) q + decay^(n - 1 - r) v D^T
    dv = ((k q^T) * R) g + decay^(n - 1 - r) k D

So there are two kernels. `_states_kernel` gives every program a tile of the state, (64, 64) at the most, that stays in
float32 registers while the program walks over the chunks, from the left or from the right; it writes what the state is
before each chunk. `_rows_kernel` then takes all blocks of rows at once. Since the tiles of a head's state are independent
of each other, 32 heads of dim 128 are 128 programs, enough for 132 processors, and the tiles shrink where there are fewer.
Local sums of every chunk and a scan over them afterwards (three kernels) would be parallel along the tokens too, but would
move the states four times, not twice. No power of the decay has a negative exponent, and 0^0 = 1.

Precision. Sums and the carried state are float32. States before a chunk are stored as what multiplies them: bfloat16 for
bfloat16, else float32. Operands in float16 that were computed (weights, states) could overflow or vanish, so their products
take float32 copies in tf32, which rounds as float16 does. Backward keeps q, k, v and the first state; states are made again,
those from the left are gone before those from the right come.

Memory traffic, a token and head, in rows u of dim = width elements; s = dim / C rows for the states (2 s where these are
float32 and the inputs are not)::

    forward    states 2 u + s (k, v; S)                rows 4 u + s (q, k, v, S; out)             8 u at dim = C
    backward   states twice 4 u + 2 s                  rows three times 12 u + 3 s               21 u

Floating-point operations with blocks of T = 64 rows: forward 4 L dim width + L (C + T) (dim + width), backward
10 L dim width + 3 L (C + T) (dim + width).

What compiled torch moves. The matrix of all weights has L elements a token and head. At L = 8192 and dim 128 that is 64 u for
each time it is written or read, and it is kept for the backward pass, where the kernel needs 128 elements a token, for its
states, and only for a while: a factor 64 in memory. The same chunks as batched products: weighted keys 2 u, local states 4
(in float32, as sums over chunks), their scan 4, weights 3, mask 2, rows 3, rows by the state 4, their sum 3: 25 u, three times
as much. The kernel earns its place: 3.1 in time against chunks, 64 in memory against the matrix at L = 8192.
"""

import torch
import triton
import triton.language as tl

from kernels._launch import check_tensor, dot, dot_options, processors

CHUNK = 128  # tokens from state to state on a GPU; there the states of dim 128 are a third of q, k and v

# --- the mathematics of one tile


@triton.jit
def _load(matrix, row, row_ok, column, column_ok, stride_row, stride_column):
    where = matrix + row.to(tl.int64)[:, None] * stride_row + column.to(tl.int64)[None, :] * stride_column
    return tl.load(where, mask=row_ok[:, None] & column_ok[None, :], other=0.0)


@triton.jit
def _powers(rate, exponent):  # decay ** exponent for exponents from 0 on; a decay of 0 has the rate -1e30
    return tl.exp2(rate * exponent.to(tl.float32))


@triton.jit
def _documents(documents, start, stop, stride):
    """The document of the last token before a chunk, and that of its own last token."""
    before = tl.load(documents + tl.maximum(start - 1, 0).to(tl.int64) * stride)
    return before, tl.load(documents + (stop - 1).to(tl.int64) * stride)


# --- the kernels


@triton.jit
def _states_kernel(
    left, right, start_state, documents, rates, states, end_state, heads, length, dim, width,
    stride_lb, stride_lh, stride_ln, stride_ld, stride_rb, stride_rh, stride_rn, stride_rw,
    stride_db, stride_dh, stride_dn,
    REVERSE: tl.constexpr, HAS_STATE: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    WIDE: tl.constexpr, WIDE_UPCAST: tl.constexpr, WIDE_PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One tile of the state, state' = decay^n state + sum_r power_r left_r right_r^T, over all chunks of one head."""
    tiles = tl.cdiv(dim, BLOCK_D) * tl.cdiv(width, BLOCK_W)
    tile = tl.program_id(0) % tiles
    line = (tl.program_id(0) // tiles).to(tl.int64)  # batch and head
    batch, head = line // heads, line % heads
    left += batch * stride_lb + head * stride_lh
    right += batch * stride_rb + head * stride_rh
    if HAS_DOCUMENTS:
        documents += batch * stride_db + head * stride_dh
    rate = tl.load(rates + line)

    depth = tile // tl.cdiv(width, BLOCK_W) * BLOCK_D + tl.arange(0, BLOCK_D)
    column = tile % tl.cdiv(width, BLOCK_W) * BLOCK_W + tl.arange(0, BLOCK_W)
    depth_ok, column_ok = depth < dim, column < width
    ok = depth_ok[:, None] & column_ok[None, :]
    place = depth.to(tl.int64)[:, None] * width + column[None, :]
    state = tl.zeros((BLOCK_D, BLOCK_W), dtype=tl.float32)
    if HAS_STATE:
        state += tl.load(start_state + line * dim * width + place, mask=ok, other=0.0)

    chunks = tl.cdiv(length, CHUNK)
    inside = tl.arange(0, CHUNK)
    for step in range(0, chunks):
        chunk = step
        if REVERSE:
            chunk = chunks - 1 - step
        stored = state.to(states.dtype.element_ty)
        tl.store(states + (line * chunks + chunk) * dim * width + place, stored, mask=ok)
        start = chunk * CHUNK
        count = tl.minimum(CHUNK, length - start)
        row = start + inside
        row_ok = row < length
        exponent = inside + 1
        if not REVERSE:
            exponent = tl.maximum(count - 1 - inside, 0)
        power = _powers(rate, exponent)
        keep = _powers(rate, count)
        if HAS_DOCUMENTS:
            own = tl.load(documents + row.to(tl.int64) * stride_dn, mask=row_ok, other=0)
            before, last = _documents(documents, start, start + count, stride_dn)
            if REVERSE:
                power = tl.where(own == before, power, 0.0)
            else:
                power = tl.where(own == last, power, 0.0)
            keep = tl.where(before == last, keep, 0.0)
        a = _load(left, row, row_ok, depth, depth_ok, stride_ln, stride_ld)
        b = _load(right, row, row_ok, column, column_ok, stride_rn, stride_rw)
        weighted = a.to(tl.float32) * power[:, None]
        if not WIDE:
            weighted = weighted.to(b.dtype)
        state = dot(tl.trans(weighted), b, state * keep, WIDE_UPCAST, WIDE_PRECISION)
    tl.store(end_state + line * dim * width + place, state, mask=ok)


@triton.jit
def _rows_kernel(
    left, middle, right, states, documents, rates, out, heads, length, dim, width,
    stride_lb, stride_lh, stride_ln, stride_ld, stride_mb, stride_mh, stride_mn, stride_md,
    stride_rb, stride_rh, stride_rn, stride_rw, stride_ob, stride_oh, stride_on, stride_ow,
    stride_sd, stride_sw, stride_db, stride_dh, stride_dn,
    REVERSE: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, WIDE_UPCAST: tl.constexpr, WIDE_PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One block of rows, ((left middle^T) * M) right + power left state, with M of its chunk; R and from the right in REVERSE."""
    strips, blocks = tl.cdiv(width, BLOCK_W), tl.cdiv(length, BLOCK_T)
    program = tl.program_id(0)
    line = (program // (strips * blocks)).to(tl.int64)
    batch, head = line // heads, line % heads
    left += batch * stride_lb + head * stride_lh
    middle += batch * stride_mb + head * stride_mh
    right += batch * stride_rb + head * stride_rh
    out += batch * stride_ob + head * stride_oh
    rate = tl.load(rates + line)

    first = program // strips % blocks * BLOCK_T
    row = first + tl.arange(0, BLOCK_T)
    row_ok = row < length
    column = program % strips * BLOCK_W + tl.arange(0, BLOCK_W)
    column_ok = column < width
    chunk = first // CHUNK
    start = chunk * CHUNK
    stop = tl.minimum(start + CHUNK, length)
    states += (line * tl.cdiv(length, CHUNK) + chunk) * dim * width

    # what the state has for these rows
    total = tl.zeros((BLOCK_T, BLOCK_W), dtype=tl.float32)
    for d in range(0, dim, BLOCK_D):
        depth = d + tl.arange(0, BLOCK_D)
        depth_ok = depth < dim
        a = _load(left, row, row_ok, depth, depth_ok, stride_ln, stride_ld)
        state = _load(states, depth, depth_ok, column, column_ok, stride_sd, stride_sw)
        total = dot(a, state, total, WIDE_UPCAST, WIDE_PRECISION)
    exponent = row - start + 1
    if REVERSE:
        exponent = tl.maximum(stop - 1 - row, 0)
    power = _powers(rate, exponent)
    if HAS_DOCUMENTS:
        documents += batch * stride_db + head * stride_dh
        own = tl.load(documents + row.to(tl.int64) * stride_dn, mask=row_ok, other=0)
        before, last = _documents(documents, start, stop, stride_dn)
        if REVERSE:
            power = tl.where(own == last, power, 0.0)
        else:
            power = tl.where(own == before, power, 0.0)
    total *= power[:, None]

    # the chunk itself, from its start to these rows, or from these rows to its end
    low, high = start, tl.minimum(first + BLOCK_T, stop)
    if REVERSE:
        low, high = first, stop
    for t in range(low, high, BLOCK_T):
        token = t + tl.arange(0, BLOCK_T)
        token_ok = token < length
        weights = tl.zeros((BLOCK_T, BLOCK_T), dtype=tl.float32)
        for d in range(0, dim, BLOCK_D):
            depth = d + tl.arange(0, BLOCK_D)
            depth_ok = depth < dim
            a = _load(left, row, row_ok, depth, depth_ok, stride_ln, stride_ld)
            b = _load(middle, token, token_ok, depth, depth_ok, stride_mn, stride_md)
            weights = dot(a, tl.trans(b), weights, UPCAST, PRECISION)
        gap = row[:, None] - token[None, :]
        if REVERSE:
            gap = -gap
        seen = gap >= 0
        if HAS_DOCUMENTS:
            theirs = tl.load(documents + token.to(tl.int64) * stride_dn, mask=token_ok, other=0)
            seen = seen & (own[:, None] == theirs[None, :])
        weights = tl.where(seen, weights * _powers(rate, tl.maximum(gap, 0)), 0.0)
        c = _load(right, token, token_ok, column, column_ok, stride_rn, stride_rw)
        if not WIDE:
            weights = weights.to(c.dtype)
        total = dot(weights, c, total, WIDE_UPCAST, WIDE_PRECISION)
    where = out + row.to(tl.int64)[:, None] * stride_on + column.to(tl.int64)[None, :] * stride_ow
    tl.store(where, total.to(out.dtype.element_ty), mask=row_ok[:, None] & column_ok[None, :])


# --- launch shapes and checks


def _chunk(tensor) -> int:
    return CHUNK if tensor.is_cuda else 32


def _rows_shape(tensor, dim, width) -> dict:
    half = tensor.dtype.itemsize == 2
    if not tensor.is_cuda:  # the interpreter
        tokens, depth, columns = 16, 32, 32
    else:
        tokens, depth, columns = (64, 64, 128) if half else (32, 32, 64)
    shape = dict(BLOCK_T=tokens, BLOCK_D=_fit(depth, dim), BLOCK_W=_fit(columns, width))
    return shape | (dict(num_warps=4, num_stages=2) if tensor.is_cuda else {})


def _states_shape(tensor, lines, dim, width, documents) -> dict:
    half = tensor.dtype.itemsize == 2
    if not tensor.is_cuda:
        depth, columns = 16, 16
    else:
        depth, columns = (64, 64) if half else (32, 64)
    depth, columns = _fit(depth, dim), _fit(columns, width)
    # a program walks over all chunks: rather smaller tiles than idle processors
    while columns > 16 and 2 * lines * triton.cdiv(dim, depth) * triton.cdiv(width, columns) <= processors(
        tensor
    ):
        columns //= 2
    shape = dict(BLOCK_D=depth, BLOCK_W=columns)
    if tensor.is_cuda:  # float32 copies, or documents, need more registers than four warps have
        shape["num_warps"] = 8 if half and (tensor.dtype == torch.float16 or documents is not None) else 4
        shape["num_stages"] = 3 if half else 2
    return shape


def _fit(block, size) -> int:
    return min(block, max(16, triton.next_power_of_2(size)))


def _constants(q, documents) -> dict:
    options = dot_options(q)
    wide = q.dtype == torch.float16
    return dict(
        HAS_DOCUMENTS=documents is not None,
        WIDE=wide,
        WIDE_UPCAST=wide or options["UPCAST"],
        WIDE_PRECISION="tf32" if wide else options["PRECISION"],
        CHUNK=_chunk(q),
    )


def _check(q, k, v, decay, state, documents, **more):
    """Check everything that a launch relies on. Returns the base-2 logarithms of the decays, (batch, heads)."""
    check_tensor("q", q, "batch, heads, length, dim")
    check_tensor("k", k, "batch, heads, length, dim", ("q", q))
    check_tensor("v", v, "batch, heads, length, width", ("q", q))
    if k.shape != q.shape or v.shape[:3] != q.shape[:3]:
        shapes = [tuple(tensor.shape) for tensor in (q, k, v)]
        raise ValueError(
            f"q, k must be (batch, heads, length, dim), v (batch, heads, length, width), got {shapes}"
        )
    lead, size = tuple(q.shape[:2]), (*q.shape[:2], q.shape[3], v.shape[3])
    if more.get("grad") is not None:
        check_tensor("grad", more["grad"], "batch, heads, length, width", ("q", q))
        if more["grad"].shape != v.shape:
            raise ValueError(f"grad must be {tuple(v.shape)}, as v, got {tuple(more['grad'].shape)}")
    for name, tensor in (("state", state), ("grad_state", more.get("grad_state"))):
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.float32:
            given = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a float32 tensor, got {given}")
        if tensor.shape != size:
            raise ValueError(f"{name} must be (batch, heads, dim, width), {size}, got {tuple(tensor.shape)}")
    if documents is not None:
        if not isinstance(documents, torch.Tensor) or documents.is_floating_point():
            raise TypeError("documents must be a tensor of integers (batch, heads, length)")
        if documents.shape != q.shape[:3]:
            raise ValueError(
                f"documents must be (batch, heads, length), {tuple(q.shape[:3])}, got {tuple(documents.shape)}"
            )
        if state is not None:
            raise ValueError("documents begin with the first token: there can be no state before it")
    if not isinstance(decay, torch.Tensor) or not decay.is_floating_point():
        raise TypeError("decay must be a floating-point tensor that broadcasts to (batch, heads)")
    for name, tensor in (("decay", decay), ("state", state), ("documents", documents)):
        if tensor is not None and tensor.device != q.device:
            raise ValueError(f"q is on {q.device}, {name} must be too, got {tensor.device}")
    try:
        decay = decay.to(torch.float64).expand(lead)
    except RuntimeError as error:
        raise ValueError(f"decay must broadcast to {lead}, got {tuple(decay.shape)}") from error
    return decay.log2().clamp(min=-1e30).to(torch.float32).contiguous()


def _strides(*tensors) -> tuple[int, ...]:
    return tuple(stride for tensor in tensors for stride in tensor.stride())


def _states(left, right, start, documents, rates, reverse):
    """The states before all chunks, (batch, heads, chunks, dim, width), and the one after the last of them."""
    batch, heads, length, dim = left.shape
    width = right.shape[3]
    dtype = torch.bfloat16 if left.dtype == torch.bfloat16 else torch.float32
    chunks = triton.cdiv(length, _chunk(left))
    states = torch.empty(batch, heads, chunks, dim, width, dtype=dtype, device=left.device)
    end = torch.empty(batch, heads, dim, width, dtype=torch.float32, device=left.device)
    if end.numel():
        shape = _states_shape(left, batch * heads, dim, width, documents)
        tiles = triton.cdiv(dim, shape["BLOCK_D"]) * triton.cdiv(width, shape["BLOCK_W"])
        _states_kernel[(batch * heads * tiles,)](
            left, right, None if start is None else start.contiguous(), documents, rates, states, end,
            heads, length, dim, width, *_strides(left, right),
            *(documents.stride() if documents is not None else (0, 0, 0)),
            REVERSE=reverse, HAS_STATE=start is not None, **_constants(left, documents), **shape,
        )  # fmt: skip
    return states, end


def _rows(left, middle, right, states, documents, rates, reverse, transposed):
    """((left middle^T) * M) right + power left state, in the layout of `right`; `transposed`: of the states."""
    batch, heads, length, dim = left.shape
    width = right.shape[3]
    out = torch.empty_like(right)
    if out.numel():
        shape = _rows_shape(left, dim, width)
        strips, blocks = triton.cdiv(width, shape["BLOCK_W"]), triton.cdiv(length, shape["BLOCK_T"])
        _rows_kernel[(batch * heads * blocks * strips,)](
            left, middle, right, states, documents, rates, out, heads, length, dim, width,
            *_strides(left, middle, right, out), *((1, dim) if transposed else (width, 1)),
            *(documents.stride() if documents is not None else (0, 0, 0)),
            REVERSE=reverse, **dot_options(left), **_constants(left, documents), **shape,
        )  # fmt: skip
    return out


# --- the operations


def lightning_forward(q, k, v, decay, *, state=None, documents=None) -> tuple[torch.Tensor, torch.Tensor]:
    """out_s = sum over t <= s of decay^(s - t) (q_s . k_t) v_t, and the state after the last key.

    Args:
        q: (batch, heads, length, dim), any strides; float32, bfloat16 or float16.
        k: (batch, heads, length, dim), same dtype.
        v: (batch, heads, length, width), same dtype.
        decay: floating-point tensor that broadcasts to (batch, heads), in [0, 1] (which is not checked).
        state: (batch, heads, dim, width) float32, of the tokens before the first; None for zeros.
        documents: integers (batch, heads, length): tokens see those of equal number only, which must be neighbours. Not with
            a state.

    Returns:
        out, (batch, heads, length, width) in the dtype of `q`, and the state, (batch, heads, dim, width) float32.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit; raised before anything is launched.
    """
    rates = _check(q, k, v, decay, state, documents)
    states, end = _states(k, v, state, documents, rates, reverse=False)
    return _rows(q, k, v, states, documents, rates, reverse=False, transposed=False), end


def lightning_backward(
    q, k, v, decay, grad, *, state=None, documents=None, grad_state=None, needed=(True, True, True, True)
):  # fmt: skip
    """The gradients with respect to `q`, `k`, `v` and the first state. Arguments as for `lightning_forward`.

    Args:
        grad: (batch, heads, length, width), gradient with respect to out, in the dtype of `q`.
        grad_state: (batch, heads, dim, width) float32, gradient with respect to the last state; None for zeros.
        needed: which gradients of `q`, `k`, `v` and the first state are wanted.

    Returns:
        The gradients of `q`, `k`, `v`, in their dtype, and that of the first state, float32; None where not wanted, and
        for the first state with documents.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit; raised before anything is launched.
    """
    rates = _check(q, k, v, decay, state, documents, grad=grad, grad_state=grad_state)
    dq = dk = dv = first = None
    if needed[0]:
        states = _states(k, v, state, documents, rates, reverse=False)[0]
        dq = _rows(grad, v, k, states, documents, rates, reverse=False, transposed=True)
        del states  # before those from the right are made
    if any(needed[1:]):
        states, first = _states(q, grad, grad_state, documents, rates, reverse=True)
    if needed[1]:
        dk = _rows(v, grad, q, states, documents, rates, reverse=True, transposed=True)
    if needed[2]:
        dv = _rows(k, q, grad, states, documents, rates, reverse=True, transposed=False)
    return dq, dk, dv, first if needed[3] and documents is None else None
