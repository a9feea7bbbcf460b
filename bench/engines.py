"""One pullback of a training step by `double` and by `blocks`, or compiled: CPU seconds and peak memory.

The engines get the same GPT-NeoX model of random weights and the same batch; that they agree is asserted first. Then
they take turns in one process, pullback by pullback: their times are medians, and a ratio is the median of the turns'. For
peak memory each has a process of its own: the growth of the resident set over one pullback, its high-water mark reset
before (Linux); gradient, ḡ and H ḡ, three times the parameters, are in it for all; "activations" is what is left without
them. Out comes a Markdown table, each engine as a multiple of `double`. With --step a step's gradient is measured as well,
and the pullback gets ḡ as in a run whose moments give the gradient back: together, what a step of a metagradient run takes.

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
VARIATIONS = [{}, {"depth": 4}, {"width": 64}, {"length": 64}, {"vocabulary": 50_304, "depth": 6}, {"batch": 1},
              {"queries": 4}]  # fmt: skip


def world(size: dict[str, int]):
    """(model, params, batch, weights, update half)."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from retrograd.data.stream import DataStream
    from retrograd.lm.model import trainable

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

    return model, trainable(model)[0], stream[0], stream.weights, update_half


def engine(kind: str, model, size: dict[str, int]):
    from retrograd.accel.compiled import Compiled
    from retrograd.core.engine import Blocks, Double
    from retrograd.lm.chain import decoder_chain
    from retrograd.lm.model import causal_objective

    if kind == "double":
        return Double(causal_objective(model)[0])
    chain = decoder_chain(model, alike=kind == "compile")
    sizes = chain.head.layout.sizes(size["batch"], size["length"])
    return Blocks(chain, Compiled(chain.links, sizes)) if kind == "compile" else Blocks(chain)


class Measured:
    """The engines on one batch."""

    def __init__(self, size: dict[str, int], kinds: list[str], step: bool) -> None:
        self.model, self.params, self.batch, self.weights, self.update_half = world(size)
        self.engines, self.step = {kind: engine(kind, self.model, size) for kind in kinds}, step
        first = next(iter(self.engines.values()))
        self.known = (
            self.update_half(first.gradient(self.params, [self.batch], self.weights, None)[1]) if step else None
        )

    def run(self, kind: str, batch=None):
        """(H ḡ, scores), and the CPU seconds they took."""
        chosen, batches = self.engines[kind], [batch or self.batch]
        start = time.process_time()
        place = (self.params, batches, self.weights, None)
        if self.known:
            found = chosen.pullback(*place, self.known, chosen.gradient(*place)[2])
        else:
            grads, pull = chosen.linearize(*place)
            found = pull(self.update_half(grads))
        return found, time.process_time() - start

    def assert_equal(self) -> float:
        """Largest relative difference of an engine's results from the first one's; refused above 1e-3 (float32)."""
        (expected, scores), *results = [self.run(kind)[0] for kind in self.engines]
        total = sum(float(x.norm()) ** 2 for x in expected.values()) ** 0.5
        assert float(scores.abs().max()) > 0
        errors = []
        for found, slopes in results:
            errors += [float((found[n] - x).norm()) / (float(x.norm()) + 1e-3 * total) for n, x in expected.items()]
            errors.append(float((slopes - scores).norm() / scores.norm()))
        assert max(errors) < 1e-3, f"the engines differ by {max(errors):.2g}"
        return max(errors)


def child(kind: str, size: dict[str, int], step: bool) -> None:
    """Prints the peak memory of one pullback."""
    measured = Measured(size, [kind], step)
    small = world({**size, "length": 8, "batch": 2})[2]
    measured.run(kind, small)  # libraries load, thread pools start
    ctypes.CDLL(None).malloc_trim(0)  # what that took and freed would hide growth
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    measured.run(kind)
    print(_status("VmHWM") - before)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def peak(kind: str, size: dict[str, int], step: bool) -> int:
    command = [sys.executable, __file__, "--child", kind, *(["--step"] if step else [])]
    command += [part for name in NAMES for part in (f"--{name}", str(size[name]))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return int(done.stdout.splitlines()[-1])


def compare(size: dict[str, int], kinds: list[str], arguments: argparse.Namespace) -> dict:
    measured = Measured(size, kinds, arguments.step)
    error = measured.assert_equal()
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(arguments.turns):
        for kind in kinds:
            seconds[kind].append(measured.run(kind)[1])
    owed = (1 + 2 * size["queries"]) * sum(p.numel() * p.element_size() for p in measured.params.values())
    peaks = {kind: peak(kind, size, arguments.step) for kind in kinds}
    active = {kind: max(0, taken - owed) for kind, taken in peaks.items()}
    found = {
        kind: {
            "time": statistics.median(one / other for one, other in zip(seconds[kind], seconds["double"])),
            "peak": peaks[kind] / peaks["double"],
            "activations": active[kind] / active["double"],
        }
        for kind in kinds[1:]
    }
    mebibytes = " → ".join(f"{taken / 2**20:.0f}" for taken in peaks.values())
    ratios = [" / ".join(f"{found[kind][name]:.2f}" for kind in found) for name in ("time", "peak", "activations")]
    cells = [*(size[name] for name in NAMES), ratios[0], f"{mebibytes} MiB", *ratios[1:], f"{error:.0e}"]
    print(f"| {' | '.join(map(str, cells))} |", flush=True)
    return {"size": size, "engines": found, "error": error, "owed_bytes": owed, "seconds": seconds, "peak_bytes": peaks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in NAMES:
        parser.add_argument(f"--{name}", type=int, default=DEFAULT[name])
    parser.add_argument("--only", action="store_true", help="this size alone, without the variations")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--against", nargs="+", choices=("blocks", "compile"), default=["blocks"], help="of double")
    parser.add_argument("--step", action="store_true", help="time a gradient and the pullback of a known ḡ")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--child", choices=("double", "blocks", "compile"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    base = {name: getattr(arguments, name) for name in NAMES}
    if arguments.child:
        return child(arguments.child, base, arguments.step)
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
