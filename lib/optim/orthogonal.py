"""Orthogonalising a matrix by polynomial steps: U V^T of M = U S V^T without a singular value decomposition."""

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch

from lib.backend import choose_impl

MUON_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""One triple for all shapes (Muon, Jordan et al. 2024)."""

ROOT_COEFFICIENTS = {
    (2048, 2048): (3.4916, -4.8224, 2.1095),
    (2048, 3072): (3.4509, -4.5790, 1.9325),
    (2048, 8192): (2.9794, -3.6674, 1.6207),
    (2048, 16384): (3.1943, -3.8221, 1.5322),
}
"""Triples for five steps by shape, the smaller side first (ROOT, arXiv 2511.20626, released code)."""


def newton_schulz(
    matrix: torch.Tensor,
    coefficients: Sequence[float] | Sequence[Sequence[float]] = MUON_COEFFICIENTS,
    *,
    steps: int = 5,
    impl: str = "auto",
) -> torch.Tensor:
    """Newton-Schulz iteration towards U V^T, the nearest matrix with all singular values 1, of M = U S V^T.

    X_0 = M / |M|_F and X_(k+1) = a X + b X X^T X + c (X X^T)^2 X. Singular vectors stay, and each singular value follows
    s <- a s + b s^3 + c s^5. Muon's coefficients lift small values fast and then waver around 1, between about 0.7 and 1.2;
    (1.5, -0.5, 0) converges, slowly. A matrix of zeros stays zero. Tall matrices are transposed for the while. Meant for
    optimizers: there is no gradient.

    Args:
        matrix: (..., m, n), floating point; computed in its own dtype. Leading dimensions are a batch of one shape.
        coefficients: (a, b, c) for all steps, or one such triple a step.
        steps: number of steps, 0 or more; with a triple a step it must be their number.
        impl: `"torch"` takes three products a step; `"triton"` computes half of the two that are symmetric; `"auto"` is the
            kernel on CUDA, except in float64.

    Returns:
        (..., m, n) in the dtype of `matrix`.

    Raises:
        TypeError: a tensor that is not floating point, or float64 for the kernel.
        ValueError: fewer than two dimensions, coefficients that are no triples, a number of steps that does not fit.
    """
    if not matrix.is_floating_point():
        raise TypeError(f"matrix must be floating point, got {matrix.dtype}")
    if matrix.ndim < 2:
        raise ValueError(f"matrix must be (..., m, n), got {tuple(matrix.shape)}")
    triples = torch.as_tensor(coefficients, dtype=torch.float64)
    if triples.ndim == 1:
        triples = triples.expand(max(steps, 0), -1)
    if steps < 0 or triples.shape != (steps, 3):
        raise ValueError(
            f"coefficients must be (a, b, c), or one such triple for each of the {steps} steps, got {coefficients!r}"
        )
    kernel = choose_impl(impl, matrix, options=("torch", "triton")) == "triton"
    if kernel and matrix.dtype == torch.float64:
        if impl == "triton":
            raise TypeError("the kernel takes float16, bfloat16 or float32; use impl='torch' for float64")
        kernel = False
    step = _step
    if kernel:
        from kernels.newton_schulz import newton_schulz_step as step
    own_dtype = nullcontext() if matrix.is_meta else torch.autocast(matrix.device.type, enabled=False)
    with torch.no_grad(), own_dtype:
        x = matrix.detach().reshape(math.prod(matrix.shape[:-2]), *matrix.shape[-2:])
        tall = x.shape[-2] > x.shape[-1]
        x = x.mT if tall else x
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=wide)
        x = (x / norm.clamp_min(torch.finfo(wide).tiny)).to(matrix.dtype)
        for a, b, c in triples.tolist():
            x = step(x, a, b, c)
        return (x.mT if tall else x).reshape(matrix.shape)


def _step(x, a, b, c):
    gram = x @ x.mT
    return torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
