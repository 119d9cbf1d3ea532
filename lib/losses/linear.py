"""Cross-entropy of a linear classifier, without the matrix of its logits.

The loss of a language model is `cross_entropy(hidden @ weight.T, targets)`. The matrix in the middle has one entry for
every token and every word of the vocabulary, which is more memory than the rest of the model needs. The functions here
compute the same loss and the same gradients tile by tile (Cut Cross-Entropy, Wijmans et al. 2024, arXiv 2411.09009).
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lib.backend import choose_impl
from lib.losses._classification import check_reduction, reduce
from lib.losses._linear_tiles import Fused, OnePass, Tiled, accumulator, target_logits


@dataclass
class CutCrossEntropyStats:
    """Counts the tiles of the backward pass. Hand one to `linear_cross_entropy` and read it after `backward()`.

    Attributes:
        blocks_seen: tiles of logits that the backward pass recomputed.
        blocks_skipped: those among them whose gradient was filtered away.
    """

    blocks_seen: int = 0
    blocks_skipped: int = 0

    @property
    def skip_fraction(self) -> float:
        """Skipped tiles per tile seen; 0 before any was seen."""
        return self.blocks_skipped / self.blocks_seen if self.blocks_seen else 0.0


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    shift: int = 0,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    filter_eps: float | str | None = "auto",
    filter_hidden: bool = True,
    filter_weight: bool = True,
    sort_vocab: bool = True,
    return_lse: bool = False,
    block_size: tuple[int, int] | None = None,
    stats: CutCrossEntropyStats | None = None,
    impl: str = "auto",
):
    """Cross-entropy of the logits `hidden @ weight.T + bias`, in memory that does not grow with their number.

    Equal to `torch.nn.functional.cross_entropy` on explicit logits, gradients included; see the chapter on Cut
    Cross-Entropy (Wijmans et al. 2024, section 4). Logits, log-sum-exp and loss are computed in float32 for inputs of
    half precision. Gradients have no gradients themselves: differentiating one raises a RuntimeError, except
    under `impl="torch"`.

    At a glance:
        formula: `-log p_y`, p = softmax(z), z = W h
        gradient: `p - e_y`; and from it `(p - e_y) W` for the hidden vector
        consistency: `p` is the distribution of the labels: Bayes- and top-k consistent
        cost: `O(C D)` per row; one tile of logits is held at a time, never all

    Args:
        hidden: hidden vectors `(..., dim)`; float16, bfloat16, float32 or (not on the kernel) float64.
        weight: classifier, one row a class, `(num_classes, dim)`, of the same dtype.
        targets: class indices `(...)`, integers in `[0, num_classes)` or `ignore_index`.
        bias: added to the logits, `(num_classes,)`.
        ignore_index: rows with this target have no loss and no gradient, and do not count in the mean.
        softcap: if given, logits become `softcap * tanh(logits / softcap)`, after the bias.
        shift: score position `t` against the target at `t + shift` of the last dimension of `targets`; 1 for
            next-token prediction from unshifted sequences.
        reduction: `"mean"` over the rows not ignored (NaN when there are none, as in PyTorch), `"sum"` or `"none"`.
        label_smoothing: share in [0, 1] of each target that is spread over all classes, as in PyTorch. It needs the
            mean logit of each row, which is summed up beside the log-sum-exp.
        z_loss: this times the squared log-sum-exp is added to the loss of each row, which keeps logits from drifting
            (Chowdhery et al. 2022, arXiv 2204.02311). At least 0.
        filter_eps: skip a tile of the backward pass when all its entries `|softmax - target distribution|` are below this.
            (Where a gradient reaches the log-sum-exp, the entries of the softmax itself must be, too.)
            `"auto"`: `finfo(dtype).eps / 32` in half precision, None otherwise. None: exact.
        filter_hidden: whether the gradient of `hidden` is filtered where `filter_eps` says so.
        filter_weight: the same for `weight` and `bias`. False keeps the small pushes that rare classes live from.
        sort_vocab: order the vocabulary by mean logit before it is cut into tiles, so that more can be skipped.
        return_lse: return also the log-sum-exp of each row's logits, differentiably: any other function of it can be
            added to the loss.
        block_size: tokens and classes of a tile; chosen by shape and device when None.
        stats: if given, its counters are raised by the tiles seen and skipped in the backward pass.
        impl: `"torch"` holds all logits; `"chunked"` is the lean path in PyTorch; `"triton"` the kernel;
            `"auto"` the kernel on CUDA and `"chunked"` elsewhere, and for what the kernel does not take: float64, and a
            `block_size` of other than powers of two from 16 on.

    Returns:
        The loss: a scalar, or of the shape of `targets` (after the shift) under `reduction="none"`, with 0 at ignored
        rows. Where `return_lse` is set, the pair of it and the log-sum-exp, which has that shape and those zeros too.

    Raises:
        TypeError: dtypes that do not fit; the message says which.
        ValueError: shapes or devices that do not fit, targets out of range, an unknown reduction, or a softcap,
            `label_smoothing`, `z_loss`, `filter_eps`, `shift` or `block_size` outside its range.
        RuntimeError: a gradient is differentiated again, or Triton is asked for and not installed.
    """
    odd_tiles = block_size is not None and any(size < 16 or size & (size - 1) for size in block_size)
    if impl == "auto" and (odd_tiles or hidden.dtype == torch.float64):
        impl = "chunked"
    impl = choose_impl(impl, hidden, options=("torch", "chunked", "triton"), cpu="chunked")
    _check_tensors(hidden, weight, targets, bias)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing!r}")
    if not 0 <= z_loss < float("inf"):
        raise ValueError(f"z_loss must be finite and at least 0, got {z_loss!r}")
    eps = _check_options(hidden, softcap, shift, reduction, filter_eps, block_size)
    filters = (filter_hidden, filter_weight)
    device = hidden.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    if autocast:
        lower = torch.get_autocast_dtype(device)
        hidden, weight, bias = (x if x is None else x.to(lower) for x in (hidden, weight, bias))
        eps = torch.finfo(lower).eps / 32 if filter_eps == "auto" else eps
    elif weight.dtype != hidden.dtype or (bias is not None and bias.dtype != hidden.dtype):
        found = weight.dtype if bias is None else f"{weight.dtype} and bias {bias.dtype}"
        raise TypeError(
            f"hidden, weight and bias must have one dtype, got hidden {hidden.dtype}, weight {found}"
        )
    if impl == "triton" and hidden.dtype == torch.float64:
        raise TypeError("the kernel takes float16, bfloat16 or float32; use impl='chunked' for float64")

    rows, targets, shape = _select_rows(targets.long(), ignore_index, shift)
    _check_range(targets, weight.shape[0], ignore_index)
    hidden = hidden.reshape(-1, hidden.shape[-1])  # (tokens, dim)
    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        if impl == "torch":
            losses, lse = _explicit(hidden, weight, bias, rows, targets, softcap, label_smoothing)
        else:
            eps = eps if any(filters) else None
            options = dict(
                softcap=softcap, smoothing=label_smoothing, eps=eps, filters=filters, sort=sort_vocab,
                blocks=block_size, stats=stats,
            )  # fmt: skip
            inputs = (hidden, weight, bias, targets, rows)
            if impl == "triton":
                losses, lse = Fused.apply(*inputs, options)
            elif (
                eps is None and reduction != "none" and not (return_lse or z_loss) and len(targets)
                and hidden.dtype.itemsize > 2
            ):  # fmt: skip
                count = len(targets) if reduction == "mean" else 1
                options["gradients"] = torch.is_grad_enabled()
                return OnePass.apply(*inputs, 1 / count, options)
            else:
                losses, lse = Tiled.apply(*inputs, options)

    if z_loss:
        losses = losses + z_loss * lse.square()
    if reduction == "none":
        loss = _spread(losses, shape)
    else:
        loss = losses.sum() if reduction == "sum" else losses.mean()
    return (loss, _spread(lse, shape)) if return_lse else loss


def indexed_neg_dot(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, impl: str = "auto"
) -> torch.Tensor:
    """Minus the logit of each token's own target, `-(hidden * weight[targets]).sum(-1)`: the loss's first term.

    Reads one row of the classifier for each token: time `O(tokens * dim)`. The PyTorch path works through the tokens in
    pieces, so that the gathered rows need little memory (Wijmans et al. 2024, algorithm 1).

    Args:
        hidden: `(..., dim)`.
        weight: `(num_classes, dim)`, same dtype.
        targets: `(...)`, integers in `[0, num_classes)`.
        impl: `"torch"` (differentiable) or `"triton"` (no gradient); `"auto"` the kernel on CUDA when no gradient is
            needed.

    Returns:
        `(...)`, in float32 for inputs of half precision, else in their dtype.

    Raises:
        TypeError: dtypes that do not fit.
        ValueError: shapes or devices that do not fit, or targets out of range.
    """
    needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    impl = "torch" if impl == "auto" and needs_gradient else impl
    impl = choose_impl(impl, hidden, options=("torch", "triton"))
    _check_tensors(hidden, weight, targets, None)
    if weight.dtype != hidden.dtype:
        raise TypeError(f"hidden and weight must have one dtype, got {hidden.dtype} and {weight.dtype}")
    flat = targets.reshape(-1).long()
    _check_range(flat, weight.shape[0], None)
    vectors = hidden.reshape(-1, hidden.shape[-1])
    if impl == "triton":
        if needs_gradient:
            raise ValueError(
                "the kernel of indexed_neg_dot has no gradient; use impl='torch' or torch.no_grad()"
            )
        from kernels import cut_cross_entropy as kernel

        return kernel.indexed_neg_dot(vectors, weight, flat).reshape(targets.shape)
    return -target_logits(vectors, weight, None, flat, None).reshape(targets.shape)


def linear_comp_sum(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    tau: float = 1.0,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    **options,
) -> torch.Tensor:
    """`comp_sum` of the logits `hidden @ weight.T`, without their matrix (Mao et al. 2023, arXiv:2304.07288).

    A comp-sum loss is a function of `log p_y` alone, and minus that is what `linear_cross_entropy` returns for each row.
    So the loss is its composition with a scalar function, exactly, and no sweep over the classes is its own.

    At a glance:
        formula: `(p_y^(tau-1) - 1) / (1 - tau)`, p = softmax(W h); `-log p_y` at tau = 1
        gradient: `p_y^(tau-1) (p - e_y)`; and from it `p_y^(tau-1) (p - e_y) W` for the hidden vector
        consistency: that of `comp_sum`
        cost: `O(C D)` per row; one tile of logits is held at a time, never all

    Args:
        hidden: `(..., dim)`, as for `linear_cross_entropy`.
        weight: `(num_classes, dim)`.
        targets: class indices `(...)`, in `[0, num_classes)` or `ignore_index`.
        tau: the exponent, finite and at least 0.
        ignore_index: targets that have no loss and no gradient.
        reduction: `"mean"` over the rows that count, `"sum"` or `"none"`.
        options: `bias`, `softcap`, `shift`, the filter's, `block_size`, `stats` and `impl` of `linear_cross_entropy`.

    Returns:
        A scalar, or losses of the shape of `targets` (after the shift), in float32 for inputs of half precision.

    Raises:
        TypeError: as `linear_cross_entropy`, and for its other options.
        ValueError: as `linear_cross_entropy`, or a `tau` that is negative or infinite.
    """
    if not (math.isfinite(tau) and tau >= 0):
        raise ValueError(f"tau must be finite and at least 0, got {tau}")

    def of_row(surprise):
        return surprise if tau == 1 else torch.expm1((1 - tau) * surprise) / (1 - tau)

    return _of_each_row(of_row, hidden, weight, targets, ignore_index, reduction, options)


def linear_ldr_kl(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    lam: float = 1.0,
    *,
    margin: float = 0.0,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    **options,
) -> torch.Tensor:
    """`ldr_kl` of the logits `hidden @ weight.T`, without their matrix (Zhu et al. 2023, arXiv:2112.14869).

    With c the cross-entropy of the logits divided by `lam`, e^c is the sum over k of exp((z_k - z_y) / lam), in which the
    target's term is 1. The margin multiplies the other terms by exp(margin / lam), so that the loss is

        lam (log(1 + exp(margin / lam) (e^c - 1)) - log C),

    a function of c alone; no sweep over the classes is its own. In float32 c is known to about 1e-7 of the log-sum-exp.
    The loss multiplies that error by `lam`, and by exp(margin / lam) where c is nearly 0, as do the gradients; for that
    reason the margin is limited. `hidden` and `bias` are divided by `lam` in their own dtype: in half precision that
    rounds them once more unless `lam` is a power of two.

    At a glance:
        formula: `lam log(mean_k exp(d_k / lam))`, d_k = z_k - z_y + margin [k != y], z = W h
        gradient: `p - e_y` with p = softmax((z + margin [k != y]) / lam); and `(p - e_y) W` for the hidden vector
        consistency: that of `ldr_kl`
        cost: `O(C D)` per row; one tile of logits is held at a time, never all

    Args:
        hidden: `(..., dim)`, as for `linear_cross_entropy`.
        weight: `(num_classes, dim)`.
        targets: class indices `(...)`, in `[0, num_classes)` or `ignore_index`.
        lam: weight of the penalty, finite and above 0; the temperature of the label weights.
        margin: added to every wrong class, in [0, 10 lam]; beyond that use `ldr_kl`.
        bias: added to the logits, `(num_classes,)`.
        softcap: if given, logits become `softcap * tanh(logits / softcap)`, after the bias and before the margin.
        ignore_index: targets that have no loss and no gradient.
        reduction: `"mean"` over the rows that count, `"sum"` or `"none"`.
        options: `shift`, the filter's, `block_size`, `stats` and `impl` of `linear_cross_entropy`.

    Returns:
        A scalar, or losses of the shape of `targets` (after the shift), in float32 for inputs of half precision.

    Raises:
        TypeError: as `linear_cross_entropy`, and for its other options.
        ValueError: as `linear_cross_entropy`, or `lam` or `margin` outside its range.
    """
    if not (math.isfinite(lam) and lam > 0):
        raise ValueError(f"lam must be finite and above 0, got {lam}")
    if not 0 <= margin <= 10 * lam:
        raise ValueError(
            f"margin must be in [0, 10 lam] = [0, {10 * lam}], got {margin}: a larger one multiplies rounding errors; "
            "use ldr_kl on the logits"
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None, got {softcap!r}")
    _check_tensors(hidden, weight, targets, bias)
    shift, log_classes = margin / lam, math.log(len(weight))

    def of_row(surprise):
        if margin == 0:
            return lam * (surprise.double() - log_classes).to(surprise.dtype)
        c = surprise.double().clamp(min=0)  # below 0 it is rounding
        # two forms of the same: the first is exact near 0, the second does not overflow
        near = torch.log1p(math.exp(shift) * torch.expm1(c.clamp(max=1)))
        far = shift + c + torch.log1p(torch.exp(-c.clamp(min=0.5)) * math.expm1(-shift))
        return (lam * (torch.where(c < 0.7, near, far) - log_classes)).to(surprise.dtype)

    options |= dict(bias=bias if bias is None else bias / lam, softcap=softcap and softcap / lam)
    return _of_each_row(of_row, hidden / lam, weight, targets, ignore_index, reduction, options)


def _of_each_row(function, hidden, weight, targets, ignore_index, reduction, options):
    """Reduce `function` of the cross-entropy of each row that counts."""
    for name in ("return_lse", "label_smoothing", "z_loss"):
        if name in options:
            raise TypeError(f"{name} has no meaning here: the loss is a function of log p_y alone")
    check_reduction(reduction)
    surprise = linear_cross_entropy(
        hidden, weight, targets, ignore_index=ignore_index, reduction="none", **options
    )
    shift = options.get("shift", 0)
    counts = (targets[..., shift:] if shift else targets) != ignore_index
    losses = torch.where(counts, function(surprise), 0)
    return losses.sum() / counts.sum() if reduction == "mean" else reduce(losses, reduction)


# --- checks


def _check_tensors(hidden, weight, targets, bias) -> None:
    if hidden.dim() < 1 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            "hidden must be (..., dim) and weight (num_classes, dim), "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if weight.shape[0] == 0:
        raise ValueError("weight must have at least one row, one for each class; it has none")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets must have the shape of hidden without its last dimension, {tuple(hidden.shape[:-1])}, "
            f"got {tuple(targets.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be (num_classes,) = ({weight.shape[0]},), got {tuple(bias.shape)}")
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name} must be of a floating dtype, got {tensor.dtype}")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise TypeError(f"targets must be class indices of an integer dtype, got {targets.dtype}")
    for name, tensor in (("weight", weight), ("targets", targets), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(
                f"all tensors must be on one device: hidden is on {hidden.device}, {name} on {tensor.device}"
            )


def _check_options(hidden, softcap, shift, reduction, filter_eps, block_size) -> float | None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None, got {softcap!r}")
    if not isinstance(shift, int) or shift < 0:
        raise ValueError(f"shift must be a non-negative integer, got {shift!r}")
    if shift and (hidden.dim() < 2 or shift >= hidden.shape[-2]):
        raise ValueError(
            f"shift must be below the length of the sequences, got shift={shift} and hidden of shape {tuple(hidden.shape)}"
        )
    if block_size is not None and (len(block_size) != 2 or min(block_size) < 1):
        raise ValueError(f"block_size must be two positive integers (tokens, classes), got {block_size!r}")
    if filter_eps == "auto":
        return torch.finfo(hidden.dtype).eps / 32 if hidden.dtype.itemsize == 2 else None
    if filter_eps is not None and (isinstance(filter_eps, str) or not 0 <= filter_eps < 1):
        raise ValueError(f"filter_eps must be 'auto', None or a number in [0, 1), got {filter_eps!r}")
    return filter_eps


def _check_range(targets, num_classes: int, ignore_index: int | None) -> None:
    if targets.is_meta or not len(targets):
        return
    low, high = (int(bound) for bound in torch.aminmax(targets))
    if low < 0 or high >= num_classes:
        kept = "" if ignore_index is None else f" or ignore_index={ignore_index}"
        raise ValueError(f"targets must lie in [0, {num_classes}){kept}, got values from {low} to {high}")


# --- which rows have a loss


def _select_rows(targets, ignore_index: int, shift: int):
    """The rows of the flattened hidden vectors with a loss (None for all), their targets, and where they belong."""
    wanted = targets[..., shift:] if shift else targets
    if targets.is_meta:  # no values to look at: take every row
        return None, wanted.reshape(-1), (wanted.shape, None)
    flat = wanted.reshape(-1)
    kept = flat != ignore_index
    positions = None if bool(kept.all()) else kept.nonzero().squeeze(1)
    rows = positions
    if shift:
        every = torch.arange(targets.numel(), device=targets.device).view(targets.shape)
        every = every[..., : targets.shape[-1] - shift].reshape(-1)
        rows = every if positions is None else every[positions]
    return rows, flat if positions is None else flat[positions], (wanted.shape, positions)


def _spread(values, where):
    shape, positions = where
    if positions is None:
        return values.reshape(shape)
    full = values.new_zeros(shape.numel())
    return full.index_copy(0, positions, values).reshape(shape)


def _explicit(hidden, weight, bias, rows, targets, softcap, smoothing):
    hidden = hidden if rows is None else hidden[rows]
    logits = F.linear(hidden, weight, bias).to(accumulator(hidden.dtype))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    return losses, logits.logsumexp(-1)
