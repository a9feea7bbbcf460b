"""Queries asked after further trainings, the phases, as functions of the parameters before them.

    φ'(θ) = φ(θ'),   θ' = what the phases make of θ, each with moments and a schedule of its own
    ∇φ'(θ)           φ's gradient pulled back through the phases, the last one first

A phase begins with fresh moments, which depend on nothing, so what goes from one to the one before is the cotangent's
part for the parameters alone. Each query column becomes φ', with a derivative of its own: so everything that takes a
run with scores takes one that is asked later. The phases are trained again for every value that is asked for, and
pulled back for every gradient, in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from retrograd.core import lookups, tree
from retrograd.core.optim import Cotangent, Params
from retrograd.core.step import Batch
from retrograd.query.columns import Column, Part, Queries
from retrograd.query.named import Asked
from retrograd.runs.progress import Bars
from retrograd.runs.setup import Setup
from retrograd.runs.states.budget import Replay, free_memory

__all__ = ["Begin", "Phases", "asked_after", "trained"]

Begin = Callable[[Params], Setup]
"""A phase: the training that begins with some parameters."""

_LEAST = Replay(plan="binomial", slots=1)  # nothing is reversed


def trained(phases: Sequence[Begin], params: Params) -> Params:
    """Parameters after all phases."""
    with lookups.suspended():
        for begin in phases:
            setup = begin(params)
            with Bars(len(setup.stream), within="then") as bars:
                params = setup.trajectory(_LEAST, observe=bars).train().params
    return params


def asked_after(asked: Sequence[Asked], phases: Sequence[Begin], like: Tensor) -> list[Asked]:
    """The same queries, asked after the phases; they share what is trained.

    Args:
        like: A tensor of the dtype and device of coefficients.
    """
    later = Phases(phases, [column for query in asked for column in query.columns])
    batch = Batch({}, torch.zeros(1, dtype=torch.int64, device=like.device), like.new_ones(1))
    behind, start = list[Asked](), 0
    for query in asked:
        places = range(start, start := start + len(query.columns))
        columns = [Column(later.columns[k].name, [Part(_Objective(later, k), batch)]) for k in places]
        measure = _measured_after(query.measure, phases)
        behind.append(query._replace(columns=columns, measure=measure, release=later.release))
    return behind


def _measured_after(
    measure: Callable[[Params], dict[str, Any]], phases: Sequence[Begin]
) -> Callable[[Params], dict[str, Any]]:
    """A query's further numbers after the phases, which are trained for them where there are any."""
    nothing = measure is Asked._field_defaults["measure"]
    return measure if nothing else lambda params: measure(trained(phases, params))


class Phases:
    """K query columns after phases, of parameters before them.

    Columns ask one by one, of several queries and their contrasts. So values and gradients are kept until other
    parameters are asked, or they are released.

    Args:
        phases: In their order.
        columns: What is asked at the end.
    """

    def __init__(self, phases: Sequence[Begin], columns: Sequence[Column]) -> None:
        self.phases, self.columns, self.queries = phases, columns, Queries(columns)
        self.start = ""  # digest of the parameters that what is kept began with
        self.values: Tensor | None = None
        self.gradients: Params | None = None  # [K, *shape]

    def value(self, column: int, params: Params) -> Tensor:
        """φ' of a column, [] in nats."""
        self._begin(params)
        if self.values is None:
            self.values = self.queries.values(trained(self.phases, params))
        return self.values[column].clone()

    def gradient(self, column: int, params: Params) -> tuple[Tensor, Params]:
        """φ' of a column, [] in nats, and its gradient."""
        self._begin(params)
        if self.gradients is None:
            with lookups.suspended():
                self.values, self.gradients = self._pulled(self.phases, params)
        assert self.values is not None, "values come with gradients"
        return self.values[column].clone(), {name: leaf[column] for name, leaf in self.gradients.items()}

    def release(self) -> None:
        """Let go of the gradients."""
        self.gradients = None

    def _begin(self, params: Params) -> None:
        start = tree.digest(params)
        if start != self.start:
            self.start, self.values, self.gradients = start, None, None

    def _pulled(self, phases: Sequence[Begin], params: Params) -> tuple[Tensor, Params]:
        setup, cotangents = phases[0](params), list[Cotangent]()
        with Bars(len(setup.stream), within="then") as bars:
            trajectory = setup.trajectory(Replay(memory=free_memory() // 4, disk=0), observe=bars)
            final = trajectory.train().params
            values, *gradient = self._pulled(phases[1:], final) if len(phases) > 1 else self.queries(final)
            del final
            trajectory.reverse(gradient.pop(), reached=cotangents.append)  # handed over: only the sweep holds it
        return values, cotangents.pop().params


class _Objective:
    """One column asked later, as an objective; nothing is trained on it."""

    def __init__(self, later: Phases, column: int) -> None:
        self.later, self.column = later, column

    def __call__(self, params: Params, inputs: dict[str, Tensor], coefficients: Tensor) -> Tensor:
        value: Tensor = _Asked.apply(self.later, self.column, tuple(params), *params.values())
        return value * coefficients.sum()


class _Asked(torch.autograd.Function):
    """φ'_k, whose derivative is what the sweep through the phases gives."""

    @staticmethod
    def forward(ctx: Any, later: Phases, column: int, names: tuple[str, ...], *leaves: Tensor) -> Tensor:
        params = {name: leaf.detach() for name, leaf in zip(names, leaves)}
        with torch.enable_grad():
            if not any(ctx.needs_input_grad):
                return later.value(column, params)
            value, gradient = later.gradient(column, params)
        ctx.save_for_backward(*(gradient[name] for name in names))
        return value

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        return (None, None, None, *(slope * leaf for leaf in ctx.saved_tensors))
