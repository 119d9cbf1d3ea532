"""Distillation losses on logits, taken apart into target and non-target classes.

Everything here is a function of three numbers a row: how far the target's logit lies above the log-sum-exp of the others,
for the student and for the teacher, and the cross-entropy between their distributions over the other classes. No copy of
the logits is kept for the backward pass.

Reference: Yang et al., From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized
Loss and Customized Soft Labels, 2023, arXiv:2303.13005.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

# logits are worked on in slices of rows, so that temporaries are small beside them
ELEMENTS, PARTS = 2**16, 16


class KDTerms(NamedTuple):
    """The three terms of the distillation loss at temperature 1; their sum is the loss.

    Attributes:
        target: -T_y log S_y.
        nontarget: (1 - T_y) times the cross-entropy of the two softmaxes over the non-target logits.
        mass: -(1 - T_y) log(1 - S_y).
    """

    target: torch.Tensor
    nontarget: torch.Tensor
    mass: torch.Tensor


def kd_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    temperature: float = 1.0,
    reduction: str = "mean",
) -> torch.Tensor:
    """Knowledge distillation: temperature^2 times the cross-entropy of the student under the teacher.

    The cross-entropy, not the divergence: the two differ by the teacher's entropy, which has no gradient. The teacher
    gets no gradient.

    At a glance:
        formula: `-t^2 sum_k T_k log S_k`, S and T the softmaxes of the logits over the temperature t
        gradient: `t (S - T)`
        consistency: `S = T`: it copies the teacher, right or wrong
        cost: `O(C)` per row; no copy of the logits is kept

    Args:
        student_logits: (N, C), floating point; half precision is computed in float32.
        teacher_logits: (N, C).
        temperature: divides both logits, above 0.
        reduction: `"mean"` over the rows, `"sum"` or `"none"`.

    Returns:
        A scalar, or (N,) under `reduction="none"`; at least float32.

    Raises:
        TypeError: logits that are not floating point.
        ValueError: shapes that do not fit, a temperature that is not positive, an unknown reduction.
    """
    _check(student_logits, teacher_logits, temperature=temperature, reduction=reduction)
    cross, _, _ = _Rows.apply(student_logits, teacher_logits.detach(), None, float(temperature), None)
    return _reduce(temperature**2 * cross, None, reduction)


def kd_decomposition(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> KDTerms:
    """The three terms of `kd_loss` at temperature 1, each differentiable.

    Args:
        student_logits: (N, C), floating point; half precision is computed in float32.
        teacher_logits: (N, C); gets no gradient.
        targets: class indices (N,); or label distributions (N, C), of which the largest entry counts.
        reduction: `"mean"` over the rows not ignored, `"sum"` or `"none"`.
        ignore_index: rows with this target index contribute nothing.

    Returns:
        `KDTerms(target, nontarget, mass)`, scalars or (N,); at least float32.

    Raises:
        TypeError: dtypes that do not fit.
        ValueError: shapes that do not fit, targets out of range, an unknown reduction.
    """
    _check(student_logits, teacher_logits, targets, reduction=reduction, ignore_index=ignore_index)
    labels, valid = _labels(targets, ignore_index)
    cross, margin, teacher_margin = _Rows.apply(student_logits, teacher_logits.detach(), labels, 1.0, 1.0)
    share, rest = teacher_margin.sigmoid(), (-teacher_margin).sigmoid()  # T_y and 1 - T_y
    terms = (-share * F.logsigmoid(margin), rest * cross, -rest * F.logsigmoid(-margin))
    return KDTerms(*(_reduce(term, valid, reduction) for term in terms))


def nkd_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    gamma: float = 1.5,
    temperature: float = 1.0,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> torch.Tensor:
    """Normalized knowledge distillation, to be added to the cross-entropy of the labels.

    -T_y log S_y + gamma temperature^2 H(T', S'), where T' and S' are the softmaxes over the logits of the C - 1 classes
    that are not the target, divided by the temperature. The target term has no temperature.

    At a glance:
        formula: `-T_y log S_y - gamma t^2 sum_(k != y) T'_k log S'_k`
        gradient: `T_y (S - e_y) + gamma t (S' - T')`, S' and T' being 0 at the target
        consistency: the other classes as the teacher orders them; the target's share comes from the labels' cross-entropy beside it
        cost: `O(C)` per row; no copy of the logits is kept

    Args:
        student_logits: (N, C), floating point; half precision is computed in float32.
        teacher_logits: (N, C); gets no gradient.
        targets: class indices (N,); or label distributions (N, C), as from mixup, of which the largest entry counts.
        gamma: weight of the non-target term, at least 0. The authors take 1.5 with temperature 1 on ImageNet.
        temperature: of the non-target distributions, above 0.
        reduction: `"mean"` over the rows not ignored, `"sum"` or `"none"`.
        ignore_index: rows with this target index have no loss and no gradient, and do not count in the mean.

    Returns:
        A scalar, or (N,) under `reduction="none"`; at least float32.

    Raises:
        TypeError: dtypes that do not fit.
        ValueError: shapes that do not fit, targets out of range, `gamma` or `temperature` outside its range, an
            unknown reduction.
    """
    _check(
        student_logits, teacher_logits, targets, temperature=temperature, reduction=reduction,
        ignore_index=ignore_index, weights={"gamma": gamma},
    )  # fmt: skip
    labels, valid = _labels(targets, ignore_index)
    inputs = (student_logits, teacher_logits.detach(), labels)
    cross, margin, teacher_margin = _Rows.apply(*inputs, float(temperature), 1.0)
    losses = -teacher_margin.sigmoid() * F.logsigmoid(margin) + gamma * temperature**2 * cross
    return _reduce(losses, valid, reduction)


def dkd_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 6.0,
    temperature: float = 4.0,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> torch.Tensor:
    """Decoupled knowledge distillation (Zhao et al. 2022, arXiv 2203.08679).

    temperature^2 (alpha KL of the pairs (target, rest) + beta KL of the distributions over the non-targets), all of them
    at the temperature.

    At a glance:
        formula: `t^2 (alpha KL(T_y, 1 - T_y || S_y, 1 - S_y) + beta KL(T' || S'))`
        gradient: `t (alpha (S_y - T_y) (e_y - S') + beta (S' - T'))`, S' and T' being 0 at the target
        consistency: `S = T`: it copies the teacher, its two parts weighed apart
        cost: `O(C)` per row; no copy of the logits is kept

    Args:
        student_logits: (N, C), floating point; half precision is computed in float32.
        teacher_logits: (N, C); gets no gradient.
        targets: class indices (N,); or label distributions (N, C), of which the largest entry counts.
        alpha: weight of the target part, at least 0.
        beta: weight of the non-target part, at least 0.
        temperature: divides all logits, above 0.
        reduction: `"mean"` over the rows not ignored, `"sum"` or `"none"`.
        ignore_index: rows with this target index have no loss and no gradient, and do not count in the mean.

    Returns:
        A scalar, or (N,) under `reduction="none"`; at least float32.

    Raises:
        TypeError: dtypes that do not fit.
        ValueError: shapes that do not fit, targets out of range, `alpha`, `beta` or `temperature` outside its range, an
            unknown reduction.
    """
    _check(
        student_logits, teacher_logits, targets, temperature=temperature, reduction=reduction,
        ignore_index=ignore_index, weights={"alpha": alpha, "beta": beta},
    )  # fmt: skip
    labels, valid = _labels(targets, ignore_index)
    teacher_logits = teacher_logits.detach()
    temperature = float(temperature)
    cross, margin, teacher_margin = _Rows.apply(
        student_logits, teacher_logits, labels, temperature, temperature
    )
    entropy, _, _ = _Rows.apply(teacher_logits, teacher_logits, labels, temperature, None)
    binary = sum(
        F.logsigmoid(sign * teacher_margin).exp()
        * (F.logsigmoid(sign * teacher_margin) - F.logsigmoid(sign * margin))
        for sign in (1, -1)
    )
    return _reduce(temperature**2 * (alpha * binary + beta * (cross - entropy)), valid, reduction)


class USKD(nn.Module):
    """Universal self-knowledge distillation: soft labels without a teacher, to be added to the labels' cross-entropy.

    alpha L_target + beta L_nontarget + mu L_weak. The target's label is S_y^2 + V_y - mean over the batch of S_y^2; the
    non-target labels follow Zipf's law in the order of the sum of two normalised predictions, the model's own and
    that of a weak classifier on an intermediate feature, which this module owns and trains with label smoothing.

    Args:
        channels: of the intermediate feature.
        num_classes: number of logits, at least 2 (3 for mixed labels).
        alpha: weight of the target term; the default weights are the authors' for ImageNet.
        beta: weight of the non-target term.
        mu: weight of the weak classifier's loss.
        rank_mode: `"paper"` adds the two normalised probabilities; `"official"` adds the weak probability and the
            model's log-probability divided by one minus the target's, as the authors' code does.

    Raises:
        ValueError: sizes below their least, negative weights, an unknown `rank_mode`.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        alpha: float = 1.0,
        beta: float = 0.1,
        mu: float = 0.005,
        rank_mode: str = "paper",
    ):
        super().__init__()
        if channels < 1 or num_classes < 2:
            raise ValueError(
                f"channels must be at least 1 and num_classes at least 2, got {channels} and {num_classes}"
            )
        _check_weights({"alpha": alpha, "beta": beta, "mu": mu})
        if rank_mode not in ("paper", "official"):
            raise ValueError(f"rank_mode must be 'paper' or 'official', got {rank_mode!r}")
        self.alpha, self.beta, self.mu, self.rank_mode = alpha, beta, mu, rank_mode
        self.weak = nn.Linear(channels, num_classes)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}, mu={self.mu}, rank_mode={self.rank_mode!r}"

    def forward(self, feature: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss, a scalar: the mean over the batch, which has to be whole, since the target's label uses its mean.

        Args:
            feature: (N, channels), or maps (N, channels, ...) which are averaged over all further dimensions.
            logits: (N, num_classes), of the same model.
            targets: class indices (N,), or label distributions (N, num_classes), of which the two largest entries
                count as targets.

        Raises:
            TypeError: dtypes that do not fit.
            ValueError: shapes that do not fit, or targets out of range.
        """
        weak_logits = self.weak_logits(feature, logits)
        labels, values = self._targets(logits, targets)
        target_labels = self._target_labels(logits, labels, values)
        ranks = self._ranks(weak_logits, logits, labels)
        # with (N, 1) or (N, 2) targets: log S_y of each
        log_target = logits.gather(1, labels) - logits.logsumexp(1, keepdim=True)
        target = -(target_labels * log_target).sum(1)
        # the Zipf labels 1 / rank, normalised, are the softmax of -log(rank)
        nontarget, _, _ = _Rows.apply(logits, -ranks.to(logits.dtype).log(), labels, 1.0, None)
        weak = F.cross_entropy(weak_logits, targets, label_smoothing=0.1)
        return self.alpha * target.mean() + self.beta * nontarget.mean() + self.mu * weak

    def labels(
        self, feature: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The soft labels of a batch: (N, 1) or (N, 2) for the targets, and (N, num_classes) for the non-targets.

        The latter are 0 at the targets and sum to 1. Arguments and errors are those of `forward`.
        """
        weak_logits = self.weak_logits(feature, logits)
        labels, values = self._targets(logits, targets)
        zipf = 1 / self._ranks(weak_logits, logits, labels).to(logits.dtype)
        zipf = zipf.scatter(1, labels, 0.0)
        return self._target_labels(logits, labels, values), zipf / zipf.sum(1, keepdim=True)

    def weak_logits(self, feature: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The weak classifier's logits, (N, num_classes), for a feature as in `forward`."""
        channels, classes = self.weak.in_features, self.weak.out_features
        if feature.dim() < 2 or feature.shape[1] != channels:
            raise ValueError(f"feature must be (N, {channels}, ...), got {tuple(feature.shape)}")
        if logits.dim() != 2 or logits.shape[1] != classes or logits.shape[0] != feature.shape[0]:
            raise ValueError(
                f"logits must be ({feature.shape[0]}, {classes}) to fit the feature, got {tuple(logits.shape)}"
            )
        return self.weak(feature if feature.dim() == 2 else feature.flatten(2).mean(2))

    def _targets(self, logits, targets):
        """Indices and values of the targets, (N, 1), or (N, 2) with the first index repeated where the second is 0."""
        _check(logits, logits, targets)
        if not targets.is_floating_point():
            labels = targets.long().unsqueeze(1)
            return labels, torch.ones_like(labels, dtype=logits.dtype)
        if logits.shape[1] < 3:
            raise ValueError("label distributions need at least three classes, so that one is not a target")
        values, labels = targets.topk(2, dim=1)
        return torch.where(values > 0, labels, labels[:, :1]), values.to(logits.dtype)

    @staticmethod
    @torch.no_grad()
    def _target_labels(logits, labels, values):
        squared = (logits.gather(1, labels) - logits.logsumexp(1, keepdim=True)).exp().square()
        return torch.where(values > 0, squared + values - squared.mean(0, keepdim=True), 0.0)

    @torch.no_grad()
    def _ranks(self, weak_logits, logits, labels):
        """The position of every class, the highest score first, 1 to num_classes; ties go to the lower index."""

        def normalised(
            x,
        ):  # probability over one minus that of the targets, also when that is 1 in floating point
            return (x - x.scatter(1, labels, -torch.inf).logsumexp(1, keepdim=True)).exp()

        scores = normalised(weak_logits)
        if self.rank_mode == "paper":
            scores = scores + normalised(logits)
        else:
            log_probability = logits.log_softmax(1)
            # both entries of (N, 2) count, also a repeated one with value 0, as in the authors' code
            scores = scores + log_probability / (1 - log_probability.gather(1, labels).sum(1, keepdim=True))
        order = scores.argsort(dim=1, descending=True, stable=True)
        return order.argsort(dim=1) + 1


class _Rows(torch.autograd.Function):
    """What the losses need of each row of student and teacher logits, both (N, C). Three outputs, each (N,):

    - the cross-entropy of the student's softmax under the teacher's, at the temperature, over the classes that are not
      excluded;
    - the student's margin: the target's logit minus the log-sum-exp of all others, at the margin's temperature, so that
      log S_y = logsigmoid(margin) and log(1 - S_y) = logsigmoid(-margin);
    - the teacher's margin, which is not differentiable.

    `excluded` holds class indices, (N, k), or is None. Margins need k = 1, and are 0 where their temperature is None.
    Nothing but the inputs is kept: the backward pass computes the softmaxes anew, some rows at a time.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(student, teacher, excluded, temperature, margin_temperature):
        parts = []
        for rows in _row_slices(student):
            s, t, out = student[rows], teacher[rows], None if excluded is None else excluded[rows]
            soft = _softmax(t, out, temperature)
            scaled = _scaled(s, temperature)
            cross = _mask(scaled, out).logsumexp(1) - (soft * scaled).sum(1)
            margins = [torch.zeros_like(cross)] * 2
            if margin_temperature is not None:
                margins = [_margin(_scaled(logits, margin_temperature), out) for logits in (s, t)]
            parts.append((cross, *margins))
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    @staticmethod
    def setup_context(ctx, inputs, output):
        student, teacher, excluded, ctx.temperature, ctx.margin_temperature = inputs
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(student, teacher, excluded)

    @staticmethod
    def backward(ctx, grad_cross, grad_margin, _):
        student, teacher, excluded = ctx.saved_tensors
        temperature, margin_temperature = ctx.temperature, ctx.margin_temperature
        parts = []
        for rows in _row_slices(student):
            s, t, out = student[rows], teacher[rows], None if excluded is None else excluded[rows]
            soft = _softmax(s, out, temperature)
            grad = (soft - _softmax(t, out, temperature)) * (grad_cross[rows] / temperature).unsqueeze(1)
            if margin_temperature is not None:
                if margin_temperature != temperature:
                    soft = _softmax(s, out, margin_temperature)
                slope = (grad_margin[rows] / margin_temperature).unsqueeze(1)
                grad = (grad - soft * slope).scatter_add(1, out, slope)
            parts.append(grad.to(student.dtype))
        return torch.cat(parts), None, None, None, None


def _row_slices(logits):
    """Consecutive slices of rows, at most PARTS of them, of about ELEMENTS logits each if that is enough."""
    count, classes = logits.shape
    step = max(1, ELEMENTS // classes, -(-count // PARTS))
    return [slice(start, start + step) for start in range(0, max(count, 1), step)]


def _scaled(logits, temperature):
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits if temperature == 1 else logits / temperature


def _mask(logits, excluded):
    return logits if excluded is None else logits.scatter(1, excluded, -torch.inf)


def _softmax(logits, excluded, temperature):
    return _mask(_scaled(logits, temperature), excluded).softmax(1)  # 0 for the excluded classes


def _margin(logits, labels):
    return logits.gather(1, labels).squeeze(1) - _mask(logits, labels).logsumexp(1)


def _labels(targets, ignore_index):
    """Class indices (N, 1) that can be gathered, and which rows count, (N,)."""
    if targets.is_floating_point():
        labels = targets.argmax(1)
        return labels.unsqueeze(1), torch.ones_like(labels, dtype=torch.bool)
    valid = targets != ignore_index
    return torch.where(valid, targets, 0).long().unsqueeze(1), valid


def _reduce(losses, valid, reduction):
    if valid is not None:
        losses = torch.where(valid, losses, 0.0)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.mean() if valid is None else losses.sum() / valid.sum()


def _check_weights(weights):
    for name, value in weights.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be at least 0 and finite, got {value}")


def _check(
    student, teacher, targets=None, *, temperature=1.0, reduction="mean", ignore_index=None, weights=None
):
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        if not logits.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {logits.dtype}")
    if student.dim() != 2 or student.shape != teacher.shape:
        raise ValueError(
            f"logits must both be (N, C), got student {tuple(student.shape)} and teacher {tuple(teacher.shape)}"
        )
    count, classes = student.shape
    if classes < (1 if targets is None else 2):
        raise ValueError(f"there is no class beside the target: got logits of shape {tuple(student.shape)}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be above 0 and finite, got {temperature}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    _check_weights(weights or {})
    if targets is None:
        return
    if targets.is_floating_point():
        if targets.shape != student.shape:
            raise ValueError(f"label distributions must be ({count}, {classes}), got {tuple(targets.shape)}")
        return
    if targets.dtype == torch.bool or targets.is_complex():
        raise TypeError(f"targets must be class indices or label distributions, got {targets.dtype}")
    if targets.shape != (count,):
        raise ValueError(f"targets must be ({count},), got {tuple(targets.shape)}")
    if torch._C._functorch.is_functorch_wrapped_tensor(targets) or targets.is_meta or not count:
        return  # values cannot be read there; gather still refuses what is out of range
    wrong = (targets < 0) | (targets >= classes)
    if ignore_index is not None:
        wrong &= targets != ignore_index
    if wrong.any():
        raise ValueError(f"targets must be in [0, {classes}), got {targets[wrong][0].item()}")
