"""Optimisers, what they are made of, and the exact dynamics of gradient descent on small convex problems."""

from lib.optim.alignment import Alignment, align_gradients, aligned_backward
from lib.optim.cross_entropy import Generation, cross_entropy_method
from lib.optim.lamb import Lamb, Lookahead
from lib.optim.orthogonal import MUON_COEFFICIENTS, ROOT_COEFFICIENTS, newton_schulz
from lib.optim.perceptron import GradientTrace, Margin, PerceptronTrace, batch_perceptron, logistic_gd, margin

__all__ = [
    "Alignment",
    "Generation",
    "GradientTrace",
    "Lamb",
    "Lookahead",
    "MUON_COEFFICIENTS",
    "Margin",
    "PerceptronTrace",
    "ROOT_COEFFICIENTS",
    "align_gradients",
    "aligned_backward",
    "batch_perceptron",
    "cross_entropy_method",
    "logistic_gd",
    "margin",
    "newton_schulz",
]
