"""Pretrained models in pieces: the stages of a vision transformer, and a head that names."""

import torch
import torch.nn.functional as F
from torch import nn

from lib.models.two_tower import TwoTower
from lib.models.vit import ViT


class _Embed(nn.Module):
    def __init__(self, vit: ViT):
        super().__init__()
        self.patches, self.positions = vit.patches, vit.positions

    def forward(self, images):
        return self.patches(images).flatten(2).transpose(1, 2) + self.positions


class _Pool(nn.Module):
    def __init__(self, vit: ViT):
        super().__init__()
        self.norm = vit.norm

    def forward(self, hidden):
        return self.norm(hidden).mean(1)


def vit_stages(vit: ViT) -> list[nn.Module]:
    """A `ViT` as a row of modules whose composition is `vit.features`: patches, each layer, norm and mean.

    They share their parameters with `vit`.
    """
    return [_Embed(vit), *vit.layers, _Pool(vit)]


class NameHead(nn.Module):
    """The last step of a two-tower model as a classifier: project, normalise, compare with the vectors of given names.

    The projection is a parameter; the names are not. Other names make it a classifier of other classes (`with_names`).

    Args:
        projection: the last layer of the image tower, (n, width) to (n, dim).
        names: unit vectors of the names, (classes, dim), as `TwoTower.encode_names` returns them.
        temperature: what cosines are divided by.
    """

    def __init__(self, projection: nn.Module, names: torch.Tensor, temperature: float):
        super().__init__()
        self.projection, self.temperature = projection, float(temperature)
        self.register_buffer("names", names.detach().clone())

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features, (n, width), to logits, (n, classes)."""
        return F.normalize(self.projection(features), dim=-1) @ self.names.T / self.temperature

    def with_names(self, names: torch.Tensor) -> "NameHead":
        """The same head, same parameters, for other names, (classes, dim)."""
        return NameHead(self.projection, names, self.temperature)


def name_head(model: TwoTower, projection: nn.Module, tokens: torch.Tensor) -> NameHead:
    """The head of a two-tower model for the names in `tokens`, (classes, length), with `projection` as its last layer."""
    with torch.no_grad():
        return NameHead(projection, model.encode_names(tokens), model.temperature.item())
