"""Scores in files: the original layout, and whatever another method wrote, with a stated sign and alignment.

The original files are aligned with the predicting position: column t has the score of predicting token t + 1. Ours are
aligned with the target, ours[:, 1:] = theirs[:, :-1] and ours[:, 0] = 0. What is stated is held against the zeros: a
score where nothing is predicted (a row's first token, padding, unsupervised tokens) means another alignment.

Beside the scores the original layout has eval_grads.pt, the query's gradient at the trained model: {"param_grads": by
parameter, "avg_loss": the query's value, "n_chunks": the batches it was a mean of}.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from retrograd.core.optim import Params
from retrograd.runs.files import file_digest, write_atomic, write_json, write_torch
from retrograd.select.json_scores import json_scores
from retrograd.select.places import Places
from retrograd.settings.select import Alignment, Sign

__all__ = [
    "read_array",
    "Stated", "file_scores", "is_original", "original_gradient", "to_prediction", "to_target", "write_original",
]  # fmt: skip

ORIGINAL = ("per_token_scores.pt", "attribution_scores.pt")
GRADIENT = "eval_grads.pt"
_FIELDS = {"param_grads", "avg_loss", "n_chunks"}
WORDS = {
    "negative": "negative for proponents (training on them lowers the query loss)",
    "positive": "positive for proponents (training on them lowers the query loss)",
}


class Stated(NamedTuple):
    """What is known of a file's scores; prefix: of the flags that say it, "" or "against_".

    by_end: Whether the flag of the sign is --higher_is, which names what high scores mean.
    """

    sign: Sign | None = None
    alignment: Alignment | None = None
    prefix: str = ""
    by_end: bool = False

    def flag(self, name: str, value: str) -> str:
        """How a user says so."""
        if name == "sign" and self.by_end:
            return f"--higher_is {'detractor' if value == 'negative' else 'proponent'}"
        return f"--{self.prefix}{name} {value}"

    @property
    def remedy(self) -> str:
        """What to do where scores are of other rows."""
        return "Give scores of this run's rows" if self.by_end else "Score these rows, or give the right --rows"


class _Table(NamedTuple):
    """values: [documents], or [rows, length]; listed: where there is a score, like values; None for everywhere."""

    values: Tensor
    listed: Tensor | None = None


def is_original(path: Path) -> bool:
    """Whether a folder is in the original layout."""
    return any((path / name).exists() for name in ORIGINAL)


def to_target(scores: Tensor) -> Tensor:
    """Prediction-aligned → target-aligned, [rows, length]: column t moves to t + 1, the last one is dropped."""
    return torch.cat([torch.zeros_like(scores[:, :1]), scores[:, :-1]], 1)


def to_prediction(scores: Tensor) -> Tensor:
    """Target-aligned → prediction-aligned, [rows, length]."""
    return torch.cat([scores[:, 1:], torch.zeros_like(scores[:, :1])], 1)


def file_scores(path: Path, column: str | None, places: Places, stated: Stated) -> tuple[Tensor, bool, dict[str, Any]]:
    """Scores of a file or of a folder in the original layout.

    Args:
        column: Of several.
    Returns:
        Scores of the real tokens, [n], or documents, [d], negative = proponent; whether of tokens; what info.json says.
    Raises:
        ValueError: If sign or alignment is not stated, contradicts the file, or the shape fits no data here.
    """
    file = _original_file(path, places) if path.is_dir() else path
    stated, said = _agreed(path, stated, _own_words(file, path.is_dir()), places)
    table = _read(file, column, places)
    per_token = table.values.ndim == 2
    if stated.sign is None:
        raise ValueError(
            f"{file} does not say which sign a proponent has; say {stated.flag('sign', 'negative')} if its scores are "
            f"{WORDS['negative']}, or {stated.flag('sign', 'positive')} if they are {WORDS['positive']}"
        )
    scores = _aligned(file, table, stated, places) if per_token else _documents(file, table, places)
    record: dict[str, Any] = {
        "kind": "original layout" if path.is_dir() else "file", "file": str(file), "sha256": file_digest(file),
        "column": column, "sign": stated.sign, "alignment": stated.alignment if per_token else None,
        "level": "tokens" if per_token else "documents", "rows": said,
    }  # fmt: skip
    if path.is_dir() and (path / GRADIENT).exists():
        saved = _saved_gradient(path)
        about = {"file": str(path / GRADIENT), "sha256": file_digest(path / GRADIENT)}
        record["query_gradient"] = {**about, "avg_loss": float(saved["avg_loss"]), "n_chunks": int(saved["n_chunks"])}
    return (scores if stated.sign == "negative" else -scores), per_token, record


def original_gradient(folder: Path, params: Params) -> Params:
    """The query's gradient of a folder in the original layout, by the parameters of the model that was trained.

    Raises:
        ValueError: If there is none, or it is not of these parameters.
    """
    if not (folder / GRADIENT).exists():
        raise ValueError(f"{folder} has no {GRADIENT}, the gradient of its query; leave gradient_cosine out")
    gradients = {
        name.replace(".parametrizations.", ".").removesuffix(".original"): g  # as sharded originals name them
        for name, g in _saved_gradient(folder)["param_grads"].items()
    }
    if missing := [name for name in params if name not in gradients]:
        raise ValueError(f"{folder / GRADIENT} has no gradient of {missing[0]}: it is of another model than --rows")
    if apart := [name for name, theta in params.items() if gradients[name].shape != theta.shape]:
        name = apart[0]
        raise ValueError(
            f"{folder / GRADIENT}: the gradient of {name} is {tuple(gradients[name].shape)} and the parameter "
            f"{tuple(params[name].shape)}: another model's, or one process's share of a sharded run, as the original "
            "saved it; join the shares"
        )
    if bad := [name for name in params if not torch.isfinite(gradients[name]).all()]:
        raise ValueError(f"{folder / GRADIENT}: the gradient of {bad[0]} is not finite")
    return {name: gradients[name].double() for name in params}


def _saved_gradient(folder: Path) -> dict[str, Any]:
    """What eval_grads.pt holds; its tensors stay on disk until they are looked at."""
    path = folder / GRADIENT
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except Exception as error:  # torch raises what it likes for a broken file
        raise ValueError(f"cannot read {path}: {type(error).__name__}: {error}") from error
    if not isinstance(saved, dict) or not saved.keys() >= _FIELDS or not isinstance(saved["param_grads"], dict):
        raise ValueError(f"{path} is not in the original layout, which has {', '.join(sorted(_FIELDS))}")
    return saved


def write_original(
    folder: Path, scores: Tensor, alignment: Alignment, places: Places, query: tuple[float, Params] | None = None
) -> None:
    """Scores of the real tokens, [n], in the original layout, with an info.json that says sign and alignment.

    Args:
        query: Value and gradient of the query at the trained model, for eval_grads.pt; not written when None.
    """
    grid = places.scatter(scores)
    aligned = to_prediction(grid) if alignment == "prediction" else grid
    for name in ORIGINAL:
        write_torch(folder / name, aligned.float())
    if query is not None:
        value, gradient = query
        saved = {"param_grads": {name: g.float() for name, g in gradient.items()}, "avg_loss": value, "n_chunks": 1}

        def fill(temporary: Path) -> None:
            with temporary.open("wb") as file:  # a file's own name would go into its bytes
                torch.save(saved, file)

        write_atomic(folder / GRADIENT, fill)
    meaning = f"Scores are {WORDS['negative']}."
    write_json(
        folder / "info.json",
        {"meaning": meaning, "sign": "negative", "alignment": alignment, "rows": places.digest},
    )


def _original_file(folder: Path, places: Places) -> Path:
    files = [folder / name for name in ORIGINAL if (folder / name).exists()]
    if len(files) == 2 and file_digest(files[0]) != file_digest(files[1]):
        first, second = (_read(file, None, places).values for file in files)
        if first.shape != second.shape or not torch.equal(first, second):
            raise ValueError(f"{files[0]} and {files[1].name} differ, and one is to be the other's copy; name one file")
    return files[0]


def _own_words(file: Path, original: bool) -> dict[str, str]:
    """What a file says of itself: info.json beside it, or the table's own words."""
    path, said = file.parent / "info.json", dict[str, str]()
    if path.exists():
        try:
            said = json.loads(path.read_text(encoding="utf8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}; mend or delete it") from error
        allowed = {"sign": ("negative", "positive"), "alignment": ("target", "prediction"), "rows": None}
        said = {
            name: value
            for name, value in said.items()
            if isinstance(value, str) and name in allowed and value in (allowed[name] or (value,))
        }
    if file.suffix == ".parquet":
        import pyarrow.parquet as pq

        meaning = (pq.read_schema(file).metadata or {}).get(b"meaning", b"").decode()
        if "Negative: a proponent" in meaning:
            said = {**said, "sign": "negative", "alignment": "target"}
    if original:
        said = {"sign": "negative", **said}
    return said


def _agreed(path: Path, stated: Stated, said: dict[str, str], places: Places) -> tuple[Stated, str]:
    """The stated and the said as one; and how the rows were compared."""
    for name in ("sign", "alignment"):
        mine, own = getattr(stated, name), said.get(name)
        if mine is not None and own is not None and mine != own:
            raise ValueError(
                f"{stated.flag(name, mine)} contradicts {path}, which says {name} {own}"
                + (" (the original layout: derivatives of the query loss)" if name == "sign" else "")
                + "; leave it out, or name the file alone if what is beside it is wrong"
            )
    if said.get("rows") not in (None, places.digest):
        raise ValueError(
            f"{path} says that its scores are of the rows with hash {said['rows']}, and the data here have hash "
            f"{places.digest} ({places.shape[0]} rows, {len(places)} real tokens). {stated.remedy}"
        )
    checked = "equal by hash" if said.get("rows") else "by shape and zeros alone"
    filled: Any = {name: getattr(stated, name) or said.get(name) for name in ("sign", "alignment")}
    return stated._replace(**filled), checked


def _read(file: Path, column: str | None, places: Places) -> _Table:
    reader: Callable[[Path, str | None, Places], _Table] | None = {
        ".pt": _of_tensor, ".npy": _of_tensor, ".parquet": _of_parquet, ".json": _of_json,
    }.get(file.suffix)  # fmt: skip
    if reader is None:
        raise ValueError(f"{file}: scores are read from .pt, .npy, .parquet and .json files; convert it")
    try:
        return reader(file, column, places)
    except ValueError:
        raise
    except Exception as error:  # torch, numpy and pyarrow raise what they like for a broken file
        raise ValueError(f"cannot read scores from {file}: {type(error).__name__}: {error}") from error


def read_array(file: Path) -> Any:
    """What a .npy or .pt file holds, mapped and not yet read: a tensor, if it is one of scores.

    Raises:
        ValueError: If it is no array of numbers, or broken.
    """
    try:
        if file.suffix == ".npy":
            return torch.from_numpy(np.load(file, mmap_mode="c", allow_pickle=False))
        return torch.load(file, weights_only=True, map_location="cpu", mmap=zipfile.is_zipfile(file))  # not old files
    except Exception as error:  # numpy and torch raise what they like for a broken file, ValueError too
        raise ValueError(
            f"{file} holds no array of numbers that can be read ({type(error).__name__}: {error}): write it whole, as "
            "floats, without pickled objects"
        ) from error


def _of_tensor(file: Path, column: str | None, places: Places) -> _Table:
    scores = read_array(file)
    if not isinstance(scores, Tensor) or scores.ndim not in (1, 2, 3) or scores.is_complex():
        what = f"{tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(
            f"{file} holds {what}; scores are one tensor, [documents] or [rows, length], with columns last"
        )
    if column is not None or scores.ndim == 3:
        columns = scores.shape[-1] if scores.ndim > 1 else 1
        if column is None or not column.isdecimal() or int(column) >= columns:
            raise ValueError(f"{file} has {columns} columns of scores; name one as {file}:0, not {column!r}")
        scores = scores[..., int(column)] if scores.ndim > 1 else scores
    return _Table(scores.double())


def _of_parquet(file: Path, column: str | None, places: Places) -> _Table:
    import pyarrow.parquet as pq

    name = column or "score"
    columns = pq.read_schema(file).names
    keys = [key for key in ("row", "position", "doc_id", "token_id") if key in columns]
    by_token = {"row", "position"} <= set(keys)
    if name not in columns or not (by_token or "doc_id" in keys):
        raise ValueError(
            f"{file} has the columns {', '.join(columns)}; scores of tokens need row, position and {name}, of "
            f"documents doc_id and {name}. Name the column of scores as {file}:NAME"
        )
    table = {key: pq.read_table(file, columns=[key])[key].to_numpy() for key in (*keys, name)}
    scores = torch.from_numpy(table[name].astype(np.float64))
    index = [table[key].astype(np.int64) for key in (("row", "position") if by_token else ("doc_id",))]
    shape = places.shape if by_token else (places.documents,)
    outside = sum(int(((at < 0) | (at >= size)).sum()) for at, size in zip(index, shape))
    if outside:
        raise ValueError(f"{file}: {outside} of {len(scores)} lines point outside the data of {shape}; other data?")
    if by_token and "token_id" in table:
        _refuse_other_tokens(file, index, table["token_id"], places)
    grid, listed = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    grid[tuple(torch.from_numpy(at) for at in index)] = scores
    listed[tuple(torch.from_numpy(at) for at in index)] = 1
    if int(listed.sum()) != len(scores):
        raise ValueError(f"{file} has {len(scores)} lines for {int(listed.sum())} different places; one line for each")
    return _Table(grid, listed)


def _of_json(file: Path, column: str | None, places: Places) -> _Table:
    content = json.loads(file.read_text(encoding="utf8"))
    scores, listed = json_scores(file, content, column, places.documents)
    return _Table(scores, listed)


def _refuse_other_tokens(file: Path, index: list[np.ndarray], tokens: np.ndarray, places: Places) -> None:
    known = places.scatter(places.token + 1)  # 0 where there is no real token
    there = known[torch.from_numpy(index[0]), torch.from_numpy(index[1])].numpy()
    wrong = int(((there != 0) & (there != tokens + 1)).sum())
    if wrong:
        raise ValueError(f"{file}: {wrong} of {len(tokens)} token ids are not those of the data here; other rows?")


def _aligned(file: Path, table: _Table, stated: Stated, places: Places) -> Tensor:
    """Target-aligned scores of the real tokens, [n]; refused where the zeros say otherwise."""
    if stated.alignment is None:
        raise ValueError(
            f"{file} has scores of tokens and does not say what they are aligned with; say --{stated.prefix}alignment "
            "prediction if column t has the score of predicting token t + 1 (as in the original files), or target if "
            "it has the score of predicting token t"
        )
    scores, (rows, length) = table.values, places.shape
    if scores.shape[0] != rows or scores.shape[1] < length:
        raise ValueError(
            f"{file} has scores of {scores.shape[0]} rows of {scores.shape[1]} tokens, and the data here are {rows} "
            f"rows of up to {length}: {len(places)} real tokens. {stated.remedy}"
        )
    counts = {}
    for alignment in ("target", "prediction"):
        moved = to_target(scores) if alignment == "prediction" else scores
        dropped = int((scores[:, -1] != 0).sum()) if alignment == "prediction" else 0
        counts[alignment] = places.outside(moved[:, :length]) + int((moved[:, length:] != 0).sum()) + dropped
    other = "target" if stated.alignment == "prediction" else "prediction"
    if counts[stated.alignment]:
        fits = f"as {other}-aligned they fit: say --{stated.prefix}alignment {other}" if not counts[other] else (
            f"as {other}-aligned, at {counts[other]}; these are scores of other rows, or padding was scored"
        )  # fmt: skip
        raise ValueError(
            f"{file} taken as {stated.alignment}-aligned has scores at {counts[stated.alignment]} places where no "
            f"token is predicted (first tokens, padding, unsupervised ones); {fits}"
        )

    def at_targets(x: Tensor) -> Tensor:
        return places.gather((to_target(x) if stated.alignment == "prediction" else x)[:, :length])

    if table.listed is not None and (missing := int((at_targets(table.listed) == 0).sum())):
        raise ValueError(f"{file} has no line for {missing} of {len(places)} real tokens; a selection needs all")
    return at_targets(scores)


def _documents(file: Path, table: _Table, places: Places) -> Tensor:
    """Scores of the documents that have a real token, [d], of all documents' or of theirs alone."""
    scores, present = table.values, places.present()
    if table.listed is not None and (missing := int((table.listed[present] == 0).sum())):
        raise ValueError(f"{file} has no score for {missing} of {len(present)} documents that are trained on; give all")
    if len(scores) == places.documents:
        return scores[present]
    if len(scores) == len(present):
        return scores
    raise ValueError(
        f"{file} has {len(scores)} scores, and the data here are {places.documents} documents, {len(present)} of them "
        "with a real token; give a score for each"
    )
