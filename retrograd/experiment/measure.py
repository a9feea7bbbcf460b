"""What a model gives for a split: its answers, and its divergence from the base on held-out rows.

What fails is missing, with its reason, and never a number; but a full disk or memory is a failure of the whole task,
which can be tried again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from retrograd.core import tree
from retrograd.evaluate.answers import Kept, read_measured, read_table, write_measured, write_table
from retrograd.evaluate.ask import Others, ask
from retrograd.evaluate.divergence import Divergence, divergence
from retrograd.evaluate.summary import described, failure
from retrograd.lm.model import CausalLM, load_causal_lm, load_tokenizer
from retrograd.query.load import load_rows
from retrograd.query.prepare import Answers
from retrograd.runs.errors import RunError
from retrograd.runs.progress import counting
from retrograd.runs.setup import find_device
from retrograd.settings.parse import build
from retrograd.settings.tasks import Task
from retrograd.settings.unlearn import UnlearnConfig, parse_source

__all__ = ["measure", "read_answers", "read_divergence"]

_MACHINE = (RunError, MemoryError, torch.OutOfMemoryError)
_FAILURES = (ValueError, OSError, RuntimeError, ArithmeticError)
_KL = "divergence.parquet"


def measure(what: dict[str, Any], model: str, folder: Path) -> dict[str, Any]:
    """Ask a model what a measuring task says, and write its answers; what is there is not asked again.

    Args:
        what: Of the task.
        model: Its folder or name.
        folder: Where the answers go, a file for each task.
    Returns:
        split; accuracy by role; perplexity of each text; kl; finite: whether all numbers are; missing: reasons by task.
    Raises:
        RunError, MemoryError, OutOfMemoryError: If the disk or memory is full.
    """
    tasks = {name: build(Task, settings, name) for name, settings in what["tasks"].items()}
    tokenizer = load_tokenizer(what["tokenizer"] or model)
    lm = load_causal_lm(model, dtype=what["dtype"], device=find_device(what["device"]))
    digest = tree.digest(dict(sorted(lm.params.items())))
    about = {"model": model, "digest": digest, "dtype": what["dtype"], "torch": torch.__version__}
    others = Others(reference=what["base"], knows=what["base"], dtype=what["dtype"], device=what["device"])
    missing: dict[str, str] = {}
    with counting("measure", len(tasks) + bool(what["rows"]), "tasks") as tick:
        for name, task in tasks.items():
            path = folder / f"{name}.parquet"
            if not path.exists():
                try:
                    measured, asked = ask(task, lm, tokenizer, what["batch_size"], others)
                    write_measured(path, measured, {"task": name, **about, **asked})
                except _MACHINE:
                    raise
                except _FAILURES as error:
                    missing[name] = " ".join(f"{type(error).__name__}: {error}".split())
            tick(1, name)
        if what["rows"]:
            try:
                _diverged(what, lm, tokenizer, folder / _KL, about, others)
            except _MACHINE:
                raise
            except _FAILURES as error:
                missing["kl"] = " ".join(f"{type(error).__name__}: {error}".split())
            tick(1, "kl")
    return {"split": what["split"], "digest": digest, **_summary(tasks, folder, missing)}


def read_answers(folder: Path, tasks: Sequence[str]) -> dict[str, Kept | None]:
    """The answers by task; None where one is missing."""
    paths = {name: folder / f"{name}.parquet" for name in tasks}
    return {name: read_measured(path)[0] if path.exists() else None for name, path in paths.items()}


def read_divergence(folder: Path) -> Divergence | None:
    """The divergence by document; None if it is missing."""
    path = folder / _KL
    kinds = {"Divergence": lambda columns: Divergence(columns["nats"], columns["targets"])}
    return read_table(path, kinds)[0] if path.exists() else None


def _diverged(
    what: dict[str, Any], lm: CausalLM, tokenizer: Any, path: Path, about: dict[str, Any], others: Others
) -> None:
    if path.exists():
        return
    base, total = others.reference_model(), Divergence([], [])
    for text in what["rows"]:
        source = parse_source(text, UnlearnConfig())
        rows = load_rows(source, tokenizer, lm, None)[0]
        of_rows = divergence(lm, base, rows, what["batch_size"])
        total = Divergence([*total.nats, *of_rows.nats], [*total.targets, *of_rows.targets])
    write_table(path, total._asdict(), {}, {"kind": "Divergence", **about})


def _summary(tasks: dict[str, Task], folder: Path, missing: dict[str, str]) -> dict[str, Any]:
    answers, finite = read_answers(folder, list(tasks)), True
    rights: dict[str, list[torch.Tensor]] = {}
    texts: dict[str, float | None] = {}
    for name, task in tasks.items():
        measured = answers[name]
        if measured is None:
            continue
        if why := failure(measured, task):
            missing[name], finite = why, False
        if isinstance(measured, Answers):
            rights.setdefault(str(task.role), []).append(measured.rights(task))
        elif task.form == "text":
            texts[name] = described(measured, task)["perplexity"]
    kl = read_divergence(folder)
    if kl is not None and not math.isfinite(kl.mean):
        missing["kl"], finite = "it is not finite", False
    absent = {str(task.role) for name, task in tasks.items() if task.choices and name in missing}
    accuracy = {side: None if side in absent or side not in rights else float(torch.cat(rights[side]).mean())
                for side in ("forget", "retain")}  # fmt: skip
    return {
        "accuracy": accuracy, "perplexity": texts, "kl": None if kl is None or "kl" in missing else kl.mean,
        "finite": finite, "missing": missing,
    }  # fmt: skip
