"""Sequential unlearning, back to front: block after block stops handing on what the frozen rest could read.

    F = (1/Z) Σ w·(logsumexp z − mean z)/log V      z: blocks 0 … l as they are now, the reference's l + 1 …, norm, head

l moves from the last of `visits` to the first, each for an equal part of the run. The states of block l are read by the
original blocks after it, so that no later block can hide what an earlier one still says; the gradient of a phase
reaches blocks up to l alone. With `top_k` the entropy is that of the k largest logits, over log k. Everything but the
blocks is frozen. Optimizer, learning rate and ramps run through all phases, where the original runs began each anew.
Masks of tokens (keywords, activations, scores) are weights. With `l2_sp` the parameters are held where they were:

    L + l2_sp·Σ ‖θ − θ0‖²                                 L2-SP, Li, Grandvalet and Davoine 1802.01483
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from retrograd.core.optim import Params
from retrograd.lm.outputs import decoder_blocks
from retrograd.unlearn.method import Method
from retrograd.unlearn.reference import Reference
from retrograd.unlearn.settings import RetainTerm, Settings, chosen_blocks
from retrograd.unlearn.terms import Term, Terms, flat, forget_term, top
from retrograd.unlearn.view import Side, View

__all__ = ["METHOD", "SequentialSettings", "of_blocks"]


@dataclass(frozen=True)
class SequentialSettings(Settings):
    """Sequential unlearning."""

    forget: float = 50.0
    """Coefficient of the forget term."""
    retain: float = 5.0
    """Coefficient of the retain term; 0 leaves it out."""
    retain_ramp: tuple[float, float] = (0.25, 1.0)
    """What the retain coefficient is multiplied by at the first step and at progress 1."""
    retain_term: RetainTerm = "l2"
    """As for the other methods; l2 is over the states of `depths` or `blocks`, all when empty."""
    visits: tuple[float, ...] = (16 / 31, 20 / 31, 24 / 31, 28 / 31)
    """Blocks that are unlearned, the last one first, as shares of the depth: 28, 24, 20 and 16 of 32."""
    top_k: int | None = None
    """Logits whose entropy counts, the largest ones; all of them when None."""
    l2_sp: float = 0.0
    """Coefficient of the squared distance of all trained parameters from where they began; 0 leaves it out. Of the
    model's own parameters: not with adapters."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.l2_sp >= 0:
            raise ValueError(f"l2_sp is {self.l2_sp}; a coefficient is at least 0")
        if not self.visits:
            raise ValueError("visits is empty; give the blocks to unlearn as shares of the depth, from 0 to 1")


def _forget(settings: SequentialSettings, view: View, side: Side) -> Terms:
    logits = side.logits if settings.top_k is None else top(side.logits, settings.top_k)
    return forget_term(settings, view, torch.sum(side.c * flat(logits)))


def _held(settings: SequentialSettings, params: Params, reference: Reference) -> Terms:
    if not settings.l2_sp:
        return Terms()
    if not reference.adapters:
        raise ValueError(
            "l2_sp is a distance of the model's own parameters, and adapters have none: train the whole model, with "
            "--lora.rank 0, or leave l2_sp out"
        )
    squares = [torch.sum((theta - reference.params[name]).square()) for name, theta in params.items()]
    return Terms(l2_sp=Term(settings.l2_sp, torch.stack(squares).sum()))


def _stitched(
    settings: SequentialSettings, params: Params, reference: Reference, progress: Tensor, module: nn.Module
) -> Params:
    """The current parameters up to the visited block, the reference's after it; adapters start as no change."""
    blocks = decoder_blocks(module)
    visits = chosen_blocks(replace(settings, depths=settings.visits, blocks=()), len(blocks))[::-1]
    phase = min(int(float(progress) * len(visits) + 1e-5), len(visits) - 1)
    current = _parameters(module, blocks[: visits[phase] + 1])
    return {name: theta if name in current else reference.params[name] for name, theta in params.items()}


def _parameters(module: nn.Module, blocks: list[nn.Module]) -> set[str]:
    inside = {id(p) for block in blocks for p in block.parameters()}
    return {name for name, p in module.named_parameters() if id(p) in inside}


def of_blocks(settings: Settings, module: nn.Module) -> Collection[str]:
    """Names of all parameters of the blocks: what is trained where embeddings, final norm and head are fixed."""
    return _parameters(module, decoder_blocks(module))


METHOD = Method(
    name="sequential",
    formula="(1/Z) Σ w·(logsumexp z − mean z)/log V, z through blocks ≤ l and the reference's after l",
    source="the original sequential runs, of 28 → 16; one optimizer throughout is ours",
    defaults=SequentialSettings(),
    forget=_forget,
    family="activation",
    reference=True,
    adapters=True,
    rank=1 / 256,  # 16 of width 4096
    trained=of_blocks,
    at=_stitched,
    penalty=_held,
)
