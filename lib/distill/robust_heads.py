"""A large pre-trained model made robust by a small robust teacher: few tuned stages, three heads, and a choice among them.

After Jain, Behl, Rawat and Vineet, Efficiently Robustify Pre-trained Models, 2023, arXiv:2309.07499. The losses and the
rule of choice are a reconstruction.
"""

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from lib.uncertainty.committee import committee_entropy

HEADS = ("clean", "robust", "unified")


class RobustLosses(NamedTuple):
    """The loss of each head, scalars in nats; the training loss is `clean + robust + weight * unified`."""

    clean: torch.Tensor
    robust: torch.Tensor
    unified: torch.Tensor


class RoutedPrediction(NamedTuple):
    """What `RobustHeads.predict` returns; heads in the order of `HEADS`.

    Attributes:
        probabilities: of the chosen head, (n, C).
        chosen: the number of the head, int64, (n,).
        by_head: mean probabilities of each head, (3, n, C).
        uncertainty: entropy of each head's mean in nats, (3, n).
        divergence: KL of the clean head's mean from the robust head's, in nats, (n,).
    """

    probabilities: torch.Tensor
    chosen: torch.Tensor
    by_head: torch.Tensor
    uncertainty: torch.Tensor
    divergence: torch.Tensor


def certainty_weights(logits: torch.Tensor) -> torch.Tensor:
    """How certain a teacher is: `1 - H(softmax(logits)) / log C`, (n, C) to (n,), from 0 (uniform) to 1 (one-hot).

    Raises:
        ValueError: logits that are not floating point (n, C >= 2).
    """
    if logits.ndim != 2 or not logits.is_floating_point() or logits.shape[1] < 2:
        raise ValueError(
            f"logits must be floating point (n, C >= 2), got {logits.dtype} {tuple(logits.shape)}"
        )
    entropy = torch.special.entr(logits.softmax(1)).sum(1)
    return (1 - entropy / torch.tensor(float(logits.shape[1])).log()).clamp(0, 1)


def head_divergence(clean: torch.Tensor, robust: torch.Tensor) -> torch.Tensor:
    """`KL(clean || robust)` of distributions, (n, C) to (n,), in nats."""
    tiny = torch.finfo(clean.dtype).tiny
    return (torch.xlogy(clean, clean) - clean * robust.clamp_min(tiny).log()).sum(-1).clamp_min(0)


def route_heads(divergence: torch.Tensor, uncertainty: torch.Tensor, kappa: float) -> torch.Tensor:
    """Which head answers: the unified one where clean and robust head agree, else the more certain of these two.

    Args:
        divergence: of clean from robust head, (n,); they agree where it is at most `kappa`.
        uncertainty: of the heads in the order of `HEADS`, (3, n) or (2, n); the unified head's is not looked at.
        kappa: at least 0; infinity always takes the unified head.

    Returns:
        Places in `HEADS`, int64, (n,); a tie goes to the clean head.

    Raises:
        ValueError: shapes that do not fit, or a kappa below 0.
    """
    if uncertainty.ndim != 2 or len(uncertainty) < 2 or divergence.shape != uncertainty.shape[1:]:
        raise ValueError(
            f"divergence must be (n,) and uncertainty (3, n), got {tuple(divergence.shape)} and {tuple(uncertainty.shape)}"
        )
    if not kappa >= 0:
        raise ValueError(f"kappa must be at least 0, got {kappa}")
    surer = (uncertainty[1] < uncertainty[0]).long()
    return torch.where(divergence <= kappa, HEADS.index("unified"), surer)


class RobustHeads(nn.Module):
    """A pre-trained model of which the last stages are tuned under three heads; the stages before them stay as they are.

    `prefix` is frozen: without gradients and in eval mode whatever `train` says. `suffix` and `heads` are copies of what is
    passed, so the original model is not touched. As the prefix never changes, `encode_prefix` may be called once for each
    image; all other methods take what it returns.

    Args:
        stages: modules whose composition maps inputs to features (n, width).
        head: from features to logits; each of the three heads starts as a copy.
        tune_last: how many of the stages to tune, at least 1.
        dropout: on the features in front of the heads, in [0, 1); a head's own mask in training, and in `predict` the same masks
            for all heads.

    Raises:
        ValueError: `tune_last` or `dropout` out of range.
    """

    def __init__(
        self, stages: Sequence[nn.Module], head: nn.Module, *, tune_last: int = 2, dropout: float = 0.1
    ):
        super().__init__()
        if not 1 <= tune_last <= len(stages):
            raise ValueError(f"tune_last must be from 1 to {len(stages)}, got {tune_last}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        cut = len(stages) - tune_last
        self.prefix = nn.Sequential(*stages[:cut]).requires_grad_(False).eval()
        self.suffix = copy.deepcopy(nn.Sequential(*stages[cut:])).requires_grad_(True)
        self.heads = nn.ModuleDict({name: copy.deepcopy(head).requires_grad_(True) for name in HEADS})
        self.dropout = dropout

    def train(self, mode: bool = True) -> "RobustHeads":
        """As usual, but for the prefix, which stays in eval mode."""
        super().train(mode)
        self.prefix.eval()
        return self

    def map_heads(self, function: Callable[[nn.Module], nn.Module]) -> "RobustHeads":
        """A model with the same prefix and suffix and other heads: `function` of each one, which is not copied."""
        other = copy.copy(self)
        other._modules = dict(self._modules)
        other.heads = nn.ModuleDict({name: function(head) for name, head in self.heads.items()})
        return other

    @torch.no_grad()
    def encode_prefix(self, inputs: torch.Tensor, batch_size: int = 1024) -> torch.Tensor:
        """What the frozen stages make of the inputs, (n, ...), without gradient."""
        return torch.cat([self.prefix(part) for part in inputs.split(batch_size)])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of the three heads, (3, n, C); with dropout in training mode."""
        features = self.suffix(hidden)
        return torch.stack([self._read(name, features) for name in HEADS])

    def _read(self, name, features):
        return self.heads[name](F.dropout(features, self.dropout, self.training))

    def training_losses(
        self,
        hidden: torch.Tensor,
        augmented: torch.Tensor,
        targets: torch.Tensor,
        teacher_logits: torch.Tensor,
        original_logits: torch.Tensor,
    ) -> RobustLosses:
        """The loss of each head on a batch of images and one augmentation of each.

        The clean head learns the labels and the original model's distribution, on the images. The robust head learns the
        labels and, with weight `certainty_weights`, the teacher's distribution, on the augmentations. The unified head learns,
        on both, the labels and the mean distribution of the other two, which gets no gradient from it.

        Args:
            hidden: what `encode_prefix` makes of the images, (n, ...).
            augmented: the same of their augmentations.
            targets: int64, (n,).
            teacher_logits: the small teacher's on the augmentations, (n, C).
            original_logits: the pre-trained model's on the images, (n, C).

        Raises:
            ValueError: batches of different lengths.
        """
        sizes = [len(each) for each in (hidden, augmented, targets, teacher_logits, original_logits)]
        if len(set(sizes)) > 1:
            raise ValueError(f"all arguments must have one length, got {sizes}")
        n = len(hidden)
        # (3, 2n, C): the images first, then their augmentations
        logits = self(torch.cat([hidden, augmented]))
        log_clean, log_robust, log_unified = logits.log_softmax(-1)
        teacher, original = teacher_logits.detach().log_softmax(-1), original_logits.detach().log_softmax(-1)
        clean = F.nll_loss(log_clean[:n], targets) + _kl(original, log_clean[:n]).mean()
        trusted = certainty_weights(teacher_logits.detach()) * _kl(teacher, log_robust[n:])
        robust = F.nll_loss(log_robust[n:], targets) + trusted.mean()
        average = ((log_clean.exp() + log_robust.exp()) / 2).detach().log()
        unified = F.nll_loss(log_unified, torch.cat([targets, targets])) + _kl(average, log_unified).mean()
        return RobustLosses(clean, robust, unified)

    @torch.no_grad()
    def committee(
        self, hidden: torch.Tensor, mc: int = 8, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean distribution, (3, n, C), and its entropy in nats, (3, n), of each head over `mc` dropout masks.

        The suffix runs once; only the heads are repeated. `mc=0` switches dropout off.

        Raises:
            ValueError: a negative `mc`.
        """
        if mc < 0:
            raise ValueError(f"mc must be at least 0, got {mc}")
        training = self.training
        self.eval()
        features = self.suffix(hidden)
        self.train(training)
        if mc == 0 or self.dropout == 0:
            features = features[None]
        else:
            draws = torch.rand(mc, *features.shape, generator=generator, dtype=features.dtype)
            features = features * (draws >= self.dropout).to(features) / (1 - self.dropout)
        flat = features.flatten(0, 1)
        members = torch.stack([self.heads[name](flat).softmax(-1) for name in HEADS])
        members = members.unflatten(1, features.shape[:2]).transpose(0, 1)  # (mc, 3, n, C)
        mean, entropy, _ = committee_entropy(members)
        return mean, entropy

    def calibrate(
        self,
        hidden: torch.Tensor,
        quantile: float = 0.95,
        mc: int = 8,
        generator: torch.Generator | None = None,
    ) -> float:
        """The threshold `kappa` below which the divergence of the heads lies for this share of clean validation images.

        Raises:
            ValueError: a quantile outside [0, 1].
        """
        if not 0 <= quantile <= 1:
            raise ValueError(f"quantile must lie in [0, 1], got {quantile}")
        mean, _ = self.committee(hidden, mc, generator)
        return head_divergence(mean[0], mean[1]).quantile(quantile).item()

    def predict(
        self,
        hidden: torch.Tensor,
        kappa: float,
        mc: int = 8,
        generator: torch.Generator | None = None,
    ) -> RoutedPrediction:
        """Predict by the head that `route_heads` chooses for each input.

        Args:
            hidden: what `encode_prefix` returns, (n, ...).
            kappa: threshold on the divergence between clean and robust head, as `calibrate` finds it.
            mc: dropout masks; 0 switches dropout off.
            generator: of the masks.
        """
        mean, entropy = self.committee(hidden, mc, generator)
        divergence = head_divergence(mean[0], mean[1])
        chosen = route_heads(divergence, entropy, kappa)
        probabilities = mean[chosen, torch.arange(len(chosen), device=chosen.device)]
        return RoutedPrediction(probabilities, chosen, mean, entropy, divergence)


def _kl(log_p, log_q):
    """KL(p || q) of each row."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
