"""Attention, state space models and gated networks as one linear time-varying system (Sieber et al. 2024)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lib.attention.linear import diagonal_scan, feature_map

NORMALIZERS = {"exp": torch.exp, "softplus": F.softplus, "sigmoid": torch.sigmoid, "none": torch.ones_like}


@dataclass(frozen=True)
class LinearSystem:
    """h_i = Lambda_i h_{i-1} + B_i u_i, y_i = C_i h_i + D_i u_i with h_{-1} = 0 and diagonal Lambda_i.

    The matrices may depend on the inputs u_0 .. u_i; they are given for one batch of input sequences. N is the size of the
    state and N / d the paper's state expansion n. This form is for insight and for tests: B and C are stored in full.

    Args:
        decay: the diagonals of Lambda, (batch, L, N).
        B: (batch, L, N, d).
        C: (batch, L, p, N), p outputs.
        D: (batch, L, p, d), or None for zero.

    Raises:
        ValueError: shapes that do not fit together.
    """

    decay: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor | None = None

    def __post_init__(self):
        lead = self.decay.shape
        fits = (
            len(lead) == 3
            and self.B.ndim == self.C.ndim == 4
            and self.B.shape[:3] == lead
            and self.C.shape[:2] == lead[:2]
            and self.C.shape[3] == lead[2]
        )
        if fits and self.D is not None:
            fits = self.D.shape == (*lead[:2], self.C.shape[2], self.B.shape[3])
        if not fits:
            names = {name: getattr(self, name) for name in ("decay", "B", "C", "D")}
            shapes = {name: tuple(value.shape) for name, value in names.items() if value is not None}
            raise ValueError(
                f"decay (batch, L, N), B (batch, L, N, d), C (batch, L, p, N), D (batch, L, p, d): got {shapes}"
            )

    @property
    def state_size(self) -> int:
        """N."""
        return self.decay.shape[2]

    def states(self, u: torch.Tensor) -> torch.Tensor:
        """All states h_i, (batch, L, N), of the inputs (batch, L, d)."""
        if u.shape != (*self.B.shape[:2], self.B.shape[3]):
            raise ValueError(f"u must be {(*self.B.shape[:2], self.B.shape[3])}, got {tuple(u.shape)}")
        return diagonal_scan(self.decay, torch.einsum("blnd,bld->bln", self.B, u))

    def scan(self, u: torch.Tensor) -> torch.Tensor:
        """The outputs y_i, (batch, L, p), by the recurrence: linear in L."""
        y = torch.einsum("blpn,bln->blp", self.C, self.states(u))
        return y if self.D is None else y + torch.einsum("blpd,bld->blp", self.D, u)

    def unroll(self) -> torch.Tensor:
        """Phi (batch, L, p, L, d) with y_i = sum_j Phi_ij u_j: the response of every output to every input.

        Phi_ij = C_i (Lambda_i ... Lambda_{j+1}) B_j for j <= i, plus D_i for j = i, and zero for j > i. Memory L^2 N d.
        """
        length = self.decay.shape[1]
        eye = torch.eye(length, dtype=self.B.dtype, device=self.B.device)
        pulses = torch.einsum("ij,bjnd->bijnd", eye, self.B)  # B_j enters at time j and at no other
        responses = diagonal_scan(self.decay[:, :, None, :, None], pulses)
        phi = torch.einsum("bipn,bijnd->bipjd", self.C, responses)
        return phi if self.D is None else phi + torch.einsum("ij,bipd->bipjd", eye, self.D)

    def to_matrix(self, value: torch.Tensor | None = None, *, tolerance: float = 1e-6) -> torch.Tensor:
        """The attention matrix (batch, L, L), a_ij with Phi_ij = a_ij * value, where there is one.

        Args:
            value: the one (p, d) matrix that all blocks share, W_V of attention; the identity if not given.
            tolerance: the largest deviation allowed, relative to the largest entry of Phi.

        Raises:
            ValueError: the blocks are not multiples of `value`, as for a state space model with one decay a channel.
        """
        phi = self.unroll()
        if value is None:
            value = torch.eye(phi.shape[2], phi.shape[4], dtype=phi.dtype, device=phi.device)
        if value.shape != (phi.shape[2], phi.shape[4]):
            raise ValueError(f"value must be {(phi.shape[2], phi.shape[4])}, got {tuple(value.shape)}")
        matrix = torch.einsum("bipjd,pd->bij", phi, value) / value.square().sum()
        error = (phi - torch.einsum("bij,pd->bipjd", matrix, value)).abs().max()
        if error > tolerance * phi.abs().max():
            raise ValueError(
                f"the blocks Phi_ij are no multiples of one matrix (largest deviation {error.item():.3g}): "
                f"this system has no scalar attention matrix"
            )
        return matrix


def _kron_identity(rows: torch.Tensor, d: int) -> torch.Tensor:
    """I_d kron rows as a matrix (batch, L, d n, d), for rows (batch, L, n): channel c has states c n .. c n + n - 1."""
    batch, length, n = rows.shape
    eye = torch.eye(d, dtype=rows.dtype, device=rows.device)
    return torch.einsum("bln,cd->blcnd", rows, eye).reshape(batch, length, d * n, d)


def _before(eta: torch.Tensor) -> torch.Tensor:
    """eta_{i-1} along dimension 1; the first is its own predecessor, which meets the zero state."""
    return torch.cat([eta[:, :1], eta[:, :-1]], 1)


def _attention(q_features, k_features, w_v, eta, fold):
    """The system of sum_j phi(q_i).psi(k_j) W_V u_j / eta_i, eta (batch, L) folded into Lambda and B, or left to C."""
    d = w_v.shape[0]
    B = _kron_identity(k_features, d) @ w_v
    C = _kron_identity(q_features, d).transpose(2, 3)
    decay = eta.new_ones(*eta.shape, d * k_features.shape[-1])
    if fold:
        return LinearSystem(decay * (_before(eta) / eta)[..., None], B / eta[..., None, None], C)
    return LinearSystem(decay, B, C / eta[..., None, None])


def from_linear_attention(
    u: torch.Tensor,
    w_q: torch.Tensor,
    w_k: torch.Tensor,
    w_v: torch.Tensor,
    *,
    feature: str | Callable = "elu1",
    degree: int = 2,
    fold: bool = False,
) -> LinearSystem:
    """Causal linear attention, normalised by its own row sums eta_i = phi(q_i) . sum_{j<=i} phi(k_j).

    Args:
        u: (batch, L, d).
        w_q: (m, d), as in torch.nn.Linear.
        w_k: (m, d).
        w_v: (d, d).
        feature: see `feature_map`.
        degree: of the feature `"taylor"`.
        fold: the paper's form with Lambda_i = eta_{i-1} / eta_i and B_i divided by eta_i; otherwise Lambda_i = I and C_i
            divided by eta_i. Both give the same outputs, because the ratios telescope.
    """
    phi = feature_map(feature, degree=degree)
    q, k = phi(u @ w_q.T), phi(u @ w_k.T)
    return _attention(q, k, w_v, (q * k.cumsum(1)).sum(-1), fold)


def from_normalized_attention(
    u: torch.Tensor,
    w_q: torch.Tensor,
    w_k: torch.Tensor,
    w_v: torch.Tensor,
    w_eta: torch.Tensor,
    *,
    feature: str | Callable = "elu1",
    degree: int = 2,
    normalizer: str = "exp",
    fold: bool = True,
) -> LinearSystem:
    """The paper's normalised attention: linear attention divided by eta(u_i) = normalizer(w_eta . u_i).

    Args:
        u: (batch, L, d).
        w_q: (m, d).
        w_k: (m, d).
        w_v: (d, d).
        w_eta: (d,).
        feature: see `feature_map`.
        degree: of the feature `"taylor"`.
        normalizer: `"exp"`, `"softplus"`, `"sigmoid"`, or `"none"` for eta = 1.
        fold: see `from_linear_attention`.

    Raises:
        ValueError: an unknown normalizer.
    """
    if normalizer not in NORMALIZERS:
        raise ValueError(f"normalizer must be one of {tuple(NORMALIZERS)}, got {normalizer!r}")
    phi = feature_map(feature, degree=degree)
    return _attention(phi(u @ w_q.T), phi(u @ w_k.T), w_v, NORMALIZERS[normalizer](u @ w_eta), fold)


def from_s6(
    u: torch.Tensor,
    w_delta: torch.Tensor,
    log_a: torch.Tensor,
    w_b: torch.Tensor,
    w_c: torch.Tensor,
    *,
    skip: torch.Tensor | None = None,
) -> LinearSystem:
    """The selective state space model of Mamba: one step size a channel, n states a channel, all read and written alike.

    Delta_i = softplus(w_delta u_i), Lambda_i = exp(-Delta_i A) with A = exp(log_a) > 0, B_i = Delta_i b(u_i) (the Euler form
    that Mamba uses, not the zero-order hold), C_i = c(u_i).

    Args:
        u: (batch, L, d).
        w_delta: (d, d).
        log_a: (d, n).
        w_b: (n, d).
        w_c: (n, d).
        skip: (d,), the diagonal of D, or None.
    """
    d, n = log_a.shape
    delta = F.softplus(u @ w_delta.T)  # (batch, L, d)
    decay = torch.exp(-delta[..., None] * log_a.exp()).flatten(2)
    B = _kron_identity(u @ w_b.T, d) * delta[:, :, None, :]
    C = _kron_identity(u @ w_c.T, d).transpose(2, 3)
    D = None if skip is None else torch.diag(skip).expand(*u.shape[:2], d, d)
    return LinearSystem(decay, B, C, D)


def from_ssd(
    u: torch.Tensor, w_delta: torch.Tensor, log_a: torch.Tensor, w_b: torch.Tensor, w_c: torch.Tensor
) -> LinearSystem:
    """One head of Mamba-2's state space dual: as S6, with one step size and one decay for the whole head.

    Args:
        u: (batch, L, d), the channels of the head.
        w_delta: (d,).
        log_a: a scalar.
        w_b: (n, d).
        w_c: (n, d).
    """
    d = u.shape[-1]
    delta = F.softplus(u @ w_delta)  # (batch, L)
    b, c = u @ w_b.T, u @ w_c.T
    decay = torch.exp(-delta * log_a.exp())[..., None].expand(*u.shape[:2], d * b.shape[-1])
    return LinearSystem(decay, _kron_identity(delta[..., None] * b, d), _kron_identity(c, d).transpose(2, 3))


def from_qlstm(
    u: torch.Tensor,
    w_forget: torch.Tensor,
    w_input: torch.Tensor,
    w_value: torch.Tensor,
    w_output: torch.Tensor,
    *,
    forget: str = "sigmoid",
    power: float = 1.0,
) -> LinearSystem:
    """The quasi-LSTM without tanh: h_i = f_i h_{i-1} + sigmoid(w_input u_i) * (w_value u_i), y_i = sigmoid(w_output u_i) * h_i.

    Args:
        u: (batch, L, d).
        w_forget: (N, d); may be None with `"coupled"`.
        w_input: (N, d).
        w_value: (N, d).
        w_output: (N, d).
        forget: `"sigmoid"`, f_i = sigmoid(w_forget u_i); `"reversed"`, f_i = sigmoid(-w_forget u_i) ** power, which is
            the decay of S6 with A = power; or `"coupled"`, f_i = sigmoid(-w_input u_i): one projection for both gates.
        power: of `"reversed"`, positive.

    Raises:
        ValueError: an unknown form of the forget gate, or a power that is not positive.
    """
    if forget not in ("sigmoid", "reversed", "coupled") or not power > 0:
        raise ValueError(
            f"forget must be 'sigmoid', 'reversed' or 'coupled' and power > 0, got {forget!r}, {power}"
        )
    gate = u @ w_input.T
    if forget == "sigmoid":
        decay = torch.sigmoid(u @ w_forget.T)
    elif forget == "coupled":
        decay = torch.sigmoid(-gate)
    else:
        decay = torch.exp(-power * F.softplus(u @ w_forget.T))
    B = torch.sigmoid(gate)[..., None] * w_value
    return LinearSystem(decay, B, torch.diag_embed(torch.sigmoid(u @ w_output.T)))


def from_rglru(
    u: torch.Tensor,
    w_recurrence: torch.Tensor,
    w_input: torch.Tensor,
    logit_a: torch.Tensor,
    *,
    power: float = 8.0,
) -> LinearSystem:
    """The RG-LRU of Griffin: h_i = a_i h_{i-1} + sqrt(1 - a_i^2) * sigmoid(w_input u_i) * u_i, y_i = h_i.

    Here a_i = a^(power r_i) with a = sigmoid(logit_a) and r_i = sigmoid(w_recurrence u_i).

    Args:
        u: (batch, L, d).
        w_recurrence: (d, d).
        w_input: (d, d).
        logit_a: (d,), the logit of a.
        power: the constant c of the paper that introduced it.
    """
    log_decay = power * torch.sigmoid(u @ w_recurrence.T) * F.logsigmoid(logit_a)
    scale = torch.sqrt(-torch.expm1(2 * log_decay))  # sqrt(1 - a^2) without cancellation
    B = torch.diag_embed(scale * torch.sigmoid(u @ w_input.T))
    return LinearSystem(log_decay.exp(), B, torch.diag_embed(torch.ones_like(u)))
