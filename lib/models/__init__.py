"""Small networks that several chapters use; trained ones come from `lib.models.zoo`."""

from lib.models.activations import CorrectedActivation, CRReLU, TopK, eafo_correction, eafo_step, topk_linear
from lib.models.bottleneck import Bottleneck, IBRegressor
from lib.models.cnn import CNN
from lib.models.decode import (
    Decoded,
    ancestral_sample,
    beam_search,
    edit_similarity,
    exact_map,
    greedy,
    minimum_bayes_risk,
    select_rows,
    strip_end,
    transform_step,
)
from lib.models.ebv import EBVHead
from lib.models.encoder import Encoded, Encoder
from lib.models.feature_gru import FeatureSequenceGRU
from lib.models.gpt import GPT
from lib.models.gru import Seq2Seq
from lib.models.mixers import MIXERS, MixerLM, SequenceMixer
from lib.models.mixture import BernoulliMixture, ContextTreeWeighting, FiniteMixture
from lib.models.mlp import mlp
from lib.models.mobile import InvertedResidual, MobileNet, SkipBlock
from lib.models.mohd import (
    BlockDiagonal,
    MoHDFFN,
    MoHDLinear,
    Monarch,
    balance_loss,
    grouped_gather_linear,
    route_groups,
)
from lib.models.nonlinearity import ScaledPerceptron, count_nonlinear_ops
from lib.models.relative_noise import RelativeNoise
from lib.models.smoothed import SmoothedLM
from lib.models.soft_vit import SOFTBlock, SOFTViT
from lib.models.spherical_output import SphericalOutput
from lib.models.stages import NameHead, name_head, vit_stages
from lib.models.strip import CGSMM, LSMM, ChannelMixing, StripMLP, TokenMixing, strip_mlp
from lib.models.switching import (
    GenerationTrace,
    SpeculativeTrace,
    entropy_adaptive,
    replay_switching,
    scheduled_switching,
    speculative,
)
from lib.models.transnormer import GLA, SGLU, TransNormer, srms_norm
from lib.models.two_tower import TwoTower, encode_names
from lib.models.unconstrained import UnconstrainedFeatures, fit_ufm
from lib.models.unet import UNet3D
from lib.models.vit import ViT
from lib.models.vlm import VLM

__all__ = [
    "BernoulliMixture",
    "BlockDiagonal",
    "Bottleneck",
    "CGSMM",
    "CNN",
    "CRReLU",
    "ChannelMixing",
    "ContextTreeWeighting",
    "CorrectedActivation",
    "Decoded",
    "EBVHead",
    "Encoded",
    "Encoder",
    "FeatureSequenceGRU",
    "FiniteMixture",
    "GLA",
    "GPT",
    "GenerationTrace",
    "IBRegressor",
    "InvertedResidual",
    "LSMM",
    "MIXERS",
    "MixerLM",
    "MoHDFFN",
    "MoHDLinear",
    "MobileNet",
    "Monarch",
    "NameHead",
    "RelativeNoise",
    "SGLU",
    "SOFTBlock",
    "SOFTViT",
    "ScaledPerceptron",
    "Seq2Seq",
    "SequenceMixer",
    "SkipBlock",
    "SmoothedLM",
    "SpeculativeTrace",
    "SphericalOutput",
    "StripMLP",
    "TokenMixing",
    "TopK",
    "TransNormer",
    "TwoTower",
    "UNet3D",
    "UnconstrainedFeatures",
    "VLM",
    "ViT",
    "ancestral_sample",
    "balance_loss",
    "beam_search",
    "count_nonlinear_ops",
    "eafo_correction",
    "eafo_step",
    "edit_similarity",
    "encode_names",
    "entropy_adaptive",
    "exact_map",
    "fit_ufm",
    "greedy",
    "grouped_gather_linear",
    "minimum_bayes_risk",
    "mlp",
    "name_head",
    "replay_switching",
    "route_groups",
    "scheduled_switching",
    "select_rows",
    "speculative",
    "srms_norm",
    "strip_end",
    "strip_mlp",
    "topk_linear",
    "transform_step",
    "vit_stages",
]
