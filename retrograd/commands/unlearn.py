"""`retrograd unlearn`: a model that forgets. Running again resumes, or answers that it is done."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from retrograd.commands.training import MODEL, carry_out
from retrograd.core.optim import Params
from retrograd.evaluate.evaluate import evaluate
from retrograd.runs.setup import Setup
from retrograd.settings.commands import EvaluateConfig
from retrograd.settings.unlearn import UnlearnConfig, check_unlearn
from retrograd.unlearn import guards
from retrograd.unlearn.methods import find_method
from retrograd.unlearn.setup import reached, set_up_unlearning

__all__ = ["unlearn"]


def unlearn(config: UnlearnConfig, console: Console | None = None) -> None:
    """Unlearn, evaluated on the way, leave the model in RUN/model, and say what became of it.

    Args:
        config: The resolved configuration, with the method's settings as `objective`.
        console: Where the summary goes; standard output when None.
    Raises:
        ValueError: For anything the user can mend, another process in the folder too; nothing has been changed then.
        RunError: For a failure of the machine; the same call resumes.
    """
    console = console or Console()
    check_unlearn(config)
    method, expected = find_method(config.method), list[str]()

    def load() -> tuple[Setup, dict[str, Any]]:
        setup, objective = set_up_unlearning(config, method)
        expected.extend(reached(setup, objective))
        flags = guards.flags(objective)
        for flag in flags:
            console.print(f"Beware: {flag}", style="yellow")
        sizes = dict(zip(("forget", "retain", "alternative"), getattr(setup.stream, "sizes")))  # noqa: B009
        return setup, {"method": method.name, "formula": method.formula, "flags": flags, "pairs": sizes}

    def check_end(before: Params, after: Params) -> None:
        guards.check_changed(before, after, expected)

    carry_out(config, "unlearn", load, console, check_end)
    _judge(config, console)


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
