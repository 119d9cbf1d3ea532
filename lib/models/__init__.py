"""Small networks that several chapters use; trained ones come from `lib.models.zoo`."""

from lib.models.activations import CorrectedActivation, CRReLU, eafo_correction, eafo_step
from lib.models.cnn import CNN
from lib.models.feature_gru import FeatureSequenceGRU
from lib.models.gpt import GPT
from lib.models.mixture import BernoulliMixture, ContextTreeWeighting, FiniteMixture
from lib.models.mlp import mlp
from lib.models.two_tower import TwoTower, encode_names
from lib.models.vit import ViT

__all__ = [
    "BernoulliMixture",
    "CNN",
    "CRReLU",
    "ContextTreeWeighting",
    "CorrectedActivation",
    "FeatureSequenceGRU",
    "FiniteMixture",
    "GPT",
    "TwoTower",
    "ViT",
    "eafo_correction",
    "eafo_step",
    "encode_names",
    "mlp",
]
