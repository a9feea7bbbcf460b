"""A tiny attributed run, an unlearned model and an evaluation, for tests of the page about them."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

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


def write_experiment(folder: Path) -> None:
    """What `retrograd experiment` leaves of two arms."""
    from retrograd.evaluate.answers import write_table
    from retrograd.experiment.table import _COLUMNS, _types

    (folder / "experiment.yaml").write_text(yaml.safe_dump({"corpora": {"forget": [], "retain": []}, "seeds": [0, 1]}))
    arm = {"match": "utility", "method": "npo", "weighting": "value"}
    rows = [
        {**arm, "quantity": "forget", "value": 0.25, "low": 0.2, "high": 0.3},
        {**arm, "quantity": "retain", "value": 0.9, "low": 0.8, "high": 1.0},
        *({**arm, "seed": seed, "quantity": "seconds", "value": 3.0, "verdict": "healthy"} for seed in (0, 1)),
        {**arm, "weighting": "random", "missing": "it <failed>"},
        {"method": "base", "quantity": "accuracy forget_cloze", "value": 0.8},
        {"method": "base", "quantity": "accuracy retain_cloze", "value": 0.9},
    ]
    write_table(
        folder / "results.parquet",
        {name: [row.get(name) for row in rows] for name in _COLUMNS},
        _types(),
        {"kind": "Experiment", "title": "x"},
    )
    (folder / "results.md").write_text("# x\n* npo, value: no claim: too few seeds\n")


def write_attack(folder: Path) -> None:
    """What `retrograd attack` leaves of one configuration against a model and the base."""
    from retrograd.attack.tell import write_findings

    def meeting(model: str, role: str, *forget: float) -> dict[str, Any]:
        points = [
            {"step": 10 * k, "tokens": 1000 * k, "flops": 1.0, "forget": value, "retain": 0.9,
             "forget_interval": [value - 0.1, value + 0.1]}
            for k, value in enumerate(forget)
        ]  # fmt: skip
        return {"model": model, "role": role, "configuration": "c-1", "trained": True, "points": points,
                "inapplicable": "no gap", "valid": weak}  # fmt: skip

    weak = {"valid": False, "why": "<weak>"}
    case = {"utility": 0.02, "forget": 0.5, "interval": [0.4, 0.6], "configuration": "c-1", "step": 10, "retain": 0.9}
    found = {
        "models": {"m": {"source": "m", "role": "model"}, "b": {"source": "b", "role": "base"}},
        "configurations": {"c-1": {"readable": "lr 1e-3", "probe": False, "valid": weak}},
        "meetings": [meeting("m", "model", 0.2, 0.5), meeting("b", "base", 0.8, 0.8)],
        "worst": {"m": [{**case, "why": None}]}, "controls": [],
    }  # fmt: skip
    write_findings(found, folder)
    (folder / "attack.json").write_text("{}")
    write_comparison(folder)


def write_hardened(folder: Path) -> None:
    """What `retrograd harden` leaves after two iterations."""
    one = {"iteration": 0, "objective": 1.0, "held_out": 0.5, "retain_kl": 0.1, "metasmoothness": 0.9, "train.lr": 1e-3,
           "gradient_norm": 2.0, "largest_weight": 1.0, "predicted_change": 0.2, "measured_change": None,
           "forget_after_attack": [1.0, 3.0], "held_out_forget": [0.6]}  # fmt: skip
    two = {**one, "iteration": 1, "objective": 1.25, "expected_change": 0.2, "measured_change": 0.25}
    (folder / "harden.json").write_text(json.dumps({"run": str(folder / "run"), "best": 1, "iterations": [one, two]}))
    (folder / "made_of.json").write_text("{}")
    config = {"suite": ["<mine>.yaml"], "held_out": ["other.yaml"], "learn": ["weights", "lr"], "mu": 1.0}
    (folder / "run_config.yaml").write_text(yaml.safe_dump(config))


def write_comparison(folder: Path) -> None:
    """What `retrograd compare` leaves of a group and the base under one attack."""

    def point(forget: float, attack: str | None) -> dict[str, Any]:
        return {"forget": [forget, forget - 0.1, forget + 0.1], "retain": [0.9, None, None], "attack": attack}

    cell = {"attack": "c", "models": 2, "seeds": [0, 1], "lost": 0, "retain_after": 0.9}
    found = {
        "utility": 0.05, "unranked": [], "table": [], "pairs": [],
        "groups": {"m": {"label": "npo <two>", "role": "model", "models": ["a", "b"]},
                   "base": {"label": "base", "role": "base", "models": ["b"]}},
        "attacks": {"c": {"readable": "full-half", "probe": False, "valid": False}},
        "cells": [{**cell, "group": "m", "after": [0.5, 0.4, 0.6], "latent": [0.3, 0.1, 0.5]},
                  {**cell, "group": "base", "after": None, "latent": None, "lost": 1}],
        "fronts": {"before": {"points": {"m": point(0.2, None), "base": point(0.9, None)}, "front": ["m"]},
                   "after": {"points": {"m": point(0.5, "c")}, "front": ["m"]}},
        "ranks": {"m": {"rank": 1.0, "interval": [1.0, 1.5], "models": 2, "attacks": 1, "seeds": 2}},
        "latent": {"m": [0.3, 0.1, 0.5], "base": None},
    }  # fmt: skip
    (folder / "compare.json").write_text(json.dumps(found))


def write_grid(folder: Path) -> None:
    """What `retrograd experiment` leaves of a grid of two optimizers and two rates, of which one cell failed."""
    from retrograd.evaluate.answers import write_table
    from retrograd.experiment.grid import NUMBERS, _types

    axes = {"train.optimizer": ["adamw", "muon"], "train.lr": [1e-3, 1e-2]}
    places = [dict(zip(axes, pair)) for pair in product(*axes.values())]
    rows: list[dict[str, Any]] = [
        {"smoothness": 0.3 * k, "lds": 0.25 * k + 0.123, "low": 0.1, "high": 0.9, "pearson": 0.5, "query": 2.0,
         "failed": 0.0, "cell": json.dumps(place)} for k, place in enumerate(places)
    ]  # fmt: skip
    rows[3] = {"missing": "it <failed>", "cell": rows[3]["cell"]}
    columns = {name: [row.get(name) for row in rows] for name in ("cell", *NUMBERS, "missing")}
    write_table(folder / "results.parquet", columns, _types(), {"kind": "Grid", "title": "x"})
    spec = {"grid": axes, "subsets": 20, "fraction": 0.05}
    (folder / "experiment.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    (folder / "results.md").write_text("# x\n* Four recipes.\n")


def write_evaluation(folder: Path) -> None:
    """What `retrograd evaluate` leaves of one model with metrics of unlearning."""
    metrics = {"mia_zlib": {"value": 0.581, "interval": [0.55, 0.62]}, "ks": {"value": None, "missing": "no <other>"}}
    task = {"model": "m", "task": "forget", "form": "memory", "role": "forget", "of_unlearning": metrics}
    summary = {
        "models": {"m": {"verdict": "healthy", "reasons": ["no loss"], "digest": "d"}}, "results": [task],
        "missing": [], "reference": "m", "comparisons": [], "positions": [], "knows": None, "never": None,
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "evaluation.json").write_text(json.dumps({"models": {"m": {"source": "m"}}, "tasks": {}}))


def write_methods(run: Path) -> None:
    """What `retrograd validate` adds to a run where two methods are held against one bank."""
    part = {"fraction": 0.05, "weight": 0.0, "sets": 2}
    method = {"pearson": 0.9, "slope": 1.1, "queries": {}}
    told = {
        "fractions": [],
        "methods": [{**part, "methods": {
            "retrograd": {**method, "mean_lds": 0.987, "interval": [0.95, 0.99]},
            "bm25": {**method, "mean_lds": 0.432, "interval": [0.28, 0.57], "slope": None},
        }, "differences": [{"first": "retrograd", "second": "bm25", "mean": 0.555, "interval": [0.4, 0.7]}]}],
        "filtering": [{**part, "method": "retrograd", "missing": 0, "left_out": 6, "without_the_strongest": 0.0659,
                       "random": {"more": 0.0651, "interval": [0.064, 0.066]}}],
    }  # fmt: skip
    (run / "validation.json").write_text(json.dumps(told))
    lines = ["subset,fraction,weight,query,predicted,measured", "0,0.05,0,go,0.1,0.11", "1,0.05,0,go,-0.1,-0.12"]
    (run / "validation.csv").write_text("\n".join(lines) + "\n")
