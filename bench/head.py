"""The vocabulary head: our `fused_ce` against plain autograd and against torch's `linear_cross_entropy` (torch ≥ 2.12).

What each can do is tried first, in float64 on a small size: a loss with a weight for every token, its gradient, the
pullback of that gradient, and forward mode. What it can do has to be what plain autograd gives. Then seconds and peak
memory at full size, on a CPU in a process for each measurement, the ways taking turns. Memory is the growth of the
process over one call, with the results in it.

    python bench/head.py                              # 888 tokens, width 128, vocabulary 50,304
    python bench/head.py --tokens 412 --width 768 --turns 3 --json head.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools import machine, peak_of, resident, table, trim, write_json

WORK = ("gradient", "pullback")
_UNWEIGHTED = "torch, chunks of ours, no weights"


def ways(chunk: int | None = None) -> dict[str, Callable[..., Any]]:
    """(h [M, D], W [V, D], targets [M], c [M]) → Σ c·ce, by name; torch's own where this torch has it."""
    import torch
    from torch.nn import functional as F

    from retrograd.lm.head import _chunk, fused_ce

    def plain(h, w, y, c):
        return torch.dot(F.cross_entropy(F.linear(h, w), y, reduction="none"), c)

    def fused(h, w, y, c):
        return fused_ce(h, w, None, y, c, chunk)

    found = {"plain": plain, "fused_ce": fused}
    if not hasattr(F, "linear_cross_entropy"):
        return found

    def torchs(options=None, reduction="none"):
        def way(h, w, y, c):
            size = {"batch_chunk_size": chunk or _chunk(w)} if options == "ours" else {}
            chosen = torch.nn.LinearCrossEntropyOptions(**size) if options else None
            found = F.linear_cross_entropy(h, w, y, reduction=reduction, options=chosen)
            return torch.dot(found, c) if reduction == "none" else found * c[0]

        return way

    more = {"torch": torchs(), "torch, chunks of its own": torchs("its"), "torch, chunks of ours": torchs("ours")}
    return {**found, **more, _UNWEIGHTED: torchs("ours", "sum")}


def operands(tokens: int, width: int, vocabulary: int, *, dtype: Any = None, device: Any = "cpu") -> tuple[Any, ...]:
    """(h, W, targets, c) and directions (ḣ, Ẇ), random."""
    import torch

    dtype, draw = dtype or torch.float32, torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float32, device=device).to(dtype)

    h, w = normal(tokens, width), normal(vocabulary, width) / width**0.5
    y = torch.randint(vocabulary, (tokens,), generator=draw, device=device)
    c = torch.rand(tokens, generator=draw, device=device).to(torch.promote_types(dtype, torch.float32)) / tokens
    return (h, w, y, c), (normal(tokens, width), normal(vocabulary, width))


def gradient(way: Callable[..., Any], given: tuple[Any, ...]) -> list[Any]:
    """[loss, ∂h, ∂W]."""
    import torch

    h, w, y, c = given
    h, w = h.detach().requires_grad_(), w.detach().requires_grad_()
    loss = way(h, w, y, c)
    return [loss.detach(), *torch.autograd.grad(loss, [h, w])]


def pullback(way: Callable[..., Any], given: tuple[Any, ...], along: tuple[Any, ...]) -> list[Any]:
    """[loss, and the pullbacks of (∂h, ∂W) along (ḣ, Ẇ) to h, W and c]."""
    import torch

    h, w, y, c = given
    h, w, c = h.detach().requires_grad_(), w.detach().requires_grad_(), c.detach().requires_grad_()
    loss = way(h, w, y, c)
    grads = torch.autograd.grad(loss, [h, w], create_graph=True)
    return [loss.detach(), *torch.autograd.grad(grads, [h, w, c], list(along))]


def forward_mode(way: Callable[..., Any], given: tuple[Any, ...], along: tuple[Any, ...]) -> list[Any]:
    """[loss, its tangent]."""
    import torch

    h, w, y, c = given
    return list(torch.func.jvp(lambda h, w: way(h, w, y, c), (h, w), along))


def abilities() -> dict[str, dict[str, float | str]]:
    """For each way and each kind of derivative: the largest relative error in float64, or why it cannot."""
    import torch

    given, along = operands(12, 8, 40, dtype=torch.float64)
    found: dict[str, dict[str, float | str]] = {}
    for name, way in ways().items():
        uniform = (*given[:3], torch.full_like(given[3], 0.5)) if name == _UNWEIGHTED else given
        kinds = {
            "weights of tokens": lambda way, given=given: [way(*given)],
            "gradient": lambda way, given=uniform: gradient(way, given),
            "pullback": lambda way, given=uniform: pullback(way, given, along),
            "forward mode": lambda way, given=uniform: forward_mode(way, given, along),
        }
        expected = {kind: call(ways()["plain"]) for kind, call in kinds.items()}
        found[name] = {kind: _tried(call, way, expected[kind]) for kind, call in kinds.items()}
    return found


def _tried(call: Callable[..., Any], way: Callable[..., Any], expected: list[Any]) -> float | str:
    try:
        return apart(call(way), expected)
    except (RuntimeError, NotImplementedError) as error:
        return str(error).strip().splitlines()[0][:160]


def apart(found: list[Any], expected: list[Any]) -> float:
    """Largest relative difference, by tensor; infinite where one is not finite."""
    import torch

    errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]
    return max(errors) if torch.isfinite(torch.tensor(errors)).all() else float("inf")


def able(found: dict[str, dict[str, float | str]], name: str, work: str) -> bool:
    """Whether a way does the work, correctly."""
    error = found[name][work]
    return isinstance(error, float) and error < 1e-9


def assert_equal(size: dict[str, int], found: dict[str, dict[str, float | str]], device: Any = "cpu") -> float:
    """Largest relative difference from plain autograd at full size, float32; refused above 1e-4."""
    import torch

    given, along = operands(**size, device=device)
    largest = 0.0
    for name, way in ways().items():
        here = (*given[:3], torch.full_like(given[3], 0.5)) if name == _UNWEIGHTED else given
        for work, call in (("gradient", gradient), ("pullback", lambda w, g: pullback(w, g, along))):
            if able(found, name, work):
                error = apart(call(way, here), call(ways()["plain"], here))
                assert error < 1e-4, f"{name}: the {work} differs from plain autograd's by {error:.2g}"
                largest = max(largest, error)
    return largest


def once(
    name: str, work: str, size: dict[str, int], device: Any = "cpu", chunk: int | None = None
) -> Callable[[], Any]:
    """A call that does the work by a way."""
    given, along = operands(**size, device=device)
    way = ways(chunk)[name]
    return (lambda: gradient(way, given)) if work == "gradient" else (lambda: pullback(way, given, along))


def child(name: str, work: str, size: dict[str, int]) -> None:
    """CPU seconds and memory of one call, printed; a small call first loads libraries."""
    once(name, work, {"tokens": 64, "width": 16, "vocabulary": 512})()
    call = once(name, work, size)
    trim()
    before = resident()
    peak = peak_of(call, "cpu")[0] - before
    start = time.process_time()
    call()
    print(json.dumps({"cpu_seconds": time.process_time() - start, "peak_bytes": peak}))


def measure(name: str, work: str, size: dict[str, int]) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", name, work]
    command += [part for key, value in size.items() for part in (f"--{key}", str(value))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("tokens", 888), ("width", 128), ("vocabulary", 50_304)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=list(ways()), help="ways to time; plain is always one")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    size = {name: getattr(arguments, name) for name in ("tokens", "width", "vocabulary")}
    if arguments.child:
        return child(*arguments.child, size)
    found = abilities()
    kinds = list(found["plain"])
    rows = [[name, *(f"{x:.0e}" if isinstance(x, float) else f"no: {x}" for x in each.values())]
            for name, each in found.items()]  # fmt: skip
    print("Relative error in float64, or why not:\n\n" + table(["", *kinds], rows))
    print(f"{size}: equal to plain autograd within {assert_equal(size, found):.0e} in float32\n", flush=True)
    chosen = [name for name in found if name in ("plain", *arguments.only)]
    pairs = [(name, work) for name in chosen for work in WORK if able(found, name, work)]
    runs: dict[tuple[str, str], list[dict[str, float]]] = {pair: [] for pair in pairs}
    for _ in range(arguments.turns):
        for pair, taken in runs.items():
            taken.append(measure(*pair, size))
    medians = {p: {k: statistics.median(r[k] for r in taken) for k in taken[0]} for p, taken in runs.items()}
    print(table(["", "work", "CPU seconds", "× plain", "peak, MiB"], [
        [name, work, f"{m['cpu_seconds']:.2f}", f"{m['cpu_seconds'] / medians['plain', work]['cpu_seconds']:.2f}",
         f"{m['peak_bytes'] / 2**20:.0f}"] for (name, work), m in medians.items()
    ]))  # fmt: skip
    if arguments.json:
        named = {f"{name}: {work}": taken for (name, work), taken in runs.items()}
        write_json(arguments.json, {"machine": machine(), "size": size, "abilities": found, "runs": named})


if __name__ == "__main__":
    main()
