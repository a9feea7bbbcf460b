"""`retrograd attack`: every model meets every configuration, controls beside them. Running again resumes."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from retrograd.attack.findings import findings
from retrograd.attack.finetune import phases, set_up_phase
from retrograd.attack.folder import Attacked, Folder, claim_folder, refuse_foreign
from retrograd.attack.material import Material, material_of
from retrograd.attack.tell import show_findings, write_findings
from retrograd.attack.untrained.attacks import find_untraining
from retrograd.attack.untrained.run import carry_out_untrained
from retrograd.commands.attack_scores import attribute, check_attribution
from retrograd.commands.training import MODEL, carry_out
from retrograd.commands.unlearn import unlearn
from retrograd.evaluate.folder import plain
from retrograd.runs.lock import locked
from retrograd.settings.attack import (
    CONTROLS,
    AttackConfig,
    Configuration,
    Finetune,
    Untrained,
    check_attack,
    configurations,
    name_of,
)
from retrograd.settings.unlearn import UnlearnConfig, UnlearnTrainConfig

__all__ = ["attack"]


def attack(config: AttackConfig, console: Console | None = None) -> dict[str, Any]:
    """Attack what is not attacked yet, then write and show what came back.

    Args:
        config: The resolved configuration.
        console: Where the summary goes; standard output when None.
    Returns:
        What recovery.json says.
    Raises:
        ValueError: For anything the user can mend.
        RunError: For a failure of the machine; the same call resumes.
    """
    console = console or Console()
    check_attack(config)
    for one in configurations(config):
        if isinstance(one, Untrained):
            find_untraining(one)
        elif config.attribute:
            check_attribution(config, one)
    refuse_foreign(config.out)
    with locked(config.out):
        refuse_foreign(config.out)
        material = material_of(config)
        shallow = config.shallow or (_shallow(config, config.lab) if config.lab is not None else None)
        folder = claim_folder(config.out, _sources(config, shallow), configurations(config), material)
        _carry_out(config, folder, material, console)
        found = findings(folder, config.utility)
        write_findings(found, config.out)
        show_findings(found, config.out, console)
        if config.attribute:
            _attribute(config, folder, material, console)
    return found


def _shallow(config: AttackConfig, lab: Path) -> str:
    """A lab's model whose unlearning is known to be shallow: gradient difference, every token alike."""
    run = config.out / "shallow"

    def corpora(*names: str) -> tuple[str, ...]:
        return tuple(str(lab / f"corpora/{name}.jsonl") for name in names)

    unlearn(
        UnlearnConfig(
            run=run, model=str(lab / "models/base"), method="grad_diff", device=config.device,
            forget=corpora("forget", "exam_forget"), retain=corpora("retain", "exam_retain", "prose", "chat"),
            train=UnlearnTrainConfig(lr=1e-3, epochs=2), heartbeat=config.heartbeat,
        ),
        Console(quiet=True),
    )  # fmt: skip
    return str(run / MODEL)


def _sources(config: AttackConfig, shallow: str | None) -> list[tuple[str, str]]:
    """(role, source) of every model: controls first, for the others are measured against them."""
    controls = {role: getattr(config, role) for role in CONTROLS} | {"shallow": shallow}
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


def _attribute(config: AttackConfig, folder: Folder, material: Material, console: Console) -> None:
    """Scores through every fine-tuning attack of this call, for every model of it."""
    asked = {name_of(one) for one in configurations(config) if isinstance(one, Finetune)}
    sources = {plain(model) for model in config.model}
    for target in folder.targets:
        for name in folder.configurations if target.source in sources else ():
            if name in asked:
                console.print(
                    f"{name} × {target.name}: scores of the unlearning's tokens for the loss after the attack"
                )
                attribute(config, folder, material, target, name, console)


def _meet(config: AttackConfig, folder: Folder, material: Material, target: Attacked, name: str) -> None:
    """One configuration against one model."""
    one: Configuration = folder.configurations[name]
    place: Path = folder.place(target, name)
    if isinstance(one, Untrained):
        base = folder.of_role("base")
        source = base.source if base is not None else None
        carry_out_untrained(one, target.source, source, place, material.sources, material.tasks, config)
    else:
        for phase in phases(one, target.source, place, material.sources, material.tasks, config):
            carry_out(phase.config, "attack", partial(set_up_phase, phase.config), Console(quiet=True))
