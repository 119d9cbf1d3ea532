"""Codecs: learned transforms, entropy models, and the coder that makes bytes of them.

Images are float tensors (batch, 3, height, width) in [0, 1]; rates are in bits.
"""

from lib.codec.annealing import (
    Refined,
    annealed_temperature,
    gumbel_round,
    rounding_logits,
    sga_refine,
)
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
from lib.codec.conventional import conventional
from lib.codec.ladder import LADDER, Rung, entropy_ladder, held_out_bits
from lib.codec.likelihood import (
    FactorizedPrior,
    gaussian_bits,
    gaussian_tables,
    scale_index,
    scale_levels,
)
from lib.codec.metrics import bd_rate, ms_ssim, psnr
from lib.codec.mlic import MLICv2, MultiReferenceEntropyModel, replace_groups
from lib.codec.model import LAMBDAS, CodecOutput, ImageCodec, s2lic
from lib.codec.multi_reference import (
    HGCP,
    ContextReweighting,
    ConvolutionalContext,
    LinearGlobalInter,
    LinearGlobalIntra,
    LocalWindowContext,
)
from lib.codec.pretrained import codec_ladder, image_codec
from lib.codec.selective import SelectiveMap, chance_of_nonzero
from lib.codec.slices import SliceEntropyModel
from lib.codec.token_mixing import Gate, ResidualConvolutions, SimpleTokenMixing
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
    "ContextReweighting",
    "ConvolutionalContext",
    "EnhancementBlock",
    "EntropyParameters",
    "FactorizedPrior",
    "Gate",
    "GlobalInterContext",
    "HGCP",
    "ImageCodec",
    "LADDER",
    "LAMBDAS",
    "LatentResidualPrediction",
    "LinearGlobalInter",
    "LinearGlobalIntra",
    "LocalContext",
    "LocalWindowContext",
    "MLICv2",
    "MultiReferenceEntropyModel",
    "Refined",
    "ResidualConvolutions",
    "ResidualSwinV2",
    "Rung",
    "SelectiveMap",
    "SimpleTokenMixing",
    "SliceEntropyModel",
    "SwinV2Block",
    "SymbolDecoder",
    "SymbolEncoder",
    "Synthesis",
    "Tables",
    "WindowAttention",
    "annealed_temperature",
    "bd_rate",
    "chance_of_nonzero",
    "checkerboard",
    "codec_ladder",
    "entropy_ladder",
    "conventional",
    "gaussian_bits",
    "gaussian_tables",
    "gumbel_round",
    "held_out_bits",
    "hyper_analysis",
    "hyper_synthesis",
    "image_codec",
    "integer_frequencies",
    "keep",
    "ms_ssim",
    "pack",
    "principal_start",
    "psnr",
    "replace_groups",
    "rounding_logits",
    "s2lic",
    "scale_index",
    "scale_levels",
    "sga_refine",
    "shift_mask",
    "squeeze",
    "train_codec",
    "unpack",
    "unsqueeze",
]
