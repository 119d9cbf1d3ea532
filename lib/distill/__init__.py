"""Distillation: losses that teach one network with the outputs of another, or with its own, and whom to ask for them."""

from lib.distill.active import (
    RADWeights,
    active_distill,
    entropy_gains,
    k_center,
    margin_gains,
    rad_sample,
    rad_weights,
    select_queries,
    worst_case_value,
)
from lib.distill.dual_head import DualHead, binary_kl, binary_kl_norm
from lib.distill.linear import linear_distillation
from lib.distill.normalized import USKD, KDTerms, dkd_loss, kd_decomposition, kd_loss, nkd_loss
from lib.distill.regions import (
    CalibratedLabels,
    SoftLabelBank,
    calibrate_regions,
    compress_topk,
    recover_topk,
)
from lib.distill.robust_heads import (
    RobustHeads,
    RobustLosses,
    RoutedPrediction,
    certainty_weights,
    head_divergence,
    route_heads,
)

__all__ = [
    "CalibratedLabels",
    "DualHead",
    "KDTerms",
    "RADWeights",
    "RobustHeads",
    "RobustLosses",
    "RoutedPrediction",
    "SoftLabelBank",
    "USKD",
    "active_distill",
    "binary_kl",
    "binary_kl_norm",
    "calibrate_regions",
    "certainty_weights",
    "compress_topk",
    "dkd_loss",
    "entropy_gains",
    "head_divergence",
    "k_center",
    "kd_decomposition",
    "kd_loss",
    "linear_distillation",
    "margin_gains",
    "nkd_loss",
    "rad_sample",
    "rad_weights",
    "recover_topk",
    "route_heads",
    "select_queries",
    "worst_case_value",
]
