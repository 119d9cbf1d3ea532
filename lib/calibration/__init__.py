"""Making a confidence mean what it says: calibrators, and the errors they are judged by."""

from lib.calibration.correctness import TransformCalibrator, correctness_aware_loss, narrowly_wrong
from lib.calibration.metrics import (
    auroc_correctness,
    brier,
    classwise_ece,
    ece,
    reliability_diagram,
    top_label,
)
from lib.calibration.scaling import (
    EnsembleTemperatureScaling,
    IsotonicCalibration,
    TemperatureScaling,
    calibrated_log_likelihood,
)
from lib.calibration.split_point import split_point_recalibrate
from lib.calibration.utility import UtilityToProbability

__all__ = [
    "EnsembleTemperatureScaling",
    "IsotonicCalibration",
    "TemperatureScaling",
    "TransformCalibrator",
    "UtilityToProbability",
    "auroc_correctness",
    "brier",
    "calibrated_log_likelihood",
    "classwise_ece",
    "correctness_aware_loss",
    "ece",
    "narrowly_wrong",
    "reliability_diagram",
    "split_point_recalibrate",
    "top_label",
]
