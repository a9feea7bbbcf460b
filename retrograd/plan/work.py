"""What a run is made of, in numbers: all that its cost depends on, whether its model is loaded or only described."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from retrograd.core import tree
from retrograd.core.step import State, Training, needs_gradient, recovered
from retrograd.data.pairs import PairStream
from retrograd.data.stream import DataStream
from retrograd.lm.engines import Curve, blocks_bytes
from retrograd.lm.spans import inner, text_config

__all__ = ["Asks", "Matter", "Model", "Steps", "Work", "matter_of", "model_of", "steps_of"]


class Steps(NamedTuple):
    """A stream in numbers.

    Args:
        rows: Of the data.
        steps, tokens: Of the run; tokens those of its rows, without padding.
        positions, pairs: Of batches padded to their longest row: Σ B·L and Σ B·L².
        batch: Rows of a step.
        largest: Rows and tokens of the longest micro-batch.
        parts: Micro-batches of a step.
    """

    rows: int
    steps: int
    tokens: int
    positions: int
    pairs: int
    batch: int
    largest: tuple[int, int]
    parts: int

    @property
    def padding(self) -> float:
        """Share of the positions that are padding."""
        return 1 - self.tokens / self.positions


class Model(NamedTuple):
    """A model in numbers: parameters that train and that are frozen, their bytes, layers, width, multiplications of a
    token in the layers and in the vocabulary head, bytes of activations by tokens of a row, if known, and of what the
    largest layer, embedding or head has of the trained."""

    trained: int
    frozen: int
    trained_bytes: int
    frozen_bytes: int
    layers: int
    width: int
    body: int
    head: int
    itemsize: int
    twice: Curve | None = None
    once: Curve | None = None
    block: int | None = None


class Asks(NamedTuple):
    """The queries: columns, tokens of what they read, and how many passes that takes."""

    columns: int = 0
    tokens: int = 0
    passes: int = 0


class Matter(NamedTuple):
    """Bytes of a state and of its parameters; whether ḡ is a function of the gradient, and that is computed again."""

    state: int
    params: int
    needed: bool
    again: bool


@dataclass(frozen=True)
class Work:
    """A run.

    Args:
        queries: Cotangents that the way back carries; 0 where there is none.
        references: Forward passes of a reference model beside each gradient's.
        scores: Numbers that the way back writes.
        exported: Whether the model is left in the run's folder.
        heartbeat: Seconds between resume points.
        paired: Whether it unlearns: the parameters it starts from stay whole.
    """

    steps: Steps
    model: Model
    matter: Matter
    asks: Asks
    queries: int
    engine: str
    references: int = 0
    scores: int = 0
    exported: bool = False
    heartbeat: float = 60.0
    paired: bool = False

    @property
    def products(self) -> float:
        """Multiply-adds of a forward pass over all steps, a multiply-add counted as two."""
        return self.flops(self.steps.tokens, self.steps.pairs)

    @property
    def asked(self) -> float:
        """The same over all that is asked."""
        return self.flops(self.asks.tokens, 0)

    def flops(self, tokens: int, pairs: int) -> float:
        """Of a forward pass; 2·L·D multiplications for each pair of a row's tokens."""
        model = self.model
        return 2.0 * (model.body + model.head) * tokens + 4.0 * model.layers * model.width * pairs

    def activations(self, engine: str, rows: int, *, twice: bool, together: int = 1) -> int | None:
        """Bytes at the peak for a micro-batch of so many rows; None where the architecture's are not known.

        Args:
            together: Micro-batches whose states `blocks` holds at once.
        """
        model, length = self.model, self.steps.largest[1]
        if model.twice is None or model.once is None:
            return None
        if not twice:
            return int(model.once.at(length) * rows)
        graph = model.twice.double(rows, length)
        if engine == "double":
            return graph
        hidden = rows * length * model.width * model.itemsize * together
        return blocks_bytes(graph, max(1, model.layers), hidden, self.queries)


def steps_of(stream: DataStream | PairStream, micro: int | None) -> Steps:
    """A stream in numbers; nothing but the lengths of its rows is read."""
    lengths = stream.rows.lengths
    tokens = positions = pairs = 0
    for batch in batches(stream):
        longest = int(lengths[batch].max())
        tokens, positions = tokens + int(lengths[batch].sum()), positions + len(batch) * longest
        pairs += len(batch) * longest**2
    size = stream.batch_size if micro is None else min(micro, stream.batch_size)
    largest = (min(size, len(stream.rows)), stream.rows.max_length)
    parts = -(-stream.batch_size // size)
    return Steps(len(stream.rows), len(stream), tokens, positions, pairs, stream.batch_size, largest, parts)


def batches(stream: DataStream | PairStream) -> Iterator[np.ndarray]:
    """The rows of each step."""
    for step in range(len(stream)):
        yield stream.rows_at(step)


def model_of(module: nn.Module, params: dict[str, torch.Tensor]) -> Model:
    """A model in numbers, by the shapes of its parameters alone.

    Of experts all are counted, whichever a token goes to.
    """
    whole = {id(p): p for p in module.parameters()}.values()
    trained, trained_bytes = sum(p.numel() for p in params.values()), tree.nbytes(params)
    settings, model = text_config(module), inner(module)
    ends: Any = (model.get_input_embeddings(), model.get_output_embeddings())
    tables = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    head = ends[1].weight.numel() if ends[1] is not None and hasattr(ends[1], "weight") else 0
    tables |= {id(ends[1].weight)} if head else set()
    body = sum(p.numel() for p in whole if p.ndim >= 2 and id(p) not in tables)
    return Model(
        trained, sum(p.numel() for p in whole) - trained, trained_bytes,
        sum(p.numel() * p.element_size() for p in whole) - trained_bytes, settings.num_hidden_layers,
        settings.hidden_size, body, head, next(iter(params.values())).element_size(),
        block=_largest_block(module, [end for end in ends if end is not None]),
    )  # fmt: skip


def _largest_block(module: nn.Module, ends: list[nn.Module]) -> int | None:
    """Bytes that train of the layer, embedding or head that has most; None where there are no layers."""
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList) and len(part)]
    if not lists:
        return None
    layers = max(lists, key=lambda part: sum(p.numel() for p in part.parameters()))
    return max(sum(p.numel() * p.element_size() for p in part.parameters() if p.requires_grad)
               for part in (*layers, *ends))  # fmt: skip


def matter_of(training: Training, initial: State) -> Matter:
    """Of a run's first state."""
    known = recovered(training.recipe, initial, initial.moments) is not None
    needed = needs_gradient(training, 0)
    return Matter(tree.nbytes(initial), tree.nbytes(initial.params), needed or known, needed and not known)
