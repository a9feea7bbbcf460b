"""What lm-eval found for one model and one name, as a parquet file: a row for each question and filter.

    task, model, question (from 0), filter, doc_hash, prompt_hash, target, options (what was scored), logprobs (nats,
    by option; of a whole text: one), gold, chosen, right (acc), right_norm (acc_norm), response (what was generated),
    metrics (all that are single numbers), dtype

gold and chosen are places of options; null where a task has none, or not one alone. The file's metadata holds lm-eval's
results, versions and settings as it gave them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from retrograd.evaluate.answers import read_table, write_table
from retrograd.query.choices import Scored
from retrograd.query.prepare import Answers
from retrograd.query.prompts import LETTERS

__all__ = ["Sample", "Sampled", "answers_of", "form_of", "read_sampled", "sampled_from", "write_sampled"]


class Sample(NamedTuple):
    """One question with one filter; the names are those of the file's columns."""

    task: str
    question: int
    filter: str
    doc_hash: str
    prompt_hash: str
    target: str
    options: list[str]
    logprobs: list[float]
    gold: int | None
    response: str | None
    metrics: dict[str, float]

    @property
    def failed(self) -> bool:
        """Something that was scored has no finite log-likelihood; lm-eval takes the first NaN for the answer."""
        return not all(map(math.isfinite, self.logprobs))

    @property
    def chosen(self) -> int | None:
        several = len(self.logprobs) > 1 and not self.failed
        return int(np.argmax(self.logprobs)) if several else None


class Sampled(NamedTuple):
    """All questions of a name by task, and what lm-eval says of them: results, versions, n-shot, n-samples, …"""

    tasks: dict[str, list[Sample]]
    told: dict[str, Any]

    def failure(self, task: str) -> str | None:
        """Why the numbers of a task are none."""
        samples = [sample for sample in self.tasks[task] if sample.filter == self.tasks[task][0].filter]
        if bad := sum(sample.failed for sample in samples):
            return f"{bad} of {len(samples)} questions have no finite log-likelihood"
        if (passes := self.told["not_finite"]) and any(sample.response is not None for sample in samples):
            return f"logits were not finite in {passes} forward passes, so what was written means nothing"
        return None


def sampled_from(results: dict[str, Any]) -> Sampled:
    """From what `ask_harness` returns."""
    tasks = {
        task: sorted((_sample(task, record) for record in records), key=lambda sample: (sample.filter, sample.question))
        for task, records in sorted(results["samples"].items())
    }
    about = {name: value for name, value in results.items() if name != "samples"}
    return Sampled(tasks, json.loads(json.dumps(about, default=_plain)))


def write_sampled(path: Path, sampled: Sampled, about: dict[str, Any]) -> None:
    """Write one file, whole or not at all.

    Args:
        about: What was asked of which weights; at least model and dtype.
    """
    import pyarrow

    rows = [row for samples in sampled.tasks.values() for row in samples]
    columns: dict[str, list[Any]] = {name: [getattr(row, name) for row in rows] for name in Sample._fields}
    for name, metric in (("right", "acc"), ("right_norm", "acc_norm")):
        outcomes = [None if row.failed else row.metrics.get(metric) for row in rows]
        columns[name] = [bool(value) if value in (0, 1) else None for value in outcomes]
    columns |= {"chosen": [row.chosen for row in rows], "metrics": [list(row.metrics.items()) for row in rows]}
    columns = {"task": columns.pop("task"), "model": [about["model"]] * len(rows), **columns}
    columns["dtype"] = [about["dtype"]] * len(rows)
    types = {"options": pyarrow.list_(pyarrow.string()), "logprobs": pyarrow.list_(pyarrow.float64()),
             "gold": pyarrow.int64(), "chosen": pyarrow.int64(), "right": pyarrow.bool_(),
             "right_norm": pyarrow.bool_(), "response": pyarrow.string(),
             "metrics": pyarrow.map_(pyarrow.string(), pyarrow.float64())}  # fmt: skip
    write_table(path, columns, types, {"kind": "Sampled", **about, "lm_eval": sampled.told})


def read_sampled(path: Path) -> tuple[Sampled, dict[str, Any]]:
    """What a file holds, and what it says of itself.

    Raises:
        RunError: If it is no such file, or damaged.
    """
    tasks, about = read_table(path, {"Sampled": _tasks})
    return Sampled(tasks, about["lm_eval"]), about


def form_of(samples: list[Sample]) -> str | None:
    """letter: the options are the letters A, B, …; cloze: other options; None: not multiple choice."""
    if any(len(sample.options) < 2 for sample in samples):
        return None
    letters = all(
        [option.strip() for option in sample.options] == list(LETTERS[: len(sample.options)]) for sample in samples
    )
    return "letter" if letters else "cloze"


def answers_of(samples: list[Sample]) -> Answers | None:
    """Multiple-choice questions as our own scorer gives them, by acc; None if lm-eval counted otherwise than by argmax.

    Widths are 1: nothing is normalised here.
    """
    form = form_of(samples)
    if form is None or any(sample.gold is None for sample in samples):
        return None
    most = max(len(sample.logprobs) for sample in samples)
    logprobs = torch.full((len(samples), most), -torch.inf, dtype=torch.float64)
    for row, sample in enumerate(samples):
        logprobs[row, : len(sample.logprobs)] = torch.tensor(sample.logprobs, dtype=torch.float64)
    widths = torch.tensor(
        [[float(k < len(sample.logprobs)) for k in range(most)] for sample in samples], dtype=torch.float64
    )
    gold = torch.tensor([sample.gold for sample in samples])
    mass = logprobs.exp().sum(1) if form == "letter" else None
    scored = Scored(
        logprobs, widths, gold, mass, [f"{sample.task} {sample.doc_hash} {sample.prompt_hash}" for sample in samples]
    )
    counted = [sample.metrics.get("acc") for sample in samples]
    same = all(bad or a == b for a, b, bad in zip(counted, scored.correct.tolist(), scored.failed.tolist()))
    return Answers(scored, [None] * len(samples)) if same else None


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _sample(task: str, record: dict[str, Any]) -> Sample:
    scored, written = list(record["filtered_resps"]), None
    if not all(isinstance(response, float) or _is_score(response) for response in scored):
        written, scored = _text(scored), []
    options = [str(arguments[1]) for arguments in record["arguments"] if scored and len(arguments) > 1]
    logprobs = [float(response[0]) if isinstance(response, tuple | list) else float(response) for response in scored]
    if "acc_mutual_info" in record["metrics"]:  # the second half are the options without a question
        options, logprobs = options[: len(options) // 2], logprobs[: len(logprobs) // 2]
    metrics = dict(_numbers(record))
    return Sample(
        task, int(record["doc_id"]), record["filter"], record["doc_hash"], record["prompt_hash"],
        str(record["target"]), options, logprobs, _gold(record["target"], options), written, metrics,
    )  # fmt: skip


def _is_score(value: Any) -> bool:
    """(log-likelihood, whether greedy decoding gives the same)."""
    return isinstance(value, tuple | list) and len(value) == 2 and isinstance(value[0], float)


def _text(responses: list[Any]) -> str:
    alone = len(responses) == 1 and isinstance(responses[0], str)
    return responses[0] if alone else json.dumps(responses, ensure_ascii=False, default=str)


def _numbers(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name in record["metrics"]:
        if isinstance(record[name], bool | int | float | np.number):
            yield name, float(record[name])


def _gold(target: Any, options: list[str]) -> int | None:
    """The place of the one right option."""
    if isinstance(target, int) and not isinstance(target, bool):
        return target if 0 <= target < len(options) and len(options) > 1 else None
    texts = [option.strip() for option in options]
    alone = isinstance(target, str) and texts.count(target.strip()) == 1 and len(texts) > 1
    return texts.index(target.strip()) if alone else None


def _tasks(columns: dict[str, list[Any]]) -> dict[str, list[Sample]]:
    columns["metrics"] = [dict(pairs) for pairs in columns["metrics"]]
    tasks: dict[str, list[Sample]] = {}
    for row in zip(*(columns[name] for name in Sample._fields), strict=True):
        tasks.setdefault(row[0], []).append(Sample(*row))
    return tasks
