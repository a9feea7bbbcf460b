"""How the cost of a metagradient run grows with its steps, its parameters and the length of its rows.

A GPT-NeoX of random weights; AdamW; all states kept; matrices by torch's library at every size. Each point is the median
CPU time of train + query + reverse; the exponent is the slope of a line through log cost against log size. Steps should
give 1; parameters and length approach 1 and 2 only where matrix products and attention dominate.

    python bench/scaling.py
    python bench/scaling.py --turns 1 --quick
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path

BASE = {"steps": 8, "width": 128, "length": 64}
AXES = {"steps": (4, 8, 16, 32), "width": (64, 128, 256, 384), "length": (32, 64, 128, 256)}
LAYERS, BATCH, VOCABULARY = 4, 4, 2048


def cost(steps: int, width: int, length: int) -> tuple[float, int]:
    """(CPU seconds of a whole run, parameters)."""
    import numpy as np
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from retrograd import DataStream, Trainer
    from retrograd.optim import adamw

    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=LAYERS, num_attention_heads=4,
            intermediate_size=4 * width, max_position_embeddings=length, hidden_dropout=0.0, attention_dropout=0.0,
            bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    draw = np.random.default_rng(0)
    rows = [draw.integers(0, VOCABULARY, length).tolist() for _ in range((steps + 1) * BATCH)]
    trainer, state = Trainer.initialize(model, adamw(1e-4, eps_root=1e-6))
    stream, query = DataStream(rows[:-BATCH], BATCH), DataStream(rows[-BATCH:], BATCH, shuffle=False)
    trainer.prove(state, stream)  # not counted
    start = time.process_time()
    final = trainer.train(state, stream)
    trainer.backward(None, stream, trainer.evaluate(final, query))
    return time.process_time() - start, sum(leaf.numel() for leaf in state.params.values())


def exponent(sizes: list[float], costs: list[float]) -> float:
    import numpy as np

    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="two points an axis")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    axes = {name: values[:2] if arguments.quick else values for name, values in AXES.items()}
    points = {(name, value): {**BASE, name: value} for name, values in axes.items() for value in values}
    cost(**BASE)  # warm
    seen: dict[tuple[str, int], list[tuple[float, int]]] = {point: [] for point in points}
    for _ in range(arguments.turns):
        for point, sizes in points.items():
            seen[point].append(cost(**sizes))
    results = {}
    print("| grows with | sizes | relative cost | exponent |\n|---|---|---|---|")
    for name, values in axes.items():
        costs = [statistics.median(seconds for seconds, _ in seen[name, value]) for value in values]
        sizes = [seen[name, value][0][1] if name == "width" else value for value in values]
        label = "parameters" if name == "width" else name
        results[label] = {"sizes": sizes, "cost": costs, "exponent": exponent(sizes, costs)}
        relative = ", ".join(f"{one / costs[0]:.2f}" for one in costs)
        shown = ", ".join(f"{size:,}" for size in sizes)
        print(f"| {label} | {shown} | {relative} | {results[label]['exponent']:.2f} |")
        assert math.isfinite(results[label]["exponent"])
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
