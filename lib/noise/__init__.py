"""Label noise, drawn once and known, so that a method against it can be judged."""

from lib.noise.labels import class_dependent_flip, pair_transition, uniform_flip

__all__ = ["class_dependent_flip", "pair_transition", "uniform_flip"]
