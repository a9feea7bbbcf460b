"""Multiple-choice queries: each question with what the trained model answers, and at what loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from retrograd.data.documents import load_documents
from retrograd.report.mask import Mask
from retrograd.report.panel import Content, Source, View
from retrograd.report.panels.setup import reproduce
from retrograd.report.subjects import Attribution
from retrograd.settings.parse import read_yaml

__all__ = ["MOST", "option_losses", "questions", "texts_of"]

MOST = 2000  # questions of a query or task that are listed


def questions(run: Attribution, view: View) -> Content | None:
    """The questions of every multiple-choice query of the run."""
    asked = [query for query in run.queries.values() if query.get("answers")]
    if not asked:
        return None
    listed = [_listed(run, query, view.mask) for query in asked]
    sources = [Source(run.folder / "queries" / query["name"] / "query.json", reproduce(run)) for query in asked]
    return Content({"queries": listed}, sources)


def _listed(run: Attribution, query: dict[str, Any], mask: Mask) -> dict[str, Any]:
    texts, why = texts_of(_settings(run, query["name"]), len(query["answers"]), mask)
    entries = []
    for number, answer in enumerate(query["answers"][:MOST]):
        unknown: dict[str, Any] = {"question": f"prompt {answer['prompt']}", "choices": None, "subject": None}
        shown = texts[number] if texts else unknown
        values, right = _values(answer["logprobs"], shown["choices"], query["normalised"]), answer["right"]
        loss = option_losses(values, query["loss"])[right] if values else None
        answered = {
            "right": right,
            "chosen": answer["chosen"],
            "loss": loss,
            "probabilities": _shares(answer["logprobs"]),
        }
        entries.append({**shown, **answered})
    about = {
        key: query.get(key) for key in ("name", "form", "loss", "accuracy", "normalised", "questions", "values_nats")
    }
    return {**about, "entries": entries, "missing": why}


def _values(logprobs: list[float], choices: list[str] | None, normalised: bool) -> list[float] | None:
    """What the loss is of: log-probabilities, or those per character; None where the texts are not there."""
    if not normalised:
        return logprobs
    return [value / len(choice) for value, choice in zip(logprobs, choices)] if choices else None


def option_losses(logprobs: Sequence[float], loss: str = "four_way") -> list[float | None]:
    """The loss in nats if each option were the right one, in turn; None where it is not finite."""
    top = max(logprobs)
    total = 0.0 if loss == "full" else top + math.log(sum(math.exp(x - top) for x in logprobs))
    return [total - x if math.isfinite(total - x) else None for x in logprobs]


def _shares(logprobs: Sequence[float]) -> list[float | None]:
    losses = option_losses(logprobs)
    return [None if loss is None else round(math.exp(-loss), 5) for loss in losses]


def _settings(run: Attribution, name: str) -> dict[str, Any]:
    """The settings of a query, with the data set that it reads."""
    added = run.folder / "queries" / name / "query_config.yaml"
    if added.exists():
        return read_yaml(added)
    return run.config["queries"].get(name) or run.config["query"]


def texts_of(settings: dict[str, Any], count: int, mask: Mask) -> tuple[list[dict[str, Any]], str]:
    """Question, choices and subject of each question of a data set, as they may be shown; or why there are none."""
    try:
        documents = load_documents(
            settings["dataset"], split=settings.get("split") or "train", subset=settings.get("subset"),
            limit=settings.get("limit"), columns=settings.get("columns") or (),
        )  # fmt: skip
    except (ValueError, OSError, KeyError, TypeError) as error:
        return [], f"the texts cannot be read: {error}"
    if not {"question", "choices"} <= set(documents.column_names) or len(documents) != count:
        return [], f"{settings['dataset']} is not what was asked: {len(documents)} rows for {count} questions"
    return [
        {"question": mask.text(str(document["question"])),
         "choices": [mask.text(str(text)) for text in document["choices"]],
         "subject": mask.text(str(document.get("subject") or ""))}
        for document in documents.select(range(min(MOST, count)))
    ], ""  # fmt: skip
