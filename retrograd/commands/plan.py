"""`retrograd plan`: what a command would take, before it is run. Nothing is trained or written."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from retrograd.plan.many import PlannedMany, plan_experiment, plan_validate
from retrograd.plan.run import Planned, plan_run
from retrograd.plan.show import show, show_many, values_of, values_of_many
from retrograd.runs.files import write_json
from retrograd.settings import run as configs
from retrograd.settings.plan import PlanOf, check_plan
from retrograd.settings.train import check_train
from retrograd.settings.unlearn import check_unlearn

__all__ = ["plan"]

_CHECKS = {"train": check_train, "magic": configs.check, "unlearn": check_unlearn}


def plan(asked: PlanOf, console: Console | None = None) -> None:
    """Print what a command would take; all numbers are written where --json says.

    Raises:
        ValueError: For what the command would refuse, or the plan cannot say.
    """
    console = console or Console()
    check_plan(asked.plan)
    planned = _planned(asked, console)
    if isinstance(planned, Planned):
        show(planned, console)
    else:
        show_many(planned, console)
    if asked.plan.json is not None:
        write_json(asked.plan.json, values_of(planned) if isinstance(planned, Planned) else values_of_many(planned))


def _planned(asked: PlanOf, console: Console) -> Planned | PlannedMany:
    match asked.command:
        case "validate":
            return plan_validate(asked.config, asked.plan, console)
        case "experiment":
            return plan_experiment(asked.config, asked.plan)
    check: Any = _CHECKS[asked.command]
    check(asked.config)
    return plan_run(asked.config, asked.plan)
