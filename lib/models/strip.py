"""Strip-MLP: linear maps along the rows and columns of feature maps that also read the neighbouring rows and columns."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn


class StripMLP(nn.Module):
    """A full linear map along each row, which reads a strip of rows; or the same along columns (arXiv:2307.11458).

    Row h of channel c is `y[h] = sum_r x[h + r] W[c, r] + b[c]` with r from -(width // 2) to width // 2 and zeros outside the
    map. Channel c = a * C2 + g lies in patch a of `groups` patches of C2 channels; the weights depend on g alone, so that
    the patches share them. Width 1 is the ordinary row or column MLP.

    Args:
        channels: of the maps, a multiple of `groups`.
        size: height and width of the maps; the weights have this size built in.
        axis: `"row"` or `"col"`.
        groups: the number of patches that share weights.
        width: rows (or columns) in a strip, odd.

    Attributes:
        weight: (channels / groups, width, size, size), the last two as input, output.
        bias: (channels / groups, size), one number for each place along the row.

    Raises:
        ValueError: sizes below 1, an even width, an unknown axis, channels that `groups` does not divide.
    """

    def __init__(self, channels: int, size: int, axis: str = "row", *, groups: int = 4, width: int = 3):
        super().__init__()
        _check_sizes(channels=channels, size=size, groups=groups, width=width)
        if channels % groups:
            raise ValueError(f"groups must divide channels={channels}, got {groups}")
        if width % 2 == 0:
            raise ValueError(f"width must be odd, got {width}")
        if axis not in ("row", "col"):
            raise ValueError(f"axis must be 'row' or 'col', got {axis!r}")
        self.channels, self.size, self.axis, self.groups, self.width = channels, size, axis, groups, width
        bound = (width * size) ** -0.5  # as in torch.nn.Linear with width * size inputs
        inner = channels // groups
        self.weight = nn.Parameter(torch.empty(inner, width, size, size).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(inner, size).uniform_(-bound, bound))

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """(n, channels, size, size) to the same shape.

        Raises:
            ValueError: maps of another shape; nothing is interpolated.
        """
        _check_maps(maps, self.channels, self.size)
        inner, size, reach = self.channels // self.groups, self.size, self.width // 2
        if self.axis == "col":
            maps = maps.transpose(2, 3)
        padded = F.pad(maps, (0, 0, reach, reach))
        strips = torch.cat([padded[:, :, r : r + size] for r in range(self.width)], 3)
        # one matrix product for each index within a patch
        strips = strips.unflatten(1, (self.groups, inner)).permute(2, 0, 1, 3, 4)
        mixed = torch.baddbmm(self.bias.unsqueeze(1), strips.flatten(1, 3), self.weight.flatten(1, 2))
        mixed = mixed.view(inner, -1, self.groups, size, size).permute(1, 2, 0, 3, 4).flatten(1, 2)
        return mixed.transpose(2, 3) if self.axis == "col" else mixed

    def extra_repr(self) -> str:
        return f"{self.channels}, {self.size}, {self.axis!r}, groups={self.groups}, width={self.width}"


class DiagonalPosition(nn.Module):
    """The learned positions of Strip-MLP: a vector for each difference of column and row index, added to the maps.

    Args:
        channels: of the maps.
        size: height and width.
    """

    def __init__(self, channels: int, size: int):
        super().__init__()
        self.table = nn.Parameter(nn.init.trunc_normal_(torch.empty(channels, 2 * size - 1), std=0.02))
        place = torch.arange(size)
        self.register_buffer("index", place - place.unsqueeze(1) + size - 1, persistent=False)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """(n, channels, size, size) plus the positions."""
        return maps + self.table[:, self.index]


class CGSMM(nn.Module):
    """Cascade group strip mixing: a row strip layer, a fusion with the input, a column strip layer, another fusion.

    Args:
        channels, size, groups, width: as in `StripMLP`.

    Raises:
        ValueError: as in `StripMLP`.
    """

    def __init__(self, channels: int, size: int, *, groups: int = 4, width: int = 3):
        super().__init__()
        self.row = StripMLP(channels, size, "row", groups=groups, width=width)
        self.col = StripMLP(channels, size, "col", groups=groups, width=width)
        self.row_position = DiagonalPosition(channels, size)
        self.col_position = DiagonalPosition(channels, size)
        self.fuse_row = nn.Conv2d(2 * channels, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.fuse_col = nn.Conv2d(2 * channels, channels, 1, bias=False)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """(n, channels, size, size) to the same shape."""
        rows = self.row(self.row_position(maps))
        rows = F.gelu(self.norm(self.fuse_row(torch.cat([rows, maps], 1))))
        columns = self.col(self.col_position(rows))
        return self.fuse_col(torch.cat([maps, columns], 1))


class LSMM(nn.Module):
    """Local strip mixing: depthwise 3 x 7 and 7 x 3 convolutions and the input, weighted per channel by a softmax.

    Args:
        channels: of the maps, at least 2.

    Raises:
        ValueError: fewer than 2 channels.
    """

    def __init__(self, channels: int):
        super().__init__()
        if channels < 2:
            raise ValueError(f"channels must be at least 2, got {channels}")
        self.wide = nn.Conv2d(channels, channels, (3, 7), padding=(1, 3), groups=channels, bias=False)
        self.tall = nn.Conv2d(channels, channels, (7, 3), padding=(3, 1), groups=channels, bias=False)
        self.weigh = nn.Sequential(
            nn.Linear(channels, channels // 2), nn.GELU(), nn.Linear(channels // 2, 3 * channels)
        )

    def branches(self, maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The three branches (n, channels, 3, h, w) and their weights (n, channels, 3), which sum to one."""
        branches = torch.stack([self.tall(maps), self.wide(maps), maps], 2)
        logits = self.weigh(branches.sum(2).mean((2, 3)))
        return branches, logits.unflatten(1, (-1, 3)).softmax(2)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """(n, channels, h, w) to the same shape."""
        branches, weights = self.branches(maps)
        return (branches * weights[..., None, None]).sum(2)


class TokenMixing(nn.Module):
    """The token mixing of a Strip-MLP block: a depthwise 3 x 3, a 1 x 1, half of the channels to each mixer, a 1 x 1.

    Args:
        channels: of the maps, even where there are two mixers.
        size: height and width of the maps.
        groups, width: of the strip layers; `groups` divides the channels of the global mixer.
        mixers: `"both"`, or for an ablation `"global"` (`CGSMM` on all channels) or `"local"` (`LSMM` on all).

    Raises:
        ValueError: other mixers, an odd number of channels, or as in `StripMLP`.
    """

    def __init__(self, channels: int, size: int, *, groups: int = 4, width: int = 3, mixers: str = "both"):
        super().__init__()
        if mixers not in ("both", "global", "local"):
            raise ValueError(f"mixers must be 'both', 'global' or 'local', got {mixers!r}")
        if mixers == "both" and channels % 2:
            raise ValueError(f"channels must be even, got {channels}")
        part = channels // 2 if mixers == "both" else channels
        self.before = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.GELU(),
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
            nn.Conv2d(channels, channels, 1),
            nn.BatchNorm2d(channels),
            nn.GELU(),
        )
        made = []
        if mixers != "local":
            made.append(CGSMM(part, size, groups=groups, width=width))
        if mixers != "global":
            made.append(LSMM(part))
        self.mixers = nn.ModuleList(made)
        self.fuse = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """(n, channels, size, size) to the same shape."""
        parts = self.before(maps).chunk(len(self.mixers), 1)
        return self.fuse(torch.cat([mixer(part) for mixer, part in zip(self.mixers, parts, strict=True)], 1))


class ChannelMixing(nn.Module):
    """Depthwise convolution, layer norm, a hidden layer with GELU and global response normalisation.

    The last maps each hidden channel x to `gamma * x * G / mean(G) + beta + x`, where G is the channel's norm over the map
    and the mean runs over channels.

    Args:
        channels: of the maps.
        alpha: how many times wider the hidden layer is.
        kernel_size: of the depthwise convolution, odd; None leaves it out.

    Raises:
        ValueError: sizes below 1 or an even kernel.
    """

    def __init__(self, channels: int, alpha: int = 3, *, kernel_size: int | None = 7):
        super().__init__()
        _check_sizes(channels=channels, alpha=alpha, kernel_size=kernel_size or 1)
        if kernel_size and kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        self.spread = (
            nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=False)
            if kernel_size
            else nn.Identity()
        )
        self.norm = nn.LayerNorm(channels)
        self.widen = nn.Linear(channels, alpha * channels)
        self.gamma = nn.Parameter(torch.zeros(alpha * channels))
        self.beta = nn.Parameter(torch.zeros(alpha * channels))
        self.narrow = nn.Linear(alpha * channels, channels)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """(n, channels, h, w) to the same shape."""
        hidden = F.gelu(self.widen(self.norm(self.spread(maps).permute(0, 2, 3, 1))))
        response = hidden.square().sum((1, 2), keepdim=True)
        # the gradient of a square root at 0 is infinite, and a channel may be silent
        response = response.clamp_min(torch.finfo(hidden.dtype).tiny).sqrt()
        hidden = self.gamma * hidden * response / (response.mean(3, keepdim=True) + 1e-6) + self.beta + hidden
        return self.narrow(hidden).permute(0, 3, 1, 2)


class StripNet(nn.Module):
    """Patches, stages of mixing blocks with 2 x 2 merging between them, mean over the map, linear classifier.

    What a merging gives is also carried past the following stages, by depthwise 2 x 2 convolutions of stride 2, and added to
    the input of each later stage. `strip_mlp` makes one.
    """

    def __init__(
        self, in_channels, num_classes, dims, depths, size, patch, token_mixing, kernel_size, drop_path
    ):
        super().__init__()
        _check_sizes(in_channels=in_channels, num_classes=num_classes, patch=patch)
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must be in [0, 1), got {drop_path}")
        if not dims or len(dims) != len(depths):
            raise ValueError(f"dims and depths must have one entry for each stage, got {dims} and {depths}")
        if size % (patch * 2 ** (len(dims) - 1)):
            raise ValueError(
                f"size must be a multiple of patch * 2 ** (stages - 1) = {patch * 2 ** (len(dims) - 1)}, got {size}"
            )
        if any(wide % narrow for narrow, wide in zip(dims[1:-1], dims[2:], strict=True)):
            raise ValueError(f"from the second on, dims must be multiples of the one before, got {dims}")
        self.patches = nn.Conv2d(in_channels, dims[0], patch, patch, bias=False)
        self.stages = nn.ModuleList()
        for stage, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            side = size // patch // 2**stage
            self.stages.append(
                nn.ModuleList(
                    nn.ModuleList([token_mixing(dim, side), ChannelMixing(dim, kernel_size=kernel_size)])
                    for _ in range(depth)
                )
            )
        self.merges = nn.ModuleList(
            nn.Conv2d(narrow, wide, 2, 2, bias=False) for narrow, wide in zip(dims, dims[1:], strict=False)
        )
        self.carriers = nn.ModuleList(
            nn.ModuleList(
                nn.Conv2d(dims[stage - 1], dims[stage], 2, 2, groups=dims[stage - 1], bias=False)
                for _ in range(stage - 1)
            )
            for stage in range(1, len(dims))
        )
        self.norm = nn.BatchNorm2d(dims[-1])
        self.head = nn.Linear(dims[-1], num_classes)
        self.drop_path = drop_path

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(n, in_channels, size, size) to logits (n, num_classes)."""
        maps, carried = self.patches(images), []
        for stage, blocks in enumerate(self.stages):
            if stage:
                merged = self.merges[stage - 1](maps)
                carriers = self.carriers[stage - 1]
                carried = [carry(old) for carry, old in zip(carriers, carried, strict=True)]
                maps = sum(carried, merged)
                carried.append(merged)
            for block in blocks:
                for mixing in block:
                    maps = maps + self._drop(mixing(maps))
        return self.head(self.norm(maps).mean((2, 3)))

    def _drop(self, change):
        if not self.training or not self.drop_path:
            return change
        keep = torch.rand(len(change), 1, 1, 1, device=change.device) >= self.drop_path
        return change * keep / (1 - self.drop_path)


def strip_mlp(
    in_channels: int,
    num_classes: int,
    dims: Sequence[int],
    depths: Sequence[int],
    size: int,
    patch: int,
    *,
    token_mixing: Callable[[int, int], nn.Module] = TokenMixing,
    kernel_size: int | None = 7,
    drop_path: float = 0.0,
) -> StripNet:
    """A Strip-MLP network; the paper's Tiny is `strip_mlp(3, 1000, (80, 160, 320, 640), (2, 2, 12, 2), 224, 4)`.

    Args:
        in_channels: of the images.
        num_classes: the number of logits.
        dims, depths: channels and blocks of each stage; a merging halves the maps between stages.
        size: height and width of the images, a multiple of `patch * 2 ** (stages - 1)`.
        patch: height and width of a patch.
        token_mixing: makes the token mixing of a block from its channels and the size of its maps.
        kernel_size: of the channel mixing's depthwise convolution; None leaves it out.
        drop_path: the probability, in training, that an example skips a mixing.

    Raises:
        ValueError: sizes that do not fit together.
    """
    return StripNet(
        in_channels, num_classes, list(dims), list(depths), size, patch, token_mixing, kernel_size, drop_path
    )  # fmt: skip


def _check_sizes(**sizes):
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _check_maps(maps, channels, size):
    if maps.ndim != 4 or maps.shape[1:] != (channels, size, size):
        raise ValueError(f"maps must be (n, {channels}, {size}, {size}), got {tuple(maps.shape)}")
