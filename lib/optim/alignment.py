"""Two losses on one network, of which the first must not be hindered: projection of the second one's gradient.

Reference: Yang et al., Dual-Head Knowledge Distillation, 2024, arXiv:2411.08937.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch


class Alignment(NamedTuple):
    """What `align_gradients` and `aligned_backward` found.

    Attributes:
        before: cosine of the two gradients; 0 where one of them vanishes.
        after: cosine of the primary gradient and the projected auxiliary one; never negative beyond rounding.
    """

    before: torch.Tensor
    after: torch.Tensor


def align_gradients(
    primary: Sequence[torch.Tensor], auxiliary: Sequence[torch.Tensor]
) -> tuple[tuple[torch.Tensor, ...], Alignment]:
    """Take from the auxiliary gradient what works against the primary one.

    With g and h the two gradients, each all parameters as one vector: h becomes h - min(0, <g, h>) / <g, g> g. The primary
    gradient is left as it is; that is what sets this apart from projecting both. Works under `torch.func.vmap`.

    Args:
        primary: gradients of the loss that counts, a tensor for each parameter.
        auxiliary: gradients of the other loss, in the same order and shapes.

    Returns:
        The projected auxiliary gradients, and an `Alignment`.

    Raises:
        ValueError: nothing given, or shapes that do not fit.
    """
    primary, auxiliary = tuple(primary), tuple(auxiliary)
    if not primary or [g.shape for g in primary] != [h.shape for h in auxiliary]:
        raise ValueError(
            f"primary and auxiliary must hold gradients of the same parameters, got shapes "
            f"{[tuple(g.shape) for g in primary]} and {[tuple(h.shape) for h in auxiliary]}"
        )
    inner, square = _dot(primary, auxiliary), _dot(primary, primary)
    factor = inner.clamp(max=0) / torch.where(square > 0, square, 1.0)
    projected = tuple(h - (factor * g).to(h.dtype) for g, h in zip(primary, auxiliary, strict=True))
    before = _cosine(inner, square, _dot(auxiliary, auxiliary))
    after = _cosine(_dot(primary, projected), square, _dot(projected, projected))
    return projected, Alignment(before, after)


def aligned_backward(losses: Sequence[torch.Tensor], params: Iterable[torch.nn.Parameter]) -> Alignment:
    """In place of `(primary + auxiliary).backward()`: the auxiliary gradient is projected before it is added.

    Two backward passes. A parameter that a loss does not reach has the gradient zero there, and still takes part. What
    `.grad` held is replaced, so that no `zero_grad` is needed; parameters that do not require gradients are skipped.

    Args:
        losses: the primary and the auxiliary loss, scalars, the latter with its weight.
        params: of the network.

    Returns:
        An `Alignment`, 0-dimensional tensors.

    Raises:
        ValueError: not two scalar losses, or no parameter that requires a gradient.
    """
    losses = tuple(losses)
    if len(losses) != 2 or any(loss.dim() for loss in losses):
        raise ValueError(
            f"losses must be two scalars, the primary and the auxiliary, got {[tuple(loss.shape) for loss in losses]}"
        )
    params = [parameter for parameter in params if parameter.requires_grad]
    if not params:
        raise ValueError("params holds no parameter that requires a gradient")
    primary, auxiliary = (
        torch.autograd.grad(loss, params, retain_graph=True, materialize_grads=True) for loss in losses
    )
    projected, alignment = align_gradients(primary, auxiliary)
    for parameter, g, h in zip(params, primary, projected, strict=True):
        parameter.grad = g + h
    return alignment


def _dot(a, b):
    """Inner product of two lists of tensors, in at least float32."""
    wide = torch.promote_types(a[0].dtype, torch.float32)
    return sum((x.to(wide) * y.to(wide)).sum() for x, y in zip(a, b, strict=True))


def _cosine(inner, square_a, square_b):
    length = (square_a * square_b).sqrt()
    return torch.where(length > 0, inner / torch.where(length > 0, length, 1.0), 0.0)
