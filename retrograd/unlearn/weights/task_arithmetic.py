"""Task arithmetic: what fine-tuning on the forget rows adds to the parameters is taken away from them.

    θ = θ0 − scale·(φ − θ0)        F = scale²·(1/Z) Σ w·CE(φ),  φ = θ0 − (θ − θ0)/scale

φ is the model fine-tuned on the forget rows, θ the unlearned one, θ0 the reference. Descending F in θ by SGD with
learning rate η is fine-tuning φ with η, step by step, so that the unlearned model is there, and can be asked, at every
step, and a run is one of gradients and can be attributed. An optimizer that scales gradients moves θ by its own step,
and φ by 1/scale of it; weight decay and clipping act on θ. The retain term, of the unlearned model θ, is none of the
method's and left out unless it is given a coefficient. There is nothing to negate in a product of adapters, so the
whole model is trained.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from retrograd.core.optim import Params
from retrograd.unlearn.method import Method
from retrograd.unlearn.reference import Reference
from retrograd.unlearn.settings import Settings
from retrograd.unlearn.terms import Term, Terms, ramped
from retrograd.unlearn.view import Side, View

__all__ = ["METHOD", "TaskArithmeticSettings"]


@dataclass(frozen=True)
class TaskArithmeticSettings(Settings):
    """Task arithmetic."""

    retain: float = 0.0
    """Coefficient of the retain term; 0 leaves it out."""
    scale: float = 1.0
    """How much of the fine-tuning's change is taken away."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scale > 0:
            raise ValueError(f"scale is {self.scale}; it has to be above 0, for the sign is the method's own")


def _forget(settings: TaskArithmeticSettings, view: View, side: Side) -> Terms:
    coefficient = ramped(settings.scale**2 * settings.forget, settings.forget_ramp, view.progress)
    return {"forget": Term(coefficient, torch.sum(side.c * side.ce))}


def _fine_tuned(
    settings: TaskArithmeticSettings, params: Params, reference: Reference, progress: Tensor, module: nn.Module
) -> Params:
    if not reference.adapters:
        raise ValueError(
            "task_arithmetic takes a change of parameters away, and that of adapters is a product of them: train the "
            "whole model, with --lora.rank 0"
        )
    then = reference.params
    return {name: then[name] - (theta - then[name]) / settings.scale for name, theta in params.items()}


METHOD = Method(
    name="task_arithmetic",
    formula="scale²·(1/Z) Σ w·CE(φ), φ = θ0 − (θ − θ0)/scale",
    source="Ilharco et al. 2212.04089, as an objective",
    defaults=TaskArithmeticSettings(),
    forget=_forget,
    family="weights",
    signed=True,
    reference=True,
    at=_fine_tuned,
)
