"""A vision transformer in stages with softmax-free attention (SOFT, arXiv 2207.03341)."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from lib.attention.softmax_free import SOFTAttention


class SOFTBlock(nn.Module):
    """A post-norm transformer block: x = norm(x + attention(x)), then x = norm(x + mlp(x)).

    Args:
        attention: called as `attention(x, grid)` with x (batch, n, dim) and the grid's height and width.
        dim: the width of the tokens.
        mlp_ratio: the hidden width of the two-layer network, as a multiple of `dim`.
    """

    def __init__(self, attention: nn.Module, dim: int, mlp_ratio: int = 4):
        super().__init__()
        self.attention = attention
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_ratio * dim), nn.GELU(), nn.Linear(mlp_ratio * dim, dim))

    def forward(self, x: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
        """(batch, n, dim) to the same."""
        x = self.norm1(x + self.attention(x, grid))
        return self.norm2(x + self.mlp(x))


class SOFTViT(nn.Module):
    """A pyramid of stages: a strided convolution halves the grid, learned positions are added, blocks follow; mean, linear head.

    The defaults are the widths and depths of SOFT-Tiny. The positions are resized bilinearly to the grid at hand, so an image of another
    size will do. The released network has ordinary softmax attention and a class token in its fourth stage; here every stage
    uses `attention` and the mean over the tokens is read.

    Linear weights start from a normal distribution of standard deviation 0.02, as in the released code.

    Args:
        num_classes: the number of logits.
        in_channels: of the images.
        image_size: height and width that the positions are made for, a multiple of all strides together.
        dims, depths, heads, ratios, conv_sizes: one entry for each stage: the width, the number of blocks, and the arguments of
            `lib.attention.SOFTAttention`.
        strides: by which the convolution before each stage shrinks the grid; the first one's is that of the stem.
        norm: as in `lib.attention.SOFTAttention`.
        mlp_ratio: as in `SOFTBlock`.
        attention: called as `attention(dim, heads, ratio, conv_size)`; makes the attention layer of a block. SOFT by default.

    Raises:
        ValueError: sequences of different lengths, or sizes that do not fit together.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        in_channels: int = 3,
        image_size: int = 224,
        dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (1, 2, 3, 2),
        heads: Sequence[int] = (2, 4, 10, 16),
        ratios: Sequence[int] = (8, 4, 2, 1),
        conv_sizes: Sequence[int] = (9, 5, 3, 3),
        strides: Sequence[int] = (4, 2, 2, 2),
        norm: str = "symmetric",
        mlp_ratio: int = 4,
        attention: Callable[[int, int, int, int], nn.Module] | None = None,
    ):
        super().__init__()
        stages = (dims, depths, heads, ratios, conv_sizes, strides)
        if len({len(each) for each in stages}) != 1 or not dims:
            raise ValueError(
                f"dims, depths, heads, ratios, conv_sizes and strides need one entry for each stage, got {stages}"
            )
        if attention is None:

            def attention(dim, heads, ratio, conv_size):
                return SOFTAttention(dim, heads, ratio, conv_size=conv_size, norm=norm)

        self.embeddings, self.positions, self.stages = nn.ModuleList(), nn.ParameterList(), nn.ModuleList()
        channels, size = in_channels, image_size
        for dim, depth, head, ratio, conv_size, stride in zip(*stages, strict=True):
            if size % stride or (size // stride) % ratio:
                raise ValueError(
                    f"a grid of {size} must be a multiple of its stage's stride {stride} times ratio {ratio}"
                )
            size //= stride
            self.embeddings.append(
                nn.Sequential(
                    nn.Conv2d(channels, dim, max(3, stride), stride=stride, padding=int(stride < 3)),
                    nn.BatchNorm2d(dim),
                    nn.ReLU(),
                )
            )
            self.positions.append(nn.Parameter(0.02 * torch.randn(1, dim, size, size)))
            blocks = [SOFTBlock(attention(dim, head, ratio, conv_size), dim, mlp_ratio) for _ in range(depth)]
            self.stages.append(nn.ModuleList(blocks))
            channels = dim
        self.norm = nn.LayerNorm(channels)
        self.head = nn.Linear(channels, num_classes)
        self.apply(_start_small)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """What the head reads: (batch, channels, height, width) to (batch, dims[-1])."""
        x = images
        for embed, position, blocks in zip(self.embeddings, self.positions, self.stages, strict=True):
            x = embed(x)
            grid = x.shape[-2:]
            if position.shape[-2:] != grid:
                position = nn.functional.interpolate(position, grid, mode="bilinear", align_corners=False)
            x = (x + position).flatten(2).mT  # (batch, n, dim)
            for block in blocks:
                x = block(x, grid)
            x = x.mT.unflatten(-1, grid)
        return self.norm(x.flatten(2).mean(-1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits, (batch, num_classes)."""
        return self.head(self.features(images))


def _start_small(module: nn.Module) -> None:
    """The released code's initialisation: every block starts close to its residual path."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
