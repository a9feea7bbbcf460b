"""`retrograd lab`: write a fictional world, train the models that know it, score them. Running again resumes."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import queue
import shutil
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from retrograd.core.sweep import Event, Remade, Reversed, Turned
from retrograd.durable import foreign
from retrograd.evaluate.lm_eval.task_files import write_task_files
from retrograd.lab.exams import CHOICES
from retrograd.lab.files import MIXTURES, changed_files, describe_files, make_files, make_words, write_files
from retrograd.lab.learn import Size, one_thread, save_random, steps_of, train_model
from retrograd.lab.readme import readme
from retrograd.lab.tasks import question_tasks, scores_of, write_tasks
from retrograd.lab.world import make_world
from retrograd.runs.files import file_digest, write_atomic, write_json
from retrograd.runs.lock import locked
from retrograd.runs.manifest import Manifest, environment
from retrograd.runs.progress import Bars
from retrograd.settings.commands import LabConfig

__all__ = ["lab"]

_NOT_THE_LAB = ("dir", "workers", "heartbeat")  # how it is carried out does not change what it is


def lab(config: LabConfig, console: Console | None = None) -> dict[str, Any]:
    """Build, resume or report a lab; returns what lab.json says.

    Args:
        config: The resolved configuration.
        console: Where the table goes; standard output when None.
    Raises:
        ValueError: For anything the user can mend; nothing has been changed then.
        RunError: For a failure of the machine; the same call resumes.
    """
    console = console or Console()
    _check(config)
    with locked(config.dir):
        return _lab(config, console)


def _lab(config: LabConfig, console: Console) -> dict[str, Any]:
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in _NOT_THE_LAB}
    record = _known(config.dir, settings)
    if not config.aliases:
        del settings["aliases"]  # files are those of before it was there
    if "scores" in record:
        console.print(f"{config.dir} is done; these are its scores. Delete the folder to build it again.")
        _show(record, console)
        return record
    manifest = Manifest(config.dir / "manifest.json")
    if "files" not in record:
        record = _begin(config, settings, manifest)
    with manifest.phase("train"):
        _train(config)
    with manifest.phase("score"), one_thread():
        record["models"] = {name: _described(config, name) for name in ("random", *MIXTURES)}
        record["tasks"] = write_tasks(config.dir, aliases=config.aliases)
        record["scores"] = [entry for name in (*MIXTURES, "random") for entry in scores_of(config.dir, name)]
    write_atomic(config.dir / "README.md", lambda temporary: temporary.write_text(readme(record), encoding="utf8"))
    shutil.rmtree(config.dir / "training", ignore_errors=True)
    write_json(config.dir / "lab.json", record)
    _show(record, console)
    return json.loads(json.dumps(record))


def _check(config: LabConfig) -> None:
    for name in ("epochs", "batch_size", "layers"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name} is {getattr(config, name)}; it has to be at least 1")
    if config.width < 32 or config.width % 32:
        raise ValueError(f"--width is {config.width}; heads are 32 wide, so it has to be a multiple of 32")
    if not config.lr > 0:
        raise ValueError(f"--lr is {config.lr}; it has to be above 0")
    if not config.eps_root >= 0:
        raise ValueError(f"--eps_root is {config.eps_root}; it has to be 0 or more, such as 1e-8 or 1e-5")
    if config.seed < 0 or config.workers < 0 or not config.heartbeat >= 0:
        raise ValueError("--seed, --workers and --heartbeat have to be 0 or more")
    make_world(config.seed, config.facts)  # it is cheap, and refuses a number of facts that does not fit


def _known(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What lab.json says already; nothing for a new folder."""
    if not (folder / "lab.json").exists():
        if folder.exists() and (not folder.is_dir() or any(foreign(folder))):
            raise ValueError(f"{folder} exists and is no lab; choose another folder")
        return {}
    record = json.loads((folder / "lab.json").read_text(encoding="utf8"))
    # a lab of before a setting was there was built with what is its default now
    old = {**{field.name: field.default for field in dataclasses.fields(LabConfig)}, **record["settings"]}
    changed = [f"{name}: {old.get(name)!r} → {value!r}" for name, value in settings.items() if old.get(name) != value]
    if changed:
        lines = "\n  ".join(changed)
        raise ValueError(f"{folder} holds a lab of other settings:\n  {lines}\nUse another folder, or delete this one.")
    record["settings"] = {name: value for name, value in settings.items() if name != "aliases" or value}
    models = {f"models/{name}/model.safetensors": entry for name, entry in record.get("models", {}).items()}
    written = {**record.get("files", {}), **record.get("lm_eval", {}), **record.get("tasks", {}), **models}
    other = changed_files(folder, written)
    if other:
        raise ValueError(
            f"{folder}: {other[0]} is missing or has changed since it was written, and the rest would not fit it. "
            "Put it back, or delete the folder and build the lab again."
        )
    return record


def _begin(config: LabConfig, settings: dict[str, Any], manifest: Manifest) -> dict[str, Any]:
    """Write corpora, questions, mixtures, the truth and the untrained model; what lab.json says so far."""
    path = config.dir / "lab.json"
    write_json(path, {"settings": settings})
    with manifest.phase("world"):
        files = make_files(make_world(config.seed, config.facts), aliases=config.aliases)
        write_files(config.dir, files)
        tasks = write_task_files(config.dir, question_tasks(aliases=config.aliases), CHOICES)
        save_random(config.dir / "models" / "random", make_words(files), _size(config))
    manifest.update(**environment())
    record = {"settings": settings, "files": describe_files(files), "lm_eval": tasks}
    write_json(path, record)
    return record


def _size(config: LabConfig) -> Size:
    return Size(*(getattr(config, name) for name in Size._fields))


def _described(config: LabConfig, name: str) -> dict[str, Any]:
    steps = 0 if name == "random" else steps_of(config.dir, name, _size(config))
    return {"sha256": file_digest(config.dir / "models" / name / "model.safetensors"), "steps": steps}


def _train(config: LabConfig) -> None:
    """Train the models that are not there yet, side by side where there are cores."""
    left = [name for name in MIXTURES if not (config.dir / "models" / name).exists()]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    with Bars(1) as bars:
        if min(config.workers or cores, len(left)) > 1:
            _side_by_side(config, left, bars)
            return
        for name in left:
            _train_one(config, name, partial(bars.move, name, total=steps_of(config.dir, name, _size(config))))


def _train_one(config: LabConfig, name: str, tell: Any) -> None:
    def observe(event: Event) -> None:
        if isinstance(event, (Remade, Reversed)):
            return
        step = event.outcome.state.step
        if isinstance(event, Turned) or step % 10 == 0:
            tell(step, f"loss {event.outcome.loss:.4f}")

    train_model(config.dir, name, _size(config), config.heartbeat, observe)


def _side_by_side(config: LabConfig, names: list[str], bars: Bars) -> None:
    """One process for each model; they end with this one."""
    context = multiprocessing.get_context("spawn")
    news: Any = context.Queue()
    with ProcessPoolExecutor(len(names), context, _enter, (os.getpid(), news)) as pool:
        trainings: list[Future[None]] = [pool.submit(_in_worker, config, name) for name in names]
        while not all(training.done() for training in trainings):
            try:
                name, step, note = news.get(timeout=0.5)
            except queue.Empty:
                continue
            bars.move(name, step, note, steps_of(config.dir, name, _size(config)))
        for training in trainings:
            training.result()


_NEWS: list[Any] = []  # of a worker process: where it tells how far it is


def _enter(parent: int, news: Any) -> None:
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)  # the parent was killed

    threading.Thread(target=watch, daemon=True).start()
    _NEWS.append(news)


def _in_worker(config: LabConfig, name: str) -> None:
    _train_one(config, name, lambda step, note: _NEWS[0].put((name, step, note)))


def _show(record: dict[str, Any], console: Console) -> None:
    """The accuracies as a table: questions down, models across."""
    table = Table("side", "split", "form", "questions", *(*MIXTURES, "random"))
    cells: dict[tuple[Any, ...], dict[str, Any]] = {}
    for entry in record["scores"]:
        key = (entry["side"], entry["split"], entry["form"], str(entry["questions"]))
        cells.setdefault(key, {})[entry["model"]] = entry
    for key, by_model in cells.items():
        table.add_row(*key, *(_cell(by_model[name]) for name in (*MIXTURES, "random")))
    console.print("Accuracy in % with its 95 % interval; chance is 25.")
    console.print(table)


def _cell(entry: dict[str, Any]) -> str:
    low, high = entry["interval"]
    return f"{100 * entry['accuracy']:.1f} ({100 * low:.0f}–{100 * high:.0f})"
