"""Training that withstands an adversary, and changes of the input that nobody chose."""

from lib.robust.augmix import AUGMIX_OPERATIONS, augmix
from lib.robust.corruptions import CORRUPTIONS, corruptions
from lib.robust.trades import trades

__all__ = ["AUGMIX_OPERATIONS", "CORRUPTIONS", "augmix", "corruptions", "trades"]
