"""Weights of forget documents that make unlearning hold: metagradient ascent through unlearning and attack.

    J(w) = mean over attacks φ(θ after unlearning with w and attack) − μ·KL(θ after unlearning with w)
    w_p = e^{u_f}·n·e^{u_d(p)} / Σ_q e^{u_d(q)} p one of n forget tokens, d(p) its document: w ≥ 0, mean e^{u_f}
    w_p = e^{u_r}                               p a retain token
    lr  = e^{u_l} of the unlearning's

u has a place for each document, then u_f, u_r, u_l, which are 0 unless they are learnt. Where the objective is linear
in w, e^{u_f} and e^{u_r} are the coefficients of its two terms. φ is the loss on forget questions whose answers the
attack does not show, KL the token mean of KL(start ‖ θ) on retain rows. ∂J/∂w comes from one sweep through the
unlearning: the attacks' cotangents at its end and −μ·∇KL add up. Adam raises J over u. Source:
metagradient descent, Engstrom et al., arXiv:2503.13751.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from retrograd.attack.chain_validation import forget_places
from retrograd.core.optim import Params
from retrograd.core.step import Recipe
from retrograd.data.pairs import RETAIN, PairStream, Part
from retrograd.data.rows import Rows, pad
from retrograd.lm.model import bound_model
from retrograd.query.columns import Column, Queries, function_column
from retrograd.runs.setup import Loaded
from retrograd.settings.attack import Finetune

__all__ = [
    "Ascent",
    "COEFFICIENTS",
    "Documents",
    "ascended",
    "asked",
    "combined",
    "documents_of",
    "drawn",
    "gradient_of",
    "mean_query",
    "part_rows",
    "faster",
    "retain_kl",
    "shuffled",
    "weights_of",
]

BETAS, EPS = (0.9, 0.99), 1e-12
COEFFICIENTS = ("forget", "retain", "lr")  # after the documents


class Documents(NamedTuple):
    """The forget tokens: their flat places in the weights [n], and the document of each, numbered from 0, [n].

    number: Of documents. retain: rows of the retain side.
    """

    places: Tensor
    document: Tensor
    number: int
    retain: slice = slice(0, 0)


class Ascent(NamedTuple):
    """Adam's state: u, and the moments of its gradient, [documents + 3] each; steps taken."""

    u: Tensor
    mean: Tensor
    square: Tensor
    step: int = 0


def documents_of(stream: PairStream) -> Documents:
    """The forget documents of a stream."""
    places, longest = forget_places(stream), stream.weights.shape[1]
    ids = np.array([stream.rows.doc_ids[place // longest][place % longest] for place in places.tolist()])
    names, number = np.unique(ids, return_inverse=True)
    first = stream.offsets[RETAIN]
    retain = slice(first, first + stream.sizes[RETAIN])
    return Documents(torch.from_numpy(places), torch.from_numpy(number), len(names), retain)


def weights_of(u: Tensor, documents: Documents, like: Tensor) -> Tensor:
    """w for u, of the shape of the stream's weights; 1 for everything that is on neither side. Differentiable.

    Args:
        u: Logarithms, [documents + 3].
    """
    own, (forget, retain) = u[: documents.number], u[documents.number : documents.number + 2].exp()
    raised = (own - own.max()).exp()[documents.document]
    chosen = forget * raised * (len(documents.places) / raised.sum())
    kept = torch.zeros_like(like)
    kept[documents.retain] = 1
    whole = 1 + kept * (retain - 1).to(like)
    return whole.flatten().index_copy(0, documents.places, chosen.to(like)).view_as(like)


def gradient_of(
    scores: Tensor, u: Tensor, documents: Documents, slope: float = 0.0, learnt: Sequence[str] = ("weights",)
) -> Tensor:
    """∂J/∂u [documents + 3] for ∂J/∂w [rows, length]; 0 for what is not learnt.

    Args:
        slope: ∂J/∂ log lr.
    """
    live = u.detach().clone().requires_grad_()
    weights = weights_of(live, documents, scores)
    gradient = torch.autograd.grad((weights * scores).sum(), live)[0]
    gradient[-1] = slope
    return gradient * asked(u, learnt)


def asked(u: Tensor, learnt: Sequence[str]) -> Tensor:
    """1 for what is learnt of u, 0 for the rest, [documents + 3]."""
    places = {"weights": slice(0, -3), "coefficients": slice(-3, -1), "lr": slice(-1, None)}
    mask = torch.zeros_like(u)
    for name in learnt:
        mask[places[name]] = 1
    return mask


def faster(recipe: Recipe, factor: float) -> Recipe:
    """A recipe with all its learning rates multiplied."""
    optimizer: Any = recipe.optimizer
    rates = {name: None if (rate := getattr(optimizer.lr, name)) is None else rate * factor
             for name in ("lr", "start", "end")}  # fmt: skip
    return replace(recipe, optimizer=replace(optimizer, lr=replace(optimizer.lr, **rates)))


def drawn(attacks: Sequence[Finetune], number: int, sample: int, jitter: float) -> list[Finetune]:
    """The attacks of an iteration: some of all, each with a seed, a rate and a half of the facts of its own."""
    draw = random.Random(f"harden/{number}")
    other = {"half": "other_half", "other_half": "half"}
    taken = []
    for attack in draw.sample(list(attacks), min(sample, len(attacks))):
        swapped = other if draw.random() < 0.5 else {}
        taken.append(replace(
            attack, seed=draw.randrange(2**31), lr=attack.lr * math.exp(draw.uniform(-1, 1) * math.log(jitter)),
            data=swapped.get(attack.data, attack.data), before=swapped.get(attack.before or "", attack.before),
        ))  # fmt: skip
    return taken


def ascended(state: Ascent, gradient: Tensor, lr: float) -> Ascent:
    """A step of Adam upwards."""
    step = state.step + 1
    mean = BETAS[0] * state.mean + (1 - BETAS[0]) * gradient
    square = BETAS[1] * state.square + (1 - BETAS[1]) * gradient.square()
    corrected = mean / (1 - BETAS[0] ** step)
    spread = (square / (1 - BETAS[1] ** step)).sqrt()
    return Ascent(state.u + lr * corrected / (spread + EPS), mean, square, step)


def shuffled(u: Tensor, seed: int) -> Tensor:
    """The same numbers on other documents: the matched random control. What is of no document stays."""
    own = len(u) - len(COEFFICIENTS)
    return torch.cat([u[:own][torch.from_numpy(np.random.default_rng(seed).permutation(own))], u[own:]])


def retain_kl(loaded: Loaded, rows: int) -> Column:
    """KL(start ‖ θ) in nats, mean over the valid targets of retain rows, as a query.

    Args:
        rows: How many, spread evenly over all of them: data sets follow each other there.
    """
    stream = loaded.stream
    assert isinstance(stream, PairStream), "an unlearning has forget and retain rows"
    first, size = stream.offsets[RETAIN], stream.sizes[RETAIN]
    chosen = [first + place * size // min(rows, size) for place in range(min(rows, size))]
    if not chosen:
        raise ValueError("the unlearning has no retain rows: there is nothing to hold the retain KL on")
    batch = pad(stream.rows, chosen)
    device = stream.weights.device
    real = torch.arange(batch["input_ids"].shape[1]) < batch["lengths"][:, None]
    given = {"input_ids": batch["input_ids"].to(device), "attention_mask": real.long().to(device), "use_cache": False}
    asked = batch["target_mask"][:, 1:].to(device)
    call = bound_model(loaded.model.module)
    with torch.no_grad():
        start = call(loaded.initial.params)(**given).logits[:, :-1][asked].log_softmax(-1)

    def divergence(model: Any, tokenizer: Any) -> Tensor:
        now = model(**given).logits[:, :-1][asked].log_softmax(-1)
        return (start.exp() * (start - now)).sum(-1).mean()

    return function_column("retain_kl", divergence, call, loaded.tokenizer, stream.weights)


def part_rows(rows: Rows, part: Part) -> Rows:
    """The rows of one data set by themselves, as they were before they were joined."""
    chosen = slice(part.first_row, part.first_row + part.rows)
    documents = [ids - part.first_document for ids in rows.doc_ids[chosen]]
    own = Rows(rows.input_ids[chosen], rows.target_mask[chosen], documents, part.documents, {})
    assert own.digest().startswith(part.digest), "a part tells the digest of its rows"
    return own


def combined(parts: Sequence[tuple[float, Params]]) -> Params:
    """Σ factor·gradient, by parameter."""
    return {name: sum((factor * part[name] for factor, part in parts), torch.zeros(())) for name in parts[0][1]}


def mean_query(columns: Sequence[Column]) -> Callable[[Params], tuple[Tensor, Params]]:
    """The mean of several queries as one: φ [1], and its gradient [1, *shape]."""

    def ask(params: Params) -> tuple[Tensor, Params]:
        values, gradient = Queries(list(columns))(params)
        return values.mean()[None], {name: leaf.mean(0, keepdim=True) for name, leaf in gradient.items()}

    return ask
