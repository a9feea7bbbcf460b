"""What more queries cost: one reverse sweep of K columns against one of a single column, over the same kept states.

A GPT-NeoX model of random weights is trained and its states are kept; K queries are the losses of K documents. First
every column of the widest sweep that is timed has to equal its own sweep. Then training and sweeps take turns; printed are
medians of CPU time: a run, which is training and a sweep, as a multiple of one with a single query; a sweep as a multiple
of a single sweep, and of K single sweeps, and what each query after the first adds to it.

    python bench/queries.py                          # both engines, K = 1, 2, 8, 32
    python bench/queries.py --engine blocks --queries 1 8 --turns 5 --json queries.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import subprocess
import time
from pathlib import Path

VOCABULARY = 1024


def world(engine: str, arguments: argparse.Namespace):
    """(training, initial state, objective)."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from retrograd.core.optim import AdamW
    from retrograd.core.step import Recipe, Training, initial_state
    from retrograd.data.stream import DataStream
    from retrograd.lm.engines import choose_engine
    from retrograd.lm.model import causal_objective, trainable

    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=arguments.width, num_hidden_layers=arguments.depth, num_attention_heads=4,
        intermediate_size=4 * arguments.width, max_position_embeddings=arguments.length, hidden_dropout=0.0,
        attention_dropout=0.0, bos_token_id=0, eos_token_id=0,
    ))  # fmt: skip
    model.eval()
    objective = causal_objective(model)[0]
    rows = torch.randint(VOCABULARY, (arguments.steps * arguments.batch, arguments.length)).tolist()
    stream = DataStream(rows, arguments.batch)
    recipe = Recipe(AdamW(1e-3, eps_root=1e-6))
    params = trainable(model)[0]
    training = Training(recipe, choose_engine(engine, model, objective).engine, stream, stream.weights)
    return training, initial_state(recipe, params), objective


def trained(training, start):
    """(the states, CPU seconds)."""
    from retrograd.core.step import step

    before, states = time.process_time(), [start]
    for _ in range(len(training.stream)):
        states.append(step(training, states[-1]).state)
    return states, time.process_time() - before


def columns(states, objective, count: int):
    """Gradients of the losses of `count` documents at the final parameters, [K, *shape]."""
    import torch

    from retrograd.core.engine import Double
    from retrograd.data.stream import DataStream

    rows = torch.randint(VOCABULARY, (count, 32), generator=torch.Generator().manual_seed(1)).tolist()
    stream, final = DataStream(rows, 1, shuffle=False), states[-1].params
    engine = Double(objective)
    grads = [engine.gradient(final, [stream[k]], stream.weights, None)[1] for k in range(count)]
    return {name: torch.stack([g[name] for g in grads]) for name in final}


def reverse(training, states, gradient):
    """Scores [K, N] of one sweep over the kept states, which give the gradients back, and its CPU seconds."""
    import torch

    from retrograd.core.step import pullback, recovered
    from retrograd.core.sweep import seed_cotangent

    start = time.process_time()
    cotangent = seed_cotangent(gradient, states[-1])
    scores = torch.zeros(len(next(iter(gradient.values()))), training.weights.numel())
    for state, after in reversed(list(itertools.pairwise(states))):
        grads = recovered(training.recipe, state, after.moments)
        pulled = pullback(training, state, cotangent, grads=grads)
        cotangent = pulled.cotangent
        scores.index_add_(1, pulled.index.flatten(), pulled.scores.flatten(1))
    return scores, time.process_time() - start


def compare(engine: str, arguments: argparse.Namespace) -> dict:
    training, start, objective = world(engine, arguments)
    states = trained(training, start)[0]
    gradient = columns(states, objective, max(arguments.queries))
    together = reverse(training, states, gradient)[0]
    picked = {0, max(arguments.queries) // 2, max(arguments.queries) - 1}
    alone = {k: reverse(training, states, {n: g[k : k + 1] for n, g in gradient.items()})[0][0] for k in picked}
    error = max(float((together[k] - found).norm() / found.norm()) for k, found in alone.items())
    assert error < 1e-4, f"{engine}: a column differs from its own sweep by {error:.2g}"
    seconds: dict[int, list[float]] = {0: [], **{count: [] for count in arguments.queries}}  # 0: training
    for _ in range(arguments.turns):
        for count, taken in seconds.items():
            chosen = {n: g[:count] for n, g in gradient.items()}
            taken.append((reverse(training, states, chosen) if count else trained(training, start))[1])
    medians = {count: statistics.median(taken) for count, taken in seconds.items()}
    forward, single = medians.pop(0), medians[1]
    for count, median in medians.items():
        ratio, run = median / single, (forward + median) / (forward + single)
        further = f"{(ratio - 1) / (count - 1):.2f}" if count > 1 else ""
        print(f"| {engine} | {count} | {run:.2f} | {ratio:.2f} | {ratio / count:.2f} | {further} |", flush=True)
    return {"engine": engine, "error": error, "training": seconds.pop(0), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--engine", nargs="+", default=["double", "blocks"], choices=("double", "blocks"))
    parser.add_argument(
        "--queries", nargs="+", type=int, default=[1, 2, 8, 32], help="the first is what others compare to"
    )
    for name, default in (("depth", 6), ("width", 128), ("length", 112), ("batch", 8), ("steps", 3), ("turns", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    assert min(arguments.queries) == 1, "costs are told in single sweeps: --queries has to include 1"
    print("| engine | K | run, of one query's | single sweeps | of K single sweeps | each further query |")
    print("|---|---|---|---|---|---|")
    results = [compare(engine, arguments) for engine in arguments.engine]
    if arguments.json:
        import torch

        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        machine = {"processor": platform.machine(), "torch": torch.__version__, "threads": torch.get_num_threads()}
        values = {
            "commit": commit,
            "machine": machine,
            "arguments": vars(arguments) | {"json": None},
            "results": results,
        }
        arguments.json.write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    main()
