"""`retrograd attack`: every model meets every configuration, controls beside them. Running again resumes.

The processes of a torchrun job take whole meetings, or share the steps of one meeting after the other; rank 0 prepares
the folder before and tells what came of it after.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from retrograd.attack.beforehand import check_data, check_models
from retrograd.attack.findings import findings
from retrograd.attack.finetune import phases, set_up_phase
from retrograd.attack.folder import (
    Attacked,
    Folder,
    begun_meetings,
    claim_folder,
    forget_unmet,
    read_folder,
    refuse_foreign,
)
from retrograd.attack.material import Material, attacked_models, check_half, material_of, shallow_unlearning
from retrograd.attack.prompted.run import carry_out_prompted
from retrograd.attack.tell import show_findings, write_findings
from retrograd.attack.untrained.run import carry_out_untrained
from retrograd.commands.attack_scores import attribute, check_attribution
from retrograd.commands.training import MODEL, carry_out
from retrograd.commands.unlearn import unlearn
from retrograd.evaluate.folder import plain
from retrograd.experiment.tasks import unlearn_config
from retrograd.parallel.deal import Deal, dealt
from retrograd.parallel.group import alone, here
from retrograd.runs.arithmetic import begun_with
from retrograd.runs.lock import locked
from retrograd.runs.manifest import Manifest
from retrograd.settings.attack import (
    AttackConfig,
    Configuration,
    Finetune,
    Untrained,
    check_attack,
    configurations,
    name_of,
)
from retrograd.settings.prompted import Prompted

__all__ = ["attack", "meet"]


def attack(config: AttackConfig, console: Console | None = None) -> dict[str, Any]:
    """Attack what is not attacked yet, then write and show what came back.

    Args:
        config: The resolved configuration.
        console: Where the summary goes; standard output when None.
    Returns:
        What recovery.json says; on ranks other than 0, nothing.
    Raises:
        ValueError: For anything the user can mend.
        RunError: For a failure of the machine; the same call resumes.
    """
    console = console or Console()
    check_attack(config)
    check_half(config)
    check_data(config)
    if config.attribute and here().world > 1:
        raise ValueError(
            f"--attribute goes back through unlearning and attack in one process, and {here().world} share the steps "
            f"of this job (--parallel {config.parallel}): leave it out, or leave --parallel out, where rank 0 does it"
        )
    for configuration in configurations(config):
        if config.attribute and isinstance(configuration, Finetune):
            check_attribution(config, configuration)
    refuse_foreign(config.out)
    if here().rank:
        _follow(config)
        return {}
    with dealt() as deal:
        if deal.rank:
            begun = deal.told(set[tuple[str, str]]())
            _carry_out(config, read_folder(config.out), material_of(config), deal, begun, Console(quiet=True))
            deal.meet()
            return {}
        return _attack(config, deal, console)


def _attack(config: AttackConfig, deal: Deal, console: Console) -> dict[str, Any]:
    """What one process does, or rank 0 of several."""
    with locked(config.out):
        refuse_foreign(config.out)
        if (config.out / "attack.json").exists():
            _refuse_other_shards(config, read_folder(config.out))
        material = material_of(config)
        check_models([source for _, source in attacked_models(config, config.shallow)], config.tokenizer)
        shallow = config.shallow or (_shallow(config, config.lab) if config.lab is not None else None)
        folder = claim_folder(config.out, attacked_models(config, shallow), configurations(config), material)
        _carry_out(config, folder, material, deal, deal.told(begun_meetings(folder)), console)
        deal.meet()
        recovery = findings(folder, config.utility)
        write_findings(recovery, config.out)
        show_findings(recovery, config.out, console)
        if config.attribute:
            _attribute(config, folder, material, console)
    return recovery


def _shallow(config: AttackConfig, lab: Path) -> str:
    """A lab's model whose unlearning is known to be shallow."""
    run = config.out / "shallow"
    values = {**shallow_unlearning(lab), "run": run, "device": config.device, "heartbeat": config.heartbeat}
    with alone():
        unlearn(unlearn_config("grad_diff", values, "the shallow control"), Console(quiet=True))
    return str(run / MODEL)


def _follow(config: AttackConfig) -> None:
    """The steps of all meetings that train, one after the other, beside rank 0."""
    meetings = here().agreed(list[tuple[str, str]]())
    folder, material = read_folder(config.out), material_of(config)
    targets = {target.name: target for target in folder.targets}
    for model, name in meetings:
        target = targets[model]
        meet(config, folder.configurations[name], target.source, None, folder.place(target, name), material)


def _carry_out(
    config: AttackConfig,
    folder: Folder,
    material: Material,
    deal: Deal,
    begun: Collection[tuple[str, str]],
    console: Console,
) -> None:
    """This process's share of the folder's meetings: of those that nobody has begun, and of the rest."""
    every = _meetings(folder)
    here().agreed([(target.name, name) for target, name in every if _trains(folder, target, name)])
    new = [meeting for meeting in every if (meeting[0].name, meeting[1]) not in begun]
    meetings = (
        [*deal.mine(new), *deal.mine([meeting for meeting in every if meeting not in new])] if deal.world > 1 else every
    )
    for number, (target, name) in enumerate(meetings, start=1):
        start = time.monotonic()
        try:
            _meet(config, folder, material, target, name)
        except ValueError:
            asked = {plain(model) for model in config.model} | {
                name_of(configuration) for configuration in configurations(config)
            }
            forget_unmet(folder, target, name, asked)
            raise
        console.print(f"{number}/{len(meetings)} {name} × {target.name}: {time.monotonic() - start:.0f} s")


def _attribute(config: AttackConfig, folder: Folder, material: Material, console: Console) -> None:
    """Scores through every fine-tuning attack of this call, for every model of it."""
    asked = {name_of(configuration) for configuration in configurations(config) if isinstance(configuration, Finetune)}
    sources = {plain(model) for model in config.model}
    for target in folder.targets:
        for name in folder.configurations if target.source in sources else ():
            if name in asked:
                console.print(
                    f"{name} × {target.name}: scores of the unlearning's tokens for the loss after the attack"
                )
                attribute(config, folder, material, target, name, console)


def _meetings(folder: Folder) -> list[tuple[Attacked, str]]:
    return [(target, name) for name in folder.configurations for target in folder.targets]


def _trains(folder: Folder, target: Attacked, name: str) -> bool:
    """Whether a meeting has training to do."""
    configuration, place = folder.configurations[name], folder.place(target, name)
    return isinstance(configuration, Finetune) and not all(
        Manifest(place / run / "manifest.json").values.get("finished") for run in configuration.runs
    )


def _refuse_other_shards(config: AttackConfig, folder: Folder) -> None:
    """Refuse, before anything is written, a meeting that was begun with other logical shards and is not done.

    Raises:
        ValueError: With its numbers, and how it can go on.
    """
    world = here().world
    begun = [(run, begun_with(run)) for target, name in _meetings(folder) if _trains(folder, target, name)
             for run in sorted(path.parent for path in folder.place(target, name).glob("*/manifest.json"))]  # fmt: skip
    for run, kind in begun:
        apart = []
        if kind and config.shards not in (None, kind.shards):
            apart.append((f"--shards is {config.shards}", "leave --shards out"))
        if kind and kind.shards % world:
            whole = "leave --parallel out: then each process takes whole meetings"
            apart.append((f"{world} processes share steps", f"take as many as divide {kind.shards}, or {whole}"))
        if kind and apart:
            why, ways = (" and ".join(words) for words in zip(*apart, strict=True))
            raise ValueError(
                f"{run} was begun with {kind.shards} logical shards, now {why}: a meeting that was begun goes on with "
                f"its own order of sums. To go on, {ways}. Or remove {run} to begin it anew."
            )


def _meet(config: AttackConfig, folder: Folder, material: Material, target: Attacked, name: str) -> None:
    """One configuration against one model."""
    base = folder.of_role("base")
    given = (folder.configurations[name], target.source, base and base.source, folder.place(target, name), material)
    if _trains(folder, target, name):
        meet(config, *given)
        return
    with alone():  # what is done has shards of its own
        meet(dataclasses.replace(config, replicas=1, shards=None), *given)


def meet(
    config: AttackConfig, configuration: Configuration, model: str, base: str | None, place: Path, material: Material
) -> None:
    """One configuration against one model, resumed where a kill left it.

    Args:
        base: The model before unlearning, which some attacks without training take.
        place: Where its runs or answers go.
    Raises:
        ValueError: For anything the user can mend.
        RunError: For a failure of the machine; the same call resumes.
    """
    if isinstance(configuration, Untrained):
        carry_out_untrained(configuration, model, base, place, material.sources, material.tasks, config)
        return
    if isinstance(configuration, Prompted):
        carry_out_prompted(configuration, model, place, material.tasks, material.half, config)
        return
    for phase in phases(configuration, model, place, material.sources, material.tasks, config):
        carry_out(phase.config, "attack", partial(set_up_phase, phase.config), Console(quiet=True))
        gc.collect()  # its model is in a cycle, and would be there beside the next one
