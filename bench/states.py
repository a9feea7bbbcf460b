"""What it costs to keep every state on disk, and what of it the computation does not wait for.

The model of bench/overhead.py is trained with AdamW and one query pulled back, with all states in memory and with all on
disk. That the scores have the same bits is asserted. Every timing is a process of its own and the ways take turns;
printed are seconds and CPU-seconds as multiples of the run in memory, how long the computation waited for each state
(wall time in the store's calls, both ways together), and each way's peak memory.

    python bench/states.py                                  # 16 steps, 3 turns
    python bench/states.py --against ../other-checkout      # and another version of the code
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from overhead import BATCH, LR, make_model, make_rows

HERE = Path(__file__).parent.parent


def child(steps: int, tier: str, folder: Path) -> dict[str, float | str]:
    """One whole run; seconds and CPU-seconds by phase, the scores' digest, peak memory."""
    from retrograd import DataStream, Trainer
    from retrograd.core import tree
    from retrograd.optim import adamw
    from retrograd.runs.states.budget import Replay
    from retrograd.runs.states.store import Store

    waits: list[float] = []
    for name in ("put", "get", "drop"):
        setattr(Store, name, stopped(getattr(Store, name), waits))
    trainer, state = Trainer.initialize(make_model(), adamw(LR, eps_root=1e-8), engine="double")
    stream = DataStream(make_rows(steps * BATCH), BATCH)
    query = DataStream(make_rows(8, seed=1), BATCH, shuffle=False)
    place = folder if tier == "disk" else None
    replay = Replay("all", memory=0, disk=1 << 62, heartbeat=1e9) if place else Replay("all")
    trainer.prove(state, stream)  # not counted
    marks = [(time.perf_counter(), time.process_time())]
    final = trainer.train(state, stream, place, replay=replay)
    marks.append((time.perf_counter(), time.process_time()))
    result = trainer.backward(place, stream, trainer.evaluate(final, query))
    marks.append((time.perf_counter(), time.process_time()))
    found: dict[str, float | str] = {"scores": tree.digest(result.weight_grads)}
    for name, (wall, cpu), (wall_after, cpu_after) in zip(("train", "reverse"), marks, marks[1:]):
        found |= {name: wall_after - wall, f"{name}_cpu": cpu_after - cpu}
    found |= {"whole": marks[-1][0] - marks[0][0], "whole_cpu": marks[-1][1] - marks[0][1]}
    return found | {"wait": sum(waits) / steps, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def stopped(method, waits: list[float]):
    """The method, with a watch."""

    def call(*given):
        start = time.perf_counter()
        try:
            return method(*given)
        finally:
            waits.append(time.perf_counter() - start)

    return call


def timed(code: Path, tier: str, steps: int, place: Path | None) -> dict[str, float | str]:
    with tempfile.TemporaryDirectory(dir=place) as folder:
        command = [sys.executable, __file__, "--child", tier, "--steps", str(steps), "--place", folder]
        environment = {**os.environ, "PYTHONPATH": str(code.resolve())}
        run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--against", type=Path, help="another checkout of this repository")
    parser.add_argument("--place", type=Path, help="folder on the disk to be measured")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--child", choices=("memory", "disk"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(arguments.steps, arguments.child, arguments.place)))
        return
    ways = {"memory": (HERE, "memory"), "disk": (HERE, "disk")}
    if arguments.against:
        ways |= {f"{tier}, other code": (arguments.against, tier) for tier in ("memory", "disk")}
    runs: dict[str, list[dict]] = {name: [] for name in ways}
    for turn in range(arguments.turns):
        for name, (code, tier) in ways.items():
            runs[name].append(timed(code, tier, arguments.steps, arguments.place))
            assert runs[name][-1]["scores"] == runs["memory"][0]["scores"], f"{name} has other bits"
            one = runs[name][-1]
            print(
                f"turn {turn + 1} {name}: {one['whole']:.1f} s, CPU {one['whole_cpu']:.1f} s, waits {one['wait']:.2f} s",
                flush=True,
            )
    report(runs, arguments.steps, arguments.json)


def report(runs: dict[str, list[dict]], steps: int, path: Path | None) -> None:
    def median(name: str, figure: str) -> float:
        return statistics.median(run[figure] for run in runs[name])

    figures = ("train", "reverse", "whole", "train_cpu", "reverse_cpu", "whole_cpu")
    ratio = {name: {f: median(name, f) / median("memory", f) for f in figures} for name in runs}
    print(f"{steps} steps: the same bits from all of them\n")
    print(
        "| states in | train | reverse | whole | train, CPU | reverse, CPU | whole, CPU | wait, s a state | peak memory |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, row in ratio.items():
        cells = " | ".join(f"{row[figure]:.3f}" for figure in figures)
        cells += f" | {median(name, 'wait'):.2f}"
        print(f"| {name} | {cells} | {median(name, 'peak_bytes') / 2**30:.2f} GiB |")
    if path:
        path.write_text(json.dumps({"steps": steps, "ratio": ratio, "runs": runs}, indent=2) + "\n")


if __name__ == "__main__":
    main()
