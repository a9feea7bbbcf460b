"""Gradient halves: ways to get H ḡ and the data-weight derivative of a batch."""

from retrograd.core.engine.blocks import Blocks
from retrograd.core.engine.double import Double

__all__ = ["Blocks", "Double"]
