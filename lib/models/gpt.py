"""A small decoder-only transformer: layer norm before each sub-layer, learned positions, causal attention."""

import torch
import torch.nn.functional as F
from torch import nn

from lib.models.mlp import activation_module


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which each position sees itself and what came before.

    `qkv` maps (batch, seq, dim) to (batch, seq, 3 * dim): first all queries, then all keys, then all values,
    each with its heads side by side. `project` returns them split by head.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def project(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v of the sub-layer's (normalised) input, each (batch, heads, seq, head_dim)."""
        return self.split(self.qkv(hidden))

    def split(self, projected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v by head out of what `qkv` returns: (batch, seq, 3 * dim) to three (batch, heads, seq, head_dim)."""
        batch, seq, _ = projected.shape
        shaped = projected.view(batch, seq, 3, self.num_heads, self.head_dim)
        return shaped.permute(2, 0, 3, 1, 4).unbind()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(hidden)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (batch, heads, seq, head_dim)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def extend(self, hidden: torch.Tensor, past: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `forward` for positions that follow cached ones.

        Args:
            hidden: the new positions, (batch, new, dim).
            past: keys and values of the positions before, (batch, 2, heads, seq, head_dim).

        Returns:
            What the sub-layer adds at the new positions, and keys and values of all positions.
        """
        q, k, v = self.project(hidden)
        past = torch.cat([past, torch.stack([k, v], 1)], 3)
        new, total = hidden.shape[1], past.shape[3]
        visible = torch.ones(new, total, dtype=torch.bool, device=hidden.device).tril(total - new)
        mixed = F.scaled_dot_product_attention(q, past[:, 0], past[:, 1], attn_mask=visible)
        return self.out(mixed.transpose(1, 2).flatten(2)), past


class Block(nn.Module):
    """Attention, then a two-layer perceptron, each on the layer norm of the residual stream and added to it."""

    def __init__(self, dim: int, num_heads: int, activation: str):
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = CausalSelfAttention(dim, num_heads)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim), activation_module(activation), nn.Linear(4 * dim, dim)
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden))
        return hidden + self.mlp(self.mlp_norm(hidden))

    def extend(self, hidden: torch.Tensor, past: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `forward` for positions that follow cached ones; see `CausalSelfAttention.extend`."""
        mixed, past = self.attention.extend(self.attention_norm(hidden), past)
        hidden = hidden + mixed
        return hidden + self.mlp(self.mlp_norm(hidden)), past


class GPT(nn.Module):
    """A language model over tokens.

    `blocks[i].attention.qkv` is the projection to hook for the queries and keys of layer i,
    `blocks[i].attention.split` cuts its output by head, and `head` is the unembedding without bias.

    Args:
        vocab_size: the number of tokens.
        context: the longest sequence.
        dim: the width of the residual stream.
        depth: the number of blocks.
        num_heads: of each attention.
        activation: of the perceptrons, a name that `lib.models.mlp` knows.

    Raises:
        ValueError: a size below 1, `dim` not a multiple of `num_heads`, or an unknown activation.
    """

    def __init__(
        self,
        vocab_size: int,
        context: int,
        *,
        dim: int = 64,
        depth: int = 2,
        num_heads: int = 4,
        activation: str = "gelu",
    ):
        super().__init__()
        sizes = {
            "vocab_size": vocab_size,
            "context": context,
            "dim": dim,
            "depth": depth,
            "num_heads": num_heads,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.vocab_size, self.context = vocab_size, context
        self.embedding = nn.Embedding(vocab_size, dim)
        self.positions = nn.Embedding(context, dim)
        self.blocks = nn.ModuleList(Block(dim, num_heads, activation) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                # what writes to the residual stream starts smaller, so that its variance does not grow with depth
                writes = name.endswith(("attention.out.weight", "mlp.2.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * depth) ** 0.5 if writes else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def features(self, tokens: torch.Tensor) -> torch.Tensor:
        """The hidden vectors that the unembedding reads: (batch, seq) to (batch, seq, dim).

        Raises:
            ValueError: `tokens` is not (batch, seq) with seq in 1..context.
        """
        if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= self.context:
            raise ValueError(f"tokens must be (batch, seq <= {self.context}), got {tuple(tokens.shape)}")
        hidden = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        return self.norm(hidden)

    def forward(
        self, tokens: torch.Tensor, targets: torch.Tensor | None = None, return_hidden: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Next-token logits.

        Args:
            tokens: (batch, seq).
            targets: (batch, seq), the token that follows each position; -100 is ignored.
            return_hidden: whether to return what `features` computes as well.

        Returns:
            logits, (batch, seq, vocab_size). With `targets` (logits, loss), the loss in nats per token; with
            `return_hidden` (logits, hidden); with both (logits, loss, hidden).
        """
        hidden = self.features(tokens)
        logits = self.head(hidden)
        result = (logits,)
        if targets is not None:
            result += (F.cross_entropy(logits.flatten(0, 1), targets.flatten()),)
        if return_hidden:
            result += (hidden,)
        return result if len(result) > 1 else logits

    def start(self, batch: int) -> torch.Tensor:
        """An empty cache for `batch` sequences, the first state of `step` and `extend`."""
        attention = self.blocks[0].attention
        shape = (batch, len(self.blocks), 2, attention.num_heads, 0, attention.head_dim)
        return self.head.weight.new_empty(shape)

    def extend(self, tokens: torch.Tensor, cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Next-token logits of tokens that follow cached ones; only the new positions are computed.

        Args:
            tokens: (batch, new), new at least 1.
            cache: keys and values of what came before, (batch, depth, 2, heads, seq, head_dim).

        Returns:
            logits, (batch, new, vocab_size), and the cache of all seq + new positions.

        Raises:
            ValueError: shapes that do not fit, or more than `context` positions.
        """
        seq = cache.shape[4]
        if tokens.ndim != 2 or tokens.shape[1] < 1 or len(tokens) != len(cache):
            raise ValueError(f"tokens must be ({len(cache)}, new >= 1), got {tuple(tokens.shape)}")
        if seq + tokens.shape[1] > self.context:
            raise ValueError(
                f"{seq} cached and {tokens.shape[1]} new positions exceed the context of {self.context}"
            )
        hidden = self.embedding(tokens) + self.positions.weight[seq : seq + tokens.shape[1]]
        caches = []
        for index, block in enumerate(self.blocks):
            hidden, past = block.extend(hidden, cache[:, index])
            caches.append(past)
        return self.head(self.norm(hidden)), torch.stack(caches, 1)

    def step(self, tokens: torch.Tensor, cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A step function of `lib.models.decode`: one token a row, (batch,), to logits (batch, vocab_size) and the new cache."""
        logits, cache = self.extend(tokens[:, None], cache)
        return logits[:, 0], cache
