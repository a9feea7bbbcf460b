"""`retrograd bank`: what a bank of retrainings holds, what is missing from it, and what each part was made with."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from retrograd.runs.arithmetic import Arithmetic
from retrograd.runs.files import write_json
from retrograd.runs.manifest import Manifest
from retrograd.runs.run_folder import finished, recorded
from retrograd.settings.commands import BankConfig
from retrograd.trust.bank import UNKNOWN, LeftOut, Made, bank_lines
from retrograd.trust.models import FOLDER

__all__ = ["Holding", "bank", "holdings", "made_here", "note_wanted"]

SHOWN = 12


class Wanted(NamedTuple):
    """A set that some call of `validate` asked for."""

    key: str
    name: str
    fraction: float
    weight: float


class Holding(NamedTuple):
    """What there is of one set: the queries with values, whether it failed, and whether its model is kept."""

    wanted: Wanted
    queries: frozenset[str]
    failed: bool
    model: bool


def bank(config: BankConfig, console: Console | None = None) -> int:
    """List a run's bank.

    Returns:
        Exit code: 0 if everything that was asked for is there, of one kind of hardware; 1 if not.
    Raises:
        ValueError: If there is no finished run, or it has no bank.
        RunError: If a line of the bank is broken.
    """
    console = console or Console()
    manifest = finished(config.run)[1]
    folder = config.run / "validation"
    entries = [entry for _, _, entry in bank_lines(folder)]
    if not entries and not list(folder.glob("asked*.json")):
        raise ValueError(f"{config.run} has no bank of retrainings; `retrograd validate {config.run}` makes one")
    identity = manifest.values["identity"]
    mine = [entry for entry in entries if entry["identity"] == identity]
    queries = _queries(config.run, manifest)
    held = holdings(folder, mine, queries)
    models = {path.stem: path.stat().st_size for path in (folder / FOLDER).glob("*.safetensors")}
    console.print(
        f"Bank of {config.run}: {len(mine)} lines, {len(models)} kept models of {sum(models.values()):,} bytes; "
        f"training {identity}."
    )
    if len(mine) < len(entries):
        console.print(f"{len(entries) - len(mine)} more lines are of another training, and count for nothing.")
    console.print(_sets(held, queries))
    whole = _missing(held, queries, config.run, console)
    one_kind = _kinds(mine, manifest.values["arithmetic"], console)
    return 0 if whole and one_kind else 1


def holdings(folder: Path, entries: Iterable[dict[str, Any]], queries: dict[str, str]) -> list[Holding]:
    """What there is of each set that was asked for.

    Args:
        entries: Lines of the bank, of this training.
        queries: Hash of each query by name.
    """
    known: dict[str, set[str]] = {}
    failed, kept = set[str](), set[str]()
    for entry in entries:
        if "failed" in entry:
            failed.add(entry["key"])
            continue
        same = {name for name, digest in queries.items() if entry["queries"].get(name) == digest}
        known.setdefault(entry["key"], set()).update(same)
        pair = (entry.get("model"), entry.get("baseline_model"))
        if all(name and (folder / FOLDER / f"{name}.safetensors").exists() for name in pair):
            kept.add(entry["key"])
    diverged = failed - known.keys()
    return [
        Holding(wanted, frozenset(known.get(wanted.key, ())), wanted.key in diverged, wanted.key in kept)
        for wanted in _wanted(folder)
    ]


def made_here(arithmetic: Arithmetic) -> Made:
    """What this process computes with."""
    if arithmetic.device == "cpu":
        return Made("cpu", f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}", torch.__version__)
    return Made(arithmetic.device.partition(":")[0], arithmetic.device_name, torch.__version__)


def note_wanted(folder: Path, suffix: str, sets: Sequence[LeftOut]) -> None:
    """Remember which sets a call asks for, beside those of earlier calls."""
    path = folder / f"asked{suffix}.json"
    asked = set(_read_wanted(path)) | {Wanted(left_out.key, left_out.name, *left_out.group) for left_out in sets}
    write_json(path, {"sets": [wanted._asdict() for wanted in sorted(asked, key=_order)]})


def _wanted(folder: Path) -> list[Wanted]:
    asked = {wanted for path in folder.glob("asked*.json") for wanted in _read_wanted(path)}
    return sorted(asked, key=_order)


def _read_wanted(path: Path) -> list[Wanted]:
    if not path.exists():
        return []
    return [Wanted(**entry) for entry in json.loads(path.read_text(encoding="utf8"))["sets"]]


def _order(wanted: Wanted) -> tuple[Any, ...]:
    return (not wanted.name.isdecimal(), wanted.fraction, wanted.weight, wanted.name.zfill(12), wanted.key)


def _queries(run: Path, manifest: Manifest) -> dict[str, str]:
    hashes = manifest.values.get("hashes", {})
    own = {name.removeprefix("query "): digest for name, digest in hashes.items() if name.startswith("query ")}
    return {**own, **{name: entry["digest"] for name, entry in recorded(run, manifest).items()}}


def _group(wanted: Wanted) -> str:
    share = f"{wanted.fraction:.4g}" if wanted.name.isdecimal() else "named sets"
    return share if not wanted.weight else f"{share} at weight {wanted.weight:g}"


def _sets(held: Sequence[Holding], queries: dict[str, str]) -> Table:
    table = Table(title="Sets by what is left out", title_justify="left")
    for name in ("left out", "asked for", "complete", "models kept", "to be asked of models", "to retrain", "diverged"):
        table.add_column(name, justify="right")
    for group in dict.fromkeys(_group(holding.wanted) for holding in held):
        these = [holding for holding in held if _group(holding.wanted) == group]
        open_ = [holding for holding in these if not holding.failed and holding.queries != frozenset(queries)]
        ask = sum(holding.model for holding in open_)
        complete = sum(holding.queries == frozenset(queries) for holding in these)
        failed, models = sum(holding.failed for holding in these), sum(holding.model for holding in these)
        table.add_row(group, *map(str, (len(these), complete, models, ask, len(open_) - ask, failed)))
    return table


def _missing(held: Sequence[Holding], queries: dict[str, str], run: Path, console: Console) -> bool:
    """Tell what is missing, by query; whether nothing is."""
    open_ = [holding for holding in held if not holding.failed and holding.queries != frozenset(queries)]
    lacking: dict[tuple[Wanted, ...], list[str]] = {}  # queries that lack the same sets are told together
    for name in queries:
        lacking.setdefault(tuple(holding.wanted for holding in open_ if name not in holding.queries), []).append(name)
    for sets, names in lacking.items():
        if sets:
            listed = _first([f"{_group(wanted)} set {wanted.name}" for wanted in sets])
            who = f"Query {names[0]!r} lacks" if len(names) == 1 else f"{len(names)} queries ({_first(names)}) lack"
            console.print(f"{who} {len(sets)} of {len(held)} sets: {listed}.", markup=False)
    if not open_:
        console.print(f"Complete: all {len(held)} sets have values of all {len(queries)} queries.")
        return True
    retrain = sum(not holding.model for holding in open_)
    console.print(
        f"INCOMPLETE: {len(open_)} sets. The calls of `retrograd validate {run}` that asked for them finish it: "
        f"{len(open_) - retrain} by asking kept models, {retrain} by retraining.",
        style="bold red", highlight=False,
    )  # fmt: skip
    return False


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _kinds(entries: Sequence[dict[str, Any]], arithmetic: dict[str, Any], console: Console) -> bool:
    """Tell what the retrainings were made with; whether all are of one kind."""
    made = Counter(map(_kind, entries))
    console.print("Made with:")
    for (kind, threads, together), number in made.items():
        kept = {entry["model"] for entry in entries if "model" in entry and _kind(entry) == (kind, threads, together)}
        how = f"{arithmetic['dtype']}, engine {arithmetic['engine']}, {threads} threads"
        stack = f", {together} models in a stack" if together > 1 else ""
        console.print(f"  {kind}; {how}{stack}: {number} lines, {len(kept)} models", highlight=False, soft_wrap=True)
    kinds = {kind for kind, *_ in made}
    if len(kinds) > 1:
        console.print(
            f"MIXED: {len(kinds)} kinds of hardware or versions; `retrograd validate` refuses such a bank. Move the "
            "retrains*.jsonl of all but one kind away.",
            style="bold red",
        )
    return len(kinds) <= 1


def _kind(entry: dict[str, Any]) -> tuple[Made, int, int]:
    """What a line was made with, its threads, and the models of its stack."""
    made = Made(**entry["made"]) if "made" in entry else UNKNOWN
    return made, entry["conditions"].get("threads", 0), entry["conditions"].get("together", 1)


def _processor() -> str:
    """The processor's name; its architecture where the system does not tell."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf8", errors="replace").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
