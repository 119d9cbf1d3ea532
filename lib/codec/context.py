"""What the entropy model of a slice may look at: earlier slices, and the anchors of its own."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class ChannelContext(nn.Module):
    """Adaptive channel-wise context: attention between the channels of all earlier slices.

    Each channel is a query and a key, normalised over the places, so that the c x c weights adapt to the image; two
    convolutions turn the result into parameters of the slice.

    Args:
        previous: channels of all earlier slices.
        slice_channels: of the slice to come; the context has twice as many.
        hidden: channels between the two convolutions.
    """

    def __init__(self, previous: int, slice_channels: int, *, hidden: int = 32):
        super().__init__()
        self.out_channels = 2 * slice_channels
        self.qkv, self.mix = nn.Conv2d(previous, 3 * previous, 1), nn.Conv2d(previous, previous, 1)
        self.temperature = nn.Parameter(torch.ones(()))
        self.head = nn.Sequential(
            nn.Conv2d(previous, hidden, 3, padding=1), nn.GELU(), nn.Conv2d(hidden, self.out_channels, 1)
        )

    def forward(self, previous: torch.Tensor) -> torch.Tensor:
        """(batch, previous, h, w) to (batch, 2 slice_channels, h, w)."""
        q, k, v = self.qkv(previous).flatten(2).chunk(3, 1)
        weights = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * self.temperature).softmax(-1)
        mixed = self.mix((weights @ v).view_as(previous))
        return self.head(previous + mixed)


class GlobalInterContext(nn.Module):
    """Adaptive global inter-slice context: deformable attention over the places of all earlier slices.

    Reference places lie on a grid of every second place. Each is moved by `reach` tanh(offset), the offset made by a small network
    from the queries; keys and values are read there by bilinear interpolation, and every place attends to all of
    them. A learned slope a head lets a weight fall with the distance.

    Args:
        previous: channels of all earlier slices.
        slice_channels: of the slice to come; the context has as many.
        heads: of attention.
        dim: of queries, keys and values.
        reach: how far a reference place may move, in places.
    """

    def __init__(
        self, previous: int, slice_channels: int, *, heads: int = 2, dim: int = 16, reach: float = 2.0
    ):
        super().__init__()
        self.out_channels, self.heads, self.reach = slice_channels, heads, reach
        self.query = nn.Conv2d(previous, dim, 1)
        self.offset = nn.Sequential(
            nn.Conv2d(dim, dim, 3, 2, 1, groups=dim), nn.GELU(), nn.Conv2d(dim, 2, 1, bias=False)
        )
        self.key_value = nn.Conv1d(previous, 2 * dim, 1)
        self.slope = nn.Parameter(torch.linspace(0.0, 1.0, heads))
        self.out = nn.Conv2d(dim, slice_channels, 1)

    def sampling_places(self, q: torch.Tensor) -> torch.Tensor:
        """Where keys and values are read, (batch, points, 2): row and column, in places."""
        offset = self.reach * torch.tanh(self.offset(q))
        rows, columns = (2 * torch.arange(n, device=q.device) + 0.5 for n in offset.shape[2:])
        grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
        return (grid + offset).flatten(2).transpose(1, 2)

    def forward(self, previous: torch.Tensor) -> torch.Tensor:
        """(batch, previous, h, w) to (batch, slice_channels, h, w)."""
        height, width = previous.shape[2:]
        q = self.query(previous)
        places = self.sampling_places(q)
        size = torch.tensor([height, width], dtype=q.dtype, device=q.device)
        grid = (2 * places + 1) / size - 1  # in [-1, 1] between the outer borders
        sampled = F.grid_sample(previous, grid.flip(-1)[:, None], align_corners=False, padding_mode="border")
        k, v = self.key_value(sampled[:, :, 0]).unflatten(1, (2, self.heads, -1)).unbind(1)
        rows, columns = (torch.arange(n, dtype=q.dtype, device=q.device) for n in (height, width))
        own = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).view(1, -1, 2)
        distance = torch.cdist(own.expand(len(q), -1, -1), places)
        scores = q.flatten(2).unflatten(1, (self.heads, -1)).mT @ k / math.sqrt(k.shape[2])
        scores = scores - F.softplus(self.slope).view(-1, 1, 1) * distance[:, None]
        read = (scores.softmax(-1) @ v.mT).mT.flatten(1, 2)
        return self.out(read.unflatten(-1, (height, width)))


class LocalContext(nn.Module):
    """Checkerboard context within a slice: a convolution over the anchors, for the places between them.

    Args:
        slice_channels: of the slice; the context has twice as many.
        kernel: side of the window.
    """

    def __init__(self, slice_channels: int, *, kernel: int = 5):
        super().__init__()
        self.out_channels = 2 * slice_channels
        self.conv = nn.Conv2d(slice_channels, self.out_channels, kernel, padding=kernel // 2)

    def forward(self, anchors: torch.Tensor) -> torch.Tensor:
        """(batch, slice_channels, h, w), zero where there is no anchor, to (batch, 2 slice_channels, h, w)."""
        return self.conv(anchors)


class EntropyParameters(nn.Module):
    """1 x 1 convolutions from contexts to the mean and the standard deviation of a slice.

    Args:
        inputs: channels of all contexts together.
        slice_channels: of the slice.
        hidden: channels between the two convolutions.
    """

    def __init__(self, inputs: int, slice_channels: int, *, hidden: int = 48):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(inputs, hidden, 1), nn.GELU(), nn.Conv2d(hidden, 2 * slice_channels, 1)
        )

    def forward(self, contexts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, inputs, h, w) to mean and scale, each (batch, slice_channels, h, w), in units of the
        channels' spread."""
        mean, log_scale = self.net(contexts).chunk(2, 1)
        return mean, log_scale.clamp(-8, 8).exp()


class LatentResidualPrediction(nn.Module):
    """0.5 tanh(network): a guess of what rounding took away, never more than half a step; it starts at zero.

    Args:
        inputs: channels of hyper means, earlier slices and the current one together.
        slice_channels: of the slice.
        hidden: channels between the two convolutions.
    """

    def __init__(self, inputs: int, slice_channels: int, *, hidden: int = 32):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(inputs, hidden, 3, padding=1), nn.GELU(), nn.Conv2d(hidden, slice_channels, 1)
        )
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * torch.tanh(self.net(x))
