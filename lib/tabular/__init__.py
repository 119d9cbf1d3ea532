"""Tables: rows of numbers and categories, how they are encoded, and networks that keep the training rows as a memory."""

from lib.tabular.hopular import Hopular, HopularBlock, feature_loss_weight, hopular_loss
from lib.tabular.spec import Categorical, Numeric, TabularSpec, corrupt, decode, encode

__all__ = [
    "Categorical",
    "Hopular",
    "HopularBlock",
    "Numeric",
    "TabularSpec",
    "corrupt",
    "decode",
    "encode",
    "feature_loss_weight",
    "hopular_loss",
]
