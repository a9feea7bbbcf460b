"""`retrograd magic`: train, query, reverse, write scores. Running again resumes, or answers that it is done."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from retrograd.commands.attribution import carry_out_attributed
from retrograd.runs.assemble import assemble
from retrograd.runs.attribute import Outcome
from retrograd.runs.setup import Loaded
from retrograd.settings import run as configs
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

    def load() -> tuple[Loaded, dict[str, Any]]:
        if config.compile:
            console.print("compiling the layers: minutes for the first time, seconds when torch's cache knows them")
        return assemble(config), {}

    return carry_out_attributed(config, "magic", load, console)
