"""How many nonlinear operations a model makes, and a perceptron that does without them (Jha and Reagen, 2025)."""

import torch
from torch import nn
from torch.nn.utils import parametrizations

from lib.models.gpt import SoftmaxAttention
from lib.models.mlp import activation_module

_NORMS = (nn.LayerNorm, nn.RMSNorm)
_ELEMENTWISE = {
    nn.GELU: "gelu", nn.ReLU: "relu", nn.SiLU: "silu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid",
}  # fmt: skip


class ScaledPerceptron(nn.Module):
    """The perceptron of a block without norms, with learnable scales of both paths: (beta - 1) x + FFN(x) / alpha.

    Added to the residual stream x, as `lib.models.GPT` does with `norm="none"`, it gives beta x + FFN(x) / alpha. With
    another norm beta would scale the normalised stream, so use it without one. For GPT's argument `mlp`:
    `lambda dim, activation: ScaledPerceptron(dim, activation, fused=True)`.

    Source: arXiv 2501.03489, learnable scaling of the feed-forward network, its fusion, and static normalisation.

    Args:
        dim: of the residual stream.
        activation: a name that `lib.models.mlp` knows.
        fused: one dim x dim matrix, trained as such, in place of two of the hidden width 4 * dim; only without activation.
        normalisation: of the weights: None, "weight" (a learnable length of each row) or "spectral" (largest singular
            value 1). Static once trained: `torch.nn.utils.parametrize.remove_parametrizations` leaves plain matrices.
        scaled: whether alpha and beta are learnable; they start at 1. False leaves the plain perceptron.
        std: of the initial weights.

    Raises:
        ValueError: `fused` with an activation, or an unknown name.
    """

    def __init__(
        self,
        dim: int,
        activation: str = "identity",
        *,
        fused: bool = False,
        normalisation: str | None = None,
        scaled: bool = True,
        std: float = 0.02,
    ):
        super().__init__()
        if fused and activation != "identity":
            raise ValueError(f"only a perceptron without activation can be fused, got {activation!r}")
        if normalisation not in (None, "weight", "spectral"):
            raise ValueError(f"normalisation must be None, weight or spectral, got {normalisation!r}")
        layers = [nn.Linear(dim, dim)] if fused else [nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)]
        for layer in layers:
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
            if normalisation == "weight":
                parametrizations.weight_norm(layer)
            elif normalisation == "spectral":
                parametrizations.spectral_norm(layer)
        if not fused:
            layers.insert(1, activation_module(activation))
        self.ffn = nn.Sequential(*layers)
        if scaled:
            self.alpha, self.beta = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))
        self.scaled = scaled

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.scaled:
            return self.ffn(x)
        return (self.beta - 1) * x + self.ffn(x) / self.alpha


def count_nonlinear_ops(model: nn.Module, length: int) -> dict[str, int]:
    """The nonlinear operations of one forward pass over one sequence, counted by running it on zeros.

    Attention counts where it is a `lib.models.gpt.SoftmaxAttention`, norms where they are torch's LayerNorm or RMSNorm,
    and activations where they are torch's modules; what a forward calls as a function is not seen.

    Args:
        model: called with tokens (1, length), as `lib.models.GPT`.
        length: of the sequence.

    Returns:
        `softmax` rows, `norm` rows, and elements of each of `gelu`, `relu`, `silu`, `tanh` and `sigmoid`.

    Raises:
        ValueError: a length below 1, or one that the model refuses.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    counts = {"softmax": 0, "norm": 0} | dict.fromkeys(_ELEMENTWISE.values(), 0)

    def count(module, inputs, _):
        first = inputs[0]
        if isinstance(module, SoftmaxAttention):
            counts["softmax"] += first.shape[:-1].numel()
        elif isinstance(module, _NORMS):
            counts["norm"] += first.shape[: first.ndim - len(module.normalized_shape)].numel()
        else:
            name = next(name for kind, name in _ELEMENTWISE.items() if isinstance(module, kind))
            counts[name] += first.numel()

    kinds = (SoftmaxAttention, *_NORMS, *_ELEMENTWISE)
    hooks = [module.register_forward_hook(count) for module in model.modules() if isinstance(module, kinds)]
    device = next(model.parameters()).device
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, length, dtype=torch.long, device=device))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return counts
