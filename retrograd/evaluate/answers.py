"""What one model gave for one task, as a parquet file: a row for each question, document or continuation.

The file's metadata says what was asked of which weights, so that every file stands for itself:

    letter, cloze   task, model, question, subject, prompt_hash, logprobs (nats, by option), characters, letter_mass,
                    tokens (cloze), gold, chosen, right, chosen_norm, right_norm, dtype; null where a question failed
    text            task, model, document, nats (mean over its targets), targets, dtype
    generate        task, model, document, prompt, text (null where logits were not finite), dtype
    memory          task, model, document, nats, targets, right, extraction, min_k, min_k_plus, bytes, dtype
    kl              task, model, nats (summed over a document's targets), targets, dtype
    depth           task, model, lost (nats per token, by block), hashes, dtype
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from retrograd.evaluate.depth import Patched
from retrograd.evaluate.divergence import Divergence
from retrograd.evaluate.memory import Memory
from retrograd.query.choices import Scored
from retrograd.query.prepare import Answers, Measured, Samples, Texts
from retrograd.runs.errors import RunError
from retrograd.runs.files import write_atomic

__all__ = ["Kept", "read_measured", "read_table", "write_measured", "write_table"]

Kept = Measured | Memory | Divergence | Patched
"""What a file holds."""

_ABOUT = b"retrograd"


def write_measured(path: Path, measured: Kept, about: dict[str, Any]) -> None:
    """Write one file, whole or not at all.

    Args:
        about: What was asked of which weights; at least model, task and dtype.
    """
    import pyarrow

    if isinstance(measured, Answers):
        columns = _answers(measured)
    elif isinstance(measured, Texts):
        columns = {"document": measured.documents, "nats": measured.nats, "targets": measured.targets}
    elif isinstance(measured, Memory):
        columns = {_PLACES.get(name, name): values for name, values in measured._asdict().items()}
    elif isinstance(measured, (Divergence, Patched)):
        columns = measured._asdict()
    else:
        columns = {"document": measured.documents, "prompt": measured.prompts, "text": measured.texts}
    n = len(next(iter(columns.values())))
    both = {"task": [about["task"]] * n, "model": [about["model"]] * n, **columns, "dtype": [about["dtype"]] * n}
    types = {"subject": pyarrow.string(), "letter_mass": pyarrow.float64(), "text": pyarrow.string(),
             "chosen": pyarrow.int64(), "chosen_norm": pyarrow.int64(), "right": pyarrow.bool_(),
             "right_norm": pyarrow.bool_(), "tokens": pyarrow.list_(pyarrow.int64())}  # fmt: skip
    if isinstance(measured, Memory):
        types = {}
    write_table(path, both, types, {"kind": type(measured).__name__, **about})


def write_table(path: Path, columns: Mapping[str, Sequence[Any]], types: dict[str, Any], about: dict[str, Any]) -> None:
    """Columns as a parquet file that says what it is, whole or not at all.

    Args:
        types: Of columns that may be all null, or are not what pyarrow takes them for.
        about: Goes to the file's metadata; `kind` is needed.
    """
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({name: pyarrow.array(values, types.get(name)) for name, values in columns.items()})
    table = table.replace_schema_metadata({_ABOUT: json.dumps(about, ensure_ascii=False).encode()})
    write_atomic(path, lambda temporary: parquet.write_table(table, temporary))


def read_measured(path: Path) -> tuple[Kept, dict[str, Any]]:
    """What a file holds, and what it says of itself.

    Raises:
        RunError: If it is no such file, or damaged.
    """
    return read_table(path, _KINDS)


def read_table(path: Path, kinds: dict[str, Callable[[dict[str, list[Any]]], Any]]) -> tuple[Any, dict[str, Any]]:
    """A file of `write_table`: its columns as its kind takes them, and what it says of itself.

    Raises:
        RunError: If it is no such file, damaged, or of no kind among these.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
        about = json.loads((table.schema.metadata or {})[_ABOUT])
        return kinds[about["kind"]](table.to_pydict()), about
    except (pyarrow.ArrowException, OSError, KeyError, ValueError) as error:
        raise RunError(f"{path} is damaged or of another kind ({error}). Delete it and run again.") from error


def _answers(measured: Answers) -> dict[str, Sequence[Any]]:
    scored = measured.scored
    options = (scored.widths > 0).sum(1).tolist()
    failed = scored.failed.tolist()

    def unless_failed(values: torch.Tensor, kind: type) -> list[Any]:
        return [None if bad else kind(value) for value, bad in zip(values.tolist(), failed)]

    return {
        "question": list(range(len(options))),
        "subject": measured.subjects or [None] * len(options),
        "prompt_hash": scored.hashes,
        "logprobs": [row[:count] for row, count in zip(scored.logprobs.tolist(), options)],
        "characters": [[int(width) for width in row[:count]] for row, count in zip(scored.widths.tolist(), options)],
        "tokens": [None] * len(options)
        if scored.tokens is None
        else [row[:count] for row, count in zip(scored.tokens.tolist(), options)],
        "letter_mass": [None] * len(options) if scored.mass is None else scored.mass.tolist(),
        "gold": scored.gold.tolist(),
        "chosen": unless_failed(scored.chosen, int),
        "right": unless_failed(scored.correct, bool),
        "chosen_norm": unless_failed(scored.chosen_norm, int),
        "right_norm": unless_failed(scored.correct_norm, bool),
    }


def _read_answers(columns: dict[str, list[Any]]) -> Answers:
    most = max(map(len, columns["logprobs"]), default=0)

    def padded(rows: list[list[Any]], fill: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.tensor([[*row, *[fill] * (most - len(row))] for row in rows], dtype=dtype).view(len(rows), most)

    logprobs, widths = padded(columns["logprobs"], -torch.inf), padded(columns["characters"], 0)
    mass = columns["letter_mass"]
    by_letter = bool(mass) and mass[0] is not None
    letter = torch.tensor(mass, dtype=torch.float64) if by_letter else None
    counted = columns.get("tokens", [])  # files of earlier versions have none
    tokens = None
    if counted and all(counts is not None for counts in counted):
        tokens = padded(counted, 0, torch.int64)
    gold = torch.tensor(columns["gold"], dtype=torch.int64)
    return Answers(Scored(logprobs, widths, gold, letter, columns["prompt_hash"], tokens), columns["subject"])


_PLACES = {"documents": "document"}
_KINDS: dict[str, Any] = {
    "Answers": _read_answers,
    "Texts": lambda columns: Texts(columns["nats"], columns["targets"], columns["document"]),
    "Memory": lambda columns: Memory(*(columns[_PLACES.get(name, name)] for name in Memory._fields)),
    "Divergence": lambda columns: Divergence(columns["nats"], columns["targets"]),
    "Patched": lambda columns: Patched(columns["lost"], columns["hashes"]),
    "Samples": lambda columns: Samples(columns["prompt"], columns["text"], columns["document"]),
}
