"""Exact attention with a Gaussian kernel, queries and keys of their own."""

import functools

import torch

SIZES = {
    "cpu": [{"batch": 1, "heads": 1, "length": 4096, "dim": 64}],
    "cuda": [
        {"batch": 4, "heads": 8, "length": 1024, "dim": 64},
        {"batch": 4, "heads": 16, "length": 4096, "dim": 64},
        {"batch": 2, "heads": 16, "length": 4096, "dim": 128},
        {"batch": 1, "heads": 16, "length": 16384, "dim": 64},
    ],
}


def inputs(device, dtype, batch, heads, length, dim):
    shape = (batch, heads, length, dim)
    return {
        name: torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for name in ("q", "k", "v")
    }


@functools.cache
def compiled_flex_attention():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def peers(device, batch, heads, length, dim):
    from lib.attention import gaussian_kernel_attention

    def explicit(q, k, v):
        norms = q.square().sum(-1, keepdim=True) + k.square().sum(-1, keepdim=True).mT
        return torch.exp((norms - 2 * q @ k.mT).clamp_min(0) * (-0.5 * dim**-0.5)) @ v

    impl, name = ("triton", "book, triton") if device == "cuda" else ("torch", "book, blockwise")
    result = {"torch": explicit, name: lambda q, k, v: gaussian_kernel_attention(q, k, v, impl=impl)}
    if device == "cuda":

        def flex(q, k, v, attend=None):
            """Softmax of scale (q.k - |k|^2 / 2), and its denominator multiplied back."""
            from torch.nn.attention.flex_attention import AuxRequest

            attend = attend or compiled_flex_attention()
            scale = dim**-0.5
            half = k.float().square().sum(-1) * (0.5 * scale)
            out, aux = attend(
                q,
                k,
                v,
                score_mod=lambda s, b, h, i, j: s - half[b, h, j],
                scale=scale,
                return_aux=AuxRequest(lse=True),
            )
            size = (aux.lse - q.float().square().sum(-1) * (0.5 * scale)).exp()
            return out * size.unsqueeze(-1).to(out.dtype)

        result["FlexAttention"] = flex
    return result


def work(element_bytes, batch, heads, length, dim):
    tensor = batch * heads * length * dim * element_bytes
    product = 2 * batch * heads * length * length * dim
    return {
        "forward_bytes": 4 * tensor,
        "forward_flops": 2 * product,
        "backward_bytes": 11 * tensor,
        "backward_flops": 7 * product,  # distances and g.v twice, and a product for each gradient
    }
