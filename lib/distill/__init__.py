"""Distillation: losses that teach one network with the outputs of another, or with its own."""

from lib.distill.normalized import USKD, KDTerms, dkd_loss, kd_decomposition, kd_loss, nkd_loss

__all__ = ["USKD", "KDTerms", "dkd_loss", "kd_decomposition", "kd_loss", "nkd_loss"]
