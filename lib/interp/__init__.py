"""What happens inside a trained network: which of its neurons speak, and how often."""

from lib.interp.sparsity import LayerSparsity, activation_sparsity

__all__ = ["LayerSparsity", "activation_sparsity"]
