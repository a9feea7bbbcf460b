"""A tiny attributed run, an unlearned model and an evaluation, for tests of the page about them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import quiz
import tiny
import torch
import yaml

from retrograd.cli import main

HOSTILE = '</script><script>document.title = "broken"</script> & <b>bold</b>'
SECRET = ["zyntha", "quorvex", "plimtar"]  # words that only the corpus to forget has


def build_world(folder: Path) -> Path:
    """`run`, by token with three queries; `documents`, by document with one; `unlearned`; and what they are made of."""
    quiz.save(folder / "model")
    tiny.save_jsonl(folder / "train.jsonl", [*tiny.sentences(24), f"the red fish {HOSTILE} swims"])
    secrets = [f"the {a} sat on the {b} hill" for a in SECRET for b in SECRET]
    tiny.save_jsonl(folder / "forget.jsonl", secrets)
    tiny.save_jsonl(folder / "retain.jsonl", ["the hill sat on the big mat", *tiny.sentences(9, seed=4)])
    tiny.save_jsonl(folder / "go.jsonl", tiny.sentences(3, seed=1))
    stay = [
        *quiz.questions(5),
        *({"question": f"Where is the {w}?", "choices": [w, "sea"], "answer": 0} for w in SECRET),
    ]
    (folder / "stay.jsonl").write_text("".join(json.dumps({"subject": "x", **row}) + "\n" for row in stay))
    queries = {
        "go": {"dataset": str(folder / "go.jsonl")},
        "stay": {"dataset": str(folder / "stay.jsonl"), "form": "cloze"},
        "letters": {"dataset": str(folder / "stay.jsonl"), "form": "letter", "loss": "full"},
    }
    (folder / "queries.yaml").write_text(yaml.safe_dump(queries, sort_keys=False))
    magic(folder, "run", "--query_file", str(folder / "queries.yaml"), "--attribute", "tokens")
    magic(folder, "documents", "--query.dataset", str(folder / "go.jsonl"))
    return folder


def magic(folder: Path, run: str, *more: str) -> None:
    assert main([
        "magic", str(folder / run), "--model", str(folder / "model"), "--data.dataset", str(folder / "train.jsonl"),
        "--train.lr", "3e-2", "--train.batch_size", "8", "--train.eps_root", "1e-6", *more,
    ]) == 0  # fmt: skip


def unlearn(folder: Path) -> Path:
    """A run of unlearning, evaluated on its way and at its end."""
    tasks = {
        "secrets": {"dataset": str(folder / "stay.jsonl"), "form": "cloze", "role": "forget"},
        "kept": {"dataset": str(folder / "stay.jsonl"), "form": "letter", "role": "retain"},
        "prose": {"dataset": str(folder / "go.jsonl"), "form": "text"},
        "samples": {
            "dataset": str(folder / "forget.jsonl"),
            "form": "generate",
            "limit": 2,
            "prompt_tokens": 3,
            "new_tokens": 4,
        },
    }
    (folder / "tasks.yaml").write_text(yaml.safe_dump(tasks, sort_keys=False))
    assert main([
        "unlearn", "grad_diff", str(folder / "unlearned"), "--model", str(folder / "model"),
        "--forget", str(folder / "forget.jsonl"), "--retain", str(folder / "retain.jsonl"), "--train.batch_size", "4",
        "--evaluate.tasks", str(folder / "tasks.yaml"), "--evaluate.every", "1",
    ]) == 0  # fmt: skip
    return folder / "unlearned"


def token_scores(run: Path, column: int) -> np.ndarray:
    """[rows, length], from the file that programs read."""
    return torch.load(run / "scores.pt", weights_only=True)[..., column].numpy()


def document_scores(run: Path, name: str) -> dict[int, float]:
    examples = json.loads((run / "all_scores.json").read_text())["examples"]
    return {one["doc_id"]: one["scores"][name] for one in examples}


def document_texts(run: Path) -> dict[int, str]:
    return {one["doc_id"]: one["text"] for one in json.loads((run / "all_scores.json").read_text())["examples"]}
