"""Entropy, information and couplings of discrete laws, per-token statistics, and spectral entropy of point sets."""

from lib.information.activation import activation_entropy, entropy_functional_gradient
from lib.information.attention import attention_entropy, causal_entropy_bound
from lib.information.binning import binned_mi, compression_score, ebab_edges, ebab_mi, fixed_edges
from lib.information.cauchy_schwarz import conditional_cs, cs_divergence, cs_qmi, gaussian_gram, hsic
from lib.information.coupling import (
    binary_entropy_bits,
    cell_masses,
    ebim,
    ebim_curve,
    entropy_bits,
    majorisation_meet,
    mec_bottleneck,
    minimum_entropy_coupling,
    mutual_information_bits,
    set_partitions,
)
from lib.information.diffusion import (
    diffusion_operator,
    dse,
    dsmi,
    shannon_binned,
    sigma_rule,
    spectrum,
    t_rule,
)
from lib.information.lossy import AutoencoderCompressor, PCACompressor, lossy_mi, mine
from lib.information.mixture import akde_mi, gaussian_logsumexp, mixture_entropy_bounds
from lib.information.nearest_neighbours import kde_entropy, kl_entropy, kl_weights, mutual_information
from lib.information.tokens import (
    PerplexityTest,
    SourceTest,
    TokenStats,
    entropy_from_logits,
    perplexity_test,
    source_test,
    token_stats,
)
from lib.information.universality import kl_ball_log_weight, universality_bound

__all__ = [
    "AutoencoderCompressor",
    "PCACompressor",
    "PerplexityTest",
    "SourceTest",
    "TokenStats",
    "activation_entropy",
    "akde_mi",
    "attention_entropy",
    "binary_entropy_bits",
    "binned_mi",
    "causal_entropy_bound",
    "cell_masses",
    "compression_score",
    "conditional_cs",
    "cs_divergence",
    "cs_qmi",
    "diffusion_operator",
    "dse",
    "dsmi",
    "ebab_edges",
    "ebab_mi",
    "ebim",
    "ebim_curve",
    "entropy_bits",
    "entropy_from_logits",
    "entropy_functional_gradient",
    "fixed_edges",
    "gaussian_gram",
    "gaussian_logsumexp",
    "hsic",
    "kde_entropy",
    "kl_ball_log_weight",
    "kl_entropy",
    "kl_weights",
    "lossy_mi",
    "majorisation_meet",
    "mec_bottleneck",
    "mine",
    "minimum_entropy_coupling",
    "mixture_entropy_bounds",
    "mutual_information",
    "mutual_information_bits",
    "perplexity_test",
    "set_partitions",
    "shannon_binned",
    "sigma_rule",
    "source_test",
    "spectrum",
    "t_rule",
    "token_stats",
    "universality_bound",
]
