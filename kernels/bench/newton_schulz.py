"""Five Newton-Schulz steps on a batch of matrices of one shape."""

import torch

SIZES = {
    "cpu": [{"batch": 4, "rows": 256, "columns": 256}, {"batch": 1, "rows": 512, "columns": 2048}],
    "cuda": [
        {"batch": 48, "rows": 768, "columns": 768},
        {"batch": 24, "rows": 2048, "columns": 2048},
        {"batch": 24, "rows": 2048, "columns": 8192},
        {"batch": 4, "rows": 5120, "columns": 5120},
    ],
}
STEPS = 5


def inputs(device, dtype, batch, rows, columns):
    return {"matrix": torch.randn(batch, rows, columns, device=device, dtype=dtype)}


def peers(device, batch, rows, columns):
    from lib.optim import MUON_COEFFICIENTS, newton_schulz

    def products(matrix):
        x = matrix / torch.linalg.matrix_norm(matrix, keepdim=True)
        for _ in range(STEPS):
            a, b, c = MUON_COEFFICIENTS
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x

    impl = "triton" if device == "cuda" else "torch"
    return {"torch": products, f"book, {impl}": lambda matrix: newton_schulz(matrix, steps=STEPS, impl=impl)}


def work(element_bytes, batch, rows, columns):
    small, large = sorted((rows, columns))
    words = 4 * small * large + 4 * small**2
    return {
        "forward_bytes": batch * STEPS * words * element_bytes,
        "forward_flops": batch * STEPS * (3 * small**2 * large + small**3),
    }
