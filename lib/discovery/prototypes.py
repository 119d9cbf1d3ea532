"""Classes that were never trained: prototypes from a few examples."""

import torch
import torch.nn.functional as F


class PrototypeClassifier:
    """The nearest class mean of the embeddings, to which classes can be added at any time.

    Args:
        metric: `"cosine"`: embeddings are normalised, prototypes are the normalised means, the largest cosine wins;
            `"euclidean"`: plain means, the smallest distance wins.

    Attributes:
        classes_: labels in order of arrival, (classes,).
        prototypes_: (classes, d).

    Raises:
        ValueError: an unknown metric.
    """

    def __init__(self, metric: str = "cosine"):
        if metric not in ("cosine", "euclidean"):
            raise ValueError(f"metric must be 'cosine' or 'euclidean', got {metric!r}")
        self.metric = metric

    def fit(self, embeddings: torch.Tensor, labels: torch.Tensor) -> "PrototypeClassifier":
        """Forget everything and learn the classes of (n, d) embeddings with labels (n,). Returns self."""
        self.classes_ = labels.new_empty(0)
        self.prototypes_ = embeddings.new_empty(0, embeddings.shape[1] if embeddings.ndim == 2 else 0)
        return self.add_classes(embeddings, labels)

    def add_classes(self, embeddings: torch.Tensor, labels: torch.Tensor) -> "PrototypeClassifier":
        """Add the classes of (n, d) embeddings with labels (n,); the others stay as they are. Returns self.

        Raises:
            ValueError: not fitted, shapes that do not fit, or a class that is there already.
        """
        self._check_fitted()
        if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1] or not len(labels):
            raise ValueError(
                f"expected (n, d) and (n,) with n >= 1, got {tuple(embeddings.shape)}, {tuple(labels.shape)}"
            )
        new, index, counts = labels.unique(return_inverse=True, return_counts=True)
        known = new[torch.isin(new, self.classes_)]
        if len(known):
            raise ValueError(f"classes {known.tolist()} are there already")
        points = self._prepare(embeddings)
        sums = points.new_zeros(len(new), points.shape[1]).index_add(0, index, points)
        means = sums / counts.unsqueeze(1)
        self.prototypes_ = torch.cat([self.prototypes_, self._prepare(means)])
        self.classes_ = torch.cat([self.classes_, new])
        return self

    def predict(self, embeddings: torch.Tensor, candidates: torch.Tensor | None = None) -> torch.Tensor:
        """Labels of (n, d) embeddings, (n,).

        Args:
            embeddings: to classify.
            candidates: labels that may be answered; None allows all.

        Raises:
            ValueError: not fitted, another dimension, or candidates that are not there.
        """
        self._check_fitted()
        if embeddings.ndim != 2 or embeddings.shape[1] != self.prototypes_.shape[1]:
            raise ValueError(
                f"embeddings must be (n, {self.prototypes_.shape[1]}), got {tuple(embeddings.shape)}"
            )
        allowed = torch.ones_like(self.classes_, dtype=torch.bool)
        if candidates is not None:
            allowed = torch.isin(self.classes_, candidates)
            if int(allowed.sum()) != len(candidates.unique()):
                raise ValueError("candidates holds classes that are not there")
        points, prototypes = self._prepare(embeddings), self.prototypes_[allowed]
        if self.metric == "cosine":
            best = (points @ prototypes.T).argmax(1)
        else:
            best = torch.cdist(points, prototypes).argmin(1)
        return self.classes_[allowed][best]

    def _prepare(self, points):
        return F.normalize(points, dim=1) if self.metric == "cosine" else points

    def _check_fitted(self):
        if not hasattr(self, "classes_"):
            raise ValueError("call fit first")


def evaluate_novel(
    known: tuple[torch.Tensor, torch.Tensor],
    known_test: tuple[torch.Tensor, torch.Tensor],
    novel: tuple[torch.Tensor, torch.Tensor],
    *,
    shots: int,
    draws: int = 20,
    metric: str = "cosine",
    generator: torch.Generator | None = None,
) -> dict[str, float]:
    """Accuracy on classes that the embedding was not trained on, alone and among the known ones.

    For each draw, `shots` examples of every novel class become its prototype and the rest is classified.

    Args:
        known: embeddings (n, d) and labels of training examples, for the prototypes of the known classes.
        known_test: the same of test examples of the known classes.
        novel: the same of the novel classes; each needs more than `shots` examples.
        shots: examples of each novel class, at least 1.
        draws: how often the shots are drawn anew.
        metric: as in `PrototypeClassifier`.
        generator: of the draws.

    Returns:
        Means over the draws: `disjoint` (novel examples, novel candidates), `joint_novel` and `joint_known` (all candidates), and
        `joint`, the harmonic mean of these two.

    Raises:
        ValueError: a novel class with too few examples, or one that is known.
    """
    x, y = novel
    classes, index, counts = y.unique(return_inverse=True, return_counts=True)
    smallest = int(counts.min())
    if shots < 1 or draws < 1 or smallest <= shots:
        raise ValueError(
            f"every novel class needs more than shots={shots} examples, the smallest has {smallest}"
        )
    base = PrototypeClassifier(metric).fit(*known)
    totals = torch.zeros(3, dtype=torch.float64)
    for _ in range(draws):
        order = torch.randperm(len(y), generator=generator)
        place = F.one_hot(index[order]).cumsum(0).gather(1, index[order, None])[:, 0]
        taken = order[place <= shots]  # the first of each class in random order
        rest = torch.ones(len(y), dtype=torch.bool)
        rest[taken] = False
        classifier = PrototypeClassifier(metric)
        classifier.classes_, classifier.prototypes_ = base.classes_, base.prototypes_
        classifier.add_classes(x[taken], y[taken])
        for slot, (points, labels, candidates) in enumerate(
            ((x[rest], y[rest], classes), (x[rest], y[rest], None), (*known_test, None))
        ):
            totals[slot] += (classifier.predict(points, candidates) == labels).double().mean()
    disjoint, joint_novel, joint_known = (totals / draws).tolist()
    harmonic = (
        2 * joint_novel * joint_known / (joint_novel + joint_known) if joint_novel + joint_known else 0.0
    )
    return {"disjoint": disjoint, "joint_novel": joint_novel, "joint_known": joint_known, "joint": harmonic}
