"""What a metagradient costs on a GPU, within 8 minutes, whatever happens: bench/gpu.sh is this with its environment.

The headline work is 1,000 rows of 104 tokens, batch 4: 250 steps of SGD on GPT-NeoX shapes of random weights.

    rates              square products in float32, TF32 and bfloat16; copies on the device and to the host
    exact              equal engines, the same bits from replay, what lower precision does to scores
    160M, 1.4B, 6.9B   plain step, step, digest, slots, pullbacks: seconds, peak memory, achieved rate; the run extrapolated
    engines            double against blocks by the length of rows, and the memory that was predicted
    queries            K = 1 and 8 in one pullback
    head               the vocabulary head: fused against plain and torch's own

Equal results come first: float64 within 1e-10, float32 within 1e-4. retrograd has no switch for TF32: it is set here with
torch.set_float32_matmul_precision("high"). "bfloat16" is the product's --dtype bfloat16, whose vocabulary head computes in
float32; "bfloat16, TF32 head" lets that head use TF32.

Sections go from the most valuable on, and every figure is on disk, in DIR/gpu.json, as soon as it is there: one that is
too slow or fails loses what it had not yet measured, and the next one goes on in a new process.

    bench/gpu.sh --output DIR --write-docs    # on a machine with a GPU; the table also goes into docs/performance.md
    bench/gpu.sh --output DIR 160M head       # some sections
    bench/gpu.sh --toy                        # the same paths on tiny shapes, on any machine
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gpu_report
import gpu_sections
from gpu_setup import Bench, release
from gpu_shapes import shape_section
from tools import machine, write_json

_LATE = 124  # exit status of a process that its own watch has ended

SECTIONS: dict[str, Callable[[Bench], None]] = {
    "rates": gpu_sections.rates,
    "exact": gpu_sections.exact,
    **{name: partial(shape_section, name) for name in ("160M", "1.4B", "6.9B")},
    "engines": gpu_sections.engines,
    "queries": gpu_sections.queries,
    "head": gpu_sections.head,
}


BUDGETS = {"rates": 60, "exact": 80, "160M": 110, "1.4B": 90, "6.9B": 110, "engines": 70, "queries": 60, "head": 60}
"""Seconds that a section may take at most; what it leaves over is the others'."""


def run(name: str, output: Path, *, device: str, toy: bool, seconds: float) -> dict[str, Any]:
    """One section's values; they are in `output`/gpu.json too, from its start on, with those of other sections."""
    import torch

    from retrograd.runs.arithmetic import deterministic

    start, path, where = time.monotonic(), output / "gpu.json", torch.device(device)
    deterministic(where)
    release(where)
    kept = _read(output)
    kept |= {"machine": machine(where), "toy": toy}

    def save(values: dict[str, Any], finished: bool = False) -> None:
        kept["sections"][name] = values | {"section_seconds": time.monotonic() - start, "finished": finished}
        write_json(path, kept)

    save({})
    SECTIONS[name](Bench(where, toy, start + seconds, save))
    save(kept["sections"][name], finished=True)
    return kept["sections"][name]


def child(names: Sequence[str], output: Path, *, device: str, toy: bool, end: float) -> None:
    """Sections one after the other; the process ends with the first that fails, or that is still busy past its time."""
    importlib.import_module("transformers.models.gpt_neox.modeling_gpt_neox")
    gc.freeze()  # collecting what models leave behind need not walk through the libraries each time
    for name in names:
        seconds = min(BUDGETS[name], end - time.time())
        if seconds < 10:
            print(f"== {name}: not reached", flush=True)
            continue
        print(f"== {name}", flush=True)
        watch = threading.Timer(seconds, os._exit, [_LATE])
        watch.daemon = True  # a section that fails ends the process at once
        watch.start()
        found = run(name, output, device=device, toy=toy, seconds=seconds - 8)
        watch.cancel()
        print(f"== {name}: {found['section_seconds']:.0f} s\n", flush=True)


def supervise(names: Sequence[str], arguments: argparse.Namespace) -> list[str]:
    """Sections in a process of their own, and in another from the next one on where that ended; those that failed."""
    end, failed, left = time.time() + arguments.minutes * 60 - 10, list[str](), list(names)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "gpu.json").unlink(missing_ok=True)
    while left and time.time() < end:
        told = ["--output", str(arguments.output), "--end", str(end), *(["--toy"] if arguments.toy else [])]
        told += ["--device", arguments.device] if arguments.device else []
        status = subprocess.run([sys.executable, __file__, *left, *told]).returncode
        begun = [name for name in left if name in _read(arguments.output)["sections"]]
        if status == 0:
            break
        if not begun:  # it did not get as far as a section: neither would another
            failed += left
            break
        print(f"== {begun[-1]}: {'stopped, too slow' if status == _LATE else 'FAILED'}\n", flush=True)
        failed += [] if status == _LATE else [begun[-1]]
        left = left[left.index(begun[-1]) + 1 :]
    return failed


def _read(output: Path) -> dict[str, Any]:
    path = output / "gpu.json"
    return json.loads(path.read_text(encoding="utf8")) if path.exists() else {"sections": {}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sections", nargs="*", help=f"all by default: {' '.join(SECTIONS)}")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder of gpu.json and gpu.md")
    parser.add_argument("--device", help="a GPU if there is one; without one only --toy works")
    parser.add_argument("--toy", action="store_true", help="tiny shapes, which say nothing about speed")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything")
    parser.add_argument("--write-docs", action="store_true", help="and into docs/performance.md, between its markers")
    parser.add_argument("--end", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names = arguments.sections or list(SECTIONS)
    if unknown := sorted(set(names) - SECTIONS.keys()):
        raise SystemExit(f"unknown sections {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    if arguments.end is None:
        failed = supervise(names, arguments)
        gpu_report.written(arguments.output, arguments.write_docs)
        raise SystemExit(f"FAILED: {', '.join(failed)}" if failed else 0)
    import torch

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu" and not arguments.toy:
        raise SystemExit("there is no GPU here; --toy takes the same paths on tiny shapes on a CPU")
    child(names, arguments.output, device=device, toy=arguments.toy, end=arguments.end)


if __name__ == "__main__":
    main()
