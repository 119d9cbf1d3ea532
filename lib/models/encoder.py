"""A BERT-like encoder for classification whose layers may leave out the vectors that receive the least attention."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from lib.attention.retention import column_scores, keep_top


class Encoded(NamedTuple):
    """What an `Encoder` computes before its head.

    Attributes:
        hidden: the vectors that are left after the last layer, (batch, left, dim).
        scores: of each layer, the attention received by each vector that entered it, (batch, entered).
        positions: of each layer, where the vectors that it left stood in the input, (batch, left).
    """

    hidden: torch.Tensor
    scores: list[torch.Tensor]
    positions: list[torch.Tensor]


class EncoderLayer(nn.Module):
    """Attention, then a two-layer perceptron, each followed by the residual sum and a layer norm, as in BERT.

    `forward` may drop vectors between the two halves: all attend and are attended to, only those kept go on.
    """

    def __init__(self, dim: int, num_heads: int, ffn_dim: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.attention_norm = nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(), nn.Linear(ffn_dim, dim))
        self.ffn_norm = nn.LayerNorm(dim)

    def attend(
        self, hidden: torch.Tensor, token_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The first half: (batch, seq, dim) to the same, and the attention weights (batch, heads, seq, seq)."""
        batch, seq, dim = hidden.shape
        q, k, v = self.qkv(hidden).view(batch, seq, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if token_mask is not None:
            logits = logits.masked_fill(~token_mask[:, None, None, :], -torch.inf)
        weights = logits.softmax(-1)
        mixed = (weights @ v).transpose(1, 2).reshape(batch, seq, dim)
        return self.attention_norm(hidden + self.out(mixed)), weights

    def forward(
        self,
        hidden: torch.Tensor,
        token_mask: torch.Tensor | None = None,
        keep: int | None = None,
        ranking: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Vectors left, (batch, left, dim), scores of those that entered, (batch, seq), and which stayed.

        `keep=None` keeps all and gives None for the last, else positions in ascending order, (batch, left).
        """
        hidden, weights = self.attend(hidden, token_mask)
        scores = column_scores(weights, token_mask)
        kept = None
        if keep is not None:
            ranks = scores if ranking is None else ranking(scores)
            kept = keep_top(ranks, min(keep, hidden.shape[1]), token_mask)
            hidden = hidden.gather(1, kept[..., None].expand(-1, -1, hidden.shape[2]))
        return self.ffn_norm(hidden + self.ffn(hidden)), scores, kept


class Encoder(nn.Module):
    """A transformer encoder over tokens with a classifier on its first vector.

    Learned positions, layer norm after each residual sum, GELU, no dropout. The first token is the classification
    token (BERT's CLS): put it there yourself; it is never dropped. `layers[i].qkv` is the projection to hook for
    queries, keys and values of layer i, first all queries, then all keys, then all values, heads side by side.

    Args:
        vocab_size: the number of tokens.
        max_length: the longest input, classification token included.
        num_classes: the number of logits.
        dim, depth, num_heads: width, number of layers, and heads of each attention.
        ffn_dim: hidden width of the perceptrons, 4 * `dim` by default.
        retention: as in `set_retention`.

    Raises:
        ValueError: a size below 1, `dim` not a multiple of `num_heads`, or a bad retention.
    """

    def __init__(
        self,
        vocab_size: int,
        max_length: int,
        num_classes: int,
        *,
        dim: int = 64,
        depth: int = 4,
        num_heads: int = 4,
        ffn_dim: int | None = None,
        retention: Sequence[int] | None = None,
    ):
        super().__init__()
        ffn_dim = 4 * dim if ffn_dim is None else ffn_dim
        sizes = {
            "vocab_size": vocab_size,
            "max_length": max_length,
            "num_classes": num_classes,
            "dim": dim,
            "depth": depth,
            "num_heads": num_heads,
            "ffn_dim": ffn_dim,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
        self.max_length = max_length
        self.embedding = nn.Embedding(vocab_size, dim)
        self.positions = nn.Embedding(max_length, dim)
        self.embedding_norm = nn.LayerNorm(dim)
        self.layers = nn.ModuleList(EncoderLayer(dim, num_heads, ffn_dim) for _ in range(depth))
        self.head = nn.Linear(dim, num_classes)
        for module in (self.embedding, self.positions):
            nn.init.normal_(module.weight, std=0.02)
        self.set_retention(retention)

    def set_retention(
        self,
        retention: Sequence[int] | None,
        ranking: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> "Encoder":
        """Choose how many vectors each layer leaves; no weight changes, so it may be called at any time.

        Args:
            retention: one count for each layer, never rising, at least 1; a layer that gets fewer vectors keeps all of
                them. None keeps everything.
            ranking: turns the scores of a layer, (batch, seq), into what the vectors are ranked by; itself by default.

        Returns:
            The encoder.

        Raises:
            ValueError: a count below 1, one that rises, or not one for each layer.
        """
        if retention is not None:
            retention = [int(count) for count in retention]
            falls = all(b <= a for a, b in zip(retention, retention[1:], strict=False))
            if len(retention) != len(self.layers) or min(retention) < 1 or not falls:
                raise ValueError(
                    f"retention must be {len(self.layers)} counts, never rising and at least 1, got {retention}"
                )
        self.retention, self.ranking = retention, ranking
        return self

    def encode(self, tokens: torch.Tensor, token_mask: torch.Tensor | None = None) -> Encoded:
        """Run all layers.

        Args:
            tokens: (batch, seq), the classification token first, seq at most `max_length`.
            token_mask: boolean, (batch, seq), True for real tokens; all by default.

        Returns:
            An `Encoded`: the vectors that are left, the scores and the positions kept of each layer.

        Raises:
            ValueError: shapes that do not fit, or padding in first place.
            TypeError: a mask that is not boolean.
        """
        if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= self.max_length:
            raise ValueError(
                f"tokens must be (batch, 1 to {self.max_length} tokens), got {tuple(tokens.shape)}"
            )
        if token_mask is not None:
            if token_mask.dtype != torch.bool:
                raise TypeError(f"token_mask must be boolean, True for real tokens, got {token_mask.dtype}")
            if token_mask.shape != tokens.shape or not token_mask[:, 0].all():
                raise ValueError("token_mask must have the shape of tokens, with the first token real")
        place = torch.arange(tokens.shape[1], device=tokens.device)
        hidden = self.embedding_norm(self.embedding(tokens) + self.positions(place))
        place = place.expand(len(tokens), -1)
        scores, positions = [], []
        for index, layer in enumerate(self.layers):
            keep = None if self.retention is None else self.retention[index]
            hidden, received, kept = layer(hidden, token_mask, keep, self.ranking)
            if kept is not None:
                place = place.gather(1, kept)
                token_mask = None if token_mask is None else token_mask.gather(1, kept)
            scores.append(received)
            positions.append(place)
        return Encoded(hidden, scores, positions)

    def features(self, tokens: torch.Tensor, token_mask: torch.Tensor | None = None) -> torch.Tensor:
        """What the head reads: the first vector after the last layer, (batch, dim)."""
        return self.encode(tokens, token_mask).hidden[:, 0]

    def forward(
        self, tokens: torch.Tensor, token_mask: torch.Tensor | None = None, *, return_scores: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits, (batch, num_classes); with `return_scores` also the scores of each layer (see `encode`)."""
        encoded = self.encode(tokens, token_mask)
        logits = self.head(encoded.hidden[:, 0])
        return (logits, encoded.scores) if return_scores else logits
