"""`retrograd magic`: train, query, reverse, write scores. Running again resumes, or answers that it is done."""

from __future__ import annotations

import warnings

from rich.console import Console

from retrograd.evaluate.on_the_way import prepare_during, show_again, watching
from retrograd.lm.engines import Choice
from retrograd.runs.attribute import Outcome, ask, stored, summarise, write_results
from retrograd.runs.begin import begin, check_folder, empty
from retrograd.runs.files import file_digest
from retrograd.runs.lock import locked
from retrograd.runs.loggers import check_loggers
from retrograd.runs.manifest import SIGN, Manifest
from retrograd.runs.resume import clean
from retrograd.runs.run_folder import refuse_other, replay_of, set_threads
from retrograd.runs.session import open_session
from retrograd.runs.setup import assemble
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
    check_folder(config, "magic")  # before anything is made there
    with locked(config.run):
        check_folder(config, "magic")
        return _magic(config, console)


def _magic(config: MagicConfig, console: Console) -> Outcome:
    if config.compile:
        console.print("compiling the layers: minutes for the first time, seconds when torch's cache knows them")
    loaded = assemble(config)
    done = not config.overwrite and Manifest(config.run / "manifest.json").done("scores")
    prepared = prepare_during(DuringConfig() if done else config.evaluate, loaded.model, loaded.tokenizer)
    if config.overwrite:
        empty(config.run)  # only now that the new run is known to be sound
    manifest = Manifest(config.run / "manifest.json")
    set_threads(manifest)
    refuse_other(config.run, manifest, loaded)
    if done:
        console.print(f"{config.run} is done; these are its scores. Use --overwrite to compute them again.")
        show_again(config.run, config.log, config.evaluate, console)
        clean(config.run / "checkpoints", keep=config.replay.keep)  # a kill may have left something
        return summarise(stored(config.run, config.run, loaded, loaded.asked), loaded, loaded.asked, console)
    begin(config, "magic", manifest, loaded, meaning=SIGN)
    _told_engine(loaded.engine, console)
    for finding in loaded.findings:
        warnings.warn(str(finding), stacklevel=2)
    with open_session(
        loaded, config.run, manifest, replay_of(config), log=config.log, watch=watching(prepared)
    ) as session:
        final = session.train()
        with manifest.phase("query"):
            values, *gradient = ask(config.run, loaded, loaded.asked, final)
        del final
        with session.reversing() as trajectory:
            # handed over, so that only the sweep holds it, and for its first step only
            scores = trajectory.reverse(gradient.pop(), curvature=config.sharpness)
    with manifest.phase("scores") as record:
        outcome = write_results(config.run, config.run, loaded, loaded.asked, values, scores)
        record["sha256"] = file_digest(config.run / "scores.pt")
    trajectory.clean()
    session.show(console)
    if compiled := loaded.engine.compiled:
        manifest.update(compiled={"graphs": compiled.graphs, "fixed": compiled.fixed, "seconds": compiled.seconds})
        console.print(f"compiled: {compiled.told}")
    return summarise(outcome, loaded, loaded.asked, console)


def _told_engine(engine: Choice, console: Console) -> None:
    console.print(f"engine: {engine.name} ({engine.why})")
