"""Softmax of long rows: two sweeps over memory against three."""

import torch

SIZES = {
    "cpu": [{"rows": 64, "columns": 65536}, {"rows": 1, "columns": 1 << 22}],
    "cuda": [
        {"rows": 4096, "columns": 4096},
        {"rows": 4096, "columns": 32768},
        {"rows": 1024, "columns": 262144},
        {"rows": 16, "columns": 1 << 24},
    ],
}


def inputs(device, dtype, rows, columns):
    return {"x": torch.randn(rows, columns, device=device, dtype=dtype, requires_grad=True)}


def peers(device, rows, columns):
    from lib.numerics import three_pass_softmax, two_pass_softmax

    impl = "triton" if device == "cuda" else "torch"
    return {
        "torch": lambda x: torch.softmax(x, -1),
        "three passes": lambda x: three_pass_softmax(x, -1),
        f"book, {impl}": lambda x: two_pass_softmax(x, -1, impl=impl),
    }


def work(element_bytes, rows, columns):
    from kernels.two_pass_softmax import BLOCK

    words = rows * columns * element_bytes
    one_launch = columns <= BLOCK
    return {
        "forward_bytes": (2 if one_launch else 3) * words,
        "forward_flops": 50 * rows * columns,
        "backward_bytes": (3 if one_launch else 5) * words,
        "backward_flops": 5 * rows * columns,
    }
