"""Log-sum-exp of a Gaussian kernel over all pairs of two samples."""

import torch

SIZES = {
    "cpu": [{"rows": 8192, "columns": 8192, "dim": 8}],
    "cuda": [
        {"rows": 4096, "columns": 4096, "dim": 2},
        {"rows": 16384, "columns": 16384, "dim": 16},
        {"rows": 32768, "columns": 32768, "dim": 16},
        {"rows": 16384, "columns": 16384, "dim": 256},
    ],
}


def inputs(device, dtype, rows, columns, dim):
    return {
        "x": torch.randn(rows, dim, device=device, dtype=dtype, requires_grad=True),
        "y": torch.randn(columns, dim, device=device, dtype=dtype, requires_grad=True),
    }


def peers(device, rows, columns, dim):
    from lib.information import gaussian_logsumexp

    def explicit(x, y):
        """By a product, the fast way of torch; it loses small distances of samples far from 0."""
        squares = x.square().sum(1, keepdim=True) + y.square().sum(1) - 2 * x @ y.T
        return (squares.clamp_min(0) * (-0.5 / dim)).logsumexp(1)

    impl = "triton" if device == "cuda" else "blockwise"
    return {
        "torch": explicit,
        f"book, {impl}": lambda x, y: gaussian_logsumexp(x, y, variance=float(dim), impl=impl),
    }


def work(element_bytes, rows, columns, dim):
    tensors = (rows + columns) * dim * element_bytes
    pairs = rows * columns
    chunks = -(-dim // 128)  # a program of the backward pass keeps 128 dimensions
    return {
        "forward_bytes": tensors,
        "forward_flops": 3 * pairs * dim + 8 * pairs,
        "backward_bytes": 3 * tensors,  # read by either launch, gradients written
        "backward_flops": 2 * (chunks * (3 * pairs * dim + 8 * pairs) + 2 * pairs * dim),
    }
