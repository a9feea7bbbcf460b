"""The sections of bench/gpu.py besides the shapes: rates, exactness, engines by row length, many queries, the head."""

from __future__ import annotations

from functools import partial
from typing import Any

import head as heads
from gpu_setup import MODES, Bench, Note, World, free_bytes, precision, release, show, world
from gpu_shapes import apart, scores
from shapes import TOYS, needed_bytes
from tools import measured

__all__ = ["engines", "exact", "head", "queries", "rates"]


def rates(bench: Bench) -> None:
    """Operations a second of square products of random numbers, and bytes a second of copies."""
    import torch

    size = 256 if bench.toy else 8192
    values: dict[str, Any] = {"size": size, "operations_per_second": {}, "bytes_per_second": {}}
    kinds = {"float32": (torch.float32, "highest"), "TF32": (torch.float32, "high"),
             "bfloat16": (torch.bfloat16, "highest")}  # fmt: skip
    for name, (dtype, products) in kinds.items():
        a, b = (torch.randn(size, size, device=bench.device).to(dtype) for _ in range(2))
        with precision(products):
            found = measured(partial(torch.mm, a, b), bench.device, warm=3, repeats=1 if bench.toy else 10)
        values["operations_per_second"][name] = 2 * size**3 / found.seconds
        print(f"  {name}: {2 * size**3 / found.seconds / 1e12:.3g} TFLOP/s", flush=True)
        bench.save(values)
    source = torch.randn(1 << (20 if bench.toy else 28), device=bench.device)
    other, host = torch.empty_like(source), torch.zeros(source.shape)
    copies = {"on the device": (other, source, 2), "to the host": (host, source, 1), "from the host": (other, host, 1)}
    for name, (to, given, times) in copies.items():
        found = measured(partial(to.copy_, given), bench.device, repeats=3)
        values["bytes_per_second"][name] = times * source.nbytes / found.seconds
        print(f"  copies {name}: {times * source.nbytes / found.seconds / 1e9:.3g} GB/s", flush=True)
        bench.save(values)


def exact(bench: Bench) -> None:
    """Equal engines, the same bits from replay, and what lower precision does to the scores of 6 steps."""
    from retrograd.runs.states.budget import Replay

    values: dict[str, Any] = {}
    tiny = world(TOYS["160M"], bench.device, "float64", steps=6)
    found = {engine: scores(tiny, tiny.training(engine), Replay("all"))[0] for engine in ("double", "blocks")}
    values["float64, double against blocks"] = apart(found["blocks"], found["double"], 1e-10)
    bench.save(values)
    one = world(bench.shapes["160M"], bench.device, steps=6)
    for engine in ("double", "blocks"):
        training = one.training(engine)
        found[engine] = scores(one, training, Replay("all"))[0]
        again, replayed = scores(one, training, Replay("binomial", slots=2))
        assert replayed > 0, "nothing was replayed"
        assert bool((found[engine] == again).all()), f"{engine}: plan all and plan binomial give other bits"
        values[f"{engine}: states replayed to the same digest, and scores to the same bits"] = replayed
        bench.save(values)
    values["float32, double against blocks"] = apart(found["blocks"], found["double"], 1e-4)
    values["lower precision"] = {}
    for mode in list(MODES)[1:]:
        release(bench.device)
        one = world(bench.shapes["160M"], bench.device, MODES[mode].dtype, steps=6)
        with precision(MODES[mode].products):
            lower = scores(one, one.training("double"), Replay("all"))[0]
        values["lower precision"][mode] = _agreement(lower, found["double"])
        bench.save(values)
    print(f"  {values}", flush=True)


def _agreement(found: Any, expected: Any) -> dict[str, float]:
    import torch

    a, b = found.flatten().double(), expected.flatten().double()
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return {
        "relative difference": float((a - b).norm() / b.norm()),
        "rank correlation": float(torch.corrcoef(ranks)[0, 1]),
    }


def engines(bench: Bench) -> None:
    """Double against blocks over the length of rows, and what `--engine auto` would have predicted for double."""
    from retrograd.lm.engines import graph_bytes

    lengths = (16, 32) if bench.toy else (104, 512, 1024)
    shape, values = bench.shapes["160M"], dict[str, Any](lengths={})
    for length in lengths:
        release(bench.device)
        longer = shape._replace(length=length)
        one, free = world(longer, bench.device, steps=2), free_bytes(bench.device)
        graph = graph_bytes(one.model, one.objective, longer.rows, length)
        found = values["lengths"][length] = {"predicted_graph_bytes": graph, "state_bytes": 4 * shape.parameters}
        print(f"rows of {length} tokens: double's graph is predicted at {show(graph)}", flush=True)
        note, pulled = Note(found, bench, partial(bench.save, values)), {}
        for engine in ("double", "blocks"):
            if needed_bytes(longer, engine, 4, graph) <= free and bench.left() > 0:
                pulled[engine] = _pullback(one, engine, note, operations=longer.operations(engine))
        if all(pulled.get(engine) is not None for engine in ("double", "blocks")):
            found["apart"] = apart(pulled["blocks"], pulled["double"], 1e-4)
        bench.save(values)


def queries(bench: Bench) -> None:
    """One pullback with K = 8 cotangents against one with a single cotangent; the columns equal first."""
    values: dict[str, Any] = {}
    one = world(bench.shapes["160M"], bench.device, steps=2, queries=8)
    for engine in ("double", "blocks"):
        found = values[engine] = dict[str, Any]()
        note = Note(found, bench, partial(bench.save, values))
        alone, together = (_pullback(one, engine, note, count) for count in (1, 8))
        found["apart"] = apart(together[:1], alone, 1e-4)
        found["of K single ones"] = found["K = 8"]["seconds"] / (8 * found["K = 1"]["seconds"])
        print(f"  {engine}: 8 queries take {found['of K single ones']:.2f} of 8 sweeps", flush=True)
        bench.save(values)


def _pullback(one: World, engine: str, note: Note, count: int = 1, **more: Any) -> Any:
    """Scores [K, B] of one step's pullback, which is noted under the engine's name, or under K where several are asked."""
    from retrograd.core.step import initial_state, pullback, step
    from retrograd.core.sweep import seed_cotangent

    training = one.training(engine)
    first = step(training, initial_state(one.recipe, one.params)).state
    gradient = {name: bar[:count] for name, bar in one.query(first.params)[1].items()}
    cotangent, kind = seed_cotangent(gradient, first), f"K = {count}" if len(one.query.columns) > 1 else engine
    return note(kind, lambda: pullback(training, first, cotangent).scores.cpu(), **more)


def head(bench: Bench) -> None:
    """The vocabulary head at two widths: each way, in float32 and TF32, and the fused one by the size of its chunks."""
    values: dict[str, Any] = {"abilities": heads.abilities(), "sizes": {}}
    for name in ("160M", "1.4B"):
        shape = bench.shapes[name]
        size = {"tokens": shape.rows * (shape.length - 1), "width": shape.width, "vocabulary": shape.vocabulary}
        found = values["sizes"][name] = {
            "size": size,
            "apart": heads.assert_equal(size, values["abilities"], bench.device),
        }
        note = Note(found, bench, partial(bench.save, values))
        pairs = [(way, work) for way in values["abilities"] for work in heads.WORK]
        for way, work in [pair for pair in pairs if heads.able(values["abilities"], *pair)]:
            for chunk in (None, size["tokens"]) if way == "fused_ce" else (None,):
                for products in ("highest", "high"):
                    if bench.left() > 0:
                        kind = f"{way}{', all tokens at once' if chunk else ''}, {work}, {_words(products)}"
                        with precision(products):
                            note(kind, heads.once(way, work, size, bench.device, chunk))


def _words(products: str) -> str:
    return "TF32" if products == "high" else "float32"
