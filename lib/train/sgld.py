"""Langevin sampling: gradient descent with the noise that turns it into a sampler of the posterior."""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from lib.train.fit import progress as bar


def sgld(
    model: nn.Module,
    loss_fn: Callable[..., torch.Tensor],
    data: Sequence[torch.Tensor],
    *,
    step: float,
    num_samples: int,
    thin: int = 1,
    burn_in: int = 0,
    prior_precision: float = 0.0,
    temperature: float = 1.0,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> list[dict[str, torch.Tensor]]:
    """Stochastic gradient Langevin dynamics (Welling and Teh, 2011): samples of the posterior over the parameters.

    Each step is `t <- t - step * grad U(t) + sqrt(2 * step * temperature) * N(0, I)` with the negative log posterior
    `U(t) = n * loss(t) + prior_precision / 2 * |t|^2`. The loss is a MEAN over examples, and `n` turns it into the sum
    that a likelihood needs: without it the temperature would be `n`. The law of the samples is the posterior to first
    order in `step`.

    Args:
        model: its parameters are the start, and hold the last state afterwards. It is sampled in train mode as given;
            layers that are random or keep batch statistics do not belong here.
        loss_fn: called as `loss_fn(model, *batch)`, returns the mean negative log likelihood of the batch in nats.
        data: tensors with equal first dimension `n`.
        step: step size, in units of squared parameters.
        num_samples: number of states to return.
        thin: steps between two of them.
        burn_in: steps before the first of them.
        prior_precision: of an isotropic Gaussian prior with mean zero; 0 is the flat prior.
        temperature: 1 samples the posterior, 0 is gradient descent.
        batch_size: examples in each gradient, drawn without replacement pass by pass; None takes all.
        seed: of the noise and the batches; the global random state is not touched.
        progress: show a bar.

    Returns:
        `num_samples` state dictionaries, as `model.state_dict()` but detached copies.

    Raises:
        ValueError: data of different lengths or none, or a step, count, precision, temperature or batch size out of
            range.
        RuntimeError: the loss became infinite or undefined (the step is too large).
    """
    if not data or not len(data[0]) or any(len(part) != len(data[0]) for part in data):
        raise ValueError("data must be tensors with one equal, positive length in their first dimension")
    n = len(data[0])
    if not step > 0 or not temperature >= 0 or not prior_precision >= 0:
        raise ValueError(
            "step must be positive, temperature and prior_precision at least 0, "
            f"got {step}, {temperature} and {prior_precision}"
        )
    if num_samples < 1 or thin < 1 or burn_in < 0:
        raise ValueError(
            f"num_samples and thin must be at least 1, burn_in at least 0, got {num_samples}, {thin} and {burn_in}"
        )
    if batch_size is not None and not 1 <= batch_size <= n:
        raise ValueError(f"batch_size must lie in 1..{n}, the number of examples, got {batch_size}")
    parameters = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator(device="cpu").manual_seed(seed)

    def batches():
        if batch_size is None:
            yield from itertools.repeat(tuple(data))
        while True:
            order = torch.randperm(n, generator=generator)
            for start in range(0, n - batch_size + 1, batch_size):
                rows = order[start : start + batch_size].to(data[0].device)
                yield tuple(part[rows] for part in data)

    samples = []
    scale = math.sqrt(2 * step * temperature)
    total = burn_in + num_samples * thin
    steps = range(1, total + 1)
    for done, batch in zip(bar(steps, "sampling", total) if progress else steps, batches(), strict=False):
        loss = loss_fn(model, *batch)
        if not torch.isfinite(loss):
            raise RuntimeError(
                f"the loss became {loss.item()} at step {done}; take a smaller step than {step}"
            )
        gradients = torch.autograd.grad(n * loss, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter -= step * (gradient + prior_precision * parameter)
                parameter += scale * noise.to(parameter.device)
        if done > burn_in and (done - burn_in) % thin == 0:
            samples.append({name: value.detach().clone() for name, value in model.state_dict().items()})
    return samples
