"""A convolutional network for volumes: one class label a voxel."""

import torch
import torch.nn.functional as F
from torch import nn


class UNet3D(nn.Module):
    """A U-shaped network for volumes: two 3 x 3 x 3 convolutions a level, max pools down, nearest neighbours up.

    Each convolution is followed by batch normalisation and a ReLU; each level has twice the channels of the one above and
    hands its features across to the way up. Convolutions pad with zeros, so voxels near the border can be told by it.

    Args:
        in_channels: of the volumes.
        num_classes: the number of logits a voxel.
        width: channels of the first level.
        depth: number of poolings; the edges of the volumes must be multiples of 2 ** depth.

    Raises:
        ValueError: a width or a depth below 1.
    """

    def __init__(self, in_channels: int = 1, num_classes: int = 2, *, width: int = 8, depth: int = 2):
        super().__init__()
        if width < 1 or depth < 1:
            raise ValueError(f"width and depth must be at least 1, got {width} and {depth}")
        self.depth = depth
        widths = [width * 2**level for level in range(depth + 1)]
        self.down = nn.ModuleList(
            _double(before, after) for before, after in zip([in_channels, *widths[:-1]], widths, strict=True)
        )
        self.up = nn.ModuleList(
            _double(low + high, high) for low, high in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.head = nn.Conv3d(width, num_classes, 1)

    def forward(self, volumes: torch.Tensor) -> torch.Tensor:
        """Logits, (batch, in_channels, d1, d2, d3) to (batch, num_classes, d1, d2, d3).

        Raises:
            ValueError: edges that are not multiples of 2 ** depth.
        """
        if volumes.dim() != 5 or any(edge % 2**self.depth for edge in volumes.shape[2:]):
            raise ValueError(
                f"volumes must be (batch, channels, d1, d2, d3) with edges that {2**self.depth} divides, got "
                f"{tuple(volumes.shape)}"
            )
        skips, hidden = [], self.down[0](volumes)
        for level in self.down[1:]:
            skips.append(hidden)
            hidden = level(F.max_pool3d(hidden, 2))
        for level in self.up:
            hidden = level(torch.cat([F.interpolate(hidden, scale_factor=2), skips.pop()], 1))
        return self.head(hidden)


def _double(before, after):
    layers = []
    for channels in (before, after):
        layers += [nn.Conv3d(channels, after, 3, padding=1, bias=False), nn.BatchNorm3d(after), nn.ReLU()]
    return nn.Sequential(*layers)
