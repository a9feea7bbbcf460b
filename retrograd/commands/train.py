"""`retrograd train`: a recipe without attribution. Running again resumes, or answers that it is done."""

from __future__ import annotations

from rich.console import Console

from retrograd.commands.training import carry_out
from retrograd.runs.setup import set_up_recipe
from retrograd.settings.train import TrainRunConfig, check_train

__all__ = ["train"]


def train(config: TrainRunConfig, console: Console | None = None) -> None:
    """Train by a recipe and leave the final model in RUN/model.

    Args:
        config: The resolved configuration.
        console: Where the summary goes; standard output when None.
    Raises:
        ValueError: For anything the user can mend, another process in the folder too; nothing has been changed then.
        RunError: For a failure of the machine; the same call resumes.
    """
    check_train(config)
    carry_out(config, "train", lambda: (set_up_recipe(config), {}), console or Console())
