"""A long run in little room: 1,250 steps of a model of 14 million parameters, whose states may take 2 GiB.

    python bench/long.py --out runs/long
    python bench/long.py --steps 200 --kills 2

`retrograd magic` trains a GPT-NeoX of random weights with SGD and pulls one query back. All states would take many times
the room; so steps are taken again. The run is made once undisturbed, and once killed by SIGKILL at random moments and
started again until it is done: `scores.pt` has to have the same bytes. It tells the states held, the steps taken again, CPU-seconds and the peak of
memory by phase, and what was done when each kill fell. Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import tiny
from tools import gpt_neox, machine, table, write_json

BATCH, PHASES = 2, ("train", "query", "reverse")


def made(folder: Path, steps: int) -> None:
    """A model of 14 million parameters, most of them of its vocabulary of 50,304, short documents and a query."""
    gpt_neox(layers=6, width=128, heads=4, vocabulary=50_304, length=64).save_pretrained(folder / "model")
    tiny.save_tokenizer(folder / "model")
    draw = random.Random(0)
    texts = [" ".join(draw.choice(tiny.WORDS) for _ in range(draw.randint(4, 16))) for _ in range(BATCH * steps)]
    tiny.save_jsonl(folder / "train.jsonl", texts)
    tiny.save_jsonl(folder / "query.jsonl", tiny.sentences(3, seed=1))


def command(folder: Path, name: str, room: str) -> list[str]:
    return [
        sys.executable, "-m", "retrograd", "magic", str(folder / name), "--model", str(folder / "model"),
        "--data.dataset", str(folder / "train.jsonl"), "--query.dataset", str(folder / "query.jsonl"),
        "--train.batch_size", str(BATCH), "--train.optimizer", "sgd", "--train.lr", "1e-2", "--attribute", "tokens",
        "--replay.plan", "binomial", "--replay.memory", room, "--replay.disk", "0",
    ]  # fmt: skip


def left_alone(command: list[str]) -> float:
    """Seconds that a command took."""
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return time.monotonic() - start


def killed(command: list[str], run: Path, kills: int, seconds: float, draw: random.Random) -> list[dict[str, Any]]:
    """Start a command, kill it at random moments, start it again; what had been done at each kill."""
    told = []
    for _ in range(kills):
        after = draw.uniform(0.1, 1.0) * seconds / max(1, kills)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=after)
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        manifest = json.loads((run / "manifest.json").read_text()) if (run / "manifest.json").exists() else {}
        told.append({"after_seconds": round(after, 1), "phases_done": sorted(manifest.get("phases", {}))})
    left_alone(command)
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--steps", type=int, default=1250)
    parser.add_argument("--room", default="2GiB", help="for states, in memory")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="keeps the runs, and what is told as long.json")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        made(folder, given.steps)
        seconds = left_alone(command(folder, "alone", given.room))
        draw = random.Random(given.seed)
        told = killed(command(folder, "killed", given.room), folder / "killed", given.kills, seconds, draw)
        manifest = json.loads((folder / "alone" / "manifest.json").read_text())
        same = len({(folder / name / "scores.pt").read_bytes() for name in ("alone", "killed")}) == 1
        found = {"steps": given.steps, "seconds": seconds, "phases": manifest["phases"], "replay": manifest.get("replay"),
                 "kills": told, "same_bytes": same, "machine": machine()}  # fmt: skip
        write_json(folder / "long.json", found)
    print(table(["phase", "CPU-seconds", "peak, GiB"],
                [[name, f"{manifest['phases'][name]['cpu_seconds']:.1f}",
                  f"{manifest['phases'][name]['peak_memory_bytes'] / 2**30:.2f}"] for name in PHASES]))  # fmt: skip
    print(f"replay: {found['replay']}\nkills: {told}\nthe same scores: {same}")
    sys.exit(0 if same and len(told) == given.kills else 1)


if __name__ == "__main__":
    main()
