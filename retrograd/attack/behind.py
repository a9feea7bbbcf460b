"""The answers behind a comparison: for each cell its runs, and in each the evaluations that its numbers are read at.

    before    of the model as it is, step 0
    after     at the step of the cell's accuracy; null where no step keeps general ability
    last      at the step of latent recovery, the last one

`compare.json` says where they lie; they stay in the folders of the attacks, from where `read_run` reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from retrograd.attack.faced import Faced
from retrograd.evaluate.answers import read_measured
from retrograd.evaluate.on_the_way import answers_path
from retrograd.query.prepare import Answers
from retrograd.settings.tasks import Task

__all__ = ["MOMENTS", "Given", "asked_tasks", "half_unseen", "masks", "read_run", "run_behind"]

MOMENTS = ("before", "after", "last")


class Given(NamedTuple):
    """What a model gave for n questions. right: the right option, [n]; chosen: the model's, −1 where it failed, [n];
    probability: of the right option among the question's options, as the task counts them, NaN where it failed, [n]."""

    right: np.ndarray
    chosen: np.ndarray
    probability: np.ndarray


def run_behind(meeting: Faced, after: int | None) -> dict[str, Any]:
    """Where the answers of a model under a configuration lie, as plain values.

    Args:
        after: The step that the cell's accuracy is read at.
    """
    course = meeting.course
    places = {"before": 0, "after": None if after is None else course.steps.index(after),
              "last": len(course.steps) - 1 if meeting.rise is None else meeting.rise.place}  # fmt: skip

    def answers_at(place: int | None) -> dict[str, Any] | None:
        if place is None:
            return None
        run, step = course.places[place]
        strength = None if course.strengths is None else course.strengths[place]
        where = {"step": course.steps[place], "strength": strength}
        return {**where, "run": str(run.relative_to(meeting.folder)), "at": step}

    return {"folder": str(meeting.folder), "model": meeting.model, "configuration": meeting.configuration,
            "seed": meeting.seed, **{moment: answers_at(place) for moment, place in places.items()}}  # fmt: skip


def half_unseen(meeting: Faced) -> str | None:
    """What of the forget questions an attack does not show: "all", the "first" half or the "second"."""
    if meeting.unseen is None:
        return None
    if meeting.unseen.all():
        return "all"
    return "first" if (meeting.unseen == meeting.course.first).all() else "second"


def asked_tasks(tasks: Mapping[str, Task]) -> dict[str, Task]:
    """The tasks of choices in the order of their questions: what is to go, then what measures general ability."""
    choices = {name: task for name, task in tasks.items() if task.choices}
    return {name: choices[name] for name in sorted(choices, key=lambda name: choices[name].role != "forget")}


def read_run(folder: Path, where: Mapping[str, Any], tasks: Mapping[str, Task]) -> dict[str, Given]:
    """What a model gave at one moment, by task; without the tasks that are missing there.

    Args:
        folder: Of attacks.
        where: A moment of `run_behind`.
        tasks: Of choices.
    """
    given = {}
    for name, task in tasks.items():
        path = answers_path(folder / where["run"], where["at"], name)
        if path.exists():
            measured = read_measured(path)[0]
            assert isinstance(measured, Answers), "a task of choices has answers"
            given[name] = _given(measured, task)
    return given


def _given(measured: Answers, task: Task) -> Given:
    scored = measured.scored
    logprobs = scored.logprobs / scored.widths.clamp(min=1) if task.normalise else scored.logprobs
    chosen = scored.chosen_norm if task.normalise else scored.chosen
    probability = logprobs.log_softmax(1).gather(1, scored.gold[:, None])[:, 0].exp()
    return Given(scored.gold.numpy(), chosen.numpy(), probability.where(~scored.failed, float("nan")).numpy())


def masks(faced: Sequence[Faced], reported: np.ndarray | None) -> dict[str, Any]:
    """Of the forget questions, which are about half A, and which the cells' accuracies are of, as 0 and 1.

    Args:
        reported: The half that no step was chosen by, [n].
    """
    first = faced[0].course.first
    return {"first": first.astype(int).tolist(), "told": None if reported is None else reported.astype(int).tolist()}
