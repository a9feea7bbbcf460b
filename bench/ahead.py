"""What it buys to gather the next block's parameters while one is passed (`--parallel shard --engine blocks`).

    unshare -n sh -c "ip link set lo up; tc qdisc add dev lo root tbf rate 400mbit burst 512kb latency 400ms;
        python bench/ahead.py --width 192 --depth 6"

Ranks are forked processes with gloo. They take turns, in an order that alternates, at a gradient and a pullback with and
without; all of them have to have the same bits. Without `unshare` and `tc` (Linux, as root) the network is this
machine's memory. Exit code 1 if bits differ.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "parallel"))

import ranks
import torch
from tools import gpt_neox, machine, write_json

from retrograd.core import tree
from retrograd.core.engine.blocks import Blocks, Read
from retrograd.core.optim import Params
from retrograd.data.stream import DataStream
from retrograd.lm.chain import decoder_chain
from retrograd.lm.model import trainable
from retrograd.parallel.group import Group
from retrograd.parallel.pieces import Pieces
from retrograd.parallel.shard import ByBlock

ranks.LIMIT = 3600
VOCABULARY = 1000


class InTurn(ByBlock):
    """Nothing is gathered before it is asked for."""

    def _reading(self, own: Params) -> Read:
        return partial(self.lying.some, own)


def timed(group: Group, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every turn, with and without."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = gpt_neox(layers=options.depth, width=options.width, heads=2, vocabulary=VOCABULARY, length=64).eval()
    engine, params = Blocks(decoder_chain(module)), trainable(module)[0]
    rows = torch.randint(0, VOCABULARY, (group.world, options.length)).tolist()
    stream = DataStream(rows, batch_size=group.world)
    lying = Pieces(params, group.world, group)
    own, bars = lying.own(params), lying.own({name: theta[None] for name, theta in params.items()})
    found: dict[str, list[float]] = {"ahead": [], "in turn": []}
    kinds, digests = [("ahead", ByBlock), ("in turn", InTurn)], set[str]()
    for turn in range(options.turns + 1):
        for name, kind in kinds[:: 1 if turn % 2 else -1]:
            half = kind(engine, group.world, group, lying=lying, first=own)
            group.everywhere(None)  # all begin at once
            start = time.perf_counter()
            passed = half.gradient(own, [stream[0]], stream.weights, None)
            pulled = half.pullback(own, [stream[0]], stream.weights, None, bars)
            if turn:  # the first warms up
                found[name].append(time.perf_counter() - start)
            digests.add(tree.digest((passed, pulled)))
    assert len(digests) == 1, "other bits"
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--depth", type=int, default=6, help="layers")
    parser.add_argument("--length", type=int, default=16, help="tokens of a row; every rank has one row")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = ranks.on_ranks(options.ranks, timed, options, patience=300.0)[0]
    ahead, plain = (statistics.median(seconds) for seconds in found.values())
    saved = sorted(100 * (1 - one / other) for one, other in zip(found["ahead"], found["in turn"], strict=True))
    low, middle, high = (saved[len(saved) * quarter // 4] for quarter in (1, 2, 3))
    print(f"a gradient and a pullback, medians of {options.turns}: {ahead:.3f} s, in turn {plain:.3f} s; "
          f"saved, by turn: median {middle:.0f} %, quartiles {low:.0f} and {high:.0f} %")  # fmt: skip
    if options.json:
        write_json(options.json, {**machine(), **vars(options), "json": str(options.json), "seconds": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
