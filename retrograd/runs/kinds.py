"""The kinds of runs that have scores, by the command that makes them: how each is checked and loaded.

What loads a run may stand above this room: it is the `assemble` of a module that is imported when it is wanted.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from retrograd.runs.manifest import Manifest
from retrograd.runs.setup import Loaded
from retrograd.settings.run import AttributedConfig, MagicConfig, check, settings_from
from retrograd.settings.unlearn import ChainConfig, UnlearnConfig, check_unlearn

__all__ = ["KINDS", "assemble", "check_settings", "command_of", "read_settings"]


class Kind(NamedTuple):
    """The class of its settings, what refuses those that cannot work, and the module that loads it."""

    config: type[AttributedConfig]
    check: Callable[[Any], None]
    module: str


KINDS = {
    "attack": Kind(ChainConfig, check_unlearn, "retrograd.attack.chained"),  # before what it is a kind of
    "magic": Kind(MagicConfig, check, "retrograd.runs.assemble"),
    "unlearn": Kind(UnlearnConfig, check_unlearn, "retrograd.unlearn.setup"),
}
"""Each kind by its command."""


def command_of(folder: Path) -> str:
    """The command that made a run; "magic" for runs of before that do not say."""
    command: str = Manifest(folder / "manifest.json").values.get("command", "magic")
    return command


def read_settings(folder: Path) -> AttributedConfig:
    """The settings of a run, from its folder. No code that they name is run.

    Raises:
        ValueError: If its kind has no scores, or the file cannot be read.
    """
    command = command_of(folder)
    if command not in KINDS:
        raise ValueError(
            f"{folder} is a run of `retrograd {command}`, which has no scores; give the folder of a finished "
            "`retrograd magic`, or of `retrograd unlearn` with --attribute"
        )
    return dataclasses.replace(settings_from(KINDS[command].config, folder / "run_config.yaml"), run=folder)


def check_settings(config: AttributedConfig) -> None:
    """Refuse settings that cannot work, before anything is loaded.

    Raises:
        ValueError: With the setting, its value and what it has to be.
    """
    _kind(config).check(config)


def assemble(config: AttributedConfig) -> Loaded:
    """Load and check everything that a run of these settings is made of.

    Raises:
        ValueError: For whatever cannot work, before anything is computed or written.
    """
    loaded: Loaded = importlib.import_module(_kind(config).module).assemble(config)
    return loaded


def _kind(config: AttributedConfig) -> Kind:
    return next(kind for kind in KINDS.values() if isinstance(config, kind.config))
