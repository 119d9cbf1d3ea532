"""The transforms of the codec: windows of SwinV2 attention between strided convolutions."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class WindowAttention(nn.Module):
    """Scaled cosine attention within windows, with a bias made from relative coordinates (SwinV2).

    softmax(cos(q, k) / tau + B) v with a learned tau >= 0.01 a head; B comes from a small network on the logarithm of the
    relative coordinates.

    Args:
        dim: channels, divisible by `heads`.
        window: side of a window.
        heads: of attention.
    """

    def __init__(self, dim: int, window: int, heads: int):
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim {dim} is not divisible by {heads} heads")
        self.window, self.heads = window, heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.log_inverse_tau = nn.Parameter(torch.full((heads, 1, 1), math.log(10.0)))
        self.bias = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, heads))
        places = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij"), -1)
        relative = (places.view(-1, 1, 2) - places.view(1, -1, 2)).float()
        logarithmic = relative.sign() * torch.log2(1 + relative.abs()) / 3
        self.register_buffer("coordinates", logarithmic, persistent=False)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """x (windows, places, dim); mask (windows of one image, places, places) bool, True where attention is allowed."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
        scores = scores * self.log_inverse_tau.clamp_max(math.log(100.0)).exp()
        scores = scores + 16 * torch.sigmoid(self.bias(self.coordinates)).permute(2, 0, 1)
        if mask is not None:
            scores = (
                scores.unflatten(0, (-1, len(mask))).masked_fill(~mask[:, None], -torch.inf).flatten(0, 1)
            )
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class SwinV2Block(nn.Module):
    """x + norm(attention(x)), then x + norm(mlp(x)): the norms come last. Both norms start at zero, the block as identity.

    Args:
        dim, window, heads: of the attention.
        shifted: windows displaced by half a window; a mask keeps apart what the roll brings together.
    """

    def __init__(self, dim: int, window: int, heads: int, *, shifted: bool = False):
        super().__init__()
        self.window, self.shift = window, window // 2 if shifted else 0
        self.attention = WindowAttention(dim, window, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        for norm in self.norms:
            nn.init.zeros_(norm.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (batch, height, width, dim), sides divisible by the window; the same shape."""
        height, width, w = x.shape[1], x.shape[2], self.window
        if height % w or width % w:
            raise ValueError(f"sides must be divisible by the window {w}, got {height} x {width}")
        shifted = x.roll((-self.shift, -self.shift), (1, 2)) if self.shift else x
        mask = shift_mask(height, width, w, self.shift, x.device) if self.shift else None
        parts = self.attention(to_windows(shifted, w), mask)
        parts = parts.view(-1, height // w, width // w, w, w, x.shape[-1]).transpose(2, 3).reshape(x.shape)
        x = x + self.norms[0](parts.roll((self.shift, self.shift), (1, 2)) if self.shift else parts)
        return x + self.norms[1](self.mlp(x))


def to_windows(x: torch.Tensor, window: int) -> torch.Tensor:
    """(batch, height, width, dim) to (batch * windows, window**2, dim)."""
    batch, height, width, dim = x.shape
    x = x.view(batch, height // window, window, width // window, window, dim)
    return x.transpose(2, 3).reshape(-1, window**2, dim)


def shift_mask(height: int, width: int, window: int, shift: int, device=None) -> torch.Tensor:
    """Which pairs of a rolled image's windows were neighbours before the roll, (windows, window**2, window**2) bool."""

    def regions(side):
        place = torch.arange(side, device=device)
        return (place >= side - window).long() + (place >= side - shift).long()

    labels = 3 * regions(height)[:, None] + regions(width)
    labels = to_windows(labels[None, ..., None], window)[..., 0]
    return labels[:, :, None] == labels[:, None]


class ResidualSwinV2(nn.Module):
    """Several blocks, every second one shifted, and a path around them.

    Args:
        dim, window, heads: of the blocks.
        depth: how many; with one nothing is ever shifted.
    """

    def __init__(self, dim: int, depth: int, window: int, heads: int):
        super().__init__()
        self.blocks = nn.ModuleList(SwinV2Block(dim, window, heads, shifted=i % 2 == 1) for i in range(depth))
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (batch, dim, height, width); the same shape."""
        y = x.permute(0, 2, 3, 1)
        for block in self.blocks:
            y = block(y)
        return x + self.conv(y.permute(0, 3, 1, 2))


class EnhancementBlock(nn.Module):
    """x + 0.2 dense(x): a densely connected block whose last layer starts at zero.

    Args:
        channels: of the image.
        growth: channels that each layer adds.
        layers: before the last.
    """

    def __init__(self, channels: int = 3, *, growth: int = 8, layers: int = 2):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Conv2d(channels + i * growth, growth, 3, padding=1) for i in range(layers)
        )
        self.last = nn.Conv2d(channels + layers * growth, channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (batch, channels, height, width); the same shape."""
        features = x
        for layer in self.layers:
            features = torch.cat([features, F.leaky_relu(layer(features), 0.2)], 1)
        return x + 0.2 * self.last(features)


class Analysis(nn.Sequential):
    """Image (batch, 3, h, w) to latents (batch, M, h / 16, w / 16): four strided convolutions, attention between them.

    Args:
        N, M: channels inside and of the latents.
        window, depths, heads: of the three residual SwinV2 groups, from fine to coarse.
    """

    def __init__(self, N: int, M: int, *, window: int = 4, depths=(1, 1, 2), heads=(2, 4, 4)):
        groups = [ResidualSwinV2(N, d, window, h) for d, h in zip(depths, heads, strict=True)]
        convolutions = [nn.Conv2d(3, N, 5, 2, 2)] + [nn.Conv2d(N, c, 3, 2, 1) for c in (N, N, M)]
        super().__init__(
            EnhancementBlock(), convolutions[0], groups[0], convolutions[1], groups[1], convolutions[2],
            groups[2], convolutions[3],
        )  # fmt: skip


class Synthesis(nn.Sequential):
    """Latents to image, the mirror of `Analysis`; its last convolution makes four pixels of each place."""

    def __init__(self, N: int, M: int, *, window: int = 4, depths=(1, 1, 2), heads=(2, 4, 4)):
        groups = [ResidualSwinV2(N, d, window, h) for d, h in zip(depths, heads, strict=True)]
        up = [nn.ConvTranspose2d(c, N, 3, 2, 1, output_padding=1) for c in (M, N, N)]
        super().__init__(
            up[0], groups[2], up[1], groups[1], up[2], groups[0], nn.Conv2d(N, 12, 3, padding=1), nn.PixelShuffle(2),
            EnhancementBlock(),
        )  # fmt: skip


class Magnitude(nn.Module):
    """|x|: the size of a latent tells about its neighbours' sizes, its sign does not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.abs()


def hyper_analysis(N: int, M: int) -> nn.Sequential:
    """Latents (batch, M, h, w), of which it sees the magnitudes, to hyper-latents (batch, N, h / 4, w / 4)."""
    net = nn.Sequential(
        Magnitude(), nn.Conv2d(M, N, 3, padding=1), nn.GELU(), nn.Conv2d(N, N, 3, 2, 1), nn.GELU(),
        nn.Conv2d(N, N, 3, 2, 1),
    )  # fmt: skip
    with torch.no_grad():
        net[-1].weight *= 4  # hyper-latents that all round to zero would tell, and learn, nothing
    return net


def hyper_synthesis(N: int, M: int) -> nn.Sequential:
    """Hyper-latents to hyper-parameters (batch, 2 M, 4 h, 4 w): means' half first."""
    return nn.Sequential(
        nn.ConvTranspose2d(N, N, 3, 2, 1, output_padding=1), nn.GELU(),
        nn.ConvTranspose2d(N, N, 3, 2, 1, output_padding=1), nn.GELU(), nn.Conv2d(N, 2 * M, 3, padding=1),
    )  # fmt: skip


@torch.no_grad()
def principal_start(analysis: Analysis, synthesis: Synthesis, images: torch.Tensor) -> None:
    """Set the convolutions to a tree of principal components, so that training starts from a good linear codec.

    Each strided convolution becomes the projection of its 2 x 2 input places on their leading principal components, the
    synthesis the transpose; everything else starts as the identity.

    Args:
        analysis, synthesis: as constructed.
        images: (batch, 3, height, width), from which the components are computed.
    """
    down = [layer for layer in analysis if isinstance(layer, nn.Conv2d)]
    up = [layer for layer in synthesis if isinstance(layer, nn.ConvTranspose2d | nn.Conv2d)][::-1]
    x = images
    for level, (forward, backward) in enumerate(zip(down, up, strict=True)):
        patches = F.unfold(x, 2, stride=2).transpose(1, 2).flatten(0, 1)  # (n, 4 channels), channel-major
        mean = patches.mean(0)
        _, _, components = torch.linalg.svd(patches - mean, full_matrices=False)
        kept = components[: forward.out_channels]
        kernels = kept.view(-1, x.shape[1], 2, 2)
        first = forward.kernel_size[0] // 2
        nn.init.zeros_(forward.weight)
        nn.init.zeros_(forward.bias)
        forward.weight[: len(kept), :, first : first + 2, first : first + 2] = kernels
        forward.bias[: len(kept)] = -kept @ mean
        nn.init.zeros_(backward.weight)
        if level == 0:  # the last layer of the synthesis: channels are (3, 2, 2)
            backward.weight[:, : len(kept), 1, 1] = kept.T
            backward.bias.copy_(mean)
        else:
            backward.weight[: len(kept), :, 1:3, 1:3] = kernels
            backward.bias.copy_(mean.view(-1, 4).mean(1))
        x = forward(x)
