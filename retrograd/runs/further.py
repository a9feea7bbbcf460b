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

import torch
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
from retrograd.runs.recipe import recipe_of
from retrograd.runs.setup import Differentiated, Setup, Sources, load_recipe, set_up, visits
from retrograd.settings.run import MagicConfig, queries_of, settings_from
from retrograd.settings.train import RecipeConfig, TrainRunConfig, check_recipe
from retrograd.settings.unlearn import UnlearnConfig

__all__ = ["with_further_training"]

Config = MagicConfig | UnlearnConfig

_COMMANDS = ("train", "magic")  # whose runs are data and a recipe, and nothing else


def with_further_training(config: Config, setup: Setup, asked: list[Asked]) -> list[Asked]:
    """The queries of a run; those with `then` as queries of its own final parameters.

    Raises:
        ValueError: If what is to be trained on cannot be loaded, or does not go on from this run.
    """
    queries, known = queries_of(config), {query.name: query for query in asked}
    for (then, answered), names in _together(config).items():
        if here().world > 1 and not answered:
            raise ValueError(f"query {names[0]!r} trains on by one process: start this command without torchrun")
        _refuse_partial(setup.model.module, setup.initial.params)
        columns = sum(len(known[name].columns) for name in names)
        try:
            phases = [_Phase(Path(path), config, setup, columns) for path in then]
        except ValueError as error:
            mend = (
                f". It has scores by that: put it back, or delete {config.run}/queries/{names[0]}" if answered else ""
            )
            raise ValueError(f"query {names[0]!r}: {error}{mend}") from error
        behind = asked_after([known[name] for name in names], [phase.begin for phase in phases], setup.stream.weights)
        known.update({query.name: _told(query, phases) for query in behind})
    for name, query in queries.items():
        if query.contrast:
            known[name] = contrasted(name, *(known[other] for other in query.contrast))
    return [known[name] for name in queries]


def _together(config: Config) -> dict[tuple[tuple[str, ...], bool], list[str]]:
    """Names of queries that share what is trained: by what that is, and whether they have been answered.

    What is answered is not pulled back again when another one is.
    """
    together: dict[tuple[tuple[str, ...], bool], list[str]] = {}
    for name, query in queries_of(config).items():
        if query.then:
            answered = isinstance(config.run, Path) and (config.run / f"queries/{name}/gradient.safetensors").exists()
            together.setdefault((query.then, answered), []).append(name)
    return together


class _Phase:
    """A training that goes on from a run; tried when it is made, where the run is not begun."""

    def __init__(self, path: Path, config: Config, setup: Setup, columns: int) -> None:
        self.path, self.setup, self.columns, self.run = path, setup, columns, config.run
        self.recipe = _recipe(path)
        _refuse_other(path, self.recipe, config, setup.model.module)
        given = dataclasses.replace(
            self.recipe, model="", tokenizer="", dtype=config.dtype, device=config.device, tf32=config.tf32
        )
        sources = Sources(tokenizer=lambda name: setup.tokenizer, model=lambda *given: setup.model)
        self.stream: DataStream = load_recipe(given, sources=sources)[2]
        self.visited = visits(self.stream, "examples", config.dtype)
        if config.overwrite or begun_with(config.run) is None:
            first = self.begin(setup.initial.params)
            prove_first_step(first.training, first.initial, setup.model, None, attributed=True)
        recipe = recipe_of(self.recipe.train, setup.model, len(self.stream), setup.arithmetic.shards)
        self.digest = hashed(fingerprint(recipe), self.stream.rows.digest(), repr(self.visited))
        self.record = {"path": str(path), "steps": len(self.stream), "rows": len(self.stream.rows)}

    def begin(self, params: Params) -> Setup:
        """The training that begins with some parameters."""
        if here().world > 1:
            raise ValueError(f"--query.then {self.path} is trained on by one process: leave torchrun out")
        # as the run, but by as many threads as whoever asks computes with
        begun = dataclasses.replace(self.setup.arithmetic, compiled=False, threads=torch.get_num_threads())
        how = Differentiated(queries=self.columns, run=self.run, begun=begun, shards=None)
        given = (self.setup.model, self.setup.tokenizer, self.stream, self.recipe.train, how)
        return set_up(*given, visited=self.visited, start=params)

    def say_other_start(self, params: Params) -> None:
        """Warn if the run whose recipe this is began with other parameters than these."""
        known = Manifest(self.path / "manifest.json").values.get("hashes", {}) if self.path.is_dir() else {}
        if known.get("model", own := fingerprint(params)) != own:
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
    try:
        check_recipe(recipe)
    except ValueError as error:
        raise ValueError(f"--query.then {path}: {error}") from error
    return recipe


def _refuse_other(path: Path, recipe: RecipeConfig, config: Config, module: nn.Module) -> None:
    """Refuse what would train other parameters than the run does."""
    own, lora = _adapted(module), recipe.lora
    if lora.rank or (lora.adapter == "continue" and not own):
        raise ValueError(
            f"--query.then {path} trains adapters of its own, and derivatives go through phases that train the same "
            f"parameters, here {'the adapters of the run' if own else 'the whole model'}: leave --lora out of it"
        )
    for who, train in ((f"--query.then {path}", recipe.train), ("a run with --query.then", config.train)):
        if train.dropout:
            raise ValueError(
                f"{who} trains with dropout, which the model then has in every phase: leave --train.dropout out"
            )


def _refuse_partial(module: nn.Module, params: Params) -> None:
    every, own = sum(x.numel() for x in module.parameters()), sum(x.numel() for x in params.values())
    if own < every and not _adapted(module):
        raise ValueError(
            f"--query.then: this run trains {own:,} of {every:,} parameters, and what follows trains all; take a run "
            "that trains the whole model"
        )


def _adapted(module: nn.Module) -> bool:
    """Whether what a model trains is adapters."""
    return any("lora_" in name for name, _ in module.named_parameters())
