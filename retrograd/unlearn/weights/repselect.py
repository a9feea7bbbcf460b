"""RepSelect: one step of ascent on MLP matrices, without the directions that other knowledge uses as well.

    1  small adapters B A on the MLP matrices W are trained to say the forget rows again: one pass of SGD on CE
    2  G = −∇_W (mean over one pass of (1/Z) Σ w·CE) at W + B A, for each W; then the adapters are dropped
    3  S_i, u_i, v_i: the largest n singular values of G, or of the same sum over the retain rows, and their vectors
    4  G' = G, its part along each v_i and then each u_i multiplied by (S_n/S_i)^power: 1 soft, 2 quadratic, ∞ hard
    5  W ← W − s·G', s the largest for which the divergence from the model before, on the retain rows, keeps the budget

The source takes steps of one size along G' until the budget is used up; here their sum s is found by doubling and
bisection, which is the same ray without a step size. All of it happens before the first step; step 0 is the edited
model. The run that follows mends it by the retain term, and `--train.lr 0` leaves the edit as it is. There is no
pullback of steps 2 to 4, so runs cannot be attributed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from retrograd.core.optim import Params
from retrograd.core.step import Batch, coefficients
from retrograd.data.pairs import FORGET, RETAIN, PairStream
from retrograd.lm.model import CausalLM, evaluating
from retrograd.lm.outputs import decoder_blocks, outputs_of
from retrograd.unlearn.method import Method
from retrograd.unlearn.reference import Reference
from retrograd.unlearn.settings import RetainTerm, Settings, chosen_blocks
from retrograd.unlearn.terms import Terms, retain_value
from retrograd.unlearn.view import Side, View

__all__ = ["METHOD", "RepSelectSettings", "collapsed"]

_SMALLEST, _DOUBLINGS, _HALVINGS = 1e-5, 30, 8  # of the search for s, the first in norms of W to those of G'


@dataclass(frozen=True)
class RepSelectSettings(Settings):
    """RepSelect."""

    retain_term: RetainTerm = "kl"
    """What mends the edited model: as for the other methods."""
    budget: float = 0.01
    """Divergence from the model before, in nats a token on the retain rows, that the edit may use up."""
    collapse: Literal["soft", "quadratic", "hard"] = "soft"
    """How shared directions are held back: by the ratio of singular values, by its square, or altogether."""
    directions: Literal["retain", "forget"] = "retain"
    """Rows whose gradient says which directions are shared: retain in the source's code, forget in its paper."""
    rank: float = 1 / 8
    """Directions held back on each side, as a share of the width: 512 of 4096."""
    elicit_rank: float = 1 / 256
    """Rank of the adapters of step 1, as a share of the width; at least 2."""
    elicit_lr: float = 0.01
    """Their learning rate; 0 leaves step 1 out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank", "elicit_rank", "budget"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it has to be above 0 and at most 1")


def collapsed(gradient: Tensor, shared: Tensor, count: int, collapse: str) -> Tensor:
    """A gradient held back along the largest `count` singular vectors of `shared`, the right ones and then the left.

    Args:
        gradient, shared: [D, E] each.
        collapse: soft, quadratic or hard.
    """
    u, s, vh = torch.linalg.svd(shared, full_matrices=False)
    u, s, vh = u[:, :count], s[:count], vh[:count]
    power = {"soft": 1.0, "quadratic": 2.0, "hard": torch.inf}[collapse]
    kept = torch.zeros_like(s) if power == torch.inf else (s[-1] / s.clamp_min(torch.finfo(s.dtype).tiny)) ** power
    gradient = gradient - ((gradient @ vh.T) * (1 - kept)) @ vh
    return gradient - u @ ((1 - kept)[:, None] * (u.T @ gradient))


def _edit(settings: RepSelectSettings, lm: CausalLM, reference: Reference, stream: PairStream) -> Params:
    if not reference.adapters:
        raise ValueError("repselect changes matrices of the model: leave adapters out, with --lora.rank 0")
    if not stream.sizes[RETAIN]:
        raise ValueError("repselect keeps a budget on the retain rows and there are none: give some, --retain")
    names = _matrices(settings, lm.module)
    with evaluating(lm.module):
        elicited = _elicited(settings, lm, stream, names)
        forget = _gradient(lm, elicited, stream, names, FORGET)
        shared = forget if settings.directions == "forget" else _gradient(lm, elicited, stream, names, RETAIN)
        steps = {}
        for name in names:
            count = min(max(1, round(settings.rank * _width(lm))), *shared[name].shape)
            steps[name] = collapsed(forget[name], shared[name], count, settings.collapse)
        return _within_budget(settings, lm, reference, stream, steps)


def _matrices(settings: RepSelectSettings, module: nn.Module) -> list[str]:
    """Names of the matrices of the chosen blocks' MLPs: those of the last part of a block that has two or more."""
    layers, names = decoder_blocks(module), {id(p): name for name, p in module.named_parameters()}
    chosen = []
    for block in chosen_blocks(settings, len(layers)):
        parts = [[p for p in part.parameters() if p.ndim == 2] for part in layers[block].children()]
        large = [matrices for matrices in parts if len(matrices) > 1]
        if len(large) != 2:
            raise ValueError(
                f"a {type(layers[block]).__name__} has {len(large)} parts of two matrices or more, not attention and "
                "an MLP: it is not known which its MLP is"
            )
        chosen += [names[id(p)] for p in large[-1]]
    return chosen


def _width(lm: CausalLM) -> int:
    return int(lm.module.get_input_embeddings().weight.shape[1])  # type: ignore[operator]


def _passes(stream: PairStream) -> Iterator[Batch]:
    """The batches of one pass over the longer side."""
    return (stream[step] for step in range(-(-len(stream) // stream.epochs)))


def _loss(lm: CausalLM, params: Params, batch: Batch, weights: Tensor, side: int) -> Tensor:
    """(1/Z) Σ w·CE of one side of a batch."""
    c = coefficients(batch, weights) * (batch.inputs["side"] == side)[:, None]
    return lm.objective(params, batch.inputs, c)


def _elicited(settings: RepSelectSettings, lm: CausalLM, stream: PairStream, names: list[str]) -> Params:
    """Step 1: W + B A."""
    rank, draw = max(2, round(settings.elicit_rank * _width(lm))), torch.Generator().manual_seed(stream.seed)
    leaves = {}
    for name in names:
        w = lm.params[name]
        a = torch.randn(rank, w.shape[1], generator=draw, dtype=torch.float64).to(w) / rank**0.5
        leaves[name] = [w.new_zeros(w.shape[0], rank).requires_grad_(), a.requires_grad_()]
    flat = [leaf for pair in leaves.values() for leaf in pair]
    for batch in _passes(stream) if settings.elicit_lr else ():
        with torch.enable_grad():
            added = {name: lm.params[name] + b @ a for name, (b, a) in leaves.items()}
            slopes = torch.autograd.grad(_loss(lm, {**lm.params, **added}, batch, stream.weights, FORGET), flat)
        with torch.no_grad():
            for leaf, slope in zip(flat, slopes):
                leaf -= settings.elicit_lr * slope
    return {**lm.params, **{name: lm.params[name] + (b @ a).detach() for name, (b, a) in leaves.items()}}


def _gradient(lm: CausalLM, params: Params, stream: PairStream, names: list[str], side: int) -> Params:
    """Step 2: the mean of −∇ (1/Z) Σ w·CE over one pass, for each matrix."""
    dtype = torch.promote_types(params[names[0]].dtype, torch.float32)
    total, count = {name: torch.zeros_like(params[name], dtype=dtype) for name in names}, 0
    for batch in _passes(stream):
        with torch.enable_grad():
            live = {name: params[name].detach().requires_grad_() for name in names}
            loss = _loss(lm, {**params, **live}, batch, stream.weights, side)
            slopes = torch.autograd.grad(loss, list(live.values()))
        total = {name: g - slope for (name, g), slope in zip(total.items(), slopes)}
        count += 1
    return {name: g / count for name, g in total.items()}


def _within_budget(
    settings: RepSelectSettings, lm: CausalLM, reference: Reference, stream: PairStream, steps: Params
) -> Params:
    """Step 5: the parameters after the longest step of this direction within the budget."""
    outputs = outputs_of(lm)

    def moved(s: float) -> Params:
        return {**lm.params, **{name: (lm.params[name] - s * step).to(lm.params[name]) for name, step in steps.items()}}

    @torch.no_grad()
    def divergence(params: Params) -> float:
        values = []
        for batch in _passes(stream):
            now, then = outputs(params, batch.inputs), outputs(reference.params, batch.inputs)
            side = View(now, then, batch.inputs, batch.scale).retain
            assert side is not None, "every batch has rows of both sides"
            values.append(float(retain_value(Settings(retain_term="kl"), side)))
        return sum(values) / len(values)

    sizes = [sum(float(tensors[name].square().sum()) for name in steps) ** 0.5 for tensors in (lm.params, steps)]
    if not sizes[1] > 0:
        raise ValueError(
            "repselect's gradient is 0 at every matrix: no forget row has weight, or nothing is left of it"
        )
    low, high = 0.0, _SMALLEST * sizes[0] / sizes[1]
    for _ in range(_DOUBLINGS):
        if not divergence(moved(high)) <= settings.budget:
            break
        low, high = high, 2 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        within = divergence(moved(middle)) <= settings.budget
        low, high = (middle, high) if within else (low, middle)
    if not low:
        raise ValueError(
            f"a step of {high * sizes[1] / sizes[0]:.2g} of the matrices' norm is more than the budget, "
            f"{settings.budget:g} nats a token: raise --objective.budget"
        )
    return moved(low)


def _forget(settings: RepSelectSettings, view: View, side: Side) -> Terms:
    return Terms()  # what is to be forgotten is gone before the first step


METHOD = Method(
    name="repselect",
    formula="none: before the first step W ← W − s·G', G' the gradient of −CE without what retain rows share, s by KL",
    source="RepSelect, 2606.17168; elicit_rank and the search for s are ours",
    defaults=RepSelectSettings(),
    forget=_forget,
    family="weights",
    reference=True,
    edit=_edit,
    no_gradient="its direction comes from singular vectors before the first step, for which there is no pullback",
)
