"""Scores and intervals that say when not to trust a prediction."""

from lib.uncertainty.committee import CommitteeEntropy, committee_entropy
from lib.uncertainty.conformal import conformal_quantile
from lib.uncertainty.fusion import fusion_weight, kurtosis_weight
from lib.uncertainty.mahalanobis import MahalanobisDetector, TiedGaussian, layer_weights
from lib.uncertainty.metrics import ood_metrics
from lib.uncertainty.predictive import posterior_predictive
from lib.uncertainty.scores import lid_score, msp, odin
from lib.uncertainty.sdm import (
    SDM,
    CDFRescaler,
    ClassECDF,
    Verified,
    depth_match,
    high_reliability_region,
    sdm_activation,
)
from lib.uncertainty.split_point import Residuals, SplitPointHeads, sds, split_interval

__all__ = [
    "CDFRescaler",
    "ClassECDF",
    "CommitteeEntropy",
    "MahalanobisDetector",
    "Residuals",
    "SDM",
    "SplitPointHeads",
    "TiedGaussian",
    "Verified",
    "committee_entropy",
    "conformal_quantile",
    "depth_match",
    "fusion_weight",
    "high_reliability_region",
    "kurtosis_weight",
    "layer_weights",
    "lid_score",
    "msp",
    "odin",
    "ood_metrics",
    "posterior_predictive",
    "sdm_activation",
    "sds",
    "split_interval",
]
