"""One training loop and what belongs to it."""

from lib.train.callbacks import DSECallback, InformationPlane
from lib.train.ensemble import fit_ensemble
from lib.train.fit import History, accuracy, fit, progress
from lib.train.memory import PeakTensor
from lib.train.sgld import sgld
from lib.train.sliding_window import sliding_window_predict
from lib.train.wise_ft import wise_ft

__all__ = [
    "DSECallback",
    "History",
    "InformationPlane",
    "PeakTensor",
    "accuracy",
    "fit",
    "fit_ensemble",
    "progress",
    "sgld",
    "sliding_window_predict",
    "wise_ft",
]
