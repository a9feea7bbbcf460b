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
    for one in (outcome, base):
        if one is not None and one.get("split") != "tune":
            raise ValueError(f"tuning asked for what was measured on the split {one.get('split')!r}: it sees its own")
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
    asked = [one for one in spec.report.tasks.values() if one.choices or one.form in ("depth", "kl")]
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
        for query, one in scores.queries.items():
            yield f"query {query} of scores {name}", str(one.dataset)
    settings = {"settings of all methods": spec.settings,
                **{f"method {name}": one.settings for name, one in spec.methods.items()},
                **{f"scores {name}": one.settings for name, one in spec.scores.items()}}  # fmt: skip
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
        for query, one in scores.queries.items():
            if one.dataset is not None:
                yield f"query {query} of scores {name}", one
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
    place, _, own = text.partition(":")
    if not (Path(place) / "run_config.yaml").exists():
        return
    used = {own} | {source.partition(":")[2] for one in (*spec.weightings.values(), *spec.analyses.values())
                    for source in (*one.scores, *one.against) if source.partition(":")[0] == name}  # fmt: skip
    wanted = {query.partition("/")[0] for query in used if query}
    values = read_yaml(Path(place) / "run_config.yaml")
    asked = dict(values.get("queries") or {"query": values.get("query")})
    asked |= {path.parent.name: read_yaml(path) for path in sorted(Path(place).glob("queries/*/query_config.yaml"))}
    for query, one in asked.items():
        if not one or not one.get("dataset") or (len(asked) > 1 and wanted and query not in wanted):
            continue
        who = f"query {query} of {place}, scores {name},"
        if Path(one["dataset"]).exists():
            read = Source(text_column=one.get("text_column"), columns=tuple(one.get("columns") or ()))
            yield who, dataclasses.replace(
                read, dataset=one["dataset"], subset=one.get("subset"), split=one.get("split") or "train",
                limit=one.get("limit"),
            )  # fmt: skip
        else:
            warnings.warn(f"{who} asked {one['dataset']}, which is not here: it is not known whether it is reported",
                          stacklevel=2)  # fmt: skip


def _corpora(spec: ExperimentSpec) -> Iterator[tuple[str, str]]:
    own = [(f"corpora of method {name}", one.corpora) for name, one in spec.methods.items() if one.corpora]
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
            _key("question", str(one["question"]).strip(), _right(one, source, k)) for k, one in enumerate(documents)
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
    documents, found = documents_of(source), _keys(source)
    if set(documents.column_names) >= _QUESTION:
        return found
    for row, messages in _documents(source, documents):
        for before, answer in _answered(row, messages):
            lines = [line.strip() for line in before.splitlines()]
            options = {match[1]: match[2] for line in lines if (match := _OPTION.fullmatch(line))}
            written = answer.strip().rstrip(".")
            told = {answer.strip(), written, options.get(written.strip("()"))}
            if chosen := _OPTION.fullmatch(answer.strip()):
                told |= {chosen[2], chosen[2].rstrip(".")}
            found |= {_key("question", line.removeprefix("Question:").strip(), one) for line in lines for one in told}
    return found


def _documents(source: Source, documents: Dataset) -> Iterator[tuple[list[Any], list[dict[str, Any]] | None]]:
    """The columns that are read of each document, and its messages; None where it is no chat."""
    names = [name for name in columns_read(documents.column_names, source.text_column) if name != "tools"]
    for k, one in enumerate(documents.with_format(None).select_columns(names)):
        row = [one[name] for name in names]
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
    found = []
    for one in messages:
        content = one.get("content") or ""
        parts = content if isinstance(content, list) else [content]
        texts = [str(part.get("text", "")) if isinstance(part, dict) else str(part) for part in parts]
        found.append((str(one.get("role")), "\n".join(texts)))
    return found


def _right(one: dict[str, Any], source: Source, number: int) -> str:
    try:
        return str(one["choices"][right_place(one["answer"], len(one["choices"]), number)]).strip()
    except ValueError as error:
        raise ValueError(f"{source.dataset}: {error}") from error


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


def _within(path: str, folder: Path) -> bool:
    one, other = Path(path).resolve(), folder.resolve()
    return one == other or other in one.parents
