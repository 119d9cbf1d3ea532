"""An image tower and a name tower that meet in one space, trained by contrast."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from lib.data import CharTokenizer
from lib.models.cnn import CNN


def encode_names(names: Sequence[str], tokenizer: CharTokenizer) -> torch.Tensor:
    """Names as one tensor of characters: int64, (names, longest), padded with `len(tokenizer)`.

    Raises:
        ValueError: no names, an empty name, or characters outside the vocabulary.
    """
    if isinstance(names, str) or not names or not all(names):
        raise ValueError(f"names must be a non-empty sequence of non-empty strings, got {names!r}")
    rows = [tokenizer.encode(name) for name in names]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=len(tokenizer))


class TwoTower(nn.Module):
    """Images and their names as unit vectors of one space, compared at a learned temperature.

    The image tower is a `CNN` whose last layer projects into the space. The name tower averages, over the characters of a
    name, an embedding of the character in its position and puts a perceptron on top.

    Args:
        vocab_size: the number of characters; the token `vocab_size` is padding.
        max_length: the longest name.
        dim: of the common space.
        image_size: height and width of the images.

    Loss and temperature are those of CLIP (Radford et al., 2021, arXiv 2103.00020, section 2.3).
    """

    def __init__(self, vocab_size: int, max_length: int, *, dim: int = 32, image_size: int = 8):
        super().__init__()
        self.padding = vocab_size
        self.image_tower = CNN(dim, image_size=image_size)
        self.characters = nn.Embedding(vocab_size + 1, dim, padding_idx=vocab_size)
        self.positions = nn.Embedding(max_length, dim)
        self.name_tower = nn.Sequential(nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim))
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    @property
    def temperature(self) -> torch.Tensor:
        """What cosines are divided by: learned, at least 0.01."""
        return (-self.log_scale).exp().clamp(min=0.01)

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """(batch, 1, size, size) to unit vectors, (batch, dim)."""
        return F.normalize(self.image_tower(images), dim=-1)

    def encode_names(self, tokens: torch.Tensor) -> torch.Tensor:
        """What the function `encode_names` returns, (names, length), to unit vectors, (names, dim).

        Raises:
            ValueError: names longer than `max_length`.
        """
        if tokens.shape[1] > len(self.positions.weight):
            raise ValueError(
                f"names of at most {len(self.positions.weight)} characters, got {tokens.shape[1]}"
            )
        present = (tokens != self.padding).unsqueeze(-1)  # (names, length, 1)
        each = torch.tanh(self.characters(tokens) + self.positions.weight[: tokens.shape[1]]) * present
        return F.normalize(self.name_tower(each.sum(1) / present.sum(1).clamp(min=1)), dim=-1)

    def forward(self, images: torch.Tensor, names: torch.Tensor) -> torch.Tensor:
        """Logits, (images, names): cosine over temperature. A softmax over a row classifies an image."""
        return self.encode_images(images) @ self.encode_names(names).T / self.temperature

    def loss(self, images: torch.Tensor, names: torch.Tensor) -> torch.Tensor:
        """The symmetric contrastive loss of a batch of pairs: image i belongs to name i.

        Cross-entropy against the diagonal, both ways. Pairs with equal names have equal vectors for them and share the
        probability: a name that stands k times adds at least log k, and the gradient is that of a target spread
        evenly over the k.

        Args:
            images: (batch, 1, size, size).
            names: (batch, length).

        Returns:
            The mean of both directions, a scalar, in nats.
        """
        logits = self(images, names)
        targets = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
