"""Logit-level distillation and the second head that carries it.

Reference: Yang et al., Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an Auxiliary Head, 2024,
arXiv:2411.08937.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from lib.distill.normalized import _check, _reduce


def binary_kl(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    temperature: float = 2.0,
    reduction: str = "mean",
) -> torch.Tensor:
    """BinaryKL: a divergence between two coins for every class, summed over the classes.

    temperature^2 sum_k KL(sigmoid(teacher_k / temperature) || sigmoid(student_k / temperature)). Unlike a softmax it sees a
    shift that all logits share. The teacher gets no gradient.

    At a glance:
        formula: `t^2 sum_k KL(sigmoid(T_k / t) || sigmoid(S_k / t))`, S and T the logits, t the temperature
        gradient: `t (sigmoid(S / t) - sigmoid(T / t))`
        consistency: `S = T`, logit by logit: it copies the teacher, right or wrong
        cost: `O(C)` per row; no gradient where both sigmoids are saturated on one side

    Args:
        student_logits: (N, C), floating point; half precision is computed in float32.
        teacher_logits: (N, C).
        temperature: divides both logits, above 0.
        reduction: `"mean"` over the rows, `"sum"` or `"none"`; the classes are always summed.

    Returns:
        A scalar, or (N,) under `reduction="none"`; at least float32.

    Raises:
        TypeError: logits that are not floating point.
        ValueError: shapes that do not fit, a temperature that is not positive, an unknown reduction.
    """
    student, teacher = _scaled_pair(student_logits, teacher_logits, temperature, reduction)
    divergence = sum(
        torch.sigmoid(sign * teacher) * (F.logsigmoid(sign * teacher) - F.logsigmoid(sign * student))
        for sign in (1, -1)
    )
    return _reduce(temperature**2 * divergence.sum(1), None, reduction)


def binary_kl_norm(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    temperature: float = 2.0,
    reduction: str = "mean",
) -> torch.Tensor:
    """BinaryKL-Norm: the coin of the difference of the logits against a fair coin, which is a log cosh.

    temperature^2 sum_k KL(1/2 || sigmoid((student_k - teacher_k) / temperature)). A smooth Huber loss on the logits: squared
    for small differences, linear for large ones, and the same wherever the teacher's logits lie. Computed as
    |x| + log(1 + exp(-2 |x|)) - log 2, which does not overflow. The teacher gets no gradient.

    At a glance:
        formula: `t^2 sum_k log cosh((S_k - T_k) / (2 t))`, S and T the logits, t the temperature
        gradient: `t / 2 tanh((S - T) / (2 t))`
        consistency: `S = T`, logit by logit: it copies the teacher, right or wrong
        cost: `O(C)` per row

    Args:
        student_logits: (N, C), floating point; half precision is computed in float32.
        teacher_logits: (N, C).
        temperature: where squared turns into linear, above 0.
        reduction: `"mean"` over the rows, `"sum"` or `"none"`; the classes are always summed.

    Returns:
        A scalar, or (N,) under `reduction="none"`; at least float32.

    Raises:
        TypeError: logits that are not floating point.
        ValueError: shapes that do not fit, a temperature that is not positive, an unknown reduction.
    """
    student, teacher = _scaled_pair(student_logits, teacher_logits, temperature, reduction)
    size = ((student - teacher) / 2).abs()
    log_cosh = size + torch.log1p(torch.exp(-2 * size)) - math.log(2)
    return _reduce(temperature**2 * log_cosh.sum(1), None, reduction)


class DualHead(nn.Module):
    """A backbone with two heads: the primary one for the labels, an auxiliary one for the teacher's logits.

    Train with `cross_entropy(first, labels) + alpha * binary_kl_norm(second, teacher)` (see also
    `lib.optim.aligned_backward`), then `export`.

    Args:
        backbone: maps inputs to features (N, dim).
        dim: of the features.
        num_classes: of the labels and of the teacher.
        aux: `"linear"`, the authors' choice for ImageNet, or `"mlp"`, theirs for CIFAR-100: linear, dropout, batch
            normalisation, ReLU, linear.
        width: hidden units of the `"mlp"` head.
        dropout: its dropout rate.

    Raises:
        ValueError: sizes below 1, or an unknown `aux`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        dim: int,
        num_classes: int,
        *,
        aux: str = "linear",
        width: int = 200,
        dropout: float = 0.1,
    ):
        super().__init__()
        if min(dim, num_classes, width) < 1:
            raise ValueError(
                f"dim, num_classes and width must be at least 1, got {dim}, {num_classes}, {width}"
            )
        if aux not in ("linear", "mlp"):
            raise ValueError(f"aux must be 'linear' or 'mlp', got {aux!r}")
        self.backbone = backbone
        self.head = nn.Linear(dim, num_classes)
        self.aux = nn.Linear(dim, num_classes)
        if aux == "mlp":
            self.aux = nn.Sequential(
                nn.Linear(dim, width),
                nn.Dropout(dropout),
                nn.BatchNorm1d(width),
                nn.ReLU(),
                nn.Linear(width, num_classes),
            )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits of the primary and of the auxiliary head, both (N, num_classes)."""
        features = self.backbone(x)
        return self.head(features), self.aux(features)

    def export(self) -> nn.Sequential:
        """The network for inference: backbone and primary head, the parameters shared with this module."""
        return nn.Sequential(self.backbone, self.head)


def _scaled_pair(student, teacher, temperature, reduction):
    _check(student, teacher, temperature=temperature, reduction=reduction)
    wide = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(wide) / temperature, teacher.detach().to(wide) / temperature
