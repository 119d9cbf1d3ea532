"""The codec: transforms, hyperprior, slices; from images to bytes and back."""

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lib.codec.coder import SymbolDecoder, SymbolEncoder
from lib.codec.container import pack, unpack
from lib.codec.context import ChannelContext, GlobalInterContext
from lib.codec.likelihood import FactorizedPrior, gaussian_bits
from lib.codec.slices import SliceEntropyModel
from lib.codec.transforms import Analysis, Synthesis, hyper_analysis, hyper_synthesis

LAMBDAS = (0.0018, 0.0035, 0.0067, 0.013, 0.025, 0.0483)
MULTIPLE = 64  # 16 by the transform, 4 by the hyper-transform


class CodecOutput(NamedTuple):
    """What `ImageCodec` computes of images.

    Attributes:
        images: the reconstruction, (batch, 3, height, width), not clamped.
        latent_bits: of each image, (batch,).
        hyper_bits: of each image, (batch,).
    """

    images: torch.Tensor
    latent_bits: torch.Tensor
    hyper_bits: torch.Tensor


class ImageCodec(nn.Module):
    """Transform coding with a hyperprior and a slice entropy model.

    Several points of the trade of rate against distortion share one network: each has a gain for every latent channel
    before quantisation and another one after it. A large gain means fine steps.

    Args:
        entropy: the model of the latents; decides the number of channels M and must take 2 M hyper-parameters.
        N: channels of the transforms and of the hyper-latents.
        lambdas: the weights of the squared error, one for each rate point, rising.
        window, depths, heads: of the attention in the transforms.
    """

    def __init__(
        self,
        entropy: SliceEntropyModel,
        N: int,
        *,
        lambdas: Sequence[float] = LAMBDAS,
        window: int = 4,
        depths=(1, 1, 2),
        heads=(2, 4, 4),
    ):
        super().__init__()
        self.M, self.N, self.lambdas = entropy.channels, N, tuple(lambdas)
        self.analysis = Analysis(N, self.M, window=window, depths=depths, heads=heads)
        self.synthesis = Synthesis(N, self.M, window=window, depths=depths, heads=heads)
        self.hyper_analysis, self.hyper_synthesis = hyper_analysis(N, self.M), hyper_synthesis(N, self.M)
        self.prior, self.entropy = FactorizedPrior(N), entropy
        # high-rate theory: d(bits)/d(step) = d(lambda error)/d(step) at step**2 = 18 / (lambda ln 2), in grey values
        start = torch.log(255 * (torch.tensor(self.lambdas) * np.log(2) / 18).sqrt())
        self.log_gain = nn.Parameter(start[:, None].repeat(1, self.M))
        self.log_inverse_gain = nn.Parameter(-start[:, None].repeat(1, self.M))

    def latents(self, images: torch.Tensor, rate) -> torch.Tensor:
        """Latents in units of a quantisation step, (batch, M, height / 16, width / 16).

        Args:
            images: (batch, 3, height, width) in [0, 1], sides divisible by 64.
            rate: index of the rate point, an int or one for each image, (batch,).
        """
        return self.analysis(images) * self._gain(self.log_gain, rate)

    def reconstruct(self, latents: torch.Tensor, rate) -> torch.Tensor:
        """Images from decoded latents, not clamped."""
        return self.synthesis(latents * self._gain(self.log_inverse_gain, rate))

    def hyper_parameters(self, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hyper-latents, not quantised, and the hyper-parameters that their quantised form gives."""
        z = self.hyper_analysis(y / self.entropy.spread)
        return z, self.hyper_synthesis(self.prior.quantise(z))

    def forward(self, images: torch.Tensor, rate=0, *, noise: bool = False) -> CodecOutput:
        """Reconstruction and bits: with noise for training, with rounding otherwise.

        Args:
            images: (batch, 3, height, width) in [0, 1], sides divisible by 64.
            rate: index of the rate point, an int or (batch,).
            noise: measure bits at latents plus uniform noise, which has a gradient; the decoder's latents are rounded either way.
        """
        decoded, latent_bits, hyper_bits = self.code(self.latents(images, rate), noise=noise)
        return CodecOutput(self.reconstruct(decoded, rate), latent_bits, hyper_bits)

    def code(
        self, y: torch.Tensor, *, noise: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Decoded latents for latents (batch, M, h, w), and the bits of latents and hyper-latents, each (batch,)."""
        z, hyper = self.hyper_parameters(y)
        decoded, means, scales = self.entropy(y, hyper)
        if noise:
            residual, z = y + torch.rand_like(y) - 0.5 - means, z + torch.rand_like(z) - 0.5
        else:
            residual, z = torch.round(y - means), self.prior.quantise(z)
        return decoded, self.symbol_bits(residual, scales).sum((1, 2, 3)), self.prior.bits(z).sum((1, 2, 3))

    def symbol_bits(self, residual: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """What each latent costs: `gaussian_bits`, unless a model leaves symbols out."""
        return gaussian_bits(residual, scale)

    def loss(self, images: torch.Tensor, rate) -> torch.Tensor:
        """(bits a pixel + lambda 255**2 MSE) / sqrt(lambda), the mean over images, each with its rate point.

        The division changes no rate point's optimum; it keeps the gradients of the six comparable.
        """
        out = self(images, rate, noise=True)
        error = (out.images - images).square().mean((1, 2, 3))
        return self._weigh(out.latent_bits + out.hyper_bits, error, images.shape[-2:].numel(), rate)

    def latent_loss(self, latents: torch.Tensor, rate) -> torch.Tensor:
        """`loss` with the squared error measured on latents: right where the transforms are orthonormal, and much cheaper.

        Args:
            latents: what `analysis` gives, (batch, M, h, w).
            rate: index of the rate point, an int or (batch,).
        """
        decoded, *bits = self.code(latents * self._gain(self.log_gain, rate), noise=True)
        pixels = 256 * latents.shape[-2:].numel()
        difference = decoded * self._gain(self.log_inverse_gain, rate) - latents
        return self._weigh(sum(bits), difference.square().sum((1, 2, 3)) / (3 * pixels), pixels, rate)

    def _weigh(self, bits, error, pixels, rate):
        weight = torch.as_tensor(self.lambdas, device=bits.device)[rate]
        return ((bits / pixels + weight * 255**2 * error) / weight.sqrt()).mean()

    @torch.no_grad()
    def compress(self, image: torch.Tensor, rate: int = 0) -> bytes:
        """A file with one image, (3, height, width) in [0, 1], of any size.

        Raises:
            ValueError: something that is no image, or a rate point that is not there.
        """
        return self.encode(image, rate)[0]

    @torch.no_grad()
    def encode(self, image: torch.Tensor, rate: int = 0) -> tuple[bytes, torch.Tensor]:
        """`compress`, and the image that the decoder will show, (3, height, width)."""
        if image.ndim != 3 or len(image) != 3 or not image.is_floating_point() or not image.numel():
            raise ValueError(f"an image must be (3, height, width) of floats, got {tuple(image.shape)}")
        self._check_rate(rate)
        height, width = image.shape[1:]
        padded = F.pad(image[None], (0, -width % MULTIPLE, 0, -height % MULTIPLE), mode="replicate")
        with _one_thread():
            y = self.latents(padded, rate)
            z = self.hyper_analysis(y / self.entropy.spread)
        return self.encode_latents(y, z, rate, (height, width))

    @torch.no_grad()
    def encode_latents(
        self, y: torch.Tensor, z: torch.Tensor, rate: int, size: tuple[int, int]
    ) -> tuple[bytes, torch.Tensor]:
        """The file of given latents and hyper-latents, and the image that a decoder shows: they are rounded here.

        Args:
            y, z: (1, M, h, w) and (1, N, h / 4, w / 4), as the transforms would give them.
            rate: index of the rate point.
            size: height and width of the image.

        Raises:
            ValueError: latents that do not fit the size, or a rate point that is not there.
        """
        self._check_rate(rate)
        height, width = size
        h, w = (-(-side // MULTIPLE) for side in size)
        if y.shape != (1, self.M, 4 * h, 4 * w) or z.shape != (1, self.N, h, w):
            raise ValueError(f"latents {tuple(y.shape)} and {tuple(z.shape)} do not fit {size} pixels")
        with _one_thread():
            encoder = SymbolEncoder()
            medians = self.prior.medians().view(-1, 1, 1)
            symbols = torch.round(z - medians)
            channel = torch.arange(self.N)[:, None, None].expand(symbols.shape[1:])
            encoder.push(symbols[0].long().numpy(), channel.numpy(), self.prior.tables())
            decoded = self.entropy.encode(y, self.hyper_synthesis(symbols + medians), encoder)
            shown = self.reconstruct(decoded, rate)[0, :, :height, :width].clamp(0, 1)
        return pack(height, width, rate, [encoder.finish()]), shown

    @torch.no_grad()
    def decompress(self, file: bytes) -> torch.Tensor:
        """The image of a file, (3, height, width) in [0, 1].

        Raises:
            ValueError: a damaged file, or one made by another model.
        """
        height, width, rate, streams = unpack(file)
        self._check_rate(rate)
        if len(streams) != 1:
            raise ValueError(f"this codec writes one stream, the file has {len(streams)}")
        with _one_thread():
            decoder = SymbolDecoder(streams[0])
            h, w = (-(-side // MULTIPLE) for side in (height, width))
            channel = np.broadcast_to(np.arange(self.N)[:, None, None], (self.N, h, w))
            symbols = torch.from_numpy(decoder.pull(channel, self.prior.tables()))[None].float()
            hyper = self.hyper_synthesis(symbols + self.prior.medians().view(-1, 1, 1))
            decoded = self.entropy.decode(hyper, decoder)
            if not decoder.is_finished():
                raise ValueError("the stream does not end where the image does: made by another model?")
            return self.reconstruct(decoded, rate)[0, :, :height, :width].clamp(0, 1)

    def _gain(self, log_gain, rate):
        return log_gain[torch.as_tensor(rate)].exp().view(-1, self.M, 1, 1)

    def _check_rate(self, rate):
        if not isinstance(rate, int) or not 0 <= rate < len(self.lambdas):
            raise ValueError(f"rate must be in 0 ... {len(self.lambdas) - 1}, got {rate!r}")


def s2lic(N: int = 24, M: int = 40, slices: int = 5, *, intra=(), **options) -> ImageCodec:
    """S2LIC (Wang et al. 2024): SwinV2 transforms; channel-wise and global inter-slice contexts; residual prediction.

    Args:
        N, M: channels of the transforms and of the latents; the paper's are 192 and 320.
        slices: of the latents; the paper's are 10.
        intra: contexts of a slice's own anchors; the released model has none.
        options: of `ImageCodec`.
    """
    entropy = SliceEntropyModel(
        M, slices, hyper=2 * M, inter=(ChannelContext, GlobalInterContext), intra=intra
    )
    return ImageCodec(entropy, N, **options)


@contextlib.contextmanager
def _one_thread():
    """Sums in another order would make encoder and decoder disagree: both compute in one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
