"""Adversarial examples: perturbations that are small to the eye and large to the loss."""

from lib.attacks.gradient import bim, fgsm, pgd
from lib.attacks.minimal import cw_l2, deepfool

__all__ = ["bim", "cw_l2", "deepfool", "fgsm", "pgd"]
