"""Information of a layer from counted bins: fixed bins, and bins that follow the layer. All results in bits.

The layer is a tensor (n, d): n inputs, each seen once and equally likely, and d neurons. Formulas: Chelombiev, Houghton
and O'Donnell, "Adaptive Estimators Show Information Compression in Deep Neural Networks" (arXiv 1902.09037).
"""

import math
import numbers

import numpy as np
import torch

from lib.information.coupling import entropy_bits


def fixed_edges(low: float, high: float, bins: int = 30) -> torch.Tensor:
    """The `bins - 1` inner edges of equal bins over [low, high]; values outside fall into the outer bins.

    Raises:
        ValueError: low is not below high, one is not finite, or bins is not a whole number >= 1.
    """
    _check_bins(bins)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"low and high must be finite with low < high, got {low} and {high}")
    return torch.linspace(low, high, bins + 1, dtype=torch.float64)[1:-1]


def ebab_edges(layer: torch.Tensor, bins: int = 30, low: float | None = None) -> torch.Tensor:
    """Entropy-based adaptive bins: edges that give every bin the same number of unique values, within one.

    All neurons of the layer are taken together and share the edges. A bin reaches from its edge, included, to the next.
    Compute them anew for every layer and every epoch.

    Args:
        layer: activity, (n, d), or of any shape that is not empty.
        bins: how many, beside the bin of `low`. With fewer unique values each one gets its own bin.
        low: lower limit of the activation (0 for ReLU, -1 for tanh and ELU), which becomes an edge; it and whatever lies
            below it is left out of the count, so that dead or saturated values have a bin of their own.

    Returns:
        The edges in ascending order, at most `bins + 1` of them, in the dtype of the layer.

    Raises:
        TypeError: the layer is not a floating-point tensor.
        ValueError: the layer is empty or not finite, bins is not a whole number >= 1, or low is not finite.
    """
    _check_layer(layer, 1)
    _check_bins(bins)
    values = _different(layer.detach())
    first = values[:0]
    if low is not None:
        if not math.isfinite(low):
            raise ValueError(f"low must be finite, got {low}")
        first = values.new_tensor([low])
        values = values[values > first]
    starts = torch.unique(torch.arange(bins, device=values.device) * len(values) // bins)
    return torch.cat([first, values[starts] if len(values) else values])


def binned_mi(
    layer: torch.Tensor, labels: torch.Tensor, edges: torch.Tensor, inputs: torch.Tensor | None = None
) -> tuple[float, float]:
    """Plug-in information I(X;T) and I(T;Y), in bits, of the layer cut at `edges`.

    T is the tuple of the bin numbers of one row. The network is deterministic and every row is another input, so that
    H(T|X) = 0 and I(X;T) = H(T), at most log2 n; I(T;Y) = H(T) - H(T|Y), at most H(Y).

    Args:
        layer: activity, (n, d) or (n, ...).
        labels: of the rows, (n,), any discrete variable.
        edges: (k,), ascending, shared by all neurons; a value has the number of the edges that it reaches.
        inputs: which input each row belongs to, (n,), if inputs repeat (a noisy layer): then H(T|X) is counted too.

    Raises:
        TypeError: the layer is not a floating-point tensor, or labels or inputs are.
        ValueError: the layer is empty or not finite, sizes do not fit together, or edges are not ascending.
    """
    _check_layer(layer, 2)
    edges = torch.as_tensor(edges, device=layer.device)
    if edges.ndim != 1 or not edges.isfinite().all() or (edges.diff() <= 0).any():
        raise ValueError("edges must be finite, ascending and of shape (k,)")
    dtype = torch.promote_types(layer.dtype, edges.dtype)
    activity = layer.detach().flatten(1).to(dtype).contiguous()
    cells = _row_numbers(torch.bucketize(activity, edges.to(dtype), right=True))
    entropy = _entropy(cells)
    pairs = [_information(cells, variable, name, entropy) for name, variable in
             (("inputs", inputs), ("labels", labels)) if variable is not None]  # fmt: skip
    return (pairs[0], pairs[1]) if inputs is not None else (entropy, pairs[0])


def ebab_mi(
    layer: torch.Tensor,
    labels: torch.Tensor,
    bins: int = 30,
    low: float | None = None,
    inputs: torch.Tensor | None = None,
) -> tuple[float, float]:
    """I(X;T) and I(T;Y) in bits with the layer's own adaptive bins: `binned_mi` at `ebab_edges`.

    Only the order of the activities matters: any strictly increasing function of the whole layer, applied to `low` too,
    leaves both numbers as they are. Arguments and errors as of those two functions.
    """
    return binned_mi(layer, labels, ebab_edges(layer, bins, low), inputs)


def compression_score(trajectory) -> np.ndarray | float:
    """How far I(X;T) has come down from its highest value by the end, `(max - last) / max`, along the last axis.

    0: the end is the highest. 1: nothing is left. A trajectory that is 0 throughout scores 0.

    Raises:
        ValueError: an empty last axis, or values that are negative or not finite.
    """
    trajectory = np.asarray(trajectory, dtype=np.float64)
    if trajectory.ndim == 0 or trajectory.shape[-1] == 0:
        raise ValueError(f"trajectory must have shape (..., epochs) with epochs >= 1, got {trajectory.shape}")
    if not np.isfinite(trajectory).all() or (trajectory < 0).any():
        raise ValueError("trajectory must hold finite information >= 0")
    highest = trajectory.max(-1)
    score = (highest - trajectory[..., -1]) / np.where(highest > 0, highest, 1.0)
    return float(score) if score.ndim == 0 else score


def _different(values: torch.Tensor) -> torch.Tensor:
    if values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(np.unique(values.numpy()))  # sorts several times faster than torch.unique
    return torch.unique(values)


def _row_numbers(codes: torch.Tensor) -> torch.Tensor:
    """One whole number for each different row of (n, d) codes >= 0, exact for any d."""
    base = int(codes.max()) + 1 if codes.numel() else 1
    cells, count = torch.zeros(len(codes), dtype=torch.int64, device=codes.device), 1
    for column in codes.unbind(1):
        if count * base >= 2**62:  # number the rows met so far anew before the product overflows
            cells = torch.unique(cells, return_inverse=True)[1]
            count = int(cells.max()) + 1
        cells, count = cells * base + column, count * base
    return torch.unique(cells, return_inverse=True)[1]


def _entropy(cells: torch.Tensor) -> float:
    counts = torch.bincount(cells).cpu().numpy()
    return float(entropy_bits(counts / counts.sum())) + 0.0


def _information(cells: torch.Tensor, variable: torch.Tensor, name: str, entropy: float) -> float:
    """`entropy`, which is that of the cells, plus the entropy of the variable, minus that of both."""
    variable = torch.as_tensor(variable, device=cells.device)
    if variable.is_floating_point() or variable.is_complex():
        raise TypeError(f"{name} must be of a discrete type, got {variable.dtype}")
    if variable.shape != cells.shape:
        raise ValueError(f"{name} must have shape {tuple(cells.shape)}, got {tuple(variable.shape)}")
    values = torch.unique(variable, return_inverse=True)[1]
    joint = torch.unique(cells * (int(values.max()) + 1) + values, return_inverse=True)[1]
    return max(0.0, entropy + _entropy(values) - _entropy(joint))


def _check_bins(bins) -> None:
    if not isinstance(bins, numbers.Integral) or isinstance(bins, bool) or bins < 1:
        raise ValueError(f"bins must be a whole number of at least 1, got {bins!r}")


def _check_layer(layer: torch.Tensor, dims: int) -> None:
    if not isinstance(layer, torch.Tensor) or not layer.is_floating_point():
        got = layer.dtype if isinstance(layer, torch.Tensor) else type(layer).__name__
        raise TypeError(f"layer must be a floating-point tensor, got {got}")
    if layer.ndim < dims or not layer.numel():
        raise ValueError(f"layer must be a tensor (n, d) that is not empty, got {tuple(layer.shape)}")
    if not layer.isfinite().all():
        raise ValueError("layer must be finite")
