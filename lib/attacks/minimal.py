"""Attacks that look for the nearest adversarial example instead of the worst one within a ball.

Sources: Moosavi-Dezfooli et al. 2016 (arXiv:1511.04599, DeepFool), Carlini and Wagner 2017 (arXiv:1608.04644, C&W).
"""

from collections.abc import Callable

import torch

from lib.attacks.gradient import check_inputs


def deepfool(
    model: Callable[[torch.Tensor], torch.Tensor],
    inputs: torch.Tensor,
    *,
    steps: int = 50,
    overshoot: float = 0.02,
    bounds: tuple[float, float] | None = (0.0, 1.0),
) -> torch.Tensor:
    """Step to the nearest decision boundary of the linearised model until the prediction changes (DeepFool, algorithm 2).

    For each other class k, with `w_k` the difference of the gradients and `f_k` that of the logits to the predicted
    class, the boundary is `|f_k| / |w_k|` away; the nearest one is taken. The steps are summed up, and the sum is
    lengthened by `overshoot` to cross the boundary. One step takes as many backward passes as there are classes.

    Args:
        model: from inputs to logits (N, C), C at least 2, in evaluation mode.
        inputs: (N, ...), floating point. They are led away from the model's own prediction.
        steps: at most so many, at least 1.
        overshoot: at least 0.
        bounds: smallest and largest legal value of an input, or None; the result is clipped to them.

    Returns:
        The perturbed inputs, detached. Where the prediction never changed it is the last point reached.

    Raises:
        TypeError: inputs that are not floating point.
        ValueError: an option out of its range, or inputs outside the bounds.
    """
    check_inputs(inputs, steps, bounds)
    if not overshoot >= 0:
        raise ValueError(f"overshoot must be at least 0, got {overshoot}")
    clean = inputs.detach()
    moved, total = clean.clone(), torch.zeros_like(clean)
    with torch.no_grad():
        start = model(clean).argmax(1) if len(clean) else None
    active = torch.arange(len(clean), device=clean.device)
    for _ in range(steps):
        if not len(active):
            break
        point, own = moved[active].requires_grad_(True), start[active].unsqueeze(1)
        with torch.enable_grad():
            logits = model(point)
            gradients = torch.stack(
                [
                    torch.autograd.grad(column.sum(), point, retain_graph=True)[0].flatten(1)
                    for column in logits.unbind(1)
                ],
                1,
            )  # (n, C, d)
        logits = logits.detach()
        rows = torch.arange(len(active), device=clean.device)
        w = gradients - gradients[rows, own[:, 0]].unsqueeze(1)
        f = logits - logits.gather(1, own)
        away = f.abs() / w.norm(dim=2).clamp_min(1e-12)
        away = away.scatter(1, own, torch.inf)
        nearest = away.argmin(1)
        normal = w[rows, nearest]
        # 1e-4 as in the authors' code: at the boundary itself the step would vanish
        length = (f[rows, nearest].abs() + 1e-4) / normal.square().sum(1).clamp_min(1e-12)
        total[active] += (length.unsqueeze(1) * normal).reshape(point.shape)
        step = clean[active] + (1 + overshoot) * total[active]
        moved[active] = step if bounds is None else step.clamp(*bounds)
        with torch.no_grad():
            active = active[model(moved[active]).argmax(1) == start[active]]
    return moved


def cw_l2(
    model: Callable[[torch.Tensor], torch.Tensor],
    inputs: torch.Tensor,
    targets: torch.Tensor,
    *,
    confidence: float = 0.0,
    steps: int = 100,
    step_size: float = 0.01,
    search_steps: int = 5,
    initial_constant: float = 0.1,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> torch.Tensor:
    """The L2 attack of Carlini and Wagner (section VI-A), untargeted.

    Minimises `|x' - x|^2 + c max(Z_t - max_(j != t) Z_j, -confidence)` over w, where x' runs through the bounds as a tanh
    of w and Z are the logits, with Adam. Each input has its own c, found by bisection: smaller after a success,
    ten times larger while there is none.

    Args:
        model: from inputs to logits (N, C), C at least 2, in evaluation mode.
        inputs: (N, ...), floating point, within `bounds`.
        targets: the true classes (N,), to be left.
        confidence: by how much the wrong logit must lead, at least 0.
        steps: of Adam for each c, at least 1.
        step_size: of Adam.
        search_steps: how many c are tried, at least 1.
        initial_constant: the first c, positive.
        bounds: smallest and largest legal value of an input.

    Returns:
        The nearest adversarial input found, detached; the input itself where none was found.

    Raises:
        TypeError: inputs that are not floating point.
        ValueError: an option out of its range, targets for another number of inputs, or inputs outside the bounds.
    """
    check_inputs(inputs, steps, bounds)
    if len(targets) != len(inputs):
        raise ValueError(f"give one target for each of the {len(inputs)} inputs, got {len(targets)}")
    if bounds is None or not bounds[0] < bounds[1]:
        raise ValueError(f"bounds must be two increasing numbers, got {bounds}")
    if search_steps < 1 or not initial_constant > 0 or not step_size > 0 or not confidence >= 0:
        raise ValueError(
            "search_steps, initial_constant and step_size must be positive, confidence at least 0"
        )
    clean = inputs.detach()
    best = clean.clone()
    if not len(clean):
        return best
    low, high = bounds
    # the factor keeps atanh finite at pixels that are exactly black or white
    start = torch.atanh((2 * (clean - low) / (high - low) - 1) * 0.999999)
    best_distance = torch.full((len(clean),), torch.inf, dtype=clean.dtype, device=clean.device)
    constant = torch.full_like(best_distance, initial_constant)
    lower, upper = torch.zeros_like(constant), torch.full_like(constant, torch.inf)
    column = targets.unsqueeze(1)
    for _ in range(search_steps):
        w = start.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([w], lr=step_size)
        succeeded = torch.zeros(len(clean), dtype=torch.bool, device=clean.device)
        for step in range(steps + 1):
            with torch.enable_grad():
                moved = (torch.tanh(w) + 1) / 2 * (high - low) + low
                logits = model(moved)
                other = logits.scatter(1, column, -torch.inf).amax(1)
                lead = logits.gather(1, column)[:, 0] - other
                distance = (moved - clean).flatten(1).square().sum(1)
                loss = distance + constant * lead.clamp_min(-confidence)
            with torch.no_grad():
                found = (lead < 0) & (lead <= -confidence)
                succeeded |= found
                better = found & (distance < best_distance)
                best[better], best_distance[better] = moved[better], distance[better]
            if step < steps:
                # each input has its own gradient; Adam works number by number, so they do not mix
                (w.grad,) = torch.autograd.grad(loss.sum(), w)
                optimizer.step()
        upper = torch.where(succeeded, torch.minimum(upper, constant), upper)
        lower = torch.where(succeeded, lower, torch.maximum(lower, constant))
        constant = torch.where(upper.isfinite(), (lower + upper) / 2, 10 * constant)
    return best.detach()
