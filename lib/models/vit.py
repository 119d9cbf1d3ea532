"""A small vision transformer with an activation of your choice."""

from collections.abc import Callable

import torch
from torch import nn


class ViT(nn.Module):
    """A vision transformer: linear patches, learned positions, pre-norm encoder, mean over the patches, linear head.

    The encoder layers are PyTorch's own, without dropout. `layers[i].linear1` gives the pre-activations of layer i and
    `layers[i].activation` is its activation, an instance of its own.

    Args:
        num_classes: the number of logits.
        activation: makes an activation, called once for each layer; a module class such as `torch.nn.GELU` will do.
        image_size: height and width of the images, a multiple of `patch_size`.
        patch_size: height and width of a patch.
        in_channels: of the images.
        dim, depth, num_heads: width, number of layers, and heads of each attention.

    Raises:
        ValueError: a patch size that does not divide the image size, or `dim` not a multiple of `num_heads`.
    """

    def __init__(
        self,
        num_classes: int = 10,
        activation: Callable[[], nn.Module] = nn.GELU,
        *,
        image_size: int = 8,
        patch_size: int = 2,
        in_channels: int = 1,
        dim: int = 32,
        depth: int = 2,
        num_heads: int = 4,
    ):
        super().__init__()
        if patch_size < 1 or image_size % patch_size:
            raise ValueError(f"patch_size must divide image_size={image_size}, got {patch_size}")
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
        self.patches = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)
        self.positions = nn.Parameter(0.02 * torch.randn((image_size // patch_size) ** 2, dim))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                dim,
                num_heads,
                4 * dim,
                dropout=0.0,
                activation=activation(),
                batch_first=True,
                norm_first=True,
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """What the head reads: (batch, channels, height, width) to (batch, dim)."""
        hidden = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        for layer in self.layers:
            hidden = layer(hidden)
        return self.norm(hidden).mean(1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits, (batch, num_classes)."""
        return self.head(self.features(images))
