"""What processes that share a run hold, whether they agree, and what a kill of one of them changes.

    python bench/ranks.py --ranks 1 2 3 4 --depth 4 --width 128
    python bench/ranks.py --ranks 1 4 --replicas 2
    python bench/ranks.py --kills 20 --seed 0

The first two run `retrograd magic` on a GPT-NeoX of random weights with each number of ranks, replicated, in pieces, and
in pieces of several replicas, and tell for each rank the bytes of all tensors that it holds between two steps of the way back, where states are kept in
memory; the most that it has at once in the proofs before the first step, while rows are passed over, for a gradient and
for a pullback, and in the query; and how far scores are from those of one process, relative to the largest. With --kills a run of two ranks is
killed at random times, one rank each time, and goes on with one rank or two, replicated or in pieces, until it is done:
its `scores.pt` has to have the bytes of a run that was left alone. Ranks are forked processes with gloo. Exit code 1 if
anything differs.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "parallel"))

import ranks
import tiny
import torch
from peak import Peak
from tools import gpt_neox, machine, table, write_json

from retrograd.cli import main as command
from retrograd.core.engine import Blocks, Double
from retrograd.lm import engines
from retrograd.parallel.group import Group
from retrograd.parallel.split import Split
from retrograd.query import together
from retrograd.query.columns import Queries
from retrograd.runs import setup
from retrograd.runs.resume import Durable
from retrograd.runs.trajectory import Trajectory

ranks.LIMIT = 3600
MODES = ("replicate", "shard")
TOLERANCE = {"float64": 1e-10, "float32": 1e-4}


def made(folder: Path, depth: int, width: int, steps: int, longest: int = 128) -> list[str]:
    """A model, documents and a question; the settings that name them."""
    module = gpt_neox(layers=depth, width=width, heads=2, vocabulary=tiny.VOCABULARY, length=160)
    module.save_pretrained(folder / "model")
    tiny.save_tokenizer(folder / "model")
    draw = random.Random(0)
    lengths = [min(length, longest) for length in (8, 12, 40, 128)]
    texts = [" ".join(draw.choice(tiny.WORDS) for _ in range(draw.choice(lengths))) for _ in range(8 * steps)]
    tiny.save_jsonl(folder / "train.jsonl", texts)
    tiny.save_jsonl(folder / "query.jsonl", tiny.sentences(3, seed=1))
    return [
        "--model", str(folder / "model"), "--data.dataset", str(folder / "train.jsonl"), "--query.dataset",
        str(folder / "query.jsonl"), "--train.batch_size", "8", "--train.lr", "1e-3", "--train.eps_root", "1e-6",
        "--train.max_grad_norm", "1.0",
    ]  # fmt: skip


def held() -> int:
    """Bytes of all tensors of this process."""
    storages = {}
    for one in gc.get_objects():
        with contextlib.suppress(ReferenceError):
            if issubclass(type(one), torch.Tensor) and one.layout is torch.strided and one.device.type != "meta":
                storages[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
    return sum(storages.values())


def watched(before: int) -> tuple[list[int], list[int]]:
    """Notes what is held between steps beyond what was held before, in this process from now on.

    Between two steps of its own way back; and, where a process has none, while it waits to be called.
    """
    between: list[int] = []
    waiting: list[int] = []
    heartbeat, wait = Durable.reverse_heartbeat, Group._wait

    def beat(self: Durable, event: Any, *given: Any) -> None:
        if event.step == self.steps - 2:
            between.append(held() - before)
        heartbeat(self, event, *given)

    def waits(self: Group, key: str, **options: Any) -> Any:
        if key.startswith("call/") and 4 <= self._calls <= 8:
            waiting.append(held() - before)
        return wait(self, key, **options)

    Durable.reverse_heartbeat, Group._wait = beat, waits  # type: ignore[method-assign]
    return between, waiting


def peaks(counted: Peak, world: int) -> dict[str, list[int]]:
    """Notes the most bytes there are at once in a run's passes over rows, beyond what was held before, from now on."""
    found: dict[str, list[int]] = {"proofs": [], "gradient": [], "pullback": [], "query": []}
    start = counted.now
    passes: dict[str, list[tuple[Any, str]]] = {
        "proofs": [(engines, "decoder_chain"), (setup, "prove_first_step"), (setup, "prove_by_block")],
        "gradient": [(Split, "_gradient"), (Split, "_linearize")],
        "pullback": [(Split, "_pulled")],
        "query": [(together, "_answered")],
    }
    if world == 1:
        passes |= {kind: [(Blocks, kind), (Double, kind)] for kind in ("gradient", "pullback")}
        passes["query"] = [(Queries, "__call__")]
    for kind, methods in passes.items():
        for owner, name in methods:
            watched = counted.during(getattr(owner, name), lambda most, kind=kind: found[kind].append(most - start))
            setattr(owner, name, lambda *given, watched=watched, **options: watched(*given, **options))
    train = Trajectory.train

    def trained(self: Trajectory) -> Any:
        for kind in ("gradient", "pullback"):
            found[kind].clear()  # of proofs, before the first step
        return train(self)

    Trajectory.train = trained  # type: ignore[method-assign]
    return found


def run(world: int, arguments: list[str]) -> list[tuple[int, ...]]:
    """(exit code, bytes held, most in the proofs, in a gradient, in a pullback, in the query) of each rank."""

    def rank(_: int) -> tuple[int, ...]:
        between, waiting = watched(held())
        code = 0
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), Peak() as counted:
            most = peaks(counted, world)
            try:
                code = command(arguments)
            except SystemExit as end:  # how other ranks than the first end
                code = int(end.code or 0)
        return code, max(between or waiting, default=0), *(max(found, default=0) for found in most.values())

    return ranks.forked(world, rank)


def compare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    base = made(folder, options.depth, options.width, options.steps, options.longest)
    settings = [*base, "--dtype", options.dtype, "--replay.plan", "all", "--replay.memory", "8GiB"]
    rows, records, worst, first = list[list[str]](), list[dict[str, Any]](), 0.0, None
    for world in options.ranks:
        meshes = [(MODES[0], 1)]
        if world > 1:
            meshes += [(MODES[1], replicas) for replicas in (1, *options.replicas) if world % replicas == 0]
        for (mode, replicas), engine in itertools.product(meshes, options.engines):
            place = folder / f"{mode}-{world}-{replicas}-{engine}"
            sharing = ["--parallel", mode, "--replicas", str(replicas)]
            done = run(world, ["magic", str(place), *settings, *sharing, "--engine", engine])
            assert all(code == 0 for code, *_ in done), f"{world} ranks, {mode}: exit codes {done}"
            scores = torch.load(place / "scores.pt", weights_only=True).double()
            first = scores if first is None else first
            apart = float((scores - first).abs().max() / first.abs().max())
            _, sizes, proofs, gradient, pullback, query = map(list, zip(*done, strict=True))
            worst = max(worst, apart)
            records.append({
                "ranks": world, "mode": mode, "replicas": replicas, "engine": engine, "held_bytes": sizes, "proofs_peak_bytes": proofs,
                "gradient_peak_bytes": gradient, "pullback_peak_bytes": pullback, "query_peak_bytes": query,
                "apart": apart,
            })  # fmt: skip
            phases = (sizes, proofs, gradient, pullback, query)
            told = [", ".join(f"{size / 2**20:.1f}" for size in each) for each in phases]
            named = f"{mode}, {replicas} replicas" if replicas > 1 else mode
            rows.append([named if world > 1 else "one process", str(world), engine, *told, f"{apart:.1g}"])
    print(table(["mode", "ranks", "engine", "MiB held between steps, by rank", "most in the proofs",
                 "in a gradient", "in a pullback", "in the query", "scores apart"], rows))  # fmt: skip
    return {"records": records, "worst": worst, "ok": worst <= TOLERANCE[options.dtype]}


def kill(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    base = [*made(folder, 2, 16, 20), "--shards", "2", "--replay.heartbeat", "0", "--patience", "30"]
    draw, reference, differ, killed = random.Random(options.seed), folder / "alone", 0, 0
    start = time.monotonic()
    assert set(carried_out(2, [str(reference), *base])) == {0}
    seconds = time.monotonic() - start
    expected = (reference / "scores.pt").read_bytes()
    while killed < options.kills:
        place, told = folder / "run", list[str]()
        while not (place / "scores.pt").exists():
            world, mode, victim = draw.choice((1, 2, 2, 2)), draw.choice(MODES), draw.randrange(2)
            after = draw.uniform(0.1, 0.9) * seconds if killed < options.kills else 10 * seconds
            codes = carried_out(world, [str(place), *base, "--parallel", mode], victim % world, after)
            dead = -signal.SIGKILL in codes
            killed += dead
            told.append(f"{mode} on {world}" + (f", rank {victim % world} killed after {after:.1f} s" if dead else ""))
            assert dead or set(codes) == {0}, f"exit codes {codes} without a kill: {told}"
        same = (place / "scores.pt").read_bytes() == expected
        differ += not same
        print(f"{'same' if same else 'OTHER'} bytes after: {'; '.join(told)}", flush=True)
        shutil.rmtree(place)
    print(f"{killed} kills, {differ} runs with other scores")
    return {"kills": killed, "differ": differ, "ok": differ == 0}


def carried_out(world: int, arguments: list[str], victim: int = 0, after: float = float("inf")) -> list[int]:
    """The exit codes of `magic`, one rank of which is killed after so many seconds if all are still there."""

    def during(processes: list[Any]) -> None:
        until = time.monotonic() + after
        while all(process.is_alive() for process in processes):
            if time.monotonic() > until:
                os.kill(processes[victim].pid, signal.SIGKILL)
                return
            time.sleep(0.01)

    def job(_: int) -> int:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return command(["magic", *arguments])

    return [code or 0 for code in ranks.forked(world, job, during=during)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--replicas", type=int, nargs="*", default=[], help="also in pieces, in so many copies")
    parser.add_argument("--depth", type=int, default=4, help="layers")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--longest", type=int, default=128, help="tokens of a document at most")
    parser.add_argument("--dtype", choices=list(TOLERANCE), default="float32")
    parser.add_argument("--engines", nargs="+", choices=["blocks", "double"], default=["blocks"])
    parser.add_argument("--kills", type=int, default=0, help="kill a run of two ranks this often instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = kill(options, Path(folder)) if options.kills else compare(options, Path(folder))
    if options.json:
        write_json(options.json, {**machine(), **found})
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
