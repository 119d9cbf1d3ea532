"""Causal linear attention with a decay per head, in the layout of a model: (batch, length, heads, dim)."""

import importlib.util

import torch

SIZES = {
    "cpu": [{"batch": 1, "length": 2048, "heads": 2, "dim": 64}],
    "cuda": [
        {"batch": 1, "length": 1024, "heads": 8, "dim": 128},
        {"batch": 4, "length": 4096, "heads": 32, "dim": 128},
        {"batch": 1, "length": 16384, "heads": 16, "dim": 128},
    ],
}


def inputs(device, dtype, batch, length, heads, dim):
    slopes = 2.0 ** (-8 * torch.arange(1, heads + 1, device=device, dtype=torch.float64) / heads)
    tensors = {
        name: (
            torch.randn(batch, length, heads, dim, device=device, dtype=dtype) / dim**0.25
        ).requires_grad_()
        for name in "qkv"
    }
    return tensors | {"decay": torch.exp(-slopes)}


def peers(device, batch, length, heads, dim):
    from lib.attention import lightning_attention

    def matrix(q, k, v, decay):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        place = torch.arange(length, device=q.device)
        gap = place[:, None] - place
        mask = decay.float()[:, None, None] ** gap.clamp(min=0) * (gap >= 0)
        return (((q @ k.mT) * mask.to(q.dtype)) @ v).transpose(1, 2)

    def book(q, k, v, decay):
        out = lightning_attention(*(x.transpose(1, 2) for x in (q, k, v)), decay, impl=impl)
        return out.transpose(1, 2)

    impl = "triton" if device == "cuda" else "chunked"
    result = {"torch": matrix, f"book, {impl}": book}
    if device == "cuda" and importlib.util.find_spec("fla"):

        def fla(q, k, v, decay):
            from fla.ops.simple_gla import chunk_simple_gla

            rates = decay.log().float()
            return chunk_simple_gla(q, k, v, g_gamma=rates, scale=1.0)[0]

        result["flash-linear-attention"] = fla
    return result


def work(element_bytes, batch, length, heads, dim):
    from kernels.lightning_attention import CHUNK

    tokens = batch * length * heads
    rows = tokens * dim * element_bytes
    states = tokens * dim * dim // CHUNK * element_bytes
    state_flops, inside_flops = 4 * tokens * dim * dim, 2 * tokens * (CHUNK + 64) * dim  # 64 rows a block
    return {
        "forward_bytes": 6 * rows + 2 * states,
        "forward_flops": state_flops + inside_flops,
        "backward_bytes": 16 * rows + 5 * states,
        "backward_flops": 5 * state_flops // 2 + 3 * inside_flops,
    }
