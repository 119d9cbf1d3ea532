"""A small decoder-only transformer whose attention, positions, norms and perceptrons can be exchanged."""

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from lib.attention.rope import rope
from lib.models.mlp import activation_module


class SoftmaxAttention(nn.Module):
    """Causal softmax attention, and the form that every other kind of attention has for `GPT`.

    A kind is made by `factory(dim=, num_heads=, context=, layer=, depth=)`, one for each block, and may override both
    methods. What is to be known of a token besides q, k and v goes into `prepare`: keys and values are cached after it.
    """

    def prepare(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor, start: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Change q, k and v of each token, (batch, heads, seq, head_dim), by what the sub-layer read there.

        Args:
            q: queries; rotary positions are applied to what is returned.
            k: keys.
            v: values.
            hidden: what they were projected from, (batch, seq, dim).
            start: the position of the first token.
        """
        return q, k, v

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """What each query reads, of the shape of `q`. There may be more keys than queries: the queries are the last tokens."""
        new, total = q.shape[-2], k.shape[-2]
        if new == total:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        visible = torch.ones(new, total, dtype=torch.bool, device=q.device).tril(total - new)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)


def _attention_factory(attention: str | Callable) -> Callable:
    if callable(attention):
        return attention
    if attention == "softmax":
        return lambda **shape: SoftmaxAttention()
    # imported by name, so that a model depends on the kinds it uses: a new kind retrains no other model
    kinds = importlib.import_module("lib.attention.kinds").KINDS
    if attention not in kinds:
        raise ValueError(f"attention must be a factory or one of {sorted(kinds)}, got {attention!r}")
    return kinds[attention]


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which each position sees itself and what came before.

    `qkv` maps (batch, seq, dim) to (batch, seq, 3 * dim): first all queries, then all keys, then all values,
    each with its heads side by side. `project` returns them split by head; `kind` mixes the values.
    """

    def __init__(self, dim: int, num_heads: int, kind: nn.Module | None = None, rotary: bool = False):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
        self.num_heads, self.head_dim, self.rotary = num_heads, dim // num_heads, rotary
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.kind = SoftmaxAttention() if kind is None else kind

    def project(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v of the sub-layer's (normalised) input, each (batch, heads, seq, head_dim)."""
        return self.split(self.qkv(hidden))

    def split(self, projected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v by head out of what `qkv` returns: (batch, seq, 3 * dim) to three (batch, heads, seq, head_dim)."""
        batch, seq, _ = projected.shape
        shaped = projected.view(batch, seq, 3, self.num_heads, self.head_dim)
        return shaped.permute(2, 0, 3, 1, 4).unbind()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        mixed = self.kind(*self._prepared(hidden, 0))  # (batch, heads, seq, head_dim)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _prepared(self, hidden: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = self.kind.prepare(*self.project(hidden), hidden, start)
        if self.rotary:
            q, k = rope(q, start=start), rope(k, start=start)
        return q, k, v

    def extend(self, hidden: torch.Tensor, past: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `forward` for positions that follow cached ones.

        Args:
            hidden: the new positions, (batch, new, dim).
            past: keys and values of the positions before, (batch, 2, heads, seq, head_dim).

        Returns:
            What the sub-layer adds at the new positions, and keys and values of all positions.
        """
        q, k, v = self._prepared(hidden, past.shape[3])
        past = torch.cat([past, torch.stack([k, v], 1)], 3)
        mixed = self.kind(q, past[:, 0], past[:, 1])
        return self.out(mixed.transpose(1, 2).flatten(2)), past


NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "none": nn.Identity}


class Block(nn.Module):
    """Attention, then a perceptron, each on the norm of the residual stream and added to it."""

    def __init__(self, dim: int, attention: CausalSelfAttention, mlp: nn.Module, norm: str):
        super().__init__()
        self.attention_norm = NORMS[norm](dim)
        self.attention = attention
        self.mlp_norm = NORMS[norm](dim)
        self.mlp = mlp

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden))
        return hidden + self.mlp(self.mlp_norm(hidden))

    def extend(self, hidden: torch.Tensor, past: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `forward` for positions that follow cached ones; see `CausalSelfAttention.extend`."""
        mixed, past = self.attention.extend(self.attention_norm(hidden), past)
        hidden = hidden + mixed
        return hidden + self.mlp(self.mlp_norm(hidden)), past


def _perceptron(dim: int, activation: str) -> nn.Module:
    return nn.Sequential(nn.Linear(dim, 4 * dim), activation_module(activation), nn.Linear(4 * dim, dim))


class GPT(nn.Module):
    """A language model over tokens.

    `blocks[i].attention.qkv` is the projection to hook for the queries and keys of layer i,
    `blocks[i].attention.split` cuts its output by head, and `head` is the unembedding without bias.

    Args:
        vocab_size: the number of tokens.
        context: the longest sequence. With rotary positions or none, longer ones are read as well.
        dim: the width of the residual stream.
        depth: the number of blocks.
        num_heads: of each attention.
        activation: of the perceptrons, a name that `lib.models.mlp` knows.
        attention: how values are mixed: "softmax", another name in `lib.attention.kinds.KINDS`, or a factory as in
            `lib.models.gpt.SoftmaxAttention`.
        positions: "learned" (a vector added at each position), "rotary" (queries and keys turned, `lib.attention.rope`), or
            "none".
        norm: before each sub-layer and the unembedding: "layer", "rms" or "none".
        mlp: makes the perceptron of a block, called as `mlp(dim, activation)`; by default two linear layers of the hidden
            width 4 * dim. What it returns keeps its initial values, as does what a factory of attention returns.

    Raises:
        ValueError: a size below 1, `dim` not a multiple of `num_heads`, or an unknown name of an option.
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
        attention: str | Callable[..., nn.Module] = "softmax",
        positions: str = "learned",
        norm: str = "layer",
        mlp: Callable[[int, str], nn.Module] | None = None,
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
        if positions not in ("learned", "rotary", "none"):
            raise ValueError(f"positions must be learned, rotary or none, got {positions!r}")
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {sorted(NORMS)}, got {norm!r}")
        factory = _attention_factory(attention)
        self.vocab_size, self.context = vocab_size, context
        self.embedding = nn.Embedding(vocab_size, dim)
        self.positions = nn.Embedding(context, dim) if positions == "learned" else None
        self.blocks = nn.ModuleList()
        for layer in range(depth):
            kind = factory(dim=dim, num_heads=num_heads, context=context, layer=layer, depth=depth)
            mixer = CausalSelfAttention(dim, num_heads, kind, rotary=positions == "rotary")
            self.blocks.append(Block(dim, mixer, (mlp or _perceptron)(dim, activation), norm))
        self.norm = NORMS[norm](dim)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if ".kind." in name or (mlp is not None and ".mlp." in name):
                continue
            if parameter.ndim == 2:
                # what writes to the residual stream starts smaller, so that its variance does not grow with depth
                writes = name.endswith(("attention.out.weight", "mlp.2.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * depth) ** 0.5 if writes else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def embed(self, tokens: torch.Tensor, start: int = 0) -> torch.Tensor:
        """The vectors that enter the first block, (batch, seq) to (batch, seq, dim); `start` is the first one's position.

        Raises:
            ValueError: `tokens` is not (batch, seq) with at least one position, or they exceed `context`.
        """
        if tokens.ndim != 2 or tokens.shape[1] < 1:
            raise ValueError(f"tokens must be (batch, seq >= 1), got {tuple(tokens.shape)}")
        vectors = self.embedding(tokens)
        if self.positions is None:
            return vectors
        if start + tokens.shape[1] > self.context:
            raise ValueError(
                f"tokens must be (batch, seq) within the context of {self.context}, got {tuple(tokens.shape)} after {start}"
            )
        return vectors + self.positions.weight[start : start + tokens.shape[1]]

    def transform(self, vectors: torch.Tensor) -> torch.Tensor:
        """All blocks and the last norm, on vectors such as `embed` makes: (batch, seq, dim) to (batch, seq, dim)."""
        for block in self.blocks:
            vectors = block(vectors)
        return self.norm(vectors)

    def features(self, tokens: torch.Tensor) -> torch.Tensor:
        """The hidden vectors that the unembedding reads: (batch, seq) to (batch, seq, dim).

        Raises:
            ValueError: `tokens` is not (batch, seq) with seq in 1..context.
        """
        return self.transform(self.embed(tokens))

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
        if tokens.ndim != 2 or tokens.shape[1] < 1 or len(tokens) != len(cache):
            raise ValueError(f"tokens must be ({len(cache)}, new >= 1), got {tuple(tokens.shape)}")
        hidden, cache = self.transform_next(self.embed(tokens, cache.shape[4]), cache)
        return self.head(hidden), cache

    def transform_next(self, vectors: torch.Tensor, cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `transform` for vectors, (batch, new, dim), that follow cached ones; returns the new cache as well."""
        caches = []
        for index, block in enumerate(self.blocks):
            vectors, past = block.extend(vectors, cache[:, index])
            caches.append(past)
        return self.norm(vectors), torch.stack(caches, 1)

    def step(self, tokens: torch.Tensor, cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A step function of `lib.models.decode`: one token a row, (batch,), to logits (batch, vocab_size) and the new cache."""
        logits, cache = self.extend(tokens[:, None], cache)
        return logits[:, 0], cache
