"""Where in a network two losses disagree."""

from collections.abc import Iterable, Mapping

import torch


def gradient_conflict(
    model: torch.nn.Module,
    loss_a: torch.Tensor,
    loss_b: torch.Tensor,
    groups: Mapping[str, Iterable[torch.nn.Parameter]] | None = None,
) -> dict[str, float]:
    """The cosine of the gradients of two losses, one for each part of a network.

    Negative: a step for one loss undoes what the other wants there. The losses' graphs are kept, and no `.grad` is
    touched.

    Args:
        model: the network that both losses were computed with.
        loss_a: a scalar.
        loss_b: another.
        groups: parts of the network as collections of parameters; by default the direct children that have parameters
            with gradients.

    Returns:
        A dictionary from part to cosine; NaN where a loss does not reach the part, or has no gradient there.

    Raises:
        ValueError: a loss that is not a scalar, or a part without parameters.
    """
    if loss_a.dim() or loss_b.dim():
        raise ValueError(f"losses must be scalars, got {tuple(loss_a.shape)} and {tuple(loss_b.shape)}")
    if groups is None:
        groups = {name: child.parameters() for name, child in model.named_children()}
        groups = {name: [p for p in parameters if p.requires_grad] for name, parameters in groups.items()}
        groups = {name: parameters for name, parameters in groups.items() if parameters}
    groups = {name: list(parameters) for name, parameters in groups.items()}
    if not groups or not all(groups.values()):
        raise ValueError(f"every part needs parameters that require gradients, got {list(groups)}")
    every = [parameter for parameters in groups.values() for parameter in parameters]
    gradients = [
        torch.autograd.grad(loss, every, retain_graph=True, materialize_grads=True)
        for loss in (loss_a, loss_b)
    ]
    cosines, start = {}, 0
    for name, parameters in groups.items():
        a, b = (
            torch.cat([g.flatten().double() for g in gradient[start : start + len(parameters)]])
            for gradient in gradients
        )
        cosines[name] = (a @ b / (a.norm() * b.norm())).item()  # 0 / 0 is NaN
        start += len(parameters)
    return cosines
