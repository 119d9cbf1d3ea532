"""Training that withstands an adversary."""

from lib.robust.trades import trades

__all__ = ["trades"]
