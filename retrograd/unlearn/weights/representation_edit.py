"""Representation editing: what a block writes loses the directions that tell forget states from retain states.

    C_x v = λ (C_y + ridge·tr(C_y)/D·I) v       C_x, C_y: second moments of forget and of retain states, weighted by w
    W ← (I − V Vᵀ) W                            V: an orthonormal basis of the `rank` v of the largest λ, of each block

W are the matrices (and biases) by which attention and MLP of a block write to the residual stream. The edit is made in
float64 before the first step, of one pass over the rows; step 0 is the edited model. The run that follows mends it by
the retain term alone, of the whole model, and `--train.lr 0` leaves the edit as it is. No step descends a forget term,
so runs cannot be attributed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from retrograd.core.optim import Params
from retrograd.core.step import coefficients
from retrograd.data.pairs import RETAIN, PairStream
from retrograd.lm.model import CausalLM, evaluating
from retrograd.lm.outputs import decoder_blocks, outputs_of
from retrograd.unlearn.method import Method
from retrograd.unlearn.reference import Reference
from retrograd.unlearn.settings import RetainTerm, Settings, chosen_blocks
from retrograd.unlearn.terms import Terms
from retrograd.unlearn.view import Side, View

__all__ = ["METHOD", "RepresentationEditSettings", "telling_directions"]


@dataclass(frozen=True)
class RepresentationEditSettings(Settings):
    """Representation editing."""

    retain_term: RetainTerm = "kl"
    """What mends the edited model: as for the other methods."""
    rank: float = 1 / 32
    """Directions taken out of each block, as a share of the width; at least one."""
    ridge: float = 0.1
    """What is added to the retain states' second moments, in mean ones."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank", "ridge"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it has to be above 0 and at most 1")


class _Writer(NamedTuple):
    """A matrix that writes to the residual stream, whether it is [D, …] and not […, D], and its bias if it has one."""

    weight: str
    rows: bool
    bias: str | None


def telling_directions(x: Tensor, y: Tensor, count: int, ridge: float) -> Tensor:
    """Orthonormal [D, count]: the span of the v with the largest λ in x v = λ (y + ridge·tr(y)/D·I) v, float64."""
    x, y = x.double(), y.double()
    eye = torch.eye(len(y)).to(y)
    root = torch.linalg.cholesky(y + ridge * y.trace() / len(y) * eye)
    inverse = torch.linalg.solve_triangular(root, eye, upper=False)
    among = torch.linalg.eigh(inverse @ x @ inverse.T).eigenvectors[:, -count:]
    basis: Tensor = torch.linalg.qr(inverse.T @ among).Q
    return basis


def _edit(settings: RepresentationEditSettings, lm: CausalLM, reference: Reference, stream: PairStream) -> Params:
    if not reference.adapters:
        raise ValueError("representation_edit changes matrices of the model: leave adapters out, with --lora.rank 0")
    if not stream.sizes[RETAIN]:
        raise ValueError("representation_edit holds forget states against retain states: give retain rows, --retain")
    layers = decoder_blocks(lm.module)
    blocks = chosen_blocks(settings, len(layers))
    edited, taken = dict(lm.params), dict[int, Tensor]()
    for block, (x, y) in _moments(lm, reference, stream, blocks).items():
        v = telling_directions(x, y, max(1, round(settings.rank * len(x))), settings.ridge)
        taken[block] = v
        for writer in _writers(lm.module, layers[block]):
            for name, along_rows in ((writer.weight, writer.rows), (writer.bias, True)):
                if name is not None:
                    w = edited[name].double()
                    edited[name] = (w - v @ (v.T @ w) if along_rows else w - (w @ v) @ v.T).to(edited[name])
    _check_written(lm, edited, stream[0].inputs, taken)
    return edited


def _check_written(lm: CausalLM, edited: Params, inputs: Any, taken: dict[int, Tensor]) -> None:
    """What an edited block adds to the states has no part in its directions: nothing else writes there."""
    later = [block for block in taken if block]
    outputs = outputs_of(lm, sorted({*later, *(block - 1 for block in later)}), logits=False)
    with torch.no_grad(), evaluating(lm.module):
        states = outputs(edited, inputs).states if later else {}
    for block in later:
        written = (states[block] - states[block - 1]).double()
        share = float((written @ taken[block]).norm() / written.norm())
        if not share <= 0.01:
            raise ValueError(
                f"block {block} of {type(lm.module).__name__} still writes {share:.2g} of the norm of its output along "
                "the directions that were taken out: norms or scales lie between its matrices and the states, and this "
                "method is not made for them"
            )


def _moments(
    lm: CausalLM, reference: Reference, stream: PairStream, blocks: tuple[int, ...]
) -> dict[int, tuple[Tensor, Tensor]]:
    """Σ c·h hᵀ of forget and of retain states by block, [D, D] float64, over one pass."""
    outputs, moments = outputs_of(lm, blocks, logits=False), dict[int, tuple[Tensor, Tensor]]()
    for step in range(-(-len(stream) // stream.epochs)):
        batch = stream[step]
        with torch.no_grad(), evaluating(lm.module):
            now = outputs(reference.params, batch.inputs, reference.adapters)
        view = View(now, None, batch.inputs, coefficients(batch, stream.weights))
        for block in blocks:
            each = []
            for side in (view.forget, view.retain):
                assert side is not None, "every batch has rows of both sides"
                h = side.now.states[block].double()
                each.append(h.T @ (side.c[:, None].double() * h))
            x, y = moments.get(block, (torch.zeros_like(each[0]), torch.zeros_like(each[1])))
            moments[block] = (x + each[0], y + each[1])
    return moments


def _writers(module: nn.Module, block: nn.Module) -> list[_Writer]:
    """The last matrix of attention and that of the MLP: of each part of the block that has two or more."""
    names = {id(p): name for name, p in module.named_parameters()}
    writers = []
    for part in block.children():
        layers = [layer for layer in part.modules() if getattr(getattr(layer, "weight", None), "ndim", 0) == 2]
        if len(layers) > 1:
            bias = getattr(layers[-1], "bias", None)
            rows = isinstance(layers[-1], nn.Linear)  # GPT-2's Conv1D is the other way round
            weight = names[id(layers[-1].weight)]
            writers.append(_Writer(weight, rows, None if bias is None else names[id(bias)]))
    if len(writers) != 2:
        raise ValueError(
            f"a {type(block).__name__} has {len(writers)} parts of two matrices or more, not attention and an MLP: it "
            "is not known by which it writes to the residual stream"
        )
    return writers


def _forget(settings: RepresentationEditSettings, view: View, side: Side) -> Terms:
    return Terms()  # what is to be forgotten is gone before the first step


METHOD = Method(
    name="representation_edit",
    formula="none: before the first step W ← (I − V Vᵀ)W in what each block writes, C_x v = λ (C_y + ridge) v",
    source="the original plan of representation engineering; rank and ridge are ours",
    defaults=RepresentationEditSettings(),
    forget=_forget,
    family="weights",
    reference=True,
    edit=_edit,
    no_gradient="it edits the parameters before the first step by rows and weights, which no step's gradient sees",
)
