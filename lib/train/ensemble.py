"""Several members of one architecture trained at once, as one batch over their weights."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn
from torch.func import functional_call, stack_module_state

from lib.train.fit import progress as progress_bar


def fit_ensemble(
    models: Sequence[nn.Module],
    loss_fn: Callable[..., torch.Tensor],
    data: Sequence[torch.Tensor],
    *,
    optimizer: Callable[[Iterable[torch.Tensor]], torch.optim.Optimizer],
    epochs: int,
    seeds: Sequence[int],
    batch_size: int | None = None,
    schedule: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] | None = None,
    callback: Callable[[Sequence[nn.Module], int], None] | None = None,
    progress: bool = True,
    desc: str = "training",
) -> torch.Tensor:
    """Train models of one architecture in place, each on its own data and in its own order, in one loop.

    Member i ends as `fit(models[i], loss_fn, data of i, ..., seed=seeds[i])` would leave it, up to rounding, but all
    members share each operation, which saves most of what small models spend on overhead.

    Args:
        models: the members; same modules, own weights.
        loss_fn: called as `loss_fn(model, *batch)` with the batch of one member, under `torch.func.vmap`; returns a
            scalar. It may call `model` as often as it likes, but nothing of it besides its `forward`.
        data: tensors of shape (members, n, ...). `x.expand(len(models), *x.shape)` gives all members the same.
        optimizer: makes the optimizer from the stacked parameters, each (members, ...). It has to work number by
            number, as SGD, Adam and AdamW do.
        epochs: how many passes over the data.
        seeds: of the shuffling, one for each member; the same seed means the same order.
        batch_size: all n at once by default. The last batch of a pass may be smaller.
        schedule: makes the scheduler from the optimizer; it is stepped after each step of the optimizer.
        callback: called as `callback(models, epoch)` after each epoch, with the weights as they are then, in eval mode
            and without gradients.
        progress: whether to show a progress bar; TQDM_DISABLE=1 silences it.
        desc: the title of the bar.

    Returns:
        The training losses, (steps, members). The models are left in eval mode.

    Raises:
        ValueError: sizes do not fit together, or a loss is not finite; the message names member and step.
    """
    members = len(models)
    if not members or len(seeds) != members:
        raise ValueError(f"give at least one model and a seed for each, got {members} and {len(seeds)} seeds")
    shapes = [tuple(tensor.shape) for tensor in data]
    if len({shape[:2] for shape in shapes}) != 1 or len(shapes[0]) < 2 or shapes[0][0] != members:
        raise ValueError(f"data must be tensors of shape ({members}, n, ...) with one n, got {shapes}")
    n = shapes[0][1]
    batch_size = n if batch_size is None else batch_size
    if epochs < 1 or batch_size < 1 or n < 1:
        raise ValueError(f"epochs, batch_size and n must be at least 1, got {epochs}, {batch_size} and {n}")

    for model in models:
        model.train()
    weights, buffers = stack_module_state(list(models))
    trained = optimizer([tensor for tensor in weights.values() if tensor.requires_grad])
    scheduler = schedule(trained) if schedule is not None else None
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    rows = torch.arange(members).unsqueeze(1)  # (members, 1)

    def loss_of_one(weights, buffers, *batch):
        return loss_fn(lambda *inputs: functional_call(models[0], (weights, buffers), inputs), *batch)

    losses_of_all = torch.vmap(loss_of_one, randomness="different")
    history = []
    for epoch in progress_bar(range(epochs), desc) if progress else range(epochs):
        order = torch.stack([torch.randperm(n, generator=generator) for generator in generators])
        for index in order.split(batch_size, dim=1):  # (members, batch)
            losses = losses_of_all(weights, buffers, *(tensor[rows, index] for tensor in data))
            if not losses.isfinite().all():
                member = int(losses.isfinite().logical_not().nonzero()[0])
                raise ValueError(
                    f"the loss of member {member} is {losses[member]} at step {len(history) + 1}"
                )
            trained.zero_grad(set_to_none=True)
            losses.sum().backward()  # the members share no weights, so each gets its own gradient
            trained.step()
            if scheduler is not None:
                scheduler.step()
            history.append(losses.detach())
        if callback is not None or epoch + 1 == epochs:
            _hand_back(models, weights, buffers)
        if callback is not None:
            with torch.no_grad():
                callback(models, epoch)
            for model in models:
                model.train()
    for model in models:
        model.eval()
    return torch.stack(history)


@torch.no_grad()
def _hand_back(models, weights, buffers):
    for member, model in enumerate(models):
        model.load_state_dict(
            {name: tensor[member] for name, tensor in (weights | buffers).items()}, strict=False
        )
        model.eval()
