"""`retrograd attack`: every model meets every configuration, controls beside them. Running again does what is missing."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from retrograd.attack.finetune import phases, set_up_phase
from retrograd.attack.folder import Attacked, Folder, claim_folder
from retrograd.attack.material import Material, material_of
from retrograd.commands.training import carry_out
from retrograd.runs.lock import locked
from retrograd.settings.attack import CONTROLS, AttackConfig, Configuration, Finetune, check_attack, configurations

__all__ = ["attack"]


def attack(config: AttackConfig, console: Console | None = None) -> None:
    """Attack what is not attacked yet, then write and show what came back.

    Args:
        config: The resolved configuration.
        console: Where the summary goes; standard output when None.
    Raises:
        ValueError: For anything the user can mend.
        RunError: For a failure of the machine; the same call resumes.
    """
    console = console or Console()
    check_attack(config)
    with locked(config.out):
        material = material_of(config)
        folder = claim_folder(config.out, _sources(config), configurations(config), material)
        _carry_out(config, folder, material, console)


def _sources(config: AttackConfig) -> list[tuple[str, str]]:
    """(role, source) of every model: controls first, for the others are measured against them."""
    controls = {role: getattr(config, role) for role in CONTROLS}
    if config.lab is not None:
        for role in ("base", "filtered", "random"):
            controls[role] = controls[role] or str(config.lab / "models" / role)
    found = [(role, source) for role, source in controls.items() if source is not None]
    taken = {source for _, source in found}
    return [*found, *(("model", source) for source in config.model if source not in taken)]


def _carry_out(config: AttackConfig, folder: Folder, material: Material, console: Console) -> None:
    meetings = [(target, name) for name in folder.configurations for target in folder.targets]
    for place, (target, name) in enumerate(meetings, start=1):
        start = time.monotonic()
        _meet(config, folder, material, target, name)
        console.print(f"{place}/{len(meetings)} {name} × {target.name}: {time.monotonic() - start:.0f} s")


def _meet(config: AttackConfig, folder: Folder, material: Material, target: Attacked, name: str) -> None:
    """One configuration against one model."""
    one: Configuration = folder.configurations[name]
    place: Path = folder.place(target, name)
    if isinstance(one, Finetune):
        for phase in phases(one, target.source, place, material.sources, material.tasks, config):
            carry_out(phase.config, "attack", lambda run=phase.config: set_up_phase(run), Console(quiet=True))
