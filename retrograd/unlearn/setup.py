"""From the configuration of `retrograd unlearn` to a training that has passed every guard before its first step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retrograd.core import tree
from retrograd.core.step import coefficients, micro_batches
from retrograd.data.pairs import PairStream, joined
from retrograd.data.rows import Rows
from retrograd.lm.checkpoint import model_width
from retrograd.lm.model import DTYPES, CausalLM, load_tokenizer
from retrograd.query.load import load_rows
from retrograd.runs.setup import Differentiated, Setup, begun_with, find_device, load_model, set_up
from retrograd.select import weights as weights_file
from retrograd.settings.train import LoraConfig
from retrograd.settings.unlearn import ONES, UnlearnConfig, parse_source
from retrograd.unlearn import guards
from retrograd.unlearn.method import Method, Unlearning
from retrograd.unlearn.methods import METHODS
from retrograd.unlearn.reference import perturbed, reference_of

__all__ = ["reached", "set_up_unlearning"]


def set_up_unlearning(config: UnlearnConfig, method: Method) -> tuple[Setup, Unlearning]:
    """Everything an unlearning run is made of, and its objective.

    The order of the guards matters: the reference is made of the model as it is, compared with it, and only then do
    parameters move beside it.

    Raises:
        ValueError: For whatever cannot work, before anything is computed or written.
    """
    device = find_device(config.device)
    tokenizer = load_tokenizer(config.tokenizer or config.model)
    model = load_model(config.model, config.dtype, device, _adapters(config, method), config.train)
    stream = _pairs(config, method, model, tokenizer, device)
    settings = getattr(config, "objective", method.defaults)
    reference = reference_of(model) if method.needs_reference(settings) else None
    objective = method.objective(model, reference, settings)
    guards.check_stream(objective, stream, config.train.micro_batch_size)
    guards.check_reference(objective, model.params, stream[0])
    start = perturbed(model.params, method.perturb, config.train.seed) if method.perturb else model.params
    guards.check_start(objective, start, stream[0])
    begun = None if config.overwrite else begun_with(config.run)
    known = method.name if METHODS.get(method.name) is method else method  # one of a user's is told by its code
    visited = (
        "unlearn", known, settings, reference.digest if reference else None, stream.sizes, stream.batches,
        stream.epochs, stream.shuffle, stream.seed, stream.horizon, tree.digest(stream.weights), config.dtype,
    )  # fmt: skip
    how = Differentiated(run=config.run, begun=begun)
    setup = set_up(model, tokenizer, stream, config.train, how, visited=visited, objective=objective, start=start)
    return setup, objective


def reached(setup: Setup, objective: Unlearning) -> list[str]:
    """Names of the parameters that the objective depends on: those that have to change."""
    leaves = {name: theta.detach().clone().requires_grad_() for name, theta in setup.initial.params.items()}
    found: set[str] = set()
    for part in micro_batches(setup.stream[0], setup.training.recipe.micro_batch_size):
        with torch.enable_grad():
            loss = objective(leaves, part.inputs, coefficients(part, setup.training.weights))
        slopes = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        found |= {name for name, slope in zip(leaves, slopes) if slope is not None}
    return [name for name in leaves if name in found]


def _adapters(config: UnlearnConfig, method: Method) -> LoraConfig:
    """The adapters asked for; where no rank is named, the method's for the width of the model."""
    rank, alpha = config.lora.rank, config.lora.alpha
    if rank is None:
        rank = method.adapter_rank(model_width(config.model))
    return LoraConfig(rank, float(rank) if alpha is None else alpha, config.lora.target_modules)


def _pairs(config: UnlearnConfig, method: Method, model: CausalLM, tokenizer: Any, device: torch.device) -> PairStream:
    """Forget, retain and alternative rows under one weight tensor."""

    def read(sources: Sequence[str], flag: str) -> list[Rows]:
        found = []
        for source in sources:
            data = parse_source(source, config)
            found.append(load_rows(data, tokenizer, model, flag, min_chars=data.min_chars)[0])
        return found

    forget, retain, alternative = (
        read(sources, flag)
        for sources, flag in (
            (config.forget, "forget"), (config.retain, "retain"), (config.alternative, "alternative"),
        )
    )  # fmt: skip
    if alternative:
        _check_alternatives(joined(forget), joined(alternative))
    others = [*retain, *alternative]
    train, dtype = config.train, torch.promote_types(DTYPES[config.dtype], torch.float32)
    return PairStream(
        joined(forget), joined(retain) if retain else None, joined(alternative) if alternative else None,
        forget_batch=train.batch_size, retain_batch=train.retain_batch_size or train.batch_size, epochs=train.epochs,
        shuffle=config.shuffle, seed=train.seed, horizon=config.horizon,
        weights=_weights(config, method, forget, others), dtype=dtype, device=device,
    )  # fmt: skip


def _check_alternatives(forget: Rows, alternative: Rows) -> None:
    """A pair has lost its other half where a document of one side alone was skipped."""
    apart = sorted(forget.skipped.keys() ^ alternative.skipped.keys())
    if apart and len(forget) == len(alternative):
        raise ValueError(
            f"document {apart[0]} was skipped on one side alone ({forget.skipped.get(apart[0], 'not')} of --forget, "
            f"{alternative.skipped.get(apart[0], 'not')} of --alternative), so that the pairs after it would not "
            "belong together: mend or drop it in both files"
        )


def _weights(config: UnlearnConfig, method: Method, forget: Sequence[Rows], others: Sequence[Rows]) -> Tensor | None:
    """Data weights [rows of all sides, L], ones where nothing is said; None if they are all ones."""
    if not config.weights:
        return None
    longest = max(rows.max_length for rows in (*forget, *others))
    parts = []
    for name, rows in zip(config.weights, forget, strict=True):
        part = torch.ones(len(rows), longest)
        if name != ONES:
            read = weights_file.read(Path(name), rows, signed=method.signed)
            part[:, : read.shape[1]] = read[:, :longest]
        parts.append(part)
    return torch.cat([*parts, *(torch.ones(len(rows), longest) for rows in others)])
