"""A recurrent encoder-decoder that looks back at its source."""

import torch
from torch import nn


class Seq2Seq(nn.Module):
    """GRU encoder (both directions) and GRU decoder with dot-product attention on the encoder's states.

    The decoder's state is the query; the attended source joins it before the output layer and is not fed back, so all
    positions of a known target are computed at once (Luong, Pham and Manning, 2015, the "dot" score, without input feeding).

    For the search functions of `lib.models.decode`: `state = model.start(sources)`, and the model's `step` is the step function.

    Args:
        source_size: number of source tokens.
        target_size: number of target tokens, the start and end tokens included.
        dim: width of embeddings and states; even.
        padding: the source token that is not looked at.

    Raises:
        ValueError: a size below 1, an odd `dim`, or padding outside the source tokens.
    """

    def __init__(self, source_size: int, target_size: int, *, dim: int = 64, padding: int = 0):
        super().__init__()
        if min(source_size, target_size, dim) < 1:
            raise ValueError(f"sizes must be at least 1, got {source_size}, {target_size} and dim {dim}")
        if dim % 2:
            raise ValueError(f"dim must be even (half for each direction of the encoder), got {dim}")
        if not 0 <= padding < source_size:
            raise ValueError(f"padding must be a source token below {source_size}, got {padding}")
        self.padding = padding
        self.source_embedding = nn.Embedding(source_size, dim)
        self.target_embedding = nn.Embedding(target_size, dim)
        self.encoder = nn.GRU(dim, dim // 2, batch_first=True, bidirectional=True)
        self.decoder = nn.GRU(dim, dim, batch_first=True)
        self.combine = nn.Linear(2 * dim, dim)
        self.head = nn.Linear(dim, target_size)

    def start(self, sources: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Read the sources.

        Args:
            sources: tokens, (batch, seq), padded on the right; at least one token each.

        Returns:
            The decoder's state: hidden (batch, dim), memory (batch, seq, dim), and which memory is real (batch, seq).

        Raises:
            ValueError: not two-dimensional, or a row of padding only.
        """
        if sources.ndim != 2:
            raise ValueError(f"sources must be (batch, seq), got {tuple(sources.shape)}")
        real = sources != self.padding
        lengths = real.sum(1)
        if not bool((lengths > 0).all()):
            raise ValueError("every source needs at least one token that is not padding")
        packed = nn.utils.rnn.pack_padded_sequence(
            self.source_embedding(sources), lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        states, last = self.encoder(packed)
        memory, _ = nn.utils.rnn.pad_packed_sequence(states, batch_first=True, total_length=sources.shape[1])
        return torch.cat([last[0], last[1]], 1), memory, real

    def forward(self, sources: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """Logits of every next token: sources (batch, seq), target prefixes (batch, steps) to (batch, steps, target_size)."""
        return self._advance(inputs, self.start(sources))[0]

    def step(
        self, tokens: torch.Tensor, state: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """One token more: tokens (batch,) and state to logits (batch, target_size) and the new state."""
        logits, state = self._advance(tokens.unsqueeze(1), state)
        return logits[:, 0], state

    def _advance(self, inputs, state):
        hidden, memory, real = state
        queries, last = self.decoder(self.target_embedding(inputs), hidden.unsqueeze(0).contiguous())
        scores = queries @ memory.transpose(1, 2)  # (batch, steps, seq)
        weights = torch.softmax(scores.masked_fill(~real.unsqueeze(1), -torch.inf), -1)
        mixed = torch.tanh(self.combine(torch.cat([queries, weights @ memory], -1)))
        return self.head(mixed), (last[0], memory, real)
