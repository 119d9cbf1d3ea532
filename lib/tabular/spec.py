"""What the columns of a table are, and how its rows become inputs of a network.

A table is a floating-point tensor (n, columns): numbers as they are, categories as codes 0, 1, ..., a missing value as
nan. The target is a column like the others.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Numeric:
    """A column of numbers, standardised as (value - mean) / std.

    Raises:
        ValueError: a mean that is not finite, or a standard deviation that is not positive and finite.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self):
        if not math.isfinite(self.mean) or not (math.isfinite(self.std) and self.std > 0):
            raise ValueError(f"need a finite mean and a positive std, got {self.mean} and {self.std}")

    @property
    def size(self) -> int:
        """How many numbers predict it: 1."""
        return 1


@dataclass(frozen=True)
class Categorical:
    """A column of codes 0 ... num_classes - 1, encoded one-hot.

    Raises:
        ValueError: fewer than two classes.
    """

    num_classes: int

    def __post_init__(self):
        if not isinstance(self.num_classes, int) or self.num_classes < 2:
            raise ValueError(f"num_classes must be an integer of at least 2, got {self.num_classes!r}")

    @property
    def size(self) -> int:
        """How many logits predict it."""
        return self.num_classes


@dataclass(frozen=True)
class TabularSpec:
    """The columns of a table and which of them are targets.

    Attributes:
        columns: one `Numeric` or `Categorical` for each column, targets included.
        target: the positions of the targets.

    Raises:
        TypeError: a column that is neither.
        ValueError: no target, no other column, or a position out of range or named twice.
    """

    columns: tuple[Numeric | Categorical, ...]
    target: tuple[int, ...]

    def __post_init__(self):
        object.__setattr__(self, "columns", tuple(self.columns))
        target = (self.target,) if isinstance(self.target, int) else tuple(self.target)
        object.__setattr__(self, "target", target)
        for column in self.columns:
            if not isinstance(column, Numeric | Categorical):
                raise TypeError(f"columns must be Numeric or Categorical, got {type(column).__name__}")
        if any(not 0 <= i < len(self.columns) for i in target) or len(set(target)) < len(target):
            raise ValueError(
                f"target must be different positions below {len(self.columns)}, got {self.target}"
            )
        if not 0 < len(target) < len(self.columns):
            raise ValueError(f"need a target and another column, got targets {target} of {len(self.columns)}")

    @classmethod
    def fit(
        cls, rows: torch.Tensor, *, target: int | Sequence[int], categorical: Mapping[int, int] | None = None
    ) -> "TabularSpec":
        """The specification of a table, with means and standard deviations of these rows. Give it training rows only.

        Args:
            rows: (n, columns), nan where missing.
            target: position or positions of the target.
            categorical: position -> number of classes; the other columns are numeric. A constant column gets std 1.

        Raises:
            TypeError: rows that are not a floating-point tensor.
            ValueError: rows of another shape, or a numeric column without any value.
        """
        _check_rows(rows)
        columns = []
        for i, values in enumerate(rows.T):
            if i in (categorical or {}):
                columns.append(Categorical(categorical[i]))
                continue
            values = values[~values.isnan()].double()
            if not len(values):
                raise ValueError(f"column {i} has no values")
            std = values.std(correction=0).item()
            columns.append(Numeric(values.mean().item(), std if std > 0 else 1.0))
        return cls(tuple(columns), target)

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many outputs each column has: 1, or its number of classes."""
        return tuple(column.size for column in self.columns)

    @property
    def width(self) -> int:
        """The width of an encoded row: every column with one more slot, which says "masked"."""
        return sum(self.sizes) + len(self.columns)

    def slots(self) -> list[slice]:
        """Where each column lies in an encoded row, mask slot (the last) included."""
        return _slices([size + 1 for size in self.sizes])

    def split(self, out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Outputs (n, sum(sizes)) of a network as one tensor (n, size) for each column."""
        return out.split(self.sizes, -1)


def encode(
    rows: torch.Tensor, spec: TabularSpec, *, hide_target: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of a table as inputs.

    A number is standardised, a code one-hot; each is followed by a mask slot, here 0. A missing value is all zeros, its
    mask slot too, so that "missing" and "hidden from you" look different.

    Args:
        rows: (n, columns), codes as numbers, nan where missing.
        spec: the columns.
        hide_target: mask the targets: zeros, and a one in the slot. For rows whose target is to be predicted.

    Returns:
        The inputs (n, spec.width), and a boolean tensor (n, columns), True where a value is missing.

    Raises:
        TypeError: rows that are not a floating-point tensor.
        ValueError: the wrong number of columns, an infinite value, or a code outside 0 ... num_classes - 1.
    """
    _check_rows(rows, len(spec.columns))
    missing = rows.isnan()
    parts = []
    for i, column in enumerate(spec.columns):
        values = rows[:, i].masked_fill(missing[:, i], 0.0)
        if isinstance(column, Numeric):
            part = ((values - column.mean) / column.std)[:, None]
        else:
            if not bool(((values == values.round()) & (values >= 0) & (values < column.num_classes)).all()):
                raise ValueError(f"column {i}: codes must be integers from 0 to {column.num_classes - 1}")
            part = F.one_hot(values.long(), column.num_classes).to(rows.dtype)
        parts += [part.masked_fill(missing[:, i, None], 0.0), part.new_zeros(len(part), 1)]
    x = torch.cat(parts, 1)
    return (_hide(x, spec) if hide_target else x), missing


def decode(out: torch.Tensor, spec: TabularSpec) -> torch.Tensor:
    """Outputs of a network (n, sum(sizes)) as rows of the table (n, columns): numbers on their original scale, and the
    most probable code of each category.

    Raises:
        ValueError: the wrong width.
    """
    if out.ndim != 2 or out.shape[1] != sum(spec.sizes):
        raise ValueError(f"out must have the shape (n, {sum(spec.sizes)}), got {tuple(out.shape)}")
    columns = [
        part[:, 0] * column.std + column.mean if isinstance(column, Numeric) else part.argmax(1).to(out.dtype)
        for part, column in zip(spec.split(out), spec.columns, strict=True)
    ]
    return torch.stack(columns, 1)


def corrupt(
    x: torch.Tensor,
    spec: TabularSpec,
    *,
    missing: torch.Tensor | None = None,
    p_noise: float = 1.0,
    p_mask: float = 0.025,
    p_replace: float = 0.175,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs for training: hide the targets and disturb the other columns.

    Each value is selected with probability `p_noise`. A selected one is masked with probability `p_mask`, and replaced
    with probability `p_replace`: a number by a standard normal one, a category by a uniform one (as in the code of
    arXiv 2206.00664, whose defaults these are). Otherwise it stays, and still counts as selected.

    Args:
        x: encoded rows (n, spec.width), nothing masked.
        spec: the columns.
        missing: boolean (n, columns); missing values are left alone.
        p_noise, p_mask, p_replace: probabilities, p_mask + p_replace at most 1.
        generator: of the random numbers.

    Returns:
        The disturbed inputs, a new tensor, and a boolean tensor (n, columns), True for selected values and for all targets.

    Raises:
        ValueError: shapes that do not fit, or probabilities that are none.
    """
    _check_encoded(x, spec, missing=missing)
    if not (0 <= p_noise <= 1 and 0 <= p_mask and 0 <= p_replace and p_mask + p_replace <= 1):
        raise ValueError(f"not probabilities: p_noise {p_noise}, p_mask {p_mask}, p_replace {p_replace}")
    n, columns = len(x), len(spec.columns)
    draw = {"generator": generator, "device": x.device}
    selected = torch.rand(n, columns, **draw) < p_noise
    fate = torch.rand(n, columns, **draw)
    touch = selected if missing is None else selected & ~missing
    mask = touch & (fate < p_mask)
    replace = touch & (fate >= p_mask) & (fate < p_mask + p_replace)
    x = x.clone()
    for i, (column, slot) in enumerate(zip(spec.columns, spec.slots(), strict=True)):
        if isinstance(column, Numeric):
            other = torch.randn(n, 1, dtype=x.dtype, **draw)
        else:
            other = F.one_hot(torch.randint(column.num_classes, (n,), **draw), column.num_classes).to(x)
        other = F.pad(other, (0, 1))
        x[:, slot] = torch.where(replace[:, i, None], other, x[:, slot])
        x[:, slot] = torch.where(mask[:, i, None], _masked(x[:, slot]), x[:, slot])
    selected[:, list(spec.target)] = True
    return _hide(x, spec), selected


def _hide(x, spec):
    x = x.clone()
    for i in spec.target:
        x[:, spec.slots()[i]] = _masked(x[:, spec.slots()[i]])
    return x


def _masked(part):
    part = torch.zeros_like(part)
    part[:, -1] = 1.0
    return part


def _slices(sizes):
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _check_rows(rows, columns=None):
    if not isinstance(rows, torch.Tensor) or not rows.is_floating_point():
        kind = rows.dtype if isinstance(rows, torch.Tensor) else type(rows).__name__
        raise TypeError(f"rows must be a floating-point tensor, got {kind}")
    if rows.ndim != 2 or (columns is not None and rows.shape[1] != columns):
        wanted = "columns" if columns is None else columns
        raise ValueError(f"rows must have the shape (n, {wanted}), got {tuple(rows.shape)}")
    if bool(rows.isinf().any()):
        raise ValueError("rows must be finite, or nan where missing, got infinities")


def _check_encoded(x, spec, **masks):
    if x.ndim != 2 or x.shape[1] != spec.width:
        raise ValueError(f"x must have the shape (n, {spec.width}), got {tuple(x.shape)}")
    for name, mask in masks.items():
        if mask is not None and (mask.dtype != torch.bool or mask.shape != (len(x), len(spec.columns))):
            raise ValueError(
                f"{name} must be boolean of shape ({len(x)}, {len(spec.columns)}), got {mask.dtype} {tuple(mask.shape)}"
            )
