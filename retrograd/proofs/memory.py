"""What the proofs before the first step hold beside the model, at most at once and without what a loss leaves.

ḡ, H ḡ, a direction, the moved parameters and their gradient: five trees as large as the parameters that train, in
float64 where that is tried. Then all that lies whole is there in float64 besides.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["FULL", "Sizes", "held_in_pieces", "held_whole"]

FULL = 1 << 26  # parameters, frozen ones too, up to which a float64 copy is made, and a second row is read
_WIDE = 8  # bytes of a float64
_BLOCKS = 6  # whole at once: parameters, ḡ, H ḡ twice while it is dealt out; and parameters and ḡ of the next one


class Sizes(NamedTuple):
    """A model in numbers: bytes that train and that are frozen, bytes of an entry, number of parameters."""

    trained: int
    frozen: int
    itemsize: int
    numbers: int


def held_whole(model: Sizes) -> int:
    """Bytes where the parameters are whole."""
    trees, wide = _trees(model)
    return trees * wide * model.trained + _copied(wide, model.trained + model.frozen)


def held_in_pieces(model: Sizes, ranks: int, block: int) -> int:
    """Bytes on each of so many ranks that have pieces and one block whole; `block` are those of the largest."""
    trees, wide = _trees(model)
    return wide * (trees * (model.trained // ranks) + _BLOCKS * block) + _copied(wide, model.frozen)


def _trees(model: Sizes) -> tuple[int, int]:
    """How many trees, and how many times an entry's bytes: in half precision two gradients, and nothing is compared."""
    if model.itemsize < 4:
        return 2, 1
    return 5, _WIDE // model.itemsize if model.numbers <= FULL else 1


def _copied(wide: int, size: int) -> int:
    return wide * size if wide > 1 else 0
