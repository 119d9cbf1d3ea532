"""Losses, in the manner of `torch.nn.functional`."""

from lib.losses.bias import BiasLoss, bias_loss, focal
from lib.losses.bottleneck import cs_ib
from lib.losses.comp_sum import (
    comp_sum,
    generalized_cross_entropy,
    mean_absolute_error,
    smooth_adversarial_comp_sum,
)
from lib.losses.entropy import entropy_regulariser
from lib.losses.h_consistency import (
    conditional_minimum,
    minimizability_gap,
    regret_bound,
    regret_bound_simple,
    regret_transformation,
)
from lib.losses.linear import (
    CutCrossEntropyStats,
    indexed_neg_dot,
    linear_comp_sum,
    linear_cross_entropy,
    linear_ldr_kl,
)
from lib.losses.metric import (
    constellation,
    pairwise_contrastive,
    prototypical,
    triplet_batch_all,
    triplet_batch_hard,
)
from lib.losses.robust_labels import (
    ALDRKL,
    crammer_singer,
    jensen_shannon,
    ldr_kl,
    nce_agce,
    nce_rce,
    symmetric_cross_entropy,
    weston_watkins,
)
from lib.losses.segmentation import confident_bce, dice_loss, translation_consistency
from lib.losses.sequence import eisl, ngram_match_map
from lib.losses.spherical import normalized_softmax
from lib.losses.svm import l1_svm, l2_svm
from lib.losses.thought import thought_loss
from lib.losses.value import C51Projection, HLGauss, TwoHot
from lib.losses.z_loss import spherical_softmax_nll, taylor_softmax_nll, z_loss

__all__ = [
    "ALDRKL",
    "BiasLoss",
    "C51Projection",
    "CutCrossEntropyStats",
    "HLGauss",
    "TwoHot",
    "bias_loss",
    "comp_sum",
    "conditional_minimum",
    "confident_bce",
    "constellation",
    "crammer_singer",
    "cs_ib",
    "dice_loss",
    "eisl",
    "entropy_regulariser",
    "focal",
    "generalized_cross_entropy",
    "indexed_neg_dot",
    "jensen_shannon",
    "l1_svm",
    "l2_svm",
    "ldr_kl",
    "linear_comp_sum",
    "linear_cross_entropy",
    "linear_ldr_kl",
    "mean_absolute_error",
    "minimizability_gap",
    "nce_agce",
    "nce_rce",
    "ngram_match_map",
    "normalized_softmax",
    "pairwise_contrastive",
    "prototypical",
    "regret_bound",
    "regret_bound_simple",
    "regret_transformation",
    "smooth_adversarial_comp_sum",
    "spherical_softmax_nll",
    "symmetric_cross_entropy",
    "taylor_softmax_nll",
    "thought_loss",
    "translation_consistency",
    "triplet_batch_all",
    "triplet_batch_hard",
    "weston_watkins",
    "z_loss",
]
