"""The kinds of attention that `lib.models.GPT` takes by name.

Each is a module that replaces softmax attention between the projections to queries, keys and values and the projection
back: see `lib.models.gpt.SoftmaxAttention`, which they extend.
"""

import torch
import torch.nn.functional as F
from torch import nn

from lib.attention.entropy import entropy_attention
from lib.attention.lightning import lightning_attention, transnormer_decay
from lib.attention.linear import linear_attention
from lib.attention.positions import alibi_slopes, distance_bias
from lib.attention.selective import Temperature
from lib.attention.softmax_free import gaussian_kernel_attention
from lib.attention.softplus import softplus_attention
from lib.models.gpt import SoftmaxAttention
from lib.models.transnormer import srms_norm


class Selective(SoftmaxAttention):
    """Temperatures of queries and values, made of the projections themselves (`lib.attention.Temperature`)."""

    def __init__(self, *, dim: int, num_heads: int, context: int, layer: int, depth: int):
        super().__init__()
        self.query = Temperature(dim // num_heads, num_heads)
        self.value = Temperature(dim // num_heads, num_heads, mode="token")

    def prepare(self, q, k, v, hidden, start):
        visible = torch.arange(start + 1, start + q.shape[-2] + 1, device=q.device)
        return q * self.query(q, visible), k, v * self.value(v)


class Linear(SoftmaxAttention):
    """Linear attention with the features elu + 1, divided by its row sums."""

    def forward(self, q, k, v):
        return linear_attention(q, k, v, causal=True)


class Gaussian(SoftmaxAttention):
    """A Gaussian kernel of the distance, with one projection for queries and keys as in SOFT.

    Its rows do not sum to one. Each is divided by the number of tokens that it sees, or early and late rows would differ in
    scale.
    """

    def prepare(self, q, k, v, hidden, start):
        return q, q, v

    def forward(self, q, k, v):
        new, total = q.shape[-2], k.shape[-2]
        visible = torch.arange(total - new + 1, total + 1, device=q.device, dtype=q.dtype)
        return gaussian_kernel_attention(q, k, v, causal=True) / visible[:, None]


class SoftplusAttention(SoftmaxAttention):
    """`lib.attention.softplus_attention`: LSSA, and LSSAR with a power `p`, which may be changed after training."""

    def __init__(self, p: float | None = None):
        super().__init__()
        self.p = p

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return softplus_attention(q, k, v, causal=True, p=self.p)


class Entropy(SoftmaxAttention):
    """Logits divided by a learnable temperature per head and position (`lib.attention.entropy_attention`).

    `temperature` is (heads, context); positions beyond the context use the last one, and values below 1e-3 count as 1e-3.
    After a forward pass `entropy` holds that of every row, (batch, heads, seq), with its gradient: it is what
    `lib.losses.entropy_regulariser` takes. Copies and saved models do not keep it.

    Args:
        start: of all temperatures.
        learn: without, the temperature stays 1 and only the entropy is added to plain attention.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        context: int,
        layer: int,
        depth: int,
        start: float = 1.0,
        learn: bool = True,
    ):
        super().__init__()
        self.temperature = nn.Parameter(torch.full((num_heads, context), float(start))) if learn else None
        self.entropy = None

    def forward(self, q, k, v):
        temperature = None
        if self.temperature is not None:
            new, total = q.shape[-2], k.shape[-2]
            position = torch.arange(total - new, total, device=q.device)
            held = self.temperature[:, position.clamp_max(self.temperature.shape[1] - 1)]
            temperature = held.clamp_min(1e-3)
        out, self.entropy = entropy_attention(q, k, v, temperature, causal=True)
        return out

    def __getstate__(self):
        # a tensor inside a graph cannot be copied
        return self.__dict__ | {"entropy": None}


class DistanceBias(SoftmaxAttention):
    """Scores that fall with the distance of a pair, each head by its own slope (`lib.attention.distance_bias`)."""

    def __init__(self, bias: str, num_heads: int):
        super().__init__()
        self.bias = bias
        self.register_buffer("slopes", alibi_slopes(num_heads), persistent=False)

    def forward(self, q, k, v):
        added = distance_bias(q.shape[-2], k.shape[-2], self.slopes.to(q.dtype), bias=self.bias, causal=True)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=added)


class Lightning(SoftmaxAttention):
    """Linear attention with a decay for each head and layer, normalised over all heads (`lib.attention.lightning_attention`)."""

    def __init__(self, *, dim: int, num_heads: int, context: int, layer: int, depth: int):
        super().__init__()
        self.register_buffer("decay", transnormer_decay(num_heads, depth)[layer])

    def prepare(self, q, k, v, hidden, start):
        return F.silu(q), F.silu(k), v

    def forward(self, q, k, v):
        mixed = lightning_attention(q, k, v, self.decay).transpose(1, 2)  # (batch, seq, heads, head_dim)
        return srms_norm(mixed.flatten(2)).view(mixed.shape).transpose(1, 2)


KINDS = {
    "softmax": lambda **shape: SoftmaxAttention(),
    "alibi": lambda num_heads, **shape: DistanceBias("linear", num_heads),
    "harmonic": lambda num_heads, **shape: DistanceBias("harmonic", num_heads),
    "selective": Selective,
    "entropy": Entropy,
    "lssa": lambda **shape: SoftplusAttention(),
    "lssar": lambda **shape: SoftplusAttention(p=15),
    "linear": lambda **shape: Linear(),
    "lightning": Lightning,
    "gaussian": lambda **shape: Gaussian(),
}
