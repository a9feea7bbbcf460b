"""`retrograd unlearn`: a model that forgets. Running again resumes, or answers that it is done."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from retrograd.commands.attribution import carry_out_attributed
from retrograd.commands.training import MODEL, carry_out, exported, leave_model
from retrograd.core.step import State
from retrograd.data.pairs import PairStream
from retrograd.evaluate.evaluate import evaluate
from retrograd.parallel.group import here
from retrograd.runs.attribute import Outcome
from retrograd.runs.manifest import Manifest
from retrograd.runs.setup import Loaded, Setup
from retrograd.settings.commands import EvaluateConfig
from retrograd.settings.unlearn import UnlearnConfig, check_unlearn
from retrograd.unlearn import guards
from retrograd.unlearn.method import Unlearning
from retrograd.unlearn.setup import assemble, reached

__all__ = ["unlearn"]


def unlearn(config: UnlearnConfig, console: Console | None = None) -> Outcome | None:
    """Unlearn, evaluated on the way, leave the model in RUN/model, and say what became of it.

    Args:
        config: The resolved configuration, with the method's settings as `objective`.
        console: Where the summary goes; standard output when None.
    Returns:
        The scores of its rows, where --attribute asks for them.
    Raises:
        ValueError: For anything the user can mend, another process in the folder too; nothing has been changed then.
        RunError: For a failure of the machine; the same call resumes.
    """
    console = console or Console()
    check_unlearn(config)
    expected = list[str]()

    def load() -> tuple[Loaded, dict[str, Any]]:
        loaded = assemble(config)
        objective, stream = loaded.objective, loaded.stream
        assert isinstance(objective, Unlearning)
        assert isinstance(stream, PairStream)
        if objective.method.edit is None:  # which has changed what it had to before the first step
            expected.extend(reached(loaded))
        flags = guards.flags(objective)
        for flag in flags:
            console.print(f"Beware: {flag}", style="yellow")
        sizes = dict(zip(("forget", "retain", "alternative"), stream.sizes))
        method = objective.method
        return loaded, {"method": method.name, "formula": method.formula, "flags": flags, "pairs": sizes}

    def check_end(setup: Setup, final: State) -> None:
        guards.check_changed(setup.initial.params, final.params, expected)

    def trained(loaded: Loaded, manifest: Manifest, final: State) -> None:
        check_end(loaded, final)
        leave_model(config, loaded, manifest, final)

    outcome = None
    if config.attribute is None:
        carry_out(config, "unlearn", load, console, check_end)
        if here().rank:
            return None
    else:
        outcome = carry_out_attributed(config, "unlearn", load, console, trained, lambda: exported(config))
    _judge(config, console)
    return outcome


def _judge(config: UnlearnConfig, console: Console) -> None:
    """The verdict on the unlearned model, against the lab's base and filtered models or the model it was made of."""
    asked = config.evaluate
    if not asked.wanted:
        return
    if not config.export:
        console.print("No verdict: --export false leaves no model to ask.")
        return
    evaluate(
        EvaluateConfig(
            (str(config.run / MODEL),), config.run / "evaluation", lab=asked.lab, tasks=asked.tasks,
            reference=None if asked.lab else config.model, tokenizer=config.tokenizer, dtype=config.dtype,
            device=config.device, batch_size=asked.batch_size,
        ),
        console,
    )  # fmt: skip
