"""Selective self-attention: every token has its own temperature, as a query and as a source (Zhang et al., 2024)."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from lib.attention.causal import causal_mask


def selective_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tau_q: torch.Tensor | None = None,
    tau_k: torch.Tensor | None = None,
    tau_v: torch.Tensor | None = None,
    *,
    causal: bool = False,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    return_weights: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention whose queries, keys and values are each multiplied by a number of their token.

    A temperature here is an *inverse* temperature: it multiplies. That of a query makes its row of weights sharper (above 1) or
    flatter; that of a value turns a source token up or down after the softmax, which a query cannot undo. Since only
    the arguments change, any fused attention computes it.

    Source: arXiv 2411.12892, Selective Self-Attention layer.

    Args:
        q: queries, (..., L, dim).
        k: keys, (..., S, dim).
        v: values, (..., S, dim_v).
        tau_q: of the queries, broadcasting with (..., L, 1).
        tau_k: of the keys, broadcasting with (..., S, 1).
        tau_v: of the values, broadcasting with (..., S, 1).
        causal: whether a query sees only keys up to its own place; fewer queries than keys are the last ones.
        mask: boolean, broadcasting with (..., L, S), True where a pair may attend.
        scale: of the products, 1 / sqrt(dim) by default.
        return_weights: whether to return the weights as well; they are what multiplies the *scaled* values.

    Returns:
        The output, (..., L, dim_v), and on request the weights, (..., L, S). A row that may attend to nothing is 0.

    Raises:
        ValueError: a temperature whose last dimension is not 1, or more queries than keys with `causal=True`.
    """
    for name, tau in {"tau_q": tau_q, "tau_k": tau_k, "tau_v": tau_v}.items():
        if tau is not None and tau.shape[-1] != 1:
            raise ValueError(f"{name} must be one number a token, (..., length, 1), got {tuple(tau.shape)}")
    q = q if tau_q is None else q * tau_q
    k = k if tau_k is None else k * tau_k
    v = v if tau_v is None else v * tau_v
    visible = mask
    if causal:
        visible = causal_mask(q.shape[-2], k.shape[-2], q.device)
        visible = visible if mask is None else visible & mask
    if not return_weights:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)
    scores = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    weights = scores.softmax(-1)
    if visible is not None:
        weights = weights.masked_fill(~visible, 0)  # a row without any visible key
    return weights @ v, weights


class Temperature(nn.Module):
    """One inverse temperature for each token and head, from what the token is and from how much it sees.

    The token part is `tanh(f(x))`, with f(x) = w . GELU(W x); the position part is `1 + sigmoid(alpha) * log n`, where n
    counts the tokens that are visible at that position. Their sum is 1 at the start but for sigmoid(alpha) log n, so a trained
    model may be given temperatures: w starts at 0.

    With `width=None` W is shared with the attention: the features handed in are the token's projections and already W x.
    This leaves `dim` new weights, and one number alpha a head.

    Source: arXiv 2411.12892, token-aware and position-aware temperature scaling; the form of f is a reconstruction.

    Args:
        dim: of the features: of the tokens, or of one head's projections with `width=None`.
        num_heads: each has temperatures of its own.
        mode: "token", "position" or "both". Without the position part the sum is 1 + tanh(f(x)).
        width: of the hidden layer of f; None to share it.
        alpha: the start of alpha; sigmoid(-7.4) = 6e-4 is where the released code starts.

    Raises:
        ValueError: an unknown mode, or a size below 1.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        mode: str = "both",
        width: int | None = None,
        alpha: float = -7.4,
    ):
        super().__init__()
        if mode not in ("token", "position", "both"):
            raise ValueError(f"mode must be token, position or both, got {mode!r}")
        if min(dim, num_heads, 1 if width is None else width) < 1:
            raise ValueError(f"sizes must be at least 1, got dim {dim}, num_heads {num_heads}, width {width}")
        self.dim, self.num_heads, self.shared = dim, num_heads, width is None
        if mode != "position":
            if width is not None:
                self.hidden = nn.Linear(dim, width)
            self.weight = nn.Parameter(torch.zeros(num_heads, dim if width is None else width))
        if mode != "token":
            self.alpha = nn.Parameter(torch.full((num_heads,), alpha))

    def forward(self, features: torch.Tensor, visible: torch.Tensor | None = None) -> torch.Tensor:
        """The temperatures, (batch, num_heads, length, 1).

        Args:
            features: (batch, length, dim), or (batch, num_heads, length, dim) with `width=None`.
            visible: how many tokens each position sees, broadcasting with (batch, length); by default 1, 2, 3, …

        Raises:
            ValueError: features of another shape.
        """
        expected = (
            ("batch", self.num_heads, "length", self.dim) if self.shared else ("batch", "length", self.dim)
        )
        if features.ndim != len(expected) or any(
            isinstance(wanted, int) and wanted != size
            for wanted, size in zip(expected, features.shape, strict=True)
        ):
            raise ValueError(
                f"features must be ({', '.join(map(str, expected))}), got {tuple(features.shape)}"
            )
        tau = torch.ones((), device=features.device, dtype=features.dtype)
        if hasattr(self, "weight"):
            inner = F.gelu(features if self.shared else self.hidden(features)[:, None])
            tau = tau + torch.tanh((inner * self.weight[:, None]).sum(-1))
        if hasattr(self, "alpha"):
            if visible is None:
                visible = torch.arange(1, features.shape[-2] + 1, device=features.device)
            log_n = visible.to(features.dtype).log()
            log_n = log_n[:, None] if log_n.ndim == 2 else log_n  # (batch, 1, length)
            tau = tau + torch.sigmoid(self.alpha)[:, None] * log_n
        shape = (len(features), self.num_heads, features.shape[-2])
        return tau.expand(shape)[..., None]


class SelectiveAttention(nn.Module):
    """Multi-head self-attention with temperatures of queries, keys and values, each on the projection that it scales.

    `lib.models.GPT` has it by the name "selective", with temperatures of queries and values.

    Args:
        dim: of the tokens.
        num_heads: divides `dim`.
        temperatures: which of the three have one, a string of the letters q, k and v.
        causal: whether a token sees only itself and what came before.
        width: of the temperatures' hidden layer, or None to share the projections.

    Raises:
        ValueError: `dim` not a multiple of `num_heads`, or other letters.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        temperatures: str = "qv",
        causal: bool = True,
        width: int | None = None,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
        if set(temperatures) - set("qkv"):
            raise ValueError(f"temperatures takes the letters q, k and v, got {temperatures!r}")
        self.num_heads, self.causal = num_heads, causal
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        size = dim // num_heads if width is None else dim
        self.temperatures = nn.ModuleDict(
            # what a source is worth does not depend on how many tokens it has before it
            {name: Temperature(size, num_heads, mode="both" if name == "q" else "token", width=width)
             for name in temperatures}
        )  # fmt: skip

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """(batch, length, dim) to (batch, length, dim); `mask` is boolean, broadcasting with (batch, heads, length, length)."""
        batch, length, dim = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        visible = (
            torch.arange(1, length + 1, device=x.device) if self.causal else x.new_full((length,), length)
        )
        taus = {
            f"tau_{name}": tau({"q": q, "k": k, "v": v}[name] if tau.shared else x, visible)
            for name, tau in self.temperatures.items()
        }
        mixed = selective_attention(q, k, v, **taus, causal=self.causal, mask=mask)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, dim))


def spikiness(weights: torch.Tensor) -> torch.Tensor:
    """How spread the rows of attention weights are: |s|_1 / (L |s|_2^2), 1 for an even row and 1 / L for a single one.

    Args:
        weights: (..., L), non-negative rows that sum to 1.

    Returns:
        (...), in [1 / L, 1]; lower is spikier.

    Raises:
        ValueError: a negative weight, or a row of zeros.
    """
    if (weights < 0).any() or (weights.sum(-1) == 0).any():
        raise ValueError("weights must be non-negative, with a positive sum in each row")
    return weights.sum(-1) / (weights.shape[-1] * weights.square().sum(-1))
