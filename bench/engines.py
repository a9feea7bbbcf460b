"""One pullback of a training step by `double` and by `blocks`, or compiled: CPU seconds and peak memory.

The engines get the same GPT-NeoX model of random weights and the same batch; that they agree is asserted first. Then
every measurement is a process of its own, the engines taking turns. Peak memory is the growth of the process's resident
set over one pullback, its high-water mark reset before (Linux); gradient, ḡ and H ḡ, three times the parameters, are in
it for all; "activations" is what is left without them. Seconds are the median of the pullbacks after that one. Out
comes a Markdown table, each engine as a multiple of `double`. With --step a step's gradient is measured as well, and the
pullback gets ḡ as in a run whose moments give the gradient back: together, what a step of a metagradient run takes.

    python bench/engines.py                                   # 12 layers, width 256, 4 × 256 tokens, and variations
    python bench/engines.py --depth 6 --width 128 --vocabulary 50304 --batch 8 --length 112 --only
    python bench/engines.py --only --step --against blocks compile        # compiles for some minutes first
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

NAMES = ("depth", "width", "length", "vocabulary", "batch", "queries")
DEFAULT = {"depth": 12, "width": 256, "length": 256, "vocabulary": 1024, "batch": 4, "queries": 1}
VARIATIONS = [{}, {"depth": 4}, {"width": 64}, {"length": 64}, {"vocabulary": 50_304, "depth": 6}, {"queries": 4}]


def world(size: dict[str, int], library: str):
    """(model, params, batch, weights, update half); matrices are multiplied by `library` from here on."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from retrograd.core import matmul
    from retrograd.lm.model import trainable
    from retrograd.lm.stream import DataStream

    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(
        vocab_size=size["vocabulary"], hidden_size=size["width"], num_hidden_layers=size["depth"],
        num_attention_heads=4, intermediate_size=4 * size["width"], max_position_embeddings=size["length"],
        hidden_dropout=0.0, attention_dropout=0.0, bos_token_id=0, eos_token_id=0,
    ), )  # fmt: skip
    model.eval()
    ids = torch.randint(size["vocabulary"], (size["batch"], size["length"])).tolist()
    stream = DataStream(ids, size["batch"], weight_shape=(size["batch"], size["length"]))
    scales = torch.linspace(1, 2, size["queries"])

    def update_half(grads):
        return {name: torch.stack([g * s for s in scales]) for name, g in grads.items()}

    params = trainable(model)[0]
    matmul.prefer(matmul.choose(library, params)[0])
    return model, params, stream[0], stream.weights, update_half


def engine(kind: str, model, size: dict[str, int]):
    from retrograd.core.engine import Blocks, Compiled, Double
    from retrograd.lm.blocks import decoder_chain
    from retrograd.lm.model import causal_objective

    if kind == "double":
        return Double(causal_objective(model)[0])
    chain = decoder_chain(model, alike=kind == "compile")
    sizes = chain.head.layout.sizes(size["batch"], size["length"])
    return Blocks(chain, Compiled(chain.links, sizes)) if kind == "compile" else Blocks(chain)


def assert_equal(size: dict[str, int], kinds: list[str], library: str) -> float:
    """Largest relative difference of an engine's results from `double`'s; refused above 1e-3 (float32)."""
    model, params, batch, weights, update_half = world(size, library)
    results = [engine(k, model, size).pullback(params, [batch], weights, None, update_half) for k in kinds]
    expected, scores = results[0]
    total = sum(float(x.norm()) ** 2 for x in expected.values()) ** 0.5
    assert float(scores.abs().max()) > 0
    errors = []
    for found, slopes in results[1:]:
        errors += [float((found[n] - expected[n]).norm()) / (float(expected[n].norm()) + 1e-3 * total) for n in params]
        errors.append(float((slopes - scores).norm() / scores.norm()))
    assert max(errors) < 1e-3, f"the engines differ by {max(errors):.2g}"
    return max(errors)


def child(kind: str, size: dict[str, int], repeats: int, step: bool, library: str) -> None:
    model, params, batch, weights, update_half = world(size, library)
    chosen = engine(kind, model, size)
    known = update_half(chosen.gradient(params, [batch], weights, None)[1]) if step else update_half

    def pullback() -> float:
        start = time.process_time()
        left = chosen.gradient(params, [batch], weights, None)[2] if step else None
        chosen.pullback(params, [batch], weights, None, known, left)
        return time.process_time() - start

    small = world({**size, "length": 8, "batch": 2}, library)[2]
    chosen.pullback(params, [small], weights, None, known)  # libraries load, thread pools start
    ctypes.CDLL(None).malloc_trim(0)  # what that took and freed would hide growth
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    first = pullback()
    peak = _status("VmHWM") - before
    seconds = [pullback() for _ in range(repeats)] or [first]
    print(json.dumps({"seconds": statistics.median(seconds), "peak_bytes": peak}))


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def measured(kind: str, size: dict[str, int], repeats: int, step: bool, library: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", kind, "--repeats", str(repeats), *(["--step"] if step else [])]
    command += ["--matmul", library]
    command += [part for name in NAMES for part in (f"--{name}", str(size[name]))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def compare(size: dict[str, int], kinds: list[str], arguments: argparse.Namespace) -> dict:
    error = assert_equal(size, kinds, arguments.matmul)
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for _ in range(arguments.turns):
        for kind in runs:
            runs[kind].append(measured(kind, size, arguments.repeats, arguments.step, arguments.matmul))

    def median(kind: str, name: str) -> float:
        return statistics.median(run[name] for run in runs[kind])

    params = world(size, arguments.matmul)[1]
    owed = (1 + 2 * size["queries"]) * sum(p.numel() * p.element_size() for p in params.values())
    active = {kind: max(0.0, median(kind, "peak_bytes") - owed) for kind in kinds}
    found = {
        kind: {
            **{name: median(kind, key) / median("double", key) for name, key in (("time", "seconds"), ("peak", "peak_bytes"))},
            "activations": active[kind] / active["double"],
        }
        for kind in kinds[1:]
    }  # fmt: skip
    peaks = " → ".join(f"{median(kind, 'peak_bytes') / 2**20:.0f}" for kind in kinds)
    ratios = [" / ".join(f"{found[kind][name]:.2f}" for kind in found) for name in ("time", "peak", "activations")]
    cells = [*(size[name] for name in NAMES), ratios[0], f"{peaks} MiB", *ratios[1:], f"{error:.0e}"]
    print(f"| {' | '.join(map(str, cells))} |", flush=True)
    return {"size": size, "engines": found, "error": error, "owed_bytes": owed, "runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in NAMES:
        parser.add_argument(f"--{name}", type=int, default=DEFAULT[name])
    parser.add_argument("--only", action="store_true", help="this size alone, without the variations")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=2, help="timed pullbacks in each process")
    parser.add_argument("--against", nargs="+", choices=("blocks", "compile"), default=["blocks"], help="of double")
    parser.add_argument("--step", action="store_true", help="time a gradient and the pullback of a known ḡ")
    parser.add_argument("--matmul", choices=("auto", "torch", "onednn"), default="auto", help="as --matmul of a run")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--child", choices=("double", "blocks", "compile"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    base = {name: getattr(arguments, name) for name in NAMES}
    if arguments.child:
        return child(arguments.child, base, arguments.repeats, arguments.step, arguments.matmul)
    sizes = [base] if arguments.only else [{**base, **change} for change in VARIATIONS]
    kinds = ["double", *arguments.against]
    columns = [*NAMES, f"CPU time, {' / '.join(kinds[1:])}", f"peak, {' → '.join(kinds)}", "peak, ratio",
               "activations, ratio", "results differ by"]  # fmt: skip
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    results = [compare(size, kinds, arguments) for size in sizes]
    if arguments.json:
        import torch

        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        machine = {"processor": platform.machine(), "torch": torch.__version__, "threads": torch.get_num_threads()}
        arguments.json.write_text(
            json.dumps({"commit": commit, "machine": machine, "results": results}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
