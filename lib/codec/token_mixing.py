"""Simple token mixing: the transform block of MLICv2, and the gate it shares with context reweighting."""

import torch
from torch import nn


class Gate(nn.Module):
    """u * sigmoid(1 x 1 (GELU(3 x 3 a channel (GELU(1 x 1 u))))): a channel's say depends on its surroundings.

    Args:
        dim: channels.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(dim, dim, 1), nn.GELU(), nn.Conv2d(dim, dim, 3, padding=1, groups=dim), nn.GELU(),
            nn.Conv2d(dim, dim, 1),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, dim, h, w) to the same shape."""
        return torch.sigmoid(self.net(x)) * x


class _ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of (batch, dim, h, w)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class SimpleTokenMixing(nn.Module):
    """x + mix(norm(x)), then x + gate(norm(x)); starts as the identity.

    The mixer is a residual block of 3 x 3 convolutions a channel, a 5 x 5 one and a 1 x 1 one.

    Args:
        dim: channels.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.norms = nn.ModuleList(_ChannelNorm(dim) for _ in range(2))
        self.residual = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim), nn.GELU(),
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim),
        )  # fmt: skip
        self.wide = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.point, self.gate = nn.Conv2d(dim, dim, 1), Gate(dim)
        for parameter in (*self.point.parameters(), self.norms[1].weight):
            nn.init.zeros_(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, dim, h, w) to the same shape."""
        u = self.norms[0](x)
        x = x + self.point(self.wide(u + self.residual(u)))
        return x + self.gate(self.norms[1](x))


class ResidualConvolutions(nn.Module):
    """x + 3 x 3 (GELU(3 x 3 x)): the block that token mixing is compared with; starts as the identity.

    Args:
        dim: channels.
        hidden: channels between.
    """

    def __init__(self, dim: int, *, hidden: int | None = None):
        super().__init__()
        hidden = hidden or dim
        self.net = nn.Sequential(
            nn.Conv2d(dim, hidden, 3, padding=1), nn.GELU(), nn.Conv2d(hidden, dim, 3, padding=1)
        )
        for parameter in self.net[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, dim, h, w) to the same shape."""
        return x + self.net(x)
