"""`retrograd plan`: what a command would take, before it is run. Nothing is trained or written."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from retrograd.plan.run import Planned, plan_run
from retrograd.plan.show import show, values_of
from retrograd.runs.files import write_json
from retrograd.settings import run as configs
from retrograd.settings.plan import PlanOf, check_plan
from retrograd.settings.train import check_train
from retrograd.settings.unlearn import check_unlearn

__all__ = ["plan"]

_CHECKS = {"train": check_train, "magic": configs.check, "unlearn": check_unlearn}


def plan(asked: PlanOf, console: Console | None = None) -> Planned:
    """Print what a command would take.

    Returns:
        The plan, of which all numbers are written where --json says.
    Raises:
        ValueError: For what the command would refuse, or the plan cannot say.
    """
    console = console or Console()
    check_plan(asked.plan)
    check: Any = _CHECKS[asked.command]
    check(asked.config)
    found = plan_run(asked.config, asked.plan)
    show(found, console)
    if asked.plan.json is not None:
        write_json(asked.plan.json, values_of(found))
    return found
