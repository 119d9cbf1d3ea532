"""The kinds of attention that `lib.models.GPT` takes by name.

Each is a module that replaces softmax attention between the projections to queries, keys and values and the projection
back: see `lib.models.gpt.SoftmaxAttention`, which they extend.
"""

import torch

from lib.attention.selective import Temperature
from lib.models.gpt import SoftmaxAttention


def softmax(*, dim: int, num_heads: int, context: int, layer: int, depth: int) -> SoftmaxAttention:
    return SoftmaxAttention()


class Selective(SoftmaxAttention):
    """Temperatures of queries and values, made of the projections themselves (`lib.attention.Temperature`)."""

    def __init__(self, *, dim: int, num_heads: int, context: int, layer: int, depth: int):
        super().__init__()
        self.query = Temperature(dim // num_heads, num_heads)
        self.value = Temperature(dim // num_heads, num_heads, mode="token")

    def prepare(self, q, k, v, hidden, start):
        visible = torch.arange(start + 1, start + q.shape[-2] + 1, device=q.device)
        return q * self.query(q, visible), k, v * self.value(v)


KINDS = {
    "softmax": softmax,
    "selective": Selective,
}
