"""What `train` and `unlearn` share: a training in its folder, evaluated on its way, whose final model is left there."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from retrograd.core import tree
from retrograd.core.optim import Params
from retrograd.core.step import State
from retrograd.evaluate.on_the_way import prepare_during, show_again, watching
from retrograd.lm.save import save_causal_lm
from retrograd.runs.begin import begin, check_folder, empty
from retrograd.runs.files import write_json
from retrograd.runs.lock import locked
from retrograd.runs.loggers import check_loggers
from retrograd.runs.manifest import Manifest
from retrograd.runs.run_folder import refuse_other, set_threads
from retrograd.runs.session import open_session
from retrograd.runs.setup import Setup
from retrograd.runs.states.budget import Replay
from retrograd.settings.during import DuringConfig
from retrograd.settings.train import ExportConfig

__all__ = ["MODEL", "carry_out"]

MODEL = "model"  # the folder of the final model, in the run's


def carry_out(
    config: ExportConfig,
    command: str,
    load: Callable[[], tuple[Setup, dict[str, Any]]],
    console: Console,
    check_end: Callable[[Params, Params], None] = lambda before, after: None,
) -> None:
    """Train what `load` sets up, resumed where a kill left it, and leave the final model in the run's folder.

    Args:
        command: Whose run it is.
        load: Loads and checks what is trained; and what the manifest is to say of it besides.
        check_end: Refuses a training that did not do what it should, by the first and the last parameters.
    Raises:
        ValueError: For anything the user can mend; nothing has been changed then.
        RunError: For a failure of the machine; the same call resumes.
    """
    check_loggers(config.log)
    check_folder(config, command)  # before anything is made there
    with locked(config.run):
        check_folder(config, command)
        _carry_out(config, command, load, console, check_end)


def _carry_out(
    config: ExportConfig,
    command: str,
    load: Callable[[], tuple[Setup, dict[str, Any]]],
    console: Console,
    check_end: Callable[[Params, Params], None],
) -> None:
    setup, told = load()
    done = not config.overwrite and _done(config)
    prepared = prepare_during(DuringConfig() if done else config.evaluate, setup.model, setup.tokenizer)
    if config.overwrite:
        empty(config.run)  # only now that the new run is known to be sound
    manifest = Manifest(config.run / "manifest.json")
    set_threads(manifest)
    refuse_other(config.run, manifest, setup)
    if done:
        console.print(f"{config.run} is done{_where(config)}. Use --overwrite to train it again.")
        show_again(config.run, config.log, config.evaluate, console)
        return
    begin(config, command, manifest, setup, **told)
    console.print(f"engine: {setup.engine.name} ({setup.engine.why})")
    for finding in setup.findings:
        warnings.warn(str(finding), stacklevel=2)
    replay = Replay(plan="binomial", slots=1, heartbeat=config.heartbeat)  # a resume point is all that is kept
    with open_session(setup, config.run, manifest, replay, log=config.log, watch=watching(prepared)) as session:
        final = session.train()
    check_end(setup.initial.params, final.params)
    if config.export:
        with manifest.phase("model"):
            _export(config.run, setup, final)
    session.trajectory.clean()
    manifest.update(finished=True)
    session.show(console)
    console.print(f"{config.run}: {len(setup.stream)} steps{_where(config)}.")


def _done(config: ExportConfig) -> bool:
    finished = Manifest(config.run / "manifest.json").values.get("finished", False)
    return finished and (not config.export or (config.run / MODEL).exists())


def _where(config: ExportConfig) -> str:
    return f"; its model is in {config.run / MODEL}" if config.export else ""


def _export(run: Path, setup: Setup, final: State) -> None:
    """The final model as a folder of its own, which says what it was made by."""
    about = {"step": final.step, "run": setup.identity, "digest": tree.digest(dict(sorted(final.params.items())))}
    save_causal_lm(
        run / MODEL, setup.model.module, setup.tokenizer, final.params,
        lambda folder: write_json(folder / "trained.json", about),
    )  # fmt: skip
