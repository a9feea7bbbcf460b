"""Does attribution find what taught an answer? Metagradients against baselines, where the truth is known: on a lab.

Each of N questions is a query of its own, the −log p of its right answer in words; all are columns of one sweep through
the training of the lab's `models/base`. Rankings of the training rows, by question:

    metagradient       the score of `retrograd magic`
    gradient cosine    −cos(∇ query, ∇ loss of the row), both at the final model
    BM25               −BM25(question and answer, row), k1 = 1.5, b = 0.75; no model at all
    random             a random order

First they are held against the truth: recall@k and the mean reciprocal rank of the rows that taught the fact. Then rows
are left out and the model is trained again: the k strongest proponents of each question by each ranking, and random sets,
for which LDS is the rank correlation of −Σ score with what happened. Everything is cached in --folder.

    python bench/lab_recall.py --folder runs/lab_recall              # the tables of docs/lab.md
    python bench/lab_recall.py --folder runs/small --facts 8 --epochs 10 --subsets 8 --questions 2
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import platform
import re
import shlex
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

SPLITS = ("paraphrase", "heldout")
DEPTHS = (1, 3, 4, 7, 10)  # three exams answer a fact in words, four documents state it
REMOVED = (4, 10)
FRACTIONS = (0.02, 0.05)


class Asked(NamedTuple):
    """A question, its right answer, its split, and the rows that taught its fact: documents, exams in words."""

    text: str
    split: str
    stated: list[int]
    answered: list[int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    for name, default in (("facts", 16), ("width", 32), ("layers", 2), ("epochs", 60), ("batch_size", 56)):
        parser.add_argument(f"--{name}", type=int, default=default, help="of the lab")
    parser.add_argument("--lr", type=float, default=1e-3, help="of the lab")
    parser.add_argument("--eps_root", type=float, default=1e-5, help="of the lab")
    parser.add_argument("--questions", type=int, default=6, help="of each side and split, at most")
    parser.add_argument("--subsets", type=int, default=30, help="random sets of each fraction")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # the lab trains on one thread, and so does its repetition
    folder, lab = arguments.folder, arguments.folder / "lab"
    size = " ".join(
        f"--{n} {getattr(arguments, n)}" for n in ("facts", "width", "layers", "epochs", "batch_size", "lr", "eps_root")
    )
    command(f"lab {lab} {size}")
    asked = ask(folder, arguments.questions)
    run = attribute(folder)
    rankings = rank(folder, asked)
    names = removals(folder, rankings)
    sets = f"--subsets {arguments.subsets} --fraction {' '.join(map(str, FRACTIONS))} --sets {folder}/removed.txt"
    command(f"validate {run} {sets} --workers 2")
    found = compare(run, asked, rankings, names, arguments.subsets)
    found |= {"settings": {k: str(v) for k, v in vars(arguments).items()}, **environment()}
    (folder / "recall.json").write_text(json.dumps(found, indent=1))
    (folder / "recall.html").write_text(picture(asked, rankings, found), encoding="utf8")
    print(f"\n{tables(found)}\n\nFigures: {folder / 'recall.json'}; picture: {folder / 'recall.html'}")


def command(line: str) -> None:
    from retrograd.cli import main as retrograd

    print(f"\n$ OMP_NUM_THREADS=1 retrograd {line}", flush=True)
    if retrograd(shlex.split(line)):
        raise SystemExit(1)


# ---------------------------------------------------------------- queries and rankings


def ask(folder: Path, most: int) -> list[Asked]:
    """The questions, written as one query file with a column for each."""
    from retrograd.lab.subjects import SIDES
    from retrograd.lab.truth import taught_by

    truth, rows, asked = taught_by(folder / "lab"), [], []
    for split in SPLITS:
        for side in SIDES:
            lines = (folder / f"lab/questions/{side}_{split}.jsonl").read_text().splitlines()[:most]
            for row in map(json.loads, lines):
                rows.append(json.dumps(row))
                taught = truth[row["fact"]]
                text = f"{row['question']} {row['choices'][row['answer']]}"
                asked.append(Asked(text, split, taught.stated, taught.answered))
    (folder / "questions.jsonl").write_text("\n".join(rows) + "\n")
    return asked


def attribute(folder: Path) -> Path:
    """`retrograd magic` on the training of models/base, with a column for each question."""
    from retrograd.lab.learn import Size, magic_flags

    lab, run = folder / "lab", folder / "run"
    settings = json.loads((lab / "lab.json").read_text())["settings"]
    flags = magic_flags(Size(**{name: settings[name] for name in Size._fields}))
    query = f"--query.dataset {folder}/questions.jsonl --query.form cloze --query.loss full --query.reduction none"
    command(f"magic {run} --model {lab}/models/random --data.dataset {lab}/train/base.jsonl {query} {flags}")
    return run


def rank(folder: Path, asked: Sequence[Asked]) -> dict[str, np.ndarray]:
    """Scores [questions, rows] by method; negative = proponent, whatever the method."""
    from retrograd.runs.run_folder import open_run
    from retrograd.trust.evidence import stored_scores

    run = open_run(folder / "run")
    rows = [json.loads(line) for line in (folder / "lab/train/base.jsonl").read_text().splitlines()]
    draw = np.random.default_rng(0)
    found = {
        "metagradient": stored_scores(run).numpy(),
        "gradient cosine": -cosines(run),
        "BM25": -bm25([one.text for one in asked], [f"{row['prompt']} {row['completion']}" for row in rows]),
        "random": draw.normal(size=(len(asked), len(rows))),
    }
    assert all(scores.shape == (len(asked), len(rows)) for scores in found.values())
    return found


def cosines(run) -> np.ndarray:
    """cos(∇φ_q, ∇ℓ_row) at the final parameters, [questions, rows]."""
    import torch

    from retrograd.data.stream import DataStream
    from retrograd.runs.files import read_tensors

    params = run.trajectory().train().params
    loaded = run.loaded
    tensors = read_tensors(run.folder / "queries" / "query" / "gradient.safetensors")[0]
    queries = torch.cat([tensors[f"gradient.{name}"].flatten(1) for name in params], 1).double()
    each = DataStream(loaded.rows, 1, shuffle=False)
    engine = loaded.training.engine
    grads = [engine.gradient(params, [each[k]], each.weights, None)[1] for k in range(len(each))]
    rows = torch.stack([torch.cat([g[name].flatten() for name in params]) for g in grads]).double()
    return (torch.nn.functional.normalize(queries) @ torch.nn.functional.normalize(rows).T).numpy()


def bm25(queries: Sequence[str], texts: Sequence[str], k1: float = 1.5, b: float = 0.75) -> np.ndarray:
    """Okapi BM25 of every text for every query, [queries, texts] (Robertson and Zaragoza 2009).

    Σ_w idf(w) · n_w (k1 + 1) / (n_w + k1 (1 − b + b |text|/mean))      idf(w) = ln(1 + (N − N_w + ½)/(N_w + ½))
    """
    words = [Counter(re.findall(r"\w+", text.lower())) for text in texts]
    lengths = np.array([sum(counts.values()) for counts in words])
    scale = k1 * (1 - b + b * lengths / lengths.mean())
    found = np.zeros((len(queries), len(texts)))
    for q, query in enumerate(queries):
        for word in re.findall(r"\w+", query.lower()):
            counts = np.array([text[word] for text in words])
            having = np.count_nonzero(counts)
            found[q] += (
                math.log(1 + (len(texts) - having + 0.5) / (having + 0.5)) * counts * (k1 + 1) / (counts + scale)
            )
    return found


def removals(
    folder: Path, rankings: dict[str, np.ndarray], depths: Sequence[int] = REMOVED
) -> list[tuple[str, int, int]]:
    """(method, k, question) of each set that is left out, in the order of the file."""
    from retrograd.lab.truth import strongest

    names, lines = [], []
    for method, scores in rankings.items():
        for k in depths:
            for q, one in enumerate(scores):
                names.append((method, k, q))
                lines.append(" ".join(map(str, strongest(one, k))))
    (folder / "removed.txt").write_text("\n".join(lines) + "\n")
    return names


# ---------------------------------------------------------------- what came of it


def compare(
    run: Path,
    asked: Sequence[Asked],
    rankings: dict[str, np.ndarray],
    names: Sequence[tuple[str, int, int]],
    subsets: int,
) -> dict:
    """Recall by method and kind of truth, LDS by method and fraction, what leaving out the strongest did."""
    predicted, measured = changes(run, len(asked))
    removed = removal(names, predicted, measured)
    return {
        "questions": Counter(one.split for one in asked),
        "recall": {method: recall(asked, scores) for method, scores in rankings.items()},
        "lds": {method: lds(scores, predicted, measured, subsets, method) for method, scores in rankings.items()},
        "removed": removed,
    }


def kinds(asked: Sequence[Asked]) -> dict[str, list[tuple[int, list[int]]]]:
    """(question, rows that taught it), by the kind of truth."""
    taught = [(q, one) for q, one in enumerate(asked) if one.split == "paraphrase"]
    return {
        "exams that answer it": [(q, one.answered) for q, one in taught],
        "exams that answer it and documents that state it": [(q, one.answered + one.stated) for q, one in taught],
        "documents that state it, no exam does": [
            (q, one.stated) for q, one in enumerate(asked) if one.split == "heldout"
        ],
    }


def recall(asked: Sequence[Asked], scores: np.ndarray) -> dict[str, dict[str, float]]:
    from retrograd.lab.truth import recall_at, reciprocal_rank

    found = {}
    for kind, truths in kinds(asked).items():
        found[kind] = {
            f"recall@{k}": float(np.mean([recall_at(scores[q], rows, k) for q, rows in truths])) for k in DEPTHS
        }
        found[kind]["MRR"] = float(np.mean([reciprocal_rank(scores[q], rows) for q, rows in truths]))
    return found


def changes(run: Path, questions: int) -> tuple[dict, dict]:
    """By (set, fraction of random ones): predicted and measured change of each question's loss, [questions] nats."""
    predicted: dict = {}
    measured: dict = {}
    with (run / "validation.csv").open() as lines:
        for row in csv.DictReader(lines):
            key = (row["subset"], float(row["fraction"]) if row["subset"].isdecimal() else None)
            predicted.setdefault(key, []).append(float(row["predicted"]))
            measured.setdefault(key, []).append(float(row["measured"]))
    assert all(len(values) == questions for values in (*predicted.values(), *measured.values()))
    return predicted, measured


def lds(scores: np.ndarray, predicted: dict, measured: dict, subsets: int, method: str) -> dict[str, dict]:
    """By fraction: LDS of each question over the random sets, their mean and its interval; median slope."""
    from retrograd.trust.left_out import agreement, mean_lds, random_subset

    found = {}
    for fraction in FRACTIONS:
        members = [random_subset(np.arange(scores.shape[1]), fraction, 0, k) for k in range(subsets)]
        said = np.array([-scores[:, chosen].sum(1) for chosen in members])
        was = np.array([measured[str(k), fraction] for k in range(subsets)])
        if method == "metagradient":  # the sets are those that were left out
            np.testing.assert_allclose(
                said, [predicted[str(k), fraction] for k in range(subsets)], rtol=1e-5, atol=1e-9
            )
        each = [agreement(said[:, q], was[:, q]) for q in range(len(scores))]
        mean, low, high = mean_lds(said, was)
        found[str(fraction)] = {
            "mean": mean, "interval": [low, high], "lowest": min(one.lds for one in each),
            "slope": float(np.median([one.slope for one in each])), "each": [one.lds for one in each],
        }  # fmt: skip
    return found


def removal(names: Sequence[tuple[str, int, int]], predicted: dict, measured: dict) -> dict:
    """By method and k: mean change of a question's own loss without its k strongest proponents; the metagradient's foresight."""
    from retrograd.trust.left_out import agreement

    own = [
        (method, k, predicted[f"set-{n}", None][q], measured[f"set-{n}", None][q])
        for n, (method, k, q) in enumerate(names)
    ]
    found = {}
    for method, k in dict.fromkeys((method, k) for method, k, _ in names):
        pairs = [(p, m) for name, depth, p, m in own if (name, depth) == (method, k)]
        said, was = np.array(pairs).T
        found[f"{method}, {k}"] = {"predicted": float(said.mean()), "measured": float(was.mean()), "each": pairs}
    said, was = np.array([(p, m) for *_, p, m in own]).T
    return {"sets": found, "foreseen": agreement(said, was)._asdict()}


def environment() -> dict:
    import torch

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {"commit": commit, "processor": platform.machine(), "torch": torch.__version__}


def tables(found: dict) -> str:
    """As Markdown."""
    depths = [f"recall@{k}" for k in DEPTHS] + ["MRR"]
    lines = [f"| rows to find | ranking | {' | '.join(depths)} |", f"|---|---|{'---|' * len(depths)}"]
    for kind in next(iter(found["recall"].values())):
        for method, parts in found["recall"].items():
            lines.append(f"| {kind} | {method} | {' | '.join(f'{parts[kind][depth]:.2f}' for depth in depths)} |")
    lines += ["", "| ranking | left out | mean LDS [95 %] | lowest of a question |", "|---|---|---|---|"]
    for method, parts in found["lds"].items():
        for fraction, one in parts.items():
            low, high = one["interval"]
            lines.append(
                f"| {method} | {float(fraction):.0%} | {one['mean']:.3f} [{low:.3f}, {high:.3f}] | {one['lowest']:.3f} |"
            )
    lines += [
        "",
        "| left out: the strongest of each question by | rows | mean change of its −log p, nats | predicted |",
        "|---|---|---|---|",
    ]
    for name, one in found["removed"]["sets"].items():
        method, k = name.split(", ")
        lines.append(f"| {method} | {k} | {one['measured']:+.3f} | {one['predicted']:+.3f} |")
    seen = found["removed"]["foreseen"]
    lines += [
        "",
        f"Predicted against measured over these {seen['sets']} sets: Spearman {seen['lds']:.3f}, Pearson {seen['pearson']:.3f}, slope {seen['slope']:.2f}.",
    ]
    return "\n".join(lines)


def picture(asked: Sequence[Asked], rankings: dict[str, np.ndarray], found: dict) -> str:
    """recall@k of every ranking by kind of truth, and predicted against measured for the sets left out."""
    from plotly import graph_objects as go
    from plotly.subplots import make_subplots

    from retrograd.lab.truth import recall_at

    parts = kinds(asked)
    titles = [f"rows to find: {kind}" for kind in parts] + ["−log p without the strongest proponents, nats"]
    figure = make_subplots(rows=2, cols=2, subplot_titles=titles)
    colours = dict(zip(rankings, ("#1f77b4", "#ff7f0e", "#2ca02c", "#7f7f7f"), strict=True))
    for place, truths in enumerate(parts.values()):
        for method, scores in rankings.items():
            y = [np.mean([recall_at(scores[q], rows, k) for q, rows in truths]) for k in range(1, 21)]
            figure.add_trace(
                go.Scatter(x=list(range(1, 21)), y=y, name=method, line_color=colours[method], showlegend=place == 0),
                row=1 + place // 2, col=1 + place % 2,
            )  # fmt: skip
    for name, one in found["removed"]["sets"].items():
        x, y = zip(*one["each"], strict=True)
        method = name.split(", ")[0]
        figure.add_trace(
            go.Scatter(x=x, y=y, mode="markers", name=name, marker_color=colours[method], showlegend=False),
            row=2,
            col=2,
        )
    figure.update_xaxes(title_text="predicted", row=2, col=2)
    figure.update_yaxes(title_text="measured", row=2, col=2)
    figure.update_layout(title="recall@k, and what leaving rows out does", template="plotly_white", height=900)
    return figure.to_html(include_plotlyjs=True)


if __name__ == "__main__":
    main()
