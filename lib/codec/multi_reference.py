"""The contexts of MLIC++ and MLICv2: linear global attention, windows of anchors, guidance by the hyperprior, reweighting."""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

from lib.attention.linear import linear_softmax_attention
from lib.attention.rope import RoPE2D
from lib.codec.checkerboard import ANCHOR, OTHER, checkerboard, keep
from lib.codec.token_mixing import Gate


@functools.lru_cache(maxsize=64)
def _places(height, width, parity, device):
    """Flat indices of the places of a parity: gathering by index has a much faster gradient than by mask."""
    return checkerboard(height, width, parity, device).flatten().nonzero()[:, 0]


@functools.lru_cache(maxsize=64)
def _neighbours(height, width, window, device):
    """Of each place of parity 1 the anchors in its window, (offsets, places): flat indices, and whether they lie inside."""
    reach = torch.arange(window, device=device) - window // 2
    offsets = torch.cartesian_prod(reach, reach)
    offsets = offsets[offsets.sum(1) % 2 == 1]  # from a place of one parity to places of the other
    places = _places(height, width, OTHER, device)
    rows = places // width + offsets[:, :1]
    columns = places % width + offsets[:, 1:]
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    return torch.where(inside, rows * width + columns, 0), inside


def _squeeze(x, parity):
    """(batch, channels, h, w) to (batch, channels, places)."""
    return x.flatten(2).index_select(2, _places(*x.shape[2:], parity, x.device))


def _unsqueeze(values, parity, height, width):
    x = values.new_zeros(*values.shape[:-1], height * width)
    return x.index_copy(2, _places(height, width, parity, values.device), values).unflatten(
        2, (height, width)
    )


def _projection(inputs: int, dim: int) -> nn.Sequential:
    """1 x 1, then 3 x 3 for each channel by itself: the latter is all that tells a place from others of equal value."""
    return nn.Sequential(nn.Conv2d(inputs, dim, 1), nn.Conv2d(dim, dim, 3, padding=1, groups=dim))


def _attend(q, k, v, heads):
    """q, k, v (batch, dim, places) to (batch, dim, queries)."""
    q, k, v = (x.unflatten(1, (heads, -1)).mT for x in (q, k, v))
    return linear_softmax_attention(q, k, v).mT.flatten(1, 2)


class ConvolutionalContext(nn.Module):
    """Channel context of MLIC++: convolutions over all earlier slices, to four times the channels of a slice.

    Args:
        previous: channels of all earlier slices.
        slice_channels: of the slice to come.
        hidden: channels between the convolutions.
    """

    def __init__(self, previous: int, slice_channels: int, *, hidden: int = 32):
        super().__init__()
        self.out_channels = 4 * slice_channels
        self.net = nn.Sequential(
            nn.Conv2d(previous, hidden, 3, padding=1), nn.GELU(),
            nn.Conv2d(hidden, self.out_channels, 3, padding=1),
        )  # fmt: skip

    def forward(self, previous: torch.Tensor) -> torch.Tensor:
        """(batch, previous, h, w) to (batch, 4 slice_channels, h, w)."""
        return self.net(previous)


class LinearGlobalInter(nn.Module):
    """Global inter-slice context: linear attention over the places of all earlier slices.

    Args:
        previous: channels of all earlier slices.
        slice_channels: of the slice to come; the context has twice as many.
        dim, heads: of the attention.
    """

    def __init__(self, previous: int, slice_channels: int, *, dim: int = 16, heads: int = 2):
        super().__init__()
        self.out_channels, self.heads = 2 * slice_channels, heads
        self.qkv = _projection(previous, 3 * dim)
        self.out = nn.Conv2d(dim, self.out_channels, 3, padding=1)

    def forward(self, previous: torch.Tensor) -> torch.Tensor:
        """(batch, previous, h, w) to (batch, 2 slice_channels, h, w)."""
        read = _attend(*self.qkv(previous).flatten(2).chunk(3, 1), self.heads)
        return self.out(read.unflatten(-1, previous.shape[2:]))


class LinearGlobalIntra(nn.Module):
    """Global intra-slice context: who resembles whom is learned from the slice before, the values are the slice's own anchors.

    Queries are the non-anchors of the previous slice, keys its anchors, values the anchors of the current one. The non-anchors
    of the current slice are what is to be decoded: they appear nowhere.

    Args:
        slice_channels: of a slice; the context has twice as many.
        dim, heads: of the attention.
    """

    def __init__(self, slice_channels: int, *, dim: int = 16, heads: int = 2):
        super().__init__()
        self.out_channels, self.heads = 2 * slice_channels, heads
        self.query, self.key, self.value = (_projection(slice_channels, dim) for _ in range(3))
        self.out = nn.Conv2d(dim, self.out_channels, 3, padding=1)

    def forward(self, previous: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
        """Two slices (batch, slice_channels, h, w), the current one zero where there is no anchor, to twice the channels."""
        q = _squeeze(self.query(keep(previous, OTHER)), OTHER)
        k = _squeeze(self.key(keep(previous, ANCHOR)), ANCHOR)
        v = _squeeze(self.value(anchors), ANCHOR)
        return self.out(_unsqueeze(_attend(q, k, v, self.heads), OTHER, *anchors.shape[2:]))


class HGCP(nn.Module):
    """Hyperprior-guided global correlation prediction: the first slice has no slice before it, but hyper-parameters.

    Queries are hyper-parameters at the places to be coded, keys those at the other places. Values are, for anchors, hyper-parameters
    at the keys' places; for the others the decoded anchors.

    Args:
        hyper: channels of the hyper-parameters.
        slice_channels: of the slice; the context has twice as many.
        parity: of the places to be coded: 0 for anchors, 1 for the others.
        dim, heads: of the attention.
    """

    def __init__(self, hyper: int, slice_channels: int, parity: int, *, dim: int = 16, heads: int = 2):
        super().__init__()
        self.out_channels, self.heads, self.parity = 2 * slice_channels, heads, parity
        self.query, self.key = _projection(hyper, dim), _projection(hyper, dim)
        self.value = _projection(hyper if parity == ANCHOR else slice_channels, dim)
        self.out = nn.Conv2d(dim, self.out_channels, 3, padding=1)

    def forward(self, hyper: torch.Tensor, anchors: torch.Tensor | None = None) -> torch.Tensor:
        """Hyper-parameters (batch, hyper, h, w) and, for the places between them, anchors (batch, slice_channels, h, w).

        Raises:
            ValueError: anchors for anchors, or none for the others.
        """
        if (anchors is None) != (self.parity == ANCHOR):
            raise ValueError(
                "the anchors' context reads hyper-parameters only, that of the others anchors too"
            )
        values = hyper if anchors is None else anchors
        q = _squeeze(self.query(hyper), self.parity)
        k, v = _squeeze(self.key(hyper), 1 - self.parity), _squeeze(self.value(values), 1 - self.parity)
        return self.out(_unsqueeze(_attend(q, k, v, self.heads), self.parity, *hyper.shape[2:]))


class LocalWindowContext(nn.Module):
    """Attention from a place between anchors to the anchors in a window around it.

    Every place has a window of its own, so windows overlap. A place between anchors has no value yet: its query is a 3 x 3
    convolution of the anchors around it. One more key with score zero and no value stands for "none of them", and keeps a
    place without anchors (in a 1 x 1 image) defined. The weighted values of a window are joined by a matrix for each
    offset, so that with even weights the whole is a convolution of the anchors.

    Args:
        slice_channels: of the slice; the context has twice as many.
        window: side of the window, odd.
        dim, heads: of the attention.
        rope: positions by `lib.attention.RoPE2D` on queries and keys, in place of a learned bias for each offset.

    Raises:
        ValueError: an even window.
    """

    def __init__(
        self, slice_channels: int, *, window: int = 5, dim: int = 16, heads: int = 2, rope: bool = False
    ):
        super().__init__()
        if window % 2 == 0:
            raise ValueError(f"window must be odd, got {window}")
        self.out_channels, self.window, self.heads = 2 * slice_channels, window, heads
        self.query = nn.Conv2d(slice_channels, dim, 3, padding=1)
        self.key, self.value = nn.Conv2d(slice_channels, dim, 1), nn.Conv2d(slice_channels, dim, 1)
        self.rope = RoPE2D(dim // heads) if rope else None
        self.bias = None if rope else nn.Parameter(torch.zeros(heads, window**2 // 2))
        self.join = nn.Conv1d(dim * (window**2 // 2), self.out_channels, 1)

    def weights(self, anchors: torch.Tensor) -> torch.Tensor:
        """How much each place of parity 1 attends to the anchors of its window, (batch, heads, window**2 // 2, places).

        They sum to less than one; the rest is for "none of them".
        """
        height, width = anchors.shape[2:]
        q, k = self.query(anchors), self.key(anchors)
        if self.rope is not None:
            q, k = (self.rope(x.unflatten(1, (self.heads, -1))).flatten(1, 2) for x in (q, k))
        q = _squeeze(q, OTHER).unflatten(1, (self.heads, -1))  # (batch, heads, d, places)
        k, inside = self._windows(k)
        scores = (q.unsqueeze(3) * k).sum(2) / math.sqrt(q.shape[2])
        if self.bias is not None:
            scores = scores + self.bias[:, :, None]
        return F.pad(scores.masked_fill(~inside, -torch.inf), (0, 0, 0, 1)).softmax(2)[:, :, :-1]

    def _windows(self, x):
        """(batch, dim, h, w) to (batch, heads, d, anchors of a window, places of parity 1), and which are inside the image."""
        neighbours, inside = _neighbours(*x.shape[2:], self.window, x.device)
        windows = x.flatten(2).index_select(2, neighbours.flatten()).unflatten(2, neighbours.shape)
        return windows.unflatten(1, (self.heads, -1)), inside

    def forward(self, anchors: torch.Tensor) -> torch.Tensor:
        """(batch, slice_channels, h, w), zero where there is no anchor, to (batch, 2 slice_channels, h, w), zero at anchors."""
        v, _ = self._windows(self.value(anchors))
        read = self.weights(anchors).unsqueeze(2) * v * (self.window**2 // 2)  # as many anchors in a window
        return _unsqueeze(self.join(read.flatten(1, 3)), OTHER, *anchors.shape[2:])


class ContextReweighting(nn.Module):
    """Attention between the channels of one context, and a gate: which channels matter depends on the image.

    softmax(Q K^T / sqrt(n)) V with one row a channel and n places. Both steps are residual and start as the identity.

    Args:
        channels: of the context.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.qkv, self.mix = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)
        self.gate, self.strength = Gate(channels), nn.Parameter(torch.zeros(channels, 1, 1))
        nn.init.zeros_(self.mix.weight)
        nn.init.zeros_(self.mix.bias)

    def forward(self, context: torch.Tensor) -> torch.Tensor:
        """(batch, channels, h, w) to the same shape."""
        q, k, v = self.qkv(context).flatten(2).chunk(3, 1)
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        context = context + self.mix((weights @ v).view_as(context))
        return context + self.strength * self.gate(context)
