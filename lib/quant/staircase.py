"""A cache of keys and values that spends fewer bits on what is older."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass
class Quantised:
    """Groups of numbers as integers: value = low + code * span / (2 ** bits - 1).

    `codes` is packed, uint8 (..., bytes), each byte with 8 / bits numbers; `low` and `span` are float16, one for each group.
    """

    codes: torch.Tensor
    low: torch.Tensor
    span: torch.Tensor
    bits: int
    shape: torch.Size
    dim: int

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and of both numbers of each group."""
        return sum(x.numel() * x.element_size() for x in (self.codes, self.low, self.span))

    def dequantise(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The numbers, in the shape and order in which they came."""
        codes = _unpack(self.codes, self.bits, self._grouped())
        step = self.span.to(dtype) / (2**self.bits - 1)
        grouped = self.low.to(dtype).unsqueeze(-1) + codes * step.unsqueeze(-1)
        return grouped.flatten(-2).transpose(self.dim, -1)

    def requantise(self, bits: int) -> "Quantised":
        """Fewer bits, from the integers that are there: the numbers that they came from are gone."""
        ratio = (2**bits - 1) / (2**self.bits - 1)
        codes = (_unpack(self.codes, self.bits, self._grouped()) * ratio).round().to(torch.uint8)
        return Quantised(_pack(codes, bits), self.low, self.span, bits, self.shape, self.dim)

    def _grouped(self):
        return *self.low.shape, self.shape[self.dim] // self.low.shape[-1]


def quantise(x: torch.Tensor, bits: int, *, group: int, dim: int = -1) -> Quantised:
    """Round to 2 ** bits even steps between the smallest and the largest number of each group.

    Args:
        x: (..., tokens, channels).
        bits: 1, 2, 4 or 8.
        group: how many neighbours along `dim` share a range.
        dim: -1 groups the channels of one token, -2 the tokens of one channel.

    Raises:
        ValueError: other bits or dimensions, a length along `dim` that `group` does not divide, groups that do not fill
            bytes, or numbers beyond the range of float16.
    """
    if bits not in (1, 2, 4, 8):
        raise ValueError(f"bits must be 1, 2, 4 or 8, got {bits}")
    if dim not in (-1, -2):
        raise ValueError(f"dim must be -1 or -2, got {dim}")
    if group < 1 or x.shape[dim] % group or group * bits % 8:
        raise ValueError(
            f"group must divide the length {x.shape[dim]} along {dim} and fill bytes of {bits}-bit codes, got {group}"
        )
    grouped = x.transpose(dim, -1).unflatten(-1, (-1, group))
    low, high = grouped.amin(-1).half(), grouped.amax(-1).half()
    span = high - low
    if not (low.isfinite().all() and span.isfinite().all()):
        raise ValueError("numbers and their ranges must be finite and within float16")
    step = span.to(x.dtype).unsqueeze(-1) / (2**bits - 1)
    codes = (grouped - low.to(x.dtype).unsqueeze(-1)) / step.where(step > 0, 1.0)
    codes = codes.round().clamp(0, 2**bits - 1).to(torch.uint8)
    return Quantised(_pack(codes, bits), low, span, bits, x.shape, dim)


class StaircaseKVCache:
    """Keys and values in windows of tokens, each quantised more coarsely the older it gets.

    The newest tokens, fewer than `window`, stay as they came. A full window goes to the first stair, and every window
    before it one stair down, where it is quantised again out of the codes it has. The last stair keeps all that reach it.
    Keys share a range along tokens, one for each channel and `group` tokens; values along channels, as in KIVI.

    Source: Li (2024), arXiv 2410.18441, on the framework of Liu et al., KIVI (2024).

    Args:
        stairs: bits of each stair, from the newest.
        window: tokens in a window.
        group: numbers that share a range. It must divide the window and the channels.

    Raises:
        ValueError: no stairs, bits that increase or are not 1, 2, 4 or 8, or a group that does not divide the window.
    """

    def __init__(self, stairs: Sequence[int] = (8, 4, 2), *, window: int = 32, group: int = 32):
        if not stairs or list(stairs) != sorted(stairs, reverse=True) or not set(stairs) <= {1, 2, 4, 8}:
            raise ValueError(
                f"stairs must be bits of 8, 4, 2, 1, none more than the one before, got {stairs}"
            )
        if window < 1 or group < 1 or window % group:
            raise ValueError(f"group must divide window, got {group} and {window}")
        self.stairs, self.window, self.group = tuple(stairs), window, group
        self.windows: list[tuple[Quantised, Quantised]] = []  # from the oldest
        self.recent: tuple[torch.Tensor, torch.Tensor] | None = None

    def __len__(self) -> int:
        recent = 0 if self.recent is None else self.recent[0].shape[-2]
        return len(self.windows) * self.window + recent

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Add tokens: k and v (..., new, dim) each, with the leading dimensions of what is there.

        Raises:
            ValueError: different numbers of tokens, or as `quantise`.
        """
        if k.shape[-2] != v.shape[-2]:
            raise ValueError(f"k and v must have the same tokens, got {tuple(k.shape)} and {tuple(v.shape)}")
        if self.recent is not None:
            k, v = (torch.cat([old, new], -2) for old, new in zip(self.recent, (k, v), strict=True))
        while k.shape[-2] >= self.window:
            self._descend(k[..., : self.window, :], v[..., : self.window, :])
            k, v = k[..., self.window :, :], v[..., self.window :, :]
        self.recent = k.clone(), v.clone()  # not a view of what was quantised

    def _descend(self, k, v):
        for age in range(1, len(self.stairs)):
            if age <= len(self.windows):
                pair = self.windows[-age]
                self.windows[-age] = tuple(part.requantise(self.stairs[age]) for part in pair)
        newest = quantise(k, self.stairs[0], group=self.group, dim=-2)
        self.windows.append((newest, quantise(v, self.stairs[0], group=self.group, dim=-1)))

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values, (..., tokens, dim), as far as they are left.

        Raises:
            ValueError: nothing was added.
        """
        if self.recent is None:
            raise ValueError("the cache is empty")
        parts = [[part.dequantise(self.recent[0].dtype) for part in pair] for pair in self.windows]
        k, v = (torch.cat(column, -2) for column in zip(*parts, self.recent, strict=True))
        return k, v

    @property
    def nbytes(self) -> int:
        """What is stored, in bytes: codes, ranges and the recent tokens."""
        recent = () if self.recent is None else self.recent
        held = sum(x.numel() * x.element_size() for x in recent)
        return held + sum(part.nbytes for pair in self.windows for part in pair)


def _pack(codes, bits):
    places = torch.arange(0, 8, bits, device=codes.device)
    spread = codes.flatten(-2).unflatten(-1, (-1, 8 // bits)).to(torch.int32) << places
    return spread.sum(-1).to(torch.uint8)


def _unpack(packed, bits, shape):
    places = torch.arange(0, 8, bits, device=packed.device)
    return ((packed.to(torch.int32).unsqueeze(-1) >> places) & (2**bits - 1)).reshape(shape)
