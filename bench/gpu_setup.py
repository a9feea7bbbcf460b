"""What the sections of bench/gpu.py run on: models of random weights, modes of arithmetic, room and time."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from shapes import SHAPES, TOYS, Shape
from tools import gpt_neox, measured

__all__ = ["MODES", "Bench", "Mode", "Note", "World", "free_bytes", "precision", "release", "show", "world"]

LR = 1e-4


class Mode(NamedTuple):
    """Dtype of the model, precision of float32 products, and the kind of product whose rate it is set against."""

    dtype: str
    products: str
    rate: str


MODES = {
    "float32": Mode("float32", "highest", "float32"),
    "TF32": Mode("float32", "high", "TF32"),
    "bfloat16, TF32 head": Mode("bfloat16", "high", "bfloat16"),
    "bfloat16": Mode("bfloat16", "highest", "bfloat16"),
}


class Bench(NamedTuple):
    """Where to run, until when (time.monotonic), and what to call with the section's values so far."""

    device: Any
    toy: bool
    until: float
    save: Callable[[dict[str, Any]], None]

    @property
    def shapes(self) -> dict[str, Shape]:
        return TOYS if self.toy else SHAPES

    def left(self) -> float:
        """Seconds."""
        return self.until - time.monotonic()


class World(NamedTuple):
    """A model with what trains it: batches of a shape, SGD, and queries, the losses of other rows."""

    model: Any
    params: Any
    objective: Any
    stream: Any
    query: Any
    recipe: Any

    def training(self, engine: str | Any) -> Any:
        """A training by the engine of a name, or by an engine."""
        from retrograd.core.step import Training
        from retrograd.lm.engines import choose_engine

        chosen = choose_engine(engine, self.model, self.objective).engine if isinstance(engine, str) else engine
        return Training(self.recipe, chosen, self.stream, self.stream.weights)


def world(shape: Shape, device: Any, dtype: str = "float32", *, steps: int = 8, queries: int = 1) -> World:
    """As `retrograd magic --train.optimizer sgd` has it, on random tokens."""
    import numpy as np
    import torch

    from retrograd.core.optim import SGD
    from retrograd.core.step import Recipe
    from retrograd.data.stream import DataStream, token_rows
    from retrograd.lm.model import DTYPES, causal_objective, trainable
    from retrograd.query.columns import Queries, query_columns

    model = gpt_neox(**shape.sizes(), dtype=DTYPES[dtype], device=device)
    objective = causal_objective(model)[0]
    draw = np.random.default_rng(0)
    rows = [draw.integers(0, shape.vocabulary, shape.length).tolist() for _ in range(steps * shape.rows + queries)]
    losses: Any = {"dtype": torch.promote_types(DTYPES[dtype], torch.float32), "device": device}
    stream = DataStream(rows[:-queries], shape.rows, **losses)
    asked = Queries(query_columns(objective, token_rows(rows[-queries:]), "none", **losses))
    return World(model, trainable(model)[0], objective, stream, asked, Recipe(SGD(LR)))


class Note(NamedTuple):
    """Times calls into `found`, saving after each."""

    found: dict[str, Any]
    bench: Bench
    save: Callable[[], None]

    def __call__(self, kind: str, call: Callable[[], Any], repeats: int = 5, **more: Any) -> Any:
        """The call's last result; None, with a note of it, where the device's memory ran out."""
        import torch

        try:
            few = 1 if self.bench.toy else repeats
            taken = measured(call, self.bench.device, repeats=few, until=self.bench.until)
        except torch.OutOfMemoryError as error:
            self.found[kind] = {"out_of_memory": str(error).splitlines()[0]}
            print(f"  {kind}: out of memory", flush=True)
            result = None
        else:
            self.found[kind] = taken.record() | more
            print(f"  {kind}: {taken.seconds * 1e3:.3g} ms, peak {show(taken.peak_bytes)}", flush=True)
            result = taken.result
        release(self.bench.device)
        self.save()
        return result


@contextmanager
def precision(products: str) -> Iterator[None]:
    """Products of float32: "highest" in float32, "high" in TF32 where the device has it."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(products)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def release(device: Any) -> None:
    """Give unused memory back to the device, so that the next measurement finds it whole."""
    import torch

    if torch.device(device).type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def free_bytes(device: Any) -> int:
    """Bytes that tensors on a device may take: what is free there now."""
    import torch

    from retrograd.runs.states.budget import free_memory

    return torch.cuda.mem_get_info(device)[0] if torch.device(device).type == "cuda" else free_memory()


def show(count: float) -> str:
    """Bytes for a person."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
