"""The training loop of the book."""

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from tqdm import tqdm


@dataclass
class History:
    """What happened during `fit`.

    Attributes:
        loss: the training loss of each step.
        validation: what `validate` returned after each round.
        rounds: the number of steps done at the end of each round.
        best_step: the number of steps after which the validation was lowest; None without validation.
    """

    loss: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    best_step: int | None = None


def fit(
    model: nn.Module,
    loss_fn: Callable[..., torch.Tensor],
    data: Sequence[torch.Tensor] | Iterable,
    *,
    optimizer: torch.optim.Optimizer,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
    clip_norm: float | None = None,
    seed: int = 0,
    validate: Callable[[nn.Module], float] | None = None,
    every: int | None = None,
    patience: int | None = None,
    callbacks: Sequence[Callable[[nn.Module, History], None]] = (),
    progress: bool = True,
    desc: str = "training",
) -> History:
    """Train `model` in place.

    Training goes in rounds: a round is one pass over `data`, or `every` steps. After each round the model is put
    into eval mode, validated and shown to the callbacks. It is left in eval mode at the end.

    Args:
        model: any module.
        loss_fn: called as `loss_fn(model, *batch)`, returns a scalar.
        data: a tuple or list of tensors with equal first dimension, which are shuffled and cut into batches of
            `batch_size` for each pass; or an iterable of batches (a DataLoader, a generator), where a batch is a
            tensor or a tuple of them.
        optimizer: over the parameters to train.
        epochs: how many passes over `data`; give either this or `steps`.
        steps: how many steps, with as many passes as they take.
        batch_size: for tensors only; all of them at once by default. The last batch of a pass may be smaller.
        schedule: a scheduler of torch.optim, stepped after each step of the optimizer.
        clip_norm: the largest norm of the gradient of all parameters together.
        seed: of the shuffling. Dropout and the like use the global random state, which the loop does not seed.
        validate: called as `validate(model)` without gradients, returns a number, lower is better.
        every: the length of a round in steps.
        patience: stop after so many rounds without a new lowest validation, and go back to the weights of the lowest
            one (also when training reaches its end).
        callbacks: each called as `callback(model, history)` after a round, without gradients.
        progress: whether to show a progress bar; the environment variable TQDM_DISABLE=1 silences all of them.
        desc: the title of the bar.

    Returns:
        The `History`.

    Raises:
        ValueError: the arguments do not fit together, `data` runs dry before the last step, or the loss or the
            validation is not finite (the message names the step).
    """
    for name, count in {"epochs": epochs, "steps": steps, "every": every, "patience": patience}.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if (epochs is None) == (steps is None):
        raise ValueError("give either epochs or steps")
    if patience is not None and validate is None:
        raise ValueError("patience needs validate, which says when the model gets better")
    batches, total = _batches(data, epochs, steps, batch_size, seed)
    history, best, best_round, weights = History(), math.inf, 0, None
    model.train()
    for step, (batch, pass_ends, last) in enumerate(_bar(batches, progress, desc, total), 1):
        optimizer.zero_grad(set_to_none=True)
        loss = loss_fn(model, *batch)
        history.loss.append(_finite(loss, "loss", step))
        loss.backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        if schedule is not None:
            schedule.step()
        if not last and not (pass_ends if every is None else step % every == 0):
            continue

        model.eval()
        history.rounds.append(step)
        with torch.no_grad():
            if validate is not None:
                history.validation.append(_finite(validate(model), "validation", step))
                if history.validation[-1] < best:
                    best, best_round, history.best_step = history.validation[-1], len(history.rounds), step
                    if patience is not None:
                        weights = copy.deepcopy(model.state_dict())
            for callback in callbacks:
                callback(model, history)
        model.train()
        if patience is not None and len(history.rounds) - best_round >= patience:
            break
    if weights is not None:
        model.load_state_dict(weights)
    model.eval()
    return history


def progress(iterable: Iterable, desc: str = "", total: int | None = None) -> Iterable:
    """`iterable` with a progress bar on standard error, silenced by the environment variable TQDM_DISABLE=1."""
    return tqdm(iterable, desc=desc, total=total, leave=False)


def accuracy(model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor, batch_size: int = 4096) -> float:
    """The share of `inputs` whose largest logit is that of the label. The model is put into its eval mode meanwhile.

    Args:
        model: maps a batch of inputs to logits, (batch, num_classes).
        inputs: (n, ...).
        labels: (n,).
        batch_size: how many inputs go through the model at a time.

    Raises:
        ValueError: no inputs, or as many labels as inputs are not there.
    """
    if len(inputs) != len(labels) or not len(labels):
        raise ValueError(
            f"got {len(inputs)} inputs and {len(labels)} labels; both need the same length, above 0"
        )
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            hits = sum(
                (model(x).argmax(-1) == y).sum().item()
                for x, y in zip(inputs.split(batch_size), labels.split(batch_size), strict=True)
            )
    finally:
        model.train(was_training)
    return hits / len(labels)


def _batches(data, epochs, steps, batch_size, seed) -> tuple[Iterator[tuple[tuple, bool, bool]], int | None]:
    """The batches, each with whether it ends a pass and whether it is the last of all, and their number if known."""
    tensors = isinstance(data, tuple | list) and all(isinstance(item, torch.Tensor) for item in data)
    if isinstance(data, torch.Tensor) or (tensors and len({len(tensor) for tensor in data}) != 1):
        raise ValueError(
            "data must be a tuple of tensors with equal first dimension, or an iterable of batches"
        )
    if batch_size is not None and (not tensors or batch_size < 1):
        raise ValueError(f"batch_size must be at least 1 and is for tensors only, got {batch_size}")
    if tensors and not len(data[0]):
        raise ValueError("data holds no examples")
    batch_size = (batch_size or len(data[0])) if tensors else None
    per_pass = -(-len(data[0]) // batch_size) if tensors else len(data) if hasattr(data, "__len__") else None
    total = steps if steps is not None else per_pass and epochs * per_pass
    generator = torch.Generator().manual_seed(seed)
    return _passes(data, epochs, steps, batch_size, generator), total


def _passes(data, epochs, steps, batch_size, generator):
    done = 0
    for epoch in itertools.count(1):
        one_pass = _shuffled(data, batch_size, generator) if batch_size else iter(data)
        if steps is not None:  # never ask a generator for more than is used
            one_pass = itertools.islice(one_pass, steps - done)
        batch = next(one_pass, None)
        if batch is None:
            raise ValueError(
                f"data ran dry after {done} steps; give an iterable that can start again, or fewer steps"
            )
        while batch is not None:
            done += 1
            following = next(one_pass, None)
            pass_ends = following is None
            last = pass_ends and (epoch == epochs or done == steps)
            yield (batch if isinstance(batch, tuple | list) else (batch,)), pass_ends, last
            batch = following
        if last:
            return


def _shuffled(tensors, batch_size, generator):
    for index in torch.randperm(len(tensors[0]), generator=generator).split(batch_size):
        yield tuple(tensor[index.to(tensor.device)] for tensor in tensors)


def _bar(batches, shown, desc, total):
    return progress(batches, desc, total) if shown else batches


def _finite(value, what: str, step: int) -> float:
    value = float(value.detach() if isinstance(value, torch.Tensor) else value)
    if not math.isfinite(value):
        raise ValueError(
            f"the {what} is {value} at step {step}; lower the learning rate or look at the inputs"
        )
    return value
