"""The folder of a run to come: whether it may be written, what is written before the first step, and emptying it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from retrograd.data.rows import Rows
from retrograd.durable import foreign, remove
from retrograd.runs.arithmetic import begun_with, refuse_other_arithmetic
from retrograd.runs.files import write_atomic
from retrograd.runs.manifest import Manifest, environment
from retrograd.runs.setup import Setup
from retrograd.settings.parse import dump_yaml, load_yaml
from retrograd.settings.train import RunConfig, difference, to_dict

__all__ = ["begin", "check_folder", "empty"]

_OTHERS = {"metasmoothness"}  # what another command may have left in the folder of a run to come


def check_folder(config: RunConfig, command: str) -> None:
    """Refuse a folder that holds another run, with the difference, before anything is loaded.

    Raises:
        ValueError: If it does, or holds something else.
    """
    stored = config.run / "run_config.yaml"
    if not stored.exists():
        if config.run.exists() and (not config.run.is_dir() or set(foreign(config.run)) - _OTHERS):
            raise ValueError(f"{config.run} exists and is no run of retrograd; choose another folder")
        return
    if config.overwrite:
        return
    begun = Manifest(config.run / "manifest.json").values
    other = begun.get("command", "magic")  # of runs of before
    if begun and other != command:
        raise ValueError(
            f"{config.run} holds a run of `retrograd {other}`. Use another folder, or --overwrite to start afresh."
        )
    old = load_yaml(stored.read_text(encoding="utf8"))
    changed = difference(old, to_dict(config))
    if changed:
        lines = "\n  ".join(changed)
        raise ValueError(
            f"{config.run} holds a run of another configuration:\n  {lines}\nUse another folder, or --overwrite to "
            "start afresh."
        )


def empty(run: Path) -> None:
    """Remove a run so that a kill meanwhile leaves one that is not done, and can be started afresh again."""
    remove(run / "manifest.json")
    for name in set(foreign(run)) - {"run_config.yaml"}:
        remove(run / name)
    remove(run / "run_config.yaml")


def begin(config: RunConfig, command: str, manifest: Manifest, setup: Setup, **more: Any) -> None:
    """Write what the run is before its first step: its settings, and in the manifest what they led to.

    Raises:
        ValueError: If it was begun with other arithmetic than this machine's; nothing is written then.
    """
    refuse_other_arithmetic(config.run, begun_with(config.run), setup.arithmetic)
    values = dump_yaml(to_dict(config))
    write_atomic(config.run / "run_config.yaml", lambda temporary: temporary.write_text(values, encoding="utf8"))
    manifest.update(
        **more,
        command=command,
        identity=setup.identity,
        hashes=setup.hashes,
        arithmetic=dataclasses.asdict(setup.arithmetic),
        **environment(),
        steps=len(setup.stream),
        parameters=sum(leaf.numel() for leaf in setup.initial.params.values()),
        fused_head=setup.model.fused,
        **({} if "engine_why" in manifest.values else {"engine_why": setup.engine.why}),
        rows=_told(setup.stream.rows),
    )


def _told(rows: Rows) -> dict[str, Any]:
    return {
        "documents": rows.documents, "rows": len(rows), "targets": rows.targets, "longest": rows.max_length,
        "truncated": rows.truncated, "packed": rows.packed, "skipped_chunks": rows.skipped_chunks,
        "skipped": {str(document): reason for document, reason in rows.skipped.items()},
    }  # fmt: skip
