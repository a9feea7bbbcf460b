"""The attacks of an experiment as one folder of attacks, `OUT/attacks`: every meeting is a link to what its task left.

The folder is made anew of what is done, whenever somebody looks; `retrograd report` and `compare` take it as it is.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from retrograd.attack.folder import Folder, claim_folder, target_name
from retrograd.attack.material import material_of
from retrograd.durable import make_folder, remove
from retrograd.experiment.carry import MEETING, MODEL
from retrograd.experiment.plan import Meeting, Plan, Results
from retrograd.settings.attack import AttackConfig, name_of

__all__ = ["ATTACKS", "gathered"]

ATTACKS = "attacks"  # in an experiment's folder


def gathered(config: AttackConfig, plan: Plan, results: Results) -> Folder | None:
    """The folder of all meetings that are done; None if there is none yet.

    Args:
        config: The attacks' settings; `out` is the folder.
    Raises:
        ValueError: If a model is not what was attacked.
    """
    done = [
        (meeting, Path(outcome["place"]))
        for meeting in plan.meetings
        if (outcome := results.result(meeting.task)) is not None
    ]
    if not done:
        return None
    of = _sources(results)
    names = {source: target_name(source) for source in {of(meeting) for meeting, _ in done}}
    groups: dict[str, list[str]] = {}
    for meeting, _ in done:
        known = groups.setdefault(of(meeting), [])
        if meeting.group is not None and meeting.group not in known:
            known.append(meeting.group)
    remove(config.out / "models")
    (config.out / "attack.json").unlink(missing_ok=True)
    sources = list(dict.fromkeys((meeting.role, of(meeting)) for meeting, _ in done))
    named = list(dict.fromkeys(meeting.configuration for meeting, _ in done))
    folder = claim_folder(config.out, sources, named, material_of(config), groups)
    for meeting, place in done:
        link = config.out / "models" / names[of(meeting)] / name_of(meeting.configuration)
        make_folder(link.parent)
        if not link.is_symlink():  # a model of two arms
            link.symlink_to(os.path.relpath(place / MEETING, link.parent.resolve()))
    return folder


def _sources(results: Results) -> Callable[[Meeting], str]:
    """The folder of a meeting's model."""

    def source(meeting: Meeting) -> str:
        if isinstance(meeting.model, str):
            return meeting.model
        outcome = results.result(meeting.model.name)
        assert outcome is not None, "what it needs was done before"
        return str(Path(outcome["place"]) / MODEL)

    return source
