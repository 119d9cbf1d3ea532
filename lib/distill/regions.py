"""Distillation from stored labels of stored crops, and the repair of labels that a teacher gave to the background.

The teacher looks at every crop once, before training. What it said is kept in a bank, compressed to its k largest
probabilities; training replays crops and labels, and never sees the teacher.

References: Shen and Xing, A Fast Knowledge Distillation Framework for Visual Recognition (FKD), 2021, arXiv:2112.01528;
Shen, FerKD: Surgical Label Adaptation for Efficient Distillation, 2023, arXiv:2312.17473.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from lib.data.crops import crop_parameters, random_resized_crop

MODES = ("smoothing", "renorm", "full")
CONTEXT, HARD, EASY = range(3)  # the categories of `calibrate_regions`


class CalibratedLabels(NamedTuple):
    """What `calibrate_regions` returns.

    Attributes:
        labels: distributions, in the shape of the teacher's labels.
        keep: which crops to train on.
        category: 0 context (hard negative), 1 hard positive, 2 easy positive.
    """

    labels: torch.Tensor
    keep: torch.Tensor
    category: torch.Tensor


def compress_topk(probabilities: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest probabilities and where they are: 2 k numbers in place of C.

    Args:
        probabilities: distributions, (..., C).
        k: from 1 to C.

    Returns:
        Indices, int64 (..., k), and probabilities (..., k), the largest first.

    Raises:
        ValueError: no distributions, or a k out of range.
    """
    _check_distributions(probabilities, "probabilities")
    if not 1 <= k <= probabilities.shape[-1]:
        raise ValueError(f"k must be from 1 to the number of classes, {probabilities.shape[-1]}, got {k}")
    values, indices = probabilities.topk(k, -1)
    return indices, values


def recover_topk(
    indices: torch.Tensor, values: torch.Tensor, num_classes: int, mode: str = "smoothing"
) -> torch.Tensor:
    """Distributions from their k largest probabilities.

    Args:
        indices: integers (..., k), different within a row.
        values: probabilities (..., k).
        num_classes: C, at least k.
        mode: `"smoothing"` spreads the missing mass evenly over the other C - k classes (where k = C there is none);
            `"renorm"` leaves these at 0 and divides by the mass kept.

    Returns:
        (..., C), with sum 1.

    Raises:
        ValueError: shapes that do not fit, fewer classes than values, indices out of range, an unknown mode.

    Reference: Shen and Xing (2021), marginal smoothing and marginal re-normalisation.
    """
    if indices.shape != values.shape or not indices.dim():
        raise ValueError(
            f"indices and values must have one shape (..., k), got {tuple(indices.shape)} and {tuple(values.shape)}"
        )
    k = values.shape[-1]
    if not 1 <= k <= num_classes:
        raise ValueError(f"num_classes must be at least the number of values, {k}, got {num_classes}")
    if indices.numel() and not (indices.amin() >= 0 and indices.amax() < num_classes):
        raise ValueError(f"indices must lie in [0, {num_classes}), got {indices.amin()} to {indices.amax()}")
    if mode not in MODES[:2]:
        raise ValueError(f"mode must be 'smoothing' or 'renorm', got {mode!r}")
    mass = values.sum(-1, keepdim=True)
    if mode == "renorm":
        values, rest = values / mass, torch.zeros_like(mass)
    else:
        rest = (1 - mass).clamp_min(0) / max(num_classes - k, 1)
    return rest.expand(*values.shape[:-1], num_classes).scatter(-1, indices.long(), values)


def calibrate_regions(
    confidence: torch.Tensor,
    labels: torch.Tensor,
    targets: torch.Tensor,
    *,
    low: float,
    high: float,
    label_smoothing: float = 0.1,
    drop_easy: float = 0.0,
) -> CalibratedLabels:
    """Replace the teacher's label where it did not see the object, keep it elsewhere, and drop the crops that teach little.

    Crops whose `confidence` is at most `low` are context: they get the softened hard label
    (1 - label_smoothing) e_y + label_smoothing / C. Between the thresholds the teacher's label stays. From `high` on the
    crop is easy: its label stays too, and the share `drop_easy` of these crops, the most confident, is not kept.

    Args:
        confidence: the teacher's probability of the TRUE class, (...). Not its largest probability: that is small
            for an ambiguous crop, and large for a background that looks like another class.
        labels: the teacher's distributions, (..., C).
        targets: true classes, integers (...).
        low, high: thresholds, low < high. For a share of the crops, give quantiles of `confidence`.
        label_smoothing: the softening of the hard label, in [0, 1].
        drop_easy: in [0, 1].

    Returns:
        `CalibratedLabels(labels, keep, category)`.

    Raises:
        TypeError: targets that are not integers.
        ValueError: shapes that do not fit, labels that are no distributions, targets or numbers out of range.

    Reference: Shen (2023); the thresholds and the formula are reconstructed from the paper's description.
    """
    _check_distributions(labels, "labels")
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise TypeError(f"targets must be integers, got {targets.dtype}")
    if not confidence.shape == targets.shape == labels.shape[:-1]:
        raise ValueError(
            f"confidence and targets must be {tuple(labels.shape[:-1])}, got {tuple(confidence.shape)} and "
            f"{tuple(targets.shape)}"
        )
    classes = labels.shape[-1]
    if targets.numel() and not (targets.amin() >= 0 and targets.amax() < classes):
        raise ValueError(f"targets must lie in [0, {classes}), got {targets.amin()} to {targets.amax()}")
    if not low < high:
        raise ValueError(f"low must be below high, got {low} and {high}")
    for name, number in (("label_smoothing", label_smoothing), ("drop_easy", drop_easy)):
        if not 0 <= number <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {number}")
    category = torch.full_like(targets, HARD)
    category[confidence <= low] = CONTEXT
    category[confidence >= high] = EASY
    softened = torch.full_like(labels, label_smoothing / classes)
    softened.scatter_add_(-1, targets[..., None], labels.new_full((*targets.shape, 1), 1 - label_smoothing))
    labels = torch.where((category == CONTEXT)[..., None], softened, labels)
    easy = torch.where(category == EASY, confidence, -torch.inf).flatten()
    dropped = easy.argsort(descending=True, stable=True)[: int(drop_easy * int((category == EASY).sum()))]
    keep = torch.ones(easy.numel(), dtype=torch.bool, device=labels.device).index_fill(0, dropped, False)
    return CalibratedLabels(labels, keep.reshape(targets.shape), category)


class SoftLabelBank:
    """Crops of images, drawn once, and the teacher's labels of them, compressed.

    The bank keeps the parameters of the crops (top, left, height, width, flip as 16-bit integers) and the labels; pixels
    are cut again when they are asked for. It does not keep the teacher.

    Args:
        images: (n, channels, height, width); a reference, not a copy.
        crops_per_image: R.
        size: height and width that the crops are resized to.
        k: how many probabilities to keep of each label; not used by mode `"full"`.
        mode: `"smoothing"`, `"renorm"` (see `recover_topk`) or `"full"`, which keeps all.
        area, ratio, flip: as of `lib.data.crop_parameters`.
        generator: of the crops.

    Attributes:
        parameters: int16 (n, R, 5).
        keep: bool (n, R), which crops to train on; all, until `relabel` says otherwise.

    Raises:
        ValueError: arguments out of range, an unknown mode, images larger than 16 bits can say.

    Reference: Shen and Xing (2021).
    """

    def __init__(
        self,
        images: torch.Tensor,
        crops_per_image: int,
        *,
        size: int,
        k: int = 5,
        mode: str = "smoothing",
        area: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        generator: torch.Generator | None = None,
    ):
        if images.dim() != 4 or max(images.shape[2:]) > 32767:
            raise ValueError(
                f"images must be (n, channels, height, width) with sides below 2^15, got {tuple(images.shape)}"
            )
        if crops_per_image < 1 or k < 1:
            raise ValueError(f"crops_per_image and k must be at least 1, got {crops_per_image} and {k}")
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        self.images, self.size, self.k, self.mode = images, size, k, mode
        self.num_classes = None
        drawn = crop_parameters(
            len(images) * crops_per_image, *images.shape[2:], area=area, ratio=ratio, flip=flip,
            generator=generator,
        )  # fmt: skip
        self.parameters = drawn.to(torch.int16).reshape(len(images), crops_per_image, 5)
        self.keep = torch.ones(len(images), crops_per_image, dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.images)

    def crops(self, index=slice(None)) -> torch.Tensor:
        """The crops of some images, cut again: (m, R, channels, size, size). `index` is what indexes a tensor of images."""
        images, parameters = self.images[index], self.parameters[index]
        count = parameters.shape[1]
        cut = random_resized_crop(images.repeat_interleave(count, 0), parameters.flatten(0, 1), self.size)
        return cut.reshape(len(images), count, *cut.shape[1:])

    @torch.no_grad()
    def build(
        self, teacher: Callable[[torch.Tensor], torch.Tensor], *, batch_size: int = 256
    ) -> "SoftLabelBank":
        """Ask the teacher for its logits of every crop, once, and store the softmax of them. Returns the bank itself.

        Args:
            teacher: crops (b, channels, size, size) -> logits (b, C). Put a module into eval mode first.
            batch_size: images at a time.
        """
        answers = []
        for index in torch.arange(len(self)).split(batch_size):
            logits = teacher(self.crops(index).flatten(0, 1))
            answers.append(logits.softmax(-1).reshape(len(index), -1, logits.shape[-1]))
        return self.relabel(torch.cat(answers))

    def relabel(self, labels: torch.Tensor, keep: torch.Tensor | None = None) -> "SoftLabelBank":
        """Store other labels, (n, R, C), compressed as the mode says, and which crops to keep, bool (n, R).

        A softened hard label loses nothing under `"smoothing"`, whatever k is. Returns the bank itself.

        Raises:
            ValueError: shapes that do not fit, labels that are no distributions.
        """
        _check_distributions(labels, "labels")
        if labels.shape[:-1] != self.keep.shape or (keep is not None and keep.shape != self.keep.shape):
            raise ValueError(
                f"labels must be {tuple(self.keep.shape)} + (C,) and keep {tuple(self.keep.shape)}"
            )
        self.num_classes = labels.shape[-1]
        if self.mode == "full":
            self._indices, self._values = None, labels.clone()
        else:
            indices, self._values = compress_topk(labels, min(self.k, self.num_classes))
            self._indices = indices.to(torch.int16 if self.num_classes <= 32767 else torch.int32)
        if keep is not None:
            self.keep = keep.clone()
        return self

    def labels(self, index=slice(None)) -> torch.Tensor:
        """The labels of the crops of some images, recovered: (m, R, C).

        Raises:
            RuntimeError: the bank has not been built.
        """
        if self.num_classes is None:
            raise RuntimeError("the bank has no labels yet: call build(teacher) first")
        if self.mode == "full":
            return self._values[index]
        return recover_topk(self._indices[index], self._values[index], self.num_classes, self.mode)

    def get(self, i: int, r: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Parameters (5,) and label (C,) of crop r of image i."""
        return self.parameters[i, r], self.labels(i)[r]

    @property
    def nbytes(self) -> int:
        """Bytes of parameters and labels, without the images."""
        stored = [self.parameters, self.keep]
        if self.num_classes is not None:
            stored += [each for each in (self._indices, self._values) if each is not None]
        return sum(each.numel() * each.element_size() for each in stored)


def _check_distributions(probabilities, name):
    if not probabilities.dim() or not probabilities.is_floating_point():
        raise ValueError(
            f"{name} must be floating point (..., C), got {probabilities.dtype} {tuple(probabilities.shape)}"
        )
    if probabilities.numel() and not (
        (probabilities >= 0).all() and ((probabilities.sum(-1) - 1).abs() <= 1e-4).all()
    ):
        raise ValueError(f"the rows of {name} must be distributions: not negative, with sum 1")
