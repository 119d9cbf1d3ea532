"""Cross-entropy of a linear classifier without its logits.

In half precision the kernel and the package cut-cross-entropy leave out tiles of the gradient that are below its rounding. Of
the random inputs here these are most tiles at the two larger sizes, as in a trained model, and few at the smallest.
"""

import importlib.util

import torch
import torch.nn.functional as F

SIZES = {
    "cpu": [
        {"tokens": 512, "dim": 64, "classes": 32768},
        {"tokens": 1024, "dim": 128, "classes": 65536},
    ],
    "cuda": [
        {"tokens": 2048, "dim": 256, "classes": 65536},
        {"tokens": 4096, "dim": 2048, "classes": 128256},
        {"tokens": 8192, "dim": 2304, "classes": 256000},
    ],
}


def inputs(device, dtype, tokens, dim, classes):
    return {
        "hidden": torch.randn(tokens, dim, device=device, dtype=dtype, requires_grad=True),
        "weight": (torch.randn(classes, dim, device=device, dtype=dtype) / dim**0.5).requires_grad_(),
        "targets": torch.randint(classes, (tokens,), device=device),
    }


def peers(device, tokens, dim, classes):
    from lib.losses import linear_cross_entropy

    impl = "triton" if device == "cuda" else "chunked"
    result = {
        "torch": lambda hidden, weight, targets: F.cross_entropy(hidden @ weight.T, targets),
        f"book, {impl}": lambda hidden, weight, targets: linear_cross_entropy(
            hidden, weight, targets, impl=impl
        ),
    }
    if device == "cuda" and importlib.util.find_spec("cut_cross_entropy"):

        def cut(hidden, weight, targets):
            from cut_cross_entropy import linear_cross_entropy

            return linear_cross_entropy(hidden, weight, targets)

        result["cut-cross-entropy"] = cut
    if device == "cuda" and importlib.util.find_spec("liger_kernel"):

        def liger(hidden, weight, targets):
            from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

            return LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, targets)[0]

        result["liger-kernel"] = liger
    return result


def work(element_bytes, tokens, dim, classes):
    tensors = (tokens + classes) * dim * element_bytes
    product = 2 * tokens * classes * dim
    # at the least the tiles (128 x 128) that hold a target; all of them in float32, where nothing is left out
    kept = 1.0 if element_bytes > 2 else 1 - (1 - min(128 / classes, 1)) ** 128
    return {
        "forward_bytes": tensors,
        "forward_flops": product,
        "backward_bytes": 2 * tensors,  # read once more, gradients written
        "backward_flops": round((1 + 2 * kept) * product),  # the logits again, and two products
    }
