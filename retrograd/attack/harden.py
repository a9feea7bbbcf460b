"""Weights of forget documents that make unlearning hold: metagradient ascent through unlearning and attack.

    J(w) = mean over attacks φ(θ after unlearning with w and attack) − μ·KL(θ after unlearning with w)
    w_p = n·e^{u_d(p)} / Σ_q e^{u_d(q)}         p one of n forget tokens, d(p) its document: w ≥ 0, mean 1

φ is the loss on forget questions whose answers the attack does not show, KL the token mean of KL(start ‖ θ) on retain
rows. ∂J/∂w comes from one sweep through the unlearning: the attacks' cotangents at its end and −μ·∇KL add up. Adam
raises J over u. Source: metagradient descent, Engstrom et al., arXiv:2503.13751.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from retrograd.attack.chain_validation import forget_places
from retrograd.core.optim import Params
from retrograd.data.pairs import RETAIN, PairStream, Part
from retrograd.data.rows import Rows, pad
from retrograd.lm.model import bound_model
from retrograd.query.columns import Column, Queries, function_column
from retrograd.runs.setup import Loaded

__all__ = [
    "Ascent",
    "Documents",
    "ascended",
    "combined",
    "documents_of",
    "gradient_of",
    "mean_query",
    "part_rows",
    "retain_kl",
    "shuffled",
    "weights_of",
]

BETAS, EPS = (0.9, 0.99), 1e-12


class Documents(NamedTuple):
    """The forget tokens: their flat places in the weights [n], and the document of each, numbered from 0, [n].

    number: Of documents.
    """

    places: Tensor
    document: Tensor
    number: int


class Ascent(NamedTuple):
    """Adam's state: u, and the moments of its gradient, [documents] each; steps taken."""

    u: Tensor
    mean: Tensor
    square: Tensor
    step: int = 0


def documents_of(stream: PairStream) -> Documents:
    """The forget documents of a stream."""
    places, longest = forget_places(stream), stream.weights.shape[1]
    found = np.array([stream.rows.doc_ids[place // longest][place % longest] for place in places.tolist()])
    names, number = np.unique(found, return_inverse=True)
    return Documents(torch.from_numpy(places), torch.from_numpy(number), len(names))


def weights_of(u: Tensor, documents: Documents, like: Tensor) -> Tensor:
    """w for u, of the shape of the stream's weights; 1 for everything that is no forget token. Differentiable.

    Args:
        u: Logarithms, [documents].
    """
    raised = (u - u.max()).exp()[documents.document]
    chosen = raised * (len(documents.places) / raised.sum())
    return torch.ones_like(like).flatten().index_copy(0, documents.places, chosen.to(like)).view_as(like)


def gradient_of(scores: Tensor, u: Tensor, documents: Documents) -> Tensor:
    """∂J/∂u [documents] for ∂J/∂w [rows, length]."""
    live = u.detach().clone().requires_grad_()
    weights = weights_of(live, documents, scores)
    return torch.autograd.grad((weights * scores).sum(), live)[0]


def ascended(state: Ascent, gradient: Tensor, lr: float) -> Ascent:
    """A step of Adam upwards."""
    step = state.step + 1
    mean = BETAS[0] * state.mean + (1 - BETAS[0]) * gradient
    square = BETAS[1] * state.square + (1 - BETAS[1]) * gradient.square()
    corrected = mean / (1 - BETAS[0] ** step)
    spread = (square / (1 - BETAS[1] ** step)).sqrt()
    return Ascent(state.u + lr * corrected / (spread + EPS), mean, square, step)


def shuffled(u: Tensor, seed: int) -> Tensor:
    """The same numbers on other documents: the matched random control."""
    return u[torch.from_numpy(np.random.default_rng(seed).permutation(len(u)))]


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
    found = Rows(rows.input_ids[chosen], rows.target_mask[chosen], documents, part.documents, {})
    assert found.digest().startswith(part.digest), "a part tells the digest of its rows"
    return found


def combined(parts: Sequence[tuple[float, Params]]) -> Params:
    """Σ factor·gradient, by parameter."""
    return {name: sum((factor * part[name] for factor, part in parts), torch.zeros(())) for name in parts[0][1]}


def mean_query(columns: Sequence[Column]) -> Callable[[Params], tuple[Tensor, Params]]:
    """The mean of several queries as one: φ [1], and its gradient [1, *shape]."""

    def ask(params: Params) -> tuple[Tensor, Params]:
        values, gradient = Queries(list(columns))(params)
        return values.mean()[None], {name: leaf.mean(0, keepdim=True) for name, leaf in gradient.items()}

    return ask
