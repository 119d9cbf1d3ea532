"""Chains of continuous thought: the last hidden state of a language model, fed back as its next input."""

import torch
from torch import nn

VARIANTS = ("base", "multi", "pause")


class LatentAttention(nn.Module):
    """What turns a hidden state into a thought that has looked at the image again.

    g(h) = LN(W_back LN(MHA(q = W h, keys = values = context) + W h)), the latent attention of MCOUT-Multi (Pham and Ngo, 2025,
    arXiv 2508.12587).

    Args:
        dim: of hidden states, context and thoughts.
        num_heads: of the attention.
        identity: start with W and W_back the identity and the attention adding nothing, so that the untrained module only
            normalises; otherwise all weights are random.

    Raises:
        ValueError: `dim` is not a multiple of `num_heads`.
    """

    def __init__(self, dim: int, num_heads: int, *, identity: bool = True):
        super().__init__()
        if dim < 1 or num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
        self.query = nn.Linear(dim, dim)
        self.attention = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.norm = nn.LayerNorm(dim)
        self.back = nn.Linear(dim, dim)
        self.final_norm = nn.LayerNorm(dim)
        if identity:
            for linear in (self.query, self.back):
                nn.init.eye_(linear.weight)
                nn.init.zeros_(linear.bias)
            nn.init.zeros_(self.attention.out_proj.weight)

    def forward(self, hidden: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Hidden states (batch, dim) and what they look at, (batch, tokens, dim), to thoughts (batch, dim)."""
        query = self.query(hidden)[:, None]
        seen, _ = self.attention(query, context, context, need_weights=False)
        return self.final_norm(self.back(self.norm(seen + query)))[:, 0]


def continuous_thought(
    model: nn.Module,
    embeds: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    n_thoughts: int,
    variant: str = "base",
    latent_attention: nn.Module | None = None,
    visual: torch.Tensor | None = None,
    pause: torch.Tensor | None = None,
    gamma: float = 1.0,
    cache: bool = True,
    detach: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Append continuous thoughts to a prompt, and return the hidden state before each and after the last.

    h_0 is the last hidden state of the prompt (after the final norm). Thought k is g(gamma^(k-1) h_(k-1)), its embedding is
    appended, and h_k is the hidden state there: Pham and Ngo (2025, arXiv 2508.12587). The head of the model on
    h_k predicts the first token of the answer after k thoughts.

    With a mask the prompts are padded on the LEFT, so that the last position is a real one in every row. Rows of one batch
    then agree with the same rows alone when positions are learned too: each row counts its positions from its first token.

    Args:
        model: a `GPT`, or anything with `.transform(vectors)`, `.transform_next(vectors, cache)`, `.start(batch)` and
            `.positions` (an embedding that is added at each position, or None).
        embeds: the prompt as it enters the first block, positions included: (batch, seq, dim).
        mask: True for tokens, False for padding: (batch, seq). Rows are grouped by length and each group runs without padding.
        n_thoughts: how many, at least 0.
        variant: "base": g is the identity. "multi": g is `latent_attention`. "pause": constants `pause`, which look at nothing;
            the control with the same number of positions.
        latent_attention: for "multi", a `LatentAttention`.
        visual: what it looks at, (batch, tokens, dim).
        pause: for "pause", (n_thoughts, dim).
        gamma: below 1 later thoughts are damped, above 1 amplified. Not for "pause".
        cache: whether to keep keys and values; without, everything runs again for each thought. The results agree.
        detach: cut the gradient of each thought, as an ablation.

    Returns:
        The thoughts as they were appended, without positions, (batch, n_thoughts, dim); and h_0 .. h_n,
        (batch, n_thoughts + 1, dim).

    Raises:
        ValueError: shapes or options that do not fit together, more positions than the model has, or padding that is not
            on the left.
    """
    if embeds.ndim != 3 or embeds.shape[1] < 1:
        raise ValueError(f"embeds must be (batch, seq >= 1, dim), got {tuple(embeds.shape)}")
    batch, seq, dim = embeds.shape
    if n_thoughts < 0:
        raise ValueError(f"n_thoughts must be at least 0, got {n_thoughts}")
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {VARIANTS}, got {variant!r}")
    if variant == "multi" and (latent_attention is None or visual is None or len(visual) != batch):
        raise ValueError("variant multi needs latent_attention and visual, (batch, tokens, dim)")
    if variant == "pause" and (pause is None or pause.shape != (n_thoughts, dim)):
        raise ValueError(f"variant pause needs pause of shape {(n_thoughts, dim)}")
    if not gamma > 0 or (variant == "pause" and gamma != 1):
        raise ValueError(f"gamma must be positive, and 1 for pause, got {gamma}")
    positions = model.positions
    if positions is not None and seq + n_thoughts > len(positions.weight):
        raise ValueError(f"{seq} + {n_thoughts} positions exceed the {len(positions.weight)} of the model")
    options = {
        "n_thoughts": n_thoughts, "variant": variant, "latent_attention": latent_attention, "pause": pause,
        "gamma": gamma, "cache": cache, "detach": detach,
    }  # fmt: skip
    if mask is not None and not mask.all():
        return _by_length(model, embeds, mask, visual, options)

    thoughts, states, kept = [], [], None
    for step in range(n_thoughts + 1):
        if cache:
            new = embeds if step == 0 else embeds[:, -1:]
            hidden, kept = model.transform_next(new, model.start(batch) if kept is None else kept)
        else:
            hidden = model.transform(embeds)
        states.append(hidden[:, -1])
        if step == n_thoughts:
            break
        source = states[-1].detach() if detach else states[-1]
        if variant == "base":
            thought = gamma**step * source
        elif variant == "multi":
            thought = latent_attention(gamma**step * source, visual)
        else:
            thought = pause[step].expand(batch, dim)
        thoughts.append(thought)
        place = 0 if positions is None else positions.weight[seq + step]
        embeds = torch.cat([embeds, (thought + place)[:, None]], 1)
    states = torch.stack(states, 1)
    return (torch.stack(thoughts, 1) if thoughts else states[:, :0]), states


def _by_length(model, embeds, mask, visual, options):
    """Rows of equal length together, without their padding."""
    if mask.shape != embeds.shape[:2] or mask.dtype != torch.bool:
        raise ValueError(
            f"mask must be boolean {tuple(embeds.shape[:2])}, got {mask.dtype} {tuple(mask.shape)}"
        )
    lengths = mask.sum(1)
    left = torch.arange(mask.shape[1], device=mask.device) >= mask.shape[1] - lengths[:, None]
    if (lengths == 0).any() or (mask != left).any():
        raise ValueError("padding must be on the left, and each row needs a token")
    found = []
    for length in lengths.unique().tolist():
        rows = (lengths == length).nonzero()[:, 0]
        seen = None if visual is None else visual[rows]
        found.append((rows, *continuous_thought(model, embeds[rows, -length:], visual=seen, **options)))
    back = torch.cat([rows for rows, _, _ in found]).argsort()
    return tuple(torch.cat([group[part] for group in found])[back] for part in (1, 2))
