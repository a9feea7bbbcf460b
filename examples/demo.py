"""The demo: a small world in which everything is known, and a model whose answers are traced back to their teachers.

It builds a lab, repeats the training of its `models/base` bit for bit, and scores every token of that for the questions
about the forget side, for those about the retain side, and for a single answer. Then it trains again without sets of
rows. The lab knows which rows teach what, so every finding is held against the truth.

    python examples/demo.py            # under six minutes on two cores
    python examples/demo.py --small    # the smallest size, for continuous integration
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

SIDES = ("forget", "retain")
TOP = 10  # rows that taught a fact: four documents state it, three exams answer it in words, three by letter


class Scale(NamedTuple):
    """Flags of the lab and of the validation."""

    lab: str
    validate: str


# ε inside the root and the learning rate are those with which scores predict retraining: docs/lab.md
FULL = Scale(
    "--facts 16 --width 32 --layers 2 --epochs 60 --batch_size 56 --lr 1e-3 --eps_root 1e-5",
    "--subsets 28 --fraction 0.03 --workers 2",
)
SMALL = Scale(
    "--facts 8 --width 32 --layers 2 --epochs 40 --batch_size 56 --lr 1e-3 --eps_root 1e-5",
    "--subsets 14 --fraction 0.05",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="the smallest size")
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"))
    arguments = parser.parse_args()
    folder, scale = arguments.folder, SMALL if arguments.small else FULL
    os.environ["OMP_NUM_THREADS"] = "1"  # the lab trains on one thread, and the bits of sums depend on their number
    shutil.rmtree(folder, ignore_errors=True)
    lab, run = folder / "lab", folder / "run"
    said = [command(f"lab {lab} {scale.lab}")]
    write_queries(folder, lab)
    said += [
        command(
            f"magic {run} --model {lab}/models/random --data.dataset {lab}/train/base.jsonl --query_file "
            f"{folder}/queries.yaml --attribute tokens {training_of(lab)}"
        )
    ]
    write_set(folder, run)
    said += [command(f"validate {run} {scale.validate} --sets {folder}/strongest.txt")]
    holds = findings(folder)
    print("\nWhat the commands themselves say:\n\n" + "\n".join(said))
    return 0 if holds else 1


def command(line: str) -> str:
    """Run a `retrograd` command; returns what it printed."""
    from retrograd.cli import main as retrograd

    print(f"$ OMP_NUM_THREADS=1 retrograd {line}\n", flush=True)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = retrograd(shlex.split(line))
    if code:
        print(said.getvalue())
        raise SystemExit(code)
    return said.getvalue()


def training_of(lab: Path) -> str:
    """The flags that repeat the training of models/base, as the lab's README has them."""
    from retrograd.lab.learn import Size, magic_flags

    settings = json.loads((lab / "lab.json").read_text())["settings"]
    return magic_flags(Size(**{name: settings[name] for name in Size._fields}))


def write_queries(folder: Path, lab: Path) -> None:
    """Three queries: the questions of each side, worded as no training row words them, and the first one alone."""
    lines = (lab / "questions/forget_paraphrase.jsonl").read_text().splitlines()
    (folder / "answer.jsonl").write_text(lines[0] + "\n")
    files = {**{side: lab / f"questions/{side}_paraphrase.jsonl" for side in SIDES}, "answer": folder / "answer.jsonl"}
    queries = {name: {"dataset": str(file), "form": "cloze"} for name, file in files.items()}
    (folder / "queries.yaml").write_text(json.dumps(queries, indent=1))


def write_set(folder: Path, run: Path) -> None:
    """The strongest proponents of the single answer, to be left out together."""
    rows = proponents(scores_of(run)["answer"], TOP)
    (folder / "strongest.txt").write_text(" ".join(map(str, rows)) + "\n")


def proponents(scores: list[float], count: int) -> list[int]:
    """The rows of the lowest scores, `count` at most, as far as these are negative."""
    from retrograd.lab.truth import strongest

    return [row for row in strongest(scores, count) if scores[row] < 0]


def scores_of(run: Path) -> dict[str, list[float]]:
    """By query, the score of each row."""
    examples = json.loads((run / "all_scores.json").read_text())["examples"]
    return {name: [one["scores"][name] for one in examples] for name in examples[0]["scores"]}


def findings(folder: Path) -> bool:
    """Print what the scores found beside the truth; whether they found it."""
    lab, run = folder / "lab", folder / "run"
    print("Found. Scores are derivatives; negative: training on it lowered the query loss, a proponent.\n")
    held = [knowledge(lab, run), *sides(lab, run), *answer(folder), validated(run)]
    print(f"\n{'The scores found the truth.' if all(held) else 'The scores did NOT find the truth.'}")
    print(f"The page about all of it: {run / 'report.html'}; scores by token: {run / 'scores.parquet'}")
    return all(held)


def knowledge(lab: Path, run: Path) -> bool:
    """Whether the attributed model is base to the bit, knows both sides, and filtered knows one."""
    from safetensors.torch import load_file

    from retrograd.lm.model import load_causal_lm

    final = load_file(run / "checkpoints" / "final.safetensors")
    base = load_causal_lm(str(lab / "models" / "base")).params
    same = all(leaf.equal(final[f"params.{name}"]) for name, leaf in base.items())
    print(f"The attributed training ends with {'the bits' if same else 'OTHER bits than those'} of models/base.")
    right = {
        (entry["model"], entry["side"]): entry["accuracy"]
        for entry in json.loads((lab / "lab.json").read_text())["scores"]
        if (entry["split"], entry["form"]) == ("paraphrase", "cloze")
    }
    print("Questions in words that it has not read are answered rightly (chance is 25%):")
    for side in SIDES:
        known, filtered = (right[model, side] for model in ("base", "filtered"))
        print(f"  {side}: {known:.0%}; by the model that never saw the forget side, {filtered:.0%}")
    return same and min(right["base", side] for side in SIDES) > 0.5 > right["filtered", "forget"]


def sides(lab: Path, run: Path) -> list[bool]:
    """Whether the strongest proponents of each side's questions are about that side."""
    from retrograd.lab.truth import sides_of_rows

    about, held = sides_of_rows(lab), []
    print(f"Of the {2 * TOP} strongest proponents of a side's questions, these are rows about that side:")
    for side in SIDES:
        share = sum(about[row] == side for row in proponents(scores_of(run)[side], 2 * TOP)) / (2 * TOP)
        print(f"  {side}: {share:.0%}; of all rows, {about.count(side) / len(about):.0%}")
        held.append(share >= 0.8)
    return held


def answer(folder: Path) -> list[bool]:
    """Whether the rows that give one answer are its strongest proponents, and whether it goes with them."""
    from retrograd.lab.truth import taught_by

    question = json.loads((folder / "answer.jsonl").read_text())
    value = question["choices"][question["answer"]]
    truth, scores = taught_by(folder / "lab")[question["fact"]], scores_of(folder / "run")["answer"]
    order = proponents(scores, len(scores))
    places = sorted(order.index(row) + 1 for row in truth.answered if row in order)
    print(f"“{question['question']}” “{value}”:")
    asked = f"{len(truth.answered)} of {len(scores)} rows ask for this and answer in words"
    print(f"  {asked}; their places among the proponents: {', '.join(map(str, places))}")
    tokens = strongest_tokens(folder / "run", len(truth.answered))
    print(f"  the strongest tokens: {', '.join(f'“{token}” in row {row}' for token, row in tokens)}")
    without = {row["subset"]: row for row in changes(folder / "run") if row["query"] == "answer"}
    measured, predicted = (float(without["set-0"][name]) for name in ("measured", "predicted"))
    others = max(float(row["measured"]) for name, row in without.items() if name != "set-0")
    print(f"  trained again without the {TOP} strongest proponents, its loss is {measured:+.3f} nats higher, predicted "
          f"{predicted:+.3f};\n  without random sets of rows, {others:+.3f} at most")  # fmt: skip
    found = len(places) == len(truth.answered) and max(places) <= TOP
    return [found, all(token == value for token, _ in tokens), measured > others]


def strongest_tokens(run: Path, count: int) -> list[tuple[str, int]]:
    """The tokens of the most negative scores for the single answer, and their rows."""
    import pyarrow.parquet as parquet

    table = parquet.read_table(run / "scores.parquet").sort_by("score_answer").slice(0, count).to_pydict()
    return [(token.strip(), row) for token, row in zip(table["token"], table["row"], strict=True)]


def validated(run: Path) -> bool:
    """Whether the scores rank the outcomes of retraining without random sets of rows."""
    part = json.loads((run / "validation.json").read_text())["fractions"][0]
    low, high = part["interval"]
    each = ", ".join(f"{name} {one['lds']:.3f}" for name, one in part["queries"].items())
    print(f"Trained again without random sets of {part['fraction']:.0%} of the rows, losses move in predicted order "
          f"(LDS):\n  {each}; mean {part['mean_lds']:.3f} [{low:.3f}, {high:.3f}]")  # fmt: skip
    return part["mean_lds"] >= 0.8


def changes(run: Path) -> Sequence[dict[str, str]]:
    with (run / "validation.csv").open() as lines:
        return list(csv.DictReader(lines))


if __name__ == "__main__":
    sys.exit(main())
