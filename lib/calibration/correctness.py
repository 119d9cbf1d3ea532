"""Calibrators that are taught whether a prediction is right, not which class is (Liu et al., 2024, arXiv:2404.13016)."""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from lib.calibration.scaling import check_fitted, check_logits
from lib.losses._classification import reduce_rows, rows
from lib.train import fit as train

LOSSES = ("ca", "ce", "mse")


def correctness_aware_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: torch.Tensor | float = 1.0,
    *,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    """Squared distance between the confidence of the prediction and whether the prediction is right.

    At a glance:
        formula: `(1[argmax z = y] - max softmax(z / T))^2`
        gradient: `2 (m - c) m (1[k = argmax] - p_k) / T` with respect to logit k, where m = max p, c = correctness
        consistency: the confidence of its minimiser is P(correct | what the temperature sees); it says nothing about which class is right
        cost: `O(C)` per row; the softmax is stored

    A Brier score of correctness: it is meant for training a temperature (or another calibrator that leaves the
    order of the logits alone), not a classifier. The correctness is a constant: no gradient flows through the argmax.

    Args:
        logits: (C,), (N, C) or (N, C, d1, ...), of the frozen classifier.
        targets: class indices (), (N,) or (N, d1, ...).
        temperature: positive; a number, or a tensor that broadcasts to the shape of the targets.
        weight: of each class, (C,).
        ignore_index: targets that do not count.
        reduction: `"mean"`, `"sum"` or `"none"`.

    Raises:
        TypeError: logits that are not floating point, targets that are not integers.
        ValueError: shapes that do not fit, targets out of range, a temperature that is not positive, an unknown reduction.
    """
    flat, labels, valid = rows(logits, targets, weight=weight, ignore_index=ignore_index, reduction=reduction)
    temperature = _temperature_rows(temperature, targets.shape, flat)
    correct = (flat.argmax(1) == labels).to(flat.dtype)
    confidence = torch.softmax(flat / temperature.unsqueeze(1), 1).amax(1)
    return reduce_rows(
        (confidence - correct) ** 2, labels, valid, targets.shape, weight=weight, reduction=reduction
    )


def narrowly_wrong(
    logits: torch.Tensor, targets: torch.Tensor, temperature: torch.Tensor | float = 1.0
) -> torch.Tensor:
    """The wrong predictions that cross-entropy would make more confident.

    A prediction is narrowly wrong when argmax z is not y, and yet z_y > sum_k p_k z_k with p = softmax(z / T): the derivative
    of log p_y with respect to the inverse temperature is positive.

    Args:
        logits: (n, C).
        targets: class indices, (n,).
        temperature: at which the derivative is taken; positive, a number or (n,).

    Returns:
        Booleans, (n,).

    Raises:
        TypeError, ValueError: as `TemperatureScaling.fit`; a temperature that is not positive.
    """
    check_logits(logits, targets)
    wide = logits.detach().double()
    temperature = _temperature_rows(temperature, targets.shape, wide)
    mean = (torch.softmax(wide / temperature.unsqueeze(1), 1) * wide).sum(1)
    chosen = wide.gather(1, targets.long().unsqueeze(1)).squeeze(1)
    return (chosen > mean) & (wide.argmax(1) != targets)


class TransformCalibrator:
    """Predict a temperature for each sample from how the classifier sees transformed copies of it.

    For the input itself and for each transformed copy, the softmax scores of the k classes that lead on the *original* are
    read, in their original order. A small network turns these (1 + copies) x k numbers into a positive temperature. The
    logits divided by it are always those of the original, so that the prediction stays.

    Args:
        transforms: functions that map a batch of inputs to a batch of the same shape. Without any, only the scores of
            the original are read.
        k: how many leading classes; at most the number of classes.
        hidden: width of the hidden layer.
        min_temperature: added to a softplus, so that the temperature is positive.
        steps: of AdamW on the whole calibration set.
        lr: its learning rate.
        weight_decay: its weight decay, against memorising a small calibration set.
        seed: of the network's initial weights; the global random state is not touched.

    Attributes:
        model_: the classifier, as it was given.
        network_: the fitted network.
        history_: of its training, a `lib.train.History`.

    Raises:
        ValueError: a size, rate or temperature out of range.
    """

    def __init__(
        self,
        transforms: Sequence[Callable[[torch.Tensor], torch.Tensor]] = (),
        k: int = 4,
        hidden: int = 16,
        *,
        min_temperature: float = 0.1,
        steps: int = 50,
        lr: float = 0.01,
        weight_decay: float = 0.1,
        seed: int = 0,
    ):
        for name, value in (("k", k), ("hidden", hidden), ("steps", steps)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        for name, value in (("min_temperature", min_temperature), ("lr", lr)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay must be at least 0, got {weight_decay}")
        self.transforms, self.k, self.hidden = tuple(transforms), k, hidden
        self.min_temperature, self.steps, self.lr = min_temperature, steps, lr
        self.weight_decay, self.seed = weight_decay, seed

    def fit(
        self, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, loss: str = "ca"
    ) -> "TransformCalibrator":
        """Train the network with the classifier frozen.

        Args:
            model: maps inputs to logits (n, C). It is used in evaluation mode, without gradients.
            inputs: (n, ...), which the classifier was *not* trained on: there it is right on everything.
            targets: class indices, (n,).
            loss: what to minimise: `"ca"` `correctness_aware_loss`, `"ce"` cross-entropy, `"mse"` the squared distance of
                the softmax to the one-hot target, summed over the classes.

        Raises:
            TypeError, ValueError: as `TemperatureScaling.fit`; an unknown loss, k above the number of classes, a transform
                that changes the shape, or a set on which every prediction is right or every one is wrong.
        """
        if loss not in LOSSES:
            raise ValueError(f"loss must be one of {LOSSES}, got {loss!r}")
        logits = _predict(model, inputs)
        check_logits(logits, targets)
        if self.k > logits.shape[1]:
            raise ValueError(f"k must be at most the number of classes, {logits.shape[1]}, got {self.k}")
        correct = logits.argmax(1) == targets
        if bool(correct.all()) or not bool(correct.any()):
            raise ValueError(
                f"every prediction on this set is {'right' if correct.all() else 'wrong'}, so it cannot teach when to "
                "doubt; fit on inputs that the classifier was not trained on"
            )
        self.model_ = model
        features, logits = self._features(inputs)
        start = torch.tensor(1.0 - self.min_temperature if self.min_temperature < 1 else 1e-3)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            self.network_ = nn.Sequential(
                nn.Linear(features.shape[1], self.hidden), nn.ReLU(), nn.Linear(self.hidden, 1)
            ).to(features)
        with torch.no_grad():  # every temperature starts near 1
            self.network_[-1].weight.mul_(0.1)
            self.network_[-1].bias.fill_(start.expm1().log())
        optimizer = torch.optim.AdamW(self.network_.parameters(), lr=self.lr, weight_decay=self.weight_decay)

        def objective(network, features, logits, targets):
            return _loss(loss, logits, targets, self._positive(network(features)))

        self.history_ = train(
            self.network_, objective, (features, logits, targets), optimizer=optimizer, steps=self.steps,
            desc=f"calibrator, {loss}",
        )  # fmt: skip
        self.network_.requires_grad_(False)
        return self

    def temperature(self, inputs: torch.Tensor) -> torch.Tensor:
        """The temperature of each input, (n,), at least `min_temperature`."""
        check_fitted(self, "network_")
        return self._positive(self.network_(self._features(inputs)[0]))

    def transform(self, inputs: torch.Tensor) -> torch.Tensor:
        """Calibrated log-probabilities of inputs (not of logits: the copies are needed), (n, C)."""
        check_fitted(self, "network_")
        features, logits = self._features(inputs)
        return torch.log_softmax(logits / self._positive(self.network_(features)).unsqueeze(1), 1)

    def _positive(self, output):
        return F.softplus(output.squeeze(1)) + self.min_temperature

    def _features(self, inputs):
        """What the network reads, (n, (1 + copies) * k), and the logits of the originals."""
        logits = _predict(self.model_, inputs)
        leading = logits.topk(self.k, 1).indices  # of the original, for every copy
        scores = [torch.softmax(logits, 1).gather(1, leading)]
        for transform in self.transforms:
            copies = transform(inputs)
            if copies.shape != inputs.shape:
                raise ValueError(
                    f"a transform must keep the shape {tuple(inputs.shape)}, got {tuple(copies.shape)}"
                )
            scores.append(torch.softmax(_predict(self.model_, copies), 1).gather(1, leading))
        return torch.cat(scores, 1), logits


def _loss(name, logits, targets, temperature):
    if name == "ca":
        return correctness_aware_loss(logits, targets, temperature)
    scaled = logits / temperature.unsqueeze(1)
    if name == "ce":
        return F.cross_entropy(scaled, targets)
    wanted = F.one_hot(targets, logits.shape[1])
    return ((torch.softmax(scaled, 1) - wanted) ** 2).sum(1).mean()


def _predict(model, inputs):
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return model(inputs)
    finally:
        model.train(was_training)


def _temperature_rows(temperature, shape, flat):
    """The temperature of each row; a tensor that requires a gradient keeps it."""
    temperature = torch.as_tensor(temperature, dtype=flat.dtype, device=flat.device)
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(temperature)
    if not wrapped and not bool((temperature > 0).all()):
        raise ValueError("temperature must be positive; a negative one would turn the ranking around")
    try:
        return temperature.expand(shape).reshape(-1)
    except RuntimeError:
        raise ValueError(
            f"temperature must broadcast to the targets' shape {tuple(shape)}, got {tuple(temperature.shape)}"
        ) from None
