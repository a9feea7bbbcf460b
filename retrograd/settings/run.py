"""The configuration of a run: the dataclasses behind the command line and run_config.yaml. No heavy imports here."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import tyro

from retrograd.settings.parse import build, parse_size, read_yaml
from retrograd.settings.question import ChoiceLoss, Question
from retrograd.settings.train import (
    GONE,
    DataConfig,
    LoraConfig,
    RecipeConfig,
    ReplayConfig,
    RunConfig,
    TrainConfig,
    TrainRunConfig,
    at_least_1,
    check_recipe,
    difference,
    finite,
    to_dict,
)

__all__ = [
    "AttributedConfig", "DataConfig", "LoraConfig", "MagicConfig", "QueryConfig", "ReplayConfig", "TrainConfig",
    "check", "check_attributed", "check_query", "difference", "from_yaml", "queries_of", "query_file", "refuse_code",
    "settings_from", "to_dict",
]  # fmt: skip


C = TypeVar("C")


@dataclass(frozen=True)
class QueryConfig(Question):
    """What is asked of the trained model, in nats: its loss on documents or on questions, or a function of yours."""

    form: Literal["text", "letter", "cloze"] = "text"
    """text: mean token loss. letter, cloze: multiple choice by answer letter, or by the answers' own texts; the data
    set then needs question, choices and answer."""
    reduction: Literal["mean", "none"] = "mean"
    """One score for the whole set (mean), or one score column for each document or question (none)."""
    loss: ChoiceLoss = "four_way"
    """four_way: −log of the right answer's share among the question's choices, what accuracy measures; full: −log p of
    the right answer, which also falls when all answers become more likely."""
    function: str | None = None
    """A Python function instead, module:name or file.py:name, called with (model, tokenizer); returns a scalar."""
    contrast: tuple[str, ...] = ()
    """Two other queries by name instead: the first minus the second."""
    then: tuple[str, ...] = ()
    """What is trained on after the run and before this is asked, one after the other: folders of runs of `retrograd
    train` or `magic`, or YAML files of such settings, of which data and train count. Scores are then for the loss after
    that training, such as those of pretraining rows for a fine-tuned model's answers."""


@dataclass(frozen=True)
class AttributedConfig(RunConfig):
    """What every run that can be attributed has in common: what is asked of it, and how the way back is carried out."""

    query: QueryConfig = field(default_factory=QueryConfig)
    query_file: Path | None = None
    """YAML file of several queries for one sweep, settings by name: {a: {dataset: …}, gap: {contrast: [a, b]}}."""
    queries: tyro.conf.Suppress[dict[str, QueryConfig]] = field(default_factory=dict)
    attribute: Literal["examples", "tokens"] | None = None
    """One score per document, or one per training token; none when None."""
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    sharpness: bool = False
    """Estimate lr·λ_max of the Hessian by step; costs one more Hessian-vector product a step."""
    trust_code: bool = False
    """Run the Python functions that a file names: a run's own settings, --config or --query_file. They run with your
    rights, so read them first. A --query.function typed in the command needs no such word."""


@dataclass(frozen=True)
class MagicConfig(RecipeConfig, AttributedConfig):
    """Train a model, pull the query loss back through every step, and write each training example's exact score."""

    attribute: Literal["examples", "tokens"] = "examples"
    """One score per document, or one per training token."""


def settings_from(kind: type[C], path: Path) -> C:
    """Defaults from a YAML file; the folder of the run is left to be given.

    Raises:
        ValueError: If the file is missing or not YAML, or names a setting that does not exist.
    """
    values = read_yaml(path)
    # a recipe may come from a run of the other command: what that one asks, keeps or leaves is no part of it
    either = {f.name for command in (MagicConfig, TrainRunConfig) for f in dataclasses.fields(command)}
    skipped = either if issubclass(kind, (MagicConfig, TrainRunConfig)) else set[str]()
    skipped -= {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    config: C = build(kind, {name: v for name, v in values.items() if name not in {*GONE, *skipped}}, str(path))
    return config


def from_yaml(path: Path) -> MagicConfig:
    """The configuration of a run, from its run_config.yaml."""
    return settings_from(MagicConfig, path)


def query_file(path: Path) -> dict[str, QueryConfig]:
    """Queries by name, from a YAML file."""
    values = read_yaml(path)
    for name, settings in values.items():
        if not isinstance(settings, dict):
            raise ValueError(f"{path}: query {name!r} is {settings!r}; it has to be settings, such as {{dataset: …}}")
    return {str(name): build(QueryConfig, settings, f"{path}: {name}") for name, settings in values.items()}


def queries_of(config: AttributedConfig) -> dict[str, QueryConfig]:
    """All queries of a run by name; the one of --query.* is called "query"."""
    given = config.query
    main = {"query": given} if given.dataset or given.function or given.contrast else {}
    return {**main, **config.queries}


def refuse_code(queries: dict[str, QueryConfig], file: Path, trusted: bool) -> None:
    """Refuse to run functions that a file names, unless whoever runs the command trusts them.

    Raises:
        ValueError: With the function, its query and the file.
    """
    named = [(name, query.function) for name, query in queries.items() if query.function]
    if named and not trusted:
        (name, function), more = named[0], f" ({len(named) - 1} more)" if len(named) > 1 else ""
        raise ValueError(
            f"{file} names Python code: query {name!r} runs {function}{more}, with your rights. Read it; then give "
            "--trust_code to run it"
        )


def check(config: MagicConfig) -> None:
    """Refuse, before anything is loaded, what cannot work.

    Raises:
        ValueError: With the setting, its value and what it has to be.
    """
    check_recipe(config)
    check_attributed(config)


def check_attributed(config: AttributedConfig) -> None:
    """As `check`, for what is asked of a run and its way back.

    Raises:
        ValueError: As `check`.
    """
    replay = config.replay
    at_least_1({"replay.interval": replay.interval, "replay.slots": replay.slots})
    finite({"replay.heartbeat": replay.heartbeat})
    if replay.plan == "interval" and replay.interval is None:
        raise ValueError("--replay.plan interval needs --replay.interval, the distance between held states")
    for size in (replay.memory, replay.disk):
        if size != "auto":
            parse_size(size)
    queries = queries_of(config)
    if "query" in config.queries and config.query != QueryConfig():
        raise ValueError("--query_file has a query named 'query', which is the one of --query; give it another name")
    if not queries:
        raise ValueError("no query: give --query.dataset (or --query.function, or several in --query_file)")
    for name, query in queries.items():
        check_query(name, query, queries)


def check_query(name: str, query: QueryConfig, known: dict[str, QueryConfig]) -> None:
    """Refuse a query that cannot work."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise ValueError(f"query name {name!r} is used as a folder; use letters, digits, '.', '_' and '-'")
    sources = {"dataset": query.dataset, "function": query.function, "contrast": query.contrast}
    given = [source for source, value in sources.items() if value]
    if len(given) != 1:
        has = f"it has {' and '.join(given)}" if given else "it has none"
        raise ValueError(f"query {name!r} needs exactly one of dataset, function and contrast; {has}")
    for setting, number in (("limit", query.limit), ("max_length", query.max_length)):
        if number is not None and number < 1:
            raise ValueError(f"query {name!r}: {setting} is {number}; it has to be at least 1")
    if query.contrast:
        if len(query.contrast) != 2 or len(set(query.contrast)) != 2:
            raise ValueError(f"query {name!r} contrasts {', '.join(query.contrast)}; it takes two different queries")
        for other in query.contrast:
            if other not in known or known[other].contrast:
                raise ValueError(
                    f"query {name!r} contrasts {other!r}, which is no other plain query; there are "
                    f"{', '.join(n for n in known if not known[n].contrast) or 'none'}"
                )
    changed = [f.name for f in dataclasses.fields(query) if getattr(query, f.name) != f.default]
    _check_belongs(name, query, given[0], changed)
    if query.normalise and query.form != "cloze":
        raise ValueError(f"query {name!r}: normalise belongs to --query.form cloze; a letter is one token")


def _check_belongs(name: str, query: QueryConfig, source: str, changed: list[str]) -> None:
    """Refuse settings that this kind of query would ignore."""
    if source != "dataset":
        unread = [s for s in changed if s != source and (s != "then" or query.contrast)]
        kind = f"a {source}"
    elif query.form == "text":
        unread, kind = [s for s in changed if s in ("template", "loss", "normalise")], "--query.form text"
    else:
        unread = [s for s in changed if s in ("text_column", "assistant_only_loss")]
        kind = f"--query.form {query.form}"
    if unread:
        raise ValueError(f"query {name!r}: {kind} has no use for {', '.join(unread)}; leave that out")
