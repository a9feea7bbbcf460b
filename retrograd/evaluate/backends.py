"""Who asks the questions of an evaluation: this package, or lm-evaluation-harness. Both leave a file for each pair of
model and task, and a summary of the same shape."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from retrograd.evaluate.answers import write_measured
from retrograd.evaluate.ask import Others, ask
from retrograd.evaluate.folder import content, plain
from retrograd.evaluate.lm_eval.model import HarnessTasks, ask_harness, find_harness, harness_version, refuse_task_code
from retrograd.evaluate.lm_eval.samples import sampled_from, write_sampled
from retrograd.evaluate.lm_eval.summary import summarise_harness
from retrograd.evaluate.lm_eval.task_files import FOLDER, LOADER, described_tasks, loader_text
from retrograd.evaluate.summary import summarise
from retrograd.lm.model import CausalLM
from retrograd.runs.progress import counting
from retrograd.settings.commands import EvaluateConfig
from retrograd.settings.tasks import Role, Task, lab_metrics, tasks_from, tasks_of_lab

__all__ = ["Backend", "find_backend"]


@runtime_checkable
class Backend(Protocol):
    """Who asks."""

    @property
    def names(self) -> Sequence[str]:
        """Of the tasks."""

    def settings(self) -> dict[str, Any]:
        """What another call has to agree with: `tasks` by name, and whatever changes all of them."""

    def beside(self, others: Others) -> Backend:
        """The same, with the models that some tasks compare with."""

    def measure(self, name: str, lm: CausalLM, tokenizer: Any, path: Path, about: dict[str, Any]) -> None:
        """Ask one model one task and write the file.

        Raises:
            ValueError: If it cannot be done.
        """

    def summarise(
        self, folder: Path, models: Sequence[str], reference: str, knows: str | None, never: str | None
    ) -> dict[str, Any]:
        """What the files say."""

    def progress(self, total: int) -> AbstractContextManager[Callable]:
        """Show how many of the files are done; gives a function of how many more are."""


def find_backend(config: EvaluateConfig) -> Backend:
    """Who is asked for, with tasks that can work as far as is known before anything is loaded.

    Raises:
        ValueError: For anything the user can mend.
    """
    if (config.lab is None) == (config.tasks is None):
        raise ValueError("give --lab DIR or --tasks, one of them: what is to be asked?")
    if config.batch_size < 1:
        raise ValueError(f"--batch_size is {config.batch_size}; it has to be at least 1")
    if config.backend == "lm-eval":
        if config.metrics:
            raise ValueError("--metrics are this package's own: leave out --backend lm-eval")
        return _find_harness(config)
    foreign = [name for name in _HARNESS_ONLY if getattr(config, name) is not None]
    if foreign:
        raise ValueError(f"--{foreign[0]} is for --backend lm-eval; settings of tasks go into the file of --tasks")
    tasks = tasks_of_lab(config.lab) if config.lab is not None else tasks_from(Path(str(config.tasks)))
    if config.metrics:
        if config.lab is None:
            raise ValueError("--metrics asks what a lab has; in a file of --tasks write the forms memory, kl and depth")
        tasks = lab_metrics(tasks, config.lab)
    return _Own(tasks, config.batch_size)


_HARNESS_ONLY = ("include_path", "num_fewshot", "limit", "forget")


@dataclass(frozen=True)
class _Own:
    """This package's scorer."""

    tasks: dict[str, Task]
    batch_size: int
    others: Others | None = None

    @property
    def names(self) -> Sequence[str]:
        return list(self.tasks)

    def beside(self, others: Others) -> Backend:
        return dataclasses.replace(self, others=others)

    def settings(self) -> dict[str, Any]:
        assert self.others is not None, "`beside` was called"
        tasks = {}
        for name, task in self.tasks.items():
            compared = {word: source and plain(source) for word, source in self.others.of(task).items()}
            tasks[name] = {**vars(task), "dataset": plain(task.dataset), "content": content(task.dataset), **compared}
            if task.alias:
                tasks[name]["alias"] = {"source": plain(task.alias), "content": content(task.alias)}
        return {"tasks": tasks}

    def measure(self, name: str, lm: CausalLM, tokenizer: Any, path: Path, about: dict[str, Any]) -> None:
        assert self.others is not None, "`beside` was called"
        measured, asked = ask(self.tasks[name], lm, tokenizer, self.batch_size, self.others)
        write_measured(path, measured, {**about, **asked, "settings": dataclasses.asdict(self.tasks[name])})

    def summarise(
        self, folder: Path, models: Sequence[str], reference: str, knows: str | None, never: str | None
    ) -> dict[str, Any]:
        return summarise(folder, models, self.tasks, reference, knows, never)

    def progress(self, total: int) -> AbstractContextManager[Callable]:
        return counting("evaluate", total, "tasks")


@dataclass(frozen=True)
class _LmEval:
    """lm-evaluation-harness."""

    harness: HarnessTasks
    roles: dict[str, Role]
    include_path: Path | None
    shots: int | None
    limit: int | None
    batch_size: int

    def beside(self, others: Others) -> Backend:
        return self

    @property
    def names(self) -> Sequence[str]:
        return list(self.roles)

    def settings(self) -> dict[str, Any]:
        tasks = {}
        for name, role in self.roles.items():
            file, spec = self.harness.local_file(name), self.harness.specs[name]
            tasks[name] = {"asked": plain(spec), "role": role, "content": file and content(str(file))}
        folder = str(self.include_path) if self.include_path else None
        included = folder and {"source": plain(folder), "content": content(folder)}
        return {
            "backend": "lm-eval", "lm_eval": harness_version(), "num_fewshot": self.shots, "limit": self.limit,
            "include_path": included, "tasks": tasks,
        }  # fmt: skip

    def measure(self, name: str, lm: CausalLM, tokenizer: Any, path: Path, about: dict[str, Any]) -> None:
        results = ask_harness(
            self.harness, name, lm, tokenizer, shots=self.shots, limit=self.limit, batch_size=self.batch_size
        )
        settings = {"num_fewshot": self.shots, "limit": self.limit, "version": harness_version()}
        write_sampled(path, sampled_from(results), {**about, "settings": settings})

    def summarise(
        self, folder: Path, models: Sequence[str], reference: str, knows: str | None, never: str | None
    ) -> dict[str, Any]:
        summary = summarise_harness(folder, models, self.roles, reference, knows, never)
        return {"backend": "lm-eval", "lm_eval": harness_version(), **summary}

    @contextmanager
    def progress(self, total: int) -> Iterator[Callable]:
        """Lines between lm-eval's own bars, which have the rate and the time left of a task."""
        done = 0

        def tick(more: int = 1, note: str = "") -> None:
            nonlocal done
            done += more
            print(f"evaluate {done}/{total}: {note}", file=sys.stderr)

        yield tick


def _find_harness(config: EvaluateConfig) -> Backend:
    for name, least in (("num_fewshot", 0), ("limit", 1)):
        number = getattr(config, name)
        if number is not None and number < least:
            raise ValueError(f"--{name} is {number}; it has to be at least {least}")
    roles: dict[str, Role] = dict.fromkeys(_listed(str(config.tasks or "")))
    folder = config.include_path
    if config.lab is not None:
        roles, folder = _of_lab(config, config.lab)
    ours = (LOADER, loader_text()) if config.lab else None
    refuse_task_code([Path(name) for name in roles], folder, config.trust_code, ours)
    harness = find_harness(list(roles), folder)
    forget = _listed(config.forget)
    unknown = [name for name in forget if name not in roles]
    if unknown:
        raise ValueError(f"--forget names {unknown[0]!r}, which is not among --tasks: {', '.join(roles)}")
    by_name = {name: "forget" if spec in forget else roles[spec] for name, spec in harness.specs.items()}
    return _LmEval(harness, by_name, folder, config.num_fewshot, config.limit, config.batch_size)


def _listed(names: str | None) -> list[str]:
    return [name.strip() for name in (names or "").split(",") if name.strip()]


def _of_lab(config: EvaluateConfig, lab: Path) -> tuple[dict[str, Role], Path]:
    """The lab's own tasks for lm-eval."""
    if config.include_path or config.forget:
        raise ValueError("--lab brings its own tasks and knows which are to be forgotten; leave out --include_path and "
                         "--forget, or give --tasks")  # fmt: skip
    return described_tasks(lab, tasks_of_lab(lab)), lab / FOLDER
