"""Scores and intervals that say when not to trust a prediction."""

from lib.uncertainty.conformal import conformal_quantile
from lib.uncertainty.mahalanobis import MahalanobisDetector, TiedGaussian, layer_weights
from lib.uncertainty.metrics import ood_metrics
from lib.uncertainty.predictive import posterior_predictive
from lib.uncertainty.scores import lid_score, msp, odin
from lib.uncertainty.split_point import Residuals, SplitPointHeads, sds, split_interval

__all__ = [
    "MahalanobisDetector",
    "Residuals",
    "SplitPointHeads",
    "TiedGaussian",
    "conformal_quantile",
    "layer_weights",
    "lid_score",
    "msp",
    "odin",
    "ood_metrics",
    "posterior_predictive",
    "sds",
    "split_interval",
]
