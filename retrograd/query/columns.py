"""Queries: scalars of the final parameters, in nats, with their gradients.

A query column is a weighted sum of losses over a few batches, so every kind of query is one thing:

    φ(θ) = Σ_parts Σ_j c_j · loss_j(θ)

the mean token loss of held-out rows, the answer loss of multiple-choice questions, one query minus another (the
second's coefficients negated), or a user's function. K columns share the final state and, in the sweep, all replay.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from retrograd.core import lookups
from retrograd.core.optim import Params
from retrograd.core.step import Batch, Objective, coefficients
from retrograd.data.rows import Rows
from retrograd.data.stream import DataStream

__all__ = [
    "Column",
    "Part",
    "Queries",
    "batch_columns",
    "contrast",
    "function_column",
    "graph_of",
    "load_function",
    "query_columns",
    "taken",
]


class Part(NamedTuple):
    """Σ c·loss over one batch."""

    objective: Objective
    batch: Batch


class Column(NamedTuple):
    """One scalar query and its name."""

    name: str
    parts: Sequence[Part]


class Queries:
    """K query columns as a function of the parameters."""

    def __init__(self, columns: Sequence[Column]) -> None:
        if not columns:
            raise ValueError("there is no query; give at least one")
        self.columns = list(columns)

    @property
    def names(self) -> list[str]:
        """The columns' names, in the order of every query axis."""
        return [column.name for column in self.columns]

    def values(self, params: Params) -> Tensor:
        """φ [K], nats."""
        with torch.no_grad():
            return torch.stack([self._sum(params, column)[0] for column in self.columns])

    def __call__(self, params: Params) -> tuple[Tensor, Params]:
        """(φ [K] in nats, ∇φ [K, *shape])."""
        summed = [self._sum(params, column, slopes=True) for column in self.columns]
        values = torch.stack([value for value, _ in summed])
        # leaf by leaf, each given up as it is copied: whole gradients are as large as the model
        return values, {name: torch.stack([grad.pop(name) for _, grad in summed]) for name in params}

    @staticmethod
    def _sum(params: Params, column: Column, slopes: bool = False) -> tuple[Tensor, Params]:
        value, total = None, dict[str, Tensor]()
        for objective, batch in column.parts:
            term, grads = taken(Part(objective, batch), params, slopes)
            value = term if value is None else value + term
            total = {name: total.pop(name) + grads.pop(name) for name in list(grads)} if total else grads
        assert value is not None, "a column has at least one part"
        return value, total


def taken(part: Part, params: Params, slopes: bool = True) -> tuple[Tensor, Params]:
    """A part's value [] and, if asked for, its gradient."""
    value, leaves = graph_of(part, params, slopes)
    if not slopes:
        return value.detach(), {}
    grads = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
    return value.detach(), dict(zip(leaves, grads))


def graph_of(part: Part, params: Params, slopes: bool = True) -> tuple[Tensor, Params]:
    """A part's value [] and the leaves that it is a function of, with its graph if slopes are wanted."""
    objective, batch = part
    # data weights of one, wherever the batch points
    ones = batch.scale.new_ones(int(batch.index.max()) + 1)
    leaves = {name: theta.detach().requires_grad_(slopes) for name, theta in params.items()}
    with torch.set_grad_enabled(slopes), lookups.whole():
        return objective(leaves, batch.inputs, coefficients(batch, ones)), leaves


def query_columns(
    objective: Objective,
    rows: Rows,
    reduction: str = "mean",
    *,
    name: str = "query",
    batch_size: int = 8,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> list[Column]:
    """The mean token loss of rows, in nats.

    Args:
        objective: Σ c·ce of a language model.
        reduction: "mean": one column for all rows; "none": one for each row, named by its document.
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f"unknown query reduction {reduction!r}; it is mean (one score) or none (one per document)")
    size = 1 if reduction == "none" else batch_size
    stream = DataStream(rows, size, shuffle=False, dtype=dtype, device=device)
    batches = [stream[t] for t in range(len(stream))]
    if reduction == "none":
        documents = [int(document[-1]) for document in rows.doc_ids]
        return [
            Column(f"{name}/{document}", [Part(objective, batch)])
            for document, batch in zip(documents, batches, strict=True)
        ]
    shares = [int(batch.inputs["target_mask"].sum()) / rows.targets for batch in batches]
    scaled = [batch._replace(scale=batch.scale * share) for batch, share in zip(batches, shares, strict=True)]
    return [Column(name, [Part(objective, batch) for batch in scaled])]


def batch_columns(objective: Objective, name: str, columns: Sequence[Sequence[Batch]]) -> list[Column]:
    """Columns of ready-made batches: one named `name`, or several named `name/0`, `name/1`, …"""
    names = [name] if len(columns) == 1 else [f"{name}/{number}" for number in range(len(columns))]
    return [
        Column(label, [Part(objective, batch) for batch in batches])
        for label, batches in zip(names, columns, strict=True)
    ]


def contrast(name: str, first: Sequence[Column], second: Sequence[Column]) -> list[Column]:
    """first − second, column by column; a single column is taken from or against each of the other's.

    Raises:
        ValueError: If neither their numbers agree nor one of them has a single column.
    """
    if len(first) != len(second) and 1 not in (len(first), len(second)):
        raise ValueError(
            f"query {name!r} is a contrast of {len(first)} columns with {len(second)}; they need equal numbers, or one"
        )
    number = max(len(first), len(second))
    pairs = zip(list(first) * (number // len(first)), list(second) * (number // len(second)), strict=True)
    labels = [name] if number == 1 else [f"{name}/{k}" for k in range(number)]
    return [Column(label, [*a.parts, *map(_negated, b.parts)]) for label, (a, b) in zip(labels, pairs, strict=True)]


def function_column(
    name: str, function: Callable[..., Tensor], call: Callable[[Params], Any], tokenizer: Any, like: Tensor
) -> Column:
    """A user's function(model, tokenizer) → scalar as a query.

    Args:
        function: Differentiable; the `model` it gets is called like a Hugging Face model.
        call: params → that model.
        like: A tensor of the run's dtype and device.
    """

    def objective(params: Params, inputs: Any, c: Tensor) -> Tensor:
        value = function(call(params), tokenizer)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"query {name!r}: the function has to return one differentiable number, it returned {got}")
        if torch.is_grad_enabled() and not value.requires_grad:
            raise ValueError(
                f"query {name!r}: the function's value does not depend on the parameters; compute it from the model "
                "that is passed in, without no_grad or detach"
            )
        return value.reshape(()) * c.sum()

    weight = like.new_ones(1)
    return Column(name, [Part(objective, Batch({}, torch.zeros(1, dtype=torch.int64, device=like.device), weight))])


def load_function(path: str) -> Callable[..., Tensor]:
    """The function of "module:name", or of "file.py:name".

    Raises:
        ValueError: If it cannot be found or takes other than two arguments.
    """
    module_name, colon, name = path.rpartition(":")
    if not colon or not module_name or not name:
        raise ValueError(f"--query.function {path!r}: write module:name, or file.py:name")
    try:
        module = _load_file(Path(module_name)) if module_name.endswith(".py") else _import(module_name)
        function = getattr(module, name)
    except (ImportError, AttributeError, OSError) as error:
        raise ValueError(f"--query.function {path!r} cannot be loaded: {error}") from error
    try:
        inspect.signature(function).bind(None, None)
    except TypeError as error:
        raise ValueError(f"--query.function {path!r} has to take (model, tokenizer): {error}") from error
    return cast(Callable[..., Tensor], function)


def _negated(part: Part) -> Part:
    return part._replace(batch=part.batch._replace(scale=-part.batch.scale))


def _import(name: str) -> Any:
    if "" not in sys.path:
        sys.path.insert(0, "")  # a module beside where the command runs, as with python -m
    return importlib.import_module(name)


def _load_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.exists():
        raise ImportError(f"there is no file {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
