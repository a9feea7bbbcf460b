"""Representation misdirection: forget states are steered to one random direction, retain states stay where they were.

    F = mean_l (1/Z) Σ w·‖h_l − c·u‖²/D,  c = steer·‖h0_l‖               R is mse: mean_l (1/Z) Σ w·‖h_l − h0_l‖²/D

u is one fixed direction, the same for all tokens: uniform draws over the unit cube, of length 1. The published c is one
number for a model; here it is a multiple of the length that the reference's state has at that token, so that it means
the same in every model and block. Only the projections that write an MLP's output, of the steered block and of those
just before it, are trained: blocks 5, 6 and 7 of 32 where block 7 is steered. With adapters these are what is trained.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from retrograd.lm.outputs import decoder_blocks
from retrograd.unlearn.method import Method
from retrograd.unlearn.settings import RetainTerm, Settings, chosen_blocks
from retrograd.unlearn.terms import Terms, forget_term
from retrograd.unlearn.view import Side, View

__all__ = ["METHOD", "RMUSettings", "output_projections"]


@dataclass(frozen=True)
class RMUSettings(Settings):
    """Representation misdirection."""

    retain: float = 2.0
    """Coefficient of the retain term; 0 leaves it out."""
    retain_term: RetainTerm = "mse"
    """As for the other methods; mse is what this one is defined with."""
    depths: tuple[float, ...] = (7 / 31,)
    """Blocks whose states are steered, as shares of the depth: block 7 of 32."""
    steer: float = 6.0
    """Length of the vector that states are steered to, in lengths of the reference's state."""
    span: float = 3 / 32
    """Blocks whose MLP projections are trained, up to each steered one, as a share of the depth; at least one."""
    direction_seed: int = 0
    """Seed of the random direction u."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.span <= 1:
            raise ValueError(f"span is {self.span}; it is a share of the depth, above 0 and at most 1")


def _forget(settings: RMUSettings, view: View, side: Side) -> Terms:
    then, each = side.reference.states, []
    for block, h in side.now.states.items():
        u = _direction(settings.direction_seed, h.shape[-1]).to(h)
        target = settings.steer * then[block].norm(dim=-1, keepdim=True) * u
        each.append((h - target).square().mean(-1))
    return forget_term(settings, view, torch.sum(side.c * torch.stack(each).mean(0)))


@lru_cache(maxsize=4)
def _direction(seed: int, width: int) -> Tensor:
    """u, [D] float64."""
    drawn = torch.rand(width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn / drawn.norm()


def output_projections(settings: RMUSettings, module: nn.Module) -> Collection[str]:
    """Names of the matrices that write MLP outputs in the trained blocks: the last one of each."""
    blocks = decoder_blocks(module)
    back = max(1, round(settings.span * len(blocks)))
    wanted = {block for top in chosen_blocks(settings, len(blocks)) for block in range(max(0, top - back + 1), top + 1)}
    last = {id([p for p in blocks[block].parameters() if p.ndim == 2][-1]) for block in wanted}
    return [name for name, p in module.named_parameters() if id(p) in last]


METHOD = Method(
    name="rmu",
    formula="mean_l (1/Z) Σ w·‖h_l − steer·‖h0_l‖·u‖²/D",
    source="Li et al. 2403.03218; block and trained matrices as open-unlearning; steer and coefficients are ours",
    defaults=RMUSettings(),
    forget=_forget,
    family="activation",
    reference=True,
    states=True,
    logits=False,
    trained=output_projections,
)
