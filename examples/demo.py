"""The demo: a small world in which everything is known, and a model whose answers are traced back to their teachers.

It builds a lab, in which `models/filtered` has read everything but the forget side. That model then reads the whole of
what `models/base` has read, and so learns the forget side. Every token of that training is scored for two queries, the
mean loss on questions about the forget side and about the retain side, and for one answer. Then the training is repeated
without sets of rows. The lab knows which rows state what, so every finding is held against the truth.

    python examples/demo.py            # under six minutes on two cores
    python examples/demo.py --small    # the smallest size, for continuous integration
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import shlex
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

SIDES = ("forget", "retain")
TOP = 10  # rows that taught a fact which the exams ask for: four state it, six ask for it


class Size(NamedTuple):
    """Of the lab, of the training that is attributed, and of its validation."""

    lab: str
    train: str
    subsets: int
    fraction: str


RECIPE = "--train.lr_schedule linear --train.warmup_ratio 0.05 --train.beta2 0.99 --train.max_grad_norm 1 --train.eps_root 1e-6"
FULL = Size(
    "--facts 32 --width 64 --layers 2 --epochs 20 --batch_size 32",
    f"--train.epochs 20 --train.batch_size 64 --train.lr 1e-3 {RECIPE}",
    16, "0.02",
)  # fmt: skip
SMALL = Size(
    "--facts 8 --width 32 --layers 2 --epochs 20 --batch_size 28",
    f"--train.epochs 12 --train.batch_size 56 --train.lr 1e-3 {RECIPE}",
    6, "0.05",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="the smallest size")
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"))
    arguments = parser.parse_args()
    folder, size = arguments.folder, SMALL if arguments.small else FULL
    shutil.rmtree(folder, ignore_errors=True)
    lab, run = folder / "lab", folder / "run"
    said = [command(f"lab {lab} {size.lab}")]
    write_queries(folder, lab)
    said += [
        command(
            f"magic {run} --model {lab}/models/filtered --data.dataset {lab}/train/base.jsonl --query_file "
            f"{folder}/queries.yaml --attribute tokens {size.train}"
        )
    ]
    write_set(folder, run)
    said += [command(f"validate {run} --subsets {size.subsets} --fraction {size.fraction} --sets {folder}/strongest.txt")]
    holds = findings(folder)
    print("\nWhat the commands themselves say:\n\n" + "\n".join(said))
    return 0 if holds else 1


def command(line: str) -> str:
    """Run a `retrograd` command; returns what it printed."""
    from retrograd.cli import main as retrograd

    print(f"$ retrograd {line}\n", flush=True)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = retrograd(shlex.split(line))
    if code:
        print(said.getvalue())
        raise SystemExit(code)
    return said.getvalue()


def write_queries(folder: Path, lab: Path) -> None:
    """Three queries: the questions of each side, worded as no training row words them, and the first one alone."""
    lines = (lab / "questions/forget_paraphrase.jsonl").read_text().splitlines()
    (folder / "answer.jsonl").write_text(lines[0] + "\n")
    files = {**{side: lab / f"questions/{side}_paraphrase.jsonl" for side in SIDES}, "answer": folder / "answer.jsonl"}
    queries = {name: {"dataset": str(file), "form": "cloze"} for name, file in files.items()}
    (folder / "queries.yaml").write_text(json.dumps(queries, indent=1))


def write_set(folder: Path, run: Path) -> None:
    """The strongest proponents of the single answer, to be left out together."""
    from retrograd.lab.truth import strongest

    rows = strongest(scores_of(run)["answer"], TOP)
    (folder / "strongest.txt").write_text(" ".join(map(str, rows)) + "\n")


def scores_of(run: Path) -> dict[str, list[float]]:
    """By query, the score of each row."""
    examples = json.loads((run / "all_scores.json").read_text())["examples"]
    return {name: [one["scores"][name] for one in examples] for name in examples[0]["scores"]}


def findings(folder: Path) -> bool:
    """Print what the scores found beside the truth; whether they found it."""
    lab, run = folder / "lab", folder / "run"
    print("Found (a score is a derivative; negative: training on the row lowered the loss, a proponent):\n")
    held = [knowledge(lab, run), *sides(lab, run), answer(folder), validated(run)]
    print(f"\n{'The scores found the truth.' if all(held) else 'The scores did NOT find the truth.'}")
    print(f"Pictures: {run / 'validation.html'}; scores by token: {run / 'scores.parquet'}")
    return all(held)


def knowledge(lab: Path, run: Path) -> bool:
    """What the models answer rightly, before and after the training that is attributed."""
    scored = json.loads((lab / "lab.json").read_text())["scores"]
    before = {
        entry["side"]: entry["accuracy"] for entry in scored
        if (entry["model"], entry["split"], entry["form"]) == ("filtered", "paraphrase", "cloze")
    }  # fmt: skip
    after = {side: asked(run, side)["accuracy"] for side in SIDES}
    for side in SIDES:
        print(f"  {side} questions answered rightly: {before[side]:4.0%} before, {after[side]:4.0%} after (chance: 25 %)")
    return after["forget"] > before["forget"]


def sides(lab: Path, run: Path) -> list[bool]:
    """Whether the strongest proponents of each side's questions are about that side."""
    from retrograd.lab.truth import sides_of_rows, strongest

    about, held = sides_of_rows(lab), []
    for side in SIDES:
        best = strongest(scores_of(run)[side], 3 * TOP)
        share, common = sum(about[row] == side for row in best) / len(best), about.count(side) / len(about)
        print(f"  {side}: {share:4.0%} of the {len(best)} strongest proponents are about that side; {common:.0%} of all rows are")
        held.append(share >= 0.8)
    return held


def answer(folder: Path) -> bool:
    """Whether the strongest proponents of one answer are the rows that state its fact or ask for it."""
    from retrograd.lab.truth import recall_at, reciprocal_rank, taught_by

    question = json.loads((folder / "answer.jsonl").read_text())
    truth, scores = taught_by(folder / "lab")[question["fact"]].rows, scores_of(folder / "run")["answer"]
    right, chance = recall_at(scores, truth, TOP), TOP / len(scores)
    print(f"  “{question['question']}” “{question['choices'][question['answer']]}”: {len(truth)} of {len(scores)} rows state or ask this")
    print(f"    {right:.0%} of its {TOP} strongest proponents are among them, the first at place "
          f"{1 / reciprocal_rank(scores, truth):.0f}; by chance {chance:.0%}")  # fmt: skip
    without = {row["subset"]: row for row in changes(folder / "run") if row["query"] == "answer"}
    named = without.pop("set-0")
    others = statistics.median(abs(float(row["measured"])) for row in without.values())
    print(f"    trained again without those {TOP}, its loss rises by {float(named['measured']):+.2f} nats (predicted "
          f"{float(named['predicted']):+.2f}); without random sets it moves by {others:.2f}")  # fmt: skip
    return right >= 0.5 and float(named["measured"]) > others


def validated(run: Path) -> bool:
    """Whether the scores rank the outcomes of retraining without random sets of rows."""
    part = json.loads((run / "validation.json").read_text())["fractions"][0]
    each = ", ".join(f"{name} {one['lds']:.3f}" for name, one in part["queries"].items())
    low, high = part["interval"]
    print(f"  predicted against retrained without random sets of rows, rank correlation (LDS): {each}; "
          f"mean {part['mean_lds']:.3f} [{low:.3f}, {high:.3f}]")  # fmt: skip
    return part["mean_lds"] >= 0.8


def asked(run: Path, name: str) -> dict[str, Any]:
    return json.loads((run / "queries" / name / "query.json").read_text())


def changes(run: Path) -> Sequence[dict[str, str]]:
    with (run / "validation.csv").open() as lines:
        return list(csv.DictReader(lines))


if __name__ == "__main__":
    sys.exit(main())
