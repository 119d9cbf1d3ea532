"""Cross-entropy of a linear classifier without its logits: Cut Cross-Entropy (Wijmans et al. 2024, arXiv 2411.09009).

The logits are `A = softcap(hidden @ weight.T + bias)`, one row a token, one column a class; the loss of a token is the
log-sum-exp of its row less the logit of its target (their section 4). The N V entries of A are never held together.

Algorithm::

    forward    grid (token blocks, stretches of classes): a program computes the tiles of its stretch one after the
               other and keeps a running maximum and mass for each of its tokens; a small logsumexp joins the stretches.
               The logit of the target is one dot product a token (their algorithm 1)
    backward   for one strip of S classes after the other
                 gradient   grid (tiles): a tile is computed again, softmax - target distribution (their algorithm 3),
                            and written to a scratch matrix (N, S) in the dtype of the inputs, unless all its entries
                            are below filter_eps. What was written is noted in one byte a tile
                 compact    the written tiles of every line of tiles, as a list
                 product    grid (blocks of dE): dE += dA W over the list; grid (blocks of dC): dC = dA^T H

Every program owns what it adds up. There are no locks and no atomics, and the results are the same in every run. The
released kernel adds every tile into both gradients under locks, so it computes the logits twice in all, as here. Each
gradient in a sweep of its own would need no scratch, but computes them three times, and has no room in registers for a
row of its gradient, so that it reads and writes float32 sums at every tile.

Operations, with u the share of tiles that are kept: 2 N V D forward, (2 + 4 u) N V D backward. (In float32 without a
filter the two products are those of `torch.mm`.)

Memory traffic in bytes, b of them an element, beyond what the L2 cache serves: forward, 16 token blocks of 128 walk
through the classes together, so (N D + V D N / 2048) b; backward the same once more, 2 u N V b for the scratch matrix
where it does not stay in the cache, 8 N D V / S for the float32 sums of dE, V D b for dC, and 2 V D b to put the classes
of a strip in order.

Compiled torch computes 6 N V D, holds the logits and their gradient, 2 N V b or more, and moves about 8 N V b for the
softmax and the two products. At N = 8192, D = 2304, V = 256000 in bfloat16 it holds 8.4 GB, more where it keeps
float32. Here it is 64 MB of scratch, 19 MB of ordered classes and 75 MB of sums: 50 times less, and that is what earns
the kernel its place. In time 3 products of 9.7 TFLOP and 34 GB stand against 2 + 2 u products and 28 GB; a trained model
has u below 0.1, so the count gives 1.4 times, less what a compiled tile lacks against a product of the vendor's library.
"""

import torch
import triton
import triton.language as tl

from kernels._launch import check_tensor, dot, dot_options, processors

_SCRATCH = (
    1 << 26
)  # bytes of the gradient of a strip of logits; a wide strip touches the sums of dE less often
_LEAST_STRIP = (
    2048  # classes of a strip, however many tokens: each strip reads and writes the sums of dE once
)
_STRETCH = 8  # tiles that a forward program walks through, at the least where that fills the processors
_MOST_STRETCHES = 16  # of a row: 64 bytes a token, however many the classes

# --- the mathematics of one tile


@triton.jit
def _tile_logits(
    hidden, weight, bias, row, column, dim, softcap,
    stride_hn, stride_hd, stride_wv, stride_wd, stride_b,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Logits of rows and columns that exist; the caller repeats some to fill the tile and masks the result."""
    tile = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    for d in range(0, dim, BLOCK_D):
        depth = d + tl.arange(0, BLOCK_D).to(tl.int64)
        h_at = hidden + row[:, None] * stride_hn + depth[None, :] * stride_hd
        w_at = weight + column[:, None] * stride_wv + depth[None, :] * stride_wd
        if EVEN:
            h = tl.load(h_at)
            w = tl.load(w_at)
        else:
            h = tl.load(h_at, mask=depth[None, :] < dim, other=0.0)
            w = tl.load(w_at, mask=depth[None, :] < dim, other=0.0)
        tile = dot(h, tl.trans(w), tile, UPCAST, PRECISION)
    if HAS_BIAS:
        tile += tl.load(bias + column * stride_b).to(tl.float32)[None, :]
    if HAS_SOFTCAP:
        tile = softcap * _tanh(tile / softcap)
    return tile


@triton.jit
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def _place_in_grid(program, tiles_n, tiles_v, GROUP: tl.constexpr):
    """Token block and class block, such that programs that run together share both in the cache."""
    group = program // (GROUP * tiles_v)
    first = group * GROUP
    height = tl.minimum(tiles_n - first, GROUP)
    inside = program - group * (GROUP * tiles_v)
    return first + inside % height, inside // height


# --- the kernels


@triton.jit
def _lse_kernel(
    hidden, weight, bias, rows, out, out_sum, count, num_classes, dim, splits, classes_per_split, softcap,
    stride_hn, stride_hd, stride_wv, stride_wd, stride_b,
    HAS_SUM: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, EVEN: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    block, split = _place_in_grid(tl.program_id(0), tl.cdiv(count, BLOCK_N), splits, GROUP)
    line = block * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.load(rows + tl.minimum(line, count - 1))
    top = tl.full((BLOCK_N,), -3.4e38, dtype=tl.float32)  # finite: exp(-inf - top) is 0, not NaN
    mass = tl.zeros((BLOCK_N,), dtype=tl.float32)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    start = split * classes_per_split
    for v in range(start, tl.minimum(start + classes_per_split, num_classes), BLOCK_V):
        column = v + tl.arange(0, BLOCK_V)
        column_ok = column < num_classes
        tile = _tile_logits(
            hidden, weight, bias, row, tl.minimum(column, num_classes - 1).to(tl.int64), dim, softcap,
            stride_hn, stride_hd, stride_wv, stride_wd, stride_b,
            HAS_BIAS, HAS_SOFTCAP, EVEN, UPCAST, PRECISION, BLOCK_N, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        if HAS_SUM:
            total += tl.sum(tl.where(column_ok[None, :], tile, 0.0), 1)
        tile = tl.where(column_ok[None, :], tile, float("-inf"))
        new_top = tl.maximum(top, tl.max(tile, 1))
        mass = mass * tl.exp(top - new_top) + tl.sum(tl.exp(tile - new_top[:, None]), 1)
        top = new_top
    at = split.to(tl.int64) * count + line
    tl.store(out + at, top + tl.log(mass), mask=line < count)
    if HAS_SUM:
        tl.store(out_sum + at, total, mask=line < count)


@triton.jit
def _indexed_neg_dot_kernel(
    hidden, weight, bias, rows, targets, out, count, num_classes, dim, softcap,
    stride_hn, stride_hd, stride_wv, stride_wd, stride_b,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    line_ok = line < count
    row = tl.load(rows + line, mask=line_ok, other=0)
    target = tl.load(targets + line, mask=line_ok, other=0)
    legal = (target >= 0) & (target < num_classes)
    target = tl.where(legal, target, 0)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for d in range(0, dim, BLOCK_D):
        depth = d + tl.arange(0, BLOCK_D).to(tl.int64)
        ok = line_ok[:, None] & (depth[None, :] < dim)
        h = tl.load(hidden + row[:, None] * stride_hn + depth[None, :] * stride_hd, mask=ok, other=0.0)
        w = tl.load(weight + target[:, None] * stride_wv + depth[None, :] * stride_wd, mask=ok, other=0.0)
        total += tl.sum(h.to(tl.float32) * w.to(tl.float32), 1)
    if HAS_BIAS:
        total += tl.load(bias + target * stride_b, mask=line_ok, other=0.0).to(tl.float32)
    if HAS_SOFTCAP:
        total = softcap * _tanh(total / softcap)
    tl.store(out + line, tl.where(legal, -total, float("nan")), mask=line_ok)


@triton.jit(do_not_specialize=["first", "tiles_v"])  # they differ from strip to strip
def _gradient_kernel(
    hidden, weight, bias, rows, order, targets, lse, upstream, upstream_lse, out, sums, kept,
    first, tiles_v, count, num_classes, dim, softcap, eps, target_share, uniform_share,
    width, stride_kept, stride_hn, stride_hd, stride_wv, stride_wd, stride_b,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_LSE_GRADIENT: tl.constexpr, FILTER: tl.constexpr,
    STORE: tl.constexpr, STORE_IDLE: tl.constexpr, SUM: tl.constexpr, SUM_IDLE: tl.constexpr,
    EVEN: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, PART_V: tl.constexpr,
):  # fmt: skip
    """The gradient with respect to the logits before the soft cap, one tile, and whether any of it matters.

    A tile that goes beyond the last row or class repeats it. That changes nothing in what matters, and the repeated
    classes meet zeros in the products; the repeated rows get an upstream gradient of 0.
    """
    n, v = _place_in_grid(tl.program_id(0), tl.cdiv(count, BLOCK_N), tiles_v, GROUP)
    line = n * BLOCK_N + tl.arange(0, BLOCK_N)
    line_ok, near = line < count, tl.minimum(line, count - 1)
    own = v * BLOCK_V + tl.arange(0, BLOCK_V)  # in the strip
    column = tl.load(order + tl.minimum(first + own, num_classes - 1))
    tile = _tile_logits(
        hidden, weight, bias, tl.load(rows + near), column.to(tl.int64), dim, softcap,
        stride_hn, stride_hd, stride_wv, stride_wd, stride_b,
        HAS_BIAS, HAS_SOFTCAP, EVEN, UPCAST, PRECISION, BLOCK_N, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    softmax = tl.exp(tile - tl.load(lse + near)[:, None])
    hit = tl.load(targets + near).to(tl.int32)[:, None] == column[None, :]
    gradient = softmax - tl.where(hit, target_share, 0.0) - uniform_share
    matters = True
    if FILTER:
        # before the upstream gradient comes in, since eps is relative to it; a NaN is not below eps, so it is not lost
        idle = tl.abs(gradient) < eps
        if HAS_LSE_GRADIENT:  # there, a softmax matters where it is near the target distribution too
            idle &= softmax < eps
        PARTS: tl.constexpr = BLOCK_V // PART_V
        busy = tl.max(tl.reshape(tl.max(tl.where(idle, 0, 1), 0), (PARTS, PART_V)), 1)
        part = first // PART_V + v * PARTS + tl.arange(0, PARTS)
        tl.store(kept + n.to(tl.int64) * stride_kept + part, busy.to(tl.int8))
        matters = tl.max(busy, 0) > 0
    gradient *= tl.load(upstream + line, mask=line_ok, other=0.0)[:, None]
    if HAS_LSE_GRADIENT:
        gradient += softmax * tl.load(upstream_lse + line, mask=line_ok, other=0.0)[:, None]
    if HAS_SOFTCAP:
        ratio = tile / softcap
        gradient *= 1.0 - ratio * ratio
    if SUM:
        column_sum = tl.sum(gradient, 0)
        if SUM_IDLE == 0:
            column_sum = tl.reshape(column_sum, (PARTS, PART_V)) * busy[:, None]
            column_sum = tl.reshape(column_sum, (BLOCK_V,))
        tl.store(sums + n.to(tl.int64) * width + own, column_sum)
    if STORE:
        at = out + line.to(tl.int64)[:, None] * width + own[None, :]
        if STORE_IDLE:
            tl.store(at, gradient.to(out.dtype.element_ty))
        else:
            if matters:
                tl.store(at, gradient.to(out.dtype.element_ty))


@triton.jit
def _compact_kernel(kept, lists, counts, length, stride_line, stride_item, BLOCK: tl.constexpr):
    """For each line of tiles, the numbers of those that were kept, in order, and how many."""
    line = tl.program_id(0).to(tl.int64)
    item = tl.arange(0, BLOCK)
    at = kept + line * stride_line + item.to(tl.int64) * stride_item
    flag = tl.load(at, mask=item < length, other=0).to(tl.int32)
    tl.store(lists + line * length + tl.cumsum(flag, 0) - flag, item, mask=flag > 0)
    tl.store(counts + line, tl.sum(flag, 0))


@triton.jit(do_not_specialize=["height", "depth"])
def _product_kernel(
    left, right, out, place, lists, counts, scale, height, depth, dim, length,
    stride_lm, stride_lk, stride_rk, stride_rd, stride_om, stride_od,
    SPARSE: tl.constexpr, ADD: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    TILE_M: tl.constexpr, TILE_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out += left @ right, or out[place] = scale * left @ right; SPARSE: over the tiles of a list."""
    blocks = tl.cdiv(dim, BLOCK_D)
    block = tl.program_id(0) // blocks
    m = (block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    d = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)
    line = (block * BLOCK_M // TILE_M).to(tl.int64)
    STEPS: tl.constexpr = TILE_K // BLOCK_K
    if SPARSE:
        steps = tl.load(counts + line) * STEPS
    else:
        steps = tl.cdiv(depth, BLOCK_K)
    ok = (m < height)[:, None] & (d < dim)[None, :]
    if ADD:
        ok &= steps > 0  # nothing to add: neither read nor written
        sums_at = out + m[:, None] * stride_om + d[None, :] * stride_od
        total = tl.load(sums_at, mask=ok, other=0.0)
    else:
        total = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for step in range(0, steps):
        start = step * BLOCK_K
        if SPARSE:
            start = tl.load(lists + line * length + step // STEPS) * TILE_K + step % STEPS * BLOCK_K
        k = start + tl.arange(0, BLOCK_K).to(tl.int64)
        a = tl.load(left + m[:, None] * stride_lm + k[None, :] * stride_lk)
        b_ok = (k < depth)[:, None]
        if EVEN == 0:
            b_ok &= (d < dim)[None, :]
        b = tl.load(right + k[:, None] * stride_rk + d[None, :] * stride_rd, mask=b_ok, other=0.0)
        total = dot(a, b, total, UPCAST, PRECISION)
    if ADD:
        tl.store(sums_at, total, mask=ok)
    else:
        row = tl.load(place + m, mask=m < height, other=0).to(tl.int64)
        at = out + row[:, None] * stride_om + d[None, :] * stride_od
        tl.store(at, (total * tl.load(scale)).to(out.dtype.element_ty), mask=ok)


# --- launch shapes: speed only, no mathematics


def _shape(tensor, kind, blocks=None, crowded=False) -> dict:
    """Tile, warps and stages of a kernel ("lse", "gradient" or "product").

    `blocks` are tokens and classes of a tile. `crowded` says that a kernel has more than usual to keep in registers.

    The wider a tile, the less it takes from the L2 cache for each operation. On an H100 in half precision the float32
    tile of 128 x 256 takes half of the registers of 8 warps. The gradient is filtered by halves of it (`PART_V`): the
    smaller a part, the more of them are skipped. Rows that are not whole 16 bytes need an address for every element.
    """
    dim = tensor.shape[1]
    if not tensor.is_cuda:  # the interpreter
        tokens, classes, depth, part, warps, stages = 32, 64, 32, 32, 4, 1
    elif tensor.dtype.itemsize == 2:
        crowded = crowded or dim % 8 != 0
        tokens, classes, depth, part, warps, stages = 128, 128 if crowded else 256, 64, 128, 8, 4
        depth = 32 if dim % 8 else depth
    else:
        tokens, classes, depth, part, warps, stages = 64, 64, 32, 64, 4, 3
    if kind == "product":  # of rows of the result (tokens), along what is summed up (depth)
        columns = min(classes, max(16, triton.next_power_of_2(dim)))
        shape = dict(BLOCK_M=tokens, BLOCK_K=depth, BLOCK_D=columns, EVEN=dim % columns == 0)
    else:
        tokens, classes = blocks or (tokens, classes)
        depth = min(depth, max(16, triton.next_power_of_2(dim)))
        shape = dict(BLOCK_N=tokens, BLOCK_V=classes, BLOCK_D=depth, EVEN=dim % depth == 0, GROUP=16)
        if kind == "gradient":
            shape["PART_V"] = part if blocks is None else classes
    return dict(**shape, num_warps=warps, num_stages=stages)


def _constants(hidden, bias, softcap) -> dict:
    return dict(HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None, **dot_options(hidden))


def _strides(hidden, weight, bias) -> tuple[int, ...]:
    return (*hidden.stride(), *weight.stride(), 0 if bias is None else bias.stride(0))


def _check(hidden, weight, bias, rows, softcap, blocks, **vectors) -> torch.Tensor:
    """Check everything that a launch relies on. Returns the indices of the rows to work on."""
    check_tensor("hidden", hidden, "tokens, dim")
    check_tensor("weight", weight, "num_classes, dim", ("hidden", hidden))
    if bias is not None:
        check_tensor("bias", bias, "num_classes", ("hidden", hidden))
    if hidden.shape[1] != weight.shape[1] or not len(weight):
        raise ValueError(
            "hidden must be (tokens, dim) and weight (num_classes, dim) with at least one class, "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and len(bias) != len(weight):
        raise ValueError(f"bias must be ({len(weight)},), one number a class, got {tuple(bias.shape)}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap!r}")
    if blocks is not None and any(size < 16 or size & (size - 1) for size in blocks):
        raise ValueError(f"the kernel's tiles must be powers of two from 16 on, got {tuple(blocks)}")
    integers = ("rows", "targets")
    count = len(hidden) if rows is None else len(rows)
    for name, tensor in (("rows", rows), *vectors.items()):
        if tensor is None:
            continue
        if tensor.shape != (count,):
            raise ValueError(f"{name} must be ({count},), one entry a row, got {tuple(tensor.shape)}")
        if tensor.device != hidden.device:
            raise ValueError(f"hidden is on {hidden.device}, {name} must be too, got {tensor.device}")
        if (tensor.dtype != torch.int64) if name in integers else not tensor.is_floating_point():
            wanted = "int64" if name in integers else "of a floating dtype"
            raise TypeError(f"{name} must be {wanted}, got {tensor.dtype}")
    return torch.arange(count, device=hidden.device) if rows is None else rows.contiguous()


# --- the operations


def lse_forward(
    hidden, weight, *, bias=None, rows=None, softcap=None, blocks=None, with_mean=False
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Log-sum-exp over the classes of each row's logits, in float32.

    Args:
        hidden: `(tokens, dim)`, any strides.
        weight: `(num_classes, dim)`, any strides, same dtype.
        bias: `(num_classes,)` or None.
        rows: int64 indices of the rows of `hidden` to work on; None for all.
        softcap: positive, or None.
        blocks: tokens and classes of a tile, powers of two from 16 on; None to let the shapes decide.
        with_mean: whether the mean logit of each row is wanted too, for label smoothing. It is summed up in the same
            sweep; (without a soft cap it would be a product with the mean row of `weight`, at another read of that).

    Returns:
        `(count,)` for the `count` rows, or a pair of such.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit; raised before anything is launched.
    """
    rows = _check(hidden, weight, bias, rows, softcap, blocks)
    count, num_classes, dim = len(rows), *weight.shape
    shape = _shape(hidden, "lse", blocks)
    programs, tiles = triton.cdiv(count, shape["BLOCK_N"]), triton.cdiv(num_classes, shape["BLOCK_V"])
    # few token blocks would leave processors idle: let several programs share a row's classes
    fill = min(tiles, triton.cdiv(2 * processors(hidden), max(1, programs)))
    splits = min(_MOST_STRETCHES, max(triton.cdiv(tiles, _STRETCH), fill))
    splits = triton.cdiv(tiles, triton.cdiv(tiles, splits))  # no program without classes
    out = hidden.new_empty(splits, count, dtype=torch.float32)
    sums = torch.empty_like(out) if with_mean else None
    if count:
        _lse_kernel[(programs * splits,)](
            hidden, weight, bias, rows, out, sums, count, num_classes, dim, splits,
            triton.cdiv(tiles, splits) * shape["BLOCK_V"], float(softcap or 1.0), *_strides(hidden, weight, bias),
            HAS_SUM=with_mean, **_constants(hidden, bias, softcap), **shape,
        )  # fmt: skip
    lse = out[0] if splits == 1 else out.logsumexp(0)
    return (lse, sums.sum(0) / num_classes) if with_mean else lse


def indexed_neg_dot(
    hidden, weight, targets, *, bias=None, rows=None, softcap=None, blocks=None
) -> torch.Tensor:
    """Minus the logit of each row's target, in float32: `(count,)`. Arguments as for `lse_forward`.

    Args:
        targets: `(count,)` int64. A target outside `[0, num_classes)` gives nan; to look for one here would make the
            host wait for the device.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit.
    """
    rows = _check(hidden, weight, bias, rows, softcap, blocks, targets=targets)
    count, num_classes, dim = len(rows), *weight.shape
    out = hidden.new_empty(count, dtype=torch.float32)
    if count:
        _indexed_neg_dot_kernel[(triton.cdiv(count, 16),)](
            hidden, weight, bias, rows, targets.contiguous(), out, count, num_classes, dim, float(softcap or 1.0),
            *_strides(hidden, weight, bias), HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None,
            BLOCK_N=16, BLOCK_D=min(128, triton.next_power_of_2(max(dim, 1))),
        )  # fmt: skip
    return out


def cut_cross_entropy_backward(
    hidden, weight, targets, lse, upstream, *, bias=None, rows=None, softcap=None, blocks=None, order=None,
    filter_eps=None, filters=(True, True), upstream_lse=None, label_smoothing=0.0, needed=(True, True, False),
):  # fmt: skip
    """The gradients with respect to `hidden`, `weight` and `bias`. Arguments as for `lse_forward`.

    Args:
        targets: `(count,)` int64, in `[0, num_classes)`.
        lse: `(count,)` float32, from `lse_forward`.
        upstream: `(count,)`, gradient with respect to each row's loss.
        order: `(num_classes,)` integers: the classes in the order in which tiles are cut; None as they stand.
        filter_eps: skip tiles whose entries `|softmax - target distribution|` are all below it; None for none.
        filters: whether it holds for the gradient of `hidden`, and for those of `weight` and `bias`.
        upstream_lse: `(count,)`, gradient with respect to each row's log-sum-exp, or None.
        label_smoothing: share of the target distribution that is spread over all classes.
        needed: which of the three gradients are wanted.

    Returns:
        The gradients, None where not needed; that of `hidden` is zero in rows not worked on. Last, an int8 matrix with a
        one for every tile (token blocks, class blocks) that reached `filter_eps`; all ones without a filter.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit.
    """
    vectors = dict(targets=targets, lse=lse, upstream=upstream, upstream_lse=upstream_lse)
    index = _check(hidden, weight, bias, rows, softcap, blocks, **vectors)
    places = _order(order, weight)
    count, num_classes, dim = len(index), *weight.shape
    shape = _shape(hidden, "gradient", blocks, crowded=softcap is not None or upstream_lse is not None)
    tile_n, tile_v, part_v = shape["BLOCK_N"], shape["BLOCK_V"], shape["PART_V"]
    tiles_n, tiles_v = triton.cdiv(count, tile_n), triton.cdiv(num_classes, tile_v)
    width = max(_LEAST_STRIP, _SCRATCH // max(1, hidden.element_size() * count))
    width = min(tiles_v, max(1, width // tile_v)) * tile_v  # whole tiles
    filtered = [filter_eps is not None and bool(one) for one in filters]
    make = torch.zeros if any(filtered) else torch.ones
    kept = make(
        tiles_n, triton.cdiv(num_classes, width) * width // part_v, dtype=torch.int8, device=hidden.device
    )
    need_hidden, need_weight, need_bias = needed
    d_hidden = torch.zeros_like(hidden) if need_hidden and (rows is not None or not count) else None
    d_weight = (torch.empty_like if count else torch.zeros_like)(weight) if need_weight else None
    d_bias = weight.new_zeros(num_classes) if need_bias else None
    if not count:
        return d_hidden, d_weight, d_bias, kept[:, : triton.cdiv(num_classes, part_v)]

    upstream, upstream_lse, peak = _normalised(upstream, upstream_lse)
    targets, lse = targets.contiguous(), lse.float().contiguous()
    sums = hidden.new_zeros(count, dim, dtype=torch.float32) if need_hidden else None
    store = need_hidden or need_weight
    strip = hidden.new_empty(tiles_n * tile_n, width) if store else None
    columns = hidden.new_empty(tiles_n, width, dtype=torch.float32) if need_bias else None
    idle_hidden, idle_weight = (need and not one for need, one in zip(needed, filtered, strict=False))
    vectors = hidden if rows is None or not need_weight else hidden[rows]
    for start in range(0, num_classes, width):
        classes = min(width, num_classes - start)
        tiles = triton.cdiv(classes, tile_v)
        _gradient_kernel[(tiles_n * tiles,)](
            hidden, weight, bias, index, places, targets, lse, upstream, upstream_lse, strip, columns, kept,
            start, tiles, count, num_classes, dim, float(softcap or 1.0), float(filter_eps or 0.0),
            1.0 - label_smoothing, label_smoothing / num_classes, width, kept.stride(0),
            *_strides(hidden, weight, bias), HAS_LSE_GRADIENT=upstream_lse is not None, FILTER=any(filtered),
            STORE=store, STORE_IDLE=idle_hidden or idle_weight or not any(filtered), SUM=need_bias,
            SUM_IDLE=not filtered[1], **_constants(hidden, bias, softcap), **shape,
        )  # fmt: skip
        own, part = places[start : start + classes], kept[:, start // part_v :][:, : width // part_v]
        gradient = strip[:count, :classes] if store else None
        if need_bias:
            d_bias[own.long()] = (columns[:, :classes].sum(0) * peak).to(weight.dtype)
        if need_hidden:
            those = weight[start : start + classes] if order is None else weight[own.long()]
            if _by_torch(hidden, filtered[0]):
                sums.addmm_(gradient, those)
            else:
                tiles = part if filtered[0] else None
                _product(gradient, those, sums, None, peak, tiles, (tile_n, part_v))
        if need_weight and _by_torch(hidden, filtered[1]):
            product = hidden.new_empty(classes, dim)
            d_weight[own.long()] = torch.mm(gradient.T, vectors, out=product).mul_(peak)
        elif need_weight:
            tiles = part.T if filtered[1] else None
            _product(gradient.T, vectors, d_weight, own, peak, tiles, (part_v, tile_n))
    strip = gradient = those = None  # before the result is allocated beside the sums
    if need_hidden:
        sums = sums.mul_(peak).to(hidden.dtype)
        d_hidden = sums if rows is None else d_hidden.index_copy_(0, index, sums)
    return d_hidden, d_weight, d_bias, kept[:, : triton.cdiv(num_classes, part_v)]


def _by_torch(hidden, filtered) -> bool:
    """Whether all tiles of a product are there and its sums have the dtype of its factors: then it is a plain one."""
    return hidden.dtype == torch.float32 and not filtered


def _product(left, right, out, place, scale, kept, tile):
    """out += left @ right where `place` is None, else out[place] = scale * left @ right.

    `kept` says which tiles of `left`, of shape `tile`, are there; None for all. Memory of `left` goes on to full tiles.
    """
    (height, depth), dim = left.shape, right.shape[1]
    lists = counts = None
    if kept is not None:
        lists = torch.empty(kept.shape, dtype=torch.int32, device=left.device)
        counts = torch.empty(len(kept), dtype=torch.int32, device=left.device)
        _compact_kernel[(len(kept),)](
            kept, lists, counts, kept.shape[1], *kept.stride(), BLOCK=triton.next_power_of_2(kept.shape[1])
        )
    shape = _shape(right, "product")
    shape["num_stages"] += 2 if kept is not None else 0  # which the lookup in the list takes
    shape["BLOCK_M"], shape["BLOCK_K"] = min(shape["BLOCK_M"], tile[0]), min(shape["BLOCK_K"], tile[1])
    _product_kernel[(triton.cdiv(height, shape["BLOCK_M"]) * triton.cdiv(dim, shape["BLOCK_D"]),)](
        left, right, out, place, lists, counts, scale, height, depth, dim, 0 if kept is None else kept.shape[1],
        *left.stride(), *right.stride(), *out.stride(), SPARSE=kept is not None, ADD=place is None,
        TILE_M=tile[0], TILE_K=tile[1], **dot_options(right), **shape,
    )  # fmt: skip


def _normalised(upstream, upstream_lse):
    """Upstream gradients with largest entry 1, so that half-precision products neither vanish nor overflow."""
    vectors = [v.float() for v in (upstream, upstream_lse) if v is not None]
    peak = torch.stack([v.abs().amax() for v in vectors]).amax().clamp(min=1e-30)
    vectors = [(v / peak).contiguous() for v in vectors]
    return vectors[0], vectors[1] if len(vectors) > 1 else None, peak


def _order(order, weight):
    if order is None:
        return torch.arange(len(weight), dtype=torch.int32, device=weight.device)
    if order.shape != weight.shape[:1] or order.device != weight.device or order.is_floating_point():
        raise ValueError(
            f"order must hold the {len(weight)} classes as integers on {weight.device}, "
            f"got {tuple(order.shape)} {order.dtype} on {order.device}"
        )
    return order.to(torch.int32).contiguous()
