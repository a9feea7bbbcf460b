"""Predict, then test: what weighted fine-tuning does to two queries' losses, by scores beforehand and by doing it.

For each optimizer and learning rate `unlearn weighted_sft` fine-tunes a lab's base on the forget rows with weights of
one, and gives the exact score τ of every token for questions about what is to go and what is to stay. Then each arm is
predicted, Δ = Σ τ·(w − 1), and trained. Arms are the rules of `retrograd select` on the scores of one attribution run
(AdamW at --scores_lr), and their matched random controls. Beside it stands the prediction from that run's own scores,
which is what one has who does not attribute at every rate. Printed are rank correlations over the arms. As the rate
falls SGD becomes linear in the weights. AdamW does not where gradients are large beside √eps_root, nor would either
with gradients clipped, which are not here.

    retrograd lab runs/lab
    python bench/predict.py --lab runs/lab --out runs/predict
    python bench/predict.py --lab runs/lab --out runs/predict --only sgd:1e-2 --limit 64    # quickly
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from tools import machine, table, write_json

from retrograd.cli import main as retrograd
from retrograd.runs.files import read_tensors
from retrograd.runs.run_folder import Opened, open_run

RULES = ("value", "sign", "clipped", "rank", "top_q", "two_objective", "positive_only", "negative_only", "selective",
         "compatible")  # fmt: skip
CONTROLS = ("random_count", "random_position", "sign_flipped")
TRAININGS = ("sgd:1e-3", "sgd:1e-2", "sgd:1e-1", "sgd:1", "adamw:1e-5", "adamw:1e-4", "adamw:1e-3")
SIDES = ("forget", "retain")


def call(*arguments: object) -> None:
    if code := retrograd([str(one) for one in arguments]):
        raise SystemExit(f"`retrograd {' '.join(map(str, arguments))}` ended with {code}")


def queries(lab: Path, out: Path) -> Path:
    """A file of both sides' questions."""
    path = out / "queries.yaml"
    asked = {
        side: {"dataset": str((lab / f"questions/{side}_taught.jsonl").resolve()), "form": "cloze"} for side in SIDES
    }
    path.write_text(json.dumps(asked))
    return path


def recipe(given: argparse.Namespace, training: str) -> list[str]:
    optimizer, lr = training.split(":")
    corpus = given.lab / "corpora/exam_forget.jsonl"
    source = f"{corpus},limit={given.limit}" if given.limit else str(corpus)
    return ["--objective.retain", "0", "--model", str(given.lab / "models/base"), "--forget", source, "--attribute", "tokens", "--query_file",
            str(queries(given.lab, given.out)), "--train.optimizer", optimizer, "--train.lr", lr, "--train.batch_size", "16",
            "--train.epochs", str(given.epochs), "--train.warmup_ratio", "0.1", "--train.max_grad_norm", "None", "--export", "False",
            *(("--train.eps_root", "1e-5") if optimizer == "adamw" else ())]  # fmt: skip


def attributed(given: argparse.Namespace, training: str) -> Opened:
    """A finished run with weights of one."""
    run = given.out / f"uniform-{training.replace(':', '-')}"
    call("unlearn", "weighted_sft", run, *recipe(given, training))
    return open_run(run)


def arms(given: argparse.Namespace, scored: Path) -> dict[str, torch.Tensor]:
    """Weights [rows, length] by name, from the scores of one run."""
    found = {}
    for rule in RULES:
        out = given.out / f"arms/{rule}"
        call("select", out, "--scores", f"{scored}:forget", "--against", f"{scored}:retain", "--rule", rule, "--controls",
             *CONTROLS, "--seeds", given.seeds)  # fmt: skip
        for folder in (out, *sorted((out / "controls").iterdir())):
            name = rule if folder == out else f"{rule}/{folder.name}"
            found[name] = read_tensors(folder / "weights.safetensors")[0]["weights"]
    return found


def tokens(run: Opened) -> torch.Tensor:
    """The run's scores, [rows, length, queries]."""
    return torch.load(run.folder / "scores.pt", weights_only=True).double()


def tested(run: Opened, scored: Opened, weights: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """For each arm and query: predicted by the run's scores and by `scored`'s, and measured, in nats."""
    ones = run.loaded.training.weights
    before = run.loaded.queries.values(run.loaded.final(ones).params).double()
    own, other, rows = tokens(run), tokens(scored), []
    for name, w in weights.items():
        w = w[:, : ones.shape[1]].to(ones)
        change = (w - ones).double()[..., None]
        after = run.loaded.queries.values(run.loaded.final(w).params).double() - before
        for k, side in enumerate(run.loaded.queries.names):
            rows.append({"arm": name, "query": side, "predicted": float((own[..., k : k + 1] * change).sum()),
                         "by scores": float((other[..., k : k + 1] * change).sum()), "measured": float(after[k])})  # fmt: skip
    return rows


def told(training: str, rows: list[dict[str, Any]]) -> list[list[str]]:
    """A line for each query: rank correlations, and how large the change is."""
    lines = []
    for side in SIDES:
        mine = [row for row in rows if row["query"] == side and np.isfinite(row["measured"])]
        measured = np.array([row["measured"] for row in mine])
        ranks = [
            float(stats.spearmanr([row[name] for row in mine], measured)[0]) for name in ("predicted", "by scores")
        ]
        pearson = float(stats.pearsonr([row["predicted"] for row in mine], measured)[0])
        lines.append([*training.split(":"), side, str(len(mine)), f"{ranks[0]:.3f}", f"{pearson:.3f}", f"{ranks[1]:.3f}",
                      f"{np.abs(measured).mean():.2g}"])  # fmt: skip
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lab", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=list(TRAININGS), help="OPTIMIZER:RATE")
    parser.add_argument("--scores_lr", default="1e-3")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--limit", type=int, default=0, help="so many forget rows; 0 for all")
    parser.add_argument("--seeds", type=int, default=1, help="draws of each random control")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    scored = attributed(given, f"adamw:{given.scores_lr}")
    weights = arms(given, scored.folder)
    lines, results = [], {}
    for training in given.only:
        results[training] = tested(attributed(given, training), scored, weights)
        lines += told(training, results[training])
        print(*lines[-2:], sep="\n", flush=True)
    write_json(given.out / "predict.json", {"arms": len(weights), "results": results, "machine": machine()})
    print(table(["optimizer", "learning rate", "query", "arms", "Spearman", "Pearson",
                 f"Spearman, scores of adamw at {given.scores_lr}", "mean |change|, nats"], lines))  # fmt: skip


if __name__ == "__main__":
    main()
