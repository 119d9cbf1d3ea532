"""Distillation from hidden vectors: the logit losses of two linear classifiers, without the logits of either.

A student and a teacher over a large vocabulary have two matrices of logits, each larger than the rest of the step. The
function here computes the losses of `lib.distill.normalized` and `lib.distill.dual_head` a slice at a time.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F

from lib.backend import choose_impl
from lib.distill.dual_head import binary_kl
from lib.distill.normalized import kd_loss, nkd_loss

_LOSSES = ("kd", "nkd", "binary_kl")
_SLICE_ELEMENTS, _SLICE_ROWS = 1 << 21, 64  # logits held at a time, unless that were fewer rows


def linear_distillation(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    targets: torch.Tensor | None = None,
    *,
    loss: str = "kd",
    temperature: float = 1.0,
    gamma: float = 1.5,
    bias: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    impl: str = "auto",
    block_size: tuple[int, int] | None = None,
) -> torch.Tensor:
    """A distillation loss on the logits of two linear classifiers, in memory that does not grow with their number.

    Equal to `kd_loss`, `nkd_loss` or `binary_kl` on the logits `hidden @ weight.T + bias` of the student and
    `teacher_hidden @ teacher_weight.T + teacher_bias` of the teacher, gradients included. The teacher's hidden vectors may
    have another dimension; its classes are the student's. The teacher gets no gradient. Losses are computed in float32 for
    inputs of half precision, and except under `impl="torch"` the logits are too. Gradients have no gradients
    themselves, except under `impl="torch"`.

    At a glance:
        formula: that of `kd_loss`, `nkd_loss` or `binary_kl` with the logits `z = W h` of both
        gradient: theirs, and from it `W^T dL/dz` for the hidden vector
        consistency: that of the loss
        cost: `O(C (D + E))` per row, D and E the lengths of the hidden vectors; some strips of logits are held at a time, never all

    Args:
        hidden: the student's hidden vectors `(..., dim)`; float16, bfloat16, float32 or (not on the kernel) float64.
        weight: the student's classifier, one row a class, `(num_classes, dim)`, of the same dtype.
        teacher_hidden: the teacher's hidden vectors `(..., teacher_dim)`, in any of these dtypes.
        teacher_weight: the teacher's classifier `(num_classes, teacher_dim)`, of the dtype of `teacher_hidden`.
        targets: class indices `(...)`, integers in `[0, num_classes)` or `ignore_index`. `"nkd"` needs them; the other
            losses read from them only which rows are ignored.
        loss: `"kd"`, `"nkd"` or `"binary_kl"`.
        temperature: of the loss, above 0.
        gamma: weight of the non-target term of `"nkd"`, at least 0; the other losses have none.
        bias: added to the student's logits, `(num_classes,)`, of the student's dtype.
        teacher_bias: added to the teacher's logits, `(num_classes,)`, of the teacher's dtype.
        ignore_index: rows with this target have no loss and no gradient, and do not count in the mean.
        reduction: `"mean"` over the rows not ignored (NaN when there are none), `"sum"` or `"none"`.
        impl: `"torch"` holds all logits; `"chunked"` is the lean path in PyTorch; `"triton"` the kernel;
            `"auto"` the kernel on CUDA and `"chunked"` elsewhere and for float64.
        block_size: rows and classes of a tile of the kernel, powers of two; the lean path takes that many
            rows at a time and all classes. Chosen by shape and device when None.

    Returns:
        A scalar, or of the shape of `hidden` without its last dimension under `reduction="none"`, with 0 at ignored
        rows; at least float32.

    Raises:
        TypeError: dtypes that do not fit; the message says which.
        ValueError: shapes or devices that do not fit, targets missing or out of range, an unknown loss or reduction, or a
            `temperature`, `gamma` or `block_size` outside its range.
        RuntimeError: a gradient is asked for with `create_graph=True`, or Triton is asked for and not installed.
    """
    wide = torch.float64 in (hidden.dtype, teacher_hidden.dtype)
    if impl == "auto" and wide:
        impl = "chunked"
    impl = choose_impl(impl, hidden, options=("torch", "chunked", "triton"), cpu="chunked")
    _check_options(loss, temperature, gamma, reduction, block_size)
    _check_tensors(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, targets, loss)
    student, teacher = (hidden, weight, bias), (teacher_hidden, teacher_weight, teacher_bias)
    device = hidden.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        lower = torch.get_autocast_dtype(device)
        student, teacher = (
            tuple(x if x is None else x.to(lower) for x in side) for side in (student, teacher)
        )
        wide = False
    for side, prefix in ((student, ""), (teacher, "teacher_")):
        for name, tensor in (("weight", side[1]), ("bias", side[2])):
            if tensor is not None and tensor.dtype != side[0].dtype:
                raise TypeError(
                    f"{prefix}hidden is {side[0].dtype}, {prefix}{name} must be too, got {tensor.dtype}"
                )
    if impl == "triton" and wide:
        raise ValueError(
            "the kernel takes float16, bfloat16 or float32; use impl='chunked' for float64, "
            f"got hidden {hidden.dtype} and teacher_hidden {teacher_hidden.dtype}"
        )

    shape = hidden.shape[:-1]
    (hidden, *student), (teacher_hidden, *teacher) = (
        student,
        (x if x is None else x.detach() for x in teacher),
    )
    hidden = hidden.reshape(-1, hidden.shape[-1])
    teacher_hidden = teacher_hidden.reshape(-1, teacher_hidden.shape[-1])
    rows, targets = _select_rows(targets, ignore_index, weight.shape[0])
    if rows is not None:  # ignored rows cost nothing from here on
        hidden, teacher_hidden, targets = (x.index_select(0, rows) for x in (hidden, teacher_hidden, targets))
    targets = targets if loss == "nkd" else None
    inputs = (hidden, *student, teacher_hidden, *teacher, targets)
    options = dict(loss=loss, temperature=float(temperature), gamma=float(gamma), blocks=block_size)
    count, scale = len(hidden), None
    with _exact(hidden):
        if impl == "torch":
            losses = _logit_losses(*(F.linear(*x) for x in (inputs[:3], inputs[3:6])), targets, options)
        elif impl == "triton":
            losses = _Fused.apply(*inputs, options)
        else:
            if reduction != "none":
                scale = 1.0 if reduction == "sum" else 1 / count if count else torch.nan
            losses = _Chunked.apply(*inputs, scale, options | {"gradients": torch.is_grad_enabled()})
    if scale is not None:
        return losses
    if reduction != "none":
        return losses.sum() if reduction == "sum" else losses.mean()
    return (losses if rows is None else losses.new_zeros(shape.numel()).index_copy(0, rows, losses)).reshape(
        shape
    )


# --- checks


def _check_options(loss, temperature, gamma, reduction, block_size) -> None:
    if loss not in _LOSSES:
        raise ValueError(f"loss must be one of {_LOSSES}, got {loss!r}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be above 0 and finite, got {temperature}")
    if not 0 <= gamma < float("inf"):
        raise ValueError(f"gamma must be at least 0 and finite, got {gamma}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if block_size is not None and (len(block_size) != 2 or min(block_size) < 1):
        raise ValueError(f"block_size must be two positive integers (rows, classes), got {block_size!r}")


def _check_tensors(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, targets, loss) -> None:
    sides = ((hidden, weight, bias, ""), (teacher_hidden, teacher_weight, teacher_bias, "teacher_"))
    for vectors, classifier, offset, prefix in sides:
        if vectors.dim() < 1 or classifier.dim() != 2 or vectors.shape[-1] != classifier.shape[1]:
            raise ValueError(
                f"{prefix}hidden must be (..., {prefix}dim) and {prefix}weight (num_classes, {prefix}dim), "
                f"got {tuple(vectors.shape)} and {tuple(classifier.shape)}"
            )
        if offset is not None and offset.shape != classifier.shape[:1]:
            raise ValueError(
                f"{prefix}bias must be (num_classes,) = ({len(classifier)},), got {tuple(offset.shape)}"
            )
        for name, tensor in (("hidden", vectors), ("weight", classifier), ("bias", offset)):
            if tensor is not None and not tensor.is_floating_point():
                raise TypeError(f"{prefix}{name} must be of a floating dtype, got {tensor.dtype}")
            if tensor is not None and tensor.device != hidden.device:
                raise ValueError(
                    f"all tensors must be on one device: hidden is on {hidden.device}, "
                    f"{prefix}{name} on {tensor.device}"
                )
    if len(teacher_weight) != len(weight) or teacher_hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            "student and teacher must have the same rows and classes, got "
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and "
            f"teacher_hidden {tuple(teacher_hidden.shape)}, teacher_weight {tuple(teacher_weight.shape)}"
        )
    if len(weight) < (2 if loss == "nkd" else 1):
        raise ValueError(f"loss={loss!r} needs more classes, got weight {tuple(weight.shape)}")
    if targets is None:
        if loss == "nkd":
            raise ValueError("loss='nkd' needs targets, got None")
        return
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise TypeError(f"targets must be class indices of an integer dtype, got {targets.dtype}")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets must have the shape of hidden without its last dimension, {tuple(hidden.shape[:-1])}, "
            f"got {tuple(targets.shape)}"
        )
    if targets.device != hidden.device:
        raise ValueError(
            f"all tensors must be on one device: hidden is on {hidden.device}, targets on {targets.device}"
        )


def _select_rows(targets, ignore_index: int, num_classes: int):
    """The rows that are not ignored, None for all; and the flat targets."""
    if targets is None:
        return None, None
    targets = targets.reshape(-1).long()
    if targets.is_meta or not len(targets):  # no values to look at: take every row
        return None, targets
    kept = targets != ignore_index
    wrong = kept & ((targets < 0) | (targets >= num_classes))
    if wrong.any():
        raise ValueError(
            f"targets must lie in [0, {num_classes}) or be ignore_index={ignore_index}, "
            f"got {targets[wrong][0].item()}"
        )
    return None if bool(kept.all()) else kept.nonzero().squeeze(1), targets


# --- the paths


def _exact(tensor):
    """Products in the dtype of their operands, also where a pass runs inside of autocast."""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


def _logit_losses(student_logits, teacher_logits, targets, options):
    shared = dict(temperature=options["temperature"], reduction="none")
    if options["loss"] == "nkd":
        return nkd_loss(student_logits, teacher_logits, targets, gamma=options["gamma"], **shared)
    return (kd_loss if options["loss"] == "kd" else binary_kl)(student_logits, teacher_logits, **shared)


def _refuse_second_derivative():
    if torch.is_grad_enabled():  # inside of a backward pass: it runs with create_graph=True
        raise RuntimeError(
            "the gradient of linear_distillation cannot be differentiated again; use impl='torch' for that"
        )


class _Chunked(torch.autograd.Function):
    """The logit losses on slices of rows. The logits are kept for no longer than their slice.

    A summed loss has a known upstream gradient up to a factor, so its gradients are finished in the forward pass, `scale`
    included, and each slice's logits are computed once. Losses of single rows (`scale` None) compute them again.
    """

    @staticmethod
    def forward(ctx, *inputs):
        *tensors, scale, options = inputs
        wants = [options["gradients"] and needed for needed in ctx.needs_input_grad[:3]]
        factor = None if scale is None or not any(wants) else scale
        losses, ctx.gradients = _sweep(tensors, wants, factor, options)
        ctx.save_for_backward(*tensors)
        ctx.scale, ctx.options = scale, options
        return losses if scale is None else losses.sum() * scale

    @staticmethod
    def backward(ctx, upstream):
        _refuse_second_derivative()
        gradients, ctx.gradients = ctx.gradients, None  # handed out, no copy stays behind
        if gradients is not None:
            gradients = [x if x is None else x.mul_(upstream) for x in gradients]
        else:  # also in a second backward pass through a retained graph
            factor = upstream if ctx.scale is None else upstream * ctx.scale
            _, gradients = _sweep(ctx.saved_tensors, ctx.needs_input_grad[:3], factor, ctx.options)
        return *gradients, *(None,) * 6


def _sweep(tensors, wants, factor, options):
    """The losses of all rows, and the gradients times `factor` (a number, a scalar or one a row) unless that is None."""
    *sides, targets = (*(tensors[i : i + 3] for i in (0, 3)), tensors[6])
    # half precision is widened once: (classes, dim), small beside the logits
    wide = [[x if x is None else x.to(_accumulator(x.dtype)) for x in side[1:]] for side in sides]
    hidden, teacher_hidden = (side[0] for side in sides)
    count, (weight, bias) = len(hidden), wide[0]
    grads = None
    if factor is not None:
        factor = torch.as_tensor(factor, dtype=weight.dtype, device=weight.device).expand(count)
        # where the dtype is wide already the sums are formed in what is handed out
        grads = [
            torch.zeros_like(x, dtype=weight.dtype, memory_format=torch.contiguous_format) if want else None
            for x, want in zip(sides[0], wants, strict=True)
        ]
    losses = []
    rows = max(_SLICE_ROWS, _SLICE_ELEMENTS // len(weight))
    step = options["blocks"][0] if options["blocks"] else rows
    with _exact(hidden):
        for start in range(0, max(count, 1), step):
            own = slice(start, start + step)
            vectors = hidden[own].to(weight.dtype)
            logits = F.linear(vectors, weight, bias).detach().requires_grad_(grads is not None)
            other = teacher_hidden[own].to(wide[1][0].dtype)
            with torch.set_grad_enabled(grads is not None):
                values = _logit_losses(
                    logits, F.linear(other, *wide[1]), None if targets is None else targets[own], options
                )
            losses.append(values.detach())
            if grads is None:
                continue
            pull = torch.autograd.grad(values, logits, factor[own].to(values.dtype))[0]
            del logits, values
            if grads[0] is not None:
                torch.mm(pull, weight, out=grads[0][own])
            if grads[1] is not None:
                grads[1].addmm_(pull.T, vectors)
            if grads[2] is not None:
                grads[2] += pull.sum(0)
    if grads is not None:
        grads = [x if x is None else x.to(hidden.dtype) for x in grads]
    return torch.cat(losses), grads


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize == 2 else dtype


class _Fused(torch.autograd.Function):
    """The same through the Triton kernels: the losses of single rows."""

    @staticmethod
    def forward(ctx, *inputs):
        from kernels.linear_distillation import linear_distillation_forward

        *tensors, options = inputs
        hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, targets = tensors
        losses, statistics = linear_distillation_forward(
            hidden, weight, teacher_hidden, teacher_weight, targets, bias=bias, teacher_bias=teacher_bias, **options
        )  # fmt: skip
        ctx.save_for_backward(*tensors, statistics)
        ctx.options = options
        return losses

    @staticmethod
    def backward(ctx, upstream):
        from kernels.linear_distillation import linear_distillation_backward

        _refuse_second_derivative()
        hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, targets, statistics = (
            ctx.saved_tensors
        )
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        with _exact(hidden):
            gradients = linear_distillation_backward(
                hidden, weight, teacher_hidden, teacher_weight, targets, statistics, upstream, bias=bias,
                teacher_bias=teacher_bias, need_hidden=need_hidden, need_weight=need_weight, need_bias=need_bias,
                **ctx.options,
            )  # fmt: skip
        return *gradients, *(None,) * 5
