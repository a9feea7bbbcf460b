"""One GPT-NeoX shape on a GPU: plain step, step, digest, slots and pullbacks in every mode; then 250 steps of it.

A few steps of each kind are timed and the run is extrapolated from them, along the replay plan that the product would
take for the free host memory, and along one whose states stay on the device. The smallest shape is then run in full in
float32, if it is expected to fit into the time: that is the check of the extrapolation. What is predicted not to fit
into the device's memory is left out, with the prediction.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from gpu_setup import MODES, Bench, Note, World, free_bytes, precision, release, show, world
from shapes import Costs, Shape, extrapolated, needed_bytes
from tools import idle

__all__ = ["apart", "scores", "shape_section"]

_KINDS = ("plain", "train", "double", "blocks")


def shape_section(name: str, bench: Bench) -> None:
    """Everything about one shape."""
    from retrograd.runs.states.budget import free_memory

    shape = bench.shapes[name]
    values: dict[str, Any] = {
        "shape": shape._asdict(), "parameters": shape.parameters, "steps": 8 if bench.toy else 250,
        "host_bytes": free_memory() // 2, "memory": {}, "slots": {}, "modes": {},
    }  # fmt: skip
    for dtype in ("bfloat16", "float32") if name == "6.9B" else ("float32", "bfloat16"):
        release(bench.device)
        _one_dtype(shape, f"{name} {dtype}", dtype, values, bench)
    if name == "160M":
        _whole_run(shape, values, bench)


def _one_dtype(shape: Shape, title: str, dtype: str, values: dict[str, Any], bench: Bench) -> None:
    import torch

    from retrograd.lm.engines import graph_bytes
    from retrograd.lm.model import DTYPES

    free, entry = free_bytes(bench.device), torch.empty((), dtype=DTYPES[dtype]).element_size()
    needs = partial(needed_bytes, shape, entry_bytes=entry)
    memory = values["memory"][dtype] = {"free_bytes": free, "needed_bytes": {"plain": needs("plain", graph_bytes=0)}}
    bench.save(values)
    if memory["needed_bytes"]["plain"] > free:
        return print(f"{title}: needs {show(memory['needed_bytes']['plain'])} of {show(free)}, left out", flush=True)
    one = world(shape, bench.device, dtype)
    graph = graph_bytes(one.model, one.objective, shape.rows, shape.length)
    memory |= {"graph_bytes": graph, "needed_bytes": {kind: needs(kind, graph_bytes=graph) for kind in _KINDS}}
    told = ", ".join(f"{kind} {show(needed)}" for kind, needed in memory["needed_bytes"].items())
    print(f"{title}: predicted {told}; free {show(free)}", flush=True)
    fitting = [kind for kind in _KINDS if memory["needed_bytes"][kind] <= free]
    trainings = {kind: one.training(kind) for kind in fitting if kind in ("double", "blocks")}
    modes = [name for name, of in MODES.items() if of.dtype == dtype]
    for mode in modes:
        if bench.left() < 0:
            print(f"{title}, {mode}: not reached in the time given", flush=True)
            continue
        print(f"{title}, {mode}", flush=True)
        found = values["modes"][mode] = {}
        with precision(MODES[mode].products):
            _one_mode(one, shape, fitting, trainings, Note(found, bench, partial(bench.save, values)))
        if mode == "float32" and all("scores" in found.get(kind, {}) for kind in ("double", "blocks")):
            found["double against blocks"] = apart(found["blocks"]["scores"], found["double"]["scores"], 1e-4)
    slots = values["slots"][dtype] = {}
    if "train" in fitting and bench.left() > 0:
        _slots(one, Note(slots, bench, partial(bench.save, values)))
    for mode in modes:
        found = values["modes"].get(mode, {})
        found["runs"] = _extrapolations({**found, **slots}, values, memory, shape.parameters * entry)
    bench.save(values)


def _one_mode(one: World, shape: Shape, fitting: list[str], trainings: dict[str, Any], note: Note) -> None:
    """Plain step, step, digest, pullbacks, at state 1: there, unlike at state 0, states are not the model's own."""
    from retrograd.core import tree
    from retrograd.core.engine import Double
    from retrograd.core.step import initial_state, pullback, step
    from retrograd.core.sweep import seed_cotangent

    def work(kind: str) -> dict[str, int]:
        return {"operations": shape.operations(kind), "done": shape.done(kind)}

    note("plain", _plain_step(one), **work("plain"))
    if "train" not in fitting:
        return
    training = one.training(Double(one.objective))
    first = step(training, initial_state(one.recipe, one.params)).state
    note("train", lambda: step(training, first).loss, **work("train"))
    note("digest", lambda: tree.digest((first.params, first.moments)), 3)
    if not trainings:
        return
    cotangent = seed_cotangent(one.query(first.params)[1], first)
    for kind, of_engine in trainings.items():
        pulled = note(kind, lambda t=of_engine: pullback(t, first, cotangent).scores.cpu(), **work(kind))
        if pulled is not None:
            note.found[kind]["scores"] = pulled.flatten().tolist()


def _plain_step(one: World) -> Callable[[], float]:
    """Hugging Face's model and loss, and torch's SGD in place."""
    import torch

    model, ids = one.model, one.stream[0].inputs["input_ids"]
    optimizer = torch.optim.SGD(model.parameters(), lr=one.recipe.optimizer.lr)

    def call() -> float:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return call


def _slots(one: World, note: Note) -> None:
    """A state into a slot of host memory, and back."""
    from retrograd.core import tree
    from retrograd.core.step import initial_state
    from retrograd.runs.states.budget import free_memory
    from retrograd.runs.states.store import Store

    initial = initial_state(one.recipe, one.params)
    first = initial._replace(step=1)
    size, repeats = tree.nbytes(first), 3 if tree.nbytes(first) < 2 << 30 else 1
    if 5 * size > free_memory():  # the slot, and two page-locked buffers that torch rounds up to powers of two
        return print(f"  slots: 5 states of {show(size)} do not fit into {show(free_memory())} of the host", flush=True)
    store = Store(initial, None, "")

    def put() -> float:
        """Seconds until the next step can begin; the call ends when the copy is made."""
        if store.held:
            store.drop(first.step)
        start = time.perf_counter()
        store.put(first)
        taken = time.perf_counter() - start
        store.settle()
        return taken

    waited = note("put", put, repeats, state_bytes=size)
    if waited is not None:
        note.found["put"]["waited"] = waited
    note("get", lambda: bool(tree.leaves(store.get(first.step))), repeats, state_bytes=size)
    store.drop(first.step)


def _extrapolations(
    found: dict[str, Any], values: dict[str, Any], memory: dict[str, Any], state_bytes: int
) -> dict[str, Any]:
    """Seconds of a whole run by engine and by where its states are; beside them the same steps of a plain loop."""
    from retrograd.runs.states.budget import Replay, layout

    def seconds(kind: str, part: str = "seconds") -> float | None:
        return found.get(kind, {}).get(part)

    runs: dict[str, Any] = {}
    steps, plain = values["steps"], seconds("plain")
    for engine in ("double", "blocks"):
        on_device = memory["free_bytes"] - memory["needed_bytes"][engine]
        host = (seconds("put", "waited"), seconds("put"), seconds("get"))
        for place, room, slot in (("host", values["host_bytes"], host), ("device", on_device, (0.0, 0.0, 0.0))):
            parts = (seconds("train"), seconds("digest"), seconds(engine), *slot)
            if None in parts or room < 2 * state_bytes:
                continue
            sizes = (state_bytes, state_bytes)  # plain SGD
            way = layout(Replay("auto", memory=room), steps, *sizes, elementwise=True, on_host=False)
            run = extrapolated(way.plan, steps, Costs(*parts)) | {"plan": way.kind}
            runs[f"{engine}, states on the {place}"] = run | {
                "of plain": run["whole"] / (steps * plain) if plain else 0
            }
    return runs


def _whole_run(shape: Shape, values: dict[str, Any], bench: Bench) -> None:
    """The run itself, for the check of the extrapolation, if it is expected to fit into the time left."""
    from retrograd.runs.states.budget import Replay

    predicted = values["modes"].get("float32", {}).get("runs", {}).get("double, states on the host")
    if predicted is None or 1.3 * predicted["whole"] + 5 > bench.left():
        return print(f"whole run: predicted {predicted}, {bench.left():.0f} s left: not run", flush=True)
    release(bench.device)
    one = world(shape, bench.device, steps=values["steps"])
    marks: list[float] = []

    def mark() -> None:
        idle(bench.device)
        marks.append(time.perf_counter())

    _, replayed = scores(one, one.training("double"), Replay("auto", memory=values["host_bytes"]), mark)
    train, reverse = marks[1] - marks[0], marks[2] - marks[1]
    values["whole run"] = {"train": train, "reverse": reverse, "whole": train + reverse, "replayed": replayed,
                           "predicted": predicted}  # fmt: skip
    print(f"whole run: {train + reverse:.1f} s, extrapolated {predicted['whole']:.1f} s", flush=True)
    bench.save(values)


def scores(one: World, training: Any, replay: Any, mark: Callable[[], None] = lambda: None) -> tuple[Any, int]:
    """(scores [K, N] of a whole run, how many replayed states had the digest they were first given).

    `mark` is called before training, after it and after the way back, in which the query is.
    """
    from retrograd.core.step import initial_state
    from retrograd.core.sweep import Advanced, Remade
    from retrograd.runs.trajectory import Trajectory

    replayed: list[int] = []

    def observe(event: Any) -> None:
        if isinstance(event, Remade) or (isinstance(event, Advanced) and event.replayed):
            replayed.append(event.step)  # its digest was compared: another would have stopped the sweep

    trajectory = Trajectory(training, initial_state(one.recipe, one.params), replay, observe=observe)
    mark()
    final = trajectory.train()
    mark()
    found = trajectory.reverse(one.query(final.params)[1])
    mark()
    assert bool(found.isfinite().all())
    assert float(found.abs().max()) > 0
    return found, len(replayed)


def apart(found: Any, expected: Any, limit: float) -> float:
    """Relative difference ‖a − b‖/‖b‖ of two engines' scores; refused above the limit."""
    import torch

    a, b = (torch.as_tensor(x).double() for x in (found, expected))
    error = float((a - b).norm() / b.norm())
    assert error <= limit, f"double and blocks differ by {error:.2g}, above {limit:g}"
    return error
