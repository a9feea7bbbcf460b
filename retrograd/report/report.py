"""`retrograd report`: gather the panels of every folder, and write the page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console

from retrograd.report.corpus import build_tables
from retrograd.report.mask import Mask, corpus_mask, nothing_masked
from retrograd.report.page import Block, Section, render
from retrograd.report.panel import View
from retrograd.report.panels import PANELS
from retrograd.report.panels.setup import write_results_table
from retrograd.report.subjects import (
    Attack,
    Attribution,
    Evaluation,
    Experiment,
    Hardened,
    Several,
    Subject,
    Training,
    open_subject,
)
from retrograd.runs.files import write_atomic
from retrograd.runs.lock import locked
from retrograd.settings.parse import build, read_yaml
from retrograd.settings.report import ReportConfig
from retrograd.settings.unlearn import UnlearnConfig, parse_source

__all__ = ["PAGE", "report"]

PAGE = "report.html"


def report(config: ReportConfig, console: Console | None = None) -> Path:
    """Write one page about all folders, results.md into each attributed run, and say where the page is.

    Raises:
        ValueError: If a folder holds nothing to show, or a corpus to forget cannot be read and so not masked.
        RunError: If the page cannot be written.
    """
    console = console or Console()
    if not config.paths:
        raise ValueError("no folder; give one that another command has left, such as runs/x")
    subjects = [subject for path in config.paths for subject in open_subject(path)]
    mask = _mask(config, subjects)
    view = View(mask)
    runs = [subject for subject in subjects if isinstance(subject, Attribution)]
    build_tables(runs, view)
    every = [Several(subjects[0].folder, "All together", tuple(subjects)), *subjects] if len(subjects) > 1 else subjects
    sections = [section for number, subject in enumerate(every) if (section := _section(number, subject, view)).blocks]
    title = config.title or ", ".join(dict.fromkeys(path.name or str(path) for path in config.paths))
    output = config.output or config.paths[0] / PAGE
    text = render(title, sections, view.tables, _mask_note(mask))
    with ExitStack() as held:
        for folder in dict.fromkeys(run.folder for run in runs):
            held.enter_context(locked(folder, shared=True))
        for run in runs:
            write_results_table(run, view)
        write_atomic(output, lambda temporary: temporary.write_text(text, encoding="utf8"))
    for subject in () if config.show_forget else subjects:
        if isinstance(subject, Hardened) and _hardened_run(subject) is None:
            why = (
                f"harden.json names the run {subject.found['run']}, which is not there any more"
                if "run" in subject.found
                else "harden.json is of an earlier version and does not name its run"
            )
            console.print(
                f"{subject.folder}/{why}: the words of that run's corpora are not masked; --forget names them",
                highlight=False, soft_wrap=True,
            )  # fmt: skip
    console.print(f"Report: {output}", highlight=False, soft_wrap=True)
    return output


def _section(number: int, subject: Subject, view: View) -> Section:
    gathered = [(panel, panel.gather(subject, view)) for panel in PANELS if isinstance(subject, panel.of)]
    blocks = [
        Block(f"{panel.name}-{number}", panel.name, panel.title, content) for panel, content in gathered if content
    ]
    return Section(subject.name, "" if isinstance(subject, Several) else str(subject.folder), blocks)


def _mask(config: ReportConfig, subjects: Sequence[Subject]) -> Mask:
    """Hides the corpora of --forget, and those that runs of unlearning among the subjects name."""
    if config.show_forget:
        return nothing_masked()
    forget, retain = list(map(_source, config.forget)), list(map(_source, config.retain))
    for settings in chain.from_iterable(map(_unlearned, subjects)):
        forget += map(_source, settings.get("forget") or ())
        retain += map(_source, settings.get("retain") or ())
    return corpus_mask(forget, retain) if forget else nothing_masked()


def _unlearned(subject: Subject) -> Iterator[dict[str, Any]]:
    """The settings of every unlearning that a subject is about, or that made a model of it."""
    if isinstance(subject, (Training, Attribution)) and "forget" in subject.config:
        yield subject.config
    if isinstance(subject, Hardened) and (path := _hardened_run(subject)) is not None:
        yield read_yaml(path)
    if isinstance(subject, Experiment) and not subject.grid:
        yield subject.spec["corpora"]
        yield from filter(None, (method.get("corpora") for method in (subject.spec.get("methods") or {}).values()))
    if isinstance(subject, Evaluation):
        yield from _of_models(model["source"] for model in subject.settings.get("models", {}).values())
    if isinstance(subject, Attack) and subject.compared:  # else it shows no text
        yield from _of_models(sorted(subject.sources))


def _hardened_run(subject: Hardened) -> Path | None:
    """The settings of the run that was hardened; None where they are not known any more."""
    path = Path(subject.found["run"]) / "run_config.yaml" if "run" in subject.found else None
    return path if path is not None and path.exists() else None


def _of_models(sources: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The settings of the unlearning that left each model, if one did."""
    for source in sources:
        path = Path(source).parent / "run_config.yaml"
        if path.exists() and "forget" in (settings := read_yaml(path)):
            yield settings


def _source(text: str) -> dict[str, Any]:
    return vars(parse_source(text, build(UnlearnConfig, {}, "defaults")))


def _mask_note(mask: Mask) -> str:
    return (
        f"{len(mask.words):,} words of the corpus to forget are blotted out, and its documents are shown by hash and "
        "length; --show_forget shows them."
        if mask
        else ""
    )
