"""Checkpoint transfer: forget states become what an ignorant teacher's would be.

    F = mean_l (1/Z) Σ w·‖A_l h_l(teacher) + b_l − h_l‖²/D          A_l, b_l: ridge regression of h0_l on h_l(teacher)

The teacher is a model that does not know, of the same tokens and number of blocks: an early checkpoint, a model trained
without the forget rows, or, where none is named, the model's own configuration at random initialisation. The maps are
fitted in float64 before the first step, at the targets of one pass over the retain rows:

    A = (C_xx + ridge·tr(C_xx)/D·I)⁻¹ C_xy, of centred states
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from retrograd.core import tree
from retrograd.data.pairs import RETAIN, PairStream
from retrograd.lm.model import CausalLM, causal_objective, evaluating, load_causal_lm, trainable
from retrograd.lm.outputs import Outputs, decoder_blocks, outputs_of
from retrograd.lm.spans import inner
from retrograd.unlearn.method import Method
from retrograd.unlearn.reference import Fitted, Reference
from retrograd.unlearn.settings import RetainTerm, Settings, chosen_blocks
from retrograd.unlearn.terms import Terms, forget_term
from retrograd.unlearn.view import Side, View

__all__ = ["METHOD", "CheckpointTransferSettings", "ridge_map"]


@dataclass(frozen=True)
class CheckpointTransferSettings(Settings):
    """Checkpoint transfer."""

    forget: float = 5.0
    """Coefficient of the forget term."""
    retain: float = 10.0
    """Coefficient of the retain term; 0 leaves it out."""
    retain_term: RetainTerm = "kl"
    """As for the other methods; kl is what this one was run with on adapters."""
    teacher: str = ""
    """Hub name or folder of the teacher; the model's own configuration at random initialisation when empty."""
    teacher_seed: int = 0
    """Seed of that initialisation."""
    ridge: float = 1e-3
    """Strength of the regression's ridge, in mean variances of the teacher's states."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ridge > 0:
            raise ValueError(f"ridge is {self.ridge}; it has to be above 0, or a regression on few rows has no answer")


class Transfer(NamedTuple):
    """The teacher, and (A [D_teacher, D], b [D]) by block."""

    teacher: CausalLM
    outputs: Any
    maps: dict[int, tuple[Tensor, Tensor]]

    def states(self, inputs: Any) -> Outputs:
        with torch.no_grad():
            states: Outputs = self.outputs(self.teacher.params, inputs)
        return states


def _fit(settings: CheckpointTransferSettings, lm: CausalLM, reference: Reference, stream: PairStream) -> Fitted:
    if not stream.sizes[RETAIN]:
        raise ValueError("checkpoint_transfer fits its maps on retain rows and there are none: give some, --retain")
    teacher, blocks = _teacher(settings, lm), chosen_blocks(settings, len(decoder_blocks(lm.module)))
    transfer = Transfer(teacher, outputs_of(teacher, blocks, logits=False), {})
    own, pairs = outputs_of(lm, blocks, logits=False), dict[int, list[tuple[Tensor, Tensor]]]()
    for step in range(min(len(stream), -(-stream.sizes[RETAIN] // stream.batches[RETAIN]))):
        batch = stream[step]
        with torch.no_grad(), evaluating(lm.module):
            now = own(reference.params, batch.inputs, reference.adapters)
        sides = [
            View(outputs, None, batch.inputs, batch.scale).retain for outputs in (transfer.states(batch.inputs), now)
        ]
        for block in blocks:
            x, y = (side.now.states[block].double() for side in sides if side is not None)
            pairs.setdefault(block, []).append((x, y))
    dtype = next(iter(lm.params.values())).dtype
    for block, seen in pairs.items():
        x, y = (torch.cat(parts) for parts in zip(*seen))
        a, b = ridge_map(x, y, settings.ridge)
        transfer.maps[block] = (a.to(dtype), b.to(dtype))
    digest = tree.digest((dict(teacher.params), {str(block): list(pair) for block, pair in transfer.maps.items()}))
    return Fitted(transfer, digest)


def ridge_map(x: Tensor, y: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """(A [D, E], b [E]) for which x A + b is close to y: x [n, D], y [n, E]; ridge in mean variances of x."""
    means = x.mean(0), y.mean(0)
    centred, other = x - means[0], y - means[1]
    square = centred.T @ centred
    strength = ridge * square.trace() / len(square)
    a = torch.linalg.solve(square + strength * torch.eye(len(square)).to(square), centred.T @ other)
    return a, means[1] - means[0] @ a


def _teacher(settings: CheckpointTransferSettings, lm: CausalLM) -> CausalLM:
    like = next(iter(lm.params.values()))
    name = str(like.dtype).removeprefix("torch.")
    if settings.teacher:
        teacher = load_causal_lm(settings.teacher, dtype=name, device=like.device)
    else:
        from transformers import AutoModelForCausalLM

        with torch.random.fork_rng():
            torch.manual_seed(settings.teacher_seed)
            module = AutoModelForCausalLM.from_config(inner(lm.module).config).to(like).eval()
        teacher = CausalLM(module, trainable(module)[0], *causal_objective(module))
    for what, sizes in {
        "blocks": [len(decoder_blocks(model.module)) for model in (teacher, lm)],
        "tokens": [inner(model.module).get_input_embeddings().weight.shape[0] for model in (teacher, lm)],
    }.items():
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"the teacher {settings.teacher} has {sizes[0]} {what}, the model {sizes[1]}: give one of the same "
                "tokenizer and depth, such as an earlier checkpoint of the model"
            )
    return teacher


def _forget(settings: CheckpointTransferSettings, view: View, side: Side) -> Terms:
    transfer: Transfer = view.fitted
    taught = View(transfer.states(view.inputs), None, view.inputs, view.coefficients.detach()).forget
    assert taught is not None
    each = []
    for block, h in side.now.states.items():
        a, b = transfer.maps[block]
        each.append((taught.now.states[block] @ a + b - h).square().mean(-1))
    return forget_term(settings, view, torch.sum(side.c * torch.stack(each).mean(0)))


METHOD = Method(
    name="checkpoint_transfer",
    formula="mean_l (1/Z) Σ w·‖A_l h_l(teacher) + b_l − h_l‖²/D",
    source="the original transfer runs; the random teacher is ours",
    defaults=CheckpointTransferSettings(),
    forget=_forget,
    family="activation",
    reference=True,
    states=True,
    logits=False,
    token_mean=False,  # a mean over tokens, but the teacher looks at those before
    adapters=True,
    rank=1 / 256,  # 16 of width 4096
    fit=_fit,
)
