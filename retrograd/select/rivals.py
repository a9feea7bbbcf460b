"""Rivals by plain gradients at the trained model: their norm, and their cosine with the query's gradient.

    norm_j = ‖∇ℓ_j(θ_T)‖          cos_j = ⟨∇ℓ_j(θ_T), ∇φ(θ_T)⟩ / (‖∇ℓ_j‖ ‖∇φ‖)

ℓ_j is the loss of a real token, or the sum over those of a document. cos > 0: a step that descends ℓ_j lowers the
query's loss, so −cos has the sign of a score. One backward pass for each j, one forward pass for each row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from retrograd.core.optim import Params
from retrograd.data.rows import pad
from retrograd.runs.files import read_tensors
from retrograd.runs.progress import counting
from retrograd.runs.run_folder import Opened
from retrograd.select.places import Places

__all__ = ["Gradients", "cosines", "gradients", "query_gradient"]


class Gradients(NamedTuple):
    """Of tokens, [n], or documents, [d]: float64. cosine: with the query's gradient; 0 where a gradient is 0."""

    norm: Tensor
    cosine: Tensor


def query_gradient(run: Path, name: str, columns: slice) -> tuple[float, Params]:
    """φ in nats and ∇φ at the trained model of a run's folder, the mean over the columns."""
    tensors = read_tensors(run / "queries" / name / "gradient.safetensors")[0]
    known = {key.removeprefix("gradient."): g for key, g in tensors.items() if key.startswith("gradient.")}
    value = float(tensors["values"][columns].double().mean())
    return value, {key: g[columns].double().mean(0) for key, g in known.items()}


def gradients(run: Opened, places: Places, query: Params, by_document: bool) -> Gradients:
    """Norm and cosine of the gradient of each real token, or each document's sum over its tokens.

    Args:
        query: ∇φ by parameter.
    """
    params = run.trajectory().train().params
    norm, cosine = cosines(run, params, places, {name: g[None] for name, g in query.items()}, by_document)
    return Gradients(norm, cosine[0])


def cosines(run: Opened, params: Params, places: Places, queries: Params, by_document: bool) -> tuple[Tensor, Tensor]:
    """Norm of each loss's gradient at some parameters, [n], and its cosine with each query's, [K, n]: float64.

    Args:
        queries: ∇φ of K queries at these parameters, [K, *shape] by parameter.
        by_document: Of each document's sum instead of each token's loss.
    """
    live = {name: theta.detach().requires_grad_() for name, theta in params.items()}
    directions = [queries[name].to(theta.device).double() for name, theta in live.items()]
    lengths = torch.stack([direction.flatten(1).square().sum(1) for direction in directions]).sum(0).sqrt().cpu()
    units = _units(places, by_document)
    losses = lru_cache(maxsize=1)(partial(_losses, run, live))  # a row's units follow each other
    norms = torch.zeros(len(units), dtype=torch.float64)
    cosine = torch.zeros((len(lengths), len(units)), dtype=torch.float64)
    with counting("gradients", len(units), "gradients") as tick:
        for number, chosen in enumerate(units):
            rows = torch.unique(places.row[chosen]).tolist()
            parts = [losses(row)[places.column[chosen[places.row[chosen] == row]]].sum() for row in rows]
            each = [torch.autograd.grad(part, list(live.values()), retain_graph=True) for part in parts]
            gradient = [torch.stack(leaves).double().sum(0) for leaves in zip(*each)]
            norms[number] = norm = _length(gradient)
            along = torch.stack([(g * q).flatten(1).sum(1) for g, q in zip(gradient, directions)]).sum(0).cpu()
            size = norm * lengths
            cosine[:, number] = torch.where(size > 0, along / size, 0.0)
            tick()
    return norms, cosine


def _length(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(g.square().sum()) for g in tensors))


def _units(places: Places, by_document: bool) -> list[Tensor]:
    """The real tokens, as places of the flat axis, of each token or document."""
    everything = torch.arange(len(places))
    if not by_document:
        return list(everything[:, None])
    order = torch.argsort(places.document, stable=True)
    counts = torch.unique(places.document, return_counts=True)[1]
    return list(order.split(counts.tolist()))


def _losses(run: Opened, live: Params, row: int) -> Tensor:
    """Loss of each token of a row, [length]: the objective Σ c·ℓ differentiated by c, once for all its tokens."""
    inputs = pad(run.loaded.rows, [row])
    first = next(iter(live.values()))
    placed = {name: x.to(first.device) for name, x in inputs.items() if name not in ("lengths", "doc_ids")}
    dtype = torch.promote_types(first.dtype, torch.float32)
    c = torch.ones(placed["target_mask"].shape, dtype=dtype, device=first.device, requires_grad=True)
    value = run.loaded.model.evaluated(live, placed, c)
    return torch.autograd.grad(value, c, create_graph=True)[0][0]
