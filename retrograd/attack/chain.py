"""Metagradients through unlearning and attack: phases chain, so λ_0 of one is the query gradient of the one before it.

    unlearning θ_0 → θ_K,  attack θ_K → θ_{K+S},  φ(θ_{K+S}) the forget loss after the attack
    pull φ's gradient back through the attack: λ_K;  pull λ_K back through the unlearning: ∂φ/∂w of its data weights

An attack begins with fresh moments, which depend on nothing: λ_K has a part for the parameters alone. So it is with
each phase of an attack that has several. Both are trained full, for merged adapters would stand between them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from retrograd.core.optim import Cotangent, Params
from retrograd.core.step import State
from retrograd.runs.session import Session
from retrograd.runs.setup import Setup
from retrograd.settings.attack import Finetune
from retrograd.settings.run import QueryConfig
from retrograd.settings.tasks import Task
from retrograd.settings.unlearn import UnlearnConfig, refuse_method

__all__ = ["Link", "check_chain", "forget_queries", "pulled_back", "unlearning_of"]


class Link(NamedTuple):
    """A phase of an attack, to be set up from the parameters that it begins with, and opened as a session."""

    set_up: Callable[[Params], Setup]
    open: Callable[[Setup], AbstractContextManager[Session]]


def pulled_back(
    links: Sequence[Link], params: Params, ask: Callable[[Setup, State], tuple[Tensor, Params]]
) -> tuple[Tensor, Params]:
    """φ [K] after all phases, and its gradient [K, *shape] with respect to the parameters that the first begins with.

    Args:
        links: Phases, in their order; at least one.
        params: Where the first begins.
        ask: φ and its gradient at the last phase's final state.
    """
    setup = links[0].set_up(params)
    with links[0].open(setup) as session:
        final = session.train()
        following = links[1:]
        values, gradient = pulled_back(following, final.params, ask) if following else ask(setup, final)
        reached = list[Cotangent]()
        with session.reversing() as trajectory:
            trajectory.reverse(gradient, reached=reached.append)
    return values, reached.pop().params


def check_chain(attack: Finetune, unlearning: UnlearnConfig, *, whole: bool) -> None:
    """Refuse what derivatives cannot pass through.

    Args:
        whole: Whether the unlearning's method trains every parameter, as an attack does.
    Raises:
        ValueError: With the setting and what it has to be.
    """
    rank, adapter = unlearning.lora.rank, unlearning.lora.adapter
    if attack.rank or rank != 0 or adapter == "continue":  # rank None: the method's own
        which = f"attack {attack.readable}" if attack.rank else str(unlearning.run)
        raise ValueError(
            f"{which} trains adapters, which are merged between the phases: derivatives go through both where all "
            "parameters are trained, --lora.rank 0 and not --lora.adapter continue"
        )
    if not whole:
        raise ValueError(
            f"{unlearning.run}: {unlearning.method} trains some of the parameters and an attack trains all: there are "
            "no derivatives through both. Give a run of a method that trains the whole model, such as npo"
        )
    if attack.dtype == "bfloat16" or unlearning.dtype == "bfloat16":
        raise ValueError(f"attack {attack.readable}: derivatives in bfloat16 are mostly noise; take float32")
    if attack.dtype != unlearning.dtype:
        raise ValueError(
            f"attack {attack.readable} is in {attack.dtype} and the unlearning in {unlearning.dtype}: derivatives go "
            "through both in one precision"
        )


def unlearning_of(source: str) -> UnlearnConfig:
    """The settings of the unlearning run that left a model.

    Raises:
        ValueError: If no such run did, or its method is code of one's own.
    """
    from retrograd.runs.kinds import command_of, read_settings

    run = Path(source).parent
    if not (run / "run_config.yaml").exists() or command_of(run) != "unlearn":
        raise ValueError(
            f"{source} lies in no run of `retrograd unlearn`, and derivatives are with respect to the rows that "
            "unlearned it: give a RUN of that command, with its RUN/model"
        )
    settings = read_settings(run)
    assert isinstance(settings, UnlearnConfig), "its command says so"
    refuse_method(settings.method, run / "run_config.yaml", trusted=False)
    return settings


def forget_queries(tasks: dict[str, Task], limit: int | None) -> dict[str, QueryConfig]:
    """The forget tasks as queries, by name: the loss that their accuracy measures."""
    shared = {field.name for field in dataclasses.fields(QueryConfig)} & {f.name for f in dataclasses.fields(Task)}
    queries = {}
    for name, task in tasks.items():
        if task.role == "forget" and task.choices:
            settings = {key: getattr(task, key) for key in shared}
            settings["limit"] = min(filter(None, (limit, task.limit)), default=None)
            queries[name] = QueryConfig(**settings)
    return queries
