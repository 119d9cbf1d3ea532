"""Multi-layer perceptrons."""

from collections.abc import Sequence

from torch import nn

ACTIVATIONS = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "elu": nn.ELU,
    "softplus": nn.Softplus,
    "identity": nn.Identity,
}


def activation_module(name: str) -> nn.Module:
    """The activation called `name`.

    Raises:
        ValueError: an unknown name.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]()


def mlp(sizes: Sequence[int], activation: str = "relu") -> nn.Sequential:
    """Linear layers with an activation between each two of them, none after the last.

    Inputs of shape (batch, ...) are flattened to (batch, sizes[0]). So `model[:-1]` computes the last hidden
    layer, after its activation, and `model[-1]` is the linear classifier on top of it.

    Args:
        sizes: the widths from input to output, at least two, as in `(64, 32, 10)`.
        activation: one of relu, gelu, silu, tanh, sigmoid, elu, softplus, identity.

    Raises:
        ValueError: fewer than two sizes, a size below 1, or an unknown activation.
    """
    sizes = tuple(sizes)
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"sizes must hold at least two positive widths, got {sizes}")
    layers: list[nn.Module] = [nn.Flatten()]
    for number, (width_in, width_out) in enumerate(zip(sizes, sizes[1:], strict=False)):
        if number:
            layers.append(activation_module(activation))
        layers.append(nn.Linear(width_in, width_out))
    activation_module(activation)  # a wrong name is an error for two sizes as well
    return nn.Sequential(*layers)
