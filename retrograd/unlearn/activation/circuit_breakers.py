"""Circuit breakers by rerouting: forget states turn away from the reference's.

    F = mean_l (1/Z) Σ w·relu cos(h_l, h0_l)               R is l2: distance to the reference on retain rows

h_l is the output of block l where a target is predicted, h0_l the reference's: the model without its adapters, or a
frozen copy. A cosine has no slope where h = h0, so training starts beside the reference (`perturb`). Once a token's
state is orthogonal to the reference's it is left alone.

With `lat_steps` F is taken under a latent attack (`retrograd.unlearn.latent`): h_l of states that were changed to say
the forget rows again. R is that of the model as it is. Latent adversarial training: Sheshadri et al. 2407.15549; the
size is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from retrograd.unlearn.latent import LatentAttack
from retrograd.unlearn.method import Method
from retrograd.unlearn.settings import RetainTerm, Settings
from retrograd.unlearn.terms import Terms, cosine, forget_term
from retrograd.unlearn.view import Side, View

__all__ = ["METHOD", "CircuitBreakersSettings"]


@dataclass(frozen=True)
class CircuitBreakersSettings(Settings):
    """Circuit breakers."""

    forget: float = 5.0
    """Coefficient of the forget term."""
    retain: float = 5.0
    """Coefficient of the retain term; 0 leaves it out."""
    forget_ramp: tuple[float, float] = (1.0, 0.75)
    """What the forget coefficient is multiplied by at the first step and at progress 1."""
    retain_ramp: tuple[float, float] = (0.0, 1.0)
    """What the retain coefficient is multiplied by at the first step and at progress 1."""
    retain_term: RetainTerm = "l2"
    """As for the other methods; l2 is what this one is defined with."""
    lat_steps: int = 0
    """Steps of a latent attack on the forget rows, under which they turn away; 0 leaves it out, the source takes 4 to
    8. Each costs a forward and a backward pass, and such runs cannot be attributed."""
    lat_size: float = 0.1
    """How far the attack goes at most, as a share of each state's norm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lat_steps < 0 or not self.lat_size > 0:
            raise ValueError(
                f"lat_steps is {self.lat_steps} and lat_size {self.lat_size}: steps are 0 (no attack) or more, and a "
                "size is above 0"
            )


def _attack(settings: CircuitBreakersSettings) -> LatentAttack | None:
    return LatentAttack(settings.lat_steps, settings.lat_size) if settings.lat_steps else None


def _forget(settings: CircuitBreakersSettings, view: View, side: Side) -> Terms:
    then = side.reference.states
    each = [cosine(h, then[block]).relu() for block, h in side.now.states.items()]
    return forget_term(settings, view, torch.sum(side.c * torch.stack(each).mean(0)))


METHOD = Method(
    name="circuit_breakers",
    formula="mean_l (1/Z) Σ w·relu cos(h_l, h0_l)",
    source="Zou et al. 2406.04313; coefficients of the original runs",
    defaults=CircuitBreakersSettings(),
    forget=_forget,
    family="activation",
    reference=True,
    states=True,
    logits=False,
    perturb=1e-3,
    adapters=True,
    rank=1 / 256,  # 16 of width 4096
    inner=_attack,
)
