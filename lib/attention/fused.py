"""Attention by the kernels of `kernels.flash_attention` and its relatives: autograd, shapes, and when."""

import torch
from torch.autograd.function import once_differentiable

from lib.backend import choose_impl

_MAX_DIM = 128  # what the kernels take


def fused_impl(
    impl: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, unfit: dict[str, bool], *,
    options: tuple[str, ...] = ("torch", "triton"), cpu: str = "torch",
) -> str:  # fmt: skip
    """Resolve an `impl=` argument of attention, where the kernel does not take everything.

    Args:
        impl: as for `lib.backend.choose_impl`.
        q, k, v: the arguments of the attention.
        unfit: what else the kernel does not take, in words, and whether it was asked for.
        options: what `impl` may be besides "auto".
        cpu: the path without the kernel. "auto" falls back to it.

    Raises:
        ValueError: an unknown `impl`, or `impl="triton"` with something that the kernel does not take.
        RuntimeError: `impl="triton"` where Triton cannot be imported.
    """
    choice = choose_impl(impl, q, options, cpu)
    if choice != "triton":
        return choice
    unfit = {
        f"{q.dtype}": q.dtype not in (torch.float32, torch.bfloat16, torch.float16),
        "tensors of different dtypes": k.dtype != q.dtype or v.dtype != q.dtype,
        f"dims above {_MAX_DIM}": max(q.shape[-1], v.shape[-1]) > _MAX_DIM,
        "dims of 0": min(q.shape[-1], v.shape[-1]) < 1,
    } | unfit
    reasons = [reason for reason, found in unfit.items() if found]
    if reasons and impl == "triton":
        raise ValueError(f"impl='triton' does not take {', '.join(reasons)}; use impl={cpu!r}")
    return cpu if reasons else choice


def with_heads(lead: torch.Size, *tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Tensors (..., length, dim) with leading dimensions that broadcast to `lead`, as (batch, heads, length, dim)."""
    result = []
    for tensor in tensors:
        if tensor is not None:
            tensor = tensor.expand(*lead, *tensor.shape[-2:])
            tensor = tensor.flatten(0, -4) if len(lead) > 2 else tensor[(None,) * (2 - len(lead))]
        result.append(tensor)
    return result


class FlashAttention(torch.autograd.Function):
    """q, k, v (batch, heads, length, dim) and `factor` (batch, heads, queries) or None: the output, and the entropy or None."""

    @staticmethod
    def forward(ctx, q, k, v, factor, entropy, options):
        from kernels.flash_attention import flash_attention_forward

        ctx.set_materialize_grads(False)
        out, lse, entropy = flash_attention_forward(q, k, v, factor=factor, entropy=entropy, **options)
        ctx.save_for_backward(q, k, v, factor, out, lse, entropy)
        ctx.options = options
        return out, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_entropy):
        from kernels.flash_attention import flash_attention_backward

        q, k, v, factor, out, lse, entropy = ctx.saved_tensors
        if grad is None:
            grad = out.new_zeros(()).expand(out.shape)
        needs = ctx.needs_input_grad
        gradients = flash_attention_backward(
            q, k, v, out, lse, grad, entropy=None if grad_entropy is None else entropy, grad_entropy=grad_entropy,
            factor=factor, need_queries=needs[0] or needs[3], need_keys=needs[1] or needs[2], **ctx.options,
        )  # fmt: skip
        return *gradients, None, None


class FlashHopfield(torch.autograd.Function):
    """state and stored (batch, heads, length, dim), `factor` (batch, heads, states): the states after each step."""

    @staticmethod
    def forward(ctx, state, stored, factor, steps):
        from kernels.hopfield_attention import hopfield_forward

        states, lse = hopfield_forward(state, stored, steps=steps, scale=1.0, factor=factor)
        ctx.save_for_backward(state, stored, factor, states, lse)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        from kernels.flash_attention import flash_attention_backward

        state, stored, factor, states, lse = ctx.saved_tensors
        needs = ctx.needs_input_grad
        d_state, d_stored, d_factor = None, None, None
        for step in reversed(range(len(states))):
            above = grad[step] if d_state is None else grad[step] + d_state
            d_state, dk, dv, df = flash_attention_backward(
                state if step == 0 else states[step - 1], stored, stored, states[step], lse[step], above,
                scale=1.0, factor=factor, need_keys=needs[1],
            )  # fmt: skip
            if needs[1]:
                both = dk.float() + dv
                d_stored = both if d_stored is None else d_stored.add_(both)
            d_factor = df if d_factor is None else d_factor + df
        return d_state, None if d_stored is None else d_stored.to(stored.dtype), d_factor, None


class SoftplusAttention(torch.autograd.Function):
    """q, k, v (batch, heads, length, dim), `scale` (queries,): the output."""

    @staticmethod
    def forward(ctx, q, k, v, scale, options):
        from kernels.softplus_attention import softplus_attention_forward

        out, saved = softplus_attention_forward(q, k, v, scale, **options)
        ctx.save_for_backward(q, k, v, scale, out, *saved)
        ctx.options = options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        from kernels.softplus_attention import softplus_attention_backward

        q, k, v, scale, out, *saved = ctx.saved_tensors
        needs = ctx.needs_input_grad
        gradients = softplus_attention_backward(
            q,
            k,
            v,
            scale,
            out,
            saved,
            grad,
            need_queries=needs[0],
            need_keys=needs[1] or needs[2],
            **ctx.options,
        )
        return *gradients, None, None
