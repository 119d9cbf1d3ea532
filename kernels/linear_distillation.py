"""Distillation losses between two linear classifiers, student and teacher, without the logits of either.

The logits are s = hidden @ weight.T + bias and t = teacher_hidden @ teacher_weight.T + teacher_bias, with N tokens, V
classes, dimensions D and E. Three losses of a row, at temperature h::

    kd          -h^2 sum_k T_k log S_k, S and T the softmaxes of s / h and t / h        (Hinton et al. 2015)
    nkd         -T_y log S_y at temperature 1, minus gamma h^2 sum_(k != y) T'_k log S'_k, S' and T' being the softmaxes
                at h over the classes that are not the target y                         (Yang et al. 2023, arXiv 2303.13005)
    binary_kl   h^2 sum_k KL(sigmoid(t_k / h) || sigmoid(s_k / h))                      (Yang et al. 2024, arXiv 2411.08937)

Both matrices of logits are made a strip at a time, some tokens and some thousand classes in float32, by torch.mm. The
kernels work on strips, and only they see a logit.

Forward, one sweep. A cross-entropy is lse(s / h) - sum_k T_k s_k / h, so a row needs two log-sum-exps and the mean of
s under T. With the running maxima a of s and b of t, what is kept is Z_s = sum exp((s - a) / h), Z_t = sum exp((t -
b) / h) and A = sum exp((t - b) / h) s / h. When new classes raise b to b', both Z_t and A shrink by exp((b - b') /
h): the mean has the teacher's weights, so it follows the teacher's maximum and never the student's. In the end the
mean is A / Z_t. A program owns some rows, and takes up its five sums from memory where the strip before has left
them. nkd leaves the target out of all sums, keeps its two logits, and sums at temperature 1 too; its margin s_y -
lse(the others) gives log S_y and 1 - S_y without a difference of nearly equal numbers. binary_kl is a plain sum.

Backward. The gradients with respect to s, per row and upstream gradient::

    kd          h (S - T)
    nkd         gamma h (S' - T') + T_y (1 - S_y) (softmax of the others at temperature 1), and -T_y (1 - S_y) at y
    binary_kl   h (sigmoid(s / h) - sigmoid(t / h)), formed as sigmoid(s) sigmoid(-t) - sigmoid(t) sigmoid(-s)

The strips of logits are made again, a kernel writes that part of the gradient in the inputs' dtype, and its products
with `weight` and with `hidden` are torch.mm again, summed in float32. Nothing is added by two programs, so results
are equal in every run.

Floating-point operations, P = 2 N V: P (D + E) forward, P (D + E) + 2 P D backward, together P (4 D + 2 E); the
kernels' own are about 40 N V. Explicit logits cost P (3 D + E). Two alternatives were counted. Kernels that own rows
(for the gradient of `hidden`) and classes (for that of `weight`) recompute twice, P (6 D + 3 E), and add to float32
rows in memory for every tile. Kernels that form tiles of both logits themselves save the strips' traffic, but two
float32 tiles of 128 x 128 leave no registers for the sums of nkd and binary_kl, and such tiles ask 64 operations of
every byte that comes from the cache: at 5.5 TB/s that is 350 TFLOP/s, about half of what torch.mm reaches, which
costs more than the strips do.

Memory traffic in bytes, for logits in half precision: 16 N V forward (both strips written and read once), 22 N V
backward (the same, and the gradient written once, read twice), 16 N D for every strip of classes. Compiled torch on
explicit logits of half precision: 12 N V forward (both written, read twice by a running softmax), 10 N V backward.

What is allocated beside the gradients: the strips (128 MB), a float32 sum of the size of `hidden` and a product of
4096 tokens, the part of `weight`'s gradient of one strip twice. At 8192 tokens, D = 2048, E = 4096, V = 128256 in
bfloat16 that is 0.24 GB. Explicit logits need 4 N V bytes and the gradient 2 N V, 6.3 GB at the least, 26 times as
much (eager PyTorch 10 to 17 GB). Time at 650 TFLOP/s and 3 TB/s: 34 TFLOP and 52 GB, 53 + 17 ms, against 22 TFLOP and
23 GB, 33 + 8 ms. This is 1.7 times slower, and earns its place by memory alone. A plain chunked form with as little
memory would read the float32 strips at least twice more.
"""

import torch
import triton
import triton.language as tl

from kernels._launch import check_tensor

LOSSES = ("kd", "nkd", "binary_kl")
SCRATCH_BYTES = 1 << 27  # strips of both logits and of the gradient
CHUNK = 4096  # tokens of a strip
_LOWEST = -3.4e38  # in place of a maximum of -inf: exp(-inf - it) is 0, not NaN
# numbers that the first kernel keeps of a row, and those that the backward pass reads
_SUMS = {"kd": 5, "nkd": 9, "binary_kl": 1}
_STATISTICS = {"kd": 2, "nkd": 4, "binary_kl": 0}

# --- the mathematics of one tile


@triton.jit
def _tile(logits, bias, row, ok, place, first, stride, stride_b, HAS_BIAS: tl.constexpr):
    """A tile of a strip of logits, bias included; `place` counts from the strip's first class on."""
    tile = tl.load(logits + row[:, None] * stride + place[None, :], mask=ok, other=0.0)
    if HAS_BIAS:
        column = (first + place).to(tl.int64)
        offset = tl.load(bias + column[None, :] * stride_b, mask=ok, other=0.0)
        tile += offset.to(tl.float32)
    return tile


@triton.jit
def _coin(x):
    """sigmoid(x), sigmoid(-x) and log(1 + e^-|x|), each of them to full relative precision."""
    e = tl.exp(-tl.abs(x))
    total = 1.0 + e
    large, small = 1.0 / total, e / total
    rounded = tl.where(total == 1.0, 1.0, total - 1.0)  # the part of e that the sum has kept
    log = tl.where(total == 1.0, e, tl.log(total) * (e / rounded))
    return tl.where(x >= 0, large, small), tl.where(x >= 0, small, large), log


@triton.jit
def _binary_divergence(s, t):
    """KL of sigmoid(t) and sigmoid(s); log sigmoid(x) = min(x, 0) - log(1 + e^-|x|)."""
    _, _, log_s = _coin(s)
    head, tail, log_t = _coin(t)
    heads = head * (tl.minimum(t, 0.0) - tl.minimum(s, 0.0))
    tails = tail * (tl.maximum(s, 0.0) - tl.maximum(t, 0.0))
    return heads + tails + (log_s - log_t)


# --- the kernels


@triton.jit
def _sums_kernel(
    student, teacher, bias, teacher_bias, targets, sums, count, first, width, inverse,
    stride_s, stride_t, stride_b, stride_tb, stride_sums,
    LOSS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_TEACHER_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Add the classes of a strip, `width` of them from `first` on, to the sums of each row."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = row < count
    sums += row
    mean = tl.load(sums, mask=row_ok, other=0.0)
    if LOSS != "binary_kl":
        top_s = tl.load(sums + stride_sums, mask=row_ok, other=0.0)
        top_t = tl.load(sums + 2 * stride_sums, mask=row_ok, other=0.0)
        mass_s = tl.load(sums + 3 * stride_sums, mask=row_ok, other=0.0)
        mass_t = tl.load(sums + 4 * stride_sums, mask=row_ok, other=0.0)
    if LOSS == "nkd":
        one_s = tl.load(sums + 5 * stride_sums, mask=row_ok, other=0.0)
        one_t = tl.load(sums + 6 * stride_sums, mask=row_ok, other=0.0)
        own_s = tl.load(sums + 7 * stride_sums, mask=row_ok, other=0.0)
        own_t = tl.load(sums + 8 * stride_sums, mask=row_ok, other=0.0)
        target = tl.load(targets + row, mask=row_ok, other=-1) - first
    for v in range(0, width, BLOCK_V):
        place = v + tl.arange(0, BLOCK_V)
        ok = row_ok[:, None] & (place[None, :] < width)
        s = _tile(student, bias, row, ok, place, first, stride_s, stride_b, HAS_BIAS)
        t = _tile(teacher, teacher_bias, row, ok, place, first, stride_t, stride_tb, HAS_TEACHER_BIAS)
        if LOSS == "binary_kl":
            # past the last class both logits are 0, and so is their divergence
            mean += tl.sum(_binary_divergence(s * inverse, t * inverse), 1)
        else:
            if LOSS == "nkd":
                hit = target[:, None] == place[None, :]
                own_s += tl.sum(tl.where(hit & ok, s, 0.0), 1)
                own_t += tl.sum(tl.where(hit & ok, t, 0.0), 1)
                ok = ok & (target[:, None] != place[None, :])
            t = tl.where(ok, t, float("-inf"))
            new_top = tl.maximum(top_t, tl.max(t, 1))
            shrink = tl.exp((top_t - new_top) * inverse)
            share = tl.exp((t - new_top[:, None]) * inverse)
            mass_t = mass_t * shrink + tl.sum(share, 1)
            mean = mean * shrink + tl.sum(share * (s * inverse), 1)
            if LOSS == "nkd":
                one_t = one_t * tl.exp(top_t - new_top) + tl.sum(tl.exp(t - new_top[:, None]), 1)
            top_t = new_top
            s = tl.where(ok, s, float("-inf"))
            new_top = tl.maximum(top_s, tl.max(s, 1))
            mass_s = mass_s * tl.exp((top_s - new_top) * inverse)
            mass_s += tl.sum(tl.exp((s - new_top[:, None]) * inverse), 1)
            if LOSS == "nkd":
                one_s = one_s * tl.exp(top_s - new_top) + tl.sum(tl.exp(s - new_top[:, None]), 1)
            top_s = new_top
    tl.store(sums, mean, mask=row_ok)
    if LOSS != "binary_kl":
        tl.store(sums + stride_sums, top_s, mask=row_ok)
        tl.store(sums + 2 * stride_sums, top_t, mask=row_ok)
        tl.store(sums + 3 * stride_sums, mass_s, mask=row_ok)
        tl.store(sums + 4 * stride_sums, mass_t, mask=row_ok)
    if LOSS == "nkd":
        tl.store(sums + 5 * stride_sums, one_s, mask=row_ok)
        tl.store(sums + 6 * stride_sums, one_t, mask=row_ok)
        tl.store(sums + 7 * stride_sums, own_s, mask=row_ok)
        tl.store(sums + 8 * stride_sums, own_t, mask=row_ok)


@triton.jit
def _gradient_kernel(
    student, teacher, bias, teacher_bias, targets, rows, gradient, count, first, width, blocks, inverse,
    stride_s, stride_t, stride_g, stride_b, stride_tb, stride_rows,
    LOSS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_TEACHER_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The gradient with respect to the student's logits of a strip, a tile for each program."""
    row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = row < count
    place = tl.program_id(0) % blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    ok = row_ok[:, None] & (place[None, :] < width)
    s = _tile(student, bias, row, ok, place, first, stride_s, stride_b, HAS_BIAS)
    t = _tile(teacher, teacher_bias, row, ok, place, first, stride_t, stride_tb, HAS_TEACHER_BIAS)
    rows += row
    pull = tl.load(rows, mask=row_ok, other=0.0)[:, None]
    if LOSS == "binary_kl":
        head_s, tail_s, _ = _coin(s * inverse)
        head_t, tail_t, _ = _coin(t * inverse)
        tile = pull * (head_s * tail_t - head_t * tail_s)
    else:
        lse_s = tl.load(rows + stride_rows, mask=row_ok, other=0.0)[:, None]
        lse_t = tl.load(rows + 2 * stride_rows, mask=row_ok, other=0.0)[:, None]
        tile = pull * (tl.exp(s * inverse - lse_s) - tl.exp(t * inverse - lse_t))
        if LOSS == "nkd":
            one_s = tl.load(rows + 3 * stride_rows, mask=row_ok, other=0.0)[:, None]
            slope = tl.load(rows + 4 * stride_rows, mask=row_ok, other=0.0)[:, None]
            target = tl.load(targets + row, mask=row_ok, other=-1)[:, None] - first
            tile -= slope * tl.exp(s - one_s)
            tile = tl.where(target == place[None, :], slope, tile)
    where = gradient + row[:, None] * stride_g + place[None, :]
    tl.store(where, tile.to(gradient.dtype.element_ty), mask=ok)


# --- launch shapes: speed only, no mathematics


def _shape(like, width, blocks) -> dict:
    """Rows and classes of a tile, and warps. `blocks` overrides the tile."""
    # on a GPU a strip's classes are a multiple of 1024 but for the last; in the interpreter few programs are best
    tokens, classes = (1, 1024) if like.is_cuda else (16, 128)
    if blocks is not None:
        tokens, classes = blocks
    shape = dict(BLOCK_N=tokens, BLOCK_V=min(classes, triton.next_power_of_2(width)))
    return shape | (dict(num_warps=4) if like.is_cuda else {})


def _strip_shape(hidden, num_classes) -> tuple[int, int]:
    """Tokens and classes of a strip. Thousands of classes, as many as are left of the bytes: it suits torch.mm."""
    tokens = max(1, min(len(hidden), CHUNK))
    classes = SCRATCH_BYTES // (8 + hidden.element_size()) // tokens
    for unit in (1024, 128):
        classes = classes // unit * unit if classes > unit else classes
    return tokens, max(1, min(num_classes, classes))


def _check(inputs, bias, teacher_bias, targets, loss, temperature, blocks, **rows) -> None:
    """Check everything that a launch relies on."""
    hidden, weight, teacher_hidden, teacher_weight = inputs
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {LOSSES}, got {loss!r}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be above 0 and finite, got {temperature!r}")
    if blocks is not None and any(size < 1 or size & (size - 1) for size in blocks):
        raise ValueError(f"the kernel's tiles must be powers of two, got {tuple(blocks)}")
    check_tensor("hidden", hidden, "tokens, dim")
    check_tensor("weight", weight, "classes, dim", ("hidden", hidden))
    check_tensor("teacher_hidden", teacher_hidden, "tokens, teacher_dim")
    check_tensor("teacher_weight", teacher_weight, "classes, teacher_dim", ("teacher_hidden", teacher_hidden))
    if bias is not None:
        check_tensor("bias", bias, "classes", ("hidden", hidden))
    if teacher_bias is not None:
        check_tensor("teacher_bias", teacher_bias, "classes", ("teacher_hidden", teacher_hidden))
    if teacher_hidden.device != hidden.device:
        raise ValueError(
            f"hidden is on {hidden.device}, teacher_hidden must be too, got {teacher_hidden.device}"
        )
    (count, dim), classes = hidden.shape, weight.shape[0]
    wanted = {
        "weight": (weight, (classes, dim)),
        "teacher_hidden": (teacher_hidden, (count, teacher_hidden.shape[1])),
        "teacher_weight": (teacher_weight, (classes, teacher_hidden.shape[1])),
        "bias": (bias, (classes,)),
        "teacher_bias": (teacher_bias, (classes,)),
        **{
            name: (x, (_STATISTICS[loss], count) if name == "statistics" else (count,))
            for name, x in rows.items()
        },
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(tensor.shape)}")
    if classes < (2 if loss == "nkd" else 1):
        raise ValueError(f"{loss} needs more classes, got weight {tuple(weight.shape)}")
    if loss == "nkd":
        if not isinstance(targets, torch.Tensor) or targets.dtype != torch.int64:
            given = targets.dtype if isinstance(targets, torch.Tensor) else type(targets).__name__
            raise TypeError(f"targets must be an int64 tensor (tokens,), got {given}")
        if targets.shape != (count,) or targets.device != hidden.device:
            raise ValueError(
                f"targets must be ({count},) on {hidden.device}, got {tuple(targets.shape)} on {targets.device}"
            )


# --- the operations


@torch.no_grad()
def linear_distillation_forward(
    hidden, weight, teacher_hidden, teacher_weight, targets=None, *, loss, temperature=1.0, gamma=1.5, bias=None,
    teacher_bias=None, blocks=None,
):  # fmt: skip
    """The loss of each row, and what the backward pass needs of it.

    Args:
        hidden: `(tokens, dim)`, any strides; float32, bfloat16 or float16.
        weight: `(classes, dim)`, any strides, same dtype.
        teacher_hidden: `(tokens, teacher_dim)`, any strides; may have another dtype than the student's tensors.
        teacher_weight: `(classes, teacher_dim)`, any strides, the dtype of `teacher_hidden`.
        targets: `(tokens,)` int64 in `[0, classes)`, which is not checked; only "nkd" reads them.
        loss: `"kd"`, `"nkd"` or `"binary_kl"`.
        temperature: above 0.
        gamma: weight of the non-target term of "nkd".
        bias: `(classes,)` of the student's dtype, or None.
        teacher_bias: `(classes,)` of the teacher's dtype, or None.
        blocks: tokens and classes of a tile, powers of two; None to let the device decide.

    Returns:
        The losses, `(tokens,)`, and statistics, `(2, tokens)` for "kd", `(4, tokens)` for "nkd" and `(0, tokens)` for
        "binary_kl"; all float32.

    Raises:
        TypeError, ValueError: dtypes, shapes, devices or options that do not fit; raised before anything is launched.
    """
    inputs = (hidden, weight, teacher_hidden, teacher_weight)
    _check(inputs, bias, teacher_bias, targets, loss, temperature, blocks)
    sums = torch.zeros(_SUMS[loss], len(hidden), dtype=torch.float32, device=hidden.device)
    sums[1:3] = _LOWEST
    for tokens, classes, s, t in _strips(inputs):
        _add_strip(s, t, bias, teacher_bias, targets, sums, tokens, classes, loss, temperature, blocks)
    return _finish(sums, loss, temperature, gamma)


@torch.no_grad()
def linear_distillation_backward(
    hidden, weight, teacher_hidden, teacher_weight, targets, statistics, upstream, *, loss, temperature=1.0, gamma=1.5,
    bias=None, teacher_bias=None, blocks=None, need_hidden=True, need_weight=True,
    need_bias=False,
):  # fmt: skip
    """The gradients with respect to the student. Arguments as for `linear_distillation_forward`.

    Args:
        statistics: from `linear_distillation_forward`.
        upstream: `(tokens,)`, gradient with respect to each row's loss.
        need_hidden, need_weight, need_bias: which gradients are wanted.

    Returns:
        The gradients of `hidden`, `weight` and `bias`, of their shapes and dtypes; None where not wanted.

    Raises:
        TypeError, ValueError: dtypes, shapes, devices or options that do not fit; raised before anything is launched.
    """
    inputs = (hidden, weight, teacher_hidden, teacher_weight)
    rows = dict(statistics=statistics, upstream=upstream)
    _check(inputs, bias, teacher_bias, targets, loss, temperature, blocks, **rows)
    sums = dict(dtype=torch.float32, device=hidden.device)
    d_hidden = torch.zeros(hidden.shape, **sums) if need_hidden else None
    d_weight = torch.zeros(weight.shape, dtype=weight.dtype, device=hidden.device) if need_weight else None
    d_bias = torch.zeros(len(weight), **sums) if need_bias else None
    if not len(hidden) or not (need_hidden or need_weight or need_bias):
        return _cast(d_hidden, hidden), d_weight, _cast(d_bias, weight)
    rows, peak = _row_factors(statistics, upstream, loss, temperature, gamma)
    scratch, d_part = None, None
    for tokens, classes, s, t in _strips(inputs):
        scratch = (
            hidden.new_empty(s.numel()) if scratch is None else scratch
        )  # the first strip is the largest
        gradient = scratch[: s.numel()].view(s.shape)
        _strip_gradient(
            s, t, bias, teacher_bias, targets, rows, gradient, tokens, classes, loss, temperature, blocks
        )
        if need_hidden:
            d_hidden[tokens] += _product(gradient, weight[classes])
        if need_bias:
            d_bias[classes] += gradient.sum(0, dtype=torch.float32)
        if need_weight:
            more = _product(gradient.T, hidden[tokens])
            d_part = more if tokens.start == 0 else d_part.add_(more)
            if tokens.stop == len(hidden):
                d_weight[classes] = d_part.mul_(peak)
    return _cast(d_hidden, hidden, peak), d_weight, _cast(d_bias, weight, peak)


def _strips(inputs):
    """Yields tokens and classes, as slices, and the student's and the teacher's logits there, without bias, in float32.

    All tokens of some classes come before the next classes. The logits are overwritten by those of the next strip.
    """
    hidden, weight, teacher_hidden, teacher_weight = inputs
    height, width = _strip_shape(hidden, len(weight))
    buffers = hidden.new_empty(2, height * width, dtype=torch.float32)
    for first in range(0, len(weight), width):
        classes = slice(first, min(first + width, len(weight)))
        for start in range(0, len(hidden), height):
            tokens = slice(start, min(start + height, len(hidden)))
            shape = (tokens.stop - start, classes.stop - first)
            s, t = (buffer[: shape[0] * shape[1]].view(shape) for buffer in buffers)
            _product(hidden[tokens], weight[classes].T, out=s)
            _product(teacher_hidden[tokens], teacher_weight[classes].T, out=t)
            yield tokens, classes, s, t


def _product(left, right, out=None):
    """left @ right in float32, of operands in half precision where they are."""
    if left.dtype == torch.float32 or not left.is_cuda:
        return torch.mm(left.float(), right.float(), out=out)
    return torch.mm(left, right, out_dtype=torch.float32, out=out)


def _add_strip(s, t, bias, teacher_bias, targets, sums, tokens, classes, loss, temperature, blocks):
    """Launch `_sums_kernel`: s and t (tokens, classes) float32 with unit stride along the classes."""
    shape = _shape(s, s.shape[1], blocks)
    _sums_kernel[(triton.cdiv(len(s), shape["BLOCK_N"]),)](
        s, t, bias, teacher_bias, _own(targets, tokens, loss), sums[:, tokens], len(s), classes.start, s.shape[1],
        1 / temperature, s.stride(0), t.stride(0), *_bias_strides(bias, teacher_bias), sums.stride(0),
        LOSS=loss, HAS_BIAS=bias is not None, HAS_TEACHER_BIAS=teacher_bias is not None, **shape,
    )  # fmt: skip


def _strip_gradient(
    s, t, bias, teacher_bias, targets, rows, gradient, tokens, classes, loss, temperature, blocks
):
    """Launch `_gradient_kernel`: s, t and gradient (tokens, classes) with unit stride along the classes."""
    shape = _shape(s, s.shape[1], blocks)
    wide = triton.cdiv(s.shape[1], shape["BLOCK_V"])
    _gradient_kernel[(triton.cdiv(len(s), shape["BLOCK_N"]) * wide,)](
        s, t, bias, teacher_bias, _own(targets, tokens, loss), rows[:, tokens], gradient, len(s), classes.start,
        s.shape[1], wide, 1 / temperature, s.stride(0), t.stride(0), gradient.stride(0),
        *_bias_strides(bias, teacher_bias), rows.stride(0),
        LOSS=loss, HAS_BIAS=bias is not None, HAS_TEACHER_BIAS=teacher_bias is not None, **shape,
    )  # fmt: skip


def _own(targets, tokens, loss):
    return targets[tokens].contiguous() if loss == "nkd" else None


def _bias_strides(*biases) -> tuple[int, int]:
    return tuple(0 if x is None else x.stride(0) for x in biases)


def _cast(total, like, peak=None):
    if total is None:
        return None
    return (total if peak is None else total.mul_(peak)).to(like.dtype)


def _finish(sums, loss, temperature, gamma):
    """Losses and statistics from the sums over all classes."""
    if loss == "binary_kl":
        return temperature**2 * sums[0], sums[1:]
    top = sums[1:3]
    lse = top / temperature + sums[3:5].log()
    cross = lse[0] - sums[0] / sums[4]
    if loss == "kd":
        return temperature**2 * cross, lse
    one = top + sums[5:7].log()
    margin, teacher_margin = sums[7:9] - one
    share = teacher_margin.sigmoid()
    losses = gamma * temperature**2 * cross - share * torch.nn.functional.logsigmoid(margin)
    return losses, torch.stack([*lse, one[0], -share * (-margin).sigmoid()])


def _row_factors(statistics, upstream, loss, temperature, gamma):
    """Per row what multiplies the difference of the distributions, and the statistics; and what was divided out.

    The largest factor is 1, so that half-precision products neither vanish nor overflow.
    """
    pull = ((gamma * temperature if loss == "nkd" else temperature) * upstream.float())[None]
    slope = statistics[3:] * upstream
    peak = torch.cat([pull, slope]).abs().amax().clamp(min=1e-30)
    return torch.cat([pull / peak, statistics[:3], slope / peak]), peak
