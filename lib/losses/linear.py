"""Cross-entropy of a linear classifier, without the matrix of its logits.

The loss of a language model is `cross_entropy(hidden @ weight.T, targets)`. The matrix in the middle has one entry for
every token and every word of the vocabulary, which is more memory than the rest of the model needs. The functions here
compute the same loss and the same gradients tile by tile (Cut Cross-Entropy, Wijmans et al. 2024, arXiv 2411.09009).
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lib.backend import choose_impl
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
        filter_eps: skip a tile of the backward pass when all its entries `|softmax - onehot|` are below this.
            `"auto"`: `finfo(dtype).eps / 32` in half precision, None otherwise. None: exact.
        filter_hidden: whether the gradient of `hidden` is filtered where `filter_eps` says so.
        filter_weight: the same for `weight` and `bias`. False keeps the small pushes that rare classes live from.
        sort_vocab: order the vocabulary by mean logit before it is cut into tiles, so that more can be skipped.
        return_lse: return also the log-sum-exp of each row's logits, differentiably (for a z-loss).
        block_size: tokens and classes of a tile; chosen by shape and device when None.
        stats: if given, its counters are raised by the tiles seen and skipped in the backward pass.
        impl: `"torch"` holds all logits; `"chunked"` is the lean path in PyTorch; `"triton"` the kernel;
            `"auto"` the kernel on CUDA and `"chunked"` elsewhere.

    Returns:
        The loss: a scalar, or of the shape of `targets` (after the shift) under `reduction="none"`, with 0 at ignored
        rows. Where `return_lse` is set, the pair of it and the log-sum-exp, which has that shape and those zeros too.

    Raises:
        TypeError: dtypes that do not fit; the message says which.
        ValueError: shapes or devices that do not fit, targets out of range, an unknown reduction, or a softcap,
            `filter_eps`, `shift` or `block_size` outside its range.
        RuntimeError: a gradient is differentiated again, or Triton is asked for and not installed.
    """
    impl = choose_impl(impl, hidden, options=("torch", "chunked", "triton"), cpu="chunked")
    _check_tensors(hidden, weight, targets, bias)
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
            losses, lse = _explicit(hidden, weight, bias, rows, targets, softcap)
        else:
            eps = eps if any(filters) else None
            options = dict(
                softcap=softcap, eps=eps, filters=filters, sort=sort_vocab, blocks=block_size, stats=stats
            )  # fmt: skip
            inputs = (hidden, weight, bias, targets, rows)
            if impl == "triton":
                losses, lse = Fused.apply(*inputs, options)
            elif (
                eps is None and reduction != "none" and not return_lse and len(targets)
                and hidden.dtype.itemsize > 2
            ):  # fmt: skip
                count = len(targets) if reduction == "mean" else 1
                options["gradients"] = torch.is_grad_enabled()
                return OnePass.apply(*inputs, 1 / count, options)
            else:
                losses, lse = Tiled.apply(*inputs, options)

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


def _explicit(hidden, weight, bias, rows, targets, softcap):
    hidden = hidden if rows is None else hidden[rows]
    logits = F.linear(hidden, weight, bias).to(accumulator(hidden.dtype))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, reduction="none"), logits.logsumexp(-1)
