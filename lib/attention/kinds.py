"""The kinds of attention that `lib.models.GPT` takes by name.

Each is a module that replaces softmax attention between the projections to queries, keys and values and the projection
back: see `lib.models.gpt.SoftmaxAttention`, which they extend.
"""

from lib.models.gpt import SoftmaxAttention


def softmax(*, dim: int, num_heads: int, context: int, layer: int, depth: int) -> SoftmaxAttention:
    return SoftmaxAttention()


KINDS = {
    "softmax": softmax,
}
