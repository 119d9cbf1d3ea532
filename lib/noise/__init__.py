"""Noise in labels and in sequences, drawn once and known, so that a method against it can be judged; votes of a crowd."""

from lib.noise.crowd import aggregate, majority_vote, normalised, softmax_counts, wawa, zero_based_skill
from lib.noise.crowd_models import dawid_skene, glad, mace
from lib.noise.labels import class_dependent_flip, pair_transition, uniform_flip
from lib.noise.sequence import sequence_noise

__all__ = [
    "aggregate",
    "class_dependent_flip",
    "dawid_skene",
    "glad",
    "mace",
    "majority_vote",
    "normalised",
    "pair_transition",
    "sequence_noise",
    "softmax_counts",
    "uniform_flip",
    "wawa",
    "zero_based_skill",
]
