"""The file of a grid: recipes of `retrograd magic` that differ in some settings, each attributed and validated.

    grid: {train.lr: [1e-4, 4e-4], train.eps_root: [1e-8, 1e-6]}      every combination is a run
    subsets: 32                                                       of `retrograd validate`
    model: gpt2                                                       and all else is of `retrograd magic`

No heavy imports here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retrograd.settings.parse import build, read_named, read_yaml

__all__ = ["GridSpec", "is_grid", "read_grid"]

_TAKEN = ("run", "config", "overwrite", "query_file", "trust_code")


@dataclass(frozen=True)
class GridSpec:
    """What a file says."""

    grid: dict[str, tuple[Any, ...]]
    """Values of each setting that varies, by its name: train.lr, train.batch_size, …"""
    settings: dict[str, Any]
    """Of `retrograd magic`, for all runs: model, data, query, train, …"""
    subsets: int = 32
    """Random sets without which each recipe is trained again, as `retrograd validate --subsets`."""
    fraction: float = 0.05
    """Share of the documents in each."""
    h: float = 0.1
    """Of metasmoothness, as `retrograd metasmoothness --h`."""
    threads: int = 1
    """Of every worker."""


def is_grid(path: Path) -> bool:
    """Whether a file is one of these, and no experiment with arms."""
    return "grid" in read_yaml(path)


def read_grid(path: Path, names: tuple[str, ...] = ()) -> GridSpec:
    """A grid from its file.

    Raises:
        ValueError: If the file is none, or anything in it cannot work as far as is known before data are read.
    """
    values = read_named(path, names)
    axes = values.get("grid")
    if not isinstance(axes, dict) or not axes or not all(isinstance(given, list) and given for given in axes.values()):
        raise ValueError(f"{path}: grid is {axes!r}; write each setting with its values: {{train.lr: [1e-4, 1e-3]}}")
    axes = values["grid"] = {name: [_number(value) for value in given] for name, given in axes.items()}
    for name, given in axes.items():
        if len({str(value) for value in given}) < len(given):
            raise ValueError(f"{path}: grid: {name} has a value twice: {given}; give each once")
    own = {f.name for f in dataclasses.fields(GridSpec)} - {"settings"}
    settings = {name: value for name, value in values.items() if name not in own}
    if taken := [name for name in settings if name in _TAKEN]:
        raise ValueError(f"{path}: {taken[0]} is set by the experiment itself; leave it out")
    spec: GridSpec = build(
        GridSpec, {**{name: values[name] for name in own if name in values}, "settings": settings}, str(path)
    )
    if spec.subsets < 3 or not 0 < spec.fraction < 1 or spec.threads < 1 or not spec.h > 0:
        raise ValueError(
            f"{path}: subsets is {spec.subsets}, fraction {spec.fraction}, h {spec.h}, threads {spec.threads}: at "
            "least 3 subsets of a share between 0 and 1, h above 0, at least 1 thread"
        )
    return spec


def _number(value: Any) -> Any:
    """YAML reads 1e-4 as a text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
