"""Linear maps of groups, each for the tokens that chose it: a mixture of hidden dimensions (Chen et al. 2024, arXiv 2412.05644).

A pair is a token with one group that it uses. Pairs are sorted by group, pair p has the row `index[p]` of x, and group g
the pairs offsets[g] to offsets[g + 1]. Two kernels, between them forward and backward of either layer of the mixture::

    grouped_product   y[out_index[p]] = W[g] x[index[p]]           programs own a tile of pairs of one group and of outputs
    grouped_outer     dW[g] = sum of dy[index'[p]] x[index[p]]^T   programs own a tile of one W[g] and walk over its pairs

Rows are read where they are: nothing of x is copied into sorted order. Which group a tile belongs to is found on the
device, from the offsets, so that the launch does not wait for the counts.

Of T tokens, k of G groups each, with d inputs and s outputs a group::

    dense and masked            2 T G s d operations; words T d + G s d + T G s
    sorted copies and a grouped product (as in mixtures of experts)
                                2 T k s d operations; words 2 T k d more than the line below, to write the copies and to read them
    here                        2 T k s d operations; words T k d + G s d + T k s

Where the results of a token's groups are added up (the second layer forward, the first one backward) T k d words more are written
and read again, as in the sorted form. With 16 groups of 256, 4 in use and d = 4096, at 3 TB/s and 700 TFLOP/s a token takes
48 ns densely and masked, 12 ns here and 34 ns with the adding up; over both layers, forward and backward, 116 ns against 288.

Sums are in float32, results in the dtype of the input; every program owns what it writes.
"""

import torch
import triton
import triton.language as tl

from kernels._launch import check_tensor, dot, dot_options


@triton.jit
def _pick(vector, place, at):  # one entry of a vector in registers
    return tl.sum(tl.where(place == at, vector, 0), 0)


@triton.jit
def _product_kernel(
    x_ptr, w_ptr, index_ptr, out_index_ptr, offsets_ptr, out_ptr, groups, depth, width,
    x_row, x_column, w_group, w_row, w_column,
    HAS_INDEX: tl.constexpr, HAS_OUT_INDEX: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    place = tl.arange(0, GROUPS)
    begin = tl.load(offsets_ptr + place, mask=place < groups, other=0)
    end = tl.load(offsets_ptr + place + 1, mask=place < groups, other=0)
    tiles = (end - begin + BLOCK_P - 1) // BLOCK_P
    last = tl.cumsum(tiles, 0)  # tiles up to and with each group
    strips = tl.cdiv(width, BLOCK_O)
    number = tl.program_id(0) // strips  # one dimension of the grid, since the others end at 65535
    group = tl.sum((last <= number).to(tl.int32), 0)
    if group < groups:  # the launch has tiles to spare
        tile = number - (_pick(last, place, group) - _pick(tiles, place, group))
        pair = _pick(begin, place, group) + tile * BLOCK_P + tl.arange(0, BLOCK_P)
        pair_ok = pair < _pick(end, place, group)
        row = tl.load(index_ptr + pair, mask=pair_ok, other=0) if HAS_INDEX else pair
        row = row.to(tl.int64)
        output = tl.program_id(0) % strips * BLOCK_O + tl.arange(0, BLOCK_O)
        output_ok = output < width
        left = x_ptr + row[:, None] * x_row
        right = w_ptr + group.to(tl.int64) * w_group + output[None, :].to(tl.int64) * w_row
        total = tl.zeros((BLOCK_P, BLOCK_O), dtype=tl.float32)
        for start in range(0, depth, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            d_ok, d = d < depth, d.to(tl.int64)
            a = tl.load(left + d[None, :] * x_column, mask=pair_ok[:, None] & d_ok[None, :], other=0.0)
            b = tl.load(right + d[:, None] * w_column, mask=d_ok[:, None] & output_ok[None, :], other=0.0)
            total = dot(a, b, total, UPCAST, PRECISION)
        to = tl.load(out_index_ptr + pair, mask=pair_ok, other=0) if HAS_OUT_INDEX else pair
        where = out_ptr + to[:, None].to(tl.int64) * width + output[None, :]
        tl.store(where, total.to(out_ptr.dtype.element_ty), mask=pair_ok[:, None] & output_ok[None, :])


@triton.jit
def _outer_kernel(
    y_ptr, x_ptr, y_index_ptr, x_index_ptr, offsets_ptr, out_ptr, width, depth, y_row, y_column, x_row, x_column,
    HAS_Y_INDEX: tl.constexpr, HAS_X_INDEX: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(2)
    begin, end = tl.load(offsets_ptr + group), tl.load(offsets_ptr + group + 1)
    output = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    input_ = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    output_ok, input_ok = output < width, input_ < depth
    total = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    for start in range(begin, end, BLOCK_P):
        pair = start + tl.arange(0, BLOCK_P)
        pair_ok = pair < end
        y_place = tl.load(y_index_ptr + pair, mask=pair_ok, other=0) if HAS_Y_INDEX else pair
        x_place = tl.load(x_index_ptr + pair, mask=pair_ok, other=0) if HAS_X_INDEX else pair
        y = y_ptr + y_place[None, :].to(tl.int64) * y_row + output[:, None].to(tl.int64) * y_column
        x = x_ptr + x_place[:, None].to(tl.int64) * x_row + input_[None, :].to(tl.int64) * x_column
        a = tl.load(y, mask=output_ok[:, None] & pair_ok[None, :], other=0.0)
        b = tl.load(x, mask=pair_ok[:, None] & input_ok[None, :], other=0.0)
        total = dot(a, b, total, UPCAST, PRECISION)
    where = out_ptr + (group.to(tl.int64) * width + output[:, None]) * depth + input_[None, :]
    tl.store(where, total.to(out_ptr.dtype.element_ty), mask=output_ok[:, None] & input_ok[None, :])


def _shape(x: torch.Tensor) -> tuple[int, int, int, dict]:
    """Two sides of a result's tile and the depth of a step, and the warps: speed only."""
    if not x.is_cuda:
        return 16, 32, 32, {}
    if x.dtype.itemsize == 2:
        return 128, 128, 64, dict(num_warps=8)
    return 64, 64, 32, dict(num_warps=4)


def _check_pairs(x: torch.Tensor, name: str, index, offsets, groups: int | None) -> int:
    """Check offsets and an index; the number of pairs."""
    for label, vector in ((name, index), ("offsets", offsets)):
        if vector is None and label != "offsets":
            continue
        if not isinstance(vector, torch.Tensor) or vector.dtype != torch.int32 or vector.dim() != 1:
            got = (
                f"{vector.dtype} {tuple(vector.shape)}" if isinstance(vector, torch.Tensor) else type(vector)
            )
            raise TypeError(f"{label} must be a vector of int32, got {got}")
        if vector.device != x.device:
            raise ValueError(f"x is on {x.device}, {label} must be too, got {vector.device}")
    if len(offsets) < 2 or (groups is not None and len(offsets) != groups + 1):
        wanted = "at least 2" if groups is None else str(groups + 1)
        raise ValueError(f"offsets must hold groups + 1 = {wanted} entries, got {len(offsets)}")
    return len(x) if index is None else len(index)


def grouped_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor,
    index: torch.Tensor | None = None,
    out_index: torch.Tensor | None = None,
) -> torch.Tensor:
    """y[out_index[p]] = W[g] x[index[p]] for the pairs p of each group g.

    Args:
        x: (rows, d), any strides, in float32, bfloat16 or float16.
        weight: (groups, s, d), any strides, same dtype.
        offsets: where each group's pairs begin, and at last their number: int32, (groups + 1,), not falling, from 0.
        index: row of x of each pair, int32 (pairs,) in [0, rows); None if pair p has row p.
        out_index: row of the result of each pair, a permutation; None if pair p has row p.

    Returns:
        (pairs, s) in the dtype of `x`, contiguous.

    Raises:
        TypeError, ValueError: a wrong dtype, device or shape; before anything is launched. The entries of `offsets` and
            `index` are not looked at.
    """
    check_tensor("x", x, "rows, d")
    check_tensor("weight", weight, "groups, s, d", like=("x", x))
    groups, width, depth = weight.shape
    if x.shape[1] != depth:
        raise ValueError(
            f"weight must be (groups, s, {x.shape[1]}) for x {tuple(x.shape)}, got {tuple(weight.shape)}"
        )
    pairs = _check_pairs(x, "index", index, offsets, groups)
    if out_index is not None and _check_pairs(x, "out_index", out_index, offsets, groups) != pairs:
        raise ValueError(f"out_index must have the {pairs} pairs, got {len(out_index)}")
    out = torch.empty((pairs, width), dtype=x.dtype, device=x.device)
    if out.numel():
        rows, columns, step, options = _shape(x)
        tiles = triton.cdiv(pairs, rows) + groups
        _product_kernel[(triton.cdiv(width, columns) * tiles,)](
            x, weight, *(None if part is None else part.contiguous() for part in (index, out_index)),
            offsets.contiguous(), out, groups, depth, width,
            *x.stride(), *weight.stride(), HAS_INDEX=index is not None,
            HAS_OUT_INDEX=out_index is not None, **dot_options(x),
            GROUPS=triton.next_power_of_2(groups), BLOCK_P=rows, BLOCK_O=columns, BLOCK_D=step, **options,
        )  # fmt: skip
    return out


def grouped_outer(
    y: torch.Tensor,
    x: torch.Tensor,
    offsets: torch.Tensor,
    y_index: torch.Tensor | None = None,
    x_index: torch.Tensor | None = None,
) -> torch.Tensor:
    """The sum over each group's pairs of y[y_index[p]] x[x_index[p]]^T: the gradient of the groups' weights.

    Args:
        y: (rows, s), any strides, in float32, bfloat16 or float16.
        x: (rows, d), any strides, same dtype.
        offsets: as for `grouped_product`.
        y_index: row of y of each pair, int32 (pairs,); None if pair p has row p.
        x_index: row of x of each pair.

    Returns:
        (groups, s, d) in the dtype of `x`, contiguous; zeros for a group without pairs.

    Raises:
        TypeError, ValueError: as `grouped_product`, and two indices of different length.
    """
    check_tensor("y", y, "rows, s")
    check_tensor("x", x, "rows, d", like=("y", y))
    counts = [
        _check_pairs(y, "y_index", y_index, offsets, None),
        _check_pairs(x, "x_index", x_index, offsets, None),
    ]
    if counts[0] != counts[1]:
        raise ValueError(f"y and x must have the same number of pairs, got {counts[0]} and {counts[1]}")
    groups, width, depth = len(offsets) - 1, y.shape[1], x.shape[1]
    out = torch.empty((groups, width, depth), dtype=x.dtype, device=x.device)
    if out.numel():
        rows, columns, step, options = _shape(x)
        _outer_kernel[(triton.cdiv(depth, columns), triton.cdiv(width, rows), groups)](
            y, x, *(None if index is None else index.contiguous() for index in (y_index, x_index)),
            offsets.contiguous(), out, width, depth, *y.stride(), *x.stride(),
            HAS_Y_INDEX=y_index is not None, HAS_X_INDEX=x_index is not None, **dot_options(x),
            BLOCK_O=rows, BLOCK_I=columns, BLOCK_P=step, **options,
        )  # fmt: skip
    return out
