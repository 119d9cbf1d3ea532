"""Classes that appear after training, and how to find them."""

from lib.discovery.prototypes import PrototypeClassifier, evaluate_novel

__all__ = ["PrototypeClassifier", "evaluate_novel"]
