"""TRADES: accuracy on clean inputs, and predictions that do not change nearby.

Source: Zhang et al. 2019 (arXiv:1901.08573).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from lib.attacks import pgd
from lib.losses._classification import check_reduction, reduce


def trades(
    model: Callable[[torch.Tensor], torch.Tensor],
    inputs: torch.Tensor,
    targets: torch.Tensor,
    *,
    eps: float,
    beta: float = 6.0,
    norm: str = "linf",
    steps: int = 10,
    step_size: float | None = None,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    generator: torch.Generator | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """Cross-entropy at x plus `beta` times the largest divergence from the prediction at x to that nearby.

    With f the softmax of the model and x' in the ball around x (beta is the paper's 1/lambda):

        -log f(x)_y + beta * max over x' of KL(f(x) || f(x')).

    The maximum is sought by `lib.attacks.pgd` on the divergence itself, from a random start in the ball (the authors' code
    starts from a small Gaussian around x, where the divergence has no gradient either). Its value is then
    differentiated through x and x' alike. No label enters the second term.

    Args:
        model: from inputs to logits (N, C). It is used in the mode it is in, the search for x' included.
        inputs: (N, ...), floating point, within `bounds`.
        targets: class indices (N,).
        eps: radius of the ball, at least 0.
        beta: weight of the second term, at least 0.
        norm: `"linf"` or `"l2"`, of the ball.
        steps: gradient steps of the search, at least 1.
        step_size: of the search; `2.5 * eps / steps` when None.
        bounds: smallest and largest legal value of an input, or None.
        generator: of the random start.
        reduction: `"mean"`, `"sum"` or `"none"`.

    Returns:
        A scalar, or one loss an input, (N,).

    Raises:
        TypeError: inputs that are not floating point.
        ValueError: a number outside its range, shapes that do not fit, inputs outside the bounds, an unknown norm or
            reduction.
    """
    check_reduction(reduction)
    if not (math.isfinite(beta) and beta >= 0):
        raise ValueError(f"beta must be finite and at least 0, got {beta}")
    logits = model(inputs)
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(
            f"model must return logits (N, C) for targets (N,), got {tuple(logits.shape)} and {tuple(targets.shape)}"
        )
    here = logits.log_softmax(1)
    fixed = here.detach()
    moved = pgd(
        model, inputs, targets, eps=eps, steps=steps, step_size=step_size, norm=norm, bounds=bounds,
        generator=generator, loss_fn=lambda z, _: _divergence(fixed, z.log_softmax(1)),
    )  # fmt: skip
    change = _divergence(here, model(moved).log_softmax(1))
    return reduce(F.cross_entropy(logits, targets, reduction="none") + beta * change, reduction)


def _divergence(log_p, log_q):
    """KL(p || q) of each row."""
    return (log_p.exp() * (log_p - log_q)).sum(1)
