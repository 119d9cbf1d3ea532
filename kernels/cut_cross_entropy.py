"""Cross-entropy of a linear classifier without its logits: Cut Cross-Entropy (Wijmans et al. 2024, arXiv 2411.09009).

The logits are `A = softcap(hidden @ weight.T + bias)`, one row a token, one column a class. Four operations, none of which
writes a tile of `A` to memory: the log-sum-exp of each row, the (negated) logit of each row's target, and the gradients
with respect to `hidden` (dE) and to `weight` and `bias` (dC). Each program owns the rows it adds up, so there are no locks
and no atomics, and the results are the same in every run.
"""

import torch
import triton
import triton.language as tl

# --- the mathematics of one tile


@triton.jit
def _tile_logits(
    hidden, weight, bias, row, row_ok, column, column_ok, dim, softcap,
    stride_hn, stride_hd, stride_wv, stride_wd, stride_b,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tile = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    for d in range(0, dim, BLOCK_D):
        depth = d + tl.arange(0, BLOCK_D)
        depth_ok = depth[None, :] < dim
        h = tl.load(
            hidden + row[:, None] * stride_hn + depth[None, :] * stride_hd,
            mask=row_ok[:, None] & depth_ok,
            other=0.0,
        )
        w = tl.load(
            weight + column[:, None] * stride_wv + depth[None, :] * stride_wd,
            mask=column_ok[:, None] & depth_ok,
            other=0.0,
        )
        if UPCAST:
            h, w = h.to(tl.float32), w.to(tl.float32)
        tile = tl.dot(h, tl.trans(w), tile, input_precision=PRECISION)
    if HAS_BIAS:
        tile += tl.load(bias + column * stride_b, mask=column_ok, other=0.0).to(tl.float32)[None, :]
    if HAS_SOFTCAP:
        tile = softcap * _tanh(tile / softcap)
    return tile


@triton.jit
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def _tile_gradient(
    tile, line, line_ok, column, column_ok, targets, lse, upstream, upstream_lse, softcap, eps,
    HAS_LSE_GRADIENT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The gradient with respect to the logits before the soft cap, and whether any of it matters."""
    row_lse = tl.load(lse + line, mask=line_ok, other=0.0)
    target = tl.load(targets + line, mask=line_ok, other=-1)
    factor = tl.load(upstream + line, mask=line_ok, other=0.0)
    inside = line_ok[:, None] & column_ok[None, :]
    hit = (target[:, None] == column[None, :]) & inside
    softmax = tl.where(inside, tl.exp(tile - row_lse[:, None]), 0.0)
    difference = softmax - tl.where(hit, 1.0, 0.0)
    # before the upstream gradient comes in, since eps is relative to it; a NaN is not below eps, so it is not lost
    size = tl.abs(difference)
    if HAS_LSE_GRADIENT:  # there, a target's entry matters even where the difference is small
        size = tl.where(hit, 1.0, size)
    matters = tl.max(tl.max(tl.where(size < eps, 0, 1), 1), 0) > 0
    gradient = difference * factor[:, None]
    if HAS_LSE_GRADIENT:
        gradient += softmax * tl.load(upstream_lse + line, mask=line_ok, other=0.0)[:, None]
    if HAS_SOFTCAP:
        ratio = tile / softcap
        gradient *= tl.where(inside, 1.0 - ratio * ratio, 0.0)
    return gradient, matters


# --- the kernels


@triton.jit
def _lse_kernel(
    hidden, weight, bias, rows, out, count, num_classes, dim, classes_per_split, softcap,
    stride_hn, stride_hd, stride_wv, stride_wd, stride_b,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    line = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    line_ok = line < count
    row = tl.load(rows + line, mask=line_ok, other=0)
    top = tl.full((BLOCK_N,), -3.4e38, dtype=tl.float32)  # finite: exp(-inf - top) is 0, not NaN
    mass = tl.zeros((BLOCK_N,), dtype=tl.float32)
    first = split * classes_per_split
    for v in range(first, tl.minimum(first + classes_per_split, num_classes), BLOCK_V):
        column = v + tl.arange(0, BLOCK_V)
        column_ok = column < num_classes
        tile = _tile_logits(
            hidden, weight, bias, row, line_ok, column.to(tl.int64), column_ok, dim, softcap,
            stride_hn, stride_hd, stride_wv, stride_wd, stride_b,
            HAS_BIAS, HAS_SOFTCAP, UPCAST, PRECISION, BLOCK_N, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        tile = tl.where(column_ok[None, :], tile, float("-inf"))
        new_top = tl.maximum(top, tl.max(tile, 1))
        mass = mass * tl.exp(top - new_top) + tl.sum(tl.exp(tile - new_top[:, None]), 1)
        top = new_top
    tl.store(out + split * count + line, top + tl.log(mass), mask=line_ok)


@triton.jit
def _indexed_neg_dot_kernel(
    hidden, weight, bias, rows, targets, out, count, dim, softcap,
    stride_hn, stride_hd, stride_wv, stride_wd, stride_b,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    line_ok = line < count
    row = tl.load(rows + line, mask=line_ok, other=0)
    target = tl.load(targets + line, mask=line_ok, other=0)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for d in range(0, dim, BLOCK_D):
        depth = d + tl.arange(0, BLOCK_D)
        ok = line_ok[:, None] & (depth[None, :] < dim)
        h = tl.load(hidden + row[:, None] * stride_hn + depth[None, :] * stride_hd, mask=ok, other=0.0)
        w = tl.load(weight + target[:, None] * stride_wv + depth[None, :] * stride_wd, mask=ok, other=0.0)
        total += tl.sum(h.to(tl.float32) * w.to(tl.float32), 1)
    if HAS_BIAS:
        total += tl.load(bias + target * stride_b, mask=line_ok, other=0.0).to(tl.float32)
    if HAS_SOFTCAP:
        total = softcap * _tanh(total / softcap)
    tl.store(out + line, -total, mask=line_ok)


@triton.jit
def _add_product(left, matrix, index, index_ok, out, out_row, out_ok, dim, stride_row, stride_d,
                 UPCAST: tl.constexpr, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """out[out_row] += left @ matrix[index], a strip of columns at a time; `out` is float32 and contiguous."""
    for d in range(0, dim, BLOCK_D):
        depth = d + tl.arange(0, BLOCK_D)
        depth_ok = depth[None, :] < dim
        right = tl.load(
            matrix + index[:, None] * stride_row + depth[None, :] * stride_d,
            mask=index_ok[:, None] & depth_ok,
            other=0.0,
        )
        if UPCAST:
            right = right.to(tl.float32)
        where = out + out_row[:, None] * dim + depth[None, :]
        ok = out_ok[:, None] & depth_ok
        running = tl.load(where, mask=ok, other=0.0)
        running = tl.dot(left.to(right.dtype), right, running, input_precision=PRECISION)
        tl.store(where, running, mask=ok)
    tl.debug_barrier()  # the next tile reads what this one wrote


@triton.jit
def _backward_dE_kernel(
    hidden, weight, bias, rows, order, targets, lse, upstream, upstream_lse, d_hidden, skipped,
    count, num_classes, dim, softcap, eps,
    stride_hn, stride_hd, stride_wv, stride_wd, stride_b,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_LSE_GRADIENT: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    line_ok = line < count
    row = tl.load(rows + line, mask=line_ok, other=0)
    for v in range(0, num_classes, BLOCK_V):
        place = v + tl.arange(0, BLOCK_V)
        column_ok = place < num_classes
        column = tl.load(order + place, mask=column_ok, other=0).to(tl.int64)
        tile = _tile_logits(
            hidden, weight, bias, row, line_ok, column, column_ok, dim, softcap,
            stride_hn, stride_hd, stride_wv, stride_wd, stride_b,
            HAS_BIAS, HAS_SOFTCAP, UPCAST, PRECISION, BLOCK_N, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        gradient, matters = _tile_gradient(
            tile, line, line_ok, column, column_ok, targets, lse, upstream, upstream_lse, softcap, eps,
            HAS_LSE_GRADIENT, HAS_SOFTCAP,
        )  # fmt: skip
        if matters:
            _add_product(
                gradient, weight, column, column_ok, d_hidden, line.to(tl.int64), line_ok, dim,
                stride_wv, stride_wd, UPCAST, PRECISION, BLOCK_D,
            )  # fmt: skip
        else:
            tl.store(skipped + tl.program_id(0) * tl.cdiv(num_classes, BLOCK_V) + v // BLOCK_V, 1)


@triton.jit
def _backward_dC_kernel(
    hidden, weight, bias, rows, order, targets, lse, upstream, upstream_lse, d_weight, d_bias, skipped,
    first_block, count, num_classes, dim, softcap, eps,
    stride_hn, stride_hd, stride_wv, stride_wd, stride_b,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_LSE_GRADIENT: tl.constexpr,
    NEED_WEIGHT: tl.constexpr, NEED_BIAS: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    block = first_block + tl.program_id(0)
    place = block * BLOCK_V + tl.arange(0, BLOCK_V)
    column_ok = place < num_classes
    column = tl.load(order + place, mask=column_ok, other=0).to(tl.int64)
    own = (tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)).to(tl.int64)  # rows of the scratch buffer
    sums = tl.zeros((BLOCK_V,), dtype=tl.float32)
    for n in range(0, count, BLOCK_N):
        line = n + tl.arange(0, BLOCK_N)
        line_ok = line < count
        row = tl.load(rows + line, mask=line_ok, other=0)
        tile = _tile_logits(
            hidden, weight, bias, row, line_ok, column, column_ok, dim, softcap,
            stride_hn, stride_hd, stride_wv, stride_wd, stride_b,
            HAS_BIAS, HAS_SOFTCAP, UPCAST, PRECISION, BLOCK_N, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        gradient, matters = _tile_gradient(
            tile, line, line_ok, column, column_ok, targets, lse, upstream, upstream_lse, softcap, eps,
            HAS_LSE_GRADIENT, HAS_SOFTCAP,
        )  # fmt: skip
        if matters:
            if NEED_BIAS:
                sums += tl.sum(gradient, 0)
            if NEED_WEIGHT:
                _add_product(
                    tl.trans(gradient), hidden, row, line_ok, d_weight, own, column_ok, dim,
                    stride_hn, stride_hd, UPCAST, PRECISION, BLOCK_D,
                )  # fmt: skip
        else:
            tl.store(skipped + n // BLOCK_N * tl.cdiv(num_classes, BLOCK_V) + block, 1)
    if NEED_BIAS:
        tl.store(d_bias + column, sums, mask=column_ok)


# --- launch shapes: speed only, no mathematics


def _shape(tensor, blocks, dim) -> dict:
    """Tile sizes and warps. `blocks` overrides the tokens and classes of a tile."""
    half = tensor.dtype.itemsize == 2
    if not tensor.is_cuda:  # the interpreter
        tokens, classes, depth = 32, 64, 32
    else:
        tokens, classes, depth = (128, 128, 64) if half else (64, 64, 32)
    if blocks is not None:
        tokens, classes = blocks
    depth = min(depth, max(16, triton.next_power_of_2(dim)))
    shape = dict(BLOCK_N=tokens, BLOCK_V=classes, BLOCK_D=depth)
    if tensor.is_cuda:
        shape["num_warps"] = 8 if tokens * classes >= 128 * 128 else 4
    return shape


def _processors(tensor) -> int:
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 4


def _constants(hidden, bias, softcap) -> dict:
    exact = hidden.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return dict(
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=softcap is not None,
        UPCAST=not hidden.is_cuda,  # the interpreter multiplies float32 only
        PRECISION="ieee" if exact else "tf32",
    )


def _strides(hidden, weight, bias) -> tuple[int, ...]:
    return (*hidden.stride(), *weight.stride(), 0 if bias is None else bias.stride(0))


def _check(hidden, weight, bias, rows, softcap, blocks, **vectors) -> torch.Tensor:
    """Check everything that a launch relies on. Returns the indices of the rows to work on."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            "hidden must be (tokens, dim) and weight (num_classes, dim), "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise TypeError(f"hidden is {hidden.dtype}, {name} must be too, got {tensor.dtype}")
    if hidden.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(f"hidden must be float16, bfloat16 or float32, got {hidden.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap!r}")
    if blocks is not None and any(size < 16 or size & (size - 1) for size in blocks):
        raise ValueError(f"the kernel's tiles must be powers of two from 16 on, got {tuple(blocks)}")
    count = len(hidden) if rows is None else len(rows)
    for name, tensor in (("weight", weight), ("bias", bias), ("rows", rows), *vectors.items()):
        if tensor is None:
            continue
        if tensor.device != hidden.device:
            raise ValueError(f"hidden is on {hidden.device}, {name} must be too, got {tensor.device}")
        if name in vectors and tensor.shape != (count,):
            raise ValueError(f"{name} must be ({count},), one entry a row, got {tuple(tensor.shape)}")
    return torch.arange(count, device=hidden.device) if rows is None else rows.contiguous()


# --- the operations


def lse_forward(hidden, weight, *, bias=None, rows=None, softcap=None, blocks=None) -> torch.Tensor:
    """Log-sum-exp over the classes of each row's logits, in float32.

    Args:
        hidden: `(tokens, dim)`, any strides.
        weight: `(num_classes, dim)`, any strides, same dtype.
        bias: `(num_classes,)` or None.
        rows: int64 indices of the rows of `hidden` to work on; None for all.
        softcap: positive, or None.
        blocks: tokens and classes of a tile, powers of two from 16 on; None to let the shapes decide.

    Returns:
        `(count,)` for the `count` rows.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit; raised before anything is launched.
    """
    rows = _check(hidden, weight, bias, rows, softcap, blocks)
    count, num_classes, dim = len(rows), *weight.shape
    if not count:
        return hidden.new_empty(0, dtype=torch.float32)
    shape = _shape(hidden, blocks, dim)
    programs, tiles = triton.cdiv(count, shape["BLOCK_N"]), triton.cdiv(num_classes, shape["BLOCK_V"])
    # few token blocks would leave processors idle: let several programs share a row's classes
    splits = max(1, min(16, tiles, triton.cdiv(2 * _processors(hidden), programs)))
    splits = triton.cdiv(tiles, triton.cdiv(tiles, splits))  # no program without classes
    out = hidden.new_empty(splits, count, dtype=torch.float32)
    _lse_kernel[programs, splits](
        hidden, weight, bias, rows, out, count, num_classes, dim,
        triton.cdiv(tiles, splits) * shape["BLOCK_V"], float(softcap or 1.0), *_strides(hidden, weight, bias),
        **_constants(hidden, bias, softcap), **shape,
    )  # fmt: skip
    return out[0] if splits == 1 else out.logsumexp(0)


def indexed_neg_dot(
    hidden, weight, targets, *, bias=None, rows=None, softcap=None, blocks=None
) -> torch.Tensor:
    """Minus the logit of each row's target, in float32: `(count,)`. Arguments as for `lse_forward`.

    Args:
        targets: `(count,)` int64, in `[0, num_classes)`.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit, or a target out of range.
    """
    rows = _check(hidden, weight, bias, rows, softcap, blocks, targets=targets)
    count, dim = len(rows), hidden.shape[1]
    out = hidden.new_empty(count, dtype=torch.float32)
    if not count:
        return out
    low, high = (int(bound) for bound in torch.aminmax(targets))
    if low < 0 or high >= len(weight):
        raise ValueError(f"targets must lie in [0, {len(weight)}), got values from {low} to {high}")
    depth = min(128, triton.next_power_of_2(dim))
    _indexed_neg_dot_kernel[(triton.cdiv(count, 32),)](
        hidden, weight, bias, rows, targets.contiguous(), out, count, dim, float(softcap or 1.0),
        *_strides(hidden, weight, bias), HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None,
        BLOCK_N=32, BLOCK_D=depth,
    )  # fmt: skip
    return out


def _normalised(upstream, upstream_lse):
    """Upstream gradients with largest entry 1, so that half-precision products neither vanish nor overflow."""
    vectors = [v.float() for v in (upstream, upstream_lse) if v is not None]
    peak = torch.stack([v.abs().amax() for v in vectors]).amax().clamp(min=1e-30)
    vectors = [(v / peak).contiguous() for v in vectors]
    return vectors[0], vectors[1] if len(vectors) > 1 else None, peak


def backward_dE(
    hidden, weight, targets, lse, upstream, *, bias=None, rows=None, softcap=None, blocks=None, order=None,
    filter_eps=None, upstream_lse=None,
):  # fmt: skip
    """The gradient with respect to `hidden`; a program for each block of tokens. Arguments as for `lse_forward`.

    Args:
        targets: `(count,)` int64, in `[0, num_classes)`.
        lse: `(count,)` float32, from `lse_forward`.
        upstream: `(count,)`, gradient with respect to each row's loss.
        order: `(num_classes,)` integers: the classes in the order in which tiles are cut; None as they stand.
        filter_eps: skip tiles whose entries `|softmax - onehot|` are all below it; None for none.
        upstream_lse: `(count,)`, gradient with respect to each row's log-sum-exp, or None.

    Returns:
        The gradient, of the shape and dtype of `hidden`, zero in rows not worked on; and an int8 matrix with a one for
        every tile (token blocks, class blocks) that was skipped.
    """
    vectors = dict(targets=targets, lse=lse, upstream=upstream, upstream_lse=upstream_lse)
    index = _check(hidden, weight, bias, rows, softcap, blocks, **vectors)
    count, num_classes, dim = len(index), *weight.shape
    shape = _shape(hidden, blocks, dim)
    tiles = (triton.cdiv(count, shape["BLOCK_N"]), triton.cdiv(num_classes, shape["BLOCK_V"]))
    skipped = torch.zeros(tiles, dtype=torch.int8, device=hidden.device)
    if not count:
        return torch.zeros_like(hidden), skipped
    upstream, upstream_lse, peak = _normalised(upstream, upstream_lse)
    sums = hidden.new_zeros(count, dim, dtype=torch.float32)
    _backward_dE_kernel[(tiles[0],)](
        hidden, weight, bias, index, _order(order, weight), targets.contiguous(), lse.contiguous(), upstream,
        upstream_lse, sums, skipped, count, num_classes, dim, float(softcap or 1.0), float(filter_eps or 0.0),
        *_strides(hidden, weight, bias), HAS_LSE_GRADIENT=upstream_lse is not None,
        **_constants(hidden, bias, softcap), **shape,
    )  # fmt: skip
    sums = sums.mul_(peak).to(hidden.dtype)
    if rows is None:
        return sums, skipped
    return torch.zeros_like(hidden).index_copy_(0, index, sums), skipped


def backward_dC(
    hidden, weight, targets, lse, upstream, *, bias=None, rows=None, softcap=None, blocks=None, order=None,
    filter_eps=None, upstream_lse=None, need_weight=True, need_bias=False,
):  # fmt: skip
    """The gradients with respect to `weight` and `bias`; a program for each block of classes.

    Arguments as for `backward_dE`. Sums are formed in float32 in a scratch buffer that serves one wave of programs after
    the other, so that a gradient of half precision needs no copy of itself in float32.

    Returns:
        The gradient of `weight` (None unless `need_weight`), that of `bias` (None unless `need_bias`), and the matrix of
        skipped tiles, as from `backward_dE`.
    """
    vectors = dict(targets=targets, lse=lse, upstream=upstream, upstream_lse=upstream_lse)
    rows = _check(hidden, weight, bias, rows, softcap, blocks, **vectors)
    count, num_classes, dim = len(rows), *weight.shape
    shape = _shape(hidden, blocks, dim)
    tiles = (triton.cdiv(count, shape["BLOCK_N"]), triton.cdiv(num_classes, shape["BLOCK_V"]))
    skipped = torch.zeros(tiles, dtype=torch.int8, device=hidden.device)
    d_weight = torch.zeros_like(weight) if need_weight else None
    d_bias = torch.zeros(num_classes, dtype=torch.float32, device=weight.device) if need_bias else None
    if count:
        upstream, upstream_lse, peak = _normalised(upstream, upstream_lse)
        order = _order(order, weight)
        wave = min(tiles[1], 2 * _processors(hidden))
        height = wave * shape["BLOCK_V"]
        scratch = hidden.new_empty(height if need_weight else 0, dim, dtype=torch.float32)
        for first in range(0, tiles[1], wave):
            _backward_dC_kernel[(min(wave, tiles[1] - first),)](
                hidden, weight, bias, rows, order, targets.contiguous(), lse.contiguous(), upstream,
                upstream_lse, scratch.zero_(), d_bias, skipped,
                first, count, num_classes, dim, float(softcap or 1.0), float(filter_eps or 0.0),
                *_strides(hidden, weight, bias), HAS_LSE_GRADIENT=upstream_lse is not None,
                NEED_WEIGHT=need_weight, NEED_BIAS=need_bias,
                **_constants(hidden, bias, softcap), **shape,
            )  # fmt: skip
            if need_weight:
                own = order[first * shape["BLOCK_V"] :][:height].long()
                d_weight[own] = scratch[: len(own)].mul_(peak).to(weight.dtype)
        if need_bias:
            d_bias *= peak
    return d_weight, d_bias if d_bias is None else d_bias.to(weight.dtype), skipped


def _order(order, weight):
    if order is None:
        return torch.arange(len(weight), dtype=torch.int32, device=weight.device)
    if order.shape != weight.shape[:1] or order.device != weight.device or order.is_floating_point():
        raise ValueError(
            f"order must hold the {len(weight)} classes as integers on {weight.device}, "
            f"got {tuple(order.shape)} {order.dtype} on {order.device}"
        )
    return order.to(torch.int32).contiguous()
