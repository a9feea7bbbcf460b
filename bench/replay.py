"""What replay plans and tiers cost on a toy, for runs of up to 10,000 steps.

A small network is trained with AdamW and one query is pulled back, under every plan and with states in memory or on
disk. That all scores have the same bits is asserted. Printed are the steps taken again (with gradients by the update
alone), the states held, the bytes of all that is held, and the time as a multiple of the run that keeps all states in
memory; ways take turns.

    python bench/replay.py                   # 1,000 steps
    python bench/replay.py --steps 10000 --turns 1
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from pathlib import Path

WIDTH, BATCH = 64, 8


def make(steps: int):
    """(training, initial state, query gradient function) of the toy."""
    import torch
    from torch.nn import functional as F

    from retrograd.core.engine import Double
    from retrograd.core.optim import AdamW
    from retrograd.core.step import Recipe, Training, initial_state
    from retrograd.data.stream import DataStream

    torch.manual_seed(0)
    params = {"in": torch.randn(WIDTH, WIDTH) / 8, "out": torch.randn(1, WIDTH) / 8}
    data = {"x": torch.randn(steps * BATCH, WIDTH), "y": torch.randn(steps * BATCH)}

    def losses(p, batch):
        return (F.linear(torch.tanh(F.linear(batch["x"], p["in"])), p["out"]).squeeze(1) - batch["y"]).square()

    def objective(p, batch, c):
        return torch.sum(losses(p, batch) * c)

    def query(p):
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in p.items()}
        value = losses(leaves, {name: x[:64] for name, x in data.items()}).mean()
        found = torch.autograd.grad(value, list(leaves.values()))
        return {name: g[None] for name, g in zip(leaves, found)}

    stream = DataStream(data, BATCH)
    training = Training(Recipe(AdamW(1e-3, eps_root=1e-6)), Double(objective), stream, stream.weights)
    return training, initial_state(training.recipe, params), query


def ways(steps: int, state_bytes: int) -> dict[str, tuple]:
    """Name → (replay, on disk?)."""
    from retrograd.runs.states.budget import Replay

    few = max(2, round(math.sqrt(steps) / 2))
    plans = {
        "all": Replay("all"), "gradients": Replay("gradients"),
        "interval": Replay("interval", interval=max(2, round(math.sqrt(steps)))), "sqrt": Replay("sqrt"), "log": Replay("log"), f"binomial, {few} slots": Replay("binomial", slots=few),
        "binomial, 10 slots": Replay("binomial", slots=10),
    }  # fmt: skip
    found = {f"{name}; memory": (plan, False) for name, plan in plans.items()}
    disk = Replay("sqrt", memory=0, disk=1 << 40, heartbeat=1e9)
    half = Replay("all", memory=steps // 2 * state_bytes, disk=1 << 40, heartbeat=1e9)
    gradients = Replay("gradients", memory=steps // 3 * state_bytes, disk=1 << 40, heartbeat=1e9)
    return {
        **found, "sqrt; disk": (disk, True), "all; half memory, half disk": (half, True),
        "gradients; a third in memory": (gradients, True),
    }  # fmt: skip


def run(world, replay, on_disk: bool):
    """(scores, seconds, layout)."""
    from retrograd.runs.trajectory import Trajectory

    training, initial, query = world
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        trajectory = Trajectory(training, initial, replay, Path(folder) if on_disk else None)
        final = trajectory.train()
        scores = trajectory.reverse(query(final.params))
        return scores, time.perf_counter() - start, trajectory.layout


def main() -> None:
    import torch

    from retrograd.core import tree

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    world = make(arguments.steps)
    all_ways = ways(arguments.steps, tree.nbytes(world[1]))
    seconds: dict[str, list[float]] = {name: [] for name in all_ways}
    layouts, expected = {}, run(world, *all_ways["all; memory"])[0]  # warm
    for _ in range(arguments.turns):
        for name, (replay, on_disk) in all_ways.items():
            scores, took, layouts[name] = run(world, replay, on_disk)
            assert torch.equal(scores, expected), f"{name} has other bits"
            seconds[name].append(took)
    print(f"{arguments.steps} steps: the same bits from all of them\n")
    base = statistics.median(seconds["all; memory"])
    rows = {
        name: {"again": layouts[name].cost.replays / arguments.steps, "held": layouts[name].cost.slots,
               "bytes": layouts[name].held_bytes / layouts["all; memory"].held_bytes,
               "time": statistics.median(found) / base}
        for name, found in seconds.items()
    }  # fmt: skip
    names = ("plan; tier", "steps taken again, by step", "states held", "bytes held, × all", "time, × all in memory")
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for name, row in rows.items():
        print(f"| {name} | {row['again']:.2f} | {row['held']} | {row['bytes']:.2f} | {row['time']:.2f} |")
    if arguments.json:
        arguments.json.write_text(json.dumps({"steps": arguments.steps, "ways": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
