"""Quantisation: numbers in few bits."""

from lib.quant.staircase import Quantised, StaircaseKVCache, quantise

__all__ = ["Quantised", "StaircaseKVCache", "quantise"]
