"""Compact convolutional networks of inverted residuals, after MobileNetV3, with and without a skip block."""

import torch
import torch.nn.functional as F
from torch import nn


class InvertedResidual(nn.Module):
    """1 x 1 expansion, 3 x 3 depthwise convolution, linear 1 x 1 projection; plus the input where shapes allow.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        expand: how many times wider the inside is.
        stride: of the depthwise convolution.
        activation: of the inside.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        expand: int,
        stride: int = 1,
        activation: type[nn.Module] = nn.Hardswish,
    ):
        super().__init__()
        inner = expand * in_channels
        self.residual = stride == 1 and in_channels == out_channels
        self.layers = nn.Sequential(
            *_convolution(in_channels, inner, 1),
            activation(),
            *_convolution(inner, inner, 3, stride, groups=inner),
            activation(),
            *_convolution(inner, out_channels, 1),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(n, in_channels, h, w) to (n, out_channels, h / stride, w / stride), rounded up."""
        out = self.layers(images)
        return out + images if self.residual else out


class SkipBlock(nn.Module):
    """Carries early maps to a later stage of lower resolution: average pooling, then an inverted residual with ReLU.

    The block of arXiv:2107.11170; its output is added to what the later stage reads.

    Args:
        in_channels: of the early maps.
        out_channels: of the later stage.
        expand: how many times wider the inside is.
    """

    def __init__(self, in_channels: int, out_channels: int, expand: int = 6):
        super().__init__()
        self.core = InvertedResidual(in_channels, out_channels, expand, activation=nn.ReLU)

    def forward(self, early: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """(n, in_channels, h, w) to (n, out_channels, *size)."""
        return self.core(F.adaptive_avg_pool2d(early, size))


class MobileNet(nn.Module):
    """A stem of stride 2, two inverted residuals of which one halves again, a wide last convolution, a linear classifier.

    With `skip`, the early maps of twice the resolution also go through a `SkipBlock` and are added to what the last
    convolution reads.

    Args:
        width: channels of the stem; the last maps have four times as many.
        num_classes: the number of logits.
        in_channels: of the images.
        skip: whether there is a skip block.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, width: int, num_classes: int, *, in_channels: int = 1, skip: bool = False):
        super().__init__()
        for name, value in (("width", width), ("num_classes", num_classes), ("in_channels", in_channels)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.stem = nn.Sequential(*_convolution(in_channels, width, 3, 2), nn.Hardswish())
        self.early = InvertedResidual(width, width, expand=2)
        self.late = InvertedResidual(width, 2 * width, expand=6, stride=2)
        self.last = nn.Sequential(*_convolution(2 * width, 4 * width, 1), nn.ReLU())
        self.head = nn.Linear(4 * width, num_classes)
        # made last: with one random state, the other weights are those of the network without it
        self.skip = SkipBlock(width, 2 * width) if skip else None

    def maps(self, images: torch.Tensor) -> torch.Tensor:
        """The last feature maps, before pooling: (n, in_channels, h, w) to (n, 4 width, h / 4, w / 4), rounded up."""
        early = self.early(self.stem(images))
        late = self.late(early)
        if self.skip is not None:
            late = late + self.skip(early, late.shape[2:])
        return self.last(late)

    def classify(self, maps: torch.Tensor) -> torch.Tensor:
        """Logits (n, num_classes) of the last feature maps: global average pooling and the linear layer."""
        return self.head(maps.mean((2, 3)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits, (n, num_classes)."""
        return self.classify(self.maps(images))


def _convolution(in_channels, out_channels, kernel, stride=1, groups=1):
    """A convolution that keeps the size (up to its stride) and batch normalisation."""
    convolution = nn.Conv2d(
        in_channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False
    )
    return convolution, nn.BatchNorm2d(out_channels)
