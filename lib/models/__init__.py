"""Small networks that several chapters use; trained ones come from `lib.models.zoo`."""

from lib.models.cnn import CNN
from lib.models.feature_gru import FeatureSequenceGRU
from lib.models.gpt import GPT
from lib.models.mixture import BernoulliMixture, ContextTreeWeighting, FiniteMixture
from lib.models.mlp import mlp
from lib.models.two_tower import TwoTower, encode_names

__all__ = [
    "BernoulliMixture",
    "CNN",
    "ContextTreeWeighting",
    "FeatureSequenceGRU",
    "FiniteMixture",
    "GPT",
    "TwoTower",
    "encode_names",
    "mlp",
]
