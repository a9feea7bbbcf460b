"""Fine-tuning attacks as trainings for the one loop: a configuration's phases, and what each is made of.

A configuration of two phases is two runs, the second of the model that the first leaves, with an optimizer and a
schedule of its own. Each is an ordinary run: it resumes, is evaluated on its way, and its folder says what it is.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch

from retrograd.attack.beforehand import check_key
from retrograd.core.optim import Params
from retrograd.data.pairs import joined
from retrograd.data.rows import Rows
from retrograd.data.stream import DataStream
from retrograd.lm.adapters import base_of
from retrograd.lm.load import load_model
from retrograd.lm.model import DTYPES, CausalLM, load_tokenizer
from retrograd.query.load import load_rows
from retrograd.runs.arithmetic import begun_with
from retrograd.runs.setup import Differentiated, Setup, find_device, set_up, visits
from retrograd.runs.shares import prove_while_whole
from retrograd.settings.attack import AttackConfig, Finetune, PhaseConfig, attack_steps
from retrograd.settings.on_the_way import OnTheWayConfig
from retrograd.settings.train import LoraConfig
from retrograd.settings.unlearn import UnlearnConfig, parse_source

__all__ = ["After", "Phase", "phases", "set_up_phase"]

_MODEL = "model"  # where a run leaves its model


class Phase(NamedTuple):
    """One run of a configuration; `last` says whether it is the attack itself."""

    name: str
    config: PhaseConfig
    last: bool


class After(NamedTuple):
    """A model as a phase finds it. params: where it starts, the model's own when None; queries: pulled back later."""

    model: CausalLM
    tokenizer: Any
    params: Params | None = None
    queries: int = 0


def phases(
    attack: Finetune, model: str, folder: Path, sources: dict[str, tuple[str, ...]], tasks: Path, config: AttackConfig
) -> list[Phase]:
    """The runs of a configuration against a model, in their order.

    Args:
        model: What is attacked.
        folder: Of this configuration against this model.
        sources: Data sets by key.
        tasks: What is asked on the way.
    Raises:
        ValueError: If there are no data of a key.
    """
    runs, start = [], model
    for name in attack.runs:
        last = name == attack.runs[-1]
        key, steps, epochs = (
            (attack.data, attack.steps, attack.epochs) if last else (attack.before, attack.before_steps, None)
        )
        assert key is not None, "a phase before has data"
        check_key(attack.readable, key, sources)
        phase = PhaseConfig(
            run=folder / name, model=start, tokenizer=config.tokenizer, dtype=attack.dtype, device=config.device,
            lora=_adapters(attack, start), heartbeat=config.heartbeat, export=config.export or not last,
            sources=sources[key], examples=attack.examples if last else None, steps=None if epochs else steps,
            epochs=epochs, max_length=config.max_length, chunk_length=config.chunk_length, max_passes=_most(config),
            evaluate=OnTheWayConfig(
                tasks=tasks, at=_ASKED, limit=config.limit, batch_size=config.batch_size, answers=True
            ),
            train=attack.train(), parallel=config.parallel, replicas=config.replicas, shards=config.shards,
            patience=config.patience,
        )  # fmt: skip
        runs.append(Phase(name, phase, last))
        start = str(folder / name / _MODEL)
    return runs


def _adapters(attack: Finetune, model: str) -> LoraConfig:
    """Those of the attack; a model that is a folder of adapters is attacked as the one that they make of their base."""
    return dataclasses.replace(attack.lora, adapter="merge" if base_of(model) else None)


_ASKED = tuple(attack_steps(10**6))  # those after a run's last step do not count


def _most(config: AttackConfig) -> float | None:
    return config.max_passes if config.max_passes is not None or config.lab is not None else 2.0


def set_up_phase(config: PhaseConfig, after: After | None = None) -> tuple[Setup, dict[str, Any]]:
    """A phase, loaded and checked before its first step, and what its manifest is to say besides.

    Args:
        after: What it goes on from, in place of the configuration's model.
    Raises:
        ValueError: For whatever cannot work, before anything is computed or written.
    """
    device = find_device(config.device)
    if after is None:
        tokenizer = load_tokenizer(config.tokenizer or config.model)
        after = After(load_model(config.model, config.dtype, device, config.lora, config.train), tokenizer)
        prove_while_whole(config, after.model)
    rows = _rows(config, after.model, after.tokenizer)
    stream = _stream(config, rows, device)
    begun = None if config.overwrite else begun_with(config.run)
    sharing = (config.shards, config.parallel, config.replicas)
    how = Differentiated("auto", False, after.queries, config.run, begun, *sharing)
    visited = ("attack", *visits(stream, "examples", config.dtype), len(stream))
    setup = set_up(after.model, after.tokenizer, stream, config.train, how, visited=visited, start=after.params)
    return setup, {"passes": round(len(stream) * config.train.batch_size / len(rows), 3), **_budget(setup)}


def _rows(config: PhaseConfig, model: CausalLM, tokenizer: Any) -> Rows:
    """The rows of all data sets together, of the first documents where only those are asked for."""
    of_sources = []
    for source in config.sources:
        data = parse_source(source, UnlearnConfig(max_length=config.max_length))
        if config.examples is not None:
            data = dataclasses.replace(data, limit=min(config.examples, data.limit or config.examples))
        of_sources.append(load_rows(data, tokenizer, model, "data", chunk_length=config.chunk_length)[0])
    rows = joined(of_sources)
    return dataclasses.replace(rows, packed=config.chunk_length is not None)


def _stream(config: PhaseConfig, rows: Rows, device: torch.device) -> DataStream:
    size, steps = config.train.batch_size, config.steps
    each = -(-len(rows) // size)
    epochs = config.epochs or math.ceil((steps or each) / each)
    passes = (steps or epochs * each) * size / len(rows)
    if config.max_passes is not None and config.epochs is None and passes > config.max_passes:
        raise ValueError(
            f"{steps} steps of {size} rows see the {len(rows)} rows of {', '.join(config.sources)} {passes:.1f} times, "
            f"and {config.max_passes:g} are the most: an attack that repeats few rows is weak. Give more data, fewer "
            "--steps, or a higher --max_passes"
        )
    dtype = torch.promote_types(DTYPES[config.dtype], torch.float32)
    return DataStream(rows, size, epochs=epochs, seed=config.train.seed, dtype=dtype, device=device, steps=steps)


def _budget(setup: Setup) -> dict[str, Any]:
    """Tokens trained on before each step, and FLOPs a token.

    2 FLOPs a parameter forward, 2 for the way back through it, 2 for its own gradient, which frozen ones have not.
    """
    stream = setup.stream
    lengths = stream.rows.lengths
    tokens = [0]
    for step in range(len(stream)):
        tokens.append(tokens[-1] + int(lengths[stream.rows_at(step)].sum()))
    trained = sum(leaf.numel() for leaf in setup.initial.params.values())
    every = sum(parameter.numel() for parameter in setup.model.module.parameters())
    return {"tokens": {str(step): tokens[step] for step in attack_steps(len(stream))},
            "flops_per_token": 4 * every + 2 * trained}  # fmt: skip
