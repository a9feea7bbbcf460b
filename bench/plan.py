"""What `retrograd plan` says, against the run that follows: time, memory and disk of small runs of many kinds.

Each plan and each run is a process of its own. Time is CPU time, which other work on the machine does not stretch as it
does the clock's: the plan times its three steps by it, the run its phases. Disk is the largest size that the run's
folder is seen to have. Asserted is what has to be equal: rows, tokens' steps, bytes of a state, states held, replays.

    python bench/plan.py                        # every case
    python bench/plan.py --case adamw sgd-disk
    python bench/plan.py --headline             # the plan of the run of 6.86 billion parameters, as docs/plan.md has it
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from tools import gpt_neox, machine, table, write_json

ROOT = Path(__file__).parent.parent
VOCABULARY = 2048
SIZES = {"small": (4, 128, 4), "wide": (4, 384, 6)}  # layers, width, heads
_LATE = ["--replay.heartbeat", "3600"]
_MAGIC = ["magic", "RUN", "--data.dataset", "ROWS", "--query.dataset", "QUERY", "--train.batch_size", "8"]
_UNLEARN = ["RUN", "--forget", "ROWS", "--retain", "OTHER", "--train.batch_size", "4", "--heartbeat", "3600"]
CASES: dict[str, tuple[str, list[str]]] = {
    "adamw": ("small", [*_MAGIC, *_LATE]),
    "adamw-wide": ("wide", [*_MAGIC, *_LATE]),
    "adamw-every-step": ("small", [*_MAGIC, "--replay.heartbeat", "0"]),
    "adamw-clipped-blocks": ("wide", [*_MAGIC, *_LATE, "--engine", "blocks", "--train.max_grad_norm", "1.0",
                                      "--train.micro_batch_size", "4"]),
    "sgd-all": ("wide", [*_MAGIC, *_LATE, "--train.optimizer", "sgd", "--train.lr", "0.01", "--replay.plan", "all"]),
    "sgd-disk": ("wide", [*_MAGIC, *_LATE, "--train.optimizer", "sgd", "--train.lr", "0.01", "--replay.plan", "all",
                          "--replay.memory", "0"]),
    "binomial": ("wide", [*_MAGIC, *_LATE, "--replay.plan", "binomial", "--replay.slots", "4", "--attribute", "tokens"]),
    "queries": ("small", [*_MAGIC, *_LATE, "--query.reduction", "none"]),
    "unlearn": ("wide", ["unlearn", "grad_diff", *_UNLEARN]),
    "unlearn-npo-scored": ("small", ["unlearn", "npo", *_UNLEARN, "--attribute", "tokens", "--query.dataset", "QUERY"]),
}  # fmt: skip


def save_world(folder: Path) -> None:
    """Models and rows of tokens on disk: rows of 24 to 96 tokens, so that batches are padded."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    for name, (layers, width, heads) in SIZES.items():
        gpt_neox(layers=layers, width=width, heads=heads, vocabulary=VOCABULARY, length=128).save_pretrained(
            folder / name
        )
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1", unk_token="w0").save_pretrained(
            folder / name
        )
    draw = np.random.default_rng(0)
    for name, count in (("ROWS", 40), ("OTHER", 40), ("QUERY", 8)):
        rows = [draw.integers(2, VOCABULARY, draw.integers(24, 97)).tolist() for _ in range(count)]
        text = "".join(json.dumps({"text": " ".join(f"w{token}" for token in row)}) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)


def arguments_of(case: str, world: Path, run: Path) -> list[str]:
    size, arguments = CASES[case]
    places = {"RUN": str(run), **{name: str(world / f"{name}.jsonl") for name in ("ROWS", "OTHER", "QUERY")}}
    return [*(places.get(word, word) for word in arguments), "--model", str(world / size), "--device", "cpu"]


def child(how: str, arguments: list[str], out: Path) -> None:
    """A plan, or a run whose phases are timed by the processor's clock."""
    from types import SimpleNamespace

    import torch

    torch.set_num_threads(1)
    if how == "plan":
        from retrograd import cli
        from retrograd.plan.run import plan_run
        from retrograd.plan.show import values_of
        from retrograd.runs.files import write_json as write
        from retrograd.settings.plan import PlanConfig

        start = time.process_time()
        config = cli._parse(arguments[0], arguments[1:])
        write(out, {**values_of(plan_run(config, PlanConfig(), time.process_time)), "cpu": time.process_time() - start})
        return
    from retrograd.cli import main
    from retrograd.runs import manifest

    manifest.time = SimpleNamespace(monotonic=time.process_time)
    code = main(arguments)
    if code:
        raise SystemExit(code)


def compared(case: str, world: Path, folder: Path) -> dict[str, Any]:
    """Predictions and what was measured, of one case."""
    arguments, plan = arguments_of(case, world, folder / case), folder / f"{case}.json"
    run_child("plan", arguments, plan)
    assert not (folder / case).exists(), "a plan writes nothing"
    disk = run_child("run", arguments, plan, watch=folder / case)
    planned, manifest = json.loads(plan.read_text()), json.loads((folder / case / "manifest.json").read_text())
    assert planned["steps"]["rows"] == manifest["rows"]["rows"]
    assert planned["steps"]["steps"] == manifest["steps"]
    assert planned["engine"] == manifest["arithmetic"]["engine"]
    if planned["replay"] is not None:
        assert planned["replay"] == manifest["replay"], (planned["replay"], manifest["replay"])
    phases = manifest["phases"]
    seconds = {name: phases[name]["seconds"] for name in ("train", "query", "reverse") if name in phases}
    return {
        "predicted": {"seconds": {name: planned["seconds"][name] for name in seconds},
                      "memory": planned["host_peak_bytes"], "disk": sum(planned["disk_bytes"].values())},
        "measured": {"seconds": seconds, "memory": max(p["peak_memory_bytes"] for p in phases.values()), "disk": disk},
        "of_the_run": planned["cpu"] / sum(seconds.values()),
    }  # fmt: skip


def run_child(how: str, arguments: list[str], out: Path, watch: Path | None = None) -> int:
    """Run a child; the largest size of the folder that was seen meanwhile."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, "--child", how, "--out", str(out), "--arguments", json.dumps(arguments)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    largest, done = 0, threading.Event()

    def look() -> None:
        nonlocal largest
        while watch is not None and not done.wait(0.02):
            largest = max(largest, size_of(watch))

    watcher = threading.Thread(target=look)
    watcher.start()
    told = process.communicate()[1]
    done.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{how} {' '.join(arguments)} failed:\n{told}")
    return largest


def size_of(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def report(found: dict[str, dict[str, Any]]) -> str:
    def ratio(one: dict[str, Any], what: str) -> str:
        a, b = (one[side][what] for side in ("predicted", "measured"))
        a, b = (sum(x.values()) if isinstance(x, dict) else x for x in (a, b))
        return f"{a / b:.2f}"

    rows = [
        (case, *(ratio(one, what) for what in ("seconds", "memory", "disk")),
         f"{sum(one['measured']['seconds'].values()):.1f} s", f"{one['measured']['memory'] / 1e6:.0f} MB",
         f"{one['measured']['disk'] / 1e6:.1f} MB")
        for case, one in found.items()
    ]  # fmt: skip
    return table(("case", "time", "memory", "disk", "CPU time measured", "peak measured", "disk measured"), rows)


QUESTION = 150  # tokens of a question with its answers, taken
HARDWARE = (("h100", 1), ("h200", 1), ("gh200", 4), ("h100", 8))
PRECISIONS = {"float32": [], "TF32": ["--tf32"], "bfloat16 *": ["--dtype", "bfloat16"]}
BEGIN, END = "<!-- bench/plan.py --headline -->", "<!-- end of bench/plan.py --headline -->"


def headline() -> str:
    """The table of docs/plan.md: one plan by arithmetic for each kind of machine and precision."""
    from retrograd import cli
    from retrograd.plan.run import plan_run
    from retrograd.plan.show import duration, size

    rows = []
    for (hardware, ranks), (name, more) in ((where, how) for where in HARDWARE for how in PRECISIONS.items()):
        asked = cli._parse("plan", [
            "--hardware", hardware, "--ranks", str(ranks), "--layout", "shard" if ranks > 1 else "replicate",
            "--disk", "2TB", "--rows", "1000", "--row_tokens", "104", "--questions", "868",
            "--question_tokens", str(QUESTION), "magic", "runs/headline",
            "--config", str(ROOT / "recipes/original/headline.yaml"), "--model", str(ROOT / "recipes/original/model"),
            *more,
        ])  # fmt: skip
        planned = plan_run(asked.config, asked.plan)
        found, remedy = planned.forecast, planned.remedy
        assert found.layout is not None
        assert found.floor is not None
        needs, has = sum(found.device.values()), found.machine.memory or 0
        change = "fits" if not found.missing else "nothing tried" if remedy is None else ", ".join(remedy.changes)
        rows.append((
            f"{ranks} × {found.machine.name}", name, f"{size(needs)} of {size(has)}",
            f"{found.layout.cost.slots} ({found.layout.on_disk} on disk)", found.layout.cost.replays,
            duration(found.floor), duration(found.total), f"{found.device_hours:.2f}", change,
        ))  # fmt: skip
    return table(("machine", "products", "memory a rank", "states held", "replays", "floor", "time", "GPU-hours",
                  "fits, or would with"), rows)  # fmt: skip


def write_docs(text: str) -> None:
    page = ROOT / "docs/plan.md"
    whole = page.read_text(encoding="utf8")
    before, rest = whole.split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{text}{END}{rest.split(END)[1]}", encoding="utf8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--headline", action="store_true", help="print the table of docs/plan.md")
    parser.add_argument("--write-docs", action="store_true", help="with --headline: into docs/plan.md too")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--arguments", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        return child(given.child, json.loads(given.arguments), given.out)
    if given.headline:
        text = headline()
        print(text, end="")
        return write_docs(text) if given.write_docs else None
    found = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save_world(folder)
        for case in given.case:
            found[case] = compared(case, folder, folder)
            print(f"{case}: {json.dumps(found[case])}", file=sys.stderr, flush=True)
    print(f"Predicted by `retrograd plan`, in shares of what the run took:\n\n{report(found)}")
    if given.json:
        write_json(given.json, {"machine": machine(), "cases": found})
    return None


if __name__ == "__main__":
    main()
