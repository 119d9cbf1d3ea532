"""Losses, in the manner of `torch.nn.functional`."""

from lib.losses.linear import CutCrossEntropyStats, indexed_neg_dot, linear_cross_entropy

__all__ = ["CutCrossEntropyStats", "indexed_neg_dot", "linear_cross_entropy"]
