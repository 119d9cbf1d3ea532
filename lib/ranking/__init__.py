"""Orders: utilities, preferences, ranking losses and metrics."""

from lib.ranking.utility import order_agreement, preference_decomposition

__all__ = [
    "order_agreement",
    "preference_decomposition",
]
