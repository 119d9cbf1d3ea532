"""Looking into a trained network: which of its neurons speak, and what depends on what."""

from lib.interp.conflict import gradient_conflict
from lib.interp.flow import ActivationFlow, activation_flow
from lib.interp.sparsity import LayerSparsity, activation_sparsity
from lib.interp.support import jacobian_support

__all__ = [
    "ActivationFlow",
    "LayerSparsity",
    "activation_flow",
    "activation_sparsity",
    "gradient_conflict",
    "jacobian_support",
]
