"""From the configuration of `retrograd unlearn` to a training that has passed every guard before its first step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from retrograd.core import tree
from retrograd.core.step import coefficients, micro_batches
from retrograd.data.pairs import PairStream, Part, joined, parts_of
from retrograd.data.rows import Rows
from retrograd.lm.checkpoint import model_width
from retrograd.lm.model import DTYPES, CausalLM
from retrograd.parallel.group import here
from retrograd.query.named import load_queries
from retrograd.runs.arithmetic import begun_with
from retrograd.runs.further import with_further_training
from retrograd.runs.setup import (
    Differentiated,
    Loaded,
    Setup,
    Sources,
    attributed,
    find_device,
    set_up,
)
from retrograd.select import weights as weights_file
from retrograd.settings.parse import build
from retrograd.settings.run import queries_of
from retrograd.settings.train import LoraConfig
from retrograd.settings.unlearn import ONES, UnlearnConfig, parse_source
from retrograd.unlearn import guards
from retrograd.unlearn.method import Method
from retrograd.unlearn.methods import METHODS, find_method
from retrograd.unlearn.reference import perturbed, reference_of
from retrograd.unlearn.settings import Settings

__all__ = ["Read", "assemble", "reached", "read", "settings_of"]


class Read(NamedTuple):
    """What an unlearning run is made of, before its objective."""

    model: CausalLM
    tokenizer: Any
    stream: PairStream
    texts: list[str]
    parts: list[Part]


def assemble(config: UnlearnConfig) -> Loaded:
    """Everything an unlearning run is made of, with what is asked of the unlearned model, if anything is.

    Its `objective` is an `Unlearning`. The order of the guards matters: the reference is made of the model as it is,
    compared with it, and only then do parameters move beside it.

    Raises:
        ValueError: For whatever cannot work, before anything is computed or written: a run is to be attributed whose
            updates are no gradients, or are not differentiated right, too.
    """
    method = find_method(config.method)
    if config.attribute is not None:
        guards.check_attributable(method, settings_of(config, method))
    loaded = read(config, method)
    size = config.train.micro_batch_size or loaded.stream.batch_size
    given = (queries_of(config), loaded.model, loaded.tokenizer)
    asked = load_queries(*given, batch_size=size, like=loaded.stream.weights)
    queries = sum(len(query.columns) for query in asked) + config.sharpness
    setup = _set_up(config, method, loaded, queries)
    return attributed(setup, loaded.texts, with_further_training(config, setup, asked), loaded.parts)


def _set_up(config: UnlearnConfig, method: Method, loaded: Read, queries: int) -> Setup:
    model, stream, train = loaded.model, loaded.stream, config.train
    settings = settings_of(config, method)
    reference = reference_of(model) if method.needs_reference(settings) else None
    fitted = method.fitted_to(model, reference, stream, settings)
    objective = method.objective(model, reference, settings, fitted)
    guards.check_stream(objective, stream, train.micro_batch_size)
    guards.check_shards(method, config.shards or here().world)
    guards.check_reference(objective, model.params, stream[0])
    start = perturbed(model.params, method.perturb, train.seed) if method.perturb else model.params
    if method.edit is not None:
        assert reference is not None, "a method that edits has a reference"
        start = method.edit(settings, model, reference, stream)
    guards.check_start(objective, start, stream[0])
    nowhere = config.overwrite or not isinstance(config.run, Path)  # a configuration without its folder
    begun = None if nowhere else begun_with(config.run)
    known = method.name if METHODS.get(method.name) is method else method  # one of a user's is told by its code
    visited = (
        "unlearn", known, settings, reference.digest if reference else None, stream.sizes, stream.batches,
        stream.epochs, stream.shuffle, stream.seed, stream.horizon, tree.digest(stream.token_weights), config.dtype,
        *([config.attribute] if config.attribute else []), *([config.order] if config.order else []),
        *([fitted.digest] if fitted else []),
    )  # fmt: skip
    sharing = (config.shards, config.parallel, config.replicas)
    how = Differentiated("auto", False, queries, config.run, begun, *sharing)
    return set_up(model, loaded.tokenizer, stream, train, how, visited=visited, objective=objective, start=start)


def settings_of(config: UnlearnConfig, method: Method) -> Settings:
    """The method's settings: its defaults, those that were parsed, or plain values from a run's folder."""
    given = config.objective
    if given is None:
        return method.defaults
    settings: Settings = build(type(method.defaults), given, "objective") if isinstance(given, dict) else given
    return settings


def reached(setup: Setup) -> list[str]:
    """Names of the parameters that the objective depends on: those that have to change."""
    leaves = {name: theta.detach().clone().requires_grad_() for name, theta in setup.initial.params.items()}
    names: set[str] = set()
    for part in micro_batches(setup.stream[0], setup.training.recipe.micro_batch_size):
        with torch.enable_grad():
            loss = setup.objective(leaves, part.inputs, coefficients(part, setup.training.weights))
        slopes = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        names |= {name for name, slope in zip(leaves, slopes) if slope is not None}
    return [name for name in leaves if name in names]


def _adapters(config: UnlearnConfig, method: Method) -> LoraConfig:
    """The adapters asked for; where no rank is named, the method's for the width of the model."""
    rank, alpha = config.lora.rank, config.lora.alpha
    if rank is None:
        rank = method.adapter_rank(model_width(config.model))
    return LoraConfig(
        rank, float(rank) if alpha is None else alpha, config.lora.target_modules, adapter=config.lora.adapter
    )


def read(config: UnlearnConfig, method: Method, sources: Sources | None = None) -> Read:
    """The model, and forget, retain and alternative rows under one weight tensor."""
    sources = sources or Sources()
    device = find_device(config.device, tf32=config.tf32)
    tokenizer = sources.tokenizer(config.tokenizer or config.model)
    adapters = _adapters(config, method)
    model = sources.model(config.model, config.dtype, device, adapters, config.train)
    if method.trained is not None and not adapters.rank:
        model = sources.narrow(model, method.trained(settings_of(config, method), model.module))
    named, texts = list[tuple[str, str, Rows]](), list[str]()
    for side, given in (
        ("forget", config.forget), ("retain", config.retain), ("alternative", config.alternative),
    ):  # fmt: skip
        for source in given:
            data = parse_source(source, config)
            rows, excerpts = sources.rows(data, tokenizer, model, side, min_chars=data.min_chars)
            named.append((side, source, rows))
            texts += excerpts
    forget, retain, alternative = (
        [rows for side, _, rows in named if side == wanted] for wanted in ("forget", "retain", "alternative")
    )
    if alternative:
        _check_alternatives(joined(forget), joined(alternative))
    train, dtype = config.train, torch.promote_types(DTYPES[config.dtype], torch.float32)
    stream = PairStream(
        joined(forget), joined(retain) if retain else None, joined(alternative) if alternative else None,
        forget_batch=train.batch_size, retain_batch=train.retain_batch_size or train.batch_size, epochs=train.epochs,
        shuffle=config.shuffle, order=config.order, seed=train.seed, horizon=config.horizon,
        weights=_weights(config, method, forget, [*retain, *alternative]), per_token=config.attribute != "examples",
        dtype=dtype, device=device,
    )  # fmt: skip
    return Read(model, tokenizer, stream, texts, parts_of(named))


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
        weights = torch.ones(len(rows), longest)
        if name != ONES:
            _refuse_teaching(method, Path(name))
            given = weights_file.read(Path(name), rows, signed=method.signed and not _reversed(method, Path(name)))
            weights[:, : given.shape[1]] = given[:, :longest]
        parts.append(weights)
    return torch.cat([*parts, *(torch.ones(len(rows), longest) for rows in others)])


def _refuse_teaching(method: Method, weights: Path) -> None:
    if method.descends and weights_file.info(weights)["use"] == "removal":
        raise ValueError(
            f"{weights} says how much of a forget term each token gets (--use removal), and {method.name} descends: it "
            "would teach most what is to go most. Select with --use descent, or take a method that ascends"
        )


def _reversed(method: Method, weights: Path) -> bool:
    """Whether weights are for descent and the method ascends: what they mean to unlearn it would teach."""
    return not method.descends and weights_file.info(weights)["use"] == "descent"
