"""A run of `retrograd attack --attribute` as one of unlearning, whose queries are asked after the attack.

    φ'(θ_K) = φ(θ_{K+S}), and ∇φ' is φ's gradient pulled back through the attack's phases

Each query column becomes φ', with a derivative of its own: so everything that takes a run with scores takes this one,
`retrograd verify`, `validate` and `query` among them. An attack is trained again for every value that is asked for, and
pulled back for every gradient, in memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retrograd.attack.chain_validation import attacked
from retrograd.attack.finetune import After, set_up_phase
from retrograd.core import tree
from retrograd.core.optim import Cotangent, Params
from retrograd.core.step import Batch
from retrograd.evaluate.folder import content
from retrograd.query.columns import Column, Part, Queries
from retrograd.runs.setup import Loaded
from retrograd.runs.states.budget import Replay, free_memory
from retrograd.settings.attack import PhaseConfig
from retrograd.settings.parse import build
from retrograd.settings.train import to_dict
from retrograd.settings.unlearn import ChainConfig, UnlearnConfig, parse_source
from retrograd.unlearn import setup as unlearning

__all__ = ["assemble", "chain_config", "contents"]


def chain_config(config: UnlearnConfig, phases: Sequence[PhaseConfig]) -> ChainConfig:
    """The settings of an unlearning with those of the attack that follows."""
    given = {field.name: getattr(config, field.name) for field in dataclasses.fields(UnlearnConfig)}
    told = ({**to_dict(phase), "contents": contents(phase)} for phase in phases)
    return ChainConfig(**given, chain=tuple(told))


def contents(phase: PhaseConfig) -> dict[str, str | None]:
    """Hashes of what a phase trains on, by data set."""
    names = [str(parse_source(text, UnlearnConfig()).dataset) for text in phase.sources]
    return {name: content(name) for name in names}


def assemble(config: ChainConfig) -> Loaded:
    """Load and check the unlearning and the attack.

    Raises:
        ValueError: For whatever cannot work; if the folder was left by a version that did not tell its attack, or what
            the attack trained on has changed.
    """
    if not config.chain:
        raise ValueError(f"{config.run} does not tell its attack: it is of an earlier version; attribute again, in "
                         "another folder")  # fmt: skip
    phases = [_phase(values, config, number) for number, values in enumerate(config.chain)]
    loaded = unlearning.assemble(config)
    columns = [column for one in loaded.asked for column in one.columns]
    chain = _Chain(loaded, phases, Queries(columns))
    asked, start = [], 0
    for one in loaded.asked:
        places = range(start, start := start + len(one.columns))
        behind = [Column(columns[k].name, [Part(_Objective(chain, k), _batch(loaded.stream.weights))]) for k in places]
        asked.append(one._replace(columns=behind, measure=_after(one.measure, chain)))
    return dataclasses.replace(loaded, asked=asked, after=chain.attacked)


def _phase(values: dict[str, Any], config: ChainConfig, number: int) -> PhaseConfig:
    given = {name: value for name, value in values.items() if name != "contents"}
    run = Path(config.run) / f"chained-{number}"  # nothing is written there
    phase: PhaseConfig = build(PhaseConfig, {**given, "run": run, "dtype": config.dtype}, f"{config.run}: chain")
    if changed := [name for name, old in values["contents"].items() if contents(phase).get(name) != old]:
        raise ValueError(f"the attack trained on {changed[0]}, which is gone or has changed since; put it back")
    return phase


def _after(measure: Any, chain: _Chain) -> Any:
    return lambda params: measure(chain.attacked(params))


def _batch(like: Tensor) -> Batch:
    """One coefficient of one."""
    return Batch({}, torch.zeros(1, dtype=torch.int64, device=like.device), like.new_ones(1))


class _Chain:
    """The queries after the attack, of parameters before it. The last gradient is kept: columns ask one by one."""

    def __init__(self, loaded: Loaded, phases: Sequence[PhaseConfig], queries: Queries) -> None:
        self.loaded, self.phases, self.queries = loaded, phases, queries
        self.known: tuple[str, bool] | None = None
        self.found: tuple[Tensor, Params | None] = (torch.zeros(0), None)

    def attacked(self, params: Params) -> Params:
        """Parameters after the attack."""
        return attacked(self.loaded, self.phases, params)

    def ask(self, params: Params, *, slopes: bool) -> tuple[Tensor, Params | None]:
        """φ' [K], and its gradient [K, *shape] if it is wanted."""
        key = (tree.digest(params), slopes)
        if self.known != key:
            self.found = self._pulled(list(self.phases), params) if slopes else (self._values(params), None)
            self.known = key
        return self.found

    def _values(self, params: Params) -> Tensor:
        return self.queries.values(self.attacked(params))

    def _pulled(self, phases: list[PhaseConfig], params: Params) -> tuple[Tensor, Params]:
        columns = len(self.queries.columns)
        setup, _ = set_up_phase(phases[0], After(self.loaded.model, self.loaded.tokenizer, params, columns))
        trajectory = setup.trajectory(Replay(memory=free_memory() // 4, disk=0))
        final, reached = trajectory.train(), list[Cotangent]()
        values, gradient = self._pulled(phases[1:], final.params) if phases[1:] else self.queries(final.params)
        del final
        trajectory.reverse(gradient, reached=reached.append)
        return values, reached.pop().params


class _Objective:
    """One column of a chain as an objective; nothing is trained on it."""

    def __init__(self, chain: _Chain, column: int) -> None:
        self.chain, self.column = chain, column

    def __call__(self, params: Params, inputs: dict[str, Tensor], coefficients: Tensor) -> Tensor:
        value: Tensor = _Asked.apply(self.chain, self.column, tuple(params), *params.values())
        return value * coefficients.sum()


class _Asked(torch.autograd.Function):
    """φ'_k, whose derivative is what the attack's sweep gives."""

    @staticmethod
    def forward(ctx: Any, chain: _Chain, column: int, names: tuple[str, ...], *leaves: Tensor) -> Tensor:
        slopes = any(ctx.needs_input_grad)
        params = {name: leaf.detach() for name, leaf in zip(names, leaves)}
        with torch.enable_grad():
            values, gradient = chain.ask(params, slopes=slopes)
        if gradient is not None:
            ctx.save_for_backward(*(gradient[name][column] for name in names))
        return values[column].clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        return (None, None, None, *(slope * leaf for leaf in ctx.saved_tensors))
