"""A small convolutional network for images of the size of the scikit-learn digits."""

import torch
from torch import nn


class CNN(nn.Module):
    """Two 3 x 3 convolutions, a 2 x 2 max pool, a hidden layer and a linear classifier. No batch statistics.

    Args:
        num_classes: the number of logits.
        in_channels: of the images.
        image_size: height and width of the images, even.
        channels: of the first and the second convolution.
        width: of the hidden layer, the penultimate one.

    Raises:
        ValueError: an image size that is odd or below 2.
    """

    def __init__(
        self,
        num_classes: int = 10,
        *,
        in_channels: int = 1,
        image_size: int = 8,
        channels: tuple[int, int] = (16, 32),
        width: int = 64,
    ):
        super().__init__()
        if image_size < 2 or image_size % 2:
            raise ValueError(f"image_size must be even and at least 2, got {image_size}")
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, channels[0], 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels[0], channels[1], 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.hidden = nn.Linear(channels[1] * (image_size // 2) ** 2, width)
        self.head = nn.Linear(width, num_classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """The penultimate layer, after its ReLU: (batch, in_channels, size, size) to (batch, width)."""
        return self.hidden(self.stem(images).flatten(1)).relu()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits, (batch, num_classes)."""
        return self.head(self.features(images))
