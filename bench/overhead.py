"""What a metagradient costs: train + query + reverse against a plain training loop of the same recipe.

The plain loop is Hugging Face's model with its own loss and torch.optim.AdamW. Both start from the same weights and see
the same batches; that they train alike is asserted before anything is timed. Every timing is a process of its own, the
two kinds taking turns; printed are the ratio of the medians and each kind's peak memory.

    python bench/overhead.py                    # the full size: 64 steps, 3 turns
    python bench/overhead.py --steps 8 --turns 1 --way double blocks double/all    # engines, with a replay plan or auto's
    python bench/overhead.py --clip 1 --way blocks blocks/all
    python bench/overhead.py --hold 1           # where a host gives and takes its guest's memory, see bench/memory.py
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from memory import holding

LR, BATCH, VOCABULARY = 1e-4, 8, 50_304


def make_rows(count: int, seed: int = 0) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [draw.integers(0, VOCABULARY, draw.integers(97, 128)).tolist() for _ in range(count)]


def make_model():
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=6, num_attention_heads=4, intermediate_size=512,
        max_position_embeddings=256, hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    return GPTNeoXForCausalLM(config)


def plain(steps: int, clip: float | None) -> tuple[list[float], float]:
    """An ordinary loop; (loss by step, seconds)."""
    import torch

    rows, model = make_rows(steps * BATCH), make_model()
    order = np.random.default_rng(0).permutation(len(rows))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, eps=1e-8, weight_decay=0.0)
    losses, start = [], time.perf_counter()
    for t in range(steps):
        batch = [rows[i] for i in order[t * BATCH : (t + 1) * BATCH]]
        width = max(map(len, batch))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in batch])
        real = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch])
        loss = model(input_ids=ids, attention_mask=real, labels=ids.masked_fill(real == 0, -100)).loss
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, time.perf_counter() - start


def metagradient(
    steps: int, clip: float | None, way: str, eps_root: float = 1e-8, backward: bool = True
) -> tuple[list[float], dict[str, float]]:
    """The whole run; (loss by step, seconds by phase)."""
    from retrograd import DataStream, Trainer
    from retrograd.core.sweep import first_time
    from retrograd.optim import adamw
    from retrograd.runs.states.budget import Replay

    engine, plan = (*way.split("/"), "")[:2]
    losses: list[float] = []
    optimizer = adamw(LR, eps_root=eps_root)
    trainer, state = Trainer.initialize(make_model(), optimizer, engine=engine, max_grad_norm=clip)
    stream = DataStream(make_rows(steps * BATCH), BATCH)
    query = DataStream(make_rows(8, seed=1), BATCH, shuffle=False)
    before = time.process_time()
    trainer.prove(state, stream)  # counted apart
    proof, marks = time.process_time() - before, [time.perf_counter()]

    def record(event) -> None:
        if first_time(event):
            losses.append(event.outcome.loss)

    final = trainer.train(state, stream, replay=Replay(plan or "auto"), observe=record)
    marks.append(time.perf_counter())
    if backward:
        found = trainer.evaluate(final, query)
        marks.append(time.perf_counter())
        result = trainer.backward(None, stream, found)
        marks.append(time.perf_counter())
        assert bool(result.weight_grads.isfinite().all())
        assert float(result.weight_grads.abs().max()) > 0
    names = ("train", "query", "reverse")
    return losses, {name: b - a for name, a, b in zip(names, marks, marks[1:])} | {
        "whole": marks[-1] - marks[0],
        "proof_cpu": proof,
    }


def timed(kind: str, steps: int, clip: float | None) -> dict[str, float]:
    """One run in a process of its own; ours with the setting of torch that the command line makes."""
    command = [sys.executable, __file__, "--child", kind, "--steps", str(steps)]
    command += ["--clip", str(clip)] if clip else []
    env = os.environ | ({} if kind == "plain" else {"THP_MEM_ALLOC_ENABLE": "1"})
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    return json.loads(done.stdout.splitlines()[-1])


def child(kind: str, steps: int, clip: float | None) -> None:
    make_model()  # libraries load
    start = time.process_time()
    seconds = {"whole": plain(steps, clip)[1]} if kind == "plain" else metagradient(steps, clip, kind)[1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        json.dumps({**seconds, "cpu": time.process_time() - start - seconds.get("proof_cpu", 0.0), "peak_bytes": peak})
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--way", nargs="+", default=["double"], help="ENGINE or ENGINE/PLAN")
    parser.add_argument("--clip", type=float, metavar="NORM", help="clip the gradient norm to this")
    parser.add_argument("--hold", type=float, metavar="GIB", help="hold the machine's free memory but for so much")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.child, arguments.steps, arguments.clip)
    expected = plain(3, arguments.clip)[0]
    for way in arguments.way:
        found = metagradient(3, arguments.clip, way, eps_root=0.0, backward=False)[0]
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    print(f"same losses as the plain loop for 3 steps: {np.round(expected, 4).tolist()}")
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in ("plain", *arguments.way)}
    for turn in range(arguments.turns):
        for kind in runs:
            with holding(arguments.hold):
                runs[kind].append(timed(kind, arguments.steps, arguments.clip))
            print(f"turn {turn + 1} {kind}: {runs[kind][-1]['whole']:.1f} s", flush=True)
    report(runs, arguments.steps, arguments.json)


def report(runs: dict[str, list[dict[str, float]]], steps: int, path: Path | None) -> None:
    import torch

    def median(kind: str, name: str) -> float:
        return statistics.median(run[name] for run in runs[kind])

    states = steps * 3 * 4 * sum(p.numel() for p in make_model().parameters()) / 2**30
    base, ratio = median("plain", "whole"), {}
    print(f"{steps} steps, kept states {states:.2f} GiB; seconds as multiples of the plain loop's {base:.1f}")
    print("| | train | query | reverse | whole | whole, CPU time | peak memory |\n|---|---|---|---|---|---|---|")
    for kind in runs:
        phases = [
            f"{median(kind, name) / base:.2f}" if kind != "plain" else "" for name in ("train", "query", "reverse")
        ]
        ratio[kind] = [median(kind, name) / median("plain", name) for name in ("whole", "cpu")]
        cells = [*phases, *(f"{x:.2f}" for x in ratio[kind]), f"{median(kind, 'peak_bytes') / 2**30:.2f} GiB"]
        print(f"| {kind} | {' | '.join(cells)} |")
    if path:
        machine = {"processor": platform.machine(), "torch": torch.__version__, "threads": torch.get_num_threads()}
        path.write_text(json.dumps({"ratio": ratio, "runs": runs, "machine": machine}, indent=2) + "\n")


if __name__ == "__main__":
    main()
