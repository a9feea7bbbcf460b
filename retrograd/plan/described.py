"""A run in numbers: loaded as its command loads it, or described by its configuration without the model's weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from retrograd.core.engine import Double
from retrograd.core.step import Recipe, State, Training, initial_state
from retrograd.data.pairs import PairStream
from retrograd.data.rows import Rows
from retrograd.data.stream import DataStream
from retrograd.lm.engines import Curve, graph_curve
from retrograd.lm.model import CausalLM
from retrograd.plan.weightless import activations_of, narrowed, rows_of, weightless
from retrograd.plan.work import Asks, Matter, Work, matter_of, model_of, steps_of
from retrograd.query.load import load_choices, load_rows
from retrograd.query.named import Asked
from retrograd.query.questions import Questions
from retrograd.runs.assemble import assemble
from retrograd.runs.recipe import recipe_of
from retrograd.runs.run_folder import heartbeat_of
from retrograd.runs.setup import Setup, Sources, load_recipe, set_up_recipe
from retrograd.settings.plan import PlanConfig
from retrograd.settings.run import AttributedConfig, MagicConfig, QueryConfig, queries_of
from retrograd.settings.train import RecipeConfig, RunConfig
from retrograd.settings.unlearn import UnlearnConfig
from retrograd.unlearn import setup as unlearning
from retrograd.unlearn.method import Method
from retrograd.unlearn.methods import find_method

__all__ = ["Described", "described", "is_attributed", "loaded"]


class Described(NamedTuple):
    """A run in numbers, with its recipe and first state, of which what is kept is planned.

    setup: the run as loaded; None where only its configuration was read. asked: its queries, loaded.
    """

    work: Work
    recipe: Recipe
    initial: State
    setup: Setup | None = None
    asked: Sequence[Asked] = ()


def is_attributed(config: RunConfig) -> bool:
    """Whether a run has a way back."""
    return isinstance(config, AttributedConfig) and config.attribute is not None


def loaded(config: RunConfig) -> Described:
    """A run, loaded and proved as its command does before the first step.

    Raises:
        ValueError: As the command does.
    """
    asked = list[Asked]()
    setup: Setup
    if isinstance(config, UnlearnConfig):
        setup = assembled = unlearning.assemble(config)
        asked = assembled.asked
    elif isinstance(config, MagicConfig):
        setup = assembled = assemble(config)
        asked = assembled.asked
    else:
        assert isinstance(config, RecipeConfig), "checked by the command"
        setup = set_up_recipe(config)
    params, columns = setup.initial.params, sum(len(query.columns) for query in asked)
    model = model_of(setup.model.module, params)
    try:
        curves = [graph_curve(setup.model.module, setup.model.objective, twice=twice) for twice in (True, False)]
        model = model._replace(twice=curves[0], once=curves[1])
    except (ValueError, RuntimeError):  # as `choose_engine`, which says so: activations are not known
        pass
    matter = matter_of(setup.training, setup.initial)
    asks = Asks(
        columns, sum(_read_by(query) for query in asked), sum(len(c.parts) for query in asked for c in query.columns)
    )
    work = _work(config, setup.stream, model, matter, asks, setup.engine.name)
    return Described(work, setup.training.recipe, setup.initial, setup, asked)


def described(config: RunConfig, plan: PlanConfig) -> Described:
    """A run by its configuration and its data, without the model's weights; of data, by --rows, only their number.

    Raises:
        ValueError: If model or data are not there, or cannot work.
    """
    config = dataclasses.replace(config, device="cpu", tf32=False)
    sources = Sources(model=weightless, narrow=narrowed)
    if plan.rows is not None:
        sources = sources._replace(tokenizer=lambda name: None, rows=rows_of(plan))
    method = find_method(config.method) if isinstance(config, UnlearnConfig) else None
    stream: DataStream | PairStream
    if isinstance(config, UnlearnConfig):
        assert method is not None, "an unlearning has a method"
        read = unlearning.read(config, method, sources)
        model, tokenizer, stream = read.model, read.tokenizer, read.stream
    else:
        assert isinstance(config, RecipeConfig), "checked by the command"
        per_token = isinstance(config, MagicConfig) and config.attribute == "tokens"
        model, tokenizer, stream, _ = load_recipe(config, per_token=per_token, sources=sources)
    recipe = recipe_of(config.train, model, len(stream))
    initial = initial_state(recipe, model.params)
    objective: Any = _Declared(method is None or method.linear)
    matter = matter_of(Training(recipe, Double(objective), stream, stream.weights), initial)
    numbers = model_of(model.module, model.params)
    curves: tuple[Curve, Curve] | None = activations_of(config.model, config.dtype)
    if curves is not None:
        numbers = numbers._replace(twice=curves[0], once=curves[1])
    asks = _asks(config, plan, tokenizer, model) if is_attributed(config) else Asks()
    engine = config.engine if isinstance(config, RecipeConfig) and not config.train.dropout else "double"
    if isinstance(config, RecipeConfig) and config.compile:
        engine = "blocks"
    return Described(_work(config, stream, numbers, matter, asks, engine), recipe, initial)


class _Declared(NamedTuple):
    """What the kernel asks of an objective before it calls it."""

    linear: bool

    def __call__(self, *given: Any) -> Any:
        raise AssertionError("a plan without weights computes no loss")


def _work(
    config: RunConfig, stream: DataStream | PairStream, model: Any, matter: Matter, asks: Asks, engine: str
) -> Work:
    micro: int | None = getattr(config, "train").micro_batch_size  # noqa: B009
    attributed = isinstance(config, AttributedConfig) and config.attribute is not None
    sharp = isinstance(config, AttributedConfig) and config.sharpness
    queries = asks.columns + sharp if attributed else 0
    references = int(isinstance(config, UnlearnConfig) and _refers(config, find_method(config.method)))
    scores = int(np.prod(stream.weights.shape)) * asks.columns if attributed else 0
    exported = not isinstance(config, MagicConfig) and bool(getattr(config, "export", False))
    return Work(
        steps_of(stream, micro), model, matter, asks if attributed else Asks(), queries, engine, references, scores,
        exported, heartbeat_of(config), isinstance(config, UnlearnConfig),
    )  # fmt: skip


def _refers(config: UnlearnConfig, method: Method) -> bool:
    return method.needs_reference(unlearning.settings_of(config, method))


def _read_by(asked: Asked) -> int:
    """Tokens that a query's passes read, padding included."""
    batches = [part.batch for column in asked.columns for part in column.parts]
    return sum(_tokens(batch.inputs) for batch in batches)


def _tokens(inputs: Any) -> int:
    ids = inputs.get("input_ids") if isinstance(inputs, dict) else None
    return int(ids.numel()) if isinstance(ids, torch.Tensor) else 0


def _asks(config: AttributedConfig | RunConfig, plan: PlanConfig, tokenizer: Any, model: CausalLM) -> Asks:
    """What the queries read, by their data sets; a function of the user's counts as a column that reads nothing."""
    assert isinstance(config, AttributedConfig), "only such a run is attributed"
    queries = queries_of(config)
    if plan.questions is not None:
        assert plan.question_tokens is not None, "checked by the settings"
        columns = sum(1 if query.reduction == "mean" else plan.questions for query in queries.values())
        return Asks(columns, plan.questions * plan.question_tokens, plan.questions)
    if plan.rows is not None and any(query.dataset for query in queries.values()):
        raise ValueError("--rows reads no data set: say with --questions and --question_tokens what the queries ask")
    asks = {name: _asked(name, query, tokenizer, model) for name, query in queries.items() if not query.contrast}
    for name, query in queries.items():
        if query.contrast:
            pair = [asks[other] for other in query.contrast]
            asks[name] = Asks(max(x.columns for x in pair), *(sum(x[i] for x in pair) for i in (1, 2)))
    return Asks(*(sum(part) for part in zip(*asks.values(), strict=True)))


def _asked(name: str, query: QueryConfig, tokenizer: Any, model: CausalLM) -> Asks:
    if query.function:
        return Asks(1, 0, 1)
    flag = "query" if name == "query" else f"queries.{name}"
    content: Rows | Questions
    if query.choices:
        content = load_choices(query, tokenizer, model, flag)
        tokens = sum(len(row) for rows in content.rows for row in rows)
        count = len(content)
    else:
        content = load_rows(query, tokenizer, model, flag)[0]
        tokens, count = int(content.lengths.sum()), len(content)
    return Asks(1 if query.reduction == "mean" else count, tokens, count)
