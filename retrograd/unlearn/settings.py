"""Settings that every unlearning method has; a method's own are a subclass with its defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["RetainTerm", "Settings", "chosen_blocks"]

RetainTerm = Literal["ce", "kl", "l2", "mse"]


@dataclass(frozen=True)
class Settings:
    """Coefficients of the two sides and what holds the retain side.

    L = forget·(a + (b − a)·p_k) · F + retain·(a' + (b' − a')·p_k) · R, p_k the progress, a and b the ramps.
    """

    forget: float = 1.0
    """Coefficient of the forget term."""
    retain: float = 1.0
    """Coefficient of the retain term; 0 leaves it out."""
    forget_ramp: tuple[float, float] = (1.0, 1.0)
    """What the forget coefficient is multiplied by at the first step and at progress 1."""
    retain_ramp: tuple[float, float] = (1.0, 1.0)
    """What the retain coefficient is multiplied by at the first step and at progress 1."""
    retain_term: RetainTerm = "ce"
    """ce: cross-entropy on retain rows; kl: divergence from the reference's predictions; l2: distance of the hidden
    states from the reference's; mse: its square over the width."""
    depths: tuple[float, ...] = ()
    """Blocks whose hidden states are used, as shares of the depth: 0 the first, 1 the last. All when empty."""
    blocks: tuple[int, ...] = ()
    """Blocks by number, from 0, in place of depths."""
    as_run: bool = False
    """Permit what the original experiments did wrong, named in the docs; results are flagged."""

    def __post_init__(self) -> None:
        for name in ("forget", "retain"):
            if not getattr(self, name) >= 0:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; a coefficient is at least 0, for the sign is the method's own"
                )
        if self.depths and self.blocks:
            raise ValueError(f"depths {self.depths} and blocks {self.blocks}: give one of them")


def chosen_blocks(settings: Settings, depth: int) -> tuple[int, ...]:
    """The numbers of the blocks that settings name, of a model with `depth` of them.

    Raises:
        ValueError: If a block is absent, or a share is outside 0 to 1.

    >>> chosen_blocks(Settings(depths=(0, 0.5, 1)), 4), chosen_blocks(Settings(depths=(0, 0.5, 1)), 32)
    ((0, 2, 3), (0, 16, 31))
    """
    if bad := [share for share in settings.depths if not 0 <= share <= 1]:
        raise ValueError(f"depth {bad[0]} is no share of the depth: 0 is the first block, 1 the last")
    if absent := [block for block in settings.blocks if not 0 <= block < depth]:
        raise ValueError(f"there is no block {absent[0]} in a model of {depth}; they are numbered 0 to {depth - 1}")
    named: Sequence[int] = settings.blocks or [int(share * (depth - 1) + 0.5) for share in settings.depths]
    return tuple(sorted(set(named))) or tuple(range(depth))
