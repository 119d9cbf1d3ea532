"""Scores and intervals that say when not to trust a prediction."""

from lib.uncertainty.mahalanobis import MahalanobisDetector, TiedGaussian, layer_weights
from lib.uncertainty.metrics import ood_metrics
from lib.uncertainty.predictive import posterior_predictive
from lib.uncertainty.scores import lid_score, msp, odin

__all__ = [
    "MahalanobisDetector",
    "TiedGaussian",
    "layer_weights",
    "lid_score",
    "msp",
    "odin",
    "ood_metrics",
    "posterior_predictive",
]
