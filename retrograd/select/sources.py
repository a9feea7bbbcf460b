"""Score sets by name: of a run and one of its queries, or of files of any other method, for one data set.

    RUN, RUN:query, RUN:query/column        a finished run; of several columns the mean, which is the mean loss's score
    FOLDER with per_token_scores.pt         the original layout
    FILE.pt, FILE.npy, FILE.parquet:column  another method's; its sign, and by token its alignment, have to be stated

A run of `unlearn --attribute` has scores of several data sets: those of the one that the rows are count.

All end as one number for each real token or document, negative = proponent, aligned with targets.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from retrograd.data.documents import documents_of
from retrograd.data.pairs import Part
from retrograd.data.rows import Rows, build_rows
from retrograd.lm.checkpoint import read_config
from retrograd.lm.model import load_tokenizer
from retrograd.runs.files import file_digest
from retrograd.runs.kinds import command_of
from retrograd.runs.manifest import Manifest
from retrograd.runs.run_folder import finished, recorded
from retrograd.runs.scores import read_scores
from retrograd.select.files import Stated, file_scores, is_original
from retrograd.select.places import Places, places_of
from retrograd.settings.run import AttributedConfig, MagicConfig, queries_of, settings_from
from retrograd.settings.select import SelectConfig
from retrograd.settings.unlearn import UnlearnConfig, parse_source

__all__ = [
    "DataSet",
    "Native",
    "Scored",
    "find_native",
    "is_run",
    "load_data",
    "load_scores",
    "query_columns",
    "split_name",
]


class DataSet(NamedTuple):
    """The rows that scores belong to, with the settings that made them."""

    config: MagicConfig
    rows: Rows
    places: Places
    tokenizer: Any


class Scored(NamedTuple):
    """Scores of the real tokens, [n], or of the documents that have one, [d]: float64, negative = proponent.

    records: What info.json says of each source.
    """

    values: Tensor
    per_token: bool
    records: list[dict[str, Any]]


class Native(NamedTuple):
    """A run, the query that is meant, and which of its columns, `of` in number."""

    folder: Path
    config: AttributedConfig
    manifest: Manifest
    query: str
    columns: slice
    of: int


def split_name(source: str) -> tuple[Path, str | None]:
    """PATH or PATH:part, whichever exists.

    Raises:
        ValueError: If nothing does.
    """
    path, colon, part = source.rpartition(":")
    if Path(source).exists():
        return Path(source), None
    if colon and Path(path).exists():
        return Path(path), part
    raise ValueError(
        f"scores {source!r}: nothing exists at {path or source}; give a run's folder, RUN:query, or a .pt, .npy, "
        ".parquet or .json file"
    )


def is_run(path: Path) -> bool:
    """Whether a folder is a run's."""
    return (path / "run_config.yaml").exists()


def load_data(config: SelectConfig) -> DataSet:
    """The rows of the first run among the sources, or of --rows.

    Raises:
        ValueError: If nothing says what they are, or the data have changed since the run.
    """
    runs = [path for path, _ in map(split_name, (*config.scores, *config.against)) if is_run(path)]
    if not runs and config.rows is None:
        raise ValueError(
            "scores from files do not say which rows they belong to; give --rows, a run on the same data or a YAML "
            "file with `model` and `data` as in a run_config.yaml"
        )
    where = runs[0] if runs else config.rows
    if config.rows is not None and runs and command_of(runs[0]) == "unlearn":
        where = config.rows  # they say which of its data sets
    assert where is not None
    if not is_run(where):
        given = settings_from(MagicConfig, where)
        if not (isinstance(given.model, str) and isinstance(given.data.dataset, str)):
            raise ValueError(
                f"--rows {where} has to name `model` and `data: {{dataset: …}}`, as a run_config.yaml does"
            )
        return _data_set(given)
    settings, manifest = finished(where)
    data_set = _data_set(settings if isinstance(settings, MagicConfig) else _forgotten(settings))
    _part_of(where, manifest, data_set.places)
    return data_set


def load_scores(sources: Sequence[str], data: DataSet, stated: Stated) -> Scored:
    """The mean of the sources' scores.

    Args:
        stated: What the user says of those from files.
    Raises:
        ValueError: If a source is missing, of other rows, of unstated or contradictory sign or alignment, not finite,
            or not of tokens or documents like the others.
    """
    loaded = [_load_one(source, data, stated) for source in sources]
    kinds = {scored.per_token for scored in loaded}
    if len(kinds) > 1:
        levels = ["tokens" if scored.per_token else "documents" for scored in loaded]
        listed = ", ".join(f"{source}: {level}" for source, level in zip(sources, levels))
        raise ValueError(f"scores of tokens and of documents do not mix ({listed}); give one kind")
    scores = torch.stack([scored.values for scored in loaded]).mean(0)
    return Scored(scores, kinds.pop(), [record for scored in loaded for record in scored.records])


def find_native(source: str) -> Native:
    """The run, query and columns of RUN, RUN:query or RUN:query/column.

    Raises:
        ValueError: If the run has several queries and none is named, or none of the name.
    """
    folder, part = split_name(source)
    config, manifest = finished(folder)
    names = [*queries_of(config), *recorded(folder, manifest)]
    if part is None and len(queries_of(config)) > 1:
        raise ValueError(f"{folder} has several queries: {', '.join(names)}. Name one: {folder}:{names[0]}")
    wanted = names[0] if part is None else part
    for name in names:
        columns = query_columns(folder, name)
        if wanted == name:
            return Native(folder, config, manifest, name, slice(0, len(columns)), len(columns))
        if wanted in columns:
            column = columns.index(wanted)
            return Native(folder, config, manifest, name, slice(column, column + 1), len(columns))
    raise ValueError(f"{folder} has no query {wanted!r}; it has {', '.join(names)}, and columns such as NAME/0")


def query_columns(folder: Path, query: str) -> list[str]:
    """Names of the columns of a run's query."""
    columns: list[str] = json.loads((folder / "queries" / query / "query.json").read_text(encoding="utf8"))["columns"]
    return columns


def _load_one(source: str, data: DataSet, stated: Stated) -> Scored:
    path, part = split_name(source)
    if is_run(path):
        return _of_run(source, data, stated)
    if path.is_dir() and not is_original(path):
        raise ValueError(
            f"{path} is neither a run (no run_config.yaml) nor in the original layout (no per_token_scores.pt or "
            "attribution_scores.pt); give a folder of `retrograd magic`, or a file"
        )
    scores, per_token, record = file_scores(path, part, data.places, stated)
    _refuse_not_finite(source, scores)
    return Scored(scores, per_token, [{"source": source, **record}])


def _of_run(source: str, data: DataSet, stated: Stated) -> Scored:
    native = find_native(source)
    if stated.sign == "positive" or stated.alignment == "prediction":
        raise ValueError(
            f"{source} is a run of retrograd: its scores are negative for proponents and aligned with targets, and "
            f"--{stated.prefix}sign or --{stated.prefix}alignment says otherwise; leave that out"
        )
    part = _part_of(native.folder, native.manifest, data.places)
    per_token = native.config.attribute == "tokens"
    own, folder = queries_of(native.config), native.folder
    path = folder / "scores.pt" if native.query in own else folder / "queries" / native.query / "scores.pt"
    scores = read_scores(path, per_token).double()
    start = 0
    for name in own if native.query in own else ():
        if name == native.query:
            break
        start += len(query_columns(folder, name))
    digest = file_digest(path)
    _refuse_changed(native, path, digest)
    values = scores[start + native.columns.start : start + native.columns.stop].mean(0)
    if part is not None and per_token:
        values = values[part.first_row : part.first_row + part.rows, : part.length]
    elif part is not None:
        values = values[part.first_document : part.first_document + part.documents]
    shape = data.places.shape if per_token else (data.places.documents,)
    if tuple(values.shape) != tuple(shape):
        raise ValueError(f"{path} has scores of shape {tuple(values.shape)} for data of {tuple(shape)}; run again")
    _refuse_not_finite(source, values)
    values = data.places.gather(values) if per_token else values[data.places.present()]
    record = {
        "source": source, "kind": "run", "query": native.query, "columns": native.columns.stop - native.columns.start,
        "file": str(path), "sha256": digest, "identity": native.manifest.values.get("identity"), "sign": "negative",
        "alignment": "target", "rows": "equal by hash", "level": "tokens" if per_token else "documents",
        **({} if part is None else {"part": {"side": part.side, "dataset": part.dataset}}),
    }  # fmt: skip
    return Scored(values, per_token, [record])


def _refuse_changed(native: Native, path: Path, digest: str) -> None:
    there = {digest}
    if native.query in queries_of(native.config):
        known = native.manifest.values["phases"]["scores"].get("sha256")
    else:  # asked together with others, the manifest has the hash of their common file
        known = recorded(native.folder, native.manifest)[native.query].get("sha256")
        there |= {file_digest(common) for common in (native.folder / "queries").glob("together-*/scores.pt")}
    if known is not None and known not in there:
        raise ValueError(f"{path} has SHA-256 {digest}, and its run wrote {known}: it has changed since. Run again")


def _part_of(folder: Path, manifest: Manifest, places: Places) -> Part | None:
    """Which of an unlearning's data sets the rows here are; None for a run on one data set, which they are.

    Raises:
        ValueError: If they are other rows than the run's.
    """
    known, of = manifest.values.get("hashes", {}).get("rows"), manifest.values.get("rows", {})
    parts = [Part(**values) for values in manifest.values.get("parts", ())]
    if same := [part for part in parts if part.digest == places.digest]:
        return same[0]
    if parts:
        has = ", ".join(f"{part.side} {part.dataset} ({part.digest})" for part in parts)
        raise ValueError(
            f"the data here (hash {places.digest}, {places.shape[0]} rows, {len(places)} targets) are none of those of "
            f"{folder}: {has}. Both need the same documents, tokenizer and lengths, unchanged since the run"
        )
    if known != places.digest:
        raise ValueError(
            f"the scores of {folder} are of other rows (hash {known}, {of.get('rows')} rows, {of.get('targets')} "
            f"targets) than the data here (hash {places.digest}, {places.shape[0]} rows, {len(places)} targets): both "
            "score sets need the same documents, tokenizer and lengths, unchanged since their runs"
        )
    return None


def _forgotten(config: AttributedConfig) -> MagicConfig:
    """Settings of the one data set that an unlearning forgets.

    Raises:
        ValueError: If there are several.
    """
    assert isinstance(config, UnlearnConfig)
    if len(config.forget) > 1:
        raise ValueError(
            f"{config.run} forgets {len(config.forget)} data sets, and weights are for one: say which by --rows, a "
            f"YAML file with `model: {config.model}` and `data: {{dataset: {config.forget[0]}}}`"
        )
    data = parse_source(config.forget[0], config)
    return MagicConfig(run=config.run, model=config.model, tokenizer=config.tokenizer, data=data)


def _refuse_not_finite(source: str, values: Tensor) -> None:
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise ValueError(f"{bad} of {values.numel()} scores of {source} are NaN or infinite; a selection needs all")


def _data_set(config: MagicConfig) -> DataSet:
    """The rows of a run's settings, without its model: only the model's configuration is read."""
    data = config.data
    tokenizer = load_tokenizer(config.tokenizer or config.model)
    model = read_config(config.model)
    documents = documents_of(data)
    text = model.get_text_config(decoder=True)  # of a composite model the part that reads
    longest = data.max_length or getattr(text, "max_position_embeddings", None)
    rows = build_rows(
        documents, tokenizer, text_column=data.text_column, assistant_only_loss=data.assistant_only_loss,
        max_length=None if data.chunk_length else longest, chunk_length=data.chunk_length, min_chars=data.min_chars,
    )  # fmt: skip
    return DataSet(config, rows, places_of(rows), tokenizer)
