"""Adapting a trained model to new data: from a few labelled examples, or at test time."""

from lib.adapt.logit_bias import (
    AMU,
    CLIPAdapter,
    CoOp,
    LogitBias,
    TipAdapter,
    class_means,
    fit_logit_biases,
    normalize_logits,
)

__all__ = [
    "AMU",
    "CLIPAdapter",
    "CoOp",
    "LogitBias",
    "TipAdapter",
    "class_means",
    "fit_logit_biases",
    "normalize_logits",
]
