"""Which inputs reach which outputs."""

from collections.abc import Callable

import torch
from torch import nn


def jacobian_support(
    module: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, *, tolerance: float = 0.0
) -> torch.Tensor:
    """Where the Jacobian of a module at one point is not zero.

    A missing path gives an exact zero, so tolerance 0 is right for layers without cancellation; use float64 and a
    random point. A path that is switched off at this point, as by a ReLU, does not count.

    Args:
        module: from one tensor to one tensor; a `torch.nn.Module` must be in eval mode.
        x: the point, floating point.
        tolerance: absolute values up to this count as zero.

    Returns:
        bool, of the shape of the output followed by the shape of `x`.

    Raises:
        ValueError: a module in training mode (batch statistics would join all places), or a negative tolerance.
        TypeError: x is not floating point.
    """
    if isinstance(module, nn.Module) and any(part.training for part in module.modules()):
        raise ValueError("module must be in eval mode: call module.eval() first")
    if tolerance < 0:
        raise ValueError(f"tolerance must not be negative, got {tolerance}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    jacobian = torch.autograd.functional.jacobian(module, x.detach())
    return jacobian.abs() > tolerance
