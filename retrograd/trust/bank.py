"""The bank of retrainings: a line for each, by the set that was left out; what is in it is never trained again.

A retraining that diverged is in it with the reason and no numbers. Where its model was kept, a line names it
(`trust.models`), and a later query is asked of that model: its values are one more line of the same key and conditions.
Every process appends to a file of its own and all read all files, so that ranks, machines and later calls share one
bank; copying files into one folder merges them. A bank is of one hardware and one version of torch: retrainings on
different ones differ by as much as small sets of data do.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from retrograd.durable import make_folder
from retrograd.runs.errors import RunError
from retrograd.runs.files import append_line, read_lines

__all__ = ["BASELINE", "UNKNOWN", "Bank", "Failed", "Kept", "LeftOut", "Made", "Retrained", "bank_lines"]

BASELINE = "baseline"


class LeftOut(NamedTuple):
    """A set to leave out, or to weigh otherwise.

    Args:
        name: For people.
        fraction: Its share of all documents (or tokens).
        places: Flat places in the data weights, ascending.
        weight: What its data weights are multiplied by: 0 leaves it out.
    """

    name: str
    fraction: float
    places: np.ndarray
    weight: float = 0.0

    @property
    def key(self) -> str:
        """Hash of the places, and of the weight where that is not 0."""
        digest = hashlib.sha256(np.asarray(self.places, dtype="<i8").tobytes())
        if self.weight:
            digest.update(repr(float(self.weight)).encode())
        return self.name if self.name == BASELINE else digest.hexdigest()[:16]

    @property
    def random(self) -> bool:
        """Drawn at random; such sets are named by number."""
        return self.name.isdecimal()

    @property
    def group(self) -> tuple[float, float]:
        """Fraction and weight: sets that have both in common are judged together."""
        return self.fraction, self.weight


class Retrained(NamedTuple):
    """Query values in nats, [K]: without the set, and with everything under the same conditions.

    model, baseline_model: The names under which both models were kept; "" where they were not.
    """

    values: list[float]
    baseline: list[float]
    model: str = ""
    baseline_model: str = ""


class Failed(NamedTuple):
    """A retraining that came to no finite numbers, and why. query: the one that is not finite; "" if training was."""

    reason: str
    query: str = ""


class Kept(NamedTuple):
    """The kept models of a retraining, and the conditions under which it was done."""

    model: str
    baseline_model: str
    conditions: dict[str, int]


class Made(NamedTuple):
    """What a retraining was computed with, as far as a bank has to be of one kind."""

    device: str
    hardware: str
    torch: str

    def __str__(self) -> str:
        return f"{self.device}, {self.hardware}, torch {self.torch}"


UNKNOWN = Made("not recorded", "hardware not recorded", "?")  # lines of an earlier version


class Bank:
    """retrains*.jsonl of a validation folder.

    Args:
        identity: Hash of the training; lines of another are ignored.
        queries: Hash of each query by name; values of another query of the name are ignored.
        columns: Names of the query columns, each its query's own or NAME/part.
        writer: Ends the name of this process's own file.
        made: What this process computes with.
    """

    def __init__(
        self,
        folder: Path,
        identity: str,
        queries: dict[str, str],
        columns: Sequence[str],
        writer: str = "",
        made: Made = UNKNOWN,
    ) -> None:
        self.folder, self.identity, self.queries, self.columns = folder, identity, queries, list(columns)
        self.made = made
        self.path = folder / f"retrains{writer}.jsonl"
        self.known: dict[str, Retrained] = {}
        self.failed: dict[str, str] = {}
        self.kept: dict[str, Kept] = {}
        self.kinds: dict[Made, int] = {}  # retrainings by what they were made with
        self._parts: dict[str, dict[str, tuple[float, float]]] = {}  # by key and conditions: columns → values
        self.read()

    def read(self) -> None:
        """Take in what other processes have written since."""
        self.kinds = {}
        for path, number, entry in bank_lines(self.folder):
            try:
                self._take(entry)
            except (ValueError, KeyError, TypeError) as error:
                raise _no_retraining(path, number, error) from error

    def done(self, key: str, *, model: bool = False) -> bool:
        """Whether a set need not be retrained without: its values are known (and its model), or that it fails."""
        return (key in self.known and (not model or key in self.kept)) or key in self.failed

    def baseline(self, conditions: dict[str, int]) -> Retrained | None:
        """The query values with everything, trained under these conditions."""
        return self.known.get(_key(BASELINE, conditions))

    def model(self, key: str, conditions: dict[str, int] | None = None) -> Kept | None:
        """The kept models of a set, of these conditions if there are such."""
        return (self.kept.get(_key(key, conditions)) if conditions else None) or self.kept.get(key)

    def add(self, retrainings: Sequence[tuple[LeftOut, Retrained | Failed]], conditions: dict[str, int]) -> None:
        """Append retrainings that were done under `conditions`, in one write."""
        make_folder(self.folder)
        entries = [
            {
                "key": left_out.key, "name": left_out.name, "fraction": left_out.fraction, "weight": left_out.weight,
                "identity": self.identity, "queries": self.queries, **self._result(retrained),
                "conditions": conditions, "made": self.made._asdict(),
            }
            for left_out, retrained in retrainings
        ]  # fmt: skip
        append_line(self.path, "\n".join(json.dumps(entry, allow_nan=False) for entry in entries), durable=True)
        for entry in entries:
            self._take(entry)

    def refuse_mixture(self, *, adding: bool) -> None:
        """Refuse a bank of several kinds of hardware or versions of torch.

        Args:
            adding: Whether this process is about to add to it.
        Raises:
            RunError: With what there is of each kind.
        """
        kinds = dict(self.kinds)
        if adding:
            kinds.setdefault(self.made, 0)
        if len(kinds) > 1:
            listed = "\n  ".join(f"{number} lines: {kind}" for kind, number in kinds.items())
            here = " (0 lines: this machine, which would add to them)" if 0 in kinds.values() else ""
            raise RunError(
                f"the bank in {self.folder} would mix retrainings of {len(kinds)} kinds{here}:\n  {listed}\n"
                "Retrainings on different hardware were seen to differ by up to 3e-3 nats, as much as small sets of "
                "data do. Go on where the bank was begun, or move the retrains*.jsonl of the others away; `retrograd "
                "bank` lists them."
            )

    def _result(self, retrained: Retrained | Failed) -> dict[str, Any]:
        if isinstance(retrained, Failed):
            return {"failed": retrained.reason, **({"query": retrained.query} if retrained.query else {})}
        numbers = {"values": retrained.values, "baseline": retrained.baseline}
        models = {"model": retrained.model, "baseline_model": retrained.baseline_model} if retrained.model else {}
        return {**{name: dict(zip(self.columns, values, strict=True)) for name, values in numbers.items()}, **models}

    def _take(self, entry: dict[str, Any]) -> None:
        if entry["identity"] != self.identity:
            return
        made = Made(**entry["made"]) if "made" in entry else UNKNOWN
        self.kinds[made] = self.kinds.get(made, 0) + 1
        same = {name for name, digest in self.queries.items() if entry["queries"].get(name) == digest}
        if "failed" in entry:
            of = entry.get("query", "")
            if (of in same) if of else True:
                self.failed[entry["key"]] = str(entry["failed"])
            return
        places = (entry["key"], _key(entry["key"], entry["conditions"]))
        if entry.get("model"):
            kept = Kept(entry["model"], entry["baseline_model"], entry["conditions"])
            self.kept |= dict.fromkeys(places, kept)
        columns = [name for name in self.columns if _query_of(name) in same]
        pairs = {name: (entry["values"][name], entry["baseline"][name]) for name in columns}
        if not all(math.isfinite(value) for pair in pairs.values() for value in pair):
            return  # an older version banked what had diverged; it is trained again, for the reason
        parts = self._parts.setdefault(places[1], {})
        parts |= pairs
        if len(parts) == len(self.columns):
            values, baseline = ([parts[name][side] for name in self.columns] for side in (0, 1))
            models = self.kept.get(places[1], Kept("", "", {}))[:2]
            self.known |= dict.fromkeys(places, Retrained(values, baseline, *models))


def bank_lines(folder: Path) -> Iterator[tuple[Path, int, dict[str, Any]]]:
    """Every line of every file of a bank: its file, number and content.

    Raises:
        RunError: For a line that is not JSON.
    """
    for path in sorted(folder.glob("retrains*.jsonl")):
        for number, line in enumerate(read_lines(path), 1):
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise _no_retraining(path, number, error) from error
            yield path, number, entry


def _no_retraining(path: Path, number: int, error: Exception) -> RunError:
    return RunError(
        f"{path}, line {number}, is no retraining ({error}). Delete the line and run the same command again; only that "
        "retraining is repeated."
    )


def _query_of(column: str) -> str:
    return column.partition("/")[0]


def _key(key: str, conditions: dict[str, int]) -> str:
    return f"{key} {sorted(conditions.items())}"
