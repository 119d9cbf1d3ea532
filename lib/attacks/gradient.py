"""Attacks by the gradient of a loss: FGSM, BIM and PGD are one loop with other settings.

Sources: Goodfellow et al. 2015 (arXiv:1412.6572, FGSM), Kurakin et al. 2017 (arXiv:1607.02533, BIM), Madry et al. 2018
(arXiv:1706.06083, PGD).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F


def pgd(
    model: Callable[[torch.Tensor], torch.Tensor],
    inputs: torch.Tensor,
    targets: torch.Tensor,
    *,
    eps: float,
    steps: int = 10,
    step_size: float | None = None,
    norm: str = "linf",
    random_start: bool = True,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    targeted: bool = False,
    loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Projected gradient ascent on the loss, within a ball around each input (Madry et al. 2018, section 2.1).

    The model is used as it is: put it into evaluation mode first if it has dropout or batch statistics. Gradients of its
    parameters are neither made nor changed.

    Args:
        model: from inputs to logits (N, C).
        inputs: (N, ...), floating point, within `bounds`.
        targets: class indices (N,); whatever `loss_fn` takes when one is given.
        eps: radius of the ball, at least 0, in the units of the inputs.
        steps: number of gradient steps, at least 1.
        step_size: length of one step in the norm; `2.5 * eps / steps` when None.
        norm: `"linf"` (steps by the sign) or `"l2"` (steps along the normalised gradient).
        random_start: begin at a point drawn uniformly from the ball instead of at the input.
        bounds: smallest and largest legal value of an input, or None.
        targeted: descend instead, towards `targets`.
        loss_fn: `loss_fn(logits, targets)`, a scalar or one number an input; cross-entropy when None.
        generator: of the random start.

    Returns:
        The perturbed inputs, detached, of the shape and dtype of `inputs`.

    Raises:
        TypeError: inputs that are not floating point.
        ValueError: an option outside its range, targets for another number of inputs, or inputs outside the bounds.
    """
    _check(inputs, targets, eps, steps, step_size, norm, bounds)
    step_size = 2.5 * eps / steps if step_size is None else step_size
    sign = -1.0 if targeted else 1.0
    clean = inputs.detach()
    moved = clean.clone()
    if random_start:
        moved = _clip(clean + _draw(clean, eps, norm, generator), clean, eps, norm, bounds)
    for _ in range(steps):
        moved.requires_grad_(True)
        with torch.enable_grad():
            logits = model(moved)
            # the sum: no input's gradient depends on how many others there are
            loss = (
                F.cross_entropy(logits, targets, reduction="sum")
                if loss_fn is None
                else loss_fn(logits, targets).sum()
            )
            (gradient,) = torch.autograd.grad(loss, moved)
        step = gradient.sign() if norm == "linf" else _unit(gradient)
        moved = _clip(moved.detach() + sign * step_size * step, clean, eps, norm, bounds)
    return moved


def bim(model, inputs, targets, *, eps, steps=10, step_size=None, **options) -> torch.Tensor:
    """The basic iterative method (Kurakin et al. 2017, section 2.2): `pgd` that starts at the input.

    Arguments, result and errors are those of `pgd`; the default step is `eps / steps`, so that the walk can just reach the
    surface of the ball.
    """
    step_size = eps / steps if step_size is None and steps else step_size
    return pgd(
        model, inputs, targets, eps=eps, steps=steps, step_size=step_size, random_start=False, **options
    )


def fgsm(model, inputs, targets, *, eps, **options) -> torch.Tensor:
    """The fast gradient sign method (Goodfellow et al. 2015, section 4): one step of length `eps` from the input.

    Arguments, result and errors are those of `pgd`.
    """
    return pgd(model, inputs, targets, eps=eps, steps=1, step_size=eps, random_start=False, **options)


def _unit(gradient):
    """Each input's gradient at length one; zero stays zero. First by its largest entry, lest tiny squares vanish."""
    largest = gradient.flatten(1).abs().amax(1) if gradient.numel() else gradient.new_zeros(len(gradient))
    largest = largest.reshape(-1, *[1] * (gradient.dim() - 1))
    scaled = torch.where(largest > 0, gradient / largest, 0.0)
    return scaled / _norms(scaled).clamp_min(1e-12)


def _norms(x):
    return x.flatten(1).norm(dim=1).reshape(-1, *[1] * (x.dim() - 1))


def _draw(clean, eps, norm, generator):
    if norm == "linf":
        return (2 * torch.rand(clean.shape, generator=generator, dtype=clean.dtype) - 1).to(
            clean.device
        ) * eps
    direction = torch.randn(clean.shape, generator=generator, dtype=clean.dtype).to(clean.device)
    radius = torch.rand(len(clean), generator=generator, dtype=clean.dtype).to(clean.device)
    radius = radius ** (1 / max(1, clean[0].numel() if len(clean) else 1))
    return eps * radius.reshape(-1, *[1] * (clean.dim() - 1)) * direction / _norms(direction).clamp_min(1e-12)


def _clip(moved, clean, eps, norm, bounds):
    if norm == "linf":
        moved = torch.clamp(moved, clean - eps, clean + eps)
    else:
        change = moved - clean
        moved = clean + change * (eps / _norms(change).clamp_min(1e-12)).clamp_max(1.0)
    return moved if bounds is None else moved.clamp(*bounds)


def check_inputs(inputs, steps, bounds):
    """What every attack asks of its inputs: raises TypeError or ValueError."""
    if not inputs.is_floating_point():
        raise TypeError(f"inputs must be floating point, got {inputs.dtype}")
    if inputs.dim() < 2:
        raise ValueError(f"inputs must be (N, ...), got {tuple(inputs.shape)}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    inside = bounds is None or not inputs.numel() or (bounds[0] <= inputs.min() and inputs.max() <= bounds[1])
    if not inside:
        raise ValueError(
            f"inputs must lie within the bounds {bounds}, got values from {inputs.min():.3g} to {inputs.max():.3g}"
        )


def _check(inputs, targets, eps, steps, step_size, norm, bounds):
    check_inputs(inputs, steps, bounds)
    if len(targets) != len(inputs):
        raise ValueError(
            f"inputs must be (N, ...) with one target each, got {tuple(inputs.shape)} and {len(targets)} targets"
        )
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps must be at least 0 and finite, got {eps}")
    if step_size is not None and not 0 <= step_size < float("inf"):
        raise ValueError(f"step_size must be at least 0 and finite, got {step_size}")
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm must be 'linf' or 'l2', got {norm!r}")
