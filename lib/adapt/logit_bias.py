"""Few-shot adaptation of a frozen image-text model by a bias on its zero-shot logits.

Every method here is `logits = zero-shot logits + weight * bias`; they differ in what the bias is computed from, by what, and in the weight
(Tang et al., "AMU-Tuning: Effective Logit Bias for CLIP-based Few-shot Learning", arXiv 2404.08958). All work on
features computed once: the encoders are never run.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from lib.train import fit_ensemble
from lib.uncertainty import kurtosis_weight


def normalize_logits(logits: torch.Tensor) -> torch.Tensor:
    """Each row minus its mean, over its standard deviation (of a sample, C - 1), (n, C) to (n, C).

    A row of equal logits becomes zeros, with a gradient of zero. One entry is at most `(C - 1) / sqrt(C)`, and no two
    differ by more than `sqrt(2 (C - 1))`.

    Raises:
        ValueError: logits that are not floating point (n, C) with C >= 2.
    """
    if logits.dim() != 2 or not logits.is_floating_point() or logits.shape[1] < 2:
        raise ValueError(
            f"logits must be floating point (n, C), C >= 2, got {logits.dtype} {tuple(logits.shape)}"
        )
    centred = logits - logits.mean(1, keepdim=True)
    variance = centred.square().sum(1, keepdim=True) / (logits.shape[1] - 1)
    return centred / variance.clamp_min(torch.finfo(logits.dtype).tiny).sqrt()


def class_means(features: torch.Tensor, labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """The mean of the features of each class, (n, d) and (n,) to (num_classes, d).

    Raises:
        ValueError: shapes or labels that do not fit, or a class without an example.
    """
    if features.dim() != 2 or labels.shape != features.shape[:1]:
        raise ValueError(
            f"features and labels must be (n, d) and (n,), got {tuple(features.shape)}, {tuple(labels.shape)}"
        )
    if len(labels) and not (labels.min() >= 0 and labels.max() < num_classes):
        raise ValueError(f"labels must lie in 0..{num_classes - 1}")
    counts = torch.bincount(labels, minlength=num_classes)
    if not (counts > 0).all():
        raise ValueError(f"classes without an example: {(counts == 0).nonzero().flatten().tolist()}")
    sums = features.new_zeros(num_classes, features.shape[1]).index_add_(0, labels, features)
    return sums / counts.unsqueeze(1)


class LogitBias(nn.Module):
    """The zero-shot classifier, `scale * cos(image, text)`, and the frame that the methods below fill.

    A method overrides `bias`, and `prepare` if it takes something from the shots before training.

    Args:
        text_features: unit vectors, one for each class, (num_classes, dim).
        scale: of the cosines, the inverse temperature of the image-text model; 100 for CLIP.

    Raises:
        ValueError: text features that are not unit rows, or a scale that is not positive.
    """

    def __init__(self, text_features: torch.Tensor, scale: float = 100.0):
        super().__init__()
        if text_features.dim() != 2 or len(text_features) < 2 or not _are_units(text_features):
            raise ValueError(
                f"text_features must be unit rows (num_classes, dim), got {tuple(text_features.shape)}"
            )
        if not scale > 0:
            raise ValueError(f"scale must be positive, got {scale}")
        self.register_buffer("text_features", text_features.detach().clone())
        self.scale = float(scale)

    def zero_shot(self, image_features: torch.Tensor) -> torch.Tensor:
        """`scale * f0 W0`, (n, dim) to (n, num_classes); the features must be unit rows."""
        if image_features.dim() != 2 or image_features.shape[1] != self.text_features.shape[1]:
            raise ValueError(
                f"image_features must be (n, {self.text_features.shape[1]}), got {tuple(image_features.shape)}"
            )
        return self.scale * image_features @ self.text_features.T

    def bias(
        self, image_features: torch.Tensor, aux_features: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | float]:
        """The bias, (n, num_classes), and its weight, a number or (n, 1). Here zero."""
        return torch.zeros_like(self.zero_shot(image_features)), 0.0

    def prepare(
        self, image_features: torch.Tensor, labels: torch.Tensor, aux_features: torch.Tensor | None = None
    ) -> None:
        """Take from the shots what needs no training. Here nothing."""

    def forward(
        self,
        image_features: torch.Tensor,
        aux_features: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Fused logits, (n, num_classes), and with targets (n,) also the training loss, a scalar in nats."""
        bias, weight = self.bias(image_features, aux_features)
        logits = self.zero_shot(image_features) + weight * bias
        return logits if targets is None else (logits, self._loss(logits, bias, targets))

    def _loss(self, logits, bias, targets):
        return F.cross_entropy(logits, targets)

    @torch.no_grad()
    def logits(self, image_features: torch.Tensor, aux_features: torch.Tensor | None = None) -> torch.Tensor:
        """Fused logits without gradients, (n, num_classes)."""
        return self(image_features, aux_features)

    def fit(
        self,
        image_features: torch.Tensor,
        labels: torch.Tensor,
        aux_features: torch.Tensor | None = None,
        **options,
    ) -> "LogitBias":
        """Adapt to the shots; `options` are those of `fit_logit_biases`. Returns self.

        Args:
            image_features: unit rows, (n, dim).
            labels: (n,).
            aux_features: unit rows of the second encoder, (n, aux_dim), for the methods that use one.
        """
        aux = None if aux_features is None else aux_features.unsqueeze(0)
        seed = options.pop("seed", 0)
        fit_logit_biases(
            [self], image_features.unsqueeze(0), labels.unsqueeze(0), aux, seeds=[seed], **options
        )
        return self


class CoOp(LogitBias):
    """Learned prompts: bias `scale * f0 (W - W0)` with W from the text tower, weight 1 (Zhou et al. 2022, arXiv 2109.01134).

    Args:
        text_features, scale: see `LogitBias`.
        prompt: a module without inputs that returns text features (num_classes, dim), normalised here. Its parameters
            with `requires_grad` are trained; the text tower in it should be frozen.
    """

    def __init__(self, text_features: torch.Tensor, prompt: nn.Module, scale: float = 100.0):
        super().__init__(text_features, scale)
        self.prompt = prompt

    def bias(self, image_features, aux_features=None):
        return self.scale * image_features @ (F.normalize(self.prompt(), dim=1) - self.text_features).T, 1.0


class CLIPAdapter(LogitBias):
    """A bottleneck on the image feature: bias `scale * (f - f0) W0`, weight 1 (Gao et al. 2021, arXiv 2110.04544).

    `f` is `ratio * mlp(f0) + (1 - ratio) * f0`, normalised.

    Args:
        text_features, scale: see `LogitBias`.
        ratio: of the adapted feature, from 0 to 1.
        reduction: the bottleneck has `dim // reduction` units.
    """

    def __init__(
        self, text_features: torch.Tensor, scale: float = 100.0, *, ratio: float = 0.2, reduction: int = 4
    ):
        super().__init__(text_features, scale)
        if not 0 <= ratio <= 1:
            raise ValueError(f"ratio must lie in [0, 1], got {ratio}")
        dim = text_features.shape[1]
        if not 1 <= reduction <= dim:
            raise ValueError(f"reduction must be from 1 to {dim}, got {reduction}")
        self.register_buffer("ratio", torch.tensor(float(ratio)))
        self.adapter = nn.Sequential(
            nn.Linear(dim, dim // reduction, bias=False),
            nn.ReLU(),
            nn.Linear(dim // reduction, dim, bias=False),
            nn.ReLU(),
        )

    def bias(self, image_features, aux_features=None):
        mixed = self.ratio * self.adapter(image_features) + (1 - self.ratio) * image_features
        return self.scale * (F.normalize(mixed, dim=1) - image_features) @ self.text_features.T, 1.0


class TipAdapter(LogitBias):
    """A cache of the shots: bias `exp(-sharpness (1 - f0 F)) L` (Zhang et al. 2022, arXiv 2207.09519).

    F are the features of the shots, L their one-hot labels. Without training that is all; with `finetune` the keys F are trained
    (the paper's Tip-Adapter-F). Predictions need `fit` first.

    Args:
        text_features, scale: see `LogitBias`.
        alpha: the weight, at least 0.
        sharpness: positive.
        finetune: whether `fit` trains the keys.
    """

    def __init__(
        self,
        text_features: torch.Tensor,
        scale: float = 100.0,
        *,
        alpha: float = 1.0,
        sharpness: float = 5.5,
        finetune: bool = False,
    ):
        super().__init__(text_features, scale)
        if not alpha >= 0 or not sharpness > 0:
            raise ValueError(f"alpha must be at least 0 and sharpness positive, got {alpha} and {sharpness}")
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        self.register_buffer("sharpness", torch.tensor(float(sharpness)))
        self.finetune = finetune
        self.keys = nn.Parameter(torch.empty(0, text_features.shape[1]), requires_grad=finetune)
        self.register_buffer("values", torch.empty(0, len(text_features)))

    def prepare(self, image_features, labels, aux_features=None):
        self.keys.data = image_features.detach().clone()
        self.values = F.one_hot(labels, len(self.text_features)).to(image_features.dtype)

    def bias(self, image_features, aux_features=None):
        if not len(self.keys):
            raise RuntimeError("TipAdapter has no shots yet: call fit first")
        affinity = image_features @ self.keys.T  # (n, shots)
        return (-self.sharpness * (1 - affinity)).exp() @ self.values, self.alpha


class AMU(LogitBias):
    """A linear predictor on features of a second encoder, started at the class means, fused by the uncertainty of the zero-shot logits.

    The bias is `normalize_logits(W f_a)`, its weight `alpha * kurtosis_weight(zero-shot logits)`. The loss has two branches,
    `lam CE(fused) + (1 - lam) CE(bias)`. Only W is trained.

    Args:
        text_features, scale: see `LogitBias`.
        aux_dim: the dimension of the auxiliary features.
        alpha: at least 0; with 0 the zero-shot logits are left as they are.
        lam: from 0 to 1; 1 switches the second branch off.
        power: of the kurtosis, at least 0; 0 switches uncertainty off.
        kurtosis_ref: see `lib.uncertainty.kurtosis_weight`.
        init: `"means"`, the class means of the shots, or `"random"`, as `nn.Linear` starts.

    Raises:
        ValueError: an option out of range.
    """

    def __init__(
        self,
        text_features: torch.Tensor,
        aux_dim: int,
        scale: float = 100.0,
        *,
        alpha: float = 0.5,
        lam: float = 0.35,
        power: float = 0.4,
        kurtosis_ref: float | None = None,
        init: str = "means",
    ):
        super().__init__(text_features, scale)
        if not alpha >= 0 or not 0 <= lam <= 1 or not power >= 0:
            raise ValueError(
                f"alpha and power must be at least 0 and lam in [0, 1], got {alpha}, {power} and {lam}"
            )
        if init not in ("means", "random"):
            raise ValueError(f"init must be 'means' or 'random', got {init!r}")
        if kurtosis_ref is not None and not kurtosis_ref > 0:
            raise ValueError(f"kurtosis_ref must be positive, got {kurtosis_ref}")
        num_classes = len(text_features)
        ref = num_classes / 4 if kurtosis_ref is None else kurtosis_ref
        for name, value in {"alpha": alpha, "lam": lam, "power": power, "kurtosis_ref": ref}.items():
            self.register_buffer(name, torch.tensor(float(value)))
        self.init = init
        self.predictor = nn.Linear(aux_dim, num_classes, bias=False)

    def prepare(self, image_features, labels, aux_features=None):
        if self.init == "means":
            means = class_means(_aux(aux_features), labels, len(self.text_features))
            self.predictor.weight.data.copy_(means)

    def bias(self, image_features, aux_features=None):
        logits = normalize_logits(self.predictor(_aux(aux_features)))
        zero_shot = self.zero_shot(image_features)
        return logits, self.alpha * kurtosis_weight(zero_shot, self.kurtosis_ref, self.power)

    def _loss(self, logits, bias, targets):
        return self.lam * F.cross_entropy(logits, targets) + (1 - self.lam) * F.cross_entropy(bias, targets)


def fit_logit_biases(
    models: Sequence[LogitBias],
    image_features: torch.Tensor,
    labels: torch.Tensor,
    aux_features: torch.Tensor | None = None,
    *,
    seeds: Sequence[int],
    epochs: int = 50,
    batch_size: int = 8,
    lr: float = 1e-3,
    weight_decay: float = 0.01,
    eps: float = 1e-4,
    progress: bool = True,
) -> torch.Tensor | None:
    """Adapt several models of one kind at once, each to its own shots; the defaults are those of the released code of AMU-Tuning.

    AdamW with a cosine schedule down to 0. Options of the models (alpha, lam, ratio, ...) may differ, shapes may not.

    Args:
        models: of one class.
        image_features: unit rows, (models, n, dim).
        labels: (models, n).
        aux_features: unit rows, (models, n, aux_dim), or None.
        seeds: of the order of the shots, one for each model.
        epochs, batch_size, lr, weight_decay, eps: of the training.
        progress: whether to show a bar.

    Returns:
        The losses (steps, models), or None if the models have nothing to train.

    Raises:
        ValueError: sizes that do not fit together, features that are not unit rows, models of several kinds.
    """
    if not models or len({type(model) for model in models}) != 1:
        raise ValueError("give at least one model, and models of one class")
    if image_features.dim() != 3 or labels.shape != image_features.shape[:2] or len(labels) != len(models):
        raise ValueError(
            f"image_features and labels must be ({len(models)}, n, dim) and ({len(models)}, n), "
            f"got {tuple(image_features.shape)} and {tuple(labels.shape)}"
        )
    for name, features in (("image_features", image_features), ("aux_features", aux_features)):
        if features is not None and not (features.shape[:2] == labels.shape and _are_units(features)):
            raise ValueError(f"{name} must be unit rows, one for each label, got {tuple(features.shape)}")
    for i, model in enumerate(models):
        model.prepare(image_features[i], labels[i], None if aux_features is None else aux_features[i])
    if not any(parameter.requires_grad for parameter in models[0].parameters()):
        return None
    # an unused tensor in the place of missing auxiliary features keeps one signature for all kinds
    aux = image_features if aux_features is None else aux_features
    without = aux_features is None
    steps = epochs * -(-labels.shape[1] // batch_size)
    return fit_ensemble(
        models,
        lambda model, image, other, targets: model(image, None if without else other, targets)[1],
        (image_features, aux, labels),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, eps=eps),
        schedule=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
        epochs=epochs,
        seeds=seeds,
        batch_size=batch_size,
        progress=progress,
        desc="adapting",
    )


def _aux(features):
    if features is None:
        raise ValueError("AMU needs aux_features")
    return features


def _are_units(features):
    return bool(((features.norm(dim=-1) - 1).abs() < 1e-3).all())
