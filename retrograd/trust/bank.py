"""The bank of retrainings: a line for each, by the set that was left out; what is in it is never trained again.

A retraining that diverged is in it with the reason and no numbers. Every process appends to a file of its own and all
read all files, so that ranks, machines and later calls share one bank; copying files into one folder merges them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from retrograd.durable import make_folder
from retrograd.runs.errors import RunError
from retrograd.runs.files import append_line, read_lines

__all__ = ["BASELINE", "Bank", "Failed", "LeftOut", "Retrained"]


class LeftOut(NamedTuple):
    """A set to leave out.

    Args:
        name: For people.
        fraction: Its share of all documents (or tokens).
        places: Flat places in the data weights, ascending.
    """

    name: str
    fraction: float
    places: np.ndarray

    @property
    def key(self) -> str:
        """Hash of the places."""
        found = hashlib.sha256(np.asarray(self.places, dtype="<i8").tobytes()).hexdigest()[:16]
        return self.name if self.name == BASELINE else found


class Retrained(NamedTuple):
    """Query values in nats, [K]: without the set, and with everything under the same conditions."""

    values: list[float]
    baseline: list[float]


class Failed(NamedTuple):
    """A retraining that came to no finite numbers, and why."""

    reason: str


BASELINE = "baseline"


class Bank:
    """retrains*.jsonl of a validation folder.

    Args:
        identity: Hash of the training; lines of another are ignored.
        queries: Hash of each query by name; lines from before one of them was asked are ignored.
        columns: Names of the query columns.
        writer: Ends the name of this process's own file.
    """

    def __init__(
        self, folder: Path, identity: str, queries: dict[str, str], columns: Sequence[str], writer: str = ""
    ) -> None:
        self.folder, self.identity, self.queries, self.columns = folder, identity, queries, list(columns)
        self.path = folder / f"retrains{writer}.jsonl"
        self.known: dict[str, Retrained] = {}
        self.failed: dict[str, str] = {}
        self.read()

    def read(self) -> None:
        """Take in what other processes have written since."""
        for path in sorted(self.folder.glob("retrains*.jsonl")):
            for number, line in enumerate(read_lines(path), 1):
                try:
                    self._take(json.loads(line))
                except (ValueError, KeyError, TypeError) as error:
                    raise RunError(
                        f"{path}, line {number}, is no retraining ({error}). Delete the line and run the same command "
                        "again; only that retraining is repeated."
                    ) from error

    def done(self, key: str) -> bool:
        """Whether a set need not be retrained without: its values are known, or that it fails."""
        return key in self.known or key in self.failed

    def baseline(self, conditions: dict[str, int]) -> list[float] | None:
        """The query values with everything, trained under these conditions."""
        found = self.known.get(_key(BASELINE, conditions))
        return found.values if found else None

    def add(self, found: Sequence[tuple[LeftOut, Retrained | Failed]], conditions: dict[str, int]) -> None:
        """Append retrainings that were done under `conditions`, in one write."""
        make_folder(self.folder)
        entries = [
            {
                "key": one.key, "name": one.name, "fraction": one.fraction, "identity": self.identity,
                "queries": self.queries, **self._result(retrained), "conditions": conditions,
            }
            for one, retrained in found
        ]  # fmt: skip
        append_line(self.path, "\n".join(json.dumps(entry, allow_nan=False) for entry in entries), durable=True)
        for entry in entries:
            self._take(entry)

    def _result(self, retrained: Retrained | Failed) -> dict[str, Any]:
        if isinstance(retrained, Failed):
            return {"failed": retrained.reason}
        return {name: dict(zip(self.columns, part, strict=True)) for name, part in retrained._asdict().items()}

    def _take(self, entry: dict[str, Any]) -> None:
        same = all(entry["queries"].get(name) == digest for name, digest in self.queries.items())
        if entry["identity"] != self.identity or not same:
            return
        if "failed" in entry:
            self.failed[entry["key"]] = str(entry["failed"])
            return
        values, baseline = ([entry[part][name] for name in self.columns] for part in ("values", "baseline"))
        if not all(map(math.isfinite, [*values, *baseline])):
            return  # an older version banked what had diverged; it is trained again, for the reason
        self.known[_key(entry["key"], entry["conditions"])] = Retrained(values, baseline)
        self.known[entry["key"]] = Retrained(values, baseline)


def _key(key: str, conditions: dict[str, int]) -> str:
    return f"{key} {sorted(conditions.items())}"
