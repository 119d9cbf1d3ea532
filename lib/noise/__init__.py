"""Noise in labels and in sequences, drawn once and known, so that a method against it can be judged."""

from lib.noise.labels import class_dependent_flip, pair_transition, uniform_flip
from lib.noise.sequence import sequence_noise

__all__ = ["class_dependent_flip", "pair_transition", "sequence_noise", "uniform_flip"]
