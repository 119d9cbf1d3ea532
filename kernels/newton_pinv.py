"""The inverses of many small matrices by Newton's iteration, each matrix in the registers of one program.

V_0 = alpha A^T and V_(k+1) = 2 V_k - V_k (A V_k), alpha = 2 damping / (|A|_1 |A|_inf) (softmax-free attention, Lu et al. 2022,
arXiv 2207.03341). The matrices are those between the landmarks of that attention: 49 rows or so, one for each head of each image.

Memory traffic of one matrix of m rows and `iters` steps, in words, and floating-point operations::

    two batched products a step     7 m^2 iters + 3 m^2     (A V: 2 reads, 1 write; 2 V - V (A V): 3 reads, 1 write)
    here                            2 m^2                   operations: 4 m^3 iters

With the 20 steps of the paper that is 70 times less. Compiled products do not fuse with one another, so they move all of it;
for m = 49 in float32 that takes 0.45 us a matrix at 3 TB/s, and the operations 0.16 us at 60 TFLOP/s. Rounding errors outside
the range of a singular matrix double with every step, so TF32 alone will not do: each product is three TF32 products of
the leading and the remaining digits, which together have those of float32.

The gradient is in terms of V alone, -V^T (dL/dV) V^T: two ordinary products, which stay with the matrix library.
"""

import torch
import triton
import triton.language as tl

from kernels._launch import check_tensor

MAX_ROWS = 64  # two matrices, and what a product needs of them, in registers and shared memory


@triton.jit
def _newton_kernel(
    a_ptr, v_ptr, rows, iters, damping, a_batch, a_row, a_column, SIZE: tl.constexpr, TINY: tl.constexpr
):
    batch = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, SIZE)
    ok = index < rows
    inside = ok[:, None] & ok[None, :]
    wide = index.to(tl.int64)
    where = a_ptr + batch * a_batch + wide[:, None] * a_row + wide[None, :] * a_column
    a = tl.load(where, mask=inside, other=0.0).to(tl.float32)  # rows and columns of zeros stay zeros
    size = tl.abs(a)
    bound = tl.max(tl.sum(size, 1), 0) * tl.max(tl.sum(size, 0), 0)
    v = tl.trans(a) * (2.0 * damping / tl.maximum(bound, TINY))
    for _ in range(iters):
        v = 2.0 * v - tl.dot(v, tl.dot(a, v, input_precision="tf32x3"), input_precision="tf32x3")
    out = v_ptr + batch * rows * rows + index[:, None] * rows + index[None, :]
    tl.store(out, v.to(v_ptr.dtype.element_ty), mask=inside)


def newton_inverse(matrix: torch.Tensor, iters: int = 20, damping: float = 0.9) -> torch.Tensor:
    """V after `iters` steps of Newton's iteration for the inverse of each matrix.

    Args:
        matrix: (batch, m, m) of any strides with m <= `MAX_ROWS`, in float32, bfloat16 or float16; computed in float32.
        iters: the number of steps, 0 or more.
        damping: in (0, 1].

    Returns:
        (batch, m, m) in the dtype of `matrix`, contiguous. A matrix of zeros gives zeros.

    Raises:
        TypeError, ValueError: a wrong dtype, device, shape or option; before anything is launched.
    """
    check_tensor("matrix", matrix, "batch, m, m")
    batch, rows, columns = matrix.shape
    if rows != columns or rows > MAX_ROWS:
        raise ValueError(f"matrix must be (batch, m, m) with m at most {MAX_ROWS}, got {tuple(matrix.shape)}")
    if iters < 0 or not 0 < damping <= 1:
        raise ValueError(f"iters must be at least 0 and damping in (0, 1], got {iters} and {damping}")
    out = torch.empty(matrix.shape, dtype=matrix.dtype, device=matrix.device)
    if out.numel():
        size = max(16, triton.next_power_of_2(rows))
        _newton_kernel[(batch,)](
            matrix, out, rows, iters, float(damping), *matrix.stride(),
            SIZE=size, TINY=torch.finfo(torch.float32).tiny, num_warps=4,
        )  # fmt: skip
    return out
