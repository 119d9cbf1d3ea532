"""Split-point analysis: what the residuals above and below a prediction say about its uncertainty.

Formulas are those of Zhao and Chen, "Post-Hoc Split-Point Self-Consistency Verification" (arXiv 2509.13262) and their code.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from lib.train.fit import fit as train


class Residuals(NamedTuple):
    """Mean absolute residuals at each input, all of one shape.

    For regression `up` and `down` are conditional: E[r | r > 0] and E[-r | r <= 0]. For classification they are the
    unconditional E[(y_k - p_k)^+] and E[(p_k - y_k)^+] of each class. `q_up` and `q_down` are quantiles of the two
    sides, in regression only.
    """

    total: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    q_up: torch.Tensor | None = None
    q_down: torch.Tensor | None = None


def sds(up: torch.Tensor, down: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Self-consistency discrepancy score, `|2 up down - total (up + down)|` (Zhao and Chen 2025).

    Zero where the total mean absolute residual is the harmonic mean of those above and below the prediction, as it is for any
    noise if the prediction is the conditional mean. For class probabilities p use `sds(1 - p, p, total).sum(-1)`.

    Args:
        up, down: mean absolute residual above and below the prediction, each given that side, any shape, at least 0.
        total: mean absolute residual, same shape.

    Returns:
        The score, in squared units of the residuals, same shape.

    Raises:
        ValueError: shapes that do not broadcast, or negative values in `up` or `down`.
    """
    if (up < 0).any() or (down < 0).any():
        raise ValueError("up and down must be mean absolute residuals, at least 0")
    return (2 * up * down - total * (up + down)).abs()


def split_interval(
    prediction: torch.Tensor, residuals: Residuals, *, recalibrate: bool = True, largest: float = 10.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prediction interval `[v - k_down q_down, v + k_up q_up]` from the quantiles of the two sides.

    With recalibration `k_up = total down / ((2 down - total) up)` and `k_down` with the sides exchanged: both are 1 where
    the residuals are consistent, and widen the interval where they are not. They are kept within [1, `largest`]; a
    denominator at or below zero counts as `largest`.

    Args:
        prediction: v, any shape.
        residuals: with quantiles, of the same shape.
        recalibrate: whether to widen.
        largest: the largest factor, at least 1.

    Returns:
        Lower and upper end, same shape as `prediction`.

    Raises:
        ValueError: residuals without quantiles, or `largest` below 1.
    """
    if residuals.q_up is None or residuals.q_down is None:
        raise ValueError("the residuals have no quantiles; fit SplitPointHeads with task='regression'")
    if not largest >= 1:
        raise ValueError(f"largest must be at least 1, got {largest}")
    up, down = residuals.q_up, residuals.q_down
    if recalibrate:
        up = up * _widening(residuals.total, residuals.up, residuals.down, largest)
        down = down * _widening(residuals.total, residuals.down, residuals.up, largest)
    return prediction - down, prediction + up


def _widening(total, own, other, largest):
    denominator = (2 * other - total) * own
    factor = torch.where(denominator > 0, total * other / denominator.clamp_min(1e-12), largest)
    return factor.clamp(1.0, largest)


class SplitPointHeads:
    """Heads on a frozen predictor's features that learn the mean absolute residuals, all together and by side.

    The heads are separate small networks, each with its own hidden layers: the score reads how far their independent answers
    contradict each other. They never touch the predictor. Features are centred and divided by one deviation common to all
    (bring columns of different units to one scale first); residuals are divided by their mean size.

    Args:
        task: `"regression"`: heads for the total, the two sides and the quantiles of the two sides. `"classification"`:
            for each class, heads for the total and the two unconditional sides.
        hidden: widths of the hidden layers of each head.
        shared: one trunk of hidden layers for all heads, with a linear head each, as in the released code. For comparison.
        level: of the side quantiles, in (0, 1); 0.95 on both sides makes a 95 % interval.
        steps: full-batch steps of Adam.
        learning_rate: of Adam, decayed to zero by a cosine.
        seed: of the initial weights; the global random state is not touched.

    Attributes:
        networks_: the heads after `fit`.

    Raises:
        ValueError: an unknown task, or an argument out of range.
    """

    def __init__(
        self,
        task: str = "regression",
        *,
        hidden: tuple[int, ...] = (64, 64),
        shared: bool = False,
        level: float = 0.95,
        steps: int = 600,
        learning_rate: float = 5e-3,
        seed: int = 0,
    ):
        if task not in ("regression", "classification"):
            raise ValueError(f"task must be 'regression' or 'classification', got {task!r}")
        if not 0 < level < 1:
            raise ValueError(f"level must lie in (0, 1), got {level}")
        if steps < 1 or not learning_rate > 0 or not hidden or min(hidden) < 1:
            raise ValueError(
                "steps and hidden widths must be at least 1 and learning_rate positive, "
                f"got {steps}, {hidden} and {learning_rate}"
            )
        self.task, self.hidden, self.shared, self.level = task, tuple(hidden), shared, level
        self.steps, self.learning_rate, self.seed = steps, learning_rate, seed

    def fit(
        self, features: torch.Tensor, prediction: torch.Tensor, targets: torch.Tensor
    ) -> "SplitPointHeads":
        """Learn the residuals of a frozen predictor. Use data that the predictor did not fit, or fits no better than others.

        Args:
            features: what the heads see, (n, d); the predictor's features or its inputs.
            prediction: (n,) values for regression, (n, C) logits for classification.
            targets: (n,) values, or class indices.

        Returns:
            self.

        Raises:
            ValueError: shapes that do not fit, values that are not finite, or a side without any residual.
        """
        features, prediction = features.detach().float(), prediction.detach().float()
        if (
            features.ndim != 2
            or not len(features)
            or len(prediction) != len(features)
            or len(targets) != len(features)
        ):
            raise ValueError(
                "features must be (n, d) and prediction and targets have n rows, got "
                f"{tuple(features.shape)}, {tuple(prediction.shape)} and {tuple(targets.shape)}"
            )
        if not features.isfinite().all() or not prediction.isfinite().all():
            raise ValueError("features and prediction must be finite")
        if prediction.ndim != (1 if self.task == "regression" else 2):
            expected = "(n,)" if self.task == "regression" else "(n, C)"
            raise ValueError(
                f"prediction must have shape {expected} for {self.task}, got {tuple(prediction.shape)}"
            )
        self.mean_ = features.mean(0)
        # one scale for all: a unit that was silent here must not be blown up when it wakes elsewhere
        self.deviation_ = (features - self.mean_).square().mean().sqrt().clamp_min(1e-6)
        if self.task == "regression":
            residual = (targets.float() - prediction)[:, None]
            outputs, count = 1, 5
        else:
            one_hot = F.one_hot(targets, prediction.shape[1])
            residual = one_hot - prediction.softmax(1)
            outputs, count = prediction.shape[1], 3
        if not residual.isfinite().all():
            raise ValueError("targets must be finite")
        if not (residual > 0).any() or not (residual < 0).any():
            raise ValueError("the residuals lie on one side of the prediction only")
        self.scale_ = residual.abs().mean() if self.task == "regression" else torch.tensor(1.0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.networks_ = _Heads(features.shape[1], self.hidden, outputs, count, self.shared)
        optimizer = torch.optim.Adam(self.networks_.parameters(), lr=self.learning_rate)
        train(
            self.networks_,
            self._loss,
            ((features - self.mean_) / self.deviation_, residual / self.scale_),
            optimizer=optimizer,
            schedule=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps),
            steps=self.steps,
            batch_size=len(features),
            seed=self.seed,
            progress=False,
        )
        return self

    def predict(self, features: torch.Tensor) -> Residuals:
        """The residuals expected at new features, (m, d) to (m,) or (m, C) each, without gradient.

        Raises:
            ValueError: not fitted, or another number of features.
        """
        if not hasattr(self, "networks_"):
            raise ValueError("call fit before predict")
        if features.ndim != 2 or features.shape[1] != len(self.mean_):
            raise ValueError(f"features must have shape (m, {len(self.mean_)}), got {tuple(features.shape)}")
        with torch.no_grad():
            parts = self.networks_((features.float() - self.mean_) / self.deviation_)
        return Residuals(
            *(self.scale_ * (part[:, 0] if self.task == "regression" else part) for part in parts)
        )

    def _loss(self, networks, inputs, residual):
        parts = networks(inputs)
        loss = F.mse_loss(parts[0], residual.abs())
        if self.task == "classification":
            return (
                loss
                + F.mse_loss(parts[1], residual.clamp_min(0))
                + F.mse_loss(parts[2], (-residual).clamp_min(0))
            )
        for mean, quantile, side in ((parts[1], parts[3], residual), (parts[2], parts[4], -residual)):
            own = side > 0
            loss = loss + F.mse_loss(mean[own], side[own])
            error = side[own] - quantile[own]
            loss = loss + torch.maximum(self.level * error, (self.level - 1) * error).mean()
        return loss


class _Heads(nn.Module):
    """`count` positive functions of the features, with separate hidden layers or one trunk."""

    def __init__(self, inputs, hidden, outputs, count, shared):
        super().__init__()
        self.shared = shared

        def layers(sizes):
            steps = [(nn.Linear(a, b), nn.ReLU()) for a, b in zip(sizes, sizes[1:], strict=False)]
            return nn.Sequential(*(layer for step in steps for layer in step))

        self.trunks = nn.ModuleList(layers((inputs, *hidden)) for _ in range(1 if shared else count))
        self.heads = nn.ModuleList(nn.Linear(hidden[-1], outputs) for _ in range(count))

    def forward(self, inputs):
        hidden = [trunk(inputs) for trunk in self.trunks]
        return [F.softplus(head(hidden[0 if self.shared else i])) for i, head in enumerate(self.heads)]
