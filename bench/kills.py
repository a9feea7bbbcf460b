"""Kill a small run over and over, at every kind of moment, and see that it ends with the bits of one left alone.

    python bench/kills.py --kills 1000 --seed 0

A run here is `retrograd magic` on a tiny model, 10 steps, evaluated on its way, with one of several layouts of what is
kept; or, with --run trainer, `Trainer` with an even smaller model, which takes a tenth of the time. It is killed one to five times, then left to end. A kill is one of

    time    after a random time
    call    at the n-th write, sync, rename or removal: before it, directly after it, or in the middle of a line
    power   the same, and what the logs grew by since they were last synced is lost from a random byte on

All processes are forked from one that has loaded everything, so that a kill costs the run's own seconds. Held against
the run that was left alone: scores, digests, the journal's lines, the best model, and that nothing else is left over.
Writes JSON to --output, exits 1 if any run differs or does not end.
"""

from __future__ import annotations

import argparse
import collections
import functools
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import tiny
import torch
from tools import machine, write_json

import retrograd.commands.magic as stage
from retrograd import cli
from retrograd.core.optim import AdamW
from retrograd.data.stream import DataStream
from retrograd.runs.states.budget import Replay
from retrograd.trainer import Trainer

LAYOUTS = {
    "every step": ("--replay.heartbeat", "0"),
    "no resume point": ("--replay.heartbeat", "1000"),
    "slots on disk": ("--replay.heartbeat", "0", "--replay.plan", "binomial", "--replay.slots", "3",
                      "--replay.memory", "0", "--replay.disk", "1GiB"),
    "gradients on disk": ("--replay.heartbeat", "0.05", "--replay.plan", "gradients", "--replay.slots", "3",
                          "--replay.memory", "0", "--replay.disk", "1GiB"),
    "kept": ("--replay.heartbeat", "0.02", "--replay.plan", "all", "--replay.keep", "--replay.disk", "1GiB"),
}  # fmt: skip
LOGS = ("metrics.jsonl", "digests.txt")
_MEMORY = "/dev/shm"  # a sync takes no time there, and a kill leaves the same
PATIENCE = 300.0  # seconds for a run; beyond them it counts as one that does not end


class Kill(NamedTuple):
    """How one process dies: after `seconds`, or at its `number`-th call that changes a disk."""

    kind: str
    seconds: float = 0.0
    number: int = 0
    moment: str = "before"

    @classmethod
    def drawn(cls, draw: random.Random, seconds: float, calls: int) -> Kill:
        """Spread over the time and the calls that a run which is left alone takes."""
        kind = draw.choice(("time", "call", "call", "power"))
        moment = draw.choice(("before", "after", "torn"))
        return cls(kind, draw.uniform(0, 1.2 * seconds), draw.randrange(1, calls + 1), moment)


class Disk:
    """Counts the calls of this process that change a disk, and dies at the one that was drawn."""

    def __init__(self, kill: Kill | None) -> None:
        self.kill, self.calls = kill, 0
        self.synced: dict[str, int] = {}  # bytes of each log that a power failure leaves
        self._real = {name: getattr(os, name) for name in ("fsync", "replace", "rename", "unlink", "rmdir")}

    def watch(self) -> None:
        for name, real in self._real.items():
            setattr(os, name, self._watched(real))
        os.fsync = self._fsync(os.fsync)
        from retrograd.runs import journal, resume

        for module in (journal, resume):
            module.append_line = self._append(module.append_line)  # type: ignore[attr-defined]

    def _watched(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            self._count("before")
            found = real(*given, **named)
            self._at("after")
            return found

        return call

    def _fsync(self, watched: Callable[[int], None]) -> Callable[[int], None]:
        def call(file: int) -> None:
            watched(file)
            path = os.readlink(f"/proc/self/fd/{file}") if Path("/proc/self/fd").exists() else ""
            if path.endswith(LOGS):
                self.synced[path] = os.fstat(file).st_size

        return call

    def _append(self, real: Callable[..., None]) -> Callable[..., None]:
        def call(path: Path, line: str, **named: Any) -> None:
            self.synced.setdefault(str(path.resolve()), path.stat().st_size if path.exists() else 0)
            self._count("before")
            if self._due("torn"):
                with path.open("ab") as file:
                    file.write(line.encode()[: max(1, len(line) // 2)])
                self._die()
            real(path, line, **named)
            self._at("after")

        return call

    def _count(self, moment: str) -> None:
        self.calls += 1
        self._at(moment)

    def _due(self, moment: str) -> bool:
        kill = self.kill
        return kill is not None and kill.kind != "time" and kill.number == self.calls and kill.moment == moment

    def _at(self, moment: str) -> None:
        if self._due(moment):
            self._die()

    def _die(self) -> None:
        for name, size in self.synced.items() if self.kill and self.kill.kind == "power" else ():
            end = os.stat(name).st_size if Path(name).exists() else 0
            if end > size:
                os.truncate(name, random.Random(self.calls).randint(size, end))
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)  # another thread may be in a call that ends later


def magic(world: Path, run: Path, layout: str) -> int:
    return cli.main([
        "magic", str(run), "--model", str(world / "model"), "--data.dataset", str(world / "train.jsonl"),
        "--query.dataset", str(world / "query.jsonl"), "--train.batch_size", "4", "--train.epochs", "2",
        "--train.lr", "1e-2", "--device", "cpu", "--evaluate.tasks", str(world / "tasks.yaml"), "--evaluate.every", "4",
        "--evaluate.keep_best", "min:prose", *LAYOUTS[layout],
    ])  # fmt: skip


REPLAYS = {
    "every step": Replay(plan="binomial", slots=2, heartbeat=0),
    "slots on disk": Replay(memory=0, disk=1 << 30, plan="all", heartbeat=0.01),
    "kept": Replay(memory=0, disk=1 << 30, plan="all", keep=True, heartbeat=1000),
}


def trainer(world: Path, run: Path, layout: str) -> int:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2).double()

    def loss(params: Any, batch: Any) -> torch.Tensor:
        found = torch.func.functional_call(model, params, (batch["x"],))
        return (found - batch["y"]).square().sum(1)

    stream = DataStream({"x": torch.randn(12, 3).double(), "y": torch.randn(12, 2).double()}, 2, epochs=2)
    trained, state = Trainer.initialize(model, AdamW(0.01, eps_root=1e-6), loss)
    final = trained.train(state, stream, run / "checkpoints", replay=REPLAYS[layout])
    found = trained.backward(
        run / "checkpoints", stream, trained.evaluate(final, stream), replay=REPLAYS[layout]
    )  # fmt: skip
    torch.save(found.weight_grads, run / "scores.pt")
    return 0


class Subject(NamedTuple):
    """What is killed: work in one of its layouts, and the files that have to come out with the same bits."""

    work: Callable[[Path, Path, str], int]
    layouts: dict[str, Any]
    files: tuple[str, ...]


SUBJECTS = {
    "magic": Subject(magic, LAYOUTS, ("scores.pt", "scores.parquet", "all_scores.json", "recipe_gradients.json",
                                      "best/model.safetensors")),
    "trainer": Subject(trainer, REPLAYS, ("scores.pt",)),
}  # fmt: skip


def make_world(folder: Path) -> None:
    tiny.save_model(folder / "model")
    tiny.save_tokenizer(folder / "model")
    tiny.save_jsonl(folder / "train.jsonl", tiny.sentences(20, 0))
    tiny.save_jsonl(folder / "query.jsonl", tiny.sentences(4, 1))
    tiny.save_jsonl(folder / "prose.jsonl", tiny.sentences(3, 2))
    (folder / "tasks.yaml").write_text(f"prose: {{form: text, dataset: {folder / 'prose.jsonl'}}}\n")


def child(work: Callable[[], int], kill: Kill | None, log: Path) -> int:
    """Fork a process that does the work; its number."""
    number = os.fork()
    if number:
        return number
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        disk = Disk(kill)
        disk.watch()
        code = work()
        log.with_suffix(".calls").write_text(str(disk.calls))
        sys.stdout.flush()
        os._exit(code)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(99)


def ended(number: int, seconds: float) -> int:
    """The exit code of a child, which is killed after so many seconds; −9 if it was."""
    until = time.monotonic() + seconds
    while not (found := os.waitpid(number, os.WNOHANG))[0]:
        if time.monotonic() > until:
            os.kill(number, signal.SIGKILL)
            found = os.waitpid(number, 0)
            break
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(found[1])


def outcome(run: Path, files: tuple[str, ...]) -> dict[str, Any]:
    """What has to be the same however often a run was killed."""
    journal = run / "metrics.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    told = sorted((line["phase"], line["step"], json.dumps({**line, "seconds": 0}, sort_keys=True)) for line in lines)
    digests = dict(line.split() for line in (run / "checkpoints" / "digests.txt").read_text().splitlines())
    states = {path.name for path in (run / "checkpoints").glob("*.safetensors")}
    left = sorted(str(path.relative_to(run)) for path in run.rglob(".*"))
    bits = {name: hashlib.sha256((run / name).read_bytes()).hexdigest() for name in files}
    return {"lines": told, "digests": digests, "states": states, "left over": left, **bits}


def differences(run: Path, alone: dict[str, Any], files: tuple[str, ...], kept: bool) -> list[str]:
    found = outcome(run, files)
    last = max(alone["states"] - {"final.safetensors"}, default="")
    if kept:  # a run that goes on does not hold the last state: the way back begins at it
        found["states"].discard(last)
        alone = {**alone, "states": alone["states"] - {last}}
    return [name for name in alone if found[name] != alone[name]]


class Undisturbed(NamedTuple):
    """A layout's run that was left alone: what it left, its seconds, and its calls that change a disk."""

    outcome: dict[str, Any]
    seconds: float
    calls: int


def undisturbed(world: Path, subject: Subject, layout: str) -> Undisturbed:
    run, log, start = world / f"alone-{layout.replace(' ', '-')}", world / "alone.log", time.monotonic()
    code = ended(child(functools.partial(subject.work, world, run, layout), None, log), PATIENCE)
    if code:
        raise RuntimeError(f"the run that was left alone ended with {code}:\n{log.read_text()[-2000:]}")
    return Undisturbed(
        outcome(run, subject.files), time.monotonic() - start, int(log.with_suffix(".calls").read_text())
    )


def disturbed(
    world: Path, number: int, draw: random.Random, subject: Subject, alone: dict[str, Undisturbed]
) -> dict[str, Any]:
    """One run that is killed up to five times and then left to end."""
    layout, run, log = draw.choice(list(alone)), world / f"run-{number}", world / "run.log"
    work, before = functools.partial(subject.work, world, run, layout), alone[layout]
    kills: list[Kill] = []
    wanted, code = draw.randint(1, 5), -signal.SIGKILL
    while code == -signal.SIGKILL and len(kills) < wanted:
        kill = Kill.drawn(draw, before.seconds, before.calls)
        code = ended(child(work, kill, log), kill.seconds if kill.kind == "time" else PATIENCE)
        if code == -signal.SIGKILL:
            kills.append(kill)
    if code in (0, -signal.SIGKILL):  # a run that ended before its kill is asked again: it is done
        code = ended(child(work, None, log), PATIENCE)
    wrong = differences(run, before.outcome, subject.files, layout == "kept") if code == 0 else [log.read_text()[-300:]]
    if not wrong:
        shutil.rmtree(run)
    told = [f"{kill.kind} {kill.moment if kill.kind != 'time' else ''}".strip() for kill in kills]
    return {"run": number, "layout": layout, "kills": told, "drawn": [list(kill) for kill in kills], "exit": code,
            "differs": wrong}  # fmt: skip


def kills(subject: Subject, wanted: int, seed: int, until: float = float("inf")) -> Iterator[dict[str, Any]]:
    """Runs with so many kills in all, each with what differs; none begins past `until` (time.monotonic)."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=_MEMORY if os.access(_MEMORY, os.W_OK) else None) as place:
        world, done = Path(place), 0
        make_world(world)
        alone = {layout: undisturbed(world, subject, layout) for layout in subject.layouts}
        for number in range(10 * wanted):
            if done >= wanted or time.monotonic() > until:
                return
            found = disturbed(world, number, random.Random(f"{seed} {number}"), subject, alone)
            done += len(found["kills"])
            print(f"{done}/{wanted} {found}" if found["differs"] else f"{done}/{wanted}", flush=True)
            yield found


def main() -> int:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--run", choices=list(SUBJECTS), default="magic")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no run after so many")
    parser.add_argument("--output", type=Path, default=Path("runs/kills.json"))
    given = parser.parse_args()
    start = time.monotonic()
    runs = list(kills(SUBJECTS[given.run], given.kills, given.seed, start + given.seconds))
    by_kind = collections.Counter(kill for run in runs for kill in run["kills"])
    wrong = [run for run in runs if run["differs"]]
    write_json(given.output, {
        "kills": sum(by_kind.values()), "by_kind": by_kind, "runs": len(runs), "wrong": wrong, "run": given.run, "seed": given.seed,
        "seconds": round(time.monotonic() - start, 1), "machine": machine(),
    })  # fmt: skip
    print(f"{sum(by_kind.values())} kills in {len(runs)} runs, {dict(by_kind)}: {len(wrong)} runs differ or do not end")
    return 1 if wrong else 0


if __name__ == "__main__":
    assert stage  # loaded before the first fork
    sys.exit(main())
