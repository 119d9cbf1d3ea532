"""How much to trust a classifier's logits, as a weight for what is added to them: large where the logits are unsure.

Formulas are those of the code of Tang et al., "AMU-Tuning: Effective Logit Bias for CLIP-based Few-shot Learning"
(arXiv 2404.08958).
"""

import math

import torch

FUSION_KINDS = ("kurtosis", "entropy", "energy", "max", "margin")


def kurtosis_weight(
    logits: torch.Tensor, ref: float | torch.Tensor | None = None, power: float | torch.Tensor = 0.4
) -> torch.Tensor:
    """`(k4 / ref)^(-power)` with k4 the kurtosis of the class probabilities, (n, C) to (n, 1).

    Population kurtosis without the minus 3: the fourth power of `(p - mean) / std`, averaged over the classes. If m of C
    classes share all probability, `k4 = 1 / (q (1 - q)) - 3` with `q = m / C`, so k4 counts how many classes compete. It does not change
    under `p -> a p + b`: for nearly uniform probabilities it says nothing about their size. Rows of equal probabilities
    get k4 = 1, the smallest kurtosis there is, and so the largest weight. Computed in double precision.

    Args:
        logits: (n, C), floating point, at least two classes.
        ref: the kurtosis at which the weight is 1; C / 4 by default, which is the 250 of the released code for 1000 classes.
        power: at least 0; 0 makes all weights 1.

    Raises:
        ValueError: logits of another shape, or a `ref` or `power` out of range (numbers only; tensors are taken as they are).
    """
    _check(logits)
    if not isinstance(ref, torch.Tensor) and ref is not None and not ref > 0:
        raise ValueError(f"ref must be positive, got {ref}")
    _check_power(power)
    ref = logits.shape[1] / 4 if ref is None else ref
    centred = torch.softmax(logits.double(), 1)
    centred = centred - centred.mean(1, keepdim=True)
    variance = centred.square().mean(1, keepdim=True)
    flat = variance < 1e-30  # rounding is all that is left
    scaled = centred / torch.where(flat, 1.0, variance).sqrt()
    kurtosis = torch.where(flat, 1.0, scaled.pow(4).mean(1, keepdim=True))
    return (kurtosis / ref).pow(-power).to(logits.dtype)


def fusion_weight(
    logits: torch.Tensor, kind: str = "kurtosis", power: float | torch.Tensor = 0.4
) -> torch.Tensor:
    """One of the weights that the released code offers, (n, C) to (n, 1); all of them fall with confidence.

    - `"kurtosis"`: `kurtosis_weight` with its default reference.
    - `"entropy"`: `exp(power H(p) / log C)`.
    - `"energy"`: `E^(-power)`, `E = 2 log sum_k exp(p_k / 2)`. It takes probabilities, not logits, and hardly varies.
    - `"max"`: `(max_k p_k)^(-power)`.
    - `"margin"`: `(p_(1) - p_(2))^(-power)`, the two largest probabilities, their distance at least 1e-6.

    Args:
        logits: (n, C), floating point, at least two classes.
        kind: one of `FUSION_KINDS`.
        power: at least 0.

    Raises:
        ValueError: logits of another shape, an unknown kind, or a negative power.
    """
    _check(logits)
    _check_power(power)
    if kind == "kurtosis":
        return kurtosis_weight(logits, power=power)
    p = torch.softmax(logits, 1)
    if kind == "entropy":
        entropy = torch.special.entr(p).sum(1, keepdim=True)
        return (power * entropy / math.log(logits.shape[1])).exp()
    if kind == "energy":
        return (2 * (p / 2).logsumexp(1, keepdim=True)).pow(-power)
    if kind == "max":
        return p.amax(1, keepdim=True).pow(-power)
    if kind == "margin":
        top = p.topk(2, 1).values
        return (top[:, :1] - top[:, 1:]).clamp_min(1e-6).pow(-power)
    raise ValueError(f"kind must be one of {FUSION_KINDS}, got {kind!r}")


def _check(logits):
    if logits.dim() != 2 or not logits.is_floating_point() or logits.shape[1] < 2:
        raise ValueError(
            f"logits must be floating point (n, C), C >= 2, got {logits.dtype} {tuple(logits.shape)}"
        )


def _check_power(power):
    if not isinstance(power, torch.Tensor) and not power >= 0:
        raise ValueError(f"power must be at least 0, got {power}")
