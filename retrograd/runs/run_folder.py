"""A run on disk: opening one that is finished, and refusing what does not belong to it."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from retrograd.core.sweep import Event
from retrograd.runs.kinds import assemble, read_settings
from retrograd.runs.lock import locked
from retrograd.runs.manifest import Manifest
from retrograd.runs.setup import Loaded, Setup
from retrograd.runs.states.budget import Layout, Replay, free_memory
from retrograd.runs.states.relay import parted
from retrograd.runs.trajectory import Trajectory
from retrograd.settings import run as configs
from retrograd.settings.parse import build, parse_size, read_yaml
from retrograd.settings.run import AttributedConfig, QueryConfig
from retrograd.settings.train import ExportConfig, RunConfig
from retrograd.settings.unlearn import UnlearnConfig, refuse_method

__all__ = [
    "Opened",
    "added_queries",
    "describe",
    "finished",
    "free_disk",
    "heartbeat_of",
    "holding",
    "lay_out_whole",
    "load_run",
    "open_run",
    "recorded",
    "refuse_other",
    "refuse_stored_code",
    "replay_of",
    "with_queries",
]


class Opened(NamedTuple):
    """A finished run with everything it is made of. loaded.asked has the run's own queries, then those added later."""

    folder: Path
    config: AttributedConfig
    manifest: Manifest
    loaded: Loaded

    def trajectory(
        self, observe: Callable[[Event], None] = lambda event: None, logs: Sequence[Path] = ()
    ) -> Trajectory:
        """Its trajectory, to read states from or to reverse again; `logs` is what `observe` appends to."""
        return self.loaded.trajectory(replay_of(self.config), self.folder / "checkpoints", observe, logs)


def open_run(
    folder: Path, more: dict[str, QueryConfig] | None = None, *, threads: int | None = None, trust_code: bool = False,
    shared: Mapping[str, Any] | None = None,
) -> Opened:  # fmt: skip
    """Load a finished run, with the queries added to it and `more` new ones.

    Args:
        threads: Thread count to use; the run's own, and so its own bits, when None.
        shared: Settings of how the processes of a job share it, in place of its own.
        trust_code: Run the functions that the folder's queries name; those of `more` are the caller's own.
    Raises:
        ValueError: If there is no finished run, it names code that is not trusted, a name is taken, or data, model or
            recipe have changed since.
    """
    config, manifest = finished(folder)
    run = load_run(
        dataclasses.replace(config, **(shared or {})), manifest, more, threads=threads, trust_code=trust_code
    )
    refuse_other(folder, run.manifest, run.loaded)
    known, added = recorded(folder, run.manifest), added_queries(folder).keys() - (more or {}).keys()
    for name in added & known.keys():
        if known[name]["digest"] != run.loaded.hashes[f"query {name}"]:
            raise ValueError(
                f"query {name!r} of {folder} reads other data than when it was asked, or what is trained on before it "
                f"(its `then`) has changed; put its files back, or delete {folder / 'queries' / name}"
            )
    return run


def load_run(
    config: AttributedConfig,
    manifest: Manifest,
    more: dict[str, QueryConfig] | None = None,
    *,
    threads: int | None = None,
    trust_code: bool = False,
) -> Opened:
    """As `open_run`, whether or not data, model and recipe are what they were."""
    refuse_stored_code(config, trust_code, asked=more or {})
    loaded = assemble(with_queries(config, more))
    if threads is not None:
        torch.set_num_threads(threads)
    return Opened(config.run, config, manifest, loaded)


def refuse_stored_code(config: AttributedConfig, trusted: bool, asked: Container[str] = ()) -> None:
    """Refuse functions that a run's folder names, unless they are trusted.

    Args:
        asked: Names of queries that come from the caller, whatever the folder has under them.
    Raises:
        ValueError: With the first such function and the file that names it.
    """
    stored = config.run / "run_config.yaml"
    configs.refuse_code(configs.queries_of(config), stored, trusted)
    if isinstance(config, UnlearnConfig):
        refuse_method(config.method, stored, trusted)
    for name, query in added_queries(config.run).items():
        if name not in asked:
            file = config.run / "queries" / name / "query_config.yaml"
            configs.refuse_code({name: query}, file, trusted)


def with_queries(config: AttributedConfig, more: dict[str, QueryConfig] | None = None) -> AttributedConfig:
    """The configuration of a run with its own queries, those added to it and `more` new ones, all by name.

    Raises:
        ValueError: If a name is taken, or a query cannot work.
    """
    own = configs.queries_of(config)
    added = {name: query for name, query in added_queries(config.run).items() if name not in (more or {})}
    taken = sorted(own.keys() & (more or {}).keys())
    if taken:
        raise ValueError(f"{config.run} has a query named {taken[0]!r} already; give the new one another name")
    everything = {**own, **added, **(more or {})}
    for name, query in everything.items():
        configs.check_query(name, query, everything)
    return dataclasses.replace(config, query=QueryConfig(), queries=everything)


def finished(folder: Path) -> tuple[AttributedConfig, Manifest]:
    """Configuration and manifest of a finished run.

    Raises:
        ValueError: If there is none in the folder.
    """
    if not (folder / "run_config.yaml").exists():
        raise ValueError(
            f"{folder} holds no run; give the folder of a finished `retrograd magic`, or of `retrograd unlearn` with "
            "--attribute"
        )
    config, manifest = read_settings(folder), Manifest(folder / "manifest.json")
    command = manifest.values.get("command", "magic")
    if isinstance(config, UnlearnConfig) and config.attribute is None:
        raise ValueError(f"{folder} is a run of `retrograd unlearn` without --attribute, which has no scores")
    if not manifest.done("scores"):
        raise ValueError(f"the run in {folder} is not finished; run its `retrograd {command}` command again first")
    return config, manifest


@contextmanager
def holding(
    folder: Path, *, shared: bool = False, patience: float = 0.3
) -> Iterator[tuple[AttributedConfig, Manifest]]:
    """Configuration and manifest of a finished run, locked meanwhile; `shared` and `patience` as for `locked`.

    Raises:
        ValueError: If there is none in the folder, or another process works on it.
    """
    finished(folder)  # before anything is made there
    with locked(folder, shared=shared, patience=patience):
        yield finished(folder)


def lay_out_whole(folder: Path, *, trust_code: bool = False) -> None:
    """Lay out whole what a query by several processes left in pieces of a finished run when it was stopped.

    Raises:
        ValueError: As `open_run`, or if another process works on the run.
        RunError: If a file is broken.
    """
    if not parted(folder / "checkpoints"):
        return
    with holding(folder, patience=60):
        if parted(folder / "checkpoints"):  # another process may have been faster
            open_run(folder, trust_code=trust_code).loaded.settle(folder / "checkpoints")


def added_queries(folder: Path) -> dict[str, QueryConfig]:
    """Queries that `retrograd query` has added to a run, by name."""
    files = sorted((folder / "queries").glob("*/query_config.yaml"))
    return {path.parent.name: build(QueryConfig, read_yaml(path), str(path)) for path in files}


def recorded(folder: Path, manifest: Manifest) -> dict[str, dict[str, str]]:
    """The manifest's entries of the added queries that are there; one whose folder was deleted is gone."""
    names = added_queries(folder)
    return {name: entry for name, entry in manifest.values.get("queries", {}).items() if name in names}


def refuse_other(folder: Path, manifest: Manifest, loaded: Setup) -> None:
    """Refuse a run whose data, model, recipe or query is not what it was begun with.

    Raises:
        ValueError: With the parts that differ.
    """
    known, found = manifest.values.get("hashes", {}), loaded.hashes
    changed = [f"{name}: {old} → {found.get(name)}" for name, old in known.items() if found.get(name) != old]
    if not changed and manifest.values.get("identity") in (None, loaded.identity):
        return
    lines = "\n  ".join(changed or ["the run's settings"])
    raise ValueError(
        f"{folder} was begun with other inputs under the same names:\n  {lines}\nA file or the model has changed "
        "since. Put it back, use another folder, or --overwrite to start afresh."
    )


def replay_of(config: AttributedConfig, memory: int | None = None, disk: int | None = None) -> Replay:
    """Budgets in bytes; "auto" is half of what is free: as given, or now."""
    given = config.replay
    free = (free_memory() if memory is None else memory, free_disk(config.run) if disk is None else disk)
    memory, disk = (
        there // 2 if asked == "auto" else parse_size(asked)
        for asked, there in zip((given.memory, given.disk), free, strict=True)
    )
    return Replay(given.plan, memory, disk, given.interval, given.slots, given.keep, heartbeat_of(config))


def heartbeat_of(config: RunConfig) -> float:
    """Seconds between a run's resume points."""
    if isinstance(config, ExportConfig):
        return config.heartbeat
    return config.replay.heartbeat if isinstance(config, AttributedConfig) else Replay.heartbeat


def free_disk(folder: Path) -> int:
    """Bytes free where a folder is or would be."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free


def describe(chosen: Layout) -> dict[str, Any]:
    """The chosen replay plan, for the manifest."""
    return {
        "plan": chosen.kind, "state_bytes": chosen.state_bytes, "slots": chosen.cost.slots, "on_disk": chosen.on_disk,
        "held_bytes": chosen.held_bytes, "gradients_on_disk": chosen.gradients_on_disk,
        "advances": chosen.cost.advances, "replays": chosen.cost.replays,
    }  # fmt: skip
