"""Attention: how hidden vectors read each other.

Tensors are (batch, heads, length, dim), or have any other leading dimensions that broadcast. A `mask` is boolean, True
where a pair may attend, as in `torch.nn.functional.scaled_dot_product_attention`. With `causal=True` and fewer queries than
keys, the queries are the last ones, as in decoding with a cache. Weights are returned on request only, by
`return_weights=True`.
"""

from lib.attention.hopfield import (
    Hopfield,
    HopfieldLayer,
    HopfieldPooling,
    fixed_point_kind,
    hopfield_capacity,
    hopfield_energy,
    hopfield_retrieve,
)
from lib.attention.online import online_softmax_update
from lib.attention.rope import rope
from lib.attention.selective import SelectiveAttention, Temperature, selective_attention, spikiness

__all__ = [
    "Hopfield",
    "HopfieldLayer",
    "HopfieldPooling",
    "SelectiveAttention",
    "Temperature",
    "fixed_point_kind",
    "hopfield_capacity",
    "hopfield_energy",
    "hopfield_retrieve",
    "online_softmax_update",
    "rope",
    "selective_attention",
    "spikiness",
]
