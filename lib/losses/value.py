"""Scalar targets as classes: histogram losses for value functions and other regressions (arXiv 2403.03950).

A network that has to predict a number gives one logit for each of several places on an interval. The softmax of the
logits is a distribution over the places, its mean is the prediction, and the loss is the cross-entropy to a target
distribution. The three classes differ in how they make that distribution.
"""

import math

import torch
from torch import nn

from lib.losses._classification import _readable, check_reduction, reduce


class _ValueHead(nn.Module):
    """Places on an interval, and the cross-entropy to a distribution over them."""

    def __init__(self, v_min: float, v_max: float, num_bins: int):
        super().__init__()
        if not (math.isfinite(v_min) and math.isfinite(v_max) and v_min < v_max):
            raise ValueError(f"v_min and v_max must be finite with v_min < v_max, got {v_min} and {v_max}")
        if num_bins < 2:
            raise ValueError(f"num_bins must be at least 2, got {num_bins}")
        self.v_min, self.v_max, self.num_bins = float(v_min), float(v_max), int(num_bins)

    def to_value(self, logits: torch.Tensor) -> torch.Tensor:
        """The mean of softmax(logits) over the places: (..., num_bins) to (...), in at least float32."""
        self._check_logits(logits)
        logits = logits.float() if logits.dtype.itemsize < 4 else logits
        return logits.softmax(-1) @ self.centers.to(logits)

    def extra_repr(self) -> str:
        return f"v_min={self.v_min}, v_max={self.v_max}, num_bins={self.num_bins}"

    def _check_logits(self, logits):
        if not logits.is_floating_point():
            raise TypeError(f"logits must be floating point, got {logits.dtype}")
        if logits.dim() == 0 or logits.shape[-1] != self.num_bins:
            raise ValueError(
                f"logits must be (..., {self.num_bins}), one for each bin, got {tuple(logits.shape)}"
            )

    def _clamped(self, values):
        if not values.is_floating_point():
            raise TypeError(f"values must be floating point, got {values.dtype}")
        values = values.float() if values.dtype.itemsize < 4 else values
        if _readable(values) and not bool(values.isfinite().all()):
            raise ValueError("values must be finite")
        return values.clamp(self.v_min, self.v_max)

    def _cross_entropy(self, logits, probs, reduction):
        check_reduction(reduction)
        self._check_logits(logits)
        if probs.shape != logits.shape:
            raise ValueError(
                f"targets must be {tuple(logits.shape[:-1])} for logits {tuple(logits.shape)}, "
                f"got {tuple(probs.shape[:-1])}"
            )
        logits = logits.float() if logits.dtype.itemsize < 4 else logits
        # detached: a bootstrapped target must not be moved towards the prediction
        losses = -(probs.detach().to(logits.dtype) * logits.log_softmax(-1)).sum(-1)
        return reduce(losses, reduction)


class HLGauss(_ValueHead):
    """Cross-entropy to the histogram of a normal law around the target (Imani and White 2018; arXiv 2403.03950, Section 3).

    The bins cut [v_min, v_max] into `num_bins` equal parts of width w. The target distribution of y gives each bin the
    mass that N(y, s^2) has there, with s = sigma_ratio * w, divided by its mass on the whole interval. Its mean is y up
    to (w / pi) exp(-2 pi^2 (s / w)^2) while y is several s away from both ends, and lies further inwards near them: 0.8 s
    at the end itself. Choose an interval some 3 s wider than the values. Targets outside it are clamped.

    At a glance:
        formula: `-sum_i p*_i log p_i`, p* the histogram of N(y, s^2) over the bins
        gradient: `p - p*`: each entry below 1 whatever the scale of the values
        consistency: p is the mean of the histograms, whose mean is E[y] while the targets keep away from the ends
        cost: `O(C)` per row, with one normal distribution function per bin edge

    Args:
        v_min: the lower end of the first bin.
        v_max: the upper end of the last bin.
        num_bins: how many bins, at least 2.
        sigma_ratio: s / w, positive (the authors' recommendation is 0.75).

    Attributes:
        edges: (num_bins + 1,), float64.
        centers: (num_bins,), float64, the middle of each bin.

    Raises:
        ValueError: ends that are not finite and ordered, fewer than 2 bins, a ratio that is not positive and finite.
    """

    def __init__(self, v_min: float, v_max: float, num_bins: int, sigma_ratio: float = 0.75):
        super().__init__(v_min, v_max, num_bins)
        if not (math.isfinite(sigma_ratio) and sigma_ratio > 0):
            raise ValueError(f"sigma_ratio must be positive and finite, got {sigma_ratio}")
        edges = torch.linspace(v_min, v_max, num_bins + 1, dtype=torch.float64)
        self.sigma_ratio = float(sigma_ratio)
        self.sigma = self.sigma_ratio * (self.v_max - self.v_min) / self.num_bins
        self.register_buffer("edges", edges, persistent=False)
        self.register_buffer("centers", (edges[1:] + edges[:-1]) / 2, persistent=False)

    def to_probs(self, values: torch.Tensor) -> torch.Tensor:
        """The target distributions: (...) to (..., num_bins), in at least float32; each sums to 1.

        Raises:
            TypeError: values that are not floating point.
            ValueError: values that are not finite.
        """
        values = self._clamped(values)
        scaled = (self.edges.to(values) - values.unsqueeze(-1)) / (self.sigma * math.sqrt(2))
        # P(a < G < b) = P(-b < G < -a): from the side where both are small, so that the difference keeps its digits;
        # erfc, since torch.special.ndtr is (1 + erf) / 2 and has lost them all at 6 s
        above, below = torch.erfc(scaled), torch.erfc(-scaled)
        mass = torch.where(
            scaled[..., :-1] > 0, above[..., :-1] - above[..., 1:], below[..., 1:] - below[..., :-1]
        )
        return mass / mass.sum(-1, keepdim=True)

    def loss(self, logits: torch.Tensor, values: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        """The cross-entropy; no gradient flows into `values`.

        Args:
            logits: (..., num_bins), floating point; half precision is computed in float32.
            values: (...), floating point.
            reduction: `"mean"`, `"sum"` or `"none"`.

        Returns:
            A scalar, or losses of the shape of `values` under `"none"`.

        Raises:
            TypeError: inputs that are not floating point.
            ValueError: shapes that do not fit, values that are not finite, an unknown reduction.
        """
        return self._cross_entropy(logits, self.to_probs(values), reduction)

    forward = loss

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, sigma_ratio={self.sigma_ratio}"


class TwoHot(_ValueHead):
    """Cross-entropy to the mass on the two places around the target whose mean it is (arXiv 2403.03950, Section 3).

    The places are `num_bins` equally spaced points, the first at v_min and the last at v_max, so that every target in
    the interval is met exactly; those outside are clamped.

    At a glance:
        formula: `-(1 - f) log p_k - f log p_(k+1)`, where y = (1 - f) z_k + f z_(k+1)
        gradient: `p - p*`: each entry below 1 whatever the scale of the values
        consistency: p is the mean of the target distributions, whose mean is E[y] while y stays in the interval
        cost: `O(C)` per row

    Args:
        v_min: the first place.
        v_max: the last place.
        num_bins: how many places, at least 2.

    Attributes:
        centers: (num_bins,), float64, the places.

    Raises:
        ValueError: ends that are not finite and ordered, fewer than 2 places.
    """

    def __init__(self, v_min: float, v_max: float, num_bins: int):
        super().__init__(v_min, v_max, num_bins)
        self.register_buffer(
            "centers", torch.linspace(v_min, v_max, num_bins, dtype=torch.float64), persistent=False
        )

    def to_probs(self, values: torch.Tensor) -> torch.Tensor:
        """The target distributions: (...) to (..., num_bins), in at least float32; each has the mean `values`.

        Raises:
            TypeError: values that are not floating point.
            ValueError: values that are not finite.
        """
        return self._project(self._clamped(values).unsqueeze(-1), None)

    def loss(self, logits: torch.Tensor, values: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        """The cross-entropy, with arguments, result and errors as in `HLGauss.loss`."""
        return self._cross_entropy(logits, self.to_probs(values), reduction)

    forward = loss

    def _project(self, points, masses):
        """Split the mass at each of the points (..., n) between its two neighbours."""
        step = (self.v_max - self.v_min) / (self.num_bins - 1)
        position = ((points - self.v_min) / step).clamp(0, self.num_bins - 1)
        # at most the last but one: at v_max the whole mass then goes to the upper neighbour and none is lost
        lower = position.floor().clamp_max(self.num_bins - 2)
        upper_share = position - lower
        masses = torch.ones_like(points) if masses is None else masses
        index = lower.long()
        probs = torch.zeros(*points.shape[:-1], self.num_bins, dtype=points.dtype, device=points.device)
        probs = probs.scatter_add(-1, index, masses * (1 - upper_share))
        return probs.scatter_add(-1, index + 1, masses * upper_share)


class C51Projection(TwoHot):
    """Cross-entropy to the projected distribution of the return (Bellemare, Dabney and Munos 2017, Algorithm 1).

    The target is not a number but a distribution: the next state's, with each place z_j moved to r + gamma z_j, clamped,
    and its mass split between the two places around as in `TwoHot`, which is the case of a certain return.

    At a glance:
        formula: `-sum_i p*_i log p_i`, p* the projection of `r + gamma Z'`
        gradient: `p - p*`: each entry below 1 whatever the scale of the values
        consistency: p is the projected law of the return, of which the mean is one number
        cost: `O(C)` per row

    Args:
        v_min: the first place.
        v_max: the last place.
        num_bins: how many places, at least 2 (51 in the name).

    Attributes:
        centers: (num_bins,), float64, the places.

    Raises:
        ValueError: ends that are not finite and ordered, fewer than 2 places.
    """

    def to_probs(
        self, rewards: torch.Tensor, discounts: torch.Tensor, next_probs: torch.Tensor
    ) -> torch.Tensor:
        """The projection of `rewards + discounts * Z'`, in at least float32.

        Args:
            rewards: (...).
            discounts: (...), gamma, and 0 where the episode ends.
            next_probs: (..., num_bins), the law of Z' on the places.

        Returns:
            (..., num_bins); each row has the sum of its `next_probs`.

        Raises:
            TypeError: inputs that are not floating point.
            ValueError: shapes that do not fit, or values that are not finite.
        """
        if not (discounts.is_floating_point() and next_probs.is_floating_point()):
            raise TypeError(
                f"discounts and next_probs must be floating point, got {discounts.dtype} and {next_probs.dtype}"
            )
        if discounts.shape != rewards.shape or next_probs.shape != (*rewards.shape, self.num_bins):
            raise ValueError(
                f"for rewards {tuple(rewards.shape)} discounts must be of the same shape and next_probs "
                f"{(*rewards.shape, self.num_bins)}, got {tuple(discounts.shape)} and {tuple(next_probs.shape)}"
            )
        dtype = torch.promote_types(torch.promote_types(rewards.dtype, next_probs.dtype), torch.float32)
        moved = rewards.to(dtype).unsqueeze(-1) + discounts.to(dtype).unsqueeze(-1) * self.centers.to(
            rewards.device, dtype
        )
        return self._project(self._clamped(moved), next_probs.to(dtype))

    def loss(
        self,
        logits: torch.Tensor,
        rewards: torch.Tensor,
        discounts: torch.Tensor,
        next_probs: torch.Tensor,
        reduction: str = "mean",
    ) -> torch.Tensor:
        """The cross-entropy of logits (..., num_bins) to the projection; no gradient flows into the target."""
        return self._cross_entropy(logits, self.to_probs(rewards, discounts, next_probs), reduction)

    forward = loss
