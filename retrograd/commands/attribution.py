"""What `magic` and `unlearn --attribute` share: train, query, reverse, write scores, whatever is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console

from retrograd.commands.training import open_folder
from retrograd.core.step import State
from retrograd.runs.attribute import Outcome, ask, stored, summarise, write_results
from retrograd.runs.files import file_digest
from retrograd.runs.manifest import SIGN, Manifest
from retrograd.runs.resume import clean
from retrograd.runs.run_folder import replay_of
from retrograd.runs.session import open_session
from retrograd.runs.setup import Loaded
from retrograd.settings.run import AttributedConfig

__all__ = ["carry_out_attributed"]


def carry_out_attributed(
    config: AttributedConfig,
    command: str,
    load: Callable[[], tuple[Loaded, dict[str, Any]]],
    console: Console,
    trained: Callable[[Loaded, Manifest, State], None] = lambda loaded, manifest, final: None,
    done: Callable[[], bool] = lambda: True,
) -> Outcome:
    """Run, resume or report a metagradient run.

    Args:
        command, load: As for `open_folder`.
        trained: What is done with the final state before the way back begins.
        done: Whether what `trained` left is there.
    Raises:
        ValueError: For anything the user can mend; nothing has been changed then.
        RunError: For a failure of the machine; the same call resumes.
    """

    def finished_words(manifest: Manifest) -> str:
        finished = manifest.done("scores") and done()
        return "; these are its scores. Use --overwrite to compute them again." if finished else ""

    def begun() -> tuple[Loaded, dict[str, Any]]:
        loaded, record = load()
        return loaded, {**record, "meaning": SIGN, **_parts(loaded)}

    with open_folder(config, command, begun, finished_words, console) as opened:
        loaded, manifest = opened.setup, opened.manifest
        if opened.done:
            loaded.settle(config.run / "checkpoints")
            clean(config.run / "checkpoints", keep=config.replay.keep)  # a kill may have left something
            outcome = summarise(stored(config.run, config.run, loaded, loaded.asked), loaded, loaded.asked, console)
            _tell_forecast(config, loaded, console)
            return outcome
        with open_session(
            loaded, config.run, manifest, replay_of(config), log=config.log, watch=opened.watch
        ) as session:
            final = session.train()
            trained(loaded, manifest, final)
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
        manifest.update(finished=True)
        session.show(console)
        if compiled := loaded.engine.compiled:
            about = {"graphs": compiled.graphs, "fixed": compiled.fixed, "seconds": compiled.seconds}
            manifest.update(compiled=about)
            console.print(f"compiled: {compiled.told}")
        summarise(outcome, loaded, loaded.asked, console)
        _tell_forecast(config, loaded, console)
        return outcome


def _tell_forecast(config: AttributedConfig, loaded: Loaded, console: Console) -> None:
    """What LDS to expect, or that nothing is known of it."""
    from retrograd.trust.forecast import read_forecast

    forecast = read_forecast(config.run, loaded.identity)
    unknown = (
        f"none yet. `retrograd metasmoothness {config.run}` retrains without six sets, and says what LDS to expect."
    )
    console.print(f"Forecast: {forecast.told if forecast else unknown}", highlight=False)


def _parts(loaded: Loaded) -> dict[str, Any]:
    """Where each data set lies among the rows and documents of the scores."""
    return {"parts": [part._asdict() for part in loaded.parts]} if loaded.parts else {}
