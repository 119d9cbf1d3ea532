"""Twenty steps of Newton's iteration for the inverses of landmark matrices."""

import torch

SIZES = {
    "cpu": [{"batch": 256, "rows": 49}],
    "cuda": [{"batch": 1024, "rows": 25}, {"batch": 8192, "rows": 49}, {"batch": 32768, "rows": 64}],
}
STEPS = 20


def inputs(device, dtype, batch, rows):
    points = torch.randn(batch, rows, 8, device=device)
    matrix = torch.exp(-torch.cdist(points, points).square() / 4) + torch.eye(rows, device=device)
    return {"matrix": matrix.to(dtype).requires_grad_()}


def peers(device, batch, rows):
    from lib.attention import newton_pinv

    def products(matrix):
        a = matrix.float()
        size = a.abs()
        v = 1.8 * a.mT / (size.sum(-1).amax(-1) * size.sum(-2).amax(-1))[:, None, None]
        for _ in range(STEPS):
            v = 2 * v - v @ (a @ v)
        return v.to(matrix.dtype)

    impl = "triton" if device == "cuda" else "torch"
    return {"torch": products, f"book, {impl}": lambda matrix: newton_pinv(matrix, iters=STEPS, impl=impl)}


def work(element_bytes, batch, rows):
    words = batch * rows**2
    return {
        "forward_bytes": 2 * words * element_bytes,
        "forward_flops": 4 * STEPS * words * rows,
        "backward_bytes": 3 * words * element_bytes,
        "backward_flops": 4 * words * rows,
    }
