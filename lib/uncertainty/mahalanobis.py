"""Gaussians on the features of a classifier, and the distance to them as a confidence.

Source: Lee et al. 2018, "A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial Attacks"
(arXiv:1807.03888).
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from sklearn.linear_model import LogisticRegression
from torch import nn


class TiedGaussian:
    """One Gaussian per class with one covariance for all of them (Lee et al. 2018, equations 1 and 2).

    Sums are kept in double precision; distances come back in the dtype of the features and are differentiable with
    respect to them. The covariance is the maximum-likelihood one: squared deviations from the mean *of the own class*,
    divided by the number of samples.

    Args:
        shrinkage: a in `(1 - a) S + a trace(S)/d I`, between 0 and 1. With 0 a singular covariance is an error.

    Attributes:
        means: (C, d), the mean of each class.
        covariance: (d, d), the tied covariance before shrinkage.
        counts: (C,), samples of each class.
        rank: numerical rank of `covariance`, out of d.

    Raises:
        ValueError: shrinkage outside [0, 1].
    """

    def __init__(self, shrinkage: float = 0.0):
        if not 0 <= shrinkage <= 1:
            raise ValueError(f"shrinkage must lie in [0, 1], got {shrinkage}")
        self.shrinkage = shrinkage

    def fit(self, features: torch.Tensor, labels: torch.Tensor) -> "TiedGaussian":
        """Estimate means and covariance.

        Args:
            features: (n, d), floating point, finite.
            labels: (n,), class indices 0 to C - 1, each present at least once.

        Raises:
            ValueError: wrong shapes, a class without samples, values that are not finite, or a covariance that is
                singular after shrinkage.
        """
        rows = _rows(features)
        if labels.shape != rows.shape[:1] or labels.is_floating_point() or not len(rows):
            raise ValueError(
                f"labels must be {len(rows)} class indices, at least one, got {labels.dtype} {tuple(labels.shape)}"
            )
        if labels.min() < 0:
            raise ValueError(f"labels must be at least 0, got {int(labels.min())}")
        self.counts = torch.bincount(labels)
        if (self.counts == 0).any():
            raise ValueError(f"class {int((self.counts == 0).nonzero()[0])} has no samples")
        sums = rows.new_zeros(len(self.counts), rows.shape[1]).index_add_(0, labels, rows)
        self.means = sums / self.counts.unsqueeze(1)
        centred = rows - self.means[labels]
        self.covariance = centred.T @ centred / len(rows)
        return self._factor()

    def add_class(self, features: torch.Tensor, weight: float | None = None) -> "TiedGaussian":
        """Append one class without touching the others: a mean, and a share in the covariance (algorithm 2).

        Args:
            features: (n, d) of the new class; it becomes class C.
            weight: of its covariance in `(1 - weight) S + weight S_new`; `1 / (C + 1)` when None, as in the paper. With 0
                the covariance stays as it is. With n / (N + n) the result is that of fitting everything at once.

        Raises:
            ValueError: wrong shapes, no samples, a weight outside [0, 1], or a singular covariance.
        """
        self._check_fitted()
        rows = _rows(features)
        if not len(rows) or rows.shape[1] != self.means.shape[1]:
            raise ValueError(f"features must be (n, {self.means.shape[1]}), n > 0, got {tuple(rows.shape)}")
        weight = 1 / (len(self.means) + 1) if weight is None else weight
        if not 0 <= weight <= 1:
            raise ValueError(f"weight must lie in [0, 1], got {weight}")
        centred = rows - rows.mean(0)
        self.means = torch.cat([self.means, rows.mean(0, keepdim=True)])
        self.counts = torch.cat([self.counts, self.counts.new_tensor([len(rows)])])
        self.covariance = (1 - weight) * self.covariance + weight * centred.T @ centred / len(rows)
        return self._factor()

    def distances(self, features: torch.Tensor) -> torch.Tensor:
        """Squared Mahalanobis distances to all class means, (n, d) to (n, C).

        Features and means are multiplied by the inverse of the Cholesky factor once, after which all classes are plain
        Euclidean distances: O(n d^2 + n C d), and no inverse of the covariance.

        Raises:
            ValueError: features of another width, not finite, or the estimator is not fitted.
        """
        self._check_fitted()
        if features.dim() == 2 and features.shape[1] != self.means.shape[1]:
            raise ValueError(f"features must have {self.means.shape[1]} columns, got {features.shape[1]}")
        whitened = self._whiten(_rows(features))
        # differences, not |a|^2 - 2ab + |b|^2: far from all classes the latter loses every digit
        euclidean = torch.cdist(whitened, self._whitened_means, compute_mode="donot_use_mm_for_euclid_dist")
        return euclidean.square().to(features.dtype)

    def score(self, features: torch.Tensor) -> torch.Tensor:
        """The confidence `max_c -distance` (Lee et al. 2018, equation 2), (n, d) to (n,). Larger is more familiar."""
        return -self.distances(features).amin(1)

    def predict(self, features: torch.Tensor) -> torch.Tensor:
        """The class with the nearest mean, (n, d) to (n,)."""
        return self.distances(features).argmin(1)

    def _check_fitted(self):
        if not hasattr(self, "means"):
            raise ValueError("TiedGaussian is not fitted: call fit first")

    def _factor(self):
        d = len(self.covariance)
        self.rank = int(torch.linalg.matrix_rank(self.covariance, hermitian=True))
        scale = self.covariance.trace() / d
        shrunk = (1 - self.shrinkage) * self.covariance
        shrunk = shrunk + self.shrinkage * scale * torch.eye(d, dtype=shrunk.dtype, device=shrunk.device)
        self._cholesky, info = torch.linalg.cholesky_ex(shrunk)
        if info != 0 or (self.shrinkage == 0 and self.rank < d):
            raise ValueError(
                f"the covariance has rank {self.rank} of {d} (dead units, or too few samples): use shrinkage > 0, "
                f"got {self.shrinkage}"
            )
        self._whitened_means = self._whiten(self.means)
        return self

    def _whiten(self, rows):
        return torch.linalg.solve_triangular(self._cholesky, rows.T, upper=False).T


class MahalanobisDetector:
    """Confidence of a trained classifier in its input, from Gaussians on several of its layers (algorithm 1).

    Layers with spatial dimensions are averaged over them. At each layer the input is first moved by
    `eps * sign(gradient of that layer's score)`, the class being fixed at the nearest one. The final score is a weighted
    sum of the layers' scores; weights come from `fit_weights`, and are all one before it.

    Args:
        model: a trained classifier; it is put into evaluation mode. Its parameters are not changed.
        layers: for each layer the name of a submodule, whose output is read, or a function from inputs to features.
        eps: length of the step on each input value, at least 0, in the units of the inputs that `model` takes: when these
            are standardised per channel, pass `scale`.
        shrinkage: of each `TiedGaussian`.
        scale: standard deviations by which the inputs were divided, broadcastable to one input, or None; the step is
            divided by them too.

    Attributes:
        gaussians: one `TiedGaussian` for each layer.
        weights: (L,), and `bias`, of the logistic regression on the scores as they are.

    Raises:
        ValueError: no layers, a negative eps.
        AttributeError: the model has no submodule of that name.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str | Callable[[torch.Tensor], torch.Tensor]],
        eps: float = 0.0,
        *,
        shrinkage: float = 0.0,
        scale: torch.Tensor | float | None = None,
    ):
        if not layers:
            raise ValueError("give at least one layer")
        if not 0 <= eps < math.inf:
            raise ValueError(f"eps must be at least 0 and finite, got {eps}")
        for layer in layers:
            if isinstance(layer, str):
                model.get_submodule(layer)
        self.model, self.layers, self.eps = model.eval(), tuple(layers), eps
        self.shrinkage, self.scale = shrinkage, scale
        self.weights, self.bias = torch.ones(len(self.layers)), 0.0

    def fit(self, loader: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> "MahalanobisDetector":
        """Fit one `TiedGaussian` a layer to the clean training batches (inputs, labels) of `loader`."""
        with torch.no_grad():
            found = [([self.features(inputs, k) for k in range(len(self.layers))], y) for inputs, y in loader]
        if not found:
            raise ValueError("the loader gave no batches")
        labels = torch.cat([y for _, y in found])
        self.gaussians = [
            TiedGaussian(self.shrinkage).fit(torch.cat([layers[k] for layers, _ in found]), labels)
            for k in range(len(self.layers))
        ]
        return self

    def features(self, inputs: torch.Tensor, layer: int) -> torch.Tensor:
        """What layer number `layer` says about the inputs, averaged over space: (n, ...) to (n, d)."""
        read = self.layers[layer]
        if isinstance(read, str):
            kept = []
            module = self.model.get_submodule(read)
            hook = module.register_forward_hook(lambda module, args, output: kept.append(output))
            try:
                self.model(inputs)
            finally:
                hook.remove()
            output = kept[0]
        else:
            output = read(inputs)
        return output.flatten(2).mean(2) if output.dim() > 2 else output

    def perturb(self, inputs: torch.Tensor, layer: int) -> torch.Tensor:
        """The inputs moved by `eps` towards the nearest class of a layer (Lee et al. 2018, equation 4)."""
        moved = inputs.detach().clone().requires_grad_(True)
        with torch.enable_grad():
            # the maximum passes its gradient to the nearest class alone, which thereby is held fixed
            score = self.gaussians[layer].score(self.features(moved, layer)).sum()
            (gradient,) = torch.autograd.grad(score, moved)
        step = gradient.sign() if self.scale is None else gradient.sign() / self.scale
        return inputs.detach() + self.eps * step

    def layer_scores(self, inputs: torch.Tensor) -> torch.Tensor:
        """The score of each layer after input pre-processing, (n, ...) to (n, L). Larger is more familiar.

        Raises:
            ValueError: the detector is not fitted.
        """
        if not hasattr(self, "gaussians"):
            raise ValueError("MahalanobisDetector is not fitted: call fit first")
        columns = []
        for k, gaussian in enumerate(self.gaussians):
            moved = self.perturb(inputs, k) if self.eps > 0 else inputs
            with torch.no_grad():
                columns.append(gaussian.score(self.features(moved, k)))
        return torch.stack(columns, 1)

    def fit_weights(self, inputs_in: torch.Tensor, inputs_out: torch.Tensor) -> "MahalanobisDetector":
        """Weights of the layers by logistic regression: `inputs_in` are familiar, `inputs_out` are not.

        Use samples that neither trained the classifier nor will test the detector. Both kinds count equally whatever their
        numbers.
        """
        self.weights, self.bias = layer_weights(self.layer_scores(inputs_in), self.layer_scores(inputs_out))
        return self

    def score(self, inputs: torch.Tensor) -> torch.Tensor:
        """The weighted sum of the layers' scores, (n, ...) to (n,). Larger is more familiar."""
        scores = self.layer_scores(inputs)
        return scores @ self.weights.to(scores) + self.bias


def layer_weights(scores_in: torch.Tensor, scores_out: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Logistic regression of "familiar" on per-layer scores, any scores: `weights` and `bias` on the raw scores.

    The columns are standardised by the familiar samples alone and clipped there at 20 standard deviations while fitting,
    so that a few absurdly far samples do not set the scale; classes are balanced. The result is linear again.

    Args:
        scores_in: (n, L), larger is more familiar.
        scores_out: (m, L).

    Returns:
        Weights (L,) and the bias, such that `scores @ weights + bias` is the log odds of being familiar.

    Raises:
        ValueError: shapes that do not match, or no samples of one kind.
    """
    if scores_in.dim() != 2 or scores_out.dim() != 2 or scores_in.shape[1] != scores_out.shape[1]:
        raise ValueError(
            f"scores must be (n, L) and (m, L), got {tuple(scores_in.shape)} and {tuple(scores_out.shape)}"
        )
    if not len(scores_in) or not len(scores_out):
        raise ValueError("give at least one sample of each kind")
    centre, spread = scores_in.double().mean(0), scores_in.double().std(0, correction=0).clamp_min(1e-12)
    rows = ((torch.cat([scores_in, scores_out]).double() - centre) / spread).clamp(-20, 20)
    familiar = torch.cat([torch.ones(len(scores_in)), torch.zeros(len(scores_out))])
    judge = LogisticRegression(class_weight="balanced", max_iter=1000).fit(
        rows.cpu().numpy(), familiar.numpy()
    )
    weights = torch.from_numpy(judge.coef_[0]).to(spread) / spread
    return weights.to(scores_in), float(judge.intercept_[0] - (weights * centre).sum())


def _rows(features):
    if features.dim() != 2 or not features.is_floating_point():
        raise ValueError(
            f"features must be floating point (n, d), got {features.dtype} {tuple(features.shape)}; average "
            "convolutional features over space first"
        )
    if not features.isfinite().all():
        raise ValueError("features must be finite")
    return features.double()
