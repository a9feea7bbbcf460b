"""Unlearning through a tuned lens: no block's states can be read out any more.

    F = mean_l (1/Z) Σ w·(logsumexp z_l − mean z_l)/log V        z_l = head(norm(h_l + A_l h_l + b_l))

The lenses A_l, b_l are trained on the forget rows before the first step (`retrograd.unlearn.lens`) and fixed from then
on, with norm and head; of the last block z_l is the model's own. Only blocks are trained, or adapters.
A resumed run trains the lenses again, to the same bits.

What is broken may be this way of reading alone: try another one on the result, such as a lens trained anew.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from retrograd.data.pairs import PairStream
from retrograd.lm.model import CausalLM
from retrograd.lm.outputs import decoder_blocks
from retrograd.unlearn.activation.sequential import of_blocks
from retrograd.unlearn.lens import fit_lens
from retrograd.unlearn.method import Method
from retrograd.unlearn.reference import Fitted, Reference
from retrograd.unlearn.settings import RetainTerm, Settings, chosen_blocks
from retrograd.unlearn.terms import Terms, flat, forget_term
from retrograd.unlearn.view import Side, View

__all__ = ["METHOD", "TunedLensSettings"]


@dataclass(frozen=True)
class TunedLensSettings(Settings):
    """Unlearning through a tuned lens."""

    forget: float = 5.0
    """Coefficient of the forget term."""
    retain: float = 5.0
    """Coefficient of the retain term; 0 leaves it out."""
    retain_term: RetainTerm = "l2"
    """As for the other methods; l2 is what this one was run with on adapters, kl on the whole model."""
    lens_epochs: int = 2
    """Passes over the run's batches that the lenses are trained for."""
    lens_lr: float = 1e-3
    """AdamW's learning rate for the lenses."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lens_epochs < 1:
            raise ValueError(f"lens_epochs is {self.lens_epochs}; without a pass there is no lens, only norm and head")


def _fit(settings: TunedLensSettings, lm: CausalLM, reference: Reference, stream: PairStream) -> Fitted:
    blocks = chosen_blocks(settings, len(decoder_blocks(lm.module)))
    return fit_lens(lm, reference, stream, blocks, epochs=settings.lens_epochs, rate=settings.lens_lr)


def _forget(settings: TunedLensSettings, view: View, side: Side) -> Terms:
    each = [flat(view.fitted(block, h)) for block, h in side.now.states.items()]
    return forget_term(settings, view, torch.sum(side.c * torch.stack(each).mean(0)))


METHOD = Method(
    name="tuned_lens",
    formula="mean_l (1/Z) Σ w·(logsumexp z_l − mean z_l)/log V, z_l = head(norm(h_l + A_l h_l + b_l))",
    source="the original lens runs; tuned lens, Belrose et al. 2303.08112",
    defaults=TunedLensSettings(),
    forget=_forget,
    family="activation",
    reference=True,
    states=True,
    logits=False,
    adapters=True,
    rank=1 / 256,  # 16 of width 4096
    trained=of_blocks,
    fit=_fit,
)
