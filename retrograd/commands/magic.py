"""`retrograd magic`: train, query, reverse, write scores. Running again resumes, or answers that it is done."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import yaml
from rich.console import Console

from retrograd.durable import foreign, remove
from retrograd.evaluate.curve import show_evaluations
from retrograd.evaluate.on_the_way import During, prepare_during
from retrograd.lm.engines import Choice
from retrograd.runs.attribute import Outcome, all_of, ask, stored, summarise, write_results
from retrograd.runs.files import file_digest, write_atomic
from retrograd.runs.journal import Journal, mirror, read_evaluations
from retrograd.runs.lock import locked
from retrograd.runs.loggers import check_loggers, open_loggers
from retrograd.runs.machine import settled
from retrograd.runs.manifest import SIGN, Manifest, environment
from retrograd.runs.progress import Bars
from retrograd.runs.run_folder import describe, refuse_other, replay_of, set_threads
from retrograd.runs.setup import Loaded, assemble
from retrograd.runs.trajectory import Trajectory, clean
from retrograd.settings import run as configs
from retrograd.settings.during import DuringConfig
from retrograd.settings.run import MagicConfig

__all__ = ["magic"]


def magic(config: MagicConfig, console: Console | None = None) -> Outcome:
    """Run, resume or report a metagradient run.

    Args:
        config: The resolved configuration.
        console: Where the summary goes; standard output when None.
    Raises:
        ValueError: For anything the user can mend, another process in the folder too; nothing has been changed then.
        RunError: For a failure of the machine; the same call resumes.
    """
    console = console or Console()
    configs.check(config)
    check_loggers(config.log)
    _check_folder(config)  # before anything is made there
    with locked(config.run):
        _check_folder(config)
        return _magic(config, console)


def _magic(config: MagicConfig, console: Console) -> Outcome:
    if config.compile:
        console.print("compiling the layers: minutes for the first time, seconds when torch's cache knows them")
    loaded = assemble(config)
    done = not config.overwrite and Manifest(config.run / "manifest.json").done("scores")
    prepared = prepare_during(DuringConfig() if done else config.evaluate, loaded.model, loaded.tokenizer)
    if config.overwrite:
        _empty(config.run)  # only now that the new run is known to be sound
    manifest = Manifest(config.run / "manifest.json")
    set_threads(manifest)
    refuse_other(config.run, manifest, loaded)
    if done:
        console.print(f"{config.run} is done; these are its scores. Use --overwrite to compute them again.")
        _told_again(config, console)
        clean(config.run / "checkpoints", keep=config.replay.keep)  # a kill may have left something
        return summarise(stored(config.run, config.run, loaded, loaded.asked), loaded, loaded.asked, console)
    _begin(config, manifest, loaded)
    _told_engine(loaded.engine, console)
    for finding in loaded.findings:
        warnings.warn(str(finding), stacklevel=2)
    with settled(), open_loggers(config.log, config.run) as loggers, Bars(len(loaded.stream)) as bars:
        journal = Journal(config.run / "metrics.jsonl", loaded.training.recipe.optimizer, loggers)
        during = During(prepared, len(loaded.stream), config.run, journal, manifest, bars)
        trajectory = Trajectory(
            loaded.training, loaded.initial, replay_of(config), config.run / "checkpoints", loaded.identity,
            all_of(bars, during, journal), logs=[journal.path],
        )  # fmt: skip
        journal.begin(trajectory)
        manifest.update(replay=describe(trajectory))
        with manifest.phase("train"), during:
            during.at(loaded.initial)
            final = trajectory.train()
            during.at(final)
        with manifest.phase("query"):
            values, *gradient = ask(config.run, loaded, loaded.asked, final)
        del final
        with manifest.phase("reverse"):
            journal.resume(trajectory)
            # handed over, so that only the sweep holds it, and for its first step only
            scores = trajectory.reverse(gradient.pop(), curvature=config.sharpness)
    with manifest.phase("scores") as record:
        outcome = write_results(config.run, config.run, loaded, loaded.asked, values, scores)
        record["sha256"] = file_digest(config.run / "scores.pt")
    trajectory.clean()
    during.show(console)
    if compiled := loaded.engine.compiled:
        manifest.update(compiled={"graphs": compiled.graphs, "fixed": compiled.fixed, "seconds": compiled.seconds})
        console.print(f"compiled: {compiled.told}")
    return summarise(outcome, loaded, loaded.asked, console)


def _told_engine(engine: Choice, console: Console) -> None:
    console.print(f"engine: {engine.name} ({engine.why})")


def _told_again(config: MagicConfig, console: Console) -> None:
    """What a finished run's journal holds besides its scores: in the viewers asked for, and as a table."""
    path = config.run / "metrics.jsonl"
    if config.log:
        with open_loggers(config.log, config.run) as loggers:
            mirror(path, loggers)
    evaluations = read_evaluations(path)
    if evaluations:
        show_evaluations(config.run, evaluations, console)
    elif config.evaluate.wanted:
        console.print("It was not evaluated on its way; `retrograd evaluate` asks models that are there.")


def _check_folder(config: MagicConfig) -> None:
    """Refuse a folder that holds another run, with the difference, before anything is loaded."""
    stored = config.run / "run_config.yaml"
    if not stored.exists():
        if config.run.exists() and (not config.run.is_dir() or set(foreign(config.run)) - _OTHERS):
            raise ValueError(f"{config.run} exists and is no run of retrograd; choose another folder")
        return
    if config.overwrite:
        return
    old = yaml.safe_load(stored.read_text(encoding="utf8"))
    changed = configs.difference(old, configs.to_dict(config))
    if changed:
        lines = "\n  ".join(changed)
        raise ValueError(
            f"{config.run} holds a run of another configuration:\n  {lines}\nUse another folder, or --overwrite to "
            "start afresh."
        )


def _empty(run: Path) -> None:
    """Remove a run so that a kill meanwhile leaves one that is not done, and can be started afresh again."""
    remove(run / "manifest.json")
    for name in set(foreign(run)) - {"run_config.yaml"}:
        remove(run / name)
    remove(run / "run_config.yaml")


def _begin(config: MagicConfig, manifest: Manifest, loaded: Loaded) -> None:
    """Write what the run is before its first step."""
    values = yaml.safe_dump(configs.to_dict(config), sort_keys=False)
    write_atomic(config.run / "run_config.yaml", lambda temporary: temporary.write_text(values, encoding="utf8"))
    rows = loaded.rows
    manifest.update(
        meaning=SIGN,
        identity=loaded.identity,
        hashes=loaded.hashes,
        **environment(torch.device(loaded.stream.device)),
        threads=torch.get_num_threads(),
        steps=len(loaded.stream),
        parameters=sum(leaf.numel() for leaf in loaded.initial.params.values()),
        fused_head=loaded.model.fused,
        engine={
            "used": loaded.engine.name,
            "why": loaded.engine.why,
            **({"compiled": True} if loaded.engine.compiled else {}),
        },
        rows={
            "documents": rows.documents, "rows": len(rows), "targets": rows.targets, "longest": rows.max_length,
            "truncated": rows.truncated, "packed": rows.packed, "skipped_chunks": rows.skipped_chunks,
            "skipped": {str(document): reason for document, reason in rows.skipped.items()},
        },
    )  # fmt: skip


_OTHERS = {"metasmoothness"}  # what another command may have left in the folder of a run to come
