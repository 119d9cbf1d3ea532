"""How many entries of an activation map are not zero."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from lib.models.activations import TopK


class LayerSparsity(NamedTuple):
    """The activation map of one layer, over all inputs (tokens count one by one).

    Attributes:
        nonzero: the share of entries that are not zero, over inputs and neurons: the sparsity of Li et al. (2022).
        dead: the share of neurons that are zero for every input. Another number: a layer without dead neurons can be sparse.
        per_neuron: for each neuron the share of inputs for which it is not zero, float64, (width,).
        per_input: for each input the share of neurons that are not zero, float64, (inputs,).
    """

    nonzero: float
    dead: float
    per_neuron: torch.Tensor
    per_input: torch.Tensor


def activation_sparsity(
    model: nn.Module, batches: Iterable, *, layers: Sequence[str] | None = None
) -> dict[str, LayerSparsity]:
    """Count the non-zero activations of each layer, through forward hooks (Li et al. 2022, section 2).

    Neurons lie along the last dimension; every other dimension counts inputs. The model runs in eval mode without
    gradients, is put back into its mode, and keeps no hook. Activations without exact zeros, such as GELU, have
    no sparsity in this sense, and no threshold is applied.

    Args:
        model: any module.
        batches: each a tensor, or a tuple whose first member is the model's input (a DataLoader will do).
        layers: the names, as in `model.named_modules()`, of the modules whose output is the map. By default every `nn.ReLU` and
            `lib.models.TopK`. ReLUs called as functions are not modules and cannot be seen.

    Returns:
        A `LayerSparsity` for each name, in the order of the modules.

    Raises:
        TypeError: a layer whose output is not a floating-point tensor.
        ValueError: no layers, an unknown name, no inputs, a layer that the forward pass does not call, or that
            it calls with different widths.
    """
    modules = dict(model.named_modules())
    if layers is None:
        layers = [name for name, module in modules.items() if isinstance(module, nn.ReLU | TopK)]
        if not layers:
            raise ValueError("the model holds no nn.ReLU and no TopK; name the layers to count")
    unknown = [name for name in layers if name not in modules]
    if unknown or not layers:
        raise ValueError(f"layers must name modules of the model, got {unknown or layers}")
    counts = {name: [] for name in layers}  # (active inputs of each neuron, active neurons of each input)

    def hook_for(name):
        def count(module, inputs, output):
            if not isinstance(output, torch.Tensor) or not output.is_floating_point():
                raise TypeError(f"layer {name!r} must return a floating-point tensor, got {type(output)}")
            active = (output != 0).reshape(-1, output.shape[-1])
            counts[name].append((active.sum(0).cpu(), active.sum(1).cpu()))

        return count

    handles = [modules[name].register_forward_hook(hook_for(name)) for name in layers]
    was_training = {module: module.training for module in modules.values()}
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                model(batch if isinstance(batch, torch.Tensor) else batch[0])
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in was_training.items():
            module.training = mode
    return {name: _summary(name, parts) for name, parts in counts.items()}


def _summary(name, parts):
    if not parts or not sum(len(per_input) for _, per_input in parts):
        raise ValueError(
            f"layer {name!r} saw no inputs: give batches, and layers which the forward pass calls"
        )
    if len({len(per_neuron) for per_neuron, _ in parts}) != 1:
        raise ValueError(f"layer {name!r} is called with different widths")
    per_input = torch.cat([each for _, each in parts])
    per_neuron = torch.stack([each for each, _ in parts]).sum(0)
    inputs, width = len(per_input), len(per_neuron)
    return LayerSparsity(
        nonzero=int(per_neuron.sum()) / (inputs * width),
        dead=int((per_neuron == 0).sum()) / width,
        per_neuron=per_neuron.double() / inputs,
        per_input=per_input.double() / width,
    )
