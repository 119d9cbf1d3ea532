"""What every kernel checks and chooses before a launch, and the product of two tiles."""

import torch
import triton
import triton.language as tl

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = triton.knobs.runtime.interpret  # as the kernels see it: fixed when triton is imported


@triton.jit
def dot(a, b, accumulator, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """accumulator + a @ b in float32; with UPCAST of float32 copies, since the interpreter multiplies nothing else."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


def dot_options(tensor: torch.Tensor) -> dict:
    """UPCAST and PRECISION of `dot` for operands like `tensor`: float32 follows torch's matmul precision."""
    # the one reading that works after either way of setting it; get_float32_matmul_precision may raise
    exact = tensor.dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision != "tf32"
    return dict(UPCAST=not tensor.is_cuda, PRECISION="ieee" if exact else "tf32")


def check_tensor(name: str, tensor: torch.Tensor, axes: str, like: tuple[str, torch.Tensor] | None = None):
    """Check one input of a kernel.

    Args:
        name: of the argument.
        tensor: the argument.
        axes: its dimensions in words, as `"tokens, dim"`.
        like: name and value of the argument whose dtype and device it must share; None if it is the first.

    Raises:
        TypeError: not a tensor, or a dtype that the kernels do not take or that differs from `like`.
        ValueError: another number of dimensions, or a device where the kernel cannot run.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor ({axes}), got {type(tensor).__name__}")
    if tensor.dim() != len(axes.split(",")):
        raise ValueError(f"{name} must be ({axes}), got {tuple(tensor.shape)}")
    if like is not None and tensor.dtype != like[1].dtype:
        raise TypeError(f"{like[0]} is {like[1].dtype}, {name} must be too, got {tensor.dtype}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}")
    if like is not None and tensor.device != like[1].device:
        raise ValueError(f"{like[0]} is on {like[1].device}, {name} must be too, got {tensor.device}")
    if not tensor.is_cuda and not INTERPRETED:
        raise ValueError(
            f"{name} must be on a CUDA device, got {tensor.device}; set TRITON_INTERPRET=1 before triton "
            "is imported to run the kernel on a CPU"
        )
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        raise ValueError(
            f"{name} is on {tensor.device}: make that the current device, "
            f"torch.cuda.set_device({tensor.device.index})"
        )


def processors(tensor: torch.Tensor) -> int:
    """Streaming multiprocessors of the tensor's GPU; a few in the interpreter."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 4
