"""Cross-entropy of a linear classifier without its logits."""

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
        from cut_cross_entropy import linear_cross_entropy as cut

        result["cut-cross-entropy"] = lambda hidden, weight, targets: cut(hidden, weight, targets)
    if device == "cuda" and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        result["liger-kernel"] = lambda hidden, weight, targets: LigerFusedLinearCrossEntropyFunction.apply(
            hidden, weight, targets
        )[0]
    return result


def work(element_bytes, tokens, dim, classes):
    tensors = (tokens + classes) * dim * element_bytes
    product = 2 * tokens * classes * dim
    return {
        "forward_bytes": tensors,
        "forward_flops": product,
        "backward_bytes": 2 * tensors,  # read once more, gradients written
        "backward_flops": 3 * product,  # the logits again, and two products; less where tiles are skipped
    }
