"""Hopular: a network for small tables whose every block reads the training set and the original input.

The paper is Schäfl, Gruber, Bitto-Nemling and Hochreiter (2022), arXiv 2206.00664.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from lib.attention import Hopfield
from lib.attention.hopfield import _weights
from lib.tabular.spec import Numeric, TabularSpec, _check_encoded


class HopularBlock(nn.Module):
    """One step of refinement (arXiv 2206.00664, Hopular block).

    First the state reads the training rows: s = LN(state), s = s + H_s(s; LN(memory)). Then each of its tokens reads the
    tokens of the original input: s = LN(s), s = s + H_f(s; LN(tokens)). H is a multi-head Hopfield association with
    beta = scaling / sqrt(size of a head) and free values. As in the authors' code, what is added to is the *normalised*
    state, and state and memory share their layer norm.

    Args:
        num_columns: tokens of a row.
        size: of a token, a multiple of `num_heads`.
        num_heads: of both associations.
        scaling: of the inverse temperature.
        dropout: of the weights of association, in training.
        samples: whether there is an association with the training rows.
        features: whether there is one with the input's tokens.
    """

    def __init__(
        self,
        num_columns: int,
        size: int,
        *,
        num_heads: int = 4,
        scaling: float = 1.0,
        dropout: float = 0.0,
        samples: bool = True,
        features: bool = True,
    ):
        super().__init__()
        if size < 1 or num_heads < 1 or size % num_heads:
            raise ValueError(f"size must be a multiple of num_heads, got {size} and {num_heads}")
        if not scaling > 0:
            raise ValueError(f"scaling must be positive, got {scaling}")
        self.size, whole = size, num_columns * size
        options = {"num_heads": num_heads, "scaling": scaling, "dropout": dropout}
        self.sample_norm, self.feature_norm = nn.LayerNorm(whole), nn.LayerNorm(size)
        self.sample_lookup = _Lookup(whole, **options) if samples else None
        self.feature_lookup = _Lookup(size, **options) if features else None

    def forward(
        self,
        state: torch.Tensor,
        memory: torch.Tensor,
        tokens: torch.Tensor,
        memory_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The refined state.

        Args:
            state: (B, columns * size).
            memory: embedded training rows, (n, columns * size).
            tokens: the embedded input, (B, columns * size).
            memory_mask: boolean (B, n), True where a row may be seen.
        """
        if self.sample_lookup is not None:
            state = self.sample_norm(state)
            mask = None if memory_mask is None else memory_mask[None]
            state = state + self.sample_lookup(state[None], self.sample_norm(memory)[None], mask)[0]
        if self.feature_lookup is not None:
            parts, stored = (
                self.feature_norm(each.unflatten(1, (-1, self.size))) for each in (state, tokens)
            )
            state = (parts + self.feature_lookup(parts, stored)).flatten(1)
        return state

    def association(
        self, state: torch.Tensor, memory: torch.Tensor, memory_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The weights with which the state reads the training rows, (heads, B, n). Arguments as of `forward`.

        Raises:
            ValueError: the block has no association with the training rows.
        """
        if self.sample_lookup is None:
            raise ValueError("this block does not read the training rows")
        mask = None if memory_mask is None else memory_mask[None]
        stored = self.sample_norm(memory)[None]
        return self.sample_lookup.association(self.sample_norm(state)[None], stored, mask=mask)[0]


class Hopular(nn.Module):
    """A network for tables that keeps the training rows as a memory (arXiv 2206.00664).

    Every column of a row becomes a token: embed, add one vector for its type and one for its position, then GELU,
    dropout, layer norm and a linear map of its own. The embedded row goes through the blocks, which read the embedded
    memory and the embedded row, and a summary predicts all columns. The memory is embedded anew in every call, with gradient.

    Args:
        spec: the columns of the table.
        memory_x: encoded training rows with their targets, nothing masked, (n, spec.width).
        memory_ids: integers (n,) that name the rows; 0 ... n - 1 by default.
        size: of a token, a multiple of `num_heads`.
        num_heads, scaling: of the associations, see `HopularBlock`.
        num_blocks: how many steps of refinement.
        dropouts: of the embedding, the associations and the summary.
        samples, features: whether the blocks have the association with training rows, and with the input's tokens.

    Raises:
        ValueError: sizes that do not fit.
    """

    def __init__(
        self,
        spec: TabularSpec,
        memory_x: torch.Tensor,
        memory_ids: torch.Tensor | None = None,
        *,
        size: int = 16,
        num_heads: int = 4,
        num_blocks: int = 4,
        scaling: float = 1.0,
        dropouts: Sequence[float] = (0.1, 0.1, 0.01),
        samples: bool = True,
        features: bool = True,
    ):
        super().__init__()
        _check_encoded(memory_x, spec)
        memory_ids = torch.arange(len(memory_x)) if memory_ids is None else memory_ids
        if memory_ids.shape != (len(memory_x),) or not len(memory_x):
            raise ValueError(f"need one id for each of {len(memory_x)} rows, got {tuple(memory_ids.shape)}")
        if num_blocks < 1 or len(dropouts) != 3:
            raise ValueError(f"need a block and three dropouts, got {num_blocks} and {dropouts}")
        self.spec, self.size, self.dropouts = spec, size, tuple(dropouts)
        self.register_buffer("memory_x", memory_x.clone())
        self.register_buffer("memory_ids", memory_ids.to(memory_x.device))
        columns = len(spec.columns)
        # one matrix for all columns: slot d of the input feeds the token of its column only
        widths = torch.tensor([width + 1 for width in spec.sizes])
        owner = torch.repeat_interleave(torch.arange(columns), widths)
        self.register_buffer("owner", F.one_hot(owner, columns).to(memory_x.dtype), persistent=False)
        types = torch.tensor([int(not isinstance(column, Numeric)) for column in spec.columns])
        self.register_buffer("types", types, persistent=False)
        self.embed_weight = _uniform(widths[owner].double().rsqrt()[:, None].expand(-1, size))
        self.embed_bias = _uniform(widths.double().rsqrt()[:, None].expand(-1, size))
        self.type_embedding, self.position_embedding = (
            _uniform(torch.full((count, size), size**-0.5)) for count in (2, columns)
        )
        self.token_norm = nn.LayerNorm(size, elementwise_affine=False)
        self.token_scale = nn.Parameter(torch.ones(columns, size))
        self.token_shift = nn.Parameter(torch.zeros(columns, size))
        self.token_weight = _uniform(torch.full((columns, size, size), size**-0.5))
        self.token_bias = _uniform(torch.full((columns, size), size**-0.5))
        options = {"num_heads": num_heads, "scaling": scaling, "dropout": self.dropouts[1]}
        options |= {"samples": samples, "features": features}
        self.blocks = nn.ModuleList(HopularBlock(columns, size, **options) for _ in range(num_blocks))
        self.summary = nn.Sequential(
            nn.GELU(),
            nn.Dropout(self.dropouts[2]),
            nn.LayerNorm(columns * size),
            nn.Linear(columns * size, sum(spec.sizes)),
        )

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """Encoded rows (B, spec.width) as states (B, columns * size)."""
        matrix = self.owner[:, :, None] * self.embed_weight[:, None]  # (width, columns, size)
        token = (x @ matrix.flatten(1)).unflatten(1, (-1, self.size)) + self.embed_bias
        token = token + self.type_embedding[self.types] + self.position_embedding
        token = F.dropout(F.gelu(token), self.dropouts[0], self.training)
        token = self.token_norm(token) * self.token_scale + self.token_shift
        return (torch.einsum("bfi,fio->bfo", token, self.token_weight) + self.token_bias).flatten(1)

    def forward(
        self,
        x: torch.Tensor,
        ids: torch.Tensor | None = None,
        *,
        memory_mask: torch.Tensor | None = None,
        return_blocks: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, list[torch.Tensor]]:
        """Predictions of all columns.

        Args:
            x: encoded rows with their targets masked, (B, spec.width).
            ids: integers (B,). A row does not see the memory rows that have its id.
            memory_mask: boolean (B, n), True where a memory row may be seen; instead of `ids`.
            return_blocks: also return the states, the embedded input first: num_blocks + 1 tensors (B, columns * size).
                `self.summary` reads any of them.

        Returns:
            (B, sum(spec.sizes)): standardised numbers and logits; `spec.split` cuts them into columns.

        Raises:
            ValueError: shapes that do not fit, both ids and memory_mask, or in training neither: a row that finds
                itself in the memory reads its own target there.
        """
        _check_encoded(x, self.spec)
        state = tokens = self.embed(x)
        memory, mask = self.embed(self.memory_x), self._mask(x, ids, memory_mask)
        states = [state]
        for block in self.blocks:
            state = block(state, memory, tokens, mask)
            states.append(state)
        out = self.summary(state)
        return (out, states) if return_blocks else out

    def association(
        self, x: torch.Tensor, ids: torch.Tensor | None = None, *, memory_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The weights with which each block reads the training rows, (blocks, heads, B, n). Arguments as of `forward`."""
        _, states = self(x, ids, memory_mask=memory_mask, return_blocks=True)
        memory, mask = self.embed(self.memory_x), self._mask(x, ids, memory_mask)
        pairs = zip(self.blocks, states[:-1], strict=True)
        return torch.stack([block.association(state, memory, mask) for block, state in pairs])

    def _mask(self, x, ids, memory_mask):
        if ids is not None and memory_mask is not None:
            raise ValueError("give ids or memory_mask, not both")
        if ids is not None:
            if ids.shape != (len(x),):
                raise ValueError(f"ids must have the shape ({len(x)},), got {tuple(ids.shape)}")
            return ids[:, None] != self.memory_ids
        if memory_mask is None and self.training:
            raise ValueError("in training a row must not find its own target in the memory: give ids")
        wanted = (len(x), len(self.memory_x))
        if memory_mask is not None and (memory_mask.dtype != torch.bool or memory_mask.shape != wanted):
            raise ValueError(f"memory_mask must be boolean of shape {wanted}, got {tuple(memory_mask.shape)}")
        return memory_mask


def hopular_loss(
    out: torch.Tensor,
    x: torch.Tensor,
    spec: TabularSpec,
    selected: torch.Tensor,
    missing: torch.Tensor | None = None,
    *,
    weight: float,
) -> torch.Tensor:
    """weight * loss of the features + (1 - weight) * loss of the targets (arXiv 2206.00664).

    Each loss is a mean over columns, and in a column over the rows that are selected and not missing: cross-entropy for
    categories, squared error of standardised values for numbers. Where one of the two has nothing to count, the other one is returned.

    Args:
        out: predictions (n, sum(spec.sizes)).
        x: the encoded rows before corruption, with their targets, (n, spec.width).
        spec: the columns.
        selected, missing: boolean (n, columns), from `corrupt` and `encode`.
        weight: from 0 to 1, see `feature_loss_weight`.

    Raises:
        ValueError: shapes that do not fit, a weight outside [0, 1], or nothing to count at all.
    """
    _check_encoded(x, spec, selected=selected, missing=missing)
    if not 0 <= weight <= 1:
        raise ValueError(f"weight must lie in [0, 1], got {weight}")
    if out.shape != (len(x), sum(spec.sizes)):
        raise ValueError(f"out must have the shape {(len(x), sum(spec.sizes))}, got {tuple(out.shape)}")
    counted = selected if missing is None else selected & ~missing
    features, targets = [], []
    parts = zip(spec.columns, spec.split(out), spec.slots(), strict=True)
    for i, (column, prediction, slot) in enumerate(parts):
        rows = counted[:, i]
        if not bool(rows.any()):
            continue
        truth = x[rows, slot.start : slot.stop - 1]
        if isinstance(column, Numeric):
            loss = F.mse_loss(prediction[rows], truth)
        else:
            loss = F.cross_entropy(prediction[rows], truth.argmax(1))
        (targets if i in spec.target else features).append(loss)
    if not features and not targets:
        raise ValueError("no selected value that is not missing: nothing to count")
    if not features or not targets:
        return torch.stack(features or targets).mean()
    return weight * torch.stack(features).mean() + (1 - weight) * torch.stack(targets).mean()


def feature_loss_weight(step: int, steps: int, *, start: float = 1.0, end: float = 0.0) -> float:
    """The weight of the self-supervised loss in step 0 ... steps - 1: a half cosine from `start` to `end`.

    Raises:
        ValueError: a step that is not one of `steps`.
    """
    if not 0 <= step < steps:
        raise ValueError(f"step must lie from 0 to {steps - 1}, got {step}")
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / max(1, steps - 1)))


class _Lookup(Hopfield):
    """A Hopfield association with dropout of its weights, which `Hopfield` leaves out because it may stream them."""

    def __init__(self, size, *, num_heads, scaling, dropout):
        beta = scaling * (size // num_heads) ** -0.5
        norms = {f"normalize_{name}": False for name in ("state", "stored", "projection")}
        super().__init__(size, num_heads=num_heads, beta=beta, values="free", **norms)
        self.dropout = dropout

    def forward(self, state, stored, mask=None):
        if not (self.training and self.dropout):
            return super().forward(state, stored, mask=mask)
        queries, keys = self._split(self.query(state)), self._split(self.key(stored))
        mask = None if mask is None else mask[:, None]
        weights = _weights(queries, keys, self.beta[:, None, None], mask)
        read = F.dropout(weights, self.dropout) @ self._values(state, stored, None)
        return self.out(read.transpose(-3, -2).flatten(-2))


def _uniform(bound):
    """A parameter drawn uniformly between -bound and bound, as the weights of nn.Linear are."""
    bound = bound.to(torch.get_default_dtype())
    return nn.Parameter((2 * torch.rand(bound.shape) - 1) * bound)
