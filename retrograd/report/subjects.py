"""What a page is about: folders that other commands have left, read as they lie there.

    Attribution   a run with scores, of `retrograd magic` or `retrograd unlearn --attribute`
    Training      a run of `retrograd train` or `retrograd unlearn`
    Evaluation    a folder of `retrograd evaluate`
    Experiment    a folder of `retrograd experiment`
    Attack        a folder of `retrograd attack`
    Hardened      a folder of `retrograd harden`
    Several       all of a page's, where there is more than one

Nothing is loaded but files: no model, no tokenizer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from retrograd.attack.folder import read_folder
from retrograd.report.scores import (
    MOST_TOKENS,
    Documents,
    Tokens,
    count_tokens,
    read_columns,
    read_documents,
    read_tokens,
)
from retrograd.runs.journal import read_evaluations, read_journal
from retrograd.settings.parse import read_yaml

__all__ = [
    "Attack", "Attribution", "Evaluation", "Experiment", "Hardened", "Several", "Subject", "Training", "open_subject",
]  # fmt: skip


MOST_COLUMNS = 32  # query columns of a run


@dataclass(frozen=True)
class Subject:
    """A folder, with the name that the page gives it."""

    folder: Path
    name: str

    def read(self, name: str) -> Any:
        """A JSON file of the folder; None if it is not there."""
        path = self.folder / name
        return json.loads(path.read_text(encoding="utf8")) if path.exists() else None


@dataclass(frozen=True)
class _Run(Subject):
    @cached_property
    def config(self) -> dict[str, Any]:
        return read_yaml(self.folder / "run_config.yaml")

    @cached_property
    def manifest(self) -> dict[str, Any]:
        return self.read("manifest.json") or {}

    @cached_property
    def journal(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Lines of the training and of the sweep, by step."""
        path = self.folder / "metrics.jsonl"
        return read_journal(path) if path.exists() else ([], [])

    @cached_property
    def evaluations(self) -> dict[int, dict[str, Any]]:
        """What was found on the way, by step."""
        path = self.folder / "metrics.jsonl"
        return read_evaluations(path) if path.exists() else {}

    @property
    def command(self) -> str:
        return self.manifest.get("command", "magic")


class Attribution(_Run):
    """A run with scores, with the queries that were added to it."""

    @cached_property
    def data_sets(self) -> list[tuple[int, str]]:
        """(first document, name) of each data set whose rows are trained on, by first document."""
        if "data" in self.config:
            return [(0, str(self.config["data"]["dataset"]))]
        return sorted((part["first_document"], part["dataset"]) for part in self.manifest.get("parts", []))

    def data_set(self, document: int) -> str:
        """The data set that a document is from."""
        return [name for first, name in self.data_sets if first <= document][-1]

    @cached_property
    def _sources(self) -> list[tuple[Path, list[str]]]:
        """Folders of score files with the columns that are shown: the first of many."""
        sources, room = [], MOST_COLUMNS
        for folder, names in read_columns(self.folder, self.manifest):
            sources.append((folder, names[:room]))
            room -= len(sources[-1][1])
        return [(folder, names) for folder, names in sources if names]

    @cached_property
    def columns(self) -> list[str]:
        """Names of the query columns that are shown: the run's own, then those added later."""
        return [name for _, names in self._sources for name in names]

    @cached_property
    def left_out(self) -> list[str]:
        """What is more than a page can hold, in words."""
        columns = sum(len(names) for _, names in read_columns(self.folder, self.manifest))
        tokens = count_tokens(self.folder) if self._per_token else 0
        said = []
        if columns > MOST_COLUMNS:
            said.append(f"the first {MOST_COLUMNS} of {columns:,} query columns are shown")
        if tokens > MOST_TOKENS:
            said.append(f"{tokens:,} tokens are more than a page can hold, and are in scores.parquet alone")
        return said

    @property
    def _per_token(self) -> bool:
        return self.config.get("attribute") == "tokens"

    @cached_property
    def queries(self) -> dict[str, dict[str, Any]]:
        """query.json by query."""
        names = [path.parent.name for path in sorted((self.folder / "queries").glob("*/query.json"))]
        return {name: self.read(f"queries/{name}/query.json") for name in names}

    @cached_property
    def documents(self) -> Documents:
        return read_documents(self.folder, self._sources)

    @cached_property
    def tokens(self) -> Tokens | None:
        """Scores of tokens; None of a run with one score for each document, and of more tokens than a page can hold."""
        if not self._per_token or count_tokens(self.folder) > MOST_TOKENS:
            return None
        return read_tokens(self.folder, self._sources)


class Training(_Run):
    """A run of `retrograd train` or `retrograd unlearn`."""


class Evaluation(Subject):
    """A folder of `retrograd evaluate`."""

    @cached_property
    def summary(self) -> dict[str, Any]:
        return self.read("summary.json")

    @cached_property
    def settings(self) -> dict[str, Any]:
        return self.read("evaluation.json") or {}


class Experiment(Subject):
    """A folder of `retrograd experiment`."""

    @cached_property
    def spec(self) -> dict[str, Any]:
        return read_yaml(self.folder / "experiment.yaml")

    @property
    def grid(self) -> bool:
        """Whether it is a grid of recipes, with no arms."""
        return "grid" in self.spec


class Attack(Subject):
    """A folder of `retrograd attack`."""

    @cached_property
    def found(self) -> dict[str, Any]:
        return self.read("recovery.json")

    @cached_property
    def compared(self) -> dict[str, Any] | None:
        """What `retrograd compare` found of the folder; None where it was not asked."""
        comparison = self.read("compare.json")
        return comparison if comparison and "cells" in comparison else None

    @property
    def sources(self) -> set[str]:
        """The models that it attacked, and those of the folders that it was compared with."""
        sources = {model["source"] for model in self.found["models"].values()}
        cells = (self.compared or {"cells": ()})["cells"]
        for other in {run["folder"] for cell in cells for run in cell.get("runs", ())} - {"."}:
            if (self.folder / other / "attack.json").exists():
                sources |= {target.source for target in read_folder(self.folder / other).targets}
        return sources


class Hardened(Subject):
    """A folder of `retrograd harden`."""

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_yaml(self.folder / "run_config.yaml")

    @cached_property
    def found(self) -> dict[str, Any]:
        return self.read("harden.json")


@dataclass(frozen=True)
class Several(Subject):
    """All subjects of a page."""

    subjects: tuple[Subject, ...] = ()


def open_subject(folder: Path) -> list[Subject]:
    """What a folder holds; a run of unlearning brings its evaluation along, an experiment its attacks.

    Raises:
        ValueError: If it holds nothing that a page could show.
    """
    name = folder.name or str(folder)
    if (folder / "made_of.json").exists():
        if not (folder / "harden.json").exists():
            raise ValueError(f"{folder} is not hardened yet; run its `retrograd harden` again first")
        return [Hardened(folder, name)]
    if (folder / "run_config.yaml").exists():
        return _open_run(folder, name)
    if (folder / "evaluation.json").exists():
        if not (folder / "summary.json").exists():
            raise ValueError(f"the evaluation in {folder} has no summary yet; run its `retrograd evaluate` again first")
        return [Evaluation(folder, name)]
    if (folder / "experiment.yaml").exists():
        if not (folder / "results.parquet").exists():
            raise ValueError(f"the experiment in {folder} has no table yet; run its `retrograd experiment` again first")
        subjects: list[Subject] = [Experiment(folder, name)]
        if (folder / "attacks" / "recovery.json").exists():
            subjects.append(Attack(folder / "attacks", f"{name}: under attack"))
        return subjects
    if (folder / "attack.json").exists():
        if not (folder / "recovery.json").exists():
            raise ValueError(f"the attacks in {folder} have no findings yet; run their `retrograd attack` again first")
        return [Attack(folder, name)]
    what = "does not exist" if not folder.exists() else "holds nothing that a page could show"
    raise ValueError(
        f"{folder} {what}; give a folder of `retrograd magic`, `train`, `unlearn`, `evaluate`, `experiment`, "
        "`attack` or `harden`"
    )


def _open_run(folder: Path, name: str) -> list[Subject]:
    run = _Run(folder, name)
    scored = "scores" in run.manifest.get("phases", {})
    if not scored and not run.manifest.get("finished"):
        raise ValueError(f"the run in {folder} is not finished; run its `retrograd {run.command}` command again first")
    if scored and run.command == "magic":
        return [Attribution(folder, name)]
    subjects: list[Subject] = [Training(folder, name)]
    if scored:
        subjects.append(Attribution(folder, f"{name}: its scores"))
    if (folder / "evaluation" / "summary.json").exists():
        subjects.append(Evaluation(folder / "evaluation", f"{name}: what it knows"))
    return subjects
