"""Codecs: learned transforms, entropy models, and the coder that makes bytes of them.

Images are float tensors (batch, 3, height, width) in [0, 1]; rates are in bits.
"""

from lib.codec.checkerboard import checkerboard, keep, squeeze, unsqueeze
from lib.codec.coder import SymbolDecoder, SymbolEncoder, Tables, integer_frequencies
from lib.codec.container import Container, pack, unpack
from lib.codec.context import (
    ChannelContext,
    EntropyParameters,
    GlobalInterContext,
    LatentResidualPrediction,
    LocalContext,
)
from lib.codec.likelihood import (
    FactorizedPrior,
    gaussian_bits,
    gaussian_tables,
    scale_index,
    scale_levels,
)
from lib.codec.metrics import bd_rate, ms_ssim, psnr
from lib.codec.model import LAMBDAS, CodecOutput, ImageCodec, s2lic
from lib.codec.pretrained import image_codec
from lib.codec.slices import SliceEntropyModel
from lib.codec.training import train_codec
from lib.codec.transforms import (
    Analysis,
    EnhancementBlock,
    ResidualSwinV2,
    SwinV2Block,
    Synthesis,
    WindowAttention,
    hyper_analysis,
    hyper_synthesis,
    principal_start,
    shift_mask,
)

__all__ = [
    "Analysis",
    "ChannelContext",
    "CodecOutput",
    "Container",
    "EnhancementBlock",
    "EntropyParameters",
    "FactorizedPrior",
    "GlobalInterContext",
    "ImageCodec",
    "LAMBDAS",
    "LatentResidualPrediction",
    "LocalContext",
    "ResidualSwinV2",
    "SliceEntropyModel",
    "SwinV2Block",
    "SymbolDecoder",
    "SymbolEncoder",
    "Synthesis",
    "Tables",
    "WindowAttention",
    "bd_rate",
    "checkerboard",
    "gaussian_bits",
    "gaussian_tables",
    "hyper_analysis",
    "hyper_synthesis",
    "image_codec",
    "integer_frequencies",
    "keep",
    "ms_ssim",
    "pack",
    "principal_start",
    "psnr",
    "s2lic",
    "scale_index",
    "scale_levels",
    "shift_mask",
    "squeeze",
    "train_codec",
    "unpack",
    "unsqueeze",
]
