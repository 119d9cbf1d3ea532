"""The elementwise linear recurrence h_t = a_t h_{t-1} + b_t, in one sweep each way.

Algorithm. Every program owns 64 channels and walks over the time with its states in float32 registers::

    forward     h_t = a_t h_{t-1} + b_t                                                  from the left
    backward    g_t = grad_t + a_{t+1} g_{t+1},  db_t = g_t,  da_t = g_t h_{t-1}         from the right

This is the scan of Martin and Cundy (2018, arXiv 1709.04057), without its parallelism along the time: channels are many (batch
times width), and a scan by products of decays, as in a tree, turns a product that overflows times a state of zero into nan. The
steps do not wait for memory: the loop is pipelined, with the loads of the next steps under way.

Memory traffic of N = outer * length * inner elements, in words of the input's size, and floating-point operations::

    forward     3 N (a, b; h)                  2 N
    backward    5 N (grad, a, h; da, db)       3 N

What compiled torch moves. It has no recurrence. A loop over the time is `length` launches one after the other (an unrolled
graph of that many steps): 4 us each are 16 ms at length 4096, where 8 * 4096 channels in float32 move 1.6 GB here, 0.5 ms.
The scan by doubling takes log2(length) sweeps of 4 N, 48 N at 4096, and keeps 2 N of each sweep for the backward pass, 24 N.
The kernel earns its place: 16 in time and 8 in memory against doubling (it keeps a, h and b's gradient), 30 in time against
the loop.
"""

import torch
import triton
import triton.language as tl

from kernels._launch import check_tensor

BLOCK = 64  # channels of a program, one warp: steps are sequential, so more programs, not larger ones


@triton.jit
def _place(program, outer, inner, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr):
    """Indices of a program's channels, (BLOCK_O, 1) and (1, BLOCK_I), and whether they are there."""
    blocks = tl.cdiv(inner, BLOCK_I)
    row = (program // blocks).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)[:, None]
    column = (program % blocks).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)[None, :]
    return row, column, (row < outer) & (column < inner)


@triton.jit
def _forward_kernel(
    decay, inputs, initial, states, outer, length, inner,
    stride_ao, stride_at, stride_ai, stride_bo, stride_bt, stride_bi, stride_ho, stride_ht, stride_hi,
    stride_so, stride_si,
    HAS_INITIAL: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row, column, ok = _place(tl.program_id(0), outer, inner, BLOCK_O, BLOCK_I)
    decay += row * stride_ao + column * stride_ai
    inputs += row * stride_bo + column * stride_bi
    states += row * stride_ho + column * stride_hi
    state = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    if HAS_INITIAL:
        state += tl.load(initial + row * stride_so + column * stride_si, mask=ok, other=0.0).to(tl.float32)
    zero = tl.zeros((1, 1), dtype=tl.int64)
    for t in tl.range(0, length, num_stages=STAGES):
        step = zero + t
        a = tl.load(decay + step * stride_at, mask=ok, other=0.0).to(tl.float32)
        b = tl.load(inputs + step * stride_bt, mask=ok, other=0.0).to(tl.float32)
        state = a * state + b
        tl.store(states + step * stride_ht, state.to(states.dtype.element_ty), mask=ok)


@triton.jit
def _backward_kernel(
    decay, states, grad, initial, d_decay, d_inputs, d_initial, outer, length, inner,
    stride_ao, stride_at, stride_ai, stride_ho, stride_ht, stride_hi, stride_go, stride_gt, stride_gi,
    stride_do, stride_dt, stride_di, stride_so, stride_si,
    HAS_INITIAL: tl.constexpr, NEED_DECAY: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row, column, ok = _place(tl.program_id(0), outer, inner, BLOCK_O, BLOCK_I)
    decay += row * stride_ao + column * stride_ai
    states += row * stride_ho + column * stride_hi
    grad += row * stride_go + column * stride_gi
    place = row * stride_do + column * stride_di  # of both gradients
    first = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    if HAS_INITIAL:
        first += tl.load(initial + row * stride_so + column * stride_si, mask=ok, other=0.0).to(tl.float32)
    reaching = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)  # a_{t+1} g_{t+1}
    zero = tl.zeros((1, 1), dtype=tl.int64)
    for t in tl.range(0, length, num_stages=STAGES):
        step = zero + (length - 1 - t)
        g = tl.load(grad + step * stride_gt, mask=ok, other=0.0).to(tl.float32) + reaching
        a = tl.load(decay + step * stride_at, mask=ok, other=0.0).to(tl.float32)
        tl.store(d_inputs + place + step * stride_dt, g.to(d_inputs.dtype.element_ty), mask=ok)
        if NEED_DECAY:
            before = tl.load(states + (step - 1) * stride_ht, mask=ok & (step > 0), other=0.0).to(tl.float32)
            before = tl.where(step > 0, before, first)
            tl.store(d_decay + place + step * stride_dt, (g * before).to(d_inputs.dtype.element_ty), mask=ok)
        reaching = a * g
    tl.store(d_initial + row * inner + column, reaching.to(d_initial.dtype.element_ty), mask=ok)


def _shape(tensor, inner) -> dict:
    """Channels of a program and depth of the pipeline."""
    columns = min(BLOCK, triton.next_power_of_2(inner))
    shape = dict(BLOCK_O=BLOCK // columns, BLOCK_I=columns, STAGES=8)
    return shape | (dict(num_warps=1) if tensor.is_cuda else {})


def _check(decay, inputs, initial, name="inputs", **more):
    check_tensor("decay", decay, "outer, length, inner")
    check_tensor(name, inputs, "outer, length, inner", ("decay", decay))
    for other, tensor in more.items():
        check_tensor(other, tensor, "outer, length, inner", ("decay", decay))
    for other, tensor in ((name, inputs), *more.items()):
        if tensor.shape != decay.shape:
            raise ValueError(f"{other} must be {tuple(decay.shape)}, as decay, got {tuple(tensor.shape)}")
    if initial is not None:
        check_tensor("initial", initial, "outer, inner", ("decay", decay))
        if initial.shape != (decay.shape[0], decay.shape[2]):
            raise ValueError(
                f"initial must be (outer, inner) of decay {tuple(decay.shape)}, got {tuple(initial.shape)}"
            )


def _grid(shape, outer, inner) -> tuple[int]:
    return (triton.cdiv(outer, shape["BLOCK_O"]) * triton.cdiv(inner, shape["BLOCK_I"]),)


def linear_scan_forward(decay, inputs, initial=None) -> torch.Tensor:
    """All states of h_t = decay_t h_{t-1} + inputs_t.

    Args:
        decay: (outer, length, inner), any strides, zero among them; float32, bfloat16 or float16.
        inputs: (outer, length, inner), same dtype.
        initial: (outer, inner), same dtype, the state before the first step; None for zeros.

    Returns:
        The states, (outer, length, inner), rounded to the dtype; from step to step they are float32.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit; raised before anything is launched.
    """
    _check(decay, inputs, initial)
    outer, length, inner = decay.shape
    states = torch.empty_like(inputs, memory_format=torch.contiguous_format)
    if states.numel():
        shape = _shape(decay, inner)
        _forward_kernel[_grid(shape, outer, inner)](
            decay, inputs, initial, states, outer, length, inner,
            *decay.stride(), *inputs.stride(), *states.stride(), *((0, 0) if initial is None else initial.stride()),
            HAS_INITIAL=initial is not None, **shape,
        )  # fmt: skip
    return states


def linear_scan_backward(decay, states, grad, initial=None, *, need_decay=True):
    """The gradients with respect to the decays, the inputs and the first state. Arguments as for `linear_scan_forward`.

    Args:
        states: (outer, length, inner), from `linear_scan_forward`.
        grad: (outer, length, inner), gradient with respect to the states, same dtype.
        need_decay: False leaves the decays' gradient out, and the states unread.

    Returns:
        The gradient of `decay` (None unless `need_decay`), that of `inputs`, and that of `initial`, (outer, inner).

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit; raised before anything is launched.
    """
    _check(decay, states, initial, "states", grad=grad)
    outer, length, inner = decay.shape
    d_inputs = torch.empty_like(states, memory_format=torch.contiguous_format)
    d_decay = torch.empty_like(d_inputs) if need_decay else None
    d_initial = torch.empty(outer, inner, dtype=decay.dtype, device=decay.device)
    if d_initial.numel():
        shape = _shape(decay, inner)
        _backward_kernel[_grid(shape, outer, inner)](
            decay, states, grad, initial, d_decay, d_inputs, d_initial, outer, length, inner,
            *decay.stride(), *states.stride(), *grad.stride(), *d_inputs.stride(),
            *((0, 0) if initial is None else initial.stride()),
            HAS_INITIAL=initial is not None, NEED_DECAY=need_decay, **shape,
        )  # fmt: skip
    return d_decay, d_inputs, d_initial
