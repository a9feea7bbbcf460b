"""Retrainings a minute: one by one, batched in a stack of models, and in two processes.

That all three measure the same is asserted first. The ways take turns; printed are medians of the rates and their ratios,
for a model whose steps are mostly overhead and for one whose steps are mostly arithmetic.

    python bench/validate.py                       # three turns of each
    python bench/validate.py --turns 1 --sets 8    # quickly
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

STEPS, BATCH = 12, 8
SIZES = {"tiny": (32, 200, 24), "small": (128, 8000, 64)}  # width, vocabulary, tokens in a row
STACK = 16


def make(size: str):
    """A run of one size: training, initial parameters, loss, query."""
    import numpy as np
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from retrograd.core.engine import Double
    from retrograd.core.optim import AdamW
    from retrograd.core.step import Recipe, Training
    from retrograd.data.stream import DataStream, token_rows
    from retrograd.lm.model import causal_objective, trainable
    from retrograd.query.columns import Queries, query_columns

    torch.set_num_threads(1)
    width, vocabulary, length = SIZES[size]
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=vocabulary, hidden_size=width, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=4 * width, max_position_embeddings=length, hidden_dropout=0.0, attention_dropout=0.0,
            bos_token_id=0, eos_token_id=0,
        )
    ).eval()  # fmt: skip
    draw = np.random.default_rng(0)
    rows = [draw.integers(0, vocabulary, length).tolist() for _ in range(STEPS * BATCH + 4)]
    objective = causal_objective(model)[0]
    stream = DataStream(rows[:-4], BATCH)
    training = Training(Recipe(AdamW(1e-3, eps_root=1e-6)), Double(objective), stream, stream.weights)
    return training, trainable(model)[0], objective, Queries(query_columns(objective, token_rows(rows[-4:])))


def weights(training, sets: int):
    import numpy as np
    import torch

    from retrograd.trust.left_out import random_subset, without

    members = np.arange(training.weights.numel())
    return torch.stack([without(training.weights, random_subset(members, 0.05, 0, k)) for k in range(sets)])


def looped(run, stack) -> list[float]:
    from retrograd.core.check import train

    training, params, _, query = run
    return [float(query.values(train(training, params, one).params)) for one in stack]


def batched(run, stack) -> list[float]:
    from retrograd.trust.ensemble import train_many

    training, params, objective, query = run
    found = []
    for start in range(0, len(stack), STACK):
        many = train_many(training, params, stack[start : start + STACK], objective=objective)
        members = len(next(iter(many.values())))
        found += [float(query.values({name: leaf[s] for name, leaf in many.items()})) for s in range(members)]
    return found


_RUNS: dict = {}


def _open(size: str) -> None:
    _RUNS[size] = make(size)


def _one(arguments) -> float:
    size, number, sets = arguments
    run = _RUNS[size]
    return looped(run, weights(run[0], sets)[number : number + 1])[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--sets", type=int, default=32)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    results = {size: measure(size, arguments.sets, arguments.turns) for size in SIZES}
    if arguments.json:
        machine = {"processor": platform.machine(), "cores": os.cpu_count()}
        arguments.json.write_text(json.dumps({"per_minute": results, "machine": machine}, indent=2) + "\n")


def measure(size: str, sets: int, turns: int) -> dict[str, float]:
    import numpy as np

    run = make(size)
    stack = weights(run[0], sets)
    with ProcessPoolExecutor(2, get_context("spawn"), _open, (size,)) as pool:
        tasks = [(size, number, sets) for number in range(sets)]
        ways = {
            "looped": lambda: looped(run, stack),
            "batched": lambda: batched(run, stack),
            "two processes": lambda: list(pool.map(_one, tasks)),
        }
        values = {name: way() for name, way in ways.items()}  # the processes are warm from here on
        assert values["looped"] == values["two processes"], "processes have to give the same bits"
        np.testing.assert_allclose(values["batched"], values["looped"], rtol=1e-5)
        parameters = sum(leaf.numel() for leaf in run[1].values())
        print(f"{size}, {parameters:,} parameters: the same values from all three ways", flush=True)
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(turns):
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                rates[name].append(60 * sets / (time.perf_counter() - start))
    medians = {name: statistics.median(found) for name, found in rates.items()}
    for name, rate in medians.items():
        print(f"  {name}: {rate:.0f} retrainings a minute, {rate / medians['looped']:.2f} × looped", flush=True)
    return medians


if __name__ == "__main__":
    main()
