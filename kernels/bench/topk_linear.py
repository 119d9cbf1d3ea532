"""The second layer of a perceptron whose tokens keep a few neurons: rows gathered by an embedding bag, no kernel needed."""

import torch

SIZES = {
    "cpu": [{"tokens": tokens, "neurons": 16384, "dim": 1024, "kept": 512} for tokens in (1, 8)],
    "cuda": [{"tokens": tokens, "neurons": 16384, "dim": 4096, "kept": 512} for tokens in (1, 8, 64)],
}


def inputs(device, dtype, tokens, neurons, dim, kept):
    return {
        "hidden": torch.randn(tokens, neurons, device=device, dtype=dtype).relu(),
        "weight": torch.randn(neurons, dim, device=device, dtype=dtype) / neurons**0.5,
    }


def peers(device, tokens, neurons, dim, kept):
    from lib.models import TopK, topk_linear

    keep = TopK(kept)
    return {
        "torch": lambda hidden, weight: keep(hidden) @ weight,
        "book, torch": lambda hidden, weight: topk_linear(hidden, weight, kept),
    }


def work(element_bytes, tokens, neurons, dim, kept):
    rows = min(tokens * kept, neurons)
    return {
        "forward_bytes": (tokens * (neurons + dim) + rows * dim) * element_bytes,
        "forward_flops": 2 * tokens * kept * dim,
    }
