"""Documents from a file, a folder or the hub, in their original order.

A document's id is its position in what `load_documents` returns. Every score is reported under that id, so nothing
here drops, reorders or merges documents: blank lines of a text file stay, "NA" in a CSV file stays the text "NA", text
that looks like a date stays text, and a cached conversion is reused only for the same bytes.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrograd.data.files import PACKED, format_of
from retrograd.data.json_files import json_rows
from retrograd.data.readers import READ
from retrograd.data.tables import RowsOf, read_rows
from retrograd.data.text_files import csv_rows, text_rows, tsv_rows
from retrograd.settings.question import Source, names_of

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["EXCERPT", "documents_of", "load_documents"]

EXCERPT = 200  # characters of a document that are shown for it

# suffix → what reads its rows; `datasets` reads parquet
_FORMATS: dict[str, RowsOf | None] = {
    ".jsonl": json_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".tsv": tsv_rows,
    ".parquet": None,
    ".txt": text_rows,
}
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


def load_documents(
    source: str, *, split: str = "train", subset: str | None = None, limit: int | None = None,
    columns: Sequence[str] = (),
) -> Dataset:  # fmt: skip
    """Load the documents of one split, in their original order.

    A source that exists on this machine is never looked up on the hub.

    Args:
        source: A folder written by `save_to_disk`; a .jsonl, .json, .csv, .tsv, .parquet or .txt file (text: one
            document per line, blank lines included; CSV: every column is text; JSON: every value is what is written),
            all but .parquet also with .gz or .zst behind, which counts as split "train"; a folder of such files, whose
            names say their split as on the hub; else the name of a data set on the hub.
        split: A split or an expression of splits: "train[:8]", "train[10%:20%]", "train[:4]+test[:4]".
        subset: Name of the subset ("configuration"), for hub data sets and folders whose README.md declares some.
        limit: Keep only the first `limit` documents.
        columns: What columns are, as in "prompt=question": they get these names, and others that would be read in
            their stead are left out.
    Raises:
        ValueError: If the source, split, subset or a column does not exist, holds no document, or cannot be read.

    Example:
        >>> import tempfile, pathlib
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "notes.txt"
        >>> _ = file.write_text("one\\n\\nthree\\n")
        >>> load_documents(str(file), split="train[1:]")["text"][:]
        ['', 'three']
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it keeps the first documents, so it must be at least 1, or None for all")
    path = Path(source).expanduser()
    with _quiet():
        if path.exists():
            documents = _load_local(path, split, subset)
        elif _looks_local(source):
            raise ValueError(
                f"{source!r} looks like a local path, and nothing exists there (current folder: {Path.cwd()}). Check "
                "the spelling, or give a hub name such as 'owner/name'."
            )
        else:
            documents = _load_hub(source, split, subset)
    if len(documents) == 0:
        raise ValueError(
            f"split {split!r} of {source!r} is empty: 0 documents. Give a source with documents, or a wider split."
        )
    documents = documents if limit is None else documents.select(range(min(limit, len(documents))))
    return _renamed(documents, columns) if columns else documents


def documents_of(source: Source) -> Dataset:
    """The documents of a source's settings; errors as `load_documents`."""
    assert source.dataset is not None, "checked by the settings"
    if source.text_column and source.columns:
        raise ValueError(
            f"text_column {source.text_column!r} and columns {', '.join(source.columns)}: give one of them, such as "
            f"columns text={source.text_column}"
        )
    return load_documents(
        source.dataset, split=source.split, subset=source.subset, limit=source.limit, columns=source.columns
    )


def _renamed(documents: Dataset, columns: Sequence[str]) -> Dataset:
    wanted = names_of(columns)
    if missing := [name for name in wanted.values() if name not in documents.column_names]:
        raise ValueError(f"no column {missing[0]!r}; the data set has {', '.join(documents.column_names)}")
    partners = {name for group in _GROUPS if group & wanted.keys() for name in group}
    rivals = (set(READ) - partners if wanted.keys() & set(READ) else set()) | wanted.keys()
    left = [name for name in documents.column_names if name in wanted.values() or name not in rivals]
    return documents.select_columns(left).rename_columns({name: role for role, name in wanted.items()})


_GROUPS = (
    {"input_ids", "labels", "attention_mask"},
    {"messages", "tools"},
    {"prompt", "completion", "tools"},
    {"text"},
)


def _looks_local(source: str) -> bool:
    """Whether no hub data set could have this name."""
    return format_of(Path(source)) in _FORMATS or _HUB_NAME.fullmatch(source) is None


def _load_hub(source: str, split: str, subset: str | None) -> Dataset:
    import datasets

    try:
        return datasets.load_dataset(source, subset, split=split)
    except Exception as error:
        reason = _reason(error)
        wanted = f"{source!r}, split {split!r}" + ("" if subset is None else f", subset {subset!r}")
        if isinstance(error, ValueError) and "config" in str(error).lower():
            raise ValueError(f"the hub cannot give {wanted}: choose another subset. {reason}") from error
        if isinstance(error, ValueError) and "split" in str(error).lower():
            raise ValueError(f"the hub cannot give {wanted}: choose another split. {reason}") from error
        raise ValueError(
            f"cannot load {wanted}: there is no such local path, and the hub failed. Check the spelling and the "
            f"network, or give a local file or folder. {reason}"
        ) from error


def _load_local(path: Path, split: str, subset: str | None) -> Dataset:
    several, single = (path / "dataset_dict.json").is_file(), (path / "state.json").is_file()
    if subset is not None and (several or single or path.is_file()):
        raise ValueError(
            f"subset {subset!r}: {path} has no subsets, only hub data sets and folders have. Leave it out."
        )
    if single:
        return _take(dict([_load_saved(path)]), path, split)
    if several:
        names = json.loads((path / "dataset_dict.json").read_text())["splits"]
        return _take({name: _load_saved(path / name)[1] for name in _wanted(path, split, names)}, path, split)
    files = _folder_files(path.resolve(), subset) if path.is_dir() else {"train": [path.absolute()]}
    return _take({name: _load_files(files[name]) for name in _wanted(path, split, list(files))}, path, split)


def _wanted(path: Path, split: str, names: list[str]) -> list[str]:
    """Splits that the expression uses: the others are not read, whatever their state."""
    used = {part.splitname for part in _parts(path, split, dict.fromkeys(names, 100))}
    return [name for name in names if name in used]


def _parts(path: Path, split: str, lengths: dict[str, int]) -> list[Any]:
    """The expression `split` as (splitname, from_, to) records, for splits of these lengths."""
    import datasets

    try:
        return datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        raise ValueError(f"split {split!r} of {path}: {error} Splits there: {', '.join(lengths)}.") from error


def _take(splits: dict[str, Dataset], path: Path, split: str) -> Dataset:
    import pyarrow

    parts = _parts(path, split, {name: len(documents) for name, documents in splits.items()})
    taken = [splits[part.splitname].select(range(part.from_, part.to)) for part in parts]
    try:
        return taken[0] if len(taken) == 1 else _joined(taken)
    except (ValueError, TypeError, pyarrow.ArrowException) as error:
        raise ValueError(
            f"split {split!r} of {path}: its parts have different columns, so they do not join. {error}"
        ) from error


def _load_saved(folder: Path) -> tuple[str, Dataset]:
    """A data set written by `save_to_disk`, and the name of its split."""
    import datasets

    try:
        saved = datasets.Dataset.load_from_disk(str(folder))
    except Exception as error:
        raise ValueError(
            f"{folder} looks written by `save_to_disk` but cannot be read: empty, or damaged. Save it again. "
            f"{_reason(error)}"
        ) from error
    # a slice is saved under its expression: "test[:8]" is still "test", and "train+test" is neither
    name = re.fullmatch(r"(\w+)(\[[^+]*)?", str(saved.split or "train"))
    return name[1] if name else "train", saved


def _folder_files(folder: Path, subset: str | None) -> dict[str, list[Path]]:
    """Data files of each split, found and named as `datasets` does for a folder or a repository."""
    import datasets

    try:
        builder = datasets.load_dataset_builder(str(folder), subset)
    except ValueError as error:
        raise ValueError(f"subset {subset!r} of folder {folder}: {_reason(error)}") from error
    except Exception as error:
        raise ValueError(
            f"folder {folder} holds no data files; put {', '.join(_FORMATS)} files there, or name one file. "
            f"{_reason(error)}"
        ) from error
    files = {str(name): [Path(file) for file in paths] for name, paths in builder.config.data_files.items()}
    taken = {file for paths in files.values() for file in paths}
    for file in taken:
        if format_of(file) not in _FORMATS:
            raise ValueError(f"folder {folder} holds {file.name}; documents come from {', '.join(_FORMATS)} files")
    if subset is None:
        _warn_left_out(folder, taken)
    return files


def _warn_left_out(folder: Path, taken: set[Path]) -> None:
    """Beside train.jsonl, a file with no split in its name, or of another format, is left out without a word."""
    from datasets.data_files import FILES_TO_IGNORE

    files = [file for file in sorted(folder.rglob("*")) if format_of(file) in _FORMATS and file not in taken]
    hidden = [file for file in files if any(part.startswith((".", "__")) for part in file.relative_to(folder).parts)]
    left_out = [file.name for file in files if file not in hidden and file.name not in FILES_TO_IGNORE]
    if left_out:
        warnings.warn(
            f"folder {folder}: {len(left_out)} data files belong to no split and are left out ({left_out[0]} first); "
            f"{len(taken)} are used. Put the split in their names, or name one file.",
            stacklevel=5,
        )


def _load_files(files: list[Path]) -> Dataset:
    """One split's files, of one format, one after the other."""
    import datasets

    files = [file for file in files if file.stat().st_size > 0]  # an empty file breaks the guess at the columns
    if not files:
        return datasets.Dataset.from_dict({"text": []})
    for file in files:
        _check_suffix(file, files[0])
    rows_of = _FORMATS[format_of(files[0])]
    # `datasets` knows a changed local file by its modification time alone, so the bytes go into the address
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "retrograd" / _digest(files)
    try:
        if rows_of is not None:
            return read_rows(rows_of, files, cache / rows_of.__name__)
        try:
            return _parquet(files, cache)
        except Exception:
            if len(files) == 1:
                raise
            return _joined([_parquet([file], cache) for file in files])  # of other columns than the first
    except Exception as error:
        names = files[0].name if len(files) == 1 else f"{files[0].name} … {files[-1].name} ({len(files)} files)"
        fault = error if isinstance(error, ValueError) and rows_of is not None else _reason(error.__cause__ or error)
        raise ValueError(f"cannot read {names} in {files[0].parent}: {fault}") from error


def _parquet(files: list[Path], cache: Path) -> Dataset:
    import datasets

    names = [glob.escape(str(file)) for file in files]
    return datasets.load_dataset("parquet", data_files=names, split="train", cache_dir=str(cache))


def _joined(parts: list[Dataset]) -> Dataset:
    """Parts one after the other; a column of other types in some of them holds each value as it was.

    Raises:
        ValueError: If a value is of a kind that has no such form.
    """
    import datasets

    kinds: dict[str, list[Any]] = {}
    for part in parts:
        for name, feature in part.features.items():
            if feature != datasets.Value("null") and feature not in kinds.setdefault(name, []):
                kinds[name].append(feature)
    mixed = [name for name, features in kinds.items() if len(features) > 1]
    return datasets.concatenate_datasets([_as_written(part, mixed) for part in parts])


def _as_written(part: Dataset, names: list[str]) -> Dataset:
    import datasets

    for name in names:
        if name in part.column_names and part.features[name] != datasets.Json():
            values = part.with_format(None)[name][:]
            json.dumps(values)  # `datasets` would turn dates into numbers without a word
            column = datasets.Dataset.from_dict({name: values}, features=datasets.Features({name: datasets.Json()}))
            part = datasets.concatenate_datasets([part.remove_columns(name), column], axis=1)
    return part


def _check_suffix(file: Path, first: Path) -> None:
    suffix = format_of(file)
    if suffix not in _FORMATS or (suffix == ".parquet" and file.suffix.lower() in PACKED):
        raise ValueError(
            f"{file} is of no known kind; documents come from {', '.join(_FORMATS)} files, texts among them with "
            f"{' or '.join(PACKED)} behind. Rename or convert it."
        )
    if _FORMATS[suffix] != _FORMATS.get(format_of(first)):
        raise ValueError(f"{first.parent}: one split mixes {first.name} and {file.name}; give it files of one format")


def _digest(files: list[Path]) -> str:
    """Hash of the files' bytes and boundaries."""
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            total.update(hashlib.file_digest(opened, "sha256").digest())
    return total.hexdigest()[:32]


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars or log lines: failures are raised, with their reason."""
    import datasets

    loggers = [logging.getLogger("datasets"), logging.getLogger("huggingface_hub")]
    levels = [logger.level for logger in loggers]
    bars = not datasets.are_progress_bars_disabled()
    if bars:
        datasets.disable_progress_bars()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
