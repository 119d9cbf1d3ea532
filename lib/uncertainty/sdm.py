"""Similarity, distance and magnitude: a softmax that knows how near a point is to what was learned, and how well.

Formulas are those of Schmaltz, "Similarity-Distance-Magnitude Universal Verification" (arXiv 2502.20167) and its code.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import nn


def sdm_activation(
    logits: torch.Tensor,
    similarity: torch.Tensor,
    distance: torch.Tensor,
    *,
    log: bool = False,
    base_change: bool = True,
) -> torch.Tensor:
    """`softmax(d z log(2 + q))`: softmax to the base `2 + q`, with logits shrunk by `d`.

    With `q = e - 2` and `d = 1` it is softmax; with `d = 0` it is uniform; a large q sharpens it.

    Args:
        logits: z, (..., C).
        similarity: q, at least 0, shape (...).
        distance: d, in [0, 1], shape (...): 1 amid the training data, 0 beyond all of them.
        log: return logarithms.
        base_change: with `log`, to the base `2 + q` instead of e. The negative log likelihood in that base has the
            gradient `d (sdm - onehot)`: the base cancels, so that points with a large q do not outweigh others.

    Returns:
        Probabilities or their logarithms, (..., C).

    Raises:
        ValueError: shapes that do not fit, a negative similarity, or a distance outside [0, 1].
    """
    if similarity.shape != logits.shape[:-1] or distance.shape != logits.shape[:-1]:
        raise ValueError(
            "similarity and distance must have the shape of the logits without the classes, got "
            f"{tuple(similarity.shape)} and {tuple(distance.shape)} for {tuple(logits.shape)}"
        )
    if (similarity < 0).any() or (distance < 0).any() or (distance > 1).any():
        raise ValueError("similarity must be at least 0 and distance within [0, 1]")
    base = torch.log(2 + similarity).unsqueeze(-1).to(logits.dtype)
    scaled = distance.unsqueeze(-1).to(logits.dtype) * base * logits
    if not log:
        return scaled.softmax(-1)
    return scaled.log_softmax(-1) / base if base_change else scaled.log_softmax(-1)


def depth_match(
    points: torch.Tensor,
    predictions: torch.Tensor,
    support: torch.Tensor,
    support_labels: torch.Tensor,
    support_predictions: torch.Tensor,
    *,
    skip_self: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Similarity q, the number of matches before the first mismatch among the nearest support points, and the nearest distance.

    A support point matches if its label and its own prediction both equal the prediction of the query. Matches count from
    the nearest outwards and stop at the first mismatch.

    Args:
        points: queries, (n, m).
        predictions: their predicted classes, (n,).
        support: the training points, (s, m).
        support_labels, support_predictions: their true and predicted classes, (s,).
        skip_self: the queries ARE the support, in the same order; each leaves itself out.

    Returns:
        q, (n,) float, and the distance to the nearest support point (n,), Euclidean.

    Raises:
        ValueError: shapes that do not fit, an empty support, or `skip_self` with other sizes.
    """
    if points.ndim != 2 or support.ndim != 2 or points.shape[1] != support.shape[1] or not len(support):
        raise ValueError(
            f"points and support must be (n, m) and (s, m), got {tuple(points.shape)} and {tuple(support.shape)}"
        )
    if len(predictions) != len(points) or not len(support) == len(support_labels) == len(support_predictions):
        raise ValueError(
            "give one prediction for each point, and one label and prediction for each support point"
        )
    if skip_self and (len(points) != len(support) or len(support) < 2):
        raise ValueError("skip_self needs the support itself as points, at least two of them")
    similarity, nearest = [], []
    for start in range(0, len(points), 1024):
        rows = slice(start, start + 1024)
        gaps = torch.cdist(points[rows], support, compute_mode="donot_use_mm_for_euclid_dist")
        if skip_self:
            index = torch.arange(len(gaps))
            gaps[index, start + index] = math.inf
        ordered, order = gaps.sort(dim=1, stable=True)
        own = predictions[rows, None]
        match = (support_labels[order] == own) & (support_predictions[order] == own) & ordered.isfinite()
        similarity.append(match.long().cumprod(1).sum(1))
        nearest.append(ordered[:, 0])
    if not similarity:
        return points.new_zeros(0), points.new_zeros(0)
    return torch.cat(similarity).to(points.dtype), torch.cat(nearest)


class ClassECDF:
    """Empirical distribution functions of a number, one for each class.

    Args:
        values: (n,).
        labels: (n,), class indices.
        num_classes: how many; a class without values gets the function that is 1 everywhere.

    Raises:
        ValueError: shapes that differ, or no values at all.
    """

    def __init__(self, values: torch.Tensor, labels: torch.Tensor, num_classes: int):
        if values.ndim != 1 or values.shape != labels.shape or not len(values):
            raise ValueError(
                f"values and labels must both be (n,), got {tuple(values.shape)}, {tuple(labels.shape)}"
            )
        self.values = [values[labels == c].sort().values for c in range(num_classes)]

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """Share of each class at or below the values, (k,) to (k, C)."""
        columns = [
            torch.searchsorted(own, values.contiguous(), right=True) / len(own)
            if len(own)
            else torch.ones_like(values)
            for own in self.values
        ]
        return torch.stack(columns, 1).to(values.dtype)


def high_reliability_region(
    rescaled: torch.Tensor, probabilities: torch.Tensor, labels: torch.Tensor, alpha: float
) -> tuple[float, torch.Tensor]:
    """The smallest threshold on the rescaled similarity above which every class is predicted right at rate `alpha`.

    For each candidate b the points with `rescaled >= b` are kept, and psi_c is the `1 - alpha` quantile of the
    probability of class c among the kept points whose TRUE class is c. The first b with `psi_c >= alpha` for all classes wins.

    Args:
        rescaled: q', (n,), of the calibration points.
        probabilities: (n, C).
        labels: (n,), class indices.
        alpha: the rate, in (1/2, 1].

    Returns:
        b and psi, (C,). If no threshold will do, b is infinite and psi is 1: the region is empty.

    Raises:
        ValueError: shapes that do not fit, or an alpha out of range.
    """
    if not 0.5 < alpha <= 1:
        raise ValueError(f"alpha must lie in (1/2, 1], got {alpha}")
    if probabilities.ndim != 2 or not len(rescaled) == len(labels) == len(probabilities):
        raise ValueError("rescaled, probabilities and labels must have one row for each calibration point")
    classes = range(probabilities.shape[1])
    for threshold in rescaled.unique():
        kept = rescaled >= threshold
        own = [probabilities[kept & (labels == c), c] for c in classes]
        if any(not len(values) for values in own):
            break  # a class has no points left, and higher thresholds have fewer
        psi = torch.stack([values.quantile(1 - alpha, interpolation="lower") for values in own])
        if (psi >= alpha).all():
            return threshold.item(), psi
    return math.inf, torch.ones(probabilities.shape[1], dtype=probabilities.dtype)


class Verified(NamedTuple):
    """What `SDM.predict` says of each point: all (n,) but `probabilities` and `lower`, (n, C)."""

    prediction: torch.Tensor
    similarity: torch.Tensor
    distance: torch.Tensor
    probabilities: torch.Tensor
    rescaled: torch.Tensor
    reliable: torch.Tensor
    effective_size: torch.Tensor
    band: torch.Tensor
    lower: torch.Tensor


class SDM:
    """Classifier on frozen features with the SDM activation, and the region in which it may be trusted.

    A linear adaptor and a linear head are trained with the SDM loss; the similarity and the distance of every training
    point are found anew after each epoch and are constants for the gradient. Calibration data set the distance scale and the
    region.

    Args:
        num_classes: C.
        dim: width of the adaptor, in which distances are measured.
        alpha: accuracy that the region is built for, in (1/2, 1].
        epochs: passes over the training data.
        batch_size: of each step.
        learning_rate: of Adam.
        seed: of the weights and the batches; the global random state is not touched.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        num_classes: int,
        dim: int = 32,
        *,
        alpha: float = 0.95,
        epochs: int = 20,
        batch_size: int = 50,
        learning_rate: float = 1e-2,
        seed: int = 0,
    ):
        if num_classes < 2 or dim < 1 or epochs < 1 or batch_size < 1 or not learning_rate > 0:
            raise ValueError(
                "num_classes must be at least 2, dim, epochs and batch_size at least 1, learning_rate positive, got "
                f"{num_classes}, {dim}, {epochs}, {batch_size} and {learning_rate}"
            )
        if not 0.5 < alpha <= 1:
            raise ValueError(f"alpha must lie in (1/2, 1], got {alpha}")
        self.num_classes, self.dim, self.alpha, self.epochs = num_classes, dim, alpha, epochs
        self.batch_size, self.learning_rate, self.seed = batch_size, learning_rate, seed

    def fit(
        self,
        features: torch.Tensor,
        labels: torch.Tensor,
        calibration_features: torch.Tensor,
        calibration_labels: torch.Tensor,
    ) -> "SDM":
        """Train on (n, k) features with labels (n,), calibrate on others that were not trained on.

        Raises:
            ValueError: shapes that do not fit, labels out of range, or values that are not finite.
        """
        for x, y in ((features, labels), (calibration_features, calibration_labels)):
            if x.ndim != 2 or len(x) != len(y) or len(x) < 2 or not x.isfinite().all():
                raise ValueError(
                    f"features must be finite and (n, k) with n labels, got {tuple(x.shape)}, {len(y)}"
                )
            if y.min() < 0 or y.max() >= self.num_classes:
                raise ValueError(f"labels must lie in 0..{self.num_classes - 1}")
        features, calibration_features = features.detach().float(), calibration_features.detach().float()
        self.mean_ = features.mean(0)
        self.scale_ = (features - self.mean_).square().mean().sqrt().clamp_min(1e-12)
        x = (features - self.mean_) / self.scale_
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.adaptor_ = nn.Linear(x.shape[1], self.dim)
            self.head_ = nn.Linear(self.dim, self.num_classes)
        parameters = [*self.adaptor_.parameters(), *self.head_.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=self.learning_rate)
        generator = torch.Generator().manual_seed(self.seed)
        similarity = torch.full((len(x),), math.e - 2)  # the first epoch is softmax
        distance = torch.ones(len(x))
        for _ in range(self.epochs):
            for rows in torch.randperm(len(x), generator=generator).split(self.batch_size):
                logits = self.head_(self.adaptor_(x[rows]))
                log_probs = sdm_activation(logits, similarity[rows], distance[rows], log=True)
                loss = F.nll_loss(log_probs, labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                self.support_ = self.adaptor_(x)
                self.support_predictions_ = self.head_(self.support_).argmax(1)
            self.support_labels_ = labels
            similarity, nearest = depth_match(
                self.support_,
                self.support_predictions_,
                self.support_,
                labels,
                self.support_predictions_,
                skip_self=True,
            )
            distance = (1 - ClassECDF(nearest, labels, self.num_classes)(nearest)).amin(1)
        hidden, _, predictions = self._embed(calibration_features)
        _, nearest = self._match(hidden, predictions)
        self.ecdf_ = ClassECDF(nearest, calibration_labels, self.num_classes)
        similarity, distance, probabilities, rescaled = self._activate(calibration_features)[2:]
        self.threshold_, self.psi_ = high_reliability_region(
            rescaled, probabilities, calibration_labels, self.alpha
        )
        self.calibration_rescaled_ = ClassECDF(rescaled, calibration_labels, self.num_classes)
        self.calibration_counts_ = torch.bincount(calibration_labels, minlength=self.num_classes)
        return self

    def predict(self, features: torch.Tensor, *, use_lower: bool = True) -> Verified:
        """Verify new points, (n, k).

        Args:
            features: as in `fit`.
            use_lower: decide on the region with the lower end of the distance's band, the cautious choice.

        Returns:
            `Verified`; `reliable` says which points the region admits, `band` is the half width of the
            Dvoretzky-Kiefer-Wolfowitz band of the distance, `lower` the probabilities at its lower end.

        Raises:
            ValueError: not fitted, or another number of features.
        """
        if not hasattr(self, "ecdf_"):
            raise ValueError("call fit before predict")
        if features.ndim != 2 or features.shape[1] != len(self.mean_):
            raise ValueError(f"features must have shape (n, {len(self.mean_)}), got {tuple(features.shape)}")
        logits, prediction, similarity, distance, probabilities, rescaled = self._activate(features.float())
        below = self._share_below(rescaled)
        effective = (below * self.calibration_counts_).round().amin(1)
        band = torch.sqrt(math.log(2 / (1 - min(self.alpha, 1 - 1e-12))) / (2 * effective)).clamp_max(1.0)
        lower = sdm_activation(logits, similarity, (distance - band).clamp_min(0))
        judged = lower if use_lower else probabilities
        over = judged >= self.psi_
        only = over.sum(1).eq(1) & over.gather(1, prediction[:, None])[:, 0]
        reliable = (rescaled.floor() > 0) & (rescaled >= self.threshold_) & only
        return Verified(
            prediction, similarity, distance, probabilities, rescaled, reliable, effective, band, lower
        )

    def _share_below(self, rescaled):
        columns = [
            torch.searchsorted(own, rescaled.contiguous(), right=False) / max(len(own), 1)
            for own in self.calibration_rescaled_.values
        ]
        return torch.stack(columns, 1)

    def _embed(self, features):
        with torch.no_grad():
            hidden = self.adaptor_((features - self.mean_) / self.scale_)
            logits = self.head_(hidden)
        return hidden, logits, logits.argmax(1)

    def _match(self, hidden, predictions):
        return depth_match(
            hidden, predictions, self.support_, self.support_labels_, self.support_predictions_
        )

    def _activate(self, features):
        hidden, logits, predictions = self._embed(features)
        similarity, nearest = self._match(hidden, predictions)
        distance = (1 - self.ecdf_(nearest)).amin(1)
        probabilities = sdm_activation(logits, similarity, distance)
        own = probabilities.gather(1, predictions[:, None])[:, 0]
        rescaled = torch.minimum(similarity, (2 + similarity) ** own)
        return logits, predictions, similarity, distance, probabilities, rescaled


class CDFRescaler:
    """Probabilities from the class-conditional distribution functions of an output: a small learned transform.

    Each output probability p_c is replaced by its rank among the calibration points whose true class is c, and a
    multinomial logistic regression on these C ranks gives probabilities. (The form of the transform is a reconstruction.)

    Args:
        penalty: inverse strength of the quadratic penalty on the weights, positive, as in scikit-learn. Ranks lie in [0, 1]
            and are mostly 0, so the weights must be large: a strong penalty (small number) makes all classes alike.

    Raises:
        ValueError: a penalty that is not positive.
    """

    def __init__(self, penalty: float = 1000.0):
        if not penalty > 0:
            raise ValueError(f"penalty must be positive, got {penalty}")
        self.penalty = penalty

    def fit(self, probabilities: torch.Tensor, labels: torch.Tensor) -> "CDFRescaler":
        """Learn from calibration points, (n, C) and (n,). Every class must occur.

        Raises:
            ValueError: shapes that do not fit, or a class without points.
        """
        if probabilities.ndim != 2 or len(probabilities) != len(labels):
            raise ValueError(
                f"expected (n, C) probabilities and n labels, got {tuple(probabilities.shape)}, {len(labels)}"
            )
        missing = set(range(probabilities.shape[1])) - set(labels.tolist())
        if missing:
            raise ValueError(f"classes {sorted(missing)} have no calibration points")
        self.ecdfs_ = [
            ClassECDF(column, labels, probabilities.shape[1]) for column in probabilities.T.contiguous()
        ]
        self.regression_ = LogisticRegression(C=self.penalty, max_iter=1000)
        self.regression_.fit(self._ranks(probabilities).numpy(), labels.numpy())
        return self

    def transform(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the classes, (n, C) to (n, C).

        Raises:
            ValueError: not fitted.
        """
        if not hasattr(self, "regression_"):
            raise ValueError("call fit before transform")
        log_probs = self.regression_.predict_log_proba(self._ranks(probabilities).numpy())
        return torch.from_numpy(log_probs).to(probabilities.dtype)

    def _ranks(self, probabilities):
        return torch.stack(
            [ecdf(probabilities[:, c])[:, c] for c, ecdf in enumerate(self.ecdfs_)], 1
        ).double()
