"""No oracle: what tuning may see, and the refusal of an experiment whose methods or tuning could see more.

No method and no tuning reads the model that never knew, a lab's table of facts, or the questions of the report; the
keyword control alone may read facts. Tuning asks here (`tuning_value`), and gets nothing that was not measured on its
own split; which data belong to which split is compared by content (`refuse_oracles`), whatever files are called.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrograd.attack.material import ASKED_SPLITS
from retrograd.data.chats import as_messages
from retrograd.data.documents import documents_of
from retrograd.data.readers import columns_read
from retrograd.experiment.tasks import dataset_of, texts_in
from retrograd.query.questions import right_place
from retrograd.settings.experiment import ExperimentSpec, Match
from retrograd.settings.parse import read_yaml
from retrograd.settings.question import Source
from retrograd.settings.tasks import tasks_from
from retrograd.settings.unlearn import UnlearnConfig, parse_source

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["refuse_oracles", "tuning_value"]

_FACTS = "facts.jsonl"


def tuning_value(match: Match, measure: str, outcome: dict[str, Any], base: dict[str, Any] | None) -> float | None:
    """What an arm's bisection is told: retain damage (match utility), or 1 − forget accuracy; None if it is missing.

    Args:
        outcome, base: Of measurings of the tuning's split; any other is refused.
    Raises:
        ValueError: If one was measured on what is reported.
    """
    for measured in (outcome, base):
        if measured is not None and measured.get("split") != "tune":
            raise ValueError(
                f"tuning asked for what was measured on the split {measured.get('split')!r}: it sees its own"
            )
    if match == "utility" and measure == "kl":
        value = outcome["kl"]
        return math.inf if value is None and outcome["finite"] is False else value
    side = "retain" if match == "utility" else "forget"
    accuracy = outcome["accuracy"][side]
    if accuracy is None and outcome["finite"] is False:
        return math.inf
    if side == "forget":
        return None if accuracy is None else 1 - accuracy
    known = None if base is None else base["accuracy"][side]
    return None if accuracy is None or known is None else known - accuracy


def refuse_oracles(spec: ExperimentSpec) -> None:
    """Refuse an experiment whose scores, methods or tuning would read what only the report may.

    Raises:
        ValueError: With who would read what.
    """
    for who, path in _paths(spec):
        if spec.never is not None and _within(path, Path(spec.never)):
            raise ValueError(f"{who} reads {path}, the model that never knew: only the report may")
        if Path(path).name == _FACTS and (Path(path).parent / "lab.json").exists():
            raise ValueError(f"{who} reads {path}, the table of facts of a lab: only the control keyword may")
    asked = [task for task in spec.report.tasks.values() if task.choices or task.form in ("depth", "kl")]
    reported = {key for source in asked for key in _keys(source)}
    reported |= {key for source in _attacked(spec) for key in _keys(source)}
    rows = {key for text in spec.report.rows for key in _keys(parse_source(text, UnlearnConfig()))}
    for who, source in _sources(spec):
        shared = len((reported | rows).intersection(_seen(source)))
        if shared:
            raise ValueError(
                f"{who} reads {source.dataset}, of which {shared} documents or questions are in `report`: choose by "
                "one split and report another, such as split: train[:50%] and train[50%:]"
            )


def _attacked(spec: ExperimentSpec) -> Iterator[Source]:
    """The questions that attacks ask."""
    config = spec.attacked()
    if config is None:
        return
    if config.lab is not None:
        for side in ("forget", "retain"):
            for split in ASKED_SPLITS:
                yield Source(str(config.lab / f"questions/{side}_{split}.jsonl"))
        return
    assert config.tasks is not None, "checked by the settings"
    yield from (task for task in tasks_from(config.tasks).values() if task.choices)


def _paths(spec: ExperimentSpec) -> Iterator[tuple[str, str]]:
    yield "base", spec.base
    for side, text in _corpora(spec):
        yield side, dataset_of(text)
    for name, scores in spec.scores.items():
        for folder in scores.folders:
            yield f"scores {name}", folder.partition(":")[0]
        for path in filter(None, (scores.start, scores.within)):
            yield f"scores {name}", path
        for query, source in scores.queries.items():
            yield f"query {query} of scores {name}", str(source.dataset)
    settings = {"settings of all methods": spec.settings,
                **{f"method {name}": method.settings for name, method in spec.methods.items()},
                **{f"scores {name}": scores.settings for name, scores in spec.scores.items()}}  # fmt: skip
    for who, values in settings.items():
        for text in texts_in(values):
            if text == spec.never or Path(text).exists():  # a teacher, say
                yield who, text
    for name, task in spec.tune.tasks.items():
        yield f"tune task {name}", task.dataset
    for text in spec.tune.rows:
        yield "tune.rows", dataset_of(text)


def _sources(spec: ExperimentSpec) -> Iterator[tuple[str, Source]]:
    """Who reads what."""
    for name, scores in spec.scores.items():
        for query, source in scores.queries.items():
            if source.dataset is not None:
                yield f"query {query} of scores {name}", source
        for folder in scores.folders:
            yield from _asked_in(spec, name, folder)
    for name, task in spec.tune.tasks.items():
        yield f"tune task {name}", task
    for text in spec.tune.rows:
        yield "tune.rows", parse_source(text, UnlearnConfig())
    for side, text in _corpora(spec):
        yield side, parse_source(text, UnlearnConfig())


def _asked_in(spec: ExperimentSpec, name: str, text: str) -> Iterator[tuple[str, Source]]:
    """The queries of a run whose scores are taken, as far as weightings name them; files of scores tell none."""
    run, _, own = text.partition(":")
    if not (Path(run) / "run_config.yaml").exists():
        return
    sides = [(each.scores, each.against) for each in (*spec.weightings.values(), *spec.analyses.values())]
    sources = [source.partition(":") for scores, against in sides for source in (*scores, *against)]
    used = {own} | {query for scores, _, query in sources if scores == name}
    wanted = {query.partition("/")[0] for query in used if query}
    config = read_yaml(Path(run) / "run_config.yaml")
    asked = dict(config.get("queries") or {"query": config.get("query")})
    asked |= {path.parent.name: read_yaml(path) for path in sorted(Path(run).glob("queries/*/query_config.yaml"))}
    for query, settings in asked.items():
        if not settings or not settings.get("dataset") or (len(asked) > 1 and wanted and query not in wanted):
            continue
        who = f"query {query} of {run}, scores {name},"
        if Path(settings["dataset"]).exists():
            read = Source(text_column=settings.get("text_column"), columns=tuple(settings.get("columns") or ()))
            yield who, dataclasses.replace(
                read, dataset=settings["dataset"], subset=settings.get("subset"),
                split=settings.get("split") or "train", limit=settings.get("limit"),
            )  # fmt: skip
        else:
            gone = f"{who} asked {settings['dataset']}, which is not here"
            warnings.warn(f"{gone}: it is not known whether it is reported", stacklevel=2)


def _corpora(spec: ExperimentSpec) -> Iterator[tuple[str, str]]:
    own = [(f"corpora of method {name}", method.corpora) for name, method in spec.methods.items() if method.corpora]
    for where, corpora in [("corpora", spec.corpora), *own]:
        for side in ("forget", "retain", "alternative"):
            for text in getattr(corpora, side):
                yield f"{where}.{side}", text


def _keys(source: Source) -> set[str]:
    """What a document or question is, whatever its file and its place there: of a question its text and the right
    answer's, of a chat its messages, of a document the columns that are read."""
    documents = documents_of(source)
    if set(documents.column_names) >= _QUESTION:
        return {
            _key("question", str(question["question"]).strip(), _right(question, source, k))
            for k, question in enumerate(documents)
        }
    return {
        _key("row", *row) if messages is None else _key("chat", *_turns(messages))
        for row, messages in _documents(source, documents)
        if any(value not in ("", None) for value in row)  # blank ones ask nothing
    }


_QUESTION = {"question", "choices", "answer"}
_OPTION = re.compile(r"\(?([A-Z])[.)]\s+(.+)")
_ANSWER = re.compile(r"^\s*Answer:(.*)$", re.MULTILINE)


def _seen(source: Source) -> set[str]:
    """The same, and the questions that solved ones ask: a line before an answer, with what that says."""
    documents, keys = documents_of(source), _keys(source)
    if set(documents.column_names) >= _QUESTION:
        return keys
    for row, messages in _documents(source, documents):
        for before, answer in _answered(row, messages):
            lines = [line.strip() for line in before.splitlines()]
            options = {match[1]: match[2] for line in lines if (match := _OPTION.fullmatch(line))}
            written = answer.strip().rstrip(".")
            readings = {answer.strip(), written, options.get(written.strip("()"))}
            if chosen := _OPTION.fullmatch(answer.strip()):
                readings |= {chosen[2], chosen[2].rstrip(".")}
            keys |= {
                _key("question", line.removeprefix("Question:").strip(), reading)
                for line in lines
                for reading in readings
            }
    return keys


def _documents(source: Source, documents: Dataset) -> Iterator[tuple[list[Any], list[dict[str, Any]] | None]]:
    """The columns that are read of each document, and its messages; None where it is no chat."""
    names = [name for name in columns_read(documents.column_names, source.text_column) if name != "tools"]
    for k, document in enumerate(documents.with_format(None).select_columns(names)):
        row = [document[name] for name in names]
        if all(isinstance(value, list) and value and isinstance(value[0], dict) for value in row):
            yield row, [message for value in row for message in as_messages(value, k)]
        else:
            yield row, None


def _answered(row: list[Any], messages: list[dict[str, Any]] | None) -> Iterator[tuple[str, str]]:
    """Every answer of a document with all that is before it: a completion, what the assistant says, a line
    "Answer: …" of a text."""
    if messages is not None:
        turns = _turns(messages)
        for k, (role, text) in enumerate(turns):
            if role == "assistant":
                yield "\n".join(before for _, before in turns[:k]), text
    elif len(row) == 2 and all(isinstance(value, str) for value in row):
        yield row[0], row[1]
    elif len(row) == 1 and isinstance(row[0], str):
        for match in _ANSWER.finditer(row[0]):
            yield row[0][: match.start()], match[1]


def _turns(messages: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Role and text of each message; a content of several parts is their texts, a line each."""
    turns = []
    for message in messages:
        content = message.get("content") or ""
        parts = content if isinstance(content, list) else [content]
        texts = [str(part.get("text", "")) if isinstance(part, dict) else str(part) for part in parts]
        turns.append((str(message.get("role")), "\n".join(texts)))
    return turns


def _right(question: dict[str, Any], source: Source, number: int) -> str:
    try:
        return str(question["choices"][right_place(question["answer"], len(question["choices"]), number)]).strip()
    except ValueError as error:
        raise ValueError(f"{source.dataset}: {error}") from error


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


def _within(path: str, folder: Path) -> bool:
    inner, outer = Path(path).resolve(), folder.resolve()
    return inner == outer or outer in inner.parents
