"""Post-hoc calibrators of logits that leave the prediction alone.

One convention, which every calibrator of logits in `lib.calibration` follows: `fit(logits, targets)` learns from a set on
which the classifier was not trained and returns the calibrator; `transform(logits)` returns log-probabilities of the same
shape and dtype; what was learned is in attributes whose names end in an underscore.
"""

import torch
from sklearn.isotonic import IsotonicRegression

RANGE = (0.01, 100.0)


class TemperatureScaling:
    """Divide all logits by one temperature, the one with the lowest negative log-likelihood (Guo et al., 2017).

    The likelihood is concave in the inverse temperature b, and its slope is the mean of z_y - sum_k p_k(b) z_k. The root of
    the slope is bracketed and bisected, so there is no learning rate and no local optimum.

    Attributes:
        temperature_: between 0.01 and 100; an end of this range where the likelihood has no maximum within, as when
            all predictions are right.
    """

    def fit(self, logits: torch.Tensor, targets: torch.Tensor) -> "TemperatureScaling":
        """Find the temperature.

        Args:
            logits: (n, C), of samples that the classifier was not trained on.
            targets: class indices, (n,).

        Raises:
            TypeError: logits that are not floating point, targets that are not integers.
            ValueError: shapes that do not fit, no samples, logits that are not finite, targets out of range.
        """
        check_logits(logits, targets)
        wide = logits.detach().double()
        chosen = wide.gather(1, targets.long().unsqueeze(1)).squeeze(1).mean()

        def slope(inverse):
            return chosen - (torch.softmax(inverse * wide, 1) * wide).sum(1).mean()

        low, high = 1 / RANGE[1], 1 / RANGE[0]
        if slope(low) <= 0:
            high = low
        elif slope(high) >= 0:
            low = high
        for _ in range(60):  # the slope falls in b; halving in the logarithm reaches float64's resolution
            middle = (low * high) ** 0.5
            low, high = (middle, high) if slope(middle) > 0 else (low, middle)
        self.temperature_ = 1 / (low * high) ** 0.5
        return self

    def transform(self, logits: torch.Tensor) -> torch.Tensor:
        """Log-probabilities at the temperature found, of the shape and dtype of the logits."""
        check_fitted(self, "temperature_")
        check_logits(logits)
        return torch.log_softmax(logits / self.temperature_, 1)


class EnsembleTemperatureScaling:
    """Mix the tempered, the original and the uniform distribution (Zhang, Kailkhura and Han, 2020).

    p = w_1 softmax(z / T) + w_2 softmax(z) + w_3 / C. The temperature is that of `TemperatureScaling`; given it, the
    log-likelihood is concave in the weights and expectation-maximisation climbs it.

    Attributes:
        temperature_: T.
        weights_: (3,), nonnegative with sum 1.
    """

    def fit(self, logits: torch.Tensor, targets: torch.Tensor) -> "EnsembleTemperatureScaling":
        """Find temperature and weights; arguments and errors as in `TemperatureScaling.fit`."""
        self.temperature_ = TemperatureScaling().fit(logits, targets).temperature_
        parts = self._parts(logits.detach().double())  # (3, n, C), logarithms
        chosen = parts.gather(2, targets.long().reshape(1, -1, 1).expand(3, -1, 1)).squeeze(2)
        # a first step from equal weights; a weight that starts at 0 would stay there
        log_weights = chosen.new_full((3, 1), 1 / 3).log()
        for _ in range(500):
            updated = torch.softmax(chosen + log_weights, 0).mean(1, keepdim=True).log()
            done = (updated.exp() - log_weights.exp()).abs().max() < 1e-9
            log_weights = updated
            if done:
                break
        self.weights_ = log_weights.squeeze(1).exp()
        return self

    def transform(self, logits: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the mixture, of the shape and dtype of the logits."""
        check_fitted(self, "weights_")
        check_logits(logits)
        weights = self.weights_.to(logits.device, logits.dtype).reshape(3, 1, 1)
        return torch.logsumexp(self._parts(logits) + weights.log(), 0)

    def _parts(self, logits):
        uniform = torch.zeros_like(logits)
        return torch.log_softmax(torch.stack([logits / self.temperature_, logits, uniform]), 2)


class IsotonicCalibration:
    """One increasing function for every entry of the softmax, then normalised (Zhang, Kailkhura and Han, 2020).

    The entries of all classes are pooled, and isotonic regression of "it is this class" on the probability gives a step
    function. A little of the probability itself is mixed in, so that the function increases strictly and the
    prediction stays.

    Args:
        epsilon: the share of the probability that is mixed in, in (0, 1).

    Attributes:
        regression_: the fitted `sklearn.isotonic.IsotonicRegression`.
    """

    def __init__(self, epsilon: float = 1e-3):
        if not 0 < epsilon < 1:
            raise ValueError(f"epsilon must lie between 0 and 1, got {epsilon}")
        self.epsilon = epsilon

    def fit(self, logits: torch.Tensor, targets: torch.Tensor) -> "IsotonicCalibration":
        """Find the step function; arguments and errors as in `TemperatureScaling.fit`."""
        check_logits(logits, targets)
        probabilities = torch.softmax(logits.detach().double(), 1)
        outcomes = torch.nn.functional.one_hot(targets.long(), logits.shape[1])
        self.regression_ = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip")
        self.regression_.fit(probabilities.cpu().flatten().numpy(), outcomes.cpu().flatten().numpy())
        return self

    def transform(self, logits: torch.Tensor) -> torch.Tensor:
        """Log-probabilities, of the shape and dtype of the logits."""
        check_fitted(self, "regression_")
        check_logits(logits)
        if not len(logits):
            return logits.clone()
        log_probabilities = torch.log_softmax(logits.detach().double(), 1)
        steps = self.regression_.predict(log_probabilities.exp().cpu().flatten().numpy())
        steps = torch.from_numpy(steps).to(logits.device).reshape(logits.shape)
        # in logarithms, so that an entry whose probability underflows keeps its place
        mixed = torch.logaddexp((steps * (1 - self.epsilon)).log(), log_probabilities + _log(self.epsilon))
        return torch.log_softmax(mixed, 1).to(logits.dtype)


def calibrated_log_likelihood(
    validation_logits: torch.Tensor,
    validation_targets: torch.Tensor,
    logits: torch.Tensor,
    targets: torch.Tensor,
) -> tuple[float, float]:
    """Mean log-likelihood at the temperature that suits the validation set (Ashukha et al., 2020).

    It compares models after each was granted the best global confidence. The temperature must not be fitted on the samples
    that are judged; under shift that means the validation set is not shifted.

    Args:
        validation_logits: (m, C).
        validation_targets: class indices, (m,).
        logits: (n, C), of the samples to be judged.
        targets: class indices, (n,).

    Returns:
        The mean of log softmax(logits / T)[target] in nats, higher is better, and T.

    Raises:
        TypeError, ValueError: as `TemperatureScaling.fit`, for either set.
    """
    scaling = TemperatureScaling().fit(validation_logits, validation_targets)
    check_logits(logits, targets)
    log_probabilities = scaling.transform(logits.detach().double())
    return log_probabilities.gather(1, targets.long().unsqueeze(1)).mean().item(), scaling.temperature_


def check_logits(logits: torch.Tensor, targets: torch.Tensor | None = None) -> None:
    """What every calibrator of logits demands of its input.

    Raises:
        TypeError: logits that are not floating point, targets that are not integers.
        ValueError: logits that are not (n, C) with C at least 2 or not finite; with targets also: no samples, targets
            that are not (n,) or out of range.
    """
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(f"logits must be (n, C) with at least 2 classes, got {tuple(logits.shape)}")
    if not bool(logits.isfinite().all()):
        raise ValueError("logits must be finite")
    if targets is None:
        return
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise TypeError(f"targets must be integer class indices, got {targets.dtype}")
    if targets.shape != logits.shape[:1]:
        raise ValueError(
            f"targets must be ({len(logits)},) for logits {tuple(logits.shape)}, got {tuple(targets.shape)}"
        )
    if not len(logits):
        raise ValueError("there are no samples to calibrate on")
    if bool(((targets < 0) | (targets >= logits.shape[1])).any()):
        raise ValueError(f"targets must be in [0, {logits.shape[1]}), got {targets.min()} to {targets.max()}")


def check_fitted(estimator: object, attribute: str) -> None:
    """Raises a RuntimeError when the estimator has no such attribute yet."""
    if not hasattr(estimator, attribute):
        raise RuntimeError(f"this {type(estimator).__name__} is not fitted; call fit first")


def _log(value):
    return torch.tensor(value, dtype=torch.float64).log()
