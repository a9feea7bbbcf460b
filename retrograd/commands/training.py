"""What commands that train share: a run's folder, opened for it, and a training evaluated on its way, which leaves its
model there."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from rich.console import Console

from retrograd.core import tree
from retrograd.core.step import State
from retrograd.evaluate.on_the_way import prepare_on_the_way, show_again, watching
from retrograd.lm.save import save_causal_lm
from retrograd.parallel.group import here
from retrograd.runs.begin import begin, check_folder, empty
from retrograd.runs.files import write_json
from retrograd.runs.lock import locked
from retrograd.runs.loggers import check_loggers
from retrograd.runs.manifest import Manifest
from retrograd.runs.run_folder import refuse_other
from retrograd.runs.session import Session, Watcher, open_session
from retrograd.runs.setup import Setup
from retrograd.runs.states.budget import TRAINED_ONLY
from retrograd.settings.on_the_way import OnTheWayConfig
from retrograd.settings.train import ExportConfig, RunConfig

__all__ = ["MODEL", "Opened", "carry_out", "exported", "leave_model", "open_folder"]

MODEL = "model"  # the folder of the final model, in the run's

S = TypeVar("S", bound=Setup)


@dataclass(frozen=True)
class Opened(Generic[S]):
    """A run's folder, locked, with what is trained there.

    done: nothing is left to do, and the user has been told so.
    watch: makes who looks on while it trains, for the session.
    """

    setup: S
    manifest: Manifest
    done: bool
    watch: Callable[[Session], Watcher] | None


@contextmanager
def open_folder(
    config: RunConfig,
    command: str,
    load: Callable[[], tuple[S, dict[str, Any]]],
    done: Callable[[Manifest], str],
    console: Console,
) -> Iterator[Opened[S]]:
    """The folder of a run, begun, gone on with or found done.

    Args:
        command: Whose run it is.
        load: Loads and checks what is trained; and what the manifest is to say of it besides.
        done: What to tell of a run of this manifest that is done; nothing where it is not.
    Raises:
        ValueError: For anything the user can mend, another process in the folder too; nothing has been changed then.
        SystemExit: On ranks other than 0, once that one is done with the folder.
    """
    if here().rank:
        load()[0].follow()
        raise SystemExit(0)
    check_loggers(config.log)
    check_folder(config, command)  # before anything is made there
    with locked(config.run):
        check_folder(config, command)
        setup, about = load()
        finished = "" if config.overwrite else done(Manifest(config.run / "manifest.json"))
        prepared = prepare_on_the_way(OnTheWayConfig() if finished else config.evaluate, setup.model, setup.tokenizer)
        if config.overwrite:
            empty(config.run)  # only now that the new run is known to be sound
        manifest = Manifest(config.run / "manifest.json")
        refuse_other(config.run, manifest, setup)
        if finished:
            console.print(f"{config.run} is done{finished}")
            show_again(config.run, config.log, config.evaluate, console)
        else:
            begin(config, command, manifest, setup, **about)
            console.print(f"engine: {setup.engine.name} ({setup.engine.why})")
            for finding in setup.findings:
                warnings.warn(str(finding), stacklevel=2)
        yield Opened(setup, manifest, bool(finished), watching(prepared))
        here().dismiss()


def carry_out(
    config: ExportConfig,
    command: str,
    load: Callable[[], tuple[Setup, dict[str, Any]]],
    console: Console,
    check_end: Callable[[Setup, State], None] = lambda setup, final: None,
) -> None:
    """Train what `load` sets up, resumed where a kill left it, and leave the final model in the run's folder.

    Other ranks of a job than the first share the steps, and come back when it is done.

    Args:
        command, load: As for `open_folder`.
        check_end: Refuses a training that did not do what it should, by its final state.
    Raises:
        ValueError: For anything the user can mend; nothing has been changed then.
        RunError: For a failure of the machine; the same call resumes.
    """

    if here().rank:
        load()[0].follow()
        return

    def done(manifest: Manifest) -> str:
        finished = manifest.values.get("finished", False) and exported(config)
        return f"{_where(config)}. Use --overwrite to train it again." if finished else ""

    with open_folder(config, command, load, done, console) as opened:
        setup, manifest = opened.setup, opened.manifest
        if opened.done:
            setup.settle(config.run / "checkpoints")
            return
        replay = replace(TRAINED_ONLY, heartbeat=config.heartbeat)
        with open_session(setup, config.run, manifest, replay, log=config.log, watch=opened.watch) as session:
            final = session.train()
        check_end(setup, final)
        leave_model(config, setup, manifest, final)
        session.trajectory.clean()
        manifest.update(finished=True)
        session.show(console)
        console.print(f"{config.run}: {len(setup.stream)} steps{_where(config)}.")


def exported(config: ExportConfig) -> bool:
    """Whether the model that a run is to leave is there."""
    return not config.export or (config.run / MODEL).exists()


def leave_model(config: ExportConfig, setup: Setup, manifest: Manifest, final: State) -> None:
    """Leave the final model in RUN/model, unless it is there or not wanted."""
    if not config.export or (manifest.done("model") and exported(config)):
        return
    with manifest.phase("model"):
        _export(config.run, setup, final)


def _where(config: ExportConfig) -> str:
    return f"; its model is in {config.run / MODEL}" if config.export else ""


def _export(run: Path, setup: Setup, final: State) -> None:
    """The final model as a folder of its own, which says what it was made by."""
    about = {"step": final.step, "run": setup.identity, "digest": tree.digest(dict(sorted(final.params.items())))}
    save_causal_lm(
        run / MODEL, setup.model.module, setup.tokenizer, final.params,
        lambda folder: write_json(folder / "trained.json", about),
    )  # fmt: skip
