"""`retrograd experiment`: a worker, or several, of an experiment. Running again does what is missing."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from retrograd.attack.beforehand import check_data
from retrograd.attack.findings import findings
from retrograd.attack.material import check_half, material_of
from retrograd.attack.tell import write_findings
from retrograd.commands.attack import meet
from retrograd.commands.compare import written
from retrograd.commands.magic import magic
from retrograd.commands.unlearn import unlearn
from retrograd.durable import LOCK, foreign, make_folder
from retrograd.evaluate.metrics import check_column
from retrograd.experiment.attacked import ATTACKS, gathered
from retrograd.experiment.carry import Runners
from retrograd.experiment.grid import GridMaker, write_grid
from retrograd.experiment.lease import Queue
from retrograd.experiment.plan import Plan
from retrograd.experiment.seen import refuse_oracles
from retrograd.experiment.table import write_results
from retrograd.experiment.tasks import Maker
from retrograd.experiment.work import work
from retrograd.lab.build import lab
from retrograd.runs.errors import STARTED_BY, Stop, StoppedError, stoppable
from retrograd.runs.files import write_atomic
from retrograd.runs.lock import locked
from retrograd.runs.progress import overall
from retrograd.settings.attack import AttackConfig, Configuration
from retrograd.settings.attacked import LAB
from retrograd.settings.commands import CompareConfig, LabConfig
from retrograd.settings.experiment import ExperimentConfig, ExperimentSpec, lab_of, read_experiment
from retrograd.settings.grid import GridSpec, is_grid, read_grid
from retrograd.settings.parse import build, dump_yaml

__all__ = ["experiment"]

TASKS, SPEC = "tasks", "experiment.yaml"


def experiment(config: ExperimentConfig, console: Console | None = None) -> int:
    """Do the tasks of an experiment that are missing, side by side with other workers, and write its table.

    Returns:
        0 if everything is there, 1 if something failed, 143 if it was asked to end before.
    Raises:
        ValueError: For anything the user can mend before anything is computed.
        RunError: For a failure of the machine; the same call goes on.
    """
    console = console or Console()
    if config.workers < 1 or not config.lease > 0:
        raise ValueError(f"--workers is {config.workers} and --lease {config.lease}: at least 1, and above 0")
    maker = _maker(config, console)
    _claim(config.out, maker.spec, write=True)
    queue = Queue(config.out.resolve() / TASKS, config.lease)
    if config.retry:
        queue.forget_failures()
    with stoppable(signal.SIGINT) as stop, _others(config, stop), _shown(queue) as show:
        try:
            plan = work(maker, queue, Runners(magic, unlearn, partial(_meet, config.out)), show, stop)
        except StoppedError:
            console.print("stopped; the same command goes on")
            return 143
    if isinstance(maker, GridMaker):
        text = write_grid(maker, queue, plan.lost(queue), config.out, config.file.stem)
    else:
        attacked = _attacked(maker.spec, plan, queue, config.out)
        text = write_results(maker.spec, plan, queue, config.out, config.file.stem, attacked)
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    lost = plan.lost(queue)
    console.print(f"{config.out / 'results.md'}: {len(plan.tasks) - len(lost)} of {len(plan.tasks)} tasks are done.")
    return 1 if lost else 0


def _maker(config: ExperimentConfig, console: Console) -> Maker | GridMaker:
    """What makes the tasks of a file; what cannot work is told now."""
    if is_grid(config.file):
        grid = read_grid(config.file, config.names)
        _claim(config.out, grid, write=False)
        return GridMaker(grid)
    built = lab_of(config.file, config.names, config.out.resolve() / LAB)
    names = config.names if built is None else (*config.names, f"{LAB}={built.dir}")
    spec = read_experiment(config.file, names)
    _claim(config.out, spec, write=False)
    for column in spec.columns:
        check_column(column, spec.report.tasks)
    maker = Maker(spec)
    for method in spec.methods:
        maker.config(method, spec.seeds[0], None)
    if built is not None:
        _claim(config.out, spec, write=True)
        _build(built, console)
    refuse_oracles(spec)  # by content: the lab has to be there
    if (attacked := spec.attacked()) is not None:
        check_half(attacked)
        check_data(attacked)
    return maker


def _build(config: LabConfig, console: Console) -> None:
    """The lab of the experiment, finished; another worker may be building it."""
    with locked(config.dir.parent, f"{LOCK}-{LAB}", patience=math.inf, tidy=False):
        lab(config, Console(quiet=True))
    console.print(f"{config.dir}: the lab is built.")


def _meet(out: Path, settings: dict[str, Any], configuration: Configuration, model: str, place: Path) -> None:
    """An attack's configuration against a model. What attacks train on is shared by all tasks, for files of one name
    have one content."""
    config: AttackConfig = build(AttackConfig, {**settings, "out": out / ATTACKS, "heartbeat": 5.0}, "attack")
    base = config.base or str(config.lab and config.lab / "models/base")
    meet(config, configuration, model, base, place, material_of(config))


def _attacked(spec: ExperimentSpec, plan: Plan, queue: Queue, out: Path) -> list[str]:
    """Write what attacks found and compare models under them; the tables, as Markdown."""
    config = spec.attacked(out.resolve() / ATTACKS)
    if config is None:
        return []
    with locked(config.out, patience=math.inf, tidy=False):
        folder = gathered(config, plan, queue)
        if folder is None:
            return []
        write_findings(findings(folder, config.utility), config.out)
        return written(CompareConfig((config.out,), utility=config.utility[0]))


def _claim(out: Path, spec: ExperimentSpec | GridSpec, *, write: bool) -> None:
    """Refuse a folder of something else; say in it what the experiment is."""
    if out.exists() and not (out / SPEC).exists() and (not out.is_dir() or any(foreign(out))):
        raise ValueError(f"{out} exists and is no experiment; choose another folder")
    if write:  # this file first: another worker may look at any moment
        text = dump_yaml(_plain(dataclasses.asdict(spec)), allow_unicode=True)
        write_atomic(out / SPEC, lambda temporary: temporary.write_text(text, encoding="utf8"))
        make_folder(out / TASKS)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


@contextlib.contextmanager
def _others(config: ExperimentConfig, stop: Stop) -> Iterator[None]:
    """The other workers that this call starts: processes of the same command. They end with it."""
    names = [word for name in config.names for word in ("--names", name)]
    command = [sys.executable, "-m", "retrograd", "experiment", str(config.file), str(config.out), "--lease",
               str(config.lease), *names]  # fmt: skip
    logs = config.out / "workers"
    if config.workers > 1:
        make_folder(logs)
    started, environment = [], {**os.environ, STARTED_BY: str(os.getpid())}
    try:
        for number in range(1, config.workers):
            with (logs / f"{number}.txt").open("a", encoding="utf8") as log:
                started.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
        yield
    finally:
        if stop.asked is not None or sys.exc_info()[0] is not None:
            for process in started:
                process.terminate()
        for process in started:
            process.wait()


@contextlib.contextmanager
def _shown(queue: Queue) -> Iterator[Callable[[Plan, str], None]]:
    """A bar over all tasks that are known and may come, with their rate, the time left and what goes on."""
    with overall("tasks") as progress:
        yield lambda plan, text: _move(progress, queue, plan, text)


def _move(progress: Progress, queue: Queue, plan: Plan, text: str) -> None:
    lost = plan.lost(queue)
    done = sum(name in lost or queue.result(name) is not None for name in plan.tasks)
    task = progress.tasks[0]
    rate = f"{60 * task.speed:.1f}/min" if task.speed else ""
    free = max(20, progress.console.width - 60)
    progress.update(task.id, completed=done, total=len(plan.tasks) + plan.more, rate=rate, note=text[:free])
