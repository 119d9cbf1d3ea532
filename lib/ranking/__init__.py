"""Orders: utilities, preferences, ranking losses and metrics."""

from lib.ranking.bleu import corpus_bleu
from lib.ranking.utility import order_agreement, preference_decomposition

__all__ = [
    "corpus_bleu",
    "order_agreement",
    "preference_decomposition",
]
