"""An output layer whose training step does not depend on the number of classes, exactly."""

import math

import torch
import torch.nn.functional as F
from torch import nn

LOSSES = ("z", "mse", "taylor", "spherical")


class SphericalOutput(nn.Module):
    """A linear layer (C, d) trained on a spherical loss by gradient descent, without its C outputs ever being computed.

    A spherical loss sees the outputs o = W h only through s = sum o, q = sum o^2 and the target's o_c. With Q = W^T W and
    wbar = W^T 1 at hand these cost `O(d^2)`, and so do the gradient on h and the update of W, which is stored as
    W = V U + 1 w^T (Vincent et al. 2015, arXiv:1412.7091; the term 1 w^T, for losses that depend on s, is de Brébisson and
    Vincent 2016, arXiv:1604.08859). A step of B examples costs `O(B d^2 + B^2 d + B^3)` and is the very step that
    `torch.optim.SGD` takes on W, up to rounding.

    The inverse of U is kept by the Woodbury identity and never computed. Every `fold_every` steps, and whenever the inverse
    is found wrong by more than `tolerance` (which includes a step that makes U singular), U is folded into V at `O(C d^2)`.

    Everything is a buffer, which moves with the module and is saved with it: no optimizer sees the weight, `step` updates it.

    Args:
        in_features: d, the size of the hidden vector.
        num_classes: C, at least 2.
        loss: `"z"` (`lib.losses.z_loss`), `"taylor"` (`lib.losses.taylor_softmax_nll`), `"spherical"`
            (`lib.losses.spherical_softmax_nll`) or `"mse"` (half the squared distance to the one-hot target).
        a: of the Z-loss.
        b: of the Z-loss.
        eps: of the spherical softmax.
        fold_every: steps between two folds, or None for folds on demand only.
        tolerance: relative error of the kept inverse from which on U is folded; `eps ** 0.6` of the dtype when None.
        dtype: float32 or float64; the default dtype when None.
        device: of the buffers.

    Raises:
        ValueError: sizes below their minimum, an unknown loss or dtype, numbers outside their range.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        loss: str = "z",
        a: float = 1.0,
        b: float = 10.0,
        eps: float = 1e-2,
        fold_every: int | None = 500,
        tolerance: float | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if in_features < 1 or num_classes < 2:
            raise ValueError(
                f"need at least 1 feature and 2 classes, got in_features={in_features}, num_classes={num_classes}"
            )
        if loss not in LOSSES:
            raise ValueError(f"loss must be one of {LOSSES}, got {loss!r}")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        if not (a > 0 and eps > 0 and math.isfinite(a) and math.isfinite(b) and math.isfinite(eps)):
            raise ValueError(f"a and eps must be finite and above 0, b finite, got a={a}, b={b}, eps={eps}")
        if fold_every is not None and fold_every < 1:
            raise ValueError(f"fold_every must be at least 1 or None, got {fold_every}")
        if tolerance is not None and not tolerance > 0:
            raise ValueError(f"tolerance must be above 0, got {tolerance}")
        self.in_features, self.num_classes, self.loss = in_features, num_classes, loss
        self.a, self.b, self.eps, self.fold_every = a, b, eps, fold_every
        self.tolerance = torch.finfo(dtype).eps ** 0.6 if tolerance is None else tolerance
        self.steps_since_fold = self.folds = 0
        options = {"dtype": dtype, "device": device}
        d = in_features
        self.register_buffer("V", torch.randn(num_classes, d, **options) / math.sqrt(d))  # (C, d)
        for name, shape in {"U": (d, d), "U_inverse": (d, d), "w": (d,), "Q": (d, d), "wbar": (d,)}.items():
            self.register_buffer(name, torch.zeros(shape, **options))
        self.load_weight(self.V)

    @torch.no_grad()
    def load_weight(self, weight: torch.Tensor) -> None:
        """Start from this weight, (C, d); it is copied. Costs `O(C d^2)`.

        Raises:
            ValueError: another shape.
        """
        if weight.shape != self.V.shape:
            raise ValueError(f"weight must be {tuple(self.V.shape)}, got {tuple(weight.shape)}")
        self._set_factors(weight)
        self._refresh()

    def materialize(self) -> torch.Tensor:
        """The weight W = V U + 1 w^T, (C, d), at `O(C d^2)`: for saving and inspection, never in a step."""
        return self.V @ self.U + self.w

    def fold(self) -> None:
        """Write U and w into V, and compute Q and wbar afresh: removes all rounding that has piled up. `O(C d^2)`."""
        self.load_weight(self.materialize())
        self.folds += 1

    def _set_factors(self, weight):
        """V = weight, U = I, w = 0."""
        self.V.copy_(weight)
        self.U.copy_(torch.eye(self.in_features))
        self.U_inverse.copy_(self.U)
        self.w.zero_()
        self.steps_since_fold = 0

    def _refresh(self):
        """Q and wbar from V alone: right where U = I and w = 0."""
        self.Q.copy_(self.V.T @ self.V)
        self.wbar.copy_(self.V.sum(0))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """All outputs, (..., d) to (..., C), at `O(d^2 + C d)` each: for inference."""
        return (hidden @ self.U.T) @ self.V.T + (hidden @ self.w).unsqueeze(-1)

    @torch.no_grad()
    def topk(self, hidden: torch.Tensor, k: int) -> torch.return_types.topk:
        """The k largest outputs and their classes, (..., k) each, of hidden vectors (..., d)."""
        return self(hidden).topk(k)

    def inverse_error(self) -> float:
        """Largest entry of U U_inverse - I."""
        identity = torch.eye(self.in_features, dtype=self.U.dtype, device=self.U.device)
        return (self.U @ self.U_inverse - identity).abs().max().item()

    def _derivatives(self, s, q, own):
        """The loss of each example, and its derivatives by s, by q and by the target's output; all (B,)."""
        C = self.num_classes
        if self.loss == "mse":
            return (q - 2 * own + 1) / 2, torch.zeros_like(s), torch.full_like(q, 0.5), -torch.ones_like(own)
        if self.loss == "taylor":
            total, target = C + s + q / 2, ((1 + own).square() + 1) / 2
            return total.log() - target.log(), 1 / total, 0.5 / total, -(1 + own) / target
        if self.loss == "spherical":
            total, target = q + C * self.eps, own.square() + self.eps
            return total.log() - target.log(), torch.zeros_like(s), 1 / total, -2 * own / target
        mean = s / C
        variance = q / C - mean.square()
        flat = variance <= 16 * torch.finfo(q.dtype).eps * q / C  # nothing but rounding: no z-score
        deviation = torch.where(flat, 1.0, variance).sqrt()
        z = torch.where(flat, 0.0, (own - mean) / deviation)
        g = torch.sigmoid(self.a * (self.b - z))
        by_s = g / (C * deviation) * (1 - z * mean / deviation)
        by_q = g * z / (2 * C * deviation.square())
        return F.softplus(self.a * (self.b - z)) / self.a, by_s, by_q, -g / deviation

    @torch.no_grad()
    def step(
        self, hidden: torch.Tensor, targets: torch.Tensor, lr: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One step of gradient descent on the weight, for the mean loss of a batch.

        Args:
            hidden: h, (B, d), of the layer's dtype. Detached here; call `hidden.backward(gradient)` to go on below.
            targets: class indices, (B,), in [0, C).
            lr: learning rate, at least 0; 0 leaves the weight alone.

        Returns:
            The mean loss, a scalar, and its gradient on `hidden`, (B, d), both at the weight before the step.

        Raises:
            TypeError: hidden of another dtype, targets that are not integers.
            ValueError: shapes that do not fit, an empty batch, targets out of range, a negative or infinite learning rate.
        """
        self._check(hidden, targets, lr)
        h, batch = hidden.detach(), len(hidden)
        Qh = h @ self.Q  # (B, d); Q is symmetric
        W_c = self.V[targets] @ self.U + self.w  # (B, d)
        s, q, own = h @ self.wbar, (h * Qh).sum(1), (h * W_c).sum(1)
        losses, by_s, by_q, by_c = self._derivatives(s, q, own)
        by_s, by_q, by_c = by_s / batch, by_q / batch, by_c / batch
        gradient = by_s[:, None] * self.wbar + 2 * by_q[:, None] * Qh + by_c[:, None] * W_c
        if lr > 0:
            self._update(h, targets, W_c, by_s, by_q, by_c, lr)
        return losses.mean(), gradient

    def _update(self, h, targets, W_c, by_s, by_q, by_c, lr):
        scaled = 2 * lr * by_q[:, None] * h  # S H, (B, d), so that A = I - H^T S H = I - h.T @ scaled
        on_c = by_c[:, None] * h
        sums, ones_gradient = by_s @ h, by_c @ h  # sum of L_s h, and 1^T of the sparse part; (d,)
        same = (targets[:, None] == targets[None, :]).to(h.dtype)  # (B, B): whose rows meet

        # Q <- A Q A - r (A W^T E + its transpose) + r^2 E^T E for W <- W A - r E, E = 1 sums^T + the sparse rows
        Q = self.Q - (self.Q @ h.T) @ scaled
        Q = Q - scaled.T @ (h @ Q)
        crossed = torch.outer(self.wbar, sums) + (by_c[:, None] * W_c).T @ h  # W^T E
        crossed = crossed - scaled.T @ (h @ crossed)
        squares = self.num_classes * torch.outer(sums, sums) + on_c.T @ (same @ on_c)
        mixed = torch.outer(sums, ones_gradient)
        Q = Q - lr * (crossed + crossed.T) + lr**2 * (squares + mixed + mixed.T)
        self.Q.copy_((Q + Q.T) / 2)
        self.wbar.sub_(scaled.T @ (h @ self.wbar)).sub_(lr * (self.num_classes * sums + ones_gradient))
        self.w.sub_(scaled.T @ (h @ self.w)).sub_(lr * sums)

        # U <- U A, and the inverse A^-1 U^-1 by Woodbury: A^-1 = I + H^T S M^-1 H, M = I - H H^T S
        self.U.sub_((self.U @ h.T) @ scaled)
        M = torch.eye(len(h), dtype=h.dtype, device=h.device) - h @ scaled.T
        core, _ = torch.linalg.solve_ex(M, h @ self.U_inverse)  # no exception: a singular M shows below
        self.U_inverse.add_(scaled.T @ core)
        probe = h @ self.U.T @ self.U_inverse.T - h
        self.steps_since_fold += 1
        wrong = not bool(probe.norm() <= self.tolerance * h.norm())  # also for NaN
        fold = wrong or self.steps_since_fold == self.fold_every
        if fold:
            self._set_factors(self.materialize())
        # rows of V: V_c U loses r L_c h, so V_c loses r L_c U^-T h
        self.V.index_add_(0, targets, on_c @ self.U_inverse, alpha=-lr)
        if fold:  # V now holds the whole step
            self._refresh()
            self.folds += 1

    def _check(self, hidden, targets, lr):
        if hidden.dtype != self.V.dtype:
            raise TypeError(f"hidden must be {self.V.dtype} like the layer, got {hidden.dtype}")
        if targets.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"targets must be integer class indices, got {targets.dtype}")
        if hidden.ndim != 2 or hidden.shape[1] != self.in_features or len(hidden) == 0:
            raise ValueError(
                f"hidden must be (B, {self.in_features}) with B at least 1, got {tuple(hidden.shape)}"
            )
        if targets.shape != hidden.shape[:1]:
            raise ValueError(f"targets must be ({len(hidden)},), got {tuple(targets.shape)}")
        if bool(((targets < 0) | (targets >= self.num_classes)).any()):
            raise ValueError(f"targets must be in [0, {self.num_classes}), got {targets.tolist()[:8]} …")
        if not (math.isfinite(lr) and lr >= 0):
            raise ValueError(f"lr must be finite and at least 0, got {lr}")
