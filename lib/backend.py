"""Which implementation of an operation runs: the Triton kernel or a PyTorch path."""

import torch

import kernels


def choose_impl(impl: str, tensor: torch.Tensor, options: tuple[str, ...], cpu: str = "torch") -> str:
    """Resolve an `impl=` argument.

    `"auto"` means the Triton kernel for CUDA tensors where Triton can be imported, and `cpu`, the best
    PyTorch path, everywhere else. Any other value is returned as it is when `options` has it.

    Raises:
        ValueError: `impl` is neither `"auto"` nor one of `options`.
        RuntimeError: `impl="triton"` was asked for where Triton cannot be imported.
    """
    if impl == "auto":
        return "triton" if tensor.is_cuda and kernels.HAS_TRITON and "triton" in options else cpu
    if impl not in options:
        raise ValueError(f"impl must be 'auto' or one of {options}, got {impl!r}")
    if impl == "triton" and not kernels.HAS_TRITON:
        raise RuntimeError(
            f"impl='triton' needs the package triton, which is not installed; use impl={cpu!r}"
        )
    return impl
