"""Rivals that `validate` computes itself, for each query column: what metagradients have to beat on the same bank.

    bm25              −BM25 of the document for the query's text
    gradient_cosine   −cos(∇ℓ_j(θ_T), ∇φ(θ_T)): the gradient of a document's loss against the query's, at the end
    tracin            the mean of that over CHECKPOINTS states of the run, evenly spaced, the last one among them
    random            a normal draw

TracIn with normalised gradients, Pruthi et al., arXiv:2002.08484, and Xia et al., arXiv:2402.04333. All have the sign
of a score: negative = proponent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from retrograd.core.optim import Params
from retrograd.core.sweep import Advanced, Event, Turned
from retrograd.runs.run_folder import Opened, added_queries
from retrograd.runs.states.budget import Replay
from retrograd.select.places import Places
from retrograd.select.rivals import cosines
from retrograd.select.words import bm25, query_tokens
from retrograd.settings.run import queries_of
from retrograd.trust.models import Models

__all__ = ["CHECKPOINTS", "RIVALS", "STATES"]

CHECKPOINTS = 5
STATES = {"gradient_cosine": 1, "tracin": CHECKPOINTS}
"""States at which a rival takes a gradient of every document; those of tracin are trained once more."""


def _bm25(run: Opened, places: Places, by_document: bool, seed: int) -> Tensor:
    configs, tokenizer = {**queries_of(run.config), **added_queries(run.folder)}, run.loaded.tokenizer
    columns = []
    for asked in run.loaded.asked:
        texts = query_tokens(asked.name, configs[asked.name], tokenizer)
        each = [texts] if len(asked.columns) == 1 else [[text] for text in texts]
        if len(each) != len(asked.columns):
            raise ValueError(
                f"query {asked.name!r} has {len(asked.columns)} columns and {len(each)} texts, so rival bm25 cannot "
                "tell which text is whose; leave bm25 out"
            )
        columns += [-bm25(places, query_texts, tokenizer) for query_texts in each]
    scores = torch.stack(columns)
    return torch.stack([places.per_document(column) for column in scores]) if by_document else scores


def _gradient_cosine(run: Opened, places: Places, by_document: bool, seed: int) -> Tensor:
    params = Models(run).base
    return _against(run, {name: leaf.to(_device(run)) for name, leaf in params.items()}, places, by_document)


def _tracin(run: Opened, places: Places, by_document: bool, seed: int) -> Tensor:
    parts = [_against(run, params, places, by_document) for params in _checkpoints(run)]
    return torch.stack(parts).mean(0)


def _random(run: Opened, places: Places, by_document: bool, seed: int) -> Tensor:
    size = len(places.present()) if by_document else len(places)
    draw = np.random.default_rng([seed, 1])
    return torch.from_numpy(draw.normal(size=(len(run.loaded.queries.names), size)))


Rival = Callable[[Opened, Places, bool, int], Tensor]

RIVALS: dict[str, Rival] = {
    "bm25": _bm25, "gradient_cosine": _gradient_cosine, "tracin": _tracin, "random": _random,
}  # fmt: skip
"""(run, its real tokens, whether by document, seed) → [K, d or n] float64, negative = proponent."""


def _against(run: Opened, params: Params, places: Places, by_document: bool) -> Tensor:
    """−cosine with each query's gradient at these parameters, [K, d or n]."""
    return -cosines(run, params, places, run.loaded.queries(params)[1], by_document)[1]


def _checkpoints(run: Opened) -> Iterator[Params]:
    """Parameters along the run, which is trained again for them; the last are the run's own."""
    steps = len(run.loaded.stream)
    wanted = {round(steps * k / CHECKPOINTS) for k in range(1, CHECKPOINTS + 1)} - {0}
    kept = list[Params]()

    def observe(event: Event) -> None:
        if isinstance(event, Advanced | Turned) and event.outcome.state.step in wanted:
            kept.append({name: leaf.clone() for name, leaf in event.outcome.state.params.items()})

    run.loaded.trajectory(Replay(plan="binomial", slots=1), observe=observe).train()
    assert len(kept) == len(wanted), f"{len(kept)} of {len(wanted)} states were seen"
    yield from kept


def _device(run: Opened) -> torch.device:
    return next(iter(run.loaded.initial.params.values())).device
