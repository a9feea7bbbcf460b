"""Golden bits: hashes of what a spread of runs gives, to hold one commit against another on one machine.

Scores, final states and validations depend on the processor, its libraries and the number of threads, so no hash is kept in
the repository: record before a change, compare after it.

    python bench/golden.py --json before.json              # at the commit before
    python bench/golden.py --against before.json           # at the commit after: exit code 1 and the names where bits differ

Only commands are used, with tiny models and data made here; one thread. A run that is killed and resumed has to have the
bits of the one that was left alone, which is asserted in passing.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "mat",
    "hill",
    "sun",
    "sea",
    "red",
    "blue",
    "big",
    "small",
    "bird",
    "fish",
    "tree",
    "sings",
    "swims",
]
BASE = "--train.lr 1e-2 --train.eps_root 1e-6 --train.batch_size 4 --query.dataset {w}/query.jsonl --device cpu"

RUNS: dict[str, str] = {
    "adamw": "",
    "adamw blocks": "--engine blocks",
    "adamw clip": "--train.max_grad_norm 0.5 --engine double",
    "adamw clip blocks": "--train.max_grad_norm 0.5 --engine blocks",
    "adamw micro": "--train.micro_batch_size 2 --engine double",
    "adamw decay": "--train.weight_decay 0.1 --train.lr_schedule linear --train.warmup_ratio 0.2",
    "one-cycle": "--train.lr_schedule one-cycle --train.epochs 2",
    "sgd": "--train.optimizer sgd",
    "sgd blocks": "--train.optimizer sgd --engine blocks",
    "momentum": "--train.optimizer sgd --train.momentum 0.9 --train.nesterov",
    "muon": "--train.optimizer muon",
    "binomial": "--replay.plan binomial --replay.slots 3 --train.epochs 2",
    "gradients": "--replay.plan gradients --train.epochs 2",
    "disk": "--replay.memory 0 --replay.keep",
    "tokens": "--attribute tokens",
    "packed": "--attribute tokens --data.chunk_length 16",
    "lora": "--lora.rank 2",
    "dropout": "--train.dropout",
    "columns": "--query.reduction none",
    "float64": "--dtype float64",
    "float64 blocks": "--dtype float64 --engine blocks",
    "sharpness": "--sharpness",
    "letter": "--query.dataset {w}/quiz.jsonl --query.form letter",
    "cloze": "--query.dataset {w}/quiz.jsonl --query.form cloze",
    "several": "--query_file {w}/queries.yaml",
    "evaluated": "--evaluate.tasks {w}/tasks.yaml --evaluate.every 2",
}
FAMILIES = ("gpt-neox", "gpt2", "llama", "mistral")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the hashes here")
    parser.add_argument("--against", type=Path, help="compare with hashes written before")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder)
        build(world)
        found = dict(hashes(world))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf8")
    print(f"{len(found)} hashes")
    return compare(json.loads(arguments.against.read_text(encoding="utf8")), found) if arguments.against else 0


def compare(before: dict[str, str], after: dict[str, str]) -> int:
    """Print what differs; 1 if anything does."""
    changed = [name for name in before if before[name] != after.get(name)]
    for name in changed:
        print(f"{name}: {before[name]} → {after.get(name, 'missing')}")
    print(f"{len(before) - len(changed)} of {len(before)} hashes are the same")
    return int(bool(changed))


def hashes(world: Path) -> Iterator[tuple[str, str]]:
    """(name, hash) of each run's scores and final state, and of what other commands give."""
    for name, flags in RUNS.items():
        yield from of_run(world, name, "gpt-neox", flags)
    for family in FAMILIES[1:]:
        for engine in ("double", "blocks"):
            yield from of_run(world, f"{family} {engine}", family, f"--engine {engine} --attribute tokens")
    run = world / "runs" / "disk"
    command(f"query {run} --name further --query.dataset {world}/query.jsonl --query.split train[:1]")
    yield "query", digest(run / "queries" / "further" / "scores.pt")
    command(f"validate {world}/runs/adamw --subsets 6 --fraction 0.2 --workers 1")
    yield "validate", digest(world / "runs" / "adamw" / "validation.csv")
    yield from of_lab(world)


def of_run(world: Path, name: str, family: str, flags: str) -> Iterator[tuple[str, str]]:
    run = world / "runs" / name.replace(" ", "-")
    query = (
        BASE.replace("--query.dataset {w}/query.jsonl", "") if "query" in flags and "reduction" not in flags else BASE
    )
    line = f"magic {run} --model {world}/{family} --data.dataset {world}/train.jsonl {query} {flags}"
    command(line.format(w=world))
    yield f"{name}: scores", digest(run / "scores.pt")
    yield f"{name}: final", digest(run / "checkpoints" / "final.safetensors")


def of_lab(world: Path) -> Iterator[tuple[str, str]]:
    lab = world / "lab"
    command(f"lab {lab} --facts 8 --width 32 --layers 1 --epochs 2 --workers 1")
    for model in ("random", "base", "filtered"):
        yield f"lab {model}", digest(lab / "models" / model / "model.safetensors")
    command(f"evaluate {lab}/models/base --lab {lab} --output {world}/exam")
    for path in sorted((world / "exam").rglob("*.parquet")):
        yield f"evaluate {path.stem}", digest(path)


def command(line: str) -> None:
    """Run a `retrograd` command; what it prints is shown only if it fails."""
    from retrograd.cli import main as retrograd

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = retrograd(shlex.split(line))
    if code:
        raise SystemExit(f"retrograd {line} ended with {code}:\n{said.getvalue()[-3000:]}")
    print(".", end="", flush=True)


def digest(path: Path) -> str:
    """Hash of what a file holds; names of files, hashes of runs and times in it do not count."""
    return hashlib.sha256(repr(_content(path)).encode()).hexdigest()[:16]


def _content(path: Path) -> Any:
    import torch
    from safetensors.torch import load_file

    if path.suffix == ".pt":
        return _bits("scores", torch.load(path, weights_only=True))
    if path.suffix == ".safetensors":
        return [_bits(name, leaf) for name, leaf in sorted(load_file(path).items())]
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pydict()
    return path.read_text(encoding="utf8")


def _bits(name: str, leaf: Any) -> tuple[str, tuple[int, ...], str]:
    import torch

    raw = leaf.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return name, tuple(leaf.shape), hashlib.sha256(raw).hexdigest()


def build(world: Path) -> None:
    """Models, a tokenizer, documents, questions, tasks and queries."""
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, MistralConfig

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"vocab_size": len(WORDS) + 8, "max_position_embeddings": 96, "bos_token_id": 0, "eos_token_id": 0}
    dropout = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    made = {
        "gpt-neox": GPTNeoXConfig(**sizes, **dropout),
        "gpt2": GPT2Config(vocab_size=sizes["vocab_size"], n_embd=16, n_layer=2, n_head=2, n_positions=96,
                           bos_token_id=0, eos_token_id=0),
        "llama": LlamaConfig(**sizes, num_key_value_heads=1),
        "mistral": MistralConfig(**sizes, num_key_value_heads=1, head_dim=8, sliding_window=6),
    }  # fmt: skip
    for name, config in made.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(world / name)
        save_tokenizer(world / name)
    write(world / "train.jsonl", [{"text": text} for text in sentences(22, 0)])
    write(world / "query.jsonl", [{"text": text} for text in sentences(3, 1)])
    draw = random.Random(2)
    quiz = [
        {"question": text, "choices": draw.sample(WORDS, 4), "answer": draw.randrange(4)} for text in sentences(5, 3)
    ]
    write(world / "quiz.jsonl", quiz)
    (world / "tasks.yaml").write_text(f"quiz: {{dataset: {world}/quiz.jsonl, form: letter}}\n", encoding="utf8")
    (world / "queries.yaml").write_text(
        f"one: {{dataset: {world}/query.jsonl}}\nletters: {{dataset: {world}/quiz.jsonl, form: letter}}\n"
        "gap: {contrast: [one, letters]}\n", encoding="utf8",
    )  # fmt: skip


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<eos>", "<unk>", *WORDS, "A", "B", "C", "D", "Answer", "."]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)


def sentences(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choice(WORDS) for _ in range(draw.randint(3, 9))) for _ in range(count)]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")


if __name__ == "__main__":
    sys.exit(main())
