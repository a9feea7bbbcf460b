"""End to end against bergson 2.5.1, the other public MAGIC: CPU time and peak memory of the same work.

The same model, rows, order and recipe go through both command lines, and the scores are compared first. bergson wants an
environment of its own; it runs on a CPU with the flags below:

    python -m venv bergson-env
    bergson-env/bin/pip install bergson==2.5.1 --constraint constraints.txt
    bergson-env/bin/pip uninstall -y torchvision torchaudio   # where they do not fit the CPU build of torch
    python bench/bergson.py --bergson bergson-env/bin/bergson
    python bench/bergson.py --bergson … --steps 8 --layers 2 --turns 1    # quickly

Both keep every state on disk: ours with --replay.memory 0, for by default it takes half of the free memory instead.
Rows are text of one token a word, so that both tokenise alike. Its rows are shuffled by datasets.shuffle(seed), ours by
the same permutation. Only one query document: its mean over several is by document, ours by token.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

VOCABULARY, BATCH, SEED, LR, EPS_ROOT = 50_304, 8, 42, 1e-4, 1e-6


def build(folder: Path, steps: int, layers: int, width: int) -> None:
    """Model, tokenizer, train.jsonl and query.jsonl."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    # special tokens are found inside words too: named w0 and w1 they would cut up w1159
    words = ["<end>", "<unknown>", *(f"w{k}" for k in range(2, VOCABULARY))]
    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "<end>", "unk_token": "<unknown>", "pad_token": "<end>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.save_pretrained(folder / "model")
    torch.manual_seed(0)
    GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
            intermediate_size=4 * width, max_position_embeddings=256, hidden_dropout=0.0, attention_dropout=0.0,
            bos_token_id=0, eos_token_id=0,
        )
    ).save_pretrained(folder / "model")  # fmt: skip
    draw = np.random.default_rng(0)
    rows = [draw.integers(2, VOCABULARY, draw.integers(97, 128)) for _ in range(steps * BATCH + 1)]
    lines = [json.dumps({"text": " ".join(f"w{k}" for k in row)}) + "\n" for row in rows]
    (folder / "train.jsonl").write_text("".join(lines[:-1]))
    (folder / "query.jsonl").write_text(lines[-1])


def ours(folder: Path, engine: str | None) -> list[str]:
    flags = (
        f"--train.lr {LR} --train.eps_root {EPS_ROOT} --train.batch_size {BATCH} --train.seed {SEED} --replay.plan all "
        "--replay.memory 0"
    ).split()
    return [
        sys.executable, "-m", "retrograd", "magic", str(folder / "ours"), "--overwrite", "--model",
        str(folder / "model"), "--data.dataset", str(folder / "train.jsonl"), "--query.dataset",
        str(folder / "query.jsonl"), *flags, *(["--engine", engine] if engine else []),
    ]  # fmt: skip


def theirs(folder: Path, bergson: str) -> list[str]:
    flags = (
        f"--precision fp32 --batch_size {BATCH} --num_epochs 1 --seed {SEED} --optimizer adamw --lr {LR} --adam_beta1 0.9 "
        f"--adam_beta2 0.999 --adam_eps 1e-8 --eps_root {EPS_ROOT} --weight_decay 0 --lr_scheduler_type constant "
        "--save_mode all --skip_validation True --nproc_per_node 1 --overwrite True"
    )
    return [
        bergson, "magic", str(folder / "theirs"), "--model", str(folder / "model"), "--data.dataset",
        str(folder / "train.jsonl"), "--query.dataset", str(folder / "query.jsonl"), "--data.prompt_column", "text",
        "--query.prompt_column", "text", "--wandb_project", "", *flags.split(),
    ]  # fmt: skip


def counted(path: Path) -> list[str]:
    """A prefix that counts a command's processor cycles into a file: CPU seconds move with a shared machine's clock rate.

    Empty where Linux' perf is missing or may not count.
    """
    prefix = ["perf", "stat", "-x,", "-e", "cycles", "-o", str(path)]
    try:
        subprocess.run([*prefix, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return prefix if cycles(path) else []


def cycles(path: Path) -> float:
    """What perf counted, in all modes; 0 if it could not."""
    lines = [line.split(",") for line in path.read_text().splitlines() if ",cycles" in line]
    return sum(float(fields[0]) for fields in lines if fields[0].isdigit())


def timed(command: list[str], log: Path) -> dict[str, float]:
    """CPU seconds, peak memory and, where they can be counted, cycles of one command and its children."""
    counts = log.with_name("cycles")
    command = [*(counter := counted(counts)), *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1",
                   "WANDB_MODE": "disabled"}  # fmt: skip
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text()[-2000:]}")
    found = {"cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_bytes": usage.ru_maxrss * 1024.0}
    return found | ({"cycles": cycles(counts)} if counter else {})


def same_scores(folder: Path) -> float:
    """Relative difference of the two score files, ‖a − b‖/‖b‖; documents are in data-set order in both."""
    import torch

    info = json.loads((folder / "theirs" / "scores" / "info.json").read_text())
    kind = np.dtype({key: info["dtype"][key] for key in ("names", "formats", "offsets", "itemsize")})
    other = np.fromfile(folder / "theirs" / "scores" / "scores.bin", dtype=kind)["score_0"]
    own = torch.load(folder / "ours" / "scores.pt", weights_only=True).numpy()
    return float(np.linalg.norm(own - other) / np.linalg.norm(own))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bergson", required=True, help="its command, in its own environment")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--engine", help="our --engine, if not the default")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder, arguments.steps, arguments.layers, arguments.width)
        runs: dict[str, list[dict[str, float]]] = {"retrograd": [], "bergson": []}
        for turn in range(arguments.turns):
            commands = {"retrograd": ours(folder, arguments.engine), "bergson": theirs(folder, arguments.bergson)}
            for who, command in commands.items():
                runs[who].append(timed(command, folder / "log"))
                print(f"turn {turn + 1} {who}: {runs[who][-1]['cpu_seconds']:.0f} CPU-seconds", flush=True)
            apart = same_scores(folder)
            print(f"scores differ by {apart:.1e} relative", flush=True)
            assert apart <= 1e-3, "not the same scores: nothing to compare"
    report(runs, apart, arguments.json)


def report(runs: dict[str, list[dict[str, float]]], apart: float, path: Path | None) -> None:
    median = {
        who: {name: statistics.median(run[name] for run in found) for name in found[0]} for who, found in runs.items()
    }
    ratios = {name: median["bergson"][name] / median["retrograd"][name] for name in median["bergson"]}
    print("| | bergson 2.5.1 | retrograd | ratio |\n|---|---|---|---|")
    units = {
        "cpu_seconds": ("CPU-seconds", 1),
        "cycles": ("10⁹ cycles", 1e9),
        "peak_bytes": ("peak memory, GiB", 2**30),
    }
    for name, (unit, scale) in units.items():
        if name not in ratios:
            continue
        a, b = median["bergson"][name] / scale, median["retrograd"][name] / scale
        print(f"| {unit} | {a:.1f} | {b:.1f} | {ratios[name]:.2f} |")
    if path:
        path.write_text(json.dumps({"runs": runs, "ratios": ratios, "scores_apart": apart}, indent=2) + "\n")


if __name__ == "__main__":
    main()
