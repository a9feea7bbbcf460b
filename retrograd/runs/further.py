"""Queries with `then`: what is trained on after a run and before they are asked, from its settings.

A phase trains the run's own parameters on, from where the run ends, by the data and the recipe of another run or of a
file. Model, precision and engine are the run's.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from retrograd.core.optim import Params
from retrograd.data.stream import DataStream
from retrograd.parallel.group import here
from retrograd.query.named import Asked, contrasted, hashed
from retrograd.runs.arithmetic import begun_with
from retrograd.runs.first_step import prove_first_step
from retrograd.runs.identity import fingerprint
from retrograd.runs.manifest import Manifest
from retrograd.runs.phases import asked_after
from retrograd.runs.setup import Differentiated, Setup, Sources, load_recipe, set_up, visits
from retrograd.settings.run import MagicConfig, queries_of, settings_from
from retrograd.settings.train import RecipeConfig, TrainRunConfig
from retrograd.settings.unlearn import UnlearnConfig

__all__ = ["with_further_training"]

Config = MagicConfig | UnlearnConfig

_COMMANDS = ("train", "magic")  # whose runs are data and a recipe, and nothing else


def with_further_training(config: Config, setup: Setup, asked: list[Asked]) -> list[Asked]:
    """The queries of a run; those with `then` as queries of its own final parameters.

    Raises:
        ValueError: If what is to be trained on cannot be loaded, or does not go on from this run.
    """
    queries = queries_of(config)
    together: dict[tuple[str, ...], list[str]] = {}  # they share what is trained
    for name, query in queries.items():
        if query.then:
            together.setdefault(query.then, []).append(name)
    if not together:
        return asked
    if here().world > 1:
        raise ValueError("--query.then trains on by one process: start this command without torchrun")
    _refuse_partial(setup.model.module, setup.initial.params, config)
    known = {query.name: query for query in asked}
    for then, names in together.items():
        columns = sum(len(known[name].columns) for name in names)
        phases = [_Phase(Path(path), config, setup, columns) for path in then]
        behind = asked_after([known[name] for name in names], [phase.begin for phase in phases], setup.stream.weights)
        known.update({query.name: _told(query, phases) for query in behind})
    for name, query in queries.items():
        if query.contrast:
            known[name] = contrasted(name, *(known[other] for other in query.contrast))
    return [known[name] for name in queries]


class _Phase:
    """A training that goes on from a run; tried when it is made, where the run is not begun."""

    def __init__(self, path: Path, config: Config, setup: Setup, columns: int) -> None:
        self.path, self.setup = path, setup
        self.recipe = _recipe(path)
        _refuse_other(path, self.recipe, config)
        given = dataclasses.replace(
            self.recipe, model="", tokenizer="", dtype=config.dtype, device=config.device, tf32=config.tf32
        )
        sources = Sources(tokenizer=lambda name: setup.tokenizer, model=lambda *given: setup.model)
        stream: DataStream = load_recipe(given, sources=sources)[2]
        self.stream, self.visited = stream, visits(stream, "examples", config.dtype)
        begun = dataclasses.replace(setup.arithmetic, compiled=False)
        self.how = Differentiated(queries=columns, run=config.run, begun=begun)
        first = self.begin(setup.initial.params)
        if config.overwrite or begun_with(config.run) is None:
            prove_first_step(first.training, first.initial, setup.model, None, attributed=True)
        self.digest = hashed(first.hashes["recipe"], first.hashes["rows"], repr(self.visited))
        self.record = {"path": str(path), "steps": len(stream), "rows": len(stream.rows)}

    def begin(self, params: Params) -> Setup:
        """The training that begins with some parameters."""
        given = (self.setup.model, self.setup.tokenizer, self.stream, self.recipe.train, self.how)
        return set_up(*given, visited=self.visited, start=params)

    def say_other_start(self, params: Params) -> None:
        """Warn if the run whose recipe this is began with other parameters than these."""
        known = Manifest(self.path / "manifest.json").values.get("hashes", {}) if self.path.is_dir() else {}
        if known.get("model", found := fingerprint(params)) != found:
            warnings.warn(
                f"{self.path} began with other parameters than this run ends with, so its own losses are others: its "
                "data and recipe are what was taken. To follow a run of its own, train it from the model of this one",
                stacklevel=2,
            )


def _told(asked: Asked, phases: Sequence[_Phase]) -> Asked:
    """A query that tells of its phases, and is another one for them."""

    def measure(params: Params, measure: Callable[[Params], dict[str, Any]] = asked.measure) -> dict[str, Any]:
        phases[0].say_other_start(params)
        return measure(params)

    record = {**asked.record, "then": [phase.record for phase in phases]}
    digest = hashed(asked.digest, *(phase.digest for phase in phases))
    return asked._replace(digest=digest, record=record, measure=measure)


def _recipe(path: Path) -> TrainRunConfig:
    """The settings of a folder's run, or of a file.

    Raises:
        ValueError: If there are none, or they are of another command.
    """
    file = path / "run_config.yaml" if path.is_dir() else path
    if not file.exists():
        raise ValueError(
            f"--query.then {path}: there is no {file}; give the folder of a run of `retrograd train` or `magic`, or a "
            "YAML file of such settings, {data: {dataset: …}, train: {…}}"
        )
    command = Manifest(path / "manifest.json").values.get("command", "magic") if path.is_dir() else "train"
    if command not in _COMMANDS:
        raise ValueError(
            f"--query.then {path} is a run of `retrograd {command}`, which trains on more than rows; a query can be "
            "asked after runs of `retrograd train` or `magic` (after an attack: `retrograd attack --attribute`)"
        )
    recipe = settings_from(TrainRunConfig, file)
    if not isinstance(recipe.data.dataset, str):
        raise ValueError(f"--query.then {path}: {file} names no data set; write {{data: {{dataset: …}}}} into it")
    return recipe


def _refuse_other(path: Path, recipe: RecipeConfig, config: Config) -> None:
    """Refuse what would train other parameters than the run does."""
    if recipe.lora.rank and (recipe.lora.rank, recipe.lora.adapter) != (config.lora.rank, "continue"):
        raise ValueError(
            f"--query.then {path} trains adapters of rank {recipe.lora.rank} of its own, and derivatives go through "
            f"phases that train the same parameters, here {_trained(config)}: leave --lora out of it"
        )
    for who, train in ((f"--query.then {path}", recipe.train), ("a run with --query.then", config.train)):
        if train.dropout:
            raise ValueError(
                f"{who} trains with dropout, which the model then has in every phase: leave --train.dropout out"
            )


def _refuse_partial(module: nn.Module, params: Params, config: Config) -> None:
    every, own = sum(x.numel() for x in module.parameters()), sum(x.numel() for x in params.values())
    if not config.lora.rank and own < every:
        raise ValueError(
            f"--query.then: this run trains {own:,} of {every:,} parameters, and what follows trains all; take a run "
            "that trains the whole model"
        )


def _trained(config: Config) -> str:
    return f"the run's adapters of rank {config.lora.rank}" if config.lora.rank else "all of the model's"
