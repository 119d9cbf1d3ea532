"""TransNormerLLM: a language model on linear attention with decay, gates instead of activations, norms without weights."""

import torch
import torch.nn.functional as F
from torch import nn

from lib.attention.lightning import lightning_attention, lrpe, transnormer_decay

PHASES = ("first", "all", "none")


def srms_norm(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """SRMSNorm, x / (norm(x) / sqrt(dim)): `torch.nn.functional.rms_norm` over the last dimension, without a weight.

    `eps` is added to the mean square, so that a row of zeros stays zero.
    """
    return F.rms_norm(x, x.shape[-1:], eps=eps)


class SGLU(nn.Module):
    """A gated linear unit without activation, (x W_v * x W_u) W_o: a product of two linear maps is all that bends.

    Args:
        dim: of inputs and outputs.
        hidden: of the product; 2 * dim by default.
    """

    def __init__(self, dim: int, hidden: int | None = None):
        super().__init__()
        hidden = 2 * dim if hidden is None else hidden
        self.vu = nn.Linear(dim, 2 * hidden, bias=False)
        self.out = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        v, u = self.vu(x).chunk(2, -1)
        return self.out(v * u)


class GLA(nn.Module):
    """Gated linear attention: SRMSNorm(attention(swish(x W_q), swish(x W_k), x W_v)) * x W_u, then W_o.

    The norm takes the heads together, after the sum: there is no denominator.

    Args:
        dim: of inputs and outputs.
        num_heads: divides `dim`.
        decay: (num_heads,), see `lib.attention.transnormer_decay`.
        phase: whether queries and keys get `lib.attention.lrpe` with learned angles.
        gate: False leaves W_u out, for comparison.

    Raises:
        ValueError: `dim` is not a multiple of `num_heads`, or the decays are not one a head.
    """

    def __init__(
        self, dim: int, num_heads: int, decay: torch.Tensor, *, phase: bool = False, gate: bool = True
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
        if decay.shape != (num_heads,):
            raise ValueError(f"decay must be ({num_heads},), one a head, got {tuple(decay.shape)}")
        self.num_heads, self.head_dim, self.gate = num_heads, dim // num_heads, gate
        self.register_buffer("decay", decay)
        self.qkvu = nn.Linear(dim, (4 if gate else 3) * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.theta = None
        if (
            phase
        ):  # the start of the released code: wavelengths from 2 pi to nearly 2 pi 10000 over all coordinates
            self.theta = nn.Parameter(10000.0 ** (-2 * torch.arange(dim).view(num_heads, -1) / dim))

    def start(self, batch: int) -> torch.Tensor:
        """The state before the first token: (batch, heads, key dim, head dim), zero, float32 or wider."""
        keys = self.head_dim * (1 if self.theta is None else 2)
        dtype = torch.promote_types(self.out.weight.dtype, torch.float32)
        return self.out.weight.new_zeros(batch, self.num_heads, keys, self.head_dim, dtype=dtype)

    def forward(
        self, x: torch.Tensor, state: torch.Tensor | None = None, position: torch.Tensor | int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What is added at tokens (batch, seq, dim) that follow those of `state`, and the state after them.

        Args:
            x: (batch, seq, dim), normalised.
            state: of the tokens before; None for none.
            position: of the first token, one number or (batch,).
        """
        parts = self.qkvu(x).chunk(4 if self.gate else 3, -1)
        q, k, v = (part.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for part in parts[:3])
        q, k = F.silu(q), F.silu(k)
        if self.theta is not None:
            start = torch.as_tensor(position, device=x.device).view(-1, 1, 1)
            positions = start + torch.arange(x.shape[1], device=x.device)  # (batch or 1, 1, seq)
            q, k = lrpe(q, self.theta, positions), lrpe(k, self.theta, positions)
        mixed, state = lightning_attention(q, k, v, self.decay, state=state, return_state=True)
        mixed = srms_norm(mixed.transpose(1, 2).flatten(2))
        return self.out(mixed * parts[3] if self.gate else mixed), state


class TransNormer(nn.Module):
    """A causal language model whose memory of the past is a matrix a head, whatever the length.

    Each block adds GLA(SRMSNorm(x)), then SGLU(SRMSNorm(x)).

    Args:
        vocab_size: the number of tokens.
        dim: the width of the residual stream.
        depth: the number of blocks.
        num_heads: of each attention.
        decay: `"exp"` or `"alibi"` (`lib.attention.transnormer_decay`), a tensor (depth, num_heads), or None for no decay.
        phase: the blocks with learned phases: `"first"` (the paper), `"all"` or `"none"`.
        gate: False leaves the attention's gate out, for comparison.
        hidden: of each SGLU; 2 * dim by default.

    Raises:
        ValueError: a size below 1, `dim` not a multiple of `num_heads`, or an unknown name of an option.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        dim: int = 64,
        depth: int = 2,
        num_heads: int = 4,
        decay: str | torch.Tensor | None = "exp",
        phase: str = "first",
        gate: bool = True,
        hidden: int | None = None,
    ):
        super().__init__()
        if min(vocab_size, dim, depth, num_heads) < 1:
            raise ValueError(f"sizes must be at least 1, got {(vocab_size, dim, depth, num_heads)}")
        if phase not in PHASES:
            raise ValueError(f"phase must be one of {PHASES}, got {phase!r}")
        if decay is None:
            decay = torch.ones(depth, num_heads)
        elif isinstance(decay, str):
            decay = transnormer_decay(num_heads, depth, decay)
        if len(decay) != depth:
            raise ValueError(f"decay must be ({depth}, {num_heads}), got {tuple(decay.shape)}")
        self.embedding = nn.Embedding(vocab_size, dim)
        self.attentions, self.mixers = nn.ModuleList(), nn.ModuleList()
        for layer in range(depth):
            phased = phase == "all" or (phase == "first" and layer == 0)
            self.attentions.append(GLA(dim, num_heads, decay[layer].clone(), phase=phased, gate=gate))
            self.mixers.append(SGLU(dim, hidden))
        self.head = nn.Linear(dim, vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2 and not name.endswith("theta"):
                # what writes to the residual stream starts smaller, so that its variance does not grow with depth
                writes = name.endswith("out.weight")
                nn.init.normal_(parameter, std=0.02 / (2 * depth) ** 0.5 if writes else 0.02)

    def start(self, batch: int) -> tuple[torch.Tensor, ...]:
        """The state before the first token: one matrix a head for each block, and the position (batch,)."""
        position = torch.zeros(batch, dtype=torch.int64, device=self.head.weight.device)
        return (*(attention.start(batch) for attention in self.attentions), position)

    def _run(self, tokens, state):
        if tokens.ndim != 2 or tokens.shape[1] < 1:
            raise ValueError(f"tokens must be (batch, seq >= 1), got {tuple(tokens.shape)}")
        hidden, new = self.embedding(tokens), []
        for layer, (attention, mixer) in enumerate(zip(self.attentions, self.mixers, strict=True)):
            before, position = (None, 0) if state is None else (state[layer], state[-1])
            mixed, after = attention(srms_norm(hidden), before, position)
            new.append(after)
            hidden = hidden + mixed
            hidden = hidden + mixer(srms_norm(hidden))
        return self.head(srms_norm(hidden)), new

    def forward(
        self, tokens: torch.Tensor, targets: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Next-token logits of (batch, seq); with `targets` (batch, seq) also the loss in nats a token (-100 is ignored)."""
        logits, _ = self._run(tokens, None)
        if targets is None:
            return logits
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def extend(self, tokens: torch.Tensor, state: tuple) -> tuple[torch.Tensor, tuple]:
        """Logits (batch, new, vocab_size) of tokens (batch, new) that follow those of `state`, and the new state."""
        logits, new = self._run(tokens, state)
        return logits, (*new, state[-1] + tokens.shape[1])

    def step(self, tokens: torch.Tensor, state: tuple) -> tuple[torch.Tensor, tuple]:
        """A step function of `lib.models.decode`: one token a row, (batch,), to logits (batch, vocab_size) and the new state."""
        logits, state = self.extend(tokens[:, None], state)
        return logits[:, 0], state
