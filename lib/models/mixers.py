"""One-layer sequence models that differ in nothing but how they mix the sequence."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from lib.attention.dsf import NORMALIZERS
from lib.attention.linear import diagonal_scan, linear_attention

MIXERS = (
    "softmax", "linear", "normalized", "s6", "ssd", "qlstm", "qlstm_reversed", "qlstm_coupled", "rglru",
)  # fmt: skip
GATED = ("qlstm", "qlstm_reversed", "qlstm_coupled", "rglru")


class SequenceMixer(nn.Module):
    """A causal sequence mixer, (batch, L, dim) to (batch, L, dim); all kinds of `MIXERS` in one frame.

    Softmax and linear attention have one head with keys of dimension `expansion`. Linear, normalised, S6 and SSD carry a state of
    dim * expansion numbers. The gated networks have no expansion of their own (n = 1); they get as many channels as make
    their state of the same size. Softmax attention has no state of fixed size: it keeps all keys and values.

    Args:
        kind: one of `MIXERS`.
        dim: of inputs and outputs.
        expansion: the paper's n; the state has dim * n numbers.
        feature: of linear and normalised attention, see `lib.attention.feature_map`.
        normalizer: of normalised attention, see `lib.attention.from_normalized_attention`.

    Raises:
        ValueError: an unknown kind or normalizer.
    """

    def __init__(
        self, kind: str, dim: int, expansion: int, *, feature: str = "elu1", normalizer: str = "exp"
    ):
        super().__init__()
        if kind not in MIXERS:
            raise ValueError(f"kind must be one of {MIXERS}, got {kind!r}")
        if normalizer not in NORMALIZERS:
            raise ValueError(f"normalizer must be one of {tuple(NORMALIZERS)}, got {normalizer!r}")
        self.kind, self.dim, self.expansion = kind, dim, expansion
        self.feature, self.normalizer = feature, normalizer
        channels = dim * expansion
        sizes = {
            "softmax": (expansion, expansion, dim),  # q, k, v
            "linear": (expansion, expansion, dim),
            "normalized": (expansion, expansion, dim, 1),  # … and eta
            "s6": (expansion, expansion, dim, dim),  # c, b, value, Delta
            "ssd": (expansion, expansion, dim, 1),
            "qlstm": (channels,) * 4,  # output gate, input gate, value, forget gate
            "qlstm_reversed": (channels,) * 4,
            "qlstm_coupled": (channels,) * 3,  # the forget gate is one minus the input gate
            "rglru": (channels,) * 3,  # input gate, value, recurrence gate
        }[kind]
        self.sizes = sizes
        gated = kind in GATED
        self.project = nn.Linear(dim, sum(sizes))
        self.out = nn.Linear(channels if gated else dim, dim, bias=False)
        if kind in ("s6", "ssd"):
            heads = dim if kind == "s6" else 1
            self.log_a = nn.Parameter(
                torch.log(torch.arange(1.0, expansion + 1)).repeat(heads, 1)[
                    :, : expansion if kind == "s6" else 1
                ]
            )
            # steps between 0.1 and 0.001, the range in which Mamba starts; a single head starts at 0.1
            steps = torch.exp(torch.linspace(math.log(1e-1), math.log(1e-3), sizes[3]))
            with torch.no_grad():
                self.project.bias[-sizes[3] :] = torch.log(torch.expm1(steps))
        if kind == "qlstm_reversed":
            self.power = nn.Parameter(torch.tensor(1.0))
        if kind == "rglru":  # decays between 0.9 and 0.999 at full recurrence gate
            self.logit_a = nn.Parameter(torch.logit(torch.linspace(0.9, 0.999, channels) ** (1 / 8)))

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        """(batch, L, dim) to (batch, L, dim)."""
        parts = self.project(u).split(self.sizes, -1)
        if self.kind == "softmax":
            mixed = F.scaled_dot_product_attention(*parts, is_causal=True)
        elif self.kind == "linear":
            mixed = linear_attention(*parts, causal=True, feature=self.feature)
        elif self.kind == "normalized":
            eta = NORMALIZERS[self.normalizer](parts[3][..., 0])
            mixed = linear_attention(*parts[:3], causal=True, feature=self.feature, eta=eta)
        elif self.kind in ("s6", "ssd"):
            mixed = self._state_space(*parts)
        else:
            mixed = self._gated(*parts)
        return self.out(mixed)

    def _state_space(self, c, b, value, raw):
        delta = F.softplus(raw)  # (batch, L, dim), or (batch, L, 1) for SSD
        if self.kind == "ssd":  # scalar decays: the matrix of all products is cheap and stable in logarithms
            total = (-delta[..., 0] * self.log_a.exp()[0, 0]).cumsum(1)
            gaps = (total[:, :, None] - total[:, None, :]).tril()
            return ((c @ (delta * b).transpose(1, 2)) * gaps.exp()).tril() @ value
        decay = torch.exp(-delta[..., None] * self.log_a.exp())  # (batch, L, dim, n)
        states = diagonal_scan(decay, (delta * value)[..., None] * b[:, :, None, :])
        return torch.einsum("bldn,bln->bld", states, c)

    def _gated(self, first, second, third, *rest):
        if self.kind == "rglru":
            log_decay = 8 * torch.sigmoid(third) * F.logsigmoid(self.logit_a)
            scale = torch.sqrt(-torch.expm1(2 * log_decay))
            return diagonal_scan(log_decay.exp(), scale * torch.sigmoid(first) * second)
        if self.kind == "qlstm":
            forget = torch.sigmoid(rest[0])
        elif self.kind == "qlstm_coupled":
            forget = torch.sigmoid(-second)
        else:  # exp(-power * softplus(z)) = sigmoid(-z) ** power, as S6 with one A for all channels
            forget = torch.exp(-torch.relu(self.power) * F.softplus(rest[0]))
        return torch.sigmoid(first) * diagonal_scan(forget, torch.sigmoid(second) * third)


class MixerLM(nn.Module):
    """Embedding, short causal convolution, one `SequenceMixer` with a residual, normalisation, classifier.

    The convolution of width two lets a token see its predecessor. Without it no single mixing layer can bind a value to the key
    before it, and every model fails at recall.

    Args:
        vocabulary: tokens.
        kind: of the mixer, one of `MIXERS`.
        dim: of the hidden vectors.
        expansion: the state expansion n.
        convolution: False leaves the short convolution out.
        feature: see `SequenceMixer`.
        normalizer: see `SequenceMixer`.
    """

    def __init__(self, vocabulary: int, kind: str, dim: int, expansion: int, *, convolution: bool = True,
                 feature: str = "elu1", normalizer: str = "exp"):  # fmt: skip
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim)
        self.convolution = nn.Parameter(torch.randn(2, dim) / math.sqrt(2)) if convolution else None
        self.mixer = SequenceMixer(kind, dim, expansion, feature=feature, normalizer=normalizer)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits (batch, L, vocabulary) of tokens (batch, L)."""
        return self.head(self.features(tokens))

    def features(self, tokens: torch.Tensor) -> torch.Tensor:
        """What `head` reads, (batch, L, dim): logits at a few positions cost less this way."""
        x = self.embedding(tokens)
        if self.convolution is not None:
            before = F.pad(x[:, :-1], (0, 0, 1, 0))
            x = self.convolution[0] * x + self.convolution[1] * before
        return self.norm(x + self.mixer(x))
