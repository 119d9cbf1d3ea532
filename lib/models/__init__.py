"""Small networks that several chapters use; trained ones come from `lib.models.zoo`."""

from lib.models.cnn import CNN
from lib.models.gpt import GPT
from lib.models.mlp import mlp
from lib.models.two_tower import TwoTower, encode_names

__all__ = ["CNN", "GPT", "TwoTower", "encode_names", "mlp"]
