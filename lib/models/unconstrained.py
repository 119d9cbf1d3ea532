"""A deep linear network whose features are free parameters, and its training to a minimum."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


class UnconstrainedFeatures(nn.Module):
    """Logits `W_M ... W_1 h_i (+ b)` of examples whose features `h_i` are free (the unconstrained features model).

    It stands for a network so expressive that its last hidden layer can be anything (Dang et al. 2023, arXiv 2301.00437).

    Args:
        n_per_class: examples of each class; the classes are in order.
        dim: width of the features and of the layers between, at least the number of classes.
        depth: number of linear layers, at least 1.
        bias: whether the last layer has a bias.
        std: of the normal initial values of features and weights.

    Attributes:
        features: (N, dim).
        weights: the layers from the features outwards; the last is (classes, dim).
        labels: (N,).

    Raises:
        ValueError: no classes, an empty class, `dim` below the number of classes, or a depth below 1.
    """

    def __init__(
        self, n_per_class: Sequence[int], dim: int, depth: int = 1, *, bias: bool = False, std: float = 0.1
    ):
        super().__init__()
        num_classes = len(n_per_class)
        if not num_classes or min(n_per_class) < 1:
            raise ValueError(
                f"n_per_class must hold at least one example of each class, got {list(n_per_class)}"
            )
        if dim < num_classes or depth < 1:
            raise ValueError(
                f"dim must be at least the {num_classes} classes and depth at least 1, got {dim} and {depth}"
            )
        self.register_buffer(
            "labels", torch.repeat_interleave(torch.arange(num_classes), torch.tensor(n_per_class))
        )
        self.features = nn.Parameter(std * torch.randn(len(self.labels), dim))
        rows = [dim] * (depth - 1) + [num_classes]
        self.weights = nn.ParameterList(nn.Parameter(std * torch.randn(size, dim)) for size in rows)
        self.bias = nn.Parameter(torch.zeros(num_classes)) if bias else None

    def product(self) -> torch.Tensor:
        """The linear classifier on the features, `W_M ... W_1`, (classes, dim)."""
        matrix = self.weights[0]
        for weight in self.weights[1:]:
            matrix = weight @ matrix
        return matrix

    def forward(self) -> torch.Tensor:
        """Logits of all examples, (N, classes)."""
        logits = self.features @ self.product().T
        return logits if self.bias is None else logits + self.bias


def fit_ufm(
    model: UnconstrainedFeatures,
    weight_decay: Sequence[float],
    feature_decay: float,
    *,
    loss: str = "mse",
    max_iterations: int = 2000,
    tolerance: float = 1e-9,
) -> float:
    """Minimise the regularised loss by L-BFGS, in place.

    The objective is `1/(2N) |logits - onehot|^2` or the mean cross-entropy, plus `l_j/2 |W_j|^2` for each layer and `l_H/2 |H|^2`;
    the bias is not penalised.

    Args:
        model: starts where it is.
        weight_decay: l_1, ..., l_M, one a layer from the features outwards.
        feature_decay: l_H.
        loss: `"mse"` or `"ce"`.
        max_iterations: of L-BFGS.
        tolerance: largest gradient at which it stops.

    Returns:
        The objective reached.

    Raises:
        ValueError: an unknown loss, another number of decays than layers, or a negative one.
    """
    if loss not in ("mse", "ce"):
        raise ValueError(f"loss must be 'mse' or 'ce', got {loss!r}")
    if len(weight_decay) != len(model.weights) or min(*weight_decay, feature_decay) < 0:
        raise ValueError(
            f"give one decay of at least 0 for each of the {len(model.weights)} layers and one for the features, got "
            f"{list(weight_decay)} and {feature_decay}"
        )
    one_hot = F.one_hot(model.labels, len(model.weights[-1])).to(model.features.dtype)

    def objective():
        logits = model()
        data = (
            (logits - one_hot).square().sum() / (2 * len(one_hot))
            if loss == "mse"
            else F.cross_entropy(logits, model.labels)
        )
        for decay, weight in zip(weight_decay, model.weights, strict=True):
            data = data + decay / 2 * weight.square().sum()
        return data + feature_decay / 2 * model.features.square().sum()

    solver = torch.optim.LBFGS(
        model.parameters(), max_iter=max_iterations, max_eval=2 * max_iterations, history_size=20,
        tolerance_grad=tolerance, tolerance_change=0.0, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure():
        solver.zero_grad()
        value = objective()
        value.backward()
        return value

    solver.step(closure)
    with torch.no_grad():
        return objective().item()
