"""Attention: how hidden vectors read each other.

Tensors are (batch, heads, length, dim), or have any other leading dimensions that broadcast. A `mask` is boolean, True
where a pair may attend, as in `torch.nn.functional.scaled_dot_product_attention`. With `causal=True` and fewer queries than
keys, the queries are the last ones, as in decoding with a cache. Weights are returned on request only, by
`return_weights=True`.
"""

from lib.attention.dsf import (
    LinearSystem,
    from_linear_attention,
    from_normalized_attention,
    from_qlstm,
    from_rglru,
    from_s6,
    from_ssd,
)
from lib.attention.entropy import entropy_attention
from lib.attention.hopfield import (
    Hopfield,
    HopfieldLayer,
    HopfieldPooling,
    fixed_point_kind,
    hopfield_capacity,
    hopfield_energy,
    hopfield_retrieve,
)
from lib.attention.lightning import lightning_attention, lightning_step, lrpe, transnormer_decay
from lib.attention.linear import (
    diagonal_scan,
    feature_map,
    linear_attention,
    linear_softmax_attention,
    taylor_features,
)
from lib.attention.online import online_softmax_update
from lib.attention.positions import alibi_slopes, distance_bias, harmonic_numbers, rope_alibi
from lib.attention.pr_flash import draw_blocks, keep_probabilities, pr_flash_attention
from lib.attention.retention import (
    column_scores,
    column_scores_streaming,
    context_contribution,
    encoder_flops,
    encoder_speedup,
    keep_top,
    retention_profile,
    solve_retention,
)
from lib.attention.rope import RoPE2D, rope
from lib.attention.selective import SelectiveAttention, Temperature, selective_attention, spikiness
from lib.attention.softmax_free import (
    SOFTAttention,
    gaussian_kernel,
    gaussian_kernel_attention,
    newton_pinv,
    softmax_free_attention,
)
from lib.attention.softplus import normalised_positive_attention, softplus_attention

__all__ = [
    "Hopfield",
    "HopfieldLayer",
    "HopfieldPooling",
    "SOFTAttention",
    "SelectiveAttention",
    "LinearSystem",
    "RoPE2D",
    "Temperature",
    "alibi_slopes",
    "column_scores",
    "column_scores_streaming",
    "context_contribution",
    "diagonal_scan",
    "distance_bias",
    "draw_blocks",
    "encoder_flops",
    "encoder_speedup",
    "entropy_attention",
    "feature_map",
    "fixed_point_kind",
    "from_linear_attention",
    "from_normalized_attention",
    "from_qlstm",
    "from_rglru",
    "from_s6",
    "from_ssd",
    "gaussian_kernel",
    "gaussian_kernel_attention",
    "harmonic_numbers",
    "hopfield_capacity",
    "hopfield_energy",
    "hopfield_retrieve",
    "keep_probabilities",
    "keep_top",
    "lightning_attention",
    "lightning_step",
    "linear_attention",
    "linear_softmax_attention",
    "lrpe",
    "newton_pinv",
    "normalised_positive_attention",
    "online_softmax_update",
    "pr_flash_attention",
    "retention_profile",
    "rope",
    "rope_alibi",
    "selective_attention",
    "softmax_free_attention",
    "softplus_attention",
    "solve_retention",
    "spikiness",
    "taylor_features",
    "transnormer_decay",
]
