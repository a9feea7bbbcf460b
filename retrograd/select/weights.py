"""The weights file: weights.safetensors with the token weights, and info.json with where they come from.

Whoever trains with weights reads them here, with the rows they are for: weights of another data set are refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retrograd.data.rows import Rows
from retrograd.runs.files import file_digest, read_tensors, write_json, write_tensors
from retrograd.runs.manifest import SIGN
from retrograd.select.places import Places

__all__ = ["DESCENT", "REMOVAL", "documents", "info", "read", "write"]

DESCENT = (
    "Weights of the token loss, which training descends: a positive weight lowers the token's loss, a negative weight "
    "raises it (ascent). For weighted_sft, which descends it; methods that ascend or take shares want --use removal."
)
REMOVAL = (
    "How much of the forget term a token gets: 0 or more, as many in sum as there are real tokens. A larger weight "
    "means more removal."
)


def write(folder: Path, weights: Tensor, kept: list[int] | None, places: Places, record: dict[str, Any]) -> None:
    """Write a weights file: info.json last, so that whoever sees it sees all.

    Args:
        weights: Of the real tokens, [n].
        kept: Ids of the documents that are kept, for a selection of documents.
        record: What info.json says besides.
    """
    rows, length = places.shape
    data = {
        "rows": rows, "length": length, "real_tokens": len(places), "documents": places.documents,
        "digest": places.digest,
    }  # fmt: skip
    tensors = {"weights": places.scatter(weights).float()}
    if kept is not None:
        tensors["documents"] = torch.tensor(kept, dtype=torch.int64)
    path = folder / "weights.safetensors"
    write_tensors(path, tensors, {"rows": places.digest})
    said = {"sign_of_scores": SIGN, "meaning": DESCENT if record["use"] == "descent" else REMOVAL}
    write_json(folder / "info.json", {**said, "data": data, "sha256": file_digest(path), **record})


def info(path: Path) -> dict[str, Any]:
    """What info.json says of a weights file, the folder or the file in it.

    Raises:
        ValueError: If there is none, or the weights have changed since it was written.
    """
    folder = path.parent if path.name == "weights.safetensors" else path
    try:
        stored = json.loads((folder / "info.json").read_text(encoding="utf8"))
        data, sha256 = stored["data"], stored["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = "its info.json is missing or broken" if folder.exists() else "it does not exist"
        raise ValueError(
            f"{path} is no weights file of `retrograd select`: {what}. Give the OUT of a `retrograd select`"
        ) from error
    file = folder / "weights.safetensors"
    if not file.exists() or file_digest(file) != sha256:
        there = f"has SHA-256 {file_digest(file)}" if file.exists() else "is missing"
        raise ValueError(
            f"{file} {there}, and its info.json was written for {sha256} ({data['real_tokens']} real tokens): select "
            "again"
        )
    return stored


def read(path: Path, rows: Rows, *, signed: bool = True) -> Tensor:
    """Weights of every token, [rows, length] float32, 0 at padding and whatever is no target.

    Args:
        path: The folder, or the file in it.
        rows: What they are to weigh.
        signed: Whether the method takes negative weights.
    Raises:
        ValueError: If they are weights of another data set, none at all, or negative where that is refused.
    """
    said = info(path)
    data, digest = said["data"], rows.digest()[:16]
    if data["digest"] != digest:
        raise ValueError(
            f"{path} weighs another data set: {data['rows']} rows of up to {data['length']} tokens, "
            f"{data['real_tokens']} of them targets (hash {data['digest']}); these are {len(rows)} rows of up to "
            f"{rows.max_length}, {rows.targets} targets (hash {digest}). Take the data set, tokenizer and lengths of "
            "the scores, or select from scores of these rows"
        )
    weights = read_tensors(path if path.is_file() else path / "weights.safetensors")[0]["weights"]
    negative = int((weights < 0).sum())
    if negative and not signed:
        raise ValueError(
            f"{negative} of {data['real_tokens']} weights in {path} are negative, which means ascent on the token "
            "loss, and this method takes none: select with --use removal, which gives proponents weights above 0"
        )
    return weights


def documents(path: Path) -> list[int]:
    """Ids of the documents that a selection keeps, ascending: positions in the data set of the scores.

    Raises:
        ValueError: If it is no selection of documents.
    """
    said = info(path)
    tensors = read_tensors(path if path.is_file() else path / "weights.safetensors")[0]
    if "documents" not in tensors:
        raise ValueError(f"{path} has token weights by rule {said['rule']}; documents are kept by --rule documents")
    return tensors["documents"].tolist()
