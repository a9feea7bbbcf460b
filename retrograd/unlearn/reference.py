"""The reference: the model that a method compares with, fixed and without a gradient.

A full fine-tuning compares with a frozen copy of the parameters it starts from, adapters with the model they were added
to, which is there when they are turned off. Dropout is off in a reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from retrograd.core import tree
from retrograd.core.optim import Params
from retrograd.lm.model import CausalLM

__all__ = ["Fitted", "Reference", "adapters_off", "frozen_copy", "perturbed", "reference_of"]


class Fitted(NamedTuple):
    """What a method makes before the first step, a constant of the objective like the reference.

    Args:
        value: As the method's forget term takes it.
        digest: Hash of it, for a run's identity.
    """

    value: Any
    digest: str


@dataclass(frozen=True, eq=False)
class Reference:
    """Parameters by the names of `trainable`, and whether the model's adapters are on."""

    params: Params
    adapters: bool = True

    @property
    def digest(self) -> str:
        """Hash of the parameters that make it another model, for a run's identity."""
        return tree.digest(self.params if self.adapters else {})


def reference_of(lm: CausalLM) -> Reference:
    """Adapters off where there are some, a frozen copy where not."""
    return adapters_off(lm) if hasattr(lm.module, "disable_adapter") else frozen_copy(lm)


def frozen_copy(lm: CausalLM) -> Reference:
    """The model as it is now."""
    return Reference({name: theta.detach().clone() for name, theta in lm.params.items()})


def adapters_off(lm: CausalLM) -> Reference:
    """The model that the adapters were added to.

    Raises:
        ValueError: If the model has no adapters.
    """
    if not hasattr(lm.module, "disable_adapter"):
        raise ValueError(
            f"{type(lm.module).__name__} has no adapters to turn off: it would be its own reference. Take a frozen copy"
        )
    return Reference(dict(lm.params), adapters=False)


def perturbed(params: Params, size: float, seed: int) -> Params:
    """θ + size·rms(θ)·N(0, I), rms over all parameters together, so that adapters that begin at 0 move too.

    At the reference itself cos(h, h0) has no slope: losses on it have to start beside it.
    """
    draw = torch.Generator().manual_seed(seed)
    count = sum(theta.numel() for theta in params.values())
    scale = size * float(tree.norm(params)) / max(1, count) ** 0.5
    noise = {name: torch.randn(theta.shape, generator=draw, dtype=torch.float64) for name, theta in params.items()}
    return {name: theta + (scale * noise[name]).to(theta) for name, theta in params.items()}
